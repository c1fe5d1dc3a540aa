"""For tests: makes chosen cells of a real sweep misbehave. Python imports this module at start from PYTHONPATH.

SLM_TEST_MISBEHAVE holds JSON, `{"<seed>": ["<stage>", "<deed>", argument]}`: the cell with that seed does the deed
when it enters that stage. Processes of the package that run no such cell never notice.
"""

import contextlib
import json
import os

if os.environ.get("SLM_TEST_MISBEHAVE"):
    import signal
    import sys
    import time

    from slm_exp.pipeline.observers import Recorder

    plans = json.loads(os.environ["SLM_TEST_MISBEHAVE"])
    enter_stage = Recorder.stage

    def first_time(folder: str) -> bool:
        try:
            open(os.path.join(folder, f"hung.{os.environ.get('SLURM_ARRAY_TASK_ID')}"), "x").close()
        except FileExistsError:
            return False
        return True

    def do(deed: str, argument: str) -> None:
        if deed == "raise":
            raise ValueError(argument)
        if deed == "memory":
            raise MemoryError(argument)
        if deed == "exit":
            sys.exit(int(argument))
        if deed == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if deed == "hang" or (deed == "hang_once" and first_time(argument)):
            time.sleep(600)
        while deed == "until" and not os.path.exists(argument):
            time.sleep(0.1)
        if deed == "fill":  # take every byte the file system has left
            with contextlib.suppress(OSError), open(argument, "wb", buffering=0) as f:
                while True:
                    f.write(b"x" * 4096)

    @contextlib.contextmanager
    def stage(self, name):
        with enter_stage(self, name) as inside:
            when, deed, argument = plans.get(str(self.cfg.seed), (None, None, None))
            if when == name:
                do(deed, argument)
            yield inside

    Recorder.stage = stage
