"""Sliding layer merging as a config-driven experiment: analyse, merge, recover, measure, record."""

import os

__version__ = "0.1.0"

# Threads that wait for each other should sleep, not spin: where another process wants the same cores, torch's CPU
# kernels become several times slower otherwise. Read once, when torch loads; an own setting wins.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
