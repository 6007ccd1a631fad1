"""The TFDS builder of CURVES; `curves` draws the images."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from kfqn_optax.experiment.datasets import curves


class KfqnCurves(tfds.core.GeneratorBasedBuilder):
    """TFDS builder ``kfqn_curves``: 20,000 train and 10,000 test images, uint8 [28, 28, 1]."""

    name = "kfqn_curves"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}  # noqa: RUF012  # as TFDS declares it
    code_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=(
                "Synthetic 28 x 28 images of a smooth curve through three random points, generated "
                "by kfqn_optax after the description of the CURVES data in Hinton and "
                "Salakhutdinov, 'Reducing the Dimensionality of Data with Neural Networks', "
                "Science 313, 2006. These are not the images used in that paper."
            ),
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(
                        shape=(curves.SIDE, curves.SIDE, 1),
                        dtype=np.uint8,
                        encoding=tfds.features.Encoding.BYTES,
                    )
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager
        return {
            "train": self._generate_examples(curves.TRAIN_EXAMPLES, seed=0),
            "test": self._generate_examples(curves.TEST_EXAMPLES, seed=1),
        }

    def _generate_examples(self, examples: int, seed: int) -> Iterator[tuple[int, dict[str, Any]]]:
        for key, image in enumerate(curves.generate(examples, seed)):
            yield key, {"image": image[..., None]}
