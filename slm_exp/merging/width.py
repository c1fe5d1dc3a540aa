"""Carrying out a width decision: the narrower model's config and digest; its weights, on first use, by build.py."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from slm_exp.core.errors import PlanError
from slm_exp.core.files import digest
from slm_exp.core.widths import NMask, WidthDecision, WidthSizes, unpack_floats, unpack_indices
from slm_exp.merging.sizes import Shape, full_shape, head_dim, legal
from slm_exp.models.base import ModelHandle
from slm_exp.models.layerwise import own_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

EFFECT = ("sizes", "kept", "means", "hidden", "mask")
"""The entries that decide the model; the others say how they were found."""


def apply_width(handle: ModelHandle, width: WidthDecision) -> ModelHandle:
    """The narrower model that a decision makes of `handle`'s, built on first use of `.model`.

    Needs what is stored in `width` and nothing else: no tokens, no scores. Embeddings, norms and projections of
    layers that lose nothing are the same tensors, the rest are new; the input model stays as it is.
    Raises PlanError: the decision is for a model of other sizes.
    Cost: the memory of the narrowed projections.
    """
    check_width(handle, width)
    about = width.to_json()
    return ModelHandle(
        handle.name, handle.config if width.mask else narrower_config(
            handle.config, handle.layout.family, width.sizes, width.means is not None),
        handle.layout, device=handle.device,
        digest=narrowed_digest(handle.digest, width),
        load_model=lambda: _build(handle, width), load_tokenizer=lambda: handle.tokenizer, note=handle.note,
        random=handle.random,
        licences=handle.licences, origin=handle.origin,
        lineage={"base": handle.name, "base_digest": handle.digest, **handle.lineage,
                 "width": {k: about.get(k) for k in ("method", "ratio", "reached", "uniform", "sizes")}})


def narrowed_digest(model: str, width: WidthDecision) -> str:
    """The digest of the narrower model, from the wider one's."""
    about = width.to_json()
    return digest({"model": model, "width": {name: about[name] for name in EFFECT if about.get(name)}})


def check_width(handle: ModelHandle, width: WidthDecision) -> None:
    """Raise PlanError where a decision is for a model of other sizes."""
    full, per, sizes, kept = full_shape(handle.config), head_dim(handle.config), width.sizes, width.kept
    if len(sizes.heads) != handle.n_layers:
        raise PlanError(f"the plan's width is for {len(sizes.heads)} layers; {handle.name} has {handle.n_layers}.")
    if width.mask:
        _check_mask(handle, width.mask)
        return
    if getattr(handle.config, "layer_widths", None):
        raise PlanError(f"{handle.name} has layers of different widths already; they cannot be narrowed again.")
    group = full.heads // full.kv_heads
    for i in range(handle.n_layers):
        query, kv, channels = kept.query_heads[i], kept.kv_heads[i], width.channels(i)
        for what, found, n in (("query heads", query, full.heads), ("key-value heads", kv, full.kv_heads),
                               ("MLP channels", channels, full.channels)):
            if found[-1] >= n:
                raise PlanError(f"the plan's width keeps {len(found)} {what} of layer {i}, the highest {found[-1]}; "
                                f"expected {len(found)} of {handle.name}'s {n}.")
        if [h // group for h in query] != [k for k in kv for _ in range(len(query) // len(kv))]:
            raise PlanError(f"the plan's width keeps query heads {query} and key-value heads {kv} of layer {i}; "
                            f"expected as many of each key-value head, which {group} share in {handle.name}.")
        if width.means is None:
            continue
        for kind, n in (("attention", (full.heads - len(query)) * per), ("mlp", full.channels - len(channels))):
            if (size := len(unpack_floats(getattr(width.means, kind)[i]))) != n:
                raise PlanError(f"width.means.{kind}[{i}] has {size} means; expected {n}, one an input that goes.")
    hidden = int(handle.config.hidden_size)
    highest = max(unpack_indices(width.hidden), default=0) if width.hidden else hidden - 1
    if highest >= hidden or (width.hidden is None and sizes.hidden != hidden):
        raise PlanError(f"the plan's width has {sizes.hidden} channels of the residual stream, the highest {highest}; "
                        f"{handle.name} has {hidden}.")


def _check_mask(handle: ModelHandle, mask: NMask) -> None:
    """Raise PlanError where masks are for projections of other sizes."""
    from slm_exp.merging.nm import inputs_of

    sizes = handle.sizes
    wide = dict(zip(inputs_of(handle.layout), (sizes.hidden, sizes.query, sizes.hidden, sizes.mlp), strict=True))
    for i, norms in enumerate(mask.norms):
        found = {name: len(unpack_floats(text, f"width.mask.norms[{i}].{name}")) for name, text in norms.items()}
        if found != wide or any(size % mask.m for size in wide.values()):
            raise PlanError(f"the plan's width.mask.norms[{i}] has inputs {found}; expected {wide}, multiples of "
                            f"mask.m = {mask.m}, as {handle.name} has.")


def narrower_config(config: PretrainedConfig, family: str, sizes: WidthSizes, biases: bool) -> PretrainedConfig:
    """A copy of a config that describes the narrower model, maybe with `biases` of attention and MLP: an ordinary one
    where all layers have one width."""
    changes: dict[str, Any] = {"head_dim": head_dim(config), "hidden_size": sizes.hidden}
    if biases:
        changes |= {"attention_bias": True, "mlp_bias": True}
    shapes = [Shape(*s) for s in zip(sizes.heads, sizes.kv_heads, sizes.channels, strict=True)]
    if len(set(shapes)) == 1 and legal(config, shapes[0], sizes.hidden):
        names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
        out = copy.deepcopy(config)
        for name, value in (changes | dict(zip(names, shapes[0], strict=True))).items():
            setattr(out, name, value)
        return out
    own: PretrainedConfig = own_config(config, family, **changes, layer_widths=[list(s) for s in shapes])
    return own


def _build(handle: ModelHandle, width: WidthDecision) -> PreTrainedModel:
    from slm_exp.merging.build import narrowed, with_masks

    if width.mask:
        return with_masks(handle, width.mask)
    config = narrower_config(handle.model.config, handle.layout.family, width.sizes, bool(width.means))
    return narrowed(handle, width, config)
