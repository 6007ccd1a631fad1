"""A small file, written whole or not at all, and never through a link."""

import os
from pathlib import Path


def replace(path: Path, content: bytes) -> None:
    """Puts a file in the place of the one that is there, if any, in one stroke.

    A reader, or a run that begins after a kill or a loss of power, sees the old file or the new.
    A link of that name is replaced; what it points to is left alone.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.unlink(missing_ok=True)
    with open(unfinished, "xb") as file:  # x: not even through a link that appears now
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
