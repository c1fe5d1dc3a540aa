"""Tests between two models that answered the same documents, and the correction for many of them.

Sources: McNemar, Psychometrika 12 (1947), in its exact binomial form; Efron and Tibshirani, An Introduction to the
Bootstrap (1993), chapter 16; Holm, Scandinavian Journal of Statistics 6 (1979).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slm_exp.runs.statistics.scores import standard_error
from slm_exp.runs.statistics.spread import student_two_sided

LEVEL = 0.05
"""A difference counts where its corrected p-value is below this."""
DRAWS = 10_000
TABLE = 2_000_000
"""Counts held at a time."""


@dataclass(frozen=True)
class Difference:
    """How far a second model's score lies above a first one's, and what chance would give."""

    value: float
    """Second minus first, in the scores' own unit."""
    stderr: float | None
    """Over documents; None where one document allows none."""
    low: float | None
    high: float | None
    """95 % interval over documents."""
    p: float
    """Two-sided."""
    test: str
    """What gave p: `mcnemar`, `bootstrap`, the latter with `+ t` when seeds were tested too; `normal` without pairs."""


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided p-value of the exact McNemar test.

    Args:
        gained: documents that only the second model answers right.
        lost: documents that only the first model answers right.
    Returns:
        Twice the smaller tail of Binomial(gained + lost, 1/2), at most 1. Exact in integers at any size.
    """
    n, tail, term = gained + lost, 0, 1
    for k in range(min(gained, lost) + 1):
        tail += term
        term = term * (n - k) // (k + 1)
    return min(1.0, 2 * tail / 2**n)


def bootstrap(differences: Sequence[np.ndarray], draws: int = DRAWS, seed: int = 0) -> Difference:
    """The mean over tasks of the mean difference over documents, by resampling the documents of every task.

    Args:
        differences: per task [S, N_task]: second minus first on the same document, for each of S pairs of runs (the
            same S everywhere). Resampled are documents; a document's S differences stay together.
        draws: resamples. The smallest p-value is 1 / (draws + 1).
        seed: the same differences and seed give the same result on any machine.
    Returns:
        p is the share of resamples that lie as far from the difference as the difference from 0; never below the
        sign test's smallest p-value for as many documents as differ, which few resamples would miss.
    Cost: a document matters by its differences only, so a task costs draws x (distinct differences U), not x N.
    """
    rng = np.random.RandomState(seed)  # the one generator whose numbers numpy promises never to change
    means_R, value, differing = np.zeros(draws), 0.0, 0
    for at_SN in differences:
        total_U, count_U = np.unique(at_SN.sum(axis=0), return_counts=True)
        block = max(1, TABLE // len(total_U))  # of draws at a time: the numbers come in the same order
        means_R += np.concatenate([
            rng.multinomial(at_SN.shape[1], count_U / count_U.sum(), size=min(block, draws - start)) @ total_U
            for start in range(0, draws, block)]) / at_SN.size
        value += float(count_U @ total_U) / at_SN.size
        differing += int(count_U[total_U != 0].sum())
    means_R, value = means_R / len(differences), value / len(differences)
    far = int((np.abs(means_R - value) >= abs(value) - 1e-12).sum())
    p = max((1 + far) / (draws + 1), min(1.0, 2.0 ** (1 - differing)))
    low, high = np.quantile(means_R, (0.025, 0.975))
    if any(at_SN.shape[1] < 2 for at_SN in differences):
        return Difference(value, None, None, None, p, "bootstrap")
    return Difference(value, float(means_R.std()), float(low), float(high), p, "bootstrap")


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected by Holm's step-down method, in the order given: all claims together err at most at LEVEL."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    out, floor = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        floor = max(floor, min(1.0, (len(order) - rank) * p_values[i]))
        out[i] = floor
    return out


def paired_t(differences: Sequence[float]) -> float:
    """Two-sided p-value of Student's test that paired values differ by 0 on average; 1 for fewer than two pairs."""
    mean, stderr = math.fsum(differences) / len(differences), standard_error(differences)
    if stderr is None or mean == 0:
        return 1.0
    return student_two_sided(abs(mean) / stderr, len(differences) - 1) if stderr > 0 else 0.0
