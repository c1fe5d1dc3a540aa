"""The losses of trainings, and their gradients, from the last states: logits exist for some tokens at a time only.

Letters: M places where a token is trained on, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slm_exp.models.layouts import layout_for

LOGITS = 1 << 24
"""Held at once: 64 MiB in float32, whatever the vocabulary and the batch."""


def next_token_loss(model: Any, batch: dict[str, Tensor], ce: float = 1.0, teacher: Any = None,
                    temperature: float = 1.0) -> Tensor:
    """Mean over the tokens to come of ce x their loss, plus KL(teacher || model) where there is a teacher.

    Args:
        teacher: a model, or what `taught` gives of one.
        batch: `input_ids`, `attention_mask` and `labels`, each [B, T]; a label below 0 is not trained on.
        temperature: both logits are divided by it for the divergence.
    """
    of_teacher = teacher if teacher is None or isinstance(teacher, tuple) else taught(teacher, batch)
    given_MD, labels_M = counted_states(model, batch)
    cap, head_VD = layout_for(model.config).cap(model.config), model.get_output_embeddings().weight
    given_MD, labels_M = given_MD.to(head_VD.device), labels_M.to(head_VD.device)  # a model may lie on several
    return head_loss(given_MD, head_VD, labels_M, ce, of_teacher, temperature, cap)


def taught(teacher: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A teacher's last states [M, D'] of a batch and its head [V, D'], for several students."""
    with torch.no_grad():
        wanted_MD, _ = counted_states(teacher, batch)
    return wanted_MD, teacher.get_output_embeddings().weight


def counted_states(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(last states [M, D], the tokens that follow [M]) of the M places where a token is trained on.

    States are multiplied by what the family multiplies its logits by.
    """
    labels = batch["labels"][:, 1:]
    counted = labels >= 0
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    last_BTD: Tensor = model.get_decoder()(**inputs, use_cache=False).last_hidden_state
    factor = layout_for(model.config).logit_factor(model.config)
    states_MD = last_BTD[:, :-1][counted.to(last_BTD.device)]
    return states_MD if factor == 1 else states_MD * factor, labels[counted]


def head_loss(given_MD: Tensor, head_VD: Tensor, labels_M: Tensor, ce: float = 1.0,
              teacher: tuple[Tensor, Tensor] | None = None, temperature: float = 1.0,
              cap: float | None = None) -> Tensor:
    """Mean over M tokens of ce x the loss of the labels, plus KL(teacher || student) where there is a teacher.

    The gradients are computed together with the loss, part by part of the tokens, so that no part is computed twice
    (in parts of the vocabulary it would be: its normaliser is known at the end only). Matrix products run in the
    dtype of autocast where that is on, sums over the vocabulary in float32.
    Args:
        teacher: last states [M, D'] and head [V, D'] of another model.
        temperature: both logits are divided by it for the divergence.
        cap: both logits are cap x tanh(what the head gives / cap).
    Memory: LOGITS logits of each model in float32, and a float32 gradient of the head where it is trained.
    """
    device = given_MD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    loss: Tensor = _HeadLoss.apply(given_MD, head_VD, labels_M, ce, *(teacher or (None, None)), temperature, dtype, cap)
    return loss


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, given_MD: Tensor, head_VD: Tensor, labels_M: Tensor, ce: float, teacher_MD: Tensor | None,
        teacher_head_VD: Tensor | None, temperature: float, dtype: torch.dtype, cap: float | None,
    ) -> Tensor:
        with torch.autocast(given_MD.device.type, enabled=False):
            h, head = given_MD.to(dtype), head_VD.to(dtype)
            others: Any = None if teacher_head_VD is None else teacher_head_VD.to(dtype)
            loss = torch.zeros((), device=h.device)
            grad_h, grad_head = torch.empty_like(h), None
            rows = max(1, LOGITS // len(head))
            for at in range(0, len(h), rows):
                x, labels = h[at : at + rows], labels_M[at : at + rows, None]
                own = (x @ head.T).float()
                bend = None if cap is None else own.div_(cap).tanh_().square().neg_().add_(1)  # slope of the cap
                if cap is not None:
                    own.mul_(cap)
                slope: Any = 0.0
                if teacher_MD is not None:
                    theirs = (teacher_MD[at : at + rows].to(dtype) @ others.T).float()
                    if cap is not None:
                        theirs = theirs.div_(cap).tanh_().mul_(cap)
                    log_q, log_p = ((z if temperature == 1 else z / temperature).log_softmax(1)
                                    for z in (own, theirs))
                    p = theirs.copy_(log_p).exp_()
                    loss += torch.dot(p.view(-1), log_p.sub_(log_q).view(-1))
                    slope = log_q.exp_().sub_(p)
                    if temperature != 1:
                        slope /= temperature
                if ce:
                    log_q = own.log_softmax(1)
                    loss -= ce * log_q.gather(1, labels).sum()
                    usual = log_q.exp_().scatter_add_(1, labels, -torch.ones_like(labels, dtype=log_q.dtype))
                    slope = usual.mul_(ce).add_(slope)
                if bend is not None:
                    slope = bend.mul_(slope)
                slope = slope.to(dtype)
                grad_h[at : at + rows] = slope @ head
                if ctx.needs_input_grad[1]:
                    part = slope.T @ x
                    grad_head = part.float() if grad_head is None else grad_head.add_(part)
            n = max(1, len(h))
        ctx.save_for_backward((grad_h / n).to(given_MD.dtype),
                              None if grad_head is None else grad_head.div_(n).to(head_VD.dtype))
        return loss / n

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        grad_h, grad_head = ctx.saved_tensors
        return (slopes[0] * grad_h, None if grad_head is None else slopes[0] * grad_head, *[None] * 7)
