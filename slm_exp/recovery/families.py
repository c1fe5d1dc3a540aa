"""The models of a family, which share their adapters, and what a step of theirs is: the work of `recovery=family`."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slm_exp.engine.head_loss import next_token_loss, taught
from slm_exp.recovery.base import Relative
from slm_exp.recovery.lora import Lora


class Students(nn.Module):
    """Models with a LoRA each, that of a layer shared by all that have its module. The adapters alone are this module's
    own, trained and saved."""

    def __init__(self, recipe: Lora, middle: int, family: Sequence[Relative], seed: int) -> None:
        super().__init__()
        self.models: tuple[Any, ...] = tuple(recipe.student(one.task) for one in family)
        self.names: dict[str, nn.Parameter] = {}
        for model, one in zip(self.models, family, strict=True):
            for half, name in _halves(model, one):
                half.weight = self.names.setdefault(name, half.weight)
        self.own = nn.ParameterList(self.names.values())
        self.middle, self.seed = middle, seed
        self.at(0.0)
        self.config = copy.deepcopy(self.models[0].config)  # of what runs at once, for the estimate of memory
        self.config.num_hidden_layers = sum(model.config.num_hidden_layers for model in self.now)

    def at(self, done: float) -> None:
        """Sample the models of the step before which this share of them is done: always the same ones."""
        between = range(1, len(self.models) - 1)
        some = random.Random(f"{self.seed} {done:.9f}").sample(between, min(self.middle, len(between)))
        self._now = sorted({0, *some, len(self.models) - 1})

    @property
    def now(self) -> list[Any]:
        """The models that run: those of the step, or where losses are measured the largest, smallest and middle one."""
        at = self._now if self.training else sorted({0, len(self.models) // 2, len(self.models) - 1})
        return [self.models[i] for i in at]

    def train(self, mode: bool = True) -> Students:
        for model in self.models:
            model.train(mode)
        return super().train(mode)

    def set_attn_implementation(self, kind: str) -> None:
        for model in self.models:
            model.set_attn_implementation(kind)

    def gradient_checkpointing_enable(self, **how: Any) -> None:
        for model in self.models:
            model.gradient_checkpointing_enable(**how)

    def named_adapters(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.names.items()}

    def take(self, adapters: Mapping[str, Tensor]) -> None:
        """Put trained adapters in."""
        with torch.no_grad():
            for name, p in self.names.items():
                p.copy_(adapters[name])


def _halves(model: Any, one: Relative) -> Iterator[tuple[Any, str]]:
    """Both halves of every adapter of a model, linear modules, and the name of what belongs there."""
    path = f"{one.task.handle.layout.layer_list}."
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            at, _, inside = name.removeprefix(path).partition(".")
            for part in ("lora_A", "lora_B"):
                yield getattr(module, part)["default"], f"{one.hosts[int(at)]}.{inside}.{part}"


def family_loss(dense: nn.Module, ce: float, temperature: float, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean over the models that run of KL(dense || model) a token + `ce` x their loss; the dense model runs once."""
    assert isinstance(model, Students)
    teacher = taught(dense, batch)
    return torch.stack([next_token_loss(one, batch, ce, teacher, temperature) for one in model.now]).mean()
