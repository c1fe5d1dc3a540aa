"""One look before the first stage: the same refusals from slm-exp, slm plan and slm doctor, status 2, nothing left."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from builders.models import keeps_first
from safetensors.torch import load_file, save_file

from slm_exp.cli.command import run_command
from slm_exp.cli.doctor import main as slm_doctor
from slm_exp.cli.main import main as slm
from slm_exp.cli.plan import main as slm_plan
from slm_exp.cli.run import main as slm_exp
from slm_exp.core.errors import CheckpointError, ConfigError, SlmError, StageError
from slm_exp.core.types import MergePlan
from slm_exp.launch.compose import compose_run
from slm_exp.models.hf import HF
from slm_exp.pipeline.inspection import inspect_jobs
from slm_exp.pipeline.run import run

OVER = ["evaluation=none", "tracking=none", "method=shortgpt", "method.target_layers=2", "calibration.seq_len=32",
        "calibration.n_samples=2", "runtime=cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory, make_tiny) -> Path:
    folder = tmp_path_factory.mktemp("looked-at") / "small"
    handle = make_tiny(layers=3)
    handle.model.save_pretrained(folder)
    handle.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def mine(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "small"))


def edit(folder: Path, name: str = "config.json", **fields) -> None:
    path = folder / name
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **fields}))


def without(folder: Path, name: str) -> None:
    state = load_file(folder / "model.safetensors")
    del state[name]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def no_special_tokens(folder: Path) -> None:
    about = json.loads((folder / "tokenizer_config.json").read_text())
    gone = ("bos_token", "eos_token", "pad_token", "unk_token", "extra_special_tokens")
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in about.items() if k not in gone}))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)


BAD = {
    "longer": (None, ["calibration.seq_len=500"], r"calibration.seq_len = 500; expected at most 128"),
    "perplexity": (None, ["evaluation=custom", "evaluation.corpora.news=heldout:news", "evaluation.ppl_seq_len=128",
                          "evaluation.ppl_bos=every_chunk"], r"evaluation.ppl_seq_len = 129; expected at most 128"),
    "training": (None, ["recovery=lora", "recovery.seq_len=400"], r"recovery.seq_len = 400; expected at most 128"),
    "refit": (None, ["recovery=reconstruct"], r"recovery.seq_len = 256; expected at most 128"),
    "size": (None, ["method.target_layers=4"], r"method.target_layers = 4"),
    "width": (None, ["width=magnitude", "width.uniform=false", "width.ratios=[0.5]"],
              r"width.ratios = \[0.5\]; expected 3 shares, one per layer of small"),
    "family": (lambda f: edit(f, model_type="reformer"), [], r"model_type = 'reformer' is not understood"),
    "field": (lambda f: edit(f, pretraining_tp=2, layer_widths=[1, 2]), [], r"layer_widths"),
    "shapes": (lambda f: edit(f, intermediate_size=48), [], r"other shapes than config.json says: .*gate_proj"),
    "absent": (lambda f: without(f, "model.norm.weight"), [], r"the weights in .* lack model.norm.weight"),
    "generation": (lambda f: edit(f, "generation_config.json", num_beams=0.5, cache_implementation="no"), [],
                   r"generation_config.json would be refused when the model is saved"),
    "tokenizer": (no_special_tokens, ["evaluation=custom", "evaluation.tasks=[piqa]", "evaluation.limit=1"],
                  r"has neither BOS nor EOS"),
    "missing": (lambda f: (f / "config.json").unlink(), [], r"config.json is missing"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_the_files_tell_is_refused_by_the_same_look(case, mine, monkeypatch):
    break_it, words, message = BAD[case]
    edit(mine, max_position_embeddings=128)
    if break_it:
        break_it(mine)
    overrides = ["model=hf", f"model.path={mine}", *OVER, *words]
    with pytest.raises(SlmError, match=message):
        inspect_jobs([compose_run(overrides)])


def test_every_command_refuses_and_leaves_nothing(mine, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLM_EXP_CACHE", str(tmp_path / "cache"))
    edit(mine, max_position_embeddings=128)
    named = ["model=hf", f"model.path={mine}", *OVER]
    assert slm(["doctor", *named, "--json"]) in (0, 1)
    assert json.loads(capsys.readouterr().out)[0]["level"] == "ok"
    bad = [*named, "calibration.seq_len=500"]
    assert slm_exp(bad) == 2
    assert capsys.readouterr().err.splitlines() == [
        "ConfigError: calibration.seq_len = 500; expected at most 128, the positions of small "
        "(max_position_embeddings)."]  # fmt: skip
    assert slm_exp([*bad, "seed=0,1", "-m"]) == 2
    assert slm(["plan", *bad, "--tflops", "1"]) == 2
    assert "WOULD FAIL: calibration.seq_len = 500" in capsys.readouterr().out
    assert slm(["doctor", *bad]) == 2
    assert capsys.readouterr().out.startswith("OFF   model      calibration.seq_len = 500")
    with pytest.raises(ConfigError, match="Did you mean model"):
        slm_doctor(["modle=hf"])
    assert not list(tmp_path.rglob("record.json"))
    assert not (tmp_path / "outputs").exists()


def test_a_refusal_of_the_first_stage_withdraws_its_record(mine, tmp_path, monkeypatch):
    cfg = compose_run(["model=hf", f"model.path={mine}", *OVER, f"cache.dir={tmp_path / 'cache'}"])
    done = run(cfg, tmp_path / "run")
    assert done["status"] == "finished"
    before = (tmp_path / "run" / "record.json").read_bytes()

    def refuse(*_: object) -> None:
        raise CheckpointError("no")

    monkeypatch.setattr(HF, "open", refuse)
    other = compose_run(["model=hf", f"model.path={mine}", *OVER, "seed=3", f"cache.dir={tmp_path / 'cache'}"])
    for folder in ("run", "new"):
        with pytest.raises(StageError) as caught:
            run(other, tmp_path / folder)
        assert caught.value.refused
    assert (tmp_path / "run" / "record.json").read_bytes() == before
    assert not [p.name for p in (tmp_path / "new").iterdir() if p.suffix in (".json", ".yaml")]
    with pytest.raises(StageError):
        run(other, tmp_path / "cell", group="sweep")  # a sweep's status tells by the record
    assert json.loads((tmp_path / "cell" / "record.json").read_text())["status"] == "failed"


def test_a_device_that_is_not_there(mine, monkeypatch):
    import torch

    cfg = compose_run(["model=hf", f"model.path={mine}", *OVER, "model.device=cuda:3"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"device = cuda:3; no CUDA device is visible. Use runtime=cpu"):
        inspect_jobs([cfg])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"device = cuda:3; expected cuda:0 to cuda:1, the 2 devices"):
        inspect_jobs([cfg])


def test_token_files_are_measured_by_their_headers(mine, tmp_path):
    edit(mine, max_position_embeddings=128)
    np.save(tmp_path / "long.npy", np.zeros((2, 200), int))
    for words in (["calibration=tokens", f"calibration.path={tmp_path / 'long.npy'}"],
                  ["evaluation=custom", f"evaluation.corpora.mine={tmp_path / 'long.npy'}"],
                  ["recovery=reconstruct", f"recovery.path={tmp_path / 'long.npy'}"]):  # fmt: skip
        over = [o for o in OVER if not (words[0] == "calibration=tokens" and o.startswith("calibration."))]
        with pytest.raises(ConfigError, match=r"(path|corpora.mine) = 200; expected at most 128, the positions of"):
            inspect_jobs([compose_run(["model=hf", f"model.path={mine}", *over, *words])])


@pytest.mark.parametrize("name", ["a=b", "a,b", "it's (x)", 'q"q', "[x]"])
def test_a_path_of_any_name_has_a_quoting_that_works(name, saved, tmp_path, capsys):
    shutil.copytree(saved, tmp_path / name)
    words = ["model=hf", f"model.path={tmp_path / name}", *OVER, "--tflops", "1"]
    assert run_command(slm_plan, words) == 2
    told = capsys.readouterr().err.strip()
    (word,) = shlex.split(told[told.index("'model.path") :])
    assert run_command(slm_plan, ["model=hf", word, *OVER, "--tflops", "1"]) == 0


def test_blanks_need_no_quoting(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "a b")
    assert run_command(slm_plan, ["model=hf", f"model.path={tmp_path / 'a b'}", *OVER, "--tflops", "1"]) == 0


def test_a_plan_with_widths_is_carried_out_on_a_model_that_is_only_sketched_here(tmp_path: Path) -> None:
    """Its config class, of which a narrower one is made, is not there before the model is; its sizes are."""
    plan = MergePlan(30, width=keeps_first([9] * 30, [3] * 30, [*[1536] * 29, 640], hidden=576))
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
    words = ["method=from_plan", f"method.path={tmp_path / 'plan.json'}", "evaluation=none", "tracking=none"]
    inspect_jobs([compose_run([*words, f"cache.dir={tmp_path}"])])
    edit(tmp_path, "plan.json", width=keeps_first([9] * 30, [3] * 30, [*[1664] * 29, 640], hidden=576).to_json())
    with pytest.raises(ConfigError, match=r"expected a plan whose width fits .* 1664 MLP channels of layer 0"):
        inspect_jobs([compose_run([*words, f"cache.dir={tmp_path}"])])
