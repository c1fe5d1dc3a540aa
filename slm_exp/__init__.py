"""Sliding layer merging as a config-driven experiment: analyse, merge, recover, measure, record.

From Python: `from slm_exp import compose, run, load, find_plan, apply, recover, evaluate, read_run, read_runs`; see
docs/python.md. They load on first use, so that importing the package takes no time.
"""

from __future__ import annotations

import importlib
import os
import warnings
from typing import TYPE_CHECKING, Any

from slm_exp.core.version import __version__ as __version__

if TYPE_CHECKING:
    from slm_exp.launch.api import apply, compose, evaluate, find_plan, load, read_run, read_runs, recover, run

__all__ = ["apply", "compose", "evaluate", "find_plan", "load", "read_run", "read_runs", "recover", "run"]

# Threads that wait for each other should sleep, not spin: where another process wants the same cores, torch's CPU
# kernels become several times slower otherwise. Read once, when torch loads; an own setting wins.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.filterwarnings("ignore", "IProgress not found")  # tqdm's, in a notebook, of bars that nobody draws
    return getattr(importlib.import_module("slm_exp.launch.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
