"""What a decoder layer is made of: names, and the few facts that code outside the model's own classes relies on."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from slm_exp.core.errors import ArchitectureError
from slm_exp.models.layerwise import has_own_code

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

COMMON = {  # what the library's own modules read; nothing outside them has to know more
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_parameters",
    "attention_bias", "mlp_bias", "attention_dropout", "layer_types", "architectures", "chunk_size_feed_forward",
    "dtype", "id2label", "label2id", "is_encoder_decoder", "output_hidden_states", "problem_type", "return_dict",
    "transformers_version", "model_type",
}  # fmt: skip
"""Config fields that every family may have."""
FUSED = "attention's input projections are one matrix"
SPARSE = "its MLP is a mixture of experts"


@dataclass(frozen=True)
class LayerLayout:
    """Names inside one family's model. Dotted names are relative to the causal LM or, below, to a layer."""

    family: str
    decoder: str = "model"
    """The decoder without its head."""
    layer_list: str = "model.layers"
    final_norm: str = "model.norm"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    qkv: str = ""
    """Where q, k and v are one matrix: its name, in place of theirs."""
    o: str = "self_attn.o_proj"
    mlp_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    mlp_out: str = "mlp.down_proj"
    """Of a mixture of experts: the shared expert's, or nothing."""
    experts: tuple[str, ...] = ()
    """Parameters of the router and of the routed experts; merge rules combine them as they do projections."""
    expert_module: str = "mlp.experts"
    output_norms: tuple[str, ...] = ()
    """Norms that attention's and the MLP's output pass on the way into the stream."""
    norm_offset: float = 0.0
    """What the norms' gains are written relative to: 1 where a norm multiplies by 1 + weight."""
    residual_scale: str = ""
    """Config field that multiplies what a sublayer adds to the stream."""
    logit_cap: str = ""
    """Config field: logits become cap x tanh(logits / cap)."""
    logit_scale: str = ""
    """Config field that multiplies the logits."""
    logit_divisor: str = ""
    """Config field that divides the logits."""
    transposed: bool = False
    """Projections are stored [inputs, outputs] (GPT-2's Conv1D)."""
    attention_per_layer: bool = False
    """Whether config.layer_types decides each layer's attention; else the whole model has one kind."""
    window: str = ""
    """How a local attention window is set: `whole` (sliding_window, in all layers or by layer_types), `upper` (with
    use_sliding_window, above max_window_layers), or not at all."""
    per_layer_config: tuple[str, ...] = ("layer_types", "mlp_layer_types", "layer_widths", "stream_maps")
    """Config lists with one entry per layer."""
    layer_counts: tuple[str, ...] = ("num_hidden_layers",)
    """Config fields that equal the number of layers."""
    layer_bounds: tuple[str, ...] = ("max_window_layers",)
    """Config fields that split the stack: how many of the lower layers have some property."""
    fields: tuple[str, ...] = ()
    """Config fields beyond COMMON that are accounted for; another one of the family's must have its default."""
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Config fields and the values that are understood."""
    same_size: str = ""
    """Config field that must equal the hidden size."""
    no_width: str = ""
    """Why layers of this family are not narrowed; empty where they are."""
    layerwise: bool = False
    """Whether this package has code for layers of different widths (models/saved_code)."""
    tiny: Mapping[str, Any] = field(default_factory=dict)
    """Config fields of a small random model, beside those that every family has."""

    @property
    def projections(self) -> tuple[str, ...]:
        """The linear modules whose `.weight` merge rules combine."""
        inputs = (self.qkv,) if self.qkv else (self.q, self.k, self.v)
        return (*inputs, self.o, *self.mlp_in, *((self.mlp_out,) if self.mlp_out else ()))

    @property
    def matrices(self) -> tuple[str, ...]:
        """Every parameter that merge rules combine."""
        return (*(f"{name}.weight" for name in self.projections), *self.experts)

    @property
    def sublayers(self) -> dict[str, tuple[str, ...]]:
        """The modules of each sublayer that hold its matrices."""
        inputs = (self.qkv,) if self.qkv else (self.q, self.k, self.v)
        mlp = ("mlp",) if self.experts else (*self.mlp_in, self.mlp_out)
        return {"attention": (*inputs, self.o), "mlp": mlp}

    @property
    def outputs(self) -> dict[str, tuple[str, ...]]:
        """What writes each sublayer's output into the residual stream: with these at zero, it does nothing."""
        shared = (self.mlp_out,) if self.mlp_out else ()
        return {"attention": (self.o,), "mlp": (*((self.expert_module,) if self.experts else ()), *shared)}

    @property
    def fitted(self) -> dict[str, tuple[str, ...]]:
        """The linear modules of `outputs`: those that a regression can change."""
        return {"attention": (self.o,), "mlp": () if self.experts else (self.mlp_out,)}

    @property
    def no_refit(self) -> str:
        """Why what a projection adds to the stream is not linear in it; empty where it is."""
        return f"its sublayers' outputs pass a norm ({', '.join(self.output_norms)})" if self.output_norms else ""

    def norm_behind(self, module: str | None) -> str:
        """The norm that a projection's output passes on its way into the stream; empty where there is none."""
        return dict(zip((self.o, self.mlp_out), self.output_norms, strict=False)).get(module or "", "")

    def written(self, layer: torch.nn.Module) -> dict[str, float]:
        """Parameters that what a layer adds to the stream is proportional to, and what each is written relative to."""
        names = [f"{norm}.weight" for norm in self.output_norms] or [
            f"{module}.{part}" for modules in self.outputs.values() for module in modules
            for part in (("down_proj",) if module == self.expert_module else ("weight", "bias"))]
        own = dict(layer.named_parameters())
        return {name: self.norm_offset if self.output_norms else 0.0 for name in names if name in own}

    def residual_factor(self, config: PretrainedConfig) -> float:
        """What a sublayer's output is multiplied by on its way into the stream."""
        return float(getattr(config, self.residual_scale)) if self.residual_scale else 1.0

    def logit_factor(self, config: PretrainedConfig) -> float:
        """What the head's output is multiplied by."""
        times = float(getattr(config, self.logit_scale)) if self.logit_scale else 1.0
        return times / (float(getattr(config, self.logit_divisor)) if self.logit_divisor else 1.0)

    def cap(self, config: PretrainedConfig) -> float | None:
        """What the logits cannot exceed; None where there is no such bound."""
        value = getattr(config, self.logit_cap, None) if self.logit_cap else None
        return None if value is None else float(value)

    def logits(self, config: PretrainedConfig, head_output: torch.Tensor) -> torch.Tensor:
        """The model's logits from what its head gives, any shape."""
        factor, cap = self.logit_factor(config), self.cap(config)
        out = head_output if factor == 1 else head_output * factor
        return out if cap is None else (out / cap).tanh() * cap

    def layers(self, model: PreTrainedModel) -> torch.nn.ModuleList:
        """The decoder layers, bottom to top."""
        return model.get_submodule(self.layer_list)  # type: ignore[return-value]

    def config_of(self, config: PretrainedConfig, hosts: Sequence[int]) -> PretrainedConfig:
        """A copy of a config in which everything that counts or lists layers speaks of a model of these layers."""
        out = copy.deepcopy(config)
        for name in self.per_layer_config:
            values = getattr(config, name, None)
            if values is not None:
                setattr(out, name, [values[i] for i in hosts])
        for name in self.layer_bounds:
            bound = getattr(config, name, None)
            if bound is not None:
                setattr(out, name, sum(i < bound for i in hosts))
        for name in self.layer_counts:
            setattr(out, name, len(hosts))
        return out

    def kinds(self, config: PretrainedConfig) -> dict[int, list[int]]:
        """The lowest layer of every kind that the config tells apart, and all of that kind."""
        lists = [list(values) for name in self.per_layer_config if (values := getattr(config, name, None)) is not None]
        bounds = [bound for name in self.layer_bounds if (bound := getattr(config, name, None)) is not None]
        found: dict[str, list[int]] = {}
        for i in range(config.num_hidden_layers):
            found.setdefault(repr([[values[i] for values in lists], [i < bound for bound in bounds]]), []).append(i)
        return {layers[0]: layers for layers in found.values()}

    def attention_width(self, layer: torch.nn.Module) -> int:
        """Channels of all query heads together."""
        weight: Any = layer.get_parameter(f"{self.o}.weight")
        return int(weight.shape[0 if self.transposed else 1])

    def products(self, layer: torch.nn.Module, config: PretrainedConfig) -> dict[str, float]:
        """Weights that one token is multiplied with in a layer's attention and in its MLP: of routed experts, those it
        is sent to."""
        own = dict(layer.named_parameters())
        total = {"attention": 0.0, "mlp": 0.0}
        for name in self.projections:
            total["attention" if name in self.sublayers["attention"] else "mlp"] += own[f"{name}.weight"].numel()
        for name in self.experts:
            share = 1.0
            if name.startswith(f"{self.expert_module}."):
                share = config.num_experts_per_tok / own[name].shape[0]
            total["mlp"] += share * own[name].numel()
        return total

    def work(self, layer: torch.nn.Module, config: PretrainedConfig) -> float:
        """Weights that one token is multiplied with in a layer."""
        return sum(self.products(layer, config).values())

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model whose layers hold a tensor this layout does not account for. Shapes suffice: meta tensors do.

        Everything in a layer must be one of `matrices` or a vector (a norm gain or a bias), and all layers alike,
        unless the config gives widths per layer (see models/layerwise.py).
        Raises ArchitectureError: names the layer and the tensor.
        """
        shapes = [{name: tuple(p.shape) for name, p in layer.named_parameters()} for layer in self.layers(model)]
        matrices, own_code = set(self.matrices), has_own_code(model.config)
        for i, has in enumerate(shapes):
            where = f"{type(model).__name__} layer {i}"
            for name in sorted(matrices - set(has)):
                raise ArchitectureError(f"{where} has no {name}, which the {self.family} layout expects.")
            for name, shape in has.items():
                if name not in matrices and len(shape) > 1 and not (own_code and name.startswith("stream_maps.")):
                    raise ArchitectureError(f"{where} has {name} of shape {list(shape)}, unknown to the {self.family} "
                                            "layout. See CONTRIBUTING, 'A new model family'.")
            if has != shapes[0] and not own_code:
                name = min(n for n in {*has, *shapes[0]} if has.get(n) != shapes[0].get(n))
                raise ArchitectureError(f"{where}: {name} has shape {has.get(name)}, in layer 0 "
                                        f"{shapes[0].get(name)}; only layers of one shape can be merged.")
