"""What every calibration source promises. A new one is covered on arrival."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import numpy as np
import pytest

from slm_exp.core.errors import ConfigError
from slm_exp.core.registry import available
from slm_exp.core.types import CalibrationTokens

SOURCES = available("calibration")


@pytest.fixture
def source(request, tmp_path):
    """A source of 6 x 48 tokens from local files (`bundled` and `mixture` have their own text)."""
    kind = SOURCES[request.param]
    if request.param in ("bundled", "mixture"):
        return kind(n_samples=6, seq_len=48)
    if request.param == "tokens":
        file = tmp_path / "t.npy"
        np.save(file, np.arange(6 * 48).reshape(6, 48) % 250)
    else:
        file = tmp_path / "t.jsonl"
        rows = [{"text": f"document {i} " + "lorem ipsum " * 20} for i in range(9)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return kind(n_samples=6, seq_len=48, path=str(file))


every_source = pytest.mark.parametrize("source", SOURCES, indirect=True)


@every_source
def test_shape_ids_and_names(source, tiny_handle):
    drawn = source.draw(tiny_handle, 0)
    assert drawn.tokens_NT.shape == (6, 48)
    assert drawn.tokens_NT.dtype == np.int32
    assert drawn.tokens_NT.min() >= 0
    assert drawn.tokens_NT.max() < tiny_handle.config.vocab_size
    assert len(set(drawn.sample_ids)) == 6
    assert drawn.source


@every_source
def test_reproducible(source, tiny_handle, make_tiny):
    one, again = source.draw(tiny_handle, 7), source.draw(make_tiny(), 7)
    assert one.digest == again.digest
    assert one.sample_ids == again.sample_ids
    if source.name != "tokens":
        assert source.draw(tiny_handle, 8).digest != one.digest


@every_source
def test_no_weights_are_loaded(source, tiny_handle):
    source.draw(tiny_handle, 0)
    assert not tiny_handle.loaded


@every_source
def test_survives_the_disk(source, tiny_handle, tmp_path):
    drawn = source.draw(tiny_handle, 0)
    drawn.save(tmp_path)
    again = CalibrationTokens.load(tmp_path)
    assert (again.digest, again.source, again.sample_ids) == (drawn.digest, drawn.source, drawn.sample_ids)


@every_source
def test_identity_is_json_without_places(source, tmp_path):
    text = json.dumps(source.identity())
    assert source.name in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize("name", SOURCES)
def test_sizes_are_checked(name):
    path = {} if name == "bundled" else {"path": "x"}
    for field, value in (("n_samples", 0), ("seq_len", 1)):
        with pytest.raises(ConfigError, match=f"calibration.{field} = {value}; expected"):
            SOURCES[name](**{field: value}, **path)


@pytest.mark.parametrize("name", SOURCES)
def test_documented(name):
    assert inspect.getdoc(SOURCES[name])
    assert Path(inspect.getfile(SOURCES[name])).stem == name
