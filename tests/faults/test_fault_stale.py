"""What is stale or damaged is not taken for whole: damage to one file is named, and costs that file."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from server import Server

from slm_exp.core.cache import digests
from slm_exp.core.cache.folder import problem
from slm_exp.core.cache.journal import Journal, read
from slm_exp.core.cache.store import StageStore
from slm_exp.core.errors import ConfigError, SlmError
from slm_exp.core.files import write_json
from slm_exp.models.files import INDEX, WEIGHTS, check_header, opened_files, weight_files
from slm_exp.runs.record import Run
from slm_exp.runs.state import DAMAGED, FINISHED

RUN = ("model=tiny", "tracking=none", "evaluation=none", "save_model=false", "calibration.n_samples=2",
       "calibration.seq_len=16", "method.threshold=0.6")


@pytest.fixture(scope="module")
def made(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    at = tmp_path_factory.mktemp("stale")
    ended = server.call("slm-exp", *RUN, f"hydra.run.dir={at}/run", f"cache.dir={at}/cache")
    assert ended.status == 0, ended.output
    return at / "run"


def test_one_bit_of_any_file_of_the_result_is_noticed(made: Path, tmp_path: Path) -> None:
    chance = random.Random(3)
    record = json.loads((made / "record.json").read_text())
    for name in (*record["files"], "record.json"):
        for _ in range(20):
            run = Path(shutil.copytree(made, tmp_path / "run"))
            data = bytearray((run / name).read_bytes())
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            (run / name).write_bytes(data)
            try:
                read = Run.read(run)
            except SlmError as error:
                assert name == "record.json", error  # noqa: PT017
            else:
                # a blank for a line break in record.json is the same record
                assert read.state == DAMAGED or read.record.raw == record, name
            shutil.rmtree(run)


@pytest.mark.parametrize("change", [
    lambda r: r.pop("files"), lambda r: r.update(files={}), lambda r: r["files"].pop("plan.json"),
    lambda r: r.update(digest=None), lambda r: r.pop("digest"), lambda r: r["eval"].update(dense={"average": 0.99}),
    lambda r: r["plan"].update(final_score=1.0), lambda r: r.update(surprise=1), lambda r: r.update(seconds=1),
])  # fmt: skip
def test_an_edited_record_is_damaged(change: Callable[[dict], object], made: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(made, tmp_path / "run"))
    record = json.loads((run / "record.json").read_text())
    change(record)
    (run / "record.json").write_text(json.dumps(record))
    assert Run.read(run).state == DAMAGED


def test_a_record_written_with_other_blanks_is_the_same(made: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(made, tmp_path / "run"))
    record = json.loads((run / "record.json").read_text())
    (run / "record.json").write_text(json.dumps(record, indent=4, sort_keys=True))
    assert Run.read(run).state == FINISHED


def test_a_flip_anywhere_in_a_cache_entry_costs_that_entry(tmp_path: Path) -> None:
    """Manifest or value: the entry is computed again, or is as it was."""
    store, chance = StageStore(tmp_path), random.Random(5)

    class Value:
        def save(self, folder: Path) -> None:
            write_json(folder / "value.json", {"a": 1})

        @classmethod
        def load(cls, folder: Path) -> Value:
            assert json.loads((folder / "value.json").read_text()) == {"a": 1}
            return cls()

    entry = store.entry("plan", {"x": 1})
    store.cached("plan", {"x": 1}, Value, Value)
    again = 0
    for _ in range(150):
        path = entry / chance.choice(["manifest.json", "value.json"])
        data = bytearray(path.read_bytes())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        problem(entry)
        again += not store.cached("plan", {"x": 1}, Value, Value)[1]
        shutil.rmtree(entry)
        store.cached("plan", {"x": 1}, Value, Value)
    assert again > 75


@pytest.mark.parametrize("line", [b"[]", b"[1]", b'[["a"], 1]', b'{"a": 1}', b"3", b"null", b"\xff", b"[" * 5000])
def test_a_line_of_a_journal_that_is_none_is_left_out(line: bytes, tmp_path: Path) -> None:
    """Also with a right checksum."""
    import zlib

    Journal(tmp_path).append("a", 1)
    with open(tmp_path / "journal.jsonl", "ab") as f:
        f.write(b"\n" + f"{zlib.crc32(line):08x} ".encode() + line)
    Journal(tmp_path).append("b", 2)
    assert read(tmp_path) == ({"a": 1, "b": 2}, 1)


MANIFESTS = (b"", b"[]", b"null", b"{", b'{"files": null}', b'{"files": {"a": null}}',
             b'{"files": {"a": {"bytes": 1e999}}}',
             b'{"files": {"../a": {"bytes": 1, "digest": "a"}}}', b'{"files": {"a": {"bytes": 1, "dihest": "a"}}}',
             b'{"files": ' + b"[" * 5000, b"\xff\xfe", b'{"files": {"a": {"bytes": "1x", "digest": "a"}}}')  # fmt: skip


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_a_manifest_that_is_none_is_a_damaged_entry(manifest: bytes, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(manifest)
    assert problem(tmp_path)


# --------------------------------------------------------------------------------------------------- identity


def test_a_change_that_keeps_size_and_times_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one")
    before = os.stat(path)
    first = digests.content_digest(path)
    path.write_bytes(b"two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert digests.content_digest(path) != first


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder as far as names go."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_an_index_beside_a_single_file_is_not_opened(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {"a": "../outside.safetensors"}}')
    assert weight_files(folder) == [WEIGHTS]
    assert folder / INDEX not in opened_files(folder)


@pytest.mark.parametrize("name", ["weights.bin", "../outside.safetensors", "/etc/a.safetensors", "a/b.safetensors",
                                  "a\\..\\b.bin", "", ".", "..", 3, None, ["a.safetensors"], "pytorch_model.bin",
                                  "model.safetensors.bin", "a.safetensors/../../b", "a.safetensors\x00.bin"])
def test_an_index_names_plain_safetensors_files_only(name: object, folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ConfigError, match="names"):
        weight_files(folder)


HEADERS = (b"[]", b"3", b'{"a": 3}', b'{"a": {"data_offsets": 3}}', b'{"a": {"data_offsets": [0]}}',
           b'{"a": {"data_offsets": [0, 1e999]}}', b'{"a": {"data_offsets": ["x", "y"]}}', b'{"a": ' + b"[" * 5000,
           b"\xff", b"{")  # fmt: skip


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("length", [None, 0, 2**63, 2**64 - 1])
def test_a_header_that_is_none_is_refused(header: bytes, length: int | None, folder: Path) -> None:
    n = len(header) if length is None else length
    (folder / WEIGHTS).write_bytes(n.to_bytes(8, "little") + header)
    with pytest.raises(ConfigError, match=r"model\.safetensors has"):
        check_header(folder, WEIGHTS)
