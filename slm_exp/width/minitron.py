from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slm_exp.core.errors import require
from slm_exp.core.registry import register
from slm_exp.core.together import DepthMethod
from slm_exp.core.widths import pack_indices
from slm_exp.merging.sizes import Kept, query_scores, top
from slm_exp.models.base import ModelHandle
from slm_exp.width.base import WidthTask
from slm_exp.width.pruner import Choose, Extras, Pruner, Scored


@register("width", "minitron")
@dataclass
class Minitron(Pruner):
    """Mean over tokens of |activation|, then L2 over samples: inputs of o (L2 within a head) and of the MLP's last
    projection; for the hidden size, outputs of the layers' norms, summed over all norms.

    Heads are ranked inside each key-value group, and as many stay in every group. Source: arXiv:2407.14679 and
    NVIDIA's mcore_minitron.py. Cost: one block forward per layer.
    """

    heads: str = "within_groups"
    hidden_size: int | None = None
    """Also narrow the residual stream to this (embeddings and norms too); heads and channels then make up the rest
    of `ratio`."""

    def check(self) -> None:
        super().check()
        if self.hidden_size is not None:
            self.at_least(8, "hidden_size")
            require(self.uniform, "width.hidden_size", self.hidden_size, "null with width.uniform=false")

    def check_model(self, handle: ModelHandle, method: DepthMethod) -> None:
        if self.hidden_size is not None:
            require(self.hidden_size < handle.config.hidden_size, "width.hidden_size", self.hidden_size,
                    f"less than {handle.name}'s {handle.config.hidden_size}")
        super().check_model(handle, method)

    @property
    def new_hidden_size(self) -> int | None:
        return self.hidden_size

    def scores(self, task: WidthTask, choose: Choose) -> Scored:
        layout, config = task.handle.layout, task.handle.config
        out, norms = [], []
        # what q and the first MLP projection take in is what the layer's two norms give
        for _, stats, _ in self.inputs(task, (layout.q, layout.mlp_in[0], layout.o, layout.mlp_out)):
            query_H = stats[layout.o].mean_abs_square_C.view(config.num_attention_heads, -1).sum(1).sqrt()
            out.append(query_scores(query_H, stats[layout.mlp_out].mean_abs_square_C.sqrt(), config))
            norms += [stats[name].mean_abs_square_C.sqrt() for name in (layout.q, layout.mlp_in[0])]
        return Scored(out, hidden_D=sum(norms[1:], norms[0]))

    def extras(self, task: WidthTask, kept: Sequence[Kept], found: Scored) -> Extras:
        if self.hidden_size is None or found.hidden_D is None:
            return Extras()
        return Extras(hidden=pack_indices(top(found.hidden_D, self.hidden_size), len(found.hidden_D)))
