"""`python -m slm_exp.cache` = `slm cache`."""

import sys

from slm_exp.cache.command import main
from slm_exp.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
