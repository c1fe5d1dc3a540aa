"""Linear modules that train under a mask: pruned weights take no part, or one that shrinks while they train."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class MaskedLinear(nn.Linear):
    """A linear module whose pruned weights count `share` times while it trains, and not at all when it is measured.

    With a share of 0 they get no gradient; with one that falls to 0 their gradients do.
    """

    mask: Tensor
    share: float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        share = self.share if self.training else 0.0
        return linear(x, self.weight * (self.mask + share * (1 - self.mask) if share else self.mask), self.bias)


def hold(model: nn.Module, modules: Iterable[str]) -> None:
    """Have these linear modules of a model (a copy of its own) keep their zeros; their parameters stay as they are."""
    for name in modules:
        module = model.get_submodule(name)
        assert type(module) is nn.Linear, f"{name} is a {type(module).__name__}"
        module.__class__ = MaskedLinear
        module.register_buffer("mask", (module.weight != 0).to(module.weight.dtype), persistent=False)


def zeroed_again(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Trained tensors by name, with zeros wherever a mask has them."""
    masks = {f"{name}.weight": m.mask for name, m in model.named_modules() if isinstance(m, MaskedLinear)}
    return {name: torch.where(masks[name].bool(), t, torch.zeros_like(t)) if name in masks else t
            for name, t in tensors.items()}
