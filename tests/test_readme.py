"""Commands that the documents print do what they say."""

import contextlib
import importlib
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest

from slm_exp.cli import main as cli
from slm_exp.core.errors import ConfigError
from slm_exp.launch.jobs import check_all

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "outputs" / "README.md", ROOT / "sweeps" / "README.md",
         *sorted((ROOT / "docs").rglob("*.md"))]
SMALL = ["model=tiny", "evaluation=none", "tracking=none"]
FOREIGN = ("pip", ".", "wandb", "squeue", "sbatch", "export", "eval", "mergekit-yaml", "mergekit-multi")
"""Commands of other tools, which no test runs: where they stand, the page says what came when they were tried."""

PATTERN = r"\.\.\.|\[[A-Za-z ]+\](?: |$)|NAME"
"""In what stands for many commands: `[overrides]`, not `tasks=[piqa]`."""
MULTIRUN = ("-m", "--multirun")


def commands() -> list[tuple[str, str]]:
    """(page, command) for every command line in a ```bash block or in a table's backticks."""
    found = []
    for page in PAGES:
        text = page.read_text()
        lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]
        lines += re.findall(r"`((?:python -m slm_exp|slm-exp|slm|make) [^`]+)`", text)
        found += [(page.name, line.split(" #")[0].strip()) for line in lines if line.strip() and line[0] != "#"]
    return sorted(set(found))


@pytest.mark.parametrize(("page", "command"), commands())
def test_every_command_is_one_that_exists(page, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)
    if "--plugin" in words:
        pytest.skip("tests/test_plugins.py runs it, with the file")
    if "tracking=tensorboard" in words and importlib.util.find_spec("tensorboard") is None:
        pytest.skip("tensorboard is not installed; tests/tracking/test_local_trackers.py runs it")
    if words[:3] == ["python", "-m", "slm_exp"] or words[0] == "slm-exp":
        arguments = words[3:] if words[0] == "python" else words[1:]
        (tmp_path / "texts.jsonl").write_text('{"text": "a"}\n')
        (tmp_path / "text.txt").write_text("a\n")
        for name in re.findall(r"[\w-]+\.npy", command):
            np.save(tmp_path / name, np.arange(512).reshape(2, 256))
        if "FOLDER_OR_REPO" in command or "FOLDER" in command:
            arguments = [a.replace("FOLDER_OR_REPO", "owner/name") for a in arguments]
        if re.search(PATTERN, command):
            pytest.skip("a pattern, not a command")
        if arguments and arguments[0] in ("--help", "--cfg"):
            return
        try:
            check_all([a for a in arguments if a not in MULTIRUN], multirun=bool(set(MULTIRUN) & set(arguments)))
        except ConfigError as error:
            if "needs its weights: `make assets`" not in str(error):
                raise
            pytest.skip("the model's weights are not installed")
    elif words[0] == "python" and words[1].startswith("benchmarks/"):
        script = (ROOT / words[1]).read_text()
        assert all(f'"{word}"' in script for word in words[2:] if word.startswith("--")), command
    elif words[0] == "slm":
        assert words[1] in cli.COMMANDS, command
        if words[1] in ("plan", "path") and not re.search(PATTERN, command) and "table=" not in command:
            check_all([w for w in words[2:] if "=" in w and w[0] != "-"], multirun=words[1] == "plan")
        if len(words) > 2 and not re.search(rf"{PATTERN}|\|", command):
            with contextlib.suppress(click.exceptions.Exit):  # --help
                main, rest = importlib.import_module(f"slm_exp.cli.{words[1]}").main, words[2:]
                while rest:  # a group passes what is left on to its subcommand
                    ctx = main.make_context(words[1], rest)
                    if not isinstance(main, click.Group) or not ctx._protected_args:
                        break
                    _, main, rest = main.resolve_command(ctx, [*ctx._protected_args, *ctx.args])
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), command
    elif words[0] not in FOREIGN and not (words[0] == "python" and words[1].startswith("llama.cpp/")):
        pytest.fail(f"{page}: {command}: a command this test does not know")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", page.read_text())
    for target, anchor in links:
        if "://" in target:
            continue
        there = (page.parent / target) if target else page
        assert there.exists(), f"{page.name} links to {target}"
        if anchor:
            heads = re.findall(r"^#+ (.*)$", there.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", head).lower().replace(" ", "-") for head in heads}, anchor


def test_the_readme_run_runs(tmp_path):
    """The README's own example, on the random model, as a user types it."""
    command = next(c for page, c in commands() if page == "README.md" and "kernel=rbf similarity=cka" in c)
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "slm_exp"]
    done = subprocess.run([sys.executable, *words[1:], *SMALL, f"cache.dir={tmp_path / 'cache'}"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=300, env=_env())
    assert done.returncode == 0, done.stderr
    (record,) = tmp_path.glob("outputs/*/record.json")
    assert (record.parent / "report.html").is_file()
    again = subprocess.run([sys.executable, *words[1:], *SMALL, f"cache.dir={tmp_path / 'cache'}"], cwd=tmp_path,
                           capture_output=True, text=True, timeout=300, env=_env())
    assert again.returncode == 0
    assert "finished" in again.stdout
    report = subprocess.run([sys.executable, "-m", "slm_exp.cli", "report", str(record.parent)], cwd=tmp_path,
                            capture_output=True, text=True, timeout=300, env=_env())
    assert report.returncode == 0, report.stderr


def test_the_readmes_method_runs_as_it_stands(tmp_path):
    """The block as a module of its own, then a run of it: what a user who pastes it gets."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    run = [*SMALL, "method=middle", "method.target_layers=6", f"cache.dir={tmp_path / 'cache'}", "save_model=false"]
    program = f"{block}\n\nimport sys\nfrom slm_exp.cli.run import main\n\nsys.exit(main({run!r}))\n"
    (tmp_path / "mine.py").write_text(program)
    done = subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300,
                          env=_env())
    assert done.returncode == 0, done.stderr
    (record,) = tmp_path.glob("outputs/*/record.json")
    assert json.loads(record.read_text())["plan"]["dropped"] == [3, 4]


CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
OWN = {"kernel": "triangle", "similarity": "last_token", "merge_rule": "ends", "method": "alone", "width": "low_first",
       "recovery": "gain"}  # fmt: skip
PROGRAM = """
import json, sys
import {modules}
heavy = [name for name in ("torch", "transformers", "lm_eval", "wandb") if name in sys.modules]
from slm_exp.cli.plan import make_plan
from slm_exp.cli.run import main
(job,) = make_plan({forecast!r}, tflops=1.0).jobs
heavy += [name for name in ("torch", "transformers", "lm_eval", "wandb") if name in sys.modules]
print(json.dumps([heavy, job.problem, job.layers, job.block_forwards]))
sys.exit(main({merged!r}) or main({removed!r}))
"""


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """What a plan and two runs leave that use every member of CONTRIBUTING's files: (the plan's line, records)."""
    folder = tmp_path_factory.mktemp("members")
    blocks = re.findall(r"```python\n(.*?)```", CONTRIBUTING, re.S)
    for i, block in enumerate(blocks):
        (folder / f"own_{i}.py").write_text(block)
    common = [*SMALL, f"cache.dir={folder / 'cache'}", "save_model=false", "runtime=cpu"]
    merged = [*common, "kernel=triangle", "similarity=last_token", "merge_rule=ends", "method.threshold=0.3",
              f"hydra.run.dir={folder / 'merged'}"]  # fmt: skip
    removed = [*common, "method=alone", "method.target_layers=6", "width=low_first", "recovery=gain",
               f"hydra.run.dir={folder / 'removed'}"]  # fmt: skip
    modules = ", ".join(f"own_{i}" for i in range(len(blocks)))
    program = PROGRAM.format(modules=modules, forecast=removed, merged=merged, removed=removed)
    (folder / "mine.py").write_text(program)
    done = subprocess.run([sys.executable, "mine.py"], cwd=folder, capture_output=True, text=True, timeout=300,
                          env=_env())
    assert done.returncode == 0, done.stderr
    planned = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[[")))
    return planned, *(json.loads((folder / name / "record.json").read_text()) for name in ("merged", "removed"))


def test_the_files_of_contributing_declare_one_member_of_each_kind():
    assert dict(re.findall(r'@register\("(\w+)", "(\w+)"\)', CONTRIBUTING)) == OWN


def test_the_files_of_contributing_run_as_they_stand(members):
    _, merged, removed = members
    of_merged, of_removed = ("kernel", "similarity", "merge_rule"), ("method", "width", "recovery")
    for record, groups in ((merged, of_merged), (removed, of_removed)):
        assert record["status"] == "finished"
        assert {group: record["config"][group]["name"] for group in groups} == {group: OWN[group] for group in groups}
    assert merged["plan"]["groups"]
    assert merged["plan"]["rule"] == "ends"
    assert removed["layers"] == {"before": 8, "after": 6}
    scores = {trial["low"]: trial["score"] for trial in removed["plan"]["trace"]}
    assert removed["plan"]["dropped"] == sorted(sorted(scores, key=lambda i: -scores[i])[:2])
    assert removed["plan"]["width"]["method"] == "low_first"
    assert removed["recovery"]["factor"] == 1.05


def test_the_files_of_contributing_load_nothing_heavy_and_are_forecast(members):
    (heavy, problem, layers, block_forwards), _, removed = members
    assert heavy == []
    assert not problem
    assert layers == 6
    assert block_forwards == pytest.approx(removed["plan"]["block_forwards"], rel=0.25)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`(?:slm_exp/)?([\w/]+/\w+\.py)`", CONTRIBUTING))))
def test_files_that_contributing_names_exist(path):
    assert (ROOT / "slm_exp" / path).is_file() or (ROOT / path).is_file()


def _env() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}
