"""What is not understood is refused by name, from the config alone."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from slm_exp.core.errors import ArchitectureError
from slm_exp.models.base import empty_model
from slm_exp.models.layouts import FAMILIES, layout_for


def config(family: str = "llama", **fields):
    base = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 300,
    }  # fmt: skip
    return AutoConfig.for_model(family, **{**base, **fields})


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (AutoConfig.for_model("bloom"), r"model_type = 'bloom' is not understood; known: arcee, .*, qwen3_moe.* See"),
        (AutoConfig.for_model("gemma"), r"'gemma' is not understood; known: [a-z0-9_, ]*\. See CONTRIBUTING"),
        (config("opt", do_layer_norm_before=False), r"do_layer_norm_before = False .*expected True"),
        (config("opt", word_embed_proj_dim=16), r"word_embed_proj_dim = 16 .*expected hidden_size = 32"),
        (config("gpt2", scale_attn_by_inverse_layer_idx=True), r"scale_attn_by_inverse_layer_idx = True .*gpt2 layout"),
        (config("qwen3_moe", mlp_only_layers=[1]), r"mlp_only_layers = \[1\] is not understood by the qwen3_moe"),
        (config("gemma2", use_bidirectional_attention=True), r"use_bidirectional_attention = True"),
        (config("cohere", use_qk_norm=True), r"use_qk_norm = True is not understood"),
        (AutoConfig.for_model("t5"), r"'t5' is an encoder-decoder"),
        (config(quantization_config={"quant_method": "gptq", "bits": 4}), r"quantization_config \(gptq\).*original"),
        (config(architectures=["LlamaForSequenceClassification"]), r"architectures = .*not a causal language model"),
        (config(no_rope_layers=[1, 0, 1, 1]), r"no_rope_layers = \[1, 0, 1, 1\] has one entry per layer"),
        (config(layer_types=["full_attention", "sliding_attention"] * 2), r"layer_types mixes .*llama gives every"),
        (config("mistral", layer_types=["full_attention", "sliding_attention"] * 2), r"mistral gives every layer"),
        (config("qwen3", layer_types=["full_attention", "chunked_attention"] * 2), r"layer_types has 'chunked_attent"),
        (
            config(rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 1e4}}),
            r"rope_parameters differ by layer type \(full_attention\), but llama has one rotary table",
        ),
    ],
)
def test_refused_by_name(refused, message):
    with pytest.raises(ArchitectureError, match=message):
        layout_for(refused)


def test_layers_of_their_own_shape_are_refused():
    uneven = config(per_layer_config={0: {"intermediate_size": 32}})
    with pytest.raises(ArchitectureError, match="per_layer_config gives layers shapes of their own"):
        layout_for(uneven)


def test_a_list_that_is_wrong_about_the_layers_is_refused():
    wrong = config("qwen2")
    wrong.layer_types = ["full_attention"] * 3
    with pytest.raises(ArchitectureError, match="layer_types has 3 entries for 4 layers"):
        layout_for(wrong)


def test_harmless_extras_pass():
    layout_for(config(eos_token_id=[1, 2, 3, 4], my_note="x", mlp_layer_types=["dense"] * 4))


def small(family: str):
    return empty_model(config(family, pad_token_id=0, **FAMILIES[family].tiny))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_a_layer_is_accounted_for(family):
    import torch

    model = small(family)
    layout = layout_for(model.config)
    layout.check(model)
    layout.layers(model)[2].register_parameter("extra", torch.nn.Parameter(torch.empty(4, 32, device="meta")))
    with pytest.raises(ArchitectureError, match=r"layer 2 has extra of shape \[4, 32\], unknown to the"):
        layout.check(model)
    for name in layout.matrices:
        model = small(family)
        module, _, leaf = name.rpartition(".")
        delattr(layout.layers(model)[1].get_submodule(module), leaf)
        with pytest.raises(ArchitectureError, match=rf"layer 1 has no {name}"):
            layout.check(model)
    model = small(family)
    module = layout.layers(model)[3].get_submodule(layout.o)
    module.weight = torch.nn.Parameter(torch.empty(7, 32, device="meta"))
    with pytest.raises(ArchitectureError, match=rf"layer 3: {layout.o}.weight has shape \(7, 32\), in layer 0 \(32"):
        layout.check(model)
