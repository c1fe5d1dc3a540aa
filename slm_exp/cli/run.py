"""`python -m slm_exp [overrides]` (= `slm-exp`): check the command line, then let Hydra run it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_exp.core.errors import ConfigError, SlmError
from slm_exp.core.runtime import rank, world
from slm_exp.launch.compose import (
    check_all,
    compose_raw,
    conf_dir,
    fields_of_swept_groups,
    is_sweep,
    open_mappings,
    prepare_hydra,
    split_sweep,
)
from slm_exp.pipeline.config import to_run_config

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Exit status: 0 all finished, 1 a job failed, 2 the config is wrong."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        argv = _first_shown(argv)
        _check_command(argv)
    except SlmError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    import hydra

    prepare_hydra()
    app = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(_job)
    sys.argv = [sys.argv[0] if sys.argv else "slm-exp", *fields_of_swept_groups(open_mappings(argv))]
    app()
    return 0


def _first_shown(argv: list[str]) -> list[str]:
    """`--cfg` of a grid shows the config of its first job, and says so; Hydra refuses the pair."""
    from hydra._internal.utils import get_args_parser

    args, unknown = get_args_parser().parse_known_args(argv)
    overrides = [*args.overrides, *unknown]
    if not args.cfg or not any(map(is_sweep, overrides)):
        return argv
    jobs = split_sweep(fields_of_swept_groups(overrides), {})
    print(f"# the first of {len(jobs)} jobs: {' '.join(jobs[0])}", file=sys.stderr)
    return [*(a for a in argv if a not in (*overrides, "-m", "--multirun")), *jobs[0]]


def _check_command(argv: list[str]) -> None:
    """Check what the command line asks for, with this package's messages, before Hydra takes over."""
    from hydra._internal.utils import get_args_parser

    args, unknown = get_args_parser().parse_known_args(argv)
    overrides = [*args.overrides, *unknown]
    if args.multirun and world() > 1:
        raise ConfigError(f"-m; expected a single run where a launcher started {world()} processes to train together.")
    if args.config_name or args.config_path or args.help or args.hydra_help or args.shell_completion or args.info:
        return
    if args.config_dir:
        overrides.append(f"hydra.searchpath=[file://{Path(args.config_dir).resolve()}]")
    if args.cfg:
        compose_raw(overrides)
    else:
        check_all(overrides, multirun=args.multirun)


def _job(cfg: DictConfig) -> dict[str, Any] | None:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from slm_exp.pipeline.run import run

    hydra_cfg = HydraConfig.get()
    multirun = hydra_cfg.mode == RunMode.MULTIRUN
    run_cfg = to_run_config(cfg)
    # a job with a process of its own (slm_exp.launch) is a single run to Hydra, and told its sweep's name
    group = os.environ.get("SLM_EXP_SWEEP") or (Path(hydra_cfg.sweep.dir).name if multirun else None)
    if run_cfg.save_model is None:
        run_cfg.save_model = group is None
    folder = Path(hydra_cfg.runtime.output_dir)
    if rank():
        from slm_exp.pipeline.run import take_part

        take_part(run_cfg, folder)
        return None
    try:
        record = run(run_cfg, folder, list(hydra_cfg.overrides.task), group)
    except SystemExit as error:
        if multirun:  # it would end the whole sweep
            raise SlmError(f"run {run_cfg.run_id} called sys.exit({error.code})") from error
        raise
    except SlmError as error:
        print(f"run {run_cfg.run_id} failed: {error}\nIts record: {folder / 'record.json'}", file=sys.stderr)
        if multirun:  # a plain message: other processes get to unpickle it
            raise SlmError(str(error)) from None
        raise SystemExit(1) from None
    from slm_exp.reporting.summary import summary

    print(summary(record, folder))
    return None
