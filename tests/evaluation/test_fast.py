"""The fast backend against lm-eval's HFLM: the same answers on every kind of request, or HFLM's own way and a word."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from slm_exp.errors import DataError
from slm_exp.evaluation import documents
from slm_exp.evaluation.backends import fast
from slm_exp.evaluation.backends.fast import FastLM, TreeForward
from slm_exp.evaluation.base import SEVEN
from slm_exp.evaluation.harness import language_model, quiet, run_tasks
from slm_exp.models.base import ModelHandle

CONTEXT = "Ann owns a kettle and a rake. Which of the two boils water?"
ENDINGS = (" The kettle", " The rake", " The", "!", " T", " The kettle boils water, the rake gathers leaves")
PAIRS = [
    *((CONTEXT, ending) for ending in ENDINGS),
    *((CONTEXT, ending) for ending in (" yes", " no")),
    *((f"Ann owns a {thing} because it", " boils water") for thing in ("kettle", "rake", "kettle of tin")),
    (CONTEXT, ENDINGS[0]),  # asked twice
    ("x", "yz"),
    ("A context that ends in a space ", "and goes on"),
    ("", "nothing before it"),
    ("", "</s>"),
]


def instances(kind: str, *arguments: Any) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def backend(name: str, handle: ModelHandle, batch_size: int | None = None) -> Any:
    assert handle.tokenizer is not None
    with quiet():
        return language_model(handle.model, handle.tokenizer, batch_size, backend=name)


def likelihoods(name: str, handle: ModelHandle, pairs: list[Any], batch_size: int | None = None) -> Any:
    return backend(name, handle, batch_size).loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)


def same(got: Any, wanted: Any, atol: float = 1e-4) -> None:
    assert [greedy for _, greedy in got] == [greedy for _, greedy in wanted]
    np.testing.assert_allclose([score for score, _ in got], [score for score, _ in wanted], atol=atol, rtol=1e-6)


@pytest.fixture
def no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FastLM, "_plain_scores", lambda self, *_: pytest.fail(f"fell back: {self._falls_back}"))


@pytest.mark.usefixtures("no_fallback")
class TestSameAsHFLM:
    @pytest.mark.parametrize("batch_size", [None, 1, 3])
    @pytest.mark.parametrize(("family", "fields"), [
        ("llama", {}), ("llama", {"tied": False}), ("mistral", {}), ("mistral", {"sliding_window": 5}),
        ("qwen2", {}), ("qwen2", {"sliding_window": 5}), ("qwen3", {"sliding_window": 40}),
    ])
    def test_families(
        self, make_tiny: Callable[..., ModelHandle], family: str, fields: dict[str, Any], batch_size: int | None
    ) -> None:
        handle = make_tiny(family, layers=4, **fields)
        same(likelihoods("fast", handle, PAIRS, batch_size), likelihoods("hflm", handle, PAIRS, 4))

    def test_greedy_answers_are_known_as_such(self, tiny_handle: ModelHandle) -> None:
        ids = tiny_handle.tokenizer(CONTEXT, return_tensors="pt").input_ids  # type: ignore[misc]
        for _ in range(5):
            ids = torch.cat([ids, tiny_handle.model(ids).logits[:, -1:].argmax(-1)], dim=1)
        context, answer = ids[0, :-5].tolist(), ids[0, -5:].tolist()
        asked = [((CONTEXT, "a"), context, answer), ((CONTEXT, "b"), context, [*answer[:4], (answer[4] + 1) % 256]),
                 ((CONTEXT, "c"), context, answer[:1])]
        got = backend("fast", tiny_handle)._loglikelihood_tokens(asked, disable_tqdm=True)
        assert [greedy for _, greedy in got] == [True, False, True]
        same(got, backend("hflm", tiny_handle)._loglikelihood_tokens(asked, disable_tqdm=True))

    @pytest.mark.parametrize("spare", [-50, 0, 2, 3])
    def test_what_does_not_fit_loses_its_beginning(
        self, tiny_handle: ModelHandle, spare: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        tiny_handle.config.max_position_embeddings = len(CONTEXT) + spare
        pairs = [(context, ending) for context in (CONTEXT, "Short.") for ending in (" yes", " no", "!", " nay")]
        with caplog.at_level(logging.WARNING, logger="slm_exp"):
            got = likelihoods("fast", tiny_handle, pairs)
        assert ("lose their beginning" in caplog.text) == (spare < 3)  # the longest answer has four bytes
        same(got, likelihoods("hflm", tiny_handle, pairs, 4))

    def test_rolling(self, make_tiny: Callable[..., ModelHandle]) -> None:
        handle = make_tiny("qwen2", layers=4, sliding_window=7)
        handle.config.max_position_embeddings = 24
        texts = instances("loglikelihood_rolling", (CONTEXT,), ("Short.",), (CONTEXT + CONTEXT,), ("a" * 24,))
        got, wanted = (backend(name, handle, 2).loglikelihood_rolling(texts, disable_tqdm=True)
                       for name in ("fast", "hflm"))
        assert got == pytest.approx(wanted, abs=1e-3)

    def test_generation(self, tiny_handle: ModelHandle) -> None:
        settings: list[dict[str, Any]] = [
            {"until": ["e", "\n"], "max_gen_toks": 12}, {"until": [], "max_gen_toks": 5, "do_sample": False},
        ]
        asked = instances("generate_until", *((text, kwargs) for text in (CONTEXT, "Short.") for kwargs in settings))
        got, wanted = (backend(name, tiny_handle).generate_until(asked, disable_tqdm=True)
                       for name in ("fast", "hflm"))
        assert got == wanted
        assert any(got)

    def test_narrow_types_are_nearer_to_the_truth(self, make_tiny: Callable[..., ModelHandle]) -> None:
        handle = make_tiny(layers=4)
        exact = np.array([score for score, _ in likelihoods("hflm", handle, PAIRS)])
        handle.model.to(torch.bfloat16)
        off = {name: np.abs(np.array([s for s, _ in likelihoods(name, handle, PAIRS)]) - exact).mean()
               for name in ("fast", "hflm")}
        assert off["fast"] < 0.5 * off["hflm"]

    def test_the_seven_tasks(self, tiny_handle: ModelHandle, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(documents, "assets_folder", lambda: None)
        tokenizer = tiny_handle.tokenizer
        assert tokenizer is not None
        ours, theirs = (run_tasks(tiny_handle.model, tokenizer, list(SEVEN), 10, None, None, True, name)
                        for name in ("fast", "hflm"))
        assert ours.tasks == theirs.tasks
        assert (ours.protocol, ours.settings, ours.sources) == (theirs.protocol, theirs.settings, theirs.sources)
        for task in SEVEN:
            for a, b in zip(ours.samples[task], theirs.samples[task], strict=True):
                assert a.pop("loglikelihoods") == pytest.approx(b.pop("loglikelihoods"), abs=1e-4)
                assert a == b


class TestEdges:
    def test_nothing_is_certain_to_follow(self, tiny_handle: ModelHandle) -> None:
        got = likelihoods("fast", tiny_handle, [("", ""), (CONTEXT, " yes"), (CONTEXT, ""), ("", "")])
        assert [*got[:1], *got[2:]] == [(0.0, True)] * 3
        same(got[1:2], likelihoods("hflm", tiny_handle, [(CONTEXT, " yes")]))
        assert likelihoods("fast", tiny_handle, []) == []

    def test_a_blank_context_counts_as_none(self, tiny_handle: ModelHandle) -> None:
        blank, none = likelihoods("fast", tiny_handle, [("  ", "yes"), ("", "  yes")])
        assert blank == none

    def test_text_without_tokens_has_no_likelihood(self, tiny_handle: ModelHandle) -> None:
        with pytest.raises(DataError, match=r"'b' gives no token of its own after 'a'"):
            backend("fast", tiny_handle)._loglikelihood_tokens([(("a", "b"), [1, 2], [])])

    def test_a_continuation_longer_than_the_model(self, tiny_handle: ModelHandle) -> None:
        tiny_handle.config.max_position_embeddings = 8
        with pytest.raises(DataError, match="continuation of 12 tokens is longer than the model's 8"):
            likelihoods("fast", tiny_handle, [("a", "twelve bytes")])

    @pytest.mark.parametrize("name", ["fast", "hflm"])
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("where", ["model.norm.weight", "model.layers.5.mlp.down_proj.weight"])
    def test_broken_models_have_no_likelihood(
        self, tiny_handle: ModelHandle, name: str, value: float, where: str
    ) -> None:
        tiny_handle.model.get_parameter(where).view(-1)[0] = value
        with pytest.raises(DataError, match="NaN or infinite logits"):
            likelihoods(name, tiny_handle, PAIRS)
        with pytest.raises(DataError, match="NaN or infinite logits"):
            backend(name, tiny_handle).generate_until(
                instances("generate_until", (CONTEXT, {"until": ["."], "max_gen_toks": 3})), disable_tqdm=True)

    def test_answers_reach_lm_evals_cache(self, tiny_handle: ModelHandle) -> None:
        lm, seen = backend("fast", tiny_handle), []
        lm.cache_hook.add_partial = lambda kind, args, answer: seen.append((kind, args, answer))
        got = lm.loglikelihood(instances("loglikelihood", *PAIRS[:4]), disable_tqdm=True)
        assert seen == [("loglikelihood", pair, answer) for pair, answer in zip(PAIRS[:4], got, strict=True)]


class TestLeavesTheModelAlone:
    def test_weights_config_and_layers(self, tiny_handle: ModelHandle) -> None:
        before = {name: t.clone() for name, t in tiny_handle.model.state_dict().items()}
        config = tiny_handle.config.to_dict()
        likelihoods("fast", tiny_handle, PAIRS)
        assert all(torch.equal(t, before[name]) for name, t in tiny_handle.model.state_dict().items())
        assert tiny_handle.config.to_dict() == config
        assert not any("forward" in layer.__dict__ for layer in tiny_handle.layers)

    def test_after_a_failure(self, tiny_handle: ModelHandle, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: Any) -> Any:
            raise KeyboardInterrupt

        monkeypatch.setattr(fast, "_score", fail)
        with pytest.raises(KeyboardInterrupt):
            likelihoods("fast", tiny_handle, PAIRS)
        assert not any("forward" in layer.__dict__ for layer in tiny_handle.layers)

    def test_cpu_layers_run_fused(self, tiny_handle: ModelHandle, monkeypatch: pytest.MonkeyPatch) -> None:
        ran = []
        layer = fast.fused_layer
        monkeypatch.setattr(fast, "fused_layer", lambda *args: (ran.append(args[0]), layer(*args))[1])
        likelihoods("fast", tiny_handle, PAIRS)
        assert set(ran) == set(tiny_handle.layers)


class TestFallsBack:
    def check(self, handle: ModelHandle, caplog: pytest.LogCaptureFixture, why: str) -> None:
        with caplog.at_level(logging.WARNING, logger="slm_exp"):
            got = likelihoods("fast", handle, [*PAIRS, ("", "")], 4)
        assert "goes the way of hflm" in caplog.text
        assert why in caplog.text
        same(got[:-1], likelihoods("hflm", handle, PAIRS, 4))
        assert got[-1] == (0.0, True)

    def test_a_model_that_ignores_masks(self, tiny_handle: ModelHandle, caplog: pytest.LogCaptureFixture) -> None:
        decoder = tiny_handle.model.base_model
        forward = decoder.forward
        decoder.forward = lambda **kwargs: forward(**kwargs | {"attention_mask": None})  # type: ignore[method-assign]
        self.check(tiny_handle, caplog, "differ from a plain forward pass")

    def test_a_model_that_refuses_masks(self, tiny_handle: ModelHandle, caplog: pytest.LogCaptureFixture) -> None:
        decoder = tiny_handle.model.base_model
        forward = decoder.forward

        def strict(input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
            if attention_mask is not None:
                raise ValueError("two dimensions, please")
            return forward(input_ids=input_ids, **kwargs)

        decoder.forward = strict  # type: ignore[method-assign]
        self.check(tiny_handle, caplog, "two dimensions, please")

    def test_a_window_that_the_config_hides(
        self, make_tiny: Callable[..., ModelHandle], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        handle = make_tiny("mistral", layers=4, sliding_window=5)
        monkeypatch.setattr(TreeForward, "_mask", lambda self, visible, positions: self._additive(visible))
        self.check(handle, caplog, "differ from a plain forward pass")

    def test_a_model_on_several_devices(self, tiny_handle: ModelHandle, caplog: pytest.LogCaptureFixture) -> None:
        tiny_handle.model.hf_device_map = {"model.layers.0": 0, "model.layers.1": "cpu"}
        self.check(tiny_handle, caplog, "spread over 2 devices")

    @pytest.mark.parametrize("factor", [1.5, math.nan])
    def test_layers_that_cannot_be_fused_still_run_as_trees(
        self, tiny_handle: ModelHandle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
        factor: float,
    ) -> None:
        wanted = likelihoods("hflm", tiny_handle, PAIRS, 4)
        monkeypatch.setattr(fast, "fused_layer", lambda layer, weights, call, h, dtype: factor * h)
        same(likelihoods("fast", tiny_handle, PAIRS), wanted)
        assert "goes the way of hflm" not in caplog.text


class TestMemory:
    def limit(self, monkeypatch: pytest.MonkeyPatch, nodes: int) -> None:
        hidden = TreeForward.hidden

        def limited(self: TreeForward, trees: Any) -> Any:
            if len(trees) * max(map(len, trees)) > nodes:
                raise torch.OutOfMemoryError("no more")
            return hidden(self, trees)

        monkeypatch.setattr(TreeForward, "hidden", limited)

    def test_batches_are_halved_until_they_fit(
        self, tiny_handle: ModelHandle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        wanted = likelihoods("fast", tiny_handle, PAIRS)
        self.limit(monkeypatch, 110)  # less than the largest tree: that one is cut
        with caplog.at_level(logging.WARNING, logger="slm_exp"):
            got = likelihoods("fast", tiny_handle, PAIRS)
        same(got, wanted)
        assert "out of memory; going on with" in caplog.text

    def test_a_request_that_never_fits(self, tiny_handle: ModelHandle, monkeypatch: pytest.MonkeyPatch) -> None:
        self.limit(monkeypatch, 60)
        with pytest.raises(DataError, match="does not fit into memory"):
            likelihoods("fast", tiny_handle, PAIRS)

    def test_other_errors_are_not_taken_for_it(
        self, tiny_handle: ModelHandle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*args: Any) -> Any:
            raise RuntimeError("something else")

        monkeypatch.setattr(fast, "_score", fail)
        with pytest.raises(RuntimeError, match="something else"):
            likelihoods("fast", tiny_handle, PAIRS)
