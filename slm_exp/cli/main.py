"""`slm COMMAND ...`: the commands besides the run itself. Each is also `python -m slm_exp.cli COMMAND`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from slm_exp.core.errors import SlmError, did_you_mean

COMMANDS = {
    "plan": "plan [overrides]    what a run or a grid would do and cost; loads nothing",
    "path": "path [overrides]    every plan any threshold can produce, with its exact interval",
    "sweep": "sweep status|resume|rerun DIR   how a sweep stands; finish what is missing",
    "tables": "tables NAME DIR...  a table of a paper from records: md, tex, csv, html; or one row per run",
    "compare": "compare RUN [RUN...]   paired tests between runs on the same documents",
    "report": "report DIR...       one self-contained page, DIR/report.html, of a run or a sweep",
    "export": "export RUN_OR_PLAN  a plan as another tool's file (mergekit)",
    "doctor": "doctor              what is wrong on this machine, and what to do about it",
    "cache": "cache [show|prune|verify]   what the stage cache holds; by age, by size; whether it is whole",
    "sync": "sync DIR...         send offline W&B runs, each once",
    "completion": "completion bash|zsh|fish   what your shell needs to complete these",
}
HELP = """A run or a grid itself: slm-exp [overrides], or python -m slm_exp [overrides]; see slm-exp --help.
slm COMMAND --help has the options, examples and exit statuses of each."""


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatch to `slm_exp.cli.COMMAND.main(argv)`. Exit status: the command's; 2 for a wrong call."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: slm COMMAND ...\n\n" + "\n".join(f"  slm {text}" for text in COMMANDS.values()))
        print(f"\n{HELP}")
        return 0 if argv else 2
    command, *rest = argv
    if command not in COMMANDS:
        print(f"slm: there is no command {command!r}; expected one of {', '.join(COMMANDS)}. "
              f"{did_you_mean(command, COMMANDS)}".rstrip(), file=sys.stderr)
        return 2
    return run_command(importlib.import_module(f"slm_exp.cli.{command}").main, rest)


def run_command(command: object, argv: Sequence[str]) -> int:
    """Call a command's main(argv), showing its own errors as one line. For the `__main__` of each command too."""
    try:
        return int(command(list(argv)) or 0)  # type: ignore[operator]
    except SlmError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `slm ... | head`: whoever read has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a place that cannot be written
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
