from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from slm_exp.core.cost import Work
from slm_exp.core.registry import register
from slm_exp.models.sizes import Sizes
from slm_exp.recovery.base import RecoveryResult, RecoveryTask
from slm_exp.recovery.fitted import Fitted

if TYPE_CHECKING:
    from torch import Tensor


@register("recovery", "replace_me")
@dataclass
class ReplaceMe(Fitted):
    """A published baseline: one linear map for a cut, by least squares, folded into the MLP below it.

    With H the stream after the layer below the cut, M what that layer's MLP adds to it, and Y the dense stream after
    the cut: T = (M'M + alpha I)^-1 M'(Y + M - H), and `down_proj` writes M T in place of M. What `reconstruct` fits
    contains this: T is a D x D map of what `down_proj` writes, not a map of what it reads.
    Source: ReplaceMe, arXiv:2505.02819, its least squares. Deviations: not its cosine objective (Adam, 10 epochs),
    which ended within .1 of perplexity of it here (docs/recovery.md); of several cuts each is fitted on the dense
    model's states; a merged layer takes the place of the layer below; a layer that lost its MLP is mapped behind its
    attention; every fifth sequence is left out, on which the whole model is judged.
    Cost: one dense forward pass over the tokens, one more of every layer beside a cut, and a solution in float64 of
    D equations each. Memory: three states [N, T, D] for every cut that is open at once.
    """

    alpha: float = 0.0
    """Ridge of the map itself, in units of M'M: pulls it to zero, as published."""

    def check(self) -> None:
        super().check()
        self.at_least(0, "alpha")

    def cost(self, sizes: Sizes, layers: float) -> tuple[Work, list[str]]:
        total, cuts = self.n_samples * self.seq_len, max(1.0, sizes.n_layers - layers)
        return Work(blocks=(sizes.n_layers + cuts) * sizes.block_flops(total, self.seq_len),
                    wide=cuts * (4 * total * sizes.hidden**2 + 3 * sizes.hidden**3)), []

    def recover(self, task: RecoveryTask) -> RecoveryResult:
        from slm_exp.recovery.cut_states import mapped, solved, states_at_cuts

        tokens, layers = self.draw(task), []
        tensors: dict[str, Tensor] = {}
        for cut in states_at_cuts(task, tokens.tokens_NT):
            map_DD = solved(cut.added_MD, cut.wanted_MD + cut.added_MD - cut.after_MD, self.alpha)
            tensors |= mapped(task.handle, cut, map_DD)
            layers.append({"layer": cut.position, "original": [*cut.slot], "errors": cut.errors(map_DD)})
        return RecoveryResult(tensors, {"tokens": tokens.describe(), "digest": tokens.digest, "layers": layers})
