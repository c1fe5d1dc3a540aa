"""The card of a checkpoint: what the hub's own classes read of it is what the run measured and the source is."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from slm_exp.core.registry import available
from slm_exp.core.types import Group, MergePlan
from slm_exp.merging.surgery import apply_plan
from slm_exp.models.hf import HF
from slm_exp.models.origin import Origin, read_origin
from slm_exp.models.packaged import Packaged
from slm_exp.runs.card import model_card
from slm_exp.runs.schema import Record

PLAN = MergePlan(8, groups=(Group(1, 3),), dropped=(5,), rule="top_layer", method="slm")
RECORD = {
    "run_id": "0123", "overrides": ["method.threshold=0.9"], "params": {"before": 100_000},
    "eval": {
        "dense": {"tasks": {"piqa": {"acc": 0.7, "n": 20}}, "perplexity": {"news": 20.0}},
        "compressed": {
            "tasks": {"piqa": {"acc": 0.65, "acc_stderr": 0.1, "acc_norm": 0.6, "n": 20},
                      "arc_challenge": {"acc": 0.2, "acc_norm": 0.25, "n": 20}},
            "perplexity": {"news": 31.25, "broken": None}, "average": None,
            "protocol": {"hash": "95fa313a2f78ca99", "fields": {}}}},
}  # fmt: skip


@pytest.fixture
def short(make_tiny):
    return apply_plan(make_tiny(layers=8), PLAN, available("merge_rule")["top_layer"]())


def test_the_hub_reads_header_and_results(short):
    of = replace(short, origin=Origin("meta-llama/Llama-2-7b-hf", "llama2", language=("en", "de")))
    card = ModelCard(model_card(of, PLAN, Record.of(RECORD)))
    about = card.data
    assert (about.base_model, about.license, about.language) == ("meta-llama/Llama-2-7b-hf", "llama2", ["en", "de"])
    assert (about.library_name, about.pipeline_tag) == ("transformers", "text-generation")
    assert about.tags == ["slm_exp", "layer-merging", "depth-pruning", "method:slm"]
    found = {(r.dataset_name, r.metric_type): (r.metric_value, r.dataset_args) for r in about.eval_results}
    protocol = {"protocol": "95fa313a2f78ca99"}
    assert found == {("piqa", "acc"): (0.65, {"documents": 20, **protocol}),
                     ("arc_challenge", "acc_norm"): (0.25, {"documents": 20, **protocol}),
                     ("news", "perplexity"): (31.25, protocol)}  # fmt: skip
    for part in ("| piqa (acc, 20 documents) | 70.0 | 65.0 |", "| arc_challenge (acc_norm, 20 documents) | – | 25.0 |",
                 "| perplexity of news | 20.00 | 31.25 |", "python -m slm_exp method.threshold=0.9", "## Limits",
                 "a standard error of about 11 points", "Not trained after the cut", "AutoModelForCausalLM",
                 "[tiny-llama](https://huggingface.co/meta-llama/Llama-2-7b-hf)"):  # fmt: skip
        assert part in card.text, part


def test_what_is_not_known_is_not_claimed(short):
    about = ModelCard(model_card(short, PLAN, Record())).data
    assert about.license == "unknown"
    assert about.base_model is about.language is None
    assert not about.eval_results
    assert "model-index" not in about.to_dict()


@pytest.mark.parametrize("name", ["smollm2_135m", "qwen2_5_coder_0_5b", "gemma3_270m"])
def test_real_models_name_their_repo_and_licence(name):
    member = available("model")[name]
    assert issubclass(member, Packaged)
    assert member.origin.base_model.count("/") == 1
    assert member.origin.license in ("apache-2.0", "gemma")


def test_a_folder_says_what_it_is_by_its_card(make_tiny, tmp_path):
    handle = make_tiny(layers=3)
    handle.model.save_pretrained(tmp_path / "m")
    handle.tokenizer.save_pretrained(tmp_path / "m")
    readme = tmp_path / "m" / "README.md"
    readme.write_text("---\nlicense: mit\nlanguage: en\nbase_model: a/b\n---\n\n# m\n")
    origin = HF(path=str(tmp_path / "m")).open(torch.device("cpu"), tmp_path).origin
    assert origin == Origin("a/b", "mit", language=("en",))
    assert read_origin(tmp_path / "m", "c/d").base_model == "c/d"
    odd = "---\nlicense: 3\nbase_model: [x]\nlanguage: 1\n---\n"
    for bad in ("", "---\n", "---\n- a\n---\n", "---\na: [\n---\n", odd, "\xff" * 9):
        readme.write_text(bad)
        assert read_origin(tmp_path / "m") == Origin()
    shutil.rmtree(tmp_path / "m")
    assert read_origin(Path(tmp_path / "m")) == Origin()
