"""`make gpu` before there is a GPU: every part on tiny shapes, and what it can do without."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from slm_exp.methods.slm import SLM

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", ROOT / "benchmarks" / "gpu.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_benchmark"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench(gpu: Any) -> Any:
    return gpu.Bench(torch.device("cpu"), tiny=True, pairs=1)


WORDS = {"search": "plain", "path": "early_stop", "baselines": "finercut", "evaluation": "HFLM at batch",
         "refit": "recovery.layers=sublayers", "lora": "plain peft", "speed": "width 0.2", "stream": "same plan"}


@pytest.mark.parametrize("part", sorted(WORDS))
def test_every_part_runs_on_tiny_shapes(part: str, gpu: Any, bench: Any) -> None:
    found = gpu.run(bench, [part], show=lambda text: None)[part]
    assert found.error == ""
    page = gpu.markdown({"device": "none"}, {part: found})
    assert WORDS[part] in page
    assert "OTHER" not in page
    assert any(row.ours for row in found.rows)


def test_no_part_is_forgotten(gpu: Any) -> None:
    assert set(gpu.PARTS) == set(WORDS)


def test_about_half_of_the_candidates_are_accepted(gpu: Any, bench: Any) -> None:
    handle = gpu.random_handle("deeper", {**gpu.TINY["llama2_7b"], "num_hidden_layers": 14}, torch.device("cpu"),
                               torch.float32)
    task = bench.task(handle, bench.tokens(handle, 4, 16))
    trace = SLM(threshold=gpu.half_accepted(task)).plan(task).trace
    assert 0.25 < sum(t.accepted for t in trace) / len(trace) < 0.75


def test_a_part_that_fails_says_why_and_the_next_one_runs(gpu: Any, bench: Any, monkeypatch: pytest.MonkeyPatch,
                                                          tmp_path: Path, capsys: Any) -> None:
    def fails(bench: Any) -> Any:
        raise RuntimeError("no room")
        yield

    monkeypatch.setitem(gpu.PARTS, "search", fails)
    status = gpu.main(["search", "refit", "--tiny", "--device", "cpu", "--pairs", "1", "--out", str(tmp_path)])
    assert status == 1
    data = json.loads((tmp_path / "gpu.json").read_text())
    assert data["parts"]["search"]["error"] == "RuntimeError: no room"
    assert data["parts"]["refit"]["rows"]
    assert data["machine"]["threads"] == torch.get_num_threads()
    assert "ended by RuntimeError: no room" in (tmp_path / "gpu.md").read_text()


@pytest.mark.parametrize(("arguments", "said"), [
    (["serach"], "part = serach; expected some of search, path"),
    (["--device", "cpu"], "expected --tiny with it"),
])
def test_wrong_calls_are_answered(gpu: Any, arguments: list[str], said: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_how_to_rehearse(gpu: Any, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "--tiny --device cpu" in capsys.readouterr().err


def test_it_needs_no_wandb_gguf_datasets_or_matplotlib() -> None:
    code = ("import sys; sys.modules.update(dict.fromkeys(['wandb', 'gguf', 'datasets', 'matplotlib']))\n"
            f"sys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n"
            "import gpu, torch\n"
            "bench = gpu.Bench(torch.device('cpu'), True, 1)\n"
            "found = gpu.run(bench, ['path', 'evaluation', 'lora'], show=lambda text: None)\n"
            "print({name: part.error for name, part in found.items()})")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "{'path': '', 'evaluation': '', 'lora': ''}" in done.stdout, done.stdout + done.stderr
