"""What changes the key of a stage: its code, not what is said about it."""

from __future__ import annotations

import pytest

from slm_exp.core.cache import code, digests
from slm_exp.core.cache.code import code_digest
from slm_exp.core.cache.store import StageStore
from slm_exp.launch.compose import compose_run
from slm_exp.pipeline.stages import Experiment, steps

SOURCE = '''
"""About the module."""
import logging

log = logging.getLogger(__name__)
LIMIT = 0.9  # a threshold
"""About the constant."""


class A:
    """About the class."""


def f(x: int) -> int:
    """About the function."""
    log.info("computing %s", x)
    logging.warning("odd")
    return x + 1
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    monkeypatch.setattr(code, "PACKAGE", tmp_path)
    (tmp_path / "a.py").write_text(SOURCE)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.py").write_text("x = 1")
    return tmp_path


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("About the module", "Of the module"),
        ("About the class", "Of the class"),
        ("About the function", "Of the function"),
        ("About the constant", "Of the constant"),
        ("a threshold", "the threshold"),
        ("computing %s", "now %s"),
        ('    logging.warning("odd")\n', ""),
        ("x + 1", "(x\n            + 1)"),
    ],
)
def test_words_do_not_count(package, old, new):
    before = code_digest(["a.py"])
    assert old in SOURCE
    (package / "a.py").write_text(SOURCE.replace(old, new))
    assert code_digest(["a.py"]) == before


@pytest.mark.parametrize(
    ("old", "new"),
    [("0.9", "0.8"), ("x + 1", "x - 1"), ("def f(", "def g("), ("return x", "log.info(x)\n    return 2")],
)
def test_code_counts(package, old, new):
    before = code_digest(["a.py"])
    assert old in SOURCE
    (package / "a.py").write_text(SOURCE.replace(old, new, 1))
    assert code_digest(["a.py"]) != before


def test_a_folder_stands_for_its_files(package):
    assert code_digest(["more"]) == code_digest(["more/b.py"]) != code_digest(["a.py"])
    assert code_digest(["more", "a.py", "more/b.py"]) == code_digest(["a.py", "more"])
    before = code_digest(["more"])
    (package / "more" / "c.py").write_text("")
    assert code_digest(["more"]) != before
    with pytest.raises(OSError, match=r"none\.py"):
        code_digest(["none.py"])


def as_another_process() -> None:
    for kept in (code._trees, code._tree_digest):
        kept.cache_clear()


def test_a_source_is_parsed_once_on_a_machine(package, tmp_path, monkeypatch):
    """Until it changes; a damaged memory costs time only."""
    monkeypatch.setenv("SLM_EXP_CACHE", str(tmp_path / "cache"))
    digests.remember_in(None)
    parsed, parse = [], code.ast.parse
    monkeypatch.setattr(code.ast, "parse", lambda source: parsed.append(source) or parse(source))
    as_another_process()
    before = code_digest(["a.py", "more"])
    assert len(parsed) == 2
    as_another_process()
    assert code_digest(["a.py", "more"]) == before
    assert len(parsed) == 2
    (package / "a.py").write_text(SOURCE.replace("0.9", "0.8"))
    assert code_digest(["a.py", "more"]) != before
    assert len(parsed) == 3
    (package / "a.py").write_text(SOURCE)
    (memory,) = (tmp_path / "cache" / "digests").glob("*.json")
    text = memory.read_text()
    for damage in (text.replace(code.tree_digest(package / "a.py"), "0" * 16), text[:-9], "[]", ""):
        memory.write_text(damage)
        as_another_process()
        assert code_digest(["a.py", "more"]) == before
    as_another_process()


def test_what_the_caller_says_decides_the_key(package, tmp_path):
    store = StageStore(tmp_path / "cache")
    one, other = code.Code(("a.py",)), code.Code(("more",))
    keys = {store.key("plan", {}, one), store.key("plan", {}, other), store.key("plan", {}, code.Code(("a.py",), ()))}
    assert len(keys) == 3
    with pytest.raises(ValueError, match="thoughts"):
        store.entry("thoughts", {}, one)


def test_every_declared_file_is_there(tmp_path):
    cfg = compose_run(["model=tiny", "evaluation=none", "tracking=none"])
    x = Experiment(cfg, tmp_path, StageStore(None))
    kept = [stage for step in steps(cfg) for stage in step.stages if stage.kind]
    assert {stage.name for stage in kept} >= {"calibrate", "similarity", "plan", "width", "recover", "evaluate"}
    for stage in kept:
        for path in stage.code(x):
            assert (code.PACKAGE / path).exists(), stage.name
        assert code_digest(stage.code(x)), stage.name
