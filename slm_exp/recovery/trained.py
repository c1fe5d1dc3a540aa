"""What recoveries by training share: their settings, data, and one training of the compressed model."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from slm_exp.core.cache.digests import content_digest
from slm_exp.core.cost import ADAM_BYTES, Work, activations
from slm_exp.core.errors import ConfigError, DataError, require, require_one_of
from slm_exp.core.files import digest, no_file
from slm_exp.core.registry import Fields, knob
from slm_exp.core.runtime import world
from slm_exp.core.together import Together
from slm_exp.engine.batches import Row, left_padded
from slm_exp.models.base import ModelHandle
from slm_exp.models.sizes import Sizes
from slm_exp.recovery import examples as sources
from slm_exp.recovery.base import JUDGED, Recovery, RecoveryResult, RecoveryTask, copy_with, tensors_digest
from slm_exp.recovery.examples import OWN, SOURCES, Examples, expected_rows, make_examples, read_rows

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger(__name__)

SCHEDULES = ("linear", "cosine", "constant")
PRECISIONS = ("auto", "bfloat16", "float32")


def next_token_loss(model: nn.Module, batch: dict[str, Tensor], *args: Any) -> Tensor:
    """See `engine.head_loss.next_token_loss`."""
    from slm_exp.engine import head_loss

    return head_loss.next_token_loss(model, batch, *args)


@dataclass
class Trained(Recovery):
    """Settings every training shares.

    Checkpoints lie in `recovery/` of the run's folder; a training that was killed goes on from the last one, with the
    same data order and dropout, and they go when it ends. Loss and learning rate go to the tracker as
    `recovery/loss` and `recovery/lr`.
    """

    forwards: ClassVar[float] = 3
    """What a step costs, in forward passes of the student."""
    runs_dense: ClassVar[bool] = False
    """Whether a step takes a forward pass of the dense model too."""

    data: str = "bundled"
    """hub: `path` is a data set (see `path`). jsonl: `path` is a file. bundled, mixture: the text of that
    calibration, in windows."""
    path: str | None = None
    """A file of rows with instruction, output and maybe input, or with text; or OWNER/NAME:FILE on the hub."""
    seq_len: int = 512
    """Tokens of an example at most; prose comes in windows of so many."""
    epochs: float = 1.0
    max_steps: int | None = None
    """Stop after so many optimiser steps; the learning rate falls towards that end."""
    max_minutes: float | None = None
    """Wall-clock limit (of this process). The result is then not kept in the stage cache."""
    lr: float = 1e-4
    schedule: str = "linear"
    """How the learning rate falls after the warm-up: linear, cosine, or constant."""
    warmup_steps: int = 100
    batch_size: int = 64
    """Examples per optimiser step."""
    micro_batch_size: int = 4
    """Examples in memory at once; gradients of batch_size / micro_batch_size of these are summed."""
    held_out: int = 200
    """Examples that are not trained on; at most a fifth of all. The checkpoint with the least loss on them is kept."""
    checkpoint_every: int = 100
    """Steps between evaluations of the held-out loss, and between checkpoints."""
    precision: str = "auto"
    """Of the matrix products: bfloat16, float32, or auto: bfloat16 where the device has instructions for it. Weights
    that train, their moments and sums are float32 either way."""
    gradient_checkpointing: bool = knob(False)
    """Compute activations again in the backward pass: less memory, about a third more time."""
    processes: int = knob(1)
    """Processes of this machine that train together, a GPU each; the run starts them itself, as torchrun does."""

    def check(self) -> None:
        require_one_of("recovery.data", self.data, SOURCES)
        require_one_of("recovery.schedule", self.schedule, SCHEDULES)
        require_one_of("recovery.precision", self.precision, PRECISIONS)
        require((self.path is not None) >= (self.data == "jsonl"), "recovery.path", self.path,
                "a file, with recovery.data=jsonl", "For example recovery.path=alpaca.jsonl.")
        require(self.path is None or self.data not in OWN, "recovery.path", self.path,
                f"null with recovery.data={self.data}", "For a file of your own use recovery.data=jsonl.")
        self.at_least(1, "seq_len", "batch_size", "micro_batch_size", "checkpoint_every", "processes")
        self.at_least(0, "warmup_steps", "held_out")
        self.positive("epochs", "lr", "max_steps", "max_minutes")
        self._check_ranks(self.processes)

    def _check_ranks(self, ranks: int) -> None:
        size = f"recovery.micro_batch_size = {self.micro_batch_size}"
        require(self.batch_size % (self.micro_batch_size * ranks) == 0, "recovery.batch_size", self.batch_size,
                f"a multiple of {size}" if ranks == 1 else f"a multiple of {ranks} processes x {size}")

    def identity(self) -> Fields:
        out = super().identity()
        if self.data == "jsonl" and self.path is not None:
            file = Path(self.path).expanduser()
            if reason := no_file(file):
                raise ConfigError(f"recovery.path = {self.path}: {reason} Expected a file.")
            out["path"] = content_digest(file)
        return out

    @property
    def wall_clock_limit(self) -> float | None:
        return self.max_minutes

    def refuses(self, others: Together) -> str | None:
        if self.precision == "float32" and others.model_dtype in ("bfloat16", "float16"):
            return (f"recovery.precision = float32; expected auto or bfloat16 with model.dtype = {others.model_dtype}, "
                    "whose frozen weights and dense states have no more.")
        return None

    def check_source(self) -> None:
        if self.data == "hub":
            repo, file = sources.hub_file(self.path)
            repo.require(file)

    def check_data(self, dense: ModelHandle) -> None:
        if dense.tokenizer is None:
            raise DataError(f"recovery={self.name} reads text, and {dense.name} has no tokenizer.")
        read_rows(self.data, self.path, dense)

    def lengths(self) -> dict[str, int]:
        return {"recovery.seq_len": self.seq_len}

    def trains(self) -> bool:
        return True

    def ranks(self) -> int:
        return self.processes

    def stored(self) -> bool:
        return self.max_minutes is None

    def cost(self, sizes: Sizes, layers: float) -> tuple[Work, list[str]]:
        rows = expected_rows(self.data, self.path, self.seq_len, self.held_out)
        steps = self.max_steps or (None if rows is None else max(1, int(self.epochs * rows / self.batch_size)))
        if steps is None:
            return Work(), [f"recovery.data={self.data}: how many examples there are is not known"]
        total = steps * self.batch_size * self.seq_len
        forwards = self.passes() + self.gradient_checkpointing
        blocks = layers * forwards * sizes.block_flops(total, self.seq_len)
        if self.runs_dense:
            blocks += sizes.n_layers * sizes.block_flops(total, self.seq_len)
        limit = [f"recovery stops after {self.max_minutes:g} minutes"] if self.max_minutes else []
        return Work(blocks=blocks, head=forwards * sizes.head_flops(total)), limit

    def passes(self) -> float:
        """What a step costs, in forward passes of the student."""
        return self.forwards

    def memory(self, sizes: Sizes, width: float) -> float:
        return sizes.total * ADAM_BYTES + self._activations(sizes)

    def _activations(self, sizes: Sizes) -> float:
        return activations(self.micro_batch_size, self.seq_len, sizes.n_layers, sizes.hidden, sizes.heads,
                           self.gradient_checkpointing)

    @abstractmethod
    def student(self, task: RecoveryTask) -> nn.Module:
        """The model that trains: parameters that require a gradient are its own, all others may be shared."""

    def trainable_copy(self, task: RecoveryTask, names: Collection[str]) -> nn.Module:
        """A copy of the compressed model in which the named parameters are its own, in float32, and trained."""
        model = task.handle.model
        copy = copy_with(model, {name: model.get_parameter(name).detach().clone() for name in names})
        for p in map(copy.get_parameter, names):
            p.data = p.data.float()
            p.requires_grad_(True)
        return copy

    def result(self, task: RecoveryTask, model: nn.Module) -> dict[str, Tensor]:
        """The compressed model's new tensors, from the trained model: what was trained, in the model's dtype."""
        return {name: p.detach().to(task.handle.model.get_parameter(name).dtype)
                for name, p in model.named_parameters() if p.requires_grad}

    def at(self, model: nn.Module, done: float) -> None:
        """Told before every step what share of the steps is done."""

    def loss(self, task: RecoveryTask, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The mean loss of a micro-batch, here of the tokens to come."""
        return next_token_loss(model, batch)

    def _examples(self, task: RecoveryTask) -> Examples:
        rows = read_rows(self.data, self.path, task.dense)
        return make_examples(rows, task.dense.tokenizer, self.seq_len, self.held_out, task.seed)

    def judged_on(self, task: RecoveryTask) -> list[Row]:
        held = self._examples(task).held_out
        return held[: max(1, JUDGED // self.seq_len)] if held else super().judged_on(task)

    def recover(self, task: RecoveryTask) -> RecoveryResult:
        """Train. Cost: estimated, logged and reported before the first step."""
        return self.train(task, lambda: self.student(task), partial(self.loss, task), partial(self.result, task),
                          task.handle.digest)

    def train(self, task: RecoveryTask, student: Callable[[], nn.Module],
              loss: Callable[[nn.Module, dict[str, Tensor]], Tensor], result: Callable[[nn.Module], dict[str, Tensor]],
              of: object) -> RecoveryResult:
        """The tensors that a training gives, and its report.

        Args:
            student, loss: see `engine.training.Training`.
            result: the tensors, of the trained model.
            of: what distinguishes the student, in JSON: its checkpoints are those of no other.
        """
        from slm_exp.engine.training import Training, checkpoints_in

        self._check_ranks(world())
        tokenizer, examples = task.dense.tokenizer, self._examples(task)
        if examples.dropped:
            log.warning("recovery: %d examples have no token to learn from after cutting to %d; left out.",
                        examples.dropped, self.seq_len)
        assert tokenizer is not None
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
        key = digest({**self.identity(), "model": of, "seed": task.seed})
        training = Training(
            f"recovery={self.name}", self, student, loss, examples.train, examples.held_out,
            collate=partial(left_padded, pad=pad), device=task.handle.device,
            half=str(task.handle.model.dtype) != "torch.float32", folder=task.folder / "recovery" / key, seed=task.seed,
            track=task.track, at=self.at)
        with checkpoints_in(training.folder):
            done = training.run()
            if done is None:
                return RecoveryResult({}, {"steps": 0})
            model, report = done
            tensors = {name: t.detach() for name, t in result(model).items()}
        counts = {"train": len(examples.train), "held_out": len(examples.held_out), "dropped": examples.dropped}
        return RecoveryResult(tensors, {"examples": counts, **report, "digest": tensors_digest(tensors)})
