"""Who imports whom: no private names of the hosts, nothing heavy, arrays only in the middle."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kfqn_optax

PACKAGE = Path(kfqn_optax.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
HOSTS = {
    "jax", "jaxlib", "flax", "optax", "chex", "tensorflow_datasets", "ml_collections", "orbax",
    "tensorboardX",
}  # fmt: skip
HEAVY = [
    "tensorflow", "tensorflow_datasets", "matplotlib", "ml_collections", "scipy.io",
    "scipy.ndimage", "rich.progress", "tensorboardX", "orbax", "kfqn_optax.experiment",
]  # fmt: skip


def imports(file):
    """Every module or name that a file imports, dotted."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def attributes(file):
    """Every dotted name that a file reads from an imported host module, in full."""
    tree = ast.parse(file.read_text())
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                aliases |= {alias.asname: alias.name} if alias.asname else {first: first}
        elif isinstance(node, ast.ImportFrom):
            aliases |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    for node in ast.walk(tree):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name) and node.id in aliases:
            yield ".".join([aliases[node.id], *reversed(parts)])


def private(name):
    """Whether a dotted name leads through something that a host keeps to itself."""
    host, *parts = name.split(".")
    inner = any(part.startswith("_") and not part.endswith("__") for part in parts)
    return host in HOSTS and (inner or name.startswith("jax.interpreters"))


def test_what_counts_as_private():
    refused = ["jax._src.core", "optax._src.base", "jax.interpreters.ad", "flax.linen._x"]
    assert all(map(private, refused))
    allowed = ["jax.numpy", "optax.transforms.partition", "os._exit", "jax.__version__"]
    assert not any(map(private, allowed))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_private_names_of_the_hosts(file):
    assert [name for name in [*imports(file), *attributes(file)] if private(name)] == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_nothing_is_unpickled(file):
    """Whoever gives us a file must not run code with it."""
    for name in [*imports(file), *attributes(file)]:
        assert name.split(".")[0] not in {"pickle", "cloudpickle", "dill", "joblib", "marshal"}
        assert name not in {"numpy.load", "jax.numpy.load", "pandas.read_pickle"}


def hosts_of(file):
    return {name.split(".")[0] for name in imports(file)} & {"flax", "optax"}


def test_only_the_outer_rooms_know_flax_or_optax():
    rooms = {f.stem: hosts_of(f) for f in PACKAGE.glob("*.py")}
    assert {room for room, hosts in rooms.items() if "flax" in hosts} <= {
        "capture", "nnx", "linen_kinds", "nnx_kinds", "train_state",
    }  # fmt: skip
    optax_rooms = {room for room, hosts in rooms.items() if "optax" in hosts}
    assert optax_rooms <= {
        "transform", "methods", "optimizer", "sharding", "summary", "train_state", "natural",
        "kfac_rule", "tkfac_rule", "mbf_rule", "block_step", "block_rule",
    }  # fmt: skip
    assert rooms["capture"] == {"flax"}  # the test can see
    assert rooms["transform"] == {"optax"}


def ours(file):
    """The rooms of ours that a file imports."""
    rooms = {f.stem for f in PACKAGE.glob("*.py")} - {"__init__"} | {"experiment"}
    found = set()
    for name in imports(file):
        first, _, rest = name.partition(".")
        if first == "kfqn_optax":
            room = rest.split(".")[0]
            found.add(room if room in rooms else "__init__")
    return found


def test_a_room_imports_only_rooms_above_it():
    """Who imports whom: a table for settled rooms; the others are checked for order."""
    table = {
        "options": set(),
        "axes": set(),
        "sharding": set(),
        "loss": set(),
        "matrix": set(),
        "geometry": set(),
        "packed": set(),
        "pairs": set(),
        "bfgs": {"pairs"},
        "lbfgs": {"pairs"},
        "low_rank": {"lbfgs", "pairs"},
        "nystrom": {"low_rank", "pairs"},
        "inverse": {"bfgs", "lbfgs", "generations", "low_rank", "nystrom"},
        "layers": {"matrix"},
        "statistics": {"layers"},
        "calls": {"geometry", "matrix"},
        "discovery": {"calls", "geometry", "layers", "matrix"},
        "combine": {"axes", "statistics"},
        "tag": {"axes", "discovery", "geometry", "loss", "sketch", "statistics"},
        "linen_kinds": {"calls", "geometry", "matrix"},
        "nnx_kinds": {"calls", "geometry", "matrix"},
        "capture": {
            "calls", "discovery", "layers", "linen_kinds", "loss", "statistics", "tag",
        },
        "nnx": {"discovery", "layers", "loss", "nnx_kinds", "statistics", "tag"},
        "layer_state": {"options", "layers", "pairs", "bfgs", "lbfgs", "inverse"},
        "intake": {
            "options", "layers", "layer_state", "statistics", "packed", "inverse",
        },
        "one_side": {"layers", "packed", "pairs", "bfgs", "lbfgs"},
        "factors": {
            "options", "layers", "layer_state", "statistics", "pairs", "inverse", "intake",
            "one_side",
        },
        "direction": {"options", "layers", "inverse", "generations", "low_rank", "nystrom"},
        "health": {"block_step", "pairs", "layer_state", "summary"},
        "moments": {"options", "layers", "layer_state", "bfgs", "inverse", "statistics"},
        "sampling": set(),
        "natural": {
            "checks", "direction", "layers", "moments", "options", "statistics", "transform",
        },
        "kfac_rule": {
            "layers", "moments", "natural", "optimizer", "options", "statistics",
        },
        "tkfac_rule": {
            "layers", "moments", "natural", "optimizer", "options", "statistics",
        },
        "sketch": set(),
        "block_bfgs": {"options", "pairs"},
        "block_matrix": {"block_bfgs", "options", "pairs"},
        "generations": {"block_bfgs", "lbfgs", "pairs"},
        "block_state": {
            "block_bfgs", "factors", "generations", "layer_state", "layers", "nystrom", "options",
            "pairs", "statistics",
        },
        "block_inputs": {
            "block_bfgs", "block_matrix", "block_state", "inverse", "layers", "nystrom", "options",
            "pairs", "statistics",
        },
        "trust": set(),
        "block_step": {
            "block_inputs", "block_state", "direction", "layers", "options", "statistics",
            "transform", "trust",
        },
        "block_rule": {
            "block_state", "block_step", "checks", "layers", "optimizer", "options", "statistics",
            "transform", "trust",
        },
        "mini_block": {"inverse", "layers", "options", "statistics"},
        "mbf_rule": {
            "checks", "layers", "mini_block", "optimizer", "options", "statistics", "transform",
        },
    }  # fmt: skip
    for room, allowed in table.items():
        if (PACKAGE / f"{room}.py").exists():
            assert ours(PACKAGE / f"{room}.py") <= allowed, room
    for file in PACKAGE.glob("*.py"):
        assert not ours(file) & {"experiment", "__init__"}, file.name
    for file in (PACKAGE / "experiment").rglob("*.py"):
        assert ours(file) <= {"experiment", "__init__"}, file.name


def test_there_are_no_cycles():
    waiting = {f.stem: ours(f) for f in PACKAGE.glob("*.py") if f.stem != "__init__"}
    while waiting:
        free = {room for room, needs in waiting.items() if not needs & waiting.keys()}
        assert free, f"these import each other: {sorted(waiting)}"
        waiting = {room: needs for room, needs in waiting.items() if room not in free}


def test_the_library_alone_imports_nothing_heavy():
    """Beyond what JAX, Flax and Optax import by themselves."""

    def modules(statement):
        code = f"import sys; {statement}; print(*sys.modules)"
        return set(subprocess.check_output([sys.executable, "-c", code], text=True).split())

    hosts = modules("import jax, flax.linen, flax.nnx, optax")
    library = modules("import kfqn_optax")
    assert "kfqn_optax.transform" in library
    assert [name for name in HEAVY if name in library - hosts] == []
    new = {name.split(".")[0] for name in library} - {name.split(".")[0] for name in hosts}
    assert new - sys.stdlib_module_names == {"kfqn_optax"}


@pytest.mark.parametrize("room", ["__init__", "load", "curves", "idx"])
def test_what_the_notebooks_draw_needs_only_numpy(room):
    """Where no function is entered; `load` imports what it needs when it is called."""
    file = PACKAGE / "experiment" / "datasets" / f"{room}.py"
    heads = [
        n for n in ast.parse(file.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)
    ]
    names = [n.module if isinstance(n, ast.ImportFrom) else n.names[0].name for n in heads]
    others = {name for name in names if name.split(".")[0] not in sys.stdlib_module_names}
    assert others <= {"numpy", "kfqn_optax.experiment.datasets.load"}


@pytest.mark.parametrize("name", kfqn_optax.__all__)
def test_public_names_have_docstrings(name):
    thing = getattr(kfqn_optax, name)
    text = thing.__doc__ or ""
    generated = text.startswith(f"{name}(")  # what dataclasses and NamedTuple write by themselves
    assert len(text) > 30, name
    assert not generated, name


def test_all_is_what_is_imported():
    assert sorted(kfqn_optax.__all__) == kfqn_optax.__all__
    imported = {name.rsplit(".")[-1] for name in imports(PACKAGE / "__init__.py")}
    assert imported == set(kfqn_optax.__all__)
