import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from lib.classification import contrastive_mixup
from lib.classification.contrastive_mixup import (
    CROPPED_AREA,
    ContrastiveNetwork,
    bounding_box,
    joint_loss,
    load_volume,
    mix,
    one_slice_per_segment,
    predict,
    random_crop,
    random_view,
    resample_depth,
    shown,
    supervised_contrastive_loss,
    view_logits,
    views,
)
from lib.classification.inputs import ScanItem
from lib.classification.volumes import VolumeBatch
from lib.data.store import save_volume


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def tiny_network(classes=2):
    return ContrastiveNetwork(
        encoder=nn.Sequential(nn.Flatten(), nn.LazyLinear(6), nn.Tanh()),
        feature_width=6,
        projection_width=4,
        classes=classes,
    )


def batch_of(targets, views=2):
    targets = torch.tensor(targets)
    names = [str(number) for number in range(len(targets))]
    return VolumeBatch(torch.randn(len(targets), views, 2, 6, 6), targets, names)


# --------------------------------------------------------------------------- the contrastive loss


def contrastive_loss_by_loops(embeddings, targets, temperature):
    """Khosla et al. 2020, equation 2, summand by summand."""
    points = [
        (row.tolist(), int(target))
        for scan, target in zip(embeddings, targets, strict=True)
        for row in scan
    ]
    losses = []
    for i, (anchor, target) in enumerate(points):
        others = [point for j, point in enumerate(points) if j != i]
        weights = [
            math.exp(sum(a * b for a, b in zip(anchor, other, strict=True)) / temperature)
            for other, _ in others
        ]
        shares = [
            math.log(weight / sum(weights))
            for weight, (_, theirs) in zip(weights, others, strict=True)
            if theirs == target
        ]
        losses.append(-sum(shares) / len(shares))
    return sum(losses) / len(losses)


@pytest.mark.parametrize(
    ("targets", "views", "temperature"),
    [([0, 1, 1], 2, 0.1), ([0, 0], 2, 0.5), ([0, 1], 3, 1.0), ([1], 2, 0.1)],
)
def test_contrastive_loss_equals_its_formula(targets, views, temperature):
    embeddings = functional.normalize(torch.randn(len(targets), views, 5), dim=-1)
    targets = torch.tensor(targets)
    found = supervised_contrastive_loss(embeddings, targets, temperature=temperature)
    expected = contrastive_loss_by_loops(embeddings, targets, temperature)
    assert found.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_contrastive_loss_falls_when_classes_part():
    targets = torch.tensor([0, 0, 1, 1])
    together = torch.tensor([1.0, 0.0]).expand(4, 2, 2)
    apart = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])[:, None].expand(
        4, 2, 2
    )
    loss_together = supervised_contrastive_loss(together, targets)
    assert loss_together.item() == pytest.approx(math.log(7))  # all alike: one of seven others
    assert supervised_contrastive_loss(apart, targets).item() == pytest.approx(
        math.log(3), abs=1e-4
    )


def test_contrastive_loss_has_finite_gradients():
    embeddings = torch.ones(3, 2, 4, requires_grad=True)
    supervised_contrastive_loss(embeddings, torch.tensor([0, 1, 1])).backward()
    assert torch.isfinite(embeddings.grad).all()


def test_one_view_is_refused():
    with pytest.raises(ValueError, match="two views of each scan, got 1"):
        supervised_contrastive_loss(torch.ones(3, 1, 4), torch.tensor([0, 1, 1]))


# ------------------------------------------------------------------------------------------ mixing


def test_mixup_is_the_same_mixture_of_all_views():
    volumes, targets = torch.randn(3, 2, 4, 5, 5), torch.tensor([0, 1, 1])
    mixed = mix(volumes, targets, mixers={"mixup": 0.5})
    expected = mixed.share * volumes + (1 - mixed.share) * volumes[[2, 0, 1]]
    torch.testing.assert_close(mixed.volumes, expected)
    assert mixed.partners.tolist() == [1, 0, 1] and mixed.targets.tolist() == [0, 1, 1]
    assert type(mixed.volumes) is torch.Tensor


@pytest.mark.parametrize("seed", range(5))
def test_cutmix_exchanges_a_rectangle_of_all_slices(seed):
    torch.manual_seed(seed)
    volumes = torch.arange(3.0).view(3, 1, 1, 1, 1).expand(3, 2, 4, 12, 10).clone()
    mixed = mix(volumes, torch.tensor([0, 1, 1]), mixers={"cutmix": 1.0})
    kept = mixed.volumes == volumes
    assert kept.float().mean().item() == pytest.approx(mixed.share)
    assert (mixed.volumes[~kept] == volumes[[2, 0, 1]][~kept]).all()
    assert (kept == kept[:1, :1, :1]).all()  # the same pixels in every scan, view and slice
    rows, columns = (~kept[0, 0, 0]).any(1).sum(), (~kept[0, 0, 0]).any(0).sum()
    assert (~kept[0, 0, 0]).sum() == rows * columns


def test_shares_follow_the_beta_distribution():
    """Beta(0.5, 0.5) has mean 1/2 and variance 1/8."""
    volumes, targets = torch.zeros(2, 2, 1, 1, 1), torch.tensor([0, 1])
    shares = [mix(volumes, targets, mixers={"mixup": 0.5}).share for _ in range(1500)]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.03)
    assert np.var(shares) == pytest.approx(0.125, abs=0.01)


def test_every_mixer_is_drawn():
    volumes = torch.arange(2.0).view(2, 1, 1, 1, 1).expand(2, 1, 1, 8, 8)
    kinds = {
        bool(
            mix(volumes, torch.tensor([0, 1]), mixers={"mixup": 1.0, "cutmix": 1.0})
            .volumes.frac()
            .any()
        )
        for _ in range(30)
    }
    assert kinds == {True, False}


def test_an_unknown_mixer_is_refused():
    with pytest.raises(ValueError, match=r"a mixer is one of .*'cutmix'.*, got 'fmix'"):
        mix(torch.zeros(2, 2, 1, 4, 4), torch.tensor([0, 1]), mixers={"fmix": 1.0})


def test_a_loss_of_a_mixture_is_linear_in_its_targets():
    scores = torch.randn(4, 2)
    mixed = contrastive_mixup.Mixed(
        torch.empty(0), torch.tensor([0, 1, 1, 0]), torch.tensor([1, 1, 0, 0]), 0.3
    )
    found = mixed.loss(lambda targets: functional.cross_entropy(scores, targets))
    soft = 0.3 * functional.one_hot(mixed.targets, 2) + 0.7 * functional.one_hot(mixed.partners, 2)
    torch.testing.assert_close(found, functional.cross_entropy(scores, soft))


# ------------------------------------------------------------------------------ network and losses


def test_scores_and_embeddings_of_views():
    scores, embeddings = tiny_network(classes=3)(torch.randn(4, 2, 2, 6, 6))
    assert scores.shape == (4, 2, 3) and embeddings.shape == (4, 2, 4)
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(4, 2))


def test_joint_loss_weighs_both_losses_as_learned(monkeypatch):
    model, batch = tiny_network(), batch_of([0, 1, 1])
    unmixed = contrastive_mixup.Mixed(batch.volumes, batch.targets, batch.targets, 1.0)
    monkeypatch.setattr(contrastive_mixup, "mix", lambda *_, **__: unmixed)
    scores, embeddings = model(batch.volumes)
    contrast = supervised_contrastive_loss(embeddings, batch.targets, temperature=0.2)
    entropy = sum(functional.cross_entropy(scores[:, view], batch.targets) for view in (0, 1)) / 2
    model.log_weights.data = torch.tensor([0.5, -1.0])
    expected = math.exp(-0.5) * contrast + 0.5 + math.exp(1.0) * entropy - 1.0
    loss = joint_loss(model, batch, mixers={}, temperature=0.2)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    slope = torch.stack([1 - math.exp(-0.5) * contrast, 1 - math.exp(1.0) * entropy])
    torch.testing.assert_close(model.log_weights.grad, slope.detach())


def test_judging_averages_the_probabilities_of_the_views():
    model, batch = tiny_network(), batch_of([0, 1, 1], views=3)
    expected = model(batch.volumes)[0].softmax(-1).mean(1)
    torch.testing.assert_close(view_logits(model, batch).softmax(-1), expected)


# ---------------------------------------------------------------------------- volumes of fixed size


@pytest.mark.parametrize(
    ("values", "depth", "expected"),
    [
        ([10, 20, 30, 50], 2, [15, 40]),
        ([10, 30], 3, [10, 20, 30]),
        ([7], 4, [7, 7, 7, 7]),
        ([1, 2, 3], 3, [1, 2, 3]),
        ([0, 90, 0], 1, [30]),
    ],
)
def test_resample_depth(values, depth, expected):
    slices = np.array(values, np.uint8)[:, None, None].repeat(2, 1).repeat(3, 2)
    found = resample_depth(slices, depth)
    assert found.shape == (depth, 2, 3) and found.dtype == np.uint8
    assert (found == np.array(expected)[:, None, None]).all()


@given(length=st.integers(1, 40), depth=st.integers(1, 40), seed=st.integers(0, 99))
def test_resampled_slices_stay_within_the_range_and_constant_ones_constant(length, depth, seed):
    slices = np.random.default_rng(seed).integers(0, 256, (length, 2, 2)).astype(np.uint8)
    found = resample_depth(slices, depth)
    assert len(found) == depth
    assert slices.min() <= found.min() and found.max() <= slices.max()
    constant = np.repeat(slices[:1], length, 0)
    assert (resample_depth(constant, depth) == slices[0]).all()


def test_volumes_are_masked_and_cut_to_the_box_of_the_lungs(tmp_path):
    voxels = np.full((6, 12, 12), 200, np.uint8)
    mask = np.zeros(voxels.shape, np.uint8)
    mask[1:4, 2:10, 3:7] = 1  # the box: rows 2 to 9, columns 3 to 10
    mask[1:4, 2:6, 7:11] = 2
    save_volume(tmp_path / "scan.b2nd", voxels)
    save_volume(tmp_path / "mask.b2nd", mask)
    scan = ScanItem("a", tmp_path / "scan.b2nd", tmp_path / "mask.b2nd", 0)
    volume = load_volume(scan, depth=6, size=8)
    expected = np.full((6, 8, 8), 200, np.uint8)
    expected[:, 4:, 4:] = 0
    np.testing.assert_array_equal(volume, expected)
    settings = {"depth": 2, "slices_per_segment": 3, "image_size": 4}
    assert shown(scan, settings).shape == (2, 4, 4)


def test_without_lungs_nothing_is_cut(tmp_path):
    voxels = np.random.default_rng(0).integers(0, 256, (3, 6, 6), dtype=np.uint8)
    save_volume(tmp_path / "scan.b2nd", voxels)
    save_volume(tmp_path / "mask.b2nd", np.zeros_like(voxels))
    unmasked = ScanItem("a", tmp_path / "scan.b2nd", None, 0)
    np.testing.assert_array_equal(load_volume(unmasked, depth=3, size=6), voxels)
    empty = ScanItem("a", tmp_path / "scan.b2nd", tmp_path / "mask.b2nd", 0)
    assert not load_volume(empty, depth=3, size=6).any()


@given(seed=st.integers(0, 999))
def test_a_bounding_box_is_the_smallest_one(seed):
    generator = np.random.default_rng(seed)
    mask = generator.random((3, 5, 4)) < generator.random() / 4
    box = bounding_box(mask)
    if mask.any():
        places = np.argwhere(mask)
        assert [part.start for part in box] == places.min(0).tolist()
        assert [part.stop - 1 for part in box] == places.max(0).tolist()
    else:
        assert mask[box].shape == mask.shape


# ------------------------------------------------------------------------------------------- views


@given(height=st.integers(1, 64), width=st.integers(1, 64), seed=st.integers(0, 999))
def test_a_random_crop_lies_within_the_slice(height, width, seed):
    top, left, rows, columns = random_crop(height, width, np.random.default_rng(seed))
    assert 0 <= top <= top + rows <= height and rows >= 1
    assert 0 <= left <= left + columns <= width and columns >= 1


def test_random_crops_have_the_published_area_and_ratio():
    generator = np.random.default_rng(0)
    crops = np.array([random_crop(1000, 1000, generator) for _ in range(500)])
    area = crops[:, 2] * crops[:, 3] / 1e6
    uncut = (crops[:, 2:] < 1000).all(1)
    assert area[uncut].min() >= CROPPED_AREA[0] - 0.002 and area.max() <= CROPPED_AREA[1]
    ratio = crops[uncut, 3] / crops[uncut, 2]
    assert 0.74 < ratio.min() < ratio.max() < 1.34
    assert ratio.min() < 0.85 and ratio.max() > 1.18


def test_a_random_view_treats_all_slices_alike():
    slices = torch.rand(1, 16, 16) * 200
    view = random_view(slices.expand(4, -1, -1), np.random.default_rng(1))
    assert view.shape == (4, 16, 16)
    assert (view == view[:1]).all() and not torch.equal(view[:1], slices)
    assert view.min() >= 0 and view.max() <= 255


def test_slices_of_segments():
    volume = torch.arange(12.0).view(12, 1, 1)
    assert one_slice_per_segment(volume, 4, None).flatten().tolist() == [1, 4, 7, 10]
    assert torch.equal(one_slice_per_segment(volume, 12, np.random.default_rng(0)), volume)
    drawn = [
        one_slice_per_segment(volume, 4, np.random.default_rng(seed)).flatten().tolist()
        for seed in range(20)
    ]
    assert len({tuple(places) for places in drawn}) > 5
    assert all([int(place) // 3 for place in places] == [0, 1, 2, 3] for places in drawn)


def test_views_are_standardised_and_depend_on_the_seed_alone():
    volume = np.full((4, 6, 6), 200, np.uint8)
    plain = views(volume, None, depth=2, count=2)
    assert plain.shape == (1, 2, 6, 6)
    assert plain.unique().item() == pytest.approx((200 / 255 - 0.3529) / 0.2983, rel=1e-4)
    first, again, other = (
        views(volume, np.random.default_rng(seed), depth=2, count=2) for seed in (0, 0, 1)
    )
    assert first.shape == (2, 2, 6, 6)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


def test_scans_are_judged_alike_wherever_they_stand(tmp_path):
    from lightning_fabric import Fabric

    scans = []
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 256, (4, 8, 8), dtype=np.uint8)
        save_volume(tmp_path / f"{number}.b2nd", noise)
        scans.append(ScanItem(f"{number}", tmp_path / f"{number}.b2nd", None, 0))
    settings = {
        "depth": 2,
        "slices_per_segment": 1,
        "image_size": 6,
        "batch_scans": 2,
        "test_views": 3,
        "loader_processes": 0,
    }
    model, fabric = tiny_network(), Fabric(accelerator="cpu", devices=1)
    model(torch.zeros(1, 1, 2, 6, 6))  # the lazy layer takes its size
    forwards = predict(model, scans, settings=settings, fabric=fabric)
    backwards = predict(model, scans[::-1], settings=settings, fabric=fabric)
    np.testing.assert_allclose(forwards, backwards[::-1], rtol=1e-5)
    assert len(np.unique(forwards[:, 0])) == 3
