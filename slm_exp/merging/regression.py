"""The work of `merge_rule=regression`: one layer's projections, so that it does to the stream what a window does."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from slm_exp.core.registry import available
from slm_exp.core.types import Group
from slm_exp.engine.gradients import ordinary
from slm_exp.engine.ridge import changed, held_out, moments, ridge_step, token_weights
from slm_exp.engine.runner import BlockRunner, Slot

log = logging.getLogger(__name__)

STARTS = ("keep_low", "top_layer", "mean")
Weights = dict[str, Tensor]


class Settings(Protocol):
    """As in `Regression`."""

    sweeps: int
    steps: int
    ridges: list[float]

    def combine(self, weights: Any) -> Tensor: ...


def fit_window(runner: BlockRunner, window: Group, entering_NTD: Tensor, wanted_NTD: Tensor, settings: Settings
               ) -> Weights:
    """See `FittingRule.fit`."""
    return _Fit(runner, window, entering_NTD, wanted_NTD, settings).run()


class _Fit:
    """One window. Errors are sums over the sequences held out, of squares weighted token by token."""

    def __init__(self, runner: BlockRunner, window: Group, entering_NTD: Tensor, wanted_NTD: Tensor,
                 settings: Settings) -> None:
        self.runner, self.window, self.settings = runner, window, settings
        self.layout = runner.handle.layout
        self.layer: Any = runner.handle.layers[window.start]
        self.entering_NTD, self.wanted_NTD = entering_NTD, wanted_NTD
        self.held_N, self.weight_NT = held_out(len(entering_NTD)), token_weights(wanted_NTD)

    def run(self) -> Weights:
        outputs = [m for kind in ("mlp", "attention") for m in self.layout.fitted[kind]]
        inner = [f"{m}.weight" for m in self.layout.projections if m not in outputs]
        best = min((self._outputs(self._start(rule), outputs) for rule in STARTS), key=lambda found: found[1])
        first = best[1]
        for _ in range(self.settings.sweeps):
            found = self._outputs(self._inner(best[0], inner), outputs)
            if not found[1] < best[1]:
                break
            best = found
        log.info("layers %d..%d as one: error %.4g by the output projections, %.4g by all", self.window.start,
                 self.window.stop - 1, first, best[1])
        own = dict(self.layer.named_parameters())
        return {name: t.to(own[name].dtype) for name, t in best[0].items()}

    def _start(self, rule: str) -> Weights:
        """A rule's projections, float32, on the lowest layer's norms and biases; experts and routers are the mean."""
        layers = list(self.runner.handle.layers[slice(*self.window)])
        combine = available("merge_rule")[rule]().combine  # type: ignore[attr-defined]
        fitted = {f"{m}.weight" for m in self.layout.projections}
        return {name: (combine if name in fitted else self.settings.combine)(
                    [layer.get_parameter(name).detach() for layer in layers]).float()
                for name in self.layout.matrices if name in dict(self.layer.named_parameters())}

    def _outputs(self, weights: Weights, modules: list[str]) -> tuple[Weights, float]:
        """With the output projections fitted, in turn; a change that helps nothing on what is held out is not made."""
        for module in modules:
            fit, held = self._moments(weights, module)
            if step := ridge_step(fit, held, self.settings.ridges):
                with torch.inference_mode():
                    weights = weights | changed(self.layout, self.layer, module, weights, step[0])
        return weights, self._moments(weights, None)[1].rr

    def _moments(self, weights: Mapping[str, Tensor], module: str | None) -> Any:
        return moments(self.runner, Slot(self.window.start, weights), module, self.entering_NTD, self.wanted_NTD,
                       self.held_N, self.weight_NT)

    def _inner(self, weights: Weights, names: list[str]) -> Weights:
        """With the inner projections fitted by L-BFGS on the sequences that are not held out."""
        at = self.window.start
        fixed = {n: ordinary(t) for n, t in weights.items() if n not in names}
        free = {n: ordinary(weights[n]).requires_grad_() for n in names if n in weights}
        own = {n: ordinary(p.detach().float()) for n, p in self.layer.named_parameters() if n not in weights}
        call = ordinary(self.runner.call(at, torch.float32))
        x, y, w = (ordinary(t[~self.held_N]).float() for t in (self.entering_NTD, self.wanted_NTD, self.weight_NT))
        total = float((w * y.square().sum(-1)).sum())
        optimiser = torch.optim.LBFGS([*free.values()], max_iter=self.settings.steps, history_size=self.settings.steps,
                                      line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimiser.zero_grad()
            value = torch.zeros((), dtype=torch.float64)
            for rows in range(0, len(x), self.runner.rows):
                part = slice(rows, rows + self.runner.rows)
                out = torch.func.functional_call(self.layer, {**own, **fixed, **free}, (x[part],), call)
                out = out[0] if isinstance(out, tuple) else out
                lost = (w[part] * (out - y[part]).square().sum(-1)).sum() / total
                lost.backward()
                value += float(lost.detach())
            return value

        with torch.enable_grad():
            optimiser.step(loss)  # type: ignore[arg-type]
        return {**weights, **{n: t.detach() for n, t in free.items()}}
