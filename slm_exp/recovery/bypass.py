from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from slm_exp.calibration.fit import check_ridges
from slm_exp.core.cost import Work
from slm_exp.core.errors import require, require_one_of
from slm_exp.core.registry import register
from slm_exp.models.base import ModelHandle
from slm_exp.models.sizes import Sizes
from slm_exp.recovery.base import RecoveryResult, RecoveryTask
from slm_exp.recovery.fitted import Fitted, require_maps
from slm_exp.recovery.reconstruct import WEIGHTS


@register("recovery", "bypass")
@dataclass
class Bypass(Fitted):
    """Every removed sublayer gets a fitted map of low rank in its place.

    The stream h becomes h + U V h/rms(h) where an attention or MLP was removed, fitted to the dense stream after it by
    reduced-rank ridge regression, from the bottom up, on the stream of the model recovered so far. Ranks follow from a
    budget in parameters: every further rank of every map is worth what it explains of what the sublayer adds to the
    dense stream, and the worthiest get it. Where a refit came before (`recovery=chain`), the layer below a cut stands
    for all of it already: the cut then has one map behind it, of the ranks of all. What is removed below the lowest
    layer has no layer to stand behind, and gets none.

    No linear layer of a stock checkpoint reads the whole stream there, so the checkpoint brings the small code that
    layers of unequal widths bring (Llama, Mistral, Qwen2 and Qwen3 alone).
    Source: SubFit, arXiv:2606.02559, by its abstract. Deviations: its bypasses of MLPs share an input basis, here each
    has its own; ranks by explained error.
    Cost: two dense passes over the tokens, a third of the layers in cuts, one of the compressed model; for every
    removed sublayer, twice, normal equations and eigenvectors of [D, D]. Memory: four states [N, T, D].
    """

    maps_stream: ClassVar[bool] = True

    budget: float = 0.05
    """Parameters of all maps together, as a share of those that the plan removed."""
    ridges: list[float] = dataclasses.field(default_factory=lambda: [1e-4, 1e-3, 1e-2, 1e-1, 1.0])
    """Ridges to choose from on the sequences held out, in units of the mean diagonal of the normal equations."""
    weighting: str = "class"
    """See recovery=reconstruct."""

    def check(self) -> None:
        super().check()
        require(0 < self.budget <= 1, "recovery.budget", self.budget, "a share > 0 and <= 1 of the removed parameters")
        check_ridges("recovery.ridges", self.ridges)
        require_one_of("recovery.weighting", self.weighting, WEIGHTS)

    def check_data(self, dense: ModelHandle) -> None:
        require_maps(self.name, dense)
        super().check_data(dense)

    def cost(self, sizes: Sizes, layers: float) -> tuple[Work, list[str]]:
        total, gone = self.n_samples * self.seq_len, max(1.0, sizes.n_layers - layers)
        return Work(blocks=(2 * sizes.n_layers + gone + layers) * sizes.block_flops(total, self.seq_len),
                    wide=4 * gone * (4 * total * sizes.hidden**2 + 20 * sizes.hidden**3)), []

    def recover(self, task: RecoveryTask) -> RecoveryResult:
        from slm_exp.recovery.bypasses import bypasses

        tokens = self.draw(task)
        tensors, maps = bypasses(task, tokens.tokens_NT, self.budget, self.ridges, self.weighting)
        return RecoveryResult(tensors, {"tokens": tokens.describe(), "digest": tokens.digest, "layers": [
            {"layer": m.position, "original": [m.layer, m.layer + 1], "kind": m.kind, "rank": m.rank, "ridge": m.ridge,
             "errors": m.errors} for m in maps]})
