"""What flows into a layer's projections over the calibration set, gathered in one pass; ECoFLaP's layer importance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from slm_exp.core.types import CalibrationTokens
from slm_exp.engine.progress import ticking
from slm_exp.engine.runner import BlockRunner, Slot
from slm_exp.models.base import ModelHandle


@dataclass
class InputStats:
    """Moments of a projection's input channels over all samples and tokens, float64 on the CPU."""

    tokens: int
    sum_C: Tensor
    square_C: Tensor
    """Sum of squares."""
    mean_abs_square_C: Tensor
    """Sum over samples of (mean over tokens of |x|) squared."""

    @property
    def mean_C(self) -> Tensor:
        return self.sum_C / self.tokens

    @property
    def variance_C(self) -> Tensor:
        """Population variance over tokens."""
        return (self.square_C / self.tokens - self.mean_C.square()).clamp(min=0)

    @property
    def norm_C(self) -> Tensor:
        """L2 over all tokens."""
        return self.square_C.sqrt()

    @classmethod
    def of(cls, x_BTC: Tensor) -> InputStats:
        """One batch's."""
        x = x_BTC.detach().double()
        return cls(x.shape[0] * x.shape[1], x.sum((0, 1)).cpu(), x.square().sum((0, 1)).cpu(),
                   x.abs().mean(1).square().sum(0).cpu())

    def add(self, other: InputStats) -> None:
        self.tokens += other.tokens
        self.sum_C += other.sum_C
        self.square_C += other.square_C
        self.mean_abs_square_C += other.mean_abs_square_C


Walk = Iterator[tuple[int, dict[str, InputStats], dict[str, Tensor]]]


def walk(handle: ModelHandle, tokens: CalibrationTokens, names: Sequence[str]) -> Walk:
    """Yield (layer, inputs of the named projections, replaced), bottom to top.

    What is put into `replaced` stands for parameters of that layer (by name inside it) for all that lies above: the
    layer runs again with them. The model itself is never modified.
    Cost: one block forward per layer, two where parameters are replaced. Memory: the states of the calibration set.
    """
    runner = BlockRunner(handle, tokens.tokens_NT, fuse=False)  # the library's layer, whose parts can be listened to
    h_NTD = runner.embed()
    with ticking("width", handle.n_layers, "layer") as tick:
        for i, layer in enumerate(handle.layers):
            with _listening(layer, names) as stats:
                out_NTD = runner.block(Slot(i), h_NTD)
            replaced: dict[str, Tensor] = {}
            yield i, stats, replaced
            h_NTD = runner.block(Slot(i, replaced), h_NTD) if replaced else out_NTD
            tick(f"layer {i}")


@contextmanager
def _listening(layer: nn.Module, names: Sequence[str]) -> Iterator[dict[str, InputStats]]:
    stats: dict[str, InputStats] = {}

    def heard(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        found = InputStats.of(args[0])
        if name in stats:
            stats[name].add(found)
        else:
            stats[name] = found

    with ExitStack() as hooks:
        for name in names:
            hooks.enter_context(layer.get_submodule(name).register_forward_pre_hook(partial(heard, name)))
        yield stats


EPSILON = 1e-3


def layer_importance(handle: ModelHandle, tokens: CalibrationTokens, layers: Sequence[int], n_samples: int,
                     seed: int) -> list[float]:
    """Per layer of `layers` (ascending): its projections' m and samples' |L(m + eps z) - L(m - eps z)| / (2 eps), added
    up, z ~ N(0, 1).

    L is the mean next-token loss of one sample. One noise for each matrix, none stored; no gradients. Source:
    ECoFLaP, arXiv:2310.02998.
    Cost: for each projection of each of `layers` two passes through that layer and those above it, over `n_samples`;
        and one through those below the last.
    """
    ids_NT, n_layers = torch.as_tensor(tokens.tokens_NT[:n_samples]).long(), handle.n_layers
    runner, head = BlockRunner(handle, ids_NT), handle.model.get_output_embeddings()

    def losses_N(h_NTD: torch.Tensor, above: int) -> torch.Tensor:
        for i in range(above, n_layers):
            h_NTD = runner.block(Slot(i), h_NTD)
        out = []
        for h_TD, ids_T in zip(runner.finish(h_NTD), ids_NT, strict=True):
            logits_TV = handle.layout.logits(handle.config, head(h_TD[:-1])).float()  # type: ignore[operator]
            out.append(cross_entropy(logits_TV, ids_T[1:].to(logits_TV.device)).double())
        return torch.stack(out)

    importance = []
    with torch.inference_mode(), ticking("importance of layers", len(layers), "layer") as tick:
        h_NTD = runner.embed()
        for i, layer in enumerate(handle.layers[: max(layers) + 1]):
            if i:
                h_NTD = runner.block(Slot(i - 1), h_NTD)
            if i not in layers:
                continue
            total = 0.0
            for m, name in enumerate(f"{p}.weight" for p in handle.layout.projections):
                weight = layer.get_parameter(name)
                generator = torch.Generator().manual_seed(seed * 1_000_003 + i * 101 + m)
                z = torch.randn(weight.shape, generator=generator).to(weight.device, weight.dtype)
                sides = [losses_N(runner.block(Slot(i, {name: weight + sign * EPSILON * z}), h_NTD), i + 1)
                         for sign in (1, -1)]
                total += float((sides[0] - sides[1]).abs().sum()) / (2 * EPSILON)
            importance.append(total)
            tick(f"{total:.3g} of layer {i}")
    return importance
