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


def feature_loss(task: RecoveryTask, model: nn.Module, batch: dict[str, Tensor], window: int, layers: str = "cuts",
                 overlap: bool = False) -> Tensor:
    """Mean over blocks of |student - dense|^2 / |dense|^2 of the stream after each block of each window.

    Args:
        batch: `input_ids`, `attention_mask` and `labels`, each [B, T]; only tokens that are trained on count.
        window: layers from each layer that trains on.
        layers: which train, as in `beside_cuts`.
        overlap: windows do not end where the next one starts.
    """
    student, dense = cast(Any, model), cast(Any, task.dense.model)
    starts, last, scales = beside_cuts(task.plan, layers), slot_ends(task.plan), stream_scales(task.plan)
    windows = [range(s, min(s + window, task.handle.n_layers)) for s in starts]
    blocks = sorted({b for blocks in windows for b in blocks})
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad(), _states(task.dense.layers, [last[b] - 1 for b in blocks]) as wanted:
        dense.get_decoder()(**inputs, use_cache=False)
    counted = (batch["labels"] >= 0) & (batch["attention_mask"].cumsum(1) > 1)

    def apart(b: int, given: Tensor) -> Tensor:
        target = wanted[last[b] - 1][counted].float() * scales[b]
        return (given[counted].float() - target).square().sum() / target.square().sum().clamp(min=1e-12)

    own = task.handle.layout.layers(student)
    if overlap:
        terms = [apart(b, given) for b, given in _through_windows(student, own, inputs, windows)]
    else:
        with _states(own, blocks, detached=starts) as states:
            student.get_decoder()(**inputs, use_cache=False)
        terms = [apart(b, states[b]) for b in blocks]
    return torch.stack(terms).mean()


def _through_windows(student: Any, layers: nn.ModuleList, inputs: Mapping[str, Tensor], windows: Sequence[range]
                     ) -> Iterator[tuple[int, Tensor]]:
    """Every window run by itself, with a gradient, from the state that enters it in the student as it is, which carries
    none: (block, the state after it)."""
    entered: dict[int, tuple[Any, Any]] = {}

    def keep(i: int, module: Any, args: Any, kwargs: Any) -> None:
        entered[i] = args, kwargs

    with ExitStack() as hooks, torch.no_grad():
        for i, layer in enumerate(layers):
            hooks.enter_context(layer.register_forward_pre_hook(partial(keep, i), with_kwargs=True))
        student.get_decoder()(**inputs, use_cache=False)
    for blocks in windows:
        h: Tensor | None = None
        for b in blocks:
            args, kwargs = entered[b]
            if h is not None:
                args, kwargs = ((h, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": h})
            out = layers[b](*args, **kwargs)
            h = out[0] if isinstance(out, tuple) else out
            yield b, cast(Tensor, h)


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
