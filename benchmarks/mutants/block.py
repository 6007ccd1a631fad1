"""Mistakes in block K-BFGS: its updates, the length of its steps, its sketches."""

from benchmarks.mutants.mutant import in_file

_IN_TURN = "tests/test_block.py::test_pairs_in_coordinates_are_pairs_in_turn"
_NO_USE = "tests/test_block.py::test_pairs_that_are_of_no_use"
_FITS = "tests/test_block.py::test_an_update_that_would_overflow_is_left_out_as_a_whole"
_LOST = "tests/test_block.py::test_a_factor_that_is_lost_starts_anew"
_BOUNDS = "tests/test_block.py::test_trust"
_NOWHERE = "tests/test_block.py::test_a_direction_that_leads_nowhere"
_RISE = "tests/test_block.py::test_a_step_is_taken_if_the_loss_rises_by_a_tenth_at_most"
_LOSS = "tests/test_block.py::test_a_loss_or_a_slope_that_is_not_finite"
_PARABOLA = "tests/test_block.py::test_kappa_finds_the_curvature_of_a_parabola"
_FIRST = "tests/test_block.py::test_the_first_radius_is_a_share_of_the_first_loss"
_NUMPY = "tests/test_block.py::test_against_numpy[1.0]"
_SHARE = "tests/test_block.py::test_the_learning_rate_is_a_share_of_the_way_to_the_minimum"
_INPUTS = "tests/test_block.py::test_inputs_that_are_not_finite"
_REACHED = "tests/test_block.py::test_layers_that_are_not_reached"
_DIGITS = "tests/test_block.py::test_a_step_of_last_digits_teaches_the_output_side_nothing"
_LAST = "tests/test_generations.py::test_bfgs_of_the_last_steps"
_LEFT_OUT = "tests/test_generations.py::test_pairs_that_are_of_no_use"
_AS_A_WHOLE = "tests/test_generations.py::test_a_step_that_would_overflow_is_left_out_as_a_whole"
_COUNTED = "tests/test_block.py::test_a_factor_that_is_lost_is_counted"
_SIGNS = "tests/test_block.py::test_signs"
_STACK = "tests/test_sketch.py::test_sketches_from_single_examples[of_stack]"

_solve = in_file("block_bfgs", _IN_TURN, _NO_USE, _FITS, _LAST)
_matrix = in_file("block_matrix", _IN_TURN, _NO_USE, _FITS, _LOST)
_generations = in_file("generations", _LAST, _LEFT_OUT, _AS_A_WHOLE)
_trust = in_file("trust", _NOWHERE, _RISE, _LOSS, _BOUNDS, _PARABOLA)
_state = in_file("block_state", _NUMPY)
_sketch = in_file("sketch", _SIGNS, _STACK)

BLOCK = (
    _solve("by_powell = sy <= powell * yHy", "by_powell = sy <= yHy"),
    _solve("t * e + (1 - t) * w, e)", "(1 - t) * e + t * w, e)"),
    _solve("sy = jnp.where(by_powell, powell * yHy, sy)", ""),
    _solve("dtype=dtype) + pairs.matvec(C, of_pair)", "dtype=dtype)"),
    _solve("yHy <= 0, small, ~fits]", "yHy < 0, small, ~fits]"),
    _solve("sy <= numbers.tiny / numbers.eps, sy", "sy <= 0, sy"),
    _solve("sy >= numbers.max * numbers.eps", "sy >= numbers.max"),
    _solve("ok & by_powell)", "by_powell)"),
    _solve("column = -rho * pairs", "column = rho * pairs"),
    _solve("column + rho * at_i, 0)", "column + at_i, 0)"),
    _solve("~fits & (status == pairs.UPDATED)", "fits & False", _FITS),
    _solve("damped & fits, reset", "damped, reset", _FITS),
    _matrix("jnp.isfinite(s) & jnp.isfinite(y), axis", "jnp.isfinite(s), axis"),
    _matrix("jnp.isfinite(s) & jnp.isfinite(y), axis", "jnp.isfinite(y), axis"),
    _matrix("(yHy < 0) | ~jnp.isfinite(yHy)", "(yHy < 0)"),
    _matrix("(yHy < 0) | ~jnp.isfinite(yHy)", "~jnp.isfinite(yHy)"),
    _matrix("& jnp.isfinite(jnp.sum(y * y))", ""),
    _matrix("jnp.where(anew, start * y, Hy)", "Hy"),
    _matrix("s, other = jnp.where(fits, s, 0), jnp.where(fits, other, 0)", ""),
    _matrix("anew = reset | fresh", "anew = reset", _NUMPY),
    _generations("jnp.asarray([0, m // 2])", "jnp.asarray([0, 0])"),
    _generations("(H.next - 1) % m >= m // 2", "H.next % m >= m // 2"),
    _generations("(H.next - 1) % m >= m // 2", "(H.next - 1) % m < m // 2"),
    _generations("sy=jnp.where(due[:, None], 0, H.sy)", "sy=H.sy"),
    _generations("jnp.where(due[:, None, None], 0, H.R_inverse)", "H.R_inverse"),
    _generations("columns = -jax", "columns = jax"),
    _generations("jnp.isfinite(s) & jnp.isfinite(y), axis", "jnp.isfinite(s), axis"),
    _generations("jnp.where(goes_on, x, held)", "x"),
    _generations("fits = jnp.all(", "fits = jnp.any("),
    _generations("next=(H.next + q) % m", "next=H.next + q"),
    _trust("(trust.steps == 0) & (first > 0)", "(first > 0)", _FIRST),
    _trust("(trust.steps == 0) & (first > 0)", "(trust.steps == 0)", _FIRST),
    _trust("& jnp.isfinite(first)", "", _FIRST),
    _trust("usable = (slope > 0) & (curvature > 0)", "usable = (curvature > 0)"),
    _trust(
        "usable = (slope > 0) & (curvature > 0)",
        "usable = (slope > 0)",
        reason="a curvature of 0 or below makes a squared length of 0 or below: too small",
    ),
    _trust("& jnp.isfinite(slope) & jnp.isfinite(curvature)", ""),
    _trust("(trust.kappa * curvature), LONGEST)", "curvature, LONGEST)"),
    _trust("length * jnp.minimum(scale, 1)", "length", _SHARE),
    _trust("length * jnp.minimum(scale, 1)", "length * scale", _SHARE),
    _trust("length = length * within", "length = length"),
    _trust("usable &= squared > _smallest(squared)", ""),
    _trust("finite = jnp.isfinite(after) & jnp.isfinite(slope)", "finite = jnp.isfinite(after)"),
    _trust("finite & (change <=", "(change <="),
    _trust("LARGEST_RISE * jnp.abs(before) + rounding", "rounding"),
    _trust("trust.kappa / LARGEST_CHANGE, trust.kappa *", "1e-30, trust.kappa *"),
    _trust("jnp.minimum(MEMORY, trust.steps / (trust.steps + 1.0))", "jnp.array(MEMORY)", _NUMPY),
    _trust("(predicted < 0) & (jnp.abs(change) > rounding)", "(predicted < 0)"),
    _trust("(ratio > 0.6)", "(ratio > 0.06)", _NUMPY),
    _trust("(step.squared > 0.8 * trust.radius)", "True", _NUMPY),
    _trust("(ratio < 0.25)", "(ratio < 0.75)", _NUMPY),
    _trust("jnp.minimum(trust.radius, step.squared) / 4", "trust.radius / 4"),
    _trust("radius = jnp.maximum(radius, least)", ""),
    _trust("least = jnp.maximum(rounding, _smallest(radius))", "least = 0.0"),
    _trust("moved & finite, kappa", "moved, kappa"),
    _trust("(moved & ~accepted)", "(~accepted)"),
    _trust("return accepted & moved", "return accepted"),
    _state("told = size > rounding", "told = size > 0", _DIGITS),
    _state("jnp.isfinite(size + rounding + _lengths(S))", "True", _INPUTS),
    _state("[(at.rows == 0) | (plus.rows == 0)", "[(at.rows != 0) | (plus.rows == 0)"),
    _state("[seen.rows == 0, ~usable]", "[~usable, ~usable]", _INPUTS, _REACHED),
    _state("n / (n + 1)", "1"),
    _state("usable & (state.stage == 0), _start", "usable & False, _start"),
    _state("taken.reset[..., None] *", "0 *", _COUNTED),
    _sketch("drawn / np.sqrt(examples)", "drawn / examples"),
    _sketch("totals = jnp.sum(rows", "totals = jnp.mean(rows"),
    _sketch(
        "rows.reshape(examples, -1, *rows.shape[1:]), axis=1",
        "rows.reshape(-1, examples, *rows.shape[1:]), axis=0",
    ),
)
