"""Values that cannot be: refused with field and remedy and status 2, nothing left behind. And what killed runs left."""

from __future__ import annotations

import json
import os
from pathlib import Path

import attack
import pytest
from server import Server

from slm_exp.runs.state import remove_stale

TINY = ("model=tiny", "tracking=none", "evaluation=none", "save_model=false", "calibration.n_samples=2",
        "calibration.seq_len=16")
VALUES = (
    "seed=1e3", "seed=-1", "seed=true", "seed=null", f"seed={10**24}", f"seed={2**63}", "seed=[1]", "model.layers=0",
    "model.layers=1000000", "model.hidden=-8", "model.hidden=1000000", "model.vocab=0", "model.family=gpt",
    "model.dtype=float8", "model.seed=-1", "method.threshold=nan", "method.threshold=inf", "method.threshold=1e400",
    "method.target_layers=-3", "method.target_layers=2.5", "method.target_ratio=1.5", "method.threshold_range=[0.5]",
    "method.threshold_range=[1,0]", "method.max_evaluations=-1", "method.protect_last=-1", "calibration.n_samples=0",
    "calibration.seq_len=0", "calibration.n_samples=2.5", "runtime.threads=0", "runtime.threads=100000000",
    "runtime.device=mars", "cache.dir=", "cache.dir=' '", "cache.accept=all", "similarity.batch=0",
    "evaluation.limit=-5",     "hydra.run.dir=/dev/null", "hydra.run.dir=/proc/x",
    "method.threshold=${oc.env:NOT_SET}", "seed=${oc.create:[1]}",
    "kernel=nothing", "nothing=1", "model.nothing=1", "+model.nothing=1", "seed", "seed=", "--nothing",
)  # fmt: skip


@pytest.mark.parametrize("value", attack.some(VALUES))
def test_a_value_that_cannot_be(value: str, server: Server, tmp_path: Path) -> None:
    words = (*TINY, f"cache.dir={tmp_path}/cache", f"hydra.run.dir={tmp_path}/run", value)
    ended = server.call("slm-exp", *words, cwd=tmp_path)
    assert ended.status == 2, ended.output
    assert "Traceback" not in ended.output
    assert value.lstrip("+-").partition("=")[0] in ended.output
    assert list(tmp_path.iterdir()) == [], "a refusal leaves nothing"


YAML = ("!!python/object/apply:os.mkdir [PLACE]", "a: !!python/name:os.system", "a: &a [*a]", "a: [" * 3000, "\x00",
        "a: b: c", "defaults: [{/hydra/callbacks: x}]",
        "# @package _global_\nhydra: {callbacks: {x: {_target_: os.mkdir}}}\n\t",
        )  # fmt: skip


@pytest.mark.parametrize("text", attack.some(YAML))
def test_a_config_file_that_is_no_plain_yaml(text: str, server: Server, tmp_path: Path) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(text.replace("PLACE", f"{tmp_path}/made"))
    ended = server.call("slm-exp", *TINY, f"hydra.run.dir={tmp_path}/run", "--config-dir", f"{tmp_path}/conf",
                        "experiment=mine", cwd=tmp_path)
    assert ended.status == 2, ended.output
    assert "Traceback" not in ended.output
    assert not (tmp_path / "made").exists()


CONFIGS = ({"num_hidden_layers": 0}, {"num_hidden_layers": 10**6}, {"hidden_act": "nothing"}, {"hidden_size": 1e9},
           {"num_attention_heads": 0}, {"num_key_value_heads": 3}, {"vocab_size": True}, {"rms_norm_eps": "x"},
           [], 3, None)
LLAMA = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300,
         "intermediate_size": 64, "num_key_value_heads": 2}  # fmt: skip


@pytest.mark.parametrize("config", attack.some(CONFIGS), ids=str)
@pytest.mark.parametrize("program", ["run", "plan"])
def test_a_model_that_cannot_be(config: object, program: str, server: Server, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    about = {**LLAMA, **config} if isinstance(config, dict) else config
    (tmp_path / "m" / "config.json").write_text(json.dumps(about))
    (tmp_path / "m" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    words = ("model=hf", f"model.path={tmp_path}/m", *TINY[1:], f"cache.dir={tmp_path}/cache")
    ended = server.call("slm", "plan", *words) if program == "plan" else server.call(
        "slm-exp", *words, f"hydra.run.dir={tmp_path}/run")
    assert ended.status == 2, ended.output
    assert "Traceback" not in ended.output
    assert "config.json" in ended.output
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------- leftovers


def test_stale_temporary_files_go_and_others_stay(tmp_path: Path) -> None:
    target, gone = tmp_path / "record.json", 2**22 + 1  # beyond any process id
    stale = [f".record.json.{gone}.abcdef.tmp", f".record.json.{gone}.old"]
    mine = [f".record.json.{os.getppid()}.abcdef.tmp", ".record.json.mine.tmp", f"record.json.{gone}.tmp",
            f".other.json.{gone}.abcdef.tmp", "record.json", f".record.json.{gone}.abcdef.txt"]
    for name in (*stale, *mine):
        (tmp_path / name).write_text("x")
    (tmp_path / f".record.json.{gone}.x.tmp").symlink_to(tmp_path / "record.json")
    remove_stale(target, own_too=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(mine)


@pytest.mark.parametrize("name", attack.some(["run.log", "record.json", "plan.json", "config.yaml"]))
def test_nothing_is_written_through_a_link(name: str, server: Server, tmp_path: Path) -> None:
    run, target = tmp_path / "run", tmp_path / "target"
    target.write_text("mine")
    run.mkdir()
    (run / name).symlink_to(target)
    ended = server.call("slm-exp", *TINY, f"cache.dir={tmp_path}/cache", f"hydra.run.dir={run}")
    assert "Traceback" not in ended.output
    assert target.read_text() == "mine"
    assert ended.status == (2 if name == "run.log" else 0), ended.output
