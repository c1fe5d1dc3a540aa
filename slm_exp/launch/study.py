"""The memory of a search: Optuna's study in a SQLite file, and what its trials were tried with.

A trial that was chosen and has not been told its values stays open: a search that goes on runs it again, so nothing is
lost to a kill, and a failed one is tried anew.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from slm_exp.core.errors import ConfigError
from slm_exp.launch.hydra_compat import Numbers

FILE = "search.db"
"""In the folder of the sweep."""


@dataclass(frozen=True)
class Tried:
    """A trial: its number, and the words that it adds to a job."""

    number: int
    overrides: tuple[str, ...]


class Study:
    """A search over axes. Its trials and their values are on disk at once.

    Args:
        folder: of the sweep.
        axes: what is chosen from, by key.
        minimize: for each objective, whether less of it is better.
        about: what makes two searches the same; another one does not go on in this folder.
    Raises ConfigError: the folder holds another search.
    """

    def __init__(self, folder: Path, axes: Mapping[str, Numbers | list[str]], minimize: Mapping[str, bool],
                 about: object, seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space = {key: _distribution(axis) for key, axis in axes.items()}
        self.minimize = minimize
        stored = optuna.storages.RDBStorage(f"sqlite:///{(folder / FILE).resolve()}")
        known = {study.study_name for study in optuna.get_all_study_summaries(stored)}
        said = json.dumps(about, sort_keys=True)
        if known and (before := optuna.load_study(study_name="search", storage=stored).user_attrs["about"]) != said:
            raise ConfigError(f"{folder} holds another search: {before}; this one is {said}. Give it a folder of its "
                              "own: hydra.sweep.dir=FOLDER.")
        self._study = optuna.create_study(
            storage=stored, study_name="search", load_if_exists=True,
            directions=["minimize" if less else "maximize" for less in minimize.values()])
        self._study.set_user_attr("about", said)
        # a sampler begins anew with each process: seeded by what there is, or it would repeat its first choices
        self._study.sampler = optuna.samplers.TPESampler(seed=seed + len(self._study.trials), constant_liar=True)
        for trial in self._study.trials:
            if trial.state == TrialState.RUNNING and trial.params.keys() != self.space.keys():  # killed as it chose
                self._study.tell(trial.number, state=TrialState.FAIL)

    def __len__(self) -> int:
        """Trials chosen so far; one that a kill kept from being chosen whole is none."""
        return sum(trial.params.keys() == self.space.keys() for trial in self._study.trials)

    @property
    def pruned(self) -> int:
        return sum(trial.state == TrialState.PRUNED for trial in self._study.trials)

    def every(self) -> Iterator[Tried]:
        """Trials that are measured or to be measured."""
        return (_tried(t) for t in self._study.trials if t.state in (TrialState.RUNNING, TrialState.COMPLETE))

    def unfinished(self) -> list[Tried]:
        return [_tried(t) for t in self._study.trials if t.state == TrialState.RUNNING]

    def ask(self) -> Tried:
        trial = self._study.ask(self.space)
        return _tried(self._study.trials[trial.number])

    def tell(self, tried: Tried, values: Sequence[float]) -> None:
        """Its objectives; a trial without a finite one teaches nothing, and is not repeated."""
        if all(map(math.isfinite, values)):
            self._study.tell(tried.number, list(values))
        else:
            self._study.tell(tried.number, state=TrialState.FAIL)

    def beaten(self, tried: Tried, screened: Sequence[float]) -> int:
        """How many earlier trials are as good in every number of the screening, and better in one. `screened`: less is
        better."""
        mine = list(screened)
        self._study.set_user_attr(f"screened {tried.number}", mine)
        known = self._study.user_attrs
        others = [known[name] for n in range(tried.number) if (name := f"screened {n}") in known]
        return sum(all(a <= b for a, b in zip(other, mine, strict=True)) and other != mine for other in others)

    def prune(self, tried: Tried) -> None:
        self._study.tell(tried.number, state=TrialState.PRUNED)

    def front(self) -> list[tuple[Tried, dict[str, float]]]:
        """The trials that no other beats in every objective, by the first one."""
        best = [(_tried(t), dict(zip(self.minimize, t.values, strict=True))) for t in self._study.best_trials]
        return sorted(best, key=lambda found: list(found[1].values()))


def _distribution(axis: Numbers | list[str]) -> BaseDistribution:
    if isinstance(axis, list):
        return CategoricalDistribution(axis)
    if axis.whole:
        return IntDistribution(int(axis.low), int(axis.high), axis.log, int(axis.step or 1))
    return FloatDistribution(float(axis.low), float(axis.high), axis.log, axis.step)


def _tried(trial: Any) -> Tried:
    """Six digits of a number: enough to tell settings apart, and a run's id does not hang on the rest."""
    words = (f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}"
             for key, value in trial.params.items())
    return Tried(trial.number, tuple(words))
