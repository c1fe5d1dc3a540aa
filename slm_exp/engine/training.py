"""One training by the transformers Trainer: checkpoints to go on from, a wall-clock limit, an estimate beforehand."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from slm_exp.core.cost import ADAM_BYTES, EAGER, activations
from slm_exp.core.errors import SlmError
from slm_exp.core.runtime import has_bfloat16, rank, set_malloc, world
from slm_exp.core.together import SectionLog
from slm_exp.engine.batches import Row
from slm_exp.engine.head_loss import LOGITS

log = logging.getLogger(__name__)

DAY = 86_400
KEPT = 2  # checkpoints: the best and the last

Batch = dict[str, Tensor]


class Recipe(Protocol):
    """How long, how fast and how exact a training is: see `recovery.trained.Trained`."""

    seq_len: int
    epochs: float
    max_steps: int | None
    max_minutes: float | None
    lr: float
    schedule: str
    warmup_steps: int
    batch_size: int
    micro_batch_size: int
    checkpoint_every: int
    precision: str
    gradient_checkpointing: bool


@dataclass(frozen=True)
class Training:
    """What is trained, on what, and where."""

    name: str
    """In messages, e.g. `recovery=full`."""
    recipe: Recipe
    student: Callable[[], nn.Module]
    """Makes the model that trains: parameters that require a gradient are its own, all others may be shared."""
    loss: Callable[[nn.Module, Batch], Tensor]
    """Mean loss of a micro-batch."""
    train: Sequence[Row]
    held_out: Sequence[Row]
    collate: Callable[[Sequence[Row]], Batch]
    """Rows to a batch whose `labels` are below 0 where nothing is trained on."""
    device: torch.device
    half: bool
    """Whether frozen weights are of 16 bits, so that matrix products are too."""
    folder: Path
    """Of the checkpoints."""
    seed: int
    track: SectionLog | None = None
    """Gets `recovery/loss`, `recovery/lr`."""
    at: Callable[[nn.Module, float], None] = lambda model, done: None
    """Called before every step with the share of the steps that are done."""

    def run(self) -> tuple[nn.Module, dict[str, Any]] | None:
        """The trained model and the report; None where no parameter trains. Goes on from the last whole checkpoint in
        `folder`, with the same data order and dropout. Raises SlmError: the disk has no room for the checkpoints."""
        with torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(self.seed)
            model = self.student()
            return self._run(model) if any(p.requires_grad for p in model.parameters()) else None

    def _run(self, model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        if self.device.type == "cpu":
            keep_freed_memory()
            if self.recipe.seq_len <= EAGER:
                model.set_attn_implementation("eager")  # type: ignore[operator]
        trainer = self._trainer(model)
        estimate = self._estimate(model, trainer)
        last = last_checkpoint(self.folder)
        if last:
            log.info("going on from %s", last)
        started = time.perf_counter()
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        history = trainer.state.log_history
        if trainer.is_fsdp_enabled:  # every process holds a part of each weight: gather them in a model of its own
            gathered = trainer.accelerator.get_state_dict(trainer.model_wrapped)
            model = self.student()
            model.load_state_dict(gathered)
        trainer.accelerator.wait_for_everyone()
        return model, {
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "precision": "bfloat16" if trainer.args.bf16 else "float32", "estimate": estimate,
            "steps": trainer.state.global_step, "steps_planned": estimate["steps"],
            "best_step": trainer.state.best_global_step if self.held_out else None,
            "loss": [[h["step"], h["loss"]] for h in history if "loss" in h],
            "held_out_loss": [[h["step"], h["eval_loss"]] for h in history if "eval_loss" in h],
            "seconds": round(time.perf_counter() - started, 1),
            **({"processes": world()} if world() > 1 else {}),
        }

    def _estimate(self, model: nn.Module, trainer: Trainer) -> dict[str, float]:
        """Steps, minutes, memory beside the dense model and disk for checkpoints: logged, and kept in the record.

        Time is measured: the second of two micro-batches there and back, a forward pass being a third of it, and the
        optimiser on a part of the parameters. Memory and disk are computed.
        Raises SlmError: the disk has no room for the checkpoints.
        """
        r = self.recipe
        steps = r.max_steps or max(1, int(r.epochs * len(self.train) / r.batch_size))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        device = next(model.parameters()).device
        batch = {name: t.to(device) for name, t in self.collate(self.train[: r.micro_batch_size]).items()}
        micro = 0.0
        with torch.random.fork_rng():
            model.train()
            for _ in range(2):
                started = time.perf_counter()
                trainer.compute_loss(model, batch).backward()  # type: ignore[union-attr]
                model.zero_grad(set_to_none=True)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                micro = time.perf_counter() - started
        evaluations = -(-steps // r.checkpoint_every) * -(-len(self.held_out) // r.micro_batch_size)
        a_step = micro * r.batch_size / r.micro_batch_size / world() + optimiser_seconds(trained, device)
        config: Any = model.config
        rows, length = batch["input_ids"].shape
        states = activations(rows, length, config.num_hidden_layers, config.hidden_size, config.num_attention_heads,
                             r.gradient_checkpointing)
        logits = 4 * 4 * min(LOGITS, batch["input_ids"].numel() * config.vocab_size)
        saved = [p for p in model.parameters() if p.requires_grad or not hasattr(model, "peft_config")]
        disk = (KEPT + 1) * (8 * trained + sum(p.numel() * p.element_size() for p in saved))
        out = {"steps": steps, "seconds_per_step": round(a_step, 3),
               "minutes": round((steps * a_step + evaluations * micro / 3) / 60, 2),
               "memory_gb": round((ADAM_BYTES * trained + states + logits) / 1e9, 3),
               "disk_gb": round(disk / 1e9, 3)}
        log.info("%s trains %.3g M of %.3g M parameters on %d examples (%d held out) in %s: %d steps of %d, "
                 "about %.1f minutes%s, %.1f GB of memory beside the dense model and %.1f GB of disk", self.name,
                 trained / 1e6, sum(p.numel() for p in model.parameters()) / 1e6, len(self.train), len(self.held_out),
                 "bfloat16" if trainer.args.bf16 else "float32", steps, r.batch_size, out["minutes"],
                 f" (stops after {r.max_minutes:g})" if r.max_minutes else "", out["memory_gb"], out["disk_gb"])
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < disk:
            raise SlmError(f"{self.folder}: {free / 1e9:.2f} GB free; {self.name} needs {out['disk_gb']:.2f} GB for "
                           f"{KEPT + 1} checkpoints. Free some, or set hydra.run.dir to a larger disk.")
        return out

    def _trainer(self, model: nn.Module) -> Trainer:
        r, held = self.recipe, bool(self.held_out)
        # what trains is float32: only autocast joins it to weights of 16 bits
        half = self.half or r.precision == "bfloat16" or (r.precision == "auto" and has_bfloat16(self.device))
        # What a launcher wraps (DistributedDataParallel, FSDP) has to be called by its forward: that is the loss.
        model.forward = functools.partial(_loss_of, self, model, torch.bfloat16 if half else None)
        # newer versions have another name for it and warn of this one
        saving: dict[str, Any] = {"gradient_checkpointing": True} if r.gradient_checkpointing else {}
        arguments = TrainingArguments(
            output_dir=str(self.folder), per_device_train_batch_size=r.micro_batch_size,
            per_device_eval_batch_size=r.micro_batch_size,
            gradient_accumulation_steps=r.batch_size // r.micro_batch_size // world(), learning_rate=r.lr,
            lr_scheduler_type=r.schedule if r.schedule != "constant" else "constant_with_warmup",
            warmup_steps=r.warmup_steps, num_train_epochs=r.epochs, max_steps=r.max_steps or -1,
            eval_strategy="steps" if held else "no", eval_steps=r.checkpoint_every,
            save_strategy="steps", save_steps=r.checkpoint_every, save_total_limit=KEPT,
            load_best_model_at_end=held, metric_for_best_model="eval_loss" if held else None,
            greater_is_better=False if held else None, prediction_loss_only=True, logging_steps=1,
            bf16=half, use_cpu=self.device.type == "cpu", **saving, seed=self.seed, data_seed=self.seed,
            remove_unused_columns=False, label_names=["labels"], report_to="none", disable_tqdm=True,
            ddp_timeout=DAY,  # the others wait while the first measures the dense model
        )
        arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs without a launcher: DataParallel would hide the model
        trainer = _Trainer(model=model, args=arguments, train_dataset=self.train,  # type: ignore[arg-type]
                           eval_dataset=self.held_out if held else None,  # type: ignore[arg-type]
                           data_collator=self.collate, callbacks=[_Progress(self)])
        trainer.remove_callback(PrinterCallback)  # it prints every step; _Progress logs it
        return trainer


class _Progress(TrainerCallback):
    """Reports to the tracker and holds the wall-clock limit; the last step is evaluated and saved like a checkpoint."""

    def __init__(self, training: Training) -> None:
        self.training, self.held = training, bool(training.held_out)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.monotonic()

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.training.at(model, state.global_step / state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        limit = self.training.recipe.max_minutes
        if limit and _of_first_process(time.monotonic() - self.started > 60 * limit, args.device):
            control.should_training_stop = True
        if control.should_training_stop or state.global_step >= state.max_steps:
            control.should_evaluate, control.should_save = self.held, self.held

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        names = {"loss": "loss", "learning_rate": "lr", "eval_loss": "held_out_loss", "grad_norm": "grad_norm"}
        values = {ours: logs[theirs] for theirs, ours in names.items() if theirs in logs}
        if values and state.is_world_process_zero:
            log.info("step %d of %d: %s", state.global_step, state.max_steps,
                     ", ".join(f"{k} {v:.4g}" for k, v in values.items()))
        if values and self.training.track:
            self.training.track.log({"recovery": {**values, "step": state.global_step}})


class _Trainer(Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
                     ) -> Any:
        own = model(**inputs)["loss"]
        if num_items_in_batch is not None and model.training:  # as Trainer does: micro-batches weigh by tokens
            own = own * ((inputs["labels"][:, 1:] >= 0).sum() / num_items_in_batch)
            own = own * self.accelerator.num_processes  # whose gradients are averaged
        return (own, {"loss": own}) if return_outputs else own


def _loss_of(training: Training, model: nn.Module, dtype: torch.dtype | None, **batch: Tensor) -> dict[str, Tensor]:
    """The forward of a model that trains: its loss, matrix products in `dtype` where one is given."""
    with torch.autocast(training.device.type, dtype, enabled=dtype is not None):
        return {"loss": training.loss(model, batch)}


def _of_first_process(value: bool, device: torch.device) -> bool:
    """The value that the first of several processes has, in all of them."""
    if world() == 1:
        return value
    shared = torch.tensor(int(value), device=device)
    torch.distributed.broadcast(shared, 0)
    return bool(shared)


def keep_freed_memory() -> None:
    """Have the C library keep what is freed for the next step, instead of giving it to the system and asking again. A
    step of a 106 M parameter model otherwise meets 440,000 page faults. Only glibc knows how."""
    set_malloc((-4, 0), (-1, 2**31 - 1))  # M_MMAP_MAX, M_TRIM_THRESHOLD


def optimiser_seconds(n: int, device: torch.device) -> float:
    """Of a step of AdamW over n float32 parameters, from one over a part of them."""
    part = torch.nn.Parameter(torch.zeros(min(n, 1 << 22), device=device))
    part.grad = torch.zeros_like(part)
    adam = torch.optim.AdamW([part], fused=True)
    adam.step()
    started = time.perf_counter()
    adam.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) * n / max(1, len(part))


def last_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint; one whose writing was cut off is removed. Its state is what Trainer writes last."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    while found:
        try:
            json.loads((found[-1] / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            log.warning("%s was cut off while it was written; removed.", found[-1])
            shutil.rmtree(found.pop(), ignore_errors=True)
        else:
            return found[-1]
    return None


@contextlib.contextmanager
def checkpoints_in(folder: Path) -> Iterator[None]:
    """Remove the checkpoints after a training and what is made of it; where that fails they stay, to go on from. Raises
    SlmError: the disk is full (what that raises differs between the libraries that write)."""
    try:
        yield
    except Exception as cause:
        if not is_full_disk(cause):
            raise
        raise SlmError(f"{folder}: no space left on the disk. Free some, or set hydra.run.dir to a larger one; "
                       "the same command then goes on from the last whole checkpoint.") from cause
    if rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a full disk (or quota)."""
    while error is not None:
        words = ("os error 28", "No space left", "PytorchStreamWriter failed writing")
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(w in str(error) for w in words):
            return True
        error = error.__cause__ or error.__context__
    return False
