"""Which layers lie beside a plan's cuts, and which dense state the residual stream after each should equal."""

from __future__ import annotations

from slm_exp.core.together import Together
from slm_exp.core.types import MergePlan
from slm_exp.models.base import ModelHandle


def slot_ends(plan: MergePlan) -> list[int]:
    """For every slot, the dense layer whose input the stream after it stands for: where the next slot starts."""
    return [*(slot.start for slot in plan.slots[1:]), plan.n_layers]


def beside_cuts(plan: MergePlan, layers: str = "cuts") -> list[int]:
    """Positions in the compressed model of the layers beside cuts; with `all` every layer from the first of them up."""
    slots = plan.slots
    partial = {sublayer.layer for sublayer in plan.sublayers}
    found = [at for at, (slot, end) in enumerate(zip(slots, slot_ends(plan), strict=True))
             if plan.width or end - slot.start > 1 or slot.start in partial or (at == 0 and slot.start > 0)]
    return [*range(found[0], len(slots))] if found and layers == "all" else found


def stream_scales(plan: MergePlan) -> list[float]:
    """For every slot, the size of the stream after it relative to the dense model's: 1 without compensation."""
    return [*plan.scales[1:], plan.scales[-1]]


def zeroed_modules(handle: ModelHandle, plan: MergePlan) -> list[str]:
    """Modules of the compressed model that are zero because the plan removed their sublayer: training would undo it."""
    at = {slot.start: i for i, slot in enumerate(plan.slots)}
    return [f"{handle.layout.layer_list}.{at[sublayer.layer]}.{module}" for sublayer in plan.sublayers
            for module in handle.layout.outputs[sublayer.kind]]


def needs_dense_stream(others: Together) -> str | None:
    """Why a recovery that compares residual streams cannot run with a config, or None."""
    if others.new_hidden_size:
        return (f"width.hidden_size = {others.new_hidden_size}; expected null with recovery={others.recovery}, which "
                "matches the dense model's residual stream: that changes its size.")
    if others.plan is not None and others.plan.width and others.plan.width.hidden:
        return (f"method.path = {others.plan_path}: its width pruning changes the hidden size; "
                f"recovery={others.recovery} matches the dense model's residual stream. Take a plan without, or "
                "another recovery.")
    return None
