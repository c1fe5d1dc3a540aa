"""`slm plan [overrides]`: what a run or a grid would do and cost, before anything is loaded.

Jobs, which of them are finished, cache hits by stage, layers and parameters before and after, operations, memory, time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import click

from slm_exp.cli.command import command, overrides_argument, require_tflops
from slm_exp.core.errors import ConfigError
from slm_exp.forecast.plan import jobs_of, make_plan, show
from slm_exp.runs.record import check_writable


@command(
    "plan", __doc__,
    examples={"slm plan": "the defaults",
              "slm plan method.threshold=0.9,0.8 merge_rule=top_layer,mean": "a grid: 4 jobs",
              "slm plan sweep=threshold_rule --json": "for programs",
              "slm plan sweep=threshold_rule --commands | xargs -d '\\n' -P2 -n1 sh -c": "the sweep without a launcher",
              "slm plan model=llama2_7b runtime=cuda --tflops 300": "for a machine that sustains 300 TFLOP/s"},
    exits={0: "every job could start", 2: "a wrong call, or a job that would fail before its weights load; says why"},
    notes="The overrides are those of a run; comma lists, sweep=NAME and -m make a grid, table=NAME the jobs that "
          "fill a table. Sizes that only a search can tell are shown as bounds. Times are those of a "
          "machine left alone, from speeds measured once (ten seconds) and kept in the cache.")
@overrides_argument()
@click.option("-m", "--multirun", is_flag=True, help="a grid, also where nothing is swept")
@click.option("--json", "as_json", is_flag=True, help="everything, for programs")
@click.option("--tflops", type=float, metavar="N", help="for a machine that sustains N TFLOP/s; measure nothing")
@click.option("--measure", is_flag=True, help="measure this machine's speed anew")
@click.option("--commands", is_flag=True, help="only a command per job, for schedulers; notes the sweep in its folder")
def main(overrides: Sequence[str], multirun: bool, as_json: bool, tflops: float | None, measure: bool,
         commands: bool) -> int:
    require_tflops(tflops)
    if commands:
        found = jobs_of(overrides, multirun, reads_weights=True)  # which name the folders
        if found.searches:
            raise ConfigError("a search chooses each job by what those before it came to, so there is no list of them. "
                              "python -m slm_exp with the same words runs it, on any launcher.")
        check_writable(found.folder)
        of_a_table = any(o.startswith("table=") for o in overrides)  # its parameters are no settings of a run
        kept = [o for o in overrides if not of_a_table or o.startswith("hydra")]
        found.define([o for o in kept if not o.startswith(("hydra.mode", "hydra.sweep.dir"))])
        print("\n".join(found.commands()))
        return 0
    plan = make_plan(overrides, multirun, tflops, measure)
    print(json.dumps(plan.to_json(), indent=1) if as_json else show(plan))
    return 2 if any(job.problem for job in plan.jobs) else 0
