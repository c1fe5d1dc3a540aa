"""What recoveries by training share: data, the transformers Trainer, checkpoints to go on from, limits, estimates."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import shutil
import time
from abc import abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_exp.core.errors import DataError, SlmError, require, require_one_of
from slm_exp.core.files import digest
from slm_exp.core.registry import knob
from slm_exp.core.runtime import rank, world
from slm_exp.recovery.base import Healed, HealTask, Recovery, replaced, tensors_digest
from slm_exp.recovery.examples import IGNORED, SOURCES, Examples, left_padded, make_examples, read_rows
from slm_exp.recovery.head import LOGITS, counted_states, head_loss

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel, Trainer

    from slm_exp.models.base import ModelHandle
    from slm_exp.pipeline.config import RunConfig

log = logging.getLogger(__name__)

SCHEDULES = ("linear", "cosine", "constant")
PRECISIONS = ("auto", "bfloat16", "float32")
ADAM_BYTES = 16  # of a trained parameter: itself, its gradient and two moments in float32
DAY = 86_400
EAGER = 512  # tokens up to which plain attention, there and back, is faster on a CPU than the fused one
KEPT = 2  # checkpoints: the best and the last


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
    precision: str = "auto"
    """Of the matrix products: bfloat16, float32, or auto: bfloat16 where the device has instructions for it. Weights
    that train, their moments and sums are float32 either way."""
    gradient_checkpointing: bool = knob(False)
    """Compute activations again in the backward pass: less memory, about a third more time."""

    def check(self) -> None:
        require_one_of("recovery.data", self.data, SOURCES)
        require_one_of("recovery.schedule", self.schedule, SCHEDULES)
        require_one_of("recovery.precision", self.precision, PRECISIONS)
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
        from slm_exp.core.cache.digests import content_digest
        from slm_exp.core.errors import ConfigError

        out = super().identity()
        if self.data == "jsonl" and self.path is not None:
            file = Path(self.path).expanduser()
            if not file.is_file():
                raise ConfigError(f"recovery.path = {self.path}; expected an existing file. There is no such file.")
            out["path"] = content_digest(file)
        return out

    def refuses(self, cfg: RunConfig) -> str | None:
        if self.precision == "float32" and (dtype := getattr(cfg.model, "dtype", "float32")) in ("bfloat16", "float16"):
            return (f"recovery.precision = float32; expected auto or bfloat16 with model.dtype = {dtype}, whose frozen "
                    "weights and dense states have no more.")
        return None

    def check_data(self, dense: ModelHandle) -> None:
        if dense.tokenizer is None:
            raise DataError(f"recovery={self.name} reads text, and {dense.name} has no tokenizer.")
        read_rows(self.data, self.path, dense)

    def trains(self) -> bool:
        return True

    def stored(self) -> bool:
        return self.max_minutes is None

    @abstractmethod
    def student(self, task: HealTask) -> nn.Module:
        """The model that trains: parameters that require a gradient are its own, all others may be shared."""

    @abstractmethod
    def result(self, task: HealTask, model: nn.Module) -> dict[str, Tensor]:
        """The compressed model's new tensors, from the trained model."""

    def loss(self, task: HealTask, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The mean loss of a micro-batch, here of the tokens to come."""
        student: Any = model
        given_MD, labels_M = counted_states(student, batch)
        return head_loss(given_MD, student.get_output_embeddings().weight, labels_M)

    def heal(self, task: HealTask) -> Healed:
        """Train. Cost: estimated, logged and reported before the first step."""
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
            where = self._where(task)
            try:
                report, model = self._train(task, model, examples)
                found = {name: t.detach() for name, t in self.result(task, model).items()}
            except Exception as cause:  # what a full disk raises differs between the libraries that write
                if not is_full_disk(cause):
                    raise
                raise SlmError(f"{where}: no space left on the disk. Free some, or set hydra.run.dir to a larger one; "
                               "the same command then goes on from the last whole checkpoint.") from cause
            if rank() == 0:
                shutil.rmtree(where, ignore_errors=True)
        return Healed(found, {**report, "digest": tensors_digest(found)})

    def _where(self, task: HealTask) -> Path:
        """The folder of the checkpoints: one for each recipe, model and seed."""
        key = digest({**self.identity(), "model": task.handle.digest, "seed": task.seed})
        return task.folder / "recovery" / key

    def _train(self, task: HealTask, model: nn.Module, examples: Examples) -> tuple[dict[str, Any], nn.Module]:
        """What there is to tell, and the trained model."""
        require(self.batch_size % (self.micro_batch_size * world()) == 0, "recovery.batch_size", self.batch_size,
                f"a multiple of {self.micro_batch_size} (recovery.micro_batch_size) x {world()} processes")
        where = self._where(task)
        if task.handle.device.type == "cpu":
            keep_freed_memory()
            if self.seq_len <= EAGER:
                model.set_attn_implementation("eager")  # type: ignore[operator]
        trainer = make_trainer(self, task, model, examples, where)
        estimate = self._estimate(task, model, examples, trainer)
        last = last_checkpoint(where)
        if last:
            log.info("going on from %s", last)
        started = time.perf_counter()
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        history = trainer.state.log_history
        if trainer.is_fsdp_enabled:  # every process holds a part of each weight: gather them in a model of its own
            gathered = trainer.accelerator.get_state_dict(trainer.model_wrapped)
            model = self.student(task)
            model.load_state_dict(gathered)
        trainer.accelerator.wait_for_everyone()
        return {
            "examples": {"train": len(examples.train), "held_out": len(examples.held_out),
                         "dropped": examples.dropped},
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "precision": "bfloat16" if trainer.args.bf16 else "float32",
            "estimate": estimate,
            "steps": trainer.state.global_step, "steps_planned": estimate["steps"],
            "best_step": trainer.state.best_global_step if examples.held_out else None,
            "loss": [[h["step"], h["loss"]] for h in history if "loss" in h],
            "held_out_loss": [[h["step"], h["eval_loss"]] for h in history if "eval_loss" in h],
            "seconds": round(time.perf_counter() - started, 1),
            **({"processes": world()} if world() > 1 else {}),
        }, model

    def _estimate(self, task: HealTask, model: nn.Module, examples: Examples, trainer: Trainer) -> dict[str, Any]:
        """Steps, minutes, memory beside the dense model and disk for checkpoints: logged, and kept in the record.

        Time is measured: the second of two micro-batches there and back, a forward pass being a third of it, and the
        optimiser on a part of the parameters. Memory and disk are computed.

        Raises:
            SlmError: the disk has no room for the checkpoints.
        """
        import torch

        steps = self.max_steps or max(1, int(self.epochs * len(examples.train) / self.batch_size))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        device = next(model.parameters()).device
        batch = left_padded(examples.train[: self.micro_batch_size], 0)
        batch = {name: t.to(device) for name, t in batch.items()}
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
        looks = -(-steps // self.checkpoint_every) * -(-len(examples.held_out) // self.micro_batch_size)
        a_step = micro * self.batch_size / self.micro_batch_size / world() + optimiser_seconds(trained, device)
        config = task.handle.config
        per_layer = 4 if self.gradient_checkpointing else 34 * (2 if trainer.args.bf16 else 4)
        states = batch["input_ids"].numel() * config.num_hidden_layers * config.hidden_size * per_layer
        logits = 4 * 4 * min(LOGITS, batch["input_ids"].numel() * config.vocab_size)
        saved = [p for p in model.parameters() if p.requires_grad or not hasattr(model, "peft_config")]
        disk = (KEPT + 1) * (8 * trained + sum(p.numel() * p.element_size() for p in saved))
        found = {"steps": steps, "seconds_per_step": round(a_step, 3),
                 "minutes": round((steps * a_step + looks * micro / 3) / 60, 2),
                 "memory_gb": round((ADAM_BYTES * trained + states + logits) / 1e9, 3),
                 "disk_gb": round(disk / 1e9, 3)}
        log.info("recovery=%s trains %.3g M of %.3g M parameters on %d examples (%d held out) in %s: %d steps of %d, "
                 "about %.1f minutes%s, %.1f GB of memory beside the dense model and %.1f GB of disk", self.name,
                 trained / 1e6, task.handle.n_params / 1e6, len(examples.train), len(examples.held_out),
                 "bfloat16" if trainer.args.bf16 else "float32", steps, self.batch_size, found["minutes"],
                 f" (stops after {self.max_minutes:g})" if self.max_minutes else "", found["memory_gb"],
                 found["disk_gb"])
        task.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(task.folder).free
        if free < disk:
            raise SlmError(f"{task.folder}: {free / 1e9:.2f} GB free; recovery={self.name} needs "
                           f"{found['disk_gb']:.2f} GB for {KEPT + 1} checkpoints. Free some, or set hydra.run.dir to "
                           "a larger disk.")
        return found


def keep_freed_memory() -> None:
    """Have the C library keep what is freed for the next step, instead of giving it to the system and asking again.

    A step of a 106 M parameter model otherwise meets 440,000 page faults. Only glibc knows how.
    """
    import ctypes

    no_mmap, never_trim = (-4, 0), (-1, 2**31 - 1)  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        for option in (no_mmap, never_trim):
            ctypes.CDLL("libc.so.6").mallopt(*option)


def optimiser_seconds(n: int, device: torch.device) -> float:
    """Of a step of AdamW over n float32 parameters, from one over a part of them."""
    import torch

    part = torch.nn.Parameter(torch.zeros(min(n, 1 << 22), device=device))
    part.grad = torch.zeros_like(part)
    adam = torch.optim.AdamW([part], fused=True)
    adam.step()
    started = time.perf_counter()
    adam.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) * n / max(1, len(part))


def last_checkpoint(where: Path) -> Path | None:
    """The last whole checkpoint; one whose writing was cut off is removed. Its state is what Trainer writes last."""
    found = sorted(where.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    while found:
        try:
            json.loads((found[-1] / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            log.warning("%s was cut off while it was written; removed.", found[-1])
            shutil.rmtree(found.pop(), ignore_errors=True)
        else:
            return found[-1]
    return None


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a full disk (or quota)."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error):
            return True
        if "No space left" in str(error) or "PytorchStreamWriter failed writing" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices in hardware: tensor cores, or AMX tiles of a CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()


def make_trainer(cfg: Trained, task: HealTask, model: nn.Module, examples: Examples, where: Path) -> Trainer:
    """A Trainer by a recipe, on the compressed model's device."""
    import torch
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    tokenizer = task.dense.tokenizer
    assert tokenizer is not None
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    device = task.handle.device
    held = bool(examples.held_out)
    half = cfg.precision == "bfloat16" or (cfg.precision == "auto" and has_bfloat16(device))
    half |= task.handle.model.dtype != torch.float32  # what trains is float32: only autocast joins the two
    # What a launcher wraps (DistributedDataParallel, FSDP) has to be called by its forward: that is the loss.
    model.forward = functools.partial(_loss_of, cfg, task, model, torch.bfloat16 if half else None)

    class Progress(TrainerCallback):
        """Tells the tracker, and ends by the clock; the last step is looked at and saved like any checkpoint."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.started = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if cfg.max_minutes and _first_says(time.monotonic() - self.started > 60 * cfg.max_minutes, args.device):
                control.should_training_stop = True
            if control.should_training_stop or state.global_step >= state.max_steps:
                control.should_evaluate, control.should_save = held, held

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            names = {"loss": "loss", "learning_rate": "lr", "eval_loss": "held_out_loss", "grad_norm": "grad_norm"}
            told = {ours: logs[theirs] for theirs, ours in names.items() if theirs in logs}
            if told and state.is_world_process_zero:
                log.info("step %d of %d: %s", state.global_step, state.max_steps,
                         ", ".join(f"{k} {v:.4g}" for k, v in told.items()))
            if told and task.track:
                task.track.log({"recovery": {**told, "step": state.global_step}})

    class Recipe(Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            own = model(**inputs)["loss"]
            if num_items_in_batch is not None and model.training:  # as Trainer does: micro-batches weigh by tokens
                own = own * ((inputs["labels"][:, 1:] != IGNORED).sum() / num_items_in_batch)
                own = own * self.accelerator.num_processes  # whose gradients are averaged
            return (own, {"loss": own}) if return_outputs else own

    # newer versions have another name for it and warn of this one
    saving: dict[str, Any] = {"gradient_checkpointing": True} if cfg.gradient_checkpointing else {}
    arguments = TrainingArguments(
        output_dir=str(where),
        per_device_train_batch_size=cfg.micro_batch_size,
        per_device_eval_batch_size=cfg.micro_batch_size,
        gradient_accumulation_steps=cfg.batch_size // cfg.micro_batch_size // world(),
        learning_rate=cfg.lr,
        lr_scheduler_type=cfg.schedule if cfg.schedule != "constant" else "constant_with_warmup",
        warmup_steps=cfg.warmup_steps,
        num_train_epochs=cfg.epochs,
        max_steps=cfg.max_steps or -1,
        eval_strategy="steps" if held else "no",
        eval_steps=cfg.checkpoint_every,
        save_strategy="steps",
        save_steps=cfg.checkpoint_every,
        save_total_limit=KEPT,
        load_best_model_at_end=held,
        metric_for_best_model="eval_loss" if held else None,
        greater_is_better=False if held else None,
        prediction_loss_only=True,
        logging_steps=1,
        bf16=half,
        use_cpu=device.type == "cpu",
        **saving,
        seed=task.seed,
        data_seed=task.seed,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        ddp_timeout=DAY,  # the others wait while the first measures the dense model
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs without a launcher: DataParallel would hide the model
    trainer = Recipe(model=model, args=arguments, train_dataset=examples.train,  # type: ignore[arg-type]
                     eval_dataset=examples.held_out if held else None,  # type: ignore[arg-type]
                     data_collator=lambda rows: left_padded(rows, pad), callbacks=[Progress()])
    trainer.remove_callback(PrinterCallback)  # it prints every step; Progress logs it
    return trainer


def _first_says(yes: bool, device: torch.device) -> bool:
    """What the first of several processes says, in all of them."""
    import torch

    if world() == 1:
        return yes
    said = torch.tensor(int(yes), device=device)
    torch.distributed.broadcast(said, 0)
    return bool(said)


def _loss_of(
    cfg: Trained, task: HealTask, model: nn.Module, dtype: torch.dtype | None, **batch: Tensor
) -> dict[str, Tensor]:
    """The forward of a model that trains: its loss, matrix products in `dtype` where one is given."""
    import torch

    with torch.autocast(task.handle.device.type, dtype, enabled=dtype is not None):
        return {"loss": cfg.loss(task, model, batch)}


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
