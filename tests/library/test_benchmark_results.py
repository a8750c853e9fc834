"""benchmarks/results.py: what a benchmark writes into RESULTS.md, and what it leaves alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.results import Section, Table

SECTION = Section("speed", "Speed", "Seconds of one thing.")
BY_HAND = "# Measurements\n\nWritten by hand.\n"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(results, "_COMMAND", ["benchmarks/speed.py", "--only", "the second", "--write"])
    made = tmp_path / "RESULTS.md"
    made.write_text(BY_HAND, "utf-8")
    return made


def table(*rows: tuple[str, str], columns: tuple[str, str] = ("what", "seconds")) -> Table:
    made = Table(*columns)
    for cells in rows:
        made.add(*cells)
    return made


def rows_of(file: Path) -> list[str]:
    return [line for line in file.read_text("utf-8").splitlines() if re.match(r"\| (?!what|thing)", line)]


def test_a_new_section_comes_last_with_its_table_and_its_run(file: Path) -> None:
    SECTION.write(table(("first", "1.0"), ("second", "")), "3 scenes", "CPU", file)
    text = file.read_text("utf-8")
    assert text.startswith(BY_HAND + "\n<!-- begin speed -->\n## Speed\n\nSeconds of one thing.\n\n")
    assert "| what | seconds | run |\n|---|---|---|\n| first | 1.0 | 1 |\n| second |  | 1 |\n\n1. `" in text
    assert re.search(r"^1\. `python -m benchmarks\.speed --only 'the second'`: 3 scenes; [\d-]+, torch ", text, re.M)
    assert text.endswith(", CPU\n<!-- end speed -->\n")


def test_a_run_replaces_its_own_rows_and_says_which_they_are(file: Path) -> None:
    SECTION.write(table(("first", "1.0"), ("second", "2.0")), "3 scenes", "CPU", file)
    SECTION.write(table(("second", "2.5"), ("third", "3.5")), "9 scenes", "CPU", file)
    assert rows_of(file) == ["| first | 1.0 | 1 |", "| second | 2.5 | 2 |", "| third | 3.5 | 2 |"]
    assert [run[:1] for run in re.findall(r": (\d+ scenes)", file.read_text("utf-8"))] == ["3", "9"]
    SECTION.write(table(("first", "4"), ("second", "5"), ("third", "6")), "50 scenes", "CPU", file)
    assert re.findall(r": (\d+ scenes)", file.read_text("utf-8")) == ["50 scenes"]


def test_the_rest_of_the_file_stays(file: Path) -> None:
    other = Section("speed.other", "Other", "Something else.")
    SECTION.write(table(("first", "1.0")), "3 scenes", "CPU", file)
    other.write(table(("first", "7.0")), "3 scenes", "CPU", file)
    file.write_text(file.read_text("utf-8") + "\nA remark.\n", "utf-8")
    before = file.read_text("utf-8")
    SECTION.write(table(("first", "1.5")), "3 scenes", "CPU", file)
    assert file.read_text("utf-8") == before.replace("| first | 1.0 | 1 |", "| first | 1.5 | 1 |")


def test_other_columns_replace_the_whole_table(file: Path) -> None:
    SECTION.write(table(("first", "1.0"), ("second", "2.0")), "3 scenes", "CPU", file)
    SECTION.write(table(("first", "9"), columns=("thing", "minutes")), "3 scenes", "CPU", file)
    assert rows_of(file) == ["| first | 9 | 1 |"]


def test_the_file_that_ships_reads_back_as_it_is(tmp_path: Path) -> None:
    text = results.RESULTS.read_text("utf-8")
    names = re.findall(r"<!-- begin (\S+) -->", text)
    assert names and len(names) == len(set(names)) == text.count("<!-- end ")
    for name in names:
        _, inner, _ = results._split(text, name)
        header = next(line for line in inner.splitlines() if line.startswith("|"))
        columns = tuple(cell.strip() for cell in header.strip("|").split("|"))[:-1]
        rows, runs = results._parse(inner, columns)
        assert rows and {row[-1] for row in rows} == {str(i) for i in range(1, len(runs) + 1)}, name
        assert {len(row) for row in rows} == {len(columns) + 1}, name
