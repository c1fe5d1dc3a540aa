"""`slm sweep`: how a sweep stands, finish what is missing, run cells again. Needs nothing but the sweep's folder."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from slm_exp.cli.command import FOLDER, command
from slm_exp.cli.run import main as run
from slm_exp.core.errors import ConfigError
from slm_exp.core.format import override
from slm_exp.core.plugins import loaded, words
from slm_exp.core.registry import GROUPS, load_all
from slm_exp.launch.compose import PLAIN_FIELDS
from slm_exp.launch.slurm import Queue
from slm_exp.runs.sweep import FINISHED, SweepFolder, table

EXPERIMENT = {*GROUPS, *PLAIN_FIELDS, "cache", "experiment", "sweep"}
LAUNCHER = """detach workers threads retries n_jobs prefer require verbose timeout batch_size timeout_min cpus_per_task
    gpus_per_node tasks_per_node mem_gb nodes name stderr_to_stdout partition qos comment constraint exclude gres
    cpus_per_gpu gpus_per_task mem_per_gpu mem_per_cpu account signal_delay_s max_num_timeout array_parallelism"""
SEARCH = "minimize maximize n_trials seed prune"
SETTINGS_OF_A_SWEEP = {"hydra/launcher", "hydra/sweeper", "hydra.sweep.subdir", "hydra.sweeper.max_jobs",
                       "hydra.sweeper.max_batch_size", *(f"hydra.sweeper.search.{name}" for name in SEARCH.split()),
                       *(f"hydra.launcher.{name}" for name in LAUNCHER.split())}
"""Of Hydra's, what sweep.json may give: nothing that is executed, imported, or a folder where pickles lie."""
CODE = "model.trust_remote_code"
"""The one field of an experiment that lets a model's folder run code."""


def launch(folder: Path, select: str, extra: Sequence[str], changed: bool = False) -> int:
    """Run the cells of the folder's definition that `select` names (missing, failed, all), as its command would.

    Args:
        extra: overrides on top of the command's, e.g. hydra.launcher.workers=4; they must not change what a cell is.
        changed: a plug-in may be another than the cells were defined with.
    Raises ConfigError: not a sweep's folder, an override in `extra` that belongs to the cells, or one in the folder's
    sweep.json that only a command line may give; a plug-in of the cells is not there, or another.
    """
    sweep = SweepFolder.read(folder)
    _check_plugins(sweep, f"slm sweep {'resume' if select == 'missing' else 'rerun'} {folder}", changed)
    for given in extra:
        if not given.startswith(("hydra.", "hydra/", f"{CODE}=")):
            raise ConfigError(f"{given}; expected Hydra's own settings (hydra.launcher.workers=2, hydra/launcher=basic)"
                              ": a sweep's cells are what they are. Other cells are another multirun, into the same "
                              "folder if you like.")
    path, argv = folder.resolve(), taken_from(sweep, extra)
    if any(o.startswith("hydra/launcher=") for o in extra):  # another launcher has other settings
        argv = [o for o in argv if not o.startswith(("hydra/launcher", "hydra.launcher"))]
    if Path(sweep.cwd).is_dir():  # relative paths in overrides mean the folder the command ran in
        os.chdir(sweep.cwd)
    elif sweep.cwd:
        print(f"the command ran in {sweep.cwd}, which is gone; relative paths now mean {Path.cwd()}", file=sys.stderr)
    settings = [o for o in extra if not o.startswith(CODE)]
    return run(["-m", *argv, *settings, override("hydra.sweep.dir", path), f"hydra.sweeper.select={select}"])


def taken_from(sweep: SweepFolder, extra: Sequence[str]) -> list[str]:
    """The overrides of sweep.json that a file may give, without those that the command line gives anew. Raises
    ConfigError: names the first that a file must not give. Nothing is ever executed because a file says so."""
    named = {o.partition("=")[0] for o in extra if not o.startswith(CODE)}
    argv = [o for o in sweep.argv if o.partition("=")[0].lstrip("+") not in named]
    for given in (*argv, *(o for job in sweep.jobs for o in job.overrides)):
        key, _, value = given.lstrip("+").partition("=")
        head = key.partition(".")[0]
        unsafe = key == CODE and value.lower() != "false" and f"{CODE}=true" not in extra
        fields = head in EXPERIMENT and re.fullmatch(r"[\w.]+", key)
        if "." in key or head in PLAIN_FIELDS:
            # of the launcher's, no path and no line of its own in a batch script
            setting = key in SETTINGS_OF_A_SWEEP and re.fullmatch(r"[\w.,:+*%@()[\]' $-]*", value)
            good = not unsafe if fields else setting
        else:
            good = (fields or key in SETTINGS_OF_A_SWEEP) and re.fullmatch(r"[\w.,()* -]*", value)
        if not good:
            why = "it lets the model's folder run code" if unsafe else (
                "the file may hold groups, fields of the experiment and the launcher's own settings")
            raise ConfigError(f"{sweep.path / 'sweep.json'}: {given!r}; {why}. If you mean it, give it again on the "
                              "command line.")
    return argv


def _check_plugins(sweep: SweepFolder, command: str, changed: bool) -> None:
    """Refuse to go on without the plug-ins that a sweep's cells come from: a file in a folder names no code to run."""
    load_all()
    here = {plugin.name: plugin for plugin in loaded()}
    again = f"{command} {shlex.join(words(sweep.plugins))}".rstrip()
    for plugin in sweep.plugins:
        what = plugin.file or f"{plugin.name} {plugin.version or ''}".rstrip()
        if plugin.name not in here:
            todo = f"Give it again: {again}" if plugin.file else "Install the package that brings it."
            raise ConfigError(f"{sweep.path} has cells of the plug-in {what}, which is not loaded. {todo}")
        if here[plugin.name].digest != plugin.digest and not changed:
            raise ConfigError(f"{sweep.path} has cells of the plug-in {what}, whose code is another by now (digest "
                              f"{plugin.digest[:8]}, here {here[plugin.name].digest[:8]}). Its cells would be computed "
                              f"anew: {again} --changed-plugin")


@command(
    "sweep", __doc__, group=True,
    examples={"slm sweep status outputs/multirun/threshold_rule": "one line per cell",
              "slm sweep resume outputs/multirun/threshold_rule hydra.launcher.workers=2": "what is missing",
              "slm sweep rerun --failed outputs/multirun/threshold_rule": "those that failed or died"},
    exits={0: "every cell is finished", 1: "a cell is not; it is named", 2: "a wrong call, or a folder in use"},
    notes="resume and rerun take groups, fields and the launcher's own settings from the folder's sweep.json; what "
          "could run code, plug-ins among it, is taken from the command line only.")
@click.pass_context
def main(ctx: click.Context) -> None:
    if ctx.invoked_subcommand is None:
        raise click.UsageError("status, resume or rerun is missing.", ctx)


DIR = click.argument("folder", metavar="DIR", type=FOLDER)
SETTINGS = click.argument("overrides", metavar="[SETTING]...", nargs=-1)
CHANGED = click.option("--changed-plugin", "changed", is_flag=True,
                       help="the plug-in may be another than the cells were defined with; its cells are computed anew")


@main.command("status", help="one line per cell; exit status 1 while one is not finished")
@click.option("--json", "as_json", is_flag=True, help="for programs")
@DIR
def _status(folder: Path, as_json: bool) -> int:
    cells = SweepFolder.read(folder).cells()
    queue = Queue.of(folder, cells)
    cells = [queue.told(cell) for cell in cells]
    if queue.states is None:
        print(f"the queue does not answer here ({queue.why}): cells may wait or run in Slurm", file=sys.stderr)
    print(json.dumps([c.to_json() for c in cells], indent=1) if as_json else table(cells))
    return int(any(c.state != FINISHED for c in cells))


@main.command("resume", help="run every cell that is not finished; recompute nothing that is. "
                             "SETTING is Hydra's, for now: hydra.launcher.workers=4")
@CHANGED
@DIR
@SETTINGS
def _resume(folder: Path, overrides: tuple[str, ...], changed: bool) -> int:
    return launch(folder, "missing", overrides, changed)


@main.command("rerun", help="run every cell again; an old record stays as record.before.json")
@click.option("--failed", is_flag=True, help="only those that failed or died")
@CHANGED
@DIR
@SETTINGS
def _rerun(folder: Path, overrides: tuple[str, ...], failed: bool, changed: bool) -> int:
    return launch(folder, "failed" if failed else "all", overrides, changed)
