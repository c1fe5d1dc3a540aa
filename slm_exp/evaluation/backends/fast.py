"""The fast backend: the log-likelihoods of lm-eval's HFLM for half of its time.

Requests that begin alike become one tree (trees.py): a document's context is computed once and every choice is a branch
that sees its own ancestors only. Logits exist only where a continuation is predicted, a few megabytes at a time; on
CPUs the decoder layers run fused (engine/fused.py). Greedy generation runs many prompts at once and lets each end by
itself (decoding.py).

Before it trusts a model it compares itself with a plain forward pass, and falls back to HFLM where they disagree.

Letters: B trees, T nodes, K nodes and their trunk, D hidden size, V vocabulary, P predicting nodes.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from slm_exp.core.errors import ArchitectureError, DataError
from slm_exp.engine.calls import STATES_BYTES, entering, in_step, streams
from slm_exp.engine.fused import fused_layer, supported
from slm_exp.engine.progress import advancing
from slm_exp.evaluation.backends.decoding import (
    NOTHING,
    Prompt,
    agrees,
    continue_greedily,
    starting,
    stop_ids,
    together,
    unusual,
)
from slm_exp.evaluation.backends.hflm import CheckedHFLM, make_room, refuse_broken
from slm_exp.evaluation.backends.shared import Shared, window_of
from slm_exp.evaluation.backends.trees import Request, Tree, common_prefix, grow
from slm_exp.models.layouts import layout_for
from slm_exp.models.streaming import shells

log = logging.getLogger(__name__)

TOKENS_PER_BATCH = {"cpu": 640, "cuda": 16384}
"""Nodes per forward pass, padding included. On a CPU a layer's inner states then stay in the cache."""
LOGITS_AT_ONCE = {"cpu": 2**22, "cuda": 2**28}
"""Logits held at a time: few enough to stay in a CPU's cache, enough to read the head's weights seldom."""
AGREEMENT = {torch.float32: 1e-4}
"""How far logits may be from a plain forward pass's, relative to their spread; 5e-2 in narrower types."""
PROBE = 16
"""Tokens before and after a fork that are compared."""
CACHED_AT_ONCE = {"cpu": 8192, "cuda": 131072}
"""Tokens in the key-value cache while generating, room for what comes included."""
ROWS_AT_ONCE = 32
"""Prompts that are continued together at most."""
UNCERTAIN = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What a model that does not understand trees raises."""


class Score(NamedTuple):
    """One request's answer, in lm-eval's terms."""

    loglikelihood: float
    greedy: bool
    """Whether every target is the most likely token."""


class _Continue(NamedTuple):
    """A prompt as other processes can be given it."""

    tokens: tuple[int, ...]
    room: int
    stops: tuple[str, ...]
    tail: int
    """Last tokens among which the end of a stop lies."""
    cut: bool
    """Whether the context was too long and lost its beginning."""


class _Rows(NamedTuple):
    """Prompts that are continued together."""

    numbers: list[int]
    """Of the prompts, among all."""
    prompts: list[_Continue]
    begun: int
    """First tokens that all have in common, read once."""
    first: bool
    """Whether they are the first of those that begin so: an answer of theirs is checked."""

    def split(self, most: int) -> list[_Rows]:
        return [_Rows(self.numbers[i : i + most], self.prompts[i : i + most], self.begun, self.first and i == 0)
                for i in range(0, len(self.numbers), most)]


Gather = Callable[[str, Sequence[Any], Sequence[int], tuple[Any, ...], Callable[..., Iterable[Any]]], list[Any]]
"""`crew.Crew.gather`."""


class FastLM(CheckedHFLM):
    """HFLM with the log-likelihoods computed along trees. Results in float32 differ from HFLM's by rounding.

    In narrower types log-probabilities are still float32 here, where HFLM rounds them to the model's type.
    Args:
        batch_size: trees (about: documents) per forward pass; None fills passes up to TOKENS_PER_BATCH, which is
            halved when memory runs out.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, batch_size: int | None = None,
                 add_bos: bool | None = None) -> None:  # fmt: skip
        super().__init__(model, tokenizer, batch_size, add_bos)
        self.trees_per_batch = batch_size
        self.nodes_per_batch = TOKENS_PER_BATCH.get(self.device.type, TOKENS_PER_BATCH["cuda"])
        self.gather: Gather | None = None
        """Set where further processes run some of the batches."""
        self._forward: TreeForward | None = None
        self._falls_back: str | None = unfit(model)  # the reason

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[Score]:
        """As lm-eval's, with nothing at all after nothing at all certain instead of an error."""
        void = [i for i, request in enumerate(requests) if request.args == ("", "")]
        out = super().loglikelihood([r for i, r in enumerate(requests) if i not in set(void)], disable_tqdm)
        for i in void:
            out.insert(i, Score(0.0, True))
        return list(out)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[Score]:
        """Log-likelihood of each continuation after its context, and whether it is what the model would say.

        A sequence that is too long loses its beginning, as in HFLM.
        Raises:
            DataError: NaN or infinite logits, a text that became no tokens, a continuation longer than the model.
        """
        sequences = [self._request(i, *request) for i, request in enumerate(requests)]
        out = [Score(0.0, True)] * len(sequences)  # an empty continuation is certain
        sequences = [s for s in sequences if s.targets]
        trees = grow(sequences, trunks=not streams(self.model))  # a pass over its files for each
        if not trees:
            return out
        if self._forward is None and self._falls_back is None:
            self._choose_forward(trees)
        if self._falls_back is None:
            self.warn_of_cuts(requests)
            assert self._forward is not None
            batches = list(self._batches(trees))
            scores = self._all("scores", batches, [sum(map(len, batch)) for batch in batches], disable_tqdm,
                               bool(self._forward.fused))
        else:
            scores = self._plain_scores(sequences, requests, disable_tqdm)
        for owner, score in scores:
            out[owner] = score
        for (text, *_), score in zip(requests, out, strict=True):
            if text is not None:  # None: a window of a rolling likelihood
                self.cache_hook.add_partial("loglikelihood", text, score)
        return out

    def _all(self, what: str, items: Sequence[Any], weights: Sequence[int], disable: bool, *args: Any
             ) -> Iterable[tuple[int, Any]]:
        """What the method `what` gives of all items, here and where `gather` sends some, in any order. Progress is this
        process's."""
        here: Callable[..., Iterable[Any]] = partial(getattr(self, what), disable=disable)
        return here(items, *args) if self.gather is None else self.gather(what, items, weights, args, here)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Text after each context, up to a stop sequence, the end of text or `max_gen_toks`.

        Greedy requests run together whatever their stops; sampled ones, and models that decoding.py does not fit,
        fall back to HFLM, with one warning.
        Raises:
            DataError: NaN or infinite logits, or no room in the model for what is to be generated.
        """
        prompts = [self._prompt(*request.args) for request in requests]
        if cut := sum(p is not None and p.cut for p in prompts):
            log.warning("%d of %d contexts leave no room to generate in %d tokens and lose their beginning.",
                        cut, len(prompts), self.max_length)  # fmt: skip
        reason = unusual(self.model)
        if reason is None:
            try:
                answers = self._continuations([p for p in prompts if p], disable_tqdm)
            except UNCERTAIN as error:
                reason = str(error)
        if reason is not None:
            log.warning("evaluation.backend=fast falls back to HFLM for generation: %s.", reason)
            return list(super().generate_until(list(requests), disable_tqdm))
        others = [i for i, p in enumerate(prompts) if p is None]
        if others:
            log.warning("%d of %d requests are sampled or searched and fall back to HFLM.", len(others), len(prompts))
        texts = iter(super().generate_until([requests[i] for i in others], disable_tqdm) if others else [])
        out = []
        for request, prompt in zip(requests, prompts, strict=True):
            if prompt is None:
                out.append(next(texts))
                continue
            text = postprocess_generated_text(self.tok_decode(next(answers)), list(prompt.stops), None)
            self.cache_hook.add_partial("generate_until", request.args, text)
            out.append(text)
        return out

    def _prompt(self, context: str, settings: Mapping[str, Any]) -> _Continue | None:
        """What is to be generated after a context; None where it is not simply the most likely text."""
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(dict(settings), self.max_gen_toks))
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        stops = handle_stop_sequences(list(kwargs.pop("until", None) or []), eos=eos)
        room, sampled = int(kwargs.pop("max_gen_toks")), kwargs.pop("do_sample", False)
        kwargs.pop("temperature", None)
        if sampled or kwargs:
            return None
        if not 0 < room < self.max_length:
            raise DataError(f"max_gen_toks = {room}; expected 1 to {self.max_length - 1}: the model holds "
                            f"{self.max_length} tokens, the context included.")
        ids, _ = self.tok_batch_encode([context], truncation=self.truncation)
        whole = [int(token) for token in ids[0].tolist()] or [self.prefix_token_id]
        tokens = tuple(whole[-(self.max_length - room) :])
        stops = [stop for stop in stops if stop]
        tail = 2 + max((len(self.tok_encode(stop, add_special_tokens=False)) for stop in stops), default=0)
        return _Continue(tokens, room, tuple(stops), tail, cut=len(tokens) < len(whole))

    def _continuations(self, prompts: Sequence[_Continue], disable_tqdm: bool) -> Iterator[list[int]]:
        """The tokens generated for each, in the order given; longest contexts first.

        Raises:
            RuntimeError: the model does not generate by its cache what it finds most likely without.
        """
        most, cached = self.trees_per_batch or ROWS_AT_ONCE, CACHED_AT_ONCE.get(self.device.type, 8192)
        rows = []
        for places, begun in together(self.model, [p.tokens for p in prompts]):
            left = places
            while left:
                longest = max(len(prompts[i].tokens) - begun + prompts[i].room for i in left[:most])
                at = max(1, min(most, cached // longest))
                some, left = left[:at], left[at:]
                rows.append(_Rows(some, [prompts[i] for i in some], begun, some[0] == places[0]))
        weights = [sum(len(p.tokens) + ROWS_AT_ONCE * p.room for p in row.prompts) for row in rows]
        found = dict(self._all("continued", rows, weights, disable_tqdm))
        return iter([found[i] for i in range(len(prompts))])

    def continued(self, rows: Sequence[_Rows], disable: bool = True) -> Iterator[tuple[int, list[int]]]:
        """(number, tokens generated) of every prompt; fewer at once when memory ends."""
        ends, start, left = stop_ids(self.model, self.tokenizer.eos_token_id), NOTHING, deque(rows)
        everything = [p for some in rows for p in some.prompts]
        what = f"greedy answers to {len(everything)} prompts, at most"
        with advancing(what, sum(p.room for p in everything), "token", disable) as advance:
            while left:
                some = left.popleft()
                prompts = [Prompt(p.tokens, p.room, self._ended(p)) for p in some.prompts]
                beginning = prompts[0].tokens[: some.begun]
                try:
                    start = start if start.tokens == beginning else starting(self.model, beginning)
                    answers = continue_greedily(self.model, prompts, ends, start, advance)
                except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                    longest = max(len(p.tokens) + p.room for p in prompts)
                    make_room(error, self.device, f"a context and answer of {longest} tokens" if len(prompts) == 1
                              else "")
                    most = len(prompts) // 2
                    log.warning("out of memory; going on with %d prompts at once.", most)
                    left = deque(piece for larger in (some, *left) for piece in larger.split(most))
                    continue
                if some.first:
                    shortest = min(range(len(answers)), key=lambda i: len(answers[i]))
                    if not agrees(self.model, prompts[shortest], answers[shortest]):
                        raise RuntimeError("what it generates by its cache is not what it finds most likely without")
                yield from zip(some.numbers, answers, strict=True)

    def _ended(self, prompt: _Continue) -> Callable[[list[int]], bool]:
        def ended(answer: list[int]) -> bool:
            text = self.tokenizer.decode(answer[-prompt.tail :])
            return any(stop in text for stop in prompt.stops)

        return ended

    def _plain_scores(self, sequences: Sequence[Request], requests: Sequence[Any],
                      disable: bool) -> Iterator[tuple[int, Score]]:  # fmt: skip
        """HFLM's own, for models that do not take trees."""
        log.warning("evaluation.backend=fast falls back to HFLM: %s.", self._falls_back)
        plain = [(None, requests[r.owner][1] or [self.prefix_token_id], requests[r.owner][2]) for r in sequences]
        scores = super()._loglikelihood_tokens(plain, disable_tqdm=disable)
        return ((r.owner, Score(*score)) for r, score in zip(sequences, scores, strict=True))

    def _request(self, owner: int, text: Any, context: list[int], continuation: list[int]) -> Request:
        if not continuation and text is not None and text[1]:
            raise DataError(f"the continuation {text[1]!r} gives no token of its own after {text[0][-60:]!r}, so it "
                            "has no likelihood.")
        if len(continuation) > self.max_length:
            raise DataError(f"a continuation of {len(continuation)} tokens is longer than the model's "
                            f"{self.max_length}.")
        whole = [*(context or [self.prefix_token_id]), *continuation][-(self.max_length + 1) :]
        return Request(owner, tuple(whole[:-1]), tuple(continuation))

    def _choose_forward(self, trees: list[Tree]) -> None:
        """The fastest forward pass over trees that agrees with a plain forward pass on small trees of these."""
        probes = [(tree, [self._model_call(torch.tensor([r.tokens], device=self.device))[0, -len(r.targets) :].float()
                          for r in tree.requests]) for tree in _probes(trees, window_of(self.model))]  # fmt: skip
        reason = ""
        for fuse in (True, False):
            try:
                with torch.inference_mode(), (forward := TreeForward(self.model, fuse)).ready():
                    errors = [_disagreement(forward, tree, plain) for tree, plain in probes]
            except torch.OutOfMemoryError:
                raise
            except UNCERTAIN as problem:
                reason = (f"{type(self.model).__name__} does not take a mask per tree ({type(problem).__name__}: "
                          f"{problem})")
                continue
            if all(error <= AGREEMENT.get(self.model.dtype, 5e-2) for error in errors):
                self._forward = forward
                return
            reason = f"its logits differ from a plain forward pass's by {max(errors):.1e} of their spread"
        self._falls_back = reason

    def _batches(self, trees: Iterable[Tree]) -> Iterator[list[Tree]]:
        """Of one trunk each, in their order; longest trees first, so memory runs out at once or never."""
        left = deque(trees)
        while left:
            rows = max(1, self.nodes_per_batch // len(left[0]))
            batch = [left.popleft()]
            while left and len(batch) < min(rows, self.trees_per_batch or rows) and left[0].trunk == batch[0].trunk:
                batch.append(left.popleft())
            yield batch

    def scores(self, batches: Sequence[list[Tree]], fuse: bool, disable: bool = True) -> Iterator[tuple[int, Score]]:
        """(owner, score) of every request in some batches of trees; smaller ones when memory ends."""
        forward = self._forward = self._forward or TreeForward(self.model, fuse)
        trees = [tree for batch in batches for tree in batch]
        tokens = sum(map(len, trees)) + sum(map(len, {tree.trunk for tree in trees}))
        what = f"log-likelihoods of {sum(len(tree.requests) for tree in trees)} requests"
        left = deque(batches)
        with torch.inference_mode(), forward.ready(), advancing(what, tokens, "token", disable) as advance:
            if streams(self.model):
                left.clear()
                for some in forward.groups(trees, self.nodes_per_batch):
                    calls = [forward.inputs(batch) for batch in some]
                    for batch, h_BTD in zip(some, in_step(self.model, calls), strict=True):
                        yield from _score(forward, batch, h_BTD)
                        advance(sum(map(len, batch)))
            while left:
                batch = left.popleft()
                try:
                    scores = _score(forward, batch)
                except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                    pieces = self._smaller(batch, error)
                    left = deque(self._batches([*pieces, *chain.from_iterable(left)]))
                    continue
                following = left[0][0].trunk if left else None
                advance(sum(map(len, batch)) + len(batch[0].trunk) * (following != batch[0].trunk))
                yield from scores

    def _smaller(self, batch: list[Tree], error: BaseException) -> list[Tree]:
        """Halve the batch size after memory ran out; a single tree is cut into two."""
        requests = sorted(batch[0].requests, key=lambda r: r.tokens)
        alone = len(batch) == len(requests) == 1
        make_room(error, self.device, f"a request of {len(requests[0].tokens)} tokens" if alone else "")
        if len(batch) == 1:
            half = len(requests) // 2
            return sorted([*grow(requests[:half]), *grow(requests[half:])], key=len, reverse=True)
        self.nodes_per_batch = max(1, len(batch) * len(batch[0]) // 2)
        log.warning("out of memory; going on with %d tokens per forward pass.", self.nodes_per_batch)
        return batch


class TreeForward:
    """A causal LM's decoder and head over trees."""

    def __init__(self, model: PreTrainedModel, fuse: bool) -> None:
        self.model = model
        self.decoder = model.base_model
        self.head: Any = model.get_output_embeddings()
        self.device = model.device
        self.fused = _fused_forwards(model) if fuse and self.device.type == "cpu" else []
        """Layers and what they run as inside `ready`; then the head runs by the same library."""
        self.window = window_of(model)
        v = self.head.weight.shape[0]
        self._trunk: tuple[tuple[int, ...], Shared] | None = None
        self.positions_at_once = max(1, LOGITS_AT_ONCE.get(self.device.type, LOGITS_AT_ONCE["cuda"]) // v)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Inside, layers run fused where they can; afterwards the model is as it was."""
        try:
            for layer, forward in self.fused:
                layer.forward = forward
            yield
        finally:
            for layer, _ in self.fused:
                layer.__dict__.pop("forward", None)

    def hidden(self, trees: Sequence[Tree]) -> Tensor:
        """Last hidden states after the final norm: [B, T, D], T the longest tree; padding holds anything finite.

        Trees of one call have one trunk. Its keys and values are computed with its first trees and kept for the next.
        """
        trunk = trees[0].trunk
        return self._decode(trees, self._shared(trunk) if trunk else None)

    def _shared(self, trunk: tuple[int, ...]) -> Shared:
        if self._trunk is None or self._trunk[0] != trunk:
            self._trunk, cache, alone = None, DynamicCache(), Tree()
            alone.add(Request(0, trunk, ()), 0)
            self._decode([alone], cache)
            self._trunk = trunk, Shared.of(cache)
        return self._trunk[1]

    def _decode(self, trees: Sequence[Tree], past: Shared | DynamicCache | None) -> Tensor:
        keys = past.before() if isinstance(past, Shared) else past
        return self.decoder(**self.inputs(trees), past_key_values=keys).last_hidden_state  # type: ignore[no-any-return]

    def groups(self, trees: Sequence[Tree], nodes: int) -> Iterator[list[list[Tree]]]:
        """Batches of trees of at most so many nodes, as many together as may go through a streamed model at once."""
        row = self.head.weight.shape[1] * self.head.weight.element_size()
        group: list[list[Tree]] = []
        left, room = deque(trees), STATES_BYTES
        while left:
            longest = len(left[0])
            batch = [left.popleft() for _ in range(min(max(1, nodes // longest), len(left)))]
            room -= len(batch) * longest * (row + 4 * longest)  # states, and masks in float32
            if group and room < 0:
                yield group
                group, room = [], STATES_BYTES
            group.append(batch)
        if group:
            yield group

    def inputs(self, trees: Sequence[Tree]) -> dict[str, Any]:
        """What the decoder is called with."""
        before = len(trees[0].trunk)
        size = max(map(len, trees))
        ids_BT = np.zeros((len(trees), size), dtype=np.int64)
        positions_BT = np.zeros_like(ids_BT)
        visible_BTK = np.ones((len(trees), size, before + size), dtype=bool)
        for row, tree in enumerate(trees):
            ids_BT[row, : len(tree)] = tree.tokens
            positions_BT[row, : len(tree)] = tree.positions
            visible_BTK[row, :, before:] = tree.visible(size)
        positions = torch.as_tensor(positions_BT, device=self.device)
        mask = self._mask(torch.as_tensor(visible_BTK, device=self.device)[:, None], positions)
        return {"input_ids": torch.as_tensor(ids_BT, device=self.device), "position_ids": positions,
                "attention_mask": mask, "use_cache": False}

    def logits(self, h_PD: Tensor) -> Tensor:
        """[P, D] -> [P, V]."""
        if self.fused and type(self.head) is torch.nn.Linear and not self.head._forward_hooks:
            out_PV = torch.ops.mkldnn._linear_pointwise(h_PD, self.head.weight, self.head.bias, "none", [], "")
        else:
            out_PV = self.head(h_PD)
        return layout_for(self.model.config).logits(self.model.config, out_PV)

    def _mask(self, visible_B1TK: Tensor, positions_BT: Tensor) -> Any:
        """What is added to attention scores, 0 or -inf, as the decoder takes it: a mask, or one per attention kind."""
        full = self._additive(visible_B1TK)
        if self.window is None:
            return full
        b, t = positions_BT.shape
        trunk_BP = torch.arange(visible_B1TK.shape[-1] - t, device=self.device).expand(b, -1)
        keys_BK = torch.cat([trunk_BP, positions_BT], dim=1)
        distance_B1TK = positions_BT[:, None, :, None] - keys_BK[:, None, None, :]
        near = self._additive(visible_B1TK & (distance_B1TK < self.window))
        kinds = set(getattr(self.model.config, "layer_types", None) or [])
        return {"full_attention": full, "sliding_attention": near} if len(kinds) > 1 else near

    def _additive(self, visible_B1TK: Tensor) -> Tensor:
        return torch.zeros((), dtype=self.model.dtype, device=self.device).where(visible_B1TK, float("-inf"))


def _score(forward: TreeForward, trees: Sequence[Tree], h_BTD: Tensor | None = None) -> list[tuple[int, Score]]:
    """(owner, score) of every request of some trees: one forward pass, unless its states are given, and logits in
    portions."""
    h_BTD = forward.hidden(trees) if h_BTD is None else h_BTD
    size = h_BTD.shape[1]
    predictions = [(owner, row * size + nodes, targets)
                   for row, tree in enumerate(trees) for owner, nodes, targets in tree.predictions()]  # fmt: skip
    nodes_P, inverse = np.unique(np.concatenate([nodes for _, nodes, _ in predictions]), return_inverse=True)
    targets = np.concatenate([np.asarray(t) for *_, t in predictions])
    logp, best = _log_probabilities(forward, h_BTD.flatten(0, 1)[torch.as_tensor(nodes_P, device=h_BTD.device)],
                                    inverse.reshape(-1), targets)  # fmt: skip
    ends = np.cumsum([len(t) for *_, t in predictions])
    return [(owner, Score(float(logp[end - len(t) : end].sum()), bool(best[end - len(t) : end].all())))
            for (owner, _, t), end in zip(predictions, ends, strict=True)]  # fmt: skip


def _log_probabilities(
    forward: TreeForward, h_PD: Tensor, which: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """log p(target) in float64 from float32 logits, and whether the target is the argmax.

    Args:
        which: for each target, the row of `h_PD` that predicts it.
    """
    order = np.argsort(which, kind="stable")
    logp, best = np.empty(len(targets)), np.empty(len(targets), dtype=bool)
    step = forward.positions_at_once
    for start in range(0, len(h_PD), step):
        part = order[slice(*np.searchsorted(which[order], [start, start + step]))]
        logits_PV = forward.logits(h_PD[start : start + step])
        highest_P = logits_PV.amax(dim=-1)
        refuse_broken(highest_P)
        rows = torch.as_tensor(which[part] - start, device=logits_PV.device)
        columns = torch.as_tensor(targets[part], device=logits_PV.device)
        equal = logits_PV[rows, columns] == highest_P[rows]  # the maximum is much cheaper than its place
        best_here = equal.clone()
        best_here[equal] = logits_PV[rows[equal]].argmax(dim=-1) == columns[equal]
        best[part] = best_here.cpu().numpy()
        logp[part] = logits_PV.log_softmax(dim=-1, dtype=torch.float32)[rows, columns].double().cpu().numpy()
    return logp, best


def unfit(model: PreTrainedModel) -> str | None:
    """Why trees cannot run through a model, as far as its config says; or None."""
    if model.get_output_embeddings() is None or model.base_model is model:
        return f"{type(model).__name__} has no head apart from its decoder"
    return None


def _probes(trees: Sequence[Tree], window: int | None) -> list[Tree]:
    """A piece around a fork of these trees, one longer than the window where any sequence is, and one with a trunk."""
    reaches = [PROBE, window] if window is not None and max(max(t.positions) for t in trees) > window else [PROBE]
    pairs = [(a.tokens, b.tokens) for tree in trees for a, b in pairwise(tree.requests)]
    forks = [(a, b, n) for a, b in pairs if (n := common_prefix(a, b)) < min(len(a), len(b))]
    out = []
    for reach in reaches:
        a, b, n = max(forks, key=lambda fork: min(fork[2], reach), default=((), (), 0))
        if not a or (reach == window and n < window):  # nothing forks, or not where the window matters
            a, b, n = max((r.tokens for tree in trees for r in tree.requests), key=len), (), 0
        start, stop = max(0, n - reach), max(n, reach) + PROBE
        pieces = [Request(0, piece, piece[-PROBE:]) for piece in (a[start:stop], b[start:stop]) if piece]
        out += grow(pieces)[:1]
    if tree := next((t for t in trees if t.trunk), None):
        trunk, after = tree.trunk[-max(reaches) :], tree.requests[0].tokens[len(tree.trunk) :][:PROBE]
        out.append(Tree(trunk))
        out[-1].add(Request(0, (*trunk, *after), after), 0)
    return out


def _disagreement(forward: TreeForward, tree: Tree, plain: Sequence[Tensor]) -> float:
    """Largest difference of a tree's logits from the plain ones, relative to their spread."""
    h_TD = forward.hidden([tree])[0]
    off = []
    for (_, nodes, _), plain_PV in zip(tree.predictions(), plain, strict=True):
        tree_PV = forward.logits(h_TD[torch.as_tensor(nodes, device=h_TD.device)]).float()
        off.append((tree_PV - plain_PV).abs().max() / plain_PV.std())
    return float(torch.stack(off).max())  # NaN where any is


def _fused_forwards(model: PreTrainedModel) -> list[tuple[Any, Callable[..., Tensor]]]:
    """(layer, its fused forward) for every decoder layer; none where one of them is not understood.

    Cost: a forward pass over two tokens, to see what the layers are called with.
    """
    kinds = set(getattr(model.config, "layer_types", None) or [])
    mask = torch.zeros(1, 1, 2, 2, dtype=model.dtype)
    try:
        layers = layout_for(model.config).layers(model)
        _, calls = entering(model.base_model, layers, {
            "input_ids": torch.zeros(1, 2, dtype=torch.long), "use_cache": False,
            "attention_mask": dict.fromkeys(kinds, mask) if len(kinds) > 1 else mask})
    except ArchitectureError:
        return []
    modules = shells(layers)
    if not all(supported(layer, call, model.dtype) for layer, call in zip(modules, calls, strict=True)):
        return []

    def fused(layer: Any) -> Callable[..., Tensor]:  # weights are looked up at every call: streamed ones come and go
        return lambda hidden_states, **call: fused_layer(layer, dict(layer.named_parameters()), call, hidden_states,
                                                         model.dtype)

    return [(layer, fused(layer)) for layer in modules]
