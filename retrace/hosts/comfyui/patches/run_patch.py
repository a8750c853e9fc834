"""Patches that follow a core sampler from step to step and may change its latent between them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import comfy.patcher_extension
import torch
from torch import Tensor

from ....core.errors import RetraceError
from ..calls import PredictionCall, SamplerCall
from ..types import Executor, Model


@contextmanager
def signed(node: str) -> Iterator[None]:
    """Errors of the library that come up inside begin with the name of ``node``."""
    try:
        yield
    except RetraceError as error:
        if str(error).startswith(node):
            raise
        raise type(error)(f"{node}: {error}") from error


class Run(Protocol):
    """The state of one run of a sampler. Latents ``[B, C, h, w]`` are in the model's scale."""

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """The sampler's latent about to be denoised at ``sigma``, as it is to be; ``x`` itself is left alone."""
        ...

    def finish(self, x: Tensor) -> Tensor:
        """The sampler's result, as it is to be."""
        ...


class RunPatch:
    """Installs a :class:`Run` for every run of a sampler. Its state hangs on the guider: runs side by side never meet.

    ``first``: its turn comes before that of patches that are there already.
    """

    key = "retrace"
    node = "Retrace"  # whose errors these are: they come up in the sampler
    first = False
    flow = False  # whether the model is a flow model, whose core divides the result of an early stop by 1 - sigma

    def __init__(self) -> None:
        self.runs: dict[int, Run] = {}

    def begin(self, call: SamplerCall) -> Run:
        """The state of a run that begins with these arguments, which may be changed."""
        raise NotImplementedError

    def install(self, patcher: Model) -> None:
        types = comfy.patcher_extension.WrappersMP
        for kind, wrapper in ((types.SAMPLER_SAMPLE, self.sample), (types.PREDICT_NOISE, self.predict)):
            patcher.add_wrapper_with_key(kind, self.key, wrapper)
            if self.first:
                wrappers = patcher.wrappers[kind]
                own = wrappers.pop(self.key)
                patcher.wrappers[kind] = {self.key: own, **wrappers}

    def sample(self, executor: Executor, *args: Any, **kwargs: Any) -> Tensor:
        """Around a whole run of a sampler."""
        call = SamplerCall(args, kwargs)
        call.sampler = getattr(executor, "class_obj", None)
        # A copy, because some samplers (uni_pc) write into their list of sigmas.
        sigmas: Tensor = call["sigmas"].clone()
        with signed(self.node):
            run = self.begin(call)
        self.runs[id(call["model_wrap"])] = run
        try:
            samples: Tensor = call.run(executor)
        finally:
            self.runs.pop(id(call["model_wrap"]), None)
        # A sampler that stops early gives back a noisy latent, which flow models also divide by 1 - sigma.
        last = float(sigmas[-1])
        rescale = 1 - last if self.flow and 0 < last < 1 else 1.0
        with signed(self.node):
            return run.finish(samples * rescale) / rescale

    def predict(self, executor: Executor, *args: Any, **kwargs: Any) -> Tensor:
        """Around every guided prediction. The sampler's own tensor is changed, so that its step starts from there."""
        run = self.runs.get(id(executor.class_obj))
        call = PredictionCall(args, kwargs)
        if run is not None:
            x: Tensor = call["x"]
            with signed(self.node):
                changed = run(x, float(torch.as_tensor(call["timestep"]).max()))
            if x.requires_grad or (x.is_inference() and not torch.is_inference_mode_enabled()):
                # Such a tensor must not be written. The model still sees the change, and the end of the run is exact.
                call["x"] = changed
            elif changed is not x:
                x.copy_(changed)
        predicted: Tensor = call.run(executor)
        return predicted
