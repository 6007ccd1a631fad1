"""Mistakes in pairs and in the two kinds of factors."""

from benchmarks.mutants.mutant import in_file

_pairs = in_file("pairs", "tests/test_pairs.py")
_bfgs = in_file("bfgs", "tests/test_bfgs.py")
_lbfgs = in_file(
    "lbfgs", "tests/test_lbfgs.py", "--deselect=tests/test_lbfgs.py::test_float32_stays_accurate"
)

FACTORS = (
    _pairs("return Pair(s, As + damping * s)", "return Pair(s, As)"),
    _pairs("return Pair(s, As + damping * s)", "return Pair(s, As + damping)"),
    _pairs("(sy <= mu * yHy) & (yHy > 0)", "(sy <= yHy) & (yHy > 0)"),
    _pairs("(yHy > 0) & finite", "finite"),
    _pairs("t = (1 - mu) * yHy /", "t = mu * yHy /"),
    _pairs("t * s + (1 - t) * Hy", "(1 - t) * s + t * Hy"),
    _pairs("jnp.where(finite, s_damped, jnp.nan)", "s_damped"),
    _pairs("(sy <= mu * ss) & (ss > 0)", "(sy <= ss) & (ss > 0)"),
    _pairs("& (jnp.asarray(mu) <= 1)", ""),
    _pairs("jnp.sqrt(jnp.finfo(s.dtype).eps) * ss", "0 * ss"),
    _pairs("t = (1 - mu) * ss /", "t = mu * ss /"),
    _pairs("shift = mu - sy /", "shift = mu + sy /"),
    _pairs("t * y + (1 - t) * s, y + shift * s", "y + shift * s, y + shift * s"),
    _pairs("pair.y + mu * pair.s", "pair.y + pair.s"),
    _pairs("pair, by_powell = damp_powell(", "_, by_powell = damp_powell("),
    _pairs("tolerance * ss * jnp.sqrt(", "tolerance * jnp.sqrt("),
    _pairs("* jnp.sqrt(dot(reference, reference))", ""),
    _pairs("[~finite, sy <= 0,", "[~finite, sy < 0,"),
    _pairs("(jnp.abs(sy) < numbers.max * numbers.eps)", "(jnp.abs(sy) < numbers.max)"),
    _pairs("& jnp.isfinite(bound)", ""),
    _pairs("(sy < numbers.tiny / numbers.eps)", "(sy < 0)"),
    _bfgs("(rho * yHy + 1) * rho / 2 * s", "(rho * yHy) * rho / 2 * s"),
    _bfgs("rho / 2 * s - rho * Hy", "rho / 2 * s + rho * Hy"),
    _bfgs("(yHy < 0) | (100 * precision * yHy > sy)", "(yHy < 0)"),
    _bfgs("(yHy < 0) | (100 * precision * yHy > sy)", "(100 * precision * yHy > sy)"),
    _bfgs("100 * precision * yHy > sy", "precision * yHy > sy"),
    _bfgs("jnp.where(reset, sy / pairs.dot(y, y), 0)", "jnp.where(reset, 1.0, 0)"),
    _bfgs("jnp.where(reset, scale * y, Hy), ", "Hy, "),
    _bfgs("jnp.isfinite(largest) & (~reset", "(~reset"),
    _bfgs("(~reset | ((scale > 0) & jnp.isfinite(scale)))", "True"),
    _bfgs("jnp.where(accept, w, -0.0)", "jnp.where(accept, w, 0.0)"),
    _bfgs("status = jnp.where(accept & ~usable, pairs.NOT_FINITE, status)", ""),
    _bfgs(
        "jnp.where(accept & reset, pairs.RESET, status)", "jnp.where(reset, pairs.RESET, status)"
    ),
    _bfgs("jnp.where(scale > 0, scale * jnp.eye(len(s), dtype=H.dtype), H)", "H"),
    _bfgs("H = (H + H.T) / 2", ""),
    _bfgs("jnp.where(jnp.isfinite(jnp.sum(H)), H, jnp.diag(1 / jnp.diag(damped)))", "H"),
    _bfgs("A + damping * jnp.eye", "A + jnp.eye"),
    _lbfgs("column = -rho *", "column = rho *"),
    _lbfgs("R_inverse = H.R_inverse[1:, 1:]", "R_inverse = H.R_inverse[:-1, :-1]"),
    _lbfgs("jnp.minimum(H.count + 1, len(H.s))", "H.count + 1"),
    _lbfgs("~is_finite(stored), _is_lost", "False, _is_lost"),
    _lbfgs("[~is_finite(stored), _is_lost(stored)]", "[~is_finite(stored), False]"),
    _lbfgs("-jnp.abs(H.y), H.sy", "jnp.abs(H.y), H.sy"),
    _lbfgs("jnp.where(emptied, jnp.zeros_like(old), old)", "old"),
    _lbfgs("emptied = offered &", "emptied ="),
    _lbfgs("100 * jnp.finfo(H.s.dtype).eps", "10 * jnp.finfo(H.s.dtype).eps"),
    _lbfgs("> jnp.maximum(asked, 1)", "> 1"),
    _lbfgs("> jnp.maximum(asked, 1)", "> asked"),
    _lbfgs("pairs.matmul(columns.T, H.y)", "pairs.matmul(columns, H.y)"),
    _lbfgs("+ jnp.sum(through_s**2, axis=0)", ""),
    _lbfgs("beta = H.sy[:, None] * alpha - pairs", "beta = alpha - pairs"),
    _lbfgs("_scaled(H, vectors - pairs.matmul(H.y.T, alpha))", "_scaled(H, vectors)"),
    _lbfgs("pairs.matmul(beta, H.R_inverse), H.s", "pairs.matmul(beta, H.R_inverse.T), H.s"),
)
