"""Values that cannot be: refused with field and remedy and status 2, nothing left behind. And what killed runs left."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import attack
import numpy as np
import pytest
from server import Server

from slm_exp.core.errors import ConfigError
from slm_exp.launch.jobs import command_jobs
from slm_exp.runs.state import remove_stale, remove_stale_below

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
    "kernel=nothing", "model=null", "method=null", "evaluation.protocol=/etc/passwd", "--config-dir=/etc/passwd",
    "nothing=1", "model.nothing=1", "+model.nothing=1", "seed", "seed=", "--nothing",
)  # fmt: skip


@pytest.mark.parametrize("value", attack.some(VALUES))
def test_a_value_that_cannot_be(value: str, server: Server, tmp_path: Path) -> None:
    words = (*TINY, f"cache.dir={tmp_path}/cache", f"hydra.run.dir={tmp_path}/run", value)
    ended = server.call("slm-exp", *words, cwd=tmp_path)
    assert ended.status == 2, ended.output
    assert "Traceback" not in ended.output
    assert value.lstrip("+-").partition("=")[0] in ended.output
    assert list(tmp_path.iterdir()) == [], "a refusal leaves nothing"


ROWS = {"few.jsonl": 3 * [{"text": "word " * 9}], "short.jsonl": 30 * [{"text": "word"}], "other.jsonl": [{"a": 1}]}
ARRAYS = {"big.npy": np.full((2, 16), 258), "negative.npy": np.full((2, 16), -1), "flat.npy": np.arange(16),
          "fraction.npy": np.zeros((2, 16))}
ONE_DRAW = ("calibration=jsonl", "calibration.n_samples=4")
DATA = {
    **{f"{file} as {what}": words for file in (*ARRAYS, "cut.npy", "longer.npy", "json.npy") for what, words in (
        ("calibration", ("calibration=tokens", f"calibration.path=AT/{file}")),
        ("text", (f"evaluation.corpora.w=AT/{file}",)))},
    "big.npy as recovery": ("recovery=reconstruct", "recovery.path=AT/big.npy"),
    **{f"{file} as calibration": (*ONE_DRAW, f"calibration.path=AT/{file}") for file in ROWS},
    "short.txt as text": ("evaluation.corpora.w=AT/short.txt",),
    "no more bundled text": ("calibration.n_samples=5000",),
}


@pytest.mark.parametrize("what", attack.some(list(DATA)))
def test_data_that_cannot_serve(what: str, server: Server, tmp_path: Path) -> None:
    """Known before the first stage, by headers, counts and sizes: status 2, and the file is named."""
    for name, rows in ROWS.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, array in ARRAYS.items():
        np.save(tmp_path / name, array)
    whole = (tmp_path / "big.npy").read_bytes()
    for name, data in (("cut.npy", whole[:-3]), ("longer.npy", whole + b"x"), ("json.npy", b'{"a": 1}'),
                       ("short.txt", b"a few words")):
        (tmp_path / name).write_bytes(data)
    words = [*TINY, *(word.replace("AT", str(tmp_path)) for word in DATA[what])]
    words = [word for word in words if word != "evaluation=none" or "text" not in what]
    ended = server.call("slm-exp", *words, f"cache.dir={tmp_path}/cache", f"hydra.run.dir={tmp_path}/run", cwd=tmp_path)
    assert ended.status == 2, ended.output
    assert "Traceback" not in ended.output
    assert what.split()[0] in ended.output or "calibration.n_samples" in ended.output
    assert not (tmp_path / "run").exists() or "recovery" in what  # a fit's tokens are looked at in stage load


def test_a_token_file_is_read_once_for_its_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often settings, identity, sizes and the draw ask; a file that has changed is read again."""
    from slm_exp.calibration import tokens

    looked: list[object] = []
    monkeypatch.setattr(tokens, "_range", functools.lru_cache(lambda s: looked.append(s) or (0, 7)))
    path = tmp_path / "ids.npy"
    np.save(path, np.arange(8).reshape(2, 4))
    source = tokens.Tokens(path=str(path))
    for _ in range(3):
        source.identity(), source.shape()
    assert len(looked) == 1
    np.save(path, np.arange(12).reshape(3, 4))
    assert source.shape() == (3, 4)
    assert len(looked) == 2


@pytest.mark.parametrize("value", ["nan", "inf", "0", "-1", "x"])
@pytest.mark.parametrize("words", [("plan", *TINY), ("tables", "paper", "model=tiny")], ids=["plan", "tables"])
def test_a_speed_that_cannot_be(value: str, words: tuple[str, ...], server: Server, tmp_path: Path) -> None:
    ended = server.call("slm", *words, "--tflops", value, cwd=tmp_path)
    assert ended.status == 2, ended.output
    assert "--tflops" in ended.output
    assert list(tmp_path.iterdir()) == []


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


def test_what_a_kill_left_of_any_file_of_a_run_goes_when_it_begins(tmp_path: Path) -> None:
    """A sample that was being written was left for good: found by 60 kills at full size."""
    gone = 2**22 + 1
    (tmp_path / "samples" / "dense").mkdir(parents=True)
    mine = [f".plan.json.{os.getppid()}.abcdef.tmp", ".notes.tmp", f".a.{gone}.tmp", f"samples/a.{gone}.abcdef.tmp"]
    stale = [f".plan.json.{gone}.abcdef.tmp", f"samples/dense/.piqa.jsonl.gz.{gone}.14b9b3.tmp",
             f".plan.json.{os.getpid()}.abcdef.tmp"]
    for name in (*mine, *stale):
        (tmp_path / name).write_text("x")
    remove_stale_below(tmp_path)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()) == sorted(mine)


def test_a_message_obeys_no_terminal() -> None:
    """Whatever file or word it quotes: found by the tables at full size."""
    assert str(ConfigError("columns[0].show = \x1b[2J\x07")) == "columns[0].show = \\x1b[2J\\x07"


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


LONG = "x" * 5000


@pytest.mark.parametrize("words", attack.some([
    ["model=hf", f"model.path={LONG}"], [f"model={LONG}"], ["method=from_plan", f"method.path={LONG}"],
    [f"cache.dir=/tmp/{LONG}"], ["recovery=reconstruct", f"recovery.path={LONG}"],
    ["calibration=jsonl", f"calibration.path={LONG}"], ["calibration=tokens", f"calibration.path={LONG}.npy"],
    [f"evaluation.protocol={LONG}"], [f"evaluation.corpora={{a: {LONG}.txt}}"], [f"hydra.run.dir={LONG}"],
    ["recovery=lora", "recovery.data=jsonl", f"recovery.path={LONG}"],
    ["--config-dir", LONG], ["--plugin", LONG]]), ids=lambda words: words[-1][:25])  # fmt: skip
def test_no_file_has_such_a_name(words: list[str], server: Server, tmp_path: Path) -> None:
    ended = server.call("slm-exp", *TINY, *words, cwd=tmp_path)
    assert ended.status == 2, ended.output
    assert "Traceback" not in ended.output
    assert len(ended.output.splitlines()) == 1
    assert "Error: " in ended.output


def test_a_list_may_be_longer_than_the_name_of_a_file() -> None:
    """Whether a file of a swept value's whole name is there was asked of the file system."""
    values = ",".join(f"{i / 1000:.4f}" for i in range(100))
    assert len(command_jobs(["model=tiny", f"method.threshold={values}"], True).jobs) == 100


def test_no_log_is_written_into_a_pipe(server: Server, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.log")
    ended = server.call("slm-exp", *TINY, f"cache.dir={tmp_path}/cache", f"hydra.run.dir={tmp_path}")
    assert ended.status == 2
    assert "run.log is a folder, pipe or device; expected no file or a plain one" in ended.output
