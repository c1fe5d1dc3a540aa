"""`evaluation.processes`: processes of this machine evaluate one model together, a GPU or a share of the cores each.

Requests that begin alike stay together (a document's choices are one tree), the longest go first, and answers come back
in the order of the requests; so do a text's chunks. On the CPU the processes share one copy of the weights, in the
system's shared memory; with GPUs each copies the model to its own.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import multiprocessing

from slm_exp.core.errors import SlmError
from slm_exp.core.runtime import die_with
from slm_exp.evaluation.perplexity import chunk_losses

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Part = list[int]
"""Numbers of the items that one process answers."""


class Crew:
    """This process and its helpers, which hold the same model and wait for work. See `crew`."""

    def __init__(self, helpers: Sequence[Connection]) -> None:
        self.helpers = helpers

    def chunk_losses(self, model: PreTrainedModel, tokens_NT: np.ndarray, batch_size: int | None, name: str
                     ) -> np.ndarray:
        """`perplexity.chunk_losses`, each process taking every so-many-th chunk."""
        n = len(self.helpers) + 1
        parts = [list(range(i, len(tokens_NT), n)) for i in range(n)]
        loss_N = self._answers(parts, "chunk_losses", lambda part: (tokens_NT[part], batch_size, name),
                               lambda some, *rest: chunk_losses(model, some, *rest))
        return np.array(loss_N)

    def divide(self, lm: Any) -> None:
        """Let a language model of lm-eval hand its helpers their share of every list of requests."""
        keys: dict[str, Callable[[Any], Any]] = {
            "_loglikelihood_tokens": lambda request: tuple(request[1]),
            "generate_until": lambda request: request.args[0]}
        for name, key in keys.items():
            setattr(lm, name, self._divided(name, getattr(lm, name), key))

    def _divided(self, name: str, alone: Callable[..., Any], key: Callable[[Any], Any]) -> Callable[..., Any]:
        def answer(requests: Sequence[Any], disable_tqdm: bool = False, **kwargs: Any) -> list[Any]:
            parts = shares([key(r) for r in requests], [weight(r) for r in requests], len(self.helpers) + 1)
            return self._answers(parts, name, lambda part: ([requests[i] for i in part],),
                                 lambda some: alone(some, disable_tqdm=disable_tqdm, **kwargs))

        return answer

    def _answers(self, parts: Sequence[Part], what: str, of: Callable[[Part], tuple[Any, ...]],
                 here: Callable[..., Any]) -> list[Any]:
        """Helpers answer their parts while this process answers the first."""
        mine, *others = parts
        asked = [(h, part) for h, part in zip(self.helpers, others, strict=True) if part]
        for helper, part in asked:
            helper.send((what, of(part)))
        out: dict[int, Any] = dict(zip(mine, here(*of(mine)), strict=True)) if mine else {}
        for helper, part in asked:
            try:
                answers = helper.recv()
            except EOFError:
                raise SlmError("a process of the evaluation ended without an answer (killed, out of memory?). Take "
                               "fewer evaluation.processes.") from None
            if isinstance(answers, BaseException):
                raise answers
            out |= zip(part, answers, strict=True)
        return [out[i] for i in range(len(out))]


def weight(request: Any) -> int:
    """About how long a request of lm-eval takes."""
    return len(request[1]) + len(request[2]) if isinstance(request, tuple) else len(request.args[0])


def shares(keys: Sequence[Any], weights: Sequence[int], n: int) -> list[Part]:
    """Numbers 0.. in n parts of about equal weight; items of equal keys lie in one part, in their order."""
    groups: dict[Any, Part] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    parts: list[Part] = [[] for _ in range(n)]
    loads = [0] * n
    for group in sorted(groups.values(), key=lambda g: -sum(weights[i] for i in g)):
        least = loads.index(min(loads))
        parts[least] += group
        loads[least] += sum(weights[i] for i in group)
    return [sorted(part) for part in parts]


@contextlib.contextmanager
def crew(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, processes: int, settings: tuple[Any, ...]
         ) -> Iterator[Crew]:
    """`processes` - 1 helpers for the time of an evaluation. `settings`: batch size, BOS and backend, as
    `harness.language_model` takes them. Raises SlmError: the model cannot be shared."""
    threads = torch.get_num_threads()
    share = max(1, threads // processes)
    context, started, pipes = multiprocessing.get_context("spawn"), [], []
    try:
        for i in range(1, processes):
            device = f"cuda:{i}" if model.device.type == "cuda" else "cpu"
            ours, theirs = context.Pipe()
            told = (theirs, os.getpid(), model, tokenizer, device, share, settings)
            helper = context.Process(target=_help, args=told)
            try:
                helper.start()
            except Exception as error:  # pickle raises many kinds; /dev/shm may be too small
                raise SlmError(f"evaluation.processes = {processes}: {type(model).__name__} cannot be shared with "
                               f"another process ({type(error).__name__}: {error}). Use evaluation.processes=1, or a "
                               "larger /dev/shm.") from error
            theirs.close()
            started.append(helper)
            pipes.append(ours)
        torch.set_num_threads(share)
        yield Crew(pipes)
    finally:
        torch.set_num_threads(threads)
        for pipe in pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
            pipe.close()
        for helper in started:
            helper.join(10)
            helper.kill()


def _help(pipe: Connection, parent: int, model: PreTrainedModel, tokenizer: Any, device: str, threads: int,
          settings: tuple[Any, ...]) -> None:
    """Answer until told to end, or until the parent has gone."""
    die_with(parent)
    torch.set_num_threads(threads)
    model.to(torch.device(device))  # type: ignore[arg-type]
    lm: Any = None
    with contextlib.suppress(EOFError):
        while (work := pipe.recv()) is not None:
            what, args = work
            try:
                if what == "chunk_losses":
                    out: Any = chunk_losses(model, *args).tolist()
                else:
                    from slm_exp.evaluation.backends.harness import language_model  # lm-eval, seconds

                    lm = lm or language_model(model, tokenizer, *settings)
                    out = getattr(lm, what)(*args, disable_tqdm=True)
            except Exception as error:  # told where it is raised
                out = error
            pipe.send(out)
