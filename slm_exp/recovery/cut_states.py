"""What the maps behind a cut are fitted on: the dense streams around it, walked once from the bottom up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from slm_exp.core.types import Group
from slm_exp.engine.ridge import held_out
from slm_exp.engine.runner import BlockRunner, Slot
from slm_exp.models.base import ModelHandle
from slm_exp.recovery.base import RecoveryTask
from slm_exp.recovery.cuts import beside_cuts, slot_ends, stream_scales

SINGULAR = 1e-10
"""Of the mean diagonal, added to it: inputs that depend on each other have a solution too."""


class CutStates(NamedTuple):
    """A cut, and rows of tokens that are not held out, float64: M tokens, D hidden size."""

    position: int
    """Of the layer beside it in the compressed model."""
    slot: Group
    """The dense layers that this one stands for."""
    module: str
    """Of the layer: what writes `added_MD`."""
    after_MD: Tensor
    """The stream after the layer, given the dense stream before it."""
    added_MD: Tensor
    """What the module adds to it."""
    wanted_MD: Tensor
    """The dense stream after the cut."""

    def errors(self, map_DD: Tensor) -> list[float]:
        """Of the stream, relative to the dense one's: without and with a map of what is added."""
        return self._errors(self.after_MD - self.added_MD + self.added_MD @ map_DD)

    def stream_errors(self, map_DD: Tensor) -> list[float]:
        """Likewise, with a map of the stream itself."""
        return self._errors(self.after_MD @ map_DD)

    def _errors(self, with_map_MD: Tensor) -> list[float]:
        scale = self.wanted_MD.square().sum()
        return [float((self.wanted_MD - h_MD).square().sum() / scale) for h_MD in (self.after_MD, with_map_MD)]


def states_at_cuts(task: RecoveryTask, tokens_NT: np.ndarray) -> Iterator[CutStates]:
    """Every cut of a plan, lowest first. Cost: one dense forward pass, and one of every layer beside a cut."""
    plan, layout = task.plan, task.handle.layout
    tokens_NT = tokens_NT[~held_out(len(tokens_NT)).numpy()]
    dense = BlockRunner(task.dense, tokens_NT, torch.float32)
    short = BlockRunner(task.handle, tokens_NT, torch.float32, fuse=False)  # the library's layers have hooks
    factor, scales, ends = layout.residual_factor(task.handle.config), stream_scales(plan), slot_ends(plan)
    waiting: list[tuple[int, str, Tensor, Tensor]] = []
    beside = beside_cuts(plan)
    h_NTD = dense.embed()
    for layer in range(plan.n_layers + 1):
        for at, module, after, added in [w for w in waiting if ends[w[0]] == layer]:
            yield CutStates(at, plan.slots[at], module, after, added, scales[at] * h_NTD.double().flatten(0, 1))
        waiting = [w for w in waiting if ends[w[0]] != layer]
        for at in beside:
            if layer == (plan.slots[at].start if at else 0):  # the lowest stands for what is removed below it
                removed = {s.kind for s in plan.sublayers if s.layer == plan.slots[at].start}
                left = [m for kind in ("mlp", "attention") if kind not in removed for m in layout.fitted[kind]]
                if left:  # experts alone cannot be mapped
                    waiting.append((at, left[0], *_around(short, at, left[0], h_NTD, factor)))
        if layer < plan.n_layers:
            h_NTD = dense.block(Slot(layer), h_NTD)


def _around(runner: BlockRunner, at: int, module: str, h_NTD: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """(stream after the layer, what the module adds to it), both [M, D] float64."""
    linear: Any = runner.handle.layers[at].get_submodule(module)
    added: list[Tensor] = []
    with linear.register_forward_hook(lambda m, args, out: added.append(out.reshape(-1, out.shape[-1]))):
        after_NTD = runner.block(Slot(at), h_NTD)
    return after_NTD.double().flatten(0, 1), torch.cat(added).double() * factor


def solved(x_MC: Tensor, y_MD: Tensor, alpha: float) -> Tensor:
    """The map [C, D] of x to y by least squares, with a ridge of alpha x the mean diagonal of x'x."""
    gram_CC = x_MC.T @ x_MC
    gram_CC.diagonal().add_((alpha + SINGULAR) * gram_CC.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny))
    return torch.linalg.solve(gram_CC, x_MC.T @ y_MD)


def mapped(handle: ModelHandle, cut: CutStates, map_DD: Tensor) -> dict[str, Tensor]:
    """The compressed model's parameters, by name, that write what is added through a map."""
    linear: Any = handle.layers[cut.position].get_submodule(cut.module)
    weight = linear.weight.double()
    new = {"weight": weight @ map_DD if handle.layout.transposed else map_DD.T @ weight}
    if linear.bias is not None:
        new["bias"] = linear.bias.double() @ map_DD
    name = f"{handle.layout.layer_list}.{cut.position}.{cut.module}"
    return {f"{name}.{part}": t.float() for part, t in new.items()}
