"""The type check over all that is written in Python here: ``python -m tools.check_types``.

ComfyUI imports the folder of a pack as a package, under whatever name it was cloned, and the nodes reach the library
relatively (``from ..retrace``). For a checker that starts inside the folder that package has no name, so everything
from the library would silently be ``Any`` in the nodes. Here mypy sees them in a copy, as the package ``pack``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAGE = ROOT / ".mypy_cache" / "as_package"
SOURCES = ("retrace", "tools", "tests", "benchmarks", "run.py")


def stage(extra: Mapping[str, str] | None = None) -> Path:
    """Copy what ComfyUI imports to where it is the package ``pack``; ``extra`` adds files by path, for a test.

    Times are kept, so that mypy's cache holds from run to run.
    """
    pack = STAGE / "pack"
    shutil.rmtree(pack, ignore_errors=True)
    for folder in ("nodes", "retrace"):
        shutil.copytree(ROOT / folder, pack / folder, ignore=_not_python)
    shutil.copy2(ROOT / "__init__.py", pack)
    for path, text in (extra or {}).items():
        (pack / path).write_text(text, encoding="utf-8")
    return pack


def _not_python(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name == "__pycache__" or ("." in name and not name.endswith(".py"))]


def check(*paths: str) -> subprocess.CompletedProcess[str]:
    """Run mypy on ``paths``, relative to the root, with the settings in pyproject.toml."""
    environment = {**os.environ, "MYPYPATH": str(STAGE)}
    command = [sys.executable, "-m", "mypy", *paths]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def main() -> int:
    """Check everything and print what mypy says."""
    pack = stage()
    done = check(*SOURCES, str((pack / "nodes").relative_to(ROOT)), str((pack / "__init__.py").relative_to(ROOT)))
    print(done.stdout + done.stderr, end="")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
