"""What a method is given to decide on."""

from __future__ import annotations

from dataclasses import dataclass, replace

from slm_exp.core.cache.store import StageStore
from slm_exp.core.types import CalibrationTokens, LayerSimilarity
from slm_exp.kernels.base import Kernel
from slm_exp.merging.rules.base import MergeRule
from slm_exp.models.base import ModelHandle
from slm_exp.similarity.base import Similarity


@dataclass(frozen=True)
class PlanTask:
    """Everything a method may look at."""

    handle: ModelHandle
    tokens: CalibrationTokens
    similarity: Similarity
    kernel: Kernel
    rule: MergeRule
    layer_similarity: LayerSimilarity | None
    store: StageStore
    seed: int = 0

    def on(self, handle: ModelHandle, with_matrix: bool) -> PlanTask:
        """The task for the model to be cut, which is not the dense one where width comes before depth.

        Args:
            with_matrix: whether the layer similarity matrix is asked for: a narrower model has its own.
        Cost: that of the matrix.
        """
        from slm_exp.similarity.layers import layer_similarity

        if handle is self.handle:
            return self
        alike = layer_similarity(handle, self.tokens, self.kernel, self.similarity) if with_matrix else None
        return replace(self, handle=handle, layer_similarity=alike)
