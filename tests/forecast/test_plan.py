"""`slm plan`: jobs, cache hits and sizes, known without weights and without torch."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from builders.runs import tiny_run
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

from slm_exp.cli.plan import main
from slm_exp.core.errors import ConfigError
from slm_exp.forecast import plan
from slm_exp.launch.compose import Composer, compose_raw, conf_dir, open_mappings, prepare_hydra
from slm_exp.launch.hydra_compat import session
from slm_exp.launch.jobs import command_jobs
from slm_exp.models.sizes import LLAMA2_7B
from slm_exp.tables import definition

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["model=tiny", "model.layers=5", "calibration.n_samples=2", "calibration.seq_len=32", "tracking=none"]
NO_TORCH = """
import sys
from slm_exp.cli.plan import main
assert main([*sys.argv[2:], "model=tiny", "--tflops", "1"]) == 0
heavy = [m for m in ("torch", "transformers", "datasets", "wandb", "lm_eval", "matplotlib") if m in sys.modules]
assert main([*sys.argv[2:], "model=hf", "model.path=" + sys.argv[1], "--tflops", "1"]) == 0
print(heavy + [m for m in ("datasets", "wandb", "lm_eval", "matplotlib") if m in sys.modules])
"""


@pytest.fixture
def call(tmp_path):
    """Overrides with folders of this test."""
    np.save(tmp_path / "t.npy", np.arange(64).reshape(2, 32))
    return [*QUICK, "evaluation=none", f"evaluation.corpora.x={tmp_path / 't.npy'}", f"cache.dir={tmp_path / 'cache'}",
            f"hydra.run.dir={tmp_path / 'run'}", f"hydra.sweep.dir={tmp_path / 'sweep'}"]  # fmt: skip


def planned(call, *more, **kwargs):
    return plan.make_plan([*call, *more], tflops=1.0, **kwargs)


def run(call, *more):
    overrides = [o for o in [*call, *more] if not o.startswith("hydra")]
    folder = next(Path(o.partition("=")[2]) for o in call if o.startswith("hydra.run.dir"))
    return tiny_run(folder, *overrides)


def test_no_weights_are_read(tmp_path):
    """Of a model in a folder: transformers looks at its config, and nobody at 27 GB of weights, here all holes."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA2_7B))
    square, wide = [4096, 4096], [11008, 4096]
    layer = {**{f"self_attn.{x}_proj": square for x in "qkvo"}, "mlp.gate_proj": wide, "mlp.up_proj": wide,
             "mlp.down_proj": wide[::-1], "input_layernorm": [4096], "post_attention_layernorm": [4096]}  # fmt: skip
    shapes = {"model.embed_tokens": [32000, 4096], "lm_head": [32000, 4096], "model.norm": [4096],
              **{f"model.layers.{i}.{name}": shape for i in range(32) for name, shape in layer.items()}}  # fmt: skip
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        header[f"{name}.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + at)
    done = subprocess.run([sys.executable, "-c", NO_TORCH, str(tmp_path), f"cache.dir={tmp_path / 'c'}"], cwd=ROOT,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert "32 layers, 6,738.4 M parameters" in done.stdout
    assert "have not been read on this machine yet" in done.stdout


def test_weights_that_are_cut_off_are_known_by_their_header(tmp_path, make_tiny):
    make_tiny().model.save_pretrained(tmp_path)
    with open(tmp_path / "model.safetensors", "r+b") as f:
        f.truncate(1000)
    with pytest.raises(ConfigError, match=r"model.safetensors has no safetensors header|its header counts"):
        plan.make_plan(["model=hf", f"model.path={tmp_path}", "tracking=none"], tflops=1.0)


def test_a_run_that_was_made_is_finished_and_its_stages_are_hits(call, tmp_path):
    before = planned(call).jobs[0]
    assert before.state == "waiting"
    assert before.layers is None
    assert before.bounds == (2, 5)
    assert before.stages["plan"] == before.stages["similarity"] == "compute"
    record = run(call)
    assert planned(call, "save_model=false").jobs[0].state == "finished"
    (tmp_path / "run" / "record.json").unlink()
    after = planned(call, "save_model=false").jobs[0]
    assert after.state == "waiting"
    assert after.layers == record["layers"]["after"]
    assert after.params == record["params"]["after"]
    for stage in ("calibrate", "similarity", "evaluate_dense", "plan", "evaluate"):
        assert after.stages[stage] == "cached", stage
    assert after.stages["load"] == "-"


def test_known_scores_tell_the_plan_of_another_threshold(call):
    threshold = 0.9
    record = run(call, f"method.threshold={threshold}")
    other = planned(call, f"method.threshold={np.nextafter(threshold, 1)}").jobs[0]
    assert other.stages["plan"] == "compute"
    assert (other.layers, other.known) == (record["layers"]["after"], "from scores in the cache")
    assert other.stages["evaluate"] == "cached"


def test_width_hits_are_known(call):
    run(call, "width=magnitude")
    after = planned(call, "width=magnitude", "save_model=false", "seed=0").jobs[0]
    assert after.state == "finished"
    run_dir = next(o for o in call if o.startswith("hydra.run.dir")).partition("=")[2]
    (Path(run_dir) / "record.json").unlink()
    after = planned(call, "width=magnitude", "save_model=false").jobs[0]
    assert after.stages["width"] == "cached"
    assert after.stages["evaluate"] == "cached"  # the decision gives the narrower model's digest


def test_a_grid_shares_what_its_jobs_have_in_common(call):
    grid = planned(call, "method.target_layers=4,3", "merge_rule=top_layer,mean")
    assert len(grid.jobs) == 4
    assert [j.stages["evaluate_dense"] for j in grid.jobs] == ["compute", "shared", "shared", "shared"]
    assert [j.stages["calibrate"] for j in grid.jobs].count("compute") == 1
    assert [j.stages["evaluate"] for j in grid.jobs] == ["compute"] * 4
    assert [j.layers for j in grid.jobs] == [4, 4, 3, 3]
    assert grid.seconds == pytest.approx(sum(j.total for j in grid.jobs))
    shown = plan.show(grid)
    assert "4 jobs" in shown
    assert len(shown.splitlines()) < 45
    about = json.loads(json.dumps(grid.to_json()))
    assert about["totals"]["jobs"] == 4
    assert about["jobs"][0]["params"] == grid.jobs[0].params


def test_models_of_plans_that_only_the_search_decides_are_not_one_model(call):
    grid = planned(call, "method.threshold=0.95,0.8,0.7")
    assert [j.stages["evaluate"] for j in grid.jobs] == ["compute"] * 3


def test_nothing_is_shared_with_a_finished_job_whose_cache_is_gone(call, tmp_path):
    grid = "method.target_layers=4,3"
    first = planned(call, grid).jobs[0].job
    tiny_run(first.folder, *(o for o in [*call, "method.target_layers=4"] if not o.startswith("hydra")))
    shutil.rmtree(tmp_path / "cache")
    jobs = planned(call, grid).jobs
    assert [job.state for job in jobs] == ["finished", "waiting"]
    assert {jobs[1].stages[name] for name in ("calibrate", "similarity", "evaluate_dense", "plan")} == {"compute"}


@pytest.mark.parametrize("first", ["slm", "shortgpt"])
def test_what_may_be_in_the_cache_does_not_depend_on_the_jobs_before(call, tmp_path, first):
    """Each method's plans are current by that method's own code."""
    run(call, "method=shortgpt", "method.target_layers=4")
    (tmp_path / "run" / "record.json").unlink()
    shutil.rmtree(tmp_path / "cache" / "calibrate")  # without tokens no key is known
    second = "shortgpt" if first == "slm" else "slm"
    jobs = planned(call, f"method={first},{second}", "method.target_layers=4").jobs
    states = {name: job.stages["plan"] for name, job in zip((first, second), jobs, strict=True)}
    assert states == {"slm": "compute", "shortgpt": "unknown"}


@pytest.mark.parametrize(
    "overrides",
    [
        ["method.threshold=0.9,0.8", "kernel=rbf"],
        ["kernel=rbf,linear", "evaluation.corpora={x: y.txt}", "hydra.launcher.workers=2"],
        ["sweep=threshold_rule", "seed=1,2"],
        ["hydra.sweep.dir=x", "seed=1,2"],
    ],
)
def test_a_grid_lies_where_the_run_puts_it(overrides, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("y.txt").write_text("a text")
    prepare_hydra()
    with session(str(conf_dir())):
        loader = GlobalHydra.instance().hydra
        whole = loader.compose_config("config", open_mappings(overrides), run_mode=RunMode.MULTIRUN)
        where = Path(str(whole.hydra.sweep.dir))
    assert command_jobs(overrides, identify=lambda cfg: "").folder == where


SWEEPS = {"calibration_seeds": 10, "kernel_rule": 18, "kernel_threshold": 9, "ratio_rule": 9,
          "threshold_kernel_rule": 45, "threshold_rule": 18}  # fmt: skip
"""Cells of every preset, multiplied by hand."""


def test_every_sweep_preset_is_counted():
    assert set(SWEEPS) == {path.stem for path in (conf_dir() / "sweep").glob("*.yaml")} - {"search"}


@pytest.mark.parametrize(("name", "n"), SWEEPS.items())
def test_every_sweep_preset_plans(name, n):
    command = [f"sweep={name}", "model=tiny", "evaluation=none"]
    grid = plan.make_plan(command, tflops=1.0)
    assert len(grid.jobs) == n
    assert [job.problem for job in grid.jobs if job.problem] == []
    assert grid.folder == Path(compose_raw(command, with_hydra=True).hydra.sweep.dir)
    assert grid.folder.name.startswith(f"{name}-")


@pytest.mark.parametrize(("order", "layers"), [("after", 26), ("before", 25)])  # a narrower layer holds less
@pytest.mark.parametrize("method", ["slm", "shortgpt"])
def test_a_target_that_depth_and_width_share_is_one(order, layers, method):
    asked = ["evaluation=none", f"method={method}", "method.target_ratio=0.2105", "width=flap", "width.share=0.5"]
    job = plan.make_plan([*asked, f"width.order={order}"], tflops=1.0).jobs[0]
    assert job.layers == layers
    assert job.params == pytest.approx(134_515_008 * (1 - 0.2105), rel=1e-3)


def test_what_would_fail_is_said_and_ends_with_status_2(call, capsys):
    assert main([*call, "method.target_layers=99", "--tflops", "1"]) == 2
    assert "WOULD FAIL: method.target_layers = 99" in capsys.readouterr().out


def test_a_wrong_call_is_a_config_error(call):
    with pytest.raises(ConfigError, match="Did you mean threshold"):
        planned(call, "method.treshold=0.8")
    with pytest.raises(ConfigError, match="--tflops = -1"):
        main(["--tflops", "-1"])
    with pytest.raises(ConfigError, match=r"job .*1\.9"):
        planned(call, "method.threshold=0.9,1.9")


def test_large_models_plan_without_the_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    grid = plan.make_plan(["model=llama2_7b", "method.target_layers=26", "runtime=cuda"], tflops=300.0)
    (job,) = grid.jobs
    assert grid.device == "cuda"
    assert job.params == pytest.approx(0.82 * 6_738_415_616, rel=2e-3)
    assert grid.to_json()["totals"]["gpu_hours"] == pytest.approx(job.total / 3600)
    assert job.total > 0
    assert 13e9 < grid.device_memory < 20e9
    call = ["model=llama2_7b", "method.target_layers=26", "runtime=cuda", "evaluation=speed"]
    timed = plan.make_plan(call, tflops=300.0)
    assert timed.jobs[0].seconds["evaluate"] < 900, "a token reads 13 GB, by a GPU's memory"


COMPOSER = Composer()
"""What it makes is what Hydra makes of the same words: tests/launch/test_jobs.py."""


@pytest.mark.parametrize("name", definition.table_names())
def test_a_table_plans_the_jobs_that_fill_it(name, tmp_path):
    own = f"cache.dir={tmp_path}"
    grid = plan.make_plan([f"table={name}", own], tflops=1.0)
    planned_jobs = sorted(sorted(set(job.job.overrides) - {own}) for job in grid.jobs)
    cells = sorted(map(sorted, definition.cells(name)), reverse=True)
    cells = {COMPOSER.run_config(cell).run_id: cell for cell in cells}
    assert planned_jobs == sorted(cells.values())  # published sets that are equal are one run
    assert all(own in job.job.overrides for job in grid.jobs)
    assert not [job.problem for job in grid.jobs if job.problem]
    assert grid.folder == Path("outputs/multirun") / name


def test_a_table_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="table"):
        plan.make_plan(["table=no_such_table"], tflops=1.0)


def test_scores_of_another_similarity_do_not_tell_a_plan(call):
    """After a run by token_cosine, the forecast of one that scores refitted candidates must not quote its scores."""
    run(call, "similarity=token_cosine")
    refit = ["similarity=token_cosine", "similarity.after=reconstruct", "similarity.fit_samples=4",
             "similarity.fit_seq_len=32"]  # fmt: skip
    forecast = planned(call, *refit).jobs[0]
    assert forecast.stages["plan"] == "compute"
    assert forecast.layers is None
    assert forecast.known == ""


def test_a_table_of_times_is_found_however_the_threads_are_set(call, monkeypatch):
    """By the setting, the environment, or the share of a pool's worker: the threads of the process that will run it."""
    timed = ["method=shortgpt", "method.target_latency=80%"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run(call, *timed)

    def latency(*more, **kwargs):
        return {job.stages["latency"] for job in planned(call, *timed, *more, **kwargs).jobs}

    assert latency() == {"cached"}
    assert latency("runtime.threads=1") == {"cached"}
    assert latency("runtime.threads=2") == {"compute"}
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert latency("runtime.threads=1") == {"cached"}
    assert latency("method.protect_last=0,1", "hydra.launcher.threads=1", multirun=True) == {"cached"}
