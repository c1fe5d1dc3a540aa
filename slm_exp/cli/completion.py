"""`slm completion bash|zsh|fish`: a script that completes commands, options, config groups and folders.

Made from the commands' own parsers and from the config tree, so it is as new as the package that wrote it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence

from slm_exp.cli.parser import Parser

SHELLS = {
    "bash": "slm completion bash > ~/.local/share/bash-completion/completions/slm",
    "zsh": 'slm completion zsh > "${fpath[1]}/_slm"',
    "fish": "slm completion fish > ~/.config/fish/completions/slm.fish",
}
OVERRIDES = ("plan", "path")
"""Commands that take a run's overrides."""


def parser() -> Parser:
    """The command line of `slm completion`."""
    p = Parser(
        "completion", __doc__,
        examples={'eval "$(slm completion bash)"': "for this shell only",
                  **{command: f"{shell}, for good" for shell, command in SHELLS.items()}},
        exits={0: "the script is on stdout", 2: "a wrong call"},
        notes="The run itself has Hydra's own completion, of every field: eval \"$(slm-exp -sc install=bash)\" "
              "(or zsh, fish).",
    )  # fmt: skip
    p.add_argument("shell", choices=sorted(SHELLS))
    return p


def main(argv: Sequence[str]) -> int:
    """See `slm completion --help`."""
    shell = parser().parse_args(list(argv)).shell
    print({"bash": bash, "zsh": zsh, "fish": fish}[shell](words()), end="")
    return 0


def words() -> dict[str, list[str]]:
    """What may follow: `` (nothing typed yet) -> commands; a command, or `command subcommand` -> options and words."""
    from slm_exp.cli.main import COMMANDS
    from slm_exp.tables.definition import table_names

    out = {"": [*COMMANDS]}
    for command in COMMANDS:
        of: Parser = importlib.import_module(f"slm_exp.cli.{command}").parser()
        out[command] = [*of.subcommands, *of.options, *choices(of), *(overrides() if command in OVERRIDES else ())]
        out |= {f"{command} {name}": sub.options for name, sub in of.subcommands.items()}
    tables = table_names()
    out["tables"] += [*tables, "sweep"]
    out["plan"] += [f"table={name}" for name in tables]
    return out


def choices(of: Parser) -> list[str]:
    """Words that a parser's positional arguments are limited to."""
    return [str(c) for a in of._actions if not a.option_strings and a.choices and not isinstance(a.choices, dict)
            for c in a.choices]  # fmt: skip


def overrides() -> list[str]:
    """`group=member` for every member of every group, presets included, and the fields of the default members."""
    from slm_exp.core.registry import GROUPS
    from slm_exp.launch.compose import choices, conf_dir

    presets = {group: sorted(p.stem for p in (conf_dir() / group).glob("*.yaml")) for group in ("experiment", "sweep")}
    return [f"{group}={name}" for group in GROUPS for name in choices(group)] + [
        f"{group}={name}" for group, names in presets.items() for name in names
    ]


def bash(words: Mapping[str, Sequence[str]]) -> str:
    """A completion function for bash; files and folders where no word fits."""
    cases = "\n".join(f"    {_quoted(key)}) words={_quoted(' '.join(of))} ;;" for key, of in words.items())
    return f"""# slm completion bash
_slm() {{
  local cur key words
  cur="${{COMP_LINE:0:COMP_POINT}}"; cur="${{cur##* }}"
  key=""
  [ "$COMP_CWORD" -ge 2 ] && key="${{COMP_WORDS[1]}}"
  case "$key ${{COMP_WORDS[2]}}" in
    "cache show"|"cache prune"|"cache verify"|"sweep status"|"sweep resume"|"sweep rerun")
      [ "$COMP_CWORD" -ge 3 ] && key="$key ${{COMP_WORDS[2]}}" ;;
  esac
  case "$key" in
{cases}
    *) words="" ;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "$cur"))
  case "$cur" in *=*) COMPREPLY=("${{COMPREPLY[@]#"${{cur%%=*}}="}}") ;; esac  # bash breaks words at =
}}
complete -o default -F _slm slm
"""


def zsh(words: Mapping[str, Sequence[str]]) -> str:
    """A completion function for zsh."""
    cases = "\n".join(f"    {_quoted(key)}) choices=({' '.join(map(_quoted, of))}) ;;" for key, of in words.items())
    return f"""#compdef slm
_slm() {{
  local key=""
  local -a choices
  (( CURRENT > 2 )) && key="${{words[2]}}"
  case "$key ${{words[3]}}" in
    "cache show"|"cache prune"|"cache verify"|"sweep status"|"sweep resume"|"sweep rerun")
      (( CURRENT > 3 )) && key="$key ${{words[3]}}" ;;
  esac
  case "$key" in
{cases}
  esac
  compadd -a choices
  _files
}}
if [ "$funcstack[1]" = "_slm" ]; then _slm "$@"; else compdef _slm slm; fi
"""


def fish(words: Mapping[str, Sequence[str]]) -> str:
    """Completions for fish."""
    lines = ["# slm completion fish", *(f"complete -c slm -n __fish_use_subcommand -f -a {word}" for word in words[""])]
    for key, of in words.items():
        seen = " ; and ".join(f"__fish_seen_subcommand_from {part}" for part in key.split())
        for word in of if key else ():
            what = f"-l {word[2:]}" if word.startswith("--") else f"-a {_quoted(word)}"
            lines.append(f"complete -c slm -n {_quoted(seen)} {what}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
