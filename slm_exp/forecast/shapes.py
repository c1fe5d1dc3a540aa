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
from slm_exp.models.sizes import BYTES, PUBLISHED, SMOLLM2, Sizes, sizes_of

if TYPE_CHECKING:
    from slm_exp.models.base import ModelHandle, ModelSource

UNKNOWN = "?"
"""A digest that cannot be told here begins with it; what follows tells unknown things apart."""
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
    from slm_exp.models.smollm2_135m import CONVERSION, gguf_file

    gguf = content_digest(gguf_file())  # 92 MB, read once
    dtype = "float32" if source.dtype == "auto" else source.dtype
    manifest = cache_dir / "model" / StageStore(cache_dir).key("model", {"gguf": gguf}, CONVERSION) / "manifest.json"
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
