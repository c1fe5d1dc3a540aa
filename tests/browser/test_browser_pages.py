"""The pages in a real browser: all that can be pointed at, typed, clicked or reached by keyboard does what it says.

`make test-browser`. Any error or warning in the console, and any address outside the sweep's folder, fails the test.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import chromium
import pytest
from builders.pages import make_sweep, page_run
from chromium import Page

from slm_exp.cli import tables
from slm_exp.reporting.page import write_report
from slm_exp.reporting.sweep import write_sweep_report

pytestmark = [pytest.mark.browser,
              pytest.mark.skipif(chromium.find() is None, reason="needs chromium (apt-get install chromium)")]
WIDTHS = (1280, 800, 400)
CLIPPED = """(() => {
    const wide = [...document.querySelectorAll(".scroll")].filter(box => box.scrollWidth > box.clientWidth + 1)
        .map(box => box.getAttribute("aria-label") || box.textContent.slice(0, 40));
    const out = [...document.querySelectorAll("svg text, th, td, output")].filter(e => {
        const box = e.getBoundingClientRect();
        return box.width > 1 && (box.left < -0.5 || box.right > innerWidth + 0.5);
    }).map(e => e.textContent);
    return [...wide, ...out];
})()"""
"""What a reader has to scroll sideways for, or cannot see at all."""
COVERED = """(() => {
    const boxes = (chart, what) => [...chart.querySelectorAll(what)].filter(e => !e.closest("defs"))
        .map(e => [e, e.getBoundingClientRect()]).filter(([, box]) => box.width > 1);
    const cover = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1.5
        && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4;  // a line of text is higher than its letters
    return [...document.querySelectorAll("svg.chart")].flatMap(chart => {
        const texts = boxes(chart, "text"), marks = boxes(chart, "use, circle");
        return texts.flatMap(([text, box], i) => [...marks, ...texts.slice(i + 1)].filter(([, other]) =>
            cover(box, other)).map(([other]) => `${text.textContent} on ${other.textContent || other.outerHTML}`));
    });
})()"""
"""Texts of charts that lie on a mark, or on another text."""


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_sweep(tmp_path_factory.mktemp("browser") / "grid", 14)
    write_sweep_report(folder)
    return folder


@pytest.fixture(scope="module")
def window() -> Iterator[Page]:
    with chromium.browser() as page:
        yield page


@pytest.fixture
def page(window: Page, sweep: Path) -> Iterator[Page]:
    """The sweep's page, freshly loaded; nothing may have gone wrong by the end of the test."""
    window.complaints.clear()
    window.loaded.clear()
    window.open(sweep / "report.html")
    yield window
    assert window.complaints == []
    assert all(address.startswith(("data:", sweep.parent.as_uri())) for address in window.loaded), window.loaded


def column(page: Page, name: str, table: str = "table-runs") -> list[str]:
    """The sorting keys of a column, in the order shown, of the rows that are."""
    found = page.js(f"""(() => {{
        const table = document.getElementById({json.dumps(table)});
        const head = [...table.tHead.rows[0].cells].find(cell => cell.textContent === {json.dumps(name)});
        return [...table.tBodies[0].rows].filter(row => !row.hidden)
            .map(row => row.cells[head.cellIndex].dataset.value);
    }})()""")
    return [str(value) for value in found]


def heading(page: Page, name: str, table: str = "table-runs") -> str:
    """A selector of the button that sorts by a column."""
    number = page.js(f"""[...document.querySelectorAll("#{table} thead th")]
        .findIndex(cell => cell.textContent === {json.dumps(name)}) + 1""")
    return f"#{table} thead th:nth-child({number}) button"


def numbers(keys: list[str]) -> list[float]:
    return [float(key) for key in keys if key]


def test_a_heading_sorts_by_click_and_by_keyboard_and_gaps_stay_last(page: Page) -> None:
    button = heading(page, "Average")
    page.click(button)
    up = column(page, "Average")
    assert numbers(up) == sorted(numbers(up))
    assert len(numbers(up)) < len(up)
    assert up[-1] == ""
    assert page.js(f"document.querySelector({json.dumps(button)}).parentElement.ariaSort") == "ascending"
    page.press("Enter")  # the button has the focus
    down = column(page, "Average")
    assert numbers(down) == sorted(numbers(down), reverse=True)
    assert down[-1] == ""
    page.js(f"document.querySelector({json.dumps(heading(page, 'method.threshold'))}).focus()")
    page.press(" ")
    assert numbers(column(page, "method.threshold")) == sorted(numbers(column(page, "method.threshold")))
    sorts = page.js("[...document.querySelectorAll('#table-runs th[aria-sort]')].map(th => th.ariaSort)")
    assert sorted(set(sorts)) == ["ascending", "none"]
    assert sorts.count("ascending") == 1
    page.click(heading(page, "boolq", "table-tasks"))
    assert numbers(column(page, "boolq", "table-tasks")) == sorted(numbers(column(page, "boolq", "table-tasks")))
    page.click(heading(page, "Runs", "table-plans"))
    assert numbers(column(page, "Runs", "table-plans")) == sorted(numbers(column(page, "Runs", "table-plans")))


def test_the_filter_holds_for_tables_and_charts(page: Page) -> None:
    everything = column(page, "merge_rule")
    page.js("""(() => { const s = document.querySelector("form.filter").elements["merge_rule/name"];
        s.value = "mean"; s.dispatchEvent(new Event("input", { bubbles: true })); })()""")
    assert set(column(page, "merge_rule")) == {"mean"}
    shown = f"{everything.count('mean')} of {len(everything)} runs"
    assert page.js("document.querySelector('form.filter output').textContent") == shown
    left = page.js("[...document.querySelectorAll('a.point:not(.out)')].map(a => a.getAttribute('aria-label'))")
    assert left
    assert all("merge_rule mean" in told for told in left)
    page.click("form.filter button[type=reset]")
    page.js("new Promise(done => setTimeout(done, 50))")
    assert column(page, "merge_rule") == everything
    page.click("form.filter input[name=find]")
    page.write("rbf failed")
    words = page.js("[...document.querySelectorAll('#table-runs tbody tr:not([hidden])')].map(row => row.textContent)")
    assert all("rbf" in text and "failed" in text for text in words)
    assert len(words) < len(everything)
    page.js("document.querySelector('form.filter input').value = ''")


def test_a_mark_pointed_at_tells_of_its_run_and_lights_it_up_everywhere(page: Page) -> None:
    assert page.js("document.querySelectorAll('.points title').length") == 0  # no second tip by the browser
    run = page.js("document.querySelector('#quality a.point').dataset.run")
    page.hover(f"#quality a.point[data-run='{run}'] use")
    assert not page.js("document.querySelector('#quality .tip').hidden")
    assert "Seven-task average" in page.js("document.querySelector('#quality .tip').textContent")
    lit = page.js("[...document.querySelectorAll('.lit')].map(e => e.dataset.run)")
    assert len(lit) >= 4  # two or more charts, the staircase, both tables
    assert len(set(lit)) == 1
    page.hover("h1")
    assert page.js("document.querySelector('#quality .tip').hidden")
    assert page.js("document.querySelectorAll('.lit').length") == 0


def test_a_chart_is_one_stop_of_the_tab_key_and_arrows_walk_it(page: Page) -> None:
    for chart in ("#quality svg.points", "#staircase svg.points"):
        stops = f"document.querySelector('{chart}').querySelectorAll('a.point[tabindex=\"0\"]').length"
        assert page.js(stops) == 1
        page.js(f"document.querySelector('{chart} a.point[tabindex=\"0\"]').focus()")
        first = page.js("document.activeElement.getAttribute('aria-label')")
        assert first
        page.press("ArrowRight")
        second = page.js("document.activeElement.getAttribute('aria-label')")
        assert second != first
        assert second in page.js(f"document.querySelector('{chart}').parentElement.querySelector('.tip').textContent")
        page.press("ArrowLeft")
        assert page.js("document.activeElement.getAttribute('aria-label')") == first
        page.press("End")
        page.press("ArrowRight")  # round to the first
        assert page.js(stops) == 1
        page.press("Escape")
        assert page.js(f"document.querySelector('{chart}').parentElement.querySelector('.tip').hidden")
        page.press("Tab")
        assert page.js(f"!document.querySelector('{chart}').contains(document.activeElement)")


def test_marks_by_another_setting(page: Page) -> None:
    page.js("""(() => { const s = document.querySelector("form.shade select");
        s.value = "kernel/name"; s.dispatchEvent(new Event("change", { bubbles: true })); })()""")
    key = page.js("[...document.querySelectorAll('#quality ul.marks li')].map(li => li.textContent)")
    assert key == ["angular", "laplacian", "linear", "rbf"]
    marks = page.js("""[...document.querySelectorAll("a.point")].map(a => [a.getAttribute("aria-label"),
        Number(a.querySelector("use").getAttribute("href").at(-1)), a.getAttribute("class")])""")
    for told, number, classes in marks:
        assert f"kernel {key[number]}" in told
        assert f"s{number}" in classes.split()


def test_the_atlas_reads_all_pictures_at_once_and_shows_one_plan_alone(page: Page) -> None:
    page.js("""(() => { const f = document.querySelector("form.pair"); f.elements.a.value = 3; f.elements.b.value = 4;
        f.dispatchEvent(new Event("input")); })()""")
    values = page.js("[...document.querySelectorAll('.sheets output')].map(o => o.textContent)")
    assert len(values) == 4
    assert all(0 < float(value) < 1 for value in values)
    page.hover(".sheet")
    assert page.js("document.querySelector('form.pair').elements.a.value") != "3"
    page.click("tr:nth-child(2) button.alone")
    key = page.js("document.querySelector('button[aria-pressed=true]').dataset.plan")
    visible = page.js("""[...document.querySelectorAll(".window")]
        .filter(w => getComputedStyle(w).display !== "none").map(w => w.dataset.plans)""")
    assert visible
    assert all(key in plans.split() for plans in visible)
    page.click("tr:nth-child(2) button.alone")
    assert page.js("document.querySelectorAll('button[aria-pressed=true]').length") == 0


def test_links_lead_to_runs_and_logs_and_copying_never_fails(page: Page, sweep: Path) -> None:
    page.click("button.copy")
    page.js("new Promise(done => setTimeout(done, 100))")
    assert page.js("document.querySelector('button.copy').textContent") in ("Copied", "Selected")
    target = page.js("document.querySelector('#table-runs a').getAttribute('href')")
    page.open(sweep / target)
    assert page.js("document.querySelector('h1').textContent")
    page.click("#copy")
    page.hover("svg.heatmap")
    assert float(page.js("document.querySelector('form.pair output').textContent")) <= 1


def test_the_skip_link_comes_first(page: Page) -> None:
    page.press("Tab")
    assert page.js("document.activeElement.className") == "skip"
    page.press("Enter")
    assert page.js("location.hash") == "#main"


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_clipped_and_no_mark_covers_another(page: Page, sweep: Path, width: int) -> None:
    assert tables.main(["sweep", str(sweep), "--format", "html,md", "--out", str(sweep.parent)]) == 0
    runs = [write_report(page_run(sweep.parent / kind, kind)) for kind in ("finished", "recovered", "baseline")]
    for path in (sweep / "report.html", *runs, sweep.parent / "sweep.html"):
        page.open(path, width)
        assert page.js(CLIPPED) == [], path
        page.js("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        page.js("new Promise(done => setTimeout(done, 50))")
        assert page.js(CLIPPED) == [], path
        touching = page.js("""[...document.querySelectorAll("#quality svg.points, #staircase svg.points")]
            .flatMap(chart => {
                const marks = [...chart.querySelectorAll("a.point use")].map(u => u.getBoundingClientRect());
                return marks.flatMap((a, i) => marks.slice(i + 1).filter(b =>
                    Math.hypot(a.x + a.width / 2 - b.x - b.width / 2, a.y + a.height / 2 - b.y - b.height / 2) < 8)
                    .map(b => [a.x, a.y]));
            })""")
        assert touching == [], path
        assert page.js(COVERED) == [], path
        split = page.js("""[...document.querySelectorAll("#table-runs .whole")].filter(e => {
            const text = document.createRange();
            text.selectNodeContents(e);
            return text.getClientRects().length > 1;
        }).map(e => e.textContent)""")
        assert split == [], path


def test_a_table_row_by_row_keeps_its_headings_its_sorting_and_its_roles(page: Page, sweep: Path) -> None:
    page.open(sweep / "report.html", 400)
    assert page.js("document.querySelector('#table-runs').closest('.scroll').classList.contains('stacked')")
    labels = page.js("[...document.querySelector('#table-runs tbody tr').cells].slice(1).map(td => td.dataset.label)")
    assert [label.replace("\u200b", "") for label in labels[:3]] == ["kernel", "method.threshold", "merge_rule"]
    assert page.js("document.querySelector('#table-runs').getAttribute('role')") == "table"
    button = heading(page, "Average")
    page.click(button)
    assert numbers(column(page, "Average")) == sorted(numbers(column(page, "Average")))


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_window(page: Page, sweep: Path, tmp_path: Path, width: int, dark: bool) -> None:
    kinds = ("finished", "failed", "running", "baseline", "bare")
    for path in [sweep / "report.html"] + [write_report(page_run(sweep.parent / kind, kind)) for kind in kinds]:
        page.open(path, width, dark=dark)
        wide = page.js("document.documentElement.scrollWidth")
        assert wide <= width, f"{path.parent.name} is {wide} px wide"
        paper = page.js("getComputedStyle(document.body).backgroundColor")
        assert (int(paper.split("(")[1].split(",")[0]) < 60) == dark


def test_a_hundred_runs_load(window: Page, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints how long by the clock, and what the page's thread worked; a busy machine is no failure."""
    folder = make_sweep(tmp_path / "hundred", 100)
    path = write_sweep_report(folder)
    window.complaints.clear()
    window.call("Performance.enable", timeDomain="threadTicks")
    before = {m["name"]: m["value"] for m in window.call("Performance.getMetrics")["metrics"]}
    window.open(path)
    worked = {m["name"]: m["value"] for m in window.call("Performance.getMetrics")["metrics"]}
    took = window.js("""(() => { const n = performance.getEntriesByType("navigation")[0];
        return [n.domContentLoadedEventEnd, n.loadEventEnd]; })()""")
    assert window.complaints == []
    assert window.js("document.querySelectorAll('#table-runs tbody tr').length") == 100
    with capsys.disabled():
        print(f"\n100 runs, {path.stat().st_size / 1e6:.2f} MB: usable after {took[0] / 1e3:.2f} s, "
              f"loaded after {took[1] / 1e3:.2f} s; CPU time of the page's thread "
              f"{worked['TaskDuration'] - before.get('TaskDuration', 0):.2f} s")
