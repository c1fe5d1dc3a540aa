"""A random model in a folder of sharded safetensors, and handles of it: resident and streamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from builders.models import tiny
from slm_exp.models.base import ModelHandle
from slm_exp.models.hf import HF


def saved(folder: Path, family: str = "llama", shards: str = "30KB", **fields: Any) -> Path:
    """A tiny random model as files of at most this size."""
    handle = tiny(family, **fields)
    handle.model.save_pretrained(folder, max_shard_size=shards)
    assert handle.tokenizer is not None
    handle.tokenizer.save_pretrained(folder)
    return folder


def both(folder: Path, dtype: str = "float32") -> tuple[ModelHandle, ModelHandle]:
    """(resident, streamed)."""
    resident, other = (HF(path=str(folder), dtype=dtype).open(torch.device("cpu"), folder) for _ in "12")
    return resident, other.stream()
