"""Texts out of records, paths and the environment do nothing where they are shown, and secrets are not shown."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from importlib.resources import files
from pathlib import Path

import attack
import pytest
from server import Server

from slm_exp.cli import main as cli
from slm_exp.core.secrets import masked

OLD = Path(__file__).parents[1] / "records" / "old"
EVIL = ("\\input{/etc/passwd}", "<img src=x onerror=alert(1)>", "=1+1", "@SUM(1)", "\x1b[2J\x1b]0;title\x07",
        "a_b & c % $x$ #",
        "</td></tr><script>alert(1)</script>", "|x|`y`", "[a](javascript:alert(1))", "\u202egnp.exe",
        "-1+cmd|' /C calc'!A0",
        "\t=1+1", "\r=1+1")  # fmt: skip
PLACES = (("plan", "rule"), ("plan", "method"), ("model", "name"), ("model", "note"), ("config", "kernel", "name"),
          ("config", "merge_rule", "name"), ("device", "name"), ("calibration", "source"), ("git", "commit"),
          ("error", "message"), ("error", "type"), ("run_id",), ("created",), ("command",))  # fmt: skip


def evil_run(at: Path, text: str, status: str) -> Path:
    """A run that has this text at every place where a text may stand."""
    folder = at / "run"
    shutil.copytree(OLD / "finished", folder)
    record = json.loads((folder / "record.json").read_text())
    record |= {"status": status, "warnings": [text], "overrides": [f"a={text}"]}
    record["error"] = {"type": "E", "message": "m", "stage": text}
    for place in PLACES:
        inner = record
        for key in place[:-1]:
            inner[key] = dict(inner.get(key) or {})
            inner = inner[key]
        inner[place[-1]] = text
    (folder / "record.json").write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize("status", ["finished", "failed"])
@pytest.mark.parametrize("text", attack.some(EVIL))
def test_a_text_does_nothing_where_it_is_shown(
    text: str, status: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil_run(tmp_path, text, status)
    shutil.copytree(OLD / "failed", tmp_path / "other")
    for form in ("md", "tex", "csv", "html"):
        assert cli.main(["tables", "sweep", str(tmp_path), "--format", form, "--mixed-protocols"]) == 0
        shown = capsys.readouterr().out
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", shown.replace("\r\n", "\n"))
        if form == "md":
            assert not re.search(r"(?<!\\)<(img|script)|(?<!\\)\]\(javascript", shown)
        if form == "tex":
            assert not re.search(r"(?<!\\)[_#]|\\input\{", re.sub(r"(?m)^%.*", "", shown))
        if form == "csv":
            cells = [cell for row in csv.reader(io.StringIO(shown)) for cell in row]
            assert not [cell for cell in cells if cell[:1] in ("=", "@", "+", "\t", "\r") or re.match(r"-\D", cell)]
        if form == "html":
            own = files("slm_exp.reporting").joinpath("tables.js").read_text("utf-8")
            assert not re.search(r"<(img|script)[ >]", shown.replace(f"<script>\n{own}</script>", "", 1))
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<img src=x" not in page
    assert "alert(1)</script>" not in page


@pytest.mark.parametrize("text", attack.some(EVIL))
def test_a_text_does_nothing_in_the_state_of_a_sweep(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = evil_run(tmp_path, text, "failed")
    (folder / "run.log").write_text(text)
    jobs = [{"run_id": text, "overrides": [f"a={text}"], "folder": name, "slug": text, "save_model": False}
            for name in ("run", f"gone {text[:2]}".replace("/", ""))]
    (tmp_path / "sweep.json").write_text(json.dumps({"argv": [], "cwd": text, "jobs": jobs}))
    cli.main(["sweep", "status", str(tmp_path)])
    cli.main(["sweep", "resume", str(tmp_path)])
    said = capsys.readouterr()
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", said.out + said.err)


ODD_VALUES = (("config.merge_rule.name", 10**100), ("config.method.target_ratio", "x"), ("config.seed", -(10**100)),
              *((f"eval.{side}.tasks.piqa.{name}", value) for side in ("dense", "compressed")
                for name in ("acc", "acc_norm") for value in (1.7e308, -1.7e308, 10**100)),
              *((f"eval.compressed.tasks.piqa.{name}_stderr", value) for name in ("acc", "acc_norm")
                for value in (-1.0, 5e-324, 1e308)))


@pytest.mark.parametrize(("place", "value"), ODD_VALUES)
def test_a_value_that_no_run_has_is_shown(place: str, value: object, tmp_path: Path) -> None:
    """In tables and on pages: found by the attacks at full size."""
    for name in ("odd", "plain"):
        shutil.copytree(OLD / "finished", tmp_path / name)
    record = json.loads((tmp_path / "odd" / "record.json").read_text())
    *path, last = place.split(".")
    inner = record
    for key in path:
        inner = inner[key]
    inner[last] = value
    (tmp_path / "odd" / "record.json").write_text(json.dumps(record))
    words = ("--format", "md,tex,csv,html", "--mixed-protocols", "--out", str(tmp_path / "t"))
    assert cli.main(["tables", "sweep", str(tmp_path), *words]) == 0
    assert cli.main(["report", str(tmp_path), str(tmp_path / "odd"), "--mixed-protocols"]) == 0


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_encoding_of_the_output_will_do(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", out)
    assert cli.main(["tables", "sweep", str(OLD), "--mixed-protocols"]) == 0
    out.seek(0)
    assert "Unverified" in out.read()


# ----------------------------------------------------------------------------------------------------- secrets

SECRETS = {"HF_TOKEN": "hf_abcdefghij", "WANDB_API_KEY": "0123456789wandb", "MY_SECRET": "swordfish1",
           "DB_PASSWORD": "pass word"}


@pytest.mark.parametrize("name", attack.some(list(SECRETS)))
@pytest.mark.parametrize("field", attack.some(["tracking.project", "calibration.path", "cache.dir", "method.path"]))
def test_a_secret_reaches_no_output_and_no_file(
    name: str, field: str, server: Server, tmp_path: Path
) -> None:
    """As a command does: in messages, in the record, its config and its log."""
    words = ["model=tiny", "evaluation=none", "save_model=false", "calibration.n_samples=2", "calibration.seq_len=16",
             f"cache.dir={tmp_path}/cache", f"hydra.run.dir={tmp_path}/run"]
    words += {"tracking.project": ["tracking.mode=disabled"],
              "calibration.path": ["calibration=jsonl", "tracking=none"],
              "cache.dir": ["tracking=none"], "method.path": ["method=from_plan", "tracking=none"]}[field]
    ended = server.call("slm-exp", *words, f"{field}={tmp_path}/${{oc.env:{name}}}", cwd=tmp_path,
                        env={name: SECRETS[name]})
    held = "".join(p.read_text(errors="replace") for p in tmp_path.rglob("*") if p.is_file())
    assert SECRETS[name] not in ended.output
    assert SECRETS[name] not in held


@pytest.mark.parametrize(("text", "shown"), [
    ("https://user:pass@host/x", "https://***@host/x"),
    ("s3://KEY:SE/CRET@bucket", None),
    ("https://user:p%40ss@host:8080/a?b=c", "https://***@host:8080/a?b=c"),
    ("git+ssh://token@github.com/x and https://a:b@c", "git+ssh://***@github.com/x and https://***@c"),
    ("https://host/a@b", "https://host/a@b"), ("me@host.org", "me@host.org"), ("file:///a@b", "file:///a@b"),
    ("${oc.env:SCRATCH}/models", "${oc.env:SCRATCH}/models"),
])  # fmt: skip
def test_credentials_of_an_address(text: str, shown: str | None) -> None:
    assert masked(text) == (text if shown is None else shown)
