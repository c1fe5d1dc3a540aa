"""Keys and values of tokens that many sequences begin with, computed once and read by all.

Letters: B rows, G query heads for each of H key-value heads, P shared tokens, T further tokens, S those and what is
read of them, E head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import AttentionMaskInterface, eager_mask

GROWTH = 64
"""Tokens of room that a growing cache makes at a time."""
NAME = "after_shared_tokens"
"""Of the attention, among those of transformers."""
_before_all: ContextVar[list[tuple[Tensor, Tensor]]] = ContextVar(NAME)


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

    @contextmanager
    def before_all(self, model: PreTrainedModel) -> Iterator[None]:
        """Inside, every token that the model reads sees these first, whatever its cache and mask say of the others.

        They are read once for all rows: scores of B rows are one product with [H, P, E], where a cache per row would
        be copied and read B times. A model has to be told the true positions.
        """
        config = model.config
        usual = config._attn_implementation
        config._attn_implementation = NAME
        reset = _before_all.set(self.layers)
        try:
            yield
        finally:
            _before_all.reset(reset)
            config._attn_implementation = usual

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


def takes_shared(model: PreTrainedModel) -> bool:
    """Whether a model's attention can be told to look at shared tokens first."""
    return bool(model._supports_attention_backend) and window_of(model) is None


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor,
               scaling: float | None = None, softcap: float | None = None, **_: Any
               ) -> tuple[Tensor, None]:  # fmt: skip
    """Softmax over shared and own keys together: [B, H G, T, E], [B, H, S, E] twice -> [B, T, H G, E]."""
    keys_1HPE, values_1HPE = _before_all.get()[module.layer_idx]  # type: ignore[index]
    b, heads, t, e = query.shape
    h, p = keys_1HPE.shape[1:3]
    q_BHQE = (query * (e**-0.5 if scaling is None else scaling)).reshape(b, h, heads // h * t, e)
    together_HBQE = q_BHQE.transpose(0, 1).reshape(h, -1, e)
    first_BHQP = (together_HBQE @ keys_1HPE[0].mT).view(h, b, -1, p).transpose(0, 1)
    scores_BHQK = torch.cat([first_BHQP, q_BHQE @ key.mT], dim=-1)
    if softcap is not None:
        scores_BHQK = softcap * torch.tanh(scores_BHQK / softcap)
    scores_BHGTK = scores_BHQK.view(b, h, -1, t, scores_BHQK.shape[-1])
    scores_BHGTK[..., p:] += attention_mask[:, None]
    weights_BHQK = scores_BHGTK.softmax(dim=-1, dtype=torch.float32).to(query.dtype).view_as(scores_BHQK)
    first_HQP = weights_BHQK[..., :p].transpose(0, 1).reshape(h, -1, p)
    out_BHQE = (first_HQP @ values_1HPE[0]).view(h, b, -1, e).transpose(0, 1) + weights_BHQK[..., p:] @ value
    return out_BHQE.reshape(b, heads, t, e).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, eager_mask)


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
