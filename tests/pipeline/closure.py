"""In a process for each: carry out an experiment up to one stage and print which files of the package computed it.

    echo '[["plan", ["model=tiny", ...]], ...]' | python tests/pipeline/closure.py

All earlier stages come from the cache that the caller filled, so what runs is the stage's own code: the files of every
function called, and of every module imported, while it computes. Libraries are imported once, before the processes
fork; nothing of the package is.
"""

import functools
import json
import os
import sys
import tempfile
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "slm_exp"


@functools.cache  # called for every call of a function
def inside(name: str | None) -> str | None:
    """A file of the package, relative to it."""
    if not name or name.startswith("<"):
        return None
    path = Path(name).resolve()
    return str(path.relative_to(PACKAGE)) if path.is_relative_to(PACKAGE) and path.suffix == ".py" else None


def used(wanted: str, overrides: list[str]) -> None:
    from slm_exp.core.cache.store import StageStore
    from slm_exp.launch.compose import compose_run
    from slm_exp.pipeline.stages import Experiment, steps

    cfg = compose_run(overrides)
    with tempfile.TemporaryDirectory() as folder:
        x = Experiment(cfg, Path(folder), StageStore(Path(cfg.cache.dir)))
        for step in steps(cfg):
            for stage in step.stages:
                if not stage.when(x):
                    continue
                if stage.name != wanted:
                    cached = stage.carry_out(x)
                    assert cached or stage.kind is None or stage.inputs(x) is None, f"{stage.name} is not in the cache"
                    continue
                files: set[str] = set()

                def called(frame, event, argument, files=files):
                    if event == "call" and (file := inside(frame.f_code.co_filename)):
                        files.add(file)

                if x.dense.loaded:
                    raise SystemExit("weights were loaded before the stage")
                before = set(sys.modules)
                sys.setprofile(called)
                try:
                    stage.compute(x)
                finally:
                    sys.setprofile(None)
                new = [sys.modules[name] for name in set(sys.modules) - before]
                files |= {file for module in new if (file := inside(getattr(module, "__file__", None)))}
                print(json.dumps({"used": sorted(files), "declared": sorted(stage.files(x))}))
                return
    raise SystemExit(f"no stage {wanted}")


if __name__ == "__main__":
    import peft  # noqa: F401
    import scipy.optimize  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    assert "slm_exp" not in sys.modules
    for stage, overrides in json.load(sys.stdin):
        if not (child := os.fork()):
            used(stage, overrides)
            sys.stdout.flush()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0, f"{stage} of {overrides}"
