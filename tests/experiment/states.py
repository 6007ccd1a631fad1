"""The arrays of a run's last checkpoint, read with Orbax alone."""

import numpy as np
from orbax.checkpoint import v1 as ocp


def last(workdir):
    """Returns the arrays by name."""
    folder = max(path for path in (workdir / "checkpoints").iterdir() if path.is_dir())
    return {name: np.asarray(array) for name, array in ocp.load(str(folder)).items()}


def assert_same(expected, found):
    """Bit by bit."""
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        assert array.dtype == found[name].dtype, name
        assert array.tobytes() == found[name].tobytes(), name
