"""Saving a model as an ordinary Hugging Face folder that is known to reload: verified first, visible afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from slm_exp.core.errors import CheckpointError
from slm_exp.core.files import honour_umask, write_json, write_text
from slm_exp.core.logs import without_bars
from slm_exp.core.types import CalibrationTokens, MergePlan
from slm_exp.models.base import ModelHandle
from slm_exp.models.generation import savable
from slm_exp.models.layerwise import has_own_code
from slm_exp.models.saving import for_older_readers, save_tokenizer
from slm_exp.runs.card import model_card
from slm_exp.runs.reload import Json, tensor_digests
from slm_exp.runs.schema import Record
from slm_exp.runs.shards import write_by_layer
from slm_exp.runs.state import remove_stale

ROWS, LENGTH = 2, 32  # tokens whose logits are compared
RELOADED_WHOLE = 1 << 30
"""Bytes of weights on a CPU up to which the verifying process holds a second copy; larger ones it reads by file."""


def save_checkpoint(compressed: ModelHandle, folder: Path, plan: MergePlan, tokens: CalibrationTokens | None = None,
                    record: Json | None = None, max_shard_size: str = "5GB") -> Json:
    """Write a model to `folder`: safetensors, config, generation config, tokenizer, plan.json and a model card.

    Everything goes to a temporary folder beside it, is reloaded there by a fresh process (see
    `verify_checkpoint`), and takes its name by one rename; a checkpoint already there is replaced. The weights keep
    their dtype. On any failure the temporary folder is gone and an older checkpoint untouched.

    Args:
        compressed: the model; loads now if it is not loaded.
        plan: saved beside the weights, and described in the card.
        tokens: whose first rows the logits are compared on; None takes arbitrary ids.
        record: the run's record; the card takes run_id, overrides, params and results from it.
        max_shard_size: larger models are cut into several files.
    Returns:
        What was verified: `{tensors, logits_off, kv_cache_off, tolerance, device}`.
    Raises:
        CheckpointError: the disk is full or not writable, or the reloaded model differs.
    Cost: the weights' bytes on disk and again in a second process, whose start (6 s of imports) runs beside the
        writing. A model on a CPU of more than RELOADED_WHOLE, or whose layers stay in files, is written layer by layer,
        and about three layers of it are in the second process, which starts afterwards.
    """
    tmp = folder.with_name(f".{folder.name}.{os.getpid()}.{uuid.uuid4().hex[:6]}.tmp")
    try:
        remove_stale(folder)
        tmp.mkdir(parents=True)
        model = compressed.model
        size = 0 if model.device.type != "cpu" else sum(p.nbytes for p in model.parameters())
        by_layer = compressed.streamed or size > RELOADED_WHOLE
        with contextlib.nullcontext() if by_layer else _reader() as reader:
            with savable(model.generation_config), without_bars():
                digests = write_by_layer(compressed, tmp) if by_layer else None
                if digests is None:
                    model.save_pretrained(tmp, max_shard_size=max_shard_size)
            if not has_own_code(compressed.config):
                _name_no_code(tmp / "config.json")
            for_older_readers(tmp / "config.json")
            for path in compressed.licences:
                shutil.copy(path, tmp / path.name)
            if compressed.tokenizer is not None:
                save_tokenizer(compressed.tokenizer, tmp)
            write_json(tmp / "plan.json", plan.to_json())  # without what was fitted: readers take any safetensors here
            write_text(tmp / "README.md", model_card(compressed, plan, Record.of(record or {})))
            honour_umask(tmp)
            verified = verify_checkpoint(tmp, compressed, tokens, digests, reader)
        _flush(tmp)
        _replace(tmp, folder)
    except (OSError, SafetensorError) as cause:  # the latter is Rust's I/O error
        raise CheckpointError(f"{folder} could not be written ({cause}). Free space there, choose another "
                              "hydra.run.dir, or set save_model=false.") from cause
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return verified


Reader = Callable[[Callable[[Path], Json]], Json]
"""Gives a folder of its own to a function that writes there what is expected of a checkpoint, and takes the result from
there (see `reload.py`) once the process has reloaded it."""


@contextlib.contextmanager
def _reader() -> Iterator[Reader]:
    """A process that imports what it needs and waits for what is expected; ended in any case."""
    with tempfile.TemporaryDirectory(prefix="slm_exp-verify-") as where:
        script = Path(__file__).with_name("reload.py")
        with subprocess.Popen(
                [sys.executable, "-P", str(script), where],  # -P: the script's folder stays off the import path
                env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_MODULES_CACHE": where},
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:

            def read(expect: Callable[[Path], Json]) -> Json:
                expected = expect(Path(where))
                _, errors = process.communicate("go\n")
                try:
                    result = json.loads((Path(where) / "result.json").read_text(encoding="utf-8"))
                except (OSError, ValueError):
                    last = errors.strip().splitlines()[-1:] or ["no message"]
                    raise CheckpointError(f"the process that reloads {expected['folder']} ended with status "
                                          f"{process.returncode}: {last[0]}") from None
                if error := result.pop("error"):
                    raise CheckpointError(f"the checkpoint does not reload as the model in memory: {error}.")
                return {**result, "tolerance": expected["tolerance"], "device": expected["device"]}

            try:
                yield read
            finally:
                process.kill()


def verify_checkpoint(folder: Path, compressed: ModelHandle, tokens: CalibrationTokens | None = None,
                      digests: Mapping[str, str] | None = None, reader: Reader | None = None) -> Json:
    """Reload a folder in a fresh process with plain transformers and compare it with the model in memory.

    Every tensor must be bit-equal, embeddings tied or not as before, logits within 1e-5 in float32 (in half precision
    within a thousandth of the largest), logits with the KV cache as without, and generation must run with it. The
    process uses the model's device; where the GPU has no room for a second copy it uses the CPU, whose arithmetic
    differs, and 5 % of the largest logit are allowed.

    A model whose layers stay in files, or a large one on a CPU, is verified by file: `digests` of the tensors as they
    were written, by their names in the files, and logits with layers that the process reads as they run (transformers'
    disk offload). It generates no text, for which every token would read all layers.

    Args:
        reader: a process that has been started; None starts one.
    Returns:
        `{tensors, logits_off, kv_cache_off, peak_bytes, tolerance, device}`.
    Raises:
        CheckpointError: the first difference found, or why the process could not finish.
    """
    with contextlib.nullcontext(reader) if reader else _reader() as read:
        return read(lambda where: expectation(folder, compressed, tokens, where, digests))


def expectation(folder: Path, compressed: ModelHandle, tokens: CalibrationTokens | None, where: Path,
                digests: Mapping[str, str] | None = None) -> Json:
    """Write what a reloaded model must show into `where`: expected.json and logits.npy ([2, T, V] float32)."""
    model = compressed.model
    vocab = int(compressed.config.vocab_size)
    ids = np.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) % vocab if tokens is None else tokens.tokens_NT[:ROWS, :LENGTH]
    embedding: Any = model.get_input_embeddings().weight
    head: Any = model.get_output_embeddings().weight  # type: ignore[operator]
    with torch.inference_mode():
        logits_NTV = model(torch.as_tensor(ids).long().to(embedding.device), use_cache=False).logits.float().cpu()
    device = "cpu" if digests else _second_device(model)
    same = device == "auto" or torch.device(device) == model.device
    exact = same and model.dtype == torch.float32
    scale = max(1.0, float(logits_NTV.abs().max()))
    expected = {
        "folder": str(folder.resolve()), "tensors": dict(digests) if digests else tensor_digests(model),
        "placed": _placed(compressed) if digests else None, "scratch": str(where),
        "tied": embedding.data_ptr() == head.data_ptr(), "tokenizer": compressed.tokenizer is not None,
        "tokens": np.asarray(ids).tolist(), "device": device, "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(), "exact": exact,
        "own_code": has_own_code(compressed.config),
        "tolerance": 1e-5 if exact else (1e-3 if same else 5e-2) * scale,
        "kv_tolerance": (1e-3 if exact else 5e-2) * scale,
    }
    write_json(where / "expected.json", expected)
    np.save(where / "logits.npy", logits_NTV.numpy(), allow_pickle=False)
    return expected


def _placed(handle: ModelHandle) -> dict[str, str]:
    """transformers' device map for reading layers from disk as they run."""
    where: dict[str, str] = {}
    path = ""
    for part in handle.layout.layer_list.split("."):
        beside = handle.model.get_submodule(path).named_children()
        where |= {f"{path}.{name}".lstrip("."): "cpu" for name, _ in beside if name != part}
        path = f"{path}.{part}".lstrip(".")
    return where | {f"{path}.{i}": "disk" for i in range(handle.n_layers)}


def _second_device(model: PreTrainedModel) -> str:
    """Where a second copy can live: the model's device, `auto` for several, cpu where the GPU has no room."""
    if model.device.type != "cuda":
        return str(model.device)
    if len({p.device for p in model.parameters()}) > 1:
        return "auto"
    torch.cuda.empty_cache()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return str(model.device) if torch.cuda.mem_get_info(model.device)[0] > 1.2 * size else "cpu"


def _name_no_code(path: Path) -> None:
    """Take out what a source model's config said of code to load it by: this package did not run it, nor check it."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.pop("auto_map", None) is not None:
        write_json(path, config)


def _flush(folder: Path) -> None:
    """fsync every file, so that the rename does not overtake their contents."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _replace(new: Path, folder: Path) -> None:
    """Give `new` the name `folder`; what had it before disappears afterwards."""
    old = new.with_suffix(".old")
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)
