"""Writing parts of a model folder. Imports transformers."""

from __future__ import annotations

import copy
from pathlib import Path

from transformers import PreTrainedTokenizerBase


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer without the traces of how this machine loaded it."""
    clean = copy.deepcopy(tokenizer)
    for trace in ("is_local", "local_files_only", "name_or_path"):
        clean.init_kwargs.pop(trace, None)
    clean.save_pretrained(folder)
