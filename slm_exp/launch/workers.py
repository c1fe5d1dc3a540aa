"""Where jobs run: one worker per visible GPU, or the cores shared out."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass, field

from slm_exp.core.runtime import available_memory, cores

GIB = 2**30


@dataclass(frozen=True)
class Worker:
    """A place for one job at a time, made by the environment its process gets."""

    name: str
    env: dict[str, str] = field(default_factory=dict)


def visible_gpus() -> list[str]:
    """The GPUs (or MIG slices) a job could see, as names for CUDA_VISIBLE_DEVICES. Imports no torch, touches no GPU."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1", "NoDevFiles")]
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return re.findall(r"UUID: (MIG-[\w/-]+)\)", listing) or re.findall(r"UUID: (GPU-[\w-]+)\)", listing)


def make_workers(n: int | None, threads: int | None, gpus: list[str], jobs: int,
                 weights: int | None = None) -> list[Worker]:
    """The pool: `n` workers over `gpus` in turn, or over the cores where there are none.

    Args:
        n: null is one per GPU; on CPUs one per `threads` cores as far as memory goes. A job is taken to need four times
            its weights (dense and compressed model, states, checkpoint) and 2 GiB.
        threads: CPU threads per job; null shares the cores out, unless OMP_NUM_THREADS is set.
        gpus: names for CUDA_VISIBLE_DEVICES; empty leaves devices alone.
        jobs: how many there are to run; more workers than that would only take threads from them.
        weights: bytes of one job's weights; null is unknown, and then one job at a time is what is safe.
    """
    fit = 1 if weights is None else available_memory() // (4 * weights + 2 * GIB)
    n = min(n or len(gpus) or max(1, min(cores() // (threads or 1), fit)), max(jobs, 1))
    env = {"TOKENIZERS_PARALLELISM": os.environ.get("TOKENIZERS_PARALLELISM", "false")}
    if threads or "OMP_NUM_THREADS" not in os.environ:
        env["OMP_NUM_THREADS"] = str(threads or max(1, cores() // n))
    if not gpus:
        return [Worker(f"cpu{i}", env) for i in range(n)]
    return [Worker(f"gpu{i % len(gpus)}", env | {"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]}) for i in range(n)]
