"""Mistakes in what surrounds the factors: statistics, intake, which pair feeds which, the step."""

from benchmarks.mutants.mutant import in_file

_GOLDEN = "tests/test_golden.py::test_every_recorded_array_in_float64[kbfgs_mse]"
_FAULTS = "tests/test_faults.py::test_output_side"
_MEAN = "tests/test_faults.py::test_mean_input"
_MOMENT = "tests/test_faults.py::test_second_moment"
_DAMPING = "tests/test_faults_of_data.py::test_a_schedule_of_damping_that_fails"
_KFQN = "tests/test_methods.py::test_kfqn_against_the_reference"
_LIMITED = "tests/test_faults.py::test_gradient_under_a_limit_on_the_step"
_NOISE = "tests/test_kinds.py::test_the_key_projection_has_no_mean_cotangent"
_EMBEDDING = "tests/test_kinds.py::test_an_embedding_is_inverted_exactly"

_statistics = in_file("statistics", "tests/test_statistics.py", _FAULTS)
_intake = in_file("intake", "tests/test_factors.py", "tests/test_intake.py", _MEAN, _MOMENT)
_factors = in_file("factors", "tests/test_factors.py", _FAULTS, _MEAN)
_transform = in_file("transform", _GOLDEN, "tests/test_transform.py")
_direction = in_file("direction", _GOLDEN, "tests/test_transform.py", _FAULTS)

STEPS = (
    _statistics(
        "if moment is None else moment / examples", "if moment is None else moment / some_rows"
    ),
    _statistics("input_mean=inputs / some_rows", "input_mean=inputs / examples"),
    _statistics('sums["cotangents"] * per_position', 'sums["cotangents"] * examples'),
    _statistics('jnp.sqrt(sums["roundings"][0])', 'sums["roundings"][0]'),
    _statistics("jnp.sum(vector * vector)", "jnp.sum(vector)"),
    _statistics(
        "decay * old + (1 - decay) * new",
        "(1 - decay) * old + decay * new",
        "tests/test_factors.py",
    ),
    _statistics("some_rows = jnp.maximum(rows, 1)", "some_rows = rows"),
    _statistics("+ rows * vector[-1]", ""),
    _statistics("product + inputs * vector[-1]", "product"),
    _statistics("output * (examples**2 / some_rows)", "output * examples"),
    _intake("jnp.where(stage == WARM, 1, running)", "running"),
    _intake("jnp.where(stage == WARM, 0, 1 - running)", "1 - running"),
    _intake("usable = (rows > 0) & is_usable(seen) & damped", "usable = is_usable(seen) & damped"),
    _intake("usable = (rows > 0) & is_usable(seen) & damped", "usable = (rows > 0) & damped"),
    _intake(
        "usable = (rows > 0) & is_usable(seen) & damped",
        "usable = (rows > 0) & is_usable(seen)",
        _DAMPING,
    ),
    _intake(
        "jnp.where(rows > 0, rows / examples, positions)",
        "jnp.where(rows > 0, rows, positions)",
        _KFQN,
    ),
    _intake("jnp.sum(jnp.abs(moment), axis=-1) if matrix", "jnp.sum(moment, axis=-1) if matrix"),
    _intake("(begun.stage != EMPTY) & (state.stage != RUNNING)", "(begun.stage != EMPTY)"),
    _intake("A = jnp.where(stage == WARM, held, batch)", "A = batch", "tests/test_intake.py"),
    _intake(
        "first = starts(states[path], begun[path]) & is_damping(damping)",
        "first = starts(states[path], begun[path])",
        _DAMPING,
        reason="`begin` has looked at the damping and left the stage alone",
    ),
    _intake("jnp.where(first & ~usable, was, begun[path].stage)", "begun[path].stage"),
    _factors("(K_plus - K) * x_plus[:, None]", "(K_plus - K) * x[:, None]"),
    _factors("K * (x_plus - x)[:, None]", "K_plus * (x_plus - x)[:, None]"),
    _factors('change += after["bias"][0] * a_plus[-1] - before["bias"][0] * a[-1]', "pass"),
    _factors("plus.cotangent_mean - at.cotangent_mean", "at.cotangent_mean - plus.cotangent_mean"),
    _factors("(at.rows != 0) & (plus.rows != 0)", "(at.rows != 0)"),
    _factors("finite = is_usable(raw.s) & is_usable(raw.y)", "finite = is_usable(raw.y)"),
    _factors("finite = is_usable(raw.s) & is_usable(raw.y)", "finite = is_usable(raw.s)"),
    _factors(
        "reached & finite & ~drowned",
        "reached & finite",
        _NOISE,
        "tests/test_factors.py",
    ),
    _factors(
        "_is_noise(at) & _is_noise(plus)",
        "_is_noise(at)",
        "tests/test_factors.py",
        _NOISE,
    ),
    _factors("return size < measured.cotangent_noise", "return size < 0", _NOISE),
    _factors(
        "jnp.where(usable, running_average(y, raw.y, options.pair_decay), y)",
        "running_average(y, raw.y, options.pair_decay)",
    ),
    _factors(
        "status = jnp.where(is_damping(damping), status, pairs.NOT_FINITE)",
        "",
        _DAMPING,
    ),
    _factors("by_powell & usable", "by_powell"),
    _factors(
        "pairs.pair_status(damped, at.cotangent_mean, options",
        "pairs.pair_status(damped, damped.y, options",
    ),
    _factors(
        "_, damping = dampings(options, root, positions)",
        "damping, _ = dampings(options, root, positions)",
        _KFQN,
    ),
    _factors("is_usable(seen) & (stage == RUNNING)", "(stage == RUNNING)"),
    _factors("is_usable(seen) & (stage == RUNNING)", "is_usable(seen)"),
    _factors(
        "(stage == RUNNING) & is_damping(damping)",
        "(stage == RUNNING)",
        _DAMPING,
    ),
    _factors("jnp.where(at != 0, status, pairs.NOT_MEASURED)", "status"),
    _factors(
        "pairs.pair_status(pair, a, options.curvature_tolerance)",
        "pairs.pair_status(pair, s, options.curvature_tolerance)",
    ),
    _factors(
        "new = 1 / (states[path].input_moment + damping[..., None])",
        "new = 1 / states[path].input_moment",
        _EMBEDDING,
    ),
    _factors("(status == pairs.UPDATED)[..., None]", "True", _EMBEDDING),
    _transform(
        "root = jnp.sqrt(jnp.asarray(value_at(options.damping, state.count)))",
        "root = jnp.asarray(value_at(options.damping, state.count))",
    ),
    _transform("(p + (-1 * lr) * u)", "(p + lr * u)"),
    _transform(
        "directions = precondition(present, begun, gradients",
        "directions = precondition(present, held, gradients",
    ),
    _transform(
        "probed = _ask(curvature_fn, probe, moments=[])",
        "probed = _ask(curvature_fn, params, moments=[])",
    ),
    _transform(
        "(state.count % every == 0) | jnp.any(jnp.stack(warm))",
        "(state.count % every == 0)",
        "tests/test_update_every.py",
    ),
    _transform(
        "(state.count % every == 0)", "(state.count % every == 1)", "tests/test_update_every.py"
    ),
    _transform(
        "return updates, ScaleByKBFGSState(count, learned)",
        "return updates, ScaleByKBFGSState(state.count, learned)",
    ),
    _transform(
        "vectors = factors.input_steps(unstored, begun,",
        "vectors = factors.input_steps(unstored, held,",
        _KFQN,
    ),
    _transform(
        "again = curvature_fn(params, moments=[], vectors=vectors)",
        "again = curvature_fn(probe, moments=[], vectors=vectors)",
        _KFQN,
    ),
    _direction("inverse.apply_to_rows(H_g, inverse.apply(H_a, M))", "inverse.apply(H_a, M)"),
    _direction(
        "inverse.apply_to_rows(H_g, inverse.apply(H_a, M))", "inverse.apply_to_rows(H_g, M)"
    ),
    _direction("learning_rate**2 * promised", "learning_rate * promised"),
    _direction("squared > limit", "squared < limit"),
    _direction("jnp.sqrt(limit / jnp.where", "(limit / jnp.where"),
    _direction("scale = jnp.where(jnp.isfinite(squared), scale, 0)", "", _LIMITED),
    _direction("jnp.vdot(M[layer], P[layer])", "jnp.vdot(P[layer], P[layer])"),
)
