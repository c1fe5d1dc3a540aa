"""Quick start: what only composes, refuses, forecasts or completes loads no torch, transformers, lm-eval or wandb."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slm_exp.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "lm_eval", "wandb", "datasets", "peft", "matplotlib")
TINY = ["model=tiny", "evaluation=none", "tracking=none"]
COMPLETE = {"_SLM_COMPLETE": "bash_complete", "COMP_WORDS": "slm plan kernel=rb", "COMP_CWORD": "2"}
QUERY = {"COMP_LINE": "slm-exp kernel=rb"}
CALLS: dict[str, tuple[str, list[str], dict[str, str], int]] = {  # name -> (program, words, environment, exit status)
    "slm-exp --help": ("run", ["--help"], {}, 0),
    "slm-exp --cfg job": ("run", ["--cfg", "job", "method.threshold=0.7"], {}, 0),
    "slm-exp -m --cfg job": ("run", ["-m", "merge_rule=mean,keep_low", "--cfg", "job"], {}, 0),
    "slm-exp completes": ("run", ["-sc", "query=bash"], QUERY, 0),
    "slm-exp refuses a member": ("run", ["kernel=rbff"], {}, 2),
    "slm-exp refuses a field": ("run", ["method.treshold=1"], {}, 2),
    "slm-exp refuses a value": ("run", ["method.threshold=1.9"], {}, 2),
    "slm-exp refuses a cell": ("run", ["-m", "method.threshold=0.9,1.9"], {}, 2),
    "slm --help": ("main", ["--help"], {}, 0),
    **{f"slm {name} --help": ("main", [name, "--help"], {}, 0) for name in COMMANDS},
    "slm refuses": ("main", ["plna"], {}, 2),
    "slm plan refuses": ("main", ["plan", "kernel=rbff"], {}, 2),
    "slm path refuses": ("main", ["path", "method.treshold=1"], {}, 2),
    "slm sweep refuses": ("main", ["sweep", "resume", "/nowhere"], {}, 2),
    "slm completion": ("main", ["completion", "bash"], {}, 0),
    "slm completes": ("main", [], COMPLETE, 0),
    "slm plan": ("main", ["plan", *TINY, "--tflops", "1"], {}, 0),
    "slm plan of a grid": ("main", ["plan", *TINY, "merge_rule=mean,top_layer", "--tflops", "1"], {}, 0),
}
PROGRAM = """
import contextlib, importlib, io, json, os, sys
heavy, calls = json.loads(sys.argv[1]), json.loads(sys.argv[2])
results = {}
for name, (program, words, environment, _) in calls.items():
    os.environ.update(environment)
    out, err = io.TextIOWrapper(io.BytesIO()), io.TextIOWrapper(io.BytesIO())
    before = set(sys.modules)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = importlib.import_module(f"slm_exp.cli.{program}").main(words)
        except SystemExit as end:
            status = end.code
    for variable in environment:
        del os.environ[variable]
    loaded = [module for module in heavy if module in sys.modules and module not in before]
    shown = []
    for stream in (out, err):
        stream.flush()
        shown.append(stream.buffer.getvalue().decode())
    results[name] = [status or 0, loaded, *shown]
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """How every call ended: (status, heavy modules that it was the first to load, stdout, stderr); in one process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SLM_EXP_CACHE": str(tmp_path_factory.mktemp("cache"))}
    done = subprocess.run([sys.executable, "-c", PROGRAM, json.dumps(HEAVY), json.dumps(CALLS)], capture_output=True,
                          text=True, cwd=tmp_path_factory.mktemp("work"), env=environment)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


@pytest.mark.parametrize("call", CALLS)
def test_a_call_loads_nothing_heavy(call: str, ended: dict[str, Any]) -> None:
    status, loaded, out, err = ended[call]
    assert loaded == []
    assert status == CALLS[call][-1], err
    if status:
        assert err.count("\n") == 1, err
    else:
        assert out.strip()


def test_completions_are_those_of_the_word(ended: dict[str, Any]) -> None:
    assert ended["slm completes"][2].split() == ["plain,rbf"]
    assert "kernel=rbf" in ended["slm-exp completes"][2].split()


@pytest.mark.parametrize("path", sorted([*ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/*.py")]),
                         ids=lambda p: p.relative_to(ROOT).as_posix())  # fmt: skip
def test_what_tests_and_benchmarks_import_exists(path: Path) -> None:
    """Imports in functions too, and of tests that only a mark or an environment variable runs."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "slm_exp":
            try:
                module = importlib.import_module(str(node.module))
            except ModuleNotFoundError as error:
                if str(error.name).startswith("slm_exp"):
                    raise
                pytest.skip(f"{error.name}, an optional requirement, is not installed")
            for name in (alias.name for alias in node.names):
                assert hasattr(module, name) or importlib.import_module(f"{node.module}.{name}"), (node.lineno, name)
        elif isinstance(node, ast.Import):
            for name in (alias.name for alias in node.names if alias.name.split(".")[0] == "slm_exp"):
                assert importlib.import_module(name), node.lineno
