"""FLOPs and bytes of the stages of a step, by formula, for networks of dense layers.

The floor of each stage: what has to be multiplied (products with matrices only) and what has to be
read from memory or written to it once for each time that it depends on what came before. With
layers d_in x d_out (bias row included), m examples, and p pairs on a side of limited memory:

    gradient     6 m d_in d_out, without the first layer's gradient of its input
    direction    2 d_in d_out (w_in + w_out), w = d for a matrix, 4 p for p pairs
    statistics   2 m d_in^2; where A is not stored, 4 m d_in for its product with a vector;
                 on fewer examples than the gradient, one more pass over them
    probe        the gradient's without that of the kernels: 2/3 of it
    factors      matrices times vectors and changes of rank 2: bytes alone matter

Symmetry of A would halve the statistics, but a product of matrices does not know of it.
"""

import itertools

from benchmarks.price.candidates import Candidate

STAGES = ("gradient", "direction", "statistics", "probe", "factors")
FLOAT = 4  # bytes


def by_formula(
    widths: tuple[int, ...], batch: int, candidate: Candidate
) -> dict[str, dict[str, float]]:
    """FLOPs and bytes by stage of one step of K-BFGS or its kin.

    Args:
        widths: of the network, from its input to its output.
        batch: examples of the gradient.
        candidate: which factors are matrices, and on what share of the batch curvature is measured.
    """
    measured = batch * (candidate.examples or 0)
    flops, floats = dict.fromkeys(STAGES, 0.0), dict.fromkeys(STAGES, 0.0)
    for number, (d_in, d_out) in enumerate(itertools.pairwise(widths)):
        d_in += 1
        size, passed = d_in * d_out, d_in + d_out
        # forward and backward to the input, in units of 2 m d_in d_out
        passes = 2 if number else 1
        flops["gradient"] += 2 * batch * size * (passes + 1)
        # forward reads and writes, backward reads and writes; kernels are read twice, written once
        floats["gradient"] += 3 * size + 4 * batch * passed
        in_ = _side(d_in, candidate.input_memory)
        out = _side(d_out, candidate.output_memory)
        flops["direction"] += 2 * size * (in_["width"] + out["width"])
        # gradient read, momentum and parameters read and written, the product between kept
        floats["direction"] += 7 * size + in_["floats"] + out["floats"]
        if not measured:
            continue
        extra_pass = 2 * measured * size * passes if measured < batch else 0
        moment = 2 * measured * d_in * (d_in if candidate.moment else 2)
        flops["statistics"] += moment + extra_pass
        floats["statistics"] += measured * passed + (d_in**2 if candidate.moment else 0)
        flops["probe"] += 2 * measured * size * passes
        floats["probe"] += 2 * size + 4 * measured * passed
        # A: new moment read, A read and written; H: two products, then read and written
        floats["factors"] += (3 * d_in**2 if candidate.moment else 0) + in_["learn"] + out["learn"]
        flops["factors"] += 2 * (in_["learn"] + out["learn"])
    return {
        stage: {"flops": flops[stage], "bytes": FLOAT * floats[stage]}
        for stage in STAGES
        if flops[stage]
    }


def _side(d: int, memory: int | None) -> dict[str, float]:
    """Of one factor: FLOPs / 2 for each entry it multiplies, floats it has, floats it moves."""
    if memory is None:
        return {"width": d, "floats": d**2, "learn": 4 * d**2}
    return {"width": 4 * memory, "floats": 2 * memory * d, "learn": 8 * memory * d}


def overhead(widths: tuple[int, ...], batch: int, candidate: Candidate) -> dict[str, float]:
    """FLOPs of a plain step, and what a candidate's step has on top of them."""
    stages = by_formula(widths, batch, candidate)
    flops = {stage: counted["flops"] for stage, counted in stages.items()}
    plain = flops.pop("gradient")
    return {"plain_flops": plain, "overhead_flops": sum(flops.values())}
