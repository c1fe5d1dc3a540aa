"""`slm completion bash|zsh|fish`: a script that completes commands, options, overrides and folders.

The script calls the installed package whenever the tab key is pressed, so it is never out of date.
"""

from __future__ import annotations

import os

import click
from click import shell_completion

from slm_exp.cli.command import OneOf, command

VARIABLE = "_SLM_COMPLETE"
SHELLS = {"bash": "slm completion bash > ~/.local/share/bash-completion/completions/slm",
          "zsh": 'slm completion zsh > "${fpath[1]}/_slm"',
          "fish": "slm completion fish > ~/.config/fish/completions/slm.fish"}


@shell_completion.add_completion_class
class Bash(shell_completion.BashComplete):
    """Bash breaks words at `=`: `kernel=rb` comes as three words, and what is completed is the last of them."""

    source_template = shell_completion.BashComplete.source_template.replace(
        "COMPREPLY+=($value)", "COMPREPLY+=($value)\n            [[ $value == *= ]] && compopt -o nospace")
    before = ""

    def get_completion_args(self) -> tuple[list[str], str]:
        given, at = shell_completion.split_arg_string(os.environ["COMP_WORDS"]), int(os.environ["COMP_CWORD"])
        words: list[str] = []
        for word in (*given[: at + 1], *[""] * (at >= len(given))):
            if words and word and (word == "=" or words[-1].endswith("=")):
                words[-1] += word
            else:
                words.append(word)
        *args, incomplete = words
        self.before = incomplete[: incomplete.rfind("=") + 1]
        return args[1:], incomplete

    def format_completion(self, item: shell_completion.CompletionItem) -> str:
        return f"{item.type},{item.value.removeprefix(self.before)}"


@command(
    "completion", __doc__,
    examples={'eval "$(slm completion bash)"': "for this shell only",
              **{line: f"{shell}, for good" for shell, line in SHELLS.items()}},
    exits={0: "the script is on stdout", 2: "a wrong call"},
    notes='The run itself has Hydra\'s own completion, of every field: eval "$(slm-exp -sc install=bash)" (zsh, fish).')
@click.argument("shell", type=OneOf(sorted(SHELLS)))
@click.pass_context
def main(ctx: click.Context, shell: str) -> None:
    script = shell_completion.get_completion_class(shell)
    assert script is not None
    print(script(ctx.find_root().command, {}, "slm", VARIABLE).source())
