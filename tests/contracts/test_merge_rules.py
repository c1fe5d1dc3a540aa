"""What every merge rule keeps to, and the closed form of each."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slm_exp.core import registry
from slm_exp.core.errors import ArchitectureError
from slm_exp.models.layouts import FAMILIES

RULES = sorted(registry.available("merge_rule"))
CLOSED_FORMS = {  # of [1, 10, 100] and of [1, 3]
    "top_layer": (100.0, 3.0),
    "keep_top": (100.0, 3.0),
    "keep_low": (1.0, 1.0),
    "mean": (37.0, 2.0),
    "sum_of_deltas": (1.0 + 9 + 99, 3.0),
}


def make(name: str) -> Any:
    return registry.available("merge_rule")[name]()


def scalars(*values: float, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.tensor([[v]], dtype=dtype) for v in values]


@pytest.mark.parametrize("name", sorted(CLOSED_FORMS))
def test_closed_form(name: str) -> None:
    rule = make(name)
    assert (rule.combine(scalars(1, 10, 100)).item(), rule.combine(scalars(1, 3)).item()) == CLOSED_FORMS[name]


@pytest.mark.parametrize("name", RULES)
def test_equal_layers_give_that_layer(name: str) -> None:
    weight = torch.randn(5, 3)
    for n in (2, 3, 4):
        torch.testing.assert_close(make(name).combine([weight.clone() for _ in range(n)]), weight)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_inputs_stay_as_they_are_and_the_dtype_is_kept(name: str, dtype: torch.dtype) -> None:
    weights = [torch.randn(4, 3, dtype=dtype) for _ in range(3)]
    before = [w.clone() for w in weights]
    out = make(name).combine(weights)
    assert out.dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    again = make(name).combine(weights)
    assert torch.equal(out, again)


@pytest.mark.parametrize("name", ["mean", "sum_of_deltas"])
def test_arithmetic_is_wider_than_bfloat16(name: str) -> None:
    """Neighbouring bfloat16 numbers, whose sums bfloat16 cannot hold."""
    weights = scalars(*[1 + i / 128 for i in range(4)], dtype=torch.bfloat16)
    exact = make(name).combine([w.double() for w in weights])
    assert make(name).combine(weights).item() == exact.to(torch.bfloat16).item()


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("name", RULES)
def test_projections_are_combined_and_the_rest_is_one_layers(name: str, family: str, make_tiny: Any) -> None:
    rule, handle = make(name), make_tiny(family)
    generator = torch.Generator().manual_seed(0)
    for p in handle.model.parameters():  # norms and biases differ from layer to layer
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    before = {n: p.clone() for n, p in handle.model.state_dict().items()}
    layers = list(handle.layers[2:5])
    merged = rule.merge(handle.layout, layers)
    assert merged.host == (2 if rule.attention_from == "top" else 0)
    host, low = dict(layers[merged.host].named_parameters()), dict(layers[0].named_parameters())
    projections = set(handle.layout.matrices)
    assert projections < set(host)
    for n, own in host.items():
        got = merged.weights.get(n, own)
        if n in projections:
            expected = rule.combine([layer.get_parameter(n) for layer in layers])
        else:
            expected = own if rule.whole_layer else low[n]
        assert torch.equal(got, expected), n
    assert all(t is not host[n] for n, t in merged.weights.items())  # only what differs
    assert all(torch.equal(before[n], p) for n, p in handle.model.state_dict().items())


def test_only_keep_top_takes_the_top_layers_norms() -> None:
    assert [name for name in RULES if make(name).whole_layer] == ["keep_top"]
    assert [name for name in RULES if make(name).attention_from == "top"] == ["keep_top", "top_layer"]


@pytest.mark.parametrize("name", ["keep_low", "keep_top", "top_layer"])
def test_selecting_rules_copy_no_weights(name: str, tiny_handle: Any) -> None:
    merged = make(name).merge(tiny_handle.layout, list(tiny_handle.layers[2:5]))
    known = {p.data_ptr() for p in tiny_handle.model.parameters()}
    assert all(t.data_ptr() in known for t in merged.weights.values())


@pytest.mark.parametrize("name", RULES)
def test_layers_of_different_shapes_are_refused(name: str, tiny_handle: Any) -> None:
    layers = list(tiny_handle.layers[:2])
    layers[1].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(8, 32))
    with pytest.raises(ArchitectureError, match=r"mlp\.up_proj\.weight is \d+x32 .* 8x32 in layer 1"):
        make(name).merge(tiny_handle.layout, layers)
    layers[1].self_attn.q_proj.bias = torch.nn.Parameter(torch.zeros(32))
    with pytest.raises(ArchitectureError):
        make(name).merge(tiny_handle.layout, layers)
