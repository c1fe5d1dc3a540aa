"""config.json: what a model of any understood family may say, checked before anything is built by it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from slm_exp.core.errors import ConfigError, did_you_mean
from slm_exp.core.files import read_text

ACTIVATIONS = (  # of transformers 5.23
    "gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh",
    "gelu_pytorch_tanh", "hardswish", "laplace", "leaky_relu", "linear", "mish", "prelu", "quick_gelu", "relu", "relu2",
    "relu6", "sigmoid", "silu", "sqrtsoftplus", "swish", "tanh", "xielu",
)  # fmt: skip
Size = Annotated[int, Field(ge=1, le=10**7)]
Positive = Annotated[FiniteFloat, Field(gt=0)]


class ConfigFile(BaseModel):
    """Bounds of the fields that sizes, time and memory follow; a field that is absent has its family's default."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model_type: str | None = None
    num_hidden_layers: Annotated[int, Field(ge=1, le=1000)] | None = None
    hidden_size: Size | None = None
    intermediate_size: Size | None = None
    num_attention_heads: Annotated[int, Field(ge=1, le=10**4)] | None = None
    num_key_value_heads: Annotated[int, Field(ge=1, le=10**4)] | None = None
    head_dim: Annotated[int, Field(ge=1, le=10**5)] | None = None
    vocab_size: Size | None = None
    max_position_embeddings: Annotated[int, Field(ge=1, le=10**9)] | None = None
    sliding_window: Annotated[int, Field(ge=0)] | None = None
    rms_norm_eps: Positive | None = None
    rope_theta: Positive | None = None
    pad_token_id: int | None = None
    initializer_range: FiniteFloat | None = None
    hidden_act: str | None = None
    tie_word_embeddings: bool | None = None
    attn_implementation: str | None = None
    transformers_weights: str | None = None

    @model_validator(mode="after")
    def _together(self) -> ConfigFile:
        if self.hidden_act is not None and self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act = {self.hidden_act!r}; expected one of {', '.join(ACTIVATIONS)}. "
                             f"{did_you_mean(self.hidden_act, ACTIVATIONS)}".rstrip())
        heads, kv = self.num_attention_heads, self.num_key_value_heads
        if heads and kv and heads % kv:
            raise ValueError(f"num_key_value_heads = {kv}; expected a divisor of num_attention_heads = {heads}.")
        if self.pad_token_id is not None and self.vocab_size and self.pad_token_id >= self.vocab_size:
            raise ValueError(f"pad_token_id = {self.pad_token_id}; expected less than vocab_size = {self.vocab_size}. "
                             "Set it to null, or to the id of another special token.")
        if "/" in (self.attn_implementation or ""):
            raise ValueError(f"attn_implementation = {self.attn_implementation}; expected none that names a "
                             "repository, whose code would run.")
        if self.transformers_weights is not None:
            raise ValueError(f"transformers_weights = {self.transformers_weights}; expected none: weights are "
                             "model.safetensors, or what model.safetensors.index.json names.")
        return self


def read_config_file(folder: Path) -> dict[str, Any]:
    """The fields of a folder's config.json. Reads nothing else. Raises ConfigError: not there, no JSON object, or a
    field that no model can have; names it."""
    try:
        about = json.loads(read_text(folder / "config.json"))
    except (OSError, ValueError, RecursionError) as cause:
        raise ConfigError(f"model.path = {folder}: config.json cannot be read ({cause}).") from cause
    if not isinstance(about, dict):
        raise ConfigError(f"model.path = {folder}: config.json holds a {type(about).__name__}; expected an object.")
    try:
        ConfigFile.model_validate(about)
    except ValidationError as cause:
        first = cause.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"][:1]))
        said = first["msg"].removeprefix("Value error, ")
        value = f"{where} = {str(first['input'])[:60]!s}; expected otherwise: {said}." if where else said
        raise ConfigError(f"model.path = {folder}: config.json has {value}") from None
    return about
