"""The models of a threshold path, one of each size: one training for all of them, their losses, their checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from slm_exp.core.cache.code import Code
from slm_exp.core.files import JsonObject
from slm_exp.core.types import MergePlan
from slm_exp.merging.surgery import apply_plan, hosts
from slm_exp.models.base import ModelHandle
from slm_exp.pipeline.stages import BUILT, HELD_OUT, READ, Experiment
from slm_exp.recovery.base import RecoveryResult, RecoveryTask, Relative, with_tensors
from slm_exp.recovery.family import Family
from slm_exp.runs.checkpoint import save_checkpoint
from slm_exp.search.path import PathPlan
from slm_exp.search.task import PlanTask

log = logging.getLogger(__name__)

TRAINED_BY = Code((*BUILT, *READ, "recovery", "engine"), ("torch", "transformers", "peft"))


@dataclass(frozen=True)
class Size:
    """The best plan of a size, and its model."""

    plan: MergePlan
    model: ModelHandle


def sizes_of(task: PlanTask, best: Mapping[int, PathPlan]) -> dict[int, Size]:
    """Models of the sizes that merge something, the largest first."""
    out = {}
    for n, found in sorted(best.items(), reverse=True):
        if found.groups:
            plan = task.with_fitted(MergePlan(
                task.handle.n_layers, found.groups, method="slm", rule=task.rule.name, similarity=task.similarity.name,
                threshold=found.low, final_score=found.final_score))
            out[n] = Size(plan, apply_plan(task.handle, plan, task.rule))
    return out


def recovered(x: Experiment, sizes: Mapping[int, Size], about: JsonObject) -> Iterator[tuple[int, Size]]:
    """Every size after the one training of `recovery=family`, one in memory at a time.

    `about` takes the training's report, and the loss on held-out passages of the dense model and of every size before
    and after. A size that the training leaves worse stays as it was. The adapters are kept in the stage cache.
    Cost: the training, and two forward passes over 3,072 tokens for each size.
    """
    recipe, rule = x.cfg.recovery, x.cfg.merge_rule
    assert isinstance(recipe, Family)
    family = [Relative(RecoveryTask(size.model, x.dense, size.plan, x.tokens, x.folder, seed=x.cfg.seed),
                       tuple(hosts(size.plan, rule))) for size in sizes.values()]
    inputs = {"recovery": recipe.identity(), "dense": x.dense.digest, "device": x.dense.device.type,
              "models": [one.task.handle.digest for one in family], "tokens": x.tokens.digest, "seed": x.cfg.seed}
    train = partial(recipe.adapters, family)
    adapters = (x.store.cached("recover", inputs, RecoveryResult, train, TRAINED_BY)[0] if recipe.stored()
                else train())
    about |= {"name": recipe.name, "report": adapters.report, "dense": held_out(x, x.dense), "sizes": {}}
    for (n, size), one in zip(sizes.items(), family, strict=True):
        model = with_tensors(size.model, RecoveryResult(recipe.recovered(one, adapters)), {
            "recovery": {**recipe.identity(), "of": [*sizes]}})
        before, after = held_out(x, size.model), held_out(x, model)
        kept = after is not None and (before is None or after <= before)
        if not kept:
            log.warning("%d layers: the held-out loss went from %s to %s; this size stays as it was.", n, before, after)
        about["sizes"][str(n)] = {"before": before, "after": after, "kept": kept}
        yield n, replace(size, model=model) if kept else size


def held_out(x: Experiment, model: ModelHandle) -> float | None:
    """The loss of a model on held-out passages, from the stage cache where it is known."""
    x.model = model
    HELD_OUT.carry_out(x)
    return x.held_out.loss


def save(x: Experiment, n: int, size: Size) -> Path:
    """Write a size's plain checkpoint. Raises CheckpointError: it could not be written, or does not reload as it
    was."""
    folder = x.folder / "models" / f"{n}_layers"
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(size.model, folder, size.plan, x.tokens)
    return folder
