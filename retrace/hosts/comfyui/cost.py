"""The last lines of a report: what the run took."""

from __future__ import annotations


def memory_lines(peak_megabytes: int | None, recomputed: bool = False, asked_for: bool | None = None) -> list[str]:
    """Peak memory, where the platform can tell; and whether blocks were computed twice to save some, and why."""
    lines = []
    if recomputed:
        why = "as asked for" if asked_for else "because memory ran out"
        lines.append(f"blocks were computed twice to save memory, {why}")
    if peak_megabytes is not None:
        lines.append(f"peak memory {peak_megabytes} MB")
    return lines
