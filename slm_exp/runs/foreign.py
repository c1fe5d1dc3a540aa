"""Plans of other programs, as plans of this one: EvoPress, mergekit, LLM-Drop.

EvoPress writes one word a layer: none, attn, mlp or attn+mlp, what is gone. LLM-Drop writes `drop_attn_list` and
`drop_mlp_list` into the config.json of a model, layer numbers or one true or false a layer. mergekit's YAML has slices
of a model that are passed through; gone are layers that are in none of them, and sublayers whose output is scaled by 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from slm_exp.core.documents import Document, parse
from slm_exp.core.errors import ConfigError, PlanError, did_you_mean, require
from slm_exp.core.files import read_text
from slm_exp.core.format import printable
from slm_exp.core.types import SUBLAYERS, Kind, MergePlan, Sublayer

LARGEST = 10_000_000
"""Bytes of a file."""
WORDS: dict[str, tuple[Kind, ...]] = {"none": (), "attn": ("attention",), "mlp": ("mlp",), "attn+mlp": SUBLAYERS}
LISTS: dict[str, Kind] = {"drop_attn_list": "attention", "drop_mlp_list": "mlp"}
OUTPUTS: dict[str, Kind] = {"o_proj": "attention", "down_proj": "mlp"}
FORMS = ("EvoPress's text (none, attn, mlp or attn+mlp on a line for every layer), LLM-Drop's config.json (with "
         "drop_attn_list and drop_mlp_list), or mergekit's YAML (slices passed through)")


class _Value(Document):
    filter: str | None = None
    value: float


class _Parameters(Document):
    scale: list[_Value] = []  # noqa: RUF012 - pydantic copies it


class _Source(Document):
    model: Any
    layer_range: list[int]
    parameters: _Parameters = _Parameters()


class _Slice(Document):
    sources: list[_Source]


class _Mergekit(Document):
    merge_method: str
    slices: list[_Slice]
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: Any = None
    tokenizer: Any = None
    name: str | None = None


def read_foreign(path: Path, layers: int | None = None) -> MergePlan:
    """The plan in a file of another program. `layers`: of the dense model, where the file does not say how many. Raises
    ConfigError: no such file, none of the forms, or something in it that a plan cannot say; names it."""
    try:
        if path.stat().st_size > LARGEST:
            raise ConfigError(f"{path}: {path.stat().st_size:,} bytes; expected {FORMS}.")
        text = read_text(path)
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}; expected {FORMS}.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}; expected {FORMS}: it cannot be read ({error}).") from None
    words = text.split()
    try:
        if words and words[0] in WORDS:
            return _evopress(text, layers)
        documents = [d for d in _documents(text) if d is not None]
        first = documents[0] if documents else None
        if isinstance(first, dict) and LISTS.keys() & first.keys():
            return _llm_drop(first, layers)
        if isinstance(first, dict) and "merge_method" in first:
            if len(documents) > 1:
                raise ValueError(f"it has {len(documents)} documents, which merge models; a plan is read from one "
                                 "whose slices are passed through.")
            return _mergekit(parse(_Mergekit, first), layers)
    except (ValueError, PlanError) as error:
        raise ConfigError(f"{path}: {error}") from None
    came = printable(" ".join(words[:8]))
    raise ConfigError(f"{path} begins with {came[:80]!r}; expected {FORMS}.")


def _documents(text: str) -> list[Any]:
    try:
        return list(yaml.safe_load_all(text))  # JSON is YAML, but for tabs
    except (yaml.YAMLError, RecursionError):
        try:
            return [json.loads(text)]
        except (ValueError, RecursionError):
            return []


def _plan(n_layers: int | None, gone: Iterable[Sublayer], method: str, layers: int | None) -> MergePlan:
    if n_layers is None and layers is None:
        raise ConfigError(f"--layers is missing; expected the dense model's number of layers: a {method} file does not "
                          "say it.")
    require(layers is None or n_layers in (None, layers), "--layers", layers, f"{n_layers}, as the file has it")
    n = n_layers if n_layers is not None else layers
    assert n is not None
    return MergePlan(n, sublayers=tuple(gone), method=method, notes=(f"read from a file of {method}.",))


def _evopress(text: str, layers: int | None) -> MergePlan:
    gone = []
    lines = text.rstrip().splitlines()
    for i, line in enumerate(lines):
        if line.strip() not in WORDS:
            raise ValueError(f"line {i + 1} = {printable(line.strip()[:40])!r}; expected one of {', '.join(WORDS)}. "
                             f"{did_you_mean(line.strip(), WORDS)}".rstrip())
        gone += [Sublayer(i, kind) for kind in WORDS[line.strip()]]
    return _plan(len(lines), gone, "evopress", layers)


def _llm_drop(config: dict[str, Any], layers: int | None) -> MergePlan:
    n, gone = config.get("num_hidden_layers"), []
    if n is not None and (not isinstance(n, int) or isinstance(n, bool)):
        raise ValueError(f"num_hidden_layers = {n!r}; expected a whole number.")
    for name, kind in LISTS.items():
        given = config.get(name) or []
        if not isinstance(given, list) or not all(isinstance(i, int) for i in given):
            raise ValueError(f"{name} = {printable(given)[:80]}; expected a list of numbers, or of true and false.")
        flags = bool(given) and all(isinstance(i, bool) for i in given)
        if flags and len(given) != (n or layers or len(given)):
            raise ValueError(f"{name} has {len(given)} entries; expected one for each of {n or layers} layers.")
        numbers = [i for i, off in enumerate(given) if off] if flags else given
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"{name} = {given} has a layer twice.")
        n = len(given) if flags and n is None and layers is None else n
        gone += [Sublayer(i, kind) for i in numbers]
    return _plan(n, gone, "llm_drop", layers)


def _mergekit(found: _Mergekit, layers: int | None) -> MergePlan:
    if found.merge_method != "passthrough":
        raise ValueError(f"merge_method = {found.merge_method}; expected passthrough: a plan merges no models.")
    models = {json.dumps(source.model, sort_keys=True) for part in found.slices for source in part.sources}
    if len(models) != 1:
        raise ValueError(f"the slices are of {len(models)} models; expected one.")
    kept, gone, at = list[int](), list[Sublayer](), 0
    for i, part in enumerate(found.slices):
        where = f"slices[{i}]"
        if len(part.sources) != 1 or len(part.sources[0].layer_range) != 2:
            raise ValueError(f"{where}; expected one source with a layer_range of two numbers.")
        start, stop = part.sources[0].layer_range
        if not at <= start < stop:
            raise ValueError(f"{where}.layer_range = [{start}, {stop}]; expected layers from {at} up, in order: a plan "
                             "repeats no layer.")
        at = stop
        kept += range(start, stop)
        gone += [Sublayer(layer, kind) for kind in _scaled(part.sources[0].parameters.scale, where)
                 for layer in range(start, stop)]
    n = layers if layers is not None else _layers_of(found.slices[0].sources[0].model)
    if n is not None and at > n:
        raise ValueError(f"the slices end with layer {at - 1}; the model has {n} layers.")
    removed = sorted(set(range(n or 0)) - set(kept))
    return _plan(n, [*gone, *(Sublayer(i, kind) for i in removed for kind in SUBLAYERS)], "mergekit", layers)


def _scaled(scale: Iterable[_Value], where: str) -> list[Kind]:
    """The sublayers whose output is scaled away."""
    out: list[Kind] = []
    for entry in scale:
        name = (entry.filter or "").rpartition(".")[2]  # a filter is a part of a tensor's name
        if entry.value == 1:
            continue
        if entry.value != 0 or name not in OUTPUTS:
            raise ValueError(f"{where}: scale of {entry.filter or 'everything'} by {entry.value:g}; expected 0 of "
                             f"{' or '.join(OUTPUTS)}, which takes a sublayer away.")
        out.append(OUTPUTS[name])
    return out


def _layers_of(model: Any) -> int | None:
    """Of a model in a local folder; None where that is not known."""
    try:
        config = json.loads(read_text(Path(str(model)).expanduser() / "config.json"))
        return int(config["num_hidden_layers"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
