"""Ridge regression from moments: the data is seen once, in batches, and only sums over it are kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


HELD = 5


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
        import torch

        xx_CC = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        return cls(xx_CC, xx_CC.new_zeros(inputs, outputs))

    def add(self, x_MC: Tensor, r_MD: Tensor, weight_M: Tensor) -> None:
        """Count tokens in, each with a weight."""
        root_M1 = weight_M.double().sqrt().unsqueeze(1)
        x, r = x_MC.double() * root_M1, r_MD.double() * root_M1
        self.xx_CC.addmm_(x.T, x)
        self.xr_CD.addmm_(x.T, r)
        self.rr += float(r.square().sum())

    def error(self, change_CD: Tensor) -> float:
        """Sum of weighted squares of r - x change."""
        quadratic = (change_CD * (self.xx_CC @ change_CD)).sum()
        return self.rr + float(quadratic - 2 * (change_CD * self.xr_CD).sum())


@contextmanager
def input_of(layer: Any, module: str | None) -> Iterator[list[Tensor]]:
    """What flows into a projection of a layer, call by call; nothing where none is named."""
    seen: list[Tensor] = []
    if module is None:
        yield seen
        return
    hook = layer.get_submodule(module).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        hook.remove()


def empty_moments(layer: Any, module: str | None, outputs: int) -> Moments:
    """Moments of a projection's inputs, and of ones where it has a bias; of nothing where none is named."""
    linear = None if module is None else layer.get_submodule(module)
    inputs = 0 if linear is None else linear.weight.shape[_inputs_dim(linear)] + (linear.bias is not None)
    return Moments.empty(int(inputs), outputs, next(layer.parameters()).device)


def add_tokens(
    fit: Moments, held: Moments, x_NTC: Tensor, out_NTD: Tensor, target_NTD: Tensor, held_N: Tensor, relative: bool,
    factor: float = 1.0,
) -> None:
    """Count in what a projection saw, and what the stream behind its layer lacks, sequence by sequence.

    Args:
        x_NTC: the projection's inputs.
        out_NTD: the stream behind the layer; target_NTD: what it should be.
        held_N: sequences that go into `held`, the others into `fit`.
        relative: each token's error counts relative to its norm, as the next layer's norm sees it.
        factor: what the projection's output is multiplied by on its way into the stream.
    """
    import torch

    x_NTC = x_NTC.reshape(*out_NTD.shape[:2], x_NTC.shape[-1])  # OPT's MLP sees all tokens in one row
    if len(fit.xx_CC) > x_NTC.shape[-1]:  # a bias is the weight of ones
        x_NTC = torch.cat([x_NTC, x_NTC.new_ones(*x_NTC.shape[:-1], 1)], dim=-1)
    if factor != 1:
        x_NTC = x_NTC * factor
    for moments, chosen_N in ((fit, ~held_N), (held, held_N)):
        x, t, r = (h[chosen_N].flatten(0, 1) for h in (x_NTC, target_NTD, target_NTD - out_NTD))
        norm_M = t.double().square().sum(1)
        weight_M = 1 / norm_M.clamp(min=1e-12) if relative else norm_M.new_ones(len(norm_M))
        moments.add(x, r, weight_M)
        moments.tt += float((weight_M * norm_M).sum())


def changed(layer: Any, module: str, weights: Mapping[str, Tensor], change_CD: Tensor) -> dict[str, Tensor]:
    """A projection's parameters, by name in the layer, with a change added, float32.

    Args:
        weights: parameters that replace the layer's own.
    """
    linear = layer.get_submodule(module)
    width = linear.weight.shape[_inputs_dim(linear)]
    weight = change_CD[:width].T if _inputs_dim(linear) else change_CD[:width]
    parts = {"weight": weight} | ({} if linear.bias is None else {"bias": change_CD[width]})
    old = {name: weights.get(f"{module}.{name}", getattr(linear, name)) for name in parts}
    return {f"{module}.{name}": (old[name].double() + part).float() for name, part in parts.items()}


def _inputs_dim(linear: Any) -> int:
    """Which dimension of a linear module's weight counts inputs: the second, of GPT-2's Conv1D the first."""
    return 0 if type(linear).__name__ == "Conv1D" else 1


def held_out(n: int) -> Tensor:
    """Which of n sequences are not fitted on [n]: every fifth, at least one. Ridges and changes are judged there."""
    import torch

    held_N = torch.arange(n) % HELD == HELD - 1
    held_N[-1] |= not held_N.any()
    return held_N


def ridge_step(fit: Moments, held: Moments, ridges: list[float]) -> tuple[Tensor, float, float] | None:
    """The change [C, D] of a linear map that takes most of the residual away on tokens it was not fitted on.

    Minimises the squared residual over `fit` plus ridge x the mean diagonal of its xx x the squared change, for every
    ridge; the change is thereby pulled to zero, the map to what it was.

    Returns:
        (change, ridge, squared residual left over `held`), or None where no ridge lowers it.
    Cost: one Cholesky factor of [C, C] and one product with [C, D] for every ridge.
    """
    import torch

    best: tuple[Tensor, float, float] | None = None
    scale = float(fit.xx_CC.diagonal().mean())
    if not scale > 0:
        return None
    for ridge in ridges:
        damped_CC = fit.xx_CC.clone()
        damped_CC.diagonal().add_(ridge * scale)
        factor_CC, failed = torch.linalg.cholesky_ex(damped_CC)
        if int(failed):
            continue  # too small a ridge for inputs that nearly depend on each other
        change_CD = torch.cholesky_solve(fit.xr_CD, factor_CC)
        error = held.error(change_CD)
        if error < (held.rr if best is None else best[2]):
            best = change_CD, ridge, error
    return best
