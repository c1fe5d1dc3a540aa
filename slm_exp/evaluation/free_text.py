"""Health of free text: what a model writes after openings of held-out prose, without anybody's right answer.

Pruned models keep choosing well and write in circles. Counted are tokens of the model's own tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, zip_longest

from slm_exp.calibration.bundled import held_out_prose
from slm_exp.calibration.heldout import DOMAINS
from slm_exp.evaluation.documents import ASSETS, assets_folder
from slm_exp.evaluation.report import FreeText
from slm_exp.evaluation.tiny_documents import made_up_prose

OPENINGS = 32
WORDS = 40
"""Of a passage that make its opening."""
NEW = 128
"""Tokens that a model may write."""
LONGEST_PERIOD = 64
"""Tokens that a loop repeats at most."""
LOOPING = 0.5
"""A text is a loop where one stretch of this share repeats itself."""
NAME = "free_text"
"""Of the file in a run's samples/."""
RULE = f"{OPENINGS} openings of {WORDS} words of held-out passages, {NEW} tokens, greedy; version 1"


def health(texts: Sequence[Sequence[int]], ended: Sequence[bool]) -> FreeText:
    """Means over texts.

    Args:
        texts: the tokens of each, without the one that ends it.
        ended: whether the model ended it by itself.
    """
    n = len(texts)
    loops = [longest_loop(text) for text in texts]
    looping = sum(loop > 0 and loop >= LOOPING * len(text) for loop, text in zip(loops, texts, strict=True))
    return FreeText(n=n, length=sum(map(len, texts)) / n, ended=sum(ended) / n,
                    distinct_1=sum(distinct(t, 1) for t in texts) / n,
                    distinct_3=sum(distinct(t, 3) for t in texts) / n, loop=sum(loops) / n, looping=looping / n)


def distinct(tokens: Sequence[int], n: int) -> float:
    """Distinct runs of n tokens, as a share of all runs; 1 where there are none (Li et al. 2016, distinct-n)."""
    runs = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(runs)) / len(runs) if runs else 1.0


def longest_loop(tokens: Sequence[int]) -> int:
    """Tokens of the longest stretch that says the same up to LONGEST_PERIOD tokens twice or more; 0 where none does.

    Cost: tokens x LONGEST_PERIOD comparisons.
    """
    longest = 0
    for period in range(1, min(LONGEST_PERIOD, len(tokens) // 2) + 1):
        run = 0
        for now, before in zip(tokens[period:], tokens, strict=False):
            run = run + 1 if now == before else 0
            if run >= period:
                longest = max(longest, run + period)
    return longest


def openings() -> list[str]:
    """The first WORDS words of OPENINGS held-out passages, the domains in turns; made-up ones without the assets."""
    if assets_folder() is None:
        passages = made_up_prose()
    else:
        turns = zip_longest(*(held_out_prose(domain) for domain in DOMAINS))
        passages = [passage for passage in chain.from_iterable(turns) if passage is not None]
    return [" ".join(passage.split()[:WORDS]) for passage in passages[:OPENINGS]]


def missing_openings(random_model: bool) -> str | None:
    """Why there are no openings here; or None."""
    if random_model or assets_folder() is not None:
        return None
    return f"evaluation.text = true: its openings come with the assets. Install: {ASSETS} (or evaluation.text=false)."
