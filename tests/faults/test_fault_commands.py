"""Damaged files through the commands: a status of 0, 1 or 2, one message, no traceback, 5 s of computing at most."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import attack
import pytest
import yaml
from attack import LIMIT_S, size, wrong
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from server import Server
from test_fault_readers import PATH, PLANS, RECORDS, TABLES

OLD = Path(__file__).parents[1] / "records" / "old"
TINY = ("model=tiny", "tracking=none", "evaluation=none", "save_model=false", "calibration.n_samples=2",
        "calibration.seq_len=16")
SWEEP = {"name": "s", "version": "0", "argv": [*TINY, "seed=0,1", "hydra/launcher=basic"], "cwd": "/tmp", "jobs": [
    {"run_id": "0" * 16, "overrides": [*TINY, "seed=0"], "folder": "0" * 16, "slug": "", "save_model": False}]}
MANIFEST = {"inputs": {"a": 1}, "files": {"value.json": {"bytes": 2, "digest": "0" * 16}}, "created": 1.0}
KEY = "0123456789abcdef"

Put = Callable[[Path, bytes], list[tuple[str, ...]]]
"""Puts a damaged file into a folder; the commands that then read it."""


def _plan(at: Path, text: bytes) -> list[tuple[str, ...]]:
    (at / "plan.json").write_bytes(text)
    words = (*TINY, "method=from_plan", f"method.path={at}/plan.json", f"cache.dir={at}/cache")
    return [("slm-exp", *words, f"hydra.run.dir={at}/run"),
            ("slm", "export", f"{at}/plan.json", "--model", "somebody/model")]


def _record(at: Path, text: bytes) -> list[tuple[str, ...]]:
    (at / "run").mkdir()
    (at / "run" / "record.json").write_bytes(text)
    shutil.copy(OLD / "finished" / "similarity.npz", at / "run")
    return [("slm", "tables", "sweep", str(at), "--mixed-protocols", "--format", "md,tex,csv,html", "--out", f"{at}/o"),
            ("slm", "report", f"{at}/run"), ("slm", "compare", f"{at}/run"), ("slm", "sync", str(at), "--dry-run")]


def _sweep(at: Path, text: bytes) -> list[tuple[str, ...]]:
    (at / "sweep.json").write_bytes(text)
    return [("slm", "sweep", "status", str(at)), ("slm", "sweep", "status", "--json", str(at)),
            ("slm", "report", str(at))]


def _path(at: Path, text: bytes) -> list[tuple[str, ...]]:
    shutil.copytree(OLD, at / "s")
    (at / "path.json").write_bytes(text)
    return [("slm", "report", f"{at}/s", "--mixed-protocols", "--path", f"{at}/path.json")]


def _table(at: Path, text: bytes) -> list[tuple[str, ...]]:
    (at / "mine.yaml").write_bytes(text)
    return [("slm", "tables", f"{at}/mine.yaml", str(OLD))]


def _manifest(at: Path, text: bytes) -> list[tuple[str, ...]]:
    entry = at / "cache" / "plan" / KEY
    entry.mkdir(parents=True)
    (entry / "manifest.json").write_bytes(text)
    where = ("--dir", f"{at}/cache")
    return [("slm", "cache", "show", *where), ("slm", "cache", "verify", *where),
            ("slm", "cache", "verify", "--repair", *where),
            ("slm", "plan", *TINY, f"cache.dir={at}/cache", "--tflops", "1")]


FILES: dict[str, tuple[st.SearchStrategy[bytes], Put]] = {
    "plan.json": (wrong(PLANS), _plan), "record.json": (wrong(RECORDS), _record),
    "sweep.json": (wrong([SWEEP]), _sweep), "path.json": (wrong([PATH]), _path),
    "table": (wrong(TABLES, yaml.safe_dump), _table), "manifest.json": (wrong([MANIFEST]), _manifest)}


@pytest.mark.parametrize("name", FILES)
def test_commands(name: str, server: Server, tmp_path_factory: pytest.TempPathFactory) -> None:
    files, put = FILES[name]
    statuses: Counter[int] = Counter()

    @seed(5)
    @settings(max_examples=size(1, 50), deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(text=files)
    def attacked(text: bytes) -> None:
        at = tmp_path_factory.mktemp("attacked")
        for words in put(at, text):
            ended = server.call(*words, cwd=at)
            took = f"{ended.seconds:.1f} s, {ended.computing:.1f} s of them computing"
            said = f"{words}: {ended.status} after {took}: {ended.output[-3000:]}"
            assert ended.status in (0, 1, 2), said
            assert "Traceback" not in ended.output, said
            assert "\x1b" not in ended.output.replace("\x1b[", ""), said
            # of computing, for others may use the machine; what was accepted, a run for example, may take longer
            assert ended.computing < LIMIT_S * (1 if ended.status == 2 else 10), said
            statuses[ended.status] += 1
        shutil.rmtree(at, ignore_errors=True)

    attacked()
    attack.rows.append((f"{name} with one field wrong, through the commands", str(statuses.total()),
                        ", ".join(f"{n} with status {status}" for status, n in sorted(statuses.items()))))


def test_a_sweep_that_was_edited_runs_nothing_of_it(server: Server, tmp_path: Path) -> None:
    """`resume` of a sweep.json that wants a callback: refused, and nothing was called."""
    for override in ("+hydra.callbacks.x={_target_: os.mkdir, path: PLACE}", "+hydra.job_logging.x=1",
                     "hydra.searchpath=[file://PLACE]", "model.trust_remote_code=true"):
        about = {**SWEEP, "argv": [*TINY, override.replace("PLACE", f"{tmp_path}/made")]}
        (tmp_path / "sweep.json").write_text(json.dumps(about))
        for verb in ("resume", "rerun"):
            ended = server.call("slm", "sweep", verb, tmp_path, cwd=tmp_path)
            assert ended.status == 2, ended.output
            assert ended.output.startswith("ConfigError"), ended.output
            assert not (tmp_path / "made").exists()
