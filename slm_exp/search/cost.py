"""What a model of some depth costs to run: operations by arithmetic, seconds by measurement."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping

import torch

from slm_exp.core.types import MergePlan, SizeCost
from slm_exp.engine.latency import Clock
from slm_exp.engine.runner import BlockRunner, Slot
from slm_exp.merging.rules.base import MergeRule
from slm_exp.merging.rules.keep_low import KeepLow
from slm_exp.merging.surgery import apply_plan
from slm_exp.models.base import ModelHandle
from slm_exp.search.path import PathPlan

ROUNDS = 5


def sizes(dense: ModelHandle, rule: MergeRule, plans: Iterable[PathPlan], seq_len: int) -> tuple[SizeCost, ...]:
    """What every size among plans of a threshold path costs to run, by its best plan; the smallest first. Cost: the
    models of all sizes, which share what they do not merge, and ROUNDS + 1 prefills of each."""
    best = best_of_each(plans)
    rule = KeepLow() if rule.fits else rule  # what a layer costs to run does not depend on its weights
    models = {n: apply_plan(dense, MergePlan(dense.n_layers, plan.groups, rule=rule.name), rule)
              for n, plan in best.items()}
    seconds = latencies(models, seq_len)
    return tuple(SizeCost(n, handle.n_params, 1 - handle.n_params / dense.n_params,
                          dense.sizes.with_layers(n).flops_per_token(seq_len), seconds[n], best[n].final_score,
                          (best[n].low, best[n].high)) for n, handle in models.items())


def best_of_each(plans: Iterable[PathPlan]) -> dict[int, PathPlan]:
    """The plan of the best final score by number of layers left, the fewest first."""
    best: dict[int, PathPlan] = {}
    for plan in plans:
        if plan.n_layers not in best or plan.final_score > best[plan.n_layers].final_score:
            best[plan.n_layers] = plan
    return dict(sorted(best.items()))


def latencies(models: Mapping[int, ModelHandle], seq_len: int) -> dict[int, float]:
    """Median seconds (see `Clock`) of a prefill over one sequence, for models by number of layers. The models take
    turns within every round, so that the ratios hold on a machine whose speed drifts."""
    if any(handle.streamed for handle in models.values()):
        return _by_block(models, seq_len)
    times: dict[int, list[float]] = {n: [] for n in models}
    for turn in range(ROUNDS + 1):  # the first is not counted
        for n, handle in models.items():
            ids = torch.arange(seq_len, device=handle.model.device)[None] % handle.config.vocab_size
            clock = Clock(ids.device)
            started = clock.mark()
            with torch.inference_mode():
                handle.model(ids, use_cache=False)
            if turn:
                times[n].append(clock.between(started, clock.mark()))
    return {n: statistics.median(t) for n, t in times.items()}


def _by_block(models: Mapping[int, ModelHandle], seq_len: int) -> dict[int, float]:
    """Of models whose layers stay in their files: the median of one layer that has been read, times the layers, and
    that of the head."""
    handle = next(iter(models.values()))
    runner = BlockRunner(handle, torch.arange(seq_len)[None] % handle.config.vocab_size, fuse=False)
    h_NTD = runner.embed()
    clock = Clock(h_NTD.device)
    layers, heads = [], []
    for _ in range(ROUNDS + 1):  # the first reads it
        started = clock.mark()
        runner.block(Slot(0), h_NTD)
        layers.append(clock.between(started, between := clock.mark()))
        runner.logits(runner.finish(h_NTD).flatten(0, 1))
        heads.append(clock.between(between, clock.mark()))
    return {n: n * statistics.median(layers[1:]) + statistics.median(heads[1:]) for n in models}
