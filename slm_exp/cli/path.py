"""`slm path [overrides]`: every plan that any threshold in method.threshold_range can produce, with its interval.

Writes path.json, path.png, budgets.png (scores over parameters, FLOPs, latency and file size) and path.md. With
recovery=family one training recovers every size, whose losses before and after are drawn and written too. A killed path
resumes: every score it had is in the stage cache, a training goes on from its last checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
from hydra.errors import HydraException

from slm_exp.cli.command import command, overrides_argument
from slm_exp.core.errors import ConfigError
from slm_exp.core.files import digest
from slm_exp.launch.compose import choices, compose_run
from slm_exp.launch.hydra_compat import is_sweep, parse
from slm_exp.recovery.family import Family
from slm_exp.runs.record import check_writable


@command(
    "path", __doc__,
    examples={"slm path": "the default model, thresholds 0.5 to 1",
              "slm path method.threshold_range=[0.85,0.95] merge_rule=mean": "a part of it, another rule",
              "slm path recovery=family --save 26,22": "one training for all sizes; checkpoints of two of them",
              "slm path method.max_evaluations=200": "stop early and say which intervals are unknown",
              "slm path hydra.run.dir=FOLDER": "where path.json goes; default outputs/path/<id>"},
    exits={0: "the whole range is known", 1: "method.max_evaluations ended it; the same command with more goes on",
           2: "a wrong call"},
    notes="The overrides are those of a run; method.threshold, target sizes, evaluation, width, tracking "
          "and recoveries other than family play no part. A killed path goes on where it was.")
@click.option("--save", metavar="LAYERS", default="", help="write plain checkpoints of these sizes, e.g. 26,22")
@overrides_argument()
def main(save: str, overrides: Sequence[str]) -> int:
    if not all(n.strip().isdecimal() for n in save.split(",") if save):
        raise ConfigError(f"--save {save}; expected numbers of layers, e.g. --save 26,22.")
    wanted = [int(n) for n in save.split(",") if save]
    given = [o for o in overrides if o.startswith("hydra.run.dir=")]
    try:
        folder = parse(given[-1]).value() if given else None
    except HydraException as error:
        raise ConfigError(f"{given[-1]}; expected a folder, quoted as Hydra has it ({error}).") from None
    methods = [o.partition("=")[2] for o in overrides if o.startswith("method=")]
    if methods and methods[-1] != "slm" and methods[-1] in choices("method"):  # before what else that method wants
        raise ConfigError(f"method = {methods[-1]}; expected slm: only it decides by a threshold, so no other has a "
                          f"path. Sizes of it: python -m slm_exp -m method={methods[-1]} method.target_layers=26,24")
    if several := next((o for o in overrides if is_sweep(o)), ""):
        raise ConfigError(f"{several}; expected one value: a path is every threshold at once, of one model and rule. "
                          "method.threshold_range=[0.5,1] says which thresholds; another setting is another path.")
    if any(o.startswith("sweep=") for o in overrides):
        raise ConfigError("slm path follows one model and rule over all thresholds; a sweep= preset is a grid of runs. "
                          "python -m slm_exp with it runs the grid.")
    cfg = compose_run([o for o in overrides if not o.startswith("hydra.")])
    if cfg.method.name != "slm":  # by a preset
        raise ConfigError(f"method = {cfg.method.name}; expected slm: only it decides by a threshold.")
    science = {k: v for k, v in cfg.science().items() if k in ("model", "calibration", "seed")}
    range_ = [float(x) for x in cfg.method.threshold_range]  # type: ignore[attr-defined]
    if isinstance(cfg.recovery, Family):
        science["recovery"] = cfg.recovery.identity()
    out = Path(str(folder or "") or f"outputs/path/{digest(science | cfg.plan_identity() | {'path': range_})}")
    check_writable(out)
    from slm_exp.cli.follow import follow_and_write  # torch: a wrong call is refused without

    return follow_and_write(cfg, out, wanted)
