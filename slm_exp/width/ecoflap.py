"""ECoFLaP's zeroth-order importance of layers: how much the loss moves when a layer's weights are shaken."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from slm_exp.core.types import CalibrationTokens
from slm_exp.engine.progress import ticking
from slm_exp.engine.runner import BlockRunner, Slot
from slm_exp.models.base import ModelHandle

EPSILON = 1e-3


def layer_importance(handle: ModelHandle, tokens: CalibrationTokens, n_samples: int, seed: int) -> list[float]:
    """Per layer, the sum over its projections m and samples of |L(m + eps z) - L(m - eps z)| / (2 eps), z ~ N(0, 1).

    L is the mean next-token loss of one sample. One noise for each matrix, none stored; no gradients. Source:
    ECoFLaP, arXiv:2310.02998.

    Cost: for each projection of each layer two passes through that layer and those above it, over `n_samples`.
    """
    ids_NT = torch.as_tensor(tokens.tokens_NT[:n_samples]).long()
    runner = BlockRunner(handle, ids_NT)
    head = handle.model.get_output_embeddings()
    n_layers = handle.n_layers

    def losses_N(h_NTD: torch.Tensor, above: int) -> torch.Tensor:
        for i in range(above, n_layers):
            h_NTD = runner.block(Slot(i), h_NTD)
        out = []
        for h_TD, ids_T in zip(runner.finish(h_NTD), ids_NT, strict=True):
            logits_TV = handle.layout.logits(handle.config, head(h_TD[:-1])).float()  # type: ignore[operator]
            out.append(cross_entropy(logits_TV, ids_T[1:].to(logits_TV.device)).double())
        return torch.stack(out)

    importance = []
    with torch.inference_mode(), ticking("importance of layers", n_layers, "layer") as tick:
        h_NTD = runner.embed()
        for i, layer in enumerate(handle.layers):
            total = 0.0
            for m, name in enumerate(f"{p}.weight" for p in handle.layout.projections):
                weight = layer.get_parameter(name)
                generator = torch.Generator().manual_seed(seed * 1_000_003 + i * 101 + m)
                z = torch.randn(weight.shape, generator=generator).to(weight.device, weight.dtype)
                sides = [losses_N(runner.block(Slot(i, {name: weight + sign * EPSILON * z}), h_NTD), i + 1)
                         for sign in (1, -1)]
                total += float((sides[0] - sides[1]).abs().sum()) / (2 * EPSILON)
            importance.append(total)
            tick(f"{total:.3g} of layer {i}")
            h_NTD = runner.block(Slot(i), h_NTD)
    return importance
