"""runtime.memory: what is refused before any stage, what auto chooses, and a streamed run against a resident one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders.streams import saved

from slm_exp.core.errors import ConfigError
from slm_exp.forecast.plan import make_plan
from slm_exp.launch.compose import compose_run
from slm_exp.models.sizes import LLAMA2_7B, sizes_of
from slm_exp.pipeline import memory, stages
from slm_exp.pipeline.memory import choose
from slm_exp.pipeline.run import run

QUIET = ["tracking=none", "evaluation=none", "calibration.n_samples=2", "calibration.seq_len=16", "save_model=false"]


def config(folder: Path, *more: str) -> Any:
    return compose_run(["model=hf", f"model.path={folder}", *QUIET, *more])


@pytest.mark.parametrize(("override", "named"), [
    ("recovery=lora", "recovery=lora takes all weights"), ("width=flap", "width=flap"),
    ("evaluation.speed_runs=20", "evaluation.speed_runs"),
    ("merge_rule=regression", "merge_rule=regression"), ("+evaluation.tasks=[nq_open]", "nq_open"),
])
def test_what_cannot_stream_is_refused_by_name(tmp_path: Path, override: str, named: str) -> None:
    saved(tmp_path, layers=3)
    with pytest.raises(ConfigError, match=r"runtime\.memory = stream; expected auto or resident") as refused:
        config(tmp_path, "runtime.memory=stream", override.lstrip("+"))
    assert named in str(refused.value)


def test_a_model_without_files_is_refused() -> None:
    with pytest.raises(ConfigError, match="model=tiny is made in memory"):
        compose_run(["model=tiny", "runtime.memory=stream"])


def test_auto_goes_by_what_is_free_and_says_so(tmp_path: Path, monkeypatch, caplog) -> None:
    cfg = config(saved(tmp_path, layers=3))
    gib = 2**30
    assert not choose(cfg, 10 * gib, 12.6 * gib, True, "cpu").streamed
    assert choose(cfg, 10 * gib, 12.4 * gib, True, "cpu").streamed
    assert not choose(cfg, 10 * gib, 12.4 * gib, False, "cpu").streamed
    assert choose(cfg, 10 * gib, 2 * gib, True, "cpu", own=gib, least=gib).may_fit
    tight = choose(cfg, 10 * gib, 2 * gib, True, "cpu", own=1.5 * gib, least=gib)
    assert tight.streamed
    assert not tight.may_fit
    assert "streamed it holds 2.7 GB" in tight.why
    trained = choose(config(tmp_path, "recovery=lora"), 10 * gib, 12.4 * gib, True, "cpu")
    assert not trained.streamed
    assert "recovery=lora" in trained.why
    assert trained.may_fit
    monkeypatch.setattr(memory, "available_memory", lambda: gib)
    x = stages.Experiment(cfg, tmp_path, None)  # type: ignore[arg-type]
    stages.LOAD.carry_out(x)
    assert x.dense.streamed
    assert "runtime.memory=auto: layers are read from their files as they run" in caplog.text


def test_a_training_without_room_is_refused_with_its_factor(tmp_path: Path, monkeypatch) -> None:
    """A full training takes 16 bytes a parameter, four times float32 weights, beside what the way back needs; a
    narrower model's weights are its own."""
    folder = saved(tmp_path, layers=3)
    monkeypatch.setattr(memory, "available_memory", lambda: 4 * params)
    for override, fits in (("recovery=lora", False), ("width=flap", False), ("runtime.memory=resident", True)):
        cfg = config(folder, "recovery=full", "recovery.seq_len=2", override)
        dense = cfg.model.open(torch.device("cpu"), folder)
        params, own = dense.n_params, cfg.recovery.memory(dense.sizes, 4) / 4
        if fits:
            assert not memory.opened(cfg, torch.device("cpu")).streamed
            assert 4 < own / params < 6
        else:
            factor = f"{1.15 + (override == 'width=flap') + own / params:.3g}"
            with pytest.raises(ConfigError, match=rf"there is no room.*\({factor} times its weights and a GiB\)"
                               r".*Use recovery\.micro_batch_size=1, a smaller model\.dtype"):
                memory.opened(cfg, torch.device("cpu"))
    monkeypatch.setattr(memory, "available_memory", lambda: 5 * 4 * params + 4 * own)
    cfg = config(folder, "recovery=full", "recovery.seq_len=2")
    assert not memory.opened(cfg, torch.device("cpu")).streamed  # it may fit: a warning


def test_what_candidates_are_refitted_on_is_counted() -> None:
    """At Llama-2-7B's size the dense states of 24 x 256 tokens alone are 3.3 GB, more with more tokens."""
    sizes, after = sizes_of(LLAMA2_7B), ["similarity.after=reconstruct"]
    plain, refitted, longer = (
        memory.searching(compose_run(["model=llama2_7b", "similarity=token_cosine", *more]), sizes)
        for more in ([], after, [*after, "similarity.fit_samples=48"]))
    states = 4 * 24 * 256 * 33 * 4096
    assert plain == 0
    assert refitted > states + 2**30
    assert longer - refitted == pytest.approx(states, rel=0.1)


def test_what_device_map_would_put_off_is_streamed(tmp_path: Path, monkeypatch, caplog) -> None:
    """`device_map=auto` by accelerate itself, on a machine that seems to have room for half of the weights."""
    import psutil

    folder = saved(tmp_path / "model", layers=6)
    more = ("model.device_map=auto", "method.threshold=0.3")
    fits = config(folder, *more, f"cache.dir={tmp_path / 'c'}")
    dense = memory.opened(fits, torch.device("cpu"))
    assert not dense.streamed
    wanted = run(fits, tmp_path / "fits")
    room = psutil.virtual_memory()._replace(available=2 * dense.n_params)  # half of its weights
    monkeypatch.setattr(psutil, "virtual_memory", lambda: room)
    for how in ("auto", "stream"):
        cfg = config(folder, *more, f"runtime.memory={how}", f"cache.dir={tmp_path / how}")
        assert run(cfg, tmp_path / f"run-{how}")["plan"] == wanted["plan"]
    assert "and model.device_map=auto would put" in caplog.text
    assert wanted["plan"]["groups"]
    for only in ("runtime.memory=resident", "recovery=lora"):
        with pytest.raises(ConfigError, match=r"device_map = auto: the model does not fit.*runtime\.memory=stream"):
            memory.opened(config(folder, *more, only), torch.device("cpu"))
    assert choose(fits, 1, 2**40, True, "all cuda devices", put_off=3).streamed


def test_a_run_and_its_forecast(tmp_path: Path) -> None:
    """The same plan, score and refit; the checkpoint's digest too."""
    folder, records = saved(tmp_path / "model", layers=6), []
    more = ("method.threshold=0.3", "recovery=reconstruct", "recovery.n_samples=4", "recovery.seq_len=16")
    for how in ("resident", "stream"):
        cfg = config(folder, *more, f"runtime.memory={how}", f"cache.dir={tmp_path / how}")
        records.append(run(cfg, tmp_path / f"run-{how}"))
    a, b = records
    assert a["run_id"] == b["run_id"]
    assert a["plan"] == b["plan"]
    assert a["plan"]["groups"]
    assert a["recovery"] == b["recovery"]
    grid = make_plan(["model=hf", f"model.path={folder}", *QUIET, "runtime.memory=stream",
                      f"cache.dir={tmp_path / 'other'}", f"hydra.run.dir={tmp_path / 'new'}"], tflops=0.1)
    assert grid.jobs[0].passes > 2
    assert grid.jobs[0].read > 0
