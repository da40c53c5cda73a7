import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_fabric import Fabric

from lib.data.phantom import make_phantom, plan_phantoms
from lib.data.store import save_volume
from lib.foundation import sam_training
from lib.foundation.mask_generator import MaskGenerator
from lib.foundation.sam import build_sam
from lib.foundation.sam_training import (
    PromptedSlices,
    augmented,
    best_overlap,
    build_optimizers,
    collate,
    dice_loss,
    evenly_spaced,
    found_lungs,
    mean_overlap,
    predict_masks,
    prompt_loss,
    read_slices,
    steps_loader,
)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """A stored phantom with its lung mask."""
    folder = tmp_path_factory.mktemp("scans")
    (record,) = plan_phantoms(scans_per_class={"train": 1}, seed=0, slices=(6, 6))[:1]
    phantom = make_phantom(record, size=96)
    files = folder / "scan.b2nd", folder / "lungs.b2nd"
    save_volume(files[0], phantom.scan.voxels)
    save_volume(files[1], phantom.lungs)
    return [files]


@pytest.fixture(scope="module")
def slices(scans):
    return read_slices(scans, side=256, slices_per_scan=4)


def batch_of(slices, *, prompts=3, augment=False):
    torch.manual_seed(0)
    items = PromptedSlices(slices, prompts=prompts, augment=augment)
    return collate([items[index, index] for index in range(len(items))])


def test_slices_are_read_at_the_networks_size(slices):
    assert len(slices) == 4
    for one in slices:
        assert one.grey.shape == (256, 256) and one.grey.dtype == np.uint8
        assert one.regions.shape == (len(one.is_lung), 256, 256)
    assert sum(one.is_lung.sum() for one in slices) >= 4
    middle = slices[2]
    assert not (middle.regions[middle.is_lung].sum(0) > 1).any()  # lungs never overlap


@pytest.mark.parametrize("augment", [False, True])
def test_prompts_lie_in_what_they_mean(slices, augment):
    batch = batch_of(slices, prompts=16, augment=augment)
    for targets, points, boxes in zip(batch.targets, batch.points, batch.boxes, strict=True):
        columns, rows = points.long().T
        assert targets[torch.arange(16), rows, columns].all()
        assert (boxes >= 0).all() and (boxes <= 255).all()
    if not augment:  # lungs have a share of their own
        is_lung = [torch.from_numpy(one.regions[one.is_lung].any(0)) for one in slices]
        within = [
            (targets & ~lungs).sum((1, 2)) == 0
            for targets, lungs in zip(batch.targets, is_lung, strict=True)
            if lungs.any()
        ]
        assert 0.45 < torch.cat(within).float().mean() < 0.97


def test_a_slice_that_moved_out_of_sight_is_prompted_as_a_whole(slices, monkeypatch):
    nothing = lambda grey, regions: (grey, torch.zeros_like(regions))  # noqa: E731
    monkeypatch.setattr(sam_training, "augmented", nothing)
    batch = batch_of(slices[:1], augment=True)
    assert batch.targets.all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_augmentation_moves_slice_and_regions_together(seed):
    torch.manual_seed(seed)
    grey = torch.zeros(64, 64)
    grey[20:40, 15:45] = 200.0
    moved, regions = augmented(grey, (grey > 100)[None])
    inside, outside = moved[regions[0]], moved[~regions[0]]
    assert inside.median() > outside.median() + 80
    assert 0.5 < regions.sum() / (20 * 30) < 2.0


def test_masks_are_those_of_the_librarys_own_forward(slices):
    sam = build_sam("small")
    batch = batch_of(slices[:2])
    batch = batch._replace(by_box=torch.tensor([[True] * 3, [False] * 3]))
    picture = batch.pictures[:, None].expand(-1, 3, -1, -1)
    labels = torch.ones(3, 1)
    asked = [
        {"image": picture[0], "original_size": (256, 256), "boxes": batch.boxes[0]},
        {"image": picture[1], "original_size": (256, 256),
         "point_coords": batch.points[1][:, None], "point_labels": labels},
    ]  # fmt: skip
    logits, quality = predict_masks(sam, batch)
    for index, (multimask, kept) in enumerate([(False, slice(0, 1)), (True, slice(1, 4))]):
        theirs = sam([asked[index]], multimask_output=multimask)[0]
        torch.testing.assert_close(logits[index, :, kept], theirs["low_res_logits"])
        torch.testing.assert_close(quality[index, :, kept], theirs["iou_predictions"])


def test_a_perfect_mask_costs_nothing_and_fits_one():
    target = torch.zeros(1, 1, 16, 16)
    target[..., 4:9, 3:12] = 1
    logits = torch.where(target > 0, 20.0, -20.0)
    assert float(dice_loss(logits, target)) == pytest.approx(0, abs=1e-4)
    regions = torch.stack([target[0, 0] > 0, target[0, 0] == 0])
    assert torch.equal(best_overlap(logits, regions), torch.ones(1, 1))
    half = logits.clone()
    half[..., 7:, :] = -20.0
    assert float(best_overlap(half, regions)) == pytest.approx(3 / 5)


def test_it_learns_a_slice(slices):
    torch.manual_seed(0)
    sam = build_sam("small").train()
    optimizer = torch.optim.AdamW(sam.parameters(), lr=1e-3)
    batch = batch_of(slices[1:3], prompts=4)
    losses = []
    for _ in range(12):
        loss = prompt_loss(sam, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_the_validation_score_is_a_mean_overlap(slices):
    sam = build_sam("small")
    loader = steps_loader(PromptedSlices(slices, prompts=2), batch_size=2, steps=2)
    with torch.no_grad():
        assert 0 <= mean_overlap(sam, loader, fabric=Fabric(accelerator="cpu")) <= 1
    with pytest.raises(ValueError, match="validation part is empty"):
        mean_overlap(sam, [], fabric=Fabric(accelerator="cpu"))


def test_found_lungs_has_a_row_per_lung(lively_sam, scans):
    generator = MaskGenerator(lively_sam, mode="fast", points_per_side=4, pred_iou_thresh=0.3)
    found = found_lungs(generator, scans, slices_per_scan=3)
    assert list(found) == ["best_mask", "by_box"] and len(found) >= 2
    assert found.stack().between(0, 1).all()


def test_evenly_spaced_keeps_both_ends():
    assert evenly_spaced(range(10), 4) == [0, 3, 6, 9]
    assert evenly_spaced([5, 6], 4) == [5, 6]


def test_every_weight_has_one_optimizer_and_muon_the_matrices_of_the_transformers():
    sam = build_sam("small")
    adam, muon = build_optimizers(sam, learning_rate=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    by_adam, by_muon = (
        [values for group in optimizer.param_groups for values in group["params"]]
        for optimizer in (adam, muon)
    )
    assert {id(v) for v in by_adam + by_muon} == {id(v) for v in sam.parameters()}
    assert len(by_adam) + len(by_muon) == len(list(sam.parameters()))
    names = {id(values): name for name, values in sam.named_parameters()}
    chosen = {names[id(values)] for values in by_muon}
    assert "image_encoder.blocks.0.attn.qkv.weight" in chosen
    assert "mask_decoder.transformer.layers.1.mlp.lin2.weight" in chosen
    assert all("blocks" in name or "transformer" in name for name in chosen)
    assert all(values.ndim == 2 for values in by_muon)


def test_a_step_of_muon_is_as_long_as_one_of_adam_is_in_a_random_direction():
    sam = build_sam("small").requires_grad_(True)
    _, muon = build_optimizers(sam, learning_rate=1e-3, betas=(0.9, 0.98), weight_decay=0.0)
    weight = sam.image_encoder.blocks[0].mlp.lin1.weight
    before = weight.detach().clone()
    torch.manual_seed(0)
    weight.grad = torch.randn_like(weight)
    muon.step()
    length = (weight.detach() - before).square().mean().sqrt().item()
    assert length == pytest.approx(
        0.2e-3, rel=0.3
    )  # root mean square of AdamW's steps is about 0.2
