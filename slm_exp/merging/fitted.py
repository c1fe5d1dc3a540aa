"""Layers that a merge rule fitted, as the file beside a plan."""

from __future__ import annotations

import json
from collections.abc import Mapping

from safetensors.torch import load, save
from torch import Tensor

from slm_exp.core.errors import PlanError
from slm_exp.core.types import FittedFile, Group, MergePlan
from slm_exp.models.base import ModelHandle, empty_model


def pack(layers: Mapping[Group, Mapping[str, Tensor]]) -> FittedFile:
    """The file of merged layers' parameters. Equal ones give equal bytes."""
    return FittedFile.of(save({f"{g.start}-{g.stop}.{name}": t.detach().cpu().contiguous()
                               for g, weights in sorted(layers.items()) for name, t in sorted(weights.items())}))


def unpack(file: FittedFile) -> dict[Group, dict[str, Tensor]]:
    """Merged layers' parameters by name inside the layer. Raises PlanError as `FittedFile.read`."""
    out: dict[Group, dict[str, Tensor]] = {}
    for key, tensor in load(file.read()).items():
        span, _, name = key.partition(".")
        start, _, stop = span.partition("-")
        out.setdefault(Group(int(start), int(stop)), {})[name] = tensor
    return out


def check(plan: MergePlan, handle: ModelHandle) -> None:
    """Raise PlanError where the file beside a plan is not whole, or not of this plan and model. Loads no weights."""
    assert plan.fitted is not None
    data, where = plan.fitted.read(), f"fitted.file = {plan.fitted.file}"
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        found = {key: tuple(about["shape"]) for key, about in header.items() if key != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise PlanError(f"{where}; expected a safetensors file.") from None
    layer = handle.layout.layers(empty_model(handle.config))[0]
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    if missing := [g for g in plan.groups if not any(key.startswith(f"{g.start}-{g.stop}.") for key in found)]:
        raise PlanError(f"{where} has no layer for the group [{missing[0].start}, {missing[0].stop}).")
    for key, shape in found.items():
        name = key.partition(".")[2]
        if shapes.get(name) != shape:
            raise PlanError(f"{where}: {key} is {shape}; expected {shapes.get(name, 'no such parameter')} for a layer "
                            f"of {handle.name}.")
