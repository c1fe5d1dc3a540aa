"""Carrying out a plan: an ordinary, shorter Hugging Face model that shares unchanged tensors with the dense one."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from typing import TYPE_CHECKING, Any

from slm_exp.core.errors import PlanError
from slm_exp.core.files import digest
from slm_exp.merging.compensation import scaled_outputs, scales
from slm_exp.models.base import ModelHandle

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel

    from slm_exp.core.types import MergePlan
    from slm_exp.merging.rules.base import MergeRule


def apply_plan(handle: ModelHandle, plan: MergePlan, rule: MergeRule | None = None) -> ModelHandle:
    """The model that a plan makes of `handle`'s, built on first use of `.model`.

    Kept layers, embeddings and head are the dense model's own tensors, not copies; only combined projections are
    new. A removed sublayer keeps its place with its output projection at zero, so that the checkpoint is an ordinary
    one; a layer without both is gone. The dense model stays as it is. So do not train the result without cloning what
    you train.

    Args:
        handle: the dense model.
        plan: which layers are merged or removed, and how wide they become (`width`, in the order it names).
        rule: what a merged layer is made of; needed when the plan has groups.
    Raises:
        PlanError: the plan is for another number of layers or another rule, or asks for what is not done here.
    Cost: the combined projections' memory and one pass over the merged layers' weights.
    """
    if plan.n_layers != handle.n_layers:
        raise PlanError(f"the plan is for a model of {plan.n_layers} layers; {handle.name} has {handle.n_layers}.")
    if plan.groups and rule is None:
        raise PlanError(f"the plan merges {len(plan.groups)} groups, which takes a merge rule.")
    if plan.groups and rule is not None and plan.rule and plan.rule != rule.name:
        raise PlanError(f"the plan was made with merge_rule={plan.rule}, not {rule.name}.")
    if plan.width:
        from slm_exp.merging.width import apply_width

        depth = dataclasses.replace(plan, width=None)
        if plan.width.get("order") == "before":
            return apply_plan(apply_width(handle, plan.width), depth, rule)
        return apply_width(apply_plan(handle, depth, rule), plan.width)
    effect = {**plan.effect(), "rule": rule.name if plan.groups and rule is not None else None}
    unchanged = plan.n_layers_out == plan.n_layers and not plan.sublayers and "compensation" not in effect
    return ModelHandle(
        name=handle.name,
        config=_shorter_config(handle, handle.config, plan, rule),
        layout=handle.layout,
        digest=handle.digest if unchanged else digest({"model": handle.digest, "plan": effect}),
        device=handle.device,
        load_model=lambda: _build(handle, plan, rule),
        load_tokenizer=lambda: handle.tokenizer,
        note=handle.note,
        random=handle.random,
        lineage={"base": handle.name, "base_digest": handle.digest, "plan": effect},
    )


def _hosts(plan: MergePlan, rule: MergeRule | None) -> list[int]:
    """For every layer of the result, the original layer whose module and config entries it has."""
    top = rule is not None and rule.attention_from == "top"
    return [slot.stop - 1 if top else slot.start for slot in plan.slots]


def _shorter_config(
    handle: ModelHandle, config: PretrainedConfig, plan: MergePlan, rule: MergeRule | None
) -> PretrainedConfig:
    """A copy of a config in which everything that counts or lists layers speaks of the result's."""
    layout, hosts = handle.layout, _hosts(plan, rule)
    out = copy.deepcopy(config)
    for name in layout.per_layer_config:
        values = getattr(config, name, None)
        if values is not None:
            setattr(out, name, [values[i] for i in hosts])
    for name in layout.layer_bounds:
        bound = getattr(config, name, None)
        if bound is not None:
            setattr(out, name, sum(i < bound for i in hosts))
    for name in layout.layer_counts:
        setattr(out, name, len(hosts))
    return out


def _build(handle: ModelHandle, plan: MergePlan, rule: MergeRule | None) -> PreTrainedModel:
    import torch
    from transformers import PretrainedConfig

    dense, layout = handle.model, handle.layout
    layers = layout.layers(dense)
    hosts = _hosts(plan, rule)
    config = _shorter_config(handle, dense.config, plan, rule)

    # A deep copy of the modules that finds every tensor already copied, so it copies none; the layer list is made anew.
    memo: dict[int, object] = {id(t): t for t in (*dense.parameters(), *dense.buffers())}
    memo[id(layers)] = shorter = torch.nn.ModuleList()
    memo[id(dense.config)] = config
    model: PreTrainedModel = copy.deepcopy(dense, memo)
    for at, (slot, host, scale) in enumerate(zip(plan.slots, hosts, scales(plan), strict=True)):
        layer = copy.deepcopy(layers[host], memo)
        if slot.stop - slot.start > 1:
            assert rule is not None
            with torch.no_grad():
                merged = rule.merge(layout, list(layers[slot.start : slot.stop]))
            if slot.start + merged.host != host:
                raise PlanError(f"merge_rule={rule.name} hosts {slot} in layer {slot.start + merged.host}, not {host}.")
            for name, tensor in merged.weights.items():
                _put(layer, name, tensor)
        if scale != 1:
            for name, tensor in scaled_outputs(layout, layer, {}, scale).items():
                _put(layer, name, tensor)
        for half in plan.sublayers:
            if half["layer"] == host:
                _silence(layer, layout.outputs[half["kind"]])
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = at  # type: ignore[assignment]
        shorter.append(layer)
    for module in model.modules():
        if isinstance(getattr(module, "config", None), PretrainedConfig):
            module.config = config  # type: ignore[assignment]
    _renumber_device_map(model, layout.layer_list, hosts)
    return model


def _silence(layer: nn.Module, outputs: tuple[str, ...]) -> None:
    """New zeros for what writes a half of a layer into the stream: an ordinary layer whose half does nothing."""
    import torch

    for module in outputs:
        for name, p in layer.get_submodule(module).named_parameters():
            _put(layer, f"{module}.{name}", torch.zeros_like(p))


def half_sizes(handle: ModelHandle, layer: int = 0) -> dict[str, int]:
    """Parameters of a layer's attention and MLP sublayers: projections and their biases. Loads no weights."""
    from slm_exp.models.base import empty_model

    module = handle.layout.layers(handle.model if handle.loaded else empty_model(handle.config))[layer]
    return {half: sum(p.numel() for name in names for p in module.get_submodule(name).parameters())
            for half, names in handle.layout.sublayers.items()}


def zeroed(compressed: ModelHandle, plan: MergePlan) -> int:
    """Parameters that a plan's sublayers leave in the checkpoint, and in `n_params`, without effect.

    An engine that skips such sublayers could leave them out.
    """
    at = {slot.start: i for i, slot in enumerate(plan.slots)}
    return sum(half_sizes(compressed, at[half["layer"]])[half["kind"]] for half in plan.sublayers)


def zeroed_note(handle: ModelHandle, plan: MergePlan) -> tuple[str, ...]:
    """What a reader of the sizes should know of a plan for `handle`; nothing where no sublayer goes."""
    kinds = Counter(half["kind"] for half in plan.sublayers)
    if not kinds:
        return ()
    which = " and ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
    sizes = half_sizes(handle)
    size = sum(sizes[half["kind"]] for half in plan.sublayers)
    are = "sublayer is" if len(plan.sublayers) == 1 else "sublayers are"
    return (f"{which} {are} zeroed: {size / 1e6:.3g} M parameters ({size / handle.n_params:.1%}) could be left out by "
            "an engine that skips them; the checkpoint keeps them.",)


def _put(layer: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter by a tensor, on the device of the one it replaces."""
    import torch

    path, _, leaf = name.rpartition(".")
    parent = layer.get_submodule(path)
    tensor = tensor.to(getattr(parent, leaf).device)
    setattr(parent, leaf, tensor if isinstance(tensor, torch.nn.Parameter) else torch.nn.Parameter(tensor, False))


def _renumber_device_map(model: PreTrainedModel, layer_list: str, hosts: list[int]) -> None:
    """Where accelerate put each layer, under the layers' new numbers (present only with a device map)."""
    placed: dict[str, Any] | None = getattr(model, "hf_device_map", None)
    if not placed:
        return
    numbers = {f"{layer_list}.{host}": f"{layer_list}.{at}" for at, host in enumerate(hosts)}
    model.hf_device_map = {  # type: ignore[assignment]
        numbers.get(name, name): device
        for name, device in placed.items()
        if name in numbers or not name.startswith(f"{layer_list}.")
    }
