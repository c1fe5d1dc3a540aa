"""The fast backend against lm-eval's HFLM: the same answers on every kind of request, or HFLM itself and a warning."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from slm_exp.core.errors import DataError
from slm_exp.evaluation import documents
from slm_exp.evaluation.backends import fast
from slm_exp.evaluation.backends.fast import FastLM, TreeForward
from slm_exp.evaluation.backends.harness import language_model, load_tasks, run_tasks
from slm_exp.evaluation.base import SEVEN
from slm_exp.evaluation.task_index import quiet
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
GENERATED = (CONTEXT, "Short.", "x", "A context that ends in a space ")


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

    @pytest.mark.parametrize(("family", "fields"), [
        ("llama", {}), ("mistral", {"sliding_window": 90}), ("qwen2", {"sliding_window": 5}), ("gemma3_text", {}),
    ])
    def test_examples_before_every_question(
        self, make_tiny: Callable[..., ModelHandle], family: str, fields: dict[str, Any]
    ) -> None:
        """They are a trunk: read once, not once a question, and every answer is as if they had been."""
        handle = make_tiny(family, layers=4, **fields)
        shots = "".join(f"Which of the two is number {i}?\nThe {i}th.\n\n" for i in range(6))
        pairs = [(f"{shots}Ann owns {i} kettles and a rake. Which boils water?", ending) for i in range(12)
                 for ending in (" The kettle", " The rake", "?")]  # fmt: skip
        read = []
        handle.model.get_input_embeddings().register_forward_hook(lambda *call: read.append(call[2].shape[:2].numel()))
        wanted = likelihoods("hflm", handle, pairs, 4)
        plain = sum(read)
        read.clear()
        same(likelihoods("fast", handle, pairs), wanted)
        assert plain > 12 * 3 * len(shots)
        assert sum(read) < 4 * len(shots) + 12 * 100  # the trunk, the probes and the questions

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

    @pytest.mark.parametrize(("family", "fields"), [
        ("llama", {}), ("mistral", {"sliding_window": 9}), ("qwen2", {"sliding_window": 9}), ("qwen3", {}),
    ])
    def test_generation(
        self, make_tiny: Callable[..., ModelHandle], family: str, fields: dict[str, Any],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """The same text as HFLM's at batch 1, where no row waits for others, whatever runs together here."""
        handle = make_tiny(family, layers=4, **fields)
        settings: list[dict[str, Any]] = [
            {"until": ["e", "\n"], "max_gen_toks": 12}, {"until": [], "max_gen_toks": 5, "do_sample": False},
            {"until": "a", "max_gen_toks": 7, "temperature": 0.0},
        ]
        asked = instances("generate_until", *((text, kwargs) for text in GENERATED for kwargs in settings))
        with caplog.at_level(logging.WARNING, logger="slm_exp"):
            got = backend("fast", handle).generate_until(asked, disable_tqdm=True)
        assert "HFLM" not in caplog.text
        assert got == backend("hflm", handle, 1).generate_until(asked, disable_tqdm=True)
        assert got == backend("fast", handle, 1).generate_until(asked, disable_tqdm=True)
        assert len(set(got)) > 1

    @pytest.mark.parametrize(("family", "fields", "shares"), [
        ("llama", {}, True), ("mistral", {"sliding_window": 90}, False), ("gemma2", {}, False),
    ])
    def test_generation_after_examples(
        self, make_tiny: Callable[..., ModelHandle], family: str, fields: dict[str, Any], shares: bool
    ) -> None:
        """What all prompts begin with is read once, where no window of attention would be narrowed by padding."""
        handle = make_tiny(family, layers=4, **fields)
        shots = "".join(f"Which of the two is number {i}?\nThe {i}th.\n\n" for i in range(6))
        asked = instances("generate_until", *(
            (f"{shots}{text}", {"until": ["e"], "max_gen_toks": 9}) for text in ("x", "Short.", CONTEXT, "y and z")))
        asked += instances("generate_until", ("Nothing of the kind", {"max_gen_toks": 9}))
        read = []
        handle.model.get_input_embeddings().register_forward_hook(lambda *call: read.append(call[2].shape[:2].numel()))
        got = backend("fast", handle).generate_until(asked, disable_tqdm=True)
        assert (sum(read) < 4 * len(shots)) == shares  # once, and once by the check
        assert got == backend("hflm", handle, 1).generate_until(asked, disable_tqdm=True)

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
        ours, theirs = (run_tasks(tiny_handle.model, tokenizer, load_tasks(list(SEVEN), 10, True), 10, backend=name)
                        for name in ("fast", "hflm"))
        assert ours.tasks == theirs.tasks
        assert (ours.protocol, ours.settings, ours.sources) == (theirs.protocol, theirs.settings, theirs.sources)
        for task in SEVEN:
            for a, b in zip(ours.samples[task], theirs.samples[task], strict=True):
                assert a.pop("loglikelihoods") == pytest.approx(b.pop("loglikelihoods"), abs=1e-4)
                assert a == b


class TestGeneration:
    ASKED = ("generate_until", (CONTEXT, {"until": ["."], "max_gen_toks": 6}), ("Short.", {"max_gen_toks": 3}))

    def both(self, handle: ModelHandle, *asked: Any) -> tuple[list[str], list[str]]:
        kind, *arguments = asked or self.ASKED
        got, wanted = (backend(name, handle, size).generate_until(instances(kind, *arguments), disable_tqdm=True)
                       for name, size in (("fast", None), ("hflm", 1)))
        return got, wanted

    @pytest.mark.parametrize("reason", ["no cache", "a wrong cache", "its own settings"])
    def test_models_that_fall_back_to_hflm(
        self, tiny_handle: ModelHandle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reason: str
    ) -> None:
        def no_cache(*args: Any) -> Any:
            raise RuntimeError("the model gives no key-value cache")

        if reason == "no cache":
            monkeypatch.setattr(fast, "continue_greedily", no_cache)
        elif reason == "a wrong cache":
            monkeypatch.setattr(fast, "continue_greedily", lambda model, prompts, *_: [[7] for _ in prompts])
        else:
            tiny_handle.model.generation_config.repetition_penalty = 1.5
        with caplog.at_level(logging.WARNING, logger="slm_exp"):
            got, wanted = self.both(tiny_handle)
        assert got == wanted
        told = {"no cache": "no key-value cache", "a wrong cache": "by its cache is not what it finds",
                "its own settings": "generation_config sets repetition_penalty"}[reason]  # fmt: skip
        assert "falls back to HFLM for generation: " in caplog.text
        assert told in caplog.text

    def test_sampled_requests_fall_back(self, tiny_handle: ModelHandle, caplog: pytest.LogCaptureFixture) -> None:
        sampled = ("Short.", {"max_gen_toks": 3, "do_sample": True, "temperature": 1.0, "top_k": 1})
        with caplog.at_level(logging.WARNING, logger="slm_exp"):
            got, wanted = self.both(tiny_handle, *self.ASKED[:2], sampled, *self.ASKED[2:])
        assert got == wanted  # top_k = 1 leaves one token to draw
        assert "1 of 3 requests are sampled" in caplog.text

    def test_the_end_of_text_ends(self, tiny_handle: ModelHandle) -> None:
        prompt = fast.Prompt(tuple(CONTEXT.encode()), 6, lambda _: False)
        (free,) = fast.continue_greedily(tiny_handle.model, [prompt], set())
        assert len(free) == 6
        tiny_handle.model.generation_config.eos_token_id = [free[2]]
        ends = fast.stop_ids(tiny_handle.model, 257)
        assert ends == {free[2], 257}
        (got,) = fast.continue_greedily(tiny_handle.model, [prompt], ends)
        assert got == free[: free.index(free[2]) + 1]

    def test_a_context_without_room_loses_its_beginning(
        self, tiny_handle: ModelHandle, caplog: pytest.LogCaptureFixture
    ) -> None:
        tiny_handle.config.max_position_embeddings = 20
        with caplog.at_level(logging.WARNING, logger="slm_exp"):
            got, wanted = self.both(tiny_handle)
        assert got == wanted
        assert "1 of 2 contexts leave no room" in caplog.text
        with pytest.raises(DataError, match="max_gen_toks = 30; expected 1 to 19"):
            self.both(tiny_handle, "generate_until", (CONTEXT, {"max_gen_toks": 30}))

    def test_fewer_prompts_at_once_when_memory_runs_out(
        self, tiny_handle: ModelHandle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        _, wanted = self.both(tiny_handle)
        greedily = fast.continue_greedily
        most = 1

        def limited(model: Any, prompts: Any, *more: Any) -> Any:
            if len(prompts) > most:
                raise torch.OutOfMemoryError("no more")
            return greedily(model, prompts, *more)

        monkeypatch.setattr(fast, "continue_greedily", limited)
        with caplog.at_level(logging.WARNING, logger="slm_exp"):
            assert self.both(tiny_handle)[0] == wanted
        assert "out of memory; going on with 1 prompts at once" in caplog.text
        most = 0
        with pytest.raises(DataError, match="does not fit into memory"):
            self.both(tiny_handle)

    @pytest.mark.slow
    def test_real_weights(self, smol_handle: ModelHandle) -> None:
        questions = ("Answer these questions:\n\nQ: who wrote hamlet?\nA:", "The capital of France is", "1, 2, 3, 4,",
                     "Once upon a time there was a small dragon who lived in a very high tower. One day")
        asked = [(text, {"until": ["\n", "."], "max_gen_toks": 24, "do_sample": False}) for text in questions]
        got, wanted = self.both(smol_handle, "generate_until", *asked)
        assert got == wanted


class TestEdges:
    def test_no_cache_is_asked_for(self, tiny_handle: ModelHandle, monkeypatch: pytest.MonkeyPatch) -> None:
        """Likelihoods need none, so models without one are served too."""
        decoder = tiny_handle.model.base_model
        forward = decoder.forward

        def without(*args: Any, use_cache: bool = True, **kwargs: Any) -> Any:
            assert not use_cache
            return forward(*args, use_cache=False, **kwargs)

        wanted = likelihoods("hflm", tiny_handle, PAIRS, 4)
        monkeypatch.setattr(FastLM, "_model_call", lambda self, inps: self.model(inps, use_cache=False).logits)
        monkeypatch.setattr(decoder, "forward", without)
        same(likelihoods("fast", tiny_handle, PAIRS), wanted)

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

        monkeypatch.setattr(TreeForward, "hidden", fail)
        with pytest.raises(KeyboardInterrupt):
            likelihoods("fast", tiny_handle, PAIRS)
        assert not any("forward" in layer.__dict__ for layer in tiny_handle.layers)

    def test_cpu_layers_run_fused(self, tiny_handle: ModelHandle, monkeypatch: pytest.MonkeyPatch) -> None:
        ran = []
        layer = fast.fused_layer
        monkeypatch.setattr(fast, "fused_layer", lambda *args: (ran.append(args[0]), layer(*args))[1])
        likelihoods("fast", tiny_handle, PAIRS)
        assert set(ran) == set(tiny_handle.layers)


def test_a_model_spread_over_devices_runs_as_trees(
    tiny_handle: ModelHandle, caplog: pytest.LogCaptureFixture
) -> None:
    """What `device_map=auto` leaves, with one device here: hooks that move what enters a layer, and the map."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    wanted = likelihoods("hflm", tiny_handle, PAIRS, 4)
    for layer in tiny_handle.layers:
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    tiny_handle.model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    same(likelihoods("fast", tiny_handle, PAIRS), wanted)
    assert "falls back" not in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_two_gpus_runs_as_trees(tiny_handle: ModelHandle, caplog: pytest.LogCaptureFixture) -> None:
    from accelerate import dispatch_model

    wanted = likelihoods("hflm", tiny_handle, PAIRS, 4)
    n = tiny_handle.n_layers
    dispatch_model(tiny_handle.model, {
        "model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1,
        **{f"model.layers.{i}": int(i >= n // 2) for i in range(n)}})  # fmt: skip
    same(likelihoods("fast", tiny_handle, PAIRS), wanted)
    assert "falls back" not in caplog.text


class TestFallsBack:
    def check(self, handle: ModelHandle, caplog: pytest.LogCaptureFixture, why: str) -> None:
        with caplog.at_level(logging.WARNING, logger="slm_exp"):
            got = likelihoods("fast", handle, [*PAIRS, ("", "")], 4)
        assert "falls back to HFLM" in caplog.text
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
        monkeypatch.setattr(fast, "window_of", lambda model: None)
        self.check(handle, caplog, "differ from a plain forward pass")

    @pytest.mark.parametrize("factor", [1.5, math.nan])
    def test_layers_that_cannot_be_fused_still_run_as_trees(
        self, tiny_handle: ModelHandle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
        factor: float,
    ) -> None:
        wanted = likelihoods("hflm", tiny_handle, PAIRS, 4)
        monkeypatch.setattr(fast, "fused_layer", lambda layer, weights, call, h, dtype: factor * h)
        same(likelihoods("fast", tiny_handle, PAIRS), wanted)
        assert "falls back to HFLM" not in caplog.text


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
        hidden = TreeForward.hidden

        def fail(self: TreeForward, trees: Any) -> Any:
            if len(trees) > 1:  # one alone is the comparison with a plain pass, after which nothing fails any more
                raise RuntimeError("something else")
            return hidden(self, trees)

        monkeypatch.setattr(TreeForward, "hidden", fail)
        with pytest.raises(RuntimeError, match="something else"):
            likelihoods("fast", tiny_handle, PAIRS)
