"""What recoveries by training share: data, the transformers Trainer, checkpoints to go on from, limits, estimates."""

from __future__ import annotations

import logging
import shutil
import time
from abc import abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_exp.errors import DataError, require, require_one_of
from slm_exp.files import digest
from slm_exp.recovery.base import Healed, HealTask, Recovery, replaced, tensors_digest
from slm_exp.recovery.examples import SOURCES, Examples, left_padded, make_examples, read_rows
from slm_exp.registry import knob

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, Trainer

    from slm_exp.models.base import ModelHandle

log = logging.getLogger(__name__)

SCHEDULES = ("linear", "cosine", "constant")
ADAM_BYTES = 16  # of a trained parameter: itself, its gradient and two moments in float32


@dataclass
class Trained(Recovery):
    """Settings every training shares.

    Checkpoints lie in `recovery/` of the run's folder; a training that was killed goes on from the last one, with the
    same data order and dropout, and they go when it ends. Loss and learning rate go to the tracker as
    `recovery/loss` and `recovery/lr`.
    """

    data: str = "bundled"
    """hub: `path` is a data set (see `path`). jsonl: `path` is a file. bundled: the bundled prose, in windows."""
    path: str | None = None
    """A file of rows with instruction, output and maybe input, or with text; or OWNER/NAME:FILE on the hub."""
    seq_len: int = 512
    """Tokens of an example at most; prose comes in windows of so many."""
    epochs: float = 1.0
    max_steps: int | None = None
    """Stop after so many optimiser steps; the learning rate falls towards that end."""
    max_minutes: float | None = None
    """Stop by the clock (of this process). The result is then not kept in the stage cache."""
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
    """Steps between looks at the held-out loss, and between checkpoints."""
    gradient_checkpointing: bool = knob(False)
    """Compute activations again in the backward pass: less memory, about a third more time."""

    def check(self) -> None:
        require_one_of("recovery.data", self.data, SOURCES)
        require_one_of("recovery.schedule", self.schedule, SCHEDULES)
        require((self.path is not None) >= (self.data == "jsonl"), "recovery.path", self.path,
                "a file, with recovery.data=jsonl", "For example recovery.path=alpaca.jsonl.")
        require(self.path is None or self.data != "bundled", "recovery.path", self.path,
                "null with recovery.data=bundled", "For a file of your own use recovery.data=jsonl.")
        for name in ("seq_len", "batch_size", "micro_batch_size", "checkpoint_every"):
            require(getattr(self, name) >= 1, f"recovery.{name}", getattr(self, name), "a whole number >= 1")
        for name in ("warmup_steps", "held_out"):
            require(getattr(self, name) >= 0, f"recovery.{name}", getattr(self, name), "a whole number >= 0")
        for name in ("epochs", "lr"):
            require(getattr(self, name) > 0, f"recovery.{name}", getattr(self, name), "a number > 0")
        for name in ("max_steps", "max_minutes"):
            value = getattr(self, name)
            require(value is None or value > 0, f"recovery.{name}", value, "null or a number > 0")
        require(self.batch_size % self.micro_batch_size == 0, "recovery.batch_size", self.batch_size,
                f"a multiple of recovery.micro_batch_size = {self.micro_batch_size}")

    def identity(self) -> dict[str, Any]:
        from slm_exp.cache.digests import content_digest
        from slm_exp.errors import ConfigError

        out = super().identity()
        if self.data == "jsonl" and self.path is not None:
            file = Path(self.path).expanduser()
            if not file.is_file():
                raise ConfigError(f"recovery.path = {self.path}; expected an existing file. There is no such file.")
            out["path"] = content_digest(file)
        return out

    def check_data(self, dense: ModelHandle) -> None:
        if dense.tokenizer is None:
            raise DataError(f"recovery={self.name} reads text, and {dense.name} has no tokenizer.")
        read_rows(self.data, self.path, dense)

    def stored(self) -> bool:
        return self.max_minutes is None

    @abstractmethod
    def student(self, task: HealTask) -> nn.Module:
        """The model that trains: parameters that require a gradient are its own, all others may be shared."""

    @abstractmethod
    def result(self, task: HealTask, model: nn.Module) -> dict[str, Tensor]:
        """The compressed model's new tensors, from the trained model."""

    def loss(self, task: HealTask, model: nn.Module, batch: dict[str, Tensor]) -> Tensor | None:
        """The mean loss of a micro-batch; None is the model's own next-token loss."""
        return None

    def heal(self, task: HealTask) -> Healed:
        """Train. Cost: estimated and logged before the first step."""
        import torch

        examples = make_examples(read_rows(self.data, self.path, task.dense), task.dense.tokenizer, self.seq_len,
                                 self.held_out, task.seed)
        if examples.dropped:
            log.warning("recovery: %d examples have no token to learn from after cutting to %d; left out.",
                        examples.dropped, self.seq_len)
        with torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(task.seed)
            model = self.student(task)
            if not any(p.requires_grad for p in model.parameters()):
                return Healed({}, {"steps": 0})
            report = self._train(task, model, examples)
            found = {name: t.detach() for name, t in self.result(task, model).items()}
        return Healed(found, {**report, "digest": tensors_digest(found)})

    def _train(self, task: HealTask, model: nn.Module, examples: Examples) -> dict[str, Any]:
        from transformers.trainer_utils import get_last_checkpoint

        where = task.folder / "recovery" / digest({**self.identity(), "model": task.handle.digest, "seed": task.seed})
        trainer = make_trainer(self, task, model, examples, where)
        steps = self._announce(task, model, examples, trainer)
        last = get_last_checkpoint(str(where)) if where.is_dir() else None
        if last:
            log.info("going on from %s", last)
        started = time.perf_counter()
        trainer.train(resume_from_checkpoint=last)
        history = trainer.state.log_history
        shutil.rmtree(where, ignore_errors=True)
        return {
            "examples": {"train": len(examples.train), "held_out": len(examples.held_out),
                         "dropped": examples.dropped},
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "steps": trainer.state.global_step, "steps_planned": steps,
            "best_step": trainer.state.best_global_step if examples.held_out else None,
            "loss": [[h["step"], h["loss"]] for h in history if "loss" in h],
            "held_out_loss": [[h["step"], h["eval_loss"]] for h in history if "eval_loss" in h],
            "seconds": round(time.perf_counter() - started, 1),
        }

    def _announce(self, task: HealTask, model: nn.Module, examples: Examples, trainer: Trainer) -> int:
        """Log size, steps, memory and time, the last from one micro-batch back and forth. Returns the steps."""
        import torch

        steps = self.max_steps or max(1, int(self.epochs * len(examples.train) / self.batch_size))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        batch = left_padded(examples.train[: self.micro_batch_size], 0)
        batch = {name: t.to(next(model.parameters()).device) for name, t in batch.items()}
        started = time.perf_counter()
        half = torch.autocast(task.handle.device.type, torch.bfloat16, enabled=trainer.args.bf16)
        with torch.random.fork_rng(), half:
            model.train()
            loss: Any = trainer.compute_loss(model, batch)
            loss.backward()
        model.zero_grad(set_to_none=True)
        seconds = (time.perf_counter() - started) * steps * self.batch_size / self.micro_batch_size
        config = task.handle.config
        tokens = batch["input_ids"].numel()
        per_layer = 4 if self.gradient_checkpointing else 34 * 4
        states = tokens * (config.num_hidden_layers * config.hidden_size * per_layer + 8 * config.vocab_size)
        log.info("recovery=%s trains %.3g M of %.3g M parameters on %d examples (%d held out): %d steps of %d, about "
                 "%.1f minutes%s and %.1f GB beside the dense model", self.name, trained / 1e6,
                 task.handle.n_params / 1e6, len(examples.train), len(examples.held_out), steps, self.batch_size,
                 seconds / 60, f" (stops after {self.max_minutes:g})" if self.max_minutes else "",
                 (weights + ADAM_BYTES * trained + states) / 1e9)
        return steps


def make_trainer(cfg: Trained, task: HealTask, model: nn.Module, examples: Examples, where: Path) -> Trainer:
    """A Trainer by a recipe, on the compressed model's device."""
    import torch
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    tokenizer = task.dense.tokenizer
    assert tokenizer is not None
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    device = task.handle.device
    held = bool(examples.held_out)
    half = task.handle.model.dtype != torch.float32  # what trains is float32 all the same: autocast joins the two

    class Progress(TrainerCallback):
        """Tells the tracker, and ends by the clock; the last step is looked at and saved like any checkpoint."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.started = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if cfg.max_minutes and time.monotonic() - self.started > 60 * cfg.max_minutes:
                control.should_training_stop = True
            if control.should_training_stop or state.global_step >= state.max_steps:
                control.should_evaluate, control.should_save = held, held

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            names = {"loss": "loss", "learning_rate": "lr", "eval_loss": "held_out_loss", "grad_norm": "grad_norm"}
            told = {ours: logs[theirs] for theirs, ours in names.items() if theirs in logs}
            if told:
                log.info("step %d of %d: %s", state.global_step, state.max_steps,
                         ", ".join(f"{k} {v:.4g}" for k, v in told.items()))
            if told and task.track:
                task.track.log({"recovery": {**told, "step": state.global_step}})

    class Recipe(Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            with torch.autocast(device.type, torch.bfloat16, enabled=arguments.bf16):
                own = cfg.loss(task, model, inputs)
            if own is None:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if num_items_in_batch is not None and model.training:  # as Trainer does: micro-batches weigh by tokens
                own = own * ((inputs["labels"][:, 1:] != -100).sum() / num_items_in_batch)
            return (own, {"loss": own}) if return_outputs else own

    # newer versions have another name for it and warn of this one
    saving: dict[str, Any] = {"gradient_checkpointing": True} if cfg.gradient_checkpointing else {}
    arguments = TrainingArguments(
        output_dir=str(where),
        per_device_train_batch_size=cfg.micro_batch_size,
        per_device_eval_batch_size=cfg.micro_batch_size,
        gradient_accumulation_steps=cfg.batch_size // cfg.micro_batch_size,
        learning_rate=cfg.lr,
        lr_scheduler_type=cfg.schedule if cfg.schedule != "constant" else "constant_with_warmup",
        warmup_steps=cfg.warmup_steps,
        num_train_epochs=cfg.epochs,
        max_steps=cfg.max_steps or -1,
        eval_strategy="steps" if held else "no",
        eval_steps=cfg.checkpoint_every,
        save_strategy="steps",
        save_steps=cfg.checkpoint_every,
        save_total_limit=2,
        load_best_model_at_end=held,
        metric_for_best_model="eval_loss" if held else None,
        greater_is_better=False if held else None,
        prediction_loss_only=True,
        logging_steps=1,
        bf16=half or (device.type == "cuda" and torch.cuda.is_bf16_supported()),
        use_cpu=device.type == "cpu",
        **saving,
        seed=task.seed,
        data_seed=task.seed,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs without a launcher: DataParallel would hide the model
    trainer = Recipe(model=model, args=arguments, train_dataset=examples.train,  # type: ignore[arg-type]
                     eval_dataset=examples.held_out if held else None,  # type: ignore[arg-type]
                     data_collator=lambda rows: left_padded(rows, pad), callbacks=[Progress()])
    trainer.remove_callback(PrinterCallback)  # it prints every step; Progress logs it
    return trainer


def trainable_copy(model: PreTrainedModel, names: Collection[str]) -> PreTrainedModel:
    """A copy of a model in which the named parameters are its own, in float32, and trained; all others are shared."""
    import torch

    copy = replaced(model, {name: model.get_parameter(name).detach().clone() for name in names})
    with torch.no_grad():
        for name in names:
            p = copy.get_parameter(name)
            p.data = p.data.float()
            p.requires_grad_(True)
    return copy


def trained_tensors(task: HealTask, model: nn.Module) -> dict[str, Tensor]:
    """What was trained, by name, in the dtype of the compressed model."""
    return {name: p.detach().to(task.handle.model.get_parameter(name).dtype)
            for name, p in model.named_parameters() if p.requires_grad}
