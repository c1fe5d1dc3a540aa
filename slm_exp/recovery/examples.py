"""Training examples: instructions by the Alpaca template with the prompt masked, or prose packed into windows."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from slm_exp.calibration.bundled import Bundled
from slm_exp.calibration.mixture import SOURCE_CHARS, Mixture
from slm_exp.calibration.mixture import SOURCES as KINDS
from slm_exp.core import text as reader
from slm_exp.core.errors import ConfigError, DataError, did_you_mean
from slm_exp.core.files import no_file
from slm_exp.core.hub import Repo
from slm_exp.engine.batches import IGNORED, Row
from slm_exp.models.base import ModelHandle

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SOURCES = ("hub", "jsonl", "bundled", "mixture")
OWN = {"bundled": Bundled, "mixture": Mixture}
"""Text that comes with a package, and needs no path."""
ALPACA, ALPACA_ROWS = "yahma/alpaca-cleaned", 51_760
OWN_TOKENS = {"bundled": 165_000, "mixture": len(KINDS) * SOURCE_CHARS / 4.7}
"""In each, about."""
HUB_FILES = {ALPACA: "alpaca_data_cleaned.json"}

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


class Examples(NamedTuple):
    """Rows for training and the held-out ones, each `{input_ids, labels}`, and how many had nothing to learn from."""

    train: list[Row]
    held_out: list[Row]
    dropped: int


def read_rows(data: str, path: str | None, dense: ModelHandle) -> list[dict[str, str]]:
    """The rows of a source: all with `instruction` and `output`, or all with `text`. Raises ConfigError / DataError: a
    file or repo that cannot be had, rows without the needed fields; names the remedy."""
    if data in OWN:
        return [{"text": d.text} for d in OWN[data](seq_len=512).documents(dense)[1]]
    if data == "hub":
        repo, file = hub_file(path)
        where = repo.file(file)
    else:
        where = Path(path or "").expanduser()
        if reason := no_file(where):
            raise ConfigError(f"recovery.path = {path}: {reason} Expected a file ({', '.join(reader.SUFFIXES)}).")
    if reader.kind_of(where) == ".txt":
        return [{"text": "".join(reader.read_lines(where))}]
    rows = reader.read_rows(where, lists=True)
    return [checked(row.value, f"{where}, row {n}") for n, row in enumerate(rows, 1)]


def hub_file(path: str | None) -> tuple[Repo, str]:
    """The data set and its file that `recovery.path` names, with `recovery.data=hub`. Raises ConfigError: no file."""
    name = path or ALPACA
    repo, _, file = name.partition(":")
    if not file and repo not in HUB_FILES:
        raise ConfigError(f"recovery.path = {name}; expected OWNER/NAME:FILE for a data set other than {ALPACA}, "
                          f"FILE ending in {', '.join(reader.SUFFIXES)}.")
    return Repo(repo, None, "dataset", "recovery.path", DataError), file or HUB_FILES[repo]


def expected_rows(data: str, path: str | None, seq_len: int, held_out: int) -> float | None:
    """About how many examples a source has to train on, from what lies here; None where that is not known."""
    if data == "hub" and path is None:
        return ALPACA_ROWS - min(held_out, ALPACA_ROWS / 5)
    if data in OWN:
        return OWN_TOKENS[data] / seq_len * 0.8
    if data == "jsonl" and path and Path(path).is_file() and path.endswith((".jsonl", ".json")):
        with open(path, "rb") as f:
            return 0.8 * sum(1 for line in f if line.strip())
    return None


def checked(row: Any, where: str) -> dict[str, str]:
    """A row's needed fields: instruction, output and the optional input; or text. Raises DataError: they are absent or
    no text."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: a JSON {type(row).__name__}; expected an object.")
    wanted = ("text",) if "text" in row and "instruction" not in row else ("instruction", "output")
    for name in wanted:
        if not isinstance(row.get(name), str):
            has = ", ".join(map(str, row)) or "none"
            what = f"is a {type(row[name]).__name__}" if name in row else f"is absent; the row has {has}"
            raise DataError(f"{where}: field {name!r} {what}. Expected `instruction` and `output` (maybe `input`), or "
                            f"`text`. {did_you_mean(name, map(str, row))}".rstrip())
    return {name: str(row[name]) for name in (*wanted, "input") if row.get(name)} | {n: row[n] for n in wanted}


def make_examples(rows: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase | None, seq_len: int,
                  held_out: int, seed: int) -> Examples:
    """Tokenise, shuffle by the seed, and hold some out (at most a fifth of them). Raises DataError: no tokenizer, or
    fewer than two examples."""
    if tokenizer is None:
        raise DataError("the model has no tokenizer; recovery by training reads text.")
    made = [instruction_example(row, tokenizer, seq_len) for row in rows if "text" not in row]
    made += packed([row["text"] for row in rows if "text" in row], tokenizer, seq_len)
    good = [e for e in made if any(label != IGNORED for label in e["labels"][1:])]  # the first token is not predicted
    if len(good) < 2:
        raise DataError(f"recovery: {len(good)} examples with something to learn in {len(rows)} rows; 2 are needed. "
                        "Lower recovery.seq_len for short texts, raise it for long prompts, or give more data.")
    random.Random(seed).shuffle(good)
    held = min(held_out, len(good) // 5) if held_out else 0
    return Examples(good[held:], good[:held], len(made) - len(good))


def instruction_example(row: dict[str, str], tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Row:
    """Prompt and answer, cut to `seq_len`; the prompt is not trained on. EOS follows where there is room. Source:
    prompter and tokenisation of Alpaca-LoRA, as in lora_retrain.py of Shortened-LLaMA."""
    prompt = (WITH_INPUT if row.get("input") else WITHOUT_INPUT).format(**row)
    start = tokenizer(next(reader.slices(prompt)), verbose=False)["input_ids"]
    ids = tokenizer(next(reader.slices(prompt + row["output"])), verbose=False)["input_ids"][:seq_len]
    eos = tokenizer.eos_token_id
    if eos is not None and start and start[-1] == eos:  # a tokenizer that ends every text itself
        start = start[:-1]
    elif eos is not None and len(ids) < seq_len:
        ids = [*ids, eos]
    masked = min(len(start), len(ids))
    return {"input_ids": ids, "labels": [IGNORED] * masked + ids[masked:]}


def packed(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, seq_len: int) -> list[Row]:
    """Texts one behind the other, EOS after each, cut into windows of `seq_len`; a shorter rest is left out."""
    stream: list[int] = []
    for text in texts:
        for part in reader.slices(text):
            stream += tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            stream.append(tokenizer.eos_token_id)
    windows = [stream[at : at + seq_len] for at in range(0, len(stream) - seq_len + 1, seq_len)]
    return [{"input_ids": window, "labels": list(window)} for window in windows]
