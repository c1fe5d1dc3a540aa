"""N:M masks: of every M inputs of an output, the N weights of largest |w| x norm of the input stay."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slm_exp.core.widths import NMask, unpack_floats
from slm_exp.models.layout import LayerLayout


def inputs_of(layout: LayerLayout) -> dict[str, tuple[str, ...]]:
    """The projections of a layer by whose input they share: the first of each stands for it."""
    first = (layout.qkv,) if layout.qkv else (layout.q, layout.k, layout.v)
    return {first[0]: first, layout.o: (layout.o,), layout.mlp_in[0]: layout.mlp_in, layout.mlp_out: (layout.mlp_out,)}


def mask_of(weight_OC: Tensor, norm_C: Tensor, n: int, m: int) -> Tensor:
    """Which weights stay, [outputs, inputs]; the first of equal scores. Scores are float64. `norm_C`: of the inputs."""
    scores = (weight_OC.double().abs() * norm_C.to(weight_OC.device).double()).view(len(weight_OC), -1, m)
    best = scores.argsort(dim=-1, descending=True, stable=True)[..., :n]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True).view(weight_OC.shape)


def masked(layout: LayerLayout, layer: nn.Module, mask: NMask, at: int) -> dict[str, Tensor]:
    """A layer's masked projections by name; new tensors. `at`: the layer's number."""
    out = {}
    for first, names in inputs_of(layout).items():
        norm_C = torch.tensor(unpack_floats(mask.norms[at][first], f"width.mask.norms[{at}].{first}"))
        for name in names:
            weight = layer.get_parameter(f"{name}.weight").detach()
            out[f"{name}.weight"] = weight * mask_of(weight, norm_C, mask.n, mask.m).to(weight.dtype)
    return out
