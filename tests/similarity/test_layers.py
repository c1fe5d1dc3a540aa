"""The layer similarity matrix against plain forward passes with hooks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slm_exp.core.errors import DataError
from slm_exp.core.types import CalibrationTokens
from slm_exp.kernels.linear import Linear
from slm_exp.kernels.rbf import RBF
from slm_exp.similarity import layers
from slm_exp.similarity.cka import CKA, cka
from slm_exp.similarity.flat_cosine import FlatCosine
from slm_exp.similarity.layers import layer_similarity


def hooked(handle, tokens) -> list[torch.Tensor]:
    """Outputs of all layers of an ordinary forward pass, before the final norm."""
    out: list[torch.Tensor] = []
    hooks = [m.register_forward_hook(lambda _m, _i, o: out.append(o[0] if isinstance(o, tuple) else o))
             for m in handle.layers]
    with torch.inference_mode():
        handle.model(torch.as_tensor(tokens.tokens_NT).long(), use_cache=False)
    for hook in hooks:
        hook.remove()
    return out


@pytest.mark.parametrize(
    ("kernel", "similarity", "skip"),
    [
        (Linear(), FlatCosine(batch=32), 1),
        (RBF(), CKA(batch=50, estimator="biased"), 1),
        (Linear(), FlatCosine(skip_first_token=False), 0),
    ],
)
def test_every_pair_is_the_cka_of_block_outputs(tiny_handle, tokens, kernel, similarity, skip):
    alike = layer_similarity(tiny_handle, tokens, kernel, similarity)
    rows = [h[:, skip:].flatten(0, 1) for h in hooked(tiny_handle, tokens)]
    for i, j in ((0, 1), (2, 5), (7, 3)):
        wanted = cka(rows[i], rows[j], kernel, similarity.estimator, similarity.batch)
        assert alike.matrix_LL[i, j] == pytest.approx(wanted, abs=1e-5)
    assert alike.matrix_LL.dtype == np.float32
    assert (alike.matrix_LL == alike.matrix_LL.T).all()
    assert (np.diag(alike.matrix_LL) == 1).all()
    assert alike.matrix_LL[0, -1] < alike.matrix_LL[0, 1] < 1
    assert (alike.kernel, alike.estimator, alike.batch) == (kernel.name, similarity.estimator, similarity.batch)
    assert alike.skip_first_token == bool(skip)


def test_several_passes_over_the_model_give_the_matrix_of_one(tiny_handle, tokens, monkeypatch):
    one = layer_similarity(tiny_handle, tokens, Linear(), FlatCosine(batch=20))
    monkeypatch.setattr(layers, "GRAM_BYTES", 8 * 20 * 20 * tiny_handle.n_layers * 2)  # two minibatches a pass
    several = layer_similarity(tiny_handle, tokens, Linear(), FlatCosine(batch=20))
    np.testing.assert_allclose(several.matrix_LL, one.matrix_LL, atol=1e-6)


def test_weights_are_untouched(tiny_handle, tokens):
    before = {name: t.clone() for name, t in tiny_handle.model.state_dict().items()}
    layer_similarity(tiny_handle, tokens, Linear(), FlatCosine())
    assert all(torch.equal(t, before[name]) for name, t in tiny_handle.model.state_dict().items())


def test_half_precision_models_are_compared_in_full(tiny_handle, tokens):
    tiny_handle.model.bfloat16()
    alike = layer_similarity(tiny_handle, tokens, Linear(), FlatCosine(batch=32))
    rows = [h[:, 1:].flatten(0, 1).double() for h in hooked(tiny_handle, tokens)]
    assert alike.matrix_LL[0, 7] == pytest.approx(cka(rows[0], rows[7], Linear(), batch=32), abs=1e-3)


def test_a_layer_that_is_not_finite_is_named(tiny_handle, tokens):
    tiny_handle.layers[3].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(DataError, match=r"layer 3 .*not finite.*model.dtype"):
        layer_similarity(tiny_handle, tokens, Linear(), FlatCosine())


def test_sequences_of_one_token_leave_nothing(tiny_handle):
    tokens = CalibrationTokens(np.zeros((9, 1), dtype="int32"), "one token each")
    with pytest.raises(DataError, match="0 tokens"):
        layer_similarity(tiny_handle, tokens, Linear(), FlatCosine())
