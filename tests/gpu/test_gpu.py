"""On a GPU: states and weights lie there, dtypes and streams give the numbers of the CPU, memory that runs out costs
only itself, deterministic runs repeat, and workers share one GPU. All on tiny models; `make gpu` runs them first."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.models import new_task, random_tokens
from builders.runs import QUICK, tiny_run
from builders.streams import saved
from lm_eval.api.instance import Instance

from slm_exp.core.errors import DataError
from slm_exp.core.runtime import Cuda, Runtime
from slm_exp.core.types import MergePlan
from slm_exp.engine.runner import BlockRunner
from slm_exp.evaluation.backends.harness import language_model
from slm_exp.evaluation.backends.speed import measure_speed
from slm_exp.evaluation.base import Evaluation
from slm_exp.evaluation.settings import Case, Settings
from slm_exp.merging.surgery import apply_plan
from slm_exp.methods.slm import SLM
from slm_exp.models.base import ModelHandle
from slm_exp.models.hf import HF
from slm_exp.models.tiny import Tiny
from slm_exp.recovery.base import RecoveryTask
from slm_exp.recovery.reconstruct import Reconstruct
from slm_exp.recovery.refit import refit
from slm_exp.search.scoring import ScoringEngine
from slm_exp.search.state import Candidate

pytestmark = pytest.mark.gpu

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "mixtral", "gpt2")
DTYPES = ("float32", "bfloat16", "float16")
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 5e-3}
REQUESTS = [(f"Ann owns {i} kettles and a rake. Which boils water?", ending)
            for i, ending in itertools.product(range(6), (" The kettle", " The rake", "?"))]  # fmt: skip


def on(device: torch.device, family: str = "llama", **fields: Any) -> ModelHandle:
    return Tiny(family=family, **fields).open(device, Path("unused"))


def likelihoods(handle: ModelHandle, backend: str) -> np.ndarray:
    lm = language_model(handle.model, handle.tokenizer, backend=backend)  # type: ignore[arg-type]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(REQUESTS)]
    return np.array([score for score, _ in lm.loglikelihood(asked, disable_tqdm=True)])


def middle(task: Any) -> float:
    """A threshold at which some candidates pass and others do not."""
    scores = sorted(t.most for t in SLM(threshold=1.0).plan(task).trace)
    return (scores[2] + scores[3]) / 2


@pytest.mark.parametrize("family", FAMILIES)
def test_states_lie_where_the_model_does(family: str, device: torch.device) -> None:
    handle, tokens = on(device, family), random_tokens()
    runner = BlockRunner(handle, tokens.tokens_NT)
    found = runner.last_state()
    ids = torch.as_tensor(tokens.tokens_NT, device=device).long()
    with torch.inference_mode():
        wanted = handle.model.base_model(ids, use_cache=False).last_hidden_state
    assert found.device.type == runner.embed().device.type == device.type
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_are_those_of_the_model_built(dtype: str, device: torch.device) -> None:
    task = new_task(on(device, dtype=dtype), random_tokens(), "mean")
    plan = MergePlan(8, ((2, 5),), rule="mean")  # type: ignore[arg-type]
    short, ids = apply_plan(task.handle, plan, task.rule).model, torch.as_tensor(task.tokens.tokens_NT).long()
    with torch.inference_mode():
        dense, last = (model.base_model(ids.to(device), use_cache=False).last_hidden_state
                       for model in (task.handle.model, short))
    wanted = task.similarity.against(dense, task.kernel)(last)
    assert ScoringEngine(task).score(plan) == pytest.approx(wanted, abs=TOLERANCE[dtype])


@pytest.mark.parametrize("fields", [{}, {"early_stop": True}, {"screen_dtype": "bfloat16"},
                                    {"screen_dtype": "bfloat16", "early_stop": True}])
def test_the_search_decides_as_on_the_cpu(fields: dict[str, Any], device: torch.device) -> None:
    there, here = (new_task(on(where), random_tokens(10, 16)) for where in (device, torch.device("cpu")))
    threshold = middle(here)
    plan, wanted = SLM(threshold=threshold, **fields).plan(there), SLM(threshold=threshold).plan(here)
    assert plan.groups == wanted.groups
    assert plan.final_score == pytest.approx(wanted.final_score, abs=1e-4)


@pytest.mark.parametrize("similarity", ["flat_cosine", "token_cosine", "angular", "cka"])
def test_every_similarity_scores_on_the_device(similarity: str, device: torch.device) -> None:
    candidate = Candidate(3, 5, ())
    there, here = (ScoringEngine(new_task(on(where), random_tokens(), similarity=similarity)).score(candidate)
                   for where in (device, torch.device("cpu")))
    assert there == pytest.approx(here, abs=1e-4)


def test_layers_read_from_their_files_decide_alike(device: torch.device, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    whole = HF(path=str(folder)).open(device, folder)
    streamed = HF(path=str(folder)).open(device, folder).stream()
    threshold = middle(new_task(whole, random_tokens()))
    plan, wanted = (SLM(threshold=threshold).plan(new_task(handle, random_tokens())) for handle in (streamed, whole))
    assert plan.groups == wanted.groups
    assert plan.final_score == pytest.approx(wanted.final_score, abs=1e-5)


def test_a_model_spread_over_two_devices_is_searched_and_cut_alike(two: list[torch.device]) -> None:
    """As `device_map=auto` leaves it: layers on either, the merged one of both."""
    from accelerate import dispatch_model

    spread, whole = on(two[0]), on(two[0])
    dispatch_model(spread.model, {  # type: ignore[arg-type]
        "model.embed_tokens": two[0], "model.rotary_emb": two[0], "model.norm": two[1], "lm_head": two[1],
        **{f"model.layers.{i}": two[i // 4] for i in range(8)}})  # fmt: skip
    tasks = [new_task(handle, random_tokens(), "mean") for handle in (spread, whole)]
    threshold = middle(tasks[1])
    plan, wanted = (SLM(threshold=threshold).plan(task) for task in tasks)
    assert plan.groups == wanted.groups
    assert plan.final_score == pytest.approx(wanted.final_score, abs=1e-5)
    both = MergePlan(8, ((2, 6),), rule="mean")  # type: ignore[arg-type]
    ids = torch.arange(24, device=two[0])[None]
    with torch.inference_mode():
        found, logits = (apply_plan(task.handle, both, task.rule).model(ids, use_cache=False).logits for task in tasks)
    torch.testing.assert_close(found.cpu(), logits.cpu(), atol=1e-4, rtol=1e-3)


def test_two_processes_with_a_gpu_each_evaluate_as_one(cuda: torch.device, two: list[torch.device], tmp_path: Path
                                                       ) -> None:
    (tmp_path / "a.txt").write_text("a text of some length that is read in chunks, again and again\n" * 9)
    settings = Evaluation(corpora={"a": str(tmp_path / "a.txt")}, ppl_seq_len=32)
    found = replace(settings, processes=len(two)).run(on(cuda))
    assert found == settings.run(on(cuda))


def test_another_cuda_stream_gives_the_same_scores(cuda: torch.device) -> None:
    candidates = [Candidate(low, 5, ()) for low in range(5)]
    engine = ScoringEngine(new_task(on(cuda), random_tokens()))
    wanted = [engine.score(candidate) for candidate in candidates]
    with torch.cuda.stream(torch.cuda.Stream()):
        beside = ScoringEngine(new_task(on(cuda), random_tokens()))
        found = [beside.score(candidate) for candidate in candidates]
    torch.cuda.synchronize()
    assert found == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_fast_backend_has_hflms_likelihoods(dtype: str, device: torch.device) -> None:
    handle = on(device, dtype=dtype)
    fast, plain = likelihoods(handle, "fast"), likelihoods(handle, "hflm")
    np.testing.assert_allclose(fast, plain, **({"atol": 2e-4} if dtype == "float32" else {"rtol": 5e-2}))


def test_an_evaluation_goes_on_with_less_when_memory_runs_out(cuda: torch.device) -> None:
    """Memory is taken away until a whole batch does not fit."""
    handle = on(cuda, hidden=512, heads=8, vocab=32000)
    wanted = likelihoods(handle, "fast")
    torch.cuda.empty_cache()
    total, before = torch.cuda.get_device_properties(cuda).total_memory, torch.cuda.memory_allocated(cuda)
    try:
        for room in (2**21, 2**22, 2**23, 2**24, 2**25, 2**26):
            torch.cuda.set_per_process_memory_fraction(min(1.0, (before + room) / total))
            try:
                found = likelihoods(handle, "fast")
            except DataError:  # even one request did not fit
                continue
            np.testing.assert_allclose(found, wanted, atol=2e-4)
            break
        else:
            pytest.fail("it does not go on at any of these sizes")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def test_a_generation_that_does_not_fit_costs_only_itself(cuda: torch.device) -> None:
    class Cases(Settings):
        def cases(self) -> list[Case]:
            return [Case(1, 4, 2), Case(2**14, 2**12, 2)]

    handle = on(cuda, vocab=32000)
    short = apply_plan(handle, MergePlan(8, dropped=(3, 4)))
    small, large = measure_speed(Cases(speed_runs=2, speed_discard=0, speed_grid_runs=1), handle, short)["cells"]
    assert small["dense"]["peak_bytes"] > 0
    assert large["error"] == "out of memory"
    assert torch.isfinite(handle.model(torch.ones(1, 4, dtype=torch.long, device=cuda)).logits).all()


def test_a_refit_on_the_device_is_that_of_the_cpu(device: torch.device, tmp_path: Path) -> None:
    found = []
    for where in (device, torch.device("cpu")):
        dense, plan = on(where), MergePlan(8, dropped=(3, 4))
        task = RecoveryTask(apply_plan(dense, plan), dense, plan, random_tokens(), tmp_path)
        found.append(refit(task, random_tokens(10, 32, seed=1), Reconstruct(ridges=[1e-2])))
    (there, there_steps), (here, here_steps) = found
    assert list(there) == list(here)
    for a, b in zip(there_steps, here_steps, strict=True):
        assert a.errors == pytest.approx(b.errors, rel=1e-2)


def test_a_run_takes_the_gpu_and_says_so_and_its_checkpoint_opens_on_the_cpu(cuda: torch.device, tmp_path: Path
                                                                             ) -> None:
    record = tiny_run(tmp_path / "run", "runtime=auto", "method.threshold=0.5", "save_model=true")
    assert (record["status"], record["device"]["type"]) == ("finished", "cuda")
    here = tiny_run(tmp_path / "here", "runtime=cpu", "method.threshold=0.5", "save_model=true",
                    cache=tmp_path / "other")
    assert record["plan"]["groups"] == here["plan"]["groups"]
    ids = torch.arange(20)[None]
    logits = [HF(path=str(tmp_path / name / "model")).open(torch.device("cpu"), tmp_path).model(ids).logits
              for name in ("run", "here")]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-3)


def test_what_a_gpu_scored_is_not_taken_for_what_a_cpu_would(cuda: torch.device, tmp_path: Path) -> None:
    first = tiny_run(tmp_path / "run", "runtime=cuda")
    again = tiny_run(tmp_path / "again", "runtime=cpu")
    cached = {s["name"]: s["cached"] for s in again["stages"]}
    assert first["device"]["type"] == "cuda"
    assert not cached["plan"]


def command(*words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    call = [sys.executable, "-m", "slm_exp", *words]
    return subprocess.run(call, capture_output=True, text=True, timeout=600, env=env)


def test_deterministic_runs_repeat_bit_for_bit(device: torch.device, tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        quick = [word for word in QUICK if not word.startswith("runtime")]
        done = command(*quick, f"runtime={device.type}", "runtime.deterministic=true", "method.threshold=0.5",
                       "recovery=full", "recovery.max_steps=2", "recovery.batch_size=4", "recovery.seq_len=32",
                       f"hydra.run.dir={tmp_path / name}", f"cache.dir={tmp_path / name / 'cache'}", "save_model=true")
        assert done.returncode == 0, done.stderr
        record = json.loads((tmp_path / name / "record.json").read_text())
        weights = HF(path=str(tmp_path / name / "model")).open(torch.device("cpu"), tmp_path).model.state_dict()
        found.append((record["plan"]["trace"], weights))
    (trace, weights), (other_trace, other) = found
    assert trace == other_trace
    assert all(torch.equal(weights[name], other[name]) for name in weights)


def test_two_workers_share_one_gpu(device: torch.device, tmp_path: Path) -> None:
    quick = [word for word in QUICK if not word.startswith("runtime")]
    done = command("-m", *quick, f"runtime={device.type}", "method.threshold=0.5,0.6,0.7,0.8",
                   "hydra.launcher.workers=2", f"hydra.sweep.dir={tmp_path / 'sweep'}",
                   f"cache.dir={tmp_path / 'cache'}")
    assert done.returncode == 0, done.stderr
    records = [json.loads(file.read_text()) for file in (tmp_path / "sweep").glob("*/record.json")]
    assert len(records) == 4
    assert {(r["status"], r["device"]["type"]) for r in records} == {("finished", device.type)}


def test_deterministic_mode_is_set_before_the_first_matrix_product(cuda: torch.device) -> None:
    """cuBLAS wants its workspace named, or every product raises an error."""
    device = replace(Cuda(), deterministic=True).prepare(0)
    try:
        x = torch.randn(64, 64, device=device)
        assert torch.equal(x @ x, x @ x)
    finally:
        Runtime().prepare(0)
