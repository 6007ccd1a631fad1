"""Runs the notebooks from top to bottom and writes them back with their outputs.

    python notebooks/execute.py [NAME.ipynb ...]     all of them by default; `make notebooks`

A notebook says in its metadata which cells its outputs are from (`source_digest`), so that a test
can tell when a cell was changed and not run again.
"""

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def source_digest(notebook: dict[str, Any]) -> str:
    """SHA-256 of the code of a notebook, as the JSON of the file or as nbformat reads it."""
    codes = [c["source"] for c in notebook["cells"] if c["cell_type"] == "code"]
    return hashlib.sha256("\0".join("".join(code) for code in codes).encode()).hexdigest()


def execute(path: Path) -> None:
    """Runs a notebook in its folder; it is written only if no cell failed."""
    import nbclient
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    client = nbclient.NotebookClient(
        notebook, timeout=1800, resources={"metadata": {"path": str(path.parent)}}
    )
    client.record_timing = False
    client.coalesce_streams = True
    client.execute()
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.metadata["source_digest"] = source_digest(notebook)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:] or sorted(FOLDER.glob("*.ipynb"))):
        print(f"running {path}", flush=True)
        execute(path)
