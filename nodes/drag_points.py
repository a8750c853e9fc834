"""Drag Points: what moves in an image and where to, placed on it with the mouse."""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui

from ..retrace.core.checks import check_image, describe
from ..retrace.core.errors import InvalidImage, InvalidPoints
from ..retrace.drag.area import movable_area
from ..retrace.drag.points import EXAMPLE, DragPoints, parse_points
from ._errors import reports_errors
from ._schema import Points, schema

PICTURE = "retrace_picture"
"""Where the widget finds the image in the node's result: a key of its own, so that core does not draw it again."""


class DragPointsNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "drag",
            node_id="RetraceDragPoints",
            display_name="Drag Points",
            description="Place points on an image: press on what should move and drag to where it should go. Paint "
            "the part that may change with the brush. Connect it to the drag nodes.",
            search_aliases=["point editor", "points editor", "drag diffusion", "draggan", "handles", "spline"],
            has_intermediate_output=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip="The image to drag on, a single one. From 'Load Image' it shows at once; from other "
                    "nodes, after the first run.",
                ),
                io.String.Input(
                    "points",
                    default="",
                    multiline=True,
                    placeholder=EXAMPLE,
                    tooltip="The points and brush strokes as JSON, in fractions of the image's width and height. The "
                    "editor in the node writes this text.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="The part that may change (1 = may change), for example from the mask editor of 'Load "
                    "Image'. Brush strokes are added on top of it. An empty mask counts as none.",
                ),
            ],
            outputs=[
                Points.Output("drag_points", display_name="points", tooltip="The points and the image they lie on."),
                io.Mask.Output(
                    "area",
                    display_name="mask",
                    tooltip="The part that may change: the mask with the brush strokes, or everything if there is "
                    "neither.",
                ),
                io.Image.Output(
                    "picture",
                    display_name="image",
                    tooltip="The image, unchanged. Encode the image that goes into this node, not this output: then "
                    "moving a point does not train or invert again.",
                ),
            ],
        )

    @classmethod
    @reports_errors("Drag Points")
    def execute(cls, image: torch.Tensor, points: str = "", mask: torch.Tensor | None = None) -> io.NodeOutput:
        picture = check_image("image", image)
        if picture.shape[0] != 1:
            raise InvalidImage(
                f"image: got {describe(image)}, which is {picture.shape[0]} images, but one is needed. Pick one "
                "with 'Image From Batch'."
            )
        shown = ui.PreviewImage(picture).values
        try:
            pairs, strokes = parse_points(points)
            if not pairs:
                raise InvalidPoints(
                    "there are no points. In the node, press on what should move in the image, drag to where it should "
                    f"go, and run again. As text: {EXAMPLE}."
                )
            area = movable_area(strokes, picture.shape[1], picture.shape[2], mask)
        except InvalidPoints:
            if cls.hidden:  # without the image nobody could place the points that are missing
                _show(cls.hidden.unique_id, shown)
            raise
        return io.NodeOutput(DragPoints(pairs, picture), area, picture, ui={PICTURE: shown})


def _show(node_id: object, shown: list[object]) -> None:
    """Give the image to the widget of a node that fails: it has no result to carry it."""
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id is not None:
        server.send_sync("retrace.drag_points", {"node": node_id, PICTURE: shown}, server.client_id)
