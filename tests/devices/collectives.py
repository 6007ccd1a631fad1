"""What a compiled program sends between devices, read from its text."""

import re

import numpy as np

_BITS = {"pred": 8, "s32": 32, "u32": 32, "f32": 32, "f64": 64, "s64": 64, "u64": 64}
_NAMES = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"
_CALL = re.compile(rf"= (.*?) ({_NAMES})(?:-start)?\(")
_ARRAY = re.compile(rf"\b({'|'.join(_BITS)})\[([\d,]*)\]")


def collectives(text):
    """Number and bytes of each kind of collective; bytes are those of the results."""
    found = {}
    for result, name in _CALL.findall(text):
        count, size = found.get(name, (0, 0))
        for kind, shape in _ARRAY.findall(result):
            size += _BITS[kind] // 8 * int(np.prod([int(n) for n in shape.split(",") if n]))
        found[name] = count + 1, size
    return found
