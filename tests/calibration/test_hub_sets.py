"""Hub data sets: one named file each, from the local cache or fetched; a local copy through calibration.path."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path

import pytest

from slm_exp.calibration.bookcorpus import BookCorpus
from slm_exp.calibration.c4 import C4
from slm_exp.calibration.wikitext2 import WikiText2
from slm_exp.core.errors import DataError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SETS = [BookCorpus, C4, WikiText2]


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put(hub: Path, kind, texts: list[str]) -> None:
    """Leave a data set's file in the local Hugging Face cache."""
    at = hub / f"datasets--{kind.repo.replace('/', '--')}"
    commit = kind.revision if kind.revision and len(kind.revision) == 40 else COMMIT
    ref = at / "refs" / (kind.revision or "main")
    ref.parent.mkdir(parents=True)
    ref.write_text(commit)
    file = at / "snapshots" / commit / kind.file
    file.parent.mkdir(parents=True)
    if kind.file.endswith(".json.gz"):
        with gzip.open(file, "wt") as f:
            f.writelines(json.dumps({"text": t, "url": "x"}) + "\n" for t in texts)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), file)


@pytest.mark.parametrize("kind", SETS)
def test_from_the_local_cache(kind, hub_cache, tiny_handle):
    put(hub_cache, kind, [f"row {i} " + "x" * 500 + "\n" for i in range(200)])
    drawn = kind(seq_len=64).draw(tiny_handle, 0)
    assert drawn.tokens_NT.shape == (10, 64)
    assert drawn.source == f"{kind.repo}/{kind.file}"
    assert all(name.startswith(f"{kind.name}:") for name in drawn.sample_ids)


def test_bookcorpus_rows_are_sentences_and_only_long_ones_count(hub_cache, tiny_handle):
    put(hub_cache, BookCorpus, ["short one ."] * 50 + ["a long sentence " * 10] * 12)
    drawn = BookCorpus(seq_len=64).draw(tiny_handle, 0)
    assert all(50 <= int(name.split(":")[1].split("@")[0]) < 62 for name in drawn.sample_ids)


def test_wikitext_rows_are_lines_and_are_joined(hub_cache, tiny_handle):
    put(hub_cache, WikiText2, ["", " = Title = \n", "", " few words .\n"] * 300)
    drawn = WikiText2(seq_len=20, n_samples=5).draw(tiny_handle, 0)
    joined = " = Title = \n few words .\n" * 300
    assert all(tiny_handle.tokenizer.decode(ids) in joined for ids in drawn.tokens_NT)


@pytest.mark.parametrize("kind", SETS)
def test_a_local_copy(kind, hub_cache, tiny_handle, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"text": f"{i} " + "y" * 200}) + "\n" for i in range(12)))
    calibration = kind(seq_len=64, path=str(file))
    drawn = calibration.draw(tiny_handle, 0)
    assert drawn.source == str(file)
    assert str(file) not in json.dumps(calibration.identity())
    assert calibration.identity() != kind(seq_len=64).identity()


@pytest.mark.parametrize("kind", SETS)
def test_offline_fails_at_once_with_the_remedy(kind, hub_cache, tiny_handle):
    start = time.monotonic()
    with pytest.raises(DataError) as error:
        kind().draw(tiny_handle, 0)
    assert time.monotonic() - start < 5
    for part in (f"calibration.path = {kind.repo}", "HF_HUB_OFFLINE", "--repo-type dataset", "to a local file"):
        assert part in str(error.value)


def test_one_quick_question_then_an_answer(hub_cache, tiny_handle, monkeypatch):
    import huggingface_hub
    from huggingface_hub import constants

    asked = []

    def no_route(url, timeout):
        asked.append((url, timeout))
        raise TimeoutError("slow")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", no_route)
    with pytest.raises(DataError, match=r"the hub does not answer \(TimeoutError: slow\)"):
        WikiText2().draw(tiny_handle, 0)
    ((url, timeout),) = asked
    assert url.endswith(f"/datasets/Salesforce/wikitext/resolve/{WikiText2.revision}/{WikiText2.file}")
    assert timeout <= 5


@pytest.mark.network
@pytest.mark.parametrize("kind", SETS)
def test_from_the_hub(kind, hub_cache, tiny_handle, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert kind().draw(tiny_handle, 0).tokens_NT.shape == (10, 128)
