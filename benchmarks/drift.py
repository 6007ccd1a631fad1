"""100,000 BFGS updates of one factor in float32, beside the same in float64: what rounding does.

    python -m benchmarks.drift [--steps 100000] [--seconds 200] [--cases input-0.3 output-1e-4 ...]
        [--unguarded]
    python -m benchmarks.drift --draw

A case is a side and a lambda. Data are made to look like those of a layer of 256 units in training.
Input side: batches of 16 inputs whose second moment has a decaying spectrum (30 k^-2, a tenth of
the units dead), whose axes turn slowly and whose mean is not zero; pairs by Hessian action on the
running average A. Output side: steps with momentum, through a Hessian with a decaying spectrum of
which one direction in twenty curves downwards, with noise a third of the size of y; averaged and
double-damped. Both dtypes see the same random numbers, made in float32.

A run stops after ``--seconds`` and goes on from ``runs/drift/`` when the command is given again.
``--unguarded`` takes the update without the guard of `bfgs.change`, to see what it is for. Finished
cases go to ``benchmarks/results/drift.json``; ``--draw`` makes ``drift.png`` of them.
"""

import argparse
import functools
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kfqn_optax import bfgs, pairs
from kfqn_optax.pairs import Pair

D, BATCH, CHUNK = 256, 16, 500
DTYPES = (jnp.float32, jnp.float64)
RESULTS = Path(__file__).parent / "results"
KEPT = Path("runs/drift")
CASES = [
    f"{side}-{lam}"
    for side in ("input", "output")
    for lam in ("0.3", "0.03", "1e-4", "1e-8", "1e-12")
]
SPECTRUM = 30.0 * np.arange(1, D + 1) ** -2.0


class Axes(NamedTuple):
    """A rotation as three reflections, each about a plane that turns slowly; [3, d] each."""

    start: np.ndarray
    other: np.ndarray

    def reflect(self, x: jax.Array, k: jax.Array, back: bool = False) -> jax.Array:
        """Rows of x, [n, d], after k steps."""
        angle = k * (2 * np.pi / np.array([5e3, 1.7e4, 6e4]))
        v = self.start + 0.3 * jnp.sin(angle)[:, None] * self.other
        v = (v / jnp.linalg.norm(v, axis=1, keepdims=True)).astype(x.dtype)
        for i in (2, 1, 0) if back else (0, 1, 2):
            x = x - 2 * (x @ v[i])[:, None] * v[i][None, :]
        return x


def axes() -> Axes:
    rng = np.random.default_rng(0)
    start, other = rng.normal(size=(2, 3, D))
    return Axes(start, other)


class Input(NamedTuple):
    """One factor of an input side and what it learns from."""

    H: jax.Array
    A: jax.Array


class Output(NamedTuple):
    """One factor of an output side, and the averages of its pairs."""

    H: jax.Array
    s: jax.Array
    y: jax.Array


class Seen(NamedTuple):
    """What a step has at hand that could show that H is lost; the status of its pair."""

    yHy: jax.Array
    vHv: jax.Array
    diagonal: jax.Array
    digits: jax.Array
    status: jax.Array


def inputs(key: jax.Array, k: jax.Array) -> jax.Array:
    """A batch of inputs in float32, [batch, d]."""
    dead = np.random.default_rng(1).permutation(D) < D // 10
    spectrum = np.where(dead, 0, SPECTRUM)
    sway = 1 + 0.5 * jnp.sin(k * (2 * np.pi / np.geomspace(1e3, 1e5, D)))
    scale = jnp.asarray(np.sqrt(spectrum) * sway, jnp.float32)
    x = jax.random.normal(key, (BATCH, D), jnp.float32) + np.float32(0.5)
    return axes().reflect(x * scale, k)


def input_step(state: Input, x: jax.Array, mu: Any, guarded: bool) -> tuple[Input, Seen]:
    H, A = state
    x = x.astype(H.dtype)
    A = (0.9 * A + (0.1 / BATCH) * pairs.matmul(x.T, x)).astype(H.dtype)
    a = jnp.mean(x, axis=0)
    s = bfgs.apply(H, a)
    pair = pairs.hessian_action(s, bfgs.apply(A, s), mu)
    H, seen = finish(H, pair, a, a, guarded)
    return Input(H, A), seen


class Change(NamedTuple):
    """Change of the mean output and of the mean cotangent in one step, float32, [d] each."""

    s: jax.Array
    y: jax.Array
    g: jax.Array


def output_change(drift: jax.Array, key: jax.Array, k: jax.Array) -> tuple[jax.Array, Change]:
    fresh, noise, g = jax.random.normal(key, (3, D), jnp.float32)
    drift = np.float32(0.99) * drift + np.float32(0.14) * fresh
    s = np.float32(1e-3) * (drift + np.float32(0.3) * fresh)
    downwards = np.random.default_rng(2).permutation(D) < D // 20
    spectrum = jnp.asarray(np.where(downwards, -0.3, 1) * SPECTRUM / 3, jnp.float32)
    turned = axes().reflect(s[None], k, back=True)
    y = axes().reflect(turned * spectrum, k)[0]
    y = y + np.float32(0.3) * jnp.linalg.norm(y) / np.float32(np.sqrt(D)) * noise
    return drift, Change(s, y, np.float32(0.01) * g)


def output_step(state: Output, change: Change, mu: Any, guarded: bool) -> tuple[Output, Seen]:
    H, s, y = state
    s = (0.9 * s + 0.1 * change.s).astype(H.dtype)
    y = (0.9 * y + 0.1 * change.y).astype(H.dtype)
    pair, _, _ = pairs.damp_double(Pair(s, y), bfgs.apply(H, y), 0.2, mu)
    H, seen = finish(H, pair, change.g.astype(H.dtype), y, guarded)
    return Output(H, s, y), seen


def finish(H, pair, reference, vector, guarded) -> tuple[jax.Array, Seen]:
    """The update, and what could have given an alarm."""
    status = pairs.pair_status(pair, reference, 1e-4)
    Hy = bfgs.apply(H, pair.y)
    yHy, sy = pairs.dot(pair.y, Hy), pairs.dot(*pair)
    if guarded:
        H_new, status = bfgs.update(H, pair, status)
    else:
        rho = 1 / jnp.where(sy > 0, sy, 1)
        w = (rho * yHy + 1) * rho / 2 * pair.s - rho * Hy
        step = bfgs.Change(pair.s, w, jnp.zeros_like(sy))
        H_new = jnp.where(status == pairs.UPDATED, bfgs.add(H, step), H)
    return H_new, Seen(
        yHy=yHy,
        vHv=pairs.dot(vector, bfgs.apply(H, vector)),
        diagonal=jnp.min(jnp.diagonal(H_new)),
        digits=sy - 100 * jnp.finfo(H.dtype).eps * yHy,
        status=status,
    )


def start(side: str, mu: float) -> Any:
    """The states in both dtypes, and the momentum of the steps."""
    first = inputs(jax.random.key(99), jnp.zeros(()))
    states = []
    for dtype in DTYPES:
        A = (first.T @ first / BATCH).astype(dtype)
        zero = jnp.zeros(D, dtype)
        inverse = bfgs.inverse(A, jnp.asarray(mu, dtype))
        eye = bfgs.init(D, jnp.dtype(dtype))
        states.append(Input(inverse, A) if side == "input" else Output(eye, zero, zero))
    return jnp.zeros(D, jnp.float32), tuple(states)


@functools.partial(jax.jit, static_argnames=("side", "guarded"))
def chunk(carry: Any, first: jax.Array, mu: Any, *, side: str, guarded: bool) -> Any:
    """The next CHUNK steps in both dtypes; what the float32 run had at hand in each."""

    def step(carry, k):
        drift, states = carry
        key = jax.random.fold_in(jax.random.key(0), k)
        if side == "input":
            x = inputs(key, k)
            made = [input_step(s, x, mu[i], guarded) for i, s in enumerate(states)]
        else:
            drift, change = output_change(drift, key, k)
            made = [output_step(s, change, mu[i], guarded) for i, s in enumerate(states)]
        return (drift, tuple(s for s, _ in made)), (made[0][1], made[1][1].status)

    return jax.lax.scan(step, carry, first + jnp.arange(CHUNK))


def measure(side: str, states: Any, mu: float) -> dict[str, float]:
    """How far both factors are from what they should be."""
    H32, H64 = (np.asarray(state.H, np.float64) for state in states)
    row = {"distance": float(np.linalg.norm(H32 - H64) / np.linalg.norm(H64))}
    for name, H, state in (("32", H32, states[0]), ("64", H64, states[1])):
        row[f"asymmetry{name}"] = float(np.abs(H - H.T).max() / np.abs(H).max())
        finite = np.isfinite(H).all()
        eigenvalues = np.linalg.eigvalsh((H + H.T) / 2) if finite else np.full(D, np.nan)
        row[f"smallest{name}"], row[f"largest{name}"] = map(float, eigenvalues[[0, -1]])
        if side == "input":
            damped = np.asarray(state.A, np.float64) + mu * np.eye(D)
            row[f"residual{name}"] = float(np.linalg.norm(H @ damped - np.eye(D)) / np.sqrt(D))
    return row


def run(case: str, guarded: bool, steps: int, until: float) -> bool:
    """Goes on with a case; whether it is finished."""
    side, lam = case.split("-", 1)
    mu = float(lam) ** 0.5
    name = case if guarded else f"{case}-unguarded"
    notes, arrays = KEPT / f"{name}.json", KEPT / f"{name}.npz"
    carry = start(side, mu)
    kept = {"case": case, "guarded": guarded, "k": 0, "rows": [], "first": {}, "counts": {}}
    if notes.exists():
        kept = json.loads(notes.read_text())
        with np.load(arrays) as leaves:
            carry = jax.tree.unflatten(jax.tree.structure(carry), list(leaves.values()))
    mus = tuple(jnp.asarray(mu, dtype) for dtype in DTYPES)
    while kept["k"] < steps and time.monotonic() < until:
        first = jnp.asarray(kept["k"])
        carry, (seen, status64) = chunk(carry, first, mus, side=side, guarded=guarded)
        note(kept, seen, status64)
        kept["k"] += CHUNK
        kept["rows"].append({"step": kept["k"]} | measure(side, carry[1], mu))
    np.savez(arrays, *map(np.asarray, jax.tree.leaves(carry)))
    notes.write_text(json.dumps(kept))
    if kept["k"] >= steps:
        collect(kept)
    return kept["k"] >= steps


def collect(kept: dict[str, Any]) -> None:
    """A finished case into the file of results: every tenth row, four digits."""
    path = RESULTS / "drift.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    entry = found.setdefault(kept["case"], {})
    entry["guarded" if kept["guarded"] else "unguarded"] = {
        "steps": kept["k"],
        "counts": kept["counts"],
        "first alarm": kept["first"],
        "smallest eigenvalue ever": min(row["smallest32"] for row in kept["rows"]),
        "largest distance": max(row["distance"] for row in kept["rows"]),
        "rows": [{k: float(f"{v:.4g}") for k, v in row.items()} for row in kept["rows"][9::10]],
    }
    path.write_text(json.dumps(found) + "\n")


def note(kept: dict[str, Any], seen: Seen, status64: jax.Array) -> None:
    """Counts the statuses, and what could have given the alarm and when it first did."""
    for name, status in (("float32", seen.status), ("float64", status64)):
        for code, count in zip(*np.unique(np.asarray(status), return_counts=True), strict=True):
            key = f"{name}: {pairs.STATUS_WORDS[int(code)]}"
            kept["counts"][key] = kept["counts"].get(key, 0) + int(count)
    for name in ("yHy", "vHv", "diagonal", "digits"):
        at = np.flatnonzero(np.asarray(getattr(seen, name)) <= 0)
        if len(at):
            kept["first"].setdefault(name, kept["k"] + int(at[0]))
        kept["counts"][name] = kept["counts"].get(name, 0) + len(at)


def draw() -> None:
    """The figure: eigenvalues, and how far float32 is from float64, by steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = json.loads((RESULTS / "drift.json").read_text())
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    for row, side in zip(axes, ("input", "output"), strict=True):
        for number, lam in enumerate(("0.3", "0.03", "1e-4", "1e-8", "1e-12")):
            for kind, line in (("guarded", "-"), ("unguarded", ":")):
                rows = found.get(f"{side}-{lam}", {}).get(kind, {}).get("rows")
                if not rows:
                    continue
                steps = [r["step"] for r in rows]
                style = {"color": f"C{number}", "linestyle": line}
                label = f"{lam}" + ("" if kind == "guarded" else ", no guard")
                row[0].plot(steps, [r["distance"] for r in rows], label=label, **style)
                for end in ("smallest32", "largest32"):
                    row[1].plot(steps, [r[end] for r in rows], **style)
        row[0].set(yscale="log", ylabel=f"{side} side")
        row[0].set_title("distance from the float64 run, relative")
        row[1].set(yscale="log")
        row[1].set_title("smallest and largest eigenvalue, float32")
        row[0].legend(title="lambda", fontsize="small")
    for axis in axes[1]:
        axis.set_xlabel("updates")
    FigureCanvasAgg(figure)
    figure.savefig(RESULTS / "drift.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--unguarded", action="store_true")
    parser.add_argument("--draw", action="store_true")
    arguments = parser.parse_args()
    if arguments.draw:
        return draw()
    jax.config.update("jax_enable_x64", True)
    until = time.monotonic() + arguments.seconds
    KEPT.mkdir(parents=True, exist_ok=True)
    for case in arguments.cases:
        done = run(case, not arguments.unguarded, arguments.steps, until)
        print(case, "finished" if done else "goes on", flush=True)


if __name__ == "__main__":
    main()
