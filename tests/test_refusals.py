"""Each refusal names the layer and says what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from models import Mlp, loss_of, problem

import kfqn_optax as kfqn


def updated(loss_fn, params, *args, tx=None, curvature_fn="ours", init_params=None, of=None):
    """One update with everything as it should be, unless told otherwise.

    Nothing is computed unless ``of`` says what of the updates is wanted: refusals come earlier.
    """
    tx = tx or kfqn.kbfgs(0.1)
    state = tx.init(params if init_params is None else init_params)
    extra = {"curvature_fn": curvature_fn}
    if curvature_fn == "ours":
        extra = {"curvature_fn": kfqn.curvature_fn(loss_fn, params, *args)}
    elif curvature_fn == "left out":
        extra = {}
    run = jax.eval_shape if of is None else lambda fn, *args: jax.jit(lambda *a: of(fn(*a)))(*args)
    ones = jax.tree.map(jnp.ones_like, params)
    return run(lambda *args: tx.update(*args, **extra)[0], ones, state, params)


def test_leaving_curvature_fn_out():
    with pytest.raises(TypeError, match="missing the keyword argument curvature_fn.*Dense_0"):
        updated(*problem(), curvature_fn="left out")


def test_curvature_fn_that_is_no_function():
    with pytest.raises(TypeError, match="curvature_fn must be a function from parameters"):
        updated(*problem(), curvature_fn=3)


def test_params_left_out():
    loss_fn, params, x, targets = problem()
    tx = kfqn.scale_by_kbfgs(0.1)
    with pytest.raises(ValueError, match="needs the parameters to precondition 'params/Dense_0'"):
        tx.update(params, tx.init(params), curvature_fn=None)


def test_loss_that_is_not_scalar():
    _, params, x, _ = problem()

    def per_example(params, x):
        return jnp.sum(Mlp([4, 3]).apply(params, x) ** 2, axis=-1)

    with pytest.raises(TypeError, match=r"per_example must return the mean loss.*shape \(8,\)"):
        kfqn.curvature_fn(per_example, params, x)
    with pytest.raises(TypeError, match="per_example must return the mean loss"):
        kfqn.find_layers(per_example, params, x)


def test_the_users_own_error_comes_through():
    _, params, x, _ = problem()

    def broken(params, x):
        return Mlp([4, 3]).apply(params, x[:, :2]).mean()

    with pytest.raises(Exception, match="kernel"):
        kfqn.curvature_fn(broken, params, x)


def test_forward_mode_inside_the_loss():
    loss_fn, params, x, targets = problem()

    def physics(params, x, targets):
        return jax.jvp(lambda x: loss_fn(params, x, targets), (x,), (x,))[1]

    with pytest.raises(ValueError, match="physics takes a forward-mode derivative"):
        kfqn.curvature_fn(physics, params, x, targets)(params)


@pytest.mark.parametrize("how", ["adversarial example", "penalty on the gradient"])
def test_reverse_mode_inside_the_loss(how):
    loss_fn, params, x, targets = problem()

    def attacked(params, x, targets):
        gradient = jax.grad(loss_fn, 1)(params, x, targets)
        if how == "adversarial example":
            return loss_fn(params, x + 0.1 * jax.lax.stop_gradient(gradient), targets)
        return loss_fn(params, x, targets) + jnp.mean(gradient**2)

    with pytest.raises(ValueError, match="attacked takes a derivative .* pass it as an argument"):
        kfqn.curvature_fn(attacked, params, x, targets)


def test_a_cast_of_all_parameters():
    loss_fn, params, x, targets = problem()

    def cast(params, x, targets):
        return loss_fn(jax.tree.map(lambda p: p.astype(jnp.bfloat16), params), x, targets)

    with pytest.raises(ValueError, match="casts all parameters to bfloat16.*'Dense_0'.*dtype="):
        kfqn.curvature_fn(cast, params, x, targets)(params)


def test_a_loss_that_compares_whole_trees():
    loss_fn, params, x, targets = problem()

    def anchored(p, x, targets):
        distance = optax.tree.norm(jax.tree.map(lambda a, b: a - b, p, params))
        return loss_fn(p, x, targets) + distance

    with pytest.raises(ValueError, match="anchored runs on the parameters but not with an extra"):
        kfqn.curvature_fn(anchored, params, x, targets)


@pytest.mark.parametrize("axes", [3, 4])
def test_a_kernel_whose_kind_is_ambiguous(axes):
    params = {"encoder": {"Conv_0": {"kernel": jnp.ones((2,) * axes)}}}
    with pytest.raises(ValueError, match=rf"'encoder/Conv_0' has a kernel with {axes} axes.*find_"):
        kfqn.kbfgs(0.1).init(params)
    with pytest.raises(ValueError, match="'encoder/Conv_0'"):
        kfqn.scale_by_kbfgs(0.1).init(params)


def test_a_bias_that_does_not_fit():
    params = {"d": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones((2, 3))}}
    with pytest.raises(ValueError, match=r"layer 'd' has a kernel of shape \(2, 3\) and a bias of"):
        kfqn.kbfgs(0.1).init(params)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64, bool])
def test_parameters_that_are_not_real(dtype):
    params = {"d": {"kernel": jnp.ones((2, 3), dtype)}}
    with pytest.raises(TypeError, match="parameter 'd/kernel' has dtype"):
        kfqn.kbfgs(0.1).init(params)


def test_an_integer_parameter_outside_the_layers():
    params = {"d": {"kernel": jnp.ones((2, 3))}, "steps": jnp.zeros((), jnp.int32)}
    with pytest.raises(TypeError, match="parameter 'steps' has dtype int32, which has no gradient"):
        kfqn.kbfgs(0.1).init(params)


def test_state_of_other_parameters():
    loss_fn, params, x, targets = problem()
    _, other, *_ = problem(widths=[4, 2])
    tx = kfqn.scale_by_kbfgs(0.1)
    with pytest.raises(ValueError, match="state of K-BFGS was made for other.*'params/Dense_1'"):
        updated(loss_fn, params, x, targets, tx=tx, init_params=other)
    _, more, *_ = problem(widths=[4, 3, 3])
    with pytest.raises(ValueError, match=r"'params/Dense_2' has .* no parameters in the gradients"):
        updated(loss_fn, params, x, targets, tx=tx, init_params=more)


def test_statistics_of_another_model():
    loss_fn, params, x, targets = problem()
    other_loss, other, *_ = problem(widths=[4, 2])
    fn = kfqn.curvature_fn(other_loss, other, x, targets[:, :2])
    tx = kfqn.scale_by_kbfgs(0.1)
    with pytest.raises(ValueError, match=r"measured layer 'params/Dense_1' with .* = \(5, 2\)"):
        tx.update(params, tx.init(params), params, curvature_fn=lambda _: fn(other))


def test_statistics_lack_a_layer():
    loss_fn, params, x, targets = problem()
    params["params"]["unused"] = {"kernel": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="measured no layer 'params/unused'.*find_layers"):
        updated(loss_fn, params, x, targets)


def test_state_lacks_a_layer():
    """Statistics of a layer that the transformation was not told of, by hand."""
    loss_fn, params, x, targets = problem()
    tx = kfqn.scale_by_kbfgs(0.1)
    statistics = kfqn.curvature_fn(loss_fn, params, x, targets)(params)
    extended = {"params": {**params["params"], "extra": {"bias": jnp.ones(2)}}}
    statistics.layers["params/extra"] = statistics.layers["params/Dense_0"]
    with pytest.raises(ValueError, match="measured 'params/extra', for which the state has no"):
        tx.update(extended, tx.init(extended), extended, curvature_fn=lambda _: statistics)


def test_layers_of_other_parameters():
    loss_fn, params, x, targets = problem()
    layers = kfqn.find_layers(loss_fn, params, x, targets)
    bigger = jax.tree.map(lambda p: jnp.ones([2 * n for n in p.shape]), params)
    with pytest.raises(ValueError, match=r"parameter 'params/Dense_0/kernel' has shape \(10, 8\)"):
        kfqn.kbfgs(0.1, layers=layers).init(bigger)
    del params["params"]["Dense_1"]["bias"]
    with pytest.raises(ValueError, match="layer 'params/Dense_1' has no parameter"):
        kfqn.kbfgs(0.1, layers=layers).init(params)


def test_parameters_of_another_structure():
    loss_fn, params, x, targets = problem()
    fn = kfqn.curvature_fn(loss_fn, params, x, targets)
    with pytest.raises(ValueError, match="only in the update: 'Dense_0/bias'"):
        fn(params["params"])


def test_a_mask_between_kernel_and_bias():
    loss_fn, params, x, targets = problem()
    mask = jax.tree_util.tree_map_with_path(lambda path, _: "bias" not in str(path), params)
    tx = optax.masked(kfqn.scale_by_kbfgs(0.1), mask)
    with pytest.raises(ValueError, match="Kernel and bias must go to the same optimizer"):
        updated(loss_fn, params, x, targets, tx=tx)


class Stacked(nn.Module):
    """Layers with stacked parameters, by scan or by vmap."""

    how: str

    @nn.compact
    def __call__(self, x):
        if self.how == "scan":
            body = nn.scan(
                lambda dense, carry, _: (nn.relu(dense(carry)), ()),
                variable_axes={"params": 0}, split_rngs={"params": True}, length=3,
            )  # fmt: skip
            return body(nn.Dense(5, name="layers"), x, None)[0]
        many = nn.vmap(
            nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True},
            in_axes=None, axis_size=3,
        )  # fmt: skip
        return many(5, name="layers")(x).sum(axis=0)


@pytest.mark.parametrize("how", ["scan", "vmap"])
def test_stacks_cannot_be_told_from_their_shapes_and_can_go_elsewhere(how):
    x = jnp.ones((4, 5))
    model = Stacked(how)
    params = model.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="layer 'params/layers' has a kernel with 3 axes"):
        kfqn.kbfgs(0.1).init(params)

    class Both(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(5, name="last")(Stacked(how, name="stack")(x))

    params = Both().init(jax.random.key(0), x)
    tx = optax.partition(
        {"ours": kfqn.kbfgs(0.1), "other": optax.sgd(0.1)},
        lambda tree: jax.tree_util.tree_map_with_path(
            lambda path, _: "other" if "stack" in str(path) else "ours", tree
        ),
    )
    elsewhere = updated(loss_of(Both()), params, x, x, tx=tx, of=lambda u: u["params"]["stack"])
    np.testing.assert_allclose(elsewhere["layers"]["kernel"], -0.1, rtol=1e-6)


def test_a_kernel_that_is_transposed_before_its_use():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            turned = nn.map_variables(
                nn.Dense, "params", lambda tree: jax.tree.map(jnp.transpose, tree)
            )
            return nn.Dense(4)(turned(5, use_bias=False, name="turned")(x))

    x = jnp.ones((4, 3))
    params = {"params": {"turned": {"kernel": jnp.ones((5, 3))}}}
    params["params"]["Dense_0"] = nn.Dense(4).init(jax.random.key(0), jnp.ones((4, 5)))["params"]
    args = params, x, jnp.ones((4, 4))
    assert [one.path for one in kfqn.find_layers(loss_of(Net()), *args)] == ["params/Dense_0"]
    with pytest.raises(ValueError, match="measured no layer 'params/turned'"):
        updated(loss_of(Net()), *args)


def test_weight_norm_is_not_mistaken_for_a_dense_layer():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.WeightNorm(nn.Dense(3))(nn.Dense(5)(x))

    x = jnp.ones((4, 5))
    params = Net().init(jax.random.key(0), x)
    layers = kfqn.find_layers(loss_of(Net()), params, x, x[:, :3])
    assert len(layers) == 1
    with pytest.raises(ValueError, match="measured no layer"):
        updated(loss_of(Net()), params, x, x[:, :3])
    updated(loss_of(Net()), params, x, x[:, :3], tx=kfqn.kbfgs(0.1, layers=layers))
