"""lm-eval's index of task files: which tasks there are, and where each reads its data. lm-eval loads on first use."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import random
import re
import statistics
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

BUNDLED_FOLDERS = (
    "super_glue/boolq", "piqa", "hellaswag", "winogrande", "arc", "openbookqa", "commonsense_qa", "siqa", "sciq",
    "super_glue/copa", "super_glue/cb", "glue/rte", "glue/sst2", "glue/mrpc", "nq_open", "mmlu/default", "gsm8k",
    "triviaqa", "lambada", "race", "wsc273",
)  # fmt: skip
"""Where lm-eval defines the tasks whose documents can come with the assets."""

_NAMED = re.compile(r"""^\s*(?:-\s+)?(?:["']?(?:task|group|tag)["']?:|-)[ \t]*["']?([^\s"'#,\[\]]+)""", re.MULTILINE)


@cache
def task_manager(bundled: bool) -> TaskManager:
    """lm-eval's index of task files: of the bundled tasks' folders in 0.3 s, or of all in 10 s."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    if not bundled:
        return TaskManager()
    root = Path(lm_eval.__file__).parent / "tasks"
    with quiet():  # a tag that several folders share is no news
        return TaskManager(include_defaults=False, include_path=[root / folder for folder in BUNDLED_FOLDERS])


def bundled_tasks() -> set[str]:
    """Names that the bundled tasks' folders define."""
    return set(task_manager(True).all_tasks)


def task_names() -> set[str]:
    """Every task, group and tag lm-eval knows; 10 s at the first call."""
    with quiet():
        return set(task_manager(False).all_tasks)


@cache
def written_names() -> set[str]:
    """Every name that a file of lm-eval's tasks may define, and some more words: read from the files' text in half a
    second, lm-eval not loaded. A name that is not among these is none of `task_names`."""
    spec = importlib.util.find_spec("lm_eval")
    names: set[str] = set()
    for path in (Path((spec.submodule_search_locations or [""])[0]) / "tasks").rglob("*") if spec else ():
        if "yaml" in path.name or ("." not in path.name and path.is_file()):
            names.update(_NAMED.findall(path.read_text(encoding="utf-8", errors="replace")))
    return names


def data_set(task: str) -> str | None:
    """The hub data set of a task, by its file; None for groups, files and tasks that bring their data."""
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = task_manager(task in bundled_tasks()).task_index.get(task)
    if entry is None or entry.yaml_path is None:
        return None
    path = load_yaml(entry.yaml_path, resolve_func=False, recursive=True).get("dataset_path")
    return path if isinstance(path, str) and "/" in path and not Path(path).exists() else None


def stock_config(task: str) -> dict[str, Any]:
    """lm-eval's definition of a bundled task, as its file has it."""
    from lm_eval.tasks._yaml_loader import load_yaml

    return dict(load_yaml(task_manager(True).task_index[task].yaml_path, resolve_func=True, recursive=True))


def _bootstrap(f: Callable[[Any], float], xs: Any, iters: int) -> float:
    draw = random.Random(0)  # lm-eval's seed of the first thousand
    return statistics.stdev(float(f(draw.choices(xs, k=len(xs)))) for _ in range(iters))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No bars and no chatter of lm-eval and datasets. Errors still show.

    Standard errors that have no closed form are bootstrapped here, in this process: lm-eval's own draws the same
    numbers in a pool of processes, and prints.
    """
    import datasets
    import lm_eval.api.metrics
    import lm_eval.api.model
    import lm_eval.api.task

    bars, level, tqdm = datasets.are_progress_bars_disabled(), logging.getLogger("lm_eval").level, lm_eval.api.task.tqdm
    bootstrap = lm_eval.api.metrics.bootstrap_stderr
    lm_eval.api.metrics.bootstrap_stderr = _bootstrap
    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = lm_eval.api.model.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = lm_eval.api.model.tqdm = tqdm
        lm_eval.api.metrics.bootstrap_stderr = bootstrap
        logging.getLogger("lm_eval").setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
