"""How fast two models generate: latency, throughput, time to first token, memory, operations.

The papers' case is a prompt of 12 tokens, exactly 128 more, batch 1, by `generate` with sampling (top-k 50, top-p
0.95): 30 runs, of which the first 10 do not count. Here the dense and the compressed model take turns inside every
run, in changing order, so that the speedup (one ratio per run) holds on a machine whose speed drifts. A timing is a
property of a machine at a moment: it is measured in every run that asks for it and never kept in the stage cache.

Source of the case: `gen_batch_eval_time.py` of Shortened LLaMA, as the released code calls it.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList

from slm_exp.core.errors import DataError
from slm_exp.core.files import JsonObject
from slm_exp.engine.progress import advancing
from slm_exp.evaluation.backends.hflm import out_of_memory, refuse_broken
from slm_exp.evaluation.report import SpeedCase, Spread, Timing
from slm_exp.evaluation.settings import Case, Settings
from slm_exp.models.base import ModelHandle

log = logging.getLogger(__name__)

PROMPT = "The Leaning Tower of Pisa is known for"
SAMPLING = {"do_sample": True, "top_k": 50, "top_p": 0.95, "temperature": 1.0}
GRID_DISCARD = 1
"""Runs of a grid's case that do not count."""
UNSTEADY = 0.2
"""Quartiles this far apart, relative to the median, are worth a warning."""


def measure_speed(cfg: Settings, dense: ModelHandle, compressed: ModelHandle) -> JsonObject:
    """`speed` of the record: both models timed in every case; one that does not fit into memory costs only itself.

    Returns:
        protocol (how it was timed), models (dense and compressed -> params, weight_bytes), cells (see `SpeedCase`;
        what there is not is left out) and notes (what limits the meaning of these numbers).
    Raises DataError: NaN or infinite logits.
    Cost: (runs + 1) generations of both models per case.
    """
    handles = {"dense": dense, "compressed": compressed}
    cells = []
    for i, case in enumerate(cfg.cases()):
        runs, discard = ((cfg.speed_runs, cfg.speed_discard) if i == 0
                         else (cfg.speed_grid_runs + GRID_DISCARD, GRID_DISCARD))  # fmt: skip
        try:
            cells.append(_time(case, handles, runs, discard))
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            log.warning("speed of %s: out of memory (%s).", case.name, error)
            cells.append(SpeedCase(name=case.name, **case._asdict(), error="out of memory"))
    device = dense.model.device.type
    protocol = {
        "runs": cfg.speed_runs, "discard": cfg.speed_discard, "grid_runs": cfg.speed_grid_runs,
        "generate": {**SAMPLING, "use_cache": True}, "turns": "dense and compressed in every run, order changing",
        "dtype": str(dense.model.dtype).removeprefix("torch."), "device": device,
        "threads": torch.get_num_threads() if device == "cpu" else None,
    }
    models = {which: {"params": h.n_params, "weight_bytes": weight_bytes(h.model)} for which, h in handles.items()}
    return {"protocol": protocol, "models": models, "cells": [cell.model_dump(exclude_unset=True) for cell in cells],
            "notes": notes(dense, compressed, cells)}


def notes(dense: ModelHandle, compressed: ModelHandle, cells: Sequence[SpeedCase]) -> list[str]:
    """What makes these numbers mean less than they seem to."""
    out = []
    if dense.random:
        out.append("speed: the model is random and tiny; its speed says nothing of a real one's.")
    # sublayers whose output projections are all zeros
    silent = sum(all(not layer.get_submodule(name).weight.any() for name in names)  # type: ignore[operator, union-attr]
                 for layer in compressed.layers for names in compressed.layout.outputs.values())
    if silent:
        out.append(f"speed: {silent} removed sublayers are zeros in the compressed model and are computed all the "
                   "same: its speed is not that of an engine that skips them.")
    elif compressed.n_params == dense.n_params:
        out.append("speed: the compressed model is as large as the dense one, so a speedup other than 1 is noise.")
    if len(set((getattr(dense.model, "hf_device_map", None) or {}).values())) > 1:
        out.append("speed: the model is spread over several devices; moving states between them is part of the time.")
    wide = [(width, cell.name) for cell in cells for side in (cell.dense, cell.compressed)
            if (s := side.latency_s) and (width := (s.q3 - s.q1) / s.median) > UNSTEADY]
    if wide:
        where = ", ".join(dict.fromkeys(name for _, name in wide))
        out.append(f"speed: the quartiles of a latency are up to {max(wide)[0]:.0%} apart ({where}; "
                   "other work on this machine?). The speedup is paired run by run and holds better than the seconds.")
    return out


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of parameters and buffers, tied ones once."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def generation_flops(handle: ModelHandle, case: Case) -> float:
    """Operations of one generation: two per weight of every product, attention in full, the head once per new token.

    Layers read all tokens but the last one generated. Norms, activations and sampling, well under 1 %, are left out.
    """
    layout, tokens = handle.layout, case.prompt + case.new - 1
    pairs = tokens * (tokens + 1) / 2
    total = 2 * case.new * handle.model.get_output_embeddings().weight.numel()  # type: ignore[operator, union-attr]
    for layer in handle.layers:
        total += 2 * tokens * layout.work(layer, handle.config)
        total += 4 * pairs * layout.attention_width(layer)
    return float(case.batch * total)


def _time(case: Case, handles: Mapping[str, ModelHandle], runs: int, discard: int) -> SpeedCase:
    ids_BT = prompt_ids(handles["dense"], case)
    seconds: dict[str, list[tuple[float, float]]] = {which: [] for which in handles}
    grown = {}
    with torch.random.fork_rng(), torch.inference_mode():
        for which, handle in handles.items():
            refuse_broken(handle.model(ids_BT[:1], use_cache=False).logits.amax())
            with _peak(handle.model.device) as peak:
                generate(handle.model, ids_BT, case.new, seed=0)
            grown[which] = peak()
        with advancing(f"speed {case.name}", runs, "run") as advance:
            for run in range(runs):
                turns = list(handles.items())
                for which, handle in turns if run % 2 == 0 else reversed(turns):
                    took = generate(handle.model, ids_BT, case.new, seed=run)
                    if run >= discard:
                        seconds[which].append(took)
                advance(1)

    def timing(which: str) -> Timing:
        latencies, firsts = zip(*seconds[which], strict=True)
        grew, model = grown[which], handles[which].model
        return Timing(latency_s=spread(latencies), tokens_per_s=spread([case.batch * case.new / s for s in latencies]),
                      first_token_s=spread(firsts), flops=generation_flops(handles[which], case),
                      peak_bytes=None if grew is None else weight_bytes(model) + grew)

    ratios = [before[0] / after[0] for before, after in zip(seconds["dense"], seconds["compressed"], strict=True)]
    return SpeedCase(name=case.name, **case._asdict(), dense=timing("dense"), compressed=timing("compressed"),
                     speedup=spread(ratios))


def spread(values: Sequence[float]) -> Spread:
    q1, median, q3 = (float(q) for q in np.quantile(values, (0.25, 0.5, 0.75)))
    return Spread(median=median, q1=q1, q3=q3, mean=float(np.mean(values)), std=float(np.std(values)), n=len(values))


def prompt_ids(handle: ModelHandle, case: Case) -> Tensor:
    """[B, T] int64: the papers' prompt, repeated or cut to the length requested; the same in every row."""
    tokenizer = handle.tokenizer
    vocab = int(handle.config.vocab_size)
    ids = list(tokenizer(PROMPT).input_ids) if tokenizer is not None else [i % vocab for i in range(1, 13)]
    row = list(itertools.islice(itertools.cycle(ids), case.prompt))
    return torch.tensor([row] * case.batch, device=handle.model.get_input_embeddings().weight.device)  # type: ignore[arg-type]


def generate(model: PreTrainedModel, ids_BT: Tensor, new: int, seed: int) -> tuple[float, float]:
    """(seconds of a whole generation, seconds to its first token)."""
    torch.manual_seed(seed)
    settings = GenerationConfig(**SAMPLING, min_new_tokens=new, max_new_tokens=new, use_cache=True, pad_token_id=0)
    first: list[float] = []

    def note(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """A stopping criterion that notes when the first token is there, and stops nothing."""
        if not first:
            first.append(_now(model.device))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    started = _now(model.device)
    out = model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), generation_config=settings,
                         stopping_criteria=StoppingCriteriaList([note]))  # type: ignore[misc, operator]  # fmt: skip
    ended = _now(model.device)
    if out.shape[1] != ids_BT.shape[1] + new or not first:
        raise DataError(f"{type(model).__name__} generated {out.shape[1] - ids_BT.shape[1]} tokens instead of {new}, "
                        "so its latency cannot be compared. Does its generation_config force tokens?")
    return ended - started, first[0] - started


def _now(device: torch.device) -> float:
    """When all that was given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextlib.contextmanager
def _peak(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """Afterwards the call gives the bytes by which memory grew at most inside (CPU: Linux only); else None."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    now, highest = _resident_afresh(), None
    try:
        yield lambda: None if now is None or highest is None else max(0, highest - now)
    finally:
        highest = _status("VmHWM")


def _resident_afresh() -> int | None:
    """Resident bytes, after freed memory went back to the system and the recorded peak was forgotten."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        return None
    return _status("VmRSS")


def _status(field: str) -> int | None:
    try:
        line = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return int(line.group(1)) * 1024 if line else None
