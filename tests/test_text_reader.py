"""The reader of texts: every encoding, line end, kind and packing gives the same text, or an error with its place."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path

import pytest

from slm_exp.core import text
from slm_exp.core.errors import DataError
from slm_exp.core.text import BOM, pieces, read_field, read_lines, read_rows, slices

TEXTS = ["plain", "naïve 漢字 🙂", "a\u2028b\x0cc\x85d", "  blanks  ", ""]


@pytest.mark.parametrize("bom", [b"", BOM])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("packed", [False, True])
def test_any_line_end_and_mark_give_the_same(tmp_path, bom, end, packed):
    ending = ".gz" if packed else ""
    write = (lambda p, b: p.write_bytes(gzip.compress(b))) if packed else Path.write_bytes
    rows, plain = tmp_path / f"a.jsonl{ending}", tmp_path / f"a.txt{ending}"
    write(rows, bom + end.join(json.dumps({"text": t}, ensure_ascii=False) for t in [*TEXTS, "last"]).encode())
    write(plain, bom + end.join(TEXTS).encode())
    assert [t for _, t in read_field(rows, "text")] == [*TEXTS, "last"]
    assert "".join(read_lines(plain)) == "\n".join(TEXTS)
    assert list(read_lines(plain))[2] == TEXTS[2] + "\n"


def test_every_kind(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"text": t, "n": i} for i, t in enumerate(TEXTS)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "b.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    (tmp_path / "c.json").write_text(json.dumps(rows, indent=2))
    (tmp_path / "d.json").write_text("\n\n".join(map(json.dumps, rows)))
    (tmp_path / "e.json.gz").write_bytes(gzip.compress(BOM + json.dumps(rows).encode()))
    for file in sorted(tmp_path.iterdir()):
        assert [row.value for row in read_rows(file)] == rows, file.name
        assert [t for _, t in read_field(file, "text")] == TEXTS, file.name


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("a.md", b"x", r"a.md: expected a file ending in .txt, .jsonl"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', r"a.jsonl, line 2: not UTF-8"),
        ("a.jsonl", b'\xff\xfe{\x00', r"line 1: not UTF-8"),
        ("a.jsonl", b"[" * 10**5, r"line 1: not JSON"),
        ("a.jsonl", b'{"text": "a"}\r{"text": 3}', r"line 2: field 'text' is a int"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"line 1: field 'text' holds half of a character"),
        ("a.jsonl", b'{"txt": "a"}', r"no field 'text'; it has txt. Did you mean txt\? Set x.field"),
        ("a.json", b'[{"text": "a"}, "b"]', r"a.json, entry 2: a JSON str; expected an object"),
        ("a.jsonl.gz", b"not packed", r"a.jsonl.gz: cannot be read to its end"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}', mtime=0)[:-9], r"a.jsonl.gz: cannot be read to its end"),
        ("a.parquet.gz", gzip.compress(b"PAR1", mtime=0), r"a.parquet.gz: not a readable parquet file"),
    ],
)
def test_damage_is_named_with_its_place(tmp_path, name, contents, message):
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(DataError, match=message):
        list(read_field(tmp_path / name, "text", "x.field"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json.gz", "a.parquet.gz"])
def test_more_than_the_limit_is_refused_before_it_is_in_memory(tmp_path, name, monkeypatch):
    monkeypatch.setattr(text, "LIMIT", 10**6)
    start = b'[{"text": "\n' if name.startswith("a.json.") else b'{"text": "ok"}\n{"text": "'
    with (gzip.open if name.endswith(".gz") else open)(tmp_path / name, "wb") as f:
        f.write(start)
        for _ in range(40):
            f.write(b"x\n" * 500_000 if name.startswith("a.json.") else b"x" * 1_000_000)
    tracemalloc.start()
    with pytest.raises(DataError, match=rf"{name}(, line [12])?: a .* of more than 0.001 GB"):
        list(read_field(tmp_path / name, "text"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6, "lines are kept as objects of 35 bytes and more"


def test_a_long_line_is_held_about_twice(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "word " * 4_000_000}))
    tracemalloc.start()
    (one,) = (t for _, t in read_field(tmp_path / "a.jsonl", "text"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(one) == 20_000_000
    assert peak < 2.3 * 20e6


def test_pieces_lose_nothing():
    lines = "".join(f"line {i}\n" * (i % 5) for i in range(50)) + "end"
    cut = list(pieces(lines.splitlines(keepends=True), 40))
    assert "".join(cut) == lines
    assert all(len(p) >= 40 for p in cut)
    assert list(pieces([], 40)) == []
    assert list(pieces(["short"], 40)) == ["short"]


@pytest.mark.parametrize("chars", [4, 10, 33])
def test_slices_lose_nothing_and_cut_no_word_where_they_can(chars):
    for long in ("the quick brown fox " * 20, "x" * 101, "", "abcd"):
        cut = list(slices(long, chars))
        assert "".join(cut) == long
        assert all(len(part) <= chars for part in cut)
    assert list(slices("aaaa bbbb cccc", 6)) == ["aaaa", " bbbb", " cccc"]
