"""The similarity of every pair of layers: CKA over pre-norm block outputs, streamed layer by layer."""

from __future__ import annotations

from slm_exp.core.errors import NOT_FINITE, DataError
from slm_exp.core.types import CalibrationTokens, LayerSimilarity
from slm_exp.engine.progress import ticking
from slm_exp.kernels.base import Kernel
from slm_exp.models.base import ModelHandle
from slm_exp.similarity.base import GRAM_BYTES, Similarity
from slm_exp.similarity.cka import fingerprint, minibatches, normalised, token_rows


def layer_similarity(handle: ModelHandle, tokens: CalibrationTokens, kernel: Kernel, similarity: Similarity
                     ) -> LayerSimilarity:
    """CKA of the outputs of every pair of decoder layers, before the final norm, on the same tokens.

    Only one layer's states are held at a time, and the Gram matrices of all layers for as many minibatches as fit
    into `GRAM_BYTES`; their pairs are then one matrix product. Of `similarity` only CKA's settings are used.
    Raises DataError: fewer than 4 tokens, or a layer's states are not finite.
    Cost: L block forwards (a few times that beyond `GRAM_BYTES`); L N T b (D + L) multiplications in float64.
    """
    import torch

    from slm_exp.engine.runner import BlockRunner, Slot

    n_samples, n_tokens = tokens.tokens_NT.shape
    parts = minibatches(n_samples * (n_tokens - similarity.skip_first_token), similarity.batch)
    per_pass = max(1, GRAM_BYTES // (handle.n_layers * len(parts[0]) ** 2 * 8))
    passes = [parts[i : i + per_pass] for i in range(0, len(parts), per_pass)]
    runner = BlockRunner(handle, tokens.tokens_NT)
    hsic_LL = torch.zeros(handle.n_layers, handle.n_layers, dtype=torch.float64)
    with torch.inference_mode(), ticking("layers", len(passes) * handle.n_layers, "layer") as tick:
        for some in passes:
            h_NTD = runner.embed()
            grams_LF = torch.empty(handle.n_layers, sum(len(p) ** 2 for p in some), dtype=torch.float64,
                                   device=h_NTD.device)
            for i in range(handle.n_layers):
                h_NTD = runner.block(Slot(i), h_NTD)
                if not h_NTD.isfinite().all():
                    raise DataError(f"the output of layer {i} holds values that are not finite in {h_NTD.dtype}. "
                                    f"{NOT_FINITE}")
                rows = token_rows(h_NTD, similarity.skip_first_token)
                grams_LF[i] = fingerprint(rows, kernel, some, similarity.estimator)
                tick()
            hsic_LL += (grams_LF @ grams_LF.mT).cpu()
    return LayerSimilarity(normalised(hsic_LL).float().numpy(), kernel.name, similarity.estimator,
                           similarity.skip_first_token, similarity.batch)
