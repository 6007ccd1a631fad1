"""What the results were measured on, and how fast it multiplies and copies."""

import os
import platform
import re
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp

REPEATS = 9


def facts() -> dict[str, str]:
    """The device, the versions, the precision of products of float32 matrices, the allocator."""
    device = jax.devices()[0]
    return {
        "device": f"{device.platform}: {device.device_kind}",
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "precision": str(jax.config.jax_default_matmul_precision or "default"),
        "allocator": os.environ.get("GLIBC_TUNABLES", "default"),
    }


def results() -> Path:
    """Where results go; of a CPU the platform alone is named, its kind says nothing."""
    return Path(__file__).parents[1] / "results" / f"price_{_slug()}.json"


def _slug() -> str:
    device = jax.devices()[0]
    if device.platform == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "_", device.device_kind.lower()).strip("_")


def peaks() -> dict[str, float]:
    """FLOPs a second of a large product, in both precisions, and bytes a second of a copy."""
    n = 1024 if jax.devices()[0].platform == "cpu" else 8192
    matrix = jax.random.normal(jax.random.key(0), (n, n))
    long = jnp.zeros((2**25,))  # 128 MiB

    def rate(amount: float, fn, *args) -> float:
        program = jax.jit(fn).lower(*args).compile()
        jax.block_until_ready(program(*args))
        taken = []
        for _ in range(REPEATS):
            begin = time.perf_counter()
            jax.block_until_ready(program(*args))
            taken.append(time.perf_counter() - begin)
        return amount / statistics.median(taken)

    highest = jax.lax.Precision.HIGHEST
    return {
        "flops_per_s": rate(2 * n**3, jnp.matmul, matrix, matrix),
        "highest_flops_per_s": rate(
            2 * n**3, lambda a, b: jnp.matmul(a, b, precision=highest), matrix, matrix
        ),
        "bytes_per_s": rate(2 * long.nbytes, lambda x: x + 1, long),
    }
