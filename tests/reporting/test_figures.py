"""`slm report --figures`: every plot of a page as PDF and SVG, of a column's width, with text that stays text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from builders.pages import make_sweep, page_run

from slm_exp.cli import report
from slm_exp.reporting.figures import WIDTH, run_figures
from slm_exp.runs.record import Run

RUN = {"plan", "candidates", "candidates-near", "similarity", "accuracy"}


def names(folder: Path) -> set[str]:
    made = list((folder / "figures").iterdir())
    assert {path.suffix for path in made} == {".pdf", ".svg"}
    assert len({path.stem for path in made}) == len(made) / 2
    return {path.stem for path in made}


@pytest.mark.parametrize(("kind", "wanted"), [
    ("recovered", RUN | {"loss"}), ("chain", RUN | {"loss"}), ("bare", None),
    ("baseline", RUN - {"candidates", "candidates-near"})])
def test_every_plot_of_a_runs_page_is_a_figure(
    kind: str, wanted: set[str] | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = page_run(tmp_path, kind)
    assert report.main(["--figures", str(folder)]) == 0
    printed = capsys.readouterr().out.split()
    assert printed == [str(folder / "report.html"), *([str(folder / "figures")] if wanted else [])]
    if wanted:
        assert names(folder) == wanted


@pytest.mark.filterwarnings("error::UserWarning")  # what matplotlib says where a legend leaves the axes no room
def test_every_plot_of_a_sweeps_page_is_a_figure(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "grid", 10)
    assert report.main(["--figures", str(folder)]) == 0
    found = names(folder)
    assert {"average", "perplexity-wikitext2", "score-flat-cosine", "staircase"} <= found
    assert {name for name in found if name.startswith("similarity-")} == {
        f"similarity-{kernel}-kernel" for kernel in ("angular", "laplacian", "linear", "rbf")}


def test_a_figure_is_a_column_wide_names_its_axes_and_is_the_same_twice(tmp_path: Path) -> None:
    run = Run.read(page_run(tmp_path))
    bytes_of = {path: path.read_bytes() for path in run_figures(run)}
    assert names(run.folder) == RUN
    assert {path: path.read_bytes() for path in run_figures(run)} == bytes_of
    text = (tmp_path / "figures" / "candidates.svg").read_text()
    width = re.search(r'<svg [^>]*width="([\d.]+)pt"', text)
    assert width
    assert float(width[1]) == pytest.approx(72 * WIDTH)
    assert "<text" in text
    assert "layers of the candidate" in text
    assert "score, flat_cosine" in text
    assert b"/Type3" not in (tmp_path / "figures" / "candidates.pdf").read_bytes()  # journals refuse such fonts
