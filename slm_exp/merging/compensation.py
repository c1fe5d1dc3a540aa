"""Prune&Comp's magnitude compensation: give the residual stream after a cut the size that the removed layers gave it.

Layers add to a stream that grows on its way up. Where layers are cut out, the stream that arrives above is too small,
and what the layers above add weighs too much. Source: arXiv:2507.18212, whose code multiplies everything below a cut
(embeddings, attention and MLP outputs) by alpha. Here what the layers above add is divided by alpha instead: every
layer and the final norm read the stream through an RMS norm, so the two are the same function up to the norms'
epsilon, and the embeddings stay as they are, so that a tied head is not rescaled with them. Biases of the output
projections are scaled with the weights; the released code leaves them. How alpha is found: search/compensation.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from slm_exp.models.layout import LayerLayout


def scaled_outputs(layout: LayerLayout, layer: nn.Module, weights: Mapping[str, Tensor], scale: float
                   ) -> dict[str, Tensor]:
    """The parameters through which a layer adds to the stream, multiplied; new tensors of the same dtype.

    Output projections and their biases; where a norm stands behind them, its gain.

    Args:
        weights: parameters that replace the layer's own.
    """
    own = dict(layer.named_parameters())
    out = {}
    for name, offset in layout.written(layer).items():
        t = weights.get(name, own[name])
        out[name] = (t.to(torch.promote_types(t.dtype, torch.float32)) * scale + offset * (scale - 1)).to(t.dtype)
    return out
