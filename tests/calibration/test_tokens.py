"""A token file is taken as it is, or refused."""

from __future__ import annotations

import numpy as np
import pytest

from slm_exp.calibration.tokens import Tokens
from slm_exp.core.errors import ConfigError, DataError


def test_as_it_is(tiny_handle, tokens, tmp_path):
    tokens.save(tmp_path)
    file = tmp_path / "calibration_tokens.npy"
    drawn = Tokens(path=str(file), n_samples=99, seq_len=7, seed=5).draw(tiny_handle, seed=1)
    assert drawn.digest == tokens.digest
    assert drawn.tokens_NT.dtype == np.int32
    assert drawn.sample_ids[1] == "calibration_tokens.npy:1"
    assert drawn.source == str(file)
    np.save(tmp_path / "wide.npy", tokens.tokens_NT.astype("uint16"))
    assert Tokens(path=str(tmp_path / "wide.npy")).draw(tiny_handle, 0).digest == tokens.digest


def test_what_is_not_looked_at_is_not_part_of_the_run(tokens, tmp_path):
    tokens.save(tmp_path)
    file = str(tmp_path / "calibration_tokens.npy")
    assert Tokens(path=file, n_samples=99, seed=5).identity() == Tokens(path=file).identity()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 8)), r"an array of float64; expected a .npy file with an int array \[N, T\]"),
        (np.zeros((2, 8), bool), r"an array of bool"),
        (np.zeros(8, int), r"shape \[8\]; expected"),
        (np.zeros((2, 2, 2), int), r"shape \[2, 2, 2\]"),
        (np.zeros((0, 8), int), r"shape \[0, 8\]"),
        (np.zeros((2, 1), int), r"shape \[2, 1\]"),
        (
            np.array([[0, 1], [2, 258]]),
            r"token id 258 at row 1, column 1 lies outside the vocabulary of tiny-llama \(0 to",
        ),
        (np.array([[0, -1]]), r"holds -1; expected"),
        (np.array([[{}, {}]], dtype=object), r"cannot be read \(.*Python objects"),
    ],
)
def test_other_arrays_are_refused(tiny_handle, tmp_path, array, message):
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    source = Tokens(path=str(tmp_path / "x.npy"))
    with pytest.raises((ConfigError, DataError), match=message):
        source.draw(tiny_handle, 0)
    if "vocabulary" not in message:  # what takes no model to see is refused before any stage
        for early in (source.identity, source.shape):
            with pytest.raises(ConfigError, match=message):
                early()


def test_other_files_are_refused(tiny_handle, tmp_path):
    (tmp_path / "x.npy").write_text("hello")
    with pytest.raises(ConfigError, match=r"cannot be read \(it holds no numbers that numpy wrote\)"):
        Tokens(path=str(tmp_path / "x.npy")).draw(tiny_handle, 0)
    np.savez(tmp_path / "x.npz", a=np.zeros((2, 8), int))
    with pytest.raises(ConfigError, match=r"an archive of 1 arrays"):
        Tokens(path=str(tmp_path / "x.npz")).draw(tiny_handle, 0)
    for act in (Tokens(path="/none.npy").identity, lambda: Tokens(path="/none.npy").draw(tiny_handle, 0)):
        with pytest.raises(ConfigError, match=r"calibration.path = /none.npy: there is no such file"):
            act()


def test_fields_that_contradict():
    with pytest.raises(ConfigError, match=r"calibration.path = None; expected a .npy file"):
        Tokens()
    with pytest.raises(
        ConfigError, match=r"calibration.add_bos = True; expected false: a token file is taken as it is"
    ):
        Tokens(path="x.npy", add_bos=True)
