"""`sweep=search`: what Optuna is asked and told, and a search that is killed and goes on."""

from __future__ import annotations

import json
import math
import re
from importlib.util import find_spec

import pytest
from sweeping import Sweep

from slm_exp.cli.main import main as slm
from slm_exp.cli.run import main as run
from slm_exp.core.errors import ConfigError
from slm_exp.launch.hydra_compat import Numbers, axis_of, parse, probes
from slm_exp.launch.jobs import command_jobs

needs_optuna = pytest.mark.skipif(find_spec("optuna") is None, reason="pip install 'slm-exp[search]'")
BOTH = {"perplexity": True, "parameters": True}


@pytest.mark.parametrize(
    ("given", "axis"),
    [
        ("method.threshold=interval(0.6,0.99)", Numbers(0.6, 0.99)),
        ("method.target_layers=int(interval(20,29))", Numbers(20, 29)),
        ("method.target_layers=range(20,29,3)", Numbers(20, 26, 3)),
        ("recovery.lr=tag(log,interval(1e-5,1e-3))", Numbers(1e-5, 1e-3, log=True)),
        ("merge_rule=mean,top_layer", ["mean", "top_layer"]),
        ("method.threshold=choice(0.9,0.8)", ["0.9", "0.8"]),
    ],
)
def test_what_an_override_lets_a_search_choose_from(given, axis):
    assert axis_of(parse(given)) == axis


def test_a_search_is_checked_at_the_ends_of_its_axes():
    axes = {o.get_key_element(): o for o in map(parse, ("seed=int(interval(1,9))", "merge_rule=a,b,c", "kernel=rbf"))}
    assert probes(axes) == [["seed=1", "merge_rule=a", "kernel=rbf"], ["seed=9", "merge_rule=a", "kernel=rbf"],
                            ["seed=1", "merge_rule=b", "kernel=rbf"],
                            ["seed=1", "merge_rule=c", "kernel=rbf"]]  # fmt: skip


def study(folder, axes, minimize=BOTH, about="this", seed=0):
    pytest.importorskip("optuna")
    from slm_exp.launch.study import Study

    return Study(folder, axes, minimize, about, seed)


AXES = {"method.threshold": Numbers(0.6, 0.99), "merge_rule": ["mean", "top_layer"]}


def test_trials_are_on_disk_at_once_and_an_open_one_is_found_again(tmp_path):
    before = study(tmp_path, AXES)
    told, left = before.ask(), before.ask()
    before.tell(told, [2.0, 100.0])
    assert re.fullmatch(r"method\.threshold=0\.\d{1,6}", told.overrides[0])
    after = study(tmp_path, AXES)
    assert after.unfinished() == [left]
    assert list(after.every()) == [told, left]
    assert after.front() == [(told, {"perplexity": 2.0, "parameters": 100.0})]
    assert after.ask() not in (told, left)
    assert len(after) == 3
    after.tell(left, [math.inf, 50.0])
    assert (len(after), len(after.unfinished()), len(after.front())) == (3, 1, 1), "not finite: tried, and no more"


def test_the_front_holds_what_no_trial_beats_in_both(tmp_path):
    found = study(tmp_path, AXES)
    trials = [found.ask() for _ in range(4)]
    for trial, values in zip(trials, [(2.0, 100.0), (3.0, 50.0), (2.5, 100.0), (3.5, 60.0)], strict=True):
        found.tell(trial, values)
    assert [trial for trial, _ in found.front()] == trials[:2]


def test_a_trial_is_beaten_by_earlier_ones_that_are_no_worse_in_anything(tmp_path):
    found = study(tmp_path, AXES)
    numbers = [(-0.9, 100.0), (-0.8, 100.0), (-0.8, 90.0), (-0.7, 110.0), (-0.9, 100.0)]
    assert [found.beaten(found.ask(), of) for of in numbers] == [0, 1, 0, 3, 0]
    last = found.ask()
    found.prune(last)
    assert found.pruned == 1
    assert last not in [*found.every(), *found.unfinished()]


def test_a_folder_belongs_to_one_search(tmp_path):
    study(tmp_path, AXES, about={"minimize": ["perplexity"]})
    with pytest.raises(ConfigError, match=r"holds another search.*hydra\.sweep\.dir"):
        study(tmp_path, AXES, about={"minimize": ["score"]})


SEARCH = ["sweep=search", "merge_rule=mean,top_layer", "method.protect_last=int(interval(1,6))",
          "hydra.sweeper.search.minimize=[parameters]", "hydra.sweeper.search.maximize=[score]"]  # fmt: skip


@needs_optuna
@pytest.mark.slow
def test_a_killed_search_goes_on_with_the_trial_it_was_at(sweep: Sweep):
    sweep.settings = ["hydra/launcher=basic"]
    killed = sweep.run("7", *SEARCH, "hydra.sweeper.search.n_trials=2", s7=("merge", "kill", ""))
    assert killed.code == -9
    (begun,) = (p.parent.name for p in sweep.folder.glob("*/record.json"))

    status = sweep.slm("resume")
    assert status.code == 0, status.err
    jobs = json.loads((sweep.folder / "sweep.json").read_text())["jobs"]
    assert jobs[0]["run_id"] == begun
    assert len(jobs) == 2
    assert "2 trials, 0 pruned" in status.out
    best = re.search(rf"^  ({begun}|{jobs[1]['run_id']})  merge_rule=\w+ method\.protect_last=\d: parameters ([\d,]+), "
                     r"score ([\d.]+)$", status.out, re.M)  # fmt: skip
    record = json.loads((sweep.folder / best[1] / "record.json").read_text())
    assert int(best[2].replace(",", "")) == record["params"]["after"]
    assert float(best[3]) == pytest.approx(record["plan"]["final_score"], abs=5e-4)

    again = sweep.slm("resume", "hydra.sweeper.search.n_trials=2")
    assert "2 of 2 trials are chosen" in again.out
    assert "started" not in again.out
    sweep.check_whole()


@needs_optuna
@pytest.mark.slow
def test_a_search_prunes_by_first_runs_and_fails_where_a_cell_does(sweep: Sweep):
    sweep.settings = ["hydra/launcher=basic"]
    for_score = [*SEARCH[:-2], "hydra.sweeper.search.minimize=[]", SEARCH[-1], "hydra.sweeper.search.prune=1"]
    ended = sweep.run("7,8", *for_score, "hydra.sweeper.search.n_trials=6", s8=("evaluate", "raise", "no luck"))
    assert ended.code == 1
    assert "no luck" in ended.err
    pruned = int(re.search(r"6 trials, (\d) pruned; the best:", ended.out)[1])
    assert pruned == ended.out.count("pruned   ") > 0
    assert len(list((sweep.folder / "screened").glob("*/record.json"))) > len(list(sweep.folder.glob("*/record.json")))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sweep=search", "hydra.sweeper.search.minimize=[perplexty]"], "= perplexty.*Did you mean perplexity"),
        (["sweep=search", "hydra.sweeper.search.minimize=[a.b,c.d,e.f]"], "one or two different numbers"),
        (["sweep=search", "hydra.sweeper.search.n_trial=4"], "n_trials?"),
        (["sweep=search", "method.threshold=interval(0.9,1.5)"], r"threshold = 1\.5"),
        (["sweep=search", "method.threshold=interval(0.9,0.8)"], "a lower and a higher number"),
        (["-m", "method.threshold=interval(0.8,0.9)"], "no grid.*sweep=search"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_runs(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["model=tiny", *words]) == 2
    err = capsys.readouterr().err
    assert re.search(said, err), err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_without_optuna_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("slm_exp.launch.objectives.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'slm-exp\[search\]'"):
        command_jobs(["sweep=search", "model=tiny"])


@needs_optuna
def test_a_plan_of_a_search_shows_its_ends_and_lists_no_commands(capsys):
    assert slm(["plan", "sweep=search", "model=tiny", "evaluation=none", "--tflops", "1"]) == 0
    out = capsys.readouterr().out
    assert "method.threshold=0.6 merge_rule=top_layer" in out
    assert "30 trials" in out
    assert slm(["plan", "sweep=search", "model=tiny", "--commands"]) == 2
    assert "no list of them" in capsys.readouterr().err
