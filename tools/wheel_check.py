"""Builds sdist and wheel, and tries the wheel where nothing but its dependencies is installed.

    make wheel-check

The wheel is made from the sdist, so what the sdist lacks the wheel lacks. It is installed into a
new virtual environment outside of this folder, imported there, and takes training steps there.
Times of imports are printed and not judged: a machine under load would fail for nothing. Processor
time suffers less from load than wall clock; imports run on one core.
"""

import statistics
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROUNDS = 9
# In the sdist: what it takes to test, to document and to run the experiments.
NEEDED = [
    "tests/test_golden.py", "tests/conftest.py", "tests/experiment/tiny.py", "docs/index.md",
    "docs/hooks.py", "mkdocs.yml", "configs/mnist.py", "benchmarks/README.md", "Makefile",
    "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "kfqn_optax/py.typed",
]  # fmt: skip
DATA = (".gz", ".npz", ".npy", ".mat", ".pkl", ".ckpt")
ABSENT = ["tensorflow", "tensorflow_datasets", "matplotlib", "ml_collections", "pytest"]
TRAINING = """
import flax.linen as nn, jax, jax.numpy as jnp, optax
import kfqn_optax as kfqn
model = nn.Dense(1)
x = jax.random.normal(jax.random.key(0), (32, 3))
y = x.sum(axis=1, keepdims=True)
params = model.init(jax.random.key(1), x)
loss_fn = lambda params, x, y: jnp.mean((model.apply(params, x) - y) ** 2)
tx = kfqn.kbfgs(0.3, 0.1)
@jax.jit
def step(params, state):
    loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
    fn = kfqn.curvature_fn(loss_fn, params, x, y)
    updates, state = tx.update(grads, state, params, curvature_fn=fn)
    return optax.apply_updates(params, updates), state, loss
state, losses = tx.init(params), []
for _ in range(20):
    params, state, loss = step(params, state)
    losses.append(float(loss))
assert losses[-1] < losses[0] / 10, losses
print(f"20 steps: loss {losses[0]:.3f} to {losses[-1]:.4f}, from {kfqn.__file__}")
"""


def built(folder: Path) -> tuple[Path, Path]:
    """The sdist, and the wheel that is made from it."""
    subprocess.run([sys.executable, "-m", "build", "--outdir", folder, ROOT], check=True)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", sdist, wheel], check=True)
    return sdist, wheel


def check_contents(sdist: Path, wheel: Path) -> None:
    """Raises unless the sdist has all it needs, and neither has data or leftovers."""
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    lacking = [name for name in NEEDED if name not in names]
    if lacking:
        raise SystemExit(f"the sdist lacks {', '.join(lacking)}; MANIFEST.in says what goes in.")
    inside = zipfile.ZipFile(wheel).namelist()
    strange = [name for name in inside if not name.startswith(("kfqn_optax/", "kfqn_optax-"))]
    strange += [n for n in (*names, *inside) if n.endswith(DATA) or "__pycache__" in n]
    if strange or "kfqn_optax/py.typed" not in inside:
        raise SystemExit(f"in the distributions, or missing from them: {strange or 'py.typed'}.")
    for file, number in ((sdist, len(names)), (wheel, len(inside))):
        print(f"{file.name}: {number} entries, {file.stat().st_size / 1e6:.2f} MB")


def seconds(python: Path, folder: Path, statement: str) -> tuple[float, float]:
    """What a statement takes in a new process, its start left out: wall clock, processor."""
    now = "(time.perf_counter(), time.process_time())"
    code = f"import time; t = {now}; {statement}; print(*(b - a for a, b in zip(t, {now})))"
    run = subprocess.run(
        [python, "-c", code], check=True, capture_output=True, text=True, cwd=folder
    )
    wall, processor = map(float, run.stdout.split())
    return wall, processor


def main() -> None:
    """Everything, in a folder that is removed again; the distributions stay in dist/."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sdist, wheel = built(folder)
        check_contents(sdist, wheel)
        venv.create(folder / "env", with_pip=True)
        python = folder / "env" / "bin" / "python"
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel],
            check=True,
        )
        look = f"from importlib.util import find_spec as f; print(*filter(f, {ABSENT}))"
        found = subprocess.check_output([python, "-c", look], text=True, cwd=folder).split()
        if found:
            raise SystemExit(f"the core dependencies brought {', '.join(found)} along.")
        subprocess.run([python, "-W", "error", "-c", TRAINING], check=True, cwd=folder)

        hosts, ours = "import optax, flax", "import optax, flax, kfqn_optax"
        modules = "import optax, flax.linen, flax.nnx"
        for statement in (hosts, modules, ours):  # the first time compiles bytecode
            seconds(python, folder, statement)
        times: dict[str, list[tuple[float, float]]] = {hosts: [], modules: [], ours: []}
        for _ in range(ROUNDS):  # in turns, so that a busy moment meets all
            for statement, taken in times.items():
                taken.append(seconds(python, folder, statement))
        print(f"medians of {ROUNDS}, seconds: wall clock, processor")
        medians = {
            s: [statistics.median(t) for t in zip(*ts, strict=True)] for s, ts in times.items()
        }
        for statement, (wall, processor) in medians.items():
            print(f"  {wall:.3f}  {processor:.3f}  {statement}")
        wall, processor = (b - a for a, b in zip(medians[hosts], medians[ours], strict=True))
        print(f"  {wall:.3f}  {processor:.3f}  kfqn_optax beyond the first")
        for file in (sdist, wheel):
            target = ROOT / "dist" / file.name
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(file.read_bytes())


if __name__ == "__main__":
    main()
