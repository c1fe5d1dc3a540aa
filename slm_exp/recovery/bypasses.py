"""Maps of low rank where sublayers were removed: which ranks a budget allows, and the fit from the bottom up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from slm_exp.core.types import SUBLAYERS, Kind, MergePlan
from slm_exp.engine.progress import ticking
from slm_exp.engine.ridge import Moments, held_out, token_weights
from slm_exp.engine.runner import BlockRunner, Slot
from slm_exp.merging.maps import map_names, ranks
from slm_exp.recovery.base import RecoveryTask
from slm_exp.recovery.cuts import stream_scales

RIDGE = 0.01
"""Of the fits that ranks are decided by."""


class Gap(NamedTuple):
    """Removed sublayers next to each other, and the layer of the compressed model behind which their maps stand."""

    position: int
    halves: range
    """2 x layer, plus 1 for its MLP."""


class Bypass(NamedTuple):
    """What was put in the place of a removed sublayer, or of all of its gap."""

    position: int
    layer: int
    kind: Kind
    rank: int
    ridge: float
    errors: list[float]
    """Of the stream after it on held-out sequences, relative: without and with it."""


def gaps(plan: MergePlan) -> list[Gap]:
    """Bottom to top. What is removed below the lowest layer has none; merged layers are not removed."""
    removed = {2 * s.layer + SUBLAYERS.index(s.kind) for s in plan.sublayers}
    starts = [slot.start for slot in plan.slots]
    found = []
    for at, slot in enumerate(plan.slots):
        first = 2 * slot.stop - (2 * slot.start + 1 in removed)
        above = starts[at + 1] if at + 1 < len(starts) else plan.n_layers
        last = 2 * above + (2 * above in removed)
        if last > first:
            found.append(Gap(at, range(first, last)))
    return found


def bypasses(task: RecoveryTask, tokens_NT: np.ndarray, budget: float, ridges: Sequence[float], weighting: str
             ) -> tuple[dict[str, Tensor], list[Bypass]]:
    """New parameters of the compressed model by name, and what they are. See `recovery.bypass.Bypass`."""
    plan, found = task.plan, gaps(task.plan)
    if not found:
        return {}, []
    of = task.dense.sublayer_params
    removed = sum(of[half // 2][SUBLAYERS[half % 2]] for gap in found for half in gap.halves)
    dense = BlockRunner(task.dense, tokens_NT, torch.float32)
    rank_of = _ranks(dense, found, int(budget * removed / (2 * int(task.dense.config.hidden_size))), weighting)
    short = BlockRunner(task.handle, tokens_NT, torch.float32)
    fits, scales, held_N = _Fits(task, ridges, weighting), stream_scales(plan), held_out(len(tokens_NT))
    dense_NTD, short_NTD, reached = dense.embed(), short.embed(), 0
    with ticking("bypasses", len(found), "cut") as tick:
        for at in range(found[-1].position + 1):
            short_NTD = short.block(Slot(at), short_NTD)
            gap = next((g for g in found if g.position == at), None)
            if gap is None:
                continue
            dense_NTD = _through(dense, dense_NTD, range(reached, gap.halves.start))
            end_NTD, reached = _through(dense, dense_NTD, gap.halves), gap.halves.stop
            scale = scales[at]
            if _nearer(short_NTD, end_NTD * scale, dense_NTD * scale, weighting):
                parts = [(gap.halves[-1], sum(rank_of[half] for half in gap.halves))]  # a refit has been here
            else:
                parts = [(half, rank_of[half]) for half in gap.halves]
            for half, rank in parts:
                dense_NTD = end_NTD if half == gap.halves[-1] else _through(dense, dense_NTD, range(half, half + 1))
                short_NTD = fits.behind(at, half, rank, short_NTD, dense_NTD * scale, held_N)
            tick(f"behind layer {at}: ranks {', '.join(str(m.rank) for m in fits.maps if m.position == at) or 'none'}")
    return fits.tensors, fits.maps


class _Fits:
    """The maps so far."""

    def __init__(self, task: RecoveryTask, ridges: Sequence[float], weighting: str) -> None:
        self.task, self.ridges, self.weighting = task, ridges, weighting
        self.eps = float(task.handle.config.rms_norm_eps)
        self.tensors: dict[str, Tensor] = {}
        self.maps: list[Bypass] = []

    def behind(self, at: int, half: int, rank: int, h_NTD: Tensor, wanted_NTD: Tensor, held_N: Tensor) -> Tensor:
        """The stream with one more map behind a layer, where one helps on sequences held out."""
        rank = min(rank, h_NTD.shape[-1] // 2)  # of more, a whole matrix has fewer parameters
        if rank < 1:
            return h_NTD
        fit, held = _moments(h_NTD, wanted_NTD, self.eps, held_N, self.weighting)
        best: tuple[float, float, Tensor, Tensor] | None = None
        for ridge in self.ridges:
            change_DD = fit.solve(ridge * fit.scale)
            if change_DD is not None:
                down_DR, up_DR = reduced(fit.xx_CC, change_DD, rank)
                error = held.error(down_DR @ up_DR.T)
                if error < (held.rr if best is None else best[0]):
                    best = error, ridge, down_DR, up_DR
        if best is None:
            return h_NTD
        error, ridge, down_DR, up_DR = best
        before = len(ranks(self.task.handle.config)[at])
        number = before + sum(m.position == at for m in self.maps)
        names = map_names(self.task.handle.layout.layer_list, at, number, rank)
        self.tensors |= dict(zip(names, (down_DR.T.float().contiguous(), up_DR.float().contiguous()), strict=True))
        self.maps.append(Bypass(at, half // 2, SUBLAYERS[half % 2], rank, ridge, [held.rr / held.tt, error / held.tt]))
        down_DR, up_DR = down_DR.float(), up_DR.float()
        return torch.cat([h + normed(h, self.eps) @ down_DR @ up_DR.T for h in h_NTD.split(8)])


def reduced(xx_CC: Tensor, change_CD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(down [C, R], up [D, R]): the map of that rank nearest to a map, over the inputs whose moments are given."""
    basis_DR = torch.linalg.eigh(change_CD.T @ xx_CC @ change_CD)[1][:, -rank:]
    return change_CD @ basis_DR, basis_DR


def normed(h_NTD: Tensor, eps: float) -> Tensor:
    """As `StreamMap` norms the stream."""
    return h_NTD * torch.rsqrt(h_NTD.square().mean(-1, keepdim=True) + eps)


def _moments(h_NTD: Tensor, wanted_NTD: Tensor, eps: float, held_N: Tensor, weighting: str) -> tuple[Moments, Moments]:
    """(fitted on, held out): the normed stream against what it lacks."""
    d = h_NTD.shape[-1]
    fit, held = (Moments.empty(d, d, h_NTD.device) for _ in "12")
    weight_NT = token_weights(wanted_NTD, weighting)
    for n, (h_TD, wanted_TD, weight_T) in enumerate(zip(h_NTD, wanted_NTD, weight_NT, strict=True)):
        sums = held if held_N[n] else fit
        sums.add(normed(h_TD, eps), wanted_TD - h_TD, weight_T)
        sums.tt += float((weight_T * wanted_TD.double().square().sum(-1)).sum())
    return fit, held


def _ranks(dense: BlockRunner, found: Sequence[Gap], total: int, weighting: str) -> dict[int, int]:
    """Removed sublayer -> the rank of its map, `total` together, by what each explains on the dense stream."""
    halves = [half for gap in found for half in gap.halves]
    worth: list[tuple[float, int]] = []
    eps = float(dense.handle.config.rms_norm_eps)
    h_NTD, reached = dense.embed(), 0
    for half in halves:
        h_NTD = _through(dense, h_NTD, range(reached, half))
        after_NTD, reached = _through(dense, h_NTD, range(half, half + 1)), half + 1
        fit, _ = _moments(h_NTD, after_NTD, eps, torch.zeros(len(h_NTD), dtype=torch.bool), weighting)
        change_DD = fit.solve(RIDGE * fit.scale)
        if change_DD is not None:
            explained_D = torch.linalg.eigvalsh(change_DD.T @ fit.xx_CC @ change_DD) / fit.tt
            worth += [(float(w), half) for w in explained_D[-(h_NTD.shape[-1] // 2) :]]
        h_NTD = after_NTD
    best = sorted(worth, reverse=True)[:total]
    return {half: sum(of == half for _, of in best) for half in halves}


def _through(dense: BlockRunner, h_NTD: Tensor, halves: range) -> Tensor:
    for layer, kinds in _whole(halves):
        h_NTD = dense.block(Slot(layer, without=frozenset(SUBLAYERS) - kinds), h_NTD)
    return h_NTD


def _whole(halves: range) -> Iterator[tuple[int, frozenset[Any]]]:
    """Layers, and which of their sublayers lie in the range."""
    for layer in range(halves.start // 2, -(-halves.stop // 2)):
        kinds = frozenset(SUBLAYERS[half % 2] for half in (2 * layer, 2 * layer + 1) if half in halves)
        if kinds:
            yield layer, kinds


def _nearer(h_NTD: Tensor, one_NTD: Tensor, other_NTD: Tensor, weighting: str) -> bool:
    weight_NT = token_weights(one_NTD, weighting)
    off = [float((weight_NT * (h_NTD - to_NTD).double().square().sum(-1)).sum()) for to_NTD in (one_NTD, other_NTD)]
    return off[0] < off[1]
