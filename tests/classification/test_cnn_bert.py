"""The classifier of 3-D CNN with BERT: network, training, embeddings of all sets."""

import hashlib
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
import yaml
from lightning_fabric import Fabric
from safetensors.torch import load_file, save_file

from lib.classification import cnn_bert
from lib.classification.cnn_bert import AVERAGE, BERT, RESNEXT3D, VARIANTS, build, embed_scan
from lib.classification.r2plus1d import r2plus1d_trunk
from lib.classification.task import Task
from lib.data.selection import Selection
from lib.data.store import StoredVolume
from lib.foundation.checkpoints import CheckpointError
from lib.reporting.cost import count_parameters

SLICES = 16
SMALL = VARIANTS["small"] | {
    "slices": SLICES,
    "trunk": {"widths": [4, 4, 8, 8], "blocks": [1, 1, 1, 1]},
    "head": {"heads": 2, "feed_forward": 16, "dropout": 0.0, "kept": 1.0},
    "dropout": 0.0,
    "resnext": {"widths": [8, 8, 16, 16], "blocks": [1, 1, 1, 1], "cardinality": 2},
}
SETTINGS = {
    "slices": SLICES,
    "resized_size": 20,
    "image_size": 16,
    "channels": "RML",
    "cropped": False,
    "multi_scale_crop": True,
    "affine": True,
    "affine_ranges": {
        "degrees": 5, "translation": 0.1, "scale": 0.1, "shear_degrees": 5,
        "brightness": 0.1, "contrast": 0.1,
    },
    "channel_statistics": None,
    "network": BERT,
    "trunk_weights": None,
    "batch_scans": 2,
    "batches_per_step": 2,
    "rounds": 1,
    "learning_rate": 1e-2,
    "weight_decay": 1e-3,
    "epochs": 2,
    "patience": None,
    "chosen_by": "accuracy",
    "plateau_by_loss": True,
    "schedule": {"kind": "plateau", "factor": 0.1, "patience": 5},
    "loader_processes": 0,
    "cache_volumes": True,
}  # fmt: skip


@pytest.fixture
def fabric():
    return Fabric(accelerator="cpu", devices=1, precision="32-true")


def make_task(scans, folder, fabric, **changes):
    return Task(
        scans=scans,
        splits=["train"] * (len(scans) - 2) + ["validation"] * 2,
        variant=SMALL,
        settings=SETTINGS | changes,
        fabric=fabric,
        folder=folder,
        seed=1,
    )


def of_length(made_scans, slices):
    """One stored scan."""
    return made_scans(4, slices=slices)[3]  # its length is ``slices`` as it is


@pytest.mark.parametrize(
    ("network", "parameters"),
    [
        (BERT, 63_491_975 + 3_155_456 + 1_026),  # 66.65 M as published (FACTS 4.8)
        (AVERAGE, 63_491_975 + 1_026),
        (RESNEXT3D, 47_521_216 + 2 * 2048 + 2),
    ],
)
def test_the_paper_preset_has_the_published_number_of_parameters(network, parameters):
    assert count_parameters(build, VARIANTS["paper"] | {"network": network}) == parameters


@pytest.mark.parametrize("network", [BERT, AVERAGE, RESNEXT3D])
@pytest.mark.parametrize("preset", VARIANTS)
def test_clips_become_an_embedding_scores_and_attention(preset, network):
    with torch.device("meta"):
        model = build(**VARIANTS[preset], network=network).eval()
        size = 224 if preset == "paper" else 64
        found = model.embed(torch.empty(2, 3, 32, size, size))
    section = VARIANTS[preset]["resnext" if network == RESNEXT3D else "trunk"]
    assert found.embedding.shape == (2, section["widths"][-1])
    assert found.logits.shape == (2, 2)
    heads = VARIANTS[preset]["head"]["heads"]
    shapes = {BERT: (2, heads, 5), AVERAGE: (2, 0, 5), RESNEXT3D: (2, 0, 3)}
    assert found.attention.shape == shapes[network]


def test_without_bert_the_embedding_is_the_mean_over_time():
    torch.manual_seed(0)
    model = build(**SMALL, network=AVERAGE).eval()
    clips = torch.rand(2, 3, SLICES, 16, 16)
    expected = model.trunk(clips).mean((2, 3, 4))
    torch.testing.assert_close(model.embed(clips).embedding, expected)
    torch.testing.assert_close(model(clips), model.output(expected))


def test_another_network_is_refused():
    with pytest.raises(ValueError, match="'bert', 'average' or 'resnext3d', got 'lstm'"):
        build(**SMALL, network="lstm")
    with pytest.raises(
        ValueError, match=r"w\.pth holds weights of R\(2\+1\)D-34, not of resnext3d"
    ):
        build(**SMALL, network=RESNEXT3D, trunk_weights="w.pth")


def test_every_configuration_can_be_built_from_either_preset(repository):
    presets = yaml.safe_load((repository / "params.yaml").read_text())["classify"]["cnn_bert"]
    for (name, changes), preset in product(presets["configurations"].items(), VARIANTS):
        settings = presets[preset] | {"trunk_weights": "w.pth"} | changes
        assert set(settings) == set(presets["paper"]), name
        if settings["network"] == RESNEXT3D:  # the weights are of the other trunk
            assert settings["trunk_weights"] is None
        with torch.device("meta"):
            build(**VARIANTS[preset], network=settings["network"])


def test_the_trunk_starts_from_a_file_of_weights(tmp_path):
    torch.manual_seed(0)
    source = r2plus1d_trunk(**SMALL["trunk"])
    path = tmp_path / "trunk.safetensors"
    save_file(source.state_dict(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    trunk = SMALL["trunk"] | {"sha256": digest}
    model = build(**SMALL | {"trunk": trunk}, trunk_weights=path)
    for name, values in source.state_dict().items():
        torch.testing.assert_close(model.trunk.state_dict()[name], values)
    with pytest.raises(CheckpointError, match="449a7af9"):  # not the published file
        build(**SMALL, trunk_weights=path)


@pytest.mark.parametrize("network", [BERT, AVERAGE, RESNEXT3D])
def test_every_network_trains_and_judges(made_scans, tmp_path, fabric, network):
    task = make_task(made_scans(6), tmp_path / "model", fabric, network=network)
    model, histories, _ = cnn_bert.train(task)
    (history,) = histories.values()
    assert [row["epoch"] for row in history] == [1, 2]
    assert {"validation_accuracy", "validation_loss"} <= set(history[0])
    found = cnn_bert.predict(model, task.scans, settings=task.settings, fabric=fabric)
    assert found.shape == (6, 2) and np.isfinite(found).all()


def test_it_learns_bright_lungs(assert_it_learns):
    changes = {"epochs": 12, "batches_per_step": 1, "multi_scale_crop": False, "affine": False}
    changes |= {"chosen_by": "loss", "channels": "LLL", "schedule": None}
    assert_it_learns(cnn_bert, SMALL, SETTINGS | changes)


def test_the_same_weights_with_and_without_memory(made_scans, tmp_path, fabric):
    scans, weights = made_scans(6), []
    for cached in (True, False):
        task = make_task(scans, tmp_path / f"{cached}", fabric, cache_volumes=cached)
        weights.append(cnn_bert.train(task).model.output.weight)
    assert torch.equal(*weights)


def test_a_missing_mask_is_named(made_scans, fabric):
    bare = replace(of_length(made_scans, 20), mask=None)
    model = build(**SMALL)
    with pytest.raises(ValueError, match="scan_0_3: channels RML need a lung mask"):
        cnn_bert.predict(model, [bare], settings=SETTINGS, fabric=fabric)
    settings = SETTINGS | {"channels": "RRR"}
    assert cnn_bert.predict(model, [bare], settings=settings, fabric=fabric).shape == (1, 2)


@pytest.mark.parametrize(
    ("slices", "sets", "seen"), [(3, 1, 3), (9, 1, 9), (16, 1, 16), (20, 2, 16), (50, 4, 48)]
)
def test_all_sets_are_embedded_and_every_slice_is_read_once(
    made_scans, fabric, monkeypatch, slices, sets, seen
):
    scan, read = of_length(made_scans, slices), []
    original = StoredVolume.__getitem__

    def counting(volume, index):
        read.append(index)
        return original(volume, index)

    monkeypatch.setattr(StoredVolume, "__getitem__", counting)
    model = build(**SMALL).eval()
    found = embed_scan(model, scan, settings=SETTINGS, fabric=fabric)
    assert len(found["positions"].unique()) == seen
    assert sorted(read) == sorted(2 * list(range(slices)))  # the slice and its mask
    assert {name: tuple(values.shape) for name, values in found.items()} == {
        "embeddings": (sets, 8),
        "logits": (sets, 2),
        "attention": (sets, 2, 3),
        "positions": (sets, SLICES),
    }
    if sets == 1:  # the one that is judged
        judged = cnn_bert.predict(model, [scan], settings=SETTINGS, fabric=fabric)
        np.testing.assert_allclose(found["logits"].softmax(1).numpy(), judged, rtol=1e-5)


def test_equal_sets_of_a_scan_are_embedded_alike(made_scans, fabric):
    scan = of_length(made_scans, 20)  # its only set is the central one too
    found = embed_scan(build(**SMALL).eval(), scan, settings=SETTINGS, fabric=fabric)
    assert torch.equal(*found["positions"])
    assert torch.equal(*found["embeddings"])


def test_embeddings_are_stored(made_scans, tmp_path, fabric):
    scan, path = of_length(made_scans, 40), tmp_path / "scan.safetensors"
    model = build(**SMALL)
    record = cnn_bert.embed_stored(scan, path, model=model, fabric=fabric, **SETTINGS)
    expected = embed_scan(model, scan, settings=SETTINGS, fabric=fabric)
    assert record == {"slices": len(expected["positions"].unique()), "sets": 3}
    for name, values in load_file(path).items():
        torch.testing.assert_close(values, expected[name])
    assert model.training  # as it was


def test_only_the_selected_slices_are_seen(made_scans, fabric):
    whole = of_length(made_scans, 30)
    chosen = Selection(whole.scan_id, "covid", 4, 12, (2, 3, 18, 17))
    part, settings = replace(whole, selection=chosen), SETTINGS | {"cropped": True}
    found = embed_scan(build(**SMALL), part, settings=settings, fabric=fabric)
    assert found["positions"].unique().tolist() == list(range(9))
    pictures = cnn_bert.shown(part, settings)
    assert pictures.shape == (SLICES, 16, 16, 3)
    assert pictures.dtype == np.uint8
    with pytest.raises(ValueError, match="scan_0_3: without a selection there is no body box"):
        cnn_bert.shown(whole, settings)
