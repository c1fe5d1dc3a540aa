"""`python -m slm_exp [overrides]` (= `slm-exp`): check the command line, then let Hydra run it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from slm_exp.cli.command import run_command
from slm_exp.core.errors import ConfigError, SlmError, StageError, did_you_mean
from slm_exp.core.logs import mask_logs, print_anything
from slm_exp.core.registry import GROUPS
from slm_exp.core.runtime import rank, world
from slm_exp.core.secrets import masked
from slm_exp.launch.compose import choices, compose_raw, conf_dir, open_mappings, prepare_hydra
from slm_exp.launch.hydra_compat import help_text, is_sweep, parse_arguments, words
from slm_exp.launch.jobs import check_all, fields_of_swept_groups, split_sweep
from slm_exp.launch.plugins import register_plugins
from slm_exp.pipeline.config import to_run_config
from slm_exp.pipeline.inspection import inspect_jobs

OPTIONS = ("--multirun", "--cfg", "--resolve", "--package", "--config-dir", "--help", "--hydra-help", "--info")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Exit status: 0 all finished, 1 a job failed, 2 the config is wrong."""
    print_anything()
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if parse_arguments(argv)[0].help:
            return run_command(_help, argv)
        argv = fields_of_swept_groups(open_mappings(_check_command(argv)), _search(argv))
    except SlmError as error:
        print(masked(f"{type(error).__name__}: {error}"), file=sys.stderr)
        return 2
    prepare_hydra()
    register_plugins()
    mask_logs()
    app = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(_job)
    sys.argv = [sys.argv[0] if sys.argv else "slm-exp", *argv]
    app()
    return 0


def _help(argv: Sequence[str]) -> int:
    groups = "".join(f"{group}: {', '.join(choices(group))}\n" for group in (*GROUPS, "experiment", "sweep"))
    print(help_text(compose_raw([], with_hydra=True).hydra.help.template, groups))
    return 0


def _check_command(argv: list[str]) -> list[str]:
    """Check what the command line requests, with this package's messages, before Hydra takes over; what to give it."""
    args, overrides = parse_arguments(argv)
    if args.multirun and world() > 1:
        raise ConfigError(f"-m; expected a single run where a launcher started {world()} processes to train together.")
    if args.config_name or args.config_path or args.hydra_help or args.shell_completion or args.info:
        return argv
    for option in overrides:
        if option.startswith("-"):
            raise ConfigError(f"{option}; expected overrides (group=member, group.field=value) or one of "
                              f"{', '.join(OPTIONS)}. {did_you_mean(option, OPTIONS)}".rstrip())
    search = _search(argv)
    if not args.cfg:
        command = check_all([*overrides, *search], multirun=args.multirun)
        if not rank():
            inspect_jobs(cfg for _, cfg in command.jobs)
        return argv
    if any(map(is_sweep, overrides)):  # Hydra refuses --cfg of a grid
        jobs = split_sweep(fields_of_swept_groups(overrides, search), {})
        print(f"# the first of {len(jobs)} jobs: {' '.join(jobs[0])}", file=sys.stderr)
        argv = [*(a for a in argv if a not in (*overrides, "-m", "--multirun")), *jobs[0]]
        overrides = jobs[0]
    compose_raw([*overrides, *search])
    return argv


def _search(argv: Sequence[str]) -> list[str]:
    """The override that --config-dir stands for."""
    folder = parse_arguments(argv)[0].config_dir
    return [f"hydra.searchpath=[file://{Path(folder).resolve()}]"] if folder else []


def _job(cfg: DictConfig) -> None:
    from slm_exp.pipeline.run import run, take_part  # torch; the command line above is checked without

    hydra_cfg = HydraConfig.get()
    multirun = hydra_cfg.mode == RunMode.MULTIRUN
    run_cfg = to_run_config(cfg)
    # a job with a process of its own (slm_exp.launch) is a single run to Hydra, and gets its sweep's name this way
    group = os.environ.get("SLM_EXP_SWEEP") or (Path(hydra_cfg.sweep.dir).name if multirun else None)
    if run_cfg.save_model is None:
        run_cfg.save_model = group is None
    folder = Path(hydra_cfg.runtime.output_dir)
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
    from slm_exp.reporting.summary import summary

    print(summary(record, folder))
