"""One training for all sizes against one for each: `recovery=family` at equal numbers of student steps.

    slm path hydra.run.dir=FOLDER ...
    python benchmarks/family.py FOLDER --sizes 27,24,21 --lr 3e-4,1e-3 --steps 8 [OVERRIDE...]

The plans are the best of each size in FOLDER/path.json, on its calibration. With k sizes the family takes `steps` steps
of all of them at once (k students, one pass of the dense model), and each size `steps` steps alone (one student and one
pass of the dense model each); data, adapters, loss and learning rates are the same. Prints the perplexity on the
held-out passages (calibration/heldout.py) of every size before and after, at every learning rate.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path

from slm_exp import load
from slm_exp.core.types import MergePlan
from slm_exp.merging.surgery import apply_plan, hosts
from slm_exp.recovery import gain
from slm_exp.recovery.base import RecoveryResult, RecoveryTask, Relative, with_tensors
from slm_exp.recovery.family import Family


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sizes", required=True)
    parser.add_argument("--lr", default="3e-4,1e-3,3e-3")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rows", type=int, default=gain.ROWS, help="held-out sequences of each of the three domains")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args()  # overrides behind options
    gain.ROWS = args.rows
    path = json.loads((args.folder / "path.json").read_text())
    study = load(f"model={path['config']['model']['name']}", "evaluation=none", "tracking=none", "calibration=tokens",
                 f"calibration.path={args.folder / 'calibration_tokens.npy'}", "recovery=family",
                 f"recovery.max_steps={args.steps}", f"recovery.checkpoint_every={args.steps}",
                 f"merge_rule={path['config']['merge_rule']['name']}", *args.overrides)
    rule, recipe, dense = study.cfg.merge_rule, study.cfg.recovery, study.dense
    assert isinstance(recipe, Family)
    sizes = [int(n) for n in args.sizes.split(",")]
    recipe = replace(recipe, middle=len(sizes) - 2)
    family = []
    with tempfile.TemporaryDirectory() as folder:
        for n in sizes:
            best = max((p for p in path["plans"] if p["n_layers"] == n), key=lambda p: p["final_score"])
            plan = MergePlan(dense.n_layers, tuple(map(tuple, best["groups"])), rule=rule.name)  # type: ignore[arg-type]
            task = RecoveryTask(apply_plan(dense, plan, rule), dense, plan, study.tokens, Path(folder))
            family.append(Relative(task, tuple(hosts(plan, rule))))

        def perplexity(one: Relative, tensors: RecoveryResult) -> str:
            model = with_tensors(one.task.handle, tensors, {"recovery": {"name": "family"}})
            return f"{math.exp(gain.held_out_loss(model, dense, study.tokens).loss or math.inf):.2f}"

        print("| training | lr | steps | " + " | ".join(f"{n} layers" for n in sizes) + " |")
        print("|---|---:|---:|" + "---:|" * len(sizes))
        nothing = [perplexity(one, RecoveryResult()) for one in family]
        print(f"| none | | | {' | '.join(nothing)} |", flush=True)
        for lr in args.lr.split(","):
            here = replace(recipe, lr=float(lr))
            adapters = here.adapters(family)
            together = [perplexity(one, RecoveryResult(here.recovered(one, adapters))) for one in family]
            print(f"| one for all | {lr} | {args.steps} | {' | '.join(together)} |", flush=True)
            alone = [perplexity(one, RecoveryResult(here.recovered(one, here.adapters([one])))) for one in family]
            print(f"| one each | {lr} | {len(sizes)} x {args.steps} | {' | '.join(alone)} |", flush=True)


if __name__ == "__main__":
    main()
