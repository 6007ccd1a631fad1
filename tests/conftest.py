"""Settings of every test: float64 allowed, no silent broadcasting of ranks."""

from pathlib import Path

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = Path(__file__).parents[1].parent / "shared"


@pytest.fixture
def golden():
    """A function from a case's name to the recording of the authors' code (NumPy archive)."""
    import numpy as np

    def load(case: str):
        path = SHARED / "golden" / f"{case}.npz"
        if not path.exists():
            pytest.skip(f"the recordings of the authors' code are not here: {path} is missing")
        return np.load(path)

    return load
