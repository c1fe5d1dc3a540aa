"""lm-eval through its Python API: its own task definitions, on documents that are already here."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slm_exp.core.errors import DataError
from slm_exp.core.files import digest
from slm_exp.evaluation import task_index
from slm_exp.evaluation.backends.fast import FastLM, Gather
from slm_exp.evaluation.backends.hflm import CheckedHFLM
from slm_exp.evaluation.documents import (
    HUB,
    MMLU_GROUPS,
    SPLIT,
    Documents,
    assets_folder,
    documents_source,
    local_documents,
    mmlu_subjects,
    remedy,
)
from slm_exp.evaluation.protocol import TaskProtocol
from slm_exp.evaluation.question_sets import OWN, STOCK_DIFFERS, own_config, shots
from slm_exp.evaluation.report import SEVEN, Row, TaskScore
from slm_exp.evaluation.task_index import quiet

log = logging.getLogger(__name__)

LOCAL = "local_"
"""Names of the groups that only carry other data to lm-eval's loader begin with it."""
FEWSHOT_SEED = 1234  # lm-eval's own default; the seven tasks are zero-shot and do not use it
BOOTSTRAP = 1000  # draws for metrics without a closed-form standard error; means have one


class LoadedTasks(NamedTuple):
    """lm-eval's task objects with their documents."""

    objects: dict[str, Any]
    """{tasks, groups}, what `lm_eval.evaluate` takes."""
    sources: dict[str, str]
    """task -> where its documents came from."""


class TaskResults(NamedTuple):
    """lm-eval's results, reduced to what a report keeps."""

    tasks: dict[str, TaskScore]
    samples: dict[str, list[Row]]
    protocol: dict[str, TaskProtocol]
    sources: dict[str, str]
    """task -> where its documents came from."""
    settings: dict[str, bool | int]
    """What else shapes a request: {add_bos, max_length}."""


@quiet()
def run_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, loaded: LoadedTasks, limit: int | None = None,
    batch_size: int | None = None, add_bos: bool | None = None, backend: str = "fast",
    gather: Gather | None = None,
) -> TaskResults:
    """Evaluate a model in memory on the first `limit` documents of each task; model and tokenizer are left as they are.

    Args:
        gather: lets further processes run some of the batches (`crew.Crew.gather`); backend=hflm has no use for it.
    Raises:
        DataError: a model that gives NaN or infinite logits.
    Cost: on two CPU cores about as long as the requests' tokens take forwards; building them is milliseconds.
    """
    lm = language_model(model, tokenizer, batch_size, add_bos, backend)
    if isinstance(lm, FastLM):
        lm.gather = gather
    tasks = loaded.objects["tasks"].values()
    questions = sum(min(limit or len(task.eval_docs), len(task.eval_docs)) for task in tasks)
    log.info("%d tasks, %d questions", len(tasks), questions)
    results = evaluate(lm, loaded.objects, limit=limit, bootstrap_iters=BOOTSTRAP, log_samples=True)
    assert results is not None  # None is for the other ranks of a distributed run
    samples = {name: [_row(loaded.objects["tasks"][name], example) for example in examples]
               for name, examples in results["samples"].items()}
    scores = {name: _score(metrics) for name, metrics in results["results"].items()}
    protocol = {
        name: TaskProtocol(results["versions"].get(name), SEVEN.get(name), scores[name].n, results["n-shot"].get(name),
                           digest([row["doc_hash"] for row in rows]), digest([row["doc_id"] for row in rows]),
                           OWN[name].differs if name in OWN else STOCK_DIFFERS.get(name))
        for name, rows in samples.items()
    }  # fmt: skip
    settings = {"add_bos": lm.tok_encode("a")[:1] == [lm.tokenizer.bos_token_id], "max_length": lm.max_length}
    return TaskResults(scores, samples, protocol, {n: loaded.sources.get(n, "hub") for n in samples}, settings)


def language_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int | None = None,
                   add_bos: bool | None = None, backend: str = "fast") -> CheckedHFLM:
    """lm-eval's interface to a model in memory: its own class, or the fast one. Both refuse NaN and infinite logits."""
    return (FastLM if backend == "fast" else CheckedHFLM)(model, tokenizer, batch_size, add_bos)


@quiet()
def load_tasks(tasks: Sequence[str], limit: int | None, random_model: bool = False,
               fewshot: Mapping[str, int] | None = None) -> LoadedTasks:
    """Build lm-eval's task objects with the documents of the evaluated split. `fewshot`: task or group -> examples
    before each question; others have what lm-eval defines, none by default. Raises DataError: lm-eval could not find
    the data of a task."""
    manager = task_index.task_manager(all(task in SPLIT or task in task_index.bundled_tasks() for task in tasks))
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
        if fewshot and task in fewshot:
            for task_object in got["tasks"].values():
                task_object.set_config("num_fewshot", fewshot[task])
    for task_object in loaded["tasks"].values():
        if task_object.get_config("num_fewshot") is None:
            task_object.set_config("num_fewshot", 0)
        task_object.set_fewshot_seed(FEWSHOT_SEED)
    return LoadedTasks(loaded, sources)


def _spec(task: str, limit: int | None, random_model: bool, manager: TaskManager) -> tuple[Any, str]:
    """What lm-eval's task manager is to load, and where the documents come from."""
    documents = local_documents(task, limit, random_model)
    if documents is not None:
        spec = _on(task, documents)  # the whole definition of an own task; laid over that of a stock task
        return spec if task in OWN else {"group": LOCAL + task, "task": [spec]}, documents.source
    if task in MMLU_GROUPS and mmlu_subjects():

        def of_subject(config_source: str, **_: Any) -> dict[str, datasets.Dataset]:
            """lm-eval passes a subject's own file, `.../mmlu_anatomy.yaml`."""
            subject = local_documents(Path(config_source).stem, limit)
            if subject is None:
                raise DataError(f"the assets hold no subject {Path(config_source).stem}")
            return _tables(subject)

        # a spec could not say it: lm-eval hands a spec's own `task` down to every member of a group
        group = manager._factory.build(manager.task_index[task], overrides={"custom_dataset": of_subject},
                                       registry=manager.task_index)  # fmt: skip
        return group, documents_source()
    return task, "hub"


def _on(task: str, documents: Documents) -> Row:
    """The stock task with other data: only splits that exist may be named."""
    splits = dict.fromkeys(("training_split", "validation_split", "test_split"))
    splits["test_split" if documents.split == "test" else "validation_split"] = documents.split
    own: Row = {}
    if task in OWN:
        base, folder = OWN[task].base, assets_folder()
        assert folder is not None  # where the documents came from
        own = own_config(task, task_index.stock_config(base) if base else None, shots(folder, task))
    return own | {"task": task, "custom_dataset": lambda **_: _tables(documents), **splits}


def _tables(documents: Documents) -> dict[str, datasets.Dataset]:
    return {split: datasets.Dataset.from_list(rows)
            for split, rows in {documents.split: documents.rows, **documents.others}.items()}  # fmt: skip


def _score(results: Mapping[str, Any]) -> TaskScore:
    """`acc,none` -> acc and `acc_stderr,none` -> acc_stderr; other filters keep their name."""
    metrics: dict[str, float | None] = {}
    for key, value in results.items():
        metric, comma, chosen = key.partition(",")
        if comma:
            metrics[metric if chosen == "none" else f"{metric}({chosen})"] = None if value == "N/A" else float(value)
    return TaskScore(metrics, int(results["sample_len"]) if "sample_len" in results else None)


def _row(task: Any, example: Row) -> Row:
    """One document's result. Raises DataError where a log-likelihood is not finite."""
    row: Row = {"doc_id": example["doc_id"], "doc_hash": example["doc_hash"], "target": example["target"]}
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
