"""What a column can show: numbers of a record, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from slm_exp.core.errors import ConfigError, did_you_mean
from slm_exp.core.files import digest
from slm_exp.evaluation.base import SEVEN
from slm_exp.evaluation.protocol import Stored
from slm_exp.evaluation.report import SpeedCase, Spread, metric_of
from slm_exp.runs.schema import Estimated
from slm_exp.runs.statistics.runs import Measured
from slm_exp.runs.statistics.scores import estimate, main_score, stderr_of_mean
from slm_exp.runs.statistics.verdict import verdict_of
from slm_exp.tables.facts import agreement

Value = float | str | None


@dataclass(frozen=True)
class Quantity:
    """One kind of number."""

    label: str
    """The column's heading."""
    value: Callable[[Measured], Value]
    digits: int = 0
    """Decimals shown."""
    stderr: Callable[[Measured], float | None] = lambda _: None
    tasks: tuple[str, ...] = ()
    """The tasks whose documents a difference is tested on; none: no test, so no row is marked."""
    protocol: Callable[[Measured], Stored] = lambda _: None
    """`{hash, fields}` of what it was measured by; numbers of different hashes do not stand in one column."""
    spread: str = "error"
    """What `stderr` is: a standard error over documents, or half the distance of the `quartiles`."""


def _sided(dense: Callable[[Measured], Value], compressed: Callable[[Measured], Value]) -> Callable[[Measured], Value]:
    return lambda m: dense(m) if m.which == "dense" else compressed(m)


def _scaled(value: Callable[[Measured], float | None], factor: float) -> Callable[[Measured], float | None]:
    return lambda m: None if (found := value(m)) is None else factor * found


def _compressed(value: Callable[[Measured], Value]) -> Callable[[Measured], Value]:
    return _sided(lambda _: None, value)


def _task(name: str) -> Quantity:
    def stderr(m: Measured) -> float | None:
        found = estimate(m.scores(name), metric_of(name, m.scores(name)) or "")
        return found.stderr if found else None

    value = _scaled(lambda m: main_score(name, m.scores(name)), 100)
    return Quantity(name, value, 2, _scaled(stderr, 100), (name,), _protocol)


def _protocol(m: Measured) -> Stored:
    return m.evaluation.protocol or None


PAPERS_CASE = "1x12x128"
"""Batch x prompt x new tokens of the papers' latency."""


def _speed(name: str, case: str = PAPERS_CASE) -> Quantity:
    """Medians; the dense model's speedup over itself is left out."""
    label, factor, digits = TIMED[name]

    def found(m: Measured) -> Spread | int | float | None:
        cell = next((cell for cell in m.record.speed.cells if cell.name == case), SpeedCase())
        if name == "speedup":
            return cell.speedup if m.which == "compressed" else None
        return getattr(cell.dense if m.which == "dense" else cell.compressed, name)

    def value(m: Measured) -> float | None:
        number = found(m)
        number = number.median if isinstance(number, Spread) else number
        return None if number is None else factor * number

    def half(m: Measured) -> float | None:
        number = found(m)
        return factor * (number.q3 - number.q1) / 2 if isinstance(number, Spread) else None

    def protocol(m: Measured) -> Stored:
        stated = m.record.speed.protocol
        fields = {**stated, "machine": m.record.device.name or None}
        return {"hash": digest(fields), "fields": fields} if stated else None

    return Quantity(label if case == PAPERS_CASE else f"{label} {case}", value, digits, half, (), protocol, "quartiles")


def _plan(m: Measured) -> str | None:
    """`14-15, 25-27; without 3, attention of 7`: merged runs of layers, then what is removed."""
    plan = m.record.plan
    if not plan:
        return None
    return "; ".join(filter(None, (plan.merged, plan.removed and f"without {plan.removed}"))) or "nothing"


def _idle(m: Measured) -> float | None:
    """Per cent of the parameters that are gone, or stand in the checkpoint as removed sublayers' zeros."""
    params = m.record.params
    if not params.before or params.after is None:
        return None
    return 100 * (params.before - params.after + params.zeroed) / params.before


def _threshold(m: Measured) -> Value:
    planned: Value = m.record.plan.threshold
    return m.record.setting("method.threshold") if planned is None else planned


def _target(m: Measured) -> str | None:
    """`26 layers`, `18.8 %`: what was requested in place of a threshold; null where a threshold was."""
    method = m.record.config.get("method") or {}
    for key, value in method.items():
        if key.startswith("target_") and value is not None:
            share = key == "target_ratio" and isinstance(value, float)
            return f"{100 * value:.3g} %" if share else f"{value} {key.removeprefix('target_')}"
    return None


def _kept(m: Measured) -> float | None:
    """Per cent of the dense model's average, as the same run measured it."""
    dense, small = (side.average for side in m.record.eval.both)
    return 100 * small / dense if dense and small is not None else None


def perplexity_ratio(m: Measured) -> Estimated | None:
    return verdict_of(m.run).perplexity_ratio


NAMED = {
    "layers": Quantity("layers", _sided(lambda m: m.record.layers.before, lambda m: m.record.layers.after)),
    "params": Quantity("params (M)", _sided(_scaled(lambda m: m.record.params.before, 1e-6),
                                            _scaled(lambda m: m.record.params.after, 1e-6)), 1),
    "parameters": Quantity("params", _sided(lambda m: m.record.params.before, lambda m: m.record.params.after)),
    "removed": Quantity("removed (%)", _sided(lambda _: 0.0, _scaled(lambda m: m.record.params.ratio_removed, 100)), 1),
    "removed_or_zeroed": Quantity("removed or zeroed (%)", _sided(lambda _: 0.0, _idle), 1),
    "score": Quantity("score", _compressed(lambda m: m.record.plan.final_score), 4),
    "plan": Quantity("plan", _compressed(_plan)),
    "agrees": Quantity("as published", _compressed(agreement)),
    "target": Quantity("target", _compressed(_target)),
    "threshold": Quantity("threshold", _compressed(_threshold), 4),
    "evaluations": Quantity("candidates", _compressed(lambda m: m.record.plan.evaluations)),
    "block_forwards": Quantity("block forwards", _compressed(lambda m: m.record.plan.block_forwards)),
    "seconds": Quantity("seconds", lambda m: m.record.seconds),
    "average": Quantity("average", _scaled(lambda m: m.evaluation.average, 100), 2, _scaled(
        lambda m: stderr_of_mean(estimate(m.scores(task), metric) for task, metric in SEVEN.items()), 100),
        tuple(SEVEN), _protocol),
    "kept": Quantity("kept (%)", _sided(lambda _: 100.0, _kept), 1, protocol=_protocol),
    "ppl_ratio": Quantity("ppl ratio", _compressed(lambda m: r.value if (r := perplexity_ratio(m)) else None), 2,
                          lambda m: r.stderr if m.which != "dense" and (r := perplexity_ratio(m)) else None,
                          protocol=_protocol),
    "verdict": Quantity("verdict", _compressed(lambda m: verdict_of(m.run).outcome or None)),
    **{name: _task(name) for name in SEVEN},
}
TIMED = {  # field of a cell of the record's `speed` -> (heading, factor, decimals)
    "latency_s": ("latency (s)", 1.0, 2), "tokens_per_s": ("tokens/s", 1.0, 1),
    "first_token_s": ("first token (s)", 1.0, 3), "peak_bytes": ("memory (GB)", 1e-9, 2),
    "flops": ("GFLOP", 1e-9, 1), "speedup": ("speedup", 1.0, 2),
}
FAMILIES = {
    "speed": f"{', '.join(TIMED)} of generating, medians; .BATCHxPROMPTxNEW for another case than {PAPERS_CASE}",
    "task": "an lm-eval task besides the seven, by the metric that counts for it: task.sciq",
    "perplexity": "a corpus of the evaluation: perplexity.wikitext2",
    "config": "a setting: config.method.target_layers",
}


def quantity(name: str) -> Quantity:
    """A quantity by a name that `check_quantity` accepts."""
    if name in NAMED:
        return NAMED[name]
    family, _, rest = name.partition(".")
    if family == "task":
        return _task(rest)
    if family == "perplexity":
        return Quantity(f"ppl {rest}", lambda m: m.evaluation.perplexity.get(rest), 2, protocol=_protocol)
    if family == "speed":
        return _speed(*rest.split(".", 1))
    return Quantity(rest.removesuffix(".name"), _compressed(
        lambda m: value if isinstance(value := m.record.setting(rest), float | int | str | None) else str(value)))


def check_quantity(name: str, where: str, more: Iterable[str] = ()) -> None:
    """Refuse a column that does not exist. `more`: other names that would do at this place. Raises ConfigError: names
    it, where it was named, and the closest that exists."""
    family, _, rest = name.partition(".")
    known = family in FAMILIES and bool(rest) and (family != "speed" or rest.partition(".")[0] in TIMED)
    if name not in NAMED and not known:
        kinds = "; ".join(f"{kind}.NAME ({about})" for kind, about in FAMILIES.items())
        names = list(dict.fromkeys([*more, "tasks", *NAMED]))
        raise ConfigError(f"{where} = {name}; expected one of {', '.join(names)}; or {kinds}. "
                          f"{did_you_mean(name, [*names, *(f'speed.{t}' for t in TIMED)])}".rstrip())
