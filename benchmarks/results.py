"""``benchmarks/RESULTS.md``: every benchmark prints its table, and with ``--write`` puts it into its own section there.

A section stands between two HTML comments. A run replaces the rows that it measured and leaves the others, so a long
benchmark can be written row by row (``--only``). Each row says which of the runs listed below the table it is from.
Text outside the comments is written by hand and stays.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import textwrap
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

RESULTS = Path(__file__).with_name("RESULTS.md")
_COMMAND = list(sys.argv)  # as started: ComfyUI's modules get another one


class Table:
    """A Markdown table whose rows are printed as they come. The first cell names a row."""

    def __init__(self, *columns: str) -> None:
        self.columns = columns
        self.rows: list[tuple[str, ...]] = []
        print(f"{_line(columns)}\n{_rule(columns)}", flush=True)

    def add(self, *cells: str) -> None:
        if len(cells) != len(self.columns):
            raise ValueError(f"got {len(cells)} cells for the columns {', '.join(self.columns)}")
        self.rows.append(cells)
        print(_line(cells), flush=True)


@dataclass(frozen=True)
class Section:
    """One section of the file. ``about`` says what the figures are; ``name`` is unique in the file."""

    name: str
    title: str
    about: str

    def of(self, kind: str) -> Section:
        """The same for one of several models, as a section of its own."""
        return replace(self, name=f"{self.name}.{kind}", title=f"{self.title}: {kind}")

    def write(self, table: Table, conditions: str, device: str | None = None, file: Path = RESULTS) -> None:
        """Replace the rows of ``table``; ``conditions`` says what this run measured on (scenes, steps, sizes)."""
        text = file.read_text(encoding="utf-8")
        before, inner, after = _split(text, self.name)
        kept, runs = _parse(inner, table.columns)
        new = f"`{command()}`: {conditions}; {date.today()}, torch {_torch()}, {device or machine()}"
        runs.append(new)
        fresh = {cells[0]: (*cells, str(len(runs))) for cells in table.rows}
        rows = [fresh.pop(row[0], row) for row in kept] + list(fresh.values())
        file.write_text(before + self._render(table.columns, rows, runs) + after, encoding="utf-8", newline="\n")
        print(f"\nWritten to {file.name}, section '{self.title}'.")

    def _render(self, columns: tuple[str, ...], rows: list[tuple[str, ...]], runs: list[str]) -> str:
        used = list(dict.fromkeys(row[-1] for row in rows))  # runs by number, in the order of the rows
        number = {old: str(new) for new, old in enumerate(used, 1)}
        lines = [f"{_begin(self.name)}\n## {self.title}\n\n{textwrap.fill(self.about, 116)}\n"]
        lines += [_line((*columns, "run")), _rule((*columns, "run"))]
        lines += [_line((*row[:-1], number[row[-1]])) for row in rows]
        lines += ["", *(f"{new}. {runs[int(old) - 1]}" for old, new in number.items()), _end(self.name)]
        return "\n".join(lines)


def add_write(parser: argparse.ArgumentParser) -> None:
    """The option that every benchmark has."""
    parser.add_argument("--write", action="store_true", help=f"also put the table into benchmarks/{RESULTS.name}")


def command() -> str:
    """The command line of this process, as a person types it."""
    words = [word for word in _COMMAND[1:] if word != "--write"]
    return shlex.join(["python", "-m", f"benchmarks.{Path(_COMMAND[0]).stem}", *words])


def machine(cpu: bool = False) -> str:
    """What computes in this process: the graphics card, or the processor with its threads."""
    import torch

    if not cpu and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if not cpu and torch.backends.mps.is_available():
        return "Apple GPU"
    threads = torch.get_num_threads()
    return f"CPU, {threads} {'thread' if threads == 1 else 'threads'}"


def _torch() -> str:
    import torch

    return torch.__version__.split("+")[0]


def _begin(name: str) -> str:
    return f"<!-- begin {name} -->"


def _end(name: str) -> str:
    return f"<!-- end {name} -->"


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _rule(columns: tuple[str, ...]) -> str:
    return "|" + "---|" * len(columns)


def _split(text: str, name: str) -> tuple[str, str, str]:
    """``text`` before the section, in it and after it; a new section comes last."""
    found = re.search(f"{re.escape(_begin(name))}(.*?){re.escape(_end(name))}", text, re.DOTALL)
    if found is None:
        return f"{text.rstrip()}\n\n", "", "\n"
    return text[: found.start()], found.group(1), text[found.end() :]


def _parse(inner: str, columns: tuple[str, ...]) -> tuple[list[tuple[str, ...]], list[str]]:
    """The rows of a section with the number of their run, and its runs; nothing if its columns are others."""
    lines = [line for line in inner.splitlines() if line.startswith("|")]
    rows = [tuple(cell.strip() for cell in line[1:].rstrip("|").split("|")) for line in lines]
    if not rows or rows[0] != (*columns, "run"):
        return [], []
    return rows[2:], re.findall(r"^\d+\. (.*)$", inner, re.MULTILINE)
