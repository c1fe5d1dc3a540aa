"""`python -m slm_exp.tables` = `slm tables`."""

import sys

from slm_exp.cli import run_command
from slm_exp.tables.command import main

if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
