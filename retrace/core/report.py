"""What reports of all methods share."""

from __future__ import annotations


def cost_line(evaluations: int, backwards: int, seconds: float) -> str:
    """What a run took, in one line."""
    passes = f", {backwards} backward passes" if backwards else ""
    return f"{evaluations} network evaluations{passes}, {seconds:.1f} s"


def memory_lines(peak_megabytes: int | None, recomputed: bool = False, asked_for: bool | None = None) -> list[str]:
    """Peak memory, where the platform can tell; and whether blocks were computed twice to save some, and why."""
    lines = []
    if recomputed:
        why = "as asked for" if asked_for else "because memory ran out"
        lines.append(f"blocks were computed twice to save memory, {why}")
    if peak_megabytes is not None:
        lines.append(f"peak memory {peak_megabytes} MB")
    return lines
