"""What a run says on one screen when it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slm_exp.runs.statistics.scores import metric_of


def summary(record: dict[str, Any], folder: Path) -> str:
    """Sizes, scores dense and compressed, where the time went, where things lie, what to do next."""
    plan, layers, params = record["plan"], record["layers"], record["params"]
    merged = ", ".join(f"{a}-{b - 1}" for a, b in plan["groups"]) or "none"
    gone = [*map(str, plan["dropped"]), *(f"{half['kind']} of {half['layer']}" for half in plan["sublayers"])]
    removed = f"; removed {', '.join(gone)}" if gone else ""
    note = f" ({record['model']['note']})" if record["model"]["note"] else ""
    lines = [
        f"run {record['run_id']} finished in {record['seconds']:.0f} s",
        f"  model      {record['model']['name']}{note}",
        f"  layers     {layers['before']} -> {layers['after']}, merged {merged}{removed}",
        f"  parameters {params['before'] / 1e6:.1f} M -> {params['after'] / 1e6:.1f} M"
        f" ({params['ratio_removed']:.1%} removed)",
    ]
    if plan["final_score"] is not None:
        lines.append(f"  score      {plan['final_score']:.4f} by {plan['similarity']}"
                     f" ({plan['evaluations']} candidates)")
    lines += _sizes(plan.get("target") or {})
    dense, small = record["eval"]["dense"], record["eval"]["compressed"]
    if small["tasks"]:
        lines.append(f"  {'task':<16} {'dense':>7} {'compressed':>11}")
        for task in small["tasks"]:
            a, b = (_main_metric(task, x["tasks"].get(task, {})) for x in (dense, small))
            lines.append(f"  {task:<16} {_percent(a):>7} {_percent(b):>11}")
        lines.append(f"  {'average':<16} {_percent(dense['average']):>7} {_percent(small['average']):>11}")
        lines.append("  (percent; hellaswag, arc_challenge, openbookqa by acc_norm; standard errors in the report)")
    for corpus, value in small["perplexity"].items():
        lines.append(f"  perplexity {corpus}: {dense['perplexity'][corpus]:.2f} -> {value:.2f}")
    lines += [_speed(cell) for cell in (record.get("speed") or {}).get("cells", ())]
    slow = sorted(record["stages"], key=lambda s: -s["seconds"])[:3]
    lines.append("  time       " + ", ".join(f"{s['name']} {s['seconds']:.0f} s" for s in slow))
    lines += [f"  warning    {w}" for w in record["warnings"]]
    lines.append(f"  report     {folder / 'report.html'}")
    return "\n".join(lines)


def _speed(cell: dict[str, Any]) -> str:
    """One shape of generation: seconds, dense and compressed, and how many times faster, with quartiles."""
    case = f"  speed      batch {cell['batch']}, {cell['prompt']} tokens in, {cell['new']} out: "
    if cell.get("error"):
        return case + cell["error"]
    before, after = (cell[which]["latency_s"]["median"] for which in ("dense", "compressed"))
    times = cell["speedup"]
    return case + (f"{before:.3g} s -> {after:.3g} s, {times['median']:.2f} times faster ({times['q1']:.2f} to "
                   f"{times['q3']:.2f})")


def _sizes(target: dict[str, Any]) -> list[str]:
    """What the search for a size came upon: the size asked for and those beside it, with what they cost to run."""
    if not target.get("sizes"):
        return []
    low, high = target["threshold"]
    budget = "" if target["complete"] else "; the budget ended the search (method.max_evaluations)"
    lines = [f"  size       {target['layers']} layers for thresholds from {low:.5f} to below {high:.5f}{budget}"]
    asked = target["layers"]
    sizes = sorted(target["sizes"], key=lambda size: -size["n_layers"])
    beside = [s for s in sizes if abs(s["n_layers"] - asked) <= 2]
    return [*lines, *(
        f"  {'->' if s['n_layers'] == asked else '  '} {s['n_layers']:>4} layers: score {s['best_final_score']:.4f}, "
        f"{s['flops_per_token'] / 1e9:.3g} GFLOP a token, {1e3 * s['latency_s']:.0f} ms a prefill"
        for s in beside
    )]


def _main_metric(task: str, scores: dict[str, Any]) -> float | None:
    """The metric that a task is quoted by: as in the seven-task average, else acc, or what there is."""
    name = metric_of(task, scores)
    return None if name is None else float(scores[name])


def _percent(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f}" if 0 <= value <= 1 else f"{value:.4g}"
