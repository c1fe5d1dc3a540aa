"""The `tracking` group: mirrors a run's record somewhere people look."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from slm_exp.core.errors import ConfigError, require
from slm_exp.core.files import JsonObject, plain
from slm_exp.core.registry import Component
from slm_exp.runs.record import failure

log = logging.getLogger(__name__)

PROVENANCE = ("run_id", "overrides", "command", "versions", "git", "plugins")
"""Of the record, beside the config itself."""
PROJECT = "slm_exp"
LONGEST_NAME = 128
Scalar = str | int | float | bool


class Tracker:
    """What the pipeline tells a tracker, and the one that keeps nothing; the record on disk is the truth, this is a
    mirror.

    No method raises because the place that is written to fails: a mirror that breaks costs a warning, not the run.
    """

    def close(self, failed: bool) -> None:
        """The run has ended."""

    def log(self, section: JsonObject) -> None:
        """Part of the record (nested); numbers become metrics named by record path with `/`."""

    def image(self, name: str, path: Path) -> None:
        """A picture, by a name like `similarity`."""

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """A table, e.g. the plan or the trace."""


class RunTracker(Tracker):
    """Mirrors to one open run of a library that is told dicts of what it has classes for, as W&B and Trackio are.

    Args:
        called: the library's name, for people.
    """

    def __init__(self, called: str, library: Any, run: Any) -> None:
        self.called, self._library, self._run = called, library, run

    def image(self, name: str, path: Path) -> None:
        mirrored(self.called, lambda: self._run.log({name: self._library.Image(str(path))}))

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        mirrored(self.called, lambda: self._run.log(
            {name: self._library.Table(columns=[*columns], data=plain(rows))}))


@dataclass
class Tracking(Component, ABC):
    """A member of the `tracking` group. How a run is called is a setting of all, so that one is swapped for another."""

    seconds: ClassVar[float] = 0.0
    """About how long it takes of a run, for the forecast."""
    package: ClassVar[str] = ""
    """What must be installed: `pip install 'slm-exp[PACKAGE]'`."""

    project: str | None = None
    """What runs are filed under; null is slm_exp."""
    group: str | None = None
    """Groups runs in the interface; null is the sweep's name in a multirun, else none."""
    run_name: str | None = None
    """Display name; null makes one from the config, e.g. `smollm2_135m-slm-top_layer-0.9`."""
    tags: list[str] = field(default_factory=list)
    """Labels in the interface."""

    def check(self) -> None:
        require(not self.package or importlib.util.find_spec(self.package) is not None, "tracking", self.name,
                "a tracker whose package is installed", f"pip install 'slm-exp[{self.package}]', or use tracking=none.")

    def display_name(self, record: JsonObject) -> str:
        """Of the run, within what a W&B server takes."""
        return (self.run_name or slug(record["config"]))[:LONGEST_NAME]

    @abstractmethod
    def opened(self, record: JsonObject, folder: Path) -> Tracker:
        """A tracker of a run, from the running record (run_id, config, overrides, group). What it raises is taken for
        the reason why it cannot start, unless it is a ConfigError."""

    @contextlib.contextmanager
    def session(self, record: JsonObject, folder: Path) -> Iterator[Tracker]:
        """Open before weights load; always close, told whether an exception passes through. Raises ConfigError: the
        tracker cannot start; names the remedy."""
        try:
            tracker = self.opened(record, folder)
        except ConfigError:
            raise
        except Exception as error:
            words = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise ConfigError(f"tracking = {self.name}; it cannot start: {words}. Use tracking=none to do without."
                              ) from error
        try:
            yield tracker
        except BaseException as error:
            tracker.log({"status": "failed", "error": failure(error)})
            tracker.close(failed=True)
            raise
        tracker.close(failed=False)


def provenance(record: JsonObject) -> JsonObject:
    """The config that a tracker keeps: the run's, and where it came from."""
    return plain({**record["config"], **{k: record[k] for k in PROVENANCE if k in record}})  # type: ignore[no-any-return]


def mirrored(name: str, send: Callable[[], Any]) -> None:
    """Send something to a tracker; where that fails, one warning."""
    try:
        send()
    except Exception as error:
        log.warning("%s: %s: %s. The record in the run's folder is complete.", name, type(error).__name__, error)


def flat(section: JsonObject) -> dict[str, Scalar]:
    """Every scalar of a part of the record by its path, `eval/compressed/tasks/piqa/acc`.

    A list of named dicts is walked by name (`stages/plan/seconds`). Other lists have no place in a metric and are
    left out, as are nulls, NaN and infinities.
    """
    out: dict[str, Scalar] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key, child in value.items():
                walk(child, f"{path}/{key}" if path else key)
        elif isinstance(value, list):
            for child in value:
                if isinstance(child, dict) and "name" in child:
                    walk({k: v for k, v in child.items() if k != "name"}, f"{path}/{child['name']}")
        elif value is not None:
            out[path] = value

    walk(plain(section), "")
    return out


def slug(config: JsonObject) -> str:
    """A readable name of a run from its resolved config: model, method, rule, size requested, and what is unusual.

    `smollm2_135m-slm-top_layer-0.9`, `Llama-2-7b-hf-slm-mean-25layers-cka_rbf-lora`.
    """

    def node(group: str) -> JsonObject:
        return config.get(group) or {}

    def name(group: str, usual: str = "") -> str:
        """The member's name, or nothing where it is the usual one."""
        chosen = str(node(group).get("name", ""))
        return "" if chosen == usual else chosen

    model, similarity, width = name("model"), name("similarity", "flat_cosine"), name("width", "none")
    sizes = {"threshold": "{:g}", "target_layers": "{}layers", "target_ratio": "{:g}less",
             "target_sublayers": "less{}halves", "target_flops": "{:g}flops", "target_latency": "{}"}
    parts = [
        Path(str(node("model").get("path") or model)).name if model == "hf" else model,
        name("method"),
        "" if node("method").get("merge") is False else name("merge_rule"),  # a baseline that merges nothing
        *(form.format(node("method")[key]) for key, form in sizes.items() if node("method").get(key) is not None),
        f"cka_{name('kernel')}" if similarity == "cka" else similarity,
        f"{width}{node('width').get('ratio') or ''}" if width else "",
        name("recovery", "none"),
        f"seed{config['seed']}" if config.get("seed") else "",
    ]
    return "-".join(part for part in parts if part)
