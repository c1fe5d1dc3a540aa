"""Nothing that is not ours is removed; nothing that is too large is taken into memory."""

from __future__ import annotations

import gzip
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from slm_exp.calibration.jsonl import JsonLines
from slm_exp.calibration.tokens import Tokens
from slm_exp.cli import main as cli
from slm_exp.core import text
from slm_exp.core.cache.folder import MARKER, TAG, find_entries, foreign, prune
from slm_exp.core.documents import read_yaml
from slm_exp.core.errors import ConfigError, DataError, SlmError
from slm_exp.evaluation.base import Evaluation
from slm_exp.methods.from_plan import FromPlan
from slm_exp.models.config_file import read_config_file
from slm_exp.recovery.full import Full
from slm_exp.runs.foreign import read_foreign
from slm_exp.runs.record import Run
from slm_exp.runs.schema import Record

KEY = "0123456789abcdef"
DESTRUCTIVE = (["prune", "--max-size", "0"], ["prune", "--older-than", "0s"], ["verify", "--repair"])


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def put(path: Path, contents: bytes = b"mine") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents)
    return path


FOREIGN = {
    "a thesis": ["thesis/chapter1/a.tex"],
    "the marker of another program": [f"{MARKER}", "plan/photos/a.jpg"],
    "names of stages": ["plan/notes/a.txt", "model/2026/weights.bin"],
    "a key without an entry": [f"plan/{KEY}/a.txt"],
    "an entry beside something else": [f"plan/{KEY}/manifest.json", "letters/a/b.txt"],
    "a file where a stage's folder would be": ["plan"],
    "a memory of another form": ["digests/a.json", "digests/notes.txt"],
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("words", DESTRUCTIVE, ids=lambda w: w[0] + w[1])
def test_a_folder_that_is_no_cache_stays(
    name: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in FOREIGN[name]:
        put(tmp_path / file)
    before = everything(tmp_path)
    assert cli.main(["cache", *words, "--dir", str(tmp_path)]) == 2
    monkeypatch.setenv("SLM_EXP_CACHE", str(tmp_path))
    assert cli.main(["cache", *words]) == 2
    assert everything(tmp_path) == before
    assert "nothing in it was touched" in capsys.readouterr().err


@pytest.mark.parametrize("words", DESTRUCTIVE, ids=lambda w: w[0] + w[1])
def test_a_link_in_a_cache_is_not_followed(words: list[str], tmp_path: Path) -> None:
    """Neither a stage's folder that is a link, nor an entry, nor a stale temporary folder."""
    cache, mine = tmp_path / "cache", tmp_path / "mine"
    put(cache / MARKER, TAG.encode())
    put(mine / KEY / "manifest.json")
    put(mine / "photo.jpg")
    (cache / "plan").symlink_to(mine)
    (cache / "model").mkdir()
    (cache / "model" / KEY).symlink_to(mine)
    (cache / "model" / f".{KEY}.1.tmp").symlink_to(mine)
    os.utime(cache / "model" / f".{KEY}.1.tmp", (1, 1), follow_symlinks=False)
    before = everything(mine)
    assert cli.main(["cache", *words, "--dir", str(cache)]) == 0
    assert everything(mine) == before


def test_an_unmarked_folder_without_entries_is_left_alone(tmp_path: Path) -> None:
    assert foreign(tmp_path) is None
    assert find_entries(tmp_path) == []
    assert prune(tmp_path, 0, 0).entries == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz"])
def test_a_bomb_is_refused_by_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "LIMIT", 10**6)
    bomb = put(tmp_path / name, gzip.compress(b"a" * 10**7))
    read = text.read_lines(bomb) if ".txt" in name else text.read_rows(bomb, "text")
    with pytest.raises(DataError, match=r"gz, line 1: a line of more than"):
        list(read)


def test_a_matrix_that_unpacks_to_much_costs_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "record.json", b'{"run_id": "a", "status": "finished"}')
    monkeypatch.setattr("slm_exp.core.types.MAX_BYTES", 10**6)
    np.savez_compressed(tmp_path / "similarity.npz", matrix=np.zeros((600, 600), "float32"), kernel="linear",
                        estimator="unbiased", skip_first_token=True, batch=256)
    run = Run.read(tmp_path)
    assert run.similarity is None
    assert "would unpack to" in str(run.unreadable[0])


@pytest.mark.parametrize("damage", ["header", "shape", "not a zip", "empty", "method"])
def test_a_damaged_matrix_costs_the_picture(damage: str, tmp_path: Path) -> None:
    put(tmp_path / "record.json", b'{"run_id": "a", "status": "finished"}')
    path = tmp_path / "similarity.npz"
    with zipfile.ZipFile(path, "w") as packed:
        head = b"{'descr': '<f4', 'fortran_order': False, 'shape': (10000000, 10000000), }\n"
        shape = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head
        contents = {"header": b"\x93NUMPY\x01\x00\x10\x00" + b"(" * 16, "shape": shape}
        packed.writestr("matrix.npy", contents.get(damage, b""))
    data = path.read_bytes()
    if damage == "method":  # a way of packing that nobody has
        path.write_bytes(data.replace(b"\x14\x00\x00\x00\x00\x00", b"\x14\x00\x00\x00\x63\x00"))
    if damage in ("not a zip", "empty"):
        path.write_bytes(b"PK\x03\x04" if damage == "not a zip" else b"")
    assert Run.read(tmp_path).similarity is None


# ------------------------------------------------------------------------------------- pipes and devices for files


@pytest.mark.parametrize("what", ["a pipe", "a device"])
def test_what_waits_for_ever_or_has_no_end_is_no_file(what: str, tmp_path: Path) -> None:
    """Records, plans, settings, matrices, samples and model files: refused at once, and not opened."""
    def put_odd(name: str) -> Path:
        path = tmp_path / name
        os.mkfifo(path) if what == "a pipe" else path.symlink_to("/dev/zero")
        return path

    for name in ("record.json", "plan.json", "similarity.npz", "config.yaml", "a.jsonl.gz", "a.txt", "config.json"):
        put_odd(name)
    for settings in (JsonLines(path=str(tmp_path / "a.txt")), Tokens(path=str(put_odd("a.npy"))),
                     Full(data="jsonl", path=str(tmp_path / "a.txt"))):
        with pytest.raises(ConfigError, match=r"\.path = \S+: it is a pipe or a device"):
            settings.identity()
    assert "it is a pipe or a device" in str(Evaluation(protocol=str(tmp_path / "record.json")).refuses())
    assert "it is a pipe or a device" in str(Evaluation(corpora={"mine": str(tmp_path / "a.txt")}).refuses())
    with pytest.raises(SlmError, match=r"record\.json cannot be read: it is a pipe or a device"):
        Run.read(tmp_path)
    with pytest.raises(ConfigError, match="a pipe or a device"):
        FromPlan(path=str(tmp_path)).identity()
    run = Run(tmp_path, Record())
    assert run.similarity is None
    assert run.config_yaml is None
    with pytest.raises(ConfigError, match="a pipe or a device"):
        read_yaml(tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match="a pipe or a device"):
        read_config_file(tmp_path)
    for read in (lambda: text.read_rows(tmp_path / "a.jsonl.gz"), lambda: text.read_lines(tmp_path / "a.txt")):
        with pytest.raises(DataError, match="a pipe or a device"):
            list(read())
    with pytest.raises(ConfigError, match="a pipe or a device"):
        read_foreign(tmp_path / "plan.json")
