"""Pebble, the demo model that ships with the pack, and the scenes of its world."""

from __future__ import annotations

from comfy_api.latest import io

from ..retrace.models.pebble.scenes import instance_masks, render, sample_scene, scene_rng
from ..retrace.models.pebble.weights import weights_folder
from ._errors import reports_errors
from ._schema import schema


class LoadPebble(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "pebble",
            node_id="RetraceLoadPebble",
            display_name="Load Pebble (demo model)",
            description="Loads Pebble, a tiny text-to-image model of coloured shapes (128x128 pixels) that ships with "
            "this pack and runs in seconds on any computer. For your own photos, use 'Load Checkpoint' instead.",
            search_aliases=["demo model", "tiny model", "test checkpoint"],
            inputs=[],
            outputs=[
                io.Model.Output("model", display_name="MODEL", tooltip="The diffusion model."),
                io.Clip.Output("clip", display_name="CLIP", tooltip="The text encoder."),
                io.Vae.Output("vae", display_name="VAE", tooltip="Encodes images to latents and decodes them."),
            ],
        )

    @classmethod
    @reports_errors("Load Pebble")
    def execute(cls) -> io.NodeOutput:
        from ..retrace.hosts.comfyui import load_pebble

        return io.NodeOutput(*load_pebble(weights_folder()))


class PebbleScene(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "pebble",
            node_id="RetracePebbleScene",
            display_name="Pebble Scene",
            description="Draws a scene from Pebble's world (one the model was not trained on), with the exact mask of "
            "its first object and a caption. For your own photo, use 'Load Image' instead.",
            search_aliases=["demo image", "test image", "shapes"],
            inputs=[
                io.Int.Input(
                    "index",
                    default=0,
                    min=0,
                    max=999_999,
                    tooltip="Which scene to draw; every number gives a different one.",
                ),
                io.Int.Input("objects", default=1, min=1, max=2, tooltip="Number of objects in the scene."),
                io.Int.Input(
                    "margin",
                    default=0,
                    min=0,
                    max=32,
                    optional=True,
                    tooltip="How far the mask extends beyond the object, in pixels. Use 3 or more to replace the "
                    "object.",
                ),
            ],
            outputs=[
                io.Image.Output("image", display_name="image", tooltip="The scene, 128x128 pixels."),
                io.Mask.Output("mask", display_name="mask", tooltip="The mask of the first object."),
                io.String.Output(
                    "caption",
                    display_name="caption",
                    tooltip="The caption of the scene, for example 'a red circle on sand'.",
                ),
            ],
        )

    @classmethod
    @reports_errors("Pebble Scene")
    def execute(cls, index: int, objects: int, margin: int = 0) -> io.NodeOutput:
        scene = sample_scene(scene_rng("heldout", index), objects)
        mask = instance_masks(scene, margin)[:1]
        return io.NodeOutput(render(scene).movedim(0, -1)[None], mask, scene.caption())
