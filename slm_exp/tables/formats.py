"""A filled table as Markdown, LaTeX (booktabs), CSV or HTML. The same grid gives the same bytes everywhere.

Texts come from records, files and folders. `Drawn` passes every one of them through its format's one escaping function,
and the formats draw that: what a text holds is shown, and does nothing.
"""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections.abc import Callable
from importlib.resources import files
from typing import NamedTuple

from markupsafe import escape

from slm_exp.core.format import printable
from slm_exp.tables.commands import commands
from slm_exp.tables.grid import BEST, SECOND, TIED, Entry, Grid, shown
from slm_exp.tables.quantities import Value

EMPTY = "–"
LEGEND = {BEST: "bold", SECOND: "underlined", TIED: "°"}
Escape = Callable[[str], str]


class Style(NamedTuple):
    """How a format writes texts and commands, and what stands around numbers by mark, plus-minus and gaps."""

    escape: Escape
    code: Escape
    marks: dict[str, str]
    half: str
    gap: str = "[{}]"
    empty: str = EMPTY

    def place(self, entry: Entry) -> str:
        """Value, plus-minus, note, number of the gap."""
        text = self.escape(entry.text)
        out = self.marks.get(entry.mark, "{}").format(text) if text else self.empty
        out += self.half.format(self.escape(entry.half_text)) if text and entry.half is not None else ""
        out += f" ({self.escape(entry.note)})" if entry.note else ""
        return out + (f" {self.gap.format(entry.missing)}" if entry.missing else "")


class Drawn:
    """A grid, every text of it escaped."""

    def __init__(self, grid: Grid, style: Style) -> None:
        escape = style.escape
        used = {e.mark for e in grid.entries()} - {""}
        legend = ", ".join(f"{mark} {LEGEND[mark]}" for mark in LEGEND if mark in used)
        self.title, self.columns = escape(grid.title), [escape(c) for c in (grid.row_heads[1], *grid.columns)]
        self.legend = [escape(note) for note in [*grid.legend, *([f"Shown as: {legend}."] if legend else [])]]
        self.notes = [escape(note) for note in grid.notes]
        self.blocks = [(escape(label), [(escape(name), list(map(style.place, row))) for name, row in rows])
                       for label, rows in grid.blocks]
        self.gaps = [f"[{gap.number}] {escape(gap.label)} ({escape(gap.why)}): {style.code(command)}"
                     for gap in grid.gaps for command in commands(gap.jobs, grid.name)]


def _line(text: str) -> str:
    return re.sub(r"[\t\n]", " ", printable(text))


def markdown(grid: Grid) -> str:
    """A pipe table a block, then notes and the commands of what is missing."""
    drawn = Drawn(grid, Style(_md, _md_code, {BEST: "**{}**", SECOND: "<u>{}</u>", TIED: "{}°"}, " ± {}"))
    lines = [f"## {drawn.title}"]
    for label, rows in drawn.blocks:
        lines += ["", *([f"**{label}**", ""] if label else [])]
        lines.append("| " + " | ".join(drawn.columns) + " |")
        lines.append("|---|" + "---:|" * len(grid.columns))
        lines += ["| " + " | ".join([name, *row]) + " |" for name, row in rows]
    lines += ["", *(f"- {note}" for note in (*drawn.legend, *drawn.notes))]
    if drawn.gaps:
        lines += ["", "Missing:", "", *(f"- {gap}" for gap in drawn.gaps)]
    return "\n".join(lines).rstrip() + "\n"


def _md(text: str) -> str:
    """No HTML, link, emphasis, code, end of a cell, heading or list; an underscore within a word is plain as it is."""
    text = re.sub(r"([\\`*|])", r"\\\1", _line(text))
    text = re.sub(r"&(?=#?\w+;)", "&amp;", text).replace("<", "&lt;")
    text = re.sub(r"\](?=[(\[:])", r"\]", text)
    return re.sub(r"(?<!\w)_|_(?!\w)|^[#>+-](?=\s|$)", r"\\\g<0>", text)


def _md_code(text: str) -> str:
    longest = max(map(len, re.findall("`+", text)), default=0)
    pad = " " if longest else ""
    return f"{'`' * (longest + 1)}{pad}{_line(text)}{pad}{'`' * (longest + 1)}"


def latex(grid: Grid) -> str:
    """A booktabs table to \\input, labelled tab:NAME; needs \\usepackage{booktabs} alone. Missing runs are comments
    behind it."""
    marks = {BEST: "\\textbf{{{}}}", SECOND: "\\underline{{{}}}", TIED: "{}$^{{\\circ}}$"}
    drawn = Drawn(grid, Style(_tex, _line, marks, "{{\\tiny$\\pm${}}}", "$^{{[{}]}}$", "--"))
    width = len(drawn.columns)
    caption = " ".join([f"{drawn.title}.", *drawn.legend])
    lines = ["% needs \\usepackage{booktabs}", "\\begin{table}",
             "\\centering\\footnotesize\\setlength{\\tabcolsep}{3pt}", f"\\caption{{{caption}}}",
             f"\\label{{tab:{grid.name}}}",
             f"\\begin{{tabular}}{{l{'r' * len(grid.columns)}}}", "\\toprule", " & ".join(drawn.columns) + " \\\\"]
    for label, rows in drawn.blocks:
        lines.append("\\midrule")
        if label:
            lines += [f"\\multicolumn{{{width}}}{{l}}{{\\textit{{{label}}}}} \\\\", "\\midrule"]
        lines += [" & ".join([_tex_head(name), *row]) + " \\\\" for name, row in rows]
    lines += ["\\bottomrule", "\\end{tabular}", ""]
    lines += [f"\\par\\raggedright {' '.join(drawn.notes)}"] if drawn.notes else []
    lines.append("\\end{table}")
    lines += [f"% [{gap.number}] {_line(gap.label)} ({_line(gap.why)}): {_line(command)}"
              for gap in grid.gaps for command in commands(gap.jobs, grid.name)]
    return "\n".join(line for line in lines if line) + "\n"


TEX = {"\\": "\\textbackslash{}", "&": "\\&", "%": "\\%", "$": "\\$", "#": "\\#", "_": "\\_", "{": "\\{", "}": "\\}",
       "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "±": "$\\pm$", "°": "$^{\\circ}$", "–": "--",
       "<": "$<$", ">": "$>$", "|": "\\textbar{}", '"': "''", "“": "``", "”": "''", "‘": "`", "’": "'", "—": "---",
       "−": "$-$", "×": "$\\times$", "≤": "$\\le$", "≥": "$\\ge$", "…": "\\dots{}", "\u00a0": "~",
       "α": "$\\alpha$", "β": "$\\beta$", "γ": "$\\gamma$", "δ": "$\\delta$", "Δ": "$\\Delta$", "θ": "$\\theta$",
       "λ": "$\\lambda$", "μ": "$\\mu$", "σ": "$\\sigma$", "τ": "$\\tau$"}


def _tex(text: str) -> str:
    """LaTeX reads UTF-8 since 2018, but its default fonts have Latin letters only; of others nothing is known."""
    return "".join(TEX.get(c) or (c if ord(c) < 128 or "LATIN" in unicodedata.name(c, "") else "?")
                   for c in _line(text))


def _tex_head(text: str) -> str:
    """A row's first cell: behind the end of a line, `[` and `*` would be arguments of it."""
    return ("{}" if text[:1] in ("[", "*") else "") + text


def html(grid: Grid) -> str:
    """One self-contained page."""
    marks = {BEST: "<b>{}</b>", SECOND: "<u>{}</u>", TIED: "{}°"}
    drawn = Drawn(grid, Style(_html, lambda command: f"<code>{_html(command)}</code>", marks, " <small>± {}</small>"))
    heads = "".join(f'<th scope="col">{c}</th>' for c in drawn.columns)
    parts = [f"<h1>{drawn.title}</h1>", '<div class="scroll"><table>', f"<thead><tr>{heads}</tr></thead>"]
    for label, rows in drawn.blocks:
        parts.append("<tbody>")
        if label:
            parts.append(f'<tr><th scope="rowgroup" colspan="{len(drawn.columns)}">{label}</th></tr>')
        for name, row in rows:
            cells = "".join(f"<td>{cell}</td>" for cell in row)
            parts.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
        parts.append("</tbody>")
    notes = "".join(f"<li>{note}</li>" for note in (*drawn.legend, *drawn.notes))
    parts += ["</table></div>", f"<ul>{notes}</ul>"]
    if drawn.gaps:
        parts.append(f"<h2>Missing</h2><ul>{''.join(f'<li>{gap}</li>' for gap in drawn.gaps)}</ul>")
    return page(drawn.title, "\n".join(parts))


def page(title: str, body: str) -> str:
    """A self-contained page in which a table that is too wide is shown row by row, as on the pages of runs."""
    css, script = (files("slm_exp.reporting").joinpath(f"tables.{kind}").read_text("utf-8") for kind in ("css", "js"))
    return ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{title}</title>\n<style>{CSS}{css}</style></head><body>\n{body}\n"
            f"<script>\n{script}</script></body></html>\n")


def _html(text: str) -> str:
    return str(escape(printable(text)))


CSS = """
:root { color-scheme: light dark; --soft: #59626d; --line: #dcd9d2 }
@media (prefers-color-scheme: dark) { :root { --soft: #a3abb4; --line: #343a41 } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem }
h1 { font-size: 1.3rem } h2 { font-size: 1.1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } .scroll { overflow-x: auto; position: relative }
body { overflow-wrap: anywhere }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap; font-weight: normal }
th[scope=row], th[scope=rowgroup], th:first-child { text-align: left }
thead { border-top: 2px solid; border-bottom: 1px solid } tbody { border-bottom: 1px solid }
th[scope=rowgroup] { font-style: italic } b { font-weight: 700 } small { opacity: .75 } code { white-space: pre-wrap }
"""


def csv_text(grid: Grid) -> str:
    """One line a row: block, row, numbers under the table's headings; then plus-minus, marks, and what is missing."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")

    def put(*cells: str) -> None:
        writer.writerow(map(_csv, cells))

    columns = grid.columns
    every = [row for _, rows in grid.blocks for _, row in rows]
    spread = [k for k in range(len(columns)) if any(row[k].half is not None for row in every)]
    marks = [k for k in range(len(columns)) if any(row[k].mark for row in every)]
    named = any(label for label, _ in grid.blocks)
    noted = any(e.note for row in every for e in row)
    put(*grid.row_heads[0 if named else 1:], *columns, *(f"{columns[k]} ±" for k in spread),
        *(f"{columns[k]} mark" for k in marks), *(["note"] if noted else []), *(["missing"] if grid.gaps else []))
    by_number = {gap.number: commands(gap.jobs, grid.name) for gap in grid.gaps}
    for label, rows in grid.blocks:
        for name, row in rows:
            missing = [c for n in dict.fromkeys(e.missing for e in row if e.missing is not None) for c in by_number[n]]
            note = "; ".join(f"{c}: {e.note}" for c, e in zip(columns, row, strict=True) if e.note)
            put(*([label] if named else []), name, *(_number(e, e.value) for e in row),
                *(_number(row[k], row[k].half) for k in spread),
                *(row[k].mark for k in marks), *([note] if noted else []),
                *(["; ".join(missing)] if grid.gaps else []))
    return out.getvalue()


def _number(entry: Entry, value: Value) -> str:
    """With all of its column's decimals: whoever reads CSV computes with it."""
    return "" if value is None else shown(value, entry.digits)


def _csv(text: str) -> str:
    """A cell that no spreadsheet takes for a formula."""
    text = printable(text)
    if text.lstrip()[:1] not in ("=", "+", "-", "@"):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text


FORMATS: dict[str, Callable[[Grid], str]] = {"md": markdown, "tex": latex, "csv": csv_text, "html": html}
