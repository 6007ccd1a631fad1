"""Matrix views against explicit indexing."""

import numpy as np
import pytest

from kfqn_optax.matrix import MatrixView


def test_dense_is_itself():
    view = MatrixView(((3,), (4,)), (), (0,), (1,))
    array = np.arange(12.0).reshape(3, 4)
    assert view.shape == view.matrix_shape == (3, 4)
    np.testing.assert_array_equal(view.to_matrix(array), array)


def test_bias_is_one_row():
    view = MatrixView(((4,),), (), (), (0,))
    assert view.matrix_shape == (1, 4)


def test_transposed():
    view = MatrixView(((3,), (4,)), (), (1,), (0,))
    array = np.arange(12.0).reshape(3, 4)
    np.testing.assert_array_equal(view.to_matrix(array), array.T)


@pytest.fixture
def grouped():
    """A convolution's kernel [2, 3, channels 5, features 2 groups x 4]."""
    return MatrixView(((2,), (3,), (5,), (2, 4)), (3,), (0, 1, 2), (4,))


def test_groups_are_blocks(grouped):
    array = np.random.default_rng(0).normal(size=grouped.shape)
    matrix = np.asarray(grouped.to_matrix(array))
    assert matrix.shape == grouped.matrix_shape == (2, 30, 4)
    assert matrix[1, (1 * 3 + 2) * 5 + 3, 2] == array[1, 2, 3, 1 * 4 + 2]
    np.testing.assert_array_equal(grouped.from_matrix(matrix), array)


@pytest.mark.parametrize("axis", range(5))
def test_stacked_axis_becomes_the_first_block(grouped, axis):
    view = grouped.stacked((axis,), (7,))
    array = np.random.default_rng(0).normal(size=view.shape)
    matrix = np.asarray(view.to_matrix(array))
    assert matrix.shape == (14, 30, 4)
    for layer in range(7):
        one = grouped.to_matrix(np.take(array, layer, axis))
        np.testing.assert_array_equal(matrix.reshape(7, 2, 30, 4)[layer], one)
    np.testing.assert_array_equal(view.from_matrix(matrix), array)


def test_stacked_twice(grouped):
    view = grouped.stacked((0, 2), (7, 6))
    array = np.random.default_rng(0).normal(size=view.shape)
    matrix = np.asarray(view.to_matrix(array)).reshape(7, 6, 2, 30, 4)
    np.testing.assert_array_equal(matrix[3, 5], grouped.to_matrix(array[3][:, 5]))
