"""Load CLIP (Retrace): a model that compares images with words."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..retrace.core.errors import InvalidFile
from ..retrace.models.clip.files import SUFFIXES
from ..retrace.models.clip.model import ARCHITECTURES, KNOWN, PEBBLE, load_image_text_model
from ._errors import reports_errors
from ._schema import ImageText, advanced, schema

_FOLDERS = ("open_clip", "clip_vision", "text_encoders")


class LoadCLIP(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "report",
            node_id="RetraceLoadCLIP",
            display_name="Load CLIP (Retrace)",
            description="Loads a CLIP with both of its sides, image and text, which measures how well the two match. "
            "Core's CLIP and CLIP Vision loaders give one side each. Nothing is downloaded.",
            search_aliases=["open_clip", "clip score", "image text model"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=[PEBBLE, *KNOWN, *_files()],
                    default=PEBBLE,
                    tooltip="Pebble's CLIP ships with the pack and knows only Pebble's world. Names like "
                    "'ViT-B-32/openai' are known models; if one is missing, the error says what to download. Your own "
                    "files come last.",
                ),
                io.Combo.Input(
                    "architecture",
                    options=list(ARCHITECTURES),
                    default=ARCHITECTURES[0],
                    tooltip="The architecture of your own file. Use quickgelu for weights from OpenAI, DFN and "
                    "MetaCLIP, and the plain names for those from LAION and DataComp. Known models do not need it.",
                    **advanced(),
                ),
            ],
            outputs=[ImageText.Output("clip", display_name="RETRACE_CLIP", tooltip="The model with both sides.")],
        )

    @classmethod
    def fingerprint_inputs(
        cls, model: str, architecture: str, **_: object
    ) -> tuple[str, str, tuple[int, int] | None] | None:
        """Load again when the file changed."""
        file = _files().get(model)
        try:
            facts = file.stat() if file else None
        except OSError:
            return None
        return model, architecture, (facts.st_mtime_ns, facts.st_size) if facts else None

    @classmethod
    @reports_errors("Load CLIP (Retrace)")
    def execute(cls, model: str, architecture: str) -> io.NodeOutput:
        if model == PEBBLE or model in KNOWN:
            return io.NodeOutput(load_image_text_model(model, folders=[p for f in _FOLDERS for p in _places(f)]))
        files = _files()
        if model not in files:
            raise InvalidFile(
                f"model: there is no '{model}' in models/{', models/'.join(_FOLDERS)}. Choose another one."
            )
        return io.NodeOutput(load_image_text_model(files[model], architecture=architecture))


def _places(folder: str) -> list[Path]:
    """Where ComfyUI keeps ``folder``; open_clip is none of core's, but extra_model_paths.yaml may name it."""
    named = folder_paths.folder_names_and_paths.get(folder)
    return [Path(place) for place in named[0]] if named else [Path(folder_paths.models_dir) / folder]


def _files() -> dict[str, Path]:
    """The files with weights, by the name that is shown: the folder, then the path in it."""
    found: dict[str, Path] = {}
    for folder in _FOLDERS:
        if folder in folder_paths.folder_names_and_paths:  # core remembers what is in there
            names = folder_paths.get_filename_list(folder)
            paths = {name: Path(folder_paths.get_full_path(folder, name) or name) for name in names}
        else:
            place = _places(folder)[0]
            paths = {str(path.relative_to(place)): path for path in sorted(place.rglob("*")) if path.is_file()}
        kept = {name: path for name, path in paths.items() if path.suffix.lower() in SUFFIXES}
        found |= {f"{folder}/{name.replace(os.sep, '/')}": path for name, path in kept.items()}
    return found
