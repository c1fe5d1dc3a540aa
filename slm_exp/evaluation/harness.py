"""lm-eval through its Python API: its own task definitions, asked on documents that are already here."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from slm_exp.errors import DataError
from slm_exp.evaluation.base import SEVEN
from slm_exp.evaluation.documents import HUB, Documents, local_documents, remedy
from slm_exp.files import digest

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from slm_exp.evaluation.backends.hflm import CheckedHFLM

log = logging.getLogger(__name__)

SEVEN_FOLDERS = ("super_glue/boolq", "piqa", "hellaswag", "winogrande", "arc", "openbookqa")
FEWSHOT_SEED = 1234  # lm-eval's own default; the seven tasks are asked zero-shot and do not use it
BOOTSTRAP = 1000  # draws for metrics without a closed-form standard error; means have one


class TaskResults(NamedTuple):
    """What lm-eval found, reduced to what a report keeps."""

    tasks: dict[str, dict[str, Any]]
    samples: dict[str, list[dict[str, Any]]]
    protocol: dict[str, Any]
    """task -> {version, metric, n, num_fewshot, documents, document_ids}: digests of contents and ids, in order."""
    sources: dict[str, str]
    """task -> where its documents came from."""
    settings: dict[str, Any]
    """What else shapes a request: {add_bos, max_length}."""


def run_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: list[str], limit: int | None = None,
    batch_size: int | None = None, add_bos: bool | None = None, random_model: bool = False, backend: str = "fast",
) -> TaskResults:
    """Ask a model in memory the first `limit` documents of each task.

    Model and tokenizer are left as they are. lm-eval's response cache is not used: it knows models by name alone.

    Raises:
        DataError: documents that cannot be had, or a model that gives NaN or infinite logits.

    Cost: on two CPU cores about as long as the requests' tokens take forwards; building them is milliseconds.
    """
    with quiet():
        from lm_eval.evaluator import evaluate

        lm = language_model(model, tokenizer, batch_size, add_bos, backend)
        loaded, sources = load_tasks(tasks, limit, random_model)
        found = evaluate(lm, loaded, limit=limit, bootstrap_iters=BOOTSTRAP, log_samples=True)
        assert found is not None  # None is for the other ranks of a distributed run
        samples = {name: [_row(loaded["tasks"][name], example) for example in examples]
                   for name, examples in found["samples"].items()}
    results = {name: _metrics(found["results"][name]) for name in found["results"]}
    protocol = {
        name: {
            "version": found["versions"].get(name), "metric": SEVEN.get(name), "n": results[name]["n"],
            "num_fewshot": found["n-shot"].get(name), "documents": digest([row["doc_hash"] for row in rows]),
            "document_ids": digest([row["doc_id"] for row in rows]),
        }
        for name, rows in samples.items()
    }
    settings = {"add_bos": lm.tok_encode("a")[:1] == [lm.tokenizer.bos_token_id], "max_length": lm.max_length}
    return TaskResults(results, samples, protocol, {name: sources.get(name, "hub") for name in samples}, settings)


def language_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int | None = None,
    add_bos: bool | None = None, backend: str = "fast",
) -> CheckedHFLM:
    """lm-eval's interface to a model in memory: its own class, or the fast one. Both refuse NaN and infinite logits."""
    if backend == "fast":
        from slm_exp.evaluation.backends.fast import FastLM

        return FastLM(model, tokenizer, batch_size, add_bos)
    from slm_exp.evaluation.backends.hflm import CheckedHFLM

    return CheckedHFLM(model, tokenizer, batch_size, add_bos)


def load_tasks(tasks: list[str], limit: int | None, random_model: bool = False) -> tuple[Any, dict[str, str]]:
    """Build lm-eval's task objects, asked zero-shot unless they say otherwise.

    Returns:
        What `lm_eval.evaluate` takes, and where the documents of each local task came from.

    Raises:
        DataError: lm-eval could not find the data of a task.
    """
    local = {task: docs for task in tasks if (docs := local_documents(task, limit, random_model)) is not None}
    manager = task_manager(all(task in SEVEN for task in tasks))
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}}
    for task in tasks:
        try:
            if task in local:
                got = manager.load([{"group": f"local_{task}", "task": [_on(task, local[task])]}])
            else:
                got = manager.load([task])
                loaded["groups"].update(got.get("groups", {}))
        except Exception as error:  # datasets raises many kinds for "not there"
            where = f" (data set {HUB[task]})" if task in HUB else ""
            raise DataError(f"the documents of {task}{where} cannot be loaded: {type(error).__name__}: {error}. "
                            + (remedy() if task in SEVEN else "")) from error
        loaded["tasks"].update(got["tasks"])
    for task_object in loaded["tasks"].values():
        if task_object.get_config("num_fewshot") is None:
            task_object.set_config("num_fewshot", 0)
        task_object.set_fewshot_seed(FEWSHOT_SEED)
    return loaded, {task: docs.source for task, docs in local.items()}


def _on(task: str, documents: Documents) -> dict[str, Any]:
    """The stock task with other data: only the asked split exists, so no other may be named."""
    import datasets

    table = datasets.Dataset.from_list(documents.rows)
    splits = dict.fromkeys(("training_split", "validation_split", "test_split"))
    splits["test_split" if documents.split == "test" else "validation_split"] = documents.split
    return {"task": task, "custom_dataset": lambda **_: {documents.split: table}, **splits}


@cache
def task_manager(only_seven: bool) -> TaskManager:
    """lm-eval's index of task files: of six folders in 0.1 s, or of all in 10 s."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    if not only_seven:
        return TaskManager()
    root = Path(lm_eval.__file__).parent / "tasks"
    return TaskManager(include_defaults=False, include_path=[root / folder for folder in SEVEN_FOLDERS])


def task_names() -> set[str]:
    """Every task, group and tag lm-eval knows; 10 s at the first call."""
    with quiet():
        return set(task_manager(only_seven=False).all_tasks)


def _metrics(found: dict[str, Any]) -> dict[str, Any]:
    """`acc,none` -> acc and `acc_stderr,none` -> acc_stderr; other filters keep their name. n last."""
    out: dict[str, Any] = {}
    for key, value in found.items():
        metric, comma, chosen = key.partition(",")
        if comma:
            out[metric if chosen == "none" else f"{metric}({chosen})"] = None if value == "N/A" else float(value)
    out["n"] = int(found["sample_len"]) if "sample_len" in found else None
    return out


def _row(task: Any, example: dict[str, Any]) -> dict[str, Any]:
    """One document's result. Raises DataError where a log-likelihood is not finite."""
    row: dict[str, Any] = {"doc_id": example["doc_id"], "doc_hash": example["doc_hash"], "target": example["target"]}
    if example["filter"] != "none":
        row["filter"] = example["filter"]
    if task.OUTPUT_TYPE == "multiple_choice":
        doc = example["doc"]
        choices = task.doc_to_choice(doc)
        target = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        row["target"] = choices.index(target) if target in choices else target  # some tasks name the answer's text
        row["loglikelihoods"] = [float(score) for score, _ in example["filtered_resps"]]
        if not all(map(math.isfinite, row["loglikelihoods"])):
            raise DataError(f"{task.config.task}, document {row['doc_id']}: log-likelihoods {row['loglikelihoods']} "
                            "are not finite, so the model has no accuracy.")
    else:
        row["answers"] = example["filtered_resps"]
    return row | {metric: example[metric] for metric in example["metrics"]}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Only one progress bar, over the requests: no chatter of lm-eval and datasets. Errors still show."""
    import datasets
    import lm_eval.api.task

    bars, level, tqdm = datasets.are_progress_bars_disabled(), logging.getLogger("lm_eval").level, lm_eval.api.task.tqdm
    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = tqdm
        logging.getLogger("lm_eval").setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
