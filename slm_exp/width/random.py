"""Width pruning by chance: what any score has to beat."""

from __future__ import annotations

from dataclasses import dataclass

from slm_exp.core.registry import register
from slm_exp.merging.sizes import LayerScores, full_shape
from slm_exp.width.base import WidthTask
from slm_exp.width.pruner import Choose, Pruner, Scored


@register("width", "random")
@dataclass
class Random(Pruner):
    """Uniformly random heads and channels, from the run's seed."""

    def scores(self, task: WidthTask, choose: Choose) -> Scored:
        import torch

        generator = torch.Generator().manual_seed(task.seed)
        shape = full_shape(task.handle.config)

        def draw(n: int) -> torch.Tensor:
            return torch.rand(n, generator=generator, dtype=torch.float64)

        zero_K = torch.zeros(shape.kv_heads, dtype=torch.float64)
        return Scored([LayerScores(draw(shape.heads), zero_K, draw(shape.channels)) for _ in task.slots])
