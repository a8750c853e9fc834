"""Retrace without ComfyUI: `python run.py demo`, `python run.py edit ...`, `python run.py test`.

This file needs nothing but Python. It makes a virtual environment beside it, installs what the command
needs, and starts itself again in there; the second time that takes no time.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
# Apart from the other, because what only the tests need may not go with its torch (a torchvision of another build).
TEST_VENV = ROOT / ".venv-test"

# The versions that were tested, for this environment only: pyproject.toml leaves them open, so that a ComfyUI keeps its
# own. Macs with Intel processors have no such wheel and get the newest there is.
_INTEL_MAC = "sys_platform == 'darwin' and platform_machine == 'x86_64'"
TESTED = {
    "torch": ["torch==2.13.0; sys_platform != 'darwin' or platform_machine != 'x86_64'", f"torch; {_INTEL_MAC}"],
}


class SetupError(Exception):
    """The environment cannot be made; the text says why and what to do."""


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="run.py", description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True, metavar="demo | edit | test")
    demo = commands.add_parser("demo", help="edit an example image and write a contact sheet")
    demo.add_argument("image", nargs="?", type=Path, help="an image of your own; needs --mask, --source and --prompt")
    edit = commands.add_parser("edit", help="edit your own image under a mask")
    edit.add_argument("image", type=Path, help="the image (PNG, JPEG, WebP, ...)")
    for command, needed in ((demo, False), (edit, True)):
        command.add_argument("--mask", type=Path, required=needed, help="a grey image of the same size, white = edit")
        command.add_argument("--source", required=needed, help="what the image shows, in words")
        command.add_argument("--prompt", required=needed, help="what it should show")
        command.add_argument("--model", type=Path, help="diffusers folder or .safetensors file (default: Pebble)")
        command.add_argument("--steps", type=int, help="sampling steps (default 50)")
        command.add_argument("--guidance", type=float, help="how strongly the prompt counts (default 7.5)")
        command.add_argument(
            "--strength",
            type=float,
            help="above 0, up to 1: how much noise the edit starts from (default 1)",
        )
        command.add_argument("--seed", type=int, help="same seed, same image (default 0)")
        command.add_argument(
            "--method", choices=("ddim", "fixed_point", "spdinv"), help="how to invert, fast to exact (default ddim)"
        )
        command.add_argument("--output", type=Path, help="folder for the results (default: output/<name>)")
        command.add_argument("--size", type=int, help="longest side the model works at (default: the model's own)")
        command.add_argument("--device", help="cuda, mps or cpu (default: the fastest there is)")
    test = commands.add_parser(
        "test", help="check the code and run the quick tests; with --all the slow ones too", add_help=False
    )
    test.add_argument("pytest", nargs=argparse.REMAINDER, help="arguments for pytest; with any, only pytest runs")
    return parser


def requirements(command: str) -> list[str]:
    """What pip installs for a command, from the lists in pyproject.toml."""
    wanted = _list("standalone")
    if command == "test":
        wanted += _list("test") + _list("dependencies")
    return [line for name in wanted for line in TESTED.get(name, [name])]


def _list(name: str) -> list[str]:
    """The list of strings ``name = [...]`` of pyproject.toml, written like Python's (3.10 has no TOML reader)."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(rf"^{name} = (\[.*?\])$", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise SetupError(f"pyproject.toml has no list '{name}'. Restore the file.")
    return [str(item) for item in ast.literal_eval(found.group(1))]


def venv_of(command: str) -> Path:
    """The folder of the environment that runs ``command``."""
    return TEST_VENV if command == "test" else VENV


def venv_python(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def stamp(command: str) -> tuple[Path, str]:
    """The file that says what is installed for a command, and what it must contain."""
    group = "test" if command == "test" else "standalone"
    content = "\n".join(requirements(command))
    return venv_of(command) / f"retrace-{group}.stamp", hashlib.sha256(content.encode()).hexdigest()


def ready(command: str) -> bool:
    file, content = stamp(command)
    return venv_python(venv_of(command)).is_file() and file.is_file() and file.read_text(encoding="utf-8") == content


def make_environment(command: str) -> None:
    """Create the environment if it is not there, and install what ``command`` needs.

    Raises:
        SetupError: Python is too old or has no venv module, or pip failed (its own message was printed).
    """
    if sys.version_info < (3, 10):  # noqa: UP036  (an older Python gets a sentence, not a traceback)
        raise SetupError(
            f"This is Python {sys.version.split()[0]}; 3.10 or newer is needed. Start run.py with that one."
        )
    if ready(command):
        return
    place = venv_of(command)
    print(f"Preparing the environment in {place} (the first time only; about 1 GB with torch) ...", flush=True)
    if not venv_python(place).is_file():
        try:
            import venv

            venv.EnvBuilder(with_pip=True, clear=True).create(place)
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            raise SetupError(
                f"A virtual environment cannot be made in {place} ({error}). Debian and Ubuntu need the package "
                "python3-venv; else check that the folder is writable."
            ) from error
    file, content = stamp(command)
    pip = [str(venv_python(place)), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    if subprocess.call([*pip, *requirements(command)]) != 0:
        raise SetupError(
            "The packages were not installed; pip's message is above. Check the network connection (a proxy or mirror "
            "is set with PIP_PROXY or PIP_INDEX_URL) and the free space, then run the command again."
        )
    from retrace.core.files import replace_file  # standard library only

    replace_file(file, content.encode())


def inside(command: str) -> bool:
    return Path(sys.prefix).resolve() == venv_of(command).resolve()


def run_tests(pytest_arguments: list[str], everything: bool = False) -> int:
    """The checks and the quick tests; with ``everything`` the slow ones too. Pytest's closing line comes last.

    With arguments pytest gets those and no others, and the checks run only with ``everything``.
    """
    python, failed = sys.executable, 0
    if everything or not pytest_arguments:
        for check in (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["tools.check_types"]):
            print(f"$ {' '.join(check)}", flush=True)
            failed |= subprocess.call([python, "-m", *check], cwd=ROOT)
    chosen = pytest_arguments or [*([] if everything else ["-m", "not slow"]), str(ROOT / "tests")]
    # Arguments may name files relative to where the user is.
    status = subprocess.call([python, "-m", "pytest", "--rootdir", str(ROOT), *chosen])
    return status or int(bool(failed))


def main(argv: list[str]) -> int:
    """Returns the exit status: 0 done, 1 tests failed, 2 something the user can put right, 130 stopped."""
    if argv[:1] == ["test"]:  # pytest has options of its own that argparse would claim
        rest = [argument for argument in argv[1:] if argument != "--all"]
        options = argparse.Namespace(command="test", everything=len(rest) < len(argv) - 1, pytest=rest)
    else:
        options = arguments().parse_args(argv)
    try:
        if not inside(options.command):
            make_environment(options.command)
            # Windows would read and print in the language of the system, which has no room for other ones.
            environment = {"PYTHONUTF8": "1", **os.environ}
            python = venv_python(venv_of(options.command))
            return subprocess.call([str(python), str(ROOT / "run.py"), *argv], env=environment)
        if options.command == "test":
            return run_tests(options.pytest, options.everything)
        sys.path.insert(0, str(ROOT))
        from retrace.cli.main import main as standalone

        return standalone(options)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
