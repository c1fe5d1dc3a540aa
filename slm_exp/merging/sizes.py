"""How wide layers become: parameters per unit, sizes that are legal, and which units stay for a size.

Letters: H query heads, K key-value heads, F MLP channels, L layers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from slm_exp.models.base import ModelHandle, count_params, empty_model

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

CHANNELS = 8
"""MLP widths are multiples of this."""
HEAD_UNITS = ("kv_groups", "within_groups")


class Shape(NamedTuple):
    """Widths of one layer."""

    heads: int
    kv_heads: int
    channels: int


class LayerScores(NamedTuple):
    """Scores of one layer's units, float64 on the CPU; the lowest go first."""

    query_H: Tensor
    kv_K: Tensor
    """Zero where a method looks at query heads only: see `query_scores`."""
    channel_F: Tensor

    def group_K(self) -> Tensor:
        """A key-value head with its query heads: the sum of their scores."""
        return self.kv_K + self.query_H.view(len(self.kv_K), -1).sum(1)


class Kept(NamedTuple):
    """Units of one layer that stay, ascending."""

    query: list[int]
    kv: list[int]
    channels: list[int]


@dataclass(frozen=True)
class Costs:
    """Parameters of one layer's units: weights and biases of every row and column that goes with a unit."""

    query: int
    """A query head: its rows of q and columns of o."""
    kv: int
    """A key-value head: its rows of k and v."""
    channel: int
    fixed: int
    """Norms and what else no unit owns."""

    def attention(self, heads: int, kv_heads: int) -> int:
        return heads * self.query + kv_heads * self.kv

    def size(self, shape: Shape) -> int:
        return self.fixed + self.attention(shape.heads, shape.kv_heads) + shape.channels * self.channel


def query_scores(query_H: Tensor, channel_F: Tensor, config: PretrainedConfig) -> LayerScores:
    """Of a method that looks at query heads only."""
    return LayerScores(query_H, query_H.new_zeros(config.num_key_value_heads), channel_F)


def full_shape(config: PretrainedConfig) -> Shape:
    """The widths every layer of an unpruned config has."""
    return Shape(config.num_attention_heads, config.num_key_value_heads, config.intermediate_size)


def costs_of(handle: ModelHandle, hidden_size: int | None = None) -> Costs:
    """Parameters per unit, from shapes alone; with another hidden size where one is given."""
    config, layout, shape = copy.deepcopy(handle.config), handle.layout, full_shape(handle.config)
    if hidden_size is not None:
        config.head_dim, config.hidden_size = head_dim(config), hidden_size
    layer = layout.layers(empty_model(config))[0]
    size = {name: p.numel() for name, p in layer.named_parameters()}

    def rows(name: str, units: int) -> int:
        return (size[f"{name}.weight"] + size.get(f"{name}.bias", 0)) // units

    query = rows(layout.q, shape.heads) + size[f"{layout.o}.weight"] // shape.heads
    kv = rows(layout.k, shape.kv_heads) + rows(layout.v, shape.kv_heads)
    channel = sum(rows(name, shape.channels) for name in layout.mlp_in)
    channel += size[f"{layout.mlp_out}.weight"] // shape.channels
    owned = shape.heads * query + shape.kv_heads * kv + shape.channels * channel
    return Costs(query, kv, channel, count_params(layer) - owned)


def head_dim(config: PretrainedConfig) -> int:
    """Channels of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def legal(config: PretrainedConfig, shape: Shape, hidden_size: int | None = None) -> bool:
    """Whether the family's own config class accepts these widths (Llama's wants hidden_size % heads == 0)."""
    sizes = {"num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": head_dim(config),
             "intermediate_size": shape.channels, "hidden_size": hidden_size or config.hidden_size}
    try:
        type(config).from_dict(config.to_dict() | sizes)
    except Exception:  # huggingface_hub's StrictDataclassError, or ValueError from older checks
        return False
    return True


def attention_shapes(full: Shape, units: str) -> list[tuple[int, int]]:
    """(query heads, key-value heads) that grouped-query attention allows, fewest first. kv_groups takes whole groups
    away; within_groups the same number of query heads from every group. Where each key-value head has one query head,
    both are whole heads."""
    per = full.heads // full.kv_heads
    if units == "kv_groups" or per == 1:
        return [(per * k, k) for k in range(1, full.kv_heads + 1)]
    return [(q * full.kv_heads, full.kv_heads) for q in range(1, per + 1)]


def fit(full: Shape, costs: Costs, attention: float, layer: float, shapes: Sequence[tuple[int, int]]) -> Shape | None:
    """The widths nearest to so many parameters: heads first, for attention alone, then channels for the whole layer.

    Args:
        attention, layer: parameters to be left, of attention's projections and of the layer.
        shapes: (query heads, key-value heads) to choose from.
    Returns: None where every choice leaves no MLP channel.
    """
    beyond: Shape | None = None
    for heads, kv_heads in sorted(shapes, key=lambda s: abs(costs.attention(*s) - attention)):
        channels = (layer - costs.fixed - costs.attention(heads, kv_heads)) / costs.channel
        snapped = CHANNELS * round(channels / CHANNELS)
        if snapped < min(CHANNELS, full.channels):
            continue
        shape = Shape(heads, kv_heads, min(snapped, full.channels))
        if channels <= full.channels + CHANNELS / 2:
            return shape
        beyond = beyond or shape  # the heads alone are larger: only if nothing else is possible
    return beyond


def smallest(full: Shape, shapes: Sequence[tuple[int, int]]) -> Shape:
    """One group of heads and one block of channels."""
    return Shape(*shapes[0], min(CHANNELS, full.channels))


class Unit(NamedTuple):
    """Something that can go: a step of one layer's heads or channels."""

    value: float
    layer: int
    kind: int
    """0 attention, 1 MLP."""
    step: int
    cost: int


def allocate_by_score(scores: dict[int, LayerScores], full: Shape, costs: Costs, units: str, remove: float,
                      compare: str) -> dict[int, Shape]:
    """Widths of every layer when the units of lowest value go first, whichever layer they are in.

    One group of heads and one block of 8 channels stay in every layer, so the removed parameters come within one
    unit of `remove` where that is possible.
    Args:
        scores: by layer.
        compare: `per_parameter` (score over cost, for scores that add up), `standardised` (z-score among the units
            of one layer and kind), or `as_given`.
    """
    import torch

    shapes = attention_shapes(full, units)
    last = full.channels % CHANNELS or CHANNELS
    ladder: list[Unit] = []
    for i, layer in scores.items():
        per_group = layer.query_H.view(full.kv_heads, -1)
        if shapes[-1] == shapes[0]:
            heads, cost = torch.zeros(0), 0
        elif shapes[0][1] < full.kv_heads:
            heads, cost = layer.group_K().sort().values, costs.attention(full.heads // full.kv_heads, 1)
        else:
            heads, cost = per_group.sort(1).values.sum(0), full.kv_heads * costs.query
        heads_each = max(1, full.heads // max(1, len(heads)))
        ordered = layer.channel_F.sort().values
        blocks = [ordered[:last], *ordered[last:].split(CHANNELS)]
        channels = torch.stack([b.mean() for b in blocks])
        widths = [len(b) * costs.channel for b in blocks]
        if compare == "per_parameter":
            heads, channels = heads / max(cost, 1), channels / costs.channel
        else:
            heads = heads / heads_each
        if compare == "standardised":
            heads, channels = standardised(heads), standardised(channels)
        ladder += [Unit(float(v), i, 0, n, cost) for n, v in enumerate(heads[:-1])]
        ladder += [Unit(float(v), i, 1, n, w) for n, (v, w) in enumerate(zip(channels[:-1], widths[:-1], strict=True))]
    gone = dict.fromkeys(scores, (0, 0))
    removed = 0
    for unit in sorted(ladder, key=lambda u: (u.value, u.layer, u.kind, u.step)):
        if removed + unit.cost / 2 > remove:
            continue
        removed += unit.cost
        a, m = gone[unit.layer]
        gone[unit.layer] = (a + 1, m) if unit.kind == 0 else (a, m + 1)
    return {i: Shape(*shapes[len(shapes) - 1 - a], full.channels - (0 if m == 0 else last + (m - 1) * CHANNELS))
            for i, (a, m) in gone.items()}


def standardised(x: Tensor) -> Tensor:
    """Mean 0 and spread 1; zeros where all are equal."""
    spread = x.std(correction=0) if len(x) > 1 else x.new_tensor(0.0)
    return (x - x.mean()) / spread if len(x) and spread > 0 else x * 0


def select(scores: LayerScores, shape: Shape) -> Kept:
    """The units of one layer that stay: the highest scores; the lower index where two are equal."""
    per = len(scores.query_H) // len(scores.kv_K)
    kv = top(scores.group_K(), shape.kv_heads)
    query = [g * per + j for g in kv for j in top(scores.query_H.view(-1, per)[g], shape.heads // shape.kv_heads)]
    return Kept(query, kv, top(scores.channel_F, shape.channels))


def top(values: Tensor, n: int) -> list[int]:
    """Indices of the n highest values, ascending."""
    return sorted(values.argsort(descending=True, stable=True)[:n].tolist())
