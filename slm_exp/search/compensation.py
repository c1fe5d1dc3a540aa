"""Finishing a plan that was found: its score and cost, and Prune&Comp's compensation of magnitude.

Layers add to a stream that grows on its way up. Where layers are cut out, the stream that arrives above is too small,
and what the layers above add weighs too much. Source: arXiv:2507.18212, whose code multiplies everything below a cut
(embeddings, attention and MLP outputs) by alpha. Here what the layers above add is divided by alpha instead: every
layer and the final norm read the stream through an RMS norm, so the two are the same function up to the norms'
epsilon, and the embeddings stay as they are, so that a tied head is not rescaled with them. Biases of the output
projections are scaled with the weights; the released code leaves them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from slm_exp.core.types import Compensation, Cut, MergePlan
from slm_exp.engine.runner import Slot
from slm_exp.merging.surgery import zeroed_note
from slm_exp.search.refit import note
from slm_exp.search.scoring import ScoringEngine, slots_of


def scored(engine: ScoringEngine, plan: MergePlan, compensate: str | None) -> MergePlan:
    """See `PlanTask.scored`."""
    if compensate:
        compensation, forwards = magnitudes(engine, plan)
        plan = replace(plan, compensation=compensation, block_forwards=plan.block_forwards + forwards)
    score = engine.score(plan)
    notes = (*plan.notes, *zeroed_note(engine.task.handle, plan), *note(engine.task))
    return replace(plan, final_score=score, evaluations=plan.evaluations + engine.evaluations,
                   block_forwards=plan.block_forwards + engine.block_forwards, notes=tuple(dict.fromkeys(notes)))


def magnitudes(engine: ScoringEngine, plan: MergePlan) -> tuple[Compensation, int]:
    """The compensation of a plan: for every cut, bottom to top, how much larger its layers would have made the stream.

    A cut's layers and what is left of them both run on the states of the compressed model, compensated below; alpha is
    the mean over samples and channels of the ratio of mean absolute values over tokens.

    A cut at the very top is left out: the final norm undoes any factor. Returned with it: the block forwards beyond the
    dense pass, none for one run of removed layers, else at most one for each layer from the first cut up.
    """
    dense, scale, forwards = engine.dense_states, 1.0, 0
    kept = dict(zip((slot.start for slot in plan.slots), slots_of(plan, engine.task.rule), strict=True))
    h_NTD, reached = dense[0], 0  # while `reached` equals the layer, h is the dense model's state
    left = [cut for cut in plan.cuts if cut.stop < plan.n_layers]
    found: list[Cut] = []

    def run(slot: Slot, x_NTD: Tensor) -> Tensor:
        nonlocal forwards
        forwards += 1
        return engine.block(replace(slot, scale=scale), x_NTD)

    for start, stop in plan.runs:
        if len(found) == len(left):
            break
        on_dense = reached == start
        full_NTD = dense[stop] if on_dense else h_NTD
        if not on_dense:
            for i in range(start, stop):
                full_NTD = run(engine.dense[i], full_NTD)
        if (start, stop) not in left:
            h_NTD, reached = full_NTD, stop if on_dense else reached
        else:
            h_NTD = run(kept[start], h_NTD) if start in kept else h_NTD
            found.append(Cut(start, stop, ratio(full_NTD, h_NTD)))
            scale /= found[-1].alpha
    return Compensation("magnitude", tuple(found)), forwards


def ratio(full_NTD: Tensor, short_NTD: Tensor) -> float:
    """Mean over samples and channels of mean|full| / mean|short| over tokens; channels at zero are left out."""
    full_ND, short_ND = (h.abs().mean(1, dtype=torch.promote_types(h.dtype, torch.float32)).double()
                         for h in (full_NTD, short_NTD.to(full_NTD.device)))
    there = (short_ND > 0) & (full_ND > 0)
    return float((full_ND[there] / short_ND[there]).mean()) if there.any() else 1.0
