"""`recovery=distill`: every weight trained to give the dense model's next-token distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slm_exp.errors import require
from slm_exp.recovery.base import HealTask
from slm_exp.recovery.examples import IGNORED
from slm_exp.recovery.full import Full
from slm_exp.registry import register

if TYPE_CHECKING:
    from torch import Tensor, nn


@register("recovery", "distill")
@dataclass
class Distill(Full):
    """KL divergence of the student's distribution from the dense model's, per token, plus `ce` x the usual loss.

    Both distributions are computed in parts of the vocabulary: two full logit tensors never exist. Source: the recipe
    of arXiv:2407.14679 (Minitron), logits only. Cost: a dense forward pass more per step than `full`.
    """

    ce: float = 0.0
    """Weight of the next-token loss."""
    temperature: float = 1.0
    """Both logits are divided by it."""
    vocabulary_part: int = 8192
    """Logits of so many words at once."""

    def check(self) -> None:
        super().check()
        require(self.ce >= 0, "recovery.ce", self.ce, "a number >= 0")
        require(self.temperature > 0, "recovery.temperature", self.temperature, "a number > 0")
        require(self.vocabulary_part >= 1, "recovery.vocabulary_part", self.vocabulary_part, "a whole number >= 1")

    def loss(self, task: HealTask, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        import torch

        student: Any = model
        dense: Any = task.dense.model
        labels = batch["labels"][:, 1:]
        counted = labels != IGNORED
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            wanted_MD = dense.get_decoder()(**inputs, use_cache=False).last_hidden_state[:, :-1][counted]
        given_MD = student.get_decoder()(**inputs, use_cache=False).last_hidden_state[:, :-1][counted]
        loss: Tensor = divergence().apply(
            given_MD, student.get_output_embeddings().weight, wanted_MD, dense.get_output_embeddings().weight,
            labels[counted], self.ce, self.temperature, self.vocabulary_part,
        )
        return loss


def divergence() -> Any:
    """The autograd function of the loss; made on first use, for torch is imported late.

    `apply(student_MD, head_VD, teacher_MD, teacher_head_VD, labels_M, ce, temperature, part)` is the mean over M tokens
    of KL(teacher || student) + ce x the loss of the labels. Two passes over the vocabulary: one for the normalisers,
    one for the loss and, as they are then known, the gradients. Memory: M x part logits of each model.
    """
    import torch

    global _function
    if _function is not None:
        return _function

    class Divergence(torch.autograd.Function):
        @staticmethod
        def forward(  # type: ignore[override]
            ctx: Any, student_MD: Tensor, head_VD: Tensor, teacher_MD: Tensor, teacher_head_VD: Tensor,
            labels_M: Tensor, ce: float, temperature: float, part: int,
        ) -> Tensor:
            with torch.autocast(student_MD.device.type, enabled=False):
                h, t = student_MD.float(), teacher_MD.float()
                parts = [slice(at, at + part) for at in range(0, len(head_VD), part)]

                def logits(x: Tensor, weight: Tensor, words: slice) -> Tensor:
                    return x @ weight[words].float().T

                hot_M, cool_M, wanted_M = (h.new_full((len(h),), -torch.inf) for _ in "123")
                for words in parts:
                    own, theirs = logits(h, head_VD, words), logits(t, teacher_head_VD, words)
                    hot_M = torch.logaddexp(hot_M, (own / temperature).logsumexp(1))
                    wanted_M = torch.logaddexp(wanted_M, (theirs / temperature).logsumexp(1))
                    cool_M = torch.logaddexp(cool_M, own.logsumexp(1))
                loss = h.new_zeros(())
                grad_h, grad_head = torch.zeros_like(h), torch.zeros_like(head_VD, dtype=torch.float32)
                for words in parts:
                    own, theirs = logits(h, head_VD, words), logits(t, teacher_head_VD, words)
                    log_q = own / temperature - hot_M[:, None]
                    log_p = theirs / temperature - wanted_M[:, None]
                    loss += (log_p.exp() * (log_p - log_q)).sum()
                    slope = (log_q.exp() - log_p.exp()) / temperature
                    if ce:
                        here = (labels_M >= words.start) & (labels_M < words.start + own.shape[1])
                        rows, columns = here.nonzero()[:, 0], labels_M[here] - words.start
                        loss += ce * (cool_M[here] - own[rows, columns]).sum()
                        slope += ce * (own - cool_M[:, None]).exp()
                        slope[rows, columns] -= ce
                    grad_h += slope @ head_VD[words].float()
                    grad_head[words] = slope.T @ h
                n = max(1, len(h))
            ctx.save_for_backward((grad_h / n).to(student_MD.dtype), (grad_head / n).to(head_VD.dtype))
            return loss / n

        @staticmethod
        def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
            grad_h, grad_head = ctx.saved_tensors
            return (slopes[0] * grad_h, slopes[0] * grad_head, *[None] * 6)

    _function = Divergence
    return _function


_function: Any = None
