"""Maps of a matrix of names against names."""

import math

import pytest
import torch
from matplotlib import pyplot

from tdhook import errors
from tdhook.plotting import matrix_map

ROWS, COLUMNS = [f"h.{i}.mlp" for i in range(3)], ["a", "$b"]
MATRIX = torch.tensor([[0.0, 1.0], [0.5, 0.25], [1.0, math.nan]])


def labels(ticks):
    return [tick.get_text() for tick in ticks]


def test_rows_go_up_and_columns_to_the_right(tmp_path):
    figure = matrix_map(MATRIX, ROWS, COLUMNS, title="$", label="CKA", row_label="model", column_label="other")
    figure.savefig(tmp_path / "map.png")
    axes, bar = figure.axes
    (image,) = axes.images
    assert image.get_array().filled(-1).tolist() == [[0.0, 1.0], [0.5, 0.25], [1.0, -1.0]] and image.origin == "lower"
    assert (axes.get_title(), axes.get_ylabel(), axes.get_xlabel()) == ("$", "model: h.*.mlp", "other")
    assert (labels(axes.get_yticklabels()), labels(axes.get_xticklabels())) == (["0", "1", "2"], ["a", "$b"])
    assert bar.get_ylabel() == "CKA"


def test_numbers_are_written_into_small_maps_only():
    assert labels(matrix_map(MATRIX, ROWS, COLUMNS).axes[0].texts) == ["0.00", "1.00", "0.50", "0.25", "1.00"]
    large = matrix_map(torch.rand(40, 40), range(40), range(40)).axes[0]
    assert large.texts == [] or len(large.texts) == 0
    assert len(large.get_xticklabels()) <= 32


def test_colors_start_at_zero_unless_values_have_both_signs():
    image = matrix_map(MATRIX, ROWS, COLUMNS).axes[0].images[0]
    assert image.get_clim() == (0, 1) and image.get_cmap().name == "viridis"
    image = matrix_map(MATRIX - 0.5, ROWS, COLUMNS).axes[0].images[0]
    assert image.get_clim() == (-0.5, 0.5) and image.get_cmap().name == "RdBu_r"
    assert matrix_map(MATRIX, ROWS, COLUMNS, limits=(0, 2)).axes[0].images[0].get_clim() == (0, 2)


def test_pyplot_and_the_matrix_are_left_alone():
    before, matrix = dict(pyplot.rcParams), torch.eye(2, requires_grad=True)
    matrix_map(matrix, "ab", "cd")
    assert pyplot.get_fignums() == [] and dict(pyplot.rcParams) == before and torch.equal(matrix, torch.eye(2))


@pytest.mark.parametrize(
    ("matrix", "options", "message"),
    [
        (MATRIX.T, {}, r"matrix has shape \[2, 3\], there are 3 rows and 2 columns; give \[S1, S2\]"),
        (MATRIX[None], {}, r"matrix has shape \[1, 3, 2\]"),
        (MATRIX * math.nan, {}, "holds no finite number"),
        (1 / MATRIX, {}, "holds infinity"),
        (MATRIX, {"limits": (1, 0)}, "ascending"),
        (MATRIX, {"percentile": 0}, "percentile"),
    ],
)
def test_wrong_arguments_raise(matrix, options, message):
    with pytest.raises(errors.InputError, match=message):
        matrix_map(matrix, ROWS, COLUMNS, **options)
