"""The commands as a family: help, wrong calls, completion."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import get_completion_class

from slm_exp.cli import completion
from slm_exp.cli import main as cli
from slm_exp.launch.compose import conf_dir

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_has_examples_and_exit_statuses(name, capsys):
    assert cli.main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    for part in (f"usage: slm {name}", f"(= python -m slm_exp.cli {name})", "examples:", f"  slm {name}",
                 "exit status:"):
        assert part in shown, part
    assert max(map(len, shown.splitlines())) <= 130


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (["plna"], "Did you mean plan?"),
        (["cache", "prun"], "Did you mean prune?"),
        (["sweep", "resum", "x"], "Did you mean resume?"),
        (["doctor", "--ful"], "Did you mean --full?"),
        (["report", "--mixed-protocol", "x"], "Did you mean --mixed-protocols?"),
        (["export"], "RUN_OR_PLAN"),
        (["import", "nowhere.txt"], "nowhere.txt; expected EvoPress's text"),
        (["import", "x", "--layer", "3"], "Did you mean --layers?"),
        (["export", "x", "--format", "mergkit"], "Did you mean mergekit?"),
        (["completion", "csh"], "expected one of bash"),
        (["completion"], "Choose from: bash, fish, zsh"),
        (["path", "model=tiny", "runtime=cpu", "--save", "26"], "--save 26; expected numbers of layers from 1 to 7"),
        (["sync"], "DIR"),
    ],
)
def test_a_wrong_call_ends_with_status_2_and_names_what_was_meant(call, said, capsys):
    try:
        status = cli.main(call)
    except SystemExit as end:
        status = end.code
    assert status == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1


def test_every_command_is_a_module_with_a_main():
    for name in cli.COMMANDS:
        module = importlib.import_module(f"slm_exp.cli.{name}")
        assert callable(module.main)
        assert (ROOT / "docs" / "commands.md").read_text().count(f"`slm {name}"), name


@pytest.fixture
def slm(tmp_path):
    """A folder with a script `slm` that runs this checkout, to be put first in PATH."""
    script = tmp_path / "bin" / "slm"
    script.parent.mkdir()
    script.write_text(f"#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m slm_exp.cli \"$@\"\n")
    script.chmod(0o755)
    return script.parent


def source(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    return capsys.readouterr().out


def test_bash_completes_commands_options_members_and_fields(slm, tmp_path, capsys):
    script = tmp_path / "slm.bash"
    script.write_text(source("bash", capsys))

    def complete(line: str) -> list[str]:
        words = re.findall(r"=|[^ =]+", line) + [""] * line.endswith(" ")  # bash breaks words at = too
        quoted = " ".join(map(shlex.quote, words))
        code = (f"source {script}; compopt() {{ :; }}; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; "
                f"_slm_completion slm; echo \"${{COMPREPLY[*]}}\"")  # fmt: skip
        return subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True,
                              env={**os.environ, "PATH": f"{slm}:{os.environ['PATH']}"}).stdout.split()

    assert complete("slm do") == ["doctor"]
    assert complete("slm cache prune --old") == ["--older-than"]
    assert complete("slm plan kernel=rb") == ["rbf"]
    assert complete("slm plan model=tiny method.thresh") == ["method.threshold=", "method.threshold_range="]


def test_every_kind_of_word_is_completed(monkeypatch):
    def complete(line: str) -> list[str]:
        words = line.split(" ")
        monkeypatch.setenv("COMP_WORDS", shlex.join(words))
        monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
        found = get_completion_class("bash")(cli.slm, {}, "slm", completion.VARIABLE).complete()
        return [item.partition(",")[2] for item in found.splitlines()]

    assert set(complete("slm ")) == set(cli.COMMANDS)
    assert complete("slm cache p") == ["prune"]
    assert "linear" in complete("slm plan kernel=")
    assert complete("slm path sweep=threshold_r") == ["threshold_rule"]
    assert complete("slm completion f") == ["fish"]
    assert complete("slm tables dep") == ["depth_width"]
    assert complete("slm plan table=spee") == ["speed"]
    assert {p.stem for p in (conf_dir() / "model").glob("*.yaml")} <= set(complete("slm plan model="))


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_ask_the_package(shell, capsys):
    assert f"_SLM_COMPLETE={shell}_complete" in source(shell, capsys)


@pytest.mark.skipif(not shutil.which("fish"), reason="fish is not installed")
def test_fish_completes(slm, tmp_path, capsys):
    script = tmp_path / "slm.fish"
    script.write_text(source("fish", capsys))
    for line, wanted in [("slm tab", "tables"), ("slm tables dep", "depth_width"), ("slm plan kernel=rb", "kernel=rbf"),
                         ("slm cache prune --ol", "--older-than")]:  # fmt: skip
        done = subprocess.run(["fish", "--no-config", "-c", f"source {script}; complete -C '{line}'"], cwd=tmp_path,
                              env={**os.environ, "PATH": f"{slm}:{os.environ['PATH']}"},
                              capture_output=True, text=True, check=True)  # fmt: skip
        assert done.stdout.split()[:1] == [wanted]


def test_a_reader_that_has_enough_ends_a_command_with_status_1():
    code = f"{sys.executable} -m slm_exp.cli path --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() in ("0", "1")  # 0 where everything was written before the reader left
    assert "Traceback" not in done.stderr


def test_bars_of_other_packages_are_silent_in_every_command(monkeypatch, capsys):
    """They read it as they are imported, which no command has done by then."""
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    assert cli.main(["plan", "--help"]) == 0
    assert os.environ["TQDM_DISABLE"] == "1"
    shown = "from tqdm import tqdm; list(tqdm(range(3)))"
    assert subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, check=True).stderr == ""


def test_what_other_packages_will_want_of_each_other_is_not_shown_and_what_a_plugin_warns_of_is():
    code = ("import warnings; from slm_exp.core.logs import silence_bars; silence_bars()\n"
            "for module in ('transformers.modeling_utils', 'peft', 'mine'):\n"
            "    warnings.warn_explicit(f'{module}: soon', FutureWarning, 'f.py', 1, module=module)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[0] == "f.py:1: FutureWarning: mine: soon"
