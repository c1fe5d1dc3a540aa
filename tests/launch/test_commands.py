"""`slm plan --commands`: a sweep by whatever runs lines of a shell."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from slm_exp.cli.main import main as slm
from slm_exp.runs.sweep import FINISHED, SweepFolder

ROOT = Path(__file__).resolve().parents[2]
GRID = ["model=tiny", "evaluation=none", "tracking=none", "calibration.n_samples=4", "calibration.seq_len=32",
        "runtime=cpu", "method.threshold=0.5,0.9", "hydra.sweep.dir=some sweep"]  # fmt: skip


def test_the_commands_through_xargs_are_the_sweep_and_again_do_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert slm(["plan", "-m", *GRID, "--commands"]) == 0
    lines = capfd.readouterr().out
    assert len(lines.splitlines()) == 2
    sweep = SweepFolder.read(tmp_path / "some sweep")
    assert [cell.state for cell in sweep.cells()] == ["waiting"] * 2
    assert shlex.split(lines.splitlines()[0])[:5] == ["env", "SLM_EXP_SWEEP=some sweep", "python", "-m", "slm_exp"]

    def through_xargs() -> str:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "SLM_EXP_CACHE": str(tmp_path / "cache"),
                       "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # fmt: skip
        done = subprocess.run(["xargs", "-d", "\n", "-P2", "-n1", "sh", "-c"], input=lines, capture_output=True,
                              text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    through_xargs()
    cells = sweep.cells()
    assert [cell.state for cell in cells] == [FINISHED] * 2
    written = [(cell.job.folder / "record.json").stat().st_mtime_ns for cell in cells]
    records = [json.loads((cell.job.folder / "record.json").read_text()) for cell in cells]
    assert {record["group"] for record in records} == {"some sweep"}
    assert not any((cell.job.folder / "model").exists() for cell in cells), "as in a multirun"
    through_xargs()
    assert [(cell.job.folder / "record.json").stat().st_mtime_ns for cell in cells] == written
    assert slm(["sweep", "resume", "some sweep"]) == 0, "the launcher finds its cells there"
    assert "2 of 2 jobs are finished" in capfd.readouterr().out


def test_a_single_run_is_one_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert slm(["plan", "model=tiny", "seed=3", "--commands"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    words = shlex.split(line)
    assert words[:5] == ["python", "-m", "slm_exp", "model=tiny", "seed=3"]
    assert words[-1].startswith("hydra.run.dir=outputs/")
    assert not (tmp_path / "outputs").exists() or not any((tmp_path / "outputs").rglob("*.json"))


def test_a_wrong_cell_prints_no_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert slm(["plan", "model=tiny", "method.threshold=0.9,1.9", "--commands"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "method.threshold = 1.9" in shown.err
    assert not list(tmp_path.iterdir())


def test_a_path_of_a_method_without_one_says_so_first(capsys):
    assert slm(["path", "method=shortgpt"]) == 2
    assert "method = shortgpt; expected slm: only it decides by a threshold" in capsys.readouterr().err
