"""Trainings of every weight on text (`full`) or the dense model's predictions (`distill`), of the layers beside cuts on
its states (`feature_distill`), and of low-rank adapters on the seven projections (`lora`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from slm_exp.core.errors import require
from slm_exp.core.registry import register
from slm_exp.core.runtime import rank
from slm_exp.core.together import Together
from slm_exp.models.sizes import Sizes
from slm_exp.recovery.base import RecoveryTask, copy_with
from slm_exp.recovery.cuts import beside_cuts, needs_dense_stream, zeroed_modules
from slm_exp.recovery.trained import Trained, next_token_loss

if TYPE_CHECKING:
    from torch import Tensor, nn


@register("recovery", "full")
@dataclass
class Full(Trained):
    """Next-token training of all parameters on packed windows of text. Tied embeddings stay tied, removed sublayers
    zero.

    Beats LoRA where much was removed (README of github.com/Nota-NetsPresso/shortened-llm, windows of 2048 there).
    Memory: 16 bytes a parameter beside the models.
    """

    schedule: str = "cosine"
    batch_size: int = 8
    warmup_steps: int = 20

    def student(self, task: RecoveryTask) -> nn.Module:
        zeroed = zeroed_modules(task.handle, task.plan)
        names = (name for name, _ in task.handle.model.named_parameters())
        return self.trainable_copy(task, [name for name in names if name.rpartition(".")[0] not in zeroed])


@register("recovery", "distill")
@dataclass
class Distill(Full):
    """KL divergence of the student's distribution from the dense model's, per token, plus `ce` x the usual loss.

    Two full logit tensors never exist (see engine/head_loss.py). Source: the recipe of arXiv:2407.14679 (Minitron),
    logits only. Cost: a dense forward pass, and the dense head, more per step than `full`.
    """

    runs_dense: ClassVar[bool] = True
    ce: float = 0.0
    """Weight of the next-token loss."""
    temperature: float = 1.0
    """Both logits are divided by it."""

    def check(self) -> None:
        super().check()
        require(self.ce >= 0, "recovery.ce", self.ce, "a number >= 0")
        require(self.temperature > 0, "recovery.temperature", self.temperature, "a number > 0")

    def loss(self, task: RecoveryTask, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return next_token_loss(model, batch, self.ce, task.dense.model, self.temperature)


@register("recovery", "feature_distill")
@dataclass
class FeatureDistill(Trained):
    """Mean over blocks of |student - dense|^2 / |dense|^2 of the stream after each block of each window.

    A window starts at a layer beside a cut and takes in the states of the student as it is, without a gradient to what
    lies below; it ends `window` layers on, or where the next one starts. First tokens, whose states are huge, are left
    out. Source: the normalised features of arXiv:2404.11098 (LAPTOP-Diff) and the windows of arXiv:2312.07950 (CBQ).
    Cost: a dense and a student forward pass, and a backward pass through the windows alone.
    """

    runs_dense: ClassVar[bool] = True
    batch_size: int = 8
    warmup_steps: int = 20
    window: int = 3
    """Layers of a window."""

    def check(self) -> None:
        super().check()
        require(self.window >= 1, "recovery.window", self.window, "a whole number >= 1")

    def refuses(self, others: Together) -> str | None:
        return super().refuses(others) or needs_dense_stream(others)

    def student(self, task: RecoveryTask) -> nn.Module:
        layers = task.handle.layout.layer_list
        names = [f"{layers}.{at}.{name}" for at in beside_cuts(task.plan)
                 for name, p in task.handle.layers[at].named_parameters() if p.any()]  # a removed sublayer stays zero
        return self.trainable_copy(task, names)

    def loss(self, task: RecoveryTask, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        from slm_exp.recovery.features import feature_loss

        return feature_loss(task, model, batch, self.window)


@register("recovery", "lora")
@dataclass
class Lora(Trained):
    """LoRA as Shortened-LLaMA and SLM retrain: rank 8 on q, k, v, o, gate, up, down, on alpaca-cleaned.

    The adapter is saved in `lora/` of the folder of the run that trains it (for peft, on the compressed model without
    recovery) and merged in float32; the merged weights take the model's dtype. Prompts are not trained on.

    Source: lora_retrain.py of github.com/Nota-NetsPresso/shortened-llm with the settings of its scripts. Differences:
    the rows held out are sampled by the run's seed; examples whose answer was cut away are left out and counted.
    """

    forwards: ClassVar[float] = 2.5
    data: str = "hub"
    seq_len: int = 256
    epochs: float = 2.0
    held_out: int = 2000
    r: int = 8
    """Rank."""
    alpha: float = 16.0
    """The update is scaled by alpha / r."""
    dropout: float = 0.05
    """Of what flows into the adapters, while training."""

    def check(self) -> None:
        super().check()
        require(self.r >= 1, "recovery.r", self.r, "a whole number >= 1")
        require(self.alpha > 0, "recovery.alpha", self.alpha, "a number > 0")
        require(0 <= self.dropout < 1, "recovery.dropout", self.dropout, "a share in [0, 1)")

    def memory(self, sizes: Sizes) -> float:
        return super().memory(sizes) * 0.05

    def student(self, task: RecoveryTask) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        names = [name.rpartition(".")[2] for name in task.handle.layout.projections]
        config = LoraConfig(r=self.r, lora_alpha=self.alpha, lora_dropout=self.dropout, bias="none",  # type: ignore[arg-type]
                            target_modules=names, exclude_modules=zeroed_modules(task.handle, task.plan) or None,
                            task_type="CAUSAL_LM")
        model = get_peft_model(copy_with(task.handle.model, {}), config)
        if self.gradient_checkpointing:
            model.enable_input_require_grads()
        return model

    def result(self, task: RecoveryTask, model: nn.Module) -> dict[str, Tensor]:
        import torch

        peft, merged = cast(Any, model), {}
        if rank() == 0:
            peft.save_pretrained(task.folder / "lora")
        for name, module in peft.get_base_model().named_modules():
            if hasattr(module, "lora_A"):
                weight = module.get_base_layer().weight
                with torch.no_grad():
                    a, b = (getattr(module, part)["default"].weight.float() for part in ("lora_A", "lora_B"))
                    merged[f"{name}.weight"] = (weight.float() + module.scaling["default"] * (b @ a)).to(weight.dtype)
        return merged
