"""A plan as mergekit's configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from slm_exp.core.errors import ConfigError, PlanError
from slm_exp.core.files import JsonObject, read_json
from slm_exp.core.registry import available
from slm_exp.core.types import Group, MergePlan
from slm_exp.core.version import __version__
from slm_exp.models.config_file import read_config_file
from slm_exp.models.layouts import FAMILIES
from slm_exp.models.packaged import Packaged
from slm_exp.runs.record import record_beside
from slm_exp.runs.schema import Record

FORMATS = ("mergekit",)
OUTPUTS = FAMILIES["llama"].outputs  # the same names in every family here
WEIGHTS: dict[str, Callable[[int], dict[int, float]]] = {
    "keep_low": lambda k: {0: 1.0},
    "keep_top": lambda k: {k - 1: 1.0},
    "top_layer": lambda k: {k - 1: 1.0},
    "mean": lambda k: dict.fromkeys(range(k), 1 / k),
    "sum_of_deltas": lambda k: {0: 2.0 - k, **dict.fromkeys(range(1, k), 1.0)},
}
"""What a group's merged projections are, as weights of its k members counted from the lowest; they sum to 1."""
WHOLE = ("keep_low", "keep_top")
"""Rules whose result is one layer as it is."""


def read_plan(source: Path, model: str | None) -> tuple[MergePlan, str, str | None]:
    """The plan, the dense model's place, and its dtype where a record says it.

    Raises:
        SlmError: no plan there, a record beside it that cannot be read, or nobody says of which model it is.
        PlanError: the run's model is more than its plan.
    """
    path = source / "plan.json" if source.is_dir() else source
    try:
        plan = MergePlan.from_json(read_json(path))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, PlanError) as error:
        why = f"there is no {path}" if isinstance(error, FileNotFoundError) else f"{path} is none ({error})"
        raise ConfigError(f"{source}; expected a run's folder or a plan.json: {why}.") from None
    record = record_beside(path)
    if (recipe := record.member("recovery").get("name", "none")) != "none":
        raise PlanError(f"{source}: recovery={recipe} changed weights after the plan, so the plan does not give that "
                        f"model. Take the checkpoint in {path.parent / 'model'}.")
    place = model or _place(record)
    if place is None:
        raise ConfigError(f"--model is missing; expected the dense model's folder or repo: {source} does not say one.")
    dtype = record.setting("model.dtype")
    return plan, place, dtype if dtype != "auto" else None


def _place(record: Record) -> str | None:
    """Where a run's dense model lies: its path, or its converted copy in the run's cache."""
    if path := record.setting("model.path"):
        return str(path)
    cache, member = record.setting("cache.dir"), available("model").get(str(record.setting("model.name")))
    if not cache or member is None or not issubclass(member, Packaged):
        return None
    try:
        folder = member().converted(Path(cache))
    except ConfigError:  # its package is not installed here, so which copy is its own is not known
        return None
    return str(folder) if (folder / "config.json").is_file() else None


def mergekit(plan: MergePlan, model: str, dtype: str | None, source: str = "") -> str:
    """YAML for mergekit 0.1.5: one document for mergekit-yaml, or several for mergekit-multi. Raises PlanError: what
    cannot be expressed, by name."""
    check(plan, model)
    head = {"dtype": dtype} if dtype else {}
    parts = {name: {"merge_method": "passthrough", **head, "slices": _slices(plan, model, place)}
             for name, place in _members(plan).items()}
    if len(parts) == 1:
        documents = [*parts.values()]
        command = "mergekit-yaml FILE FOLDER"
    else:
        mixed = [{"model": name, "parameters": {"weight": _weights(plan, at)}} for at, name in enumerate(parts)]
        documents = [*({"name": name, **part} for name, part in parts.items()),
                     {"merge_method": "linear", **head, "models": mixed}]
        # its model card asks the hub for the documents' names
        command = "mergekit-multi FILE -I SCRATCH --out-path FOLDER --no-write-model-card"
    merged = f", {len(plan.groups)} group{'s' if len(plan.groups) > 1 else ''} merged by {plan.rule}"
    title = (f"# {command}\n# slm export {source} (slm_exp {__version__}): {plan.n_layers_out} of {plan.n_layers} "
             f"layers{merged if plan.groups else ''}\n")
    written = (yaml.safe_dump(d, sort_keys=False, default_flow_style=None, width=112) for d in documents)
    return title + "---\n".join(written)


def check(plan: MergePlan, model: str) -> None:
    """Raise PlanError for what mergekit cannot express."""
    if plan.width:
        raise PlanError(f"width={plan.width.method}: mergekit has no narrower layers.")
    if plan.groups and plan.rule not in WEIGHTS:
        raise PlanError(f"rule = {plan.rule!r}: expected one of {', '.join(WEIGHTS)} where layers are merged.")
    path = Path(model).expanduser() / "config.json"
    config = read_config_file(path.parent) if path.is_file() else {}
    kinds = config.get("layer_types")
    kinds = sorted(set(map(str, kinds))) if isinstance(kinds, list) else []
    if len(kinds) > 1:
        raise PlanError(f"layer_types = {', '.join(kinds)}: mergekit does not move a layer's attention kind with it.")
    if (count := config.get("num_hidden_layers", plan.n_layers)) != plan.n_layers:
        raise PlanError(f"the plan is for {plan.n_layers} layers; {model} has {count}.")


def _members(plan: MergePlan) -> dict[str, Callable[[Group], int]]:
    """The models whose weighted mean the result is: name -> which layer of a slot it has."""
    if not plan.groups or plan.rule in WHOLE:
        top = plan.rule == "keep_top"
        return {"kept": lambda slot: slot.stop - 1 if top else slot.start}
    if plan.rule == "top_layer":
        return {"lowest": lambda slot: slot.start, "top": lambda slot: slot.stop - 1}
    most = max(g.stop - g.start for g in plan.groups)
    return {f"member{j}": lambda slot, j=j: min(slot.start + j, slot.stop - 1) for j in range(most)}  # type: ignore[misc]


def _slices(plan: MergePlan, model: str, place: Callable[[Group], int]) -> list[JsonObject]:
    """Runs of neighbouring layers that are treated in the same way."""
    removed = {(part.layer, part.kind) for part in plan.sublayers}
    runs: list[tuple[int, int, Any]] = []
    for slot, scale in zip(plan.slots, plan.scales, strict=True):
        at = place(slot)
        factors = {m: 0.0 if (slot.start, kind) in removed else scale for kind, names in OUTPUTS.items() for m in names}
        scaled = {m: f for m, f in factors.items() if f != 1}
        extends = runs and runs[-1][1:] == (at, scaled)
        runs.append((runs.pop()[0] if extends else at, at + 1, scaled))
    out = []
    for start, stop, scaled in runs:
        source: JsonObject = {"model": model, "layer_range": [start, stop]}
        if scaled:
            parts: list[JsonObject] = [{"filter": name, "value": factor} for name, factor in scaled.items()]
            source["parameters"] = {"scale": [*parts, {"value": 1.0}]}
        out.append({"sources": [source]})
    return out


def _weights(plan: MergePlan, member: int) -> list[JsonObject]:
    """A member's weight in every tensor: norms and biases are the lowest's, projections as the rule has them."""
    lowest = 1.0 if member == 0 else 0.0
    out: list[JsonObject] = [{"filter": "norm", "value": lowest}, {"filter": "bias", "value": lowest}]
    for at, slot in enumerate(plan.slots):
        if (k := slot.stop - slot.start) > 1:
            mine = WEIGHTS[plan.rule](k).get(k - 1 if plan.rule == "top_layer" and member else member, 0.0)
            out.append({"filter": f"layers.{at}.", "value": mine})
    return [*out, {"value": lowest}]
