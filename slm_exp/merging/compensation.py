"""Prune&Comp's magnitude compensation: give the stream behind a cut the size that the removed layers gave it.

Layers add to a stream that grows on its way up. Where layers are cut out, the stream that arrives above is too small,
and what the layers above add weighs too much. Source: arXiv:2507.18212, whose code multiplies everything below a cut
(embeddings, attention and MLP outputs) by alpha. Here what the layers above add is divided by alpha instead: every
layer and the final norm read the stream through an RMS norm, so the two are the same function up to the norms'
epsilon, and the embeddings stay as they are, so that a tied head is not rescaled with them. Biases of the output
projections are scaled with the weights; the released code leaves them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slm_exp.core.types import MergePlan
    from slm_exp.engine.runner import Slot
    from slm_exp.models.layouts import LayerLayout
    from slm_exp.search.reduced import ReducedModels
    from slm_exp.search.task import PlanTask


def magnitudes(task: PlanTask, plan: MergePlan, models: ReducedModels) -> tuple[dict[str, Any], int]:
    """The compensation of a plan: for every cut, bottom to top, how much larger its layers would have made the stream.

    A cut is a run of removed layers, a merged group, or a layer that lost a half. Its layers and what is left of them
    both run on the states of the compressed model, compensated below; alpha is the mean over samples and channels of
    the ratio of mean absolute values over tokens.

    Returns:
        `{kind, cuts: [{start, stop, alpha}]}` over original layers [start, stop), and the block forwards it took beyond
        the dense pass: none for one run of removed layers, else at most one for each layer from the first cut up. A
        cut at the very top is left out: the final norm undoes any factor.
    """
    from slm_exp.search.reduced import slots_of

    dense, cuts, scale, forwards = models.dense_states, [], 1.0, 0
    kept = dict(zip((slot.start for slot in plan.slots), slots_of(plan, task.rule), strict=True))
    h_NTD, reached = dense[0], 0  # while `reached` equals the layer, h is the dense model's state

    def run(slot: Slot, x_NTD: Tensor) -> Tensor:
        nonlocal forwards
        forwards += 1
        return models.block(replace(slot, scale=scale), x_NTD)

    segments = _segments(plan)
    while segments and not (_is_cut(*segments[-1], plan) and segments[-1][1] < plan.n_layers):
        segments.pop()
    for start, stop in segments:
        on_dense = reached == start
        full_NTD = dense[stop] if on_dense else h_NTD
        if not on_dense:
            for i in range(start, stop):
                full_NTD = run(models.dense[i], full_NTD)
        if not _is_cut(start, stop, plan):
            h_NTD, reached = full_NTD, stop if on_dense else reached
        else:
            h_NTD = run(kept[start], h_NTD) if start in kept else h_NTD
            cuts.append({"start": start, "stop": stop, "alpha": ratio(full_NTD, h_NTD)})
            scale /= cuts[-1]["alpha"]
    return {"kind": "magnitude", "cuts": cuts}, forwards


def ratio(full_NTD: Tensor, short_NTD: Tensor) -> float:
    """Mean over samples and channels of mean|full| / mean|short| over tokens; channels at zero are left out."""
    full_ND, short_ND = (h.abs().mean(1, dtype=_wide(h)).double() for h in (full_NTD, short_NTD.to(full_NTD.device)))
    there = (short_ND > 0) & (full_ND > 0)
    return float((full_ND[there] / short_ND[there]).mean()) if there.any() else 1.0


def scales(plan: MergePlan) -> tuple[float, ...]:
    """For every slot of a plan, what its layer's outputs are multiplied by."""
    cuts = (plan.compensation or {}).get("cuts", ())
    out = []
    for slot in plan.slots:
        scale = 1.0
        for cut in cuts:
            if cut["stop"] <= slot.start:
                scale /= cut["alpha"]
        out.append(scale)
    return tuple(out)


def scaled_outputs(layout: LayerLayout, layer: nn.Module, weights: Mapping[str, Tensor], scale: float
                   ) -> dict[str, Tensor]:
    """The parameters through which a layer adds to the stream, multiplied; new tensors of the same dtype.

    Args:
        weights: parameters that replace the layer's own.
    """
    own = dict(layer.named_parameters())
    names = [f"{module}.{part}" for module in (layout.o, layout.mlp_out) for part in ("weight", "bias")]
    return {name: (t.to(_wide(t)) * scale).to(t.dtype)
            for name in names if (t := weights.get(name, own.get(name))) is not None}


def _segments(plan: MergePlan) -> list[tuple[int, int]]:
    """The original layers as runs [start, stop) with one fate: each slot's, and each run of dropped layers between."""
    out, at = [], 0
    for slot in plan.slots:
        if slot.start > at:
            out.append((at, slot.start))
        out.append((slot.start, slot.stop))
        at = slot.stop
    return [*out, (at, plan.n_layers)] if at < plan.n_layers else out


def _is_cut(start: int, stop: int, plan: MergePlan) -> bool:
    return stop - start > 1 or start in plan.dropped or any(half["layer"] == start for half in plan.sublayers)


def _wide(t: Tensor) -> Any:
    import torch

    return torch.promote_types(t.dtype, torch.float32)
