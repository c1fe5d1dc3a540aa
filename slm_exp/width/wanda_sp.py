from __future__ import annotations

from dataclasses import dataclass

from slm_exp.core.registry import register
from slm_exp.merging.sizes import LayerScores, query_scores
from slm_exp.width.base import WidthTask
from slm_exp.width.pruner import Choose, Pruner, Scored


@register("width", "wanda_sp")
@dataclass
class WandaSP(Pruner):
    """Mean over rows of |W_ij| times the norm of input channel j, for o and the MLP's last projection.

    A head's score is the sum over its channels. A layer's inputs are those after pruning the layers below, where
    widths do not depend on scores. Source: the structured Wanda of FLAP's code, arXiv:2312.11983 and 2306.11695.
    Cost: two block forwards per layer (one with allocation=score or sequential=false).
    """

    sequential: bool = True
    """Look at each layer's input as it is after the layers below were pruned."""

    def scores(self, task: WidthTask, choose: Choose) -> Scored:
        handle, layout, config = task.handle, task.handle.layout, task.handle.config
        out: list[LayerScores] = []
        for i, stats, replaced in self.inputs(task, (layout.o, layout.mlp_out)):
            weights = {n: handle.layers[i].get_parameter(f"{n}.weight").detach() for n in (layout.o, layout.mlp_out)}
            scores = {n: w.double().abs().mean(0).cpu() * stats[n].norm_C for n, w in weights.items()}
            query_H = scores[layout.o].view(config.num_attention_heads, -1).sum(1)
            out.append(query_scores(query_H, scores[layout.mlp_out], config))
            if self.sequential and (kept := choose(i, out[-1])) is not None:
                per = weights[layout.o].shape[1] // config.num_attention_heads
                columns = [h * per + c for h in kept.query for c in range(per)]
                for name, stay in ((layout.o, columns), (layout.mlp_out, kept.channels)):
                    pruned = weights[name].new_zeros(weights[name].shape)
                    pruned[:, stay] = weights[name][:, stay]
                    replaced[f"{name}.weight"] = pruned
        return Scored(out)
