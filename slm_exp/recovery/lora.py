from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from slm_exp.core.cost import ADAM_BYTES
from slm_exp.core.errors import require
from slm_exp.core.files import read_json, write_json
from slm_exp.core.registry import register
from slm_exp.core.runtime import rank
from slm_exp.models.base import ModelHandle
from slm_exp.models.sizes import Sizes
from slm_exp.recovery.base import RecoveryTask, copy_with
from slm_exp.recovery.cuts import zeroed_modules
from slm_exp.recovery.trained import Trained

if TYPE_CHECKING:
    from torch import Tensor, nn


@register("recovery", "lora")
@dataclass
class Lora(Trained):
    """LoRA as Shortened-LLaMA and SLM retrain: rank 8 on q, k, v, o, gate, up, down, on alpaca-cleaned.

    The adapter is saved in `lora/` of the folder of the run that trains it (for peft, on the compressed model without
    recovery) and merged in float32; the merged weights take the model's dtype. Prompts are not trained on. Which
    projections there are is the family's; routed experts stay as they are unless `experts` is set.
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
    experts: bool = False
    """Adapt the routed experts of a mixture too, each with rank r. Their updates are added to the weights before the
    product, which leaves no place for dropout."""

    def check(self) -> None:
        super().check()
        self.at_least(1, "r")
        self.positive("alpha")
        require(0 <= self.dropout < 1, "recovery.dropout", self.dropout, "a share in [0, 1)")
        require(not self.experts or self.dropout == 0, "recovery.dropout", self.dropout, "0 with recovery.experts=true")

    def check_data(self, dense: ModelHandle) -> None:
        require(not self.experts or bool(dense.layout.experts), "recovery.experts", self.experts,
                f"false: {dense.layout.family} has no routed experts")
        super().check_data(dense)

    def memory(self, sizes: Sizes, width: float) -> float:
        """Adapters, and what is larger: the step, or the adapted weights, which are a second set."""
        sides = 4 * (sizes.hidden + sizes.query) + 3 * (sizes.hidden + sizes.mlp)
        return ADAM_BYTES * sizes.n_layers * self.r * sides + max(self._activations(sizes),
                                                                  width * sizes.n_layers * sizes.layer)

    def student(self, task: RecoveryTask) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        layout = task.handle.layout
        names = [name.rpartition(".")[2] for name in layout.projections]
        zeroed = zeroed_modules(task.handle, task.plan)
        parts = [name for name in layout.experts if name.startswith(f"{layout.expert_module}.")] if self.experts else []
        experts = [f"{layout.layer_list}.{i}.{name}" for i in range(task.handle.n_layers) for name in parts
                   if f"{layout.layer_list}.{i}.{layout.expert_module}" not in zeroed]
        config = LoraConfig(r=self.r, lora_alpha=self.alpha, lora_dropout=self.dropout, bias="none",  # type: ignore[arg-type]
                            target_modules=names, exclude_modules=zeroed or None,
                            target_parameters=experts or None, fan_in_fan_out=layout.transposed, task_type="CAUSAL_LM")
        model = get_peft_model(copy_with(task.handle.model, {}), config)
        if self.gradient_checkpointing:
            model.enable_input_require_grads()
        return model

    def result(self, task: RecoveryTask, model: nn.Module) -> dict[str, Tensor]:
        if rank() == 0:
            cast(Any, model).save_pretrained(task.folder / "lora")
            about = task.folder / "lora" / "adapter_config.json"
            # it fits the compressed model alone, which has no place yet; peft would load it on the dense one
            write_json(about, {**read_json(about), "base_model_name_or_path": None})
        return self.merged(task, model)

    def merged(self, task: RecoveryTask, model: nn.Module) -> dict[str, Tensor]:
        """The adapted weights."""
        import torch

        merged = {}
        for name, module in cast(Any, model).get_base_model().named_modules():
            if hasattr(module, "parameter_name"):  # of an expert's parameter; several of one module are nested
                weight = module.get_param()
                with torch.no_grad():
                    change = module.get_delta_weight("default").float()
                    part = f"{name.removesuffix('.base_layer')}.{module.parameter_name}"
                    merged[part] = (weight.float() + change).to(weight.dtype)
            elif hasattr(module, "lora_A"):
                weight = module.get_base_layer().weight
                with torch.no_grad():
                    a, b = (getattr(module, part)["default"].weight.float() for part in ("lora_A", "lora_B"))
                    change = module.scaling["default"] * (b @ a)
                    change = change.T if task.handle.layout.transposed else change
                    merged[f"{name}.weight"] = (weight.float() + change).to(weight.dtype)
        return merged
