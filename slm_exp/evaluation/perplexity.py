"""Perplexity by the paper's protocol: short non-overlapping chunks, every predicted token counted once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from slm_exp.calibration.bundled import held_out_prose
from slm_exp.calibration.heldout import DOMAINS, RULE, TOKENS
from slm_exp.calibration.tokens import load_ids, require_ids
from slm_exp.core.cache.digests import content_digest
from slm_exp.core.errors import DataError, did_you_mean
from slm_exp.core.files import digest, no_file
from slm_exp.core.text import SUFFIXES, kind_of, read_field, read_lines, slices
from slm_exp.engine.progress import advancing
from slm_exp.evaluation import documents
from slm_exp.evaluation.report import Row
from slm_exp.evaluation.tiny_documents import made_up_prose
from slm_exp.models.base import ModelHandle
from slm_exp.models.layouts import layout_for

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

HUB_SETS: dict[str, dict[str, Any]] = {  # arguments of datasets.load_dataset, the text field, how many rows
    "wikitext2": {"load": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"},
                  "field": "text", "rows": None},
    "ptb": {"load": {"path": "ptb-text-only/ptb_text_only", "revision": "refs/convert/parquet",
                     "name": "penn_treebank", "split": "validation"},
            "field": "sentence", "rows": None},
    "c4": {"load": {"path": "allenai/c4", "split": "train",
                    "data_files": {"train": "en/c4-validation.00000-of-00008.json.gz"}},
           "field": "text", "rows": 1100},
}
SAMPLES = "perplexity-"
"""Before a corpus's name: the file of its chunks' losses in `samples/`."""
BOS_TOO = "_bos"
"""Added to a corpus's name for its perplexity with BOS before every chunk (`ppl_bos=both`)."""
WINDOW = 2048
LONG_WINDOWS = f"_{WINDOW}"
"""The end of a corpus's name whose chunks have WINDOW tokens, as in the papers of 2025-26; others `ppl_seq_len`."""
FILES = (*SUFFIXES, ".npy")
LONG = 2**22  # characters tokenised at a time: above every published corpus here, so those are in one piece
HELD_OUT = {f"heldout:{domain}": domain for domain in DOMAINS}
"""Bundled prose that nothing else uses: the first TOKENS tokens of each domain."""
CHUNK_TOKENS = {"cpu": 1024, "cuda": 4096}  # tokens per forward pass: logits of 1024 x 49152 are 200 MB in float32


class Corpus(NamedTuple):
    """Token chunks to predict, and how they were cut."""

    tokens_NT: np.ndarray
    """[N, T] int64; a chunk predicts its tokens 1 .. T-1."""
    protocol: dict[str, str | int]
    """{source, seq_len, bos, chunks}; source is a digest for files, a name for hub sets."""


def perplexity(model: PreTrainedModel, tokens_NT: np.ndarray, batch_size: int | None = None, name: str = "") -> float:
    """exp of the mean negative log-likelihood over all predicted tokens of all chunks; see `chunk_losses`."""
    return exp_of_mean(chunk_losses(model, tokens_NT, batch_size, name))


def exp_of_mean(loss_N: np.ndarray) -> float:
    """The perplexity of a text from the losses of its chunks, which are equally long."""
    mean = float(loss_N.mean())
    return math.exp(mean) if mean < 700 else math.inf


def chunk_losses(model: PreTrainedModel, tokens_NT: np.ndarray, batch_size: int | None = None,
                 name: str = "") -> np.ndarray:
    """Mean negative log-likelihood, in nats, of the predicted tokens of each chunk: [N] float64.

    Each of the N chunks is read alone, so the first of its T tokens only conditions. Log-probabilities are float32
    or wider, their sum is exact to double precision; logits of one batch are held at a time.
    `batch_size`: chunks per forward pass; None chooses.
    Raises DataError: the mean is NaN or infinite.
    Cost: one forward pass over N T tokens with all logits.
    """
    import torch
    from torch.nn.functional import cross_entropy

    n = len(tokens_NT)
    device: torch.device = model.get_input_embeddings().weight.device  # type: ignore[assignment]
    losses = []
    size = batch_rows(model, tokens_NT, batch_size)
    batches = torch.as_tensor(tokens_NT, dtype=torch.long, device=device).split(size)
    with torch.inference_mode(), advancing(f"perplexity {name}".strip(), n, "chunk") as advance:
        for ids_BT, logits_BTV in zip(batches, _logits(model, batches), strict=True):
            for ids_T, logits_TV in zip(ids_BT, logits_BTV, strict=True):  # row by row: one float32 copy of [T, V]
                nll_T = cross_entropy(logits_TV[:-1].float(), ids_T[1:].to(logits_TV.device), reduction="none")
                losses.append(float(nll_T.double().mean()))
            if not math.isfinite(sum(losses[-len(ids_BT) :])):
                raise DataError(f"the model gives NaN or infinite logits on {name or 'the text'}, so it has no "
                                "perplexity. Try model.dtype=float32 or bfloat16 (float16 overflows easily).")
            advance(len(ids_BT))
    return np.array(losses)


def batch_rows(model: PreTrainedModel, tokens_NT: np.ndarray, batch_size: int | None) -> int:
    """Chunks that `chunk_losses` reads at once."""
    kind: str = model.get_input_embeddings().weight.device.type  # type: ignore[union-attr, assignment]
    return batch_size or max(1, CHUNK_TOKENS.get(kind, CHUNK_TOKENS["cpu"]) // tokens_NT.shape[1])


def samples(corpora: Mapping[str, Corpus], losses: Mapping[str, np.ndarray]) -> dict[str, list[Row]]:
    """What stays of every chunk, as of a task's documents: its number, a digest of its ids, its mean loss `nll`."""
    return {SAMPLES + name: [{"doc_id": i, "doc_hash": digest(ids_T.tolist()), "nll": float(loss)}
                             for i, (ids_T, loss) in enumerate(zip(corpus.tokens_NT, losses[name], strict=True))]
            for name, corpus in corpora.items()}


def _logits(model: PreTrainedModel, batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """[B, T, V] of every batch. A model whose layers stay in files is read once for as many as memory takes."""
    from slm_exp.engine.calls import STATES_BYTES, in_step, streams

    if not streams(model):
        yield from (model(input_ids=ids_BT, use_cache=False).logits for ids_BT in batches)
        return
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    at_once = max(1, STATES_BYTES // (batches[0].numel() * head.weight.shape[1] * head.weight.element_size()))
    for start in range(0, len(batches), at_once):
        calls = [{"input_ids": ids_BT, "use_cache": False} for ids_BT in batches[start : start + at_once]]
        yield from (layout_for(model.config).logits(model.config, head(h_BTD)) for h_BTD in in_step(model, calls))


def load_corpora(corpora: dict[str, str], handle: ModelHandle, seq_len: int, bos: str) -> dict[str, Corpus]:
    """`load_corpus` of each, NAME_2048 in chunks of that length; `both` adds NAME_bos, with BOS in `every_chunk`."""
    out = {}
    for name, where in corpora.items():
        size = chunk_tokens(name, seq_len)
        out[name] = load_corpus(where, handle, size, "once" if bos == "both" else bos)
        if bos == "both" and not where.endswith(".npy"):
            out[name + BOS_TOO] = load_corpus(where, handle, size, "every_chunk")
    return out


def chunk_tokens(name: str, seq_len: int) -> int:
    """Tokens per chunk of a text corpus."""
    return WINDOW if name.endswith(LONG_WINDOWS) else seq_len


def load_corpus(where: str, handle: ModelHandle, seq_len: int = 128, bos: str = "once") -> Corpus:
    """Chunks of a text file, a hub set or a token file.

    Text is tokenised without special tokens, in one piece up to LONG characters: rows joined by blank lines
    ("\\n\\n"), as hub sets are in this protocol. A .txt file is read as the hub's WikiText rows: one per line with its
    newline, "" for a blank line. Other files give one row per line or row, its field `text`. The last partial chunk is
    dropped.
    Args:
        where: path ending in one of FILES, or one of HUB_SETS or HELD_OUT. A .npy file holds [N, T] ids, taken as they
            are: `seq_len` and `bos` do not apply.
        seq_len: tokens per chunk.
        bos: `once` puts BOS before the text, `every_chunk` before each chunk (then of seq_len + 1 tokens), or
            `never`. A tokenizer without BOS turns `once` into `never`.
    Raises DataError: missing, malformed or shorter than a chunk; ids outside the vocabulary; no tokenizer or no BOS.
    """
    if where.endswith(".npy"):
        ids_NT = require_ids(Path(where), handle, where).astype(np.int64)
        about = {"source": content_digest(Path(where)), "seq_len": ids_NT.shape[1], "bos": "as given"}
        return Corpus(ids_NT, about | {"chunks": len(ids_NT)})
    tokenizer = handle.tokenizer
    if tokenizer is None:
        raise DataError(f"{handle.name} has no tokenizer to read {where} with; give a .npy token file.")
    if tokenizer.bos_token_id is None and bos == "every_chunk":
        raise DataError(f"{handle.name}: its tokenizer has no BOS token; use evaluation.ppl_bos=never.")
    if tokenizer.bos_token_id is None:
        bos = "never"
    parts = [np.asarray(tokenizer(part, add_special_tokens=False, verbose=False).input_ids, dtype=np.int64)
             for part in slices("\n\n".join(_rows(where)), LONG)]
    ids = np.concatenate([[tokenizer.bos_token_id] * (bos == "once"), *parts]).astype(np.int64)
    if where in HELD_OUT:
        ids = ids[:TOKENS]
    n = len(ids) // seq_len
    if n == 0:
        raise _too_short(f"{where} has {len(ids)} tokens", seq_len)
    tokens_NT = ids[: n * seq_len].reshape(n, seq_len)
    if bos == "every_chunk":
        tokens_NT = np.insert(tokens_NT, 0, tokenizer.bos_token_id, axis=1)
    return Corpus(tokens_NT, {"source": corpus_identity(where), "seq_len": seq_len, "bos": bos, "chunks": n})


def check_file(where: str, handle: ModelHandle, seq_len: int) -> None:
    """Refuse a file that cannot be a corpus of chunks of `seq_len` tokens for a model, as far as its config and the
    file's header or size say it. Raises DataError / ConfigError, as `load_corpus`."""
    path = Path(where)
    if where.endswith(".npy"):
        require_ids(path, handle, where)
    elif where.endswith((".txt", ".jsonl", ".json")) and (size := path.stat().st_size) + 2 < seq_len:  # BOS and a blank
        raise _too_short(f"{where} has {size} bytes", seq_len)


def _too_short(what: str, seq_len: int) -> DataError:
    return DataError(f"{what}; expected at least one chunk of {seq_len} tokens. Use a longer text or a smaller "
                     "evaluation.ppl_seq_len.")


def row_length(where: str) -> int | None:
    """Tokens of a token file's rows, by its header; None of anything else."""
    try:
        return int(np.load(where, mmap_mode="r", allow_pickle=False).shape[1]) if where.endswith(".npy") else None
    except Exception:  # what `load_ids` says in a line; numpy and zipfile raise a dozen kinds
        return None


def corpus_identity(where: str) -> str:
    """A digest of a file's contents, or the name of a hub set or of bundled text and the rule that chose it."""
    if where in HELD_OUT:
        return f"{where}, {RULE if documents.assets_folder() else 'packaged'}"
    if where.endswith(".npy"):
        load_ids(Path(where), f"evaluation.corpora: {where}")
    return content_digest(Path(where)) if where.endswith(FILES) and Path(where).is_file() else where


def unknown_corpus(where: str) -> str | None:
    """Why `where` names no corpus, or None. Looks at names only."""
    if where.endswith(FILES):
        return no_file(Path(where))
    names = (*HUB_SETS, *HELD_OUT)
    if where in names:
        return None
    return f"expected a file ending in {', '.join(FILES)}, or one of {', '.join(names)}. {did_you_mean(where, names)}"


def missing_corpora(corpora: dict[str, str], random_model: bool = False, at_hand: bool = False) -> str | None:
    """Which hub sets or bundled texts cannot be had here; or None. `at_hand`: see `Settings.corpora_at_hand`."""
    leave_out = ", or set HF_HUB_OFFLINE=1, which leaves it out" * at_hand
    for name, where in corpora.items():
        if where in HUB_SETS and documents.out_of_reach(HUB_SETS[where]["load"]["path"]):
            return (f"evaluation.corpora.{name} = {where}: not on this machine, {documents.why_out_of_reach()}. "
                    f"Give a file instead: 'evaluation.corpora={{{name}: path/to/{where}.txt}}'{leave_out}.")
        if where in HELD_OUT and documents.assets_folder() is None and not random_model:
            return (f"evaluation.corpora.{name} = {where}: its text comes with the assets. Install: {documents.ASSETS} "
                    f"(or leave it out: '~evaluation.corpora.{name}').")
    return None


def _rows(where: str) -> Iterator[str]:
    if where in HUB_SETS:
        import datasets

        about = HUB_SETS[where]
        try:
            rows = datasets.load_dataset(**about["load"])
        except Exception as error:  # datasets raises many kinds for "not there"
            raise DataError(f"{where} ({about['load']['path']}) cannot be loaded: {type(error).__name__}: {error}. "
                            f"Give a file instead: 'evaluation.corpora={{{where}: path/to/{where}.txt}}'") from error
        yield from rows[: about["rows"]][about["field"]]
        return
    if where in HELD_OUT:  # a random model without the assets reads made-up text: its numbers mean nothing either way
        yield from made_up_prose() if documents.assets_folder() is None else held_out_prose(HELD_OUT[where])
        return
    file = Path(where)
    if kind_of(file) == ".txt":
        yield from (line if line.strip() else "" for line in read_lines(file))
    else:
        yield from (text for _, text in read_field(file, "text"))
