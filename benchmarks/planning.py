"""How long every depth method takes to plan: seconds, block forwards, seconds per block forward.

    python benchmarks/planning.py                                    # bundled calibration text, 10 x 128 tokens
    python benchmarks/planning.py --tokens X.npy --methods sleb,blockpruner
    python benchmarks/planning.py --remove 1 model=tiny              # 1 layer or sublayer of the random model

Each method plans once, without a cache, to remove 5 layers (or 5 attention and MLP sublayers). Weights, tokens and the
layer similarity matrix are there before the clock starts. Times are wall time and want a quiet machine.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from slm_exp.core.cache.store import StageStore  # noqa: E402
from slm_exp.core.errors import SlmError  # noqa: E402
from slm_exp.core.registry import available  # noqa: E402
from slm_exp.core.types import MergePlan  # noqa: E402
from slm_exp.launch.compose import compose_run  # noqa: E402
from slm_exp.methods.base import PlanTask  # noqa: E402
from slm_exp.pipeline.config import RunConfig  # noqa: E402
from slm_exp.similarity.layers import layer_similarity  # noqa: E402

MINUTES = {"sleb": 6, "blockpruner": 12, "finercut": 12, "slm": None, "laco": None}
ONE_SHOT = 3
"""Minutes meant for SmolLM2 on two cores: by method, None where no time is meant, and for all others."""


def size(name: str, n_layers: int, remove: int) -> str:
    """The override that asks for `remove` layers or sublayers less."""
    targets = getattr(available("method")[name], "targets", ("target_layers",))
    if "target_layers" in targets:
        return f"method.target_layers={n_layers - remove}"
    return f"method.target_sublayers={remove}"


def planned(cfg: RunConfig, task: PlanTask) -> tuple[MergePlan, float]:
    """One plan and its seconds."""
    started = time.perf_counter()
    return cfg.method.plan(task), time.perf_counter() - started


def main() -> int:
    every = [name for name in available("method") if name != "from_plan"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", help="npy of token ids: the calibration (default: the bundled text)")
    parser.add_argument("--methods", default=",".join(every), help="names, with commas between (default: all)")
    parser.add_argument("--remove", type=int, default=5, help="layers or sublayers to remove")
    parser.add_argument("overrides", nargs="*", help="of every plan, e.g. model=hf model.path=FOLDER")
    args = parser.parse_args()
    common = ["tracking=none", "evaluation=none", *args.overrides]
    common += ["calibration=tokens", f"calibration.path={args.tokens}"] if args.tokens else []

    cfg = compose_run(common)
    handle = cfg.model.open(cfg.runtime.prepare(cfg.seed), Path(cfg.cache.dir))
    tokens = cfg.calibration.draw(handle, cfg.seed)
    alike = layer_similarity(handle, tokens, cfg.kernel, cfg.similarity)
    n, t = tokens.tokens_NT.shape
    print(f"{handle.name}, {n} x {t} tokens, {args.remove} of {handle.n_layers} layers (or sublayers) removed\n")
    print("| method | removed | evaluations | block forwards | seconds | per block forward, s | minutes meant |")
    print("|---|---|---:|---:|---:|---:|---:|", flush=True)
    status = 0
    for name in args.methods.split(","):
        try:
            cfg = compose_run([*common, f"method={name}", size(name, handle.n_layers, args.remove)])
            cfg.method.check_model(handle)
            task = PlanTask(handle, tokens, cfg.similarity, cfg.kernel, cfg.merge_rule, alike, StageStore(None),
                            cfg.seed)
            plan, seconds = planned(cfg, task)
        except SlmError as error:
            print(f"{name}: {error}", file=sys.stderr)
            status = 1
            continue
        gone = [*(f"{a}-{b - 1}" for a, b in plan.groups), *map(str, plan.dropped)]
        gone += [f"{half.kind[0].upper()}{half.layer}" for half in plan.sublayers]
        meant = MINUTES.get(name, ONE_SHOT)
        print(f"| {name} | {' '.join(gone)} | {plan.evaluations} | {plan.block_forwards} | {seconds:.1f} "
              f"| {seconds / plan.block_forwards:.3f} | {meant or ''} |", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
