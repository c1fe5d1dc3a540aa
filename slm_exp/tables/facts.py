"""What tables mean by `$layers`, `$sizes` and the like for a model: `_models.yaml`, or the model's own config."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import MISSING, fields
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from slm_exp.core.conf import published_file, published_sets
from slm_exp.core.documents import read_yaml
from slm_exp.core.errors import ConfigError
from slm_exp.core.files import read_json
from slm_exp.core.format import override
from slm_exp.core.registry import available
from slm_exp.core.types import SUBLAYERS, MergePlan
from slm_exp.launch.compose import compose_run, conf_dir
from slm_exp.runs.statistics.runs import Measured

MODELS = "_models"
"""The file beside the tables that says what `$sizes` and its like are for each model."""
Params = dict[str, Any]
"""A table's parameters: what `$name` stands for; of an `each`: parameter -> a list of values, or `$name` of one."""
PAPERS = (6 / 32, 11 / 32)
"""The layers that go at the papers' two sizes, of those there are; 8 and 14 of 40."""


def model_facts(model: str, overrides: Sequence[str] = ()) -> tuple[Params, set[str]]:
    """What is known of a model, on top of what `_models.yaml` says of all; and the names it knows for any model.
    `overrides`: of the model, e.g. model.path=FOLDER: a model that the file does not name is asked itself. Raises
    ConfigError: the overrides make no model, or its config.json cannot be that of one."""
    models = _models()
    known = {key for facts in models.values() for key in facts}
    own = models[model] if model in models else _computed(model, tuple(overrides)) if model else {}
    return {**models["all"], "named": model, "published": published_of(model), **own}, {*known, "published"}


@cache
def _models() -> dict[str, Params]:
    """`_models.yaml`; a table asks for it a few hundred times."""
    return read_yaml(conf_dir() / "table" / f"{MODELS}.yaml")


def published_of(model: str) -> list[str]:
    """The published layer sets of a model, SOURCE/MODEL/NAME."""
    return [name for name in published_sets() if name.split("/")[1] == model]


def published_plan(name: str) -> MergePlan:
    return MergePlan.from_json(read_json(published_file(name)))


def ours(name: str) -> list[list[str]]:
    """The overrides of our run that chooses what a published set does, in a list; none where we have no such method."""
    plan = published_plan(name)
    cls = available("method").get(plan.method)
    size = ("target_sublayers", 2 * len(plan.dropped) + len(plan.sublayers)) if plan.sublayers else (
        "target_layers", plan.n_layers_out)
    if size[0] not in getattr(cls, "targets", ()):
        return []
    return [[f"method={plan.method}", f"method.{size[0]}={size[1]}"]]


def agreement(m: Measured) -> str | None:
    """`7 of 7 (linearpatch)`: the sublayers of every published set of a run's model, method and size that it removes
    too, counted in layers where the set has whole layers only."""
    chosen = next((o[6:] for o in m.record.overrides if o.startswith("model=")), "")
    plan, found = m.record.plan, []
    mine = {(i, kind) for i in plan.dropped for kind in SUBLAYERS} | {(s.layer, s.kind) for s in plan.sublayers}
    for name in published_of(chosen) if plan else []:
        other = published_plan(name)
        theirs = {(i, kind) for i in other.dropped for kind in SUBLAYERS} | {(s.layer, s.kind) for s in other.sublayers}
        if other.method == plan.method and len(theirs) == len(mine):
            each = 1 if other.sublayers else len(SUBLAYERS)
            found.append(f"{len(theirs & mine) // each} of {len(theirs) // each} ({name.split('/')[0]})")
    return ", ".join(found) or None


@lru_cache(maxsize=64)
def _computed(model: str, overrides: tuple[str, ...]) -> Params:
    """Sizes of a model by its config alone; nothing of one whose config is not here."""
    cfg = compose_run([f"model={model}", *overrides])
    sketch = cfg.model.sketch(Path(cfg.cache.dir), "cpu")
    named = {"named": Path(cfg.model.path).name or model}
    if sketch.sizes is None:
        return named
    return named | sizes_of_layers(sketch.sizes.n_layers, sketch.sizes.total, sketch.sizes.layer)


def sizes_of_layers(layers: int, parameters: int, per_layer: int) -> Params:
    """The facts that follow from so many layers: the papers' sizes, and those of the path's curve."""
    gone = dict.fromkeys(max(1, int(share * layers + 0.5)) for share in PAPERS) if layers > 1 else ()
    return {"layers": layers, "parameters": parameters, "per_layer": per_layer, "sizes": [layers - n for n in gone],
            "curve": list(range(layers - 1, max(layers // 2, 1) - 1, -1)),
            "called": "As in the papers 6/32 and 11/32 of the layers go, which they call 20 % and 35 %."}


def model_of(runs: Sequence[Measured], default: str) -> Params:
    """The table's parameters that name the model of the records, where it is not the one that the table has anyway; its
    sizes too, as the records have them, where its config is not on this machine. Raises ConfigError: the records are of
    several models, none of them the table's; names them."""
    found = Counter(tuple(overrides_of(m.record.config.get("model") or {})) for m in runs)
    found.pop((), None)
    if not found or (f"model={default}",) in found:
        return {}
    if len(found) > 1:
        raise ConfigError(f"the runs there are of {len(found)} models; say which: "
                          f"{'; '.join(' '.join(words) for words in found)}.")
    [((first, *extra), _)] = found.items()
    model = first.partition("=")[2]
    known = "layers" in model_facts(model, extra)[0]
    return {"model": model, **({"extra": extra} if extra else {}), **({} if known else _sizes_in_records(runs))}


def _sizes_in_records(runs: Sequence[Measured]) -> Params:
    """Sizes of the runs' model by what they recorded: where its config is not on this machine."""
    for m in runs:
        layers, params = m.record.layers, m.record.params
        gone = (layers.before or 0) - (layers.after or 0)
        narrowed = (m.record.config.get("width") or {}).get("name") != "none"
        if layers.before and gone > 0 and params.before and params.after and not narrowed:
            return sizes_of_layers(layers.before, params.before, (params.before - params.after) // gone)
    return {}


def overrides_of(config: Params) -> list[str]:
    """The overrides that a record's model means: a preset or a member, and the settings that differ from it."""
    name = str(config.get("name", ""))
    cls = available("model").get(name)
    if cls is None:
        return []
    defaults = {f.name: None if f.default is MISSING else f.default for f in fields(cls)
                if f.metadata.get("science", True)}
    for path in sorted((conf_dir() / "model").glob("*.yaml")) if name == "hf" else []:
        preset = {key: value for key, value in read_yaml(path).items() if key in defaults}
        if preset.get("path") == config.get("path"):
            name, defaults = path.stem, defaults | preset
            break
    return [f"model={name}", *(_set(f"model.{key}", config[key]) for key, default in defaults.items()
                               if key in config and config[key] != default)]


def _set(key: str, value: object) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return f"{key}={text}" if re.fullmatch(r"[\w./-]+", text, re.ASCII) else override(key, text)
