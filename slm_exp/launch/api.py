"""The experiment from Python, step by step: what `from slm_exp import ...` gives. See docs/python.md.

A setting is an override, as on the command line (`"method.threshold=0.8"`). Steps that a run or another notebook has
carried out come from the stage cache, under the same keys.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from slm_exp.core import plugins
from slm_exp.core.cache.store import StageStore
from slm_exp.core.errors import ConfigError, SlmError
from slm_exp.core.types import CalibrationTokens, LayerSimilarity, MergePlan
from slm_exp.evaluation.base import EvalReport
from slm_exp.launch.compose import compose_run
from slm_exp.launch.hydra_compat import is_sweep
from slm_exp.merging.surgery import apply_plan
from slm_exp.methods.from_plan import FromPlan
from slm_exp.models.base import ModelHandle
from slm_exp.pipeline.config import RunConfig
from slm_exp.pipeline.run import run as carry_out
from slm_exp.pipeline.stages import CALIBRATE, EVALUATE, LOAD, SIMILARITY, Experiment, check_model, recoveries, steps
from slm_exp.reporting.heatmap import heatmap
from slm_exp.runs.record import FILE, Run, check_writable
from slm_exp.runs.tracking.base import flat

if TYPE_CHECKING:
    import pandas as pd

Where = str | Path
Plan = MergePlan | Run | Where
"""A plan; or a run, its folder, or a plan.json that holds one."""


def compose(*overrides: str, plugin: Sequence[Where] = ()) -> RunConfig:
    """The checked config of one run, as the command line would have it.

    Args:
        plugin: files that declare members of config groups, as `--plugin FILE` (docs/plugins.md).
    Raises ConfigError: names the field, what came, what was wanted.
    """
    for given in overrides:
        if given.lstrip("+~").startswith(("hydra.", "hydra/")):
            raise ConfigError(f"{given}: Hydra's own settings belong to a command line; run(..., folder=FOLDER) says "
                              "where a run goes.")
        if is_sweep(given) or given.startswith("sweep="):
            raise ConfigError(f"{given}: several values make a sweep; expected one run. Call run() for each, or "
                              "python -m slm_exp -m with these overrides.")
    plugins.add(plugin)
    return compose_run(overrides)


def run(*overrides: str, folder: Where | None = None, plugin: Sequence[Where] = ()) -> Run:
    """The whole experiment, as `python -m slm_exp` does it. A finished one is returned at once.

    Args:
        folder: where its files go; null is `outputs/<run_id>`.
    Raises ConfigError: before anything loads. StageError: a stage failed; the record is on disk.
    """
    cfg = compose(*overrides, plugin=plugin)
    if cell := next((p for p in cfg.plugins if not p.digest), None):
        raise ConfigError(f"a member of this run is defined in {cell.name}, which is no file, so no command could "
                          "repeat it. Write it to a file and give plugin=[FILE].")
    if cfg.save_model is None:
        cfg.save_model = True
    where = Path(folder or f"outputs/{cfg.run_id}")
    check_writable(where)
    carry_out(cfg, where, overrides)
    return read_run(where)


class Picture(Figure):
    """A matplotlib figure that a notebook shows, whatever backend is set."""

    def _repr_png_(self) -> bytes:
        out = io.BytesIO()
        self.savefig(out, format="png")
        return out.getvalue()


class Study:
    """A dense model with the settings it is compressed and measured by; what `load` gives.

    Weights load when a step needs them, once; no step changes them.
    """

    def __init__(self, overrides: Sequence[str], plugin: Sequence[Where] = ()) -> None:
        self.overrides = tuple(overrides)
        self.cfg = compose(*overrides, plugin=plugin)
        x = self.experiment()
        LOAD.carry_out(x)
        self.dense: ModelHandle = x.dense

    def __repr__(self) -> str:
        return f"<{self.dense.name}: {self.dense.n_layers} layers, {self.dense.n_params / 1e6:,.1f} M parameters>"

    def experiment(self) -> Experiment:
        """A fresh one, as `pipeline.run` carries it out."""
        return Experiment(self.cfg, Path(), StageStore(self.cfg.cache_folder))

    def with_(self, *overrides: str) -> Study:
        """The same model under further overrides, which win. Its weights are shared. Raises ConfigError: as `compose`;
        or the overrides name another model, or what this one cannot do."""
        if not overrides:
            return self
        new = object.__new__(Study)
        new.overrides = (*self.overrides, *overrides)
        new.cfg, new.dense = compose(*new.overrides), self.dense
        if new.cfg.model != self.cfg.model or new.cfg.runtime != self.cfg.runtime:
            raise ConfigError(f"{' '.join(overrides)}: expected settings for the model that is loaded. Load the other "
                              "one with load().")
        check_model(new.cfg, new.dense)
        return new

    @cached_property
    def tokens(self) -> CalibrationTokens:
        """The calibration's, [N, T] ids in `.tokens_NT`."""
        x = self._at()
        CALIBRATE.carry_out(x)
        return x.tokens

    @cached_property
    def similarity(self) -> LayerSimilarity:
        """CKA of all layers' outputs on the tokens, [L, L] in `.matrix_LL`. Cost: one pass over the layers."""
        x = self._at()
        x.tokens = self.tokens
        SIMILARITY.carry_out(x)
        return x.similarity

    def plot(self, plan: Plan | None = None) -> Picture:
        """The similarity matrix, with what a plan does drawn over it; `.savefig(FILE)` keeps it."""
        title = f"{self.dense.name}: layer similarity ({self.similarity.kernel} CKA)"
        made = None if plan is None else self.plan(plan)
        return heatmap(self.similarity, made, title, Picture)  # type: ignore[return-value]

    def plan(self, given: Plan) -> MergePlan:
        """A plan for this model, from whatever holds it. Raises ConfigError: it is for another, or there is none."""
        if isinstance(given, MergePlan):
            return given
        return FromPlan(path=str(given.folder if isinstance(given, Run) else given)).plan_for(self.dense)

    def _at(self, plan: MergePlan | None = None) -> Experiment:
        """An experiment with this model loaded, and a plan carried out."""
        x = self.experiment()
        x.dense = x.model = self.dense
        x.plan = MergePlan(self.dense.n_layers) if plan is None else plan
        return x


def load(*overrides: str, plugin: Sequence[Where] = ()) -> Study:
    """Open a model: `load("model=tiny")`, `load("model=hf", "model.path=FOLDER", "method.target_layers=26")`. Raises
    ConfigError, ArchitectureError, DataError: what cannot work with this model, before its weights load."""
    return Study(overrides, plugin)


def find_plan(study: Study, *overrides: str) -> MergePlan:
    """Decide what is merged, removed and narrowed, as the run of these settings would; touches no weights.

    Args:
        overrides: on top of the study's, e.g. `"method=shortgpt", "method.target_layers=26"`.
    Cost: the search's (`slm plan` says it beforehand).
    """
    x = (here := study.with_(*overrides))._at()
    x.tokens, x.similarity = here.tokens, here.similarity
    for step in steps(here.cfg):
        if step.name in ("load", "width", "plan", "merge"):
            for stage in step.stages:
                if stage is not LOAD and stage.when(x):
                    stage.carry_out(x)
    return x.plan


def apply(study: Study, plan: Plan) -> ModelHandle:
    """The model that a plan makes of the study's, `.model` of which is transformers' own. Shares all weights that stay.

    A plan that names no merge rule is carried out by the study's.
    Raises ConfigError, PlanError: the plan is for another model, or by a rule that is not there.
    """
    made = study.plan(plan)
    rule = study.cfg.merge_rule
    if made.groups and made.rule and made.rule != rule.name:
        rule = compose(*study.overrides, f"merge_rule={made.rule}").merge_rule
    return apply_plan(study.dense, made, rule)


def recover(study: Study, plan: Plan, *overrides: str) -> ModelHandle:
    """The plan's model after the recovery of these settings: `recover(study, plan, "recovery=reconstruct")`.

    Cost: the recovery's; a result with the same inputs comes from the stage cache.
    """
    here = study.with_(*overrides)
    x = here._at(here.plan(plan))
    x.model, x.tokens = apply(here, x.plan), here.tokens
    with tempfile.TemporaryDirectory(prefix="slm_exp-recover-") as folder:
        x.folder = Path(folder)
        for stage in recoveries(here.cfg):
            stage.carry_out(x)
    return x.model


def evaluate(study: Study, model: ModelHandle | None = None, *overrides: str) -> EvalReport:
    """Measure a model by these settings' evaluation; the study's dense one where none is given. Raises DataError:
    documents or texts are missing. ProtocolError: see `evaluation.protocol` and `dense_range`."""
    here = study.with_(*overrides)
    evaluation, x = here.cfg.evaluation, here._at()
    x.model = model or here.dense
    EVALUATE.carry_out(x)
    evaluation.accept(x.report, dense=x.model.digest == here.dense.digest)
    return x.report


def read_run(folder: Where) -> Run:
    """A run from its folder: `.record` is typed, `.plan` and `.similarity` are read when they are wanted. Raises
    SlmError: there is no record, or it cannot be read."""
    return Run.read(Path(folder))


def read_runs(*folders: Where) -> pd.DataFrame:
    """A row per run below these folders, whatever its state; a column per number and setting of its record.

    Columns are named by their place in record.json, as in the trackers (`config/method/threshold`, `layers/after`,
    `eval/compressed/perplexity/news`), besides `folder` and `state` (a damaged or killed run says so).
    Raises SlmError: there is no run below a folder, or a record that cannot be read.
    """
    import pandas as pd

    rows = []
    for run in (read_run(path) for folder in folders for path in _records(Path(folder))):
        known = flat(run.record.raw)
        rows.append({"folder": str(run.folder), "state": run.state, **known})
    return pd.DataFrame(rows)


def _records(folder: Path) -> Iterator[Path]:
    found = sorted(path.parent for path in folder.rglob(FILE))
    if not found:
        raise SlmError(f"{folder} holds no run; give the folder of a run (outputs/<run_id>), of a sweep, or above.")
    yield from found
