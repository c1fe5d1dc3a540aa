from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from slm_exp.core.errors import require
from slm_exp.core.registry import register
from slm_exp.merging.sizes import LayerScores
from slm_exp.models.layout import LayerLayout
from slm_exp.width.base import WidthTask
from slm_exp.width.pruner import Choose, Pruner, Scored

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig


@register("width", "magnitude")
@dataclass
class Magnitude(Pruner):
    """Sum of |w| (norm 1) or of w squared (norm 2) over all rows and columns that go with a unit.

    As LLM-Pruner's magnitude criterion (arXiv:2305.11627). Needs no tokens. Cost: one pass over the weights.
    """

    compare: ClassVar[str] = "per_parameter"
    norm: int = 1
    """1 or 2."""

    def check(self) -> None:
        super().check()
        require(self.norm in (1, 2), "width.norm", self.norm, "1 or 2")

    def scores(self, task: WidthTask, choose: Choose) -> Scored:
        layout = task.handle.layout
        out = []
        for layer in task.handle.layers:
            weights = {name: layer.get_parameter(f"{name}.weight").detach() for name in layout.projections}
            salience = {name: w.double().abs() ** self.norm for name, w in weights.items()}
            out.append(coupled_sums(salience, layout, task.handle.config))
        return Scored(out)


def coupled_sums(salience: Mapping[str, Tensor], layout: LayerLayout, config: PretrainedConfig,
                 signed_rows: bool = False) -> LayerScores:
    """Sum elements' salience over the rows (q, k, v, MLP in) and columns (o, MLP out) that go with each unit.

    Args:
        salience: by projection, in the shape of its weight ([out, in]).
        signed_rows: sum a row or column with signs, and take absolute values of those sums only.
    """

    def line_sums(name: str, dim: int) -> Tensor:
        sums = salience[name].sum(dim)
        return sums.abs() if signed_rows else sums

    query_H = (line_sums(layout.q, 1) + line_sums(layout.o, 0)).view(config.num_attention_heads, -1).sum(1)
    kv_K = (line_sums(layout.k, 1) + line_sums(layout.v, 1)).view(config.num_key_value_heads, -1).sum(1)
    channel_F = line_sums(layout.mlp_out, 0)
    for name in layout.mlp_in:
        channel_F = channel_F + line_sums(name, 1)
    return LayerScores(query_H.double().cpu(), kv_K.double().cpu(), channel_F.double().cpu())
