"""model=tiny: reproducible, made of parts one can tell apart, and whole enough to tokenise, save and reload."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slm_exp.core.errors import ConfigError
from slm_exp.core.registry import available
from slm_exp.models.hf import HF
from slm_exp.models.layouts import FAMILIES
from slm_exp.models.tiny import Tiny, byte_tokenizer

TEXT = "Plain text,\n  blanks, naïve café, 漢字 🙂\x00 and </p>."


def test_equal_fields_give_equal_weights(make_tiny):
    one, two, other = make_tiny(), make_tiny(), make_tiny(seed=1)
    assert one.digest == two.digest != other.digest
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, two.model.state_dict()[name]), name
    assert not torch.equal(one.model.model.norm.weight, other.model.model.norm.weight)


def test_weights_are_those_of_the_recipe(tiny_handle):
    """If this moves, random_weights draws something else: raise RECIPE in tiny.py, so that caches notice."""
    q = tiny_handle.layers[3].self_attn.q_proj.weight
    assert q[0, :3].tolist() == pytest.approx([0.27414, -0.08410, 0.07454], abs=1e-4)


def test_a_sweep_knows_about_how_large_it_is(tmp_path, make_tiny):
    """Within a factor of two, without opening anything: made in memory, as a folder, as a repo nobody has seen."""
    handle = make_tiny("llama")
    true = 4 * handle.n_params
    assert true / 2 < Tiny(family="llama").weights_bytes() < true * 2
    handle.model.save_pretrained(tmp_path)
    assert true / 2 < HF(path=str(tmp_path), dtype="auto").weights_bytes() < true * 2
    assert HF(path="owner/name").weights_bytes() is None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_once_and_without_weights(make_tiny, family, tied):
    handle = make_tiny(family, tied=tied)
    n = handle.n_params
    assert not handle.loaded
    unique = {p.data_ptr(): p.numel() for p in handle.model.parameters()}
    assert n == sum(unique.values()) == make_tiny(family).n_params + (0 if tied else 258 * 32)


def test_layers_norms_and_biases_differ(make_tiny):
    layers = make_tiny("qwen2").layers
    for name in ("self_attn.q_proj.weight", "self_attn.k_proj.bias", "input_layernorm.weight"):
        low, high = layers[2].get_parameter(name), layers[3].get_parameter(name)
        assert (low - high).abs().min() > 0, name


def test_bytes_round_trip_and_survive_saving(tmp_path: Path):
    from transformers import AutoTokenizer

    tokenizer = byte_tokenizer()
    ids = tokenizer(TEXT)["input_ids"]
    assert len(ids) == len(TEXT.encode())
    assert max(ids) < 256 <= tokenizer.bos_token_id < tokenizer.eos_token_id < 258
    assert tokenizer.decode(ids) == TEXT
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(TEXT)["input_ids"] == ids
    assert again.decode(ids) == TEXT


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"family": "lama"}, r"model.family = lama; expected one of arcee, .*Did you mean llama"),
        ({"hidden": 36}, r"model.hidden = 36; expected a multiple of 2 x model.heads = 8"),
        ({"kv_heads": 3}, r"model.kv_heads = 3; expected a divisor of model.heads = 4"),
        ({"vocab": 100}, r"model.vocab = 100; expected a whole number >= 258"),
        ({"layers": 0}, r"model.layers = 0"),
        ({"sliding_window": 8}, r"model.sliding_window = 8; .*other than llama"),
        ({"path": "x"}, r"model.path = x; .*use model=hf"),
        ({"dtype": "float64"}, r"model.dtype = float64; expected one of auto, bfloat16"),
        ({"device": "gpu"}, r"model.device = gpu; expected null, auto, cpu, cuda or cuda:N"),
        ({"device_map": "balanced"}, r"model.device_map = balanced; expected null or auto"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        Tiny(**fields)


@pytest.mark.parametrize("name", ["tiny", "smollm2_135m", "gemma3_270m"])
@pytest.mark.parametrize(("field", "value"), [
    ("path", "x"), ("revision", "main"), ("device_map", "auto"), ("trust_remote_code", True)])  # fmt: skip
def test_fields_that_a_model_would_ignore_are_refused(name, field, value):
    with pytest.raises(ConfigError, match=rf"model\.{field} = {value}; expected .* model={name}.*use model=hf"):
        available("model")[name](**{field: value})


def test_dtype_is_part_of_the_digest_and_device_is_not():
    at = torch.device("cpu")
    half = Tiny(dtype="bfloat16").open(at, Path("unused"))
    assert half.digest != Tiny().open(at, Path("unused")).digest
    assert half.model.dtype == torch.bfloat16
    assert Tiny(device="cuda:1").identity() == Tiny().identity()
    assert Tiny(dtype="auto").identity() == Tiny().identity()
