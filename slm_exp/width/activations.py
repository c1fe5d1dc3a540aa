"""Width pruning by what flows into projections over the calibration set: FLAP, Wanda-sp, Minitron."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from slm_exp.core.errors import ConfigError, require
from slm_exp.core.registry import register
from slm_exp.core.together import DepthMethod
from slm_exp.core.widths import InputMeans, pack_floats, pack_indices
from slm_exp.merging.sizes import Kept, LayerScores, head_dim, query_scores, standardised, top
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
        for i, stats in self.inputs(task, (layout.o, layout.mlp_out)):
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
                packed.append(pack_floats([float(m) for c, m in enumerate(mean[name]) if c not in stay]))
        return Extras(means=out)


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
        steps = self.inputs(task, (layout.o, layout.mlp_out))
        step = next(steps, None)
        while step is not None:
            i, stats = step
            weights = {n: handle.layers[i].get_parameter(f"{n}.weight").detach() for n in (layout.o, layout.mlp_out)}
            scores = {n: w.double().abs().mean(0).cpu() * stats[n].norm_C for n, w in weights.items()}
            query_H = scores[layout.o].view(config.num_attention_heads, -1).sum(1)
            out.append(query_scores(query_H, scores[layout.mlp_out], config))
            kept = choose(i, out[-1]) if self.sequential else None
            replaced = None
            if kept is not None:
                per = weights[layout.o].shape[1] // config.num_attention_heads
                columns = [h * per + c for h in kept.query for c in range(per)]
                replaced = {}
                for name, stay in ((layout.o, columns), (layout.mlp_out, kept.channels)):
                    pruned = weights[name].new_zeros(weights[name].shape)
                    pruned[:, stay] = weights[name][:, stay]
                    replaced[f"{name}.weight"] = pruned
            try:
                step = steps.send(replaced)
            except StopIteration:
                step = None
        return Scored(out)


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
            require(self.hidden_size >= 8, "width.hidden_size", self.hidden_size, "a whole number >= 8")
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
        for _, stats in self.inputs(task, (layout.q, layout.mlp_in[0], layout.o, layout.mlp_out)):
            query_H = stats[layout.o].mean_abs_square_C.view(config.num_attention_heads, -1).sum(1).sqrt()
            out.append(query_scores(query_H, stats[layout.mlp_out].mean_abs_square_C.sqrt(), config))
            norms += [stats[name].mean_abs_square_C.sqrt() for name in (layout.q, layout.mlp_in[0])]
        return Scored(out, hidden_D=sum(norms[1:], norms[0]))

    def extras(self, task: WidthTask, kept: Sequence[Kept], found: Scored) -> Extras:
        if self.hidden_size is None or found.hidden_D is None:
            return Extras()
        return Extras(hidden=pack_indices(top(found.hidden_D, self.hidden_size), len(found.hidden_D)))
