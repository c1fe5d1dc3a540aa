from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from slm_exp.calibration.fit import FitSource
from slm_exp.core.cost import Count
from slm_exp.core.errors import ConfigError, require, require_one_of
from slm_exp.core.registry import Fields, register
from slm_exp.core.types import MergePlan, Sublayer, Target, Trial
from slm_exp.core.widths import KeptUnits, WidthDecision, WidthSizes, pack_indices
from slm_exp.merging.sizes import CHANNELS, Costs, Shape, costs_of, full_shape
from slm_exp.methods.base import Sized
from slm_exp.models.base import ModelHandle
from slm_exp.search.budget import Budget
from slm_exp.search.task import PlanTask

if TYPE_CHECKING:
    from slm_exp.search.joint import Choice, Price

DTYPES = ("bfloat16", "float16", "float32")
LEAST = 2
"""Steps of channels that every MLP keeps."""


@register("method", "joint")
@dataclass
class Joint(Sized):
    """Attention sublayers and MLP channels go together: the set of least KL divergence.

    Every layer's attention, its MLP at half its width and its MLP at the narrowest (the last projection refitted to
    the channels that stay) are taken away alone, and the predictions' KL divergence from the dense model's is the
    price. The first layer's attention stays. Widths between follow a power law; prices are taken to add up (as in
    LAPTOP-Diff, arXiv:2404.11098), and a knapsack finds the cheapest set of the size that is asked. Channels go by
    backward elimination (Optimal Brain Surgeon). The plan is only the choice: `recovery=reconstruct
    recovery.layers=sublayers` is the repair it was made for.

    `target_layers` and `target_ratio` count parameters: as many go as that many whole layers have. A removed attention
    keeps one group of heads, at zero, in the checkpoint. Layers have widths of their own, so the checkpoint brings its
    own code.
    Fitted and scored on different tokens: the fits take `fit_samples` x `fit_seq_len` tokens of documents that the
    calibration has not drawn from, or `fit_path`.
    Cost: three scored models a layer, of the layers above it and the head twice, two passes over the tokens of the
    fits, and steps x inverses of [channels, channels] in float64 a layer.
    """

    mergeable: ClassVar[bool] = False

    protect_first: int = 1
    protect_last: int = 1
    steps: int = 12
    """Into how many parts an MLP's channels are divided; two at least stay."""
    fit_path: str | None = None
    """Tokens to fit on: a .npy file [N, T], or texts as in calibration=jsonl; null is calibration=mixture."""
    fit_samples: int = 12
    """Sequences; of a .npy file all are taken."""
    fit_seq_len: int = 256
    """Tokens per sequence."""
    screen_dtype: str | None = "bfloat16"
    """Scored models run in it; null is the model's own."""

    @property
    def removes_sublayers(self) -> bool:
        return True

    @property
    def narrows(self) -> bool:
        return True

    def needs_resident(self) -> str | None:
        return f"method={self.name}, which refits every layer it prices"

    def check(self) -> None:
        super().check()
        self.at_least(2 * LEAST, "steps")
        self.at_least(2, "fit_samples", "fit_seq_len")
        require(self.compensate is None, "method.compensate", self.compensate, "null: the refit restores magnitudes")
        if self.screen_dtype is not None:
            require_one_of("method.screen_dtype", self.screen_dtype, DTYPES)

    def identity(self) -> Fields:
        own = {k: v for k, v in super().identity().items() if k not in ("fit_path", "fit_samples", "fit_seq_len")}
        return {**own, "tokens": self._source().identity()}

    def _source(self) -> FitSource:
        return FitSource.of(self, self.fit_path, self.fit_samples, self.fit_seq_len)

    def check_model(self, handle: ModelHandle) -> None:
        layout = handle.layout
        why = layout.no_width or layout.no_refit
        if not layout.layerwise:
            why = why or "there is no code for layers of different widths"
        elif getattr(handle.config, "layer_widths", None):
            why = "they have widths of their own already"
        if why:
            raise ConfigError(f"method={self.name}: {layout.family} layers cannot be narrowed and refitted: {why}. "
                              "Take another method, e.g. method=shortgpt.")
        if not self.unmeasured:
            self._wanted(handle)

    def check_data(self, dense: ModelHandle) -> None:
        self._source().check(dense)

    def layers_left(self, handle: ModelHandle) -> int | None:
        return None

    def bounds(self, n_layers: int) -> tuple[int, int] | None:
        return n_layers, n_layers

    def search_cost(self, n_layers: int, removed: int | None) -> Count:
        models = 3 * len(self.removable(n_layers))
        return Count(2 * n_layers + models * n_layers / 2, 2 * models, note=(
            f"method={self.name} removes as many parameters as so many layers have, and keeps every layer; "
            "its fits cost two passes over their tokens, and inverses, beside the scores"))

    def _step(self, handle: ModelHandle) -> int:
        """Channels that go at once, so that widths stay multiples of CHANNELS."""
        return max(CHANNELS, full_shape(handle.config).channels // self.steps // CHANNELS * CHANNELS)

    def _gain(self, budget: Budget, wide: int, i: int, attention: bool, channels: int) -> float:
        """What the budget counts of a layer's attention, if it goes, and of `channels` of `wide`."""
        mlp = budget.costs.part(i, "mlp") - budget.costs.narrow(i, 1 - channels / wide)
        return attention * budget.costs.part(i, "attention") + mlp

    def _wanted(self, handle: ModelHandle) -> float:
        """What to remove: parameters, or what the budget counts. Loads no weights. Raises ConfigError: more than can
        be; says how much can."""
        full, of = full_shape(handle.config), handle.sublayer_params[0]
        layer = of["attention"] + of["mlp"]
        if (budget := self.budget(handle)) is not None:
            step, wide = self._step(handle), full.channels
            most = sum(self._gain(budget, wide, i, i > 0, (wide - LEAST * step) // step * step)
                       for i in self.removable(handle.n_layers))
            least = budget.costs.dense - most
            budget.refuse_none(None if budget.fits(least) else least, f"every MLP keeps {LEAST} of {self.steps} parts",
                               f"a layer is {budget.show(budget.costs.layer(0))}")
            return budget.costs.dense - budget.limit
        if self.target_layers is not None:
            require(self.target_layers <= handle.n_layers, "method.target_layers", self.target_layers,
                    f"1 to {handle.n_layers} for {handle.name}")
            name, wanted = "target_layers", float((handle.n_layers - self.target_layers) * layer)
        else:
            name, wanted = "target_ratio", (self.target_ratio or 0) * handle.n_params
        most = len(self.removable(handle.n_layers)) * (
            layer - (LEAST + 1) * self._step(handle) / full.channels * of["mlp"])
        require(wanted <= most, f"method.{name}", getattr(self, name),
                f"{most / layer:.1f} layers' worth of parameters ({most / handle.n_params:.3f} of all) at most go from "
                f"{handle.name}", f"Every MLP keeps {LEAST} of {self.steps} parts, and "
                f"method.protect_first={self.protect_first} and protect_last={self.protect_last} keep layers.")
        return wanted

    def plan(self, task: PlanTask) -> MergePlan:
        from slm_exp.search.fitting import disjoint
        from slm_exp.search.joint import cheapest, prices

        task = replace(task)  # an engine of its own, for a cost of its own
        handle, full, costs = task.handle, full_shape(task.handle.config), costs_of(task.handle)
        step, budget = self._step(handle), self.budget(handle)
        attention = costs.attention(full.heads, full.kv_heads)

        def gain(choice: Choice) -> float:
            if budget is not None:
                return self._gain(budget, full.channels, *choice)
            return choice.attention * attention + choice.channels * costs.channel

        fit = disjoint(self._source().draw(handle, task.seed, task.tokens), task.tokens, f"method={self.name}",
                       "method.fit_path")
        found = prices(task, fit, self.removable(handle.n_layers), step, LEAST * step, self.screen_dtype)
        choices = cheapest(found, self._wanted(handle), gain, step, full.channels)
        return self._plan(task, fit.digest, found, choices, costs)

    def _plan(self, task: PlanTask, tokens: str, found: dict[int, Price], choices: Sequence[Choice], costs: Costs
              ) -> MergePlan:
        from slm_exp.search.joint import slots_without

        handle, full = task.handle, full_shape(task.handle.config)
        of = {c.layer: c for c in choices}
        gone = {i for i, c in of.items() if c.attention}
        per = full.heads // full.kv_heads
        heads = [per if i in gone else full.heads for i in range(handle.n_layers)]
        channels = [sorted(set(range(full.channels)) - set(found[i].order[: of[i].channels] if i in of else ()))
                    for i in range(handle.n_layers)]
        whole = costs.size(full) * handle.n_layers
        removed = sum(c.attention * costs.attention(full.heads, full.kv_heads) + c.channels * costs.channel
                      for c in choices)
        shapes = [Shape(h, h // per, len(c)) for h, c in zip(heads, channels, strict=True)]
        width = WidthDecision(
            method=self.name, ratio=removed / whole, order="after", uniform=False, tokens=tokens, notes=[],
            reached=1 - sum(map(costs.size, shapes)) / whole,
            sizes=WidthSizes(heads=heads, kv_heads=[h // per for h in heads], channels=[len(c) for c in channels],
                             hidden=int(handle.config.hidden_size)),
            kept=KeptUnits(query_heads=[[*range(h)] for h in heads], kv_heads=[[*range(h // per)] for h in heads],
                           channels=[pack_indices(c, full.channels) for c in channels]))
        score = task.engine.score(slots_without(handle, gone, channels))
        total = sum(found[c.layer].mlp(c.channels, full.channels - self._half(handle)) + (
            found[c.layer].attention or 0.0) * c.attention for c in choices)
        note = (f"joint: {len(gone)} attentions and {sum(c.channels for c in choices)} MLP channels go, "
                f"{removed / handle.n_params:.4f} of the parameters; prices sum to {total:.3f} nats a token. Layers "
                "have widths of their own, so the checkpoint brings its own code. recovery=reconstruct "
                "recovery.layers=sublayers is the repair it was made for.")
        changed = bool(gone) or any(len(c) < full.channels for c in channels)
        plan = MergePlan(
            handle.n_layers, sublayers=tuple(Sublayer(i, "attention") for i in sorted(gone)), method=self.name,
            similarity=task.similarity.name, width=width if changed else None, final_score=score, notes=(note,),
            trace=tuple(Trial(i, i, -price, accepted) for i in sorted(found)
                        for price, accepted in ((found[i].attention, i in gone), (found[i].half, of[i].channels > 0))
                        if price is not None and math.isfinite(price)),
            evaluations=task.engine.evaluations, block_forwards=task.engine.block_forwards)
        target = Target(self.requested, True, handle.n_layers, sublayers=len(gone), budget=self.reached(handle, plan))
        return replace(plan, target=target)

    def _half(self, handle: ModelHandle) -> int:
        """The width of half an MLP, in whole steps."""
        wide, step = full_shape(handle.config).channels, self._step(handle)
        return wide - step * (wide // (2 * step))
