"""What ComfyUI knows about the pack after it has loaded."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

from tools.comfyui.server import ComfyServer
from tools.update_locale import english

ROOT = Path(__file__).parents[2]
NODES = {
    "RetraceLoadPebble": ["MODEL", "CLIP", "VAE"],
    "RetracePebbleScene": ["IMAGE", "MASK", "STRING"],
    "RetraceDDIMInverter": ["LATENT", "RETRACE_TRAJECTORY", "SIGMAS", "STRING", "SAMPLER"],
    "RetraceSaveInversion": ["STRING"],
    "RetraceLoadInversion": ["LATENT", "RETRACE_TRAJECTORY", "SIGMAS", "CONDITIONING"],
    "RetraceNullTextOptimizer": ["CONDITIONING", "CONDITIONING", "LATENT", "STRING"],
    "RetraceEditFriendlyInverter": ["LATENT", "RETRACE_TRAJECTORY", "SIGMAS", "SAMPLER", "STRING"],
    "RetracePromptToPrompt": ["MODEL", "CONDITIONING", "LATENT", "STRING", "IMAGE"],
    "RetraceDirectInversion": ["MODEL"],
    "RetraceProximalGuidance": ["MODEL"],
    "RetraceAttentionMask": ["MASK", "IMAGE", "STRING"],
    "RetraceReferenceSchedule": ["SIGMAS"],
    "RetraceBlendStep": ["MODEL"],
    "RetracePasteBackground": ["IMAGE"],
    "RetraceBackgroundReconstruction": ["IMAGE", "STRING"],
    "RetraceMaskPrecisionBlur": ["MASK"],
    "RetraceEditReport": ["STRING", "STRING"],
    "RetraceRankByCLIP": ["IMAGE", "INT", "STRING"],
    "RetraceLoadCLIP": ["RETRACE_CLIP"],
    "RetraceDragPoints": ["RETRACE_POINTS", "MASK", "IMAGE"],
    "RetraceIdentityLoRA": ["MODEL", "LORA_MODEL", "LOSS_MAP", "STRING"],
    "RetraceDragLatentOptimizer": ["LATENT", "SIGMAS", "STRING", "STRING", "IMAGE"],
    "RetraceReferenceKVControl": ["MODEL"],
    "RetraceWarpAndInpaint": ["IMAGE", "MASK", "MASK", "STRING"],
}
LANGUAGES = ("en", "ko", "zh")


def test_every_node_registers_with_its_sockets(server: ComfyServer) -> None:
    info = server.object_info()
    ours = {name: value["output"] for name, value in info.items() if name.startswith("Retrace")}
    missing = {name: ours.get(name) for name, outputs in NODES.items() if ours.get(name) != outputs}
    assert not missing, server.log[-3000:]


def test_every_input_output_and_node_explains_itself(server: ComfyServer) -> None:
    for name, value in server.object_info().items():
        if not name.startswith("Retrace"):
            continue
        assert value["description"], name
        assert value["category"].startswith("Retrace/"), name
        for group in ("required", "optional"):
            for input_name, spec in value["input"].get(group, {}).items():
                assert spec[1].get("tooltip"), f"{name}.{input_name} has no tooltip"
        assert len(value["output_tooltips"]) == len(value["output"]), name
        assert all(value["output_tooltips"]), name


def test_load_pebble_replaces_the_checkpoint_loader(server: ComfyServer) -> None:
    info = server.object_info()
    assert info["RetraceLoadPebble"]["output"] == info["CheckpointLoaderSimple"]["output"]


def test_every_node_has_help_and_texts_in_all_languages(newest_server: ComfyServer) -> None:
    info = newest_server.object_info()
    ours = {name: value for name, value in info.items() if name.startswith("Retrace")}
    for name in ours:
        help_page = ROOT / "web" / "docs" / f"{name}.md"
        assert help_page.is_file(), f"{name} has no help page"
    for language in LANGUAGES:
        texts = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text("utf-8"))
        assert set(texts) == set(ours), language
        for name, value in ours.items():
            inputs = {i for group in ("required", "optional") for i in value["input"].get(group, {})}
            assert set(texts[name].get("inputs", {})) == inputs, f"{language}: {name}"
            assert set(texts[name]["outputs"]) == {str(i) for i in range(len(value["output"]))}, f"{language}: {name}"
        if language == "en":
            assert texts == english(info), "run: python tools/update_locale.py"
    served = newest_server.get_json("/i18n")
    assert served["ko"]["nodeDefs"]["RetraceBlendStep"]["display_name"]
    listed = newest_server.request("GET", "/extensions/ComfyUI-Retrace/docs/RetraceBlendStep.md")
    assert b"Blend Step" in listed


def test_errors_name_nodes_that_there_are(newest_server: ComfyServer) -> None:
    """Every node that WIRES names, by the name that ComfyUI shows; 'Latent Batch' there may be 'LatentBatch'."""
    parsed = ast.parse((ROOT / "nodes" / "_errors.py").read_text("utf-8"))
    (wires,) = (
        statement.value
        for statement in parsed.body
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "WIRES"
    )
    texts = [text.value for text in ast.walk(wires) if isinstance(text, ast.Constant)]
    named = {name for text in texts for name in re.findall(r"'([A-Z][^']*)'", str(text))}
    titles = {node["display_name"] or name for name, node in newest_server.object_info().items()}
    titles |= set(newest_server.object_info())  # newer cores call some of them by longer names
    shown = {title.replace(" ", "") for title in titles} | {
        title.partition(" (")[0].replace(" ", "") for title in titles
    }
    unknown = {name for name in named if name.replace(" ", "") not in shown}
    assert len(named) > 10 and unknown == {"Open in MaskEditor"}  # a menu


def test_the_template_browser_lists_the_workflows(server: ComfyServer) -> None:
    shipped = {path.stem for path in (ROOT / "workflows").glob("*.json")}
    assert shipped
    assert shipped <= set(server.get_json("/workflow_templates")["ComfyUI-Retrace"])


def _imported_at_start(path: Path, seen: dict[Path, set[str]]) -> dict[Path, set[str]]:
    """Follow the imports at module level from ``path`` through this pack; the other packages that each file names."""
    if path in seen or not path.is_file():
        return seen
    seen[path] = set()
    for statement in ast.parse(path.read_text("utf-8")).body:
        if isinstance(statement, ast.Import):
            seen[path] |= {alias.name.split(".")[0] for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom) and statement.level == 0:
            seen[path].add((statement.module or "").split(".")[0])
        elif isinstance(statement, ast.ImportFrom):
            folder = path.parents[statement.level - 1].joinpath(*(statement.module or "").split("."))
            for place in [folder, *(folder / alias.name for alias in statement.names)]:
                _imported_at_start(place.with_suffix(".py"), seen)
                _imported_at_start(place / "__init__.py", seen)
    return seen


def test_starting_imports_nothing_heavy() -> None:
    """Every file that ComfyUI imports at its start leaves these to the moment of use."""
    heavy = {"diffusers", "open_clip", "lpips", "kornia", "transformers", "scipy", "torchvision"}
    files = _imported_at_start(ROOT / "nodes" / "__init__.py", {})
    assert len(files) > 15
    for path, packages in files.items():
        assert not heavy & packages, f"{path.relative_to(ROOT)} imports {heavy & packages} at module level"


def test_the_root_can_be_imported_without_comfyui() -> None:
    module = ast.parse((ROOT / "__init__.py").read_text("utf-8"))
    top = [s for s in module.body if isinstance(s, (ast.Import, ast.ImportFrom))]
    assert {s.module if isinstance(s, ast.ImportFrom) else s.names[0].name for s in top} <= {"__future__", "typing"}
