"""What a step costs, as multiples of a plain forward and backward pass; see benchmarks/README.md.

    python -m benchmarks.price --sizes mnist curves faces

Core packages only (jax, flax, optax and this library; matplotlib for the figure).
"""
