"""What a search goes by: numbers of a finished run, by name or by their place in its record."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from omegaconf import DictConfig

from slm_exp.core.errors import ConfigError, did_you_mean, require
from slm_exp.runs.record import Run
from slm_exp.runs.statistics.verdict import verdict_of

NAMED: dict[str, Callable[[Run], float | None]] = {
    "perplexity": lambda run: ratio.value if (ratio := verdict_of(run).perplexity_ratio) else None,
    "parameters": lambda run: None if (n := run.record.params.after) is None else n - run.record.params.zeroed,
    "average": lambda run: run.record.eval.compressed.average,
    "score": lambda run: run.record.plan.final_score,
}
"""Any other name is a place in record.json: eval.compressed.perplexity.news."""


def number_of(run: Run, name: str) -> float | None:
    """An objective of a run; None where it has none of that name, infinity where it is not finite."""
    if name in NAMED:
        return NAMED[name](run)
    value: Any = run.record.raw
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return None
        value = value[part]
    return float(value) if isinstance(value, int | float) else math.inf if value is None else None


def check_search(search: DictConfig) -> None:
    """Refuse settings of a search that cannot work. Raises ConfigError: names the field."""
    asked, where = [*search.minimize, *search.maximize], "hydra.sweeper.search"
    require(1 <= len(asked) <= 2 and len(set(asked)) == len(asked), f"{where}.minimize and maximize", asked,
            "one or two different numbers of a run, e.g. [perplexity,parameters]")
    for name in asked:
        field = f"{where}.{'minimize' if name in search.minimize else 'maximize'}"
        require("." in name or name in NAMED, field, name,
                f"{', '.join(NAMED)}, or a place in record.json (eval.compressed.perplexity.news)",
                did_you_mean(name, NAMED))
    require(search.n_trials >= 1, f"{where}.n_trials", search.n_trials, "a number >= 1")
    require(search.prune is None or search.prune >= 1, f"{where}.prune", search.prune, "null or a number >= 1")


def require_optuna() -> None:
    """Raises ConfigError: it is not installed here."""
    if find_spec("optuna") is None:
        raise ConfigError("a search needs Optuna, which is not installed here: pip install 'slm-exp[search]'")
