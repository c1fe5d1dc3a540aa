"""The commands as a family: help, wrong calls, completion."""

import importlib
import shutil
import subprocess
from pathlib import Path

import pytest

from slm_exp.cli import completion
from slm_exp.cli import main as cli
from slm_exp.launch.compose import conf_dir

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_has_examples_and_exit_statuses(name, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0
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
        (["export", "x", "--format", "mergkit"], "Did you mean mergekit?"),
        (["completion", "csh"], "expected one of bash"),
        (["sync"], "DIR"),
    ],
)
def test_a_wrong_call_ends_with_status_2_and_names_what_was_meant(call, said, capsys):
    try:
        status = cli.main(call)
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert said in capsys.readouterr().err


def test_every_command_is_a_module_with_a_main():
    for name in cli.COMMANDS:
        module = importlib.import_module(f"slm_exp.cli.{name}")
        assert callable(module.main)
        assert (ROOT / "docs" / "commands.md").read_text().count(f"`slm {name}"), name


def test_completion_knows_commands_options_and_members(tmp_path):
    script = tmp_path / "slm.bash"
    script.write_text(completion.bash(completion.words()))

    def complete(line: str) -> list[str]:
        words = line.split(" ")
        code = (f"source {script}; COMP_LINE='{line}'; COMP_POINT={len(line)}; COMP_WORDS=({' '.join(words)}); "
                f"COMP_CWORD={len(words) - 1}; _slm; echo \"${{COMPREPLY[*]}}\"")  # fmt: skip
        return subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True).stdout.split()

    assert complete("slm do") == ["doctor"]
    assert complete("slm cache p") == ["prune"]
    assert complete("slm cache prune --old") == ["--older-than"]
    assert "linear" in complete("slm plan kernel=")
    assert complete("slm plan kernel=rb") == ["rbf"]
    assert complete("slm plan sweep=threshold_r") == ["threshold_rule"]
    assert complete("slm completion f") == ["fish"]
    assert complete("slm tables dep") == ["depth_width"]
    assert complete("slm plan table=spee") == ["speed"]
    presets = {f"model={p.stem}" for p in (conf_dir() / "model").glob("*.yaml")}
    assert presets <= set(completion.words()["plan"])


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_every_command(shell):
    script = getattr(completion, shell)(completion.words())
    for name in cli.COMMANDS:
        assert name in script


@pytest.mark.skipif(not shutil.which("fish"), reason="fish is not installed")
def test_fish_completes(tmp_path):
    script = tmp_path / "slm.fish"
    script.write_text(completion.fish(completion.words()))
    for line, wanted in [("slm tab", "tables"), ("slm tables dep", "depth_width"), ("slm plan kernel=rb", "kernel=rbf"),
                         ("slm cache prune --ol", "--older-than")]:  # fmt: skip
        done = subprocess.run(["fish", "--no-config", "-c", f"source {script}; complete -C '{line}'"], cwd=tmp_path,
                              capture_output=True, text=True, check=True)  # fmt: skip
        assert done.stdout.split() == [wanted]
