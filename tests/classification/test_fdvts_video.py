import numpy as np
import torch
from lightning_fabric import Fabric
from safetensors.torch import save_file
from torch import nn
from torchvision.models.video import swin3d_t

from lib.classification import fdvts_video
from lib.classification.fdvts_video import CARD, VARIANTS, VideoEncoder, build
from lib.classification.task import Task
from lib.data.store import open_volume

TINY = {
    "patch_size": [2, 8, 8],
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": [2, 2, 2],
}
SETTINGS = {
    "depth": 4,
    "slices_per_segment": 2,
    "image_size": 24,
    "batch_scans": 4,
    "rounds": 12,
    "learning_rate": 3.0e-3,
    "weight_decay": 0.0,
    "temperature": 0.1,
    "mixers": {"mixup": 0.1, "cutmix": 0.1},
    "test_views": 3,
    "epochs": 4,
    "patience": None,
    "chosen_by": "loss",
    "schedule": None,
    "loader_processes": 0,
    "cache_volumes": True,
}


def count(module):
    return sum(weights.numel() for weights in module.parameters())


def test_parameters_of_the_papers_network():
    """Video Swin-T as torchvision states it (28,158,070 with 400 classes), its head replaced."""
    with torch.device("meta"):
        model = build(**VARIANTS["paper"])
        original = swin3d_t()
    assert count(original) == 28_158_070
    assert count(model.encoder) == count(original) - count(original.head) == 27_850_470
    assert count(model) == 28_541_034
    ours, theirs = model.encoder.transformer.state_dict(), original.state_dict()
    assert {name: values.shape for name, values in ours.items()} == {
        name: values.shape for name, values in theirs.items() if not name.startswith("head.")
    }
    assert CARD.approximation


def test_parameters_of_the_small_network():
    assert count(build(**VARIANTS["small"])) == 745_670


def test_the_papers_stochastic_depth_is_torchvisions():
    with torch.device("meta"):
        ours, theirs = build(**VARIANTS["paper"]).encoder.transformer, swin3d_t()
    rates = [
        [layer.p for layer in network.modules() if type(layer).__name__ == "StochasticDepth"]
        for network in (ours, theirs)
    ]
    assert rates[0] == rates[1] and max(rates[0]) == 0.1


def test_slices_are_frames_and_grey_is_every_colour():
    volumes = torch.randn(2, 5, 8, 6)
    videos = VideoEncoder(nn.Identity())(volumes)
    assert videos.shape == (2, 3, 5, 8, 6)
    assert all(torch.equal(videos[:, colour], volumes) for colour in range(3))


def test_weights_of_ones_own_are_taken_over(tmp_path):
    torch.manual_seed(0)
    source = build(**TINY).encoder.transformer
    states = source.state_dict() | {"head.weight": torch.ones(400, 16)}
    save_file(states, tmp_path / "kinetics.safetensors")
    model = build(backbone_weights=tmp_path / "kinetics.safetensors", **TINY)
    found = model.encoder.transformer.state_dict()
    assert all(torch.equal(found[name], values) for name, values in source.state_dict().items())


def make_task(scans, folder, settings):
    return Task(
        scans=scans,
        splits=["train"] * 8 + ["validation"] * 2 + ["test"] * 2,
        variant=TINY,
        settings=settings,
        fabric=Fabric(accelerator="cpu", devices=1),
        folder=folder,
        seed=0,
    )


def test_a_tiny_network_learns_and_judges_scans_it_has_not_seen(made_scans, black_scan, tmp_path):
    task = make_task(made_scans(12, size=40), tmp_path / "model", SETTINGS)
    model, histories, _ = fdvts_video.train(task)
    (history,) = histories.values()
    assert history[-1]["validation_loss"] < history[0]["validation_loss"]
    assert (model.log_weights != 1).all()
    scans = [*task.part("test"), black_scan, task.train[0]]
    assert len(open_volume(task.train[0].volume)) == 1
    found = fdvts_video.predict(model, scans, settings=SETTINGS, fabric=task.fabric)
    assert found.shape == (4, 2) and np.isfinite(found).all()
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
    assert found[:2].argmax(1).tolist() == [0, 1]


def test_the_same_seed_gives_the_same_weights(made_scans, tmp_path):
    scans, settings = made_scans(12), SETTINGS | {"epochs": 1, "rounds": 1}
    first, second = (
        fdvts_video.train(make_task(scans, tmp_path / name, settings)).model.state_dict()
        for name in ("first", "second")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
