"""`python -m slm_exp [overrides]` (= `slm-exp`): check the command line, then let Hydra run it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from slm_exp.cli.command import refused, run_command
from slm_exp.cli.shown import config_text
from slm_exp.core.errors import ConfigError, SlmError, StageError, did_you_mean, require
from slm_exp.core.format import override
from slm_exp.core.logs import mask_logs, print_anything, silence_bars
from slm_exp.core.plugins import take
from slm_exp.core.registry import GROUPS
from slm_exp.core.runtime import die_with, rank, world
from slm_exp.core.secrets import masked
from slm_exp.core.version import __version__
from slm_exp.launch.compose import (
    PLAIN_FIELDS,
    PRESETS,
    choices,
    compose_raw,
    conf_dir,
    meant,
    open_mappings,
    prepare_hydra,
)
from slm_exp.launch.hydra_compat import help_text, is_sweep, parse_arguments, words
from slm_exp.launch.jobs import SWEEP, check_all, fields_of_swept_groups, split_sweep
from slm_exp.launch.search import register_plugins
from slm_exp.launch.workers import visible_gpus
from slm_exp.pipeline.config import RunConfig, to_run_config
from slm_exp.pipeline.inspection import inspect_jobs
from slm_exp.pipeline.run import run, take_part
from slm_exp.reporting.summary import summary
from slm_exp.runs.record import is_finished

RANKS = "SLM_EXP_RANKS"
"""In the environment of processes that a run started to train together."""
OPTIONS = ("--multirun", "--cfg", "--resolve", "--package", "--config-dir", "--plugin", "--help", "--hydra-help",
           "--info")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Exit status: 0 all finished, 1 a job failed, 2 the config is wrong."""
    print_anything()
    silence_bars()
    if world() > 1 and RANKS in os.environ:
        die_with(os.getppid())
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        argv = take(argv)
        if "--version" in argv:  # Hydra would say its own
            print(f"slm_exp {__version__}")
            return 0
        args, _ = parse_arguments(argv)
        if args.experimental_rerun:
            raise ConfigError(f"--experimental-rerun {args.experimental_rerun}: it would read a pickle. A run is "
                              "repeated by the command in its record.json, or on its page.")
        if args.help:
            return run_command(_help, argv)
        if args.cfg == "job" and not (args.package or args.config_name or args.config_path):
            return run_command(_show, argv)
        argv = fields_of_swept_groups(open_mappings(_check_command(argv)), _search(argv))
    except (SlmError, OSError) as error:
        return refused(error)
    prepare_hydra()
    register_plugins()
    mask_logs()
    app = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(_job)
    sys.argv = [sys.argv[0] if sys.argv else "slm-exp", *argv]
    app()
    return 0


def _help(argv: Sequence[str]) -> int:
    groups = "".join(f"{group}: {', '.join(choices(group))}\n" for group in (*GROUPS, *PRESETS))
    print(help_text(compose_raw([], with_hydra=True).hydra.help.template, groups))
    return 0


def _show(argv: Sequence[str]) -> int:
    args, overrides = parse_arguments(argv)
    _check_words(argv)
    search = _search(argv)
    if any(map(is_sweep, overrides)):
        jobs = split_sweep(fields_of_swept_groups(open_mappings(overrides), search), {})
        print(f"# the first of {len(jobs)} jobs: {' '.join(jobs[0])}", file=sys.stderr)
        overrides = jobs[0]
    print(config_text([*overrides, *search], args.resolve), end="")
    return 0


def _check_command(argv: list[str]) -> list[str]:
    """Check what the command line requests, with this package's messages, before Hydra takes over; what to give it:
    its options first, as it wants them."""
    args, overrides = parse_arguments(argv)
    if args.multirun and world() > 1:
        raise ConfigError(f"-m; expected a single run where a launcher started {world()} processes to train together.")
    if args.config_name or args.config_path:
        return _check_primary(argv)
    if args.hydra_help or args.shell_completion or args.info:
        return argv
    _check_words(argv)
    options, _ = _split(argv)
    search = _search(argv)
    if not args.cfg:
        command = check_all([*overrides, *search], multirun=args.multirun)
        if not rank():
            inspect_jobs(cfg for _, cfg in command.jobs)
    else:
        if any(map(is_sweep, overrides)):  # Hydra refuses --cfg of a grid
            overrides = split_sweep(fields_of_swept_groups(overrides, search), {})[0]
            options = [o for o in options if o not in ("-m", "--multirun")]
        compose_raw([*overrides, *search])
    return [*options, *overrides]


def _check_primary(argv: list[str]) -> list[str]:
    """The words, options first, with a config in place of conf/config.yaml (`--config-name`, `--config-path`) named as
    Hydra finds it; what it holds is Hydra's to check. Raises ConfigError: it is not there; says what is."""
    args = parse_arguments(argv)[0]
    if args.config_path:
        require(Path(args.config_path).is_dir(), "--config-path", args.config_path, "an existing folder",
                "Presets of your own need only --config-dir FOLDER +experiment=NAME.")
    name = (args.config_name or "config").removesuffix(".yaml")
    folders = [Path(folder) for folder in (args.config_path, args.config_dir) if folder]
    there = [] if args.config_path else ["config"]
    if name not in there and not any((folder / f"{name}.yaml").is_file() for folder in folders):
        there += sorted(path.stem for folder in folders for path in folder.glob("*.yaml"))
        name = name.rpartition("/")[2]
        presets = [f"{group}={member}" for group in PRESETS for member in choices(group)]
        own = next((f"{name} is a preset: {preset}" for preset in presets if preset.endswith(f"={name}")), None)
        raise ConfigError(f"--config-name = {args.config_name or name}; expected one of "
                          f"{', '.join(there) or '(no YAML file is there)'}. {own or 'Presets: ' + ', '.join(presets)}")
    options, overrides = _split(argv)
    last_wins = [f"--config-path={Path(args.config_path).resolve()}"] if args.config_path else []
    return [*options, *last_wins, *overrides]


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Hydra's own options with their values, and the other words, both in the order of the command line."""
    options, others = list[str](), list[str]()
    left = list(parse_arguments(argv)[1])
    for word in argv:
        if word in left:
            left.remove(word)
            others.append(word)
        else:
            options.append(word)
    return options, others


def _check_words(argv: Sequence[str]) -> None:
    """Answer options that are none, fields without their group, and repo ids for members with the command that was
    meant; other mistakes are found when the config is composed. Raises ConfigError: with that command, or with the
    options there are."""
    right, wrong, words = list[str](), list[str](), iter(_split(argv)[1])
    own_folder = bool(_search(argv)) or any("hydra.searchpath" in word for word in argv)
    for word in words:
        # a folder of the user's may hold model/OWNER/NAME.yaml
        better, given = [] if own_folder and word.startswith("model=") else meant(word), word
        if word.startswith("-"):
            name, equals, value = word.lstrip("-").partition("=")
            if not _as_override(name, "VALUE"):
                raise ConfigError(f"{word}; expected overrides (group=member, group.field=value) or one of "
                                  f"{', '.join(OPTIONS)}. {did_you_mean(word, OPTIONS)}".rstrip())
            value = value if equals else next(words, "VALUE")
            better, given = _as_override(name, value), word if equals else f"{word} {value}"
        wrong += [given] if better else []
        right += better or [word]
    if wrong:
        raise ConfigError(f"{', '.join(wrong)}: settings are overrides, GROUP=MEMBER or GROUP.FIELD=VALUE. Meant, "
                          f"perhaps: {shlex.join(['python', '-m', 'slm_exp', *_split(argv)[0], *right])}")


def _as_override(name: str, value: str) -> list[str]:
    """What `--NAME VALUE` may mean; empty where NAME is none of a setting."""
    word = f"{name.replace('-', '_')}={value}"
    return meant(word) or [word] * (name.partition(".")[0] in (*GROUPS, *PRESETS, *PLAIN_FIELDS))


def _search(argv: Sequence[str]) -> list[str]:
    """The override that --config-dir stands for."""
    folder = parse_arguments(argv)[0].config_dir
    if not folder:
        return []
    require(Path(folder).is_dir(), "--config-dir", folder, "an existing folder", "Presets lie in FOLDER/experiment.")
    return [f"hydra.searchpath=[file://{Path(folder).resolve()}]"]


def _start_ranks(ranks: int, cfg: RunConfig, folder: Path, multirun: bool) -> None:
    """Become the launcher of this run's processes (`recovery.processes`); returns where one is enough.

    They die with it, by the kernel's own means on Linux.
    """
    if multirun:
        raise SlmError(f"recovery.processes = {ranks}; expected 1 where a launcher runs jobs inside its own processes. "
                       "Take hydra/launcher=processes or slurm.")
    if is_finished(folder, cfg.run_id, with_model=bool(cfg.save_model)):
        return
    gpus = [] if (cfg.model.device or cfg.runtime.device) == "cpu" else visible_gpus()
    if gpus and len(gpus) < ranks:
        print(f"ConfigError: recovery.processes = {ranks}; expected at most the {len(gpus)} GPUs that are visible.",
              file=sys.stderr)
        raise SystemExit(2)
    os.environ[RANKS] = str(ranks)
    if not gpus:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    sys.stdout.flush()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    os.execv(sys.executable, [*launcher, "-m", "slm_exp", *sys.argv[1:], override("hydra.run.dir", folder)])


def _job(cfg: DictConfig) -> None:
    hydra_cfg = HydraConfig.get()
    multirun = hydra_cfg.mode == RunMode.MULTIRUN
    run_cfg = to_run_config(cfg)
    # a job with a process of its own (slm_exp.launch) is a single run to Hydra, and gets its sweep's name this way
    group = os.environ.get(SWEEP) or (Path(hydra_cfg.sweep.dir).name if multirun else None)
    if run_cfg.save_model is None:
        run_cfg.save_model = group is None
    folder = Path(hydra_cfg.runtime.output_dir)
    if (ranks := run_cfg.recovery.ranks()) > 1 and world() == 1:
        _start_ranks(ranks, run_cfg, folder, multirun)
    if rank():
        take_part(run_cfg, folder)
        return
    try:
        record = run(run_cfg, folder, words(hydra_cfg.overrides.task), group)
    except SystemExit as error:
        if multirun:  # it would end the whole sweep
            raise SlmError(f"run {run_cfg.run_id} called sys.exit({error.code})") from error
        raise
    except SlmError as error:
        message = masked(str(error))
        if group is None and isinstance(error, StageError) and error.refused:  # it has left no record
            print(masked(f"{type(error.__cause__).__name__}: {error.__cause__}"), file=sys.stderr)
            raise SystemExit(2) from None
        print(f"run {run_cfg.run_id} failed: {message}\nIts record: {folder / 'record.json'}", file=sys.stderr)
        if multirun:  # a plain message: other processes get to unpickle it
            raise SlmError(message) from None
        raise SystemExit(1) from None
    print(summary(record, folder))
