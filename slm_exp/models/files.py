"""The files of a model's folder: which of them the loader opens, what they contain, whether they are whole.

Nothing is opened but JSON, text and safetensors: no pickle. Imports no torch.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from slm_exp.core.cache.digests import files_digest, must_be_read
from slm_exp.core.errors import CheckpointError, ConfigError
from slm_exp.core.files import read_text
from slm_exp.core.secrets import masked
from slm_exp.models.config_file import read_config_file
from slm_exp.models.layouts import FAMILIES

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SMALL = ("*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*", "README.md")
"""Config, tokenizer, weight index, licence and what the card says of it."""
TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
             "added_tokens.json", "vocab.json", "merges.txt")
OPENED = (*TOKENIZER, "generation_config.json", "chat_template.jinja", "chat_template.json",
          "additional_chat_templates/*.jinja")
"""What is opened besides config and weights, where it is there."""
FLOATS = ("F64", "F32", "F16", "BF16")
BUFFERS = (".inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", ".masked_bias")
"""What old checkpoints hold beside weights."""
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")
LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")
LICENCES = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY", "GEMMA_TERMS")
MAX_HEADER = 100_000_000
"""Bytes of a safetensors header, as the library has it."""


class Tensor(NamedTuple):
    """What a safetensors header says of one tensor."""

    dtype: str
    """As safetensors names it: F32, BF16, I8, ..."""
    shape: tuple[int, ...]
    file: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def short_name(folder: Path) -> str:
    """A folder's name as records show it; for the `model` folder of a run, with the run's name before it."""
    folder = folder.resolve()
    return str(masked(f"{folder.parent.name}-model" if folder.name == "model" else folder.name))


def is_sharded(folder: Path) -> bool:
    """Whether the loader goes by the index: only where there is no single file, as transformers does."""
    return not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file()


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that make up a model. Raises ConfigError: the index is malformed, or names
    something other than safetensors files beside it."""
    if not is_sharded(folder):
        return [WEIGHTS]
    where = f"model.path = {folder}: {INDEX}"
    again = "Copy the checkpoint again."
    try:
        names = json.loads(read_text(folder / INDEX))["weight_map"].values()
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as cause:
        raise ConfigError(f"{where} is no weights index ({type(cause).__name__}: {cause}). {again}") from cause
    for name in names:
        if not isinstance(name, str) or name != os.path.basename(name) or not name.endswith(".safetensors"):
            raise ConfigError(f"{where} names {str(name)[:80]!r}; expected names of .safetensors files in the same "
                              f"folder. {again}")
    if not names:
        raise ConfigError(f"{where} names no files. {again}")
    return sorted(set(names))


def no_checkpoint(folder: Path) -> str | None:
    """Why a folder is no checkpoint that this package wrote, and nothing besides; None where it is one."""
    written = ("config.json", "plan.json", "README.md", "*.safetensors", INDEX, *OPENED, "*.py",
               *(f"{name}*" for name in LICENCES))
    if lacking := [name for name in ("config.json", "plan.json") if not (folder / name).is_file()]:
        return f"it has no {lacking[0]}"
    other = [path.name for path in sorted(folder.rglob("*")) if not path.is_dir()
             and not any(fnmatch(path.relative_to(folder).as_posix(), name) for name in written)]
    return f"it holds {other[0]}" if other else None


def licence_files(folder: Path) -> tuple[Path, ...]:
    """Licence and notice files of a folder."""
    return tuple(sorted(path for path in folder.iterdir()
                        if path.is_file() and path.name.upper().startswith(LICENCES) and path.suffix != ".safetensors"))


def has_weights(folder: Path) -> bool:
    """Whether every weight file is there."""
    return all((folder / name).is_file() for name in weight_files(folder))


def opened_files(folder: Path, code: bool = False) -> list[Path]:
    """Every file that decides a model's results: weights, config, tokenizer, chat templates, generation config. `code`:
    the folder's own code is run, so it counts. Raises ConfigError: the folder holds no model, or a part of it is
    missing."""
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


def headers(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a model's weight files by name, from their headers. Raises ConfigError: a file is not whole, or
    not safetensors."""
    return {name: tensor for file in weight_files(folder) for name, tensor in check_header(folder, file).items()}


def inspect(folder: Path) -> None:
    """Refuse a folder that cannot work, by config.json and the headers of the weights alone. Raises ConfigError: names
    file, field and remedy."""
    safetensors_only(sorted(p.name for p in folder.iterdir()), f"model.path = {folder}")
    names = weight_files(folder)
    about = read_config_file(folder) if (folder / "config.json").is_file() else {}  # `opened_files` says if missing
    tensors: dict[str, Tensor] = {}
    for name in names:
        if (folder / name).is_file():
            tensors |= check_header(folder, name)
    _floats(folder, tensors)
    _tokenizer(folder, about.get("vocab_size"))
    if about.get("model_type") in FAMILIES and all((folder / name).is_file() for name in names):
        _counted(folder, about, tensors)


def _tokenizer(folder: Path, vocab: int | None) -> None:
    """Refuse a tokenizer that appends EOS, or whose vocabulary the embedding has not.

    Special tokens beside the vocabulary may lie beyond the embedding (Gemma 3's image token does): text gives none.
    """
    path = folder / "tokenizer.json"
    try:
        about = json.loads(read_text(path))
        words, steps = about["model"]["vocab"], about.get("post_processor") or {}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return  # the tokenizer's own reader says what is wrong
    highest = max(words.values(), default=0) if isinstance(words, dict) else len(words) - 1
    if vocab and highest >= vocab:
        raise ConfigError(f"model.path = {folder}: tokenizer.json has ids outside the vocabulary: up to {highest}, the "
                          f"embedding has vocab_size = {vocab} rows. Take the tokenizer that belongs to this model.")
    for step in steps.get("processors", [steps]):
        if (step.get("single") or [{}])[-1].get("SpecialToken"):
            name = step["single"][-1]["SpecialToken"].get("id")
            raise ConfigError(f"model.path = {folder}: tokenizer.json appends {name!r} to every text "
                              "(add_eos_token), so answers would be cut. Set add_eos_token to false and save the "
                              "tokenizer again, or take the last entry out of post_processor.single.")


def _floats(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Refuse weights of a type that cannot be merged."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS and len(tensor.shape) > 1 and not name.endswith(BUFFERS):
            raise ConfigError(f"model.path = {folder}: {tensor.file}: {name} is of type {tensor.dtype}; expected "
                              f"{', '.join(FLOATS)}. Quantised weights cannot be merged: take the original checkpoint.")


def _counted(folder: Path, about: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Refuse weights whose layers or vocabulary are not those of config.json."""
    where, again = f"model.path = {folder}", "config.json and the weights belong to different models; copy both again."
    found = {int(at[1]) for name in tensors if (at := LAYER.search(name))}
    n = about.get("num_hidden_layers") or about.get("n_layer")
    if n and found and found != {*range(n)}:
        odd = sorted(found ^ {*range(n)})[0]
        what = "lack" if odd < n else "hold, beyond what config.json counts,"
        layers = FAMILIES[about["model_type"]].layer_list
        raise CheckpointError(f"the weights in {folder} {what} {layers}.{odd}. (num_hidden_layers = {n}). {again}")
    head, embedding = (next((t for k, t in tensors.items() if k.endswith(names)), None)
                       for names in (("lm_head.weight", "embed_out.weight"), EMBEDDINGS))
    vocab = about.get("vocab_size")
    if vocab and embedding and embedding.shape[0] != vocab:
        raise CheckpointError(f"{where}: {embedding.file}: the embedding is of shape {list(embedding.shape)}; expected "
                              f"vocab_size = {vocab} rows. {again}")
    if about.get("tie_word_embeddings") and head and embedding and not _equal(folder, tensors):
        raise ConfigError(f"{where}: config.json has tie_word_embeddings = True, but {head.file} holds an lm_head of "
                          "its own. Set tie_word_embeddings to false in config.json, or delete lm_head.weight.")


def _equal(folder: Path, tensors: dict[str, Tensor]) -> bool:
    """Whether head and embedding hold the same bytes."""
    pair = [next(k for k in tensors if k.endswith(names)) for names in (("lm_head.weight", "embed_out.weight"),
                                                                         EMBEDDINGS)]
    if tensors[pair[0]][:2] != tensors[pair[1]][:2]:
        return False
    parts = [_bytes(folder / tensors[name].file, name) for name in pair]
    return all(a == b for a, b in zip(*parts, strict=True))


def _bytes(path: Path, name: str) -> Iterator[bytes]:
    """The bytes of one tensor, a megabyte at a time."""
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        start, stop = json.loads(f.read(length))[name]["data_offsets"]
        f.seek(8 + length + start)
        for at in range(start, stop, 1 << 20):
            yield f.read(min(1 << 20, stop - at))


def check_header(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of a weight file; refuses one that is not whole. Raises ConfigError: not safetensors, or cut off;
    says what it may be."""
    path, where = folder / name, f"model.path = {folder}: {name}"
    size = path.stat().st_size
    with open(path, "rb") as f:
        start = f.read(8)
        length = int.from_bytes(start, "little")
        if start == b"version ":
            raise ConfigError(f"{where} is a git-lfs pointer, not weights. Run `git lfs pull` there.")
        header = f.read(length) if length <= min(size, MAX_HEADER) else b""
    try:
        about = {key: value for key, value in json.loads(header).items() if key != "__metadata__"}
        ends = max((int(value["data_offsets"][1]) for value in about.values()), default=0)
        tensors = {key: Tensor(str(value["dtype"]), tuple(map(int, value["shape"])), name)
                   for key, value in about.items()}  # fmt: skip
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as cause:
        raise ConfigError(f"{where} has no safetensors header; it is damaged or something else. Download it "
                          "again.") from cause
    if size != 8 + length + ends:
        raise ConfigError(f"{where} has {size} bytes; its header counts {8 + length + ends}. The download was cut off "
                          "or went wrong; download it again.")
    return tensors


def safetensors_only(names: Sequence[str], where: str) -> None:
    """Refuse a list of files that has no safetensors weights, saying what it has instead. Raises ConfigError: pickled
    weights only, an adapter, GGUF, or no model at all."""
    if "adapter_config.json" in names:
        if WEIGHTS in names or INDEX in names:
            raise ConfigError(f"{where}: a PEFT adapter (adapter_config.json) beside a whole model, which transformers "
                              "would load on top. Move adapter_config.json and adapter_model.safetensors elsewhere, or "
                              "merge the adapter (peft: `merge_and_unload()`, then `save_pretrained`).")
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
