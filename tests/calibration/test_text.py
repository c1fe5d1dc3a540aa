"""Texts to tokens: long enough documents, reproducible crops, exact ids; bad files are named with their line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from slm_exp.calibration.documents import read_documents
from slm_exp.calibration.jsonl import JsonLines
from slm_exp.core.errors import ConfigError, DataError

LONG = [f"{i}: " + "abcdefghij" * 30 for i in range(12)]


def write(path: Path, rows: list) -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    opener = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "wt", encoding="utf-8") as f:
        f.write(text)
    return path


@pytest.fixture
def long_file(tmp_path) -> Path:
    return write(tmp_path / "long.jsonl", [{"text": t, "n": i} for i, t in enumerate(LONG)])


def test_rows_are_crops_of_the_documents_they_name(tiny_handle, long_file):
    calibration = JsonLines(path=str(long_file), n_samples=10, seq_len=64)
    drawn = calibration.draw(tiny_handle, seed=3)
    assert drawn.tokens_NT.shape == (10, 64)
    assert drawn.tokens_NT.dtype == np.int32
    assert len({name.split("@")[0] for name in drawn.sample_ids}) == 10, "one crop a document"
    for ids, name in zip(drawn.tokens_NT, drawn.sample_ids, strict=True):
        document, offset = name.split("@")
        line = int(document.removeprefix("long:"))
        text = tiny_handle.tokenizer.decode(ids)
        assert LONG[line - 1][int(offset) :][:64] == text


def test_seed_decides_and_only_the_seed(tiny_handle, long_file):
    calibration = JsonLines(path=str(long_file), seq_len=64)
    one, two, other = (calibration.draw(tiny_handle, seed) for seed in (0, 0, 1))
    assert one.digest == two.digest != other.digest
    assert one.sample_ids == two.sample_ids
    own = JsonLines(path=str(long_file), seq_len=64, seed=1)
    assert own.draw(tiny_handle, 0).digest == other.digest, "calibration.seed wins over the run's"


def test_equal_contents_elsewhere_are_equal_calibration(tiny_handle, long_file, tmp_path):
    zipped = write(tmp_path / "other.jsonl.gz", [{"text": t} for t in LONG])
    one, two = (JsonLines(path=str(p), seq_len=64).draw(tiny_handle, 0) for p in (long_file, zipped))
    assert one.digest == two.digest


def test_identity_follows_contents_not_place(long_file, tmp_path):
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(long_file.read_bytes())
    here, there = JsonLines(path=str(long_file)), JsonLines(path=str(copy))
    assert here.identity() == there.identity()
    before = here.identity()
    copy.write_text(json.dumps({"text": "else"}))
    assert there.identity() != before
    assert JsonLines(path=str(long_file), seq_len=64).identity() != before


def test_short_documents_do_not_count(tiny_handle, tmp_path):
    file = write(tmp_path / "mixed.jsonl", [{"text": "x" * 20}, {"text": "y" * 40}] * 6)
    drawn = JsonLines(path=str(file), n_samples=6, seq_len=40).draw(tiny_handle, 0)
    assert set(map(int, drawn.tokens_NT.ravel())) == {tiny_handle.tokenizer("y")["input_ids"][0]}
    with pytest.raises(DataError, match=r"6 texts have at least 40 tokens; 7 are wanted. Lower calibration.n_samples"):
        JsonLines(path=str(file), n_samples=7, seq_len=40).draw(tiny_handle, 0)


def test_bos_only_when_asked_even_if_the_tokenizer_adds_it(make_tiny, long_file):
    from tokenizers.processors import TemplateProcessing

    handle = make_tiny()
    bos = handle.tokenizer.bos_token_id
    handle.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    assert handle.tokenizer("x")["input_ids"][0] == bos
    plain = JsonLines(path=str(long_file), seq_len=64).draw(handle, 0).tokens_NT
    assert not (plain == bos).any()
    asked = JsonLines(path=str(long_file), seq_len=64, add_bos=True).draw(handle, 0).tokens_NT
    assert asked.shape == plain.shape
    assert (asked[:, 0] == bos).all()
    assert not (asked[:, 1:] == bos).any()


def test_add_bos_without_a_bos_token(make_tiny, long_file):
    handle = make_tiny()
    handle.tokenizer.bos_token = None
    with pytest.raises(DataError, match=r"the tokenizer of tiny-llama has no BOS token. Set calibration.add_bos=false"):
        JsonLines(path=str(long_file), seq_len=64, add_bos=True).draw(handle, 0)


def test_a_model_without_tokenizer(tiny_handle, long_file):
    tiny_handle.load_tokenizer = lambda: None
    with pytest.raises(DataError, match=r"needs a tokenizer, .*Use calibration=tokens calibration.path="):
        JsonLines(path=str(long_file)).draw(tiny_handle, 0)


def test_ids_outside_the_vocabulary(tiny_handle, long_file):
    tiny_handle.config.vocab_size = 60
    with pytest.raises(DataError, match=r"token id \d+ at row 0, column \d+ lies outside the vocabulary .*\(0 to 59\)"):
        JsonLines(path=str(long_file), seq_len=64).draw(tiny_handle, 0)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}, '{"text": '], r"bad.jsonl, line 2: not JSON"),
        (
            [{"text": "a"}, "", {"txt": "b"}],
            r"line 3: no field 'text'; it has txt.*Did you mean txt.*calibration.field",
        ),
        (['["text"]'], r"line 1: a JSON list; expected an object"),
        ([{"text": 5}], r"line 1: field 'text' is a int; expected text"),
    ],
)
def test_bad_lines_are_named(tiny_handle, tmp_path, rows, message):
    file = write(tmp_path / "bad.jsonl", rows)
    with pytest.raises(DataError, match=message):
        JsonLines(path=str(file)).draw(tiny_handle, 0)


def test_a_truncated_archive_is_named(tiny_handle, tmp_path):
    file = write(tmp_path / "cut.jsonl.gz", [{"text": t} for t in LONG])
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"cut.jsonl.gz: cannot be read to its end"):
        JsonLines(path=str(file)).draw(tiny_handle, 0)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (None, r"calibration.path = None; expected a file or folder of JSON lines"),
        ("/nowhere.jsonl", r"calibration.path = /nowhere.jsonl: there is no such file. Expected a file or folder"),
    ],
)
def test_a_path_that_is_nothing(path, message):
    with pytest.raises(ConfigError, match=message):
        JsonLines(path=path).identity()


def test_folders_parquet_and_plain_text(tiny_handle, tmp_path):
    import pyarrow
    import pyarrow.parquet

    write(tmp_path / "a.jsonl", [{"text": t} for t in LONG[:4]])
    pyarrow.parquet.write_table(pyarrow.table({"text": LONG[4:8]}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text("".join(f"{t}\n" for t in LONG[8:]))
    (tmp_path / "ignored.md").write_text("x" * 1000)
    drawn = JsonLines(path=str(tmp_path), n_samples=9, seq_len=64).draw(tiny_handle, 0)
    names = {name.split("@")[0] for name in drawn.sample_ids}
    assert names == {"a:1", "a:2", "a:3", "a:4", "b:0", "b:1", "b:2", "b:3", "c:0"}, "c.txt is one piece of 16 x 64"
    with pytest.raises(DataError, match=r"b.parquet: no field 'txt'; it has text. Did you mean text"):
        list(read_documents(tmp_path / "b.parquet", "txt", "b", 9))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"b.parquet: not a readable parquet file"):
        list(read_documents(tmp_path / "b.parquet", "text", "b", 9))
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"c.txt, line 1: not UTF-8"):
        list(read_documents(tmp_path / "c.txt", "text", "c", 9))


def test_a_long_document_becomes_bounded_ones(tiny_handle, tmp_path, monkeypatch):
    from slm_exp.core import text

    monkeypatch.setattr(text.slices, "__defaults__", (500,))
    words = " ".join(f"word{i}" for i in range(1000))
    file = write(tmp_path / "one.jsonl", [{"text": "short " * 20}, {"text": words}])
    found = list(read_documents(file, "text", "one", 9))
    assert [d.name for d in found[:3]] == ["one:1", "one:2/0", "one:2/1"]
    assert max(len(d.text) for d in found) <= 500
    assert "".join(d.text for d in found[1:]) == words
    drawn = JsonLines(path=str(file), n_samples=4, seq_len=64).draw(tiny_handle, 0)
    assert drawn.tokens_NT.shape == (4, 64)
