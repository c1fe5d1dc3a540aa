"""What is known of a model's folder before anything loads: refused by name, in milliseconds, or put right."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from slm_exp.core.errors import ConfigError, SlmError
from slm_exp.models.files import headers, inspect
from slm_exp.models.hf import HF
from slm_exp.models.saving import for_older_readers
from slm_exp.models.sizes import sizes_in, sizes_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, make_tiny) -> Path:
    folder = tmp_path_factory.mktemp("inspected") / "small"
    handle = make_tiny(layers=3)
    handle.model.save_pretrained(folder)
    handle.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def mine(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "small"))


def edit(folder: Path, name: str = "config.json", **fields) -> None:
    about = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**about, **fields}))


def rewrite(folder: Path, **tensors: torch.Tensor) -> None:
    state = load_file(folder / "model.safetensors")
    save_file({**state, **{k.replace("__", "."): t for k, t in tensors.items()}}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip


def test_a_head_of_its_own_under_a_config_that_ties_is_refused(mine):
    embedding = load_file(mine / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(mine, lm_head__weight=embedding.clone())
    inspect(mine)  # a second copy of the same numbers is harmless
    rewrite(mine, lm_head__weight=embedding + 1)
    with pytest.raises(ConfigError, match=r"tie_word_embeddings = True, but model.safetensors holds an lm_head of its"):
        HF(path=str(mine)).identity()


def test_integer_weights_are_refused(mine):
    rewrite(mine, model__layers__1__mlp__up_proj__weight=torch.zeros(64, 32, dtype=torch.int8))
    with pytest.raises(ConfigError, match=r"layers.1.mlp.up_proj.weight is of type I8; expected F64, F32, F16, BF16"):
        inspect(mine)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 4}, r"lack model.layers.3"),
        ({"num_hidden_layers": 2}, r"hold, beyond what config.json counts, model.layers.2"),
        ({"vocab_size": 300}, r"the embedding is of shape \[258, 32\]; expected vocab_size = 300 rows"),
        ({"pad_token_id": 258}, r"pad_token_id = 258; expected less than vocab_size = 258"),
    ],
)
def test_weights_that_do_not_fit_the_config(mine, fields, message):
    edit(mine, **fields)
    with pytest.raises(SlmError, match=message):
        inspect(mine)


def test_a_tokenizer_that_appends_eos_is_refused(mine):
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    step = {"type": "TemplateProcessing", "single": [text, end], "pair": [text, text], "special_tokens": {}}
    edit(mine, "tokenizer.json", post_processor={"type": "Sequence", "processors": [step]})
    with pytest.raises(ConfigError, match=r"tokenizer.json appends '</s>' to every text \(add_eos_token\)"):
        inspect(mine)
    step["single"] = [end, text]  # before the text it is BOS
    edit(mine, "tokenizer.json", post_processor=step)
    inspect(mine)


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(mine):
    about = json.loads((mine / "tokenizer.json").read_text())
    about["model"]["vocab"]["far"] = 258
    (mine / "tokenizer.json").write_text(json.dumps(about))
    with pytest.raises(ConfigError, match=r"ids outside the vocabulary: up to 258, .* vocab_size = 258 rows"):
        inspect(mine)


def test_what_a_session_left_in_the_config_is_put_right(mine, tokens):
    edit(mine, return_dict=False, output_attentions=True, output_hidden_states=True,
         attn_implementation="flash_attention_2")  # fmt: skip
    model = HF(path=str(mine)).open(CPU, mine).model
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        out = model(torch.as_tensor(tokens.tokens_NT[:1]).long())
    assert set(out.keys()) <= {"logits", "past_key_values"}


def test_longer_than_the_positions_is_refused_by_the_setting(mine):
    edit(mine, max_position_embeddings=64)
    handle = HF(path=str(mine)).open(CPU, mine)
    handle.require_room("calibration.seq_len", 64)
    with pytest.raises(ConfigError, match=r"calibration.seq_len = 128; expected at most 64, the positions of small"):
        handle.require_room("calibration.seq_len", 128)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "opt", "gpt2", "phi3", "qwen2_moe"])
def test_sizes_from_headers_are_the_models(family, make_tiny, tmp_path):
    handle = make_tiny(family)
    handle.model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    sizes = sizes_in(config, headers(tmp_path))
    assert (sizes.total, sizes.layer, sizes.n_layers) == (handle.n_params, handle.layer_params, 8)
    assert sizes.matrices == handle.layout.work(handle.layers[0], handle.config)
    sketch = HF(path=str(tmp_path)).sketch(tmp_path, "cpu")
    assert sketch.sizes == sizes
    assert sketch.handle.n_layers == 8
    assert sketch.handle.sublayer_params == handle.sublayer_params
    if family in ("llama", "qwen3", "gemma3_text"):
        assert sizes_of(config) == sizes


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e5},
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5,
         "original_max_position_embeddings": 64},
    ],
)  # fmt: skip
def test_older_readers_find_their_names_and_newer_ones_the_same(mine, rope):
    from transformers import AutoConfig

    edit(mine, rope_parameters=rope)
    before = AutoConfig.from_pretrained(mine)
    for_older_readers(mine / "config.json")
    about = json.loads((mine / "config.json").read_text())
    assert about["rope_theta"] == rope["rope_theta"]
    assert about["torch_dtype"] == about["dtype"] == "float32"
    scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
    assert about["rope_scaling"] == (None if rope["rope_type"] == "default" else scaling)
    assert AutoConfig.from_pretrained(mine).rope_parameters == before.rope_parameters


def test_greedy_stays_greedy_and_licences_go_along(mine, tokens):
    from slm_exp.core.types import MergePlan
    from slm_exp.merging.surgery import apply_plan
    from slm_exp.runs.checkpoint import save_checkpoint

    (mine / "LICENSE").write_text("do as you like")
    (mine / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.6, "top_p": 0.9}))
    short = apply_plan(HF(path=str(mine)).open(CPU, mine), MergePlan(3, dropped=(1,)))
    save_checkpoint(short, mine.parent / "out", MergePlan(3, dropped=(1,)), tokens)
    out = json.loads((mine.parent / "out" / "generation_config.json").read_text())
    assert not out.get("do_sample")
    assert "temperature" not in out
    assert (mine.parent / "out" / "LICENSE").read_text() == "do as you like"
    assert json.loads((mine.parent / "out" / "config.json").read_text())["rope_theta"] == 10000.0
    assert np.isclose(short.model.generation_config.temperature, 0.6)
