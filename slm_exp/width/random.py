from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from slm_exp.core.registry import register
from slm_exp.merging.sizes import full_shape, query_scores
from slm_exp.width.base import WidthTask
from slm_exp.width.pruner import Choose, Pruner, Scored

if TYPE_CHECKING:
    import torch


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

        return Scored([query_scores(draw(shape.heads), draw(shape.channels), task.handle.config) for _ in task.slots])
