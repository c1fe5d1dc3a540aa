"""Two runs' models on the same sequences: perplexity of both, and a paired test of their losses, sequence by sequence.

    python benchmarks/paired.py RUN_A RUN_B --tokens wt2test_24x256.npy books_24x256.npy

Every RUN is the folder of a finished run; its model is made again from the stage cache, by the run's own overrides.
The test is exact up to sampling: signs of the differences are flipped at random (two-sided).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from slm_exp.core.cache.store import StageStore  # noqa: E402
from slm_exp.engine.runner import BlockRunner  # noqa: E402
from slm_exp.engine.vocabulary import mean_loss  # noqa: E402
from slm_exp.launch.compose import compose_run  # noqa: E402
from slm_exp.models.base import ModelHandle  # noqa: E402
from slm_exp.pipeline.stages import Experiment, steps  # noqa: E402

FLIPS = 20_000


def model_of(run: Path) -> ModelHandle:
    """The recovered model of a run."""
    record = json.loads((run / "record.json").read_text(encoding="utf-8"))
    cfg = compose_run([o for o in record["overrides"] if not o.startswith("hydra.")])
    with tempfile.TemporaryDirectory() as folder:
        x = Experiment(cfg, Path(folder), StageStore(Path(cfg.cache.dir)))
        for step in steps(cfg):
            if step.name in ("load", "calibrate", "similarity", "plan", "merge", "width", "recover"):
                for stage in step.stages:
                    if stage.when(x):
                        cached = stage.carry_out(x)
                        print(f"{run.name}: {stage.name}{' from the cache' if cached else ''}", file=sys.stderr)
        x.model.model  # noqa: B018 - built before the folder goes
        return x.model


def losses(model: ModelHandle, tokens_NT: np.ndarray) -> np.ndarray:
    """Mean next-token loss of every sequence."""
    last_NTD = BlockRunner(model, tokens_NT).last_state()
    return np.array([mean_loss(BlockRunner(model, row[None]), last_NTD[i : i + 1]) for i, row in enumerate(tokens_NT)])


def flipped(difference_N: np.ndarray) -> float:
    """How often the mean of differences with random signs is as large as theirs."""
    signs = np.random.default_rng(0).choice((-1, 1), (FLIPS, len(difference_N)))
    return float((1 + (abs((signs * difference_N).mean(1)) >= abs(difference_N.mean()) - 1e-15).sum()) / (1 + FLIPS))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs=2, type=Path)
    parser.add_argument("--tokens", nargs="+", type=Path, required=True, help="npy files of token ids [N, T]")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    models = [model_of(run) for run in args.runs]
    print("| tokens | perplexity of the first | of the second | loss: second - first | p | sequences |")
    print("|---|---:|---:|---:|---:|---:|")
    for path in args.tokens:
        first, second = (losses(model, np.load(path)) for model in models)
        gap = second - first
        error = gap.std(ddof=1) / math.sqrt(len(gap))
        print(f"| {path.stem} | {math.exp(first.mean()):.1f} | {math.exp(second.mean()):.1f} | {gap.mean():+.3f} ± "
              f"{error:.3f} | {flipped(gap):.4f} | {len(gap)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
