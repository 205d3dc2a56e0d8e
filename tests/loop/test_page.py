"""The pictures of the report page: every label is inside, whatever the figures and names are."""

import re
from functools import partial

import pytest

from ebft.output.page import _errors, _figure, _losses, _section, _sparsity, _whole_losses

NAMES = {"short": "fc.weight", "long": "block_sparse_moe.shared_expert.gate_and_up_projection.weight"}


def blocks(count, smallest, name):
    """Of which the errors span the decades from ``smallest`` to 1."""
    return [
        {
            "block": index,
            "relative_error_before": smallest ** (index / max(1, count - 1)),
            "relative_error_after": 0.9 * smallest ** (index / max(1, count - 1)),
            "losses": [smallest, 1234.5, 0.5],
            "matrices": {name: 0.5, "mlp.up_proj.weight": 0.25},
        }
        for index in range(count)
    ]


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("smallest", [0.5, 1e-6])
@pytest.mark.parametrize("count", [1, 126])
@pytest.mark.parametrize("draw", [_errors, _losses, _sparsity])
def test_no_label_is_cut_off(draw, count, smallest, name):
    figure = _figure(partial(draw, blocks=blocks(count, smallest, name)))
    _is_inside(figure)


def test_no_label_of_the_whole_model_s_losses_is_cut_off():
    _is_inside(_figure(partial(_whole_losses, losses=[12345.6, 2.0] * 1000)))


def _is_inside(figure):
    around = figure.get_tightbbox()
    assert (around.x0 >= 0, around.y0 >= 0) == (True, True)
    assert (around.x1 <= figure.get_figwidth(), around.y1 <= figure.get_figheight()) == (True, True)


def test_labels_are_text_and_whole_numbers():
    svg = _section("Errors", "", partial(_errors, blocks=blocks(3, 0.3, "fc.weight"))).svg
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert {"block", "relative error", "pruned", "recovered", "0", "1", "2"} <= set(labels)
    assert not {"0.5", "1.5"} & set(labels[:5])  # on the axis of blocks
    assert {"0.3", "0.6"} <= set(labels)  # not 3 x 10^-1
