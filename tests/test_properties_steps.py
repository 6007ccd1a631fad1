"""What whole steps do not depend on: the order of layers, copies of examples, units.

Two facts decide what a batch may be changed into. Gradients and mean cotangents come from the loss,
so an example of weight zero adds nothing to them. A and the mean input count every row that the
layer sees, weighted or not. So a batch may be repeated, as a whole, with any weights that make the
same loss; padding it with anything else changes the factors.

And which units cancel: for one layer without bias under half the squared error, ``h = W a``,
``y = s``. Data c times as large make A ``c^2`` times as large, so ``lambda_A`` has to follow, which
is ``sqrt(lambda)``: lambda times ``c^4``. (The output side has the same root, and must not need it:
``s.y = |s|^2`` is above ``sqrt(lambda) |s|^2`` as long as lambda is below 1.) A loss c times as
large makes H_g c times as small, if it starts so.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from hypothesis import strategies as st
from models import problem
from properties import profiles, seeds
from steps import close, layers_of

import kfqn_optax as kfqn

STEPS, EXAMPLES, D_IN, WIDTH, D_OUT = 4, 6, 5, 4, 3
methods = st.sampled_from(["kbfgs", "kfqn"])


class Named(nn.Module):
    """Two dense layers by any names."""

    first: str
    second: str

    @nn.compact
    def __call__(self, x):
        dense = functools.partial(nn.Dense, param_dtype=jnp.float64, dtype=jnp.float64)
        return dense(D_OUT, name=self.second)(nn.relu(dense(WIDTH, name=self.first)(x)))


def loss_by_names(*names):
    model = Named(*names)

    def loss_fn(params, x, targets, weights):
        losses = jnp.sum(0.5 * (model.apply(params, x) - targets) ** 2, axis=-1)
        return jnp.sum(weights * losses) / jnp.sum(weights)

    return loss_fn


@functools.lru_cache
def run_of(method, names, backwards=False):
    """A jitted run of some steps on one batch: parameters and layer states after each."""
    loss_fn = loss_by_names(*names)

    @jax.jit
    def run(params, *batch):
        layers = kfqn.find_layers(loss_fn, params, *batch)
        tx = getattr(kfqn, method)(0.2, 0.1, layers=layers[::-1] if backwards else layers)

        def step(carry, _):
            params, state = carry
            grads = jax.grad(loss_fn)(params, *batch)
            fn = kfqn.curvature_fn(loss_fn, params, *batch)
            updates, state = tx.update(grads, state, params, curvature_fn=fn)
            carry = optax.apply_updates(params, updates), state
            return carry, (carry[0], layers_of(state))

        return jax.lax.scan(step, (params, tx.init(params)), None, STEPS)[1]

    return run


def case(seed):
    rng = np.random.default_rng(seed)
    shapes = [(D_IN, WIDTH), (WIDTH,), (WIDTH, D_OUT), (D_OUT,)]
    K, b, L, c = (jnp.asarray(rng.normal(size=shape)) for shape in shapes)
    x, t = rng.normal(size=(EXAMPLES, D_IN)), rng.normal(size=(EXAMPLES, D_OUT))
    return [{"kernel": K, "bias": b}, {"kernel": L, "bias": c}], x, t


def named(layers, *names):
    return {"params": dict(zip(names, layers, strict=True))}


def check_the_order_of_layers_does_not_matter(seed, method):
    layers, x, t = case(seed)
    w = np.ones(EXAMPLES)
    params, states = run_of(method, ("a", "b"))(named(layers, "a", "b"), x, t, w)
    other = run_of(method, ("z", "b"), backwards=True)(named(layers, "z", "b"), x, t, w)
    for one, theirs in (("a", "z"), ("b", "b")):
        close(params["params"][one], other[0]["params"][theirs], rtol=1e-9)
        close(states[f"params/{one}"], other[1][f"params/{theirs}"], rtol=1e-8)


test_the_order_of_layers, test_the_order_of_layers_soak = profiles(
    check_the_order_of_layers_does_not_matter, 15, seeds, methods
)


def check_a_batch_may_be_repeated_with_any_weights(seed, method):
    """Twice the batch, the copies with weight 1 or with weight 0."""
    layers, x, t = case(seed)
    params, ones = named(layers, "a", "b"), np.ones(EXAMPLES)
    run = run_of(method, ("a", "b"))
    expected = run(params, x, t, ones)
    for weight in (0, 1):
        weights = np.concatenate([ones, weight * ones])
        after, states = run(params, np.tile(x, (2, 1)), np.tile(t, (2, 1)), weights)
        close(after, expected[0], rtol=1e-9)
        for path, state in states.items():
            for field in ("input", "output", "s", "y", "input_status", "output_status"):
                close(getattr(state, field), getattr(expected[1][path], field), rtol=1e-8)


test_a_repeated_batch, test_a_repeated_batch_soak = profiles(
    check_a_batch_may_be_repeated_with_any_weights, 15, seeds, methods
)


def test_padding_with_zeros_leaves_gradients_and_thins_out_the_moments():
    """Examples of weight zero: the mean cotangent is the same, A and the mean input count them."""
    layers, x, t = case(0)
    params, loss_fn = named(layers, "a", "b"), loss_by_names("a", "b")
    weights = np.repeat([1.0, 0.0], [EXAMPLES, 2])
    pad = functools.partial(np.pad, pad_width=((0, 2), (0, 0)))

    @jax.jit
    def measure(*batch):
        return kfqn.curvature_fn(loss_fn, params, *batch)(params).layers

    plain, padded = measure(x, t, np.ones(EXAMPLES)), measure(pad(x), pad(t), weights)
    for path in plain:
        close(padded[path].cotangent_mean, plain[path].cotangent_mean, rtol=1e-12)
    share = EXAMPLES / (EXAMPLES + 2)
    a, a_padded = plain["params/a"], padded["params/a"]
    close(a_padded.input_mean[:-1], share * a.input_mean[:-1], rtol=1e-12)
    close(a_padded.input_moment[:-1, :-1], share * a.input_moment[:-1, :-1], rtol=1e-12)
    assert float(a_padded.input_mean[-1]) == float(a_padded.input_moment[-1, -1]) == 1


single, *_ = problem([D_OUT], d_in=D_IN, bias=False)


@jax.jit
def single_run(W, x, t, damping, factor, start):
    """K-BFGS on one layer without bias, under ``factor`` times the loss, from H_g = I / start.

    Returns the kernels before each step and after the last, and the layer's state.
    """

    def loss_fn(params, x, t):
        return factor * single(params, x, t)

    tx = kfqn.kbfgs(0.3, damping)
    params = {"params": {"Dense_0": {"kernel": W}}}
    state = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf / start if jax.tree_util.keystr(path[-1:]) == ".output" else leaf,
        tx.init(params),
    )

    def step(carry, _):
        params, state = carry
        grads = jax.grad(loss_fn)(params, x, t)
        fn = kfqn.curvature_fn(loss_fn, params, x, t)
        updates, state = tx.update(grads, state, params, curvature_fn=fn)
        return (optax.apply_updates(params, updates), state), params

    (params, state), passed = jax.lax.scan(step, (params, state), None, STEPS)
    (of_layer,) = layers_of(state).values()
    kernels = jax.tree.map(lambda all_, last: jnp.concatenate([all_, last[None]]), passed, params)
    return kernels["params"]["Dense_0"]["kernel"], of_layer


def check_the_units_of_data_and_loss_cancel(seed, size, factor):
    _, x, t = case(seed)
    W = np.random.default_rng(seed + 1).normal(size=(D_IN, D_OUT))
    damping = min(0.1, 0.5 / size**4, 0.5 * factor**2)
    expected, plain = single_run(W, x, t, damping, 1.0, 1.0)
    larger, of_larger = single_run(W, size * x, size * t, size**4 * damping, 1.0, 1.0)
    close(larger, expected, rtol=1e-7)
    close(of_larger.input * size**2, plain.input, rtol=1e-6)
    close(of_larger.output, plain.output, rtol=1e-6)
    heavier, of_heavier = single_run(W, x, t, damping, factor, factor)
    close(heavier, expected, rtol=1e-7)
    close(of_heavier.output * factor, plain.output, rtol=1e-6)


test_units_of_data_and_loss, test_units_of_data_and_loss_soak = profiles(
    check_the_units_of_data_and_loss_cancel, 15, seeds, st.floats(0.1, 10), st.floats(0.1, 10)
)


def test_a_heavier_loss_alone_is_another_problem():
    """H_g starts from the identity, which has units: the scaling above needs I / factor there."""
    _, x, t = case(0)
    W = np.ones((D_IN, D_OUT))
    plain, _ = single_run(W, x, t, 0.1, 1.0, 1.0)
    heavier, _ = single_run(W, x, t, 0.1, 4.0, 1.0)
    close(heavier[1] - heavier[0], 4 * (plain[1] - plain[0]), rtol=1e-9)
