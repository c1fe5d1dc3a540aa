"""The last word on every recovery: the loss of the whole model on tokens that it was not fitted on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from slm_exp.engine.batches import left_padded
from slm_exp.engine.head_loss import next_token_loss
from slm_exp.recovery.base import Recovery, RecoveryResult, RecoveryTask, copy_with

log = logging.getLogger(__name__)

BATCH = 4


def judged(recovery: Recovery, task: RecoveryTask) -> RecoveryResult:
    """What a recovery gives, unless it leaves the model worse: then nothing, and the report says so.

    A refit whose own errors fall can still destroy a model, e.g. by losing the one state that all later heads attend
    to. So `loss` of the report holds the next-token loss before and after; with a rise, or no number, every tensor is
    taken back.
    Cost: two forward passes over `Recovery.judged_on`.
    """
    found = recovery.recover(task)
    if not found.tensors:
        return found
    rows = recovery.judged_on(task)
    before, after = (mean_loss(model, rows) for model in
                     (task.handle.model, copy_with(task.handle.model, found.tensors)))
    kept = after <= before  # not where it is not a number
    verdict = {"rows": len(rows), "before": before, "after": after, "kept": kept}
    if not kept:
        log.warning("recovery=%s is taken back: the loss of the whole model on held-out tokens went from %.3f to %.3f. "
                    "More or other tokens to fit on may help.", recovery.name, before, after)
    return RecoveryResult(found.tensors if kept else {}, {**found.report, "whole_model": verdict})


def mean_loss(model: Any, rows: Sequence[dict[str, list[int]]]) -> float:
    """Mean next-token loss in nats over what is trained on in rows of `input_ids` and `labels`."""
    device, total, count = next(model.get_input_embeddings().parameters()).device, 0.0, 0
    with torch.no_grad():
        for at in range(0, len(rows), BATCH):
            batch = {name: t.to(device) for name, t in left_padded(rows[at : at + BATCH], 0).items()}
            n = int((batch["labels"][:, 1:] >= 0).sum())
            total += n * float(next_token_loss(model, batch))
            count += n
    return total / count
