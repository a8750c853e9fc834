"""What other people's checkers say about the pack: python tools/check_ecosystem.py (needs a ComfyUI, and no network).

comfy-lint
    every graph in ``workflows/api`` against the nodes of a running ComfyUI
comfy-import-guard
    every name of core that the shipped code uses, against the source of a ComfyUI
comfy-test
    the scripts for the browser, for collisions with other packs

The first two run for each ComfyUI: the one in ``COMFYUI_PATH`` and, where set, the one in ``COMFYUI_FLOOR_PATH``.
Install the checkers first: pip install comfy-lint comfy-import-guard comfy-test
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ASKED_WITH_A_DEFAULT = {
    "comfy.model_management.STREAM_CAST_BUFFERS",
    "comfy.model_management.in_training",
    "comfy.model_management.is_oom",
    "comfy.model_patcher.CoreModelPatcher",
}
"""Names that old versions lack and that the code asks for with a default, which comfy-import-guard does not see."""


def run(*command: str | Path) -> bool:
    """Run a checker and show what it says; whether it passed."""
    print(f"$ {' '.join(map(str, command))}", flush=True)
    return subprocess.run([program(str(command[0])), *map(str, command[1:])], cwd=ROOT).returncode == 0


def program(name: str) -> str:
    beside = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if beside is None:
        sys.exit(f"{name} is not installed: pip install comfy-lint comfy-import-guard comfy-test")
    return beside


def lint_graphs(install: Any, scratch: Path) -> bool:
    from tools.comfyui.server import ComfyServer

    known = scratch / "object_info.json"
    with ComfyServer(install, ROOT) as server:
        known.write_text(json.dumps(server.object_info()), encoding="utf-8")
    # A graph that waits for a file of the user's has null in that place.
    graphs = [file for file in sorted(ROOT.glob("workflows/api/*.json")) if ": null" not in file.read_text("utf-8")]
    return run("comfy-lint", "--schema-cache", known, *(file.relative_to(ROOT) for file in graphs))


def check_imports(install: Any, scratch: Path) -> bool:
    """comfy-import-guard reads a git repository; it gets one that holds just this ComfyUI's modules."""
    repository, packs = scratch / "cache" / "ComfyUI", scratch / "install" / "custom_nodes"
    repository.mkdir(parents=True)
    for file in install.path.glob("*.py"):
        shutil.copy(file, repository)
    for folder in (
        "api_server",
        "app",
        "comfy",
        "comfy_api",
        "comfy_config",
        "comfy_execution",
        "comfy_extras",
        "utils",
    ):
        if (install.path / folder).is_dir():
            shutil.copytree(install.path / folder, repository / folder, ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-C", str(repository), "-c", "user.name=check", "-c", "user.email=check@localhost"]
    for words in (["init", "--quiet"], ["add", "--all", "--force"], ["commit", "--quiet", "--message", "ComfyUI"]):
        subprocess.run([*git, *words], check=True)
    left_out = (ROOT / ".comfyignore").read_text(encoding="utf-8").split()
    patterns = [".git", "__pycache__", *(name.strip("/") for name in left_out)]
    shutil.copytree(ROOT, packs / "ComfyUI-Retrace", ignore=shutil.ignore_patterns(*patterns))
    command = ["comfy-import-guard", "--offline", "--quiet", "--json", "--cache-dir", str(scratch / "cache"), "check"]
    command += ["--no-update", "--target", "HEAD", "--comfy-dir", str(scratch / "install")]
    print(f"$ {' '.join(command)}", flush=True)
    done = subprocess.run([program(command[0]), *command[1:]], capture_output=True, text=True)
    if not done.stdout.startswith("{"):
        print(done.stdout + done.stderr)
        return False
    (pack,) = json.loads(done.stdout)["packs"]
    findings = [item for value in pack.values() if isinstance(value, list) for item in value]
    wrong = [item for item in findings if item["dotted"] not in ASKED_WITH_A_DEFAULT]
    for item in wrong:
        print(f"{item['file']}:{item['line']}: {item['status']} {item['dotted']} ({item['detail']})")
    print(f"{pack['references']} names of core used, {len(findings)} findings, {len(wrong)} of them wrong")
    return not wrong


def main() -> int:
    sys.path.insert(0, str(ROOT))
    from tools.comfyui.server import ComfyInstall, find_comfyui

    floor = os.environ.get("COMFYUI_FLOOR_PATH")
    installs = [find_comfyui(), ComfyInstall.at(Path(floor)) if floor else None]
    passed = [run("comfy-test", "lint", "--check", "javascript", ".")]
    for install in filter(None, installs):
        print(f"\nComfyUI {install.version}", flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            passed += [lint_graphs(install, Path(scratch)), check_imports(install, Path(scratch))]
    if not any(installs):
        print("No ComfyUI found (set COMFYUI_PATH): only comfy-test ran.")
    print("\nAll passed." if all(passed) else "\nFailed: see above.")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
