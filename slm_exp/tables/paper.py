"""`slm tables paper`: every table of a model in a folder, in all formats, figures in PDF, a page that links them."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from slm_exp.core.errors import ConfigError, ProtocolError, did_you_mean
from slm_exp.core.files import write_text, writing
from slm_exp.core.types import LayerSimilarity
from slm_exp.reporting.heatmap import heatmap
from slm_exp.runs.statistics.runs import Measured
from slm_exp.tables.definition import Table, parameters, read_table, table_names
from slm_exp.tables.facts import Params
from slm_exp.tables.formats import FORMATS, page
from slm_exp.tables.grid import Grid, fill, missing_commands
from slm_exp.tables.records import Finder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ORDER = ("main", "main_lora", "speed", "depth_width", "rules", "thresholds", "calibration", "similarity",
         "as_published", "agreement", "methods", "recovery")
"""In which the tables are listed; others follow by name."""


@dataclass
class Drawn:
    """What a table's files are, and how much of it there is."""

    table: Table
    filled: int = 0
    rows: int = 0
    files: list[Path] = field(default_factory=list)
    figures: list[Path] = field(default_factory=list)
    why: str = ""
    """Why it is not drawn."""


def tables_of(params: Params) -> tuple[list[Table], list[str]]:
    """Every table that can be made for the model, and why others cannot. Raises ConfigError: a parameter that no table
    has, or a model that there is not."""
    names = sorted(table_names(), key=lambda n: (ORDER.index(n) if n in ORDER else len(ORDER), n))
    known = {name: parameters(name) for name in names}
    every = sorted({key for own in known.values() for key in own})
    for key in params:
        if key not in every:
            raise ConfigError(f"{key}: no table has such a parameter; they have {', '.join(every)}. "
                              f"{did_you_mean(key, every)}".rstrip())
    tables, left = [], []
    model = {"model": params.get("model", known["main"]["model"])}
    for name in names:
        try:
            tables.append(read_table(name, model | {key: value for key, value in params.items() if key in known[name]}))
        except ConfigError as error:
            left.append(f"{name}: {error}")
    if not tables:
        raise ConfigError(f"no table can be made: {left[0]}")
    return tables, left


def write_paper(tables: Sequence[Table], runs: Sequence[Measured], out: Path, costs: Mapping[str, str]) -> list[Drawn]:
    """Write the folder: NAME.md/.tex/.csv/.html and NAME*.pdf of every table that has a run, missing.sh with the
    commands of all that is missing, paper.tex that sets the tables, index.html. `costs`: by table, what its runs would
    cost, for the page."""
    drawn, missing = [], ["# what is missing, table by table"]
    for table in tables:
        one = Drawn(table)
        drawn.append(one)
        try:
            grid = fill(table, runs)
        except ProtocolError as error:
            one.why = str(error)
            continue
        lines = [line for block, (_, rows) in zip(table.blocks, grid.blocks, strict=True)
                 for row, (_, line) in zip(block.rows, rows, strict=True) if row.which != "dense"]
        one.rows, one.filled = len(lines), sum(all(e.missing is None for e in line) for line in lines)
        commands = missing_commands(grid)
        missing += [f"# {table.name}: {len(commands)} commands", *commands] if commands else []
        if not one.filled:
            one.why = "no run yet"
            continue
        for kind, text_of in FORMATS.items():
            write_text(path := out / f"{table.name}.{kind}", text_of(grid))
            one.files.append(path)
        one.figures = _figures(table, grid, runs, out)
    write_text(out / "missing.sh", "\n".join(missing) + "\n")
    inputs = "\n".join(f"\\input{{{one.table.name}}}" for one in drawn if one.files)
    write_text(out / "paper.tex", "\\documentclass{article}\\usepackage{booktabs}"
               "\\usepackage[a3paper,landscape,margin=1cm]{geometry}"  # the largest tables fit on such a page
               f"\n\\begin{{document}}\n{inputs}\n\\end{{document}}\n")
    write_text(out / "index.html", _page(drawn, out, costs))
    return drawn


def _page(drawn: Sequence[Drawn], out: Path, costs: Mapping[str, str]) -> str:
    rows = []
    for one in drawn:
        links = " ".join(f'<a href="{p.name}">{p.suffix[1:]}</a>' for p in one.files)
        figures = " ".join(f'<a href="{p.name}">{p.stem}</a>' for p in one.figures)
        rows.append(f'<tr><th scope="row">{html.escape(one.table.title)}</th><td>{one.filled} of {one.rows}</td>'
                    f"<td>{links or html.escape(one.why)}</td><td>{figures}</td>"
                    f"<td>{html.escape(costs.get(one.table.name, ''))}</td></tr>")
    heads = "".join(f'<th scope="col">{h}</th>' for h in ("table", "rows filled", "files", "figures", "what it costs"))
    title = f"Tables of {html.escape(str(drawn[0].table.params.get('named')))}"
    return page(title, f'<h1>{title}</h1>\n<div class="scroll"><table><thead><tr>{heads}</tr></thead>\n<tbody>\n'
                + "\n".join(rows) + '\n</tbody></table></div>\n<p><a href="paper.tex">paper.tex</a> sets all tables; '
                '<a href="missing.sh">missing.sh</a> has the commands of what is missing.</p>')


def _figures(table: Table, grid: Grid, runs: Sequence[Measured], out: Path) -> list[Path]:
    made: list[Path] = []

    def save(name: str, figure: Figure) -> None:
        with writing(path := out / f"{name}.pdf") as tmp:
            figure.savefig(tmp, format="pdf", metadata={"CreationDate": None})
        made.append(path)

    if "average" in grid.columns and table.name != "thresholds":
        save(table.name, _averages(grid))
    finder = Finder(runs)
    found = [m for cell in table.cells() if (m := finder.find(cell))]
    if table.name == "thresholds":
        save(table.name, _curve(found))
    if table.name == "similarity":
        kernels: dict[str, LayerSimilarity] = {}
        for m in found:
            if (m.run.folder / "similarity.npz").is_file():
                one = LayerSimilarity.load(m.run.folder)
                kernels.setdefault(one.kernel, one)
        for kernel, one in sorted(kernels.items()):
            save(f"{table.name}-{kernel}", heatmap(one, None, f"{table.params.get('named')}, layers"))
    return made


def _averages(grid: Grid) -> Figure:
    """The column `average`, a panel a block: a dot a row with its plus-minus, the dense model as a line."""
    from matplotlib.figure import Figure

    at = grid.columns.index("average")
    blocks = [(label, [(name, line[at]) for name, line in rows if isinstance(line[at].value, float)])
              for label, rows in grid.blocks]
    blocks = [(label, rows) for label, rows in blocks if rows]
    figure = Figure(figsize=(6.5, sum(0.5 + 0.2 * len(rows) for _, rows in blocks) + 0.5), layout="constrained")
    panels = figure.subplots(len(blocks) or 1, 1, squeeze=False, sharex=True)[:, 0]
    for panel, (label, rows) in zip(panels, blocks, strict=False):
        for y, (name, entry) in enumerate(rows):
            if name == "dense":
                panel.axvline(entry.value, color="0.6", linewidth=0.8, linestyle=":")
            panel.errorbar(entry.value, y, xerr=entry.half, fmt="o", markersize=4, color="#3b528b", elinewidth=0.8)
        panel.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=7)
        panel.set_ylim(len(rows) - 0.5, -0.5)
        panel.set_title(label, loc="left", fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("seven-task average (%)", fontsize=8)
    return figure


def _curve(runs: Sequence[Measured]) -> Figure:
    """The average (or, without one, the score) over the layers left: the path's best plans as a line, thresholds as
    named points."""
    from matplotlib.figure import Figure

    measured = any(m.evaluation.average is not None for m in runs)
    points = [(m.record.layers.after or 0, 100 * value if measured else value, m) for m in runs
              if (value := m.evaluation.average if measured else m.record.plan.final_score) is not None]
    path = sorted((n, value) for n, value, m in points if m.record.setting("method.target_layers") is not None)
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([x for x, _ in path], [y for _, y in path], "-", marker=".", color="#3b528b", linewidth=1.4,
              label="best plan of the path")
    for layers, value, m in points:
        if (tau := m.record.setting("method.threshold")) is not None:
            axes.plot(layers, value, "x", color="#b5367a")
            axes.annotate(f"{tau:g}", (layers, value), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.invert_xaxis()
    axes.set_xlabel("layers left")
    axes.set_ylabel("seven-task average (%)" if measured else "score")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
