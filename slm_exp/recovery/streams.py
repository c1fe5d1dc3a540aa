"""Which layers lie beside a plan's cuts, and which state of the dense model the stream behind each should be."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slm_exp.core.types import MergePlan
    from slm_exp.models.base import ModelHandle
    from slm_exp.pipeline.config import RunConfig


def ends(plan: MergePlan) -> list[int]:
    """For every slot, the dense layer whose input the stream behind it stands for: where the next slot starts."""
    return [*(slot.start for slot in plan.slots[1:]), plan.n_layers]


def beside_cuts(plan: MergePlan, layers: str) -> list[int]:
    """Positions in the compressed model of the layers to refit."""
    slots = plan.slots
    halved = {half.layer for half in plan.sublayers}
    found = [at for at, (slot, end) in enumerate(zip(slots, ends(plan), strict=True))
             if plan.width or end - slot.start > 1 or slot.start in halved or (at == 0 and slot.start > 0)]
    return [*range(found[0], len(slots))] if found and layers == "all" else found


def stream_scales(plan: MergePlan) -> list[float]:
    """For every slot, how large the stream behind it is against the dense model's: 1 without compensation."""
    return [*plan.scales[1:], plan.scales[-1]]


def silenced(handle: ModelHandle, plan: MergePlan) -> list[str]:
    """Modules of the compressed model that are zero because the plan removed their half: to train them undoes it."""
    at = {slot.start: i for i, slot in enumerate(plan.slots)}
    return [f"{handle.layout.layer_list}.{at[half.layer]}.{module}" for half in plan.sublayers
            for module in handle.layout.outputs[half.kind]]


def needs_the_dense_stream(cfg: RunConfig) -> str | None:
    """Why a recovery that compares streams cannot run with a config, or None."""
    if size := getattr(cfg.width, "hidden_size", None):
        return (f"width.hidden_size = {size}; expected null with recovery={cfg.recovery.name}, which matches the dense "
                "model's stream: that changes its size.")
    given = getattr(cfg.method, "given", None)  # the plan that from_plan replays
    if given is not None and (given.width or {}).get("hidden"):
        return (f"method.path = {cfg.method.path}: its width pruning changes the hidden size; "  # type: ignore[attr-defined]
                f"recovery={cfg.recovery.name} matches the dense model's stream. Take a plan without, or another "
                "recovery.")
    return None
