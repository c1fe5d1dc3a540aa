"""A W&B sweep of thresholds by W&B's own agent, offline: what it starts, and the runs as a server would get them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from readback import read_run, records

ROOT = Path(__file__).resolve().parents[2]
AGENT = """
import json, sys
from wandb.wandb_agent import Agent
command, runs = json.loads(sys.argv[1])
agent = Agent(None, None, sweep_id="thresholds")
agent._sweep_command = command
for run in runs:  # as the server sends them
    said = agent._process_command({"type": "run", "program": "slm-exp", **run})
    assert "exception" not in said, said
    assert agent._run_processes[run["run_id"]].wait() == 0, run
"""


@pytest.mark.slow
def test_an_agents_runs_are_the_sweeps_under_its_ids(tmp_path: Path) -> None:
    told = yaml.safe_load((ROOT / "sweeps" / "threshold_rule.yaml").read_text())
    told["parameters"] = {"method.threshold": {"values": [0.9, 0.5]}, "model": {"value": "tiny"},
                          "evaluation.tasks": {"value": "[]"}, "calibration.n_samples": {"value": 4},
                          "calibration.seq_len": {"value": 32}}  # fmt: skip
    fixed = {key: of for key, of in told["parameters"].items() if "value" in of}
    runs = [{"run_id": f"run{i}", "args": {"method.threshold": {"value": threshold}, **fixed}}
            for i, threshold in enumerate(told["parameters"]["method.threshold"]["values"])]  # fmt: skip
    env = {**os.environ, "WANDB_MODE": "offline", "WANDB_SWEEP_ID": "thresholds", "WANDB_PROJECT": told["project"],
           "WANDB_ENTITY": "us", "PYTHONPATH": str(ROOT), "SLM_EXP_CACHE": str(tmp_path / "cache"),
           "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", AGENT, json.dumps([told["command"], runs])], env=env, cwd=tmp_path,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr

    sent = {run.id: (run, folder) for folder in tmp_path.rglob("offline-run-*") if (run := read_run(folder))}
    assert set(sent) == {"run0", "run1"}
    for i, threshold in enumerate((0.9, 0.5)):
        run, folder = sent[f"run{i}"]
        record = json.loads((folder.parents[1] / "record.json").read_text())
        assert record["status"] == "finished"
        assert record["config"]["method"]["threshold"] == threshold
        assert run.config["run_id"] == record["run_id"] == folder.parents[1].name
        assert run.config["method.threshold"] == threshold, "the sweep's own value, which its charts group by"
        assert (run.project, run.entity, run.exit_code) == ("slm_exp", "us", 0)
        assert run.summary["layers/after"] == record["layers"]["after"]
        (news,) = (run.summary[key] for key in run.summary if key.endswith("compressed/perplexity/news"))
        assert news == record["eval"]["compressed"]["perplexity"]["news"]
        (begun,) = (r.run for r in records(next(folder.glob("*.wandb"))) if r.WhichOneof("record_type") == "run")
        assert begun.sweep_id == "thresholds"
        assert len(begun.display_name) <= 128
