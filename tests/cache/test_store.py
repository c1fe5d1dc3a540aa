"""The stage cache: computed once, never half, never stale, never in the way."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from slm_exp.core.cache import store as store_module
from slm_exp.core.cache.store import StageStore
from slm_exp.core.files import write_json


@dataclass
class Value:
    x: int

    def save(self, folder: Path) -> None:
        write_json(folder / "value.json", {"x": self.x})

    @classmethod
    def load(cls, folder: Path) -> "Value":
        return cls(json.loads((folder / "value.json").read_text())["x"])


class Counter:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Value:
        self.calls += 1
        return Value(self.calls)


def entries(store: StageStore) -> list[Path]:
    return [p for p in (store.folder / "plan").iterdir() if p.is_dir()]


def test_same_inputs_compute_once(tmp_path):
    store, compute = StageStore(tmp_path), Counter()
    assert store.cached("plan", {"a": 1}, Value, compute) == (Value(1), False)
    assert store.cached("plan", {"a": 1}, Value, compute) == (Value(1), True)
    assert store.cached("plan", {"a": 2}, Value, compute) == (Value(2), False)


def test_the_key_feels_code_and_libraries(tmp_path, monkeypatch):
    store = StageStore(tmp_path)
    key = store.key("plan", {"a": 1})
    monkeypatch.setattr(store_module, "code_digest", lambda files: "edited")
    edited = store.key("plan", {"a": 1})
    monkeypatch.setattr(store_module, "library_versions", lambda names: {"torch": "99"})
    assert len({key, edited, store.key("plan", {"a": 1})}) == 3


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "manifest"])
def test_a_damaged_entry_is_reported_and_recomputed(tmp_path, caplog, damage):
    store, compute = StageStore(tmp_path), Counter()
    store.cached("plan", {}, Value, compute)
    (entry,) = entries(store)
    file = entry / ("manifest.json" if damage == "manifest" else "value.json")
    if damage == "delete":
        file.unlink()
    elif damage == "flip":
        file.write_bytes(file.read_bytes().replace(b"1", b"7"))
    else:
        file.write_bytes(file.read_bytes()[:-3])
    assert store.cached("plan", {}, Value, compute) == (Value(2), False)
    assert "damaged" in caplog.text
    assert store.cached("plan", {}, Value, compute) == (Value(2), True)


def test_a_failing_computation_leaves_nothing(tmp_path):
    store = StageStore(tmp_path)

    def explode() -> Value:
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        store.cached("plan", {}, Value, explode)
    assert entries(store) == []
    assert store.cached("plan", {}, Value, Counter())[1] is False


def test_concurrent_askers_share_one_computation(tmp_path):
    store, gate = StageStore(tmp_path), threading.Event()
    calls = []

    def slow() -> Value:
        calls.append(1)
        gate.wait(5)
        return Value(1)

    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(store.cached, "plan", {}, Value, slow) for _ in range(3)]
        gate.set()
        results = [f.result() for f in asked]
    assert len(calls) == 1
    assert sorted(cached for _, cached in results) == [False, True, True]


def test_a_cache_that_cannot_be_written_only_warns(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    store = StageStore(tmp_path / "file")
    assert store.cached("plan", {}, Value, Counter()) == (Value(1), False)
    assert "cache" in caplog.text


def test_no_folder_means_no_cache():
    compute = Counter()
    StageStore(None).cached("plan", {}, Value, compute)
    StageStore(None).cached("plan", {}, Value, compute)
    assert compute.calls == 2
