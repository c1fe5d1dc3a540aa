"""Writing parts of a model folder. Imports transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from slm_exp.core.files import read_json, write_json


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer without the traces of how this machine loaded it."""
    clean = copy.deepcopy(tokenizer)
    for trace in ("is_local", "local_files_only", "name_or_path"):
        clean.init_kwargs.pop(trace, None)
    clean.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    about: dict[str, Any] = read_json(path)
    if about.get("tokenizer_class") == "TokenizersBackend":  # transformers 5's name of what 4 calls this
        write_json(path, {**about, "tokenizer_class": "PreTrainedTokenizerFast"})


def for_older_readers(path: Path) -> None:
    """Write into a config.json, beside what transformers 5 reads, what transformers 4 reads in its place.

    That is `rope_theta` and `rope_scaling` for `rope_parameters`, `torch_dtype` for `dtype`. Tables by layer kind have
    names of their own in transformers 4 (Gemma 3's rope_local_base_freq); of others nothing is written.
    """
    about: dict[str, Any] = read_json(path)
    rope = about.get("rope_parameters") or {}
    added: dict[str, Any] = {}
    kinds = [part for part in rope.values() if isinstance(part, dict)]
    if about.get("model_type") == "gemma3_text" and {"full_attention", "sliding_attention"} <= set(rope):
        added["rope_local_base_freq"] = rope["sliding_attention"].get("rope_theta")
        rope, kinds = rope["full_attention"], []
    if "rope_theta" in rope and not kinds:
        added["rope_theta"] = rope["rope_theta"]
        if "partial_rotary_factor" in rope:
            added["partial_rotary_factor"] = rope["partial_rotary_factor"]
            added |= {"rotary_pct": rope["partial_rotary_factor"]} if about.get("model_type") == "gpt_neox" else {}
        scaled = rope.get("rope_type", "default") != "default"
        added["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"} if scaled else None
    if "dtype" in about:
        added["torch_dtype"] = about["dtype"]
    if added:
        write_json(path, {**added, **about})
