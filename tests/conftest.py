"""Settings of every test: float64 allowed, no silent broadcasting of ranks."""

import os
import tempfile
from pathlib import Path

import jax
import pytest
from models import problem
from steps import batches_for, step_of

import kfqn_optax as kfqn

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
# The time of the tests is compilation; the machine code of these tiny programs need not be fast.
jax.config.update("jax_disable_most_optimizations", True)
# XLA's older code generator takes a quarter of the time. It reads this when the first program is
# compiled, and would not start with a flag that it does not know.
if jax.__version__.startswith("0.10."):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = flags.strip()
# Many tests compile the same program again, each in a jit of its own: these are found here. The
# folder belongs to this process alone and goes with it, unless JAX_COMPILATION_CACHE_DIR names one.
if jax.config.jax_compilation_cache_dir is None:
    COMPILED = tempfile.TemporaryDirectory(prefix="kfqn-compiled-")
    jax.config.update("jax_compilation_cache_dir", COMPILED.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

SHARED = Path(__file__).parents[1].parent / "shared"


@pytest.fixture(scope="session")
def golden():
    """A function from a case's name to the recording of the authors' code (NumPy archive)."""
    import numpy as np

    def load(case: str):
        path = SHARED / "golden" / f"{case}.npz"
        if not path.exists():
            pytest.skip(f"the recordings of the authors' code are not here: {path} is missing")
        return np.load(path)

    return load


@pytest.fixture(scope="session")
def trained():
    """A transformation, its loss, and where four steps lead."""
    loss_fn, params, *_ = problem()
    tx = kfqn.kbfgs(0.1, 0.05)
    state, step = tx.init(params), step_of(tx, loss_fn)
    for batch in batches_for(params, count=4):
        params, state, _ = step(params, state, *batch)
    return tx, loss_fn, params, state
