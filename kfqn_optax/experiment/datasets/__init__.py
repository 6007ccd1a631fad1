"""The images of the paper's three autoencoders, Fashion-MNIST, and a text, as plain arrays.

Images go through TensorFlow Datasets (TFDS), without TensorFlow: raw files, or a generator, are
turned once into a prepared data set in the TFDS folder, and every later run reads that. The text
comes with Python (see `text`).

    raw files or generator -> builder (curves, mnist, faces) -> prepared set -> `load` -> arrays
    pydoc_data -> text ------------------------------------------------------> `load` -> arrays

Importing this package imports neither TFDS nor TensorFlow; calling `load` imports TFDS.
"""

from kfqn_optax.experiment.datasets.load import Dataset, Labelled, load

__all__ = ["Dataset", "Labelled", "load"]
