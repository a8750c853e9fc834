"""A line of text on a node while it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def progress_text(hidden: Any) -> Callable[[str], None]:
    """Shows texts on the node whose ``hidden`` inputs these are; does nothing where no server runs."""
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    node_id = hidden.unique_id if hidden else None

    def show(text: str) -> None:
        if server is not None and node_id is not None:
            server.send_progress_text(text, node_id)

    return show
