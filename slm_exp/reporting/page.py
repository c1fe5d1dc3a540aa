"""`report.html`: one run on one self-contained page, from what it left in its folder. Nothing is recomputed."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_exp.core.errors import SlmError
from slm_exp.core.files import write_text
from slm_exp.core.types import LayerSimilarity, MergePlan
from slm_exp.reporting import charts, results
from slm_exp.runs.record import load_record
from slm_exp.runs.sweep import state_of

if TYPE_CHECKING:
    from jinja2 import Environment


def write_report(folder: Path, record: dict[str, Any] | None = None) -> Path:
    """Write `folder/report.html` and return its path. Takes a fraction of a second.

    Args:
        record: the run's record while it is not yet the one on disk; else record.json is read. A failed or running
            record makes a page too, of what there is.

    Raises:
        SlmError: no readable record.json.
    """
    if record is None:
        record = load_record(folder)
    plan = MergePlan.from_json(record["plan"]) if record.get("plan") else None
    page = environment().get_template("run.html.j2").render(
        record=record,
        state=state_of(folder, record),
        plan=plan,
        method=(record.get("config") or {}).get("method", {}).get("name", ""),
        charts=charts,
        matrix=_matrix(folder),
        widths=_widths(plan),
        advice=advice(record),
        config_yaml=_config_yaml(folder, record),
        **_results(folder, record),
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


@functools.cache
def environment() -> Environment:
    """Jinja2 with this package's templates and number formats; everything is escaped, a misspelt name is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    env = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
                      trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"percent": percent, "signed": signed, "duration": duration, "setting": setting}
    env.globals["size_change"] = size_change
    return env


def percent(value: float | None, digits: int = 1) -> str:
    """0.4571 -> 45.7; a dash for None."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def setting(path: str) -> str:
    """A config path as an override writes it: `method.threshold`, `merge_rule`."""
    return path.removesuffix("/name").replace("/", ".")


def signed(value: float) -> str:
    """-0.05 -> −5.0, in percentage points."""
    rounded = round(100 * value, 1)
    return f"{'+' if rounded > 0 else '−' if rounded < 0 else ''}{abs(rounded):.1f}"


def size_change(before: int, after: int) -> tuple[str, str]:
    """134515008, 123894720 -> ("134.5", "123.9 M"): one unit, that of the larger."""
    unit, factor, digits = next((u, f, d) for u, f, d in (("B", 1e9, 2), ("M", 1e6, 1), ("k", 1e3, 1), ("", 1, 0))
                                if max(before, after) >= f or f == 1)
    return f"{before / factor:.{digits}f}", f"{after / factor:.{digits}f} {unit}".rstrip()


def duration(seconds: float | None) -> str:
    """158.52 -> 2 min 39 s."""
    if seconds is None:
        return "–"
    if seconds < 10:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def advice(record: dict[str, Any]) -> list[str]:
    """What to do about a failed run; empty for any other."""
    error = record.get("error")
    if record.get("status") != "failed" or not error:
        return []
    said = f"{error.get('type')} {error.get('message')}".lower()
    out = []
    if "memory" in said:
        out.append("Ask for less memory: evaluation.batch_size=1, model.dtype=bfloat16, a smaller "
                   "calibration.n_samples, or runtime=cpu; model.device_map=auto spreads a model over several GPUs.")
    elif "no space left" in said:
        out.append("Free disk space, or write elsewhere: hydra.run.dir=FOLDER, cache.dir=FOLDER.")
    elif error.get("type") == "KeyboardInterrupt":
        out.append("The run was interrupted from outside.")
    elif str(error.get("type")).endswith("Error") and error.get("type") in _named_errors():
        out.append("The message above names the setting and the remedy.")
    else:
        out.append("This is not a mistake in the settings that slm_exp knows. The traceback is at the end of run.log.")
    done = [stage["name"] for stage in record.get("stages", [])]
    if done:
        out.append(f"Then repeat the command: {', '.join(done)} finished, and what the cache holds of them is not "
                   "computed again.")
    else:
        out.append("Then repeat the command.")
    return out


def _named_errors() -> set[str]:
    return {cls.__name__ for cls in SlmError.__subclasses__()}


def _widths(plan: MergePlan | None) -> dict[str, list[int]]:
    """What is left of every layer, by what it counts; empty where layers kept their width."""
    if not plan or not plan.width:
        return {}
    sizes = plan.width.sizes
    return {"Heads": sizes.heads, "Key-value heads": sizes.kv_heads, "MLP channels": sizes.channels}


def _matrix(folder: Path) -> LayerSimilarity | None:
    try:
        return LayerSimilarity.load(folder)
    except (OSError, ValueError, KeyError):  # a failed run may have none
        return None


def _config_yaml(folder: Path, record: dict[str, Any]) -> str:
    try:
        return (folder / "config.yaml").read_text(encoding="utf-8")
    except OSError:
        return json.dumps(record.get("config"), indent=1, ensure_ascii=False)  # YAML holds JSON


def _results(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    evaluation = record.get("eval") or {}
    rows = results.compare(evaluation, folder / "samples")
    sides = [evaluation.get(which) or {} for which in ("dense", "compressed")]
    texts = [side.get("perplexity") or {} for side in sides]
    protocol: dict[str, Any] = next((side["protocol"] for side in reversed(sides) if side.get("protocol")), {})
    return {
        "rows": rows,
        "average": results.average(evaluation, rows),
        "perplexity": {corpus: [text.get(corpus) for text in texts] for corpus in {**texts[0], **texts[1]}},
        "protocol": protocol,
    }
