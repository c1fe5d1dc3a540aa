"""`python -m slm_exp [overrides]` (= `slm-exp`): one run, or a multirun with -m."""

import sys

from slm_exp.cli.run import main

if __name__ == "__main__":
    sys.exit(main())
