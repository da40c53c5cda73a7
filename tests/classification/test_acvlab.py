from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from lightning_fabric import Fabric
from timm import create_model
from torch import nn

from lib.classification import acvlab
from lib.classification.acvlab import (
    VARIANTS,
    build,
    log_probabilities,
    picture_loss,
    predict,
    shown,
    slice_logits,
    slice_loss,
    train,
)
from lib.classification.task import Task
from lib.classification.volumes import VolumeBatch
from tests.classification.made_acvlab import stored, thorax, tiny_acvlab


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def paper():
    with torch.device("meta"):
        return build(**VARIANTS["paper"])


def count(module):
    return sum(weights.numel() for weights in module.parameters())


def random_slices(*shape, size=24):
    return torch.randint(0, 256, (*shape, size, size), dtype=torch.uint8)


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


# -------------------------------------------------------------------------------------- whole runs


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
