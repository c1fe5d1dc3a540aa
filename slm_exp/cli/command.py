"""What the commands share: click commands whose help reads like a manual page and whose errors name what was meant."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import math
import os
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from slm_exp.core.errors import SlmError, did_you_mean, require
from slm_exp.core.files import write_text
from slm_exp.core.logs import print_anything
from slm_exp.core.registry import GROUPS, available
from slm_exp.core.secrets import masked

FOLDER = click.Path(path_type=Path)  # type: ignore[type-var]  # click's stubs want bytes or str


class Command(click.Command):
    """`slm NAME`; as a function it takes the words after the name and returns the exit status.

    Args:
        doc: a summary, the docstring of the command's module.
        examples: a command -> what it does.
        exits: a status -> when.
        notes: what else there is to know; one paragraph is folded, a list stays as it is. May be a function, so that
            only `--help` pays for it.
    """

    def __init__(self, *args: Any, doc: str = "", examples: Mapping[str, str] = {}, exits: Mapping[int, str] = {},
                 notes: str | Callable[[], str] = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.doc, self.examples, self.exits, self.notes = doc, examples, exits, notes

    def __call__(self, argv: Sequence[str]) -> int:  # type: ignore[override]
        """Run with these words. Raises SlmError as the command does; SystemExit 2 for a wrong call."""
        return status_of(self, argv, f"slm {self.name}")

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, " ".join(self.collect_usage_pieces(ctx)), prefix="usage: ")

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        text = f"{self.doc.strip()}\n(= python -m slm_exp.cli {self.name})" if self.doc else self.help or ""
        formatter.write("\n" + text + "\n")

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        parts = []
        if self.examples:
            width = max(map(len, self.examples))
            parts.append("examples:\n" + "\n".join(f"  {c:<{width}}  {what}" for c, what in self.examples.items()))
        if notes := self.notes() if callable(self.notes) else self.notes:
            parts.append(notes if "\n  " in notes else textwrap.fill(" ".join(notes.split()), 112))
        if self.exits:
            parts.append("exit status:\n" + "\n".join(f"  {status}  {when}" for status, when in self.exits.items()))
        formatter.write("".join(f"\n{part}\n" for part in parts))


class Group(Command, click.Group):
    """`slm NAME SUBCOMMAND`."""

    command_class = Command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        there = self.list_commands(ctx)
        if args[0] not in there and not args[0].startswith("-") and not ctx.resilient_parsing:
            raise _none_of(args[0], there, ctx)
        return super().resolve_command(ctx, args)


class OneOf(click.Choice[str]):
    """A word of a few; a wrong one is refused with the nearest."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in self.choices:
            raise _none_of(value, self.choices, ctx)
        return str(value)


def _none_of(word: str, there: Sequence[str], ctx: click.Context | None) -> click.UsageError:
    nearest = did_you_mean(word, there)
    return click.UsageError(f"{word!r}; expected one of {', '.join(there)}. {nearest}".rstrip(), ctx)


def command(name: str, doc: str | None, *, group: bool = False, **kwargs: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: make a function the command `slm NAME`, with the help that `Command` describes."""
    settings = {"terminal_width": 112, "help_option_names": ["-h", "--help"]}
    if group:
        kwargs |= {"invoke_without_command": True, "subcommand_metavar": "[SUBCOMMAND] ..."}
    return click.command(name, cls=Group if group else Command, doc=doc or "", context_settings=settings, **kwargs)


def require_tflops(tflops: float | None) -> None:
    """Raise ConfigError where an option --tflops is no speed."""
    require(tflops is None or 0 < tflops < math.inf, "--tflops", tflops, "a number > 0")


def overrides_argument() -> Callable[[Callable[..., Any]], Any]:
    """The argument `OVERRIDE ...` of commands that take a run's overrides."""
    return click.argument("overrides", nargs=-1, metavar="[OVERRIDE]...", shell_complete=complete_override)


def complete_override(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """`group=member`, presets included, `table=NAME`, and fields (`method.threshold=`) of every member."""
    from slm_exp.launch.compose import choices

    words = [f"{group}={name}" for group in (*GROUPS, "experiment", "sweep", "table") for name in choices(group)
             if not name.startswith("_")]
    words += sorted({f"{group}.{f.name}=" for group in GROUPS for member in available(group).values()
                     for f in dataclasses.fields(member)})
    return [CompletionItem(word) for word in words if word.startswith(incomplete)]


def print_or_write(text: str, out: Path | None) -> None:
    """To stdout, or into a file, whose name is printed."""
    if out is None:
        print(text, end="")
    else:
        write_text(out, text)
        print(out)


def status_of(of: click.Command, argv: Sequence[str], called: str) -> int:
    """Call a click command; its exit status.

    Raises:
        SystemExit: 2 for a wrong call, one line on stderr.
        SlmError: as the command does.
    """
    try:
        return int(of.main(list(argv), called, standalone_mode=False) or 0)
    except click.Abort:
        raise SystemExit(130) from None
    except click.ClickException as error:
        ctx = getattr(error, "ctx", None)
        where, message = ctx.command_path if ctx else called, " ".join(error.format_message().split())
        if isinstance(error, click.NoSuchOption) and ctx:
            options = [o for p in ctx.command.params if isinstance(p, click.Option) for o in (*p.opts, "--help")]
            message = f"there is no {error.option_name}. {did_you_mean(error.option_name, options)}".rstrip()
        print(f"{where}: {message} See {where} --help.", file=sys.stderr)
        raise SystemExit(2) from None


def run_command(of: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Call a command, showing its own errors as one line; its exit status."""
    print_anything()
    try:
        status = of(argv)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `slm ... | head`: whoever read has enough
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (SlmError, OSError) as error:  # also a place that cannot be written
        return refused(error)


def refused(error: SlmError | OSError) -> int:
    """Say in one line why a command does nothing; its exit status."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        name = os.fsdecode(error.filename)
        text = f"ConfigError: {name[:60]}... ({len(name)} characters); expected a name that a file can have."
    print(masked(text), file=sys.stderr)
    return 2
