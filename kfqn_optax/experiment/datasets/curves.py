"""CURVES: images of a smooth curve through three random points, drawn here.

Hinton and Salakhutdinov (Science 313, 2006, and its supporting text) made 28 x 28 images of
curves, each from three randomly chosen points in two dimensions, so six numbers describe an
image; 20,000 are for training and 10,000 for testing. Their files are not distributed with this
package. What follows is our own synthetic generation after that description, so losses on it are
comparable with each other and only roughly with published ones.

An image is the parabola through the three points, drawn with a pen of Gaussian profile. The
pen's width and the room left at the border are chosen such that 18 principal components leave as
much of an image unexplained as in theirs: a squared error of 5.87 per test image here, 5.90 in
their figure 2A. The mean intensity is 0.066. Intensities between 0 and 1 put a floor under the
cross-entropy, that of a perfect reconstruction: 50 nats per image on average.

This file needs NumPy alone; `curves_builder` hands the images to TFDS.
"""

import numpy as np

SIDE = 28  # pixels
TRAIN_EXAMPLES = 20_000
TEST_EXAMPLES = 10_000

_BORDER = 4.5  # pixels between the outermost pixel centres and the area of the three points
_PEN = 1.1  # pixels, the standard deviation of the pen's profile
_SAMPLES = 96  # points along a curve; at most about a pixel apart
_CHUNK = 1000  # images drawn at a time; bounds the memory, 96 x 28 x 2 floats an image


def parabolas(points: np.ndarray) -> np.ndarray:
    """The curve through three points each, sampled.

    The curve is the quadratic polynomial of a parameter t in [0, 1] that meets the points at t =
    0, m and 1, with m the share of the first chord in the length of both chords: the middle
    point is passed when the pen would expect it, which keeps the parabola from swinging far out
    of the points' triangle.

    Args:
        points: [examples, 3, 2], in pixels. The middle point must differ from both ends.

    Returns:
        [examples, 96, 2], in pixels.
    """
    first, second = np.linalg.norm(np.diff(points, axis=1), axis=-1).T
    m = (first / (first + second))[:, None]
    t = np.linspace(0.0, 1.0, _SAMPLES)
    # Lagrange's basis at 0, m, 1.
    basis = np.stack(
        [(t - m) * (t - 1) / m, t * (t - 1) / (m * (m - 1)), t * (t - m) / (1 - m)], axis=-1
    )
    return basis @ points


def stroke(curves: np.ndarray) -> np.ndarray:
    """Images of sampled curves, drawn with a soft pen.

    Every sample leaves a Gaussian spot, weighted by the length of curve that it stands for, such
    that a long straight stroke has intensity 1 on its middle line; where strokes overlap the ink
    saturates at 1. A spot is the product of a function of the row and one of the column, so that
    an image is one matrix product.

    Args:
        curves: [examples, samples, 2], row and column in pixels.

    Returns:
        float32 [examples, 28, 28] in [0, 1].
    """
    lengths = np.linalg.norm(np.diff(curves, axis=1), axis=-1)
    ink = np.zeros(curves.shape[:2])  # [examples, samples], intensity times pixel length
    ink[:, 1:] += lengths / 2
    ink[:, :-1] += lengths / 2
    ink /= np.sqrt(2 * np.pi) * _PEN
    pixels = np.arange(SIDE, dtype=np.float32)
    distance = (curves.astype(np.float32)[..., None] - pixels) / np.float32(_PEN)
    spots = np.exp(-(distance**2) / 2)  # [examples, samples, 2, 28]
    rows = spots[:, :, 0] * ink[..., None].astype(np.float32)
    return np.minimum(rows.transpose(0, 2, 1) @ spots[:, :, 1], 1)


def generate(examples: int, seed: int) -> np.ndarray:
    """Draws images; the same arguments give the same images.

    Args:
        examples: how many.
        seed: of the random points. The first images of a longer run are those of a shorter one.

    Returns:
        uint8 [examples, 28, 28].
    """
    rng = np.random.default_rng(seed)
    points = rng.uniform(_BORDER, SIDE - 1 - _BORDER, (examples, 3, 2))
    images = np.empty((examples, SIDE, SIDE), np.uint8)
    for start in range(0, examples, _CHUNK):
        chunk = slice(start, start + _CHUNK)
        images[chunk] = np.rint(255 * stroke(parabolas(points[chunk])))
    return images
