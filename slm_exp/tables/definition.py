"""What a table is: rows, columns and the runs that fill its cells, read from `conf/table/NAME.yaml`.

A cell's runs are overrides, as a command line would have them: those of the whole table, of its row and of its column
together. `$name` stands for a parameter: of the table, of its model (`_models.yaml`), or of an `each` around it.
"""

# ruff: noqa: RUF012 (pydantic copies defaults)
from __future__ import annotations

import itertools
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from slm_exp.core.documents import Document, read_document
from slm_exp.core.errors import ConfigError, did_you_mean
from slm_exp.evaluation.base import SEVEN
from slm_exp.launch.compose import check_key, conf_dir
from slm_exp.tables.facts import MODELS, Params, model_facts, ours
from slm_exp.tables.quantities import check_quantity, quantity


class Column(Document):
    """One number of every row; a string is its `show`."""

    show: str
    """A quantity, see quantities.py; in a file also `tasks`, the seven."""
    each: Params = {}
    label: str | None = None
    """None is the quantity's own."""
    runs: list[str] = []
    digits: Annotated[int, Field(ge=0)] | None = None
    """Decimals; None is the quantity's own."""

    @property
    def heading(self) -> str:
        return quantity(self.show).label if self.label is None else self.label

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, data: Any) -> Any:
        return {"show": data} if isinstance(data, str) else data


class Row(Document):
    """One thing that is compared with the other rows of its block."""

    label: str
    each: Params = {}
    runs: list[str] = []
    which: Literal["compressed", "dense"] = "compressed"
    """`dense`: the dense model, which every run of the table has measured."""

    @model_validator(mode="after")
    def _dense_has_no_runs(self) -> Self:
        if self.which == "dense" and self.runs:
            raise ValueError("it is the dense model and has runs of its own; expected none: every run of the block has "
                             "measured it.")
        return self


class BlockText(Document):
    """A block as the file has it."""

    each: Params = {}
    label: str = ""


class TableText(Document):
    """A table as its file has it."""

    title: str | None = None
    notes: list[str] = []
    params: Params = {}
    runs: list[str] = []
    over: Params = {}
    blocks: Annotated[list[BlockText], Field(min_length=1)] = [BlockText()]
    rows: Annotated[list[Row], Field(min_length=1)]
    columns: Annotated[list[Column], Field(min_length=1)]


class Block(NamedTuple):
    """Rows under one heading."""

    label: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Table:
    """A whole declaration, its parameters filled in."""

    name: str
    title: str
    notes: list[str]
    runs: list[str]
    """Overrides of every cell."""
    over: list[tuple[str, ...]]
    """Overrides that a cell is repeated with (seeds): its value is their mean. One empty tuple: a single run."""
    blocks: tuple[Block, ...]
    columns: tuple[Column, ...]
    params: Mapping[str, Any]
    last: tuple[str, ...] = ()
    """Overrides of every run that hold even over those of its row: of a rehearsal."""

    def cell(self, row: Row, column: Column) -> list[list[str]]:
        """The overrides of the runs that fill a cell, one list a run; none for the dense model, which any run fills."""
        if row.which == "dense":
            return []
        return [together(self.runs, row.runs, column.runs, again, self.last) for again in self.over]

    def cells(self) -> list[list[str]]:
        """The overrides of every run of the table, each once, in reading order."""
        every = (overrides for block in self.blocks for row in block.rows for column in self.columns
                 for overrides in self.cell(row, column))
        return list({tuple(overrides): overrides for overrides in every}.values())


def cells(table_name: str, params: Mapping[str, Any] | None = None) -> list[list[str]]:
    """The overrides of every run of a table: what `slm tables NAME --missing` would print if nothing had run.

    Args:
        table_name: a file of conf/table without `.yaml`, or the path of a YAML file.
        params: values for the table's parameters, e.g. {"model": "llama2_7b"}.
    Raises ConfigError: no such table, a wrong key in it, an unknown parameter; says where and what was wanted.
    """
    return read_table(table_name, params).cells()


def table_names() -> list[str]:
    """The declared tables."""
    return sorted(p.stem for p in (conf_dir() / "table").glob("*.yaml") if not p.stem.startswith("_"))


def read_table(name: str, params: Mapping[str, Any] | None = None) -> Table:
    """A table by name or by the path of its file; see `cells` for arguments and errors."""
    path = _found(name)
    check_parameters(name, params or {})
    return _Reader(path, read_document(TableText, path)).table(dict(params or {}))


def check_parameters(name: str, given: Iterable[str]) -> None:
    """Refuse a parameter that a table has not, by name, with those that it has; see `cells` for errors."""
    known = sorted(parameters(name))
    for key in given:
        if key not in known:
            raise ConfigError(f"{key}: {_found(name)} has no such parameter; it has {', '.join(known)}. "
                              f"{did_you_mean(key, known)}".rstrip())


def parameters(name: str) -> Params:
    """The parameters of a table, whatever its model is, with its own values; see `cells` for errors."""
    return {**dict.fromkeys(model_facts("")[1]), **read_document(TableText, _found(name)).params}


def summaries() -> Iterator[tuple[str, str, list[str]]]:
    """Name, title and own parameters of every declared table."""
    for name in table_names():
        text = read_document(TableText, _found(name))
        yield name, (text.title or "").replace(", $named", ""), list(text.params)


def _found(name: str) -> Path:
    path = Path(name) if name.endswith((".yaml", ".yml")) else conf_dir() / "table" / f"{name}.yaml"
    if not path.is_file():
        names = ["sweep", "paper", *table_names()]
        raise ConfigError(f"table = {name}; expected one of {', '.join(names)}, or an existing .yaml file. "
                          f"{did_you_mean(name, names)}".rstrip())
    return path


def together(*parts: Sequence[str]) -> list[str]:
    """Overrides in order; of two for the same key the later one holds, at the earlier one's place."""
    return list({override.partition("=")[0]: override for override in itertools.chain(*parts)}.values())


@dataclass
class _Reader:
    """Fills the parameters of one file into a Table; knows the file's name for every complaint."""

    _path: Path
    _text: TableText
    _known_facts: set[str] = field(default_factory=set)

    def table(self, given: Params) -> Table:
        text, own = self._text, self._text.params
        model = str(given.get("model", own.get("model", "")))
        if model:
            check_key(f"model={model}")
        extra = [str(o) for o in given.get("extra") or [] if str(o).startswith("model.")]
        facts, self._known_facts = model_facts(model, extra)
        params = {**facts, **own, **given}
        params = {key: self._fill(value, params, f"params.{key}") for key, value in params.items()}
        columns = tuple(c for i, each in enumerate(text.columns) for c in self._columns(each, params, f"columns[{i}]"))
        blocks = tuple(b for i, each in enumerate(text.blocks) for b in self._blocks(each, params, f"blocks[{i}]"))
        over = [[f"{key}={v}" for v in values] for key, values in self._values(text.over, params, "over").items()]
        for values in filter(None, over):
            check_key(values[0])
            if len(set(values)) < len(values):
                raise ConfigError(f"{self._path}: over has {', '.join(values)}; expected every value once, for a run "
                                  "counted twice is no second run.")
        if not any(row.which != "dense" for block in blocks for row in block.rows):
            used = str([*(part.each for part in text.blocks), *(part.each for part in text.rows)])
            empty = sorted(key for key, value in params.items() if value == [] and key in used)
            raise ConfigError(f"{self._path}: no run fills this table, because nothing is known for model = "
                              f"{params.get('model')} of {', '.join(empty) or 'its rows'}. Say it: "
                              f"{empty[0] if empty else 'PARAMETER'}=[...].")
        name = self._path.stem
        return Table(name, str(self._fill(text.title or name, params, "title")),
                     [str(self._fill(note, params, "notes")) for note in text.notes],
                     self._runs(text.runs, params, "runs"), list(itertools.product(*filter(None, over))), blocks,
                     columns, params, tuple(self._runs(params.get("last") or [], params, "last")))

    def _blocks(self, text: BlockText, params: Params, where: str) -> Iterator[Block]:
        for inner in self._each(text.each, params, where):
            rows = tuple(r for i, row in enumerate(self._text.rows) for r in self._rows(row, inner, f"rows[{i}]"))
            yield Block(str(self._fill(text.label, inner, where)), rows)

    def _rows(self, text: Row, params: Params, where: str) -> Iterator[Row]:
        for inner in self._each(text.each, params, where):
            label, runs = str(self._fill(text.label, inner, where)), self._runs(text.runs, inner, where)
            yield Row(label=label, runs=runs, which=text.which)

    def _columns(self, text: Column, params: Params, where: str) -> Iterator[Column]:
        for inner in self._each(text.each, params, where):
            show, runs = str(self._fill(text.show, inner, where)), self._runs(text.runs, inner, where)
            for name in SEVEN if show == "tasks" else (show,):
                check_quantity(name, f"{self._path}: {where}.show")
                label = None if text.label is None else str(self._fill(text.label, inner, where))
                yield Column(show=name, label=label, runs=runs, digits=text.digits)

    def _each(self, each: Params, params: Params, where: str) -> Iterator[Params]:
        """The parameters once for every combination of the `each` values; a size brings its shares along."""
        for values in itertools.product(*self._values(each, params, f"{where}.each").values()):
            inner = params | dict(zip(each, values, strict=True))
            taus = (params.get("at_size") or {}).get(inner.get("size"), [])
            inner |= {"ours": ours(str(inner["set"]))} if "set" in each else {}
            yield inner | ({"taus": taus, **_shares(inner)} if "size" in each else {})

    def _values(self, each: Params, params: Params, where: str) -> dict[str, list[Any]]:
        filled = {key: self._fill(values, params, f"{where}.{key}") for key, values in each.items()}
        for key, values in filled.items():
            if not isinstance(values, list):
                raise ConfigError(f"{self._path}: {where}.{key} = {values!r}; expected a list.")
        return filled

    def _runs(self, texts: Sequence[str], params: Params, where: str) -> list[str]:
        runs: list[str] = []
        for text in texts:
            filled = self._fill(text, params, where)  # a parameter can be a list of overrides
            runs += map(str, filled if isinstance(filled, list) else [filled])
        for override in runs:
            if not override.partition("=")[1]:
                raise ConfigError(f"{self._path}: {where}.runs has {override!r}; expected an override, key=value.")
            try:
                check_key(override)
            except ConfigError as error:
                raise ConfigError(f"{self._path}: {where}: {error}") from None
        return runs

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
                raise ConfigError(f"{self._path}: {where} uses ${name}, which neither conf/table/{MODELS}.yaml nor a "
                                  f"config.json on this machine says of model={params.get('model')}; give it: "
                                  f"{name}=VALUE.") from None
            raise ConfigError(f"{self._path}: {where} uses ${error.args[0]}, and there is no such parameter; known: "
                              f"{', '.join(sorted(params))}. {did_you_mean(error.args[0], params)}".rstrip()) from None
        except ValueError as error:
            raise ConfigError(f"{self._path}: {where} = {value!r}: {error}; a plain dollar sign is $$.") from None


def _shares(params: Mapping[str, Any]) -> Params:
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
