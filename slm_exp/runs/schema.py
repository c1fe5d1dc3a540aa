"""The contents of record.json as a typed document. Records of older versions lack some of it: see `Section`."""

# ruff: noqa: RUF012 (pydantic copies defaults)
from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from slm_exp.core.documents import Section, parse
from slm_exp.core.files import JsonObject
from slm_exp.core.plugins import Plugin
from slm_exp.evaluation.report import FreeText, SpeedCase

Scores = dict[str, int | float | str | None]
"""A task's entry: {acc, acc_stderr, acc_norm, acc_norm_stderr, n}, or a task's own metrics."""


class Device(Section):
    type: str = ""
    name: str = ""
    threads: int | None = None
    cpus: int | None = None


class Git(Section):
    commit: str = ""
    dirty: bool = False


class StageTime(Section):
    name: str
    seconds: float = 0.0
    cached: bool = False


class Failure(Section):
    type: str = ""
    message: str = ""
    stage: str | None = None

    @property
    def line(self) -> str:
        """Type and message."""
        return f"{self.type}: {self.message}" if self else ""


class Model(Section):
    name: str = ""
    note: str = ""
    digest: str | None = None
    random: bool = False
    """Weights that were never trained."""


class Calibration(Section):
    source: str = ""
    sample_ids: list[str] = []
    digest: str | None = None
    shape: list[int] = []

    @property
    def size(self) -> str:
        """`10 × 128`."""
        return " × ".join(map(str, self.shape))


class Layers(Section):
    before: int | None = None
    after: int | None = None

    def __bool__(self) -> bool:
        return self.before is not None and self.after is not None


class Parameters(Section):
    before: int | None = None
    after: int | None = None
    ratio_removed: float | None = None
    zeroed: int = 0
    """Those of removed sublayers, which stand in the checkpoint as zeros."""

    def __bool__(self) -> bool:
        return bool(self.before) and self.after is not None


class Cost(Section):
    """Of one model."""

    flops_per_token: float | None = None
    """Of a prompt; removed sublayers are not counted."""
    bytes: float | None = None
    """Of its weights in a checkpoint, where removed sublayers stand as zeros."""


class Costs(Section):
    length: int | None = None
    """Tokens of the prompt."""
    dense: Cost = Cost()
    compressed: Cost = Cost()


class WidthSizes(Section):
    """What is left of every layer."""

    heads: list[int] = []
    kv_heads: list[int] = []
    channels: list[int] = []


class Width(Section):
    method: str = ""
    ratio: float | None = None
    reached: float | None = None
    """Share of the decoder layers' parameters that is gone."""
    order: str = "after"
    uniform: bool = False
    sizes: WidthSizes = WidthSizes()


class RemovedSublayer(Section):
    layer: int
    kind: str


class SizeFound(Section):
    """One size that the search for a size came upon."""

    n_layers: int
    best_final_score: float | None = None
    flops_per_token: float | None = None
    latency_s: float | None = None


class BudgetMet(Section):
    """Of operations or time, as `core.types.BudgetReached`."""

    measure: str = ""
    limit: float | None = None
    reached: float | None = None
    dense: float | None = None
    what: str = ""


class SizeTarget(Section):
    complete: bool = True
    layers: int | None = None
    threshold: float | list[float] = []
    """That reaches the size, or the interval of those that do."""
    sizes: list[SizeFound] = []
    budget: BudgetMet = BudgetMet()


class Plan(Section):
    """What tables and pages quote of a plan; `core.types.MergePlan` is what is carried out."""

    method: str = ""
    rule: str = ""
    similarity: str = ""
    threshold: float | None = None
    final_score: float | None = None
    groups: list[list[int]] = []
    dropped: list[int] = []
    sublayers: list[RemovedSublayer] = []
    width: Width = Width()
    target: SizeTarget = SizeTarget()
    evaluations: int | None = None
    block_forwards: int | None = None

    @field_validator("groups")
    @classmethod
    def _pairs(cls, groups: list[list[int]]) -> list[list[int]]:
        if any(len(group) != 2 for group in groups):
            raise ValueError("expected [start, stop] for each.")
        return groups

    @property
    def merged(self) -> str:
        """`14-15, 25-27`; empty where nothing is."""
        return ", ".join(f"{start}-{stop - 1}" for start, stop in self.groups)

    @property
    def removed(self) -> str:
        """`3, attention of 7`; empty where nothing is."""
        return ", ".join([*map(str, self.dropped), *(f"{part.kind} of {part.layer}" for part in self.sublayers)])


class Measurement(Section):
    """What was measured on one model."""

    tasks: dict[str, Scores] = {}
    average: float | None = None
    perplexity: dict[str, float | None] = {}
    text: FreeText = FreeText()
    protocol: JsonObject = {}
    """{hash, fields, sources}, see evaluation/protocol.py."""

    @field_validator("protocol")
    @classmethod
    def _fields_are_a_mapping(cls, protocol: JsonObject) -> JsonObject:
        if not isinstance(protocol.get("fields") or {}, dict):
            raise ValueError(f"fields = {protocol['fields']!r}; expected a mapping.")
        if not isinstance((protocol.get("fields") or {}).get("perplexity") or {}, dict | list):
            raise ValueError(f"fields.perplexity = {protocol['fields']['perplexity']!r}; expected a mapping.")
        if not isinstance(protocol.get("hash") or "", str):
            raise ValueError(f"hash = {protocol['hash']!r}; expected text.")
        return protocol

    @field_validator("tasks", mode="before")
    @classmethod
    def _no_scores(cls, tasks: Any) -> Any:
        return {name: scores or {} for name, scores in tasks.items()} if isinstance(tasks, dict) else tasks

    def scores(self, task: str) -> Scores:
        """A task's entry; empty where it was not measured."""
        return self.tasks.get(task) or {}


class Measurements(Section):
    dense: Measurement = Measurement()
    compressed: Measurement = Measurement()

    @property
    def both(self) -> tuple[Measurement, Measurement]:
        return self.dense, self.compressed

    def of(self, which: str) -> Measurement:
        """Of the `dense` or the `compressed` model."""
        return self.dense if which == "dense" else self.compressed


class Estimated(Section):
    """A difference or a ratio of two models on the same documents."""

    value: float
    stderr: float | None = None
    low: float | None = None
    high: float | None = None
    """95 % interval."""
    p: float | None = None
    n: int | None = None
    """Documents, or chunks of text."""


class JudgedTask(Section):
    chance: float
    """What guessing scores, in [0, 1]."""
    mute: bool
    """Whether the dense model cannot be told from that, so that the task counts in no verdict."""
    n: int


class Verdict(Section):
    """What runs/statistics/verdict.py says of the compressed model."""

    outcome: str = ""
    sentence: str = ""
    """Begins with the outcome."""
    rules: int = 0
    perplexity_ratio: Estimated | None = None
    """Compressed to dense, the geometric mean over the texts."""
    texts: dict[str, Estimated] = {}
    """The ratio on each."""
    tasks_difference: Estimated | None = None
    """Compressed minus dense, the mean over tasks that are not mute, in [-1, 1]."""
    tasks: dict[str, JudgedTask] = {}

    def __bool__(self) -> bool:
        return bool(self.outcome)


class Examples(Section):
    train: int = 0
    held_out: int = 0


class RefittedLayer(Section):
    layer: int | None = None
    original: list[int] = []
    """The dense layers [start, stop) it was made of."""
    errors: list[float] = []


class Gain(Section):
    """Loss on held-out passages around a step of a chain."""

    before: float | None = None
    after: float | None = None


class WholeModel(Section):
    """What decided whether a recovery is kept: the loss on tokens that it was not fitted on."""

    rows: int | None = None
    before: float | None = None
    after: float | None = None
    kept: bool = True


class OneRecovery(Section):
    """What a training or a refit left."""

    name: str = ""
    """Of a step of a chain."""
    gain: Gain = Gain()
    whole_model: WholeModel = WholeModel()
    steps: int | None = None
    steps_planned: int | None = None
    best_step: int | None = None
    trained_parameters: int | None = None
    examples: Examples = Examples()
    loss: list[list[float]] = []
    """(step, loss), in training."""
    held_out_loss: list[list[float]] = []
    layers: list[RefittedLayer] = []

    @field_validator("examples", "layers", mode="before")
    @classmethod
    def _count_alone(cls, value: Any) -> Any:
        """Some recoveries say only how many."""
        return value if isinstance(value, dict | list) else None if value is None else {}


class Recovery(OneRecovery):
    """A recovery, or a chain of them."""

    steps: int | list[OneRecovery] | None = None  # type: ignore[assignment]

    @property
    def chain(self) -> list[OneRecovery]:
        return self.steps if isinstance(self.steps, list) else []


class Speed(Section):
    protocol: JsonObject = {}
    cells: list[SpeedCase] = []


class ResultFile(Section):
    bytes: int
    sha256: str


class Record(Section):
    """record.json."""

    run_id: str = ""
    status: str = ""
    group: str | None = None
    command: str = ""
    overrides: list[str] = []
    plugins: list[Plugin] = []
    """That members of the config came from."""
    config: JsonObject = {}
    """Every setting, with the member's name in each group."""
    versions: dict[str, str | None] = {}
    code: str | None = None
    """Digest of the package's source by syntax tree."""
    device: Device = Device()
    git: Git = Git()
    created: str = ""
    seconds: float | None = None
    stage: str | None = None
    """What a run that has not ended is at."""
    stages: list[StageTime] = []
    warnings: list[str] = []
    model: Model = Model()
    calibration: Calibration = Calibration()
    layers: Layers = Layers()
    params: Parameters = Parameters()
    costs: Costs = Costs()
    plan: Plan = Plan()
    eval: Measurements = Measurements()
    verdict: Verdict = Verdict()
    recovery: Recovery = Recovery()
    speed: Speed = Speed()
    error: Failure = Failure()
    files: dict[str, ResultFile] = {}
    """The files that are the result, by their path in the run's folder."""
    digest: str | None = None
    """Of the record itself, without this."""
    raw: JsonObject = Field(default={}, exclude=True, repr=False)
    """The record as it is on disk."""

    @model_validator(mode="before")
    @classmethod
    def _keep_raw(cls, data: Any) -> Any:
        return {**data, "raw": data} if isinstance(data, dict) else data

    def __bool__(self) -> bool:
        return bool(self.raw)

    @field_validator("device", mode="before")
    @classmethod
    def _named_device(cls, device: Any) -> Any:
        return {"name": device} if isinstance(device, str) else device

    @field_validator("config")
    @classmethod
    def _members_are_mappings(cls, config: JsonObject) -> JsonObject:
        wrong = [group for group in ("model", "method", "recovery", "evaluation", "cache")
                 if not isinstance(config.get(group) or {}, dict)]
        if wrong:
            raise ValueError(f"{wrong[0]} = {config[wrong[0]]!r}; expected a mapping.")
        return config

    @classmethod
    def of(cls, data: Any) -> Self:
        """A record from its JSON. Raises ValueError: where, what came, what was wanted."""
        return parse(cls, data)

    @property
    def words(self) -> list[str]:
        """What repeats the run, after `python -m slm_exp`: plug-ins and overrides."""
        return [*(f"--plugin={plugin.file}" for plugin in self.plugins if plugin.file), *self.overrides]

    def member(self, group: str) -> Mapping[str, Any]:
        """The settings of a config group; empty where the record has none."""
        return self.config.get(group) or {}

    def setting(self, path: str) -> Any:
        """A setting by its path, `method.threshold`; None where there is none."""
        found: Any = self.config
        for key in path.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        return found
