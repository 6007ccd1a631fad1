"""idx files: read, plain and compressed, and refused where anything in them is wrong."""

import gzip

import numpy as np
import pytest
from raw_files import idx_bytes

from kfqn_optax.experiment.datasets import idx

IMAGES = np.arange(24, dtype=np.uint8).reshape(4, 3, 2)


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_idx(tmp_path, pack):
    path = tmp_path / "file"
    path.write_bytes(pack(idx_bytes(IMAGES)))
    np.testing.assert_array_equal(idx.read(path, (4, 3, 2)), IMAGES)


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected the bytes 00 00 08 03, found none"),
        (b"\x00\x00\x0d\x03" + idx_bytes(IMAGES)[4:], "found 00 00 0d 03"),  # float32
        (idx_bytes(IMAGES[0]), "found 00 00 08 02"),
        (idx_bytes(IMAGES)[:10], "ends within its header: expected 16 bytes, found 10"),
        (idx_bytes(IMAGES[:3]), r"holds an array of shape \(3, 3, 2\), expected \(4, 3, 2\)"),
        (b"\x00\x00\x08\x03" + b"\xff" * 12, r"shape \(4294967295, .*expected \(4, 3, 2\)"),
        (idx_bytes(IMAGES)[:-5], "cut short: expected 24 bytes .* found 19"),
        (idx_bytes(IMAGES) + b"\x00", "too long: expected it to end after 24 bytes"),
    ],
    ids=["empty", "type", "axes", "header", "shape", "huge", "short", "trailing"],
)
def test_wrong_idx(tmp_path, pack, content, message):
    path = tmp_path / "file-idx3-ubyte"
    path.write_bytes(pack(content))
    with pytest.raises(ValueError, match=message) as error:
        idx.read(path, (4, 3, 2))
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda packed: packed[:-9], "no end"),
        (lambda packed: packed[:-8] + bytes(8), "not a sound gzip file"),
        (lambda packed: packed[:12] + b"\xff" * 8 + packed[20:], "not a sound gzip file"),
        (lambda packed: packed + b"more", "not a sound gzip file"),
    ],
    ids=["truncated", "checksum", "stream", "trailing"],
)
def test_damaged_gzip(tmp_path, damage, message):
    path = tmp_path / "file-idx3-ubyte.gz"
    path.write_bytes(damage(gzip.compress(idx_bytes(IMAGES))))
    with pytest.raises(ValueError, match=message) as error:
        idx.read(path, (4, 3, 2))
    assert str(path) in str(error.value)
