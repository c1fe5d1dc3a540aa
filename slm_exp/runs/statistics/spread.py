"""Mean and interval over seeds, by Student's distribution."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from slm_exp.runs.statistics.scores import standard_error

UNINTERESTING = ("tracking/", "runtime/", "cache/", "save_model")
"""Settings that change no result, by how `tracking.base.flat` names them."""


class Spread(NamedTuple):
    """Values of runs that differ in their seed alone."""

    mean: float
    half: float | None
    """Half the width of the 95 % interval of the mean; None for one value."""


def spread(values: Sequence[float]) -> Spread:
    """Mean and 95 % interval of at least one value."""
    stderr = standard_error(values)
    half = None if stderr is None else student_quantile(0.975, len(values) - 1) * stderr
    return Spread(math.fsum(values) / len(values), half)


def is_seed(path: str) -> bool:
    """Whether a setting, by its path, only draws another sample of the same: `seed`, `calibration/seed`."""
    return path.rpartition("/")[2] == "seed"


def differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings, by their paths, in which some configs differ. One that another member of its group implies
    (`method/protect_last` where only `method` differs) is none."""
    known = [config for config in configs if config]
    paths = [path for path in dict.fromkeys(p for config in known for p in config)
             if not path.startswith(UNINTERESTING) and len({repr(c.get(path)) for c in known}) > 1]

    def implied(path: str) -> bool:
        name = f"{path.partition('/')[0]}/name"
        pairs = {(repr(c.get(name)), repr(c.get(path))) for c in known}
        return path != name and name in paths and len({member for member, _ in pairs}) == len(pairs)

    return [path for path in paths if not implied(path)]


def by_seed(configs: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Which runs differ in nothing but seeds, by their numbers, in the order of the first of each. `configs`: every
    setting by its path."""
    groups: dict[str, list[int]] = {}
    for number, config in enumerate(configs):
        same = sorted((path, repr(value)) for path, value in config.items()
                      if not is_seed(path) and not path.startswith(UNINTERESTING))
        groups.setdefault(repr(same), []).append(number)
    return list(groups.values())


def student_two_sided(t: float, freedom: int) -> float:
    """Probability that Student's t lies further from 0 than `t` >= 0."""
    from scipy.special import stdtr  # a fifth of a second, which tables without seeds do not need

    return float(2 * stdtr(freedom, -t))


def student_quantile(share: float, freedom: int) -> float:
    """The value below which `share` of Student's distribution lies."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, share))
