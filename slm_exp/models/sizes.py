"""A model's sizes by arithmetic from its config alone. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from slm_exp.core.errors import ConfigError
from slm_exp.models.files import BUFFERS, LAYER, Tensor
from slm_exp.models.layout import LayerLayout
from slm_exp.models.layouts import FAMILIES

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
LLAMA = {"model_type": "llama", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False}
LLAMA2_7B = {**LLAMA, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
             "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "dtype": "float16"}
LLAMA2_13B = {**LLAMA2_7B, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
              "num_attention_heads": 40, "num_key_value_heads": 40}
SMOLLM2 = {**LLAMA, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
           "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True, "dtype": "float32"}
PUBLISHED: dict[str, dict[str, Any]] = {  # the presets' repos by their published config.json, for machines without hub
    "huggyllama/llama-7b": LLAMA2_7B,
    "meta-llama/Llama-2-7b-hf": LLAMA2_7B,
    "meta-llama/Llama-2-13b-hf": LLAMA2_13B,
    "lmsys/vicuna-7b-v1.3": LLAMA2_7B,
    "lmsys/vicuna-13b-v1.3": LLAMA2_13B,
    "meta-llama/Meta-Llama-3-8B": {**LLAMA2_7B, "intermediate_size": 14336, "num_key_value_heads": 8,
                                   "vocab_size": 128256, "dtype": "bfloat16"},
}


@dataclass(frozen=True)
class Sizes:
    """A decoder-only model's sizes, in parameters and floating-point operations."""

    n_layers: int
    hidden: int
    vocab: int
    layer: int
    """Parameters of one decoder layer."""
    total: int
    """Parameters, tied ones once."""
    products: dict[str, int]
    """Weights that a token is multiplied with in one layer's attention and in its MLP: of routed experts, those that it
    is sent to."""
    query: int
    """Width of all query heads together."""
    heads: int
    """Of the queries."""
    mlp: int
    """Channels between the MLP's projections."""
    sublayers: dict[str, int]
    """Parameters of one layer's attention and of its MLP: projections and their biases."""

    @property
    def matrices(self) -> int:
        """Weights of one layer's matrix products."""
        return sum(self.products.values())

    def with_layers(self, n: float) -> Sizes:
        """The same model with another number of layers."""
        return replace(self, n_layers=int(n), total=self.total - int((self.n_layers - n) * self.layer))

    def sublayer_flops(self, seen: float) -> dict[str, float]:
        """Operations of one token in a layer's attention and in its MLP, where it sees so many tokens: two per weight
        of every matrix product, and 4 x width x tokens seen for attention. Norms and activations, well under 1 %, are
        left out."""
        return {kind: 2.0 * size + (4 * self.query * seen if kind == "attention" else 0)
                for kind, size in self.products.items()}

    def block_flops(self, tokens: float, seq_len: float) -> float:
        """Operations of one layer over so many tokens in sequences of `seq_len`."""
        return tokens * sum(self.sublayer_flops((seq_len + 1) / 2).values())

    def head_flops(self, tokens: float) -> float:
        """Operations of the output head over so many tokens."""
        return 2 * tokens * self.hidden * self.vocab

    def flops_per_token(self, seq_len: int) -> float:
        """Operations of one token of a prefill (half the sequence is seen on average), head included."""
        return self.head_flops(1) + self.n_layers * self.block_flops(1, seq_len)


ARITHMETIC = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
"""Families whose sizes follow from a config by `sizes_of`; the others' are read from the headers of their weights."""


def named(about: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config.json, GPT-2's and OPT's under the names that other families use too."""
    other = {"num_hidden_layers": "n_layer", "hidden_size": "n_embd", "num_attention_heads": "n_head",
             "intermediate_size": "ffn_dim"}
    return {**{name: about[own] for name, own in other.items() if about.get(own) is not None}, **about}


def sizes_in(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Sizes:
    """Sizes of any family from the headers of its weights. `tensors`: by name, see `models.files.headers`. Raises
    ConfigError: a field that is missing; names it."""
    about = named(config)
    own = {name: t for name, t in tensors.items() if not name.endswith(BUFFERS)}
    if about.get("tie_word_embeddings", config.get("model_type") in ("gpt2", "opt")):
        own = {name: t for name, t in own.items() if not name.endswith("lm_head.weight")}
    layers = {name: t for name, t in own.items() if LAYER.search(name)}
    try:
        n, d, v = (int(about[name]) for name in ("num_hidden_layers", "hidden_size", "vocab_size"))
        heads = int(about["num_attention_heads"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"a config of type {about.get('model_type')} lacks {error}.") from None
    experts = about.get("num_local_experts") or about.get("num_experts") or 1
    routed = float(about.get("num_experts_per_tok") or 1) / experts
    matrices = {name: t for name, t in layers.items() if len(t.shape) > 1}
    whole = sum(t.size * (routed if ".experts." in name else 1) for name, t in matrices.items())
    layer = sum(t.size for t in layers.values()) // max(1, n)
    layout = FAMILIES[str(about.get("model_type"))]
    parts = _sublayers(layout, layers)
    attention = _sublayers(layout, matrices)["attention"]
    return Sizes(n, d, v, layer, sum(t.size for t in own.values()),
                 {"attention": attention // max(1, n), "mlp": int((whole - attention) / max(1, n))},
                 heads * int(about.get("head_dim") or d // heads), heads, int(about.get("intermediate_size") or 4 * d),
                 {kind: size // max(1, n) for kind, size in parts.items()})


def _sublayers(layout: LayerLayout, layers: Mapping[str, Tensor]) -> dict[str, int]:
    """Parameters of all layers' attention and MLP by the names of their tensors. Checkpoints name experts in ways of
    their own, so there the MLP is every matrix that is not attention's."""
    out = dict.fromkeys(layout.sublayers, 0)
    for name, tensor in layers.items():
        own = name[LAYER.search(name).end():]  # type: ignore[union-attr]
        kind = next((kind for kind, modules in layout.sublayers.items()
                     if own.startswith(tuple(f"{module}." for module in modules))),
                    "mlp" if layout.experts and len(tensor.shape) > 1 else None)
        if kind:
            out[kind] += tensor.size
    return out


def sizes_of(config: Any) -> Sizes:
    """Sizes from a config's fields: a mapping (config.json) or an object. Raises ConfigError: a family that is not
    understood, or a field that is missing; names it."""
    about = config if isinstance(config, Mapping) else vars(config)
    family = about.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(f"model_type = {family}; expected one of {', '.join(FAMILIES)}.")
    if family not in ARITHMETIC:
        raise ConfigError(f"model_type = {family}: size unknown without the headers of its weights.")
    try:
        d, f, heads = (int(about[n]) for n in ("hidden_size", "intermediate_size", "num_attention_heads"))
        n, v = int(about["num_hidden_layers"]), int(about["vocab_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"a config of type {family} lacks {error}.") from None
    kv = int(about.get("num_key_value_heads") or heads)
    head = int(about.get("head_dim") or d // heads)
    q, k = heads * head, kv * head
    attention, mlp = 2 * d * q + 2 * d * k, 3 * d * f
    products = {"attention": attention, "mlp": mlp}
    if family == "qwen2":
        attention += q + 2 * k
    elif about.get("attention_bias"):
        attention += q + 2 * k + d
    if family == "llama" and about.get("mlp_bias"):
        mlp += 2 * f + d
    vectors = 2 * d  # two norms
    if family == "gemma3_text":
        vectors += 2 * d  # four norms
    if family in ("qwen3", "gemma3_text"):
        vectors += 2 * head
    layer = attention + mlp + vectors
    total = n * layer + d + v * d * (1 if about.get("tie_word_embeddings", family == "gemma3_text") else 2)
    return Sizes(n, d, v, layer, total, products, q, heads, f, {"attention": attention, "mlp": mlp})
