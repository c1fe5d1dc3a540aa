"""Members in files and packages of one's own: where they work, what names them, what an edit means."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from slm_exp.cli.run import main
from slm_exp.core import plugins
from slm_exp.core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
QUICK = ("model=tiny", "evaluation=none", "tracking=none", "calibration.n_samples=4", "calibration.seq_len=32",
         "method.target_layers=6", "runtime=cpu")  # fmt: skip
MIDDLE = '''
from dataclasses import dataclass

from slm_exp.core.registry import register
from slm_exp.methods.base import Baseline, Selection

__version__ = "0.3"


@register("method", "middle")
@dataclass
class Middle(Baseline):
    """Drop what lies in the middle."""

    def choose(self, task, n_remove):
        return Selection(tuple(range(3, 3 + n_remove)))
'''
SCORE = """
from dataclasses import dataclass

from slm_exp.core.registry import register
from slm_exp.kernels.base import Kernel
from slm_exp.similarity.base import Similarity


@register("similarity", "constant")
@dataclass
class Constant(Similarity):
    value: float = 0.95

    def against(self, dense_NTD, kernel):
        return lambda trial_NTD: self.value


@register("kernel", "ones")
@dataclass
class Ones(Kernel):
    def gram(self, x_BND):
        return x_BND @ x_BND.mT
"""
IDENTITIES = """
import json, sys
from slm_exp.core import plugins
from slm_exp.launch.compose import compose_run
plugins.add(sys.argv[1:2])
cfgs = [compose_run(words) for words in json.loads(sys.argv[2])]
print(json.dumps([[cfg.run_id, cfg.plan_identity(), cfg.matrix_identity()] for cfg in cfgs]))
"""


def python(*words: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "SLM_EXP_CACHE": str(cwd / "cache"), **env})


@pytest.fixture
def middle(tmp_path):
    (tmp_path / "mine.py").write_text(MIDDLE)
    return tmp_path / "mine.py"


@pytest.fixture
def unnamed(monkeypatch):
    """SLM_EXP_PLUGINS is empty, and again afterwards."""
    monkeypatch.setenv(plugins.VARIABLE, "")


def identities(file: Path, *runs: tuple[str, ...]) -> list[list[object]]:
    """Of each run, by its overrides, in a process that has the plug-in as it is by now."""
    done = python("-c", IDENTITIES, str(file), json.dumps([["model=tiny", *run] for run in runs]), cwd=file.parent)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("text", "said"), [
    ("def broken(:\n", r"mine.py: it cannot be loaded: SyntaxError.*\(.*line 1\)"),
    ("import no_such_package\n", r"ModuleNotFoundError: No module named 'no_such_package' \(mine.py, line 1\)"),
    ("x = 1\n", "declares nothing; expected classes under @register"),
    (MIDDLE.replace('"middle"', '"slm"'), "slm_exp.methods.slm has a member of that name"),
    (MIDDLE.replace('"method"', '"methods"'), "expected one of the groups model, "),
])  # fmt: skip
def test_a_file_that_is_no_plugin_is_refused_in_a_line(text, said, tmp_path, unnamed, capsys):
    (tmp_path / "mine.py").write_text(text)
    sys.modules.pop("slm_exp.core.plugins.mine", None)
    assert main(["--plugin", str(tmp_path / "mine.py"), *QUICK]) == 2
    shown = capsys.readouterr().err
    assert re.search(said, shown), shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize("words", [["--plugin"], ["--plugin", "nowhere.py"], ["--plugin=notes.txt"]])
def test_what_is_no_file_is_refused(words, tmp_path, unnamed, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ConfigError, match=r"expected a \.py file"):
        plugins.take(words)


def test_two_files_of_one_name_are_refused(tmp_path, unnamed, monkeypatch):
    monkeypatch.setattr(plugins, "_ready", False)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(MIDDLE)
    rest = plugins.take(["-m", "--plugin", str(tmp_path / "a" / "mine.py"), "seed=1"])
    assert rest == ["-m", "seed=1"]
    assert os.environ[plugins.VARIABLE] == str(tmp_path / "a" / "mine.py")
    with pytest.raises(ConfigError, match="has the same name"):
        plugins.take([f"--plugin={tmp_path / 'b' / 'mine.py'}"])


def test_a_name_in_a_config_loads_nothing(middle):
    """A preset, a search path, an override: none of them names code."""
    (middle.parent / "experiment").mkdir()
    (middle.parent / "experiment" / "theirs.yaml").write_text(f"# @package _global_\nplugin: {middle}\n")
    done = python("-m", "slm_exp", "--config-dir", str(middle.parent), "experiment=theirs", "method=middle", *QUICK,
                  cwd=middle.parent)
    assert done.returncode == 2
    assert "middle" not in done.stderr.partition("expected one of")[2].split("Did")[0].split(", ")


def test_an_edit_is_another_run_and_a_comment_is_none(middle):
    words = ("method=middle", "method.target_layers=6")
    first, other = identities(middle, words, ())
    middle.write_text("# hello\n" + MIDDLE.replace('"""Drop what', '"""Remove what'))
    assert identities(middle, words) == [first]
    middle.write_text(MIDDLE.replace("range(3, 3 +", "range(2, 2 +"))
    edited, same = identities(middle, words, ())
    assert edited[0] != first[0]
    assert same == other, "what uses no plug-in does not see it"
    assert "code" not in json.dumps(same)


def test_cache_keys_see_a_score_and_a_kernel(tmp_path):
    file = tmp_path / "scores.py"
    file.write_text(SCORE)
    words = ("similarity=constant", "kernel=ones")
    (_, plan, matrix), (_, other, _) = identities(file, words, (*words, "similarity.value=0.9"))
    assert plan["similarity"] == {"name": "constant", "value": 0.95, "code": plan["similarity"]["code"]}
    assert other["similarity"]["value"] == 0.9
    file.write_text(SCORE.replace("x_BND @ x_BND.mT", "2 * x_BND @ x_BND.mT"))
    ((_, edited, edited_matrix),) = identities(file, words)
    assert edited["similarity"]["code"] != plan["similarity"]["code"]
    assert edited_matrix["kernel"]["code"] != matrix["kernel"]["code"]


def test_an_installed_package_is_found_by_its_entry_point(tmp_path):
    site = tmp_path / "site"
    (site / "theirs").mkdir(parents=True)
    (site / "theirs" / "__init__.py").write_text("")
    (site / "theirs" / "members.py").write_text(MIDDLE)
    info = site / "theirs-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[slm_exp]\nmine = theirs.members\n")
    code = ("from slm_exp.launch.compose import compose_run; "
            "print(compose_run(['model=tiny', 'method=middle', 'method.target_layers=6']).plugins)")  # fmt: skip
    done = python("-c", code, cwd=tmp_path, PYTHONPATH=os.pathsep.join([str(ROOT), str(site)]))
    assert "name='mine', file=None" in done.stdout, done.stderr
    assert "version='1.2'" in done.stdout


def test_a_folder_is_a_plugin_of_several_files(tmp_path):
    (tmp_path / "several").mkdir()
    (tmp_path / "several" / "__init__.py").write_text("from . import members\n")
    (tmp_path / "several" / "members.py").write_text(MIDDLE)
    done = python("-m", "slm_exp.cli", "plan", "--plugin", "several", "method=middle", *QUICK, "--tflops", "1",
                  cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "6 of 8 layers" in done.stdout


@pytest.mark.parametrize("launcher", [[], pytest.param(["hydra/launcher=joblib_cores"], marks=pytest.mark.slow),
                                      pytest.param(["hydra/launcher=submitit_local"], marks=pytest.mark.slow)],
                         ids=["processes", "joblib", "submitit"])  # fmt: skip
def test_a_sweep_has_it_in_its_jobs_and_asks_for_it_again(middle, launcher):
    work = middle.parent
    if launcher:
        pytest.importorskip(f"hydra_plugins.hydra_{launcher[0].partition('=')[2].partition('_')[0]}_launcher")
    cells = ("-m", "seed=1", "method=middle", *QUICK, "save_model=false", *launcher, "hydra.sweep.dir=sweep")
    done = python("-m", "slm_exp", "--plugin", "mine.py", *cells, cwd=work)
    assert done.returncode == 0, done.stderr
    records = [json.loads(path.read_text()) for path in sorted(work.glob("sweep/*/record.json"))]
    assert [r["plan"]["dropped"] for r in records] == [[3, 4]]
    (used,) = records[0]["plugins"]
    assert (used["file"], used["version"]) == (str(middle), "0.3")

    again = shlex.split(records[0]["command"])
    assert again[:5] == ["python", "-m", "slm_exp", "--plugin", str(middle)]
    composed = python(*again[1:], "--cfg", "job", cwd=work)  # which no command without the plug-in does
    assert "middle" in composed.stdout, composed.stderr

    for path in work.glob("sweep/*/record.json"):
        path.unlink()
    slm = ("-m", "slm_exp.cli", "sweep", "resume", "sweep")
    refused = python(*slm, cwd=work)
    assert refused.returncode == 2
    command = re.search(r"Give it again: (slm sweep resume .*)", refused.stderr)
    assert command, refused.stderr
    middle.write_text(MIDDLE.replace("range(3, 3 +", "range(2, 2 +"))
    other = python("-m", "slm_exp.cli", *shlex.split(command[1])[1:], cwd=work)
    assert other.returncode == 2
    assert "whose code is another by now" in other.stderr
    told = re.search(r"anew: (.*)", other.stderr)
    assert told, other.stderr
    anew = python("-m", "slm_exp.cli", *shlex.split(told[1])[1:], cwd=work)
    assert anew.returncode == 0, anew.stderr
    found = [json.loads(path.read_text())["plan"]["dropped"] for path in work.glob("sweep/*/record.json")]
    assert found == [[2, 3]]


def test_a_job_that_is_unpickled_knows_its_plugin(middle):
    """As in the workers of joblib and submitit, which import a member's class and nothing of the command line."""
    config = "compose_run(['model=tiny', 'method=middle', 'method.target_layers=6'])"
    made = python("-c", "import pickle, sys; from slm_exp.core import plugins; plugins.add(['mine.py']); "
                        f"from slm_exp.launch.compose import compose_run; cfg = {config}; "
                        "print(cfg.run_id, pickle.dumps(cfg).hex())", cwd=middle.parent)
    run_id, pickled = made.stdout.split()
    there = python("-c", f"import pickle; print(pickle.loads(bytes.fromhex('{pickled}')).run_id)", cwd=middle.parent,
                   SLM_EXP_PLUGINS=str(middle))
    assert there.stdout.split() == [run_id], there.stderr
