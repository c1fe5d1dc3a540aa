"""The `recovery` group: heal what compression broke. A recipe gives new tensors; putting them in is one for all."""

from __future__ import annotations

import copy
import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from slm_exp.core.files import digest, write_json
from slm_exp.core.registry import Component

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from slm_exp.core.types import CalibrationTokens, MergePlan
    from slm_exp.models.base import ModelHandle
    from slm_exp.pipeline.config import RunConfig
    from slm_exp.runs.tracking.base import Tracker


@dataclass(frozen=True)
class HealTask:
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
    track: Tracker | None = None
    seed: int = 0


@dataclass(frozen=True)
class Healed:
    """What a recovery changed: new tensors by parameter name, and what there is to tell. Everything else is shared."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """By name as in the compressed model's `named_parameters()`; a tied tensor once."""
    report: dict[str, Any] = field(default_factory=dict)
    """`recovery` of the record."""

    def save(self, folder: Path) -> None:
        """Write healed.safetensors and healed.json.

        Raises:
            OSError: they cannot be written, e.g. the disk is full.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.tensors.items()}
        try:
            save_file(tensors, folder / "healed.safetensors")
        except SafetensorError as cause:  # what the library makes of an error of the system
            raise OSError(f"{folder / 'healed.safetensors'}: {cause}") from cause
        write_json(folder / "healed.json", self.report)

    @classmethod
    def load(cls, folder: Path) -> Healed:
        from safetensors.torch import load_file

        return cls(load_file(folder / "healed.safetensors"),
                   json.loads((folder / "healed.json").read_text(encoding="utf-8")))


@dataclass
class Recovery(Component, ABC):
    """A recovery recipe."""

    changes_weights: ClassVar[bool] = True

    def refuses(self, cfg: RunConfig) -> str | None:
        """Why this recipe cannot run with the rest of the config, or None. Checked before anything loads."""
        return None

    def check_data(self, dense: ModelHandle) -> None:
        """Raise ConfigError or DataError where the recipe's data is absent or malformed. Called before weights load."""

    def trains(self) -> bool:
        """Whether processes that a launcher started take part."""
        return False

    def stored(self) -> bool:
        """Whether the stage cache may keep the result: the same task gives it again."""
        return True

    @abstractmethod
    def heal(self, task: HealTask) -> Healed:
        """New tensors for the compressed model. Neither model is changed, bit for bit, also on an exception."""


def with_tensors(handle: ModelHandle, found: Healed, identity: dict[str, Any]) -> ModelHandle:
    """A model with some tensors replaced, built on first use of `.model`; the input where there are none.

    Its digest is of the model, the recipe and its data (`identity`), and of the new tensors: other code of a recipe, or
    a stop by the clock, gives another model.
    """
    if not found.tensors:
        return handle
    return dataclasses.replace(
        handle,
        digest=digest({"model": handle.digest, **identity, "tensors": tensors_digest(found.tensors)}),
        load_model=lambda: replaced(handle.model, found.tensors),
        load_tokenizer=lambda: handle.tokenizer,
        lineage={**(handle.lineage or {"base": handle.name, "base_digest": handle.digest}),
                 "recovery": identity["recovery"]},
    )


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Of names and contents: what stopped by the clock, or on a GPU, is told apart."""
    import hashlib

    import torch

    found = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        found.update(name.encode())
        found.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def replaced(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    """A copy of a model's modules that shares every tensor but those given; tied ones stay tied.

    The new tensors take the device and dtype of the ones they replace.
    """
    import torch

    # A deep copy that finds every tensor already copied: as itself, or as its replacement wherever it occurs.
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for name, tensor in tensors.items():
        old = model.get_parameter(name)
        memo[id(old)] = torch.nn.Parameter(tensor.detach().to(old.device, old.dtype), requires_grad=False)
    return copy.deepcopy(model, memo)
