"""What a run or a grid would do and cost: jobs, cache hits, sizes, operations, memory, time. Loads no weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from slm_exp.core.cost import Tokens, Work
from slm_exp.core.errors import ConfigError, SlmError
from slm_exp.core.files import plain
from slm_exp.core.format import duration, human
from slm_exp.core.runtime import available_memory, cores
from slm_exp.forecast.machine import Machine, machine, stated
from slm_exp.forecast.walk import CACHED, COMPUTE, MAYBE, SHARED, Lookup, Outline, walk
from slm_exp.launch.jobs import CommandJobs, command_jobs
from slm_exp.launch.workers import visible_gpus
from slm_exp.models.sizes import Sizes
from slm_exp.models.sketch import Sketch
from slm_exp.pipeline.config import RunConfig
from slm_exp.pipeline.inspection import Inspection
from slm_exp.pipeline.memory import choose, held, searching, streamed_part
from slm_exp.recovery.gain import loss_cost
from slm_exp.runs.sweep import FINISHED, Job, differing, read_cell
from slm_exp.tables.build import split_words
from slm_exp.tables.definition import cells, parameters

SAVING = 5.0
"""Passes over layers' files: writing, logits, and the fresh process's digests and two comparisons."""
ROWS = 12
"""Jobs shown one by one."""


@dataclass
class JobPlan:
    """What one job would do and cost."""

    job: Job
    state: str
    """As `slm sweep status` reports it: finished, failed, died, running, waiting."""
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
    passes: float = 0
    """Over the layers' files, where these stay there."""
    read: float = 0
    """Bytes read from them."""
    problem: str = ""
    """Why it would fail before its weights load."""
    notes: list[str] = field(default_factory=list)

    @property
    def total(self) -> float | None:
        return sum(self.seconds.values()) if self.seconds or self.state == FINISHED else None

    def to_json(self) -> dict[str, Any]:
        return {
            "run_id": self.job.run_id or None, "overrides": list(self.job.overrides), "folder": str(self.job.folder),
            "state": self.state, "problem": self.problem or None, "layers": self.layers, "bounds": self.bounds,
            "known": self.known or None, "params": self.params, "flops_per_token": self.flops_per_token,
            "flops": self.flops, "block_forwards": self.block_forwards,
            "streamed": {"passes": self.passes, "bytes": self.read} if self.passes else None,
            "stages": [{"name": n, "state": s, "seconds": self.seconds.get(n)} for n, s in self.stages.items()],
            "seconds": self.total, "notes": self.notes}


@dataclass
class GridPlan:
    """The whole command."""

    folder: Path
    multirun: bool
    device: str
    workers: int
    threads: int
    jobs: list[JobPlan] = field(default_factory=list)
    models: list[Sketch] = field(default_factory=list)
    machine: Machine | None = None
    memory: float = 0
    """Bytes of the largest job's process."""
    verifying: float = 0
    """More of them while a checkpoint is verified by a second process."""
    device_memory: float = 0
    seq_len: int = 128
    notes: list[str] = field(default_factory=list)

    @property
    def to_run(self) -> list[JobPlan]:
        return [j for j in self.jobs if j.state != FINISHED]

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
        hours = None if self.seconds is None else self.seconds / 3600
        return plain({  # type: ignore[no-any-return]
            "folder": str(self.folder), "multirun": self.multirun, "device": self.device,
            "workers": self.workers, "threads": self.threads,
            "models": [{"name": m.name, "dtype": m.dtype, "digest": None if m.digest.startswith("?") else m.digest,
                        **({"layers": m.sizes.n_layers, "params": m.sizes.total, "bytes": m.bytes,
                            "flops_per_token": m.sizes.flops_per_token(self.seq_len)} if m.sizes else {})}
                       for m in self.models],
            "jobs": [j.to_json() for j in self.jobs],
            "totals": {"jobs": len(self.jobs), "finished": len(self.jobs) - len(self.to_run),
                       "seconds": self.wall, "hours_of_work": hours,
                       "gpu_hours": hours if self.device == "cuda" else 0,
                       "core_hours": None if hours is None or self.device == "cuda" else hours * self.threads,
                       "flops": sum(j.flops for j in self.to_run), "memory_bytes": self.memory,
                       "verification_bytes": self.verifying, "device_memory_bytes": self.device_memory},
            "machine": asdict(self.machine) if self.machine else None, "notes": self.notes})


def make_plan(overrides: Sequence[str], multirun: bool = False, tflops: float | None = None,
              anew: bool = False) -> GridPlan:
    """Compose every job, look into the cache, count, and estimate.

    Args:
        tflops: plan for a machine that sustains so many TFLOP/s; nothing is measured here then.
        anew: measure this machine's speed even where it is known.
    Raises ConfigError: as the run itself would; names the job.
    """
    return plan_jobs(jobs_of(overrides, multirun), tflops, anew)


def plan_jobs(command: CommandJobs, tflops: float | None = None, anew: bool = False) -> GridPlan:
    """`make_plan` of jobs that are composed already."""
    first = command.jobs[0][1]
    requested = first.model.device or first.runtime.device
    gpus = visible_gpus() if requested != "cpu" else []
    device = "cuda" if requested.startswith("cuda") or (requested == "auto" and gpus) else "cpu"
    here = device == "cpu" or bool(gpus)
    grid = GridPlan(command.folder, command.multirun, device, *(command.capacity() if here else (1, cores())))
    lookup = Lookup(first.cache_folder)
    inspection = Inspection(device, here=False)
    for _, cfg in command.jobs:
        inspection.sketch(cfg)
    grid.models = list(inspection.sketches.values())
    grid.notes = [note for model in grid.models for note in model.notes]
    dtype = grid.models[0].dtype
    if tflops is not None:
        grid.machine = stated(tflops, device, dtype)
    elif here:
        grid.machine = machine(Path(first.cache.dir), device, dtype, grid.threads, anew)
    else:
        grid.notes.append("no GPU is visible here, so times are not known: --tflops N gives those of a machine that "
                          "sustains N TFLOP/s.")
    for job, cfg in command.jobs:
        grid.jobs.append(_job_plan(grid, job, cfg, inspection, lookup))
    grid.notes += dict.fromkeys(note for plan in grid.to_run for note in plan.notes)
    if command.searches:
        grid.notes.append(f"a search of {command.hydra.sweeper.search.n_trials} trials; the jobs above are the ends of "
                          "what it chooses from.")
    searches = sum(plan.bounds is not None and plan.stages.get("plan") == COMPUTE for plan in grid.to_run)
    if searches > 1:
        grid.notes.append("searches of one model, rule and similarity share scores, which is not counted: it is less.")
    return grid


def jobs_of(overrides: Sequence[str], multirun: bool, reads_weights: bool = False) -> CommandJobs:
    """The jobs of a command line as the run would make them; of `table=NAME [PARAM=VALUE]` those that fill it.
    `reads_weights`: for their run_id, where this machine has never read them; else that is empty."""
    identify = (lambda cfg: cfg.run_id) if reads_weights else _known_run_id
    name = next((o.partition("=")[2] for o in overrides if o.startswith("table=")), None)
    if name is None:
        return command_jobs(overrides, multirun, identify=identify)
    others, own = [o for o in overrides if not o.startswith(("table=", "hydra"))], parameters(name)
    given, _ = split_words([o for o in others if o.partition("=")[0] in own or o.startswith("model.")])
    added = [o for o in others if o.partition("=")[0] not in own and not o.startswith("model.")]
    missing = [[*cell, *added] for cell in cells(name, given)]
    if not missing:
        raise ConfigError("no job is left to plan: the table has every cell.")
    hydra = [o for o in overrides if o.startswith("hydra")]
    return command_jobs(hydra, True, cells=missing, name=Path(name).stem, identify=identify)


def cell_jobs(name: str, runs: Sequence[Sequence[str]]) -> CommandJobs:
    """The jobs of a table's runs, by their overrides, in the folder where `slm tables NAME --missing` puts them."""
    return command_jobs([], True, cells=runs, name=name, identify=_known_run_id)


def _known_run_id(cfg: RunConfig) -> str:
    """Empty where it takes a digest of weights that this machine has never read."""
    return "" if cfg.model.unread_weights() else cfg.run_id


def _job_plan(grid: GridPlan, job: Job, cfg: RunConfig, inspection: Inspection, lookup: Lookup) -> JobPlan:
    plan, model = JobPlan(job, read_cell(job).state if job.run_id else "unknown"), inspection.sketch(cfg)
    try:
        inspection.look(cfg)
        cfg.evaluation.check_data(model.random)
    except SlmError as error:
        plan.problem = str(error)
    if model.sizes is None or model.handle is None:
        plan.notes.append(f"{model.name}: without its config.json nothing can be counted.")
        return plan
    if plan.state == FINISHED:  # it computes nothing that a later job could share
        lookup = Lookup(lookup.store.folder)
    threads = cfg.runtime.threads or grid.threads  # of the process that will run it, which is not this one
    outline = walk(replace(cfg, runtime=replace(cfg.runtime, threads=threads)), model, lookup, job.save_model)
    if outline.method is not None:
        cfg = replace(cfg, method=outline.method)
    if cfg.method.unmeasured:
        plan.notes.append(f"method.target_latency = {cfg.method.target_latency}: the table of times of this device is "
                          "yet to be measured, which the run does first; the size follows from it.")
    try:
        if not cfg.width.prunes:
            cfg.method.check_model(model.handle)  # the others look at modules, which takes torch
        _size(plan, cfg, model, outline)
    except SlmError as error:
        plan.problem = plan.problem or str(error)
    if plan.state != FINISHED:
        plan.stages = outline.stages
        plan.notes += cfg.advice()
        plan.known = plan.known or outline.plan_from
        _cost(grid, plan, cfg, model, outline)
    return plan


def _size(plan: JobPlan, cfg: RunConfig, model: Sketch, outline: Outline) -> None:
    """Layers and parameters left, or the bounds of what a search may leave."""
    sizes, handle = model.sizes, model.handle
    assert sizes is not None
    assert handle is not None
    if outline.plan is not None:
        plan.layers, plan.known = outline.plan.n_layers_out, outline.plan_from
    else:
        plan.layers = cfg.width.layers_left(sizes, cfg.method.target_ratio) or cfg.method.layers_left(handle)
        plan.known = "as requested"
    if plan.layers is None:
        plan.known, plan.bounds = "", cfg.method.bounds(sizes.n_layers)
        return
    left = sizes.with_layers(plan.layers)
    gone = cfg.width.params_removed(sizes, plan.layers, cfg.method.target_ratio)
    plan.params = left.total - gone
    plan.flops_per_token = left.flops_per_token(cfg.calibration.seq_len) - 2 * gone
    plan.known += ", width to within a snap" if cfg.width.prunes else ""


def _cost(grid: GridPlan, plan: JobPlan, cfg: RunConfig, model: Sketch, outline: Outline) -> None:
    """Operations, seconds and memory of a job's stages."""
    sizes = model.sizes
    assert sizes is not None
    tokens = cfg.calibration.shape()
    grid.seq_len = tokens.t
    layers: float = plan.layers if plan.layers is not None else sizes.n_layers
    count = cfg.method.cost(sizes.n_layers, None if plan.layers is None else sizes.n_layers - plan.layers)
    before, unsaid = cfg.evaluation.cost(sizes, sizes.n_layers, model.random)
    after, _ = cfg.evaluation.cost(sizes, layers, model.random)
    to_do = {name: [state in (COMPUTE, MAYBE) for state in states] for name, states in outline.parts.items()}
    parts = [part for part, computed in zip(cfg.recovery.parts(), to_do.get("recover", ()), strict=False) if computed]
    recoveries = [(part, *part.cost(sizes, layers)) for part in parts]
    looks = sum((part.judging_cost(sizes, layers, tokens) for part in parts),
                loss_cost(sizes, layers) * sum(to_do.get("held_out", ())))
    recovery, more = sum((work for _, work, _ in recoveries), looks), [n for *_, notes in recoveries for n in notes]
    size = float(model.bytes)
    if cfg.evaluation.times:  # measured anew every time, both models in turns
        after += cfg.evaluation.generation_cost(sizes, layers, size)
    search = Work(blocks=count.blocks * sizes.block_flops(tokens.total, tokens.t),
                  head=count.heads * sizes.head_flops(tokens.total))
    if cfg.method.uses_merge_rule() and cfg.method.replays is None:
        search += cfg.merge_rule.cost(sizes, count.scores)
    works = {
        "load": Work(starts=1, moved=size / 4, fixed=0.3 + (sizes.total / 5e7 if model.random else 0)),
        "latency": cfg.method.timing_cost(sizes, size),
        "calibrate": Work(fixed=0.1 if model.random else 1.0),
        "similarity": cfg.similarity.matrix_cost(sizes, tokens), "evaluate_dense": before,
        "plan": search + cfg.similarity.score_cost(sizes, tokens, count.scores),
        "merge": Work(moved=(sizes.n_layers - layers) * sizes.layer * 4 / 10),
        "width": cfg.width.cost(sizes, layers, tokens),
        "recover": recovery, "evaluate": after,
        "save": Work(starts=1, moved=3 * size * layers / sizes.n_layers, fixed=0.7),
        "report": Work(fixed=1.0 + cfg.tracking.seconds),
    }
    doing = {name: works[name] for name, state in plan.stages.items() if state in (COMPUTE, MAYBE)}
    if "load" not in doing:
        doing["load"] = Work(starts=1)  # the process imports torch all the same
    elif "evaluate" in doing and "evaluate_dense" in doing and cfg.evaluation.tasks:
        doing["evaluate"] += Work(harness=-1)
    plan.flops = sum(w.flops for w in doing.values())
    plan.block_forwards = count.blocks if "plan" in doing else 0
    evaluates = bool({"evaluate", "evaluate_dense"} & set(doing))
    plan.notes += [*([count.note] if count.note and "plan" in doing else []), *(unsaid if evaluates else ()), *more]
    if grid.machine is not None and not (unsaid and evaluates):
        plan.seconds = {name: grid.machine.seconds(w, sizes.hidden) for name, w in doing.items()}
        if "recover" in plan.seconds:
            plan.seconds["recover"] -= sum(max(0, grid.machine.seconds(work, sizes.hidden) - 60 * limit)
                                           for part, work, _ in recoveries if (limit := part.wall_clock_limit))
    streamed = grid.device == "cpu" and choose(cfg, model.bytes, available_memory(), cfg.model.needs_resident() is None,
                                               grid.device, own=held(cfg, model.bytes, sizes)).streamed
    if streamed or cfg.runtime.memory == "stream":
        streamed = True
        of = {"similarity": 1.0, "evaluate_dense": cfg.evaluation.file_passes, "evaluate": cfg.evaluation.file_passes,
              "plan": (count.blocks if count.reads is None else count.reads) / sizes.n_layers,
              "recover": cfg.recovery.file_passes, "save": SAVING}
        plan.passes = sum(of.get(name, 0) for name in doing)
        plan.read = plan.passes * model.bytes * sizes.n_layers * sizes.layer / sizes.total
    _memory(grid, cfg, model, sizes, tokens, doing, streamed)


def _memory(grid: GridPlan, cfg: RunConfig, model: Sketch, sizes: Sizes, tokens: Tokens, doing: Iterable[str],
            streamed: bool) -> None:
    """Peak bytes of the process, of its checkpoint's verification beside it, and on the GPU."""
    imports = grid.machine.resident if grid.machine else 1e9
    states = (sizes.n_layers + 3) * tokens.total * sizes.hidden * 4
    stages = {"plan": states + searching(cfg, sizes), "similarity": cfg.similarity.matrix_bytes(sizes, tokens),
              "recover": held(cfg, model.bytes, sizes), "width": held(cfg, model.bytes, sizes)}
    work = max([1e8, *(bytes_ for name, bytes_ in stages.items() if name in doing)])
    weights = float(model.bytes)
    if streamed:
        weights = streamed_part(weights, sizes)
    if grid.device == "cuda":
        grid.device_memory = max(grid.device_memory, weights + work + 1e9)
        grid.memory = max(grid.memory, imports + 2e9 + weights)
    else:
        grid.memory = max(grid.memory, imports + weights + work)
    if "save" in doing:
        grid.verifying = max(grid.verifying, imports * 0.6 + weights)


def show(grid: GridPlan) -> str:
    """One screen."""
    todo = grid.to_run
    jobs, how = (f"{len(grid.jobs)} jobs", f"{grid.workers} at a time, ") if grid.multirun else ("1 job", "")
    lines = [f"{jobs} in {grid.folder}: {len(grid.jobs) - len(todo)} finished, {len(todo)} to run ({how}{grid.device}, "
             f"{grid.threads} threads)"]
    for model in grid.models:
        about = "size unknown"
        if model.sizes:
            about = (f"{model.sizes.n_layers} layers, {model.sizes.total / 1e6:,.1f} M parameters, "
                     f"{model.sizes.flops_per_token(grid.seq_len) / 1e9:.3g} GFLOP a token at {grid.seq_len}, "
                     f"{human(model.bytes)} in {model.dtype}")
        lines.append(f"model     {model.name}: {about}")
    lines += ["", f"  {'stage':<15}{'compute':>8}{'cached':>8}{'shared':>8}{'unknown':>8}{'time':>14}"]
    for name in dict.fromkeys(name for job in todo for name in job.stages):
        states = [job.stages.get(name) for job in todo]
        if any(s in (COMPUTE, MAYBE, CACHED, SHARED) for s in states):
            counts = "".join(f"{states.count(s) or '-':>8}" for s in (COMPUTE, CACHED, SHARED, MAYBE))
            spent = [job.seconds[name] for job in todo if name in job.seconds]
            lines.append(f"  {name:<15}{counts}{duration(sum(spent)) if spent else '-':>14}")
    lines.append("")
    apart = differing([job.job for job in grid.jobs]) if all(j.job.run_id for j in grid.jobs) else {}
    for job in grid.jobs[:ROWS]:
        what = apart.get(job.job.run_id) or " ".join(job.job.overrides) or "(defaults)"
        took = ", time unknown" if job.total is None else f", {duration(job.total)}" * (job.state != FINISHED)
        lines.append(f"  {what}: {job.state + ' ' if job.state != 'waiting' else ''}{_after(job, grid)}{took}")
        lines += [f"    WOULD FAIL: {job.problem}"] * bool(job.problem)
    if len(grid.jobs) > ROWS:
        bad = sum(bool(j.problem) for j in grid.jobs[ROWS:])
        lines.append(f"  ... and {len(grid.jobs) - ROWS} more (--json has all){f'; {bad} WOULD FAIL' if bad else ''}")
    lines.append("")
    if grid.memory:
        more = f"; {human(grid.verifying)} more while the checkpoint is verified" if grid.verifying else ""
        card = f", {human(grid.device_memory)} on the GPU" if grid.device_memory else ""
        lines.append(f"memory    {human(grid.memory)} a job{card}{more}")
    if passes := sum(j.passes for j in todo):
        lines.append(f"reads     {passes:,.1f} passes over the layers' files, {human(sum(j.read for j in todo))}")
    lines.append(f"work      {sum(j.flops for j in todo) / 1e12:,.3g} TFLOP")
    if grid.wall is not None and grid.seconds is not None:
        unit = "GPU" if grid.device == "cuda" else "core"
        hours = grid.seconds / 3600 * (1 if unit == "GPU" else grid.threads)
        lines.append(f"time      {duration(grid.wall)}, {hours:.2g} {unit} hours")
    else:
        lines.append("time      unknown")
    lines += [f"note      {note}" for note in grid.notes]
    if any(MAYBE in job.stages.values() for job in todo):
        lines.append("note      unknown stages depend on what an earlier one finds; they are counted as computed.")
    return "\n".join(lines)


def _after(job: JobPlan, grid: GridPlan) -> str:
    """`27 of 30 layers, 123.9 M parameters (-7.9 %)`, or what is not known."""
    model = grid.models[0].sizes
    if job.layers is not None and job.params is not None and model:
        gone = 1 - job.params / model.total
        return (f"{job.layers} of {model.n_layers} layers, {job.params / 1e6:,.1f} M parameters ({-100 * gone:+.1f} %) "
                f"{job.known}").rstrip()
    if job.bounds:
        how = f" ({job.known})" if job.known else ", which only the search decides"
        return f"{job.bounds[0]} to {job.bounds[1]} layers{how}"
    return "size unknown"
