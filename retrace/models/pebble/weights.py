"""Where Pebble's weights are."""

from __future__ import annotations

import os
from pathlib import Path

from ...core.errors import InvalidFile

# For those who train their own: a folder of the same layout to use instead.
OVERRIDE = "RETRACE_PEBBLE"
SHIPPED = Path(__file__).parent / "weights"


def weights_folder() -> Path:
    """The diffusers folder that ships with this package; raises :class:`InvalidFile` when it is incomplete."""
    folder = Path(os.environ.get(OVERRIDE) or SHIPPED)
    missing = [part for part in ("unet", "vae", "text_encoder", "tokenizer") if not (folder / part).is_dir()]
    if missing:
        raise InvalidFile(
            f"Pebble's weights are incomplete: {', '.join(missing)} missing in {folder}. They belong to this package: "
            "install it again (git clone, or the ComfyUI Manager), or train them: python -m retrace.training.pebble"
        )
    return folder
