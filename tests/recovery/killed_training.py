"""Trainings that kill themselves: `python killed_training.py FOLDER STEP ...` (0: it lives). Prints reports as JSON."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch

from slm_exp.core.registry import available
from slm_exp.core.types import CalibrationTokens, MergePlan
from slm_exp.merging.surgery import apply_plan
from slm_exp.models.tiny import Tiny
from slm_exp.recovery.base import RecoveryTask


class Killer:
    """A tracker that ends the process in the middle of a step's report."""

    def __init__(self, step: int) -> None:
        self.step = step

    def log(self, section: dict) -> None:
        if section["recovery"]["step"] == self.step and "loss" in section["recovery"]:
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: str, step: str) -> None:
    dense = Tiny(layers=3).open(torch.device("cpu"), Path("unused"))
    plan = MergePlan(3, dropped=(1,))
    ids = torch.zeros(1, 2, dtype=torch.int32).numpy()
    tokens = CalibrationTokens(ids, "none")
    task = RecoveryTask(apply_plan(dense, plan), dense, plan, tokens, Path(folder), Killer(int(step)))  # type: ignore[arg-type]
    recovery = available("recovery")["lora"](data="bundled", seq_len=32, max_steps=8, batch_size=4, micro_batch_size=2,
                                             warmup_steps=2, checkpoint_every=2, held_out=4, lr=1e-2)
    found = recovery.recover(task)  # type: ignore[attr-defined]
    print(json.dumps({k: v for k, v in found.report.items() if k not in ("seconds", "estimate")}), flush=True)


if __name__ == "__main__":
    for where, when in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        main(where, when)
