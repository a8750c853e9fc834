"""Patches that follow a core sampler from step to step and may change its latent between them."""

from __future__ import annotations

from typing import Any, Protocol

import comfy.patcher_extension
import torch
from torch import Tensor

_ARGUMENTS = (
    "model_wrap",
    "sigmas",
    "extra_args",
    "callback",
    "noise",
    "latent_image",
    "denoise_mask",
    "disable_pbar",
)


class SamplerCall:
    """The arguments of core's ``Sampler.sample`` by name, however a version or another wrapper passes them."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._positional = len(args)
        self._values = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}

    def __getitem__(self, name: str) -> Any:
        return self._values.get(name)

    def __setitem__(self, name: str, value: Any) -> None:
        self._values[name] = value

    def run(self, executor: Any) -> Tensor:
        args = [self._values[name] for name in _ARGUMENTS[: self._positional]]
        kwargs = {k: v for k, v in self._values.items() if k not in _ARGUMENTS[: self._positional]}
        samples: Tensor = executor(*args, **kwargs)
        return samples


class Run(Protocol):
    """The state of one run of a sampler. Latents ``[B, C, h, w]`` are in the model's scale."""

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """The sampler's latent about to be denoised at ``sigma``, as it shall be; ``x`` itself is left alone."""
        ...

    def finish(self, x: Tensor) -> Tensor:
        """The sampler's result, as it shall be."""
        ...


class RunPatch:
    """Installs a :class:`Run` for every run of a sampler. Its state hangs on the guider: runs side by side never meet.

    ``first``: its turn comes before that of patches that are there already.
    """

    key = "retrace"
    first = False
    flow = False  # whether the model is a flow model, whose core divides the result of an early stop by 1 - sigma

    def __init__(self) -> None:
        self.runs: dict[int, Run] = {}

    def begin(self, call: SamplerCall) -> Run:
        """The state of a run that begins with these arguments, which may be changed."""
        raise NotImplementedError

    def install(self, patcher: Any) -> None:
        types = comfy.patcher_extension.WrappersMP
        for kind, wrapper in ((types.SAMPLER_SAMPLE, self.sample), (types.PREDICT_NOISE, self.predict)):
            patcher.add_wrapper_with_key(kind, self.key, wrapper)
            if self.first:
                wrappers = patcher.wrappers[kind]
                own = wrappers.pop(self.key)
                patcher.wrappers[kind] = {self.key: own, **wrappers}

    def sample(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Around a whole run of a sampler."""
        call = SamplerCall(args, kwargs)
        # A copy, because some samplers (uni_pc) write into their list of sigmas.
        sigmas: Tensor = call["sigmas"].clone()
        run = self.begin(call)
        self.runs[id(call["model_wrap"])] = run
        try:
            samples = call.run(executor)
        finally:
            self.runs.pop(id(call["model_wrap"]), None)
            self.end()
        # A sampler that stops early gives back a noisy latent, which flow models also divide by 1 - sigma.
        last = float(sigmas[-1])
        rescale = 1 - last if self.flow and 0 < last < 1 else 1.0
        return run.finish(samples * rescale) / rescale

    def end(self) -> None:
        """A run is over, also where it failed or was stopped."""

    def predict(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Around every guided prediction. The sampler's own tensor is changed, so that its step starts from there."""
        run = self.runs.get(id(executor.class_obj))
        if run is not None:
            x: Tensor = args[0] if args else kwargs["x"]
            timestep: Tensor | float = args[1] if len(args) > 1 else kwargs["timestep"]
            changed = run(x, float(torch.as_tensor(timestep).max()))
            if x.requires_grad or (x.is_inference() and not torch.is_inference_mode_enabled()):
                # Such a tensor must not be written. The model still sees the change, and the end of the run is exact.
                if args:
                    args = (changed, *args[1:])
                else:
                    kwargs["x"] = changed
            elif changed is not x:
                x.copy_(changed)
        result: Tensor = executor(*args, **kwargs)
        return result
