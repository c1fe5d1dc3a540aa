"""What is masked in messages and records, and what is left as it is."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
from builders.runs import QUICK

from slm_exp.core import secrets
from slm_exp.core.errors import StageError
from slm_exp.core.secrets import masked
from slm_exp.launch.compose import compose_run
from slm_exp.models.base import ModelHandle
from slm_exp.pipeline import run as pipeline


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_taken", {})


@pytest.mark.parametrize(("text", "shown"), [
    ("https://user:pass@host/x is not there", "https://***@host/x is not there"),
    ("a 'https://token@host' and s3://k:s@b/c", "a 'https://***@host' and s3://***@b/c"),
    ("https://host/a@b", "https://host/a@b"),
    ("mail me@host, evaluation@v2", "mail me@host, evaluation@v2"),
    ("no secrets", "no secrets"),
])  # fmt: skip
def test_credentials_of_addresses_are_masked(text: str, shown: str) -> None:
    assert masked(text) == shown
    assert masked({"a": [text, 1, None], "b": (text,)}) == {"a": [shown, 1, None], "b": [shown]}


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "MY_KEY", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD",
                                  "DB_PASSWD", "SERVICE_CREDENTIALS", "KEY", "token"])  # fmt: skip
def test_secret_variables_that_reached_a_config_are_masked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "opensesame")
    assert masked("opensesame") == "opensesame"  # it is in no config
    cfg = compose_run([*QUICK, f"calibration.field=${{oc.env:{name}}}"])
    assert cfg.calibration.field == "opensesame"
    assert masked("field opensesame is missing") == "field *** is missing"


@pytest.mark.parametrize("name", ["SCRATCH", "TOKENIZERS_PARALLELISM", "MONKEY", "KEYBOARD", "HOME_DIR"])
def test_other_variables_stay_as_they_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "/scratch/me")
    compose_run([*QUICK, f"calibration.field=${{oc.env:{name}}}/models"])
    assert masked("/scratch/me/models") == "/scratch/me/models"


def test_a_short_secret_masks_itself_and_no_part_of_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "text")
    compose_run([*QUICK, "calibration.field=${oc.env:MY_KEY}"])
    assert masked(["text", "textual context"]) == ["***", "textual context"]


def test_a_default_is_no_secret_and_a_missing_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_TOKEN", raising=False)
    assert compose_run([*QUICK, "calibration.field=${oc.env:NO_TOKEN,body}"]).calibration.field == "body"
    assert masked("body") == "body"
    with pytest.raises(Exception, match=r"calibration.field: .*NO_TOKEN"):
        compose_run([*QUICK, "calibration.field=${oc.env:NO_TOKEN}"])


@pytest.mark.parametrize("fails", [False, True])
def test_no_file_of_a_run_holds_the_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_handle: ModelHandle, fails: bool
) -> None:
    """Nor of its stage cache: names of the model, of samples, texts and corpora come from paths."""
    monkeypatch.setenv("MY_TOKEN", "opensesame")
    there = tmp_path / "opensesame"
    tiny_handle.model.save_pretrained(there)
    tiny_handle.tokenizer.save_pretrained(there)  # type: ignore[union-attr]
    (tmp_path / "opensesame.jsonl").write_text((json.dumps({"text": "long enough to be read " * 6}) + "\n") * 40)
    (tmp_path / "opensesame.txt").write_text("long enough to be read " * 40)
    secret = f"{tmp_path}/${{oc.env:MY_TOKEN}}"
    overrides = [*QUICK, "model=hf", f"model.path={secret}", "calibration=jsonl", f"calibration.path={secret}.jsonl",
                 "save_model=true", "evaluation=custom", f"evaluation.corpora.mine={secret}.txt"]
    cfg = compose_run([*overrides, f"cache.dir={tmp_path}/cache"])
    if fails:
        monkeypatch.setattr("slm_exp.runs.checkpoint.save_checkpoint", lambda *_, **__: (_ for _ in ()).throw(
            ValueError(f"no room in {there}")))
    with pytest.raises(StageError) if fails else nullcontext():
        pipeline.run(cfg, tmp_path / "run", overrides)
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["status"] == ("failed" if fails else "finished")
    assert record["config"]["calibration"]["path"] == f"{tmp_path}/***.jsonl"
    assert (record["model"]["name"], record["calibration"]["source"]) == ("***", f"{tmp_path}/***.jsonl")
    assert record["overrides"] == overrides  # the name, with which the command can be repeated
    for path in (p for folder in ("run", "cache") for p in (tmp_path / folder).rglob("*") if p.is_file()):
        assert b"opensesame" not in path.read_bytes(), path
