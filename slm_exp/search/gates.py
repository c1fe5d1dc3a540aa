"""Gates that learn which parts of a model it can do without. Letters: U parts."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slm_exp.core.cache.journal import Journal
from slm_exp.core.types import SUBLAYERS
from slm_exp.engine.batches import left_padded
from slm_exp.engine.head_loss import next_token_loss
from slm_exp.engine.training import Training, checkpoints_in
from slm_exp.merging.sharing import shared_copy
from slm_exp.models.base import ModelHandle
from slm_exp.search.greedy import Unit
from slm_exp.search.inputs import journal_of
from slm_exp.search.task import PlanTask

SHARPNESS, LOW, HIGH = 2 / 3, -0.1, 1.1
"""Of the hard concrete distribution (arXiv:1712.01312): its temperature, and the range that a sigmoid is stretched to
before it is clipped to [0, 1]."""
START = 3.0
"""Log-odds of a gate at first: nearly open."""
TIGHTENING = 0.5
"""Share of the steps in which the budget tightens."""
EVERY = 20
"""Steps between checkpoints."""


@dataclass(frozen=True)
class Learning:
    """How gates learn; see `methods.gates.Gates`."""

    steps: int
    rows: int
    """Sequences of a step."""
    together: int
    """In memory at once, at most."""
    lr: float
    pressure: float


@dataclass
class Recipe:
    """As `engine.training.Recipe` wants it."""

    seq_len: int
    max_steps: int | None
    lr: float
    batch_size: int
    micro_batch_size: int
    checkpoint_every: int
    epochs: float = 1.0
    max_minutes: float | None = None
    schedule: str = "linear"
    warmup_steps: int = 0
    precision: str = "auto"
    gradient_checkpointing: bool = False


class Gated(nn.Module):
    """A model whose parts are multiplied by gates. Only the gates are this module's own: they alone train and are
    saved."""

    def __init__(self, handle: ModelHandle, units: Sequence[Unit]) -> None:
        super().__init__()
        self.log_odds_U = nn.Parameter(torch.full((len(units),), START))
        self._models = (shared_copy(handle.model),)
        self.config = self.model.config
        self.tightened = 0.0
        """Share of what has to go that has to go by now."""
        self._gates_U = torch.ones(len(units))
        layout = handle.layout
        for at, unit in enumerate(units):
            for kind in (unit.kind,) if unit.kind else SUBLAYERS:
                for name in layout.outputs[kind]:
                    writes = layout.layers(self.model)[unit.layer].get_submodule(layout.norm_behind(name) or name)
                    writes.register_forward_hook(partial(self._through, at))

    @property
    def model(self) -> Any:
        return self._models[0]

    def set_attn_implementation(self, kind: str) -> None:
        self.model.set_attn_implementation(kind)

    def _through(self, at: int, module: nn.Module, args: Any, out: Any) -> Any:
        if isinstance(out, tuple):
            return (self._through(at, module, args, out[0]), *out[1:])
        return out * self._gates_U[at].to(out.device, out.dtype)

    def draw(self) -> None:
        """Draw every gate anew."""
        noise_U = torch.rand(len(self.log_odds_U)).clamp(1e-6, 1 - 1e-6).logit().to(self.log_odds_U)
        soft_U = torch.sigmoid((noise_U + self.log_odds_U) / SHARPNESS)
        self._gates_U = (soft_U * (HIGH - LOW) + LOW).clamp(0, 1)

    @property
    def open_U(self) -> Tensor:
        """Probability of each gate to be more than 0."""
        return torch.sigmoid(self.log_odds_U - SHARPNESS * math.log(-LOW / HIGH))


def learned(task: PlanTask, units: Sequence[Unit], gains: Sequence[float], need: float, how: Learning) -> list[float]:
    """For every part, the probability that its gate is open after learning. Kept in the task's store.

    Args:
        gains: what each part takes away.
        need: how much has to go, in the same unit.
    """
    inputs = {"value": "gates", "model": task.handle.digest, "device": task.handle.device.type, "seed": task.seed,
              "tokens": task.tokens.digest, "units": units, "gains": gains, "need": need, "how": vars(how)}
    folder = journal_of(task.store, inputs)
    journal = Journal(folder)
    if "open" not in journal.entries:
        with ExitStack() as kept:
            own = folder or Path(kept.enter_context(tempfile.TemporaryDirectory()))
            journal.append("open", _learn(task, units, torch.tensor(gains) / need, how, own / "training"))
    return [math.nan if p is None else float(p) for p in journal.entries["open"]]


def _learn(task: PlanTask, units: Sequence[Unit], gains_U: Tensor, how: Learning, folder: Path) -> list[float | None]:
    """`gains_U`: in parts of what has to go."""
    dense, rows = task.handle.model, [{"input_ids": row, "labels": row} for row in task.tokens.tokens_NT.tolist()]

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        assert isinstance(model, Gated)
        model.draw()
        gone = ((1 - model.open_U) * gains_U.to(model.log_odds_U)).sum()
        missing = (model.tightened - gone).clamp(min=0)
        return next_token_loss(model.model, batch, 0.0, dense) + how.pressure * missing

    def at(model: nn.Module, done: float) -> None:
        assert isinstance(model, Gated)
        model.tightened = min(1.0, done / TIGHTENING)

    together = max(k for k in range(1, how.together + 1) if how.rows % k == 0)
    recipe = Recipe(task.tokens.tokens_NT.shape[1], how.steps, how.lr, how.rows, together, EVERY)
    training = Training(
        "method=gates", recipe, lambda: Gated(task.handle, units), loss, rows, [], partial(left_padded, pad=0),
        task.handle.device, str(dense.dtype) != "torch.float32", folder, task.seed, at=at)
    with checkpoints_in(folder):
        done = training.run()
        assert done is not None
        model, _ = done
        assert isinstance(model, Gated)
        return [p if math.isfinite(p) else None for p in model.open_U.tolist()]
