"""Plans of a size asked for: the threshold path, followed only where that size can still be reached."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slm_exp.errors import ConfigError, PlanError
from slm_exp.search.path import Branch, PathPlan, Scores, follow
from slm_exp.search.progress import LOG_EVERY_S

if TYPE_CHECKING:
    from slm_exp.models.base import ModelHandle
    from slm_exp.search.state import Candidate, SearchState

log = logging.getLogger(__name__)

BUDGET = 400
"""Candidates scored for a size where no budget is set."""


@dataclass(frozen=True)
class Found:
    """The best plan of a size, and how sure that is."""

    plan: PathPlan
    complete: bool
    """False when the budget ended the search: a better plan of this size may exist."""
    neighbours: tuple[PathPlan, ...]
    """What a threshold just below and just above the plan's interval gives, where range and budget allow."""
    met: tuple[PathPlan, ...]
    """Every plan that the search came upon, of this size and of others."""


def best_of_size(
    scores: Scores, start: SearchState, n_layers: int, layers: int, low: float, high: float,
    commit_open_window: bool = True, max_evaluations: int | None = None,
) -> Found:
    """Among the plans of thresholds [low, high) that leave `layers` layers, the one with the best final score.

    Raises:
        PlanError: no threshold in the range leaves that many layers (or the budget ended first); names the nearest.
    """
    budget = BUDGET if max_evaluations is None else max_evaluations
    asked: set[Candidate] = set()
    with watching(low, high, f"search for {layers} layers") as show:
        path = follow(scores, start, n_layers, low, high, commit_open_window, budget,
                      wanted=lambda sizes: layers in sizes, show=show, asked=asked)
    of_size = [p for p in path.plans if p.n_layers == layers]
    if not of_size:
        met = sorted({p.n_layers for p in path.plans}, key=lambda n: abs(n - layers))[:2]
        near = f" Nearest sizes met: {', '.join(map(str, sorted(met)))}." if met else ""
        why = ("" if path.complete else f" {path.evaluations} candidates were scored, then method.max_evaluations = "
               f"{budget} ended the search; raise it.")
        raise PlanError(f"no threshold in [{low:g}, {high:g}) leaves {layers} of {n_layers} layers.{near}{why} "
                        "Another rule or similarity reaches other sizes; method.threshold_range widens the search.")
    best = max(of_size, key=lambda p: p.final_score)
    beside = [t for t in (math.nextafter(best.low, -math.inf), best.high) if low <= t < high]
    neighbours = [
        plan
        for t in beside
        for plan in follow(scores, start, n_layers, t, math.nextafter(t, math.inf), commit_open_window, budget,
                           asked=asked).plans
    ]
    return Found(best, path.complete, tuple(neighbours), (*path.plans, *neighbours))


def layers_for_ratio(handle: ModelHandle, ratio: float, fewest: int) -> int:
    """How many layers are left when about `ratio` of the parameters is gone: the nearest size. Loads no weights.

    Args:
        fewest: layers that any plan leaves.
    Raises:
        ConfigError: even the nearest size is off by more than one layer's share; names it and its ratio.
    """
    from slm_exp.models.base import count_params, empty_model

    total = handle.n_params
    share = count_params(handle.layout.layers(empty_model(handle.config))) / handle.n_layers / total
    layers = min(range(fewest, handle.n_layers + 1), key=lambda n: abs((handle.n_layers - n) * share - ratio))
    reached = (handle.n_layers - layers) * share
    if abs(reached - ratio) > share:
        raise ConfigError(
            f"method.target_ratio = {ratio}; expected a share of the parameters that removing layers can reach. The "
            f"nearest is {reached:.3f} ({layers} of {handle.n_layers} layers left); each layer is {share:.1%}."
        )
    return layers


class watching:  # noqa: N801 - reads as a verb in `with watching(...)`
    """Show how much of a threshold range is decided: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, low: float, high: float, what: str) -> None:
        self.low, self.high, self.what = low, high, what

    def __enter__(self) -> Callable[[Branch, int], None]:
        from tqdm import tqdm

        form = "{desc}: {percentage:3.0f}% of thresholds |{bar}| {elapsed}{postfix}"
        self.bar = tqdm(total=self.high - self.low, desc=self.what, bar_format=form, disable=not sys.stderr.isatty())
        self.logged = time.monotonic()
        return self._show

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def _show(self, branch: Branch, scored: int) -> None:
        # from the highest threshold down, so what lies above the branch is decided
        about = f"{scored} candidates scored, below {branch.high:.4f} to do"
        self.bar.n = self.high - branch.high
        self.bar.set_postfix_str(about, refresh=True)
        if self.bar.disable and time.monotonic() - self.logged > LOG_EVERY_S:
            self.logged = time.monotonic()
            log.info("%s: %s", self.what, about)
