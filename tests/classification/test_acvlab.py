from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from lightning_fabric import Fabric
from timm import create_model
from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr
from torch import nn

from lib.classification import acvlab
from lib.classification.acvlab import (
    CARD,
    VARIANTS,
    ACVLab,
    SequenceNetwork,
    SliceNetwork,
    Standardise,
    augment,
    build,
    chosen_slices,
    embedding_view,
    log_probabilities,
    picture_loss,
    predict,
    shown,
    slice_logits,
    slice_loss,
    slice_view,
    train,
)
from lib.classification.inputs import ScanItem
from lib.classification.task import Task
from lib.classification.volumes import VolumeBatch
from lib.data.store import save_volume

WIDTH = 16
TINY_SWIN = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_ratio": 1}
NUMBERS = {"draws": 3, "slices_per_scan": 4, "sequence_slices": 5, "seed": 0}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def tiny_acvlab():
    """The system on a CNN of one layer, with a picture of 16 x 16."""
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    slices = SliceNetwork(
        backbone=backbone,
        feature_width=8,
        embedding_width=WIDTH,
        mean=torch.full((3,), 0.5),
        deviation=torch.full((3,), 0.5),
    )
    swin = SwinTransformerV2Cr(img_size=(WIDTH, WIDTH), in_chans=1, num_classes=2, **TINY_SWIN)
    sequence = SequenceNetwork(embedding_width=WIDTH, width=4, hidden_width=4)
    return ACVLab(
        slices=slices,
        sequence=nn.Sequential(Standardise(WIDTH), sequence),
        picture=nn.Sequential(Standardise(WIDTH), nn.Unflatten(1, (1, WIDTH)), swin),
        picture_slices=WIDTH,
    )


@pytest.fixture(scope="module")
def paper():
    with torch.device("meta"):
        return build(**VARIANTS["paper"])


def count(module):
    return sum(weights.numel() for weights in module.parameters())


def random_slices(*shape, size=24):
    return torch.randint(0, 256, (*shape, size, size), dtype=torch.uint8)


# ----------------------------------------------------------------------------------- the networks


def test_parameters_of_the_paper(paper):
    model = paper
    with torch.device("meta"):
        b3 = torchvision.models.efficientnet_b3()
        swin = create_model("swinv2_cr_base_224", in_chans=1, num_classes=2)
    assert count(model.sequence) == 1_564_929
    assert count(model.slices.backbone) == count(b3.features)
    assert count(model.slices) - count(b3.features) == 1536 * 224 + 224 + 224 + 1
    assert {n: w.shape for n, w in model.picture[2].named_parameters()} == {
        n: w.shape for n, w in swin.named_parameters()
    }
    assert count(model) == CARD.parameters


def test_the_papers_networks_take_their_inputs(paper):
    with torch.device("meta"):
        assert paper.slices(torch.empty(2, 4, 256, 256)).shape == (2, 4)
        assert paper.sequence(torch.empty(3, 120, 224)).shape == (3,)
        assert paper.picture(torch.empty(2, 224, 224)).shape == (2, 2)


def test_rescaling_is_twice_the_normalised_picture_less_one():
    variant = {**VARIANTS["small"], "backbone_weights": None}
    plain, rescaled = (build(**{**variant, "rescaled": on}).slices for on in (False, True))
    grey = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(
        (grey - rescaled.mean) / rescaled.deviation, 2 * (grey - plain.mean) / plain.deviation - 1
    )


def test_the_small_variant_trains_neither_early_stages_nor_batch_norm():
    network = build(**VARIANTS["small"]).slices
    trained = {name for name, weights in network.named_parameters() if weights.requires_grad}
    assert not any("bn" in name or "conv_stem" in name or "blocks.2" in name for name in trained)
    assert {"backbone.blocks.3.0.conv_pw.weight", "embedding.weight", "output.bias"} <= trained
    state = {name: values.clone() for name, values in network.backbone.state_dict().items()}
    network.train()(random_slices(2, 3, size=32))
    for name, values in network.backbone.state_dict().items():
        assert torch.equal(values, state[name]), name
    with pytest.raises(ValueError, match="freeze_batch_norm"):
        build(**{**VARIANTS["small"], "freeze_batch_norm": False})


def test_the_lstm_reads_its_last_states_of_both_directions():
    network = SequenceNetwork(embedding_width=6, width=5, hidden_width=4).eval()
    sequences = torch.randn(3, 7, 6)
    outputs, _ = network.recurrent(sequences)
    states = torch.cat([outputs[:, -1, :5], outputs[:, 0, 5:]], 1)
    torch.testing.assert_close(network(sequences), network.head(states).squeeze(1))


def test_standardised_embeddings_have_mean_0_and_deviation_1():
    layer, embeddings = Standardise(3), torch.randn(50, 3) * torch.tensor([1.0, 9.0, 0.1]) + 4
    torch.testing.assert_close(layer(embeddings), embeddings)
    layer.measure(embeddings)
    out = layer(embeddings)
    torch.testing.assert_close(out.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(out.std(0, correction=0), torch.ones(3), atol=1e-4, rtol=0)
    layer.measure(torch.full((4, 3), 2.0))  # a feature that never changes
    assert torch.isfinite(layer(embeddings)).all()


def test_scans_in_pieces_have_the_same_embeddings(monkeypatch):
    model, slices = tiny_acvlab().eval(), random_slices(7)
    whole = model.embed(slices)
    monkeypatch.setattr(acvlab, "SLICES_PER_CHUNK", 3)
    torch.testing.assert_close(model.embed(slices), whole)


def test_drawn_embeddings_are_the_embeddings_of_drawn_slices():
    """One draw of all slices is the plain mean of their probabilities, the published judgement."""
    model, slices = tiny_acvlab().eval(), random_slices(4)
    found = model(slices, **{**NUMBERS, "draws": 1})
    torch.testing.assert_close(found["slices"], model.slices(slices[None]).sigmoid().mean())


@pytest.mark.parametrize("length", [1, 2, 9])
def test_every_member_gives_a_probability(length):
    found = tiny_acvlab().eval()(random_slices(length), **NUMBERS)
    assert list(found) == ["slices", "sequence", "picture"]
    assert all(0 < chance < 1 for chance in found.values())


# ------------------------------------------------------------------------------- scores and losses


def test_scores_have_the_given_probability():
    chance = torch.tensor([0.0, 0.2, 1.0])
    scores = log_probabilities(chance)
    assert torch.isfinite(scores).all()
    torch.testing.assert_close(scores.softmax(1)[:, 1], chance, atol=1e-5, rtol=0)


class Levels(nn.Module):
    """The mean grey value of each slice as its logit."""

    def forward(self, volumes):
        return volumes.float().mean((2, 3))


def test_a_scan_is_judged_by_its_mean_probability_and_trained_slice_by_slice():
    volumes = torch.tensor([[2, 0], [1, 3]], dtype=torch.uint8)[:, :, None, None]
    batch = VolumeBatch(volumes, torch.tensor([1, 0]), ["a", "b"])
    chances = torch.tensor([[2.0, 0.0], [1.0, 3.0]]).sigmoid()
    torch.testing.assert_close(slice_logits(Levels(), batch).softmax(1)[:, 1], chances.mean(1))
    expected = -torch.stack([chances[0].log(), (1 - chances[1]).log()]).mean()
    torch.testing.assert_close(slice_loss(Levels(), batch), expected)


def test_smoothed_labels_of_the_picture_loss():
    scores = torch.tensor([[0.3, -1.0], [2.0, 0.5]])
    batch = VolumeBatch(scores, torch.tensor([1, 0]), ["a", "b"])
    labels = torch.tensor([[0.05, 0.95], [0.95, 0.05]])
    expected = nn.functional.binary_cross_entropy_with_logits(scores, labels)
    torch.testing.assert_close(picture_loss(nn.Identity(), batch, smoothing=0.1), expected)


# ------------------------------------------------------------------------------------------- views


def disc(number=1, size=48):
    rows, columns = np.mgrid[:size, :size] - size / 2
    grey = np.where(rows**2 + (columns - 8) ** 2 < 36, 200, 60).astype(np.uint8)
    return np.repeat(grey[None], number, 0)


def test_augmentation_moves_and_lights_half_of_the_slices_within_bounds():
    slices = disc(400)
    changed = augment(slices, np.random.default_rng(0)).numpy()
    assert (changed.shape, changed.dtype) == (slices.shape, np.uint8)
    background = np.median(changed, (1, 2))
    assert 0.4 < (background == 60).mean() < 0.6
    assert background.min() >= 60 * 0.8 - 51 - 1
    assert background.max() <= 60 * 1.2 + 51 + 1
    unlit = changed[background == 60] > 130
    columns = (unlit * np.arange(48)).sum((1, 2)) / unlit.sum((1, 2))
    assert 0.35 < (columns < 24).mean() < 0.65  # mirrored
    sizes = unlit.sum((1, 2))
    assert 0.8**2 * 0.85 < sizes.min() / 111 < 0.85
    assert 1.15 < sizes.max() / 111 < 1.2**2 * 1.15


def test_augmentation_without_strength_only_mirrors():
    slices = disc(20)
    changed = augment(slices, np.random.default_rng(0), strength=0.0).numpy()
    kinds = {(part == slices[0]).all() + 2 * (part == slices[0][:, ::-1]).all() for part in changed}
    assert kinds == {1, 2}


def test_slices_without_generator_are_always_the_same_and_unchanged():
    slices = random_slices(9).numpy()
    numbers = {"number": 4, "seed": 1, "strength": 1.0}
    plain = slice_view(slices, None, **numbers)
    assert torch.equal(plain, slice_view(slices, None, **numbers))
    rows = [next(i for i, s in enumerate(slices) if (s == p.numpy()).all()) for p in plain]
    assert rows == sorted(set(rows))
    random = [slice_view(slices, np.random.default_rng(seed), **numbers) for seed in (5, 5, 6)]
    assert torch.equal(random[0], random[1])
    assert not torch.equal(random[0], random[2])


@pytest.mark.parametrize("fresh", [True, False])
def test_embeddings_are_drawn_anew_only_where_asked(fresh):
    embeddings = np.arange(40, dtype=np.float32)[:, None]
    views = [
        embedding_view(embeddings, np.random.default_rng(seed), number=8, seed=0, fresh=fresh)
        for seed in (1, 2)
    ]
    assert views[0].shape == (8, 1)
    assert (views[0].diff(dim=0) > 0).all()
    assert torch.equal(*views) != fresh
    plain = embedding_view(embeddings, None, number=8, seed=0, fresh=fresh)
    assert torch.equal(plain, views[0]) != fresh


# -------------------------------------------------------------------------------------- whole runs


def thorax(slices, *, lesion, size=64):
    """HU: a body with two lungs, on most slices with a patch in each lung where asked."""
    voxels = np.full((slices, size, size), -1000, np.int16)
    voxels[:, 8:56, 4:60] = 40
    voxels[:, 14:50, 8:28] = voxels[:, 14:50, 34:56] = -850
    if lesion:
        voxels[:, 30:44, 10:18] = voxels[:, 30:44, 46:54] = -350
    noise = np.random.default_rng(slices).normal(0, 20, voxels.shape)
    return (voxels + noise).astype(np.int16)


def stored(folder, name, voxels, target, *, mask="lungs"):
    """A scan in the store, with the sidecars that preparing leaves."""
    paths = [folder / f"{name}.b2nd", folder / f"{name}-lungs.b2nd"]
    inside = np.zeros(voxels.shape, np.uint8)
    if mask == "lungs":
        inside[:, 14:50, 8:28], inside[:, 14:50, 34:56] = 1, 2
    for path, values in zip(paths, (voxels, inside), strict=True):
        save_volume(path, values)
        path.with_suffix(".json").write_text("{}")
    return ScanItem(name, paths[0], paths[1] if mask else None, target)


@pytest.mark.parametrize("mask", ["lungs", None])
def test_the_chosen_slices_are_cropped_to_the_body_and_masked(tmp_path, mask):
    voxels = thorax(9, lesion=False)
    voxels[:3, 14:50] = 40  # no lung at the head end
    slices = chosen_slices(stored(tmp_path, "a", voxels, 0, mask=mask), size=32, share=0.5)
    assert slices.shape == (5, 32, 32)
    inside = slices[:, 8:24, 6:12]
    assert (np.abs(inside.astype(int) - 85) < 25).all()  # lung, on every chosen slice
    border = slices[:, [0, -1]]
    assert (border == 0).all() if mask else (border > 200).all()


def test_scan_and_mask_of_different_shape_are_refused(tmp_path):
    scan = stored(tmp_path, "a", thorax(3, lesion=False), 0)
    save_volume(scan.mask, np.ones((3, 64, 63), np.uint8))
    with pytest.raises(ValueError, match="scan and lung mask differ in shape"):
        chosen_slices(scan, size=32, share=0.5)


def settings(**changes):
    """A section of params.yaml for tiny scans."""
    step = {"batch_scans": 4, "rounds": 4, "patience": None, "chosen_by": "loss"}
    step |= {"epochs": 4, "weight_decay": 1e-4, "schedule": None}
    return {
        "image_size": 32,
        "window_share": 0.5,
        "slices_per_scan": 3,
        "draws": 2,
        "sequence_slices": 4,
        "draw_seed": 0,
        "fresh_draws": True,
        "slices": step | {"learning_rate": 1e-2, "head_learning_rate": 1e-2, "augmentation": 0.1},
        "sequence": step | {"learning_rate": 1e-2},
        "picture": step | {"learning_rate": 0.05, "momentum": 0.9, "label_smoothing": 0.1},
        "loader_processes": 0,
        "cache_slices": True,
        **changes,
    }


def trained_tiny(task):
    """Train the tiny system instead of one of the two variants."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(acvlab, "build", lambda **_: tiny_acvlab())
        return train(task)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Scans with and without lesions, the task and the system trained on them."""
    tmp_path = tmp_path_factory.mktemp("run")
    scans = [
        stored(tmp_path, f"scan-{i}", thorax(4 + i, lesion=i % 2 == 1), i % 2) for i in range(14)
    ]
    task = Task(
        scans=scans,
        splits=["train"] * 8 + ["validation"] * 4 + ["test"] * 2,
        variant={},
        settings=settings(),
        fabric=Fabric(accelerator="cpu", devices=1),
        folder=tmp_path / "model",
        seed=0,
    )
    return scans, task, trained_tiny(task)


def test_the_system_learns_lesions_and_judges_every_scan_alone(run, tmp_path):
    scans, task, trained = run
    assert list(trained.histories) == ["EfficientNet", "LSTM", "Swin V2"]
    assert all(len(rows) == 4 for rows in trained.histories.values())
    for name in ("slices", "sequence", "picture"):
        assert (task.folder / name / "best.safetensors").is_file()
    scans = [
        *scans[12:],
        stored(tmp_path, "one slice", thorax(1, lesion=True), 1),
        stored(tmp_path, "black", np.full((3, 64, 64), -1000, np.int16), 0),
        stored(tmp_path, "no lung", thorax(5, lesion=True), 0, mask="empty"),
    ]
    given = {"settings": task.settings, "fabric": task.fabric}
    together = predict(trained.model, scans, **given)
    assert together.shape == (5, 2)
    assert np.isfinite(together).all()
    np.testing.assert_allclose(together.sum(1), 1, rtol=1e-5)
    assert together[:3].argmax(1).tolist() == [0, 1, 1]
    alone = np.concatenate([predict(trained.model, [scan], **given) for scan in scans[::-1]])
    np.testing.assert_array_equal(alone[::-1], together)
    np.testing.assert_array_equal(shown(scans[0], task.settings).shape, (8, 32, 32))


def test_the_same_seed_gives_the_same_weights(run, tmp_path):
    _, task, trained = run
    again = trained_tiny(replace(task, folder=tmp_path / "again"))
    assert trained.histories == again.histories
    for name, values in trained.model.state_dict().items():
        assert torch.equal(values, again.model.state_dict()[name]), name
