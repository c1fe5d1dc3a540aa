"""`report.html`: one run on one self-contained page, from what it left in its folder. Nothing is recomputed."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from slm_exp.core.errors import SlmError
from slm_exp.core.files import JsonObject, plain, write_text
from slm_exp.core.format import duration, places, rounded, rounded_pair, signed
from slm_exp.evaluation.base import SEVEN
from slm_exp.reporting import charts, results, svg
from slm_exp.reporting.results import Comparison
from slm_exp.reporting.rows import setting
from slm_exp.runs.record import Run, say_unverified
from slm_exp.runs.schema import Estimated, Record
from slm_exp.runs.statistics.paired import Difference
from slm_exp.runs.statistics.scores import Estimate, estimate
from slm_exp.runs.statistics.verdict import times, verdict_of

log = logging.getLogger(__name__)


def write_report(folder: Path, record: JsonObject | None = None, verify: bool = False, run: Run | None = None) -> Path:
    """Write `folder/report.html` and return its path. Takes a fraction of a second.

    Args:
        record: the run's record while it is not yet the one on disk; else record.json is read. A failed or running
            record makes a page too, of what there is.
        verify: check the digests of large files too.
        run: the run, if it was read already.
    Raises SlmError: no readable record.json.
    """
    if run is None:
        run = Run.read(folder, verify) if record is None else Run(folder, Record.of(plain(record)), on_disk=False)
    shown, measured, rows = run.record, run.record.eval, results.compare(run)
    sizes = shown.plan.width.sizes
    average = results.average(run, rows)
    widths = {"Heads": sizes.heads, "Key-value heads": sizes.kv_heads, "MLP channels": sizes.channels}
    text = environment().get_template("run.html.j2").render(
        run=run, record=shown, plan=run.plan, charts=charts, svg=svg, matrix=run.similarity, advice=advice(shown),
        widths={name: column for name, column in widths.items() if column},  # empty where layers kept theirs
        config_yaml=run.config_yaml or json.dumps(shown.config, indent=1, ensure_ascii=False),  # YAML holds JSON
        unverified=say_unverified([run]), rows=rows, average=average, verdict=verdict_of(run),
        left_out=left_out(run, rows, average),
        estimate=estimate,
        perplexity={corpus: [side.perplexity.get(corpus) for side in measured.both]
                    for corpus in {**measured.dense.perplexity, **measured.compressed.perplexity}},
        texts=results.free_texts(run), others=results.other_metrics(measured),
        protocol=measured.compressed.protocol or measured.dense.protocol)
    path = folder / "report.html"
    write_text(path, text)
    return path


@functools.cache
def environment() -> Environment:
    """Jinja2 with this package's templates and number formats; everything is escaped, a misspelt name is an error."""
    env = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
                      trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"percent": percent, "estimated": estimated, "ends": ends, "duration": duration, "setting": setting,
                    "times": times}
    env.globals |= {"size_change": size_change, "drawn": drawn, "broken": broken}
    return env


def drawn(draw: Callable[..., Markup], *args: object) -> Markup:
    """A picture; where it cannot be drawn, why: the rest of the page is worth having."""
    try:
        return draw(*args)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        log.warning("%s could not be drawn: %s: %s", draw.__name__, type(error).__name__, error)
        return Markup('<p class="said">This picture could not be drawn ({}: {}). The numbers are in record.json.</p>'
                      ).format(type(error).__name__, error)


def left_out(run: Run, rows: Sequence[Comparison], average: Comparison | None) -> list[str]:
    """What a page of a run usually has and this one has not, each with the reason."""
    record, plan, out = run.record, run.plan, []
    ended = f"; it {'is' if run.state == 'running' else 'ended'} in stage {record.stage or record.error.stage or '?'}"
    why = "" if run.state in ("finished", "damaged") else ended
    if plan is None:
        out.append("Plan: the run has none that can be read" + why + ".")
    elif not plan.trace:
        out.append(f"Candidates: {plan.method} kept no scores of single candidates.")
    if run.similarity is None:
        out.append(f"Layer similarity: similarity.npz is not in this folder or cannot be read{why}.")
    if not record.eval.compressed.tasks and not record.eval.compressed.perplexity:
        none = record.setting("evaluation.name") == "none"
        out.append("Evaluation: " + ("evaluation=none measures nothing." if none else
                                     f"nothing was measured of the compressed model{why}."))
    elif rows and average is None:
        apart = results.protocols_differ(record.eval)
        lacking = [task for task in SEVEN if task not in {row.task for row in rows if row.dense and row.compressed}]
        out.append("Seven-task average: " + (f"{apart}." if apart else f"{', '.join(lacking)} not measured{why}."))
    return out


def percent(value: float | None, digits: int = 1) -> str:
    """0.4571 -> 45.7; a dash for None."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def estimated(found: Estimate | Difference | Estimated | None, factor: float = 100, digits: int = 1,
              sign: bool = False) -> Markup:
    """`40.7 ± 3.5`, rounded as the error is; a dash for None. A share in per cent, a difference in points."""
    if found is None:
        return Markup("–")
    error = None if found.stderr is None else factor * found.stderr
    value, error_text = rounded_pair(factor * found.value, error, digits)
    value = typographic(value, sign)
    return Markup("{} <span class=err>± {}</span>").format(value, error_text) if error_text else Markup(value)


def ends(found: Difference) -> str:
    """The interval of a difference, in points, as precise as its error."""
    digits = places(100 * found.value, 100 * (found.stderr or 0), 1)
    return ", ".join(typographic(rounded(100 * end, digits), True) for end in (found.low, found.high)
                     if end is not None)


def typographic(number: str, sign: bool = False) -> str:
    """With a true minus, and a plus where it is asked for."""
    return (signed(number) if sign else number).replace("-", "−")


def broken(name: str) -> Markup:
    """A setting's name that may go on in a next line behind its dots and underscores."""
    return Markup(escape(name).replace(".", Markup(".<wbr>")).replace("_", Markup("_<wbr>")))


def size_change(before: int, after: int) -> tuple[str, str]:
    """134515008, 123894720 -> ("134.5", "123.9 M"): one unit, that of the larger."""
    unit, factor, digits = next((u, f, d) for u, f, d in (("B", 1e9, 2), ("M", 1e6, 1), ("k", 1e3, 1), ("", 1, 0))
                                if max(before, after) >= f or f == 1)
    return f"{before / factor:.{digits}f}", f"{after / factor:.{digits}f} {unit}".rstrip()


def advice(record: Record) -> list[str]:
    """What to do about a failed run; empty for any other."""
    error = record.error
    if record.status != "failed" or not error:
        return []
    text = f"{error.type} {error.message}".lower()
    out = []
    if "memory" in text:
        out.append("Ask for less memory: evaluation.batch_size=1, model.dtype=bfloat16, a smaller "
                   "calibration.n_samples, or runtime=cpu; model.device_map=auto spreads a model over several GPUs.")
    elif "no space left" in text:
        out.append("Free disk space, or write elsewhere: hydra.run.dir=FOLDER, cache.dir=FOLDER.")
    elif error.type == "KeyboardInterrupt":
        out.append("The run was interrupted from outside.")
    elif error.type in {cls.__name__ for cls in SlmError.__subclasses__()}:
        out.append("The message above names the setting and the remedy.")
    else:
        out.append("This is not a mistake in the settings that slm_exp knows. The traceback is at the end of run.log.")
    done = ", ".join(stage.name for stage in record.stages)
    rest = f": {done} finished, and what the cache holds of them is not computed again." if done else "."
    return [*out, f"Then repeat the command{rest}"]
