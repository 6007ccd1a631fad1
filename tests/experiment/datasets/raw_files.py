"""Raw files of data sets: how a test writes small ones, and where the published ones are."""

import struct
from pathlib import Path

import pytest

PUBLISHED = Path(__file__).parents[3].parent / "shared" / "data"


def idx_bytes(array):
    """What an idx file of a uint8 array holds."""
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


def published(problem):
    """The folder of a problem's published files; skips the test where it is missing."""
    folder = PUBLISHED / problem
    if not folder.is_dir():
        pytest.skip(f"the published files of '{problem}' are not here: {folder} is missing")
    return folder
