from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from slm_exp.core.errors import ConfigError
from slm_exp.core.registry import register
from slm_exp.core.together import DepthMethod
from slm_exp.core.widths import InputMeans, pack_floats
from slm_exp.merging.sizes import Kept, head_dim, query_scores, standardised
from slm_exp.models.base import ModelHandle
from slm_exp.width.base import WidthTask
from slm_exp.width.pruner import Choose, Extras, Pruner, Scored


@register("width", "flap")
@dataclass
class FLAP(Pruner):
    """Variance of an input channel of o or the MLP's last projection, times the squared norm of its column.

    Standardised within each layer; a head's score is the mean over its channels (whose product is squared once
    more, as released). With uniform=false all units of all layers share one threshold (FLAP's AL-AM) unless
    allocation=equal. What the removed channels were on average goes into biases, which needs a family whose config
    switches them on for every projection (Llama). Source: arXiv:2312.11983; variances here are over all tokens, not
    by the released update, which counts the new mean twice.
    Cost: one block forward per layer. The means are stored in the plan (5 bytes of base64 per removed channel).
    """

    published_allocation: ClassVar[str] = "score"
    compare: ClassVar[str] = "as_given"
    compensate: bool = True
    """Add biases for the means of what is removed."""

    @property
    def adds_biases(self) -> bool:
        return self.compensate

    def check_model(self, handle: ModelHandle, method: DepthMethod) -> None:
        for switch, projection in (("attention_bias", handle.layout.o), ("mlp_bias", handle.layout.mlp_out)):
            if self.compensate and not hasattr(handle.config, switch):
                raise ConfigError(f"width.compensate = True: {handle.layout.family} has no {switch} in its config, so "
                                  f"a bias of {projection} could not be saved. Set width.compensate=false, or use a "
                                  "Llama model.")
        super().check_model(handle, method)

    def scores(self, task: WidthTask, choose: Choose) -> Scored:
        layout, config = task.handle.layout, task.handle.config
        out, means = [], []
        for i, stats, _ in self.inputs(task, (layout.o, layout.mlp_out)):
            layer = task.handle.layers[i]
            fluctuation = {}
            for name in (layout.o, layout.mlp_out):
                columns_C = layer.get_parameter(f"{name}.weight").detach().double().square().sum(0).cpu()
                fluctuation[name] = stats[name].variance_C * columns_C
            query_H = standardised(fluctuation[layout.o].square()).view(config.num_attention_heads, -1).mean(1)
            out.append(query_scores(query_H, standardised(fluctuation[layout.mlp_out]), config))
            means.append({name: s.mean_C for name, s in stats.items()})
        return Scored(out, means=means)

    def extras(self, task: WidthTask, kept: Sequence[Kept], found: Scored) -> Extras:
        if not self.compensate or found.means is None:
            return Extras()
        layout, per = task.handle.layout, head_dim(task.handle.config)
        out = InputMeans(attention=[], mlp=[])
        for mean, units in zip(found.means, kept, strict=True):
            columns = {h * per + c for h in units.query for c in range(per)}
            for packed, name, stay in ((out.attention, layout.o, columns),
                                       (out.mlp, layout.mlp_out, {*units.channels})):
                packed.append(pack_floats([m for c, m in enumerate(mean[name].tolist()) if c not in stay]))
        return Extras(means=out)
