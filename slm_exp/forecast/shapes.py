"""A model from its config alone: sizes by arithmetic, digest from what is remembered. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from slm_exp.core.errors import ConfigError
from slm_exp.core.files import digest
from slm_exp.models.layouts import FAMILIES

if TYPE_CHECKING:
    from slm_exp.models.base import ModelHandle, ModelSource

UNKNOWN = "?"
"""A digest that cannot be told here begins with it; what follows tells unknown things apart."""
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
LLAMA = {"model_type": "llama", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False}
LLAMA2_7B = {**LLAMA, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
             "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "dtype": "float16"}
LLAMA2_13B = {**LLAMA2_7B, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
              "num_attention_heads": 40, "num_key_value_heads": 40}
SMOLLM2 = {**LLAMA, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
           "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True, "dtype": "float32"}
PUBLISHED: dict[str, dict[str, Any]] = {  # the presets' repos by their published config.json, for machines without hub
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
    matrices: int
    """Weights of one layer's matrix products."""
    query: int
    """Width of all query heads together."""
    mlp: int
    """Channels between the MLP's projections."""

    def with_layers(self, n: float) -> Sizes:
        """The same model with another number of layers."""
        return Sizes(int(n), self.hidden, self.vocab, self.layer, self.total - int((self.n_layers - n) * self.layer),
                     self.matrices, self.query, self.mlp)  # fmt: skip

    def block_flops(self, tokens: float, seq_len: float) -> float:
        """Operations of one layer over so many tokens in sequences of `seq_len`; as `search.cost.flops_per_token`."""
        return tokens * (2 * self.matrices + 4 * self.query * (seq_len + 1) / 2)

    def head_flops(self, tokens: float) -> float:
        """Operations of the output head over so many tokens."""
        return 2 * tokens * self.hidden * self.vocab

    def flops_per_token(self, seq_len: int) -> float:
        """Operations of one token of a prefill, head included; as `search.cost.flops_per_token`."""
        return self.head_flops(1) + self.n_layers * self.block_flops(1, seq_len)


def sizes_of(config: Any) -> Sizes:
    """Sizes from a config's fields: a mapping (config.json) or an object.

    Raises:
        ConfigError: a family that is not understood, or a field that is missing; names it.
    """
    about = config if isinstance(config, Mapping) else vars(config)
    family = about.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(f"model_type = {family}; expected one of {', '.join(FAMILIES)}.")
    try:
        d, f, heads = (int(about[n]) for n in ("hidden_size", "intermediate_size", "num_attention_heads"))
        n, v = int(about["num_hidden_layers"]), int(about["vocab_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"a config of type {family} lacks {error}.") from None
    kv = int(about.get("num_key_value_heads") or heads)
    head = int(about.get("head_dim") or d // heads)
    q, k = heads * head, kv * head
    matrices = 2 * d * q + 2 * d * k + 3 * d * f
    vectors = 2 * d  # two norms
    if family == "qwen2":
        vectors += q + 2 * k
    elif about.get("attention_bias"):
        vectors += q + 2 * k + d
    if family == "qwen3":
        vectors += 2 * head
    if family == "llama" and about.get("mlp_bias"):
        vectors += 2 * f + d
    layer = matrices + vectors
    total = n * layer + d + v * d * (1 if about.get("tie_word_embeddings") else 2)
    return Sizes(n, d, v, layer, total, matrices, q, f)


@dataclass(frozen=True)
class Sketch:
    """What is known of a model without opening it."""

    name: str
    digest: str
    """As `ModelHandle.digest`; begins with `?` where it cannot be told."""
    sizes: Sizes | None
    handle: ModelHandle | None
    """Stands in for the model wherever only config and digest are looked at; has no weights to load."""
    dtype: str = "float32"
    random: bool = False
    notes: tuple[str, ...] = ()
    """What could not be told, and why."""

    @property
    def bytes(self) -> int:
        """Of the weights in memory."""
        return self.sizes.total * BYTES.get(self.dtype, 4) if self.sizes else 0


def sketch(source: ModelSource, cache_dir: Path, device_type: str) -> Sketch:
    """What is known of the model that a config names. Reads small files only."""
    from slm_exp.models.hf import HF
    from slm_exp.models.smollm2_135m import SmolLM2
    from slm_exp.models.tiny import Tiny

    if isinstance(source, Tiny):
        return _tiny(source, device_type)
    if isinstance(source, SmolLM2):
        return _smollm2(source, cache_dir, device_type)
    if isinstance(source, HF):
        return _hf(source, device_type)
    return Sketch(source.name, f"{UNKNOWN}{source.name}", None, None, notes=(
        f"model={source.name}: only the run itself can tell its size.",))


def _made(name: str, value: str, config: Mapping[str, Any] | None, dtype: str, device_type: str,
          random: bool = False, notes: tuple[str, ...] = ()) -> Sketch:  # fmt: skip
    from slm_exp.models.base import ModelHandle

    sizes = None
    if config is not None:
        try:
            sizes = sizes_of(config)
        except ConfigError as error:
            notes = (*notes, f"{name}: its size cannot be told here: {error}")
    if sizes is None or config is None:
        return Sketch(name, value, None, None, dtype, random, notes)

    def refuse() -> Any:
        raise AssertionError("a sketch has no weights")

    handle = ModelHandle(name, SimpleNamespace(**config), FAMILIES[str(config["model_type"])], value,  # type: ignore[arg-type]
                         SimpleNamespace(type=device_type), refuse, refuse, random=random)  # type: ignore[arg-type]
    handle.__dict__ |= {"n_params": sizes.total, "layer_params": sizes.layer}  # cached properties: no empty model
    return Sketch(name, value, sizes, handle, dtype, random, notes)


def _tiny(source: Any, device_type: str) -> Sketch:
    config = {
        "model_type": source.family, "hidden_size": source.hidden, "intermediate_size": 2 * source.hidden,
        "num_hidden_layers": source.layers, "num_attention_heads": source.heads,
        "num_key_value_heads": source.kv_heads, "head_dim": source.hidden // source.heads,
        "vocab_size": source.vocab, "tie_word_embeddings": source.tied,
    }
    about = source.identity()
    return _made(f"tiny-{source.family}", digest(about), config, str(about["dtype"]), device_type, random=True)


def _smollm2(source: Any, cache_dir: Path, device_type: str) -> Sketch:
    from slm_exp.core.cache.digests import content_digest
    from slm_exp.core.cache.store import StageStore
    from slm_exp.models.smollm2_135m import gguf_file

    gguf = content_digest(gguf_file())  # 92 MB, read once
    dtype = "float32" if source.dtype == "auto" else source.dtype
    manifest = cache_dir / "model" / StageStore(cache_dir).key("model", {"gguf": gguf}) / "manifest.json"
    try:
        weights = json.loads(manifest.read_text(encoding="utf-8"))["files"]["model.safetensors"]["digest"]
    except (OSError, ValueError, KeyError):
        note = "the embedded weights have not been converted in this cache yet (20 s, once)."
        return _made(source.name, f"{UNKNOWN}{gguf}{dtype}", SMOLLM2, dtype, device_type, notes=(note,))
    return _made(source.name, digest({"weights": weights, "dtype": dtype}), SMOLLM2, dtype, device_type)


def _hf(source: Any, device_type: str) -> Sketch:
    from slm_exp.models.hf import TOKENIZER, folder_digest, short_name, weight_files

    folder, name = source._folder(), source.path
    notes: tuple[str, ...] = ()
    if folder is not None:
        config, name = _read(folder), short_name(folder)
        seen = unseen(folder, ("config.json", *weight_files(folder), *TOKENIZER)) if config else []
        contents = {"folder": folder_digest(folder)} if config and not seen else None
        if seen:
            size = sum(f.stat().st_size for f in seen) / 1e9
            notes = (f"{folder}: {len(seen)} files ({size:.1f} GB) have not been read on this machine yet, so finished "
                     "runs and cache hits cannot be told; the first run reads them once.",)  # fmt: skip
    else:
        snapshot = _snapshot(source)
        config = _read(snapshot) if snapshot else PUBLISHED.get(source.path)
        contents = {"repo": source.path, "commit": snapshot.name} if snapshot else None
        if snapshot is None:
            notes = (f"{source.path} is not in the local Hugging Face cache; a run would download it.",)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32") if config else "float32"
    dtype = dtype.removeprefix("torch.") if source.dtype == "auto" else source.dtype
    value = digest({**contents, "dtype": dtype}) if contents else f"{UNKNOWN}{source.path}{source.revision}{dtype}"
    return _made(name, value, config, dtype, device_type, notes=notes)


def unseen(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """Which of a model's files would have to be read to know their digest. Small ones are read."""
    from slm_exp.core.cache.digests import remembered

    files = [folder / name for name in names if (folder / name).is_file()]
    return [f for f in files if f.suffix == ".safetensors" and remembered(f) is None]


def _snapshot(source: Any) -> Path | None:
    """The repo's snapshot folder in the local Hugging Face cache; looks at no network."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(source.path, revision=source.revision, local_files_only=True,
                                        allow_patterns=["config.json"]))  # fmt: skip
    except Exception:  # not there, or no repo id at all: the run says which
        return None
    return folder if (folder / "config.json").is_file() else None


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
