"""The arguments that core hands to a wrapper, by name, however a version or another wrapper passes them."""

from __future__ import annotations

from typing import Any, ClassVar

from .types import Executor, Sampler


class WrappedCall:
    """A call on its way to ``executor``. Arguments are read and changed by name; what was not given is None."""

    names: ClassVar[tuple[str, ...]]

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._positional = min(len(args), len(self.names))
        self._unknown = args[len(self.names) :]
        self._values = {**dict(zip(self.names, args, strict=False)), **kwargs}

    def __getitem__(self, name: str) -> Any:
        return self._values.get(name)

    def __setitem__(self, name: str, value: Any) -> None:
        self._values[name] = value

    def run(self, executor: Executor) -> Any:
        """Go on with the call, its arguments passed as they came."""
        positional = self.names[: self._positional]
        named = {name: value for name, value in self._values.items() if name not in positional}
        return executor(*(self._values[name] for name in positional), *self._unknown, **named)


class SamplerCall(WrappedCall):
    """``Sampler.sample``: a whole run of a sampler (``WrappersMP.SAMPLER_SAMPLE``)."""

    names = ("model_wrap", "sigmas", "extra_args", "callback", "noise", "latent_image", "denoise_mask", "disable_pbar")
    sampler: Sampler = None
    """Whose ``sample`` it is."""


class PredictionCall(WrappedCall):
    """``CFGGuider.predict_noise``: one guided prediction (``WrappersMP.PREDICT_NOISE``)."""

    names = ("x", "timestep", "model_options", "seed")


class EvaluationCall(WrappedCall):
    """``calc_cond_batch``: all conditions at one level (``WrappersMP.CALC_COND_BATCH``)."""

    names = ("model", "conds", "x_in", "timestep", "model_options")


class NetworkCall(WrappedCall):
    """``BaseModel.apply_model``: one pass of the network (``WrappersMP.APPLY_MODEL``)."""

    names = ("x", "t", "c_concat", "c_crossattn", "control", "transformer_options")
