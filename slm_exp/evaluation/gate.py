"""The dense gate: a dense model that does not measure as it is known to is no model to compress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from slm_exp.core.errors import ProtocolError
from slm_exp.evaluation.report import SEVEN, EvalReport

CHECK = ("Check the model (path, revision, dtype), BOS (evaluation.add_bos, evaluation.ppl_bos), the documents "
         "(evaluation.limit, the protocol's task versions) and the range itself; ~evaluation.dense_range.NAME takes "
         "one away.")


def check_range(report: EvalReport, known: Mapping[str, Sequence[float]]) -> None:
    """Compare a dense model's report with what it is known to reach.

    Args:
        known: `average`, a task or a corpus -> [low, high], both allowed; per cent, or perplexity for a corpus.
    Raises:
        ProtocolError: every value outside its range: expected, got, and what to check.
    """
    outside = []
    for name, (low, high) in known.items():
        got = _measured(report, name)
        if got is None or not low <= got <= high:
            outside.append(f"{name}: expected {low:g} to {high:g}, got {'nothing' if got is None else f'{got:.4g}'}")
    if outside:
        raise ProtocolError(f"the dense model is outside evaluation.dense_range: {'; '.join(outside)}. {CHECK}")


def _measured(report: EvalReport, name: str) -> float | None:
    """Per cent, or perplexity; None where the report has no such number."""
    if name in report.perplexity:
        return report.perplexity[name]
    metrics = report.tasks[name].metrics if name in report.tasks else {}
    counting = next((m for m in (SEVEN.get(name), "acc", "acc_norm") if m in metrics), "")
    value = report.average if name == "average" else metrics.get(counting or "")
    return None if value is None else 100 * value
