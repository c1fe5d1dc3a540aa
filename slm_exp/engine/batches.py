"""Rows of tokens as batches that a training reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Row = dict[str, list[int]]
"""`input_ids` and `labels` of a sequence."""
IGNORED = -100  # the label of a token that is not trained on


def left_padded(examples: Sequence[Row], pad: int) -> dict[str, Tensor]:
    """A batch: rows filled on the left to a multiple of eight, what was filled neither attended to nor trained on. Nor
    is a row's first token, which only padding comes before."""
    import torch

    longest = -(-max(len(e["input_ids"]) for e in examples) // 8) * 8
    whole = [{**e, "attention_mask": [1] * len(e["input_ids"])} for e in examples]
    filled = {"input_ids": pad, "labels": IGNORED, "attention_mask": 0}
    batch = {name: torch.tensor([[value] * (longest - len(e[name])) + e[name] for e in whole])
             for name, value in filled.items()}
    batch["labels"][batch["attention_mask"].cumsum(1) <= 1] = IGNORED
    return batch
