"""The `runtime` group: device, threads, determinism. Changes no result a record claims.

Ranks: where a launcher (accelerate, torchrun) started the same command many times, the first process does the run. The
others come to the recovery by the same way (through the stage cache they share), take part in its training, and end;
what they write goes to a folder of their own that is removed.
"""

from __future__ import annotations

import contextlib
import os
import platform
import random
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slm_exp.core.errors import ConfigError, require, require_one_of
from slm_exp.core.registry import Component, knob, register

if TYPE_CHECKING:
    import torch


DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")
MOST_THREADS = 4096
"""Thread pools of many more end the process without a word."""


def world() -> int:
    """How many processes train together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "MASTER_ADDR" in os.environ else 1


def rank() -> int:
    """Of this process among them; the first is 0."""
    return int(os.environ.get("RANK", "0")) if world() > 1 else 0


def local_rank() -> int:
    """Of this process on its machine: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if world() > 1 else 0


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with(parent: int) -> None:
    """Have the kernel SIGKILL this process when its parent ends, however it ends. Linux only; elsewhere nothing."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the request
        sys.exit(1)


def set_malloc(*options: tuple[int, int]) -> None:
    """Set options of glibc's malloc, by the numbers of malloc.h; another C library stays as it is."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        for option in options:
            ctypes.CDLL("libc.so.6").mallopt(*option)


def available_memory() -> int:
    """Bytes that new processes may take: what the machine has free, or what is left of this process's cgroup."""
    import psutil

    free, root = [psutil.virtual_memory().available], Path("/sys/fs/cgroup")
    for limit, used in (("memory.max", "memory.current"),
                        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):  # cgroup v2, v1
        with contextlib.suppress(OSError, ValueError):  # no such cgroup, or no limit ("max")
            free.append(int((root / limit).read_text()) - int((root / used).read_text()))
    return max(0, min(free))


@dataclass
class Runtime(Component):
    """Where a run computes."""

    device: str = knob("auto")
    """auto (cuda where there is one), cpu, cuda, cuda:1, ..."""
    threads: int | None = knob(None)
    """CPU threads; null leaves torch's choice."""
    deterministic: bool = knob(False)
    """Refuse kernels that are not deterministic (slower on CUDA)."""
    memory: str = knob("auto")
    """resident: the whole model is loaded. stream: decoder layers stay in their files and are read when they run, at
    most three in memory. auto: stream where the model does not fit into what is free (docs/scale.md)."""

    def check(self) -> None:
        require(bool(DEVICE.fullmatch(self.device)), "runtime.device", self.device, "auto, cpu, cuda or cuda:N")
        require(self.threads is None or 1 <= self.threads <= MOST_THREADS, "runtime.threads", self.threads,
                f"null or a number from 1 to {MOST_THREADS}")
        require_one_of("runtime.memory", self.memory, ("auto", "resident", "stream"))

    def cpu_threads(self) -> int:
        """That this process computes with, as far as settings and environment say: a name for what is timed."""
        requested = os.environ.get("OMP_NUM_THREADS", "")
        return self.threads or (int(requested) if requested.isdigit() else 0) or cores()

    def prepare(self, seed: int, device: str | None = None) -> torch.device:
        """Set threads, determinism and every seed; return the device (`device` overrides this config's). Raises
        ConfigError: cuda is requested and not there."""
        import torch

        if self.threads:
            torch.set_num_threads(self.threads)
        if self.deterministic:  # read when the first matrix product runs on a GPU; without it each one is an error
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # the same switch as use_deterministic_algorithms, which imports the compiler (2 s) besides
        torch.set_deterministic_debug_mode("error" if self.deterministic else "default")
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        self.require_device(device)
        wanted = device or self.device
        if wanted == "auto":
            wanted = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(f"cuda:{local_rank()}" if wanted == "cuda" and world() > 1 else wanted)

    def require_device(self, device: str | None = None) -> None:
        """Refuse a GPU that is not there (`device` overrides this config's). Imports torch where one is asked for.
        Raises ConfigError: no GPU is visible, or none of that number."""
        wanted = device or self.device
        if not wanted.startswith("cuda"):
            return
        import torch

        if not torch.cuda.is_available():
            raise ConfigError(f"device = {wanted}; no CUDA device is visible. Use runtime=cpu or runtime=auto.")
        n, number = torch.cuda.device_count(), wanted.partition(":")[2]
        require(not number or (number.isdigit() and int(number) < n), "device", wanted,
                f"cuda:0 to cuda:{n - 1}, the {n} devices that are visible")

    def describe(self, device: torch.device) -> dict[str, Any]:
        """What the record says about the machine."""
        import torch

        return {"type": device.type, "name": device_name(device), "threads": torch.get_num_threads(),
                "cpus": os.cpu_count()}


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices in hardware: tensor cores, AMX tiles or AVX-512 of a CPU. Emulated,
    these products are slower than float32's."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def device_name(device: torch.device) -> str:
    """Of a GPU, or of the processor as the system calls it."""
    if device.type == "cuda":
        import torch

        return str(torch.cuda.get_device_name(device))
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


@register("runtime", "auto")
@dataclass
class Auto(Runtime):
    """CUDA where there is one, else CPU."""


@register("runtime", "cpu")
@dataclass
class Cpu(Runtime):
    """CPU only."""

    device: str = knob("cpu")


@register("runtime", "cuda")
@dataclass
class Cuda(Runtime):
    """A CUDA device, or an error."""

    device: str = knob("cuda")
