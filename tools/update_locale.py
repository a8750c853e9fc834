"""Write locales/en/nodeDefs.json from the nodes: python tools/update_locale.py (needs a ComfyUI)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def english(object_info: dict[str, Any]) -> dict[str, Any]:
    """The texts of our nodes as they stand in the schemas, in the form of a locale file."""
    texts: dict[str, Any] = {}
    for name, node in object_info.items():
        if not name.startswith("Retrace"):
            continue
        inputs = {
            key: {"name": spec[1].get("display_name") or key, "tooltip": spec[1]["tooltip"]}
            for group in ("required", "optional")
            for key, spec in node["input"].get(group, {}).items()
        }
        outputs = {
            str(i): {"name": label, "tooltip": tooltip}
            for i, (label, tooltip) in enumerate(zip(node["output_name"], node["output_tooltips"], strict=True))
        }
        texts[name] = {"display_name": node["display_name"], "description": node["description"]}
        texts[name] |= ({"inputs": inputs} if inputs else {}) | {"outputs": outputs}
    return texts


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from tools.comfyui.server import ComfyServer, find_comfyui

    install = find_comfyui()
    if install is None:
        sys.exit("No ComfyUI found; set COMFYUI_PATH.")
    with ComfyServer(install, ROOT) as server:
        file = ROOT / "locales" / "en" / "nodeDefs.json"
        file.write_text(json.dumps(english(server.object_info()), indent=2, ensure_ascii=False) + "\n", "utf-8")
