"""lm-eval through its Python API: its own task definitions, asked on documents that are already here."""

from __future__ import annotations

import contextlib
import logging
import math
import random
import statistics
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from slm_exp.core.errors import DataError
from slm_exp.core.files import digest
from slm_exp.evaluation.base import SEVEN
from slm_exp.evaluation.documents import (
    HUB,
    MMLU_GROUPS,
    Documents,
    documents_source,
    local_documents,
    mmlu_subjects,
    remedy,
)

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from slm_exp.evaluation.backends.hflm import CheckedHFLM

log = logging.getLogger(__name__)

BUNDLED_FOLDERS = (
    "super_glue/boolq", "piqa", "hellaswag", "winogrande", "arc", "openbookqa", "commonsense_qa", "siqa", "sciq",
    "super_glue/copa", "super_glue/cb", "glue/rte", "glue/sst2", "glue/mrpc", "nq_open", "mmlu/default",
)  # fmt: skip
"""Where lm-eval defines the tasks whose documents can come with the assets."""
LOCAL = "local_"
"""Names of the groups that only carry other data to lm-eval's loader begin with it."""
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
    loaded_tasks: tuple[Any, dict[str, str]] | None = None,
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
        loaded, sources = loaded_tasks or load_tasks(tasks, limit, random_model)
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
    """Build lm-eval's task objects, asked zero-shot unless they say otherwise. Documents of the asked splits only.

    Returns:
        What `lm_eval.evaluate` takes, and where the documents of each local task came from.

    Raises:
        DataError: lm-eval could not find the data of a task.
    """
    with quiet():
        return _load_tasks(tasks, limit, random_model)


def _load_tasks(tasks: list[str], limit: int | None, random_model: bool) -> tuple[Any, dict[str, str]]:
    manager = task_manager(all(task in SEVEN or task in bundled_tasks() for task in tasks))
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}}
    sources: dict[str, str] = {}
    for task in tasks:
        try:
            spec, source = _spec(task, limit, random_model, manager)
            got = manager.load([spec])
        except DataError:
            raise
        except Exception as error:  # datasets raises many kinds for "not there"
            where = f" (data set {HUB[task]})" if task in HUB else ""
            raise DataError(f"the documents of {task}{where} cannot be loaded: {type(error).__name__}: {error}. "
                            + remedy([task])) from error
        loaded["tasks"].update(got["tasks"])
        loaded["groups"].update({k: v for k, v in got.get("groups", {}).items() if not k.startswith(LOCAL)})
        sources.update(dict.fromkeys(got["tasks"], source))
    for task_object in loaded["tasks"].values():
        if task_object.get_config("num_fewshot") is None:
            task_object.set_config("num_fewshot", 0)
        task_object.set_fewshot_seed(FEWSHOT_SEED)
    return loaded, sources


def _spec(task: str, limit: int | None, random_model: bool, manager: TaskManager) -> tuple[Any, str]:
    """What lm-eval's task manager is to load, and where the documents come from."""
    documents = local_documents(task, limit, random_model)
    if documents is not None:
        return {"group": LOCAL + task, "task": [_on(task, documents)]}, documents.source
    if task in MMLU_GROUPS and mmlu_subjects():

        def of_subject(config_source: str, **_: Any) -> dict[str, Any]:
            """lm-eval tells a subject's own file, `.../mmlu_anatomy.yaml`."""
            subject = local_documents(Path(config_source).stem, limit)
            if subject is None:
                raise DataError(f"the assets hold no subject {Path(config_source).stem}")
            return _tables(subject)

        # a spec could not say it: lm-eval hands a spec's own `task` down to every member of a group
        group = manager._factory.build(manager.task_index[task], overrides={"custom_dataset": of_subject},
                                       registry=manager.task_index)  # fmt: skip
        return group, documents_source()
    return task, "hub"


def _on(task: str, documents: Documents) -> dict[str, Any]:
    """The stock task with other data: only splits that exist may be named."""
    splits = dict.fromkeys(("training_split", "validation_split", "test_split"))
    splits["test_split" if documents.split == "test" else "validation_split"] = documents.split
    return {"task": task, "custom_dataset": lambda **_: _tables(documents), **splits}


def _tables(documents: Documents) -> dict[str, Any]:
    import datasets

    return {split: datasets.Dataset.from_list(rows)
            for split, rows in {documents.split: documents.rows, **documents.others}.items()}  # fmt: skip


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


def data_set(task: str) -> str | None:
    """The hub data set of a task, by its file; None for groups, files and tasks that bring their data."""
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = task_manager(task in bundled_tasks()).task_index.get(task)
    if entry is None or entry.yaml_path is None:
        return None
    path = load_yaml(entry.yaml_path, resolve_func=False, recursive=True).get("dataset_path")
    return path if isinstance(path, str) and "/" in path and not Path(path).exists() else None


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


def _bootstrap(f: Callable[[Any], float], xs: Any, iters: int) -> float:
    draw = random.Random(0)  # lm-eval's seed of the first thousand
    return statistics.stdev(float(f(draw.choices(xs, k=len(xs)))) for _ in range(iters))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Only one progress bar, over the requests: no chatter of lm-eval and datasets. Errors still show.

    Standard errors that have no closed form are bootstrapped here, in this process: lm-eval's own draws the same
    numbers in a pool of processes, and prints.
    """
    import datasets
    import lm_eval.api.metrics
    import lm_eval.api.task

    bars, level, tqdm = datasets.are_progress_bars_disabled(), logging.getLogger("lm_eval").level, lm_eval.api.task.tqdm
    bootstrap = lm_eval.api.metrics.bootstrap_stderr
    lm_eval.api.metrics.bootstrap_stderr = _bootstrap
    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = tqdm
        lm_eval.api.metrics.bootstrap_stderr = bootstrap
        logging.getLogger("lm_eval").setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
