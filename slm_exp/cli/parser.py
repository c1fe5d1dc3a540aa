"""What the commands share: a parser whose help reads like a manual page and whose errors name what was meant."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

from slm_exp.core.errors import did_you_mean


class Parser(argparse.ArgumentParser):
    """`slm NAME`: its first docstring line as the summary, then examples, notes, exit statuses.

    Args:
        name: of the command, and of the module `slm_exp.cli.NAME`.
        doc: the module's docstring.
        examples: a command -> what it does.
        exits: a status -> when.
        notes: what else there is to know; one paragraph is folded, a list stays as it is.
    """

    def __init__(
        self, name: str = "", doc: str | None = None, *, examples: Mapping[str, str] | None = None,
        exits: Mapping[int, str] | None = None, notes: str = "", **kwargs: Any,
    ) -> None:
        self.examples = dict(examples or {})
        parts = []
        if self.examples:
            width = max(map(len, self.examples))
            parts.append("examples:\n" + "\n".join(f"  {c:<{width}}  {what}" for c, what in self.examples.items()))
        if notes:
            parts.append(notes if "\n  " in notes else _folded(notes))
        if exits:
            parts.append("exit status:\n" + "\n".join(f"  {status}  {when}" for status, when in exits.items()))
        if name:
            kwargs |= {"prog": f"slm {name}", "description": f"{(doc or '').strip()}\n(= python -m slm_exp.cli {name})"}
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(epilog="\n\n".join(parts) or None, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """One line with what was meant, the command that helps, exit status 2."""
        hint = ""
        if found := re.search(r"invalid choice: '?(.*?)'? \(choose from (.*)\)", message):
            choices = [c.strip(" '") for c in found.group(2).split(",")]
            hint = did_you_mean(found.group(1), choices)
            message = f"{found.group(1)!r}; expected one of {', '.join(choices)}."
        elif found := re.search(r"unrecognized arguments: (\S+)", message):
            options = [o for action in self._actions for o in action.option_strings]
            hint = did_you_mean(found.group(1).partition("=")[0], options)
        print(f"{self.prog}: {message} {hint}".rstrip() + f"\nSee {self.prog} --help.", file=sys.stderr)
        raise SystemExit(2)

    @property
    def subcommands(self) -> dict[str, Parser]:
        """The parsers of `slm NAME SUBCOMMAND`, by name."""
        holders = [a for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        return {name: p for a in holders for name, p in a.choices.items()}

    @property
    def options(self) -> list[str]:
        """Every long option."""
        return sorted(o for action in self._actions for o in action.option_strings if o.startswith("--"))


def _folded(text: str, width: int = 112) -> str:
    import textwrap

    return textwrap.fill(" ".join(text.split()), width)
