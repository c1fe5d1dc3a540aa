"""Greedy generation for many prompts at once, each until its own end: a row that is done leaves the batch.

What prompts begin with, as the examples of a few-shot task, is read once for all of them.

Letters: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from slm_exp.evaluation.backends.hflm import refuse_broken
from slm_exp.evaluation.backends.shared import Shared, growing, takes_shared, window_of
from slm_exp.evaluation.backends.trees import TRUNK, alike

PLAIN = {
    "_from_model_config", "bos_token_id", "cache_implementation", "do_sample", "eos_token_id", "max_length",
    "max_new_tokens", "pad_token_id", "temperature", "top_k", "top_p", "transformers_version", "trust_remote_code",
    "use_cache",
}  # fmt: skip
"""What a model's generation_config may say without changing what is most likely next; a penalty of 1 is none."""
AGREEMENT = {torch.float32: 1e-3}
"""How far below the highest logit a chosen token's may be without cache, relative to their spread; else 5e-2."""


class Prompt(NamedTuple):
    """What a model continues."""

    tokens: tuple[int, ...]
    """At least one."""
    room: int
    """Tokens to generate at most."""
    ended: Callable[[list[int]], bool]
    """Whether the tokens generated so far are enough."""


def unusual(model: PreTrainedModel) -> str | None:
    """Why a model's own generation settings ask for more than the most likely token, or None."""
    config = model.generation_config
    if config is None:
        return None
    more = sorted(name for name, value in config.to_diff_dict().items()
                  if name not in PLAIN and value not in (None, False, 1))  # fmt: skip
    return f"its generation_config sets {', '.join(more)}" if more else None


def stop_ids(model: PreTrainedModel, eos: int | None) -> set[int]:
    """Tokens that end a generation: the tokenizer's and those of the model's generation_config."""
    own = getattr(model.generation_config, "eos_token_id", None)
    own = own if isinstance(own, (list, tuple)) else [own]
    return {int(token) for token in (*own, eos) if token is not None}


class Start(NamedTuple):
    """What all of some prompts begin with."""

    tokens: tuple[int, ...] = ()
    kept: Shared | None = None
    """Its keys and values."""


NOTHING = Start()


def continue_greedily(model: PreTrainedModel, prompts: Sequence[Prompt], ends: set[int], start: Start = NOTHING,
                      done: Callable[[int], None] = lambda tokens: None) -> list[list[int]]:  # fmt: skip
    """The most likely tokens after each prompt, until `ended` or `room` or with one of `ends`, which is included.

    Prompts are padded on the left and share each forward pass; the cache of rows that are done is dropped.
    Args:
        start: is not read again.
        done: is told, step by step, how many more of the tokens that there is room for are generated or not needed.
    Raises:
        DataError: NaN or infinite logits.
        RuntimeError: there is no cache to go on from.
    Cost: one pass over the prompts after their start, then a forward of one token per step and row; the cache of all.
    """
    device: torch.device = model.get_input_embeddings().weight.device  # type: ignore[assignment]
    begun = len(start.tokens)
    tails = [p.tokens[begun:] for p in prompts]
    size = max(map(len, tails))
    ids_BT = torch.tensor([[0] * (size - len(tail)) + list(tail) for tail in tails], device=device)
    mask_BT = torch.tensor([[0] * (size - len(tail)) + [1] * len(tail) for tail in tails], device=device)
    positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0) + begun
    out: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    cache: Any = growing() if window_of(model) is None else None
    before = start.kept.before_all(model) if start.kept is not None else nullcontext()
    with torch.inference_mode(), before:
        while rows:
            output: Any = model(input_ids=ids_BT, attention_mask=mask_BT, position_ids=positions_BT,
                                past_key_values=cache, use_cache=True, logits_to_keep=1)  # fmt: skip
            logits_BV = output.logits[:, -1]
            refuse_broken(logits_BV.amax(dim=-1))
            next_B = logits_BV.argmax(dim=-1)
            cache = output.past_key_values
            if cache is None:
                raise RuntimeError(f"{type(model).__name__} gives no key-value cache")
            for row, token in zip(rows, next_B.tolist(), strict=True):
                out[row].append(token)
            left = [i for i, row in enumerate(rows) if out[row][-1] not in ends and len(out[row]) < prompts[row].room
                    and not prompts[row].ended(out[row])]  # fmt: skip
            gone = set(range(len(rows))).difference(left)
            done(len(left) + sum(prompts[rows[i]].room - len(out[rows[i]]) + 1 for i in gone))
            if gone:
                rows = [rows[i] for i in left]
                if not rows:
                    break
                keep = torch.tensor(left, device=device)
                cache.batch_select_indices(keep)
                next_B, mask_BT, positions_BT = next_B[keep], mask_BT[keep], positions_BT[keep]
            ids_BT = next_B[:, None]
            mask_BT = torch.cat([mask_BT, torch.ones_like(ids_BT)], dim=1)
            positions_BT = positions_BT[:, -1:] + 1
    return out


def starting(model: PreTrainedModel, tokens: tuple[int, ...]) -> Start:
    """What some prompts begin with, read. Cost: one pass over it."""
    device: torch.device = model.get_input_embeddings().weight.device  # type: ignore[assignment]
    with torch.inference_mode():
        return Start(tokens, Shared.reading(model, torch.tensor([tokens], device=device)) if tokens else None)


def together(model: PreTrainedModel, prompts: Sequence[tuple[int, ...]]) -> list[tuple[list[int], int]]:
    """Which prompts (their tokens) are continued together, and how many first tokens of theirs are worth reading once.

    Returns:
        places in `prompts`, longest first; all in one where the attention cannot be told of a beginning.
    """
    places = sorted(range(len(prompts)), key=lambda i: prompts[i])
    pieces = alike([prompts[i] for i in places]) if takes_shared(model) else [(slice(None), 0)]
    alone: list[int] = []
    out: list[tuple[list[int], int]] = []
    for place, shared in pieces:
        some = places[place]
        length = min(shared, *(len(prompts[i]) - 1 for i in some)) if some else 0
        if len(some) == 1 or length < TRUNK:
            alone += some
        else:
            out.append((some, length))
    return [(sorted(some, key=lambda i: -len(prompts[i])), begun) for some, begun in (*out, (alone, 0)) if some]


def agrees(model: PreTrainedModel, prompt: Prompt, answer: Sequence[int]) -> bool:
    """Whether a plain forward pass, without cache or padding, finds the same tokens the most likely."""
    device: torch.device = model.get_input_embeddings().weight.device  # type: ignore[assignment]
    ids_1T = torch.tensor([[*prompt.tokens, *answer[:-1]]], device=device)
    with torch.inference_mode():
        logits_TV = model(input_ids=ids_1T, use_cache=False).logits[0, -len(answer) :].float()
    chosen_T = logits_TV.gather(1, torch.tensor(answer, device=logits_TV.device)[:, None])[:, 0]
    short = (logits_TV.amax(dim=-1) - chosen_T).max() / logits_TV.std()
    return float(short) <= AGREEMENT.get(model.dtype, 5e-2)
