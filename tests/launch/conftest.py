from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from sweeping import Sweep


@pytest.fixture
def sweep(tmp_path: Path) -> Iterator[Sweep]:
    """A sweep folder of its own, with a stage cache of its own."""
    made = Sweep(tmp_path / "sweep", tmp_path / "cache", ["hydra.launcher.workers=2"])
    yield made
    made.close()


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """`mount("name", "size=1m")`: a tmpfs there, gone after the test; skips where mounting is not allowed."""
    mounted: list[Path] = []

    def go(name: str, options: str) -> Path:
        if os.geteuid() != 0 or not shutil.which("mount"):
            pytest.skip("mounting a small file system needs root")
        path = tmp_path / name
        path.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
        mounted.append(path)
        return path

    yield go
    for path in reversed(mounted):
        subprocess.run(["umount", "-l", str(path)], check=False)
