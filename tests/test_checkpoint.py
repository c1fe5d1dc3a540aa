"""A checkpoint reloads in a fresh process, without this package, as the model that was saved; or never appears."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slm_exp.core.errors import ArchitectureError, CheckpointError
from slm_exp.core.registry import available
from slm_exp.core.types import MergePlan
from slm_exp.merging.surgery import apply_plan
from slm_exp.models.hf import HF
from slm_exp.models.layouts import layout_for
from slm_exp.runs import checkpoint, reload
from slm_exp.runs.card import model_card
from slm_exp.runs.checkpoint import expectation, save_checkpoint
from slm_exp.runs.schema import Record

MEAN = available("merge_rule")["mean"]()
PLAN = MergePlan(8, groups=((1, 3), (4, 7)), rule="mean", method="slm", similarity="flat_cosine", threshold=0.9)


@pytest.fixture
def short(make_tiny):
    return apply_plan(make_tiny(), PLAN, MEAN)


@pytest.fixture
def unverified(monkeypatch):
    """Saving without the fresh process, where a test is about something else."""
    monkeypatch.setattr(checkpoint, "verify_checkpoint", lambda *a: {})


def around(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.parent.iterdir())


# --- the fresh process ---------------------------------------------------------------------------------------------


def test_saved_verified_and_loaded_again(short, tokens, tmp_path):
    folder = tmp_path / "run" / "model"
    verified = save_checkpoint(short, folder, PLAN, tokens, {"run_id": "r1"})
    assert verified["logits_off"] <= verified["tolerance"] == 1e-5
    assert verified["tensors"] == len(short.model.state_dict())
    assert around(folder) == ["model"]
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "plan.json", "README.md",
    }  # fmt: skip
    assert MergePlan.load(folder) == PLAN
    mask = os.umask(0)
    os.umask(mask)
    assert all(p.stat().st_mode & 0o777 == 0o666 & ~mask for p in folder.iterdir())

    again = HF(path=str(folder)).open(torch.device("cpu"), tmp_path)
    assert again.name == "run-model"
    assert again.n_params == short.n_params
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, short.model.state_dict()[name]), name
    assert again.model.lm_head.weight is again.model.model.embed_tokens.weight
    assert again.tokenizer("abc")["input_ids"] == short.tokenizer("abc")["input_ids"]
    assert "is_local" not in (folder / "tokenizer_config.json").read_text()


def test_half_precision_untied_windowed_and_in_shards(make_tiny, tokens, tmp_path):
    dense = make_tiny("qwen2", tied=False, sliding_window=8, dtype="bfloat16")
    short = apply_plan(dense, PLAN, MEAN)
    verified = save_checkpoint(short, tmp_path / "model", PLAN, tokens, max_shard_size="50KB")
    assert verified["logits_off"] == 0.0
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1
    about = json.loads((tmp_path / "model" / "config.json").read_text())
    assert about["dtype"] == "bfloat16"
    assert about["num_hidden_layers"] == len(about["layer_types"]) == 5


@pytest.mark.slow
def test_the_embedded_model(smol_handle, tmp_path):
    """Real weights through the whole door: merge, save, reload, and the text goes on sensibly."""
    plan = MergePlan(30, groups=((14, 16), (25, 28)), rule="top_layer", method="slm")
    short = apply_plan(smol_handle, plan, available("merge_rule")["top_layer"]())
    verified = save_checkpoint(short, tmp_path / "model", plan)
    assert verified["logits_off"] <= 1e-5
    assert short.n_params == smol_handle.n_params - 3 * 3_540_096
    card = (tmp_path / "model" / "README.md").read_text()
    assert "SmolLM2-135M-Instruct, dequantised from Q4_1" in card
    assert (tmp_path / "model" / "model.safetensors").stat().st_size < 4 * short.n_params + 100_000
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer; p = sys.argv[1]\n"
        "m, t = AutoModelForCausalLM.from_pretrained(p), AutoTokenizer.from_pretrained(p)\n"
        "x = t('The capital of France is', return_tensors='pt').input_ids\n"
        "print(t.decode(m.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=3, do_sample=False)[0]))\n"
        "assert 'slm_exp' not in sys.modules"
    )
    ran = subprocess.run([sys.executable, "-P", "-c", script, str(tmp_path / "model")], capture_output=True, text=True)
    assert "Paris" in ran.stdout, ran.stderr


def test_a_process_that_dies_is_reported(short, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.sys, "executable", "/bin/false")
    with pytest.raises(CheckpointError, match=r"the process that reloads .* ended with status 1"):
        save_checkpoint(short, tmp_path / "model", PLAN)
    assert list(tmp_path.iterdir()) == []


# --- what it notices -----------------------------------------------------------------------------------------------


def change_config(folder: Path, **fields) -> None:
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**about, **fields}))


def flip_a_bit(folder: Path) -> None:
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "model.safetensors").write_bytes(raw)


def drop_the_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def test_a_reloading_process_whose_run_was_killed_ends_and_judges_nothing(tmp_path: Path) -> None:
    ran = subprocess.run([sys.executable, "-P", reload.__file__, str(tmp_path)], stdin=subprocess.DEVNULL, timeout=120)
    assert ran.returncode == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (flip_a_bit, r"tensor model\.\S+ differs from the one saved"),
        (lambda f: change_config(f, rms_norm_eps=0.1), r"logits differ by"),
        (lambda f: change_config(f, rope_parameters={"rope_type": "default", "rope_theta": 5.0}), r"logits differ by"),
        (lambda f: change_config(f, num_hidden_layers=4), r"unexpected_keys: model.layers.4"),
        (lambda f: change_config(f, num_hidden_layers=6), r"missing_keys: model.layers.5"),
        (lambda f: change_config(f, tie_word_embeddings=False), r"missing_keys: lm_head|should be one tensor"),
        (drop_the_tokenizer, r"Exception|Error"),
        (lambda f: (f / "model.safetensors").unlink(), r"model.safetensors"),
    ],
)
def test_a_spoilt_checkpoint_is_noticed(short, tokens, tmp_path, unverified, spoil, message):
    """The script's own checks, run in this process to save time."""
    import re

    folder, where = tmp_path / "model", tmp_path / "expected"
    where.mkdir()
    save_checkpoint(short, folder, PLAN, tokens)
    expectation(folder, short, tokens, where)
    spoil(folder)
    reload.main(str(where))
    error = json.loads((where / "result.json").read_text())["error"]
    assert re.search(message, error), error


def test_an_intact_one_passes_all_but_the_last_check(short, tokens, tmp_path, unverified):
    """In this process the package is loaded, which is what the last check refuses."""
    save_checkpoint(short, tmp_path / "model", PLAN, tokens)
    expectation(tmp_path / "model", short, tokens, tmp_path)
    reload.main(str(tmp_path))
    assert json.loads((tmp_path / "result.json").read_text())["error"] == "loading the checkpoint imported slm_exp"


def test_layers_with_wrong_cache_slots_are_noticed(short, tokens, tmp_path, unverified, monkeypatch):
    import transformers

    save_checkpoint(short, tmp_path / "model", PLAN, tokens)
    expectation(tmp_path / "model", short, tokens, tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained

    def misnumbered(*args, **kwargs):
        model, info = load(*args, **kwargs)
        model.model.layers[3].self_attn.layer_idx = 2
        return model, info

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", misnumbered)
    reload.main(str(tmp_path))
    assert "KV cache" in json.loads((tmp_path / "result.json").read_text())["error"]


# --- never half a checkpoint ---------------------------------------------------------------------------------------


def test_a_mismatch_leaves_nothing_and_spares_the_older_one(short, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    monkeypatch.setattr(checkpoint, "verify_checkpoint", lambda *a: {})
    save_checkpoint(short, folder, PLAN)
    (folder / "mark").write_text("older")

    def differs(*args):
        raise CheckpointError("tensor x differs")

    monkeypatch.setattr(checkpoint, "verify_checkpoint", differs)
    with pytest.raises(CheckpointError, match="tensor x differs"):
        save_checkpoint(short, folder, PLAN)
    assert around(folder) == ["model"]
    assert (folder / "mark").read_text() == "older"
    monkeypatch.setattr(checkpoint, "verify_checkpoint", lambda *a: {})
    save_checkpoint(short, folder, PLAN)
    assert around(folder) == ["model"]
    assert not (folder / "mark").exists()


def test_a_full_disk_leaves_nothing(short, tmp_path, unverified):
    """A real write error: no file of this process may grow beyond 100 kB (the weights have 220)."""
    _ = short.model
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"could not be written .*Free space there, .* save_model=false"):
            save_checkpoint(short, tmp_path / "model", PLAN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_no_folder(short, tmp_path, unverified):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        save_checkpoint(short, tmp_path / "file" / "model", PLAN)


def test_leftovers_of_a_killed_process_are_removed(short, tmp_path, unverified):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in (f".model.{dead.pid}.abc123.tmp", f".model.{dead.pid}.abc123.old", f".model.{os.getpid()}.abc123.tmp"):
        (tmp_path / name).mkdir()
    save_checkpoint(short, tmp_path / "model", PLAN)
    assert around(tmp_path / "model") == [f".model.{os.getpid()}.abc123.tmp", "model"]


# --- what goes with the weights ------------------------------------------------------------------------------------


def test_generation_settings_that_contradict_are_saved_all_the_same(short, tmp_path, unverified):
    """Published ones exist: a temperature without do_sample, which transformers warns of and refuses to save."""
    short.model.generation_config.temperature = 0.6
    save_checkpoint(short, tmp_path / "model", PLAN)
    about = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert about["temperature"] == 0.6
    assert about["do_sample"] is True
    assert not short.model.generation_config.do_sample


def test_the_card_says_what_it_is(short):
    record = {"run_id": "0123", "overrides": ["method.threshold=0.9", "calibration.path=my file.jsonl"],
              "params": {"before": 82_528}}  # fmt: skip
    card = model_card(short, PLAN, Record.of(record))
    for part in (
        "library_name: transformers", "# tiny-llama, 5 of 8 layers", "random weights",
        f"{short.n_params:,} parameters, 82,528 before (33.7% removed)", "merged into one: 1..2, 4..6",
        "Method slm, merge rule mean, similarity flat_cosine, threshold 0.9", "## Licence",
        "python -m slm_exp method.threshold=0.9 'calibration.path=my file.jsonl'", "AutoModelForCausalLM",
    ):  # fmt: skip
        assert part in card, part
    assert "base_model" not in card
    short.lineage["base"] = "meta-llama/Llama-2-7b-hf"
    assert "base_model: meta-llama/Llama-2-7b-hf" in model_card(short, PLAN, Record())


def test_a_model_without_tokenizer_is_saved_without(short, tmp_path, unverified):
    short.load_tokenizer = lambda: None
    save_checkpoint(short, tmp_path / "model", PLAN)
    assert not list((tmp_path / "model").glob("tokenizer*"))


def test_a_config_cannot_smuggle_code_into_a_checkpoint(tmp_path, make_tiny):
    """Neither an auto_map of the source model nor widths that its type does not have."""
    handle = make_tiny()
    handle.model.config.auto_map = {"AutoModelForCausalLM": "elsewhere--evil.Model"}
    save_checkpoint(handle, tmp_path / "model", MergePlan(8))
    assert "auto_map" not in json.loads((tmp_path / "model" / "config.json").read_text())
    handle.config.layer_widths = [[4, 2, 64]] * 8
    with pytest.raises(ArchitectureError, match="layer_widths in a config of model_type llama"):
        layout_for(handle.config)
