"""`slm COMMAND ...`: the commands besides the run itself. Each is also `python -m slm_exp.cli COMMAND`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import click
from click.shell_completion import CompletionItem

from slm_exp.cli.command import Group, run_command, status_of
from slm_exp.core.logs import silence_bars
from slm_exp.core.plugins import take
from slm_exp.core.version import __version__

COMMANDS = {"plan": "plan [overrides]    what a run or a grid would do and cost; loads nothing",
            "path": "path [overrides]    every plan any threshold can produce, with its exact interval",
            "sweep": "sweep status|resume|rerun DIR   how a sweep stands; finish what is missing",
            "tables": "tables NAME DIR...  a table of a paper from records: md, tex, csv, html; or one row per run",
            "compare": "compare RUN [RUN...]   paired tests between runs on the same documents",
            "report": "report DIR...       one self-contained page, DIR/report.html, of a run or a sweep",
            "merge": "merge MODEL PLAN OUT   the checkpoint that a plan makes of a model",
            "export": "export RUN_OR_PLAN  a plan as another tool's file (mergekit)",
            "import": "import FILE         another program's plan as a plan.json: EvoPress, mergekit, LLM-Drop",
            "doctor": "doctor [overrides]  what is wrong with this machine or the model named, and what to do",
            "cache": "cache [show|prune|verify]   what the stage cache holds; by age, by size; whether it is whole",
            "sync": "sync DIR...         send offline W&B runs, each once",
            "completion": "completion bash|zsh|fish   what your shell needs to complete these"}
HELP_OPTION = {"help_option_names": ["-h", "--help"]}
HELP = """A run or a grid itself: slm-exp [overrides], or python -m slm_exp [overrides]; see slm-exp --help.
slm COMMAND --help has the options, examples and exit statuses of each. With any of them --plugin FILE loads members of
config groups from a file of your own (docs/plugins.md)."""


class Commands(Group):
    """Every command, each module loaded when its command is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return importlib.import_module(f"slm_exp.cli.{cmd_name}").main if cmd_name in COMMANDS else None

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in COMMANDS if name.startswith(incomplete)]

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write("usage: slm COMMAND ...\n\n" + "\n".join(f"  slm {text}" for text in COMMANDS.values()))
        formatter.write(f"\n\n{HELP}\n")


@click.command("slm", cls=Commands, invoke_without_command=True, context_settings=HELP_OPTION)
@click.version_option(__version__, message="slm_exp %(version)s")
@click.pass_context
def slm(ctx: click.Context) -> int:
    if ctx.invoked_subcommand:
        return 0
    click.echo(ctx.get_help())
    return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Call `slm_exp.cli.COMMAND.main`. Exit status: the command's; 2 for a wrong call."""
    silence_bars()
    if "_SLM_COMPLETE" in os.environ:
        importlib.import_module("slm_exp.cli.completion")  # its class for bash takes the place of click's
    return run_command(lambda words: status_of(slm, take(words), "slm"), sys.argv[1:] if argv is None else argv)
