"""CURVES: the geometry and the ink of a curve, and the whole set against the paper's numbers."""

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets", reason="needs the extra 'experiment'")


from kfqn_optax.experiment.datasets import curves


def test_parabolas_meet_their_points():
    points = np.random.default_rng(0).uniform(5, 22, (50, 3, 2))
    sampled = curves.parabolas(points)
    assert sampled.shape == (50, 96, 2)
    np.testing.assert_allclose(sampled[:, 0], points[:, 0])
    np.testing.assert_allclose(sampled[:, -1], points[:, 2])
    nearest = np.linalg.norm(sampled - points[:, 1:2], axis=-1).min(axis=1)
    assert nearest.max() < 0.7  # half of the largest distance between samples


def test_stroke_has_intensity_one_on_a_straight_line_and_none_away_from_it():
    line = np.stack([np.full(96, 14.0), np.linspace(4, 23, 96)], axis=-1)
    image = curves.stroke(line[None])[0]
    assert image.dtype == np.float32
    np.testing.assert_allclose(image[14, 8:20], 1, atol=1e-3)
    np.testing.assert_allclose(image[15, 8:20], np.exp(-0.5 / 1.1**2), atol=1e-3)
    assert image[:8].max() < 1e-4


def test_curves_repeat_and_differ():
    images = curves.generate(50, seed=3)
    assert images.shape == (50, 28, 28)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, curves.generate(50, seed=3))
    np.testing.assert_array_equal(images[:20], curves.generate(20, seed=3))
    assert len(np.unique(images.reshape(50, -1), axis=0)) == 50
    assert (images != curves.generate(50, seed=4)).any(axis=(1, 2)).all()
    assert (images.max(axis=(1, 2)) > 200).all()
