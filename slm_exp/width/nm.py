from __future__ import annotations

from dataclasses import dataclass

from slm_exp.core.cost import Tokens, Work
from slm_exp.core.errors import ConfigError, require
from slm_exp.core.registry import register
from slm_exp.core.together import DepthMethod
from slm_exp.core.widths import KeptUnits, NMask, WidthDecision, WidthSizes, pack_floats, pack_indices
from slm_exp.models.base import ModelHandle
from slm_exp.models.sizes import Sizes
from slm_exp.width.base import Width, WidthTask


@register("width", "nm")
@dataclass
class NM(Width):
    """N of M weights stay in every group of inputs (2:4 and others), by |w| x norm of the input. Nothing gets smaller.

    In every row of every projection of the decoder layers, of every `m` neighbouring inputs the `n` of highest score
    stay and the others become zero. A layer's inputs are those after masking the layers below it. The checkpoint is
    dense, with zeros: of the same size and speed in plain transformers; `params.zeroed` is what an engine with kernels
    for such patterns could leave out. `recovery=full` and `distill` keep the pattern (`recovery.masked`), the others
    fill it again. Source: Wanda, arXiv:2306.11695, its N:M form; float64 scores, the first of equal ones stays.
    Cost: two block forwards per layer (one with sequential=false), then the masked model's score.
    """

    n: int = 2
    """Weights that stay of every `m`."""
    m: int = 4
    sequential: bool = True
    """Look at each layer's input as it is after the layers below were masked."""

    def check(self) -> None:
        require(self.order == "after", "width.order", self.order, "after: what is merged later would fill the masks")
        self.at_least(2, "m")
        require(1 <= self.n < self.m, "width.n", self.n, f"1 to {self.m - 1}, fewer than width.m = {self.m}")

    def check_model(self, handle: ModelHandle, method: DepthMethod) -> None:
        layout, config = handle.layout, handle.config
        if layout.experts or layout.transposed:
            why = "have routed experts" if layout.experts else "store their projections the other way round"
            raise ConfigError(f"width={self.name}: {layout.family} layers {why}, which are not masked. Take "
                              "width=none.")
        if getattr(config, "layer_widths", None):
            raise ConfigError(f"width={self.name}: {handle.name} has layers of different widths.")
        sizes = handle.sizes
        for what, size in (("hidden size", sizes.hidden), ("attention width", sizes.query), ("MLP width", sizes.mlp)):
            require(size % self.m == 0, "width.m", self.m, f"a divisor of {handle.name}'s {what}, {size}")

    def cost(self, sizes: Sizes, layers: float, tokens: Tokens) -> Work:
        passes = (2 if self.sequential else 1) * layers + layers + sizes.n_layers
        return Work(blocks=passes * sizes.block_flops(tokens.total, tokens.t))

    def decide(self, task: WidthTask) -> WidthDecision:
        from slm_exp.merging.nm import inputs_of, masked
        from slm_exp.width.inputs import walk

        handle, layout, config = task.handle, task.handle.layout, task.handle.config
        norms: list[dict[str, str]] = []
        for i, stats, replaced in walk(handle, task.tokens, tuple(inputs_of(layout))):
            norms.append({name: pack_floats(s.norm_C.tolist()) for name, s in stats.items()})
            if self.sequential:
                replaced |= masked(layout, handle.layers[i], NMask(n=self.n, m=self.m, norms=norms), i)
        n, heads, kv = handle.n_layers, config.num_attention_heads, getattr(config, "num_key_value_heads", None)
        kv, wide = kv or heads, handle.sizes.mlp
        return WidthDecision(
            method=self.name, ratio=None, order="after", uniform=True, reached=0.0, tokens=task.tokens.digest,
            sizes=WidthSizes(heads=[heads] * n, kv_heads=[kv] * n, channels=[wide] * n, hidden=handle.sizes.hidden),
            kept=KeptUnits(query_heads=[[*range(heads)]] * n, kv_heads=[[*range(kv)]] * n,
                           channels=[pack_indices(range(wide), wide)] * n),
            mask=NMask(n=self.n, m=self.m, norms=norms), notes=[
                f"width: {self.n}:{self.m} masks: {1 - self.n / self.m:.0%} of the decoder layers' projection weights "
                "are zero. The checkpoint is dense, of the same size, and as fast as before in plain transformers; "
                "what kernels for such patterns would save was not measured."])
