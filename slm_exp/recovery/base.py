"""The `recovery` group: give back part of what compression took. A recipe makes tensors, one function puts them in."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from slm_exp.core.cost import Tokens, Work
from slm_exp.core.files import digest, write_json
from slm_exp.core.registry import Component, Fields
from slm_exp.core.together import SectionLog, Together
from slm_exp.core.types import CalibrationTokens, MergePlan
from slm_exp.engine.batches import Row
from slm_exp.models.base import ModelHandle
from slm_exp.models.sizes import Sizes

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

JUDGED = 8192
"""Tokens at most that decide whether a recovery is kept."""


@dataclass(frozen=True)
class RecoveryTask:
    """Everything a recovery may look at."""

    handle: ModelHandle
    """The compressed model; its tensors are shared with `dense` and stay as they are."""
    dense: ModelHandle
    plan: MergePlan
    """What made the one of the other."""
    tokens: CalibrationTokens
    """Those the plan was found with."""
    folder: Path
    """The run's, for checkpoints of a training."""
    track: SectionLog | None = None
    seed: int = 0


@dataclass(frozen=True)
class Relative:
    """One plan of a family."""

    task: RecoveryTask
    hosts: tuple[int, ...]
    """For every layer of its model, the layer of the dense one whose adapter it takes; see `merging.surgery.hosts`."""


@dataclass(frozen=True)
class RecoveryResult:
    """What a recovery changed: new tensors by parameter name, and its report. Everything else is shared."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """By name as in the compressed model's `named_parameters()`, a tied tensor once; or new ones: those of maps behind
    its layers (merging/maps.py)."""
    report: dict[str, Any] = field(default_factory=dict)
    """`recovery` of the record."""

    def save(self, folder: Path) -> None:
        """Raises OSError where the files cannot be written, e.g. because the disk is full."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.tensors.items()}
        try:
            save_file(tensors, folder / "recovered.safetensors")
        except SafetensorError as cause:  # what the library makes of an error of the system
            raise OSError(f"{folder / 'recovered.safetensors'}: {cause}") from cause
        write_json(folder / "recovered.json", self.report)

    @classmethod
    def load(cls, folder: Path) -> RecoveryResult:
        from safetensors.torch import load_file

        return cls(load_file(folder / "recovered.safetensors"),
                   json.loads((folder / "recovered.json").read_text(encoding="utf-8")))


@dataclass
class Recovery(Component, ABC):
    """A recovery recipe."""

    changes_weights: ClassVar[bool] = True
    maps_stream: ClassVar[bool] = False
    """Whether it puts maps of the residual stream behind layers."""

    streams: ClassVar[bool] = False
    """Whether it goes through the layers one by one, so that they may stay in their files."""

    file_passes: ClassVar[int] = 0
    """Over the files of a model whose layers stay there."""

    @property
    def wall_clock_limit(self) -> float | None:
        """Minutes after which it stops; None where it ends by itself."""
        return None

    def parts(self) -> tuple[Recovery, ...]:
        """What is carried out, one after the other, each on what the one before left: itself, unless it is a chain."""
        return (self,)

    def refuses(self, others: Together) -> str | None:
        """Why this recipe cannot run with the rest of the config, or None. Checked before anything loads."""
        return None

    def needs_resident(self) -> str | None:
        return None if self.streams else f"recovery={self.name} takes all weights at once"

    def check_source(self) -> None:
        """Raise where the data can only be had from a hub that does not answer. Called before a model is looked at."""

    def check_data(self, dense: ModelHandle) -> None:
        """Raise ConfigError or DataError where the recipe's data is absent or malformed. Called before weights load."""

    def lengths(self) -> dict[str, int]:
        """The longest sequence that each setting makes the model read."""
        return {}

    def trains(self) -> bool:
        """Whether processes that a launcher started take part."""
        return False

    def ranks(self) -> int:
        """Processes that train together in one job, a GPU each."""
        return 1

    def stored(self) -> bool:
        """Whether the stage cache may keep the result: the same task gives it again."""
        return True

    def cost(self, sizes: Sizes, layers: float) -> tuple[Work, list[str]]:
        """Of a model of so many layers, and what could not be counted; `sizes` are the dense model's."""
        return Work(), [f"recovery={self.name}: how long it takes is not known"]

    def memory(self, sizes: Sizes, width: float) -> float:
        """Bytes that it takes beside both models, about, what it makes included. `width`: bytes of a weight."""
        return 0

    @abstractmethod
    def recover(self, task: RecoveryTask) -> RecoveryResult:
        """New tensors for the compressed model. Neither model is changed, bit for bit, also on an exception."""

    def judged_on(self, task: RecoveryTask) -> list[Row]:
        """Rows that decide whether a recovery is kept: none that it was fitted on. Here those that the plan was found
        with; a recovery that reads text holds some of its own out."""
        return token_rows(task.tokens.tokens_NT)

    def judging_cost(self, sizes: Sizes, layers: float, tokens: Tokens) -> Work:
        """Of the look at both models; `tokens` are the calibration's shape."""
        total = min(JUDGED, tokens.total) if self.changes_weights else 0
        return Work(blocks=2 * layers * sizes.block_flops(total, tokens.t), head=4 * sizes.head_flops(total))


def token_rows(tokens_NT: np.ndarray) -> list[Row]:
    """Sequences as rows that are trained on everywhere, JUDGED tokens at most (one row at least)."""
    rows = tokens_NT[: max(1, JUDGED // tokens_NT.shape[1])].tolist()
    return [{"input_ids": row, "labels": row} for row in rows]


def with_tensors(handle: ModelHandle, result: RecoveryResult, identity: dict[str, Any]) -> ModelHandle:
    """A model with some tensors replaced, built on first use of `.model`; the input where there are none. Its digest is
    of the model, the recipe and its data (`identity`), and of the new tensors: other code of a recipe, or a wall-clock
    limit, gives another model."""
    if not result.tensors:
        return handle
    from slm_exp.merging.maps import mapped_config

    lineage = handle.lineage or {"base": handle.name, "base_digest": handle.digest}
    tensors = result.tensors
    return dataclasses.replace(
        handle, config=mapped_config(handle.config, tensors),
        digest=digest({"model": handle.digest, **identity, "tensors": tensors_digest(tensors)}),
        load_model=lambda: copy_with(handle.model, tensors), load_tokenizer=lambda: handle.tokenizer,
        lineage={**lineage, "recovery": _after(lineage.get("recovery"), identity["recovery"])})


def _after(first: Fields | None, then: Fields) -> Fields:
    """What a model was recovered by, for its card."""
    return then if first is None else {"name": f"{first['name']}, then {then['name']}", "steps": [first, then]}


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Of names and contents: results of a wall-clock limit, or of a GPU, differ from each other."""
    import torch

    found = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        found.update(name.encode())
        found.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def copy_with(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    """See `merging.sharing.shared_copy`; new maps of the stream are put behind their layers."""
    from slm_exp.merging.maps import with_maps

    return with_maps(model, tensors)
