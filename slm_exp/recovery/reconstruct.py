"""`recovery=reconstruct`: the layer beside every cut takes over, by regression, what the cut took away."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from slm_exp.calibration.fit import check_ridges
from slm_exp.core.cost import Work, normal_equations
from slm_exp.core.errors import require, require_one_of
from slm_exp.core.registry import Fields, register
from slm_exp.engine.batches import Row
from slm_exp.models.sizes import Sizes
from slm_exp.recovery.base import Recovery, RecoveryResult, RecoveryTask
from slm_exp.recovery.fitted import Fitted

LAYERS = ("cuts", "all", "sublayers")
WEIGHTS = ("class", "relative", "equal")
DTYPES = ("float32", "bfloat16")


@register("recovery", "reconstruct")
@dataclass
class Reconstruct(Fitted):
    """Refit output projections so that the residual stream after each cut is the dense model's again. No training.

    Beside a cut means: the merged layer itself, the layer just below removed layers (the one just above, where the
    lowest layers are removed), the layer that lost a sublayer, and every layer of a model pruned in width. From the
    bottom up, on the stream of the model refitted so far, the layer's `down_proj` and `o_proj` get the change that
    brings the stream after it nearest to the dense model's after the window, by ridge regression. What `o_proj` adds is
    taken as passing the layer's MLP by; a change that makes the error on held-out sequences larger is taken back.
    Where a norm stands behind a projection, its gain is fitted too, after it (see `engine.ridge.moments`).
    How tokens are weighted matters (`engine.ridge.token_weights`): the few of huge norm must not dominate the fit, nor
    be forgotten by it.
    Cost: two passes over the calibration tokens (dense and compressed), 2 x passes + 1 more of every refitted layer,
    and its normal equations. Memory: two states [N, T, D] in temporary files, and 8 C^2 bytes for C MLP channels, as
    much again where more than C tokens are held out.
    """

    through_norms: ClassVar[bool] = True
    streams: ClassVar[bool] = True
    file_passes: ClassVar[int] = 10
    """Two of the fit, and four of either model to judge the result."""

    layers: str = "cuts"
    """cuts: the layer beside every cut. all: every layer from the first of these up. sublayers: likewise, and each
    attention and MLP once, to the dense stream where the next one that is left begins; on all tokens, once the ridge is
    chosen."""
    attention: bool = True
    """Refit o_proj too."""
    passes: int | None = None
    """How often each layer's projections are refitted, in turn; null is 2. With layers=sublayers once."""
    ridges: list[float] = dataclasses.field(default_factory=lambda: [1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0])
    """Ridges to choose from, in units of the mean diagonal of the normal equations."""
    weighting: str = "class"
    """relative: each token's error counts relative to its norm, as the next layer's norm sees it. class: likewise, and
    tokens of outlying norm together count as much as all others. equal: as it is."""
    passes_in: str = "float32"
    """Layers run over the tokens of the fit in it; states and sums stay float32 and float64. bfloat16 is several times
    as fast where the device has instructions for it."""

    def check(self) -> None:
        super().check()
        self.at_least(1, "passes")
        require(self.layers != "sublayers" or self.passes in (None, 1), "recovery.passes", self.passes,
                "null or 1 with recovery.layers=sublayers")
        check_ridges("recovery.ridges", self.ridges)
        require_one_of("recovery.layers", self.layers, LAYERS)
        require_one_of("recovery.weighting", self.weighting, WEIGHTS)
        require_one_of("recovery.passes_in", self.passes_in, DTYPES)

    def identity(self) -> Fields:
        return {**super().identity(), "passes": self.rounds}

    @property
    def rounds(self) -> int:
        """How often each projection is refitted."""
        return 1 if self.layers == "sublayers" else self.passes or 2

    def judged_on(self, task: RecoveryTask) -> list[Row]:
        if self.layers == "sublayers":  # whose last fit is on all of its tokens
            return Recovery.judged_on(self, task)
        return super().judged_on(task)

    def cost(self, sizes: Sizes, layers: float) -> tuple[Work, list[str]]:
        total = self.n_samples * self.seq_len
        cuts = max(1.0, sizes.n_layers - layers) if self.layers == "cuts" else layers
        refits = cuts * self.rounds * (2 if self.attention else 1)
        blocks = sizes.n_layers + layers + cuts * (2 * self.rounds + 1)
        return Work(blocks=blocks * sizes.block_flops(total, self.seq_len),
                    wide=refits * (2 * total * sizes.mlp**2 + 20 * sizes.mlp**3)), []

    def memory(self, sizes: Sizes, width: float) -> float:
        """The regression of the widest projection, a layer in float32, and the float32 projections: of a quarter of the
        layers where only those beside cuts are refitted, since how many these are, a plan says."""
        refitted = sizes.n_layers * (0.25 if self.layers == "cuts" else 1)
        made = 4 * sizes.hidden * (sizes.mlp + sizes.query * self.attention)
        fitted = normal_equations(sizes.mlp, sizes.hidden, self.n_samples * self.seq_len / 5)
        return fitted + 4 * sizes.layer + refitted * made

    def recover(self, task: RecoveryTask) -> RecoveryResult:
        from slm_exp.recovery.refit import refit

        tokens = self.draw(task)
        tensors, steps = refit(task, tokens, self)
        return RecoveryResult(tensors, {"tokens": tokens.describe(), "digest": tokens.digest,
                                        "layers": [step._asdict() for step in steps]})
