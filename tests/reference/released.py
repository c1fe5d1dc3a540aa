"""The released search, written plainly from its description: the slow twin that the package is compared with.

Deep copy of the model for every candidate, a full forward with logits for every sample, merged layers really deleted.
`top_layer` repeats the released arithmetic step by step, rounding included. Source: SLM.py of the released code of
Ding et al. 2025, arXiv:2502.19159 (from a description of its loop, not from its text).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch

MATRICES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


@dataclass
class Released:
    """What the plain search did."""

    groups: list[tuple[int, int]] = field(default_factory=list)
    """Merged layers, half-open, in original indices, highest first."""
    scores: list[tuple[int, int, float]] = field(default_factory=list)
    """(low, high, score) of every evaluation, in order."""
    layers_run: int = 0
    """Decoder layers executed over the whole calibration set."""
    model: Any = None
    """The merged model."""


def search(model: Any, tokens_NT: Any, threshold: float, rule: str = "top_layer") -> Released:
    """Slide a window from the layer below the top to the bottom; merge while the last hidden state stays alike."""
    tokens_NT = torch.as_tensor(tokens_NT).long()
    out = Released()
    dense = [_last_state(model, row) for row in tokens_NT]
    out.layers_run += len(model.model.layers)

    def score(trial: Any, low: int, high: int) -> float:
        states = [_last_state(trial, row) for row in tokens_NT]
        cosines = [torch.cosine_similarity(a, b, dim=0) for a, b in zip(dense, states, strict=True)]
        out.layers_run += len(trial.model.layers)
        out.scores.append((low, high, float(sum(cosines) / len(cosines))))
        return out.scores[-1][2]

    current = copy.deepcopy(model)
    high, low = len(model.model.layers) - 2, len(model.model.layers) - 3
    while low >= 0:
        if score(merge(current, low, high, rule), low, high) > threshold:
            low -= 1
        elif low + 1 != high:
            current = merge(current, low + 1, high, rule)
            out.groups.append((low + 1, high + 1))
            high = low
        else:
            high, low = high - 1, low - 1
    out.model = current
    return out


@torch.no_grad()
def merge(model: Any, low: int, high: int, rule: str) -> Any:
    """A copy of the model in which layer `low` stands for low..high."""
    trial = copy.deepcopy(model)
    layers = trial.model.layers
    for name in MATRICES:
        target = layers[low].get_submodule(name).weight
        window = [model.model.layers[k].get_submodule(name).weight for k in range(low, high + 1)]
        if rule == "top_layer":  # the released loop: meant as a sum of differences, overwrites instead
            for weight in window:
                target += weight - target
        elif rule == "sum_of_deltas":
            target += sum(weight - window[0] for weight in window)
        elif rule == "mean":
            target.copy_(sum(window) / len(window))
        elif rule in ("keep_low", "keep_top"):
            target.copy_(window[0] if rule == "keep_low" else window[-1])
        else:
            raise ValueError(rule)
    host = low
    if rule == "keep_top":
        layers[low].load_state_dict(model.model.layers[high].state_dict())
    if rule in ("keep_top", "top_layer"):
        host = high
    if hasattr(layers[low].self_attn, "sliding_window"):
        layers[low].self_attn.sliding_window = layers[host].self_attn.sliding_window
    del layers[low + 1 : high + 1]
    types = getattr(trial.config, "layer_types", None)
    if types is not None:
        types = list(types)
        trial.config.layer_types = [*types[:low], types[host], *types[high + 1 :]]
    trial.config.num_hidden_layers = len(layers)
    return trial


@torch.no_grad()
def _last_state(model: Any, row_T: torch.Tensor) -> torch.Tensor:
    """The last hidden state (after the final norm) of one sample, flattened."""
    return model(row_T[None], use_cache=False, output_hidden_states=True).hidden_states[-1].flatten()
