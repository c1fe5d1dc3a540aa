"""Building the model of a plan: a shorter one of the dense model's own tensors, combined projections apart."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig, PreTrainedModel

from slm_exp.core.errors import PlanError
from slm_exp.core.types import MergePlan
from slm_exp.merging.rules.base import MergeRule
from slm_exp.merging.sharing import replace_parameter, scaled_outputs, shared_copy
from slm_exp.models.base import ModelHandle


def build(
    handle: ModelHandle, plan: MergePlan, rule: MergeRule | None, hosts: list[int], config: PretrainedConfig
) -> PreTrainedModel:
    """The model that a plan makes of `handle`'s.

    Args:
        hosts: for every layer of the result, the original layer whose module it has.
        config: of the result.
    Raises:
        PlanError: the rule puts a merged layer into another module than its `attention_from` says.
    """
    layout = handle.layout
    model = shared_copy(handle.model, config=config, layer_list=layout.layer_list, layers=hosts)
    for layer, slot, host, scale in zip(layout.layers(model), plan.slots, hosts, plan.scales, strict=True):
        if slot.stop - slot.start > 1:
            assert rule is not None
            with torch.no_grad():
                merged = rule.merge(layout, list(handle.layers[slot.start : slot.stop]))
            if slot.start + merged.host != host:
                raise PlanError(f"merge_rule={rule.name} hosts {slot} in layer {slot.start + merged.host}, not {host}.")
            for name, tensor in merged.weights.items():
                replace_parameter(layer, name, tensor)
        if scale != 1:
            for name, tensor in scaled_outputs(layout, layer, {}, scale).items():
                replace_parameter(layer, name, tensor)
        for module in (m for s in plan.sublayers if s.layer == host for m in layout.outputs[s.kind]):
            for name, p in layer.get_submodule(module).named_parameters():  # an ordinary layer that adds nothing here
                replace_parameter(layer, f"{module}.{name}", torch.zeros_like(p))
    return model
