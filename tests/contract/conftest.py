"""One suite for every host. A host is tested where its framework can be imported.

The diffusers host runs wherever diffusers is installed. The ComfyUI host needs ComfyUI's own interpreter and
``COMFYUI_PATH``, its folder; the models then run on the CPU unless ``RETRACE_TEST_DEVICE=gpu``. ``RETRACE_HOSTS`` picks
hosts by name. Everything happens under ``torch.inference_mode``, as in ComfyUI's executor: otherwise the mistakes that
only inference tensors bring to light would stay hidden.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retrace.core.errors import InvalidFile
from retrace.core.host import Denoiser, Host
from retrace.models.pebble.weights import weights_folder
from tests.rounding import roundings

_skipped: set[str] = set()


class StopRequested(Exception):
    """Raised by a progress callback of the diffusers host."""


@dataclass
class Subject:
    """A host under test, and what the tests need to know that a method does not."""

    name: str
    host: Any
    load: Callable[[Path], Host]
    folder: Path
    reports: list[tuple[int, int]] = field(default_factory=list)
    stopping: bool = False

    def network(self, x: Tensor, timestep: int, embedding: Tensor) -> Tensor:
        """The raw network: what it answers to a variance-preserving input at an integer timestep."""
        raise NotImplementedError

    def eps(self, x: Tensor, timestep: int, embedding: Tensor) -> Tensor:
        """The noise that the raw network predicts, from its v where that is what it predicts."""
        output = self.network(x, timestep, embedding)
        if self.host.parametrisation == "eps":
            return output
        # Salimans & Ho 2022: eps = sigma_t z_t + alpha_t v, with alpha_t^2 + sigma_t^2 = 1.
        sigma = float(self.host.training_sigmas()[timestep])
        return (sigma * x + output) / (1 + sigma**2) ** 0.5  # type: ignore[no-any-return]

    def networks(self) -> list[nn.Module]:
        """UNet and VAE."""
        raise NotImplementedError

    @property
    def roundings(self) -> int:
        """Of one pass of the UNet."""
        return roundings(self.networks()[0])

    def unsupported(self) -> Host:
        """Make a host of a model that predicts x0 directly, which no method here was written for."""
        raise NotImplementedError

    @contextmanager
    def interrupted(self) -> Iterator[type[BaseException]]:
        """Inside, the user has pressed stop; gives the exception to expect."""
        raise NotImplementedError

    def run(self, latent: Tensor, method: Callable[..., Any], *prompts: str, gradients: bool = False) -> Any:
        """``method(denoiser, latent, [condition of each prompt])``."""
        conds = {str(i): self.host.encode_text(prompt) for i, prompt in enumerate(prompts or ("a red circle",))}

        def with_list(denoiser: Denoiser, x: Tensor, prepared: Any) -> Any:
            return method(denoiser, x, [prepared[name] for name in conds])

        return self.host.run(latent, conds, with_list, gradients=gradients)


class DiffusersSubject(Subject):
    def network(self, x: Tensor, timestep: int, embedding: Tensor) -> Tensor:
        output = self.host.unet(x, timestep, encoder_hidden_states=embedding.expand(len(x), -1, -1), return_dict=False)
        return output[0]  # type: ignore[no-any-return]

    def networks(self) -> list[nn.Module]:
        return [self.host.unet, self.host.vae]

    def unsupported(self) -> Host:
        from retrace.hosts.diffusers import DiffusersHost
        from retrace.hosts.diffusers.loading import load_parts

        parts = load_parts(self.folder, torch.float32)
        scheduler = {**parts.scheduler, "prediction_type": "sample"}
        return DiffusersHost(replace(parts, scheduler=scheduler), "x0 model")

    @contextmanager
    def interrupted(self) -> Iterator[type[BaseException]]:
        self.stopping = True
        try:
            yield StopRequested
        finally:
            self.stopping = False

    def note(self, step: int, total: int, denoised: Tensor | None) -> None:
        if self.stopping:
            raise StopRequested
        self.reports.append((step, total))


class ComfySubject(Subject):
    def network(self, x: Tensor, timestep: int, embedding: Tensor) -> Tensor:
        network = self.host.model.model.diffusion_model
        steps = torch.full((len(x),), float(timestep))
        return network(x, steps, context=embedding.expand(len(x), -1, -1), transformer_options={})  # type: ignore[no-any-return]

    def networks(self) -> list[nn.Module]:
        return [self.host.model.model.diffusion_model, self.host.vae.first_stage_model]

    def unsupported(self) -> Host:
        import comfy.model_sampling

        from retrace.hosts.comfyui import ComfyHost

        class X0Sampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.X0):
            pass

        model = self.host.model.clone()
        model.add_object_patch("model_sampling", X0Sampling(model.model.model_config))
        return ComfyHost(model)

    @contextmanager
    def interrupted(self) -> Iterator[type[BaseException]]:
        import comfy.model_management

        comfy.model_management.interrupt_current_processing(True)
        try:
            yield comfy.model_management.InterruptProcessingException
        finally:
            comfy.model_management.interrupt_current_processing(False)


def _diffusers(folder: Path) -> Subject:
    from retrace.hosts.diffusers import DiffusersHost

    subject = DiffusersSubject(
        "diffusers", None, lambda path: DiffusersHost.load(path, device="cpu", dtype=torch.float32), folder
    )
    subject.host = DiffusersHost.load(folder, device="cpu", dtype=torch.float32, progress=subject.note)
    return subject


def _comfyui(folder: Path) -> Subject:
    import comfy.options

    arguments, sys.argv = sys.argv, ["main.py", *([] if os.environ.get("RETRACE_TEST_DEVICE") == "gpu" else ["--cpu"])]
    try:
        comfy.options.enable_args_parsing()
        import comfy.utils

        from retrace.hosts.comfyui import ComfyHost, load_pebble
    finally:
        sys.argv = arguments
    subject = ComfySubject("comfyui", None, lambda path: ComfyHost(*load_pebble(path)), folder)
    subject.host = subject.load(folder)
    comfy.utils.set_progress_bar_global_hook(lambda step, total, *_, **__: subject.reports.append((step, total)))
    return subject


HOSTS = {"diffusers": ("diffusers", _diffusers), "comfyui": ("comfy", _comfyui)}


@pytest.fixture(scope="session", params=list(HOSTS))
def _subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    name = request.param
    wanted = os.environ.get("RETRACE_HOSTS")
    if wanted and name not in wanted.split(","):
        pytest.skip(f"RETRACE_HOSTS={wanted}")
    try:
        folder = weights_folder()
    except InvalidFile as error:
        _skipped.add(str(error))
        pytest.skip(str(error))
    package, make = HOSTS[name]
    if name == "comfyui" and os.environ.get("COMFYUI_PATH"):
        sys.path.append(os.environ["COMFYUI_PATH"])
    try:
        __import__(package)
    except ImportError:
        how = "Run with ComfyUI's Python and COMFYUI_PATH set." if name == "comfyui" else "Install 'diffusers'."
        _skipped.add(f"host '{name}': '{package}' cannot be imported. {how}")
        pytest.skip(f"no '{package}' here")
    with torch.inference_mode():
        subject = make(folder)
    yield subject
    subject.host = None
    if name == "comfyui":  # its patchers complain when the interpreter takes them down
        import comfy.model_management

        with torch.inference_mode():
            comfy.model_management.unload_all_models()


@pytest.fixture
def subject(_subject: Subject) -> Iterator[Subject]:
    """The host under test, inside inference mode and with a seeded generator behind ``torch.randn``."""
    _subject.reports.clear()
    with torch.inference_mode(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield _subject


@pytest.fixture
def host(subject: Subject) -> Any:
    return subject.host


@pytest.fixture
def comfy_subject(subject: Subject) -> Subject:
    """The ComfyUI host; tests that need it are skipped for others."""
    if subject.name != "comfyui":
        pytest.skip("about ComfyUI only")
    return subject


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for reason in sorted(_skipped):
        terminalreporter.write_line(f"SKIPPED, contract: {reason}", yellow=True, bold=True)
