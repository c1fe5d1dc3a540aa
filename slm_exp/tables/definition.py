"""What a table is: rows, columns and the runs that fill its cells, read from `conf/table/NAME.yaml`.

A cell's runs are overrides, as a command line would have them: those of the whole table, of its row and of its column
together. `$name` stands for a parameter: of the table, of its model (`_models.yaml`), or of an `each` around it.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_exp.core.errors import ConfigError, did_you_mean
from slm_exp.evaluation.base import SEVEN
from slm_exp.launch.compose import check_key, conf_dir

MODELS = "_models"
"""The file beside the tables that says what `$sizes` and its like are for each model."""
KEYS = {
    "table": ("title", "notes", "params", "runs", "over", "blocks", "rows", "columns"),
    "block": ("each", "label"),
    "row": ("each", "label", "runs", "which"),
    "column": ("each", "label", "show", "runs", "digits"),
}


@dataclass(frozen=True)
class Column:
    """One number of every row."""

    label: str
    show: str
    """A quantity, see quantities.py."""
    runs: tuple[str, ...] = ()
    digits: int | None = None
    """Decimals; None is the quantity's own."""


@dataclass(frozen=True)
class Row:
    """One thing that is compared with the other rows of its block."""

    label: str
    runs: tuple[str, ...]
    which: str = "compressed"
    """Or `dense`: the dense model, which every run of the table has measured."""


@dataclass(frozen=True)
class Block:
    """Rows under one heading."""

    label: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Table:
    """A whole declaration, its parameters filled in."""

    name: str
    title: str
    notes: tuple[str, ...]
    runs: tuple[str, ...]
    """Overrides of every cell."""
    over: tuple[tuple[str, ...], ...]
    """Overrides that a cell is repeated with (seeds): its value is their mean. One empty tuple: a single run."""
    blocks: tuple[Block, ...]
    columns: tuple[Column, ...]
    params: Mapping[str, Any]

    def cell(self, row: Row, column: Column) -> list[list[str]]:
        """The overrides of the runs that fill a cell, one list a run; none for the dense model, which any run fills."""
        if row.which == "dense":
            return []
        return [together(self.runs, row.runs, column.runs, again) for again in self.over]

    def cells(self) -> list[list[str]]:
        """The overrides of every run of the table, each once, in reading order."""
        every = (tuple(overrides) for block in self.blocks for row in block.rows for column in self.columns
                 for overrides in self.cell(row, column))
        return [list(overrides) for overrides in dict.fromkeys(every)]


def cells(table_name: str, params: Mapping[str, Any] | None = None) -> list[list[str]]:
    """The overrides of every run of a table: what `slm tables NAME --missing` would print if nothing had run.

    Args:
        table_name: a file of conf/table without `.yaml`, or the path of a YAML file.
        params: values for the table's parameters, e.g. {"model": "llama2_7b"}.

    Raises:
        ConfigError: no such table, a wrong key in it, an unknown parameter; says where and what was wanted.
    """
    return read_table(table_name, params).cells()


def table_names() -> list[str]:
    """The declared tables."""
    return sorted(p.stem for p in (conf_dir() / "table").glob("*.yaml") if not p.stem.startswith("_"))


def table_path(name: str) -> Path:
    """The file of a table, whether it is there or not."""
    return Path(name) if name.endswith((".yaml", ".yml")) else conf_dir() / "table" / f"{name}.yaml"


def read_table(name: str, params: Mapping[str, Any] | None = None) -> Table:
    """A table by name or by the path of its file; see `cells` for arguments and errors."""
    path, told = _declared(name)
    return _Reader(path, told).table(path.stem, dict(params or {}))


def parameters(name: str) -> set[str]:
    """What a table can be told, whatever its model is; see `cells` for errors."""
    return {*(_declared(name)[1].get("params") or {}), *model_facts("")[1]}


def _declared(name: str) -> tuple[Path, dict[str, Any]]:
    path = table_path(name)
    if not path.is_file():
        names = ["sweep", *table_names()]
        raise ConfigError(f"table = {name}; expected one of {', '.join(names)}, or an existing .yaml file. "
                          f"{did_you_mean(name, names)}".rstrip())
    return path, read_yaml(path)


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping from a YAML file.

    Raises:
        ConfigError: not YAML, or no mapping.
    """
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds {type(found).__name__}; expected a mapping.")
    return found


def together(*parts: Sequence[str]) -> list[str]:
    """Overrides in order; of two for the same key the later one holds, at the earlier one's place."""
    found: dict[str, str] = {}
    for override in itertools.chain(*parts):
        found[override.partition("=")[0]] = override
    return list(found.values())


def model_facts(model: str) -> tuple[dict[str, Any], set[str]]:
    """What `_models.yaml` says of a model, on top of what it says of all; and the names it knows for any model."""
    told = read_yaml(conf_dir() / "table" / f"{MODELS}.yaml")
    return {**told["all"], **told.get(model, {})}, {key for facts in told.values() for key in facts}


class _Reader:
    """Turns one file into a Table; knows the file's name for every complaint."""

    def __init__(self, path: Path, told: dict[str, Any]) -> None:
        self._path, self._told = path, told
        self._known_facts: set[str] = set()

    def table(self, name: str, given: dict[str, Any]) -> Table:
        told = self._keys("table", self._told, str(self._path))
        own = self._mapping(told.get("params"), "params")
        model = str(given.get("model", own.get("model", "")))
        if model:
            check_key(f"model={model}")
        facts, self._known_facts = model_facts(model)
        known = sorted({*own, *self._known_facts})
        for key in given:
            if key not in known:
                raise ConfigError(f"{key}={given[key]}: {self._path} has no parameter {key}; it has "
                                  f"{', '.join(known)}. {did_you_mean(key, known)}".rstrip())
        params = {**facts, **own, **given}
        params = {key: self._fill(value, params, f"params.{key}") for key, value in params.items()}
        columns = tuple(c for i, item in enumerate(self._list(told.get("columns"), "columns"))
                        for c in self._columns(item, params, f"columns[{i}]"))
        blocks = tuple(b for i, item in enumerate(self._list(told.get("blocks", [{}]), "blocks"))
                       for b in self._blocks(item, told.get("rows"), params, f"blocks[{i}]"))
        over = [[f"{key}={v}" for v in self._list(self._fill(values, params, f"over.{key}"), f"over.{key}", empty=True)]
                for key, values in self._mapping(told.get("over"), "over").items()]
        for values in over:
            if values:
                check_key(values[0])
            if len(set(values)) < len(values):
                raise ConfigError(f"{self._path}: over has {', '.join(values)}; expected every value once, for a run "
                                  "counted twice is no second run.")
        notes = self._list(told.get("notes", []), "notes", empty=True)
        if not any(row.which != "dense" for block in blocks for row in block.rows):
            empty = sorted(key for key, value in params.items() if value == [] and key in str(self._told))
            raise ConfigError(f"{self._path}: no run fills this table, because nothing is known for model = "
                              f"{params.get('model')} of {', '.join(empty) or 'its rows'}. Say it: "
                              f"{empty[0] if empty else 'PARAMETER'}=[...].")
        return Table(
            name, str(self._fill(told.get("title", name), params, "title")),
            tuple(str(self._fill(note, params, "notes")) for note in notes),
            self._runs(told.get("runs", []), params, "runs"),
            tuple(itertools.product(*(values for values in over if values))), blocks, columns, params)

    def _blocks(self, item: Any, rows: Any, params: dict[str, Any], where: str) -> Iterator[Block]:
        told = self._keys("block", item, where)
        for inner in self._each(told, params, where):
            made = tuple(r for i, row in enumerate(self._list(rows, "rows"))
                         for r in self._rows(row, inner, f"rows[{i}]"))
            yield Block(str(self._fill(told.get("label", ""), inner, where)), made)

    def _rows(self, item: Any, params: dict[str, Any], where: str) -> Iterator[Row]:
        told = self._keys("row", item, where)
        which = told.get("which", "compressed")
        if which not in ("compressed", "dense"):
            raise ConfigError(f"{self._path}: {where}.which = {which}; expected compressed or dense.")
        if which == "dense" and told.get("runs"):
            raise ConfigError(f"{self._path}: {where} is the dense model and has runs of its own; expected none: "
                              "every run of the block has measured it.")
        for inner in self._each(told, params, where):
            label = str(self._fill(self._required(told, "label", where), inner, where))
            yield Row(label, self._runs(told.get("runs", []), inner, where), which)

    def _columns(self, item: Any, params: dict[str, Any], where: str) -> Iterator[Column]:
        from slm_exp.tables.quantities import check_quantity, default_label

        if isinstance(item, str):
            item = {"show": item}
        told = self._keys("column", item, where)
        digits = told.get("digits")
        if digits is not None and (not isinstance(digits, int) or isinstance(digits, bool) or digits < 0):
            raise ConfigError(f"{self._path}: {where}.digits = {digits}; expected a whole number >= 0.")
        for inner in self._each(told, params, where):
            show = str(self._fill(self._required(told, "show", where), inner, where))
            for name in SEVEN if show == "tasks" else (show,):
                check_quantity(name, f"{self._path}: {where}.show")
                label = str(self._fill(told.get("label", default_label(name)), inner, where))
                yield Column(label, name, self._runs(told.get("runs", []), inner, where), told.get("digits"))

    def _each(self, told: dict[str, Any], params: dict[str, Any], where: str) -> Iterator[dict[str, Any]]:
        """The parameters once for every combination of the `each` values; a size brings its shares along."""
        each = {key: self._list(self._fill(values, params, f"{where}.each.{key}"), f"{where}.each.{key}", empty=True)
                for key, values in self._mapping(told.get("each"), f"{where}.each").items()}
        for values in itertools.product(*each.values()):
            inner = params | dict(zip(each, values, strict=True))
            yield inner | (_shares(inner) if "size" in each else {})

    def _runs(self, told: Any, params: dict[str, Any], where: str) -> tuple[str, ...]:
        runs: list[str] = []
        for item in self._list(told, f"{where}.runs", empty=True):
            filled = self._fill(item, params, where)  # a parameter can be a list of overrides
            runs += map(str, filled if isinstance(filled, list) else [filled])
        for override in runs:
            if not override.partition("=")[1]:
                raise ConfigError(f"{self._path}: {where}.runs has {override!r}; expected an override, key=value.")
            try:
                check_key(override)
            except ConfigError as error:
                raise ConfigError(f"{self._path}: {where}: {error}") from None
        return tuple(runs)

    def _fill(self, value: Any, params: Mapping[str, Any], where: str) -> Any:
        """`$name` by its value: the value itself where nothing stands around it, else as text."""
        if isinstance(value, list):
            return [self._fill(v, params, where) for v in value]
        if not isinstance(value, str):
            return value
        try:
            if value.startswith("$") and value[1:].isidentifier():
                return params[value[1:]]
            return string.Template(value).substitute(params)
        except KeyError as error:
            if (name := error.args[0]) in self._known_facts:
                raise ConfigError(f"{self._path}: {where} uses ${name}, which conf/table/{MODELS}.yaml does not say of "
                                  f"model={params.get('model')}; give it: {name}=VALUE.") from None
            raise ConfigError(f"{self._path}: {where} uses ${error.args[0]}, and there is no such parameter; known: "
                              f"{', '.join(sorted(params))}. {did_you_mean(error.args[0], params)}".rstrip()) from None
        except ValueError as error:
            raise ConfigError(f"{self._path}: {where} = {value!r}: {error}; a plain dollar sign is $$.") from None

    def _keys(self, kind: str, told: Any, where: str) -> dict[str, Any]:
        told = self._mapping(told, where)
        for key in told:
            if key not in KEYS[kind]:
                raise ConfigError(f"{self._path}: {where if where != str(self._path) else kind} has the key {key!r}; "
                                  f"expected {', '.join(KEYS[kind])}. {did_you_mean(str(key), KEYS[kind])}".rstrip())
        return told

    def _required(self, told: dict[str, Any], key: str, where: str) -> Any:
        if key not in told:
            raise ConfigError(f"{self._path}: {where} has no {key}.")
        return told[key]

    def _mapping(self, told: Any, where: str) -> dict[str, Any]:
        if told is not None and not isinstance(told, dict):
            raise ConfigError(f"{self._path}: {where} = {told!r}; expected a mapping.")
        return told or {}

    def _list(self, told: Any, where: str, empty: bool = False) -> list[Any]:
        if not isinstance(told, list) or not (told or empty):
            wanted = "a list" if empty else "a list of at least one"
            raise ConfigError(f"{self._path}: {where} = {told!r}; expected {wanted}.")
        return told


def _shares(params: Mapping[str, Any]) -> dict[str, Any]:
    """What leaving `$size` layers removes: `$share` of the parameters, `$percent`, `$width_ratio` of the layers'."""
    try:
        layers, per_layer, parameters = (int(params[key]) for key in ("layers", "per_layer", "parameters"))
    except (KeyError, TypeError, ValueError):
        return {}
    left = params["size"]
    if not isinstance(left, int) or not 0 < left < layers:
        raise ConfigError(f"size = {left}; expected a number of layers left of {params.get('model')}'s {layers}: 1 to "
                          f"{layers - 1} (sizes=[...]).")
    share = (layers - left) * per_layer / parameters
    return {"share": str(round(share, 4)), "percent": f"{100 * share:.1f}",
            "width_ratio": str(round((layers - left) / layers, 4))}
