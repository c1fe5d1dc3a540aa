"""The argument `OVERRIDE ...` of commands that take a run's overrides, with its completion."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import click
from click.shell_completion import CompletionItem

from slm_exp.core.registry import GROUPS, available
from slm_exp.launch.compose import choices
from slm_exp.tables.definition import table_names


def complete_override(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """`group=member`, presets included, `table=NAME`, and fields (`method.threshold=`) of every member."""
    words = [f"{group}={name}" for group in (*GROUPS, "experiment", "sweep") for name in choices(group)]
    words += [f"table={name}" for name in table_names()]
    words += sorted({f"{group}.{f.name}=" for group in GROUPS for member in available(group).values()
                     for f in dataclasses.fields(member)})
    return [CompletionItem(word) for word in words if word.startswith(incomplete)]


def overrides_argument() -> Callable[[Callable[..., Any]], Any]:
    return click.argument("overrides", nargs=-1, metavar="[OVERRIDE]...", shell_complete=complete_override)
