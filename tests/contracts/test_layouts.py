"""What every model family's layout promises. A new entry in FAMILIES is covered on arrival."""

from __future__ import annotations

import pytest
import torch

from slm_exp.core.registry import available
from slm_exp.core.types import MergePlan
from slm_exp.merging.surgery import apply_plan
from slm_exp.models.layouts import FAMILIES, layout_for

every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
def test_the_parts_are_where_it_says(make_tiny, family):
    handle = make_tiny(family)
    layout, model = handle.layout, handle.model
    assert layout_for(handle.config) is layout
    assert len(handle.layers) == handle.n_layers == 8
    assert model.get_submodule(layout.decoder) is model.get_decoder()
    assert model.get_submodule(layout.final_norm).weight.shape == (32,)
    for layer in handle.layers:
        for name in layout.projections:
            assert layer.get_submodule(name).weight.ndim == 2, name
        assert layer.get_submodule(layout.mlp_out).weight.shape[0] == 32
        assert layer.get_submodule(layout.q).weight.shape[0] == 2 * layer.get_submodule(layout.k).weight.shape[0]


@every_family
def test_running_the_parts_is_running_the_model(make_tiny, family, tokens):
    """The layer list is all there is between the embedding and the final norm."""
    handle = make_tiny(family)
    ids = torch.as_tensor(tokens.tokens_NT).long()
    states = []
    for part in (*handle.layers, handle.model.get_submodule(handle.layout.final_norm)):
        part.register_forward_hook(lambda m, a, out: states.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        last = handle.model.get_decoder()(ids, use_cache=False).last_hidden_state
    assert len(states) == 9
    assert torch.equal(states[-1], last)


@every_family
@pytest.mark.parametrize("tied", [True, False])
def test_a_shorter_model_saves_and_reloads_as_itself(make_tiny, family, tied, tokens, tmp_path):
    from transformers import AutoModelForCausalLM

    window = None if family == "llama" else 8
    rule = available("merge_rule")["top_layer"]()
    dense = make_tiny(family, tied=tied, sliding_window=window)
    short = apply_plan(dense, MergePlan(8, groups=((3, 6),), dropped=(1,), rule="top_layer"), rule)
    short.model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.as_tensor(tokens.tokens_NT).long()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, short.model(ids).logits)
    assert layout_for(again.config).layers(again)[4].self_attn.layer_idx == 4
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    ours, theirs = short.model.config.to_dict(), again.config.to_dict()
    assert {k for k in ours if theirs[k] != ours[k]} <= {"_name_or_path"}
    assert short.n_params == again.num_parameters()
