"""What `slm sweep resume` takes from a folder's sweep.json: nothing that could run code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slm_exp.cli import sweep as command
from slm_exp.core.errors import ConfigError

GOOD = ["model=tiny", "experiment=demo", "method=slm,angular", "method.threshold=choice(0.5,0.6)", "seed=0,1",
        "save_model=False", "++evaluation.corpora.mine=/data/a.txt", "cache.dir=/tmp/my cache", "width.layers=[2,6]",
        "hydra/launcher=slurm", "hydra.launcher.partition='low'", "hydra.launcher.mem_gb=8", "kernel=glob(*)",
        "hydra.sweeper.max_jobs=5000", "model.trust_remote_code=false"]  # fmt: skip
BAD = [
    "+hydra.callbacks.x._target_=os.system",
    "++hydra.callbacks={a: {_target_: os.system}}",
    "hydra={callbacks: {a: {_target_: os.system}}}",
    "hydra/launcher=../../../tmp/x",
    "hydra.launcher._target_=os.system",
    "hydra.launcher.setup=[touch /tmp/x]",
    "hydra.launcher.partition='a\ntouch x'",
    "hydra.launcher.submitit_folder=/tmp/x",
    "hydra.searchpath=[file:///tmp/x]",
    "hydra.job.env_set={A: b}",
    "hydra.job.chdir=true",
    "hydra.sweep.subdir=../../x",
    "experiment=../../../tmp/x",
    "+kernel@hydra.callbacks=rbf",
    "~kernel",
    "model.trust_remote_code=true",
    "++model.trust_remote_code=choice(true)",
    "+model={trust_remote_code: true}",
    "word",
]


def folder(path: Path, argv: list[str], job: list[str]) -> Path:
    about = {"run_id": "0" * 16, "overrides": job, "folder": "0" * 16, "slug": "", "save_model": False}
    (path / "sweep.json").write_text(json.dumps({"argv": argv, "cwd": str(path), "jobs": [about]}))
    return path


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The command lines that were handed to the run."""
    calls: list[list[str]] = []
    monkeypatch.setattr(command, "run", lambda argv: calls.append(list(argv)) or 0)
    monkeypatch.chdir(tmp_path)
    return calls


def test_groups_fields_and_the_launchers_settings_are_taken(tmp_path: Path, launched: list[list[str]]) -> None:
    assert command.main(["resume", str(folder(tmp_path, GOOD, ["seed=1"])), "hydra.launcher.mem_gb=16"]) == 0
    (argv,) = launched
    assert argv[0] == "-m"
    assert argv[1 : len(GOOD)] == [o for o in GOOD if o != "hydra.launcher.mem_gb=8"]
    assert argv[len(GOOD) :][0] == "hydra.launcher.mem_gb=16"
    assert argv[-1] == "hydra.sweeper.select=missing"


@pytest.mark.parametrize("override", BAD)
@pytest.mark.parametrize("place", ["argv", "job"])
@pytest.mark.parametrize("verb", ["resume", "rerun"])
def test_anything_else_is_refused_by_name(
    override: str, place: str, verb: str, tmp_path: Path, launched: list[list[str]]
) -> None:
    argv, job = (["seed=0", override], ["seed=0"]) if place == "argv" else (["seed=0"], ["seed=0", override])
    with pytest.raises(ConfigError) as refused:
        command.main([verb, str(folder(tmp_path, argv, job))])
    assert repr(override) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not launched


def test_what_the_command_line_gives_again_is_taken_from_there(tmp_path: Path, launched: list[list[str]]) -> None:
    where = folder(tmp_path, ["seed=0", "hydra.verbose=true", "model.trust_remote_code=true"], ["seed=0"])
    assert command.main(["resume", str(where), "hydra.verbose=false", "model.trust_remote_code=true"]) == 0
    (argv,) = launched
    assert argv.count("hydra.verbose=false") == 1
    assert "hydra.verbose=true" not in argv
    assert "model.trust_remote_code=true" in argv
