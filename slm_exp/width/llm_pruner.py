from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from slm_exp.core.errors import ConfigError, require_one_of
from slm_exp.core.registry import register
from slm_exp.core.together import DepthMethod
from slm_exp.core.types import CalibrationTokens
from slm_exp.engine.progress import ticking
from slm_exp.models.base import ModelHandle
from slm_exp.width.base import WidthTask
from slm_exp.width.pruner import Choose, Pruner, Scored

if TYPE_CHECKING:
    from torch import Tensor
from slm_exp.width.magnitude import coupled_sums

SALIENCE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "param_first": lambda w, g, h: (w * g).abs(),
    "param_second": lambda w, g, h: (w * w * h).abs(),
    "param_mix": lambda w, g, h: (w * g - 0.5 * w * w * h).abs(),
    "vectorize": lambda w, g, h: w * g,
}

Gradients = dict[tuple[int, str], "Tensor"]

FIRST, LAST = 4, 2
"""Layers at the bottom and the top that the published runs leave as they are."""


@register("width", "llm_pruner")
@dataclass
class LLMPruner(Pruner):
    """First- or second-order estimate of the loss change, summed over a unit's rows and columns.

    With w a weight, g the gradient of the mean loss and h the mean over samples of squared gradients:
    param_first sums |w g|, param_second |w^2 h|, param_mix |w g - w^2 h / 2| over elements; vectorize sums w g with
    signs along each row or column and takes absolute values of those sums. With uniform=false the first 4 and last
    2 layers are left as they are unless `layers` says otherwise. Source: arXiv:2305.11627 and its released code.

    Cost: a forward and a backward pass per sample, streamed; memory for one float32 gradient of every projection
    (two for param_second and param_mix). Float32 whatever the model's dtype.
    """

    compare: ClassVar[str] = "per_parameter"
    passes: ClassVar[int] = 6
    taylor: str = "param_mix"
    """param_first, param_second, param_mix or vectorize."""

    def check(self) -> None:
        super().check()
        require_one_of("width.taylor", self.taylor, SALIENCE)

    def check_model(self, handle: ModelHandle, method: DepthMethod) -> None:
        if getattr(handle.config, "quantization_config", None) is not None:
            raise ConfigError(f"width=llm_pruner needs gradients, and {handle.name} is quantised. Take the original "
                              "checkpoint, or width=magnitude, wanda_sp or flap.")
        super().check_model(handle, method)

    def protected_range(self, n_layers: int) -> tuple[int, int]:
        return (FIRST, n_layers - LAST) if n_layers > FIRST + LAST else (0, n_layers)

    def scores(self, task: WidthTask, choose: Choose) -> Scored:
        layout, out = task.handle.layout, []
        first, squares = gradients(task.handle, task.tokens, second=self.taylor in ("param_second", "param_mix"))
        for i, layer in enumerate(task.handle.layers):
            salience = {}
            for name in layout.projections:
                w = layer.get_parameter(f"{name}.weight").detach().float()
                g = first.pop((i, name))
                salience[name] = SALIENCE[self.taylor](w, g, squares.pop((i, name), g))
            out.append(coupled_sums(salience, layout, task.handle.config, signed_rows=self.taylor == "vectorize"))
        return Scored(out)


def gradients(handle: ModelHandle, tokens: CalibrationTokens, second: bool) -> tuple[Gradients, Gradients]:
    """Gradient of the mean next-token loss, and mean over samples of each sample's squared gradient. Both float32, by
    (layer, projection); the latter empty unless `second`. Samples pass one at a time. The model's own parameters never
    require gradients and hold none afterwards."""
    import torch
    from torch.nn.functional import cross_entropy

    model, layout = handle.model, handle.layout
    ids_NT = torch.as_tensor(tokens.tokens_NT).long()
    device = model.get_input_embeddings().weight.device
    names = {(i, name): f"{layout.layer_list}.{i}.{name}.weight"
             for i in range(handle.n_layers) for name in layout.projections}
    with torch.enable_grad(), ticking("gradients", len(ids_NT), "sample") as tick:
        # float32 stand-ins for the parameters: the very tensors where the model is float32 already
        weights = {name: p.detach().float() for name, p in model.named_parameters()}
        wanted = {key: weights[name].detach().requires_grad_() for key, name in names.items()}
        weights |= {names[key]: w for key, w in wanted.items()}
        first: Gradients = {}
        squares: Gradients = {}
        for ids_T in ids_NT:
            call = {"input_ids": ids_T[None].to(device), "use_cache": False}
            logits_TV = torch.func.functional_call(model, weights, (), call).logits[0, :-1].float()
            loss = cross_entropy(logits_TV, ids_T[1:].to(logits_TV.device)) / len(ids_NT)
            found = torch.autograd.grad(loss, list(wanted.values()))
            for key, g in zip(wanted, found, strict=True):
                first[key] = first[key].add_(g) if key in first else g
                if second:
                    square = g.square() * len(ids_NT)  # g is 1/N of this sample's gradient
                    squares[key] = squares[key].add_(square) if key in squares else square
            tick(f"loss {float(loss.detach()) * len(ids_NT):.4f}")
    return first, squares
