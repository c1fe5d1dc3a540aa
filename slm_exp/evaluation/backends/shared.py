"""Keys and values of tokens that many sequences begin with, computed once and read by all.

Letters: B rows, H key-value heads, P shared tokens, T further tokens, E head size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

GROWTH = 64
"""Tokens of room that a growing cache makes at a time."""


class Shared(NamedTuple):
    """What a decoder keeps of shared tokens."""

    layers: list[tuple[Tensor, Tensor]]
    """Keys and values of every layer, [1, H, P, E]."""

    @classmethod
    def of(cls, cache: Cache) -> Shared:
        """What one row left in a cache. Raises RuntimeError where a layer keeps something else."""
        layers: list[Any] = cache.layers
        try:
            return cls([(layer.keys, layer.values) for layer in layers])
        except AttributeError as error:
            raise RuntimeError(f"the model's cache holds no keys and values ({error})") from error

    @classmethod
    def reading(cls, model: PreTrainedModel, ids_1P: Tensor) -> Shared:
        """What a model keeps of these tokens. Cost: one pass over them without logits."""
        cache = growing()
        model.base_model(input_ids=ids_1P, past_key_values=cache, use_cache=True)
        return cls.of(cache)

    def for_rows(self, rows: int) -> Cache:
        """A cache of so many rows that begin with these tokens, to go on in."""
        cache = growing()
        for i, (keys, values) in enumerate(self.layers):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), i)
        return cache

    def before(self) -> DynamicCache:
        """A cache that stands before the tokens of any number of rows and keeps none of them."""
        return _Before(self.layers)


class _Before(DynamicCache):
    def __init__(self, shared: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.shared = shared

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
               ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """[B, H, T, E] -> [B, H, P + T, E]."""
        keys, values = ((s.expand(len(x), -1, -1, -1), x)
                        for s, x in zip(self.shared[layer_idx], (key_states, value_states), strict=True))  # fmt: skip
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.shared[layer_idx][0].shape[2]


def growing() -> Cache:
    """An empty cache that makes room ahead: one more token is written in place, where transformers' copies all."""
    return Cache(layer_class_to_replicate=_Growing)


class _Growing(DynamicLayer):
    room: list[Tensor] | None = None
    """What `keys` and `values` are the beginning of; null where they were replaced."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """[B, H, T, E] -> all so far."""
        before = self.get_seq_length()
        after = before + key_states.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.room is None or self.room[0].shape[2] < after:
            self.room = [x.new_empty(*x.shape[:2], after + GROWTH, x.shape[3]) for x in (key_states, value_states)]
            for new, old in zip(self.room, (self.keys, self.values), strict=True):
                if before and old is not None:
                    new[:, :, :before] = old
        for new, states in zip(self.room, (key_states, value_states), strict=True):
            new[:, :, before:after] = states
        self.keys, self.values = (x[:, :, :after] for x in self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.room = None


def window_of(model: PreTrainedModel) -> int | None:
    """Tokens of the local attention window, where any layer has one."""
    config = model.config
    kinds = getattr(config, "layer_types", None)
    window: int | None = getattr(config, "sliding_window", None)
    return window if kinds is None or "sliding_attention" in kinds else None
