"""The notebooks: they run from top to bottom, and what they show is from the cells they have."""

import base64
import importlib.util
import json
import re
from pathlib import Path

import jax
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
SMALL = {
    "quickstart": {"STEPS": 3, "ADAM_STEPS": 4, "EARLY": 2, "SIDE": 4, "WIDTHS": (4,)},
    "autoencoder": {
        "KBFGS_EPOCHS": 2, "ADAM_EPOCHS": 1, "EXAMPLES": 12, "BATCH": 6, "CURVATURE_EXAMPLES": 3,
        "WIDTHS": (8, 3),
    },
    "your_model": {
        "STEPS": 2, "ADAM_STEPS": 2, "EXAMPLES": 20, "BATCH": 6, "CURVATURE_EXAMPLES": 6,
        "RATES": (0.3, 1.2), "DAMPINGS": (0.1, 0.3), "WIDTHS": (2, 2, 4, 4),
    },
}  # fmt: skip
each = pytest.mark.parametrize("name", SMALL)


def read(name):
    return json.loads((FOLDER / f"{name}.ipynb").read_text())


def code_cells(name):
    return [cell for cell in read(name)["cells"] if cell["cell_type"] == "code"]


def source(cell):
    return "".join(cell["source"])


def tagged(cell, tag):
    return tag in cell["metadata"].get("tags", [])


def outputs(name):
    return [output for cell in code_cells(name) for output in cell["outputs"]]


def pictures(name):
    found = [output["data"]["image/png"] for output in outputs(name) if "data" in output]
    return [base64.b64decode(png) for png in found]


def test_every_notebook_is_tested():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == SMALL.keys()


@each
def test_it_runs_at_a_small_size(name, monkeypatch):
    """All cells in one namespace, as a kernel would; no magic but in the cell that installs."""
    plt = pytest.importorskip("matplotlib.pyplot", reason="needs the extra 'experiment'")
    shown = []

    def show():
        shown.extend(plt.get_fignums())
        for number in plt.get_fignums():
            plt.figure(number).canvas.draw()
        plt.close("all")

    monkeypatch.setattr(plt, "show", show)
    plt.switch_backend("agg")
    cells = [cell for cell in code_cells(name) if not tagged(cell, "install")]
    assert len(code_cells(name)) - len(cells) == 1
    namespace = {"__name__": "__main__"}
    with jax.enable_x64(False), plt.rc_context():
        for number, cell in enumerate(cells):
            exec(compile(source(cell), f"{name}, code cell {number}", "exec"), namespace)
            if tagged(cell, "parameters"):
                assert namespace.keys() >= SMALL[name].keys()
                namespace |= SMALL[name]
    assert namespace["STEPS" if "STEPS" in SMALL[name] else "EXAMPLES"] in (2, 3, 12)
    assert not plt.get_fignums()  # a figure that no cell showed
    assert len(shown) == len(pictures(name))


@each
def test_its_outputs_are_from_its_cells(name):
    """Run in order, without errors, and not changed afterwards; `make notebooks` sees to it."""
    spec = importlib.util.spec_from_file_location("execute", FOLDER / "execute.py")
    assert spec is not None
    assert spec.loader is not None
    execute = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(execute)
    cells = code_cells(name)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert {output["output_type"] for output in outputs(name)} <= {"stream", "display_data"}
    assert all(output.get("name") != "stderr" for output in outputs(name))
    assert read(name)["metadata"]["source_digest"] == execute.source_digest(read(name))


@each
def test_it_can_be_read_without_running_it(name):
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 500_000
    assert len(pictures(name)) >= 2
    assert all(png.startswith(b"\x89PNG") and len(png) > 2000 for png in pictures(name))


@each
def test_numbers_in_its_prose_are_in_its_cells(name):
    known = "\n".join(map(source, code_cells(name)))
    known += "".join("".join(output.get("text", "")) for output in outputs(name))
    prose = "\n".join(source(c) for c in read(name)["cells"] if c["cell_type"] == "markdown")
    prose = re.sub(r"`[^`]*`|\]\([^)]*\)|\$[^$]*\$", "", prose)
    numbers = re.findall(r"\d+\.\d+", prose)
    assert [number for number in numbers if number not in known] == []


@each
def test_it_installs_only_what_is_missing(name):
    first = code_cells(name)[0]
    assert tagged(first, "install")
    attempt, _, otherwise = source(first).partition("except ImportError:")
    assert "import kfqn_optax" in attempt
    assert "%" not in attempt
    assert otherwise.split() == ["%pip", "install", "--quiet", "{SOURCE}"]
