"""Where jobs run: one worker per visible GPU, or the cores shared out."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass, field

CORES_PER_WORKER = 2


@dataclass(frozen=True)
class Worker:
    """A place for one job at a time, made by the environment its process gets."""

    name: str
    env: dict[str, str] = field(default_factory=dict)


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """The GPUs (or MIG slices) a job could see, as names for CUDA_VISIBLE_DEVICES. Imports no torch, touches no GPU."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is not None:
        return [name.strip() for name in told.split(",") if name.strip() not in ("", "-1", "NoDevFiles")]
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return re.findall(r"UUID: (MIG-[\w/-]+)\)", listing) or re.findall(r"UUID: (GPU-[\w-]+)\)", listing)


def make_workers(n: int | None, threads: int | None, gpus: list[str]) -> list[Worker]:
    """The pool: `n` workers over `gpus` in turn, or over the cores where there are none.

    Args:
        n: null is one per GPU; on CPUs one per two cores (see docs/sweeps.md for what was measured).
        threads: CPU threads per job; null shares the cores out, unless OMP_NUM_THREADS is set.
        gpus: names for CUDA_VISIBLE_DEVICES; empty leaves devices alone.
    """
    n = n or len(gpus) or max(1, cores() // CORES_PER_WORKER)
    env = {"TOKENIZERS_PARALLELISM": os.environ.get("TOKENIZERS_PARALLELISM", "false")}
    if threads or "OMP_NUM_THREADS" not in os.environ:
        env["OMP_NUM_THREADS"] = str(threads or max(1, cores() // n))
    if not gpus:
        return [Worker(f"cpu{i}", env) for i in range(n)]
    return [Worker(f"gpu{i % len(gpus)}", env | {"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]}) for i in range(n)]
