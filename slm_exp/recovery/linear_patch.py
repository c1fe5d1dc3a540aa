from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from slm_exp.core.cost import Work
from slm_exp.core.registry import register
from slm_exp.engine.hadamard import hadamard
from slm_exp.models.base import ModelHandle
from slm_exp.models.sizes import Sizes
from slm_exp.recovery.base import RecoveryResult, RecoveryTask
from slm_exp.recovery.fitted import Fitted, require_maps

if TYPE_CHECKING:
    from torch import Tensor


@register("recovery", "linear_patch")
@dataclass
class LinearPatch(Fitted):
    """A published baseline: the stream after a cut rescaled, channel by channel, in a rotated basis.

    With Q an orthonormal Hadamard matrix, H the stream after the layer below the cut and Y the dense stream after the
    cut: D_k = mean |Y Q|_k / mean |H Q|_k over tokens, and the stream is multiplied by Q diag(D) Q'. A norm reads the
    stream next, so this folds into no weight: the checkpoint has a matrix behind the layer, and brings the small code
    that layers of unequal widths bring (Llama, Mistral, Qwen2 and Qwen3 alone).
    Source: LinearPatch, arXiv:2505.24680, training-free. Deviations: its cuts are one run of layers, here each of
    several cuts has a matrix, fitted on the dense model's states; a merged layer takes the place of the layer below;
    every fifth sequence is left out, on which the whole model is judged.
    Cost: one dense forward pass over the tokens, and one more of every layer beside a cut. D^2 parameters a cut.
    """

    maps_stream: ClassVar[bool] = True
    rotate: bool = True
    """False: Q = I, the paper's `diag`."""

    def check_data(self, dense: ModelHandle) -> None:
        require_maps(self.name, dense)
        super().check_data(dense)
        if self.rotate:
            hadamard(int(dense.config.hidden_size), "recovery.rotate=false")

    def cost(self, sizes: Sizes, layers: float) -> tuple[Work, list[str]]:
        total, cuts = self.n_samples * self.seq_len, max(1.0, sizes.n_layers - layers)
        return Work(blocks=(sizes.n_layers + cuts) * sizes.block_flops(total, self.seq_len),
                    wide=cuts * 4 * total * sizes.hidden**2), []

    def recover(self, task: RecoveryTask) -> RecoveryResult:
        import torch

        from slm_exp.merging.maps import map_names, ranks
        from slm_exp.recovery.cut_states import states_at_cuts

        tokens, layers = self.draw(task), []
        tensors: dict[str, Tensor] = {}
        n, before = int(task.handle.config.hidden_size), ranks(task.handle.config)
        q_DD = (torch.from_numpy(hadamard(n)) if self.rotate else torch.eye(n, dtype=torch.float64)
                ).to(task.handle.device)
        for cut in states_at_cuts(task, tokens.tokens_NT):
            y_D, h_D = ((states_MD @ q_DD).abs().mean(0) for states_MD in (cut.wanted_MD, cut.after_MD))
            map_DD = (q_DD * torch.where(h_D > 0, y_D / h_D, 1.0)) @ q_DD.T
            (name,) = map_names(task.handle.layout.layer_list, cut.position, len(before[cut.position]), 0)
            tensors[name] = map_DD.T.float().contiguous()
            layers.append({"layer": cut.position, "original": [*cut.slot], "errors": cut.stream_errors(map_DD)})
        return RecoveryResult(tensors, {"tokens": tokens.describe(), "digest": tokens.digest, "layers": layers})
