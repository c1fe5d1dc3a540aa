"""`python -m slm_exp.cli COMMAND` = `slm COMMAND`."""

import sys

from slm_exp.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
