"""`slm plan [overrides]`: what a run or a grid would do and cost, before anything is loaded.

Jobs, which of them are finished, cache hits by stage, layers and parameters before and after, operations, memory, time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_exp.cli.parser import Parser
from slm_exp.core.errors import ConfigError, SlmError

if TYPE_CHECKING:
    from slm_exp.forecast.hits import Lookup, Outline
    from slm_exp.forecast.shapes import Sketch
    from slm_exp.forecast.speed import Machine
    from slm_exp.forecast.work import Work
    from slm_exp.pipeline.config import RunConfig
    from slm_exp.runs.sweep import Job

ROWS = 12
"""Jobs shown one by one."""


def parser() -> Parser:
    """The command line of `slm plan`."""
    p = Parser(
        "plan", __doc__,
        examples={
            "slm plan": "the defaults",
            "slm plan method.threshold=0.9,0.8 merge_rule=top_layer,mean": "a grid: 4 jobs",
            "slm plan sweep=threshold_rule --json": "for programs",
            "slm plan model=llama2_7b runtime=cuda --tflops 300": "for a machine that sustains 300 TFLOP/s",
        },
        exits={0: "every job could start", 1: "a job would fail before its weights load; says which and why",
               2: "a wrong call"},
        notes="The overrides are those of a run; comma lists, sweep=NAME and -m make a grid, table=NAME the jobs that "
              "fill a table. Sizes that only a search can tell are shown as bounds. Times are those of a "
              "machine left alone, from speeds measured once (ten seconds) and kept in the cache.",
    )  # fmt: skip
    p.add_argument("overrides", nargs="*", help="as of a run: group=member, group.field=value", metavar="OVERRIDE")
    p.add_argument("-m", "--multirun", action="store_true", help="a grid, also where nothing is swept")
    p.add_argument("--json", action="store_true", help="everything, for programs")
    p.add_argument("--tflops", type=float, metavar="N", help="for a machine that sustains N TFLOP/s; measure nothing")
    p.add_argument("--measure", action="store_true", help="measure this machine's speed anew")
    return p


def main(argv: Sequence[str]) -> int:
    """See `slm plan --help`."""
    args = parser().parse_intermixed_args(list(argv))
    if args.tflops is not None and args.tflops <= 0:
        raise ConfigError(f"--tflops = {args.tflops}; expected a number > 0.")
    found = make_plan(args.overrides, args.multirun, args.tflops, args.measure)
    print(json.dumps(found.to_json(), indent=1) if args.json else show(found))
    return int(any(job.problem for job in found.jobs))


@dataclass
class JobPlan:
    """What one job would do and cost."""

    job: Job
    state: str
    """As `slm sweep status` says it: finished, failed, died, running, waiting."""
    stages: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    """By stage; empty where the time is not known."""
    layers: int | None = None
    """Left in the compressed model, where it is known."""
    bounds: tuple[int, int] | None = None
    """Fewest and most layers a search may leave."""
    known: str = ""
    """How the size is known."""
    params: int | None = None
    flops_per_token: float | None = None
    flops: float = 0
    block_forwards: float | None = None
    problem: str = ""
    """Why it would fail before its weights load."""
    notes: list[str] = field(default_factory=list)

    @property
    def total(self) -> float | None:
        return sum(self.seconds.values()) if self.seconds or self.state == "finished" else None


@dataclass
class GridPlan:
    """The whole command."""

    folder: Path
    multirun: bool
    jobs: list[JobPlan]
    models: list[Sketch]
    device: str
    workers: int
    threads: int
    machine: Machine | None
    memory: float = 0
    """Bytes of the largest job's process."""
    verifying: float = 0
    """More of them while a checkpoint is verified by a second process."""
    device_memory: float = 0
    seq_len: int = 128
    notes: list[str] = field(default_factory=list)

    @property
    def to_run(self) -> list[JobPlan]:
        return [j for j in self.jobs if j.state != "finished"]

    @property
    def seconds(self) -> float | None:
        """Of all jobs together; None where a job's time is not known."""
        times = [j.total for j in self.to_run]
        return None if any(t is None for t in times) else sum(t for t in times if t is not None)

    @property
    def wall(self) -> float | None:
        """With the workers there are."""
        if self.seconds is None:
            return None
        longest = max((j.total or 0 for j in self.to_run), default=0.0)
        return max(longest, self.seconds / max(1, min(self.workers, len(self.to_run))))

    def to_json(self) -> dict[str, Any]:
        """Everything, for programs."""
        from slm_exp.core.files import plain

        total = self.seconds
        hours = None if total is None else total / 3600
        return plain({  # type: ignore[no-any-return]
            "folder": str(self.folder), "multirun": self.multirun, "device": self.device,
            "workers": self.workers, "threads": self.threads,
            "models": [{"name": m.name, "dtype": m.dtype, "digest": None if m.digest.startswith("?") else m.digest,
                        **({"layers": m.sizes.n_layers, "params": m.sizes.total, "bytes": m.bytes,
                            "flops_per_token": m.sizes.flops_per_token(self.seq_len)} if m.sizes else {})}
                       for m in self.models],
            "jobs": [{"run_id": j.job.run_id or None, "overrides": list(j.job.overrides), "folder": str(j.job.folder),
                      "state": j.state, "problem": j.problem or None, "layers": j.layers, "bounds": j.bounds,
                      "known": j.known or None, "params": j.params, "flops_per_token": j.flops_per_token,
                      "flops": j.flops, "block_forwards": j.block_forwards,
                      "stages": [{"name": n, "state": s, "seconds": j.seconds.get(n)} for n, s in j.stages.items()],
                      "seconds": j.total, "notes": j.notes} for j in self.jobs],
            "totals": {"jobs": len(self.jobs), "finished": len(self.jobs) - len(self.to_run),
                       "seconds": self.wall, "hours_of_work": hours,
                       "gpu_hours": hours if self.device == "cuda" else 0,
                       "core_hours": None if hours is None or self.device == "cuda" else hours * self.threads,
                       "flops": sum(j.flops for j in self.to_run), "memory_bytes": self.memory,
                       "verification_bytes": self.verifying, "device_memory_bytes": self.device_memory},
            "machine": asdict(self.machine) if self.machine else None, "notes": self.notes,
        })  # fmt: skip


def make_plan(
    overrides: Sequence[str], multirun: bool = False, tflops: float | None = None, anew: bool = False
) -> GridPlan:
    """Compose every job, ask the cache, count, and estimate.

    Raises:
        ConfigError: as the run itself would; names the job.
    """
    from slm_exp.forecast.hits import Lookup
    from slm_exp.forecast.shapes import sketch
    from slm_exp.forecast.speed import machine, told
    from slm_exp.launch.workers import cores, visible_gpus

    grid, made, hydra = compose(overrides, multirun)
    cfg = made[0][1]
    asked = cfg.model.device or cfg.runtime.device
    gpus = visible_gpus() if asked != "cpu" else []
    device = "cuda" if asked.startswith("cuda") or (asked == "auto" and gpus) else "cpu"
    grid.device = device
    here = device == "cpu" or bool(gpus)
    grid.workers, grid.threads = _workers([c for _, c in made], hydra, gpus, grid.multirun) if here else (1, cores())
    sketches: dict[str, Sketch] = {}
    lookup = Lookup(Path(cfg.cache.dir) if cfg.cache.enabled else None)
    for job, cfg in made:
        named = repr(cfg.model)
        if named not in sketches:
            sketches[named] = sketch(cfg.model, Path(cfg.cache.dir), device)
            grid.notes += sketches[named].notes
        grid.jobs.append(_job_plan(job, cfg, sketches[named], device, lookup))
    grid.models = list(sketches.values())
    first = grid.models[0]
    if tflops is not None:
        grid.machine = told(tflops, device, first.dtype)
    elif here:
        grid.machine = machine(Path(cfg.cache.dir), device, first.dtype, grid.threads, anew)
    else:
        grid.notes.append("no GPU is visible here, so times are not known: --tflops N gives those of a machine that "
                          "sustains N TFLOP/s.")  # fmt: skip
    for plan, (_, cfg) in zip(grid.jobs, made, strict=True):
        _cost(grid, plan, cfg, sketches[repr(cfg.model)])
    grid.notes += dict.fromkeys(note for plan in grid.to_run for note in plan.notes)
    searches = sum(plan.bounds is not None and plan.stages.get("plan") == "compute" for plan in grid.to_run)
    if searches > 1:
        grid.notes.append("searches of one model, rule and similarity share scores, which is not counted: it is less.")
    return grid


def compose(overrides: Sequence[str], multirun: bool) -> tuple[GridPlan, list[tuple[Job, RunConfig]], Any]:
    """The jobs of a command line as the run itself would make them, and Hydra's own settings."""
    from slm_exp.launch import compose as door
    from slm_exp.pipeline.config import to_run_config
    from slm_exp.runs.sweep import Job
    from slm_exp.runs.tracking.wandb import slug

    table, cells = _of_table(overrides)
    if cells is not None:
        overrides = [o for o in overrides if o.startswith("hydra")]
    swept = [o for o in overrides if not o.startswith("hydra.") and door.is_sweep(o)]
    whole = door.compose_raw([o for o in overrides if o not in swept], with_hydra=True)
    multirun = multirun or bool(swept) or cells is not None or str(whole.hydra.mode).endswith("MULTIRUN")
    if not multirun:
        cfg = to_run_config(door.science_only(whole))
        save = True if cfg.save_model is None else bool(cfg.save_model)
        run_id = _run_id(cfg)
        where = Path("outputs/RUN_ID") if not run_id else Path(str(whole.hydra.run.dir))  # resolving it hashes weights
        found = [(Job(run_id, tuple(o for o in overrides if not o.startswith("hydra")), where, "", save), cfg)]
        return GridPlan(where, False, [], [], "cpu", 1, 1, None), found, whole.hydra
    named = any(o.startswith("hydra.sweep.dir=") for o in overrides)
    where = Path("outputs/multirun") / Path(table).stem if table and not named else Path(str(whole.hydra.sweep.dir))
    jobs = cells
    if jobs is None:
        params = dict(whole.hydra.sweeper.get("params") or {})
        jobs = door.split_sweep(overrides, params)
        where = _sweep_dir(overrides, whole) if swept else where
    made: dict[str, tuple[Job, RunConfig]] = {}
    for overrides_of_job in jobs:
        task = [o for o in overrides_of_job if not o.startswith("hydra")]
        try:
            cfg = door.compose_run(task)
            run_id = _run_id(cfg)
        except ConfigError as error:
            raise ConfigError(f"job {' '.join(task)}: {error}") from None
        job = Job(run_id, tuple(task), where / run_id, slug(cfg.resolved()), bool(cfg.save_model))
        made.setdefault(run_id or " ".join(task), (job, cfg))
    if not made:
        raise ConfigError("no job is left to plan: the table has every cell.")
    return GridPlan(where, True, [], [], "cpu", 1, 1, None), list(made.values()), whole.hydra


def _sweep_dir(overrides: Sequence[str], whole: Any) -> Path:
    """Where a grid of comma lists lies: the folder's name hashes the command's task overrides."""
    from slm_exp.core.files import digest
    from slm_exp.launch.compose import open_mappings

    if any(o.startswith("hydra.sweep.dir=") for o in overrides):
        return Path(str(whole.hydra.sweep.dir))
    given = open_mappings(overrides)
    task = sorted(o for o in given if not o.startswith(("sweep=", "experiment=", "hydra.", "hydra/")))
    base = whole.hydra.runtime.choices.get("sweep") or whole.hydra.runtime.choices.get("experiment") or "grid"
    return Path("outputs/multirun") / f"{base}-{digest(task)[:8]}"


def _of_table(overrides: Sequence[str]) -> tuple[str, list[list[str]] | None]:
    """A table's name and the jobs that fill it, for `table=NAME [PARAM=VALUE]`; None where no table is asked for."""
    name = next((o.partition("=")[2] for o in overrides if o.startswith("table=")), None)
    if name is None:
        return "", None
    try:
        from slm_exp.tables.definition import cells, parameters
    except ImportError:
        raise ConfigError(f"table={name}: this version of slm_exp has no tables.") from None
    from slm_exp.tables.build import split_words

    others = [o for o in overrides if not o.startswith(("table=", "hydra"))]
    known = parameters(name)
    given, _ = split_words([o for o in others if o.partition("=")[0] in known])
    added = [o for o in others if o.partition("=")[0] not in known]
    return name, [[*cell, *added] for cell in cells(name, given)]


def _run_id(cfg: RunConfig) -> str:
    """The run's id, or nothing where big files would have to be read for it."""
    from slm_exp.forecast.shapes import unseen
    from slm_exp.models.hf import HF, TOKENIZER, weight_files

    if isinstance(cfg.model, HF) and (folder := cfg.model._folder()) is not None:
        names = ("config.json", *weight_files(folder), *TOKENIZER)
        if all((folder / name).is_file() for name in weight_files(folder)) and unseen(folder, names):
            return ""
    return cfg.run_id


def _workers(cfgs: Sequence[RunConfig], hydra: Any, gpus: list[str], multirun: bool) -> tuple[int, int]:
    """Jobs at a time, and CPU threads of each, as the launcher decides them."""
    import os

    from slm_exp.launch.plugins import heaviest
    from slm_exp.launch.workers import cores, make_workers

    own = cfgs[0].runtime.threads or int(os.environ.get("OMP_NUM_THREADS") or 0)
    if not multirun:
        return 1, own or cores()
    launcher = hydra.launcher
    workers = launcher.get("workers") or launcher.get("n_jobs")
    pool = make_workers(workers, launcher.get("threads"), gpus, len(cfgs), heaviest(cfgs))
    return len(pool), own or int(pool[0].env.get("OMP_NUM_THREADS") or cores())


def _job_plan(job: Job, cfg: RunConfig, model: Sketch, device: str, lookup: Lookup) -> JobPlan:
    from slm_exp.forecast.hits import outline
    from slm_exp.runs.sweep import FINISHED, read_cell

    state = read_cell(job).state if job.run_id else "unknown"
    plan = JobPlan(job, state)
    if model.sizes is None or model.handle is None:
        plan.notes.append(f"{model.name}: without its config.json nothing can be counted.")
        return plan
    plan.problem = problem(cfg, model)
    told = outline(cfg, model, device, lookup, job.save_model)
    _size(plan, cfg, model, told)
    if state == FINISHED:
        return plan
    plan.stages = told.stages
    plan.notes += cfg.advice()
    plan.known = plan.known or told.plan_from
    return plan


def problem(cfg: RunConfig, model: Sketch) -> str:
    """Why the run would fail before its weights load, as far as that is known without torch; or nothing."""
    from slm_exp.methods.sublayers import SublayerBaseline

    assert model.handle is not None
    try:
        if not cfg.width.prunes and not (isinstance(cfg.method, SublayerBaseline) and cfg.method.target_ratio):
            cfg.method.check_model(model.handle)
        cfg.evaluation.check_data(model.random)
    except SlmError as error:
        return str(error)
    return ""


def _size(plan: JobPlan, cfg: RunConfig, model: Sketch, told: Outline) -> None:
    """Layers and parameters left, or the bounds of what a search may leave."""
    from slm_exp.methods.base import Baseline
    from slm_exp.methods.sublayers import SublayerBaseline

    sizes, handle = model.sizes, model.handle
    assert sizes is not None
    assert handle is not None
    n = sizes.n_layers
    halves = isinstance(cfg.method, SublayerBaseline) and getattr(cfg.method, "unit", "") != "layer"
    share = getattr(cfg.width, "share", None)
    whole = (cfg.method.target_ratio or 0) * sizes.total if share else None  # what depth and width remove together
    try:
        if told.plan is not None:
            plan.layers, plan.known = told.plan.n_layers_out, told.plan_from
        elif halves:
            plan.bounds, plan.known = (1, n), "halves of layers go; the checkpoint keeps most of their parameters"
        elif share and whole:
            layer = sizes.layer - (share * whole / n if cfg.width.order == "before" else 0)
            plan.layers, plan.known = n - round((1 - share) * whole / layer), "as asked"
        elif isinstance(cfg.method, Baseline):
            plan.layers, plan.known = n - cfg.method.layers_to_remove(handle), "as asked"
        elif cfg.method.name == "slm":
            asked = cfg.method._layers_asked(handle)  # type: ignore[attr-defined]
            if asked is not None:
                plan.layers, plan.known = asked, "as asked"
            else:
                start = cfg.method.start(n)  # type: ignore[attr-defined]
                plan.bounds = (n - max(0, start.high - start.floor), n)
    except SlmError:
        return  # already said as the job's problem
    if plan.layers is None:
        return
    left = sizes.with_layers(plan.layers)
    plan.params, plan.flops_per_token = left.total, left.flops_per_token(cfg.calibration.seq_len)
    if cfg.width.prunes:
        ratio = getattr(cfg.width, "ratio", None) or 0.2
        wanted = ratio * plan.layers * sizes.layer if whole is None else left.total - sizes.total + whole
        gone = max(0, int(wanted))
        plan.params -= gone
        plan.flops_per_token -= 2 * gone
        plan.known += ", width to within a snap"


def _cost(grid: GridPlan, plan: JobPlan, cfg: RunConfig, model: Sketch) -> None:
    """Operations, seconds and memory of a job's stages."""
    from slm_exp.forecast import work
    from slm_exp.forecast.hits import COMPUTE, MAYBE

    sizes = model.sizes
    if sizes is None or not plan.stages:
        return
    tokens = work.calibration_tokens(cfg)
    grid.seq_len = tokens.t
    layers: float = plan.layers if plan.layers is not None else sizes.n_layers
    count = work.method(cfg, sizes.n_layers, None if plan.layers is None else sizes.n_layers - plan.layers)
    measured, unsaid = work.evaluation(cfg, sizes, sizes.n_layers, model.random)
    after, _ = work.evaluation(cfg, sizes, layers, model.random)
    healing, more = work.recovery(cfg, sizes, layers)
    size = float(model.bytes)
    if getattr(cfg.evaluation, "speed_runs", 0):  # measured anew every time, both models in turns
        after += work.generation(cfg, sizes, layers, size)
    works: dict[str, Work] = {
        "load": work.Work(starts=1, moved=size / 4, fixed=0.3 + (sizes.total / 5e7 if model.random else 0)),
        "calibrate": work.Work(fixed=0.1 if model.random else 1.0),
        "similarity": work.similarity(cfg, sizes, tokens),
        "evaluate_dense": measured,
        "plan": work.plan(cfg, sizes, tokens, count),
        "merge": work.Work(moved=(sizes.n_layers - layers) * sizes.layer * 4 / 10),
        "width": work.width(cfg, sizes, layers, tokens),
        "recover": healing,
        "evaluate": after,
        "save": work.Work(starts=1, moved=3 * size * layers / sizes.n_layers, fixed=0.7),
        "report": work.Work(fixed=1.0),
    }
    if cfg.tracking.name == "wandb":
        works["report"] += work.Work(fixed=3.0)
    doing = {name: works[name] for name, state in plan.stages.items() if state in (COMPUTE, MAYBE)}
    if "load" not in doing:
        doing["load"] = work.Work(starts=1)  # the process imports torch all the same
    elif "evaluate" in doing and "evaluate_dense" in doing:
        doing["evaluate"] += work.Work(harness=-1) if cfg.evaluation.tasks else work.Work()
    plan.flops = sum(w.flops for w in doing.values())
    plan.block_forwards = count.blocks if "plan" in doing else 0
    said = [count.note] if count.note and "plan" in doing else []
    plan.notes += [*said, *(unsaid if {"evaluate", "evaluate_dense"} & set(doing) else ()), *more]
    if grid.machine is not None:
        plan.seconds = {name: grid.machine.seconds(w, sizes.hidden) for name, w in doing.items()}
        if (limit := getattr(cfg.recovery, "max_minutes", None)) and "recover" in plan.seconds:
            plan.seconds["recover"] = min(plan.seconds["recover"], 60 * limit)
        if unsaid and {"evaluate", "evaluate_dense"} & set(doing):
            plan.seconds = {}
    _memory(grid, plan, cfg, model, tokens, doing)


def _memory(
    grid: GridPlan, plan: JobPlan, cfg: RunConfig, model: Sketch, tokens: Any, doing: Iterable[str]
) -> None:
    """Peak bytes of the process, of its checkpoint's verification beside it, and on the GPU."""
    from slm_exp.forecast.work import BYTES_OF_GRAMS, GRAM_BYTES

    sizes = model.sizes
    assert sizes is not None
    imports = grid.machine.resident if grid.machine else 1e9
    states = (sizes.n_layers + 3) * tokens.total * sizes.hidden * 4
    grams = min(GRAM_BYTES, sizes.n_layers * tokens.total * min(cfg.similarity.batch, tokens.total) * 8)
    work = max(states if "plan" in doing else 0, grams * BYTES_OF_GRAMS if "similarity" in doing else 0, 1e8)
    if "recover" in doing and hasattr(cfg.recovery, "epochs"):
        work = max(work, sizes.total * 16 * (0.05 if cfg.recovery.name == "lora" else 1))
    weights = model.bytes
    if grid.device == "cuda":
        grid.device_memory = max(grid.device_memory, weights + work + 1e9)
        grid.memory = max(grid.memory, imports + 2e9 + weights)
    else:
        grid.memory = max(grid.memory, imports + weights + work)
    if "save" in doing:
        grid.verifying = max(grid.verifying, imports * 0.6 + weights)


def show(grid: GridPlan) -> str:
    """One screen."""
    from slm_exp.cli.cache import human
    from slm_exp.forecast.hits import CACHED, COMPUTE, MAYBE, SHARED
    from slm_exp.runs.sweep import differing

    todo = grid.to_run
    jobs = f"{len(grid.jobs)} jobs" if grid.multirun else "1 job"
    how = f"{grid.workers} at a time, " if grid.multirun else ""
    lines = [f"{jobs} in {grid.folder}: {len(grid.jobs) - len(todo)} finished, {len(todo)} to run ({how}{grid.device}, "
             f"{grid.threads} threads)"]  # fmt: skip
    for model in grid.models:
        about = "size unknown"
        if model.sizes:
            about = (f"{model.sizes.n_layers} layers, {model.sizes.total / 1e6:,.1f} M parameters, "
                     f"{model.sizes.flops_per_token(grid.seq_len) / 1e9:.3g} GFLOP a token at {grid.seq_len}, "
                     f"{human(model.bytes)} in {model.dtype}")  # fmt: skip
        lines.append(f"model     {model.name}: {about}")
    lines += ["", f"  {'stage':<15}{'compute':>8}{'cached':>8}{'shared':>8}{'unknown':>8}{'time':>10}"]
    names = list(dict.fromkeys(name for job in todo for name in job.stages))
    for name in names:
        states = [job.stages.get(name) for job in todo]
        if not any(s in (COMPUTE, MAYBE, CACHED, SHARED) for s in states):
            continue
        counts = "".join(f"{states.count(s) or '-':>8}" for s in (COMPUTE, CACHED, SHARED, MAYBE))
        spent = [job.seconds[name] for job in todo if name in job.seconds]
        lines.append(f"  {name:<15}{counts}{duration(sum(spent)) if spent else '-':>10}")
    lines.append("")
    apart = differing([job.job for job in grid.jobs]) if all(j.job.run_id for j in grid.jobs) else {}
    for job in grid.jobs[:ROWS]:
        what = apart.get(job.job.run_id) or " ".join(job.job.overrides) or "(defaults)"
        took = "" if job.state == "finished" else duration(job.total) if job.total is not None else "time unknown"
        state = f"{job.state} " if job.state != "waiting" else ""
        lines.append(f"  {what}: {state}{_after(job, grid)}{', ' + took if took else ''}")
        if job.problem:
            lines.append(f"    WOULD FAIL: {job.problem}")
    if len(grid.jobs) > ROWS:
        bad = sum(bool(j.problem) for j in grid.jobs[ROWS:])
        fails = f"; {bad} WOULD FAIL" if bad else ""
        lines.append(f"  ... and {len(grid.jobs) - ROWS} more (--json has all){fails}")
    lines.append("")
    if grid.memory:
        more = f"; {human(grid.verifying)} more while the checkpoint is verified" if grid.verifying else ""
        card = f", {human(grid.device_memory)} on the GPU" if grid.device_memory else ""
        lines.append(f"memory    {human(grid.memory)} a job{card}{more}")
    flops = sum(j.flops for j in todo)
    lines.append(f"work      {flops / 1e12:,.3g} TFLOP")
    if grid.wall is not None and grid.seconds is not None:
        unit = "GPU" if grid.device == "cuda" else "core"
        hours = grid.seconds / 3600 * (1 if unit == "GPU" else grid.threads)
        lines.append(f"time      {duration(grid.wall)}, {hours:.2g} {unit} hours")
    else:
        lines.append("time      unknown")
    notes = [*grid.notes]
    if any(MAYBE in job.stages.values() for job in todo):
        notes.append("unknown stages depend on what an earlier one finds; they are counted as computed.")
    lines += [f"note      {note}" for note in notes]
    return "\n".join(lines)


def _after(job: JobPlan, grid: GridPlan) -> str:
    """`27 of 30 layers, 123.9 M parameters (-7.9 %)`, or what is not known."""
    model = grid.models[0].sizes
    if job.layers is not None and job.params is not None and model:
        gone = 1 - job.params / model.total
        return (f"{job.layers} of {model.n_layers} layers, {job.params / 1e6:,.1f} M parameters ({-100 * gone:+.1f} %) "
                f"{job.known}").rstrip()  # fmt: skip
    if job.bounds:
        return f"{job.bounds[0]} to {job.bounds[1]} layers" + (f" ({job.known})" if job.known else
                                                                ", which only the search can tell")  # fmt: skip
    return "size unknown"


def duration(seconds: float | None) -> str:
    """`45 s`, `12 min`, `3.4 h`."""
    if seconds is None:
        return "?"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"
