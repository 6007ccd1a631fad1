"""The sums of a folder's files, in a file beside it that `sha256sum --check` reads.

00000120/          a folder
00000120.sha256    a line for each file below it: the sum, two spaces, its name from here
"""

import hashlib
import os
import re
from pathlib import Path

from kfqn_optax.experiment.atomic import replace

_LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")
_LONGEST = 1 << 20  # bytes of a file of sums; one of ours has some thousands


class Refused(Exception):
    """A folder that is not used; the message follows its name in a sentence."""


def path_of(folder: Path) -> Path:
    """Returns where a folder's sums are."""
    return folder.with_name(f"{folder.name}.sha256")


def write(folder: Path) -> None:
    """Writes down the sums of a folder, in one stroke."""
    lines = [f"{_sha256(folder.parent / name)}  {name}\n" for name in _files(folder)]
    replace(path_of(folder), "".join(lines).encode())


def verify(folder: Path, most_bytes: int) -> None:
    """Refuses a folder whose files are not those whose sums were written down.

    Links and whatever else is no plain file are refused first, then a folder that has more bytes
    than it may, and only then is anything read.

    Raises:
        Refused: the message names the first file that is not right.
    """
    files = _files(folder)
    size = sum((folder.parent / name).stat().st_size for name in files)
    if size > most_bytes:
        raise Refused(f"has {size} bytes, more than the {most_bytes} that it may have")
    path = path_of(folder)
    if path.is_symlink() or not path.is_file() or path.stat().st_size > _LONGEST:
        raise Refused(f"cannot be checked: {path.name} is no file of sums")
    lines = path.read_bytes().decode("utf-8", "replace").splitlines()
    sums = {match[2]: match[1] for match in map(_LINE.fullmatch, lines) if match}
    missing = sorted(set(sums) - set(files))
    if missing or not files:
        raise Refused(f"lacks {missing[0] if missing else 'all its files'}")
    for name in files:
        if name not in sums:
            raise Refused(f"has a file {name!r} that {path.name} does not name")
        if _sha256(folder.parent / name) != sums[name]:
            raise Refused(f"is damaged: {name} is not as it was written")


def _files(folder: Path) -> list[str]:
    """The names of all files below a folder, as seen from where it lies."""
    if folder.is_symlink():
        raise Refused("is a link, not a folder")
    found, waiting = [], [folder]
    while waiting:
        with os.scandir(waiting.pop()) as listing:
            entries = list(listing)
        for entry in entries:
            name = Path(entry.path).relative_to(folder.parent).as_posix()
            if entry.is_dir(follow_symlinks=False):
                waiting.append(Path(entry.path))
            elif entry.is_file(follow_symlinks=False):
                found.append(name)
            else:
                raise Refused(f"holds {name!r}, which is no plain file")
    return sorted(found)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
