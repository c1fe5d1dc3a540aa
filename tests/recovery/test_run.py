"""A run with a recovery: its record, its stage in the cache, its run_id, its refusals."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.runs import QUICK, tiny_run

from slm_exp.core.errors import ConfigError
from slm_exp.launch.compose import compose_run

FIRST = ("method=first", "method.target_layers=6")


@pytest.fixture
def run(tmp_path: Path) -> Any:
    return lambda *overrides, folder="run": tiny_run(tmp_path / folder, *FIRST, *overrides)


def stage(record: dict[str, Any]) -> dict[str, Any]:
    return next(s for s in record["stages"] if s["name"] == "recover")


def test_the_record_tells_the_refit_and_the_cache_keeps_it(run: Any) -> None:
    refit = ["recovery=reconstruct", "recovery.n_samples=10", "recovery.seq_len=32"]
    first = run(*refit)
    assert not stage(first)["cached"]
    about = first["recovery"]
    assert about["tokens"]["shape"] == [10, 32]
    assert about["tokens"]["digest"] != first["calibration"]["digest"]
    assert [step["layer"] for step in about["layers"]] == [0]
    again = run(*refit, "tracking=none", folder="again")
    assert stage(again)["cached"]
    assert again["recovery"] == about
    other = run(*refit, "seed=1", folder="other")
    assert not stage(other)["cached"]
    assert len({r["run_id"] for r in (first, other, run(folder="plain"))}) == 3


def test_the_contents_of_the_fit_decide_the_run_id_and_its_place_does_not(tmp_path: Path) -> None:
    ids = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(seed).integers(0, 256, (8, 16)))
        cfg = compose_run([*QUICK, *FIRST, "recovery=reconstruct", f"recovery.path={tmp_path / name}.npy"])
        ids.append(cfg.run_id)
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize("name", ["reconstruct", "feature_distill"])
def test_streams_of_another_size_are_refused(name: str) -> None:
    extra = ["recovery.data=bundled"] if name != "reconstruct" else []
    narrow = ["width=minitron", "width.ratio=0.2", "width.hidden_size=24"]
    with pytest.raises(ConfigError, match=rf"width\.hidden_size = 24; expected null with recovery={name}"):
        compose_run([*QUICK, *FIRST, *narrow, f"recovery={name}", *extra])


def test_a_half_precision_model_has_no_float32_training() -> None:
    with pytest.raises(ConfigError, match=r"recovery.precision = float32; expected auto or bfloat16 with model.dtype"):
        compose_run([*QUICK, *FIRST, "model.dtype=bfloat16", "recovery=full", "recovery.precision=float32"])


def test_a_narrowed_model_is_refitted_in_every_layer(run: Any) -> None:
    record = run("recovery=reconstruct", "recovery.n_samples=10", "recovery.seq_len=32", "width=magnitude",
                 "width.ratio=0.25")
    steps = record["recovery"]["layers"]
    assert [step["layer"] for step in steps] == [*range(6)]
    assert all(step["errors"][-1] <= step["errors"][0] for step in steps)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "lora"])
def test_two_processes_of_a_launcher_train_what_one_does(name: str, tmp_path: Path) -> None:
    """full: in the environment that accelerate launch and torchrun give; lora: by `recovery.processes`. On the CPU."""
    command = [sys.executable, "-m", "slm_exp", *QUICK, f"recovery={name}", "recovery.data=bundled", "recovery.lr=1e-3",
               "recovery.seq_len=32", "recovery.batch_size=8", "recovery.micro_batch_size=4", "recovery.max_steps=4",
               "recovery.held_out=8", "recovery.checkpoint_every=2", "recovery.warmup_steps=1", "save_model=true",
               *(["recovery.dropout=0"] if name == "lora" else [])]  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launched = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}

    def start(folder: str, words: Sequence[str] = (), **env: str) -> subprocess.Popen[str]:
        where = [*words, f"hydra.run.dir={tmp_path / folder}", f"cache.dir={tmp_path / folder}_cache"]
        return subprocess.Popen([*command, *where], env=os.environ | env, stderr=subprocess.PIPE, text=True)

    if name == "full":
        several = [start("two", RANK=str(i), LOCAL_RANK=str(i), **launched) for i in range(2)]
    else:
        several = [start("two", words=["recovery.processes=2"])]
    running = [start("one"), *several]
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    one, two = (json.loads((tmp_path / folder / "record.json").read_text()) for folder in ("one", "two"))
    assert two["status"] == "finished"
    assert two["recovery"]["processes"] == 2
    for curve in ("loss", "held_out_loss"):
        assert [loss for _, loss in two["recovery"][curve]] == pytest.approx(
            [loss for _, loss in one["recovery"][curve]], rel=1e-3)
    assert one["run_id"] == two["run_id"]
    assert not any((tmp_path / "two" / "recovery").iterdir())
    assert (tmp_path / "two" / "model" / "config.json").is_file()


def test_what_processes_cannot_share_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"a multiple of 3 processes x recovery.micro_batch_size = 4"):
        compose_run([*QUICK, *FIRST, "recovery=lora", "recovery.batch_size=64", "recovery.processes=3"])
    cfg = compose_run([*QUICK, *FIRST, "recovery=chain", "recovery.steps=[{name: lora, processes: 2}]"])
    assert cfg.recovery.ranks() == 2
    assert cfg.run_id == compose_run([*QUICK, *FIRST, "recovery=chain", "recovery.steps=[lora]"]).run_id
