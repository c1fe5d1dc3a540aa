"""The files of a model's folder: which of them the loader opens, what they contain, whether they are whole.

Nothing is opened but JSON, text and safetensors: no pickle. Imports no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from slm_exp.core.cache.digests import files_digest, must_be_read
from slm_exp.core.errors import ConfigError
from slm_exp.models.config_file import read_config_file

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SMALL = ("*.json", "*.model", "*.txt", "*.jinja")  # config, tokenizer, weight index
TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
OPENED = (*TOKENIZER, "generation_config.json", "chat_template.jinja", "chat_template.json",
          "additional_chat_templates/*.jinja")
"""What is opened besides config and weights, where it is there."""
MAX_HEADER = 100_000_000
"""Bytes of a safetensors header, as the library has it."""


def short_name(folder: Path) -> str:
    """A folder's name; for the `model` folder of a run, with the run's name before it."""
    folder = folder.resolve()
    return f"{folder.parent.name}-model" if folder.name == "model" else folder.name


def is_sharded(folder: Path) -> bool:
    """Whether the loader goes by the index: only where there is no single file, as transformers does."""
    return not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file()


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that make up a model.

    Raises:
        ConfigError: the index is malformed, or names something other than safetensors files beside it.
    """
    if not is_sharded(folder):
        return [WEIGHTS]
    where = f"model.path = {folder}: {INDEX}"
    again = "Copy the checkpoint again."
    try:
        names = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as cause:
        raise ConfigError(f"{where} is no weights index ({type(cause).__name__}: {cause}). {again}") from cause
    for name in names:
        if not isinstance(name, str) or name != os.path.basename(name) or not name.endswith(".safetensors"):
            raise ConfigError(f"{where} names {str(name)[:80]!r}; expected names of .safetensors files in the same "
                              f"folder. {again}")
    if not names:
        raise ConfigError(f"{where} names no files. {again}")
    return sorted(set(names))


def has_weights(folder: Path) -> bool:
    """Whether every weight file is there."""
    return all((folder / name).is_file() for name in weight_files(folder))


def opened_files(folder: Path, code: bool = False) -> list[Path]:
    """Every file that decides a model's results: weights, config, tokenizer, chat templates, generation config.

    Args:
        code: the folder's own code is run, so it counts.
    Raises:
        ConfigError: the folder holds no model, or a part of it is missing.
    """
    needed = ["config.json", *([INDEX] if is_sharded(folder) else []), *weight_files(folder)]
    for name in needed:
        if not (folder / name).is_file():
            safetensors_only(sorted(p.name for p in folder.iterdir()), f"model.path = {folder}")
            raise ConfigError(f"model.path = {folder}: {name} is missing; the checkpoint is incomplete. Copy it again.")
    more = [path for pattern in OPENED for path in folder.glob(pattern)] + (list(folder.rglob("*.py")) if code else [])
    return [folder / name for name in needed] + [path for path in more if path.is_file()]


def folder_digest(folder: Path, code: bool = False) -> str:
    """Digest of the names and contents of `opened_files`."""
    return files_digest(opened_files(folder, code), folder)


def unread(folder: Path) -> list[Path]:
    """The large files that `folder_digest` would have to read."""
    return [path for path in opened_files(folder) if must_be_read(path)]


def inspect(folder: Path) -> None:
    """Refuse a folder that cannot work, by config.json and the headers of the weights alone.

    Raises:
        ConfigError: names file, field and remedy.
    """
    safetensors_only(sorted(p.name for p in folder.iterdir()), f"model.path = {folder}")
    names = weight_files(folder)
    if (folder / "config.json").is_file():  # else `opened_files` says what is missing
        read_config_file(folder)
    for name in names:
        if (folder / name).is_file():
            check_header(folder, name)


def check_header(folder: Path, name: str) -> None:
    """Refuse a weight file that is not whole.

    Raises:
        ConfigError: not safetensors, or cut off; says what it may be.
    """
    path, where = folder / name, f"model.path = {folder}: {name}"
    size = path.stat().st_size
    with open(path, "rb") as f:
        start = f.read(8)
        length = int.from_bytes(start, "little")
        if start == b"version ":
            raise ConfigError(f"{where} is a git-lfs pointer, not weights. Run `git lfs pull` there.")
        header = f.read(length) if length <= min(size, MAX_HEADER) else b""
    try:
        tensors = [about for key, about in json.loads(header).items() if key != "__metadata__"]
        ends = max((int(about["data_offsets"][1]) for about in tensors), default=0)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as cause:
        raise ConfigError(f"{where} has no safetensors header; it is damaged or something else. Download it "
                          "again.") from cause
    if size != 8 + length + ends:
        raise ConfigError(f"{where} has {size} bytes; its header counts {8 + length + ends}. The download was cut off "
                          "or went wrong; download it again.")


def safetensors_only(names: Sequence[str], where: str) -> None:
    """Refuse a list of files that has no safetensors weights, saying what it has instead.

    Raises:
        ConfigError: pickled weights only, an adapter, GGUF, or no model at all.
    """
    if "adapter_config.json" in names:
        raise ConfigError(f"{where}: a PEFT adapter, not a whole model. Merge it into its base model first "
                          "(peft: `merge_and_unload()`, then `save_pretrained`).")
    if WEIGHTS in names or INDEX in names:
        return
    pickled = [n for n in names if n.endswith((".bin", ".pt", ".pth")) and "training_args" not in n]
    if pickled:
        raise ConfigError(f"{where}: has only pickled weights ({pickled[0]}), which can run code when opened. Take a "
                          "revision with safetensors (on the hub often model.revision=refs/pr/N by SFconvertbot), or "
                          "convert it once where you trust it: load it with transformers and `save_pretrained`.")
    gguf = [n for n in names if n.endswith(".gguf")]
    if gguf:
        raise ConfigError(
            f"{where}: holds GGUF weights ({gguf[0]}), which are quantised. Take the original checkpoint."
        )
    raise ConfigError(f"{where}: no model.safetensors here; expected a Hugging Face model folder (config.json, "
                      "model.safetensors, tokenizer.json).")
