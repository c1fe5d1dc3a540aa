"""Jobs as few multirun commands."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Sequence

from slm_exp.core.format import override
from slm_exp.core.plugins import loaded
from slm_exp.core.plugins import words as plugin_words

Product = dict[str, tuple[str, ...]]
"""key -> values: every combination is a job."""


def commands(jobs: Sequence[Sequence[str]], name: str) -> list[str]:
    """Command lines that run the jobs, each job once, into one folder that `slm tables` reads.

    Args:
        jobs: overrides; no job twice.
        name: of the table; its runs go to outputs/multirun/NAME.
    """
    folder = override("hydra.sweep.dir", f"outputs/multirun/{name}")
    head = ["python", "-m", "slm_exp", *plugin_words(loaded()), "-m", folder]
    return [shlex.join([*head, *(f"{key}={','.join(values)}" for key, values in product.items())])
            for product in products(jobs)]


def products(jobs: Sequence[Sequence[str]]) -> list[Product]:
    """Jobs as grids: two grids that differ in the values of one key become one, until none do."""
    out: list[Product] = []
    for job in jobs:
        pairs = (override.partition("=") for override in job)
        out.append({key: (value,) for key, _, value in pairs})
    while alike := next(((i, j, key) for i, j in itertools.combinations(range(len(out)), 2)
                         if (key := _differ_in(out[i], out[j])) is not None), None):
        i, j, key = alike
        out[i] = out[i] | {key: (*out[i][key], *out.pop(j)[key])}
    return out


def _differ_in(a: Product, b: Product) -> str | None:
    """The one key whose values differ; None where there are more, or other keys."""
    if list(a) != list(b):
        return None
    apart = [key for key in a if a[key] != b[key]]
    return apart[0] if len(apart) == 1 else None
