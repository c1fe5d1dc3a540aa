"""The wrong kind of input: the first line says the fact that matters, and what to give in its place."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from builders.records import make_run

from slm_exp.cli.main import main as slm
from slm_exp.cli.run import main as run
from slm_exp.core.version import __version__
from slm_exp.launch.compose import conf_dir

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """outputs/ with a single run, and with a sweep of one."""
    single = make_run(tmp_path / "outputs", ["seed=1"])
    single.rename(tmp_path / "outputs" / "single")
    swept = make_run(tmp_path / "outputs" / "multirun" / "grid", ["seed=2"])
    swept.rename(swept.parent / "cell")
    (swept.parent / "sweep.json").write_text(json.dumps({"argv": [], "cwd": "", "jobs": []}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("words", "said"), [
    ("sweep status nothing", "there is no folder nothing"),
    ("sweep status outputs/single", "is a single run, not a sweep.*python -m slm_exp seed=1 hydra.run.dir="),
    ("sweep resume outputs/multirun/grid/cell", "one run of the sweep outputs/multirun/grid; give the sweep's folder"),
    ("sweep resume outputs", "sweeps lie in it: outputs/multirun/grid"),
    ("sweep resume outputs/multirun", "sweeps lie in it: outputs/multirun/grid"),
    ("compare nothing", "RUN = nothing: there is no nothing"),
    ("compare outputs/multirun/grid", "is no run, there are 1 in it; give one: outputs/multirun/grid/cell"),
    ("compare outputs/single/record.json", "is a file; give the folder of a run: outputs/single"),
    ("import nothing.json", "there is no file nothing.json"),
    ("merge model=tiny plan.json out", "MODEL is a name alone.*: tiny"),
    ("plan method.treshold=0.9", r"there is no method.treshold\. Did you mean threshold\? Known here: batch, "),
    ("plan shortgpt", "shortgpt: a setting is GROUP=MEMBER.*Meant, perhaps: method=shortgpt"),
    ("plan angular", "kernel=angular or .*similarity=angular or .*method=angular"),
    ("plan owner/name", "Meant, perhaps: model=hf model.path=owner/name"),
    ("path method=shortgpt", "expected slm: only it decides by a threshold"),
    ("path method.threshold=0.9,0.8", "a path is every threshold at once"),
    ("path sweep=threshold_rule", "a grid of runs"),
])  # fmt: skip
def test_the_fact_that_matters_comes_first(there, words, said, capsys):
    assert slm(words.split()) == 2
    err = capsys.readouterr().err
    assert re.search(said, err), err
    assert err.count("\n") == 1
    assert "Errno" not in err
    assert "Traceback" not in err


def test_a_page_of_what_is_no_run_says_so(there, capsys):
    assert slm(["report", "nothing"]) == 2
    assert "slm report: there is no nothing; give the folder of a run" in capsys.readouterr().err


def test_a_folder_of_presets_that_is_not_there_is_named(there, capsys):
    assert run(["--config-dir", "nothing", "+experiment=mine"]) == 2
    assert capsys.readouterr().err.startswith("ConfigError: --config-dir = nothing; expected an existing folder.")


@pytest.mark.parametrize(("words", "said"), [
    (["--config-name", "nothing"], "--config-name = nothing; expected one of config. Presets: experiment=best, "),
    (["--config-name", "experiment/demo"], "demo is a preset: experiment=demo"),
    (["--config-path", "nothing"], "--config-path = nothing; expected an existing folder"),
    (["--config-path", "own"], "--config-name = config; expected one of mine"),
    (["--cfg", "jo"], "--cfg/-c: invalid choice: 'jo' (choose from"),
    (["--cfg"], "--cfg/-c: expected one argument"),
    (["--experimental-rerun", "job.pickle"], "it would read a pickle. A run is repeated by the command in its record"),
    (["metod.threshold=0.8"], "there is no group metod. Did you mean method?"),
    (["kernel.gamma=3"], "the kernel that is chosen has no gamma; it is a field of kernel=polynomial."),
    (["save_model=maybe"], "save_model=maybe: Value 'maybe' is not a valid bool."),
    (["model"], "model: a setting is GROUP=MEMBER or GROUP.FIELD=VALUE. Members of model: gemma3_270m, "),
    (["model="], "model = ; expected one of gemma3_270m, "),
    (["-m", "method.threshold=range(0.9,0.8,0.05)"], "range(0.9,0.8,0.05): it has no value, so no job is left"),
    (["-m", "seed=0,1", "kernel=glob(zz*)"], "kernel=glob(zz*): it has no value"),
])  # fmt: skip
def test_a_typo_is_answered_in_a_line(there, words, said, capsys):
    (there / "own").mkdir()
    (there / "own" / "mine.yaml").touch()
    assert run(words) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_a_config_of_ones_own_in_place_of_the_packages(there, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["slm-exp"])
    (there / "own").mkdir()
    (there / "own" / "mine.yaml").write_text((conf_dir() / "config.yaml").read_text() + "\nseed: 7\n")
    (there / "own" / "bare.yaml").write_text("defaults: [run_schema, _self_]\nseed: 7\n")
    for words in (["--config-dir", "own", "--config-name", "mine"], ["--config-path", "own", "--config-name", "bare"]):
        assert run(["--cfg", "job", *words]) == 0
        assert "seed: 7\n" in capsys.readouterr().out


def test_the_version_is_this_packages(capsys):
    assert run(["--version"]) == slm(["--version"]) == 0
    assert capsys.readouterr().out == 2 * f"slm_exp {__version__}\n"


def test_a_bare_word_on_the_command_line_of_a_run(there, capsys):
    assert run(["rbf"]) == 2
    assert "rbf: a setting is GROUP=MEMBER or GROUP.FIELD=VALUE. Meant, perhaps: kernel=rbf" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "said"), [
    (["evaluation=perplexity"], "evaluation.corpora.wikitext2 = wikitext2: not on this machine, and the hub does not"),
    (["calibration=c4", "evaluation=none"], "calibration.path = allenai/c4: not in the local Hugging Face cache"),
    (["recovery=lora", "evaluation=none"], "recovery.path = yahma/alpaca-cleaned: not in the local"),
])  # fmt: skip
def test_data_that_cannot_be_had_are_refused_before_any_stage(words, said, tmp_path):
    """The hub is asked once, at a port of this machine where nobody listens."""
    env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"),
           "HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "slm_exp", "model=tiny", "tracking=none", *words], cwd=tmp_path,
                          capture_output=True, text=True, env=env)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert not (tmp_path / "outputs").exists()
