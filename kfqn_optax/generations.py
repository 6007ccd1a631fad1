"""A factor that forgets: an inverse kept as the pairs of its last steps, in two generations.

A limited memory that drops its oldest pair for each new one leaves the others on another matrix
than they were damped with. Here nothing is dropped. Each of two generations begins with ``c I``,
takes q pairs a step for some number of steps, the window, and then begins anew; they do so in
turns, half a window apart. The elder one is the factor: it knows the pairs of at least half a
window of steps and at most a whole one. What curvature was before that has no part in it, and
neither have rounding errors.

Both generations take the same pairs, and keep their own s, since damping depends on what the factor
is by then. The inverse is that of `lbfgs`, ``c V^T V + S R^-T D R^-1 S^T``.
"""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from kfqn_optax import lbfgs, pairs
from kfqn_optax.block_bfgs import Solved, Taken, taken
from kfqn_optax.lbfgs import Memory


class Generations(NamedTuple):
    """The pairs of two generations, m = window times q rows each.

    The q rows of a step lie at the same place for both generations, those of the next step behind
    them, and at the end of the window it begins at 0 again. Rows that a generation does not hold
    have zeros in ``sy`` and in rows and columns of ``R_inverse``, which keeps them out of every
    product.

    Attributes:
        s: changes of the point, damped, [2, m, d].
        y: changes of the gradient, [m, d].
        sy: the inner products s.y, [2, m].
        R_inverse: R^-1, upper triangular if the rows are taken in the order of time, [2, m, m].
        scale: c, [].
        next: where the next step's rows will lie, int32, [].
    """

    s: jax.Array
    y: jax.Array
    sy: jax.Array
    R_inverse: jax.Array
    scale: jax.Array
    next: jax.Array


class Offer(NamedTuple):
    """q pairs beside the generations that are to take them.

    Attributes:
        products: of the rows with the y, [2, 2q, q].
        usable: which pairs are finite, [2, q].
        rows: s_1, ..., s_q, Hy_1, ..., Hy_q, [2, 2q, d].
        y: [q, d].
        along: R^-1 S^T y, [2, m, q].
    """

    products: jax.Array
    usable: jax.Array
    rows: jax.Array
    y: jax.Array
    along: jax.Array


def init(d: int, pairs_of_step: int, window: int, dtype: jnp.dtype) -> Generations:
    """No pair yet: the identity on [d], with room for ``window`` steps of so many pairs."""
    m = pairs_of_step * window
    return Generations(
        s=jnp.zeros((2, m, d), dtype),
        y=jnp.zeros((m, d), dtype),
        sy=jnp.zeros((2, m), dtype),
        R_inverse=jnp.zeros((2, m, m), dtype),
        scale=jnp.ones((), dtype),
        next=jnp.zeros((), jnp.int32),
    )


def elder(H: Generations) -> Memory:
    """The generation that is the factor."""
    s, sy, R_inverse = (_elder(H, both) for both in (H.s, H.sy, H.R_inverse))
    return Memory(s, H.y, sy, R_inverse, jnp.sum(sy > 0, dtype=jnp.int32), H.scale)


def _elder(H: Generations, both: jax.Array) -> jax.Array:
    """What belongs to the elder generation, of an array with one of each."""
    m = len(H.y)
    return jnp.where((H.next - 1) % m >= m // 2, both[0], both[1])


def _both(H: Generations) -> Memory:
    """Both generations as memories; s, sy and R^-1 have one more axis in front."""
    return Memory(H.s, H.y, H.sy, H.R_inverse, H.next, H.scale)


_AXES = Memory(*cast(Any, (0, None, 0, 0, None, None)))  # of `_both`, for `jax.vmap`


def _begun(H: Generations) -> Generations:
    """With the generation emptied whose turn it is to begin anew."""
    m = len(H.y)
    due = H.next == jnp.asarray([0, m // 2])
    return H._replace(
        sy=jnp.where(due[:, None], 0, H.sy),
        R_inverse=jnp.where(due[:, None, None], 0, H.R_inverse),
    )


def offer(H: Generations, s: jax.Array, y: jax.Array) -> Offer:
    """The products that `block_bfgs.solve` reads, for both generations.

    Args:
        H: the factor, on [d].
        s: changes of the point, [q, d].
        y: changes of the gradient, [q, d], with whatever damping they have by themselves.
    """
    usable = jnp.all(jnp.isfinite(s) & jnp.isfinite(y), axis=-1)
    s, y = (jnp.where(usable[:, None], x, 0) for x in (s, y))

    def of_one(held: Memory) -> tuple[jax.Array, ...]:
        rows = jnp.concatenate([s, lbfgs.apply_to_rows(held, y)])
        along = pairs.matmul(held.R_inverse, pairs.matmul(held.s, y.T))
        return pairs.matmul(rows, y.T), rows, along

    products, rows, along = jax.vmap(of_one, (_AXES,))(_both(_begun(H)))
    return Offer(products, jnp.stack([usable, usable]), rows, y, along)


def take(H: Generations, offer: Offer, solved: Solved) -> tuple[Generations, Taken]:
    """The generations after the pairs, and what became of these in the elder one.

    They are as they were if no pair could be taken or one of the two would overflow.
    """
    begun, q, m = _begun(H), len(offer.y), len(H.y)

    def put(array: jax.Array, rows: jax.Array, axis: int) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(
            array, rows, H.next, axis, allow_negative_indices=False
        )

    s = jax.vmap(pairs.matmul)(solved.s, offer.rows)
    columns = -jax.vmap(pairs.matmul)(offer.along, solved.R_inverse)
    columns = jax.vmap(put, (0, 0, None))(columns, solved.R_inverse, 0)
    new = Generations(
        s=put(begun.s, s, 1),
        y=put(begun.y, offer.y, 0),
        sy=put(begun.sy, solved.sy, 1),
        R_inverse=put(begun.R_inverse, columns, 2),
        scale=H.scale,
        next=(H.next + q) % m,
    )
    fits = jnp.all(jax.vmap(lbfgs.is_finite, (_AXES,))(_both(new)))
    status, damped = (_elder(new, both) for both in (solved.status, solved.damped))
    told = taken(status, damped, fits, reset=jnp.zeros((), bool))
    goes_on = jnp.any(told.status == pairs.UPDATED)
    return jax.tree.map(lambda x, held: jnp.where(goes_on, x, held), new, H), told
