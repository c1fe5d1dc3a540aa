"""The refit of `recovery=reconstruct`: ridge regression of output projections, layer by layer from the bottom up."""

from __future__ import annotations

import logging
import math
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from slm_exp.core.types import SUBLAYERS, CalibrationTokens, Group, Kind
from slm_exp.engine.progress import ticking
from slm_exp.engine.ridge import Moments, Rows, changed, held_out, moments, ridge_step, token_weights
from slm_exp.engine.runner import BlockRunner, Slot
from slm_exp.merging.sizes import full_shape
from slm_exp.recovery.base import RecoveryTask
from slm_exp.recovery.cuts import beside_cuts, slot_ends, stream_scales

log = logging.getLogger(__name__)


class Settings(Protocol):
    """As in `Reconstruct`."""

    layers: str
    attention: bool
    ridges: list[float]
    weighting: str
    passes_in: str

    @property
    def rounds(self) -> int: ...


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
        kind = _Upward if settings.layers == "sublayers" else _Refit
        return kind(settings, task, tokens, Path(where)).run()


class _Refit:
    """One pass up both models, side by side."""

    def __init__(self, settings: Settings, task: RecoveryTask, tokens: CalibrationTokens, where: Path) -> None:
        self.settings, self.task = settings, task
        self.layout = task.handle.layout
        ids_NT = tokens.tokens_NT
        self.dtype: torch.dtype = getattr(torch, settings.passes_in)
        self.dense = BlockRunner(task.dense, ids_NT, self.dtype)
        self.short = BlockRunner(task.handle, ids_NT, self.dtype)
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
        for module in [*modules * self.settings.rounds, None]:  # the last round only judges the last change
            fit, held = self._moments(position, module, weights, scale)
            if held.rr > lowest:
                weights, ridges[-1] = kept, None
                del fit, held  # before the next ones: of 11,008 inputs they take a GiB each
                fit, held = self._moments(position, module, weights, scale)
            kept, lowest = weights, held.rr
            errors.append(held.rr / held.tt)
            if module is not None:
                step = ridge_step(fit, held, self.settings.ridges)
                ridges.append(step[1] if step else None)
                del fit, held
                if step:
                    layer = self.task.handle.layers[position]
                    weights = weights | changed(self.layout, layer, module, weights, step[0])
                del step
        return weights, Refitted(position, list(slot), errors, modules * self.settings.rounds, ridges)

    def _moments(self, position: int, module: str | None, weights: dict[str, Tensor], scale: float
                 ) -> tuple[Moments, Moments | Rows]:
        return moments(self.short, Slot(position, weights), module, self.short_NTD, self.dense_NTD, self.held_N,
                       self.weight_NT, scale)


class _Upward(_Refit):
    """Sublayer by sublayer instead: each is fitted once, to the dense stream where the next one that is left begins."""

    def run(self) -> tuple[dict[str, Tensor], list[Refitted]]:
        out: dict[str, Tensor] = {}
        steps: list[Refitted] = []
        plan, left = self.task.plan, self._left()
        starts = [2 * plan.slots[at].start + (kind == "mlp") for at, kind in left] + [2 * plan.n_layers]
        merged = {at for at, slot in enumerate(plan.slots) if slot.stop - slot.start > 1}
        first = next((j for j, (at, _) in enumerate(left) if at in merged or starts[j + 1] - starts[j] > 1
                      or at in self._narrowed or (j == 0 and starts[0] > 0)), None)
        if first is None:
            return {}, []
        self._embed()
        reached = starts[first] if first else 0
        if not _in_sequence(self.dense, self.dense_NTD[self.batches[0]]):
            log.info("attention and MLP run side by side here: each layer is refitted as one (recovery.layers=all).")
            return super().run()
        for i in range(reached):  # so far the two models are the same
            self._advance(self.dense, self.dense_NTD, _half(i))
        self.short_NTD.copy_(self.dense_NTD)
        with ticking("refit", len(left) - first, "sublayer") as tick:
            for j in range(first, len(left)):
                for i in range(reached, starts[j + 1]):
                    self._advance(self.dense, self.dense_NTD, _half(i))
                reached = starts[j + 1]
                (at, kind), above = left[j], left[min(j + 1, len(left) - 1)][0]
                weights, step = self._fitted(at, kind, plan.scales[above])
                steps += [step] if step else []
                out |= {f"{self.layout.layer_list}.{at}.{name}": t for name, t in weights.items()}
                self._advance(self.plain, self.short_NTD, Slot(at, weights, without=_other(kind)))
                tick(f"layer {at}, {kind}: relative error {step.errors[0]:.4f}, {step.errors[1]:.4f}" if step else "")
        return out, steps

    @cached_property
    def plain(self) -> BlockRunner:
        """Of the compressed model; nobody looks into its layers, so that they may be fused."""
        return BlockRunner(self.task.handle, self.short.tokens_NT, self.dtype)

    def _left(self) -> list[tuple[int, Kind]]:
        """The compressed model's sublayers, bottom to top, by position."""
        gone = {(s.layer, s.kind) for s in self.task.plan.sublayers}
        return [(at, kind) for at, slot in enumerate(self.task.plan.slots) for kind in SUBLAYERS
                if (slot.start, kind) not in gone]

    @cached_property
    def _narrowed(self) -> set[int]:
        """Positions of layers that lost width."""
        width = self.task.plan.width
        if width is None:
            return set()
        full, sizes = full_shape(self.task.dense.config), width.sizes
        shapes = list(zip(sizes.heads, sizes.kv_heads, sizes.channels, strict=True))
        return {at for at, shape in enumerate(shapes) if shape != full or width.order == "before"}

    def _fitted(self, at: int, kind: Kind, scale: float) -> tuple[dict[str, Tensor], Refitted | None]:
        modules = self.layout.fitted[kind] if self.settings.attention or kind == "mlp" else ()
        if not modules:
            return {}, None
        weight_NT = token_weights(self.dense_NTD, self.settings.weighting, self.short.rows)
        fit, held = moments(self.short, Slot(at, without=_other(kind)), modules[0], self.short_NTD, self.dense_NTD,
                            self.held_N, weight_NT, scale)
        step = ridge_step(fit, held, self.settings.ridges, whole=True, own_units=True)
        errors = [held.rr / held.tt, (step[2] if step else held.rr) / held.tt]
        del fit, held
        weights = changed(self.layout, self.task.handle.layers[at], modules[0], {}, step[0]) if step else {}
        return weights, Refitted(at, list(self.task.plan.slots[at]), errors, [modules[0]], [step[1] if step else None])


def _other(kind: Kind) -> frozenset[str]:
    return frozenset(SUBLAYERS) - {kind}


def _half(i: int) -> Slot:
    """The i-th sublayer of the dense model, with its residual."""
    return Slot(i // 2, without=_other(SUBLAYERS[i % 2]))


def _in_sequence(runner: BlockRunner, h_BTD: Tensor) -> bool:
    """Whether a layer is its attention and then its MLP; side by side they are not."""
    row = h_BTD[:1]
    whole, halves = runner.block(Slot(0), row), runner.block(_half(1), runner.block(_half(0), row))
    return bool((whole - halves).norm() < (1e-3 if runner.dtype == torch.float32 else 0.05) * (whole - row).norm())


def _on_disk(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Float32 states in a file that is mapped into memory: the system keeps of them what it has room for."""
    return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=torch.float32).view(shape)
