"""How fast this machine is at what a run does, measured once in a process of its own and kept in the cache.

A layer's speed depends on its width (small ones are all overhead), so it is measured at several. Times on a CPU are
processor seconds of the threads used: what the machine does when it is left alone, whoever else is on it now.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from slm_exp.core.cache.store import library_versions
from slm_exp.core.cost import Work
from slm_exp.core.errors import SlmError
from slm_exp.core.files import digest, write_json

log = logging.getLogger(__name__)

DISK = 4e8
"""Bytes a second of writing and flushing, reading or hashing weights."""
READ = {"cpu": 1e10, "cuda": 1.5e12}
"""Bytes a second of reading weights from memory, about."""
RECIPE = 1  # raise it when what is measured changes: what was kept is then measured anew


@dataclass(frozen=True)
class Machine:
    """A machine's speeds. Rates in operations a second."""

    device: str
    """cpu or cuda."""
    name: str
    threads: int
    dtype: str
    blocks: tuple[tuple[int, float], ...] = ()
    """(hidden size, rate in decoder layers), ascending."""
    head: float = 0
    wide: float = 0
    """In float64."""
    start: float = 0
    """Seconds to import torch and transformers."""
    harness: float = 0
    """Seconds to import lm-eval and data sets."""
    resident: float = 0
    """Bytes in memory once all that is imported."""
    measured: bool = True
    """False: given by --tflops."""

    def block_rate(self, hidden: int) -> float:
        """Between the widths measured by interpolation of logarithms, beyond them the nearest one's."""
        points = self.blocks
        if hidden <= points[0][0]:
            return points[0][1] * hidden / points[0][0]  # overhead: as long for less
        for (a, rate_a), (b, rate_b) in pairwise(points):
            if hidden <= b:
                part = math.log(hidden / a) / math.log(b / a)
                return math.exp((1 - part) * math.log(rate_a) + part * math.log(rate_b))
        return points[-1][1]

    def seconds(self, work: Work, hidden: int) -> float:
        return (work.blocks / self.block_rate(hidden) + work.head / self.head + work.wide / self.wide
                + work.moved / DISK + work.read / READ[self.device] + work.starts * self.start
                + work.harness * self.harness + work.fixed)


def stated(tflops: float, device: str, dtype: str) -> Machine:
    """A machine that is not this one, by the operations it sustains; imports as on most."""
    rate = tflops * 1e12
    return Machine(device, f"{tflops:g} TFLOP/s, as stated", 0, dtype, ((1, rate),), rate, rate / 16, 8.0, 6.0, 1.2e9,
                   measured=False)


def machine(cache_dir: Path, device: str, dtype: str, threads: int | None, anew: bool = False) -> Machine:
    """This machine's speeds, from the cache or measured now (about ten seconds, most of it imports). Raises SlmError:
    the measuring process failed; says how."""
    about = {"recipe": RECIPE, "device": device, "dtype": dtype, "threads": threads,
             "omp": os.environ.get("OMP_NUM_THREADS"), "host": platform.node(), "cores": os.cpu_count(),
             "cards": os.environ.get("CUDA_VISIBLE_DEVICES"), "versions": library_versions()}
    kept = cache_dir / "speed" / f"{digest(about)}.json"
    if not anew:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return _machine(json.loads(kept.read_text(encoding="utf-8"))["machine"])
    print("measuring this machine's speed once (about 10 s; kept in the cache) ...", file=sys.stderr)
    path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")]))
    ran = subprocess.run([sys.executable, "-m", "slm_exp.forecast.measure", device, dtype, str(threads or 0)],
                         capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path})
    try:
        measured = json.loads(ran.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        last = ran.stderr.strip().splitlines()[-1:] or [f"status {ran.returncode}"]
        raise SlmError(f"the machine's speed could not be measured: {last[0]}. `slm plan --tflops N` plans for one "
                       "that sustains N, and slm doctor says what is wrong here.") from None
    try:
        write_json(kept, {"about": about, "machine": measured})
    except OSError as error:
        log.warning("could not keep the machine's speed in %s: %s", kept, error)
    return _machine(measured)


def _machine(measured: dict[str, Any]) -> Machine:
    return Machine(**{**measured, "blocks": tuple((int(h), float(r)) for h, r in measured["blocks"])})
