"""The idx files in which MNIST and Fashion-MNIST are distributed.

An idx file is a header, two zero bytes, a byte for the element type (8: uint8), a byte for the
number of axes, the sizes as big-endian 32-bit numbers, and then the elements and nothing else
(http://yann.lecun.com/exdb/mnist). The caller says which shape it expects, so a wrong file is
refused from its header, before anything is read or allocated on its word.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

_UINT8 = 8


def read(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The array in an idx file, plain or compressed with gzip.

    Args:
        path: the file. Whether it is compressed is read from its first bytes, not from its name.
        shape: what the file must hold.

    Returns:
        uint8 array of the given shape; read only.

    Raises:
        ValueError: the file is damaged, cut short, too long, or holds something else.
    """
    advice = "Fetch the file again."
    size = math.prod(shape)
    try:
        with gzip.open(path) if _is_gzip(path) else path.open("rb") as file:
            _check_header(path, file.read(4 + 4 * len(shape)), shape)
            # One byte more than wanted shows what follows, and has gzip verify its checksum.
            content = file.read(size + 1)
    except EOFError as error:
        raise ValueError(f"{path} is cut short: its gzip stream has no end. {advice}") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a sound gzip file: {error}. {advice}") from error
    if len(content) < size:
        raise ValueError(
            f"{path} is cut short: expected {size} bytes after the header for an array of shape "
            f"{shape}, found {len(content)}. {advice}"
        )
    if len(content) > size:
        raise ValueError(
            f"{path} is too long: expected it to end after {size} bytes of an array of shape "
            f"{shape}, found more. {advice}"
        )
    return np.frombuffer(content, np.uint8).reshape(shape)


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _check_header(path: Path, header: bytes, shape: tuple[int, ...]) -> None:
    """Refuses a header other than that of a uint8 array of the given shape."""
    advice = "Put the standard file there."
    magic = bytes([0, 0, _UINT8, len(shape)])
    if header[:4] != magic:
        raise ValueError(
            f"{path} does not begin like an idx file of uint8 with {len(shape)} axes: expected the "
            f"bytes {magic.hex(' ')}, found {header[:4].hex(' ') or 'none'}. {advice}"
        )
    if len(header) < 4 + 4 * len(shape):
        raise ValueError(
            f"{path} ends within its header: expected {4 + 4 * len(shape)} bytes, found "
            f"{len(header)}. {advice}"
        )
    found = struct.unpack(f">{len(shape)}I", header[4:])
    if found != shape:
        raise ValueError(f"{path} holds an array of shape {found}, expected {shape}. {advice}")
