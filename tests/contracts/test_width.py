"""What every width pruner promises. A new member is covered on arrival."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

from slm_exp.core.errors import ConfigError
from slm_exp.core.registry import available
from slm_exp.core.types import MergePlan
from slm_exp.core.widths import WidthDecision
from slm_exp.merging.sizes import costs_of, full_shape, legal
from slm_exp.merging.width import apply_width
from slm_exp.methods.slm import SLM
from slm_exp.models.layouts import FAMILIES
from slm_exp.width.base import WidthTask
from slm_exp.width.pruner import Pruner

PRUNERS = sorted(name for name, cls in available("width").items() if issubclass(cls, Pruner))
"""Those that narrow; masks are in tests/width/test_nm.py."""
every_pruner = pytest.mark.parametrize("name", PRUNERS)
RATIO = 0.3
PER_LAYER = {"uniform": False, "allocation": "score"}


def pruner(name: str, handle: Any = None, **fields: Any) -> Any:
    """A member with default settings; flap without biases where the family has none."""
    if name == "flap" and handle is not None and handle.layout.family != "llama":
        fields.setdefault("compensate", False)
    return available("width")[name](**fields)


def decide(cfg: Any, handle: Any, tokens: Any, ratio: float = RATIO, seed: int = 0) -> WidthDecision:
    cfg.check_model(handle, SLM())
    task = WidthTask(handle, tokens, MergePlan(handle.n_layers).slots, ratio, seed, n_dense=handle.n_layers)
    made = cfg.decide(task)
    assert WidthDecision.from_json(json.loads(json.dumps(made.to_json()))) == made
    return made


def logits(handle: Any, tokens: Any) -> torch.Tensor:
    """In float64, so that differences are of the models and not of rounding."""
    model = copy.deepcopy(handle.model).double()
    with torch.inference_mode():
        return model(torch.as_tensor(tokens.tokens_NT).long(), use_cache=False).logits


def silence_removed(handle: Any, width: WidthDecision) -> None:
    """Zero the out-projection columns of every unit that a decision removes: they contribute nothing then."""
    per = handle.config.head_dim
    with torch.no_grad():
        for i, layer in enumerate(handle.layers):
            gone = sorted(set(range(handle.config.num_attention_heads)) - set(width.kept.query_heads[i]))
            layer.self_attn.o_proj.weight[:, [h * per + c for h in gone for c in range(per)]] = 0
            channels = set(range(handle.config.intermediate_size)) - set(width.channels(i))
            layer.mlp.down_proj.weight[:, sorted(channels)] = 0


@every_pruner
@pytest.mark.parametrize("fields", [{}, PER_LAYER], ids=["uniform", "per_layer"])
@pytest.mark.parametrize("heads", ["kv_groups", "within_groups"])
def test_units_that_contribute_nothing_are_removed_without_a_trace(name, fields, heads, make_tiny, tokens):
    handle = make_tiny(layers=3, hidden=64, heads=8, kv_heads=2)
    width = decide(pruner(name, heads=heads, **fields), handle, tokens, 0.45)
    assert fields or min(width.sizes.heads) < 8, "heads went"
    silence_removed(handle, width)
    narrow = apply_width(handle, width)
    assert (logits(narrow, tokens) - logits(handle, tokens)).abs().max() < 1e-5
    assert narrow.n_params < handle.n_params


@every_pruner
@pytest.mark.parametrize("family", [name for name, layout in FAMILIES.items() if layout.layerwise])
def test_the_result_is_an_ordinary_model_of_the_family(name, family, make_tiny, tokens):
    handle = make_tiny(family, layers=3, sliding_window=None if family == "llama" else 8)
    width = decide(pruner(name, handle), handle, tokens, 0.5)
    narrow = apply_width(handle, width)
    config = narrow.config
    assert type(config) is type(handle.config)
    assert legal(config, full_shape(config))
    assert (config.num_attention_heads, config.num_key_value_heads) == (2, 1 if name != "minitron" else 2)
    assert config.head_dim == 8
    assert config.intermediate_size % 8 == 0
    assert type(narrow.model) is type(handle.model)
    narrow.layout.check(narrow.model)
    assert sum(p.numel() for p in narrow.model.parameters()) == narrow.n_params
    assert torch.isfinite(logits(narrow, tokens)).all()


@every_pruner
@pytest.mark.parametrize("fields", [{}, PER_LAYER, {"uniform": False, "allocation": "equal"}],
                         ids=["uniform", "score", "equal"])  # fmt: skip
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.4])
def test_the_ratio_is_reached_within_a_snap(name, fields, ratio, make_tiny, tokens):
    """Heads may leave or take more than asked; channels make up for it, in steps of 8."""
    handle = make_tiny(layers=4, hidden=64, heads=8, kv_heads=4)
    cfg = pruner(name, **fields, **({"layers": [0, 4]} if fields else {}))
    width = decide(cfg, handle, tokens, ratio)
    costs, full = costs_of(handle), full_shape(handle.config)
    before = costs.size(full)
    after = [costs.size(full._replace(heads=h, kv_heads=k, channels=c)) for h, k, c in
             zip(*(getattr(width.sizes, n) for n in ("heads", "kv_heads", "channels")), strict=True)]  # fmt: skip
    reached = 1 - sum(after) / (before * 4)
    assert reached == pytest.approx(width.reached)
    step = 4 * costs.channel / before
    assert abs(reached - ratio) <= (step if fields != PER_LAYER else costs.attention(2, 1) / before) + 1e-9
    assert f"{reached:.4f}" in width.notes[0]
    narrow = apply_width(handle, width)
    biases = sum(p.numel() for n, p in narrow.model.named_parameters() if n.endswith("bias"))
    assert handle.n_params - narrow.n_params + biases == before * 4 - sum(after)


@every_pruner
@pytest.mark.parametrize("fields", [{}, PER_LAYER], ids=["uniform", "per_layer"])
def test_deciding_repeats_and_touches_no_weight(name, fields, make_tiny, tokens):
    handle = make_tiny(layers=3)
    before = {n: p.clone() for n, p in handle.model.state_dict().items()}
    modules = list(handle.model.modules())
    first = decide(pruner(name, **fields), handle, tokens)
    assert decide(pruner(name, **fields), handle, tokens) == first
    _ = apply_width(handle, first).model
    assert all(torch.equal(before[n], p) for n, p in handle.model.state_dict().items())
    assert list(handle.model.modules()) == modules
    assert not any(p.requires_grad or p.grad is not None for p in handle.model.parameters())
    assert all("forward" not in m.__dict__ and not m._forward_hooks and not m._forward_pre_hooks for m in modules)


@every_pruner
def test_unchanged_tensors_are_shared(name, make_tiny, tokens):
    handle = make_tiny(layers=3)
    narrow = apply_width(handle, decide(pruner(name), handle, tokens))
    wide = dict(handle.model.named_parameters())
    for n, p in narrow.model.named_parameters():
        if n in wide and p.shape == wide[n].shape:
            assert p.data_ptr() == wide[n].data_ptr() or "bias" in n, n
    assert narrow.digest != handle.digest
    assert narrow.lineage["base"] == handle.name
    assert narrow.lineage["width"]["method"] == name


@every_pruner
@pytest.mark.parametrize("fields", [{}, PER_LAYER], ids=["uniform", "per_layer"])
def test_generation_with_the_cache_is_generation_without(name, fields, make_tiny, tokens):
    handle = make_tiny(layers=3)
    narrow = apply_width(handle, decide(pruner(name, **fields), handle, tokens))
    ids = torch.as_tensor(tokens.tokens_NT[:1, :8]).long()
    texts = [narrow.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6,
                                   use_cache=cached, pad_token_id=0) for cached in (True, False)]  # fmt: skip
    assert torch.equal(*texts)


@every_pruner
@pytest.mark.parametrize("uniform", [True, False])
def test_a_ratio_that_leaves_nothing_is_refused_before_weights_load(name, uniform, make_tiny):
    handle = make_tiny()
    cfg = pruner(name, ratio=0.97, uniform=uniform, layers=None if uniform else [0, 8])
    with pytest.raises(ConfigError, match=r"width.ratio = 0.97: expected at most 0\.\d+ .* no attention head"):
        cfg.check_model(handle, SLM())
    assert not handle.loaded


@every_pruner
def test_a_range_outside_the_model_is_refused_before_weights_load(name, make_tiny):
    handle = make_tiny()
    with pytest.raises(ConfigError, match=r"width.layers = \[4, 26\]; expected a range within the model's 8 layers"):
        pruner(name, uniform=False, layers=[4, 26]).check_model(handle, SLM())
    assert not handle.loaded
