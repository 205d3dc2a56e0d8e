"""PackedMask and the files that keep masks."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ebft_kernels import MaskedLinear, PackedMask, load_masks, mask_linears_, masks_of, save_masks


def test_made_from_and_read_as():
    dense = torch.rand(2, 3, 45) > 0.3
    mask = PackedMask.from_dense(dense)
    assert mask.words.shape == (2, 3, 2)
    assert torch.equal(mask.dense(), dense)
    assert (mask.numel(), mask.count()) == (270, int(dense.sum()))
    assert mask.density() == pytest.approx(dense.float().mean().item())
    assert mask == PackedMask(mask.words.clone(), mask.shape)
    assert mask != PackedMask.from_dense(~dense)
    assert mask != PackedMask.from_dense(dense[0])
    assert mask.to("cpu") is mask
    assert "(2, 3, 45)" in repr(mask)
    assert PackedMask.ones((4, 33)).count() == 132
    assert PackedMask.from_nonzero(torch.tensor([[0.0, -0.0, 1e-30, float("nan")]])).dense().tolist() == [[0, 0, 1, 1]]


def test_from_scores():
    scores = torch.randn(8, 64)
    assert PackedMask.from_topk(scores, 10).dense().sum(-1).tolist() == [10] * 8
    mask = PackedMask.from_scores(scores, 2, 4)
    assert mask.is_nm(2, 4)
    assert not mask.is_nm(1, 4)
    assert mask.density() == 0.5
    kept = scores.masked_fill(~mask.dense(), -torch.inf).reshape(8, 16, 4).sort(-1).values[..., 2:]
    assert torch.equal(kept, scores.reshape(8, 16, 4).sort(-1).values[..., 2:])


def test_zero_pruned_gives_exact_zeros_over_anything():
    weight = torch.tensor([[float("nan"), float("inf"), -1.0, 2.0]])
    PackedMask.from_dense(torch.tensor([[False, False, False, True]])).zero_pruned_(weight)
    assert weight.tolist() == [[0.0, 0.0, 0.0, 2.0]]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PackedMask.from_dense(torch.ones(3, 4)), r"got torch.float32 \(3, 4\); expected torch.bool"),
        (lambda: PackedMask(torch.zeros(3, 2, dtype=torch.int32), (3, 32)), r"expected torch.int32 \(3, 1\)"),
        (lambda: PackedMask(torch.zeros(3, 1), (3, 32)), r"got words torch.float32"),
        (lambda: PackedMask.from_topk(torch.randn(3, 4), 5), "got k = 5 for rows of 4"),
        (lambda: PackedMask.from_scores(torch.randn(3, 6), 2, 4), "got 2:4 for rows of 6"),
        (lambda: PackedMask.from_scores(torch.randn(3, 8), 5, 4), "got 5:4"),
        (lambda: PackedMask.from_scores(torch.ones(3, 8, dtype=torch.int32), 2, 4), "expected floats"),
        (lambda: PackedMask.ones((3, 8)).zero_pruned_(torch.randn(8, 3)), r"got a weight \(8, 3\); expected \(3, 8\)"),
    ],
)
def test_refuses_what_does_not_fit(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_masks_round_trip_through_a_file(tmp_path):
    model = nn.Sequential(nn.Linear(40, 6), nn.ReLU(), nn.Linear(6, 3))
    masks = {"0.weight": torch.rand(6, 40) > 0.5, "2.weight": torch.rand(3, 6) > 0.5}
    mask_linears_(model, masks)
    save_masks(model, tmp_path / "masks.safetensors")
    loaded = load_masks(tmp_path / "masks.safetensors")
    assert loaded == masks_of(model)
    assert loaded.keys() == masks.keys()
    assert load_file(tmp_path / "masks.safetensors")["0.weight"].dtype == torch.int32

    save_masks({"experts": torch.rand(4, 5, 33) > 0.5}, tmp_path / "three.safetensors")
    assert load_masks(tmp_path / "three.safetensors")["experts"].shape == (4, 5, 33)
    save_masks(MaskedLinear(5, 3), tmp_path / "one.safetensors")
    assert list(load_masks(tmp_path / "one.safetensors")) == ["weight"]


def test_plain_bool_tensors_are_read_and_others_refused(tmp_path):
    mask = torch.rand(3, 40) > 0.5
    save_file({"w": mask}, tmp_path / "bool.safetensors")
    assert torch.equal(load_masks(tmp_path / "bool.safetensors")["w"].dense(), mask)
    save_file({"w": mask.float()}, tmp_path / "float.safetensors")
    with pytest.raises(ValueError, match=r"w is torch.float32; expected bool"):
        load_masks(tmp_path / "float.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_masks(tmp_path / "text.safetensors")
    with pytest.raises(OSError, match="No such file"):
        load_masks(tmp_path / "none.safetensors")
