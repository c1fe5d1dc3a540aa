"""Ridge regression from moments: the data is seen once, in batches, and only sums over it are kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from slm_exp.engine.runner import BlockRunner, Slot
from slm_exp.models.layout import LayerLayout

HELD = 5
QUIET = 0.1
"""Channels whose gain is below this share of the median are left alone by a refit of the projection before the norm:
what they lack would take a change so large that it turned all others' direction."""
QUIETEST = 1e-3
"""Of the mean square of all inputs: an input below it is penalised as if it had so much."""
OUTLYING = 10.0
"""Times the median norm, from which on a token's state is outlying."""
TILE = 1024
"""Inputs in a tile: of more than two, normal equations are factored tile by tile in their own place, not in a copy."""


def token_weights(states_NTD: Tensor, weighting: str = "class", rows: int = 8) -> Tensor:
    """What each token's squared error counts, [N, T] float64.

    `equal`: the same. `relative`: one over the squared norm, as the next layer's norm sees it. `class`: likewise, but
    tokens of outlying norm together count as much as all others together. Most decoders have a layer that makes one
    state in a sequence, usually the first token's, a hundred times larger than the others, and later heads attend to
    it: one token in 256, which a mean over tokens forgets.
    Args:
        states_NTD: those that the errors are errors of.
        rows: sequences in float64 at once.
    """
    square_NT = torch.cat([part.double().square().sum(-1) for part in states_NTD.split(rows)]).clamp(min=1e-12)
    if weighting == "equal":
        return torch.ones_like(square_NT)
    weight_NT = 1 / square_NT
    outlying_NT = square_NT > OUTLYING**2 * square_NT.median()
    if weighting == "class" and (few := int(outlying_NT.sum())):
        weight_NT[outlying_NT] *= (square_NT.numel() - few) / few
    return weight_NT


@dataclass
class Moments:
    """Sums over tokens of weighted products of inputs x and residuals r, float64.

    C inputs, D outputs, M tokens. Memory: 8 (C^2 + C D) bytes, however many tokens.
    """

    xx_CC: Tensor
    xr_CD: Tensor
    rr: float = 0.0
    tt: float = 0.0
    """Sum of weighted squares of what x is to explain, residual or not."""

    @classmethod
    def empty(cls, inputs: int, outputs: int, device: torch.device) -> Moments:
        xx_CC = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        return cls(xx_CC, xx_CC.new_zeros(inputs, outputs))

    def add(self, x_MC: Tensor, r_MD: Tensor, weight_M: Tensor) -> None:
        """Count tokens in, each with a weight."""
        root_M1 = weight_M.double().sqrt().unsqueeze(1)
        x, r = x_MC.double() * root_M1, r_MD.double() * root_M1
        self.xx_CC.addmm_(x.T, x)
        self.xr_CD.addmm_(x.T, r)
        self.rr += float(r.square().sum())

    @property
    def scale(self) -> float:
        """What ridges are relative to: the mean weighted square of an input."""
        return float(self.xx_CC.diagonal().mean())

    def solve(self, ridge: float, own_units: bool = False) -> Tensor | None:
        """The change that minimises the error plus ridge x its squares, or those of what each input moves by it: a
        quiet input is then pulled to zero no more than a loud one. None where inputs depend on each other. Memory: the
        change, and up to 2 TILE inputs two more matrices of them."""
        own_C = self.xx_CC.diagonal() / self.scale + QUIETEST if own_units else torch.ones(())
        if len(self.xx_CC) > 2 * TILE:
            return _solved_in_place(self.xx_CC, self.xr_CD, ridge * own_C)
        damped_CC = self.xx_CC.clone()
        damped_CC.diagonal().add_(ridge * own_C)
        factor_CC, failed = torch.linalg.cholesky_ex(damped_CC)
        return None if int(failed) else torch.cholesky_solve(self.xr_CD, factor_CC)

    def error(self, change_CD: Tensor) -> float:
        """Sum of weighted squares of r - x change."""
        quadratic = (change_CD * (self.xx_CC @ change_CD)).sum()
        return self.rr + float(quadratic - 2 * (change_CD * self.xr_CD).sum())

    def join(self, others: Any) -> None:
        """Count in what other sums, or rows, have."""
        if isinstance(others, Rows):
            for rows in others.rows:
                self.add(*rows)
        else:
            self.xx_CC += others.xx_CC
            self.xr_CD += others.xr_CD
            self.rr += others.rr


def _solved_in_place(xx_CC: Tensor, xr_CD: Tensor, ridge: Tensor) -> Tensor | None:
    """The x of (xx + diag(ridge)) x = xr by Cholesky, tile by tile: the factor lies below the diagonal of xx, which is
    restored from what is above it. None where the sum is not positive definite."""
    c, diagonal_C = len(xx_CC), xx_CC.diagonal().clone()
    tiles = [slice(at, min(at + TILE, c)) for at in range(0, c, TILE)]
    out_CD, factors = xr_CD.clone(), list[Tensor]()  # of the tiles on the diagonal
    xx_CC.diagonal().add_(ridge)
    try:
        for k, own in enumerate(tiles):
            left = slice(0, own.start)
            factor, failed = torch.linalg.cholesky_ex(torch.addmm(xx_CC[own, own], xx_CC[own, left],
                                                                  xx_CC[own, left].T, alpha=-1))
            if int(failed):
                return None
            factors.append(factor)
            for below in tiles[k + 1:]:
                tile = torch.addmm(xx_CC[below, own], xx_CC[below, left], xx_CC[own, left].T, alpha=-1)
                xx_CC[below, own] = torch.linalg.solve_triangular(factor.T, tile, upper=True, left=False)
            known_BD = torch.addmm(out_CD[own], xx_CC[own, left], out_CD[left], alpha=-1)
            out_CD[own] = torch.linalg.solve_triangular(factor, known_BD, upper=False)
        for own, factor in zip(reversed(tiles), reversed(factors), strict=True):
            above = slice(own.stop, c)
            known_BD = torch.addmm(out_CD[own], xx_CC[above, own].T, out_CD[above], alpha=-1)
            out_CD[own] = torch.linalg.solve_triangular(factor.T, known_BD, upper=True)
        return out_CD
    finally:
        xx_CC.diagonal().copy_(diagonal_C)
        for k, own in enumerate(tiles):
            for below in tiles[k + 1:]:
                xx_CC[below, own] = xx_CC[own, below].T


class Rows:
    """In the place of `Moments` that only judge: the tokens themselves, where they take less room than the products of
    their inputs. Memory: theirs, in their own dtype."""

    def __init__(self) -> None:
        self.rr = self.tt = 0.0
        self.rows: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, x_MC: Tensor, r_MD: Tensor, weight_M: Tensor) -> None:
        """See `Moments.add`."""
        self.rows.append((x_MC, r_MD, weight_M))
        self.rr += float((r_MD.double() * weight_M.double().sqrt().unsqueeze(1)).square().sum())

    def error(self, change_CD: Tensor) -> float:
        """See `Moments.error`."""
        return sum(float((weight_M * (r_MD.double() - x_MC.double() @ change_CD).square().sum(1)).sum())
                   for x_MC, r_MD, weight_M in self.rows)


class GainMoments(Moments):
    """Likewise of a norm's gain: channel d of the output is channel d of the normed input times gain d, so that only
    the products channel by channel are kept, [D] each, under the same names."""

    @classmethod
    def of(cls, channels: int, device: torch.device) -> GainMoments:
        zeros_D = torch.zeros(channels, dtype=torch.float64, device=device)
        return cls(zeros_D, zeros_D.clone())

    def add(self, x_MC: Tensor, r_MD: Tensor, weight_M: Tensor) -> None:
        x, r, weight_M1 = x_MC.double(), r_MD.double(), weight_M.double().unsqueeze(1)
        self.xx_CC += (weight_M1 * x.square()).sum(0)
        self.xr_CD += (weight_M1 * x * r).sum(0)
        self.rr += float((weight_M1 * r.square()).sum())

    @property
    def scale(self) -> float:
        return float(self.xx_CC.mean())

    def solve(self, ridge: float, own_units: bool = False) -> Tensor | None:
        return self.xr_CD / (self.xx_CC + ridge * (self.xx_CC / self.scale + QUIETEST if own_units else 1.0))

    def error(self, change_CD: Tensor) -> float:
        return self.rr + float((change_CD.square() * self.xx_CC - 2 * change_CD * self.xr_CD).sum())


def moments(runner: BlockRunner, slot: Slot, module: str | None, entering_NTD: Tensor, wanted_NTD: Tensor,
            held_N: Tensor, weight_NT: Tensor | None = None, scale: float = 1.0) -> tuple[Moments, Moments | Rows]:
    """(fitted on, held out): what a projection of a layer sees against what the stream behind the layer lacks.

    Where a norm stands behind the projection (OLMo 2, Gemma 2, GLM-4), the layer adds gain x W x / s with s the root
    mean square of W x, token by token. With s as it is now that is linear: x / s is what the projection sees, and the
    change found is that of gain x W, which `changed` divides by the gain. The norm then turns the size of the new W x
    back into s, so that only its direction comes as found; sizes by channel are the gain's, which is fitted exactly.
    Either change is judged by the layer's true output.
    Args:
        module: the projection, or such a norm for its gain; None for errors alone.
        wanted_NTD: the stream behind the layer as it should be, up to `scale`.
        held_N: sequences that are held out.
        weight_NT: see `token_weights`, whose default it is.
    Cost: one forward of the layer. Its inputs join with ones where the projection has a bias.
    """
    layer: Any = runner.handle.layers[slot.host]
    layout, device, d = runner.handle.layout, next(layer.parameters()).device, wanted_NTD.shape[-1]
    gain = module in layout.output_norms
    norm = module if gain else layout.norm_behind(module)
    inputs = inputs_of(layer.get_submodule(module)) if module and not gain else 0
    sums = (GainMoments.of(d, device) if gain else Moments.empty(inputs, d, device) for _ in "12")
    few = 0 < int(held_N.sum()) * entering_NTD.shape[1] < inputs
    fit, held = next(sums), Rows() if few else next(sums)
    factor: float | Tensor = layout.residual_factor(runner.handle.config)
    weight_NT = token_weights(wanted_NTD) if weight_NT is None else weight_NT
    seen: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name in filter(None, dict.fromkeys((module, norm))):
            hook = partial(_note, seen, name)
            hooks.enter_context(layer.get_submodule(name).register_forward_pre_hook(hook))
        for at in range(0, len(held_N), runner.rows):
            rows = slice(at, at + runner.rows)
            out_NTD = runner.block(slot, entering_NTD[rows])
            target_NTD = wanted_NTD[rows].to(out_NTD.device) * scale
            x_NTC = seen[module] if module else out_NTD[..., :0]
            if norm:
                factor = 1 / _size(layer.get_submodule(norm), seen[norm])
            add_tokens(fit, held, x_NTC, out_NTD, target_NTD, held_N[rows], weight_NT[rows], factor)
    return fit, held


def _note(seen: dict[str, Tensor], name: str, module: Any, args: tuple[Tensor, ...]) -> None:
    seen[name] = args[0]


def _size(norm: Any, y_NTD: Tensor) -> Tensor:
    """What a norm divides each token by [N, T, 1]: the root mean square."""
    eps: Any = getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", 0.0)
    return (y_NTD.float().square().mean(-1, keepdim=True) + eps).sqrt()


def add_tokens(fit: Moments, held: Moments | Rows, x_NTC: Tensor, out_NTD: Tensor, target_NTD: Tensor, held_N: Tensor,
               weight_NT: Tensor, factor: float | Tensor = 1.0) -> None:
    """Count in what a projection saw (x), and what the stream behind its layer lacks, sequence by sequence. `factor`:
    what the projection's output is multiplied by on its way into the stream, one number or [N, T, 1]."""
    x_NTC = x_NTC.reshape(*out_NTD.shape[:2], x_NTC.shape[-1])  # OPT's MLP sees all tokens in one row
    if len(fit.xx_CC) == x_NTC.shape[-1] + 1:  # a bias is the weight of ones
        x_NTC = torch.cat([x_NTC, x_NTC.new_ones(*x_NTC.shape[:-1], 1)], dim=-1)
    x_NTC = x_NTC * factor
    held_N, weight_NT = held_N.to(out_NTD.device), weight_NT.to(out_NTD.device)
    for sums, chosen_N in ((fit, ~held_N), (held, held_N)):
        x, t, r, weight_M = (h[chosen_N].flatten(0, 1) for h in (x_NTC, target_NTD, target_NTD - out_NTD, weight_NT))
        sums.add(x, r, weight_M)
        sums.tt += float((weight_M * t.double().square().sum(1)).sum())


def changed(layout: LayerLayout, layer: Any, module: str, weights: Mapping[str, Tensor], change_CD: Tensor
            ) -> dict[str, Tensor]:
    """Parameters of a projection, or of a norm behind one, by name in the layer, with a change added, float32.
    `weights`: parameters that replace the layer's own."""
    linear = layer.get_submodule(module)
    if module in layout.output_norms:
        name = f"{module}.weight"
        return {name: (weights.get(name, linear.weight).double() + change_CD).float()}
    if norm := layout.norm_behind(module):
        own: Tensor = layer.get_parameter(f"{norm}.weight")
        gain_D = weights.get(f"{norm}.weight", own).double() + layout.norm_offset
        heard_D = gain_D.abs() > QUIET * gain_D.abs().median()
        change_CD = torch.where(heard_D, change_CD / gain_D, torch.zeros_like(change_CD))
    width = linear.weight.shape[_inputs_dim(linear)]
    weight = change_CD[:width].T if _inputs_dim(linear) else change_CD[:width]
    parts = {"weight": weight} | ({} if linear.bias is None else {"bias": change_CD[width]})
    old = {name: weights.get(f"{module}.{name}", getattr(linear, name)) for name in parts}
    return {f"{module}.{name}": (old[name].double() + part).float() for name, part in parts.items()}


def inputs_of(linear: Any) -> int:
    """Inputs of a linear module, ones for its bias included."""
    return int(linear.weight.shape[_inputs_dim(linear)]) + (linear.bias is not None)


def _inputs_dim(linear: Any) -> int:
    """Which dimension of a linear module's weight counts inputs: the second, of GPT-2's Conv1D the first."""
    return 0 if type(linear).__name__ == "Conv1D" else 1


def held_out(n: int) -> Tensor:
    """Which of n sequences are not fitted on [n]: every fifth, at least one. Ridges and changes are judged there."""
    held_N = torch.arange(n) % HELD == HELD - 1
    held_N[-1] |= not held_N.any()
    return held_N


def ridge_step(fit: Moments, held: Moments | Rows, ridges: list[float], whole: bool = False, own_units: bool = False
               ) -> tuple[Tensor, float, float] | None:
    """The change [C, D] of a linear map that takes most of the residual away on tokens it was not fitted on.

    Minimises the squared residual over `fit` plus ridge x the mean diagonal of its xx x the squared change, for every
    ridge; the change is thereby pulled to zero, the map to what it was.

    Args:
        whole: fit once more by the chosen ridge, on the tokens held out as well, which `fit` has from then on.
        own_units: see `Moments.solve`.
    Returns:
        (change, ridge, squared residual left over `held`), or None where no ridge lowers it.
    Cost: one Cholesky factor of [C, C] and one product with [C, D] for every ridge.
    """
    best: tuple[Tensor, float, float] | None = None
    scale = fit.scale
    if not scale > 0:
        return None
    for ridge in ridges:
        change_CD = fit.solve(ridge * scale, own_units)
        if change_CD is None:
            continue  # too small a ridge for inputs that nearly depend on each other
        error = held.error(change_CD)
        if error < (held.rr if best is None else best[2]):
            best = change_CD, ridge, error
    if whole and best:
        fit.join(held)
        change_CD = fit.solve(best[1] * fit.scale, own_units)
        return (best[0] if change_CD is None else change_CD, *best[1:])
    return best


def eliminated(xx_CC: Tensor, map_CD: Tensor, step: int, least: int, ridge: float = 0.03
               ) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs of a linear map that stay when it gets narrower step by step, and the map refitted to its own output.

    Backward elimination: the inputs go whose loss costs the refitted map least, |map of c|^2 / (xx^-1)_cc each (Optimal
    Brain Surgeon, Hassibi and Stork 1993), `step` at a time. The ridge pulls to the map as it was.
    Yields:
        (inputs that stay, ascending, [K], their map [K, D]) with C - step, C - 2 step, ... of them, `least` at last.
    Cost: one inverse of [K, K] for every step.
    """
    gram_CC = xx_CC / xx_CC.diagonal().mean().clamp(min=1e-30)
    gram_CC.diagonal().mul_(1 + ridge).add_(1e-3 * ridge)
    aim_CD = gram_CC @ map_CD
    stay_K = torch.arange(len(xx_CC), device=xx_CC.device)
    inverse_KK, part_KD = _inverse(gram_CC), map_CD
    while len(stay_K) > least:
        cost_K = part_KD.square().sum(1) / inverse_KK.diagonal()
        gone = cost_K.argsort(stable=True)[: min(step, len(stay_K) - least)]
        left_K = torch.ones_like(stay_K, dtype=torch.bool)
        left_K[gone] = False
        stay_K = stay_K[left_K]
        inverse_KK = _inverse(gram_CC[stay_K][:, stay_K])
        part_KD = inverse_KK @ aim_CD[stay_K]
        yield stay_K, part_KD


def _inverse(gram_CC: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(gram_CC))
