"""Published numbers and layer sets: each agrees with itself, names its source, and meets the rows that repeat it."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from builders.records import make_run

from slm_exp.core.documents import read_yaml
from slm_exp.core.errors import ConfigError
from slm_exp.core.types import MergePlan
from slm_exp.evaluation.base import SEVEN
from slm_exp.launch.compose import check_key, compose_run, conf_dir
from slm_exp.methods.from_plan import FromPlan
from slm_exp.runs.record import Run
from slm_exp.runs.schema import Record
from slm_exp.runs.statistics.runs import Measured
from slm_exp.tables.definition import Table, read_table
from slm_exp.tables.facts import agreement, model_facts, published_of
from slm_exp.tables.reference import Published, matches, published

FILES = sorted((conf_dir() / "reference").glob("*.yaml"))
ENTRIES = published()
PLANS = sorted((conf_dir() / "published").rglob("*.json"))
NARROWED = [e for e in ENTRIES if any(run.startswith("width=") for run in e.runs)]


def called(entry: Published) -> str:
    return f"{entry.file}, {entry.model}, {entry.what}"


# ------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_file_says_where_its_numbers_were_read_and_how_they_were_measured(path: Path) -> None:
    told = read_yaml(path)
    assert re.search(r"arXiv \d{4}\.\d{5}|\w@[0-9a-f]{7}", told["source"]), "a paper or a repository at a commit"
    assert told["protocol"]
    assert told.get("entries") or told.get("claims")
    assert all(claim["text"] and claim["model"] for claim in told.get("claims") or [])
    twice = Counter(called(e) for e in ENTRIES if e.file == path.stem)
    assert max(twice.values(), default=1) == 1, twice


def asked(entry: Published) -> int:
    """How many of the seven tasks a row has."""
    return sum(task in entry.values for task in SEVEN)


@pytest.mark.parametrize("entry", [e for e in ENTRIES if asked(e) == len(SEVEN) and "average" in e.values], ids=called)
def test_an_average_is_that_of_its_row(entry: Published) -> None:
    mean = sum(entry.values[task] for task in SEVEN) / len(SEVEN)
    assert abs(mean - entry.values["average"]) < 0.011  # some sources cut where others round


@pytest.mark.parametrize("entry", [e for e in ENTRIES if 0 < asked(e) < len(SEVEN)], ids=called)
def test_a_row_of_some_tasks_has_no_average_and_says_which_are_left_out(entry: Published) -> None:
    assert "average" not in entry.values, "the mean of a part of the tasks is no seven-task average"
    assert re.search(r"left out|so its .* are others", entry.protocol), entry.protocol


@pytest.mark.parametrize("entry", ENTRIES, ids=called)
def test_numbers_are_in_range(entry: Published) -> None:
    for name, value in entry.values.items():
        if name.startswith("perplexity."):
            assert value > 1, name
        else:
            assert 15 < value < 100, f"{name}: accuracies are per cent"


@pytest.mark.parametrize("entry", ENTRIES, ids=called)
def test_a_row_can_be_repeated(entry: Published) -> None:
    """The dense model needs no run; anything else names its method and size, width and ratio."""
    assert bool(entry.runs) == (entry.which == "compressed")
    for run in entry.runs:
        check_key(run)
    if entry in NARROWED:
        assert "method.threshold=1.0" in entry.runs
        assert sum(run.startswith("width.ratio=") for run in entry.runs) == 1
    elif entry.runs:
        assert any(run.startswith(("method.target_layers=", "method.threshold=")) for run in entry.runs)


def test_sizes_are_of_the_model() -> None:
    for entry in ENTRIES:
        layers = model_facts(entry.model)[0]["layers"]
        left = [int(run.partition("=")[2]) for run in entry.runs if run.startswith("method.target_layers=")]
        assert all(0 < n < layers for n in left), called(entry)
        for n, of in re.findall(r"(\d+) of (\d+) layers", entry.what):
            assert left == [int(n)], called(entry)
            assert int(of) == layers, called(entry)


def test_dense_rows_of_one_protocol_come_first() -> None:
    """A difference is read beside the dense model of the same source: where there is one, before what it explains."""
    for path in FILES:
        of_file = [e for e in ENTRIES if e.file == path.stem]
        for model in {e.model for e in of_file}:
            which = [e.which for e in of_file if e.model == model]
            assert which == sorted(which, key=lambda kind: kind != "dense"), f"{path.stem}, {model}"


def test_parameters_left_are_those_of_the_ratio() -> None:
    """Where a source says how many parameters are left, the ratio leaves that many."""
    checked = 0
    for entry in NARROWED:
        facts = model_facts(entry.model)[0]
        ratio = next(float(run.partition("=")[2]) for run in entry.runs if run.startswith("width.ratio="))
        left = facts["parameters"] - ratio * facts["layers"] * facts["per_layer"]
        for said, unit in re.findall(r"([\d.]+) (B|%) left", entry.what):
            found = left / 1e9 if unit == "B" else 100 * left / facts["parameters"]
            assert found == pytest.approx(float(said), abs=0.01), called(entry)
            checked += 1
    assert checked == 5


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.runs and "=laco" not in str(e.runs)], ids=called)
def test_a_row_of_some_table_repeats_it(entry: Published) -> None:
    """Of those with their settings as published, of the main tables at its size, or of the thresholds."""
    size = [int(run.partition("=")[2]) for run in entry.runs if run.startswith("method.target_layers=")]
    asked = [("main", str(size)), ("main_lora", str(size)), ("thresholds", ""), ("as_published", ""),
             ("as_published", "recovery=lora")]
    assert any(matches(entry, table, row) for name, more in asked for table in [read(name, entry.model, more)]
               for block in table.blocks for row in block.rows)


@cache
def read(name: str, model: str, more: str) -> Table:
    given = {"sizes": json.loads(more)} if more.startswith("[") and more != "[]" else {}
    return read_table(name, {"model": model, **given, **({"extra": [more]} if "=" in more else {})})


# ------------------------------------------------------------------------------- layer sets


def test_every_source_that_is_named_has_its_plans() -> None:
    sets = Counter(path.relative_to(conf_dir() / "published").parts[:2] for path in PLANS)
    assert {("linearpatch", "llama2_7b"), ("linearpatch", "llama2_13b"), ("linearpatch", "llama3_8b"),
            ("evopress", "llama2_7b"), ("evopress", "llama3_8b")} <= set(sets)


@pytest.mark.parametrize("path", PLANS, ids=lambda p: str(p.relative_to(conf_dir() / "published")))
def test_a_layer_set_is_a_plan_of_its_model(path: Path) -> None:
    plan = MergePlan.from_json(json.loads(path.read_text()))
    assert plan.n_layers == model_facts(path.parent.name)[0]["layers"]
    assert not plan.groups
    assert plan.rule == ""
    assert plan.method
    assert re.search(r"arXiv \d{4}\.\d{5}|\w@[0-9a-f]{7}", plan.notes[0])
    attention, mlp = (len(plan.dropped) + sum(s.kind == kind for s in plan.sublayers)
                      for kind in ("attention", "mlp"))
    match path.stem.split("_")[-2:]:
        case ["sublayers", n]:
            assert attention + mlp == int(n)
        case [a, b] if a.isdigit():
            assert (attention, mlp) == (int(a), int(b))
        case [_, n]:
            assert len(plan.dropped) == int(n)
            assert not plan.sublayers
            assert plan.n_layers_out == plan.n_layers - int(n)
    for note in plan.notes:
        if note.startswith("removed in the order"):
            order = [int(i) for i in re.findall(r"\d+", note)]
            assert sorted(order) == list(plan.dropped)
            assert len(set(order)) == len(order)


@pytest.mark.parametrize("path", PLANS, ids=lambda p: str(p.relative_to(conf_dir() / "published")))
def test_from_plan_takes_it(path: Path) -> None:
    method = FromPlan(path=str(path))
    method.check()
    assert method.given == MergePlan.from_json(json.loads(path.read_text()))
    assert not method.uses_merge_rule()


def test_a_set_is_named_and_a_wrong_name_is_refused_with_the_nearest() -> None:
    at = conf_dir() / "published" / "linearpatch" / "llama2_7b" / "shortgpt_7.json"
    assert FromPlan(path="published:linearpatch/llama2_7b/shortgpt_7").identity() == FromPlan(path=str(at)).identity()
    overrides = ["model=llama2_7b", "method=from_plan", "method.path=published:linearpatch/llama2_7b/shortgpt_7"]
    assert compose_run(overrides).method.replays.dropped == tuple(range(23, 30))
    with pytest.raises(ConfigError, match=r"published:linearpatch/llama2_7b/shortgtp_7; .*Did you mean .*/shortgpt_7"):
        FromPlan(path="published:linearpatch/llama2_7b/shortgtp_7").check()


def test_agreement_counts_what_our_run_chooses_too(tmp_path: Path) -> None:
    """Our ShortGPT of 7 layers shares 6 with LinearPatch's; a run of another size or method is compared with none."""
    words = ["model=llama2_7b", "evaluation=none", "method=shortgpt", "method.target_layers=25"]
    run = Measured(Run.read(make_run(tmp_path, words, n=2)))
    of = {"n_layers": 32, "groups": [], "dropped": [22, *range(24, 30)], "sublayers": [], "method": "shortgpt"}

    def agreed(**plan: object) -> str | None:
        return agreement(Measured(Run(run.run.folder, Record.of(run.record.raw | {"plan": of | plan}))))

    assert agreed() == "6 of 7 (linearpatch)"
    assert agreed(dropped=list(range(23, 30))) == "7 of 7 (linearpatch)"
    assert agreed(method="sleb", dropped=[14, 23, 11, 24, 10, 27, 2]) == "6 of 7 (linearpatch)"
    assert agreed(dropped=[29]) is None
    kinds = [{"layer": i, "kind": "attention"} for i in range(6)]
    assert agreed(method="blockpruner", dropped=[], sublayers=kinds).endswith(" of 6 (blockpruner)")


def test_every_set_stands_in_the_agreement_table_beside_our_run_of_its_method() -> None:
    table = read_table("agreement", {"model": "llama2_7b"})
    assert [block.label for block in table.blocks] == published_of("llama2_7b")
    rows = {block.label: [row.runs for row in block.rows] for block in table.blocks}
    assert rows["linearpatch/llama2_7b/shortgpt_7"] == [
        ["method=from_plan", "method.path=published:linearpatch/llama2_7b/shortgpt_7"],
        ["method=shortgpt", "method.target_layers=25"]]
    assert ["method=blockpruner", "method.target_sublayers=12"] in rows["blockpruner/llama2_7b/sublayers_12"]


def test_smaller_sets_of_a_greedy_or_one_shot_method_lie_in_the_larger_ones() -> None:
    families: dict[tuple[str, str], list[tuple[int, set[int]]]] = {}
    for path in PLANS:
        plan = MergePlan.from_json(json.loads(path.read_text()))
        if plan.method in ("sleb", "shortened_ppl", "shortened_taylor") and not plan.sublayers:
            families.setdefault((str(path.parent), plan.method), []).append((len(plan.dropped), set(plan.dropped)))
    assert len(families) > 5
    for sets in families.values():
        ordered = [chosen for _, chosen in sorted(sets, key=lambda s: s[0])]
        assert all(a < b for a, b in pairwise(ordered))


def test_protected_layers_stay() -> None:
    """SLEB keeps the first and the last layer, Taylor+ and PPL of Shortened-LLaMA the first four and the last two."""
    for path in PLANS:
        plan = MergePlan.from_json(json.loads(path.read_text()))
        kept = {"sleb": {0, plan.n_layers - 1}, "shortened_ppl": {0, 1, 2, 3, plan.n_layers - 2, plan.n_layers - 1}}
        kept["shortened_taylor"] = kept["shortened_ppl"]
        assert not kept.get(plan.method, set()) & set(plan.dropped), path
