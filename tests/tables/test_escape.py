"""What texts of records do in a table of any format: nothing."""

from __future__ import annotations

import csv
import io
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_exp.core.format import printable
from slm_exp.tables.formats import FORMATS, _csv, _md, _tex
from slm_exp.tables.grid import Entry, Gap, Grid

EVIL = ["\\input{/etc/passwd}", "a_b & 50 %", "<img src=x onerror=alert(1)>", '=HYPERLINK("http://x")', "+1+1",
        "@SUM(1)", "\x1b[2J\x1b]0;title\x07", "a | b", "[x](javascript:alert(1))", "`code`", "**bold**", "line\nbreak",
        "{", "\u202e"]


def everywhere(text: str) -> Grid:
    """A grid with a text at every place that can hold one."""
    return Grid("g", text, [text, "c"], [(text, [(text, [Entry(text, note=text), Entry(1.0, 0.5, 1, missing=1)])])],
                [text], [Gap(1, (("seed=1",),), text, text)], row_heads=("block", text))


@pytest.mark.parametrize("text", EVIL)
def test_latex_has_no_command_of_theirs(text: str) -> None:
    drawn = FORMATS["tex"](everywhere(text))
    body = "\n".join(line for line in drawn.splitlines() if not line.startswith("%"))
    assert "\\input" not in body
    assert not re.search(r"(?<!\\)[_#]", body)
    assert body.count("{") - body.count("\\{") == body.count("}") - body.count("\\}")
    assert "\x1b" not in drawn
    assert drawn.count("\n%") == 1  # a line of the record does not leave the comment


@pytest.mark.parametrize("text", EVIL)
def test_markdown_has_no_html_link_or_cell_of_theirs(text: str) -> None:
    drawn = FORMATS["md"](everywhere(text))
    assert "<img" not in drawn
    assert "](" not in drawn.replace("\\](", "")
    rows = [line for line in drawn.splitlines() if line.startswith("|")]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [4, 4, 4]
    assert "\x1b" not in drawn


@pytest.mark.parametrize("text", EVIL)
def test_csv_has_no_formula(text: str) -> None:
    rows = list(csv.reader(io.StringIO(FORMATS["csv"](everywhere(text)))))
    assert not [cell for row in rows for cell in row if cell[:1] in "=+-@" and cell[:1]]
    assert not [cell for row in rows for cell in row if "\x1b" in cell]


@pytest.mark.parametrize("text", EVIL)
def test_html_has_no_element_of_theirs(text: str) -> None:
    tags: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            tags.append(tag)

    Reader().feed(FORMATS["html"](everywhere(text)))
    assert "img" not in tags
    assert tags.count("script") == 1  # the page's own


def test_numbers_and_names_stay_as_they_are() -> None:
    assert [_csv(text) for text in ("-0.05", "+1.00", "-", "a-b")] == ["-0.05", "+1.00", "'-", "a-b"]
    assert _md("sum_of_deltas ± 0.5 (top_layer) [1]") == "sum_of_deltas ± 0.5 (top_layer) [1]"
    assert _tex("50 % of a_b") == "50 \\% of a\\_b"


@settings(deadline=None)
@given(st.text())
def test_nothing_unseen_reaches_a_terminal(text: str) -> None:
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", printable(text))
