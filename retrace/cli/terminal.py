"""How run.py shows that work goes on: lines that are rewritten on a terminal, and finished lines in a file or pipe."""

from __future__ import annotations

import sys
import time

from torch import Tensor

_NAMES = {"invert": "Inverting", "reconstruct": "Reconstructing", "edit": "Editing"}


class Terminal:
    """The progress of one command, on the standard output."""

    def __init__(self) -> None:
        self._live = sys.stdout.isatty()
        self._begun = time.perf_counter()
        self._stage = ""
        self._open = False

    def say(self, line: str) -> None:
        """A line that stays."""
        self._end()
        print(line, flush=True)

    def stage(self, name: str) -> None:
        """A stage of an edit begins."""
        self._stage, self._begun = _NAMES.get(name, name), time.perf_counter()

    def steps(self, step: int, total: int, _: Tensor | None = None) -> None:
        """A step of the stage is done; elsewhere than on a terminal only the last one makes a line."""
        line = f"  {self._stage:<15}{step:>4} of {total}   {self._seconds()}"
        if self._live and step < total:
            self._rewrite(line)
        elif self._live:
            self._rewrite(line)
            self._end()
        elif step == total:
            self.say(line)

    def _seconds(self) -> str:
        return f"{time.perf_counter() - self._begun:5.1f} s"

    def _rewrite(self, line: str) -> None:
        print(f"\r{line}", end="", flush=True)
        self._open = True

    def _end(self) -> None:
        if self._open:
            print(flush=True)
            self._open = False
