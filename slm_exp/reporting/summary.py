"""What a run says on one screen when it ends."""

from __future__ import annotations

from pathlib import Path

from slm_exp.core.files import JsonObject, plain
from slm_exp.runs.schema import Record, SizeTarget, SpeedCase
from slm_exp.runs.statistics.scores import main_score


def summary(finished: JsonObject, folder: Path) -> str:
    """Sizes, scores dense and compressed, where the time went, where things lie, what to do next."""
    record = Record.of(plain(finished))
    plan, layers, params, (dense, small) = record.plan, record.layers, record.params, record.eval.both
    removed = f"; removed {plan.removed}" if plan.removed else ""
    note = f" ({record.model.note})" if record.model.note else ""
    lines = [
        f"run {record.run_id} finished in {record.seconds or 0:.0f} s",
        f"  model      {record.model.name}{note}",
        f"  layers     {layers.before} -> {layers.after}, merged {plan.merged or 'none'}{removed}",
        f"  parameters {(params.before or 0) / 1e6:.1f} M -> {(params.after or 0) / 1e6:.1f} M"
        f" ({params.ratio_removed or 0:.1%} removed)",
    ]
    if plan.final_score is not None:
        lines.append(f"  score      {plan.final_score:.4f} by {plan.similarity} ({plan.evaluations} candidates)")
    lines += _sizes(plan.target)
    if small.tasks:
        lines.append(f"  {'task':<16} {'dense':>7} {'compressed':>11}")
        for task, scores in small.tasks.items():
            lines.append(f"  {task:<16} {_percent(main_score(task, dense.scores(task))):>7} "
                         f"{_percent(main_score(task, scores)):>11}")
        lines.append(f"  {'average':<16} {_percent(dense.average):>7} {_percent(small.average):>11}")
        lines.append("  (percent; hellaswag, arc_challenge, openbookqa by acc_norm; standard errors in the report)")
    for corpus, value in small.perplexity.items():
        before = dense.perplexity.get(corpus)
        lines.append(f"  perplexity {corpus}: {_perplexity(before)} -> {_perplexity(value)}")
    if small.text:
        one, other = dense.text, small.text
        lines.append(f"  free text  ends by itself {_percent(one.ended)} -> {_percent(other.ended)}, distinct runs of "
                     f"three {_percent(one.distinct_3)} -> {_percent(other.distinct_3)} (percent)")
    lines += [_speed(cell) for cell in record.speed.cells]
    slow = sorted(record.stages, key=lambda s: -s.seconds)[:3]
    lines.append("  time       " + ", ".join(f"{s.name} {s.seconds:.0f} s" for s in slow))
    lines += [f"  warning    {w}" for w in record.warnings]
    lines.append(f"  report     {folder / 'report.html'}")
    return "\n".join(lines)


def _speed(cell: SpeedCase) -> str:
    """One shape of generation: seconds, dense and compressed, and how many times faster, with quartiles."""
    case = f"  speed      batch {cell.batch}, {cell.prompt} tokens in, {cell.new} out: "
    before, after, times = cell.dense.latency_s, cell.compressed.latency_s, cell.speedup
    if cell.error or not (before and after and times):
        return case + cell.error
    return case + (f"{before.median:.3g} s -> {after.median:.3g} s, {times.median:.2f} times faster ({times.q1:.2f} to "
                   f"{times.q3:.2f})")


def _sizes(target: SizeTarget) -> list[str]:
    """What the search for a size found: the size requested and those beside it, with what they cost to run."""
    ends = target.threshold if isinstance(target.threshold, list) else []
    if not target.sizes or target.layers is None or len(ends) != 2:
        return []
    low, high = ends
    budget = "" if target.complete else "; the budget ended the search (method.max_evaluations)"
    lines = [f"  size       {target.layers} layers for thresholds from {low:.5f} to below {high:.5f}{budget}"]
    near = [size for size in target.sizes if abs(size.n_layers - target.layers) <= 2]
    return [*lines, *(
        f"  {'->' if s.n_layers == target.layers else '  '} {s.n_layers:>4} layers: "
        f"score {s.best_final_score or 0:.4f}, {(s.flops_per_token or 0) / 1e9:.3g} GFLOP a token, "
        f"{1e3 * (s.latency_s or 0):.0f} ms a prefill" for s in sorted(near, key=lambda size: -size.n_layers))]


def _percent(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f}" if 0 <= value <= 1 else f"{value:.4g}"


def _perplexity(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
