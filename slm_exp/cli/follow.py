"""Following the threshold path of a model: the work of `slm path`."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from slm_exp.cli import curve
from slm_exp.core.cache.store import StageStore
from slm_exp.core.errors import ConfigError
from slm_exp.core.files import write_json, write_text
from slm_exp.core.secrets import masked
from slm_exp.engine.progress import ticking
from slm_exp.methods.slm import SLM
from slm_exp.models.base import dtype_name
from slm_exp.models.sizes import BYTES
from slm_exp.pipeline.config import RunConfig
from slm_exp.pipeline.memory import opened
from slm_exp.pipeline.stages import Experiment
from slm_exp.recovery.family import Family
from slm_exp.reporting.budgets import BUDGETS
from slm_exp.reporting.staircase import MERGED, RECOVERED, draw_budgets, draw_staircase, exponential, fronts, qualities
from slm_exp.search.cost import best_of_each, sizes
from slm_exp.search.path import Branch, follow
from slm_exp.search.scoring import ScoringEngine
from slm_exp.search.task import PlanTask

log = logging.getLogger(__name__)


def follow_and_write(cfg: RunConfig, out: Path, wanted: Sequence[int] = ()) -> int:
    """Follow the path of a config's model and write it into a folder, with checkpoints of the `wanted` sizes. Returns
    main's exit status. Raises ConfigError: the path has none of such a size; names those it has."""
    method = cfg.method
    assert isinstance(method, SLM)
    low, high = map(float, method.threshold_range)
    device = cfg.runtime.prepare(cfg.seed, cfg.model.device)
    dense = opened(cfg, device)
    if many := [n for n in wanted if not 0 < n < dense.n_layers]:
        raise ConfigError(f"--save {many[0]}; expected numbers of layers from 1 to {dense.n_layers - 1}, fewer than "
                          f"{dense.name} has.")
    family = isinstance(cfg.recovery, Family)
    if family:
        cfg.recovery.check_data(dense)
        for name, n in cfg.recovery.lengths().items():
            dense.require_room(name, n)
    tokens = cfg.calibration.draw(dense, cfg.seed)
    store = StageStore(cfg.cache_folder)
    task = PlanTask(dense, tokens, cfg.similarity, cfg.kernel, cfg.merge_rule, None, store, cfg.seed)
    start = method.start(dense.n_layers)
    scorer = ScoringEngine(task, top=start.high)
    with watching(low, high) as show:
        path = follow(scorer, start, dense.n_layers, low, high, method.commit_open_window, method.max_evaluations,
                      show=show, foresee=scorer.foresee, early_stop=method.early_stop)

    seq_len, itemsize = int(tokens.tokens_NT.shape[1]), BYTES[dtype_name(dense.config, cfg.model.dtype)]
    result = {
        "range": [low, high], "plans": [plan.to_json() for plan in path.plans],
        "unknown": [list(interval) for interval in path.unknown], "evaluations": path.evaluations,
        "block_forwards": scorer.block_forwards,
        "sizes": [{**dataclasses.asdict(size), "bytes": size.params * itemsize}
                  for size in sizes(dense, cfg.merge_rule, path.plans, seq_len)],
        "seq_len": seq_len,
        "model": {"name": dense.name, "note": dense.note, "digest": dense.digest, "n_layers": dense.n_layers},
        "calibration": tokens.describe(), "config": masked(cfg.resolved()), "device": cfg.runtime.describe(device)}
    tokens.save(out)
    models = curve.sizes_of(task, best_of_each(path.plans)) if family or wanted else {}
    x = Experiment(cfg, out, store)
    x.dense, x.tokens = dense, tokens
    folders = []
    if unknown := [n for n in wanted if n not in models]:
        raise ConfigError(f"--save {unknown[0]}; expected sizes of this path: {', '.join(map(str, models))}. "
                          "method.threshold_range or another rule reaches others.")
    about: dict[str, Any] = {}
    for n, size in curve.recovered(x, models, about) if family and models else models.items():
        if n in wanted:
            folders.append(curve.save(x, n, size))
    result |= {"recovery": about} if about else {}
    write_json(out / "path.json", result)
    draw_staircase(result, out / "path.png")
    draw_budgets(result, out / "budgets.png")
    page = table(result)
    write_text(out / "path.md", page)
    print(page, *(out / name for name in ("path.json", "path.png", "budgets.png")), *folders, sep="\n")
    if path.unknown:
        print(f"method.max_evaluations = {method.max_evaluations} ended the path; unknown: "
              + ", ".join(f"[{a:.4f}, {b:.4f})" for a, b in path.unknown)
              + ". The same command with a larger one goes on from here.", file=sys.stderr)
    return int(bool(path.unknown))


def shown(perplexity: float) -> str:
    return f"{perplexity:.2f}" if perplexity < 1e5 else f"{perplexity:.3g}"


@contextlib.contextmanager
def watching(low: float, high: float) -> Iterator[Callable[[Branch, int], None]]:
    """Show how much of a threshold range is decided: a bar on a terminal, a line now and then elsewhere."""
    with ticking("thresholds decided", 100, "%") as tick:
        yield lambda branch, scored: tick(f"{scored} candidates scored, below {branch.high:.4f} to do",
                                          at=100 * (high - branch.high) / (high - low))  # from the highest down


def table(result: dict[str, Any]) -> str:
    """The path as Markdown: every plan, then every size."""
    dense, curve = result["model"]["n_layers"], result.get("recovery")
    lines = [
        f"{result['model']['name']}: {len(result['plans'])} plans for thresholds {result['range'][0]:g} to "
        f"{result['range'][1]:g}; {result['evaluations']} candidates scored, "
        f"{result['block_forwards']} block forwards.",
        *([f"({result['model']['note']})"] if result["model"]["note"] else []),
        "",
        "| threshold from | below | layers | merged | final score |",
        "|---:|---:|---:|---|---:|",
    ]
    for plan in result["plans"]:
        merged = " ".join(f"{a}-{b - 1}" for a, b in plan["groups"]) or "nothing"
        lines.append(f"| {plan['threshold_low']:.5f} | {plan['threshold_high']:.5f} | {plan['n_layers']} | {merged} "
                     f"| {plan['final_score']:.4f} |")
    lines += [
        "",
        "The best plan of every size, and by which budgets another is as small and better (budgets.png). Latency is "
        f"the median of a prefill over {result['seq_len']} tokens, on a CPU with one thread in processor time "
        f"({result['device']['name'] or result['device']['type']}, {result['device']['threads']} threads)."
        + (f" Perplexities are of passages that nothing was fitted on, before and after the one training of "
           f"recovery={curve['name']} (dense {shown(exponential(curve['dense']))})." if curve else ""),
        "",
        "| layers | parameters removed | GFLOP per token | latency, ms | weights, MB | best final score | threshold | "
        f"beaten by |{' perplexity | recovered |' if curve else ''}",
        f"|---:|---:|---:|---:|---:|---:|---|---|{'---:|---:|' if curve else ''}",
    ]
    best = fronts(result["sizes"])
    for at, size in reversed([*enumerate(qualities(result))]):
        beaten = [BUDGETS[budget].name for budget, front in best.items() if not front[at]]
        of = f"{size['n_layers']} of {dense}"
        more = f" {shown(size[MERGED])} | {shown(size[RECOVERED])} |" if MERGED in size else " | |" if curve else ""
        lines.append(f"| {of} | {size['ratio_removed']:.1%} | {size['flops_per_token'] / 1e9:.3g} "
                     f"| {1e3 * size['latency_s']:.1f} | {size['bytes'] / 1e6:.1f} | {size['best_final_score']:.4f} "
                     f"| [{size['threshold'][0]:.5f}, {size['threshold'][1]:.5f}) | {'; '.join(beaten)} |{more}")
    return "\n".join(lines) + "\n"
