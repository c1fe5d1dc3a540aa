"""`evaluation.processes`: processes of this machine evaluate one model together, a GPU or a share of the cores each.

What is divided are the batches that one process would run, whole: what is computed together shapes the rounding, and
rounding can turn the most likely token of a generation. So answers are bit by bit those of one process with as many
threads as each has here. On the CPU the processes share one copy of the weights, in the system's shared memory; with
GPUs each copies the model to its own.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import multiprocessing

from slm_exp.core.errors import SlmError
from slm_exp.core.runtime import die_with
from slm_exp.evaluation.perplexity import batch_rows, chunk_losses

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Crew:
    """This process and its helpers, which hold the same model and wait for work. See `crew`."""

    def __init__(self, helpers: Sequence[Connection]) -> None:
        self.helpers = helpers

    def chunk_losses(self, model: PreTrainedModel, tokens_NT: np.ndarray, batch_size: int | None, name: str
                     ) -> np.ndarray:
        """`perplexity.chunk_losses`, each process taking whole batches."""
        size = batch_rows(model, tokens_NT, batch_size)
        batches = [(i, tokens_NT[i : i + size]) for i in range(0, len(tokens_NT), size)]
        found = self.gather("chunk_losses", batches, [len(tokens_BT) for _, tokens_BT in batches], (batch_size, name),
                            partial(_losses, model))
        return np.array([loss for _, loss in sorted(found)])

    def gather(self, what: str, items: Sequence[Any], weights: Sequence[int], args: tuple[Any, ...],
               here: Callable[..., Iterable[Any]]) -> list[Any]:
        """What all processes answer, in no order: this one runs `here(items, *args)` on its share, the others what they
        know by the name `what`.

        Args:
            weights: about how long each item takes.
        Raises:
            SlmError: a helper was killed. What a process raises is raised here, when all have ended their shares.
        """
        mine, *others = shares(weights, len(self.helpers) + 1)
        asked = [(h, part) for h, part in zip(self.helpers, others, strict=True) if part]
        for helper, part in asked:
            helper.send((what, [items[i] for i in part], args))
        answers: list[Any] = [_tried(lambda: list(here([items[i] for i in mine], *args)))] if mine else []
        for helper, _ in asked:  # of every one, whatever was raised: no answer may wait for the next question
            try:
                answers.append(helper.recv())
            except EOFError:
                answers.append(SlmError("a process of the evaluation ended without an answer (killed, out of memory?). "
                                        "Take fewer evaluation.processes."))
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return [*chain.from_iterable(answers)]


def _tried(answer: Callable[[], list[Any]]) -> list[Any] | Exception:
    try:
        return answer()
    except Exception as error:  # told where it is raised
        return error


def _losses(model: PreTrainedModel, batches: Sequence[tuple[int, np.ndarray]], batch_size: int | None, name: str
            ) -> Iterable[tuple[int, float]]:
    """(number, loss) of every chunk of some batches, each given with the number of its first chunk. Only the last may
    be shorter than the others, so that they are cut into the same batches again."""
    numbers = [start + i for start, tokens_BT in batches for i in range(len(tokens_BT))]
    loss_N = chunk_losses(model, np.concatenate([tokens_BT for _, tokens_BT in batches]), batch_size, name)
    return zip(numbers, loss_N.tolist(), strict=True)


def shares(weights: Sequence[int], n: int) -> list[list[int]]:
    """Numbers 0.. in n parts of about equal weight, each in its order."""
    parts: list[list[int]] = [[] for _ in range(n)]
    loads = [0] * n
    for i in sorted(range(len(weights)), key=lambda i: -weights[i]):
        least = loads.index(min(loads))
        parts[least].append(i)
        loads[least] += weights[i]
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
            what, items, args = work
            if what == "chunk_losses":
                here: Callable[..., Iterable[Any]] = partial(_losses, model)
            else:
                from slm_exp.evaluation.backends.harness import language_model  # lm-eval, seconds

                lm = lm or language_model(model, tokenizer, *settings)
                here = getattr(lm, what)
            pipe.send(_tried(lambda: list(here(items, *args))))  # noqa: B023 called at once
