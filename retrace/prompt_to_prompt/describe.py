"""What an edit does, in lines of text."""

from __future__ import annotations

from ..core.prompt import Prompt
from .control import PromptToPrompt, Target


def describe_edit(edit: PromptToPrompt) -> str:
    """For every target: which word takes whose place, which is new, which is gone, and what was set for it."""
    lines = [f"source: {edit.source.text}"]
    for number, target in enumerate(edit.targets, 1):
        lines.append(f"target {number}: {target.prompt.text}")
        lines += [f"  {line}" for line in _words(edit.source, target)]
    window = " to ".join(f"{share:.0%}" for share in edit.self_replace)
    lines.append(f"self-attention of the source: {window} of the steps, up to {edit.self_limit} x {edit.self_limit}")
    if edit.blend is not None:
        lines.append(f"local blend from {edit.blend.start:.0%} of the steps, threshold {edit.blend.threshold:g}")
    return "\n".join(lines)


def _words(source: Prompt, target: Target) -> list[str]:
    lines: list[str] = []
    used: set[int] = set()
    for word in target.prompt.words:
        first = word.positions[0]
        givers = [w for w in source.words if any(float(target.tokens.mapper[p, first]) > 0 for p in w.positions)]
        used.update(id(giver) for giver in givers)
        text = " ".join(giver.text for giver in givers)
        if not float(target.tokens.taken[first]):
            line = f"{word.text}: new"
        elif text == word.text:
            line = word.text
        else:
            line = f"{word.text} in place of {text or 'no word'}"
        weight = float(target.weights[first])
        if weight != 1:
            line += f", weight {weight:g}"
        start, end = target.windows[first].tolist()
        lines.append(f"{line} ({start:.0%} to {end:.0%})" if float(target.tokens.taken[first]) else line)
    gone = [word.text for word in source.words if id(word) not in used]
    return [*lines, f"gone: {', '.join(gone)}"] if gone else lines
