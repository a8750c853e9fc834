"""Save Inversion and Load Inversion: trajectories in ComfyUI's own output and input folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import folder_paths
from comfy_api.latest import io, ui

from ..retrace.core.errors import InvalidFile
from ..retrace.inversion.files import SUFFIX, load_with_extra, safe_name, save_trajectory
from ._checks import require_trajectory
from ._errors import reports_errors
from ._schema import Trajectory, schema

_NEGATIVE = "negative."  # in front of what is kept of an optimised negative

_FOLDERS = {"output": folder_paths.get_output_directory, "input": folder_paths.get_input_directory}

if TYPE_CHECKING:
    from ..retrace.hosts.comfyui.types import Model


class SaveInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "inversion",
            node_id="RetraceSaveInversion",
            display_name="Save Inversion",
            description="Writes an inversion to ComfyUI's output folder, so that it does not have to be computed "
            "again.",
            search_aliases=["save trajectory"],
            is_output_node=True,
            inputs=[
                Trajectory.Input("trajectory", tooltip="From 'DDIM Inverter'."),
                io.String.Input(
                    "name", default="inversion", tooltip="File name without a folder, for example 'my_photo'."
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    tooltip="On: replace a file of the same name. Off: number the new one (my_photo_2, my_photo_3 "
                    "...).",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="The negative from 'Null-text Optimizer', to save along with its inversion.",
                ),
            ],
            outputs=[io.String.Output("file", display_name="name", tooltip="The name of the file that was written.")],
        )

    @classmethod
    @reports_errors("Save Inversion")
    def execute(cls, trajectory: object, name: str, overwrite: bool, negative: object = None) -> io.NodeOutput:
        from ..retrace.hosts.comfyui.runs.null_text import to_tensors

        path_to_noise = require_trajectory(trajectory)
        extra = {} if negative is None else {_NEGATIVE + k: v for k, v in to_tensors(negative).items()}
        path = Path(_FOLDERS["output"]()) / safe_name(name)
        if not overwrite:
            stem, number = path.stem, 2
            while path.exists():
                path = path.with_name(f"{stem}_{number}{SUFFIX}")
                number += 1
        save_trajectory(path_to_noise, path, extra)
        return io.NodeOutput(path.name, ui=ui.PreviewText(path.name))


class LoadInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "inversion",
            node_id="RetraceLoadInversion",
            display_name="Load Inversion",
            description="Reads an inversion written by 'Save Inversion'. With a model connected, it checks that this "
            "model made the inversion, and also outputs the noise as LATENT.",
            search_aliases=["load trajectory"],
            inputs=[
                io.String.Input(
                    "name", default="inversion", tooltip="File name without a folder, for example 'my_photo'."
                ),
                io.Combo.Input(
                    "folder",
                    options=list(_FOLDERS),
                    default="output",
                    tooltip="Which of ComfyUI's folders the file is in.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The model you will sample with; an inversion made with another one is refused.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    "noise_latent",
                    display_name="LATENT",
                    tooltip="The noise to sample from; needs a connected model.",
                ),
                Trajectory.Output("trajectory", display_name="trajectory", tooltip="The latents at every noise level."),
                io.Sigmas.Output("sigmas", display_name="SIGMAS", tooltip="The noise levels of the inversion."),
                io.Conditioning.Output(
                    "negative",
                    display_name="negative",
                    tooltip="The optimised negative saved with it; needs a connected model.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str, folder: str, **_: Any) -> Any:
        """Read again when the file changed."""
        try:
            facts = (Path(_FOLDERS[folder]()) / safe_name(name)).stat()
        except (InvalidFile, OSError, KeyError):  # KeyError: the folder comes through a link and is not known yet
            return None
        return facts.st_mtime_ns, facts.st_size

    @classmethod
    @reports_errors("Load Inversion")
    def execute(cls, name: str, folder: str, model: Model = None) -> io.NodeOutput:
        place = Path(_FOLDERS[folder]())
        path = place / safe_name(name)
        if not path.is_file():
            there = sorted(file.stem for file in place.glob(f"*{SUFFIX}"))
            held = f"contains {', '.join(there[:20])}" if there else "contains no such files"
            raise InvalidFile(f"there is no file '{path.name}' in ComfyUI's {folder} folder, which {held}.")
        trajectory, extra = load_with_extra(path)
        sigmas = trajectory.sigmas.clone()  # core's uni_pc writes into it
        if model is None:
            blocked = _blocked("the noise (LATENT) and the negative need the model that made them. Connect it here.")
            return io.NodeOutput(blocked, trajectory, sigmas, blocked)
        from ..retrace.hosts.comfyui import ComfyHost
        from ..retrace.hosts.comfyui.latents import noise_samples
        from ..retrace.hosts.comfyui.runs.null_text import from_tensors

        host = ComfyHost(model)
        trajectory.require_model(host.fingerprint())
        kept = {k.removeprefix(_NEGATIVE): v for k, v in extra.items() if k.startswith(_NEGATIVE)}
        negative = from_tensors(host, kept) if kept else _blocked(f"'{path.name}' was saved without a negative.")
        return io.NodeOutput({"samples": noise_samples(host, trajectory)}, trajectory, sigmas, negative)


def _blocked(why: str) -> Any:
    """Stands for an output while nobody uses it; whoever does gets this message from ComfyUI."""
    from comfy_execution.graph_utils import ExecutionBlocker

    return ExecutionBlocker(f"Load Inversion: {why}")
