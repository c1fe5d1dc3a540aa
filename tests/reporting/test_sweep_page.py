"""A sweep's page: every run once, whatever became of it; what differs between them; one file that stands alone."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.pages import KERNELS, make_cell, make_sweep, page_run, similarity
from builders.records import L
from pages import Page, table

from slm_exp.cli import report
from slm_exp.core.errors import SlmError
from slm_exp.core.files import write_json
from slm_exp.core.types import LayerSimilarity, MergePlan, Sublayer
from slm_exp.reporting import atlas, measures, svg, sweep_charts
from slm_exp.reporting.measures import Point, with_front
from slm_exp.reporting.rows import in_order, read_rows, with_results
from slm_exp.reporting.sweep import is_sweep, write_sweep_report
from slm_exp.runs.sweep import SweepFolder


def sweep(folder: Path) -> Path:
    """Three runs without a definition."""
    for name, threshold, kind in (("ccc", 0.9, "finished"), ("aaa", 0.8, "finished"), ("bbb", 0.85, "failed")):
        edit(page_run(folder / name, kind), lambda record, name=name, threshold=threshold: (
            record["config"]["method"].update(threshold=threshold), record["config"]["tracking"].update(tags=name)))
    return folder


def edit(run: Path, change: Any) -> None:
    record = json.loads((run / "record.json").read_text())
    change(record)
    write_json(run / "record.json", record)


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten cells: 6 finished, 2 failed alike, 1 died, 1 not begun."""
    return make_sweep(tmp_path_factory.mktemp("grid") / "grid", 10)


@pytest.fixture(scope="module")
def page(grid: Path) -> Page:
    return Page(write_sweep_report(grid).read_text())


def test_every_cell_is_a_row_whatever_became_of_it(grid: Path, page: Page) -> None:
    jobs = SweepFolder.read(grid).jobs
    rows = [e for e in page.all("tr") if "data-state" in e["attrs"]]
    assert sorted(e["attrs"]["data-run"] for e in rows) == sorted(job.run_id for job in jobs)
    states = [e["attrs"]["data-state"] for e in rows]
    assert {state: states.count(state) for state in states} == {"finished": 6, "failed": 2, "died": 1, "waiting": 1}
    told = {(f"method.threshold={threshold}", f"merge_rule={rule}", f"kernel={kernel}")
            for _, kernel, threshold, rule, *_ in table(page, "Every run")}
    assert told == {job.overrides for job in jobs}  # also of those that have not begun


def test_rows_are_ordered_by_what_differs(tmp_path: Path) -> None:
    page = Page(write_sweep_report(sweep(tmp_path / "grid")).read_text())
    cells = table(page, "Every run")
    assert [row[:2] for row in cells] == [["aaa", "0.8"], ["bbb", "0.85"], ["ccc", "0.9"]]
    assert cells[0][2:10] == ["1.430 ± 0.018", "44 ± 4", "−5.0 ± 2.7", "89.7 %", "clearly worse", "30 → 27", "7.9 %",
                              "0.9053"]
    assert cells[1][2:] == [*"–––––––", "0.9053", "–", "2 min 39 s", "failed: OutOfMemoryError in evaluate"]
    assert "3 runs that differ in method.threshold;" in page.text("p", "lede")[0]


def test_a_setting_that_its_component_implies_is_no_column(tmp_path: Path) -> None:
    folder = sweep(tmp_path)
    for run, method in (("aaa", {"name": "first", "protect_last": 2}), ("bbb", {"name": "last", "protect_last": 0})):
        edit(folder / run, lambda record, method=method: record["config"].update(method=method))
    heads = Page(write_sweep_report(folder).read_text()).text("th")
    assert "method" in heads
    assert "method.protect_last" not in heads


def test_stands_alone(page: Page, grid: Path) -> None:
    for element in page.elements:
        for name in ("href", "src", "action"):
            target = element["attrs"].get(name)
            if target is not None and not target.startswith(("#", "data:")):
                assert element["tag"] == "a"  # a link to a page or log of the sweep; nothing else is loaded
                assert (grid / target).is_file(), target
    assert not re.search(r"@import|url\((?!#)|https?:", page.html)
    (policy,) = [e for e in page.all("meta") if e["attrs"].get("http-equiv") == "Content-Security-Policy"]
    assert policy["attrs"]["content"].startswith("default-src 'none'")
    assert "connect-src" not in policy["attrs"]["content"]
    ids = [e["attrs"]["id"] for e in page.elements if "id" in e["attrs"]]
    assert len(ids) == len(set(ids))
    wanted = {e["attrs"]["href"][1:] for e in page.elements if (e["attrs"].get("href") or "").startswith("#")}
    assert wanted <= set(ids)


def test_can_be_read_without_the_pictures(page: Page) -> None:
    assert len(page.all("h1")) == 1
    assert page.all("a", "skip")
    for picture in page.all("svg"):
        about = picture["attrs"]
        assert about.get("aria-hidden") == "true" or (about.get("role") in ("img", "group") and about.get("aria-label"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(e["attrs"].get("scope") in ("col", "row") for e in page.all("th"))
    for control in (*page.all("input"), *page.all("select")):
        assert "label" in control["inside"]
    for region in (e for e in page.all("div") if "scroll" in (e["attrs"].get("class") or "")):
        assert (region["attrs"]["role"], region["attrs"]["tabindex"]) == ("region", "0")
        assert region["attrs"]["aria-label"]
    for link in (e for e in page.all("a") if "point" in (e["attrs"].get("class") or "")):
        assert link["text"].strip()  # its title is its name
    assert not [e for e in page.all("button") if "hidden" not in e["attrs"] and e["attrs"].get("type") != "reset"]
    assert all("hidden" in e["attrs"] for e in page.all("form"))  # without the script there are no dead controls


def test_sort_keys_are_what_their_columns_say(page: Page) -> None:
    for html in re.findall(r'<table class="sortable.*?</table>', page.html, re.S):
        head, _, body = html.partition("<tbody>")
        kinds = re.findall(r"<th scope=\"col\"([^>]*)>", head)
        for line in re.findall(r"<tr[^>]*>(.*?)</tr>", body, re.S):
            cells = re.findall(r"<t[hd]( [^>]*)?>", line)
            assert len(cells) == len(kinds)
            for kind, cell in zip(kinds, cells, strict=True):
                if "data-sort" in kind:
                    (key,) = re.findall(r'data-value="([^"]*)"', cell)
                    assert "number" not in kind or key == "" or math.isfinite(float(key))


def test_marks_link_to_pages_that_are_there_and_their_runs_to_rows(grid: Path, page: Page) -> None:
    marks = [e for e in page.all("a") if "point" in e["attrs"].get("class", "")]
    finished = {e["attrs"]["data-run"] for e in page.all("tr") if e["attrs"].get("data-state") == "finished"}
    charts = [e for e in page.all("svg", "points") if "over parameters" in e["attrs"]["aria-label"]]
    assert [e["attrs"]["aria-label"].split(" (")[0] for e in charts] == [
        "Seven-task average", "Perplexity, wikitext2", "Similarity to dense, flat_cosine"]
    assert {e["attrs"]["data-run"] for e in marks} >= finished
    assert all((grid / e["attrs"]["href"]).is_file() for e in marks)


def test_the_same_records_give_the_same_bytes(grid: Path) -> None:
    first = write_sweep_report(grid).read_bytes()
    assert write_sweep_report(grid).read_bytes() == first


def test_text_from_outside_is_shown_not_run(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=http://x.example/>"
    folder = sweep(tmp_path)

    def poison(record: dict[str, Any]) -> None:
        record["config"]["merge_rule"]["name"] = evil
        record["model"] = {"name": evil, "note": evil, "digest": evil}
        record["warnings"] = [evil]
        record["error"] = record["error"] and {"type": evil, "message": evil, "stage": evil}
        record["eval"]["dense"]["tasks"][evil] = record["eval"]["dense"]["tasks"]["piqa"]

    for run in ("aaa", "bbb"):
        edit(folder / run, poison)
        (folder / run / "run.log").write_text(evil)
    page = Page(write_sweep_report(folder).read_text())
    assert len(page.all("script")) == 1
    assert not page.all("img")
    assert evil not in page.html
    assert evil in page.text("section")[0]


def test_what_is_not_finished_says_why_and_how_to_go_on(page: Page) -> None:
    (trouble,) = [e for e in page.all("section") if e["attrs"]["id"] == "trouble"]
    cards = [" ".join(e["text"].split()) for e in page.all("div", "card") if e["inside"][-1] == "section"][:3]
    assert cards[0].startswith("2 failed in stage evaluate OutOfMemoryError: CUDA out of memory.Ask for less memory")
    assert "<b>CUDA</b> out of memory." in cards[0]  # the end of its log, as text
    assert cards[1].startswith("1 died in stage evaluate It terminated unexpectedly")
    assert cards[2].startswith("1 waiting kernel")
    assert "slm sweep resume grid" in trouble["text"]  # the folder as seen from where the sweep was started


def test_a_sweep_without_a_definition_gives_each_runs_command(tmp_path: Path) -> None:
    page = Page(write_sweep_report(sweep(tmp_path)).read_text())
    assert "python -m slm_exp method.threshold=0.9" in page.text("section")[0]
    assert "slm sweep resume" not in page.html


def test_a_damaged_record_is_a_row_too(tmp_path: Path) -> None:
    folder = sweep(tmp_path)
    (folder / "aaa" / "record.json").write_text("{")
    page = Page(write_sweep_report(folder).read_text())
    assert len(table(page, "Every run")) == 3
    assert "cannot be read" in page.text("section")[0]


def test_the_front_is_what_no_other_model_beats() -> None:
    rng = np.random.default_rng(0)
    for higher in (True, False):
        points = [Point(None, int(params), float(value)) for params, value in rng.integers(0, 9, (40, 2))]
        for point in with_front(points, higher):
            def beats(other: Point, point: Point = point, higher: bool = higher) -> bool:
                better = other.value > point.value if higher else other.value < point.value
                return (better and other.cost <= point.cost) or (
                    other.value == point.value and other.cost < point.cost)
            assert point.front == (not any(beats(other) for other in points))


def test_quality_is_drawn_over_every_budget_that_runs_have(tmp_path: Path) -> None:
    """Each with a front of its own: here the run that is faster is the one whose file is larger."""
    folder = sweep(tmp_path)
    for name, flops, size, perplexity in (("aaa", 0.2e9, 500e6, 40.0), ("ccc", 0.25e9, 400e6, 50.0)):
        edit(folder / name, lambda record, flops=flops, size=size, perplexity=perplexity: record.update(
            costs={"length": 128, "dense": {"flops_per_token": 0.3e9, "bytes": 540e6},
                   "compressed": {"flops_per_token": flops, "bytes": size}},
            eval={**record["eval"], "compressed": {**record["eval"]["compressed"],
                                                   "perplexity": {"wikitext2": perplexity}}}))
    found = measures.over_budgets([with_results(row) for row in read_rows(folder)[1]])
    assert list(found) == ["params", "flops_per_token", "bytes"]  # nothing was timed
    fronts = {budget: {p.row.name for m in some if m.key == "perplexity-wikitext2" for p in m.front if p.row}
              for budget, some in found.items()}
    assert fronts["flops_per_token"] == {"aaa"}
    assert fronts["bytes"] == {"aaa", "ccc"}
    assert not any(m.criterion for m in found["bytes"])
    timed = {side: {"latency_s": {"median": seconds, "q1": seconds, "q3": seconds}}
             for side, seconds in (("dense", 2.0), ("compressed", 1.5))}
    edit(folder / "aaa", lambda record: record.update(speed={"cells": [{"name": "1x12x128", **timed}]}))
    page = Page(write_sweep_report(folder, figures=True).read_text())
    headings = [text for text in page.text("h3") if text.startswith("Over ")]
    assert headings == ["Over parameters", "Over operations", "Over latency, both models in turns", "Over weights file"]
    assert any("75 % of dense" in text for text in page.text("title"))
    assert (folder / "figures" / "perplexity-wikitext2-over-bytes.pdf").is_file()


def test_runs_that_measured_nothing_are_drawn_over_no_further_budget(tmp_path: Path) -> None:
    """Of these there is what searches select by, and that has no front over operations or bytes."""
    folder = sweep(tmp_path)
    for run in ("aaa", "bbb", "ccc", "ddd"):
        if (folder / run / "record.json").is_file():
            edit(folder / run, lambda record: record.update(eval={}, costs={
                "length": 128, "dense": {"flops_per_token": 3e8, "bytes": 5e8},
                "compressed": {"flops_per_token": 2e8, "bytes": 4e8}}))
    found = measures.over_budgets([with_results(row) for row in read_rows(folder)[1]])
    assert list(found) == ["params"]
    assert all(m.criterion for m in found["params"])
    assert "Over " not in " ".join(Page(write_sweep_report(folder).read_text()).text("h3"))


def test_no_front_is_drawn_on_what_searches_select_by(grid: Path, page: Page) -> None:
    found = {m.name: m for m in measures.measure([with_results(row) for row in read_rows(grid)[1]])}
    assert found["Similarity to dense, flat_cosine"].front == []
    assert found["Perplexity, wikitext2"].front
    assert len([e for e in page.all("summary") if e["text"] == "The front as a table"]) == 2
    assert any("so no front is drawn" in text for text in page.text("figcaption"))


def test_marks_at_one_place_stand_beside_each_other() -> None:
    places = [(0.9, 10.0), (0.9, 100.0), (0.905, 12.0), (0.9, 11.0), (0.8, 10.0)]
    out = sweep_charts.apart([(x, *sweep_charts.reaching(y)) for x, y in places])
    assert (out[1], out[4]) == (0, 0)
    together = sorted((out[0], out[2], out[3]))
    assert sum(together) == pytest.approx(0)
    assert {b - a for a, b in itertools.pairwise(together)} == {sweep_charts.TOUCH}  # as wide as a mark
    assert max(together) == out[2], "the one further to the right stays there"
    assert max(map(abs, sweep_charts.apart([(0, 0.0, 12.0)] * 50))) <= sweep_charts.WIDE / 2
    lines = [(0.5, *sweep_charts.reaching(50.0, 10.0, 90.0)), (0.5, *sweep_charts.reaching(120.0, 80.0, 160.0))]
    assert sweep_charts.apart(lines) == [-6, 6], "marks far from each other, whose intervals would lie on each other"


def test_perplexities_have_the_error_of_their_ratio_and_averages_the_chance(grid: Path, page: Page) -> None:
    rows = [with_results(row) for row in read_rows(grid)[1]]
    found = {m.key: m for m in measures.measure(rows)}
    points = [p for p in found["perplexity-wikitext2"].points if p.row]
    for point in points:
        assert point.row
        ratio = point.row.verdict.texts["wikitext2"]
        assert ratio.stderr
        assert point.stderr == pytest.approx(point.value / ratio.value * ratio.stderr)
    assert found["average"].chance == pytest.approx(100 * (3 * 0.5 + 4 * 0.25) / 7)
    assert len(page.all("line", "whisker")) > len(points)
    assert len(page.all("line", "chance")) == 1


def test_a_sweep_over_sizes_has_no_staircase_and_one_without_averages_no_such_columns(tmp_path: Path) -> None:
    folder = sweep(tmp_path)

    def sized(record: dict[str, Any]) -> None:
        record["config"]["method"] |= {"threshold": None, "target_layers": 27}
        record["verdict"] = None
        for side in filter(None, record["eval"].values()):
            side["tasks"] = {"boolq": side["tasks"]["boolq"]}
            side["average"] = None

    for run in folder.glob("*/record.json"):
        edit(run.parent, sized)
    page = Page(write_sweep_report(folder).read_text())
    assert not [e for e in page.all("section") if e["attrs"].get("id") == "staircase"]
    heads = page.text("th")
    assert "Average" not in heads
    assert "average" not in heads
    assert "boolq" in heads


def test_a_step_covers_exactly_the_thresholds_that_decide_alike(grid: Path) -> None:
    _, rows = read_rows(grid)
    found = {step.row.name: step for step in sweep_charts.decided_steps(rows)}
    assert found
    for step in found.values():
        plan = step.row.plan
        assert plan
        for threshold in (step.low, math.nextafter(step.high, 0)):
            assert [t.score > threshold for t in plan.trace] == [t.accepted for t in plan.trace]
        for threshold in (math.nextafter(step.low, 0), step.high):
            assert [t.score > threshold for t in plan.trace] != [t.accepted for t in plan.trace]


def test_paths_are_found_or_given_and_only_drawn_with_their_model(tmp_path: Path, grid: Path) -> None:
    folder = sweep(tmp_path / "sweep")
    plans = [{"threshold_low": low, "threshold_high": high, "n_layers": n, "final_score": high, "groups": []}
             for low, high, n in ((0.7, 0.83, 26), (0.83, 0.9, 27), (0.9, 1.0, 30))]
    record = json.loads((folder / "aaa" / "record.json").read_text())
    told = {"plans": plans, "unknown": [], "model": record["model"], "calibration": record["calibration"],
            "config": {"merge_rule": {"name": "top_layer"}, "similarity": {"name": "flat_cosine"}}}
    write_json(folder / "path.json", told)
    write_json(tmp_path / "other" / "path.json", told | {"model": {"digest": "another"}})
    write_json(folder / "broken" / "path.json", {})
    assert report.main([str(folder), "--path", str(tmp_path / "other")]) == 0
    page = Page((folder / "report.html").read_text())
    (drawn,) = re.findall(r'<g class="exact">(.*?)</g>', page.html)
    assert drawn.startswith("<title>path.json: 3 plans, top_layer by flat_cosine</title>")
    assert drawn.count("<line") == 3 + 2
    assert "other/path.json is of another model and is left out." in page.text("p", "note")
    for asked, said in ((folder / "broken", "no threshold path"), (tmp_path / "none.json", "there is no .*none.json")):
        with pytest.raises(SlmError, match=said):
            write_sweep_report(folder, paths=[asked])


def test_one_training_for_all_sizes_is_a_curve_over_every_budget_that_was_counted(tmp_path: Path) -> None:
    """A size that the training left worse stays as it was merged; one whose loss is unknown is no mark."""
    folder = sweep(tmp_path)
    record = json.loads((folder / "aaa" / "record.json").read_text())
    plans = [{"threshold_low": 0.6, "threshold_high": 0.9, "n_layers": n, "groups": [], "final_score": 0.9}
             for n in (5, 6, 7)]
    told = {"plans": plans, "model": record["model"], "calibration": record["calibration"], "config": {},
            "sizes": [{"n_layers": n, "params": n * 1e6, "latency_s": n * 1e-3} for n in (7, 6, 5)],
            "recovery": {"name": "family", "dense": math.log(10), "sizes": {
                "5": {"before": math.log(80), "after": math.log(40), "kept": True},
                "6": {"before": math.log(30), "after": math.log(31), "kept": False},
                "7": {"before": None, "after": math.log(20), "kept": True}}}}
    write_json(tmp_path / "path" / "path.json", told)
    page = Page(write_sweep_report(folder, paths=[tmp_path / "path"]).read_text())
    marks = [text for text in page.text("title") if "layers, merged" in text or "layers, after recovery=family" in text]
    over_params = ["5 layers, merged: perplexity 80", "6 layers, merged: perplexity 30",
                   "5 layers, after recovery=family: perplexity 40", "6 layers, after recovery=family: perplexity 30",
                   "7 layers, after recovery=family: perplexity 20"]
    assert marks == over_params * 2  # and over latency
    assert [row[0] for row in table(page, "Perplexity before and after")] == ["5", "6", "7"]


def test_equal_matrices_and_equal_plans_are_shown_once(grid: Path, page: Page) -> None:
    _, rows = read_rows(grid)
    found = atlas.gather(rows)
    assert sorted(sheet.similarity.kernel for sheet in found.sheets) == sorted(KERNELS)
    assert sum(len(sheet.rows) for sheet in found.sheets) == len([row for row in rows if row.run])
    effects = [(s.plan.groups, s.plan.dropped) for s in found.shapes]
    assert len(effects) == len(set(effects)) > 1
    assert len(page.all("svg", "sheet")) == len(KERNELS)
    assert {sheet.name for sheet in found.sheets} == {f"{kernel} kernel" for kernel in KERNELS}
    framed = {key for e in page.all("g", "window") for key in e["attrs"]["data-plans"].split()}
    assert framed == {s.key for s in found.shapes if s.plan.groups}
    assert {e["attrs"]["data-plan"] for e in page.all("button", "alone")} == {s.key for s in found.shapes}


def test_a_sheet_is_named_by_the_setting_that_varies(tmp_path: Path) -> None:
    for seed in (0, 1):
        run = make_cell(tmp_path / str(seed), 0.9, "mean", "rbf").rename(tmp_path / f"run{seed}")
        similarity("rbf", 1 + seed).save(run)
        edit(run, lambda record, seed=seed: record["config"].update(calibration={"n_samples": 10 + seed}))
    names = [sheet.name for sheet in atlas.gather(in_order(read_rows(tmp_path)[1])).sheets]
    assert names == ["rbf kernel, calibration.n_samples 10", "rbf kernel, calibration.n_samples 11"]


def test_a_matrix_is_read_back_to_a_255th(tmp_path: Path) -> None:
    import base64

    run = make_cell(tmp_path, 0.9, "mean", "rbf")
    matrix = np.random.default_rng(0).uniform(-0.1, 1, (L, L)).astype("float32")
    LayerSimilarity(matrix, "rbf", "unbiased", True, 256).save(run)
    (sheet,) = atlas.gather(read_rows(tmp_path)[1]).sheets
    values = np.frombuffer(base64.b64decode(sheet.values), "uint8").reshape(L, L) / 255
    assert np.abs(values - matrix.clip(0, 1)).max() <= 0.5 / 255 + 1e-6


def test_a_strip_has_every_layer_once() -> None:
    plan = MergePlan(12, ((1, 4),), (7,), rule="mean", sublayers=(Sublayer(9, "mlp"),))
    drawn = str(atlas.strip(plan))
    paths = dict(re.findall(r'd="([^"]+)" class="box (\w+)"', drawn)[i][::-1] for i in range(3))
    assert {kind: path.count("M") for kind, path in paths.items()} == {"kept": 8, "merged": 1, "dropped": 1}
    assert "h2.84" in paths["merged"]
    assert "M9.08 5h0.84v5" in paths["kept"]  # without its upper half


def test_stage_times_and_cache_hits_add_up(page: Page) -> None:
    rows = {row[0]: row[1:3] for row in table(page, "Stages over all runs")}
    assert rows["load"] == ["9", "–"]
    assert rows["similarity"] == ["1", "8"]
    assert rows["evaluate"] == ["6", "–"]


def test_the_command_knows_a_sweep_from_a_run(tmp_path: Path) -> None:
    folder = sweep(tmp_path)
    assert is_sweep(folder)
    assert not is_sweep(folder / "aaa")
    assert report.main([str(folder), str(folder / "aaa")]) == 0
    assert (folder / "report.html").is_file()


def test_results_of_different_protocols_are_not_shown_side_by_side(tmp_path: Path) -> None:
    folder = sweep(tmp_path)

    def other(record: dict[str, Any]) -> None:
        for side in record["eval"].values():
            side["protocol"] = {"hash": "another", "fields": side["protocol"]["fields"] | {"limit": 3}}

    edit(folder / "aaa", other)
    page = Page(write_sweep_report(folder).read_text())
    refusal = r"No accuracies and perplexities: .* were measured by different protocols \(limit: 3 and \d+\)"
    assert re.search(refusal, page.html)
    assert "43.6" not in page.html
    assert "81.94" not in page.html
    assert page.all("svg", "points")[0]["attrs"]["aria-label"].startswith("Similarity")
    assert report.main([str(folder), "--mixed-protocols"]) == 0
    page = Page((folder / "report.html").read_text())
    assert "43.6" in page.html
    assert "No accuracies" not in page.html


def test_sweeps_without_plans_or_measurements_still_have_a_page(tmp_path: Path) -> None:
    page_run(tmp_path / "aaa", "bare")
    page = Page(write_sweep_report(tmp_path).read_text())
    assert len(table(page, "Every run")) == 1
    empty = tmp_path / "empty"
    SweepFolder(empty, ["seed=1,2"], str(tmp_path), []).write()
    assert "0 runs" in write_sweep_report(empty).read_text()


def test_axes_hold_their_values_and_are_logarithmic_only_over_decades() -> None:
    for low, high in itertools.pairwise((0.5, 0.7, 3, 40, 41, 900, 1e7)):
        axis = svg.Axis([low, high], log=True)
        assert axis.log == (high / low > 20)
        assert axis.low <= low < high <= axis.high
        assert 0 <= axis.at(low) < axis.at(high) <= 1
        assert 2 <= len(axis.ticks) <= 10
    assert not svg.Axis([0, 1e6], log=True).log
    wide = svg.Axis([10, 3e11], log=True)
    assert max(len(wide.label(tick)) for tick in wide.ticks) <= 6
    assert [wide.label(tick) for tick in (1e4, 1e5, 3e11)] == ["10,000", "10⁵", "3·10¹¹"]
