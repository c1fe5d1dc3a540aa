"""`make test-models`: the other real models, and a checkpoint read by transformers 4. What is absent is skipped."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from slm_exp.core.cache.folder import default_cache_dir
from slm_exp.core.errors import ConfigError
from slm_exp.core.registry import available
from slm_exp.core.types import CalibrationTokens, Group, MergePlan
from slm_exp.engine.runner import BlockRunner, Slot
from slm_exp.evaluation.perplexity import load_corpus, perplexity
from slm_exp.merging.surgery import apply_plan
from slm_exp.runs.checkpoint import save_checkpoint

pytestmark = pytest.mark.models
TOP = available("merge_rule")["top_layer"]()
KNOWN = {"qwen2_5_coder_0_5b": (24, 630_167_424, False, "once", 90.0), "gemma3_270m": (18, 268_098_176, True,
                                                                                      "every_chunk", 30.0)}  # fmt: skip
"""Layers, parameters, tied, BOS, and the perplexity of prose that a sound conversion stays below."""


@pytest.fixture(scope="module", params=KNOWN)
def real(request):
    source = available("model")[request.param]()
    try:
        source.files()
    except ConfigError as missing:
        pytest.skip(str(missing))
    return source.open(torch.device("cpu"), Path(default_cache_dir()).expanduser())


@pytest.fixture(scope="module")
def prose(real):
    corpus = load_corpus("heldout:news", real, 128, KNOWN[real.name][3])
    return CalibrationTokens(corpus.tokens_NT[:10].astype(np.int32), "news", tuple(map(str, range(10))))


def test_the_model_is_what_it_says_and_reads_prose(real, prose):
    layers, parameters, tied, _, bound = KNOWN[real.name]
    assert (real.n_layers, real.n_params) == (layers, parameters)
    head, embedding = real.model.get_output_embeddings().weight, real.model.get_input_embeddings().weight
    assert (head.data_ptr() == embedding.data_ptr()) == tied
    assert 5 < perplexity(real.model, prose.tokens_NT, 2) < bound


def test_prefix_reuse_scores_the_model_that_surgery_makes(real, prose):
    n = real.n_layers
    plan = MergePlan(n, groups=(Group(6, 9),), dropped=(3,), rule="top_layer")
    short = apply_plan(real, plan, TOP)
    ids = torch.as_tensor(prose.tokens_NT[:2]).long()
    merged = TOP.merge(real.layout, list(real.layers[6:9]))
    slots = [Slot(i) for i in range(n) if i not in (3, 6, 7, 8)]
    slots.insert(5, Slot(6 + merged.host, merged.weights))
    runner = BlockRunner(real, ids)
    h = runner.embed()
    for slot in slots:
        h = runner.block(slot, h)
    ours = runner.logits(runner.finish(h).flatten(0, 1)).view(*ids.shape, -1)
    with torch.no_grad():
        wanted = short.model(ids, use_cache=False).logits
    assert (ours - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_a_shorter_model_is_saved_reloads_and_names_its_source(real, prose, tmp_path):
    plan = MergePlan(real.n_layers, dropped=(5,), rule="top_layer")
    verified = save_checkpoint(apply_plan(real, plan, TOP), tmp_path / "model", plan, prose)
    assert verified["logits_off"] <= 1e-5
    assert f"base_model: {real.origin.base_model}" in (tmp_path / "model" / "README.md").read_text()
    assert [p.name for p in real.licences] == [p.name for p in real.licences if (tmp_path / "model" / p.name).is_file()]


def test_a_refit_brings_the_stream_nearer(real, prose, tmp_path):
    from slm_exp.recovery.base import RecoveryTask, with_tensors
    from slm_exp.recovery.reconstruct import Reconstruct

    tokens = load_corpus("heldout:children", real, 128, KNOWN[real.name][3]).tokens_NT
    np.save(tmp_path / "fit.npy", tokens[:24])
    plan = MergePlan(real.n_layers, dropped=(10,), rule="top_layer")
    short = apply_plan(real, plan, TOP)
    recovery = Reconstruct(path=str(tmp_path / "fit.npy"), passes=1, ridges=[1e-2, 1e-1, 1.0])
    result = recovery.recover(RecoveryTask(short, real, plan, prose, tmp_path))
    refitted = with_tensors(short, result, {"recovery": recovery.identity()})
    before, after = (perplexity(handle.model, prose.tokens_NT, 2) for handle in (short, refitted))
    assert after < before


OLD = """
import json, sys
import numpy as np, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, where = sys.argv[1:]
ids = torch.as_tensor(np.load(where + "/ids.npy"))
model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
with torch.no_grad():
    np.save(where + "/logits.npy", model(ids, use_cache=False).logits.numpy())
words = AutoTokenizer.from_pretrained(folder)("The quick brown fox").input_ids
print(json.dumps({"version": transformers.__version__, "theta": model.config.rope_theta, "words": words}))
"""


def test_transformers_4_reads_a_saved_smollm2_with_equal_logits(smol_handle, tmp_path):
    where = os.environ.get("SLM_EXP_TRANSFORMERS4", "")
    if not Path(where, "transformers").is_dir():
        pytest.skip("SLM_EXP_TRANSFORMERS4 names no folder with transformers 4; make test-models makes one")
    plan = MergePlan(30, groups=(Group(24, 27),), rule="top_layer")
    short = apply_plan(smol_handle, plan, TOP)
    ids = np.arange(64).reshape(2, 32) * 97 % 40_000
    save_checkpoint(dataclasses.replace(short), tmp_path / "model", plan,
                    CalibrationTokens(ids.astype(np.int32), "made", ("a", "b")))  # fmt: skip
    np.save(tmp_path / "ids.npy", ids)
    environment = {**os.environ, "PYTHONPATH": where, "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run([sys.executable, "-P", "-c", OLD, str(tmp_path / "model"), str(tmp_path)], check=False,
                         capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr[-2000:]
    told = json.loads(ran.stdout.splitlines()[-1])
    assert told["version"].startswith("4.57.")
    assert told["theta"] == 100_000
    assert told["words"] == smol_handle.tokenizer("The quick brown fox").input_ids
    with torch.no_grad():
        wanted = short.model(torch.as_tensor(ids), use_cache=False).logits.numpy()
    assert np.abs(np.load(tmp_path / "logits.npy") - wanted).max() < 1e-3
