"""Carrying out a plan: an ordinary, shorter Hugging Face model that shares unchanged tensors with the dense one."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING

from slm_exp.core.errors import PlanError
from slm_exp.core.files import digest
from slm_exp.core.types import MergePlan
from slm_exp.merging.rules.base import MergeRule
from slm_exp.merging.width import apply_width
from slm_exp.models.base import ModelHandle

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def apply_plan(handle: ModelHandle, plan: MergePlan, rule: MergeRule | None = None) -> ModelHandle:
    """The model that a plan makes of `handle`'s, built on first use of `.model`.

    Kept layers, embeddings and head are the dense model's own tensors, not copies; only combined projections are
    new. A removed sublayer keeps its place with its output projection at zero, so that the checkpoint is an ordinary
    one; a layer without both is gone. So do not train the result without cloning what you train.
    `rule`: what a merged layer is made of; needed when the plan has groups.
    Raises PlanError: the plan is for another number of layers or another rule, or asks for what is not done here.
    Cost: the combined projections' memory and one pass over the merged layers' weights.
    """
    if plan.n_layers != handle.n_layers:
        raise PlanError(f"the plan is for a model of {plan.n_layers} layers; {handle.name} has {handle.n_layers}.")
    if plan.groups and rule is None:
        raise PlanError(f"the plan merges {len(plan.groups)} groups, which takes a merge rule.")
    if plan.groups and rule is not None and plan.rule and plan.rule != rule.name:
        raise PlanError(f"the plan was made with merge_rule={plan.rule}, not {rule.name}.")
    if plan.groups and rule is not None and rule.fits != (plan.fitted is not None):
        raise PlanError(f"merge_rule={rule.name} {'fits' if rule.fits else 'does not fit'} merged layers, and the plan "
                        f"{'names no file with them' if rule.fits else 'names a file with some'} (`fitted`).")
    if plan.width:
        depth = dataclasses.replace(plan, width=None)
        if plan.width.order == "before":
            return apply_plan(apply_width(handle, plan.width), depth, rule)
        return apply_width(apply_plan(handle, depth, rule), plan.width)
    effect = {**plan.effect(), "rule": rule.name if plan.groups and rule is not None else None}
    unchanged = plan.n_layers_out == plan.n_layers and not plan.sublayers and "compensation" not in effect
    return ModelHandle(
        handle.name, handle.layout.config_of(handle.config, hosts(plan, rule)), handle.layout,
        digest=handle.digest if unchanged else digest({"model": handle.digest, "plan": effect}), device=handle.device,
        load_model=lambda: _built(handle, plan, rule), load_tokenizer=lambda: handle.tokenizer, note=handle.note,
        random=handle.random, licences=handle.licences, origin=handle.origin, streamed=handle.streamed,
        lineage={"base": handle.name, "base_digest": handle.digest, "plan": effect})


def hosts(plan: MergePlan, rule: MergeRule | None) -> list[int]:
    """For every layer of the result, the original layer whose module and config entries it has."""
    top = rule is not None and rule.attention_from == "top"
    return [slot.stop - 1 if top else slot.start for slot in plan.slots]


def _built(handle: ModelHandle, plan: MergePlan, rule: MergeRule | None) -> PreTrainedModel:
    from slm_exp.merging.build import build

    own = hosts(plan, rule)
    return build(handle, plan, rule, own, handle.layout.config_of(handle.model.config, own))


def zeroed(compressed: ModelHandle, plan: MergePlan) -> int:
    """Parameters that a plan's sublayers and masks leave in the checkpoint, and in `n_params`, at zero and without
    effect. An engine that skips such sublayers, or has kernels for such patterns, could leave them out."""
    at = {slot.start: i for i, slot in enumerate(plan.slots)}
    gone = sum(compressed.sublayer_params[at[s.layer]][s.kind] for s in plan.sublayers)
    if plan.width is None or plan.width.mask is None:
        return gone
    mask, products = plan.width.mask, compressed.sizes.products
    left = len(plan.slots) * sum(products.values()) - sum(products[s.kind] for s in plan.sublayers)
    return gone + left * (mask.m - mask.n) // mask.m


def flops_per_token(compressed: ModelHandle, plan: MergePlan, length: int) -> float:
    """Operations of a token in a prompt of so many, head included, for an engine that skips removed sublayers."""
    of = compressed.sizes.sublayer_flops((length + 1) / 2)
    return compressed.sizes.flops_per_token(length) - sum(of[s.kind] for s in plan.sublayers)


def zeroed_note(handle: ModelHandle, plan: MergePlan) -> tuple[str, ...]:
    """What a reader of the sizes should know of a plan for `handle`; nothing where no sublayer goes."""
    kinds = Counter(s.kind for s in plan.sublayers)
    if not kinds:
        return ()
    which = " and ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
    size = sum(handle.sublayer_params[s.layer][s.kind] for s in plan.sublayers)
    are = "sublayer is" if len(plan.sublayers) == 1 else "sublayers are"
    return (f"{which} {are} zeroed: {size / 1e6:.3g} M parameters ({size / handle.n_params:.1%}) could be left out by "
            "an engine that skips them; the checkpoint keeps them.",)
