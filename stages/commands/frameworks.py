"""Jobs that need a framework's own package, which nothing below the command line may import."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from stages.commands.backends import ENGINES, PROBES, attribute
from stages.jobs.capture import CaptureCommand
from stages.jobs.decompose_options import DecomposeOptions
from stages.jobs.doctor import FrameworkRequest
from stages.progress import Progress
from stages.spec.backend import Loader


def decomposed(options: DecomposeOptions, load: Loader, progress: Progress) -> dict[str, Any]:
    """Decompose as asked; the `svf.decompose/1` document. PyTorch computes the stages, JAX where there is no torch."""
    from stages.jobs import decompose as job

    backend = load("torch" if find_spec("torch") else "jax", "cpu")
    if backend.name != "torch":
        progress.say("torch is not installed: JAX computes the recorded stages")
    if options.svd_weights is not None:
        load_weights = attribute("svf_torch.weights_file:load_svd_weights")
        return job.decompose_stored(options, load_weights, backend, progress)
    if options.svd == "torch":
        return job.decompose(options, attribute("svf_torch.svd:TORCH_SVD"), backend, progress)
    return job.decompose(options, job.FLOAT64, backend, progress)


def captured(command: CaptureCommand, _load: object, _progress: object) -> dict[str, Any]:
    """Run an engine's own model and write what hooks saw; the `svf.capture/1` document."""
    from stages.jobs import capture as job

    return job.captured(command, attribute(f"{ENGINES[command.engine]}:run"))


def framework(request: FrameworkRequest, _load: object, _progress: object) -> dict[str, Any]:
    """What the probe of a framework says of it, or `error`: why it does not start."""
    try:
        found: dict[str, Any] = attribute(PROBES[request.name])()
    except Exception as error:  # whatever is broken there is what the doctor is asked for
        return {"error": f"{type(error).__name__}: {error}"}
    return found
