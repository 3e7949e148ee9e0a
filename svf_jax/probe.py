"""What this process's JAX is and how it is set: run in a child of `svf doctor`. Twin of svf_torch/probe.py."""

from __future__ import annotations

import jax

from stages.spec.environment import AUTOTUNE, xla_flag


def probe() -> dict[str, object]:
    """Devices and the settings that change results, as plain values."""
    config = jax.config.values
    return {
        "devices": ["cpu", *_accelerators()],
        "settings": {
            "cpu_devices": jax.devices("cpu")[0].client.device_count(),
            "default_backend": jax.default_backend(),
            "default_matmul_precision": str(config["jax_default_matmul_precision"] or "the device's"),
            "enable_x64": bool(config["jax_enable_x64"]),
            "disable_jit": bool(config["jax_disable_jit"]),
            **flags(),
        },
    }


def flags() -> dict[str, str]:
    """The flags that let products on a GPU differ from run to run, or keep casts back and forth out."""
    return {name: xla_flag(name) for name in (AUTOTUNE, "xla_allow_excess_precision")}


def _accelerators() -> list[str]:
    return [f"{d.platform}:{d.id} {d.device_kind}" for d in jax.devices() if d.platform != "cpu"]
