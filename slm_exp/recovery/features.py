"""How far the states of a student are from the dense model's, block by block: the loss of `feature_distill`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from slm_exp.recovery.base import RecoveryTask
from slm_exp.recovery.cuts import beside_cuts, slot_ends, stream_scales


def feature_loss(task: RecoveryTask, model: nn.Module, batch: dict[str, Tensor], window: int) -> Tensor:
    """Mean over blocks of |student - dense|^2 / |dense|^2 of the stream after each block of each window.

    Args:
        batch: `input_ids`, `attention_mask` and `labels`, each [B, T]; only tokens that are trained on count.
        window: layers from each layer beside a cut on.
    """
    student, dense = cast(Any, model), cast(Any, task.dense.model)
    starts, last, scales = beside_cuts(task.plan), slot_ends(task.plan), stream_scales(task.plan)
    blocks = sorted({b for s in starts for b in range(s, min(s + window, task.handle.n_layers))})
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad(), _states(task.dense.layers, [last[b] - 1 for b in blocks]) as wanted:
        dense.get_decoder()(**inputs, use_cache=False)
    with _states(task.handle.layout.layers(student), blocks, detached=starts) as given:
        student.get_decoder()(**inputs, use_cache=False)
    counted = (batch["labels"] >= 0) & (batch["attention_mask"].cumsum(1) > 1)
    loss = torch.zeros((), device=counted.device)
    for b in blocks:
        target = wanted[last[b] - 1][counted].float() * scales[b]
        loss = loss + (given[b][counted].float() - target).square().sum() / target.square().sum().clamp(min=1e-12)
    return loss / len(blocks)


@contextmanager
def _states(layers: nn.ModuleList, outputs: Sequence[int], detached: Sequence[int] = ()
            ) -> Iterator[Mapping[int, Tensor]]:
    """The outputs of some layers during a pass; what enters the `detached` ones carries no gradient."""
    seen: dict[int, Tensor] = {}

    def keep(i: int, module: Any, args: Any, out: Any) -> None:
        seen[i] = out[0] if isinstance(out, tuple) else out

    def cut(module: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (args[0].detach(), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach()}

    with ExitStack() as hooks:
        for i in outputs:
            hooks.enter_context(layers[i].register_forward_hook(partial(keep, i)))
        for i in detached:
            hooks.enter_context(layers[i].register_forward_pre_hook(cut, with_kwargs=True))
        yield seen
