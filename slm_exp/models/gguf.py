"""GGUF weights as an ordinary model folder. Imports torch."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import transformers.modeling_gguf_pytorch_utils as reader
from transformers import AutoModelForCausalLM, AutoTokenizer

from slm_exp.core.files import honour_umask
from slm_exp.core.logs import without_bars
from slm_exp.models.saving import save_tokenizer

log = logging.getLogger(__name__)


@without_bars()
def convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF model as an ordinary folder: float32 safetensors, config, generation config, tokenizer.

    Cost: about 20 s and 1.5 GB of memory.
    """
    log.warning("preparing %s once (20 s to a minute; kept in the cache) ...", gguf.stem)
    bar, reader.tqdm = reader.tqdm, lambda items, **_: items  # which has no switch
    try:
        read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    finally:
        reader.tqdm = bar
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
