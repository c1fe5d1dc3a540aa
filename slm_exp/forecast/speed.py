"""How fast this machine is at what a run does, measured once in a process of its own and kept in the cache.

A layer's speed depends on its width (small ones are all overhead), so it is measured at several. Times on a CPU are
processor seconds of the threads used: what the machine does when it is left alone, whoever else is on it now.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from slm_exp.core.errors import SlmError
from slm_exp.core.files import digest, write_json
from slm_exp.forecast.work import Work

log = logging.getLogger(__name__)

WIDTHS = {"cpu": (32, 128, 512, 1024), "cuda": (128, 1024, 4096)}
TOKENS = {"cpu": 640, "cuda": 8192}
LAYERS = 2
DISK = 4e8
"""Bytes a second of writing and flushing, reading or hashing weights."""
READ = {"cpu": 1e10, "cuda": 1.5e12}
"""Bytes a second of reading weights from memory, about."""
ENOUGH_S = 0.25
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
    """False: told by --tflops."""

    def block_rate(self, hidden: int) -> float:
        """Between the widths measured by interpolation of logarithms, beyond them the nearest one's."""
        points = self.blocks
        if hidden <= points[0][0]:
            return points[0][1] * hidden / points[0][0]  # overhead: as long for less
        for (a, fast_a), (b, fast_b) in pairwise(points):
            if hidden <= b:
                part = math.log(hidden / a) / math.log(b / a)
                return math.exp((1 - part) * math.log(fast_a) + part * math.log(fast_b))
        return points[-1][1]

    def seconds(self, work: Work, hidden: int) -> float:
        return (work.blocks / self.block_rate(hidden) + work.head / self.head + work.wide / self.wide
                + work.moved / DISK + work.read / READ[self.device] + work.starts * self.start
                + work.harness * self.harness + work.fixed)


def told(tflops: float, device: str, dtype: str) -> Machine:
    """A machine that is not this one, by the operations it sustains; imports as on most."""
    rate = tflops * 1e12
    name = f"{tflops:g} TFLOP/s, as told"
    return Machine(device, name, 0, dtype, ((1, rate),), rate, rate / 16, 8.0, 6.0, 1.2e9, measured=False)


def machine(cache_dir: Path, device: str, dtype: str, threads: int | None, anew: bool = False) -> Machine:
    """This machine's speeds, from the cache or measured now (about ten seconds, most of it imports).

    Raises:
        SlmError: the measuring process failed; says how.
    """
    from slm_exp.core.cache.store import library_versions

    about = {
        "recipe": RECIPE, "device": device, "dtype": dtype, "threads": threads,
        "omp": os.environ.get("OMP_NUM_THREADS"), "host": platform.node(), "cores": os.cpu_count(),
        "cards": os.environ.get("CUDA_VISIBLE_DEVICES"), "versions": library_versions(),
    }  # fmt: skip
    kept = cache_dir / "speed" / f"{digest(about)}.json"
    try:
        if not anew:
            found = json.loads(kept.read_text(encoding="utf-8"))["machine"]
            return Machine(**{**found, "blocks": tuple((int(h), float(r)) for h, r in found["blocks"])})
    except (OSError, ValueError, KeyError, TypeError):
        pass
    print("measuring this machine's speed once (about 10 s; kept in the cache) ...", file=sys.stderr)
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(p for p in (package, os.environ.get("PYTHONPATH", "")) if p)
    ran = subprocess.run([sys.executable, "-m", "slm_exp.forecast.speed", device, dtype, str(threads or 0)],
                         capture_output=True, text=True, check=False,
                         env={**os.environ, "PYTHONPATH": path})  # fmt: skip
    try:
        found = json.loads(ran.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        last = ran.stderr.strip().splitlines()[-1:] or [f"status {ran.returncode}"]
        raise SlmError(f"the machine's speed could not be measured: {last[0]}. `slm plan --tflops N` plans for one "
                       "that sustains N, and slm doctor says what is wrong here.") from None  # fmt: skip
    try:
        write_json(kept, {"about": about, "machine": found})
    except OSError as error:
        log.warning("could not keep the machine's speed in %s: %s", kept, error)
    return Machine(**{**found, "blocks": tuple((int(h), float(r)) for h, r in found["blocks"])})


def measure(device: str, dtype: str, threads: int | None) -> Machine:
    """Measure here and now. Imports torch, transformers and lm-eval."""
    import resource
    import time

    began = time.process_time()
    import torch
    import transformers  # noqa: F401

    from slm_exp.engine.runner import BlockRunner, Slot
    from slm_exp.models.tiny import Tiny

    if threads:
        torch.set_num_threads(threads)
    Tiny(layers=1).open(torch.device("cpu"), Path()).model  # noqa: B018 - imports the model's own code
    start = time.process_time() - began
    cpus = 1 if device == "cuda" else torch.get_num_threads()
    clock = time.perf_counter if device == "cuda" else time.process_time

    def rate(run: Callable[[], Any], flops: float) -> float:
        run()
        best = math.inf
        spent = 0.0
        while spent < ENOUGH_S:
            begin = clock()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            took = max(clock() - begin, 1e-6) / cpus
            best, spent = min(best, took), spent + took
        return flops / best

    where, kind = torch.device(device), getattr(torch, dtype)
    blocks = []
    n = TOKENS[where.type]
    from slm_exp.forecast.shapes import sketch

    for hidden in WIDTHS[where.type]:
        heads = max(2, hidden // 64)
        source = Tiny(layers=LAYERS, hidden=hidden, heads=heads, kv_heads=heads, dtype=dtype)
        sizes = sketch(source, Path(), "cpu").sizes
        assert sizes is not None
        runner = BlockRunner(source.open(where, Path()), torch.zeros(n // 128, 128, dtype=torch.long).numpy())
        h_NTD = runner.embed()
        for i in range(LAYERS):
            runner.block(Slot(i), h_NTD)  # checks the fused layer against the library's

        def pass_through(runner: Any = runner, h_NTD: Any = h_NTD) -> None:
            for i in range(LAYERS):
                runner.block(Slot(i), h_NTD)

        blocks.append((hidden, rate(pass_through, LAYERS * sizes.block_flops(n, 128))))
    x = torch.randn(256, 512, device=where, dtype=kind)
    head = torch.nn.functional.linear
    w = torch.randn(16384, 512, device=where, dtype=kind)
    with torch.inference_mode():
        head_rate = rate(lambda: head(x, w).log_softmax(-1, dtype=torch.float32), 2 * 256 * 512 * 16384)
        y = torch.randn(512, 512, device=where, dtype=torch.float64)
        wide = rate(lambda: y @ y, 2 * 512**3)
    begin = time.process_time()
    import datasets  # noqa: F401
    import lm_eval.evaluator
    import lm_eval.models.huggingface  # noqa: F401

    harness = time.process_time() - begin
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else platform.processor() or platform.machine()
    # what is resident now less what the measuring itself holds, which is given back to the system only in part
    with open("/proc/self/statm") as f:
        resident = int(f.read().split()[1]) * resource.getpagesize()
    return Machine(where.type, name, torch.get_num_threads(), dtype, tuple(blocks), head_rate, wide, start, harness,
                   float(resident))


if __name__ == "__main__":
    told_device, told_dtype, told_threads = sys.argv[1:4]
    print(json.dumps(asdict(measure(told_device, told_dtype, int(told_threads) or None))))
