"""Every model preset composes into a checked source, without weights or network."""

from __future__ import annotations

from pathlib import Path

import pytest

from slm_exp.models.base import ModelSource
from slm_exp.models.hf import HF

CONF = Path(__file__).resolve().parents[2] / "conf"
PRESETS = sorted(p.stem for p in (CONF / "model").glob("*.yaml"))


def compose_model(choice: str, *overrides: str) -> ModelSource:
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    from slm_exp.core.registry import load_all

    load_all()
    ConfigStore.instance().store(name="only_model", node={"defaults": [{"model": choice}, "_self_"]})
    with initialize_config_dir(str(CONF), version_base=None):
        return OmegaConf.to_object(compose("only_model", list(overrides)).model)


@pytest.mark.parametrize("name", PRESETS)
def test_preset(name):
    source = compose_model(name)
    assert isinstance(source, HF)
    assert source.identity()["repo"].count("/") == 1
    assert source.trust_remote_code is False
    first = (CONF / "model" / f"{name}.yaml").read_text().splitlines()[0]
    assert first == f"# python -m slm_exp model={name}"


def test_all_presets_are_there():
    assert {"llama1_7b", "llama2_7b", "llama2_13b", "llama3_8b", "vicuna_7b", "vicuna_13b"} <= set(PRESETS)


def test_a_preset_takes_a_folder(tmp_path):
    (tmp_path / "x").mkdir()
    assert compose_model("llama2_7b", f"model.path={tmp_path / 'x'}").path == str(tmp_path / "x")
