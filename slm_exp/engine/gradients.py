"""Gradients of the calibration loss, one decoder layer at a time: no layer's activations outlive it.

The states entering every layer come from a pass without gradients; going down, each layer runs again on them with
gradients and hands the gradient of its input to the layer below. The model's own parameters are never touched:
float32 copies of one layer's take their place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slm_exp.core.errors import DataError
from slm_exp.engine.runner import BlockRunner
from slm_exp.models.base import ModelHandle


class Gradient(NamedTuple):
    """A parameter, the gradient of the mean next-token loss, and the mean over samples of each sample's squared
    gradient where it is asked for, else zeros. float32, only good until the next layer is requested."""

    weight: Tensor
    first: Tensor
    square: Tensor


def layer_gradients(
    runner: BlockRunner, states: list[Tensor], squares: bool = False
) -> Iterator[tuple[int, dict[str, Gradient]]]:
    """From the top layer down, (layer, gradients by name inside it).

    Args:
        runner: of the model; its tokens are inputs and targets.
        states: entering layers 0..L-1, then the last layer's output: L + 1 of [N, T, D].
    Raises:
        DataError: the loss is not finite.
    Cost: a forward and a backward pass of every layer and of the head; memory for one layer's parameters in float32
        three times over (four with `squares`), one sample's activations of it, and [N, T, D].
    """
    upstream = _last_state_gradient(runner, states[-1])
    for i in range(len(states) - 2, -1, -1):
        layer = runner.handle.layers[i]
        device = next(layer.parameters()).device
        weights = {n: p.detach().float().clone().requires_grad_() for n, p in layer.named_parameters()}
        call = ordinary(runner.call(i, torch.float32))
        found = {n: Gradient(w.detach(), torch.zeros_like(w), torch.zeros_like(w) if squares else torch.zeros(()))
                 for n, w in weights.items()}
        for row in range(len(upstream)):
            x_1TD = ordinary(states[i][row : row + 1].to(device, torch.float32)).requires_grad_()
            with torch.enable_grad():
                out = torch.func.functional_call(layer, weights, (x_1TD,), call)
                out = out[0] if isinstance(out, tuple) else out
            out.backward(upstream[row : row + 1].to(device))
            assert x_1TD.grad is not None
            upstream[row] = x_1TD.grad[0]
            for name, w in weights.items():
                if w.grad is None:  # an expert that no token was sent to
                    continue
                found[name].first.add_(w.grad)
                if squares:  # of a sample's own loss, of which 1/N is in the mean
                    found[name].square.addcmul_(w.grad, w.grad, value=len(upstream))
                w.grad = None
        yield i, found


def model_gradients(handle: ModelHandle, tokens_NT: Any, squares: bool) -> Iterator[tuple[int, dict[str, Gradient]]]:
    """`layer_gradients` of a model on some tokens, after a float32 pass over them whose states are kept."""
    runner = BlockRunner(handle, tokens_NT, torch.float32)
    return layer_gradients(runner, runner.states(), squares)


def _last_state_gradient(runner: BlockRunner, last_NTD: Tensor) -> Tensor:
    """Gradient of the mean loss with respect to the last layer's output: [N, T, D] float32."""
    norm = runner.model.get_submodule(runner.handle.layout.final_norm)
    head: Any = runner.model.get_output_embeddings()
    of_norm, of_head = ({n: ordinary(p.detach().float()) for n, p in m.named_parameters()} for m in (norm, head))
    device = head.weight.device
    n_targets = runner.tokens_NT[:, 1:].numel()
    out = torch.empty(last_NTD.shape, dtype=torch.float32, device=device)
    for row, targets_T in enumerate(runner.tokens_NT[:, 1:]):
        x_TD = ordinary(last_NTD[row].to(device, torch.float32)).requires_grad_()
        with torch.enable_grad():
            logits_TV = torch.func.functional_call(head, of_head, torch.func.functional_call(norm, of_norm, x_TD[:-1]))
            logits_TV = runner.handle.layout.logits(runner.handle.config, logits_TV)
            loss = torch.nn.functional.cross_entropy(logits_TV, targets_T.to(device), reduction="sum") / n_targets
        if not loss.isfinite():
            raise DataError(f"the loss of calibration sample {row} is not finite; there is no gradient. "
                            "The weights or the states of this model are damaged.")
        loss.backward()
        assert x_TD.grad is not None
        out[row] = x_TD.grad
    return out


def ordinary(value: Any) -> Any:
    """Copies of tensors made in inference mode, which autograd refuses; containers keep their kind."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {k: ordinary(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(ordinary(v) for v in value)
    return value
