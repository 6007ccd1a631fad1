"""What ``docs/optax.md`` says beside its table."""

import doctest
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from contract import BATCHES, OURS, alone, close, initial, loss_fn, step_of
from flax import nnx

import kfqn_optax as kfqn

PAGE = Path(__file__).parents[1] / "docs" / "optax.md"


class Told(Exception):
    """The extra argument has arrived."""


def _tell(grads, state, params=None, *, curvature_fn=None, **extra):
    raise Told("curvature_fn is here" if curvature_fn is not None else "curvature_fn was dropped")


SPY = optax.GradientTransformationExtraArgs(optax.sgd(0.1, momentum=0.5).init, _tell)


def by_hand(tx):
    steps = optax.MultiSteps(tx, 2)
    return optax.GradientTransformationExtraArgs(steps.init, steps.update)


HERE_IT_IS, DROPPED = (Told, "curvature_fn is here"), (Told, "curvature_fn was dropped")
UNEXPECTED = (TypeError, "unexpected keyword argument 'curvature_fn'")
WRAPPERS = {
    "named_chain": (lambda tx: optax.named_chain(("a", optax.clip(1.0)), ("b", tx)), HERE_IT_IS),
    "MultiSteps by hand": (lambda tx: optax.chain(by_hand(tx)), HERE_IT_IS),
    "MultiSteps in chain": (lambda tx: optax.chain(optax.MultiSteps(tx, 2)), DROPPED),
    "conditionally_transform": (
        lambda tx: optax.conditionally_transform(tx, lambda count: True), HERE_IT_IS
    ),
    "conditionally_mask": (lambda tx: optax.conditionally_mask(tx, lambda count: True), HERE_IT_IS),
    "schedule_free": (lambda tx: optax.contrib.schedule_free(tx, 0.1), HERE_IT_IS),
    "mechanize": (optax.contrib.mechanize, HERE_IT_IS),
    "lookahead": (lambda tx: optax.lookahead(tx, 2, 0.5), UNEXPECTED),
    "split_real_and_imaginary": (optax.contrib.split_real_and_imaginary, UNEXPECTED),
    "sam": (lambda tx: optax.contrib.sam(tx, optax.sgd(0.1)), UNEXPECTED),
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPERS)
def test_which_transformations_pass_the_argument_on(name):
    wrap, (error, message) = WRAPPERS[name]
    grads = params = {"w": jnp.ones(2)}
    if name == "lookahead":
        params = optax.LookaheadParams.init_synced(params)
    tx = wrap(SPY)
    state = tx.init(params)
    with pytest.raises(error, match=message):
        tx.update(grads, state, params, curvature_fn=lambda p: p)


def section(title):
    """The Python of one section of the page, run; its names."""
    text = PAGE.read_text().split(f"## {title}\n")[1].split("\n## ")[0]
    names = {}
    exec("\n".join(e.source for e in doctest.DocTestParser().get_examples(text)), names)
    return names


@pytest.mark.parametrize("name", ["kbfgs", pytest.param("kbfgs_l", marks=pytest.mark.slow), "kfqn"])
def test_microbatches_as_on_the_page_are_the_large_batch(name):
    """Gradient and curvature one microbatch at a time, for two steps."""
    recipe, optimizer = section("Microbatches"), OURS[name]
    tx, params = optimizer.make(), initial()

    def split(batch):
        x, targets, weight = batch
        return x.reshape(4, 2, 3), targets.reshape(4, 2, 2), jnp.full(4, weight)

    @jax.jit
    def step(params, state, microbatches):
        grads, fn = recipe["accumulate"](loss_fn, params, microbatches)
        updates, state = tx.update(grads, state, params, curvature_fn=fn)
        return optax.apply_updates(params, updates), state, updates

    state = tx.init(params)
    for batch, expected in zip(BATCHES[:2], alone(optimizer)[0], strict=False):
        params, state, updates = step(params, state, split(batch))
        close((params, state, updates), expected, "results")


def test_a_loss_that_scans_over_microbatches_takes_them_for_positions():
    """What the page warns of."""

    def scanning(params, *microbatches):
        return jnp.mean(jax.lax.map(lambda batch: loss_fn(params, *batch), microbatches))

    params, (x, targets, weight) = initial(), BATCHES[0]
    microbatches = x.reshape(4, 2, 3), targets.reshape(4, 2, 2), jnp.full(4, weight)
    of_all = kfqn.curvature_fn(loss_fn, params, *BATCHES[0])(params).layers["params/Dense_0"]
    scanned = kfqn.curvature_fn(scanning, params, *microbatches)(params).layers["params/Dense_0"]
    close(scanned.input_mean, of_all.input_mean, "mean inputs")
    close(scanned.input_moment, 4 * of_all.input_moment, "second moments")
    assert int(of_all.rows / of_all.examples) == 1
    assert int(scanned.rows / scanned.examples) == 4


def test_a_value_fn_that_takes_the_argument_allows_a_line_search():
    optimizer, params = OURS["kbfgs"], initial()
    tx = optax.chain(optimizer.make(), optax.scale_by_backtracking_linesearch(5))

    def value_fn(params, curvature_fn=None):
        return loss_fn(params, *BATCHES[0])

    def more(params):
        value, grad = jax.value_and_grad(value_fn)(params)
        return {"value": value, "grad": grad, "value_fn": value_fn}

    @jax.jit
    def step(params, state):
        return step_of(optimizer, tx, more=more(params))(params, state, BATCHES[0])[:2]

    before, state = value_fn(params), tx.init(params)
    for _ in range(3):
        params, state = step(params, state)
    assert value_fn(params) < 0.9 * before
    assert int(optax.tree.get(state, "layers")["params/Dense_0"].output_status) == 0


@pytest.mark.parametrize("given", [False, True], ids=["inferred", "given"])
@pytest.mark.parametrize("method", ["kbfgs", "block_kbfgs", "kfac", "mbf"])
def test_map_params_gives_factors_to_transform_non_params(method, given):
    """One by one if the layers were given, else all in one dictionary."""
    params = initial()
    layers = kfqn.find_layers(loss_fn, params, *BATCHES[0]) if given else None
    tx = getattr(kfqn, f"scale_by_{method}")(0.1, layers=layers)
    state, seen = tx.init(params), []

    def note(rest):
        seen.append(rest)
        return rest

    close(optax.tree.map_params(tx, None, state, transform_non_params=note), state, "states")
    whole = {"layers", "momentum"}  # dictionaries, of which nothing is known without layers
    expected = jax.tree.leaves(state)
    if not given:
        fields = state._asdict().items()
        expected = [
            v for k, part in fields for v in ([part] if k in whole else jax.tree.leaves(part))
        ]
    assert jax.tree.structure(seen) == jax.tree.structure(expected)


def test_a_container_without_leaves_is_no_placeholder():
    tx = kfqn.scale_by_kbfgs(0.1)
    for params in [{}, (), None, optax.MaskedNode(), {"a": optax.MaskedNode()}]:
        assert tx.init(params).layers == {}


@pytest.mark.parametrize("method", [kfqn.kbfgs, kfqn.kfac])
def test_gradients_without_layers_for_a_loss_with_layers(method):
    """A tree with other parameters is refused, a part of the same parameters is not."""
    tx, params, fn = method(0.1), initial(), kfqn.curvature_fn(loss_fn, initial(), *BATCHES[0])
    scale = {"params": {"Dense_0": optax.MaskedNode(), "scale": params["params"]["scale"]}}
    tx.update(scale, tx.init(scale), scale, curvature_fn=fn)
    other = {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match="differ in structure"):
        tx.update(other, tx.init(other), other, curvature_fn=fn)


def test_holes_are_filled_leaf_by_leaf_and_by_whole_parts():
    params, other = initial(), jax.tree.map(lambda p: p + 0.1, initial())
    fn, hole = kfqn.curvature_fn(loss_fn, params, *BATCHES[0]), optax.MaskedNode()
    dense, scale = params["params"]["Dense_0"], params["params"]["scale"]
    for given, whole in [
        ({"Dense_0": hole, "scale": scale + 0.1}, {"Dense_0": dense, "scale": scale + 0.1}),
        (
            {"Dense_0": {"kernel": hole, "bias": dense["bias"] + 0.1}, "scale": hole},
            {"Dense_0": {**dense, "bias": dense["bias"] + 0.1}, "scale": scale},
        ),
        ({**other["params"], "scale": hole}, {**other["params"], "scale": scale}),
    ]:
        close(fn({"params": given}), fn({"params": whole}), "statistics")


class Normed(nnx.Module):
    """A layer behind a normalization, whose scale goes to the fallback."""

    def __init__(self):
        self.norm = nnx.LayerNorm(3, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        self.dense = nnx.Linear(3, 2, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        self.norm.scale[...] = jnp.array([1.0, 2.0, 3.0])

    def __call__(self, x):
        return self.dense(self.norm(x))


def test_holes_of_nnx_parameters_are_filled():
    """A normalization without its scale would run, and be another model."""
    model, (x, targets, _) = Normed(), BATCHES[0]
    fn = kfqn.nnx_curvature_fn(lambda model, x: jnp.mean((model(x) - targets) ** 2), model, x)
    params = nnx.state(model, nnx.Param)
    expected = fn(params)
    for bare in (False, True):
        given = nnx.as_pure(params) if bare else params
        holes = jax.tree_util.tree_map_with_path(
            lambda path, leaf: optax.MaskedNode() if "norm" in str(path[0]) else leaf, given
        )
        assert len(jax.tree.leaves(holes)) == 2
        close(fn(holes), expected, "statistics")
    prefix = nnx.State({"dense": params["dense"], "norm": optax.MaskedNode()})
    close(fn(prefix), expected, "statistics")


def test_the_page():
    result = doctest.testfile(str(PAGE), module_relative=False)
    assert result.attempted > 10
    assert result.failed == 0
