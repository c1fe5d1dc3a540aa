"""The refit of `recovery=reconstruct`: ridge regression of output projections, layer by layer from the bottom up."""

from __future__ import annotations

import logging
import math
import tempfile
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from slm_exp.core.types import CalibrationTokens, Group
from slm_exp.engine.ridge import Moments, changed, held_out, moments, ridge_step, token_weights
from slm_exp.engine.runner import BlockRunner, Slot
from slm_exp.recovery.base import RecoveryTask
from slm_exp.recovery.cuts import beside_cuts, slot_ends, stream_scales

log = logging.getLogger(__name__)


class Settings(Protocol):
    """As in `Reconstruct`."""

    layers: str
    attention: bool
    passes: int
    ridges: list[float]
    weighting: str


class Refitted(NamedTuple):
    """What was done to one layer."""

    layer: int
    """Position in the compressed model."""
    original: list[int]
    """The dense layers [start, stop) that it stands for."""
    errors: list[float]
    """Of the stream after it on held-out sequences, relative; before each projection's refit, and at the end."""
    projections: list[str]
    ridges: list[float | None]
    """The one chosen for each; None where no change helped."""


def refit(task: RecoveryTask, tokens: CalibrationTokens, settings: Settings
          ) -> tuple[dict[str, Tensor], list[Refitted]]:
    """New tensors of the compressed model by name, and what was done layer by layer."""
    with tempfile.TemporaryDirectory(prefix="slm_exp-reconstruct-") as where:
        return _Refit(settings, task, tokens, Path(where)).run()


class _Refit:
    """One pass up both models, side by side."""

    def __init__(self, settings: Settings, task: RecoveryTask, tokens: CalibrationTokens, where: Path) -> None:
        self.settings, self.task = settings, task
        self.layout = task.handle.layout
        ids_NT = tokens.tokens_NT
        self.dense = BlockRunner(task.dense, ids_NT, torch.float32)
        self.short = BlockRunner(task.handle, ids_NT, torch.float32)
        self.batches = [slice(at, at + self.short.rows) for at in range(0, len(ids_NT), self.short.rows)]
        self.held_N = held_out(len(ids_NT))
        shape = (*ids_NT.shape, int(task.handle.config.hidden_size))
        self.dense_NTD, self.short_NTD = (_on_disk(where / name, shape) for name in ("dense", "short"))

    def run(self) -> tuple[dict[str, Tensor], list[Refitted]]:
        out: dict[str, Tensor] = {}
        steps: list[Refitted] = []
        plan = self.task.plan
        chosen, slots, scales = beside_cuts(plan, self.settings.layers), plan.slots, stream_scales(plan)
        if not chosen:
            return out, steps
        at = slots[chosen[0]].start if chosen[0] else 0
        self._embed()
        for i in range(at):  # so far the two models are the same
            self._advance(self.dense, self.dense_NTD, Slot(i))
        self.short_NTD.copy_(self.dense_NTD)
        for position in range(chosen[0], chosen[-1] + 1):
            end = slot_ends(plan)[position]
            for i in range(at, end):
                self._advance(self.dense, self.dense_NTD, Slot(i))
            at = end
            weights: dict[str, Tensor] = {}
            if position in chosen:
                weights, step = self._refit(position, slots[position], scales[position])
                steps.append(step)
                log.info("layer %d: relative error of the stream %.4f, refitted %.4f", position, step.errors[0],
                         step.errors[-1])
                out |= {f"{self.layout.layer_list}.{position}.{name}": t for name, t in weights.items()}
            if position < chosen[-1]:
                self._advance(self.short, self.short_NTD, Slot(position, weights))
        return out, steps

    def _embed(self) -> None:
        for rows in self.batches:  # a runner embeds all it has: one for each batch
            part = BlockRunner(self.task.dense, self.dense.tokens_NT[rows], self.dense.dtype, fuse=False)
            self.dense_NTD[rows] = part.embed()

    def _advance(self, runner: BlockRunner, h_NTD: Tensor, slot: Any) -> None:
        for rows in self.batches:
            h_NTD[rows] = runner.block(slot, h_NTD[rows])

    def _refit(self, position: int, slot: Group, scale: float) -> tuple[dict[str, Tensor], Refitted]:
        """One layer's new parameters by name inside it, and how the error fell."""
        removed = {s.kind for s in self.task.plan.sublayers if s.layer == slot.start}
        left = {kind: () if kind in removed else names for kind, names in self.layout.fitted.items()}
        if not self.settings.attention and left["mlp"]:
            left["attention"] = ()
        modules = [m for name in (*left["mlp"], *left["attention"]) for m in (name, self.layout.norm_behind(name)) if m]
        weights: dict[str, Tensor] = {}
        kept, lowest = weights, math.inf
        errors: list[float] = []
        ridges: list[float | None] = []
        self.weight_NT = token_weights(self.dense_NTD, self.settings.weighting, self.short.rows)
        for module in [*modules * self.settings.passes, None]:  # the last round only judges the last change
            fit, held = self._moments(position, module, weights, scale)
            if held.rr > lowest:
                weights, ridges[-1] = kept, None
                fit, held = self._moments(position, module, weights, scale)
            kept, lowest = weights, held.rr
            errors.append(held.rr / held.tt)
            if module is not None:
                step = ridge_step(fit, held, self.settings.ridges)
                ridges.append(step[1] if step else None)
                if step:
                    layer = self.task.handle.layers[position]
                    weights = weights | changed(self.layout, layer, module, weights, step[0])
        return weights, Refitted(position, list(slot), errors, modules * self.settings.passes, ridges)

    def _moments(self, position: int, module: str | None, weights: dict[str, Tensor], scale: float
                 ) -> tuple[Moments, Moments]:
        return moments(self.short, Slot(position, weights), module, self.short_NTD, self.dense_NTD, self.held_N,
                       self.weight_NT, scale)


def _on_disk(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Float32 states in a file that is mapped into memory: the system keeps of them what it has room for."""
    return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=torch.float32).view(shape)
