"""`python -m slm_exp.forecast.measure DEVICE DTYPE THREADS`: this machine's speeds as JSON. Imports everything."""

from __future__ import annotations

import json
import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers  # noqa: F401

from slm_exp.engine.runner import BlockRunner, Slot
from slm_exp.forecast.machine import Machine
from slm_exp.models.tiny import Tiny

WIDTHS = {"cpu": (32, 128, 512, 1024), "cuda": (128, 1024, 4096)}
TOKENS = {"cpu": 640, "cuda": 8192}
LAYERS = 2
ENOUGH_S = 0.25


def measure(device: str, dtype: str, threads: int | None) -> Machine:
    """Measure here and now."""
    if threads:
        torch.set_num_threads(threads)
    Tiny(layers=1).open(torch.device("cpu"), Path()).model  # noqa: B018 - imports the model's own code
    start = time.process_time()  # of this process: the interpreter and all imports
    cpus = 1 if device == "cuda" else torch.get_num_threads()
    clock = time.perf_counter if device == "cuda" else time.process_time

    def rate(run: Callable[[], Any], flops: float) -> float:
        """Operations a second, by the best of the runs that take ENOUGH_S together."""
        run()
        best, spent = math.inf, 0.0
        while spent < ENOUGH_S:
            begin = clock()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            took = max(clock() - begin, 1e-6) / cpus
            best, spent = min(best, took), spent + took
        return flops / best

    where, kind = torch.device(device), getattr(torch, dtype)
    n = TOKENS[where.type]
    blocks = []
    for hidden in WIDTHS[where.type]:
        heads = max(2, hidden // 64)
        source = Tiny(layers=LAYERS, hidden=hidden, heads=heads, kv_heads=heads, dtype=dtype)
        sizes = source.sketch(Path(), "cpu").sizes
        assert sizes is not None
        runner = BlockRunner(source.open(where, Path()), torch.zeros(n // 128, 128, dtype=torch.long).numpy())
        h_NTD = runner.embed()

        def pass_through(runner: Any = runner, h_NTD: Any = h_NTD) -> None:
            for i in range(LAYERS):
                runner.block(Slot(i), h_NTD)

        blocks.append((hidden, rate(pass_through, LAYERS * sizes.block_flops(n, 128))))
    x = torch.randn(256, 512, device=where, dtype=kind)
    w = torch.randn(16384, 512, device=where, dtype=kind)
    y = torch.randn(512, 512, device=where, dtype=torch.float64)
    with torch.inference_mode():
        linear, flops = torch.nn.functional.linear, 2 * w.numel() * len(x)
        head = rate(lambda: linear(x, w).log_softmax(-1, dtype=torch.float32), flops)
        wide = rate(lambda: y @ y, 2 * 512**3)
    begin = time.process_time()
    import datasets  # noqa: F401
    import lm_eval.evaluator
    import lm_eval.models.huggingface  # noqa: F401

    harness = time.process_time() - begin
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else platform.processor() or platform.machine()
    return Machine(where.type, name, torch.get_num_threads(), dtype, tuple(blocks), head, wide, start, harness,
                   float(psutil.Process().memory_info().rss))


if __name__ == "__main__":
    device, dtype, threads = sys.argv[1:4]
    print(json.dumps(asdict(measure(device, dtype, int(threads) or None))))
