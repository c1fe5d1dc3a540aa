"""A filled table as Markdown, LaTeX (booktabs), CSV or HTML. The same grid gives the same bytes everywhere."""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Callable, Iterator

from markupsafe import Markup, escape

from slm_exp.tables.commands import commands
from slm_exp.tables.grid import BEST, SECOND, TIED, Entry, Gap, Grid

EMPTY = "–"
LEGEND = {BEST: "bold", SECOND: "underlined", TIED: "°"}


def markdown(grid: Grid) -> str:
    """A pipe table a block, then notes and the commands of what is missing."""
    lines = [f"## {grid.title}"]
    for label, rows in grid.blocks:
        lines += ["", *([f"**{_md(label)}**", ""] if label else [])]
        lines.append("| " + " | ".join([grid.row_heads[1], *map(_md, grid.columns)]) + " |")
        lines.append("|---|" + "---:|" * len(grid.columns))
        lines += ["| " + " | ".join([_md(name), *map(_md_entry, row)]) + " |" for name, row in rows]
    lines += ["", *(f"- {note}" for note in _notes(grid))]
    if grid.gaps:
        lines += ["", "Missing:", ""]
        lines += [f"- [{gap.number}] {_md(gap.label)} ({_md(gap.why)}): `{command}`"
                  for gap in grid.gaps for command in _commands(grid, gap)]
    return "\n".join(lines).rstrip() + "\n"


def _md(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _md_entry(entry: Entry) -> str:
    text = _md(entry.text)
    text = {BEST: f"**{text}**", SECOND: f"<u>{text}</u>", TIED: f"{text}°"}.get(entry.mark, text)
    return _around(entry, text, f" ± {entry.half_text}", "[{}]")


def latex(grid: Grid) -> str:
    """A booktabs table to \\input; needs \\usepackage{booktabs} alone. Missing runs are comments behind it."""
    width = len(grid.columns) + 1
    lines = ["% needs \\usepackage{booktabs}", "\\begin{table}",
             "\\centering\\footnotesize\\setlength{\\tabcolsep}{3pt}", f"\\caption{{{_tex(grid.title)}}}",
             f"\\begin{{tabular}}{{l{'r' * len(grid.columns)}}}", "\\toprule",
             " & ".join([_tex(grid.row_heads[1]), *map(_tex, grid.columns)]) + " \\\\"]
    for label, rows in grid.blocks:
        lines.append("\\midrule")
        if label:
            lines += [f"\\multicolumn{{{width}}}{{l}}{{\\textit{{{_tex(label)}}}}} \\\\", "\\midrule"]
        lines += [" & ".join([_tex_head(name), *map(_tex_entry, row)]) + " \\\\" for name, row in rows]
    lines += ["\\bottomrule", "\\end{tabular}", ""]
    lines += [f"\\par\\raggedright {_tex(' '.join(_notes(grid)))}"] if _notes(grid) else []
    lines.append("\\end{table}")
    lines += [f"% [{gap.number}] {gap.label} ({gap.why}): {command}".replace("\n", " ")
              for gap in grid.gaps for command in _commands(grid, gap)]
    return "\n".join(line for line in lines if line) + "\n"


TEX = {"\\": "\\textbackslash{}", "&": "\\&", "%": "\\%", "$": "\\$", "#": "\\#", "_": "\\_", "{": "\\{", "}": "\\}",
       "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "±": "$\\pm$", "°": "$^{\\circ}$", "–": "--",
       "<": "$<$", ">": "$>$", "|": "\\textbar{}", '"': "''", "“": "``", "”": "''", "‘": "`", "’": "'", "—": "---",
       "−": "$-$", "×": "$\\times$", "≤": "$\\le$", "≥": "$\\ge$", "…": "\\dots{}", "\u00a0": "~",
       "α": "$\\alpha$", "β": "$\\beta$", "γ": "$\\gamma$", "δ": "$\\delta$", "Δ": "$\\Delta$", "θ": "$\\theta$",
       "λ": "$\\lambda$", "μ": "$\\mu$", "σ": "$\\sigma$", "τ": "$\\tau$"}


def _tex(text: str) -> str:
    """LaTeX reads UTF-8 since 2018, but its default fonts have Latin letters only; of others nothing is known."""
    return "".join(TEX.get(c) or (c if ord(c) < 128 or "LATIN" in unicodedata.name(c, "") else "?") for c in text)


def _tex_head(text: str) -> str:
    """A row's first cell: behind the end of a line, `[` and `*` would be arguments of it."""
    return ("{}" if text[:1] in ("[", "*") else "") + _tex(text)


def _tex_entry(entry: Entry) -> str:
    text = _tex(entry.text)
    marked = {BEST: f"\\textbf{{{text}}}", SECOND: f"\\underline{{{text}}}", TIED: f"{text}$^{{\\circ}}$"}
    half = f"{{\\tiny$\\pm${entry.half_text}}}"
    return _around(entry, marked.get(entry.mark, text), half, "$^{{[{}]}}$", "--")


def html(grid: Grid) -> str:
    """One self-contained page."""
    parts: list[str] = [f"<h1>{escape(grid.title)}</h1>", "<table>"]
    heads = "".join(f'<th scope="col">{escape(c)}</th>' for c in [grid.row_heads[1], *grid.columns])
    parts.append(f"<thead><tr>{heads}</tr></thead>")
    for label, rows in grid.blocks:
        parts.append("<tbody>")
        if label:
            parts.append(f'<tr><th scope="rowgroup" colspan="{len(grid.columns) + 1}">{escape(label)}</th></tr>')
        for name, row in rows:
            cells = "".join(f"<td>{_html_entry(entry)}</td>" for entry in row)
            parts.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
        parts.append("</tbody>")
    parts.append("</table>")
    parts.append("<ul>" + "".join(f"<li>{escape(note)}</li>" for note in _notes(grid)) + "</ul>")
    if grid.gaps:
        line = Markup("<li>[{}] {} ({}): <code>{}</code></li>")
        gaps = "".join(line.format(gap.number, gap.label, gap.why, command)
                       for gap in grid.gaps for command in _commands(grid, gap))
        parts.append(f"<h2>Missing</h2><ul>{gaps}</ul>")
    body = "\n".join(parts)
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(grid.title)}</title>\n'
            f"<style>{CSS}</style></head><body>\n{body}\n</body></html>\n")


CSS = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem }
h1 { font-size: 1.3rem } h2 { font-size: 1.1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap; font-weight: normal }
th[scope=row], th[scope=rowgroup], th:first-child { text-align: left }
thead { border-top: 2px solid; border-bottom: 1px solid } tbody { border-bottom: 1px solid }
th[scope=rowgroup] { font-style: italic } b { font-weight: 700 } small { opacity: .75 } code { white-space: pre-wrap }
"""


def _html_entry(entry: Entry) -> Markup:
    text = escape(entry.text)
    text = {BEST: Markup("<b>{}</b>"), SECOND: Markup("<u>{}</u>"),
            TIED: Markup("{}°")}.get(entry.mark, Markup("{}")).format(text)
    return Markup(_around(entry, text, Markup(" <small>± {}</small>").format(entry.half_text), "[{}]"))


def csv_text(grid: Grid) -> str:
    """One line a row: block, row, numbers under the table's headings; then plus-minus, marks, and what is missing."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    spread = [k for k in range(len(grid.columns)) if any(row[k].half is not None for row in _rows(grid))]
    marks = [k for k in range(len(grid.columns)) if any(row[k].mark for row in _rows(grid))]
    named = any(label for label, _ in grid.blocks)
    noted = any(e.note for row in _rows(grid) for e in row)
    writer.writerow([*([grid.row_heads[0]] if named else []), grid.row_heads[1], *grid.columns,
                     *(f"{grid.columns[k]} ±" for k in spread), *(f"{grid.columns[k]} mark" for k in marks),
                     *(["note"] if noted else []), *(["missing"] if grid.gaps else [])])
    by_number = {gap.number: gap for gap in grid.gaps}
    for label, rows in grid.blocks:
        for name, row in rows:
            gaps = [by_number[n] for n in dict.fromkeys(e.missing for e in row if e.missing is not None)]
            told = "; ".join(command for gap in gaps for command in _commands(grid, gap))
            writer.writerow([*([label] if named else []), name, *(e.text for e in row),
                             *(row[k].half_text for k in spread), *(row[k].mark for k in marks),
                             *(["; ".join(f"{c}: {e.note}" for c, e in zip(grid.columns, row, strict=True) if e.note)]
                               if noted else []), *([told] if grid.gaps else [])])
    return out.getvalue()


def _rows(grid: Grid) -> Iterator[list[Entry]]:
    return (row for _, rows in grid.blocks for _, row in rows)


def _around(entry: Entry, text: str, half: str, gap: str, empty: str = EMPTY) -> str:
    """Value, plus-minus, note, number of the gap."""
    out = text if entry.text else empty
    out += half if entry.text and entry.half is not None else ""
    out += f" ({entry.note})" if entry.note else ""
    return out + (" " + gap.format(entry.missing) if entry.missing is not None else "")


def _notes(grid: Grid) -> list[str]:
    used = {e.mark for e in grid.entries()} - {""}
    told = ", ".join(f"{mark} {LEGEND[mark]}" for mark in LEGEND if mark in used)
    return [*grid.notes, *([f"Shown as: {told}."] if told else [])]


def _commands(grid: Grid, gap: Gap) -> list[str]:
    return commands(gap.jobs, grid.name)


FORMATS: dict[str, Callable[[Grid], str]] = {"md": markdown, "tex": latex, "csv": csv_text, "html": html}
