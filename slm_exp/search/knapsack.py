"""The cheapest set of changes that is enough: one of several for each of many parts, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array


class Option(NamedTuple):
    """One thing that may become of a part."""

    price: float
    gain: float
    """What it takes away, in the unit of the budget."""


def cheapest(parts: Sequence[Sequence[Option]], need: float) -> list[int]:
    """One option of every part, by number: those of least price together whose gains sum to `need` or more.

    The multiple-choice knapsack, solved as a mixed-integer program to a gap of zero (HiGHS, by scipy).
    `need`: in the unit of the gains.
    Raises ValueError: the largest gains together are less.
    Cost: a second for 60 parts of two options, or 30 of 25.
    """
    options = [option for part in parts for option in part]
    of = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    most = sum(max(option.gain for option in part) for part in parts)
    if most < need:
        raise ValueError(f"all changes together take {most:g} away, less than {need:g}")
    scale = need or most or 1.0  # gains of order one, as the solver's tolerances want it
    gains = np.array([option.gain for option in options]) / scale
    one = csr_array((np.ones(len(options)), (of, np.arange(len(options)))))
    rules = [LinearConstraint(one, 1, 1), LinearConstraint(gains[None], need / scale, np.inf)]
    prices = np.array([option.price for option in options])
    found = milp(prices / max(1e-300, np.abs(prices).max()), integrality=np.ones(len(options)), bounds=Bounds(0, 1),
                 constraints=rules, options={"mip_rel_gap": 0.0})
    if found.x is None:
        raise ValueError(f"no such set: {found.message}")
    return [int(np.flatnonzero(found.x[of == i] > 0.5)[0]) for i in range(len(parts))]
