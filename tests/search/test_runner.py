"""Running a model layer by layer, fused or not, with weights replaced."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch

from slm_exp.core.errors import ArchitectureError
from slm_exp.engine import runner as runner_module
from slm_exp.engine.runner import BlockRunner, Slot

FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {"sliding_window": 5},
    "qwen3": {"sliding_window": 5},
}
needs_bf16 = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="this CPU has no bfloat16 in oneDNN",
)


def last_state(runner: BlockRunner) -> torch.Tensor:
    h_NTD = runner.embed()
    for i in range(runner.handle.n_layers):
        h_NTD = runner.block(Slot(i), h_NTD)
    return runner.finish(h_NTD)


def library_state(model: Any, tokens: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.model(torch.as_tensor(tokens.tokens_NT).long(), use_cache=False).last_hidden_state


def with_biases(handle: Any) -> Any:
    """Zero-initialised biases and unit gains would hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    for name, p in handle.model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return handle


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_one_by_one_are_the_model(family: str, fuse: bool, make_tiny: Any, tokens: Any) -> None:
    handle = with_biases(make_tiny(family, **FAMILIES[family]))
    runner = BlockRunner(handle, tokens.tokens_NT, fuse=fuse)
    torch.testing.assert_close(last_state(runner), library_state(handle.model, tokens), atol=2e-5, rtol=1e-4)
    assert runner.forwards == handle.n_layers
    if torch.backends.mkldnn.is_available():
        assert runner.fused == [fuse] * handle.n_layers


@pytest.mark.parametrize("fuse", [False, True])
def test_small_batches_change_nothing(fuse: bool, tiny_handle: Any, tokens: Any) -> None:
    runner = BlockRunner(tiny_handle, tokens.tokens_NT, fuse=fuse)
    whole = last_state(runner)
    runner.rows = 3
    torch.testing.assert_close(last_state(runner), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_replaced_weights_act_as_if_the_layer_had_them(family: str, fuse: bool, make_tiny: Any, tokens: Any) -> None:
    handle = with_biases(make_tiny(family, **FAMILIES[family]))
    new = {name: p + 0.01 for name, p in handle.layers[5].named_parameters()}
    runner = BlockRunner(handle, tokens.tokens_NT, fuse=fuse)
    h_NTD = runner.embed()
    out = runner.block(Slot(4, new), h_NTD)
    changed = copy.deepcopy(handle.model)
    changed.model.layers[4].load_state_dict(new)
    other = copy.copy(handle)
    other.__dict__["model"] = changed
    torch.testing.assert_close(out, BlockRunner(other, tokens.tokens_NT, fuse=False).block(Slot(4), h_NTD))


def test_a_replaced_parameter_must_exist(tiny_handle: Any, tokens: Any) -> None:
    runner = BlockRunner(tiny_handle, tokens.tokens_NT)
    with pytest.raises(ArchitectureError, match=r"layer 2 has no parameter mlp\.q"):
        runner.block(Slot(2, {"mlp.q": torch.zeros(1)}), runner.embed())


@needs_bf16
@pytest.mark.parametrize("fuse", [False, True])
def test_bfloat16_is_near_and_leaves_the_weights_alone(fuse: bool, tiny_handle: Any, tokens: Any) -> None:
    before = {name: p.clone() for name, p in tiny_handle.model.state_dict().items()}
    runner = BlockRunner(tiny_handle, tokens.tokens_NT, torch.bfloat16, fuse=fuse)
    out = last_state(runner).float()
    exact = library_state(tiny_handle.model, tokens)
    assert 1e-7 < (out - exact).norm() / exact.norm() < 2e-2
    assert all(torch.equal(before[name], p) for name, p in tiny_handle.model.state_dict().items())


@needs_bf16
def test_the_fused_block_adds_up_in_the_dtype_of_the_states(tiny_handle: Any, tokens: Any) -> None:
    runner = BlockRunner(tiny_handle, tokens.tokens_NT, torch.bfloat16)
    h_NTD = BlockRunner(tiny_handle, tokens.tokens_NT).embed()
    assert runner.block(Slot(0), h_NTD).dtype == torch.float32


def test_a_fused_block_that_deviates_is_not_used(
    tiny_handle: Any, tokens: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = runner_module.fused_layer
    monkeypatch.setattr(runner_module, "fused_layer", lambda *a: real(*a) * 1.001)
    monkeypatch.setattr(runner_module, "supported", lambda *a: True)
    runner = BlockRunner(tiny_handle, tokens.tokens_NT)
    with caplog.at_level(logging.WARNING):
        out = last_state(runner)
    assert runner.fused == [False] * 8
    assert "layer 3: the fused block differs" in caplog.text
    torch.testing.assert_close(out, library_state(tiny_handle.model, tokens), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("change", ["hook", "activation", "wrapped", "eager"])
def test_layers_that_are_not_understood_run_as_they_are(change: str, tiny_handle: Any, tokens: Any) -> None:
    model = tiny_handle.model
    if change == "hook":
        model.model.layers[1].mlp.register_forward_hook(lambda module, args, out: out * 2)
    elif change == "activation":
        model.config.hidden_act = "gelu"
        model.model.layers[1].mlp.act_fn = torch.nn.GELU()
    elif change == "wrapped":
        model.model.layers[1].mlp.down_proj.register_parameter("scale", torch.nn.Parameter(torch.ones(1)))
    else:
        model.set_attn_implementation("eager")
    runner = BlockRunner(tiny_handle, tokens.tokens_NT)
    torch.testing.assert_close(last_state(runner), library_state(model, tokens), atol=1e-5, rtol=1e-4)
    assert runner.fused[1] is False


def test_accelerate_hooks_stay_and_are_obeyed(tiny_handle: Any, tokens: Any) -> None:
    """`device_map=auto` hangs hooks on every layer: forwards replaced on the instance."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    exact = library_state(tiny_handle.model, tokens)
    for layer in tiny_handle.layers:
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu"))
    hooked = [layer.forward for layer in tiny_handle.layers]
    runner = BlockRunner(tiny_handle, tokens.tokens_NT)
    torch.testing.assert_close(last_state(runner), exact, atol=1e-6, rtol=1e-5)
    assert [layer.forward for layer in tiny_handle.layers] == hooked


def test_the_model_is_whole_after_a_failing_forward(tiny_handle: Any, tokens: Any) -> None:
    bad = tokens.tokens_NT.copy()
    bad[0, 0] = 10**6  # no such token: the embedding raises while the layers' forwards are replaced
    with pytest.raises(IndexError):
        BlockRunner(tiny_handle, bad)
    assert all("forward" not in layer.__dict__ for layer in tiny_handle.layers)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_on_cuda(family: str, make_tiny: Any, tokens: Any) -> None:
    handle = make_tiny(family, **FAMILIES[family])
    exact = last_state(BlockRunner(handle, tokens.tokens_NT))
    handle.model.cuda()
    out = last_state(BlockRunner(handle, tokens.tokens_NT))
    assert out.is_cuda
    torch.testing.assert_close(out.cpu(), exact, atol=1e-4, rtol=1e-3)
