"""`recovery=feature_distill`: the layers beside cuts trained so that a few blocks behind each give the dense states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slm_exp.core.errors import require
from slm_exp.core.registry import register
from slm_exp.recovery.base import HealTask
from slm_exp.recovery.examples import IGNORED
from slm_exp.recovery.streams import beside_cuts, ends, needs_the_dense_stream, stream_scales
from slm_exp.recovery.trained import Trained, trainable_copy, trained_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slm_exp.pipeline.config import RunConfig


@register("recovery", "feature_distill")
@dataclass
class FeatureDistill(Trained):
    """Mean over blocks of |student - dense|^2 / |dense|^2 of the stream behind each block of each window.

    A window starts at a layer beside a cut and takes in the states of the student as it is, without a gradient to what
    lies below; it ends `window` layers on, or where the next one starts. First tokens, whose states are huge, are left
    out. Source: the normalised features of arXiv:2404.11098 (LAPTOP-Diff) and the windows of arXiv:2312.07950 (CBQ).
    Cost: a dense and a student forward pass, and a backward pass through the windows alone.
    """

    batch_size: int = 8
    warmup_steps: int = 20
    window: int = 3
    """Layers of a window."""

    def check(self) -> None:
        super().check()
        require(self.window >= 1, "recovery.window", self.window, "a whole number >= 1")

    def refuses(self, cfg: RunConfig) -> str | None:
        return super().refuses(cfg) or needs_the_dense_stream(cfg)

    def student(self, task: HealTask) -> nn.Module:
        layers = task.handle.layout.layer_list
        names = [f"{layers}.{at}.{name}" for at in beside_cuts(task.plan, "cuts")
                 for name, p in task.handle.layers[at].named_parameters() if p.any()]  # a removed half stays removed
        return trainable_copy(task.handle.model, names)

    def result(self, task: HealTask, model: nn.Module) -> dict[str, Tensor]:
        return trained_tensors(task, model)

    def loss(self, task: HealTask, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        import torch

        student: Any = model
        starts = beside_cuts(task.plan, "cuts")
        blocks = sorted({b for s in starts for b in range(s, min(s + self.window, task.handle.n_layers))})
        last, scales = ends(task.plan), stream_scales(task.plan)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        dense: Any = task.dense.model
        with torch.no_grad(), _states(task.dense.layers, [last[b] - 1 for b in blocks]) as wanted:
            dense.get_decoder()(**inputs, use_cache=False)
        with _states(task.handle.layout.layers(student), blocks, detached=starts) as given:
            student.get_decoder()(**inputs, use_cache=False)
        counted = (batch["labels"] != IGNORED) & (batch["attention_mask"].cumsum(1) > 1)
        loss = torch.zeros((), device=counted.device)
        for b in blocks:
            target = wanted[last[b] - 1][counted].float() * scales[b]
            loss = loss + (given[b][counted].float() - target).square().sum() / target.square().sum().clamp(min=1e-12)
        return loss / len(blocks)


@contextmanager
def _states(layers: nn.ModuleList, outputs: list[int], detached: Any = ()) -> Iterator[Mapping[int, Tensor]]:
    """The outputs of some layers during a pass; what enters the `detached` ones carries no gradient."""
    seen: dict[int, Tensor] = {}

    def keep(i: int) -> Any:
        def hook(module: Any, args: Any, out: Any) -> None:
            seen[i] = out[0] if isinstance(out, tuple) else out

        return hook

    def cut(module: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (args[0].detach(), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach()}

    hooks = [layers[i].register_forward_hook(keep(i)) for i in outputs]
    hooks += [layers[i].register_forward_pre_hook(cut, with_kwargs=True) for i in detached]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
