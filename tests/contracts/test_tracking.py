"""What every tracker promises: it opens from a running record, takes everything, and lets exceptions through."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from slm_exp.core import registry
from slm_exp.core.errors import ConfigError

CONFIG = {"model": {"name": "tiny"}, "seed": 0}
RECORD = {"run_id": "0123456789abcdef", "config": CONFIG, "overrides": [], "group": None}


THERE = [name for name, kind in registry.available("tracking").items()
         if not kind.package or importlib.util.find_spec(kind.package)]  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))


@pytest.mark.parametrize("name", THERE)
def test_takes_whatever_the_pipeline_says(name: str, tmp_path: Path) -> None:
    with registry.available("tracking")[name]().session(RECORD, tmp_path) as tracker:  # type: ignore[attr-defined]
        tracker.log({"stages": [{"name": "load", "seconds": 0.1, "cached": False}], "plan": {"groups": [[0, 2]]}})
        tracker.log({})
        tracker.table("plan", ["slot", "layers"], [[0, "0-1"], [1, None]])
        tracker.image("similarity", tmp_path / "missing.png")


@pytest.mark.parametrize("name", THERE)
def test_an_exception_passes_unchanged(name: str, tmp_path: Path) -> None:
    error = KeyError("mine")

    def fail() -> None:
        with registry.available("tracking")[name]().session(RECORD, tmp_path):  # type: ignore[attr-defined]
            raise error

    with pytest.raises(KeyError) as caught:
        fail()
    assert caught.value is error


@pytest.mark.parametrize("name", registry.available("tracking"))
def test_calls_runs_by_the_same_settings(name: str) -> None:
    fields = {f.name for f in dataclasses.fields(registry.available("tracking")[name])}
    assert {"project", "group", "run_name", "tags"} <= fields


@pytest.mark.parametrize("name", sorted(set(registry.available("tracking")) - set(THERE)))
def test_a_tracker_that_is_not_installed_is_refused_with_the_command(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"tracking = {name}; .*pip install 'slm-exp\[{name}\]'"):
        registry.available("tracking")[name]()


@pytest.mark.parametrize("name", registry.available("tracking"))
def test_changes_no_result(name: str) -> None:
    from slm_exp.pipeline.config import UNSCIENTIFIC

    assert registry.available("tracking")[name].config_group in UNSCIENTIFIC
