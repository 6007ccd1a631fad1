"""The images of the paper's three autoencoders, and Fashion-MNIST, as plain arrays.

Everything goes through TensorFlow Datasets (TFDS), without TensorFlow: raw files, or a
generator, are turned once into a prepared data set in the TFDS folder, and every later run reads
that.

    raw files or generator -> builder (curves, mnist, faces) -> prepared set -> `load` -> arrays

Importing this package imports neither TFDS nor TensorFlow; calling `load` imports TFDS.
"""

from kfqn_optax.experiment.datasets.load import Dataset, load

__all__ = ["Dataset", "load"]
