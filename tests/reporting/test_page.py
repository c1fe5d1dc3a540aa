"""report.html says what the record says, stands alone, and can be read without eyes or network."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.models import keeps_first
from builders.pages import KINDS, TASKS, page_run, plan, similarity
from builders.records import L
from pages import Page, table

from slm_exp.cli import report
from slm_exp.core.errors import SlmError
from slm_exp.core.files import write_json
from slm_exp.core.format import duration
from slm_exp.core.types import Group, MergePlan, Trial
from slm_exp.reporting import charts, svg
from slm_exp.reporting.page import size_change, typographic, write_report


@pytest.fixture
def page(tmp_path: Path) -> Page:
    return Page(write_report(page_run(tmp_path)).read_text())


def of(kind: str, folder: Path, **changes: Any) -> Page:
    page_run(folder, kind)
    record = json.loads((folder / "record.json").read_text())
    write_json(folder / "record.json", {**record, **changes})
    return Page(write_report(folder).read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_stands_alone_and_is_well_formed(kind: str, tmp_path: Path) -> None:
    page = of(kind, tmp_path)
    assert len(page.html) < 200_000
    for element in page.elements:
        for name in ("href", "src", "action"):
            target = element["attrs"].get(name)
            assert target is None or target.startswith(("#", "data:")), element
    assert not re.search(r"@import|url\((?!#)", page.html)
    (policy,) = [e for e in page.all("meta") if e["attrs"].get("http-equiv") == "Content-Security-Policy"]
    assert policy["attrs"]["content"].startswith("default-src 'none'")
    ids = [e["attrs"]["id"] for e in page.elements if "id" in e["attrs"]]
    assert len(ids) == len(set(ids))
    wanted = {e["attrs"]["href"][1:] for e in page.elements if (e["attrs"].get("href") or "").startswith("#")}
    assert wanted <= set(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_can_be_read_without_the_pictures(kind: str, tmp_path: Path) -> None:
    page = of(kind, tmp_path)
    assert len(page.all("h1")) == 1
    for picture in page.all("svg"):
        classes = (picture["attrs"].get("class") or "").split()
        part_of_a_figure = "row" in classes  # the figure around the rows has the role and the name
        hidden = picture["attrs"].get("aria-hidden") == "true"
        named = picture["attrs"].get("role") == "img" and picture["attrs"].get("aria-label")
        assert hidden or part_of_a_figure or named
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(e["attrs"].get("scope") in ("col", "row") for e in page.all("th"))
    assert page.all("html")[0]["attrs"]["lang"] == "en"
    for form_input in page.all("input"):
        assert "label" in form_input["inside"]


def test_headline(page: Page) -> None:
    assert page.text("h1") == ["smollm2_135m: 30 layers to 27"]
    assert page.text("dd", "big") == ["1.430 ± 0.018 times", "−5.0 ± 2.7 points", "30 →to 27", "134.5 →to 123.9 M",
                                      "0.9053"]
    assert page.text("dd", "small")[:5] == ["57.31 →to 81.94", "49 ± 4 →to 44 ± 4 %, n = 140", "89.7 % of dense kept",
                                            "3 fewer", "7.9 % removed"]
    assert page.text("p", "verdict") == ["Clearly worse: perplexity is 1.430 ± 0.018 times the dense model's."]
    assert "dequantised from Q4_1" in page.text("p", "note")[0]


def test_every_task_has_its_row(page: Page) -> None:
    rows = {cells[0].split("acc")[0]: cells[1:] for cells in table(page, "Accuracy in per cent")}
    assert list(rows) == [*TASKS, "averageseven-task mean, n = 140"]
    assert rows["boolq"] == ["50.0", "60 ± 11", "55 ± 11", "−5 ± 5"]
    assert rows["hellaswag"] == ["25.0", "40 ± 11", "35 ± 11", "−5 ± 9"]
    assert rows["averageseven-task mean, n = 140"] == ["35.7", "49 ± 4", "44 ± 4", "−5.0 ± 2.7"]
    assert table(page, "Perplexity") == [["wikitext2", "57.31", "81.94", "1.430 ± 0.018"]]


def test_what_guessing_gives_is_drawn_and_mute_tasks_are_marked(page: Page) -> None:
    titles = [title for title in page.text("title") if ", chance: " in title]
    assert titles[:3] == ["boolq, chance: 50.0", "piqa, chance: 50.0", "hellaswag, chance: 25.0"]
    mute = [cells[0].split("acc")[0] for cells in table(page, "Accuracy in per cent") if cells[0].endswith("mute")]
    assert mute == [name.split("acc")[0] for name in page.text("div", "mute")]
    assert "boolq" in mute  # 60 of 100 is within two errors of 50 at 20 documents
    assert "arc_easy" not in mute


def test_stages_parameters_and_command(page: Page) -> None:
    stages = [cells[:2] for cells in table(page, "Stages; 2 min 39 s in all")]
    assert ["similarity (cache)", "3.9 s"] in stages
    assert ["evaluate", "56 s"] in stages
    assert table(page, "Parameters")[2] == ["removed", "10,620,288", "7.9 %"]
    (command,) = [e for e in page.all("pre") if e["attrs"].get("id") == "command"]
    assert command["text"] == "python -m slm_exp method.threshold=0.9 'evaluation.corpora={wikitext2: wikitext2}'"
    assert "threshold: 0.9" in page.all("pre")[1]["text"]
    assert "the released code would drop it" in page.text("section", "warnings")[0]


def test_the_stack_shows_every_layer_once(page: Page) -> None:
    drawn = plan()
    assert len(page.all("rect", "box")) == L + drawn.n_layers_out
    assert len(page.all("path", "ribbon")) == drawn.n_layers_out
    assert len(page.all("path", "merged")) == 2
    titles = page.text("title")
    assert "compressed layer 14: layers 14–15 merged by top_layer" in titles
    assert "layer 26: merged" in titles
    assert "layer 29: kept" in titles


def test_what_a_baseline_removes_is_hatched(tmp_path: Path) -> None:
    page = of("baseline", tmp_path)
    assert len(page.all("rect", "dropped")) == 3 + 2
    assert "layer 20: removed" in page.text("title")
    assert "layer 9: kept, mlp removed" in page.text("title")
    told = "Layers 20, 21, 25 removed; attention of layer 7 removed; mlp of layer 9 removed."
    assert told in page.text("p", "lede")[0]
    assert not [e for e in page.all("section") if e["attrs"].get("id") == "search"]
    assert page.text("h1") == ["smollm2_135m: 30 layers to 27, 1 attention and 1 mlp removed"]
    assert page.text("dd", "small")[3:5] == ["3 fewer; 1 attention and 1 mlp removed", "7.9 % removed; 1.0 % zeroed"]


def test_narrower_layers_and_recovery_are_shown(tmp_path: Path) -> None:
    page = of("recovered", tmp_path)
    assert "layers narrowed by 9.8 % of their parameters (flap)" in page.text("p", "lede")[0]
    rows = table(page, "What is left of the layers")
    assert (len(rows), rows[1]) == (27, ["1", "6", "3", "1528", ""])
    assert table(page, "Layers refitted") == [["14", "14–15", "0.2000", "0.0900"]]
    assert "40 of 40 steps on 90 examples, 10 held out, 1,234,567 parameters trained" in page.text("section")[5]
    assert "5.978 before, 11.018 after; worse, so it was taken back" in page.text("section")[5]
    labels = [e["attrs"].get("aria-label") or "" for e in page.all("svg")]
    assert any(label.startswith("Training loss over steps: 2.600 at first") for label in labels)


def test_the_steps_of_a_chain_are_shown(tmp_path: Path) -> None:
    page = of("chain", tmp_path)
    assert table(page, "Steps of the recovery") == [["reconstruct", "4.5000", "4.1000"], ["lora", "4.1000", "–"]]
    assert table(page, "Layers refitted") == [["14", "14–15", "0.2000", "0.0900"]]
    assert any("lora: 40 steps" in text for text in page.text("section"))


def test_a_plan_that_only_narrows_says_so() -> None:
    assert charts.describe(MergePlan(4, width=keeps_first([1], [1], [8], method="flap", ratio=0.2))) == (
        "Layers narrowed by 20.0 % of their parameters (flap).")


def test_every_candidate_is_a_mark_on_its_side_of_the_threshold_over_its_layers(page: Page) -> None:
    trace = plan().trace
    assert len(table(page, "Candidates in the order tried")) == len(trace)
    whole = Page(str(charts.candidates(plan())))
    (line,) = whole.all("line", "threshold")
    marks, reaches = whole.all("use"), whole.all("line", "reach")
    assert len(marks) == len(reaches) == len(trace)
    for mark, reach, trial in zip(marks, reaches, trace, strict=True):
        above = float(mark["attrs"]["y"]) < float(line["attrs"]["y1"])
        assert above == trial.accepted == (mark["attrs"]["class"] == "accepted")
        ends = [float(reach["attrs"][x].rstrip("%")) for x in ("x1", "x2")]
        room = 0.02 * 30  # at the left; at the right there is some
        assert ends == pytest.approx([100 * (at + room) / (30 + room) for at in (trial.low, trial.high)], abs=0.01)


def test_the_closest_decisions_are_enlarged(page: Page) -> None:
    near = charts.near_threshold(plan())
    assert near
    inside = [t for t in plan().trace if near[0] <= t.score <= near[1]]
    assert 6 <= len(inside) < len(plan().trace) / 2
    assert len(Page(str(charts.candidates(plan(), near))).all("use")) == len(inside)
    assert len(page.all("svg", "chart")) == 2 + len(TASKS) + 2  # both pictures; a line a task, the average, the axis
    assert charts.near_threshold(plan(threshold=None)) is None
    assert charts.near_threshold(plan(trace=tuple(Trial(i, i, 0.84 + 0.01 * i, i > 6) for i in range(12)))) is None


@pytest.mark.parametrize("kind", ["finished", "recovered"])
def test_every_plot_names_its_axes(kind: str, tmp_path: Path) -> None:
    page = of(kind, tmp_path)
    names = page.text("text", "title")
    assert names.count("layer") == 2  # the heat map's
    assert "accuracy, %" in names
    assert {"layers of the candidate, the mark at the lowest", "score, flat_cosine"} <= set(names)
    assert ({"optimiser steps", "loss, nats a token"} <= set(names)) == (kind == "recovered")


def test_half_of_the_colours_are_for_similarities_above_the_knee() -> None:
    assert svg.shade(svg.KNEE) == 0.5
    palette = np.frombuffer(svg.palette(), "uint8").reshape(256, 3).astype(int)
    steps = [np.abs(palette[b] - palette[a]).sum() for a, b in ((round(255 * 0.8), round(255 * 0.9)), (0, 26))]
    assert steps[0] > 2 * steps[1]  # a tenth of similarity: above the knee and at the lower end


def test_what_is_not_on_the_page_is_said_with_its_reason(tmp_path: Path) -> None:
    def absent(page: Page) -> str:
        return " ".join(e["text"] for e in page.all("section") if e["attrs"].get("id") == "left-out")

    assert absent(of("finished", tmp_path / "whole")) == ""
    assert "shortgpt kept no scores" in absent(of("baseline", tmp_path / "baseline"))
    failed = absent(of("failed", tmp_path / "failed"))
    assert "nothing was measured of the compressed model; it ended in stage evaluate" in failed
    bare = absent(of("bare", tmp_path / "bare"))
    assert "Plan: " in bare
    assert "Layer similarity: " in bare


def test_a_picture_that_cannot_be_drawn_says_why_and_the_page_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def candidates(*_: object) -> None:
        raise ValueError("no such <score>")

    monkeypatch.setattr(charts, "candidates", candidates)
    page = Page(write_report(page_run(tmp_path)).read_text())
    said = "This picture could not be drawn (ValueError: no such <score>). The numbers are in record.json."
    assert page.text("p", "said")[:2] == [said, said]
    assert page.all("svg", "stack")


def test_heatmap_pixels_are_the_matrix_with_layer_0_below_left() -> None:
    from PIL import Image

    matrix = np.array([[1, 0.5, 0], [0.5, 1, -0.2], [0, -0.2, 1]], dtype="float32")
    drawn = str(charts.heatmap(matrix, MergePlan(3, (Group(0, 2),))))
    data = re.search(r"base64,([^\"]+)", drawn)
    assert data
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data[1]))).convert("RGB"))
    colour = [tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in (svg.SCALE[0], svg.SCALE[-1])]
    assert pixels.shape == (3, 3, 3)
    assert [tuple(pixels[2 - i, i]) for i in range(3)] == [colour[1]] * 3
    assert tuple(pixels[0, 0]) == tuple(pixels[2, 2]) == colour[0]  # 0, twice
    assert tuple(pixels[1, 2]) == colour[0]  # below 0 counts as 0
    frame = re.search(r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)" class="frame"', drawn)
    assert frame
    x, y, width, height = map(float, frame.groups())
    assert (x, y + height) == pytest.approx((50, 386))
    assert width == height == pytest.approx(380 * 2 / 3, abs=0.01)


def test_deep_models_stay_light_and_their_labels_apart(tmp_path: Path) -> None:
    n = 126
    groups = tuple(Group(i, i + 2) for i in range(0, 120, 3))
    deep = MergePlan(n, groups, rule="mean", trace=(Trial(0, 1, 0.5, True),) * 400)
    drawn = str(charts.stack(deep))
    for column in (r'x="28"', r'x="372"'):
        heights = sorted(float(y) for y in re.findall(rf'<text {column} y="([\d.]+)"', drawn))
        assert len(heights) > 20
        assert min(b - a for a, b in itertools.pairwise(heights)) >= 12
    assert len(charts.heatmap(np.eye(n, dtype="float32"), deep)) < 60_000


def test_a_candidate_that_ended_early_stands_at_its_bound_and_says_so() -> None:
    trace = (Trial(1, 2, 0.95, True), Trial(0, 2, None, False, 0.83))
    drawn = str(charts.candidates(MergePlan(4, ((1, 3),), rule="mean", threshold=0.9, trace=trace)))
    assert "layers 0–2, score at most 0.8300, rejected" in drawn
    assert "layers 1–2, score 0.9500, accepted" in drawn
    assert "1 ended early" in drawn


def test_a_failed_run_says_where_why_and_what_to_do(tmp_path: Path) -> None:
    page = of("failed", tmp_path)
    assert page.text("h1") == ["smollm2_135m: stopped in stage evaluate"]
    (trouble,) = page.text("section", "trouble")
    assert "Failed in stage evaluate" in trouble
    assert "OutOfMemoryError: CUDA out of memory" in trouble
    assert "evaluation.batch_size=1" in trouble
    assert "load, calibrate, similarity, evaluate_dense, plan finished" in trouble
    assert page.all("svg", "stack")  # the plan it had by then
    assert page.text("span", "status") == ["failed"]


@pytest.mark.parametrize(("error", "advice"), [
    ({"type": "ConfigError", "message": "x = 1; expected 2.", "stage": "load"}, "names the setting and the remedy"),
    ({"type": "OSError", "message": "[Errno 28] No space left on device", "stage": "save"}, "Free disk space"),
    ({"type": "ZeroDivisionError", "message": "division by zero", "stage": "plan"}, "at the end of run.log"),
    ({"type": "KeyboardInterrupt", "message": "", "stage": None}, "interrupted from outside"),
])
def test_advice_fits_the_error(error: dict[str, Any], advice: str, tmp_path: Path) -> None:
    assert advice in of("bare", tmp_path, error=error).text("section", "trouble")[0]


def test_text_from_outside_is_shown_not_run(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    page = of("finished", tmp_path, command=f"python {evil}", warnings=[evil], model={"name": evil, "note": evil})
    assert len(page.all("script")) == 1
    assert evil not in page.html
    assert evil in page.text("section", "warnings")[0]


def test_nan_in_the_matrix_does_not_break_the_script(tmp_path: Path) -> None:
    page_run(tmp_path)
    broken = similarity()
    broken.matrix_LL[0, 1] = np.nan
    broken.save(tmp_path)
    page = write_report(tmp_path).read_text()
    found = re.search(r"const matrix = (.*);\n", page)
    assert found
    assert json.loads(found[1])[0][:2] == [1.0, None]


def test_the_record_in_hand_wins_over_the_one_on_disk(tmp_path: Path) -> None:
    page_run(tmp_path, "running")
    record = json.loads((tmp_path / "record.json").read_text())
    for given, shown in ((None, "died"), ({**record, "status": "finished"}, "finished")):
        assert Page(write_report(tmp_path, given).read_text()).text("span", "status") == [shown]


def test_a_run_is_at_work_while_its_folder_is_held_and_has_died_otherwise(tmp_path: Path) -> None:
    from filelock import FileLock

    page_run(tmp_path, "running")
    with FileLock(tmp_path / ".lock"):
        page = Page(write_report(tmp_path).read_text())
    assert page.text("span", "status") == ["running"]
    assert "was at work" in page.text("section")[0]
    page = Page(write_report(tmp_path).read_text())
    assert page.text("span", "status") == ["died"]
    assert "terminated unexpectedly" in page.text("section", "trouble")[0]


def test_without_evaluation_there_is_still_a_page(tmp_path: Path) -> None:
    nothing = {"tasks": {}, "average": None, "perplexity": {}, "protocol": {}}
    page = of("finished", tmp_path, eval={"dense": nothing, "compressed": nothing})
    assert page.all("svg", "stack")
    assert not [e for e in page.all("section") if e["attrs"].get("id") == "evaluation"]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = page_run(tmp_path / "good"), tmp_path / "bad"
    bad.mkdir()
    assert report.main([str(bad), str(good)]) == 2
    captured = capsys.readouterr()
    assert captured.out.strip() == str(good / "report.html")
    assert "holds no record.json" in captured.err
    (bad / "record.json").write_text("{")
    with pytest.raises(SlmError, match="cannot be read"):
        write_report(bad)


def test_numbers_for_people() -> None:
    times = {None: "–", 0.02: "0.02 s", 2.13: "2.1 s", 59.6: "1 min 0 s", 61: "1 min 1 s", 3725: "1 h 2 min"}
    assert [duration(seconds) for seconds in times] == list(times.values())
    assert size_change(134_515_008, 123_894_720) == ("134.5", "123.9 M")
    assert size_change(6_738_415_616, 5_524_000_000) == ("6.74", "5.52 B")
    assert size_change(91_200, 80_000) == ("91.2", "80.0 k")
    assert [typographic(v, True) for v in ("-5.0", "0.0", "1.0")] == ["−5.0", "0.0", "+1.0"]


@pytest.mark.parametrize(
    ("low", "high"), [(0.78, 0.95), (0.9, 0.9), (0, 1), (1, 400), (1, 2), (-0.3, 0.99), (0.90001, 0.90002)]
)
def test_ticks_enclose_the_values_and_are_few(low: float, high: float) -> None:
    ticks = svg.ticks(low, high)
    assert ticks[0] <= low + 1e-9
    assert ticks[-1] >= high - 1e-9
    assert 1 <= len(ticks) <= 10
