"""Values of a model's predictions over the vocabulary, in pieces: no [N, T, V] tensor ever exists whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slm_exp.engine.runner import BlockRunner
from slm_exp.models.base import ModelHandle

PIECE = 1 << 22
"""Logits held at once: 16 MiB in float32, which stays near the processor."""
WORDS = 4096


def model_loss(handle: ModelHandle, tokens_NT: Any) -> float:
    """`mean_loss` of a model on some tokens. Cost: a forward pass."""
    runner = BlockRunner(handle, tokens_NT)
    return mean_loss(runner, runner.last_state())


def mean_loss(runner: BlockRunner, last_NTD: Tensor) -> float:
    """Mean cross entropy, in nats, of every token but the first given those before it.

    Args:
        runner: of the model whose head it is; its tokens are the targets.
        last_NTD: [N, T, D] last hidden states, after the final norm.
    Cost: one pass of the head, in pieces over tokens and vocabulary; sums are float64.
    """
    with torch.inference_mode():
        x_MD = last_NTD[:, :-1].flatten(0, 1)
        targets_M = runner.tokens_NT[:, 1:].flatten()
        n_words = runner.model.get_output_embeddings().weight.shape[0]
        total = 0.0
        for x, target in zip(x_MD.split(PIECE // WORDS), targets_M.split(PIECE // WORDS), strict=True):
            sums = []
            for start in range(0, n_words, WORDS):
                z = runner.logits(x, slice(start, start + WORDS)).float()
                sums.append(z.logsumexp(-1))
                at = target.to(z.device) - start
                here = (at >= 0) & (at < z.shape[1])
                total -= float(z[here, at[here]].double().sum())
            total += float(torch.stack(sums).logsumexp(0).double().sum())
        return total / targets_M.numel()


def prediction_distance(runner: BlockRunner, dense_NTD: Tensor, last_NTD: Tensor, kind: str) -> float:
    """How far a model's next-token predictions are from the dense model's: mean over all tokens, 0 is identical.

    Args:
        dense_NTD, last_NTD: [N, T, D] last hidden states of both, after the final norm.
        kind: js, the Jensen-Shannon divergence [KL(P||M) + KL(Q||M)] / 2 with M = (P + Q) / 2, in nats (at most log 2);
            kl, KL(P||Q), P the dense model's; angular, the angle between the logits over pi, 0 to 1; or norm, their
            Euclidean distance.
    Cost: the head over the calibration set twice (the dense logits are computed again, not kept).
    """
    rows = max(1, PIECE // runner.model.get_output_embeddings().weight.shape[0])
    dense_MD, total = dense_NTD.flatten(0, 1), 0.0
    with torch.inference_mode():
        for dense, x in zip(dense_MD.split(rows), last_NTD.flatten(0, 1).split(rows), strict=True):
            p, q = runner.logits(dense).float(), runner.logits(x).float()
            total += float(DISTANCES[kind](p, q).double().sum())
    return total / len(dense_MD)


def squared_distance(dense_NTD: Tensor, last_NTD: Tensor) -> float:
    """Squared distance of last hidden states from the dense model's, relative to their square; 0 is identical."""
    with torch.inference_mode():
        apart = (last_NTD.double() - dense_NTD.double()).square().sum()
        return float(apart / dense_NTD.double().square().sum().clamp(min=1e-300))


def _js(p_MV: Tensor, q_MV: Tensor) -> Tensor:
    p_MV, q_MV = p_MV.log_softmax(-1), q_MV.log_softmax(-1)
    p, q = p_MV.exp(), q_MV.exp()
    m_MV = (p + q).mul_(0.5).clamp_(min=torch.finfo(p.dtype).tiny).log_()  # both at zero: no contribution
    return (p.mul_(p_MV.sub_(m_MV)).sum(-1) + q.mul_(q_MV.sub_(m_MV)).sum(-1)) / 2


def _kl(p_MV: Tensor, q_MV: Tensor) -> Tensor:
    p_MV, q_MV = p_MV.log_softmax(-1), q_MV.log_softmax(-1)
    return (p_MV.exp() * (p_MV - q_MV)).sum(-1)


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "js": _js, "kl": _kl, "norm": lambda p, q: (p - q).norm(dim=-1),
    "angular": lambda p, q: torch.nn.functional.cosine_similarity(p, q, -1).clamp(-1, 1).acos() / math.pi}
"""Both logits [M, V] -> [M], by name."""
