"""Tests of lib/classification/embedding_mlp.py."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from lightning_fabric import Fabric
from safetensors.torch import save_file

from lib.classification import embedding_mlp
from lib.classification.embedding_mlp import (
    ACTIVATIONS,
    POOLINGS,
    VARIANTS,
    PooledScans,
    batches,
    build,
    pool,
    read_embeddings,
    validation_scores,
)

SETTINGS = {
    "batch_scans": 8,
    "learning_rate": 2e-2,
    "epochs": 12,
    "patience": None,
    "chosen_by": "accuracy",
    "plateau": {"factor": 0.1, "patience": 5},
}
MATRIX = [("max", "tanh"), ("both", "sigmoid")]


def made_embeddings(number, *, width=12, seed=0):
    """Of scans with one to three sets; the odd ones lie apart from the others."""
    generator = torch.Generator().manual_seed(seed)
    shift = 3 * torch.nn.functional.one_hot(torch.tensor(0), width)
    return [
        torch.randn(1 + index % 3, width, generator=generator) + (2 * (index % 2) - 1) * shift
        for index in range(number)
    ]


def made_scans(pooling="both", number=48):
    return PooledScans(
        scan_ids=[f"scan-{index}" for index in range(number)],
        splits=["train", "train", "train", "validation", "validation", "test"] * (number // 6),
        targets=[index % 2 for index in range(number)],
        features=pool(made_embeddings(number), pooling),
    )


def trained(scans, folder, *, activation="relu", seed=0, **changed):
    return embedding_mlp.train(
        scans,
        activation=activation,
        variant=VARIANTS["small"],
        settings=SETTINGS | changed,
        fabric=Fabric(accelerator="cpu"),
        folder=folder,
        seed=seed,
    )


@pytest.mark.parametrize(
    ("variant", "width", "parameters"),
    [("paper", 1024, 135_394), ("code", 1024, 270_690), ("paper", 512, 69_858)],
)
def test_it_has_the_parameters_of_the_published_layers(variant, width, parameters):
    model = build(width=width, activation="sigmoid", **VARIANTS[variant])
    assert sum(weights.numel() for weights in model.parameters()) == parameters


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_layers_follow_figure_3(activation):
    model = build(width=10, activation=activation, hidden=[6, 4], dropout=0.5)
    names = ["fc1", "activation1", "dropout1", "fc2", "activation2", "dropout2", "output"]
    assert [name for name, _ in model.named_children()] == names
    assert model.dropout1.p == model.dropout2.p == 0.5
    assert type(model.activation1) is type(model.activation2) is ACTIVATIONS[activation]
    assert model(torch.zeros(3, 10)).shape == (3, 2)


@settings(max_examples=30, deadline=None)
@given(
    arrays(
        np.float32,
        st.tuples(st.integers(1, 5), st.integers(1, 6)),
        elements=st.floats(-100, 100, width=32),
    ),
    st.randoms(use_true_random=False),
)
def test_pooling_is_that_of_numpy_and_knows_no_order_of_sets(values, random):
    sets = torch.from_numpy(values)
    order = random.sample(range(len(sets)), len(sets))
    for pooling in POOLINGS:
        torch.testing.assert_close(pool([sets], pooling), pool([sets[order]], pooling))
    both = pool([sets], "both")[0].numpy()
    np.testing.assert_allclose(
        both, np.concatenate([values.max(0), values.mean(0)]), rtol=1e-5, atol=1e-4
    )


def test_a_single_set_is_its_own_maximum_and_mean():
    one = made_embeddings(1)
    assert len(one[0]) == 1
    torch.testing.assert_close(pool(one, "max"), pool(one, "mean"))


@pytest.mark.parametrize(("pooling", "activation"), MATRIX)
def test_it_learns_and_gives_the_same_twice(pooling, activation, tmp_path):
    scans, fabric, found = made_scans(pooling), Fabric(accelerator="cpu"), []
    for run in ("first", "second"):
        model, histories, _ = trained(scans, tmp_path / run, activation=activation)
        found.append(embedding_mlp.predict(model, scans, settings=SETTINGS, fabric=fabric))
    np.testing.assert_array_equal(*found)
    assert list(histories) == ["MLP"]
    np.testing.assert_allclose(found[0].sum(1), 1, atol=1e-6)
    right = found[0].argmax(1) == scans.targets
    assert right[np.array(scans.splits) == "test"].all()


def test_the_first_epoch_of_best_validation_accuracy_is_kept(tmp_path):
    scans = made_scans()
    model, histories, _ = trained(scans, tmp_path)
    scores = [row["validation_accuracy"] for row in histories["MLP"]]
    assert max(scores) == scores[-1]  # so the first of equals is not the last epoch
    assert scores.index(max(scores)) < len(scores) - 1
    again, _, _ = trained(scans, tmp_path / "shorter", epochs=1 + scores.index(max(scores)))
    for kept, expected in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(kept, expected, rtol=0, atol=0)


def test_the_test_part_changes_nothing(tmp_path):
    scans, found = made_scans(), []
    for factor in (1.0, -5.0):
        features = scans.features.clone()
        features[np.array(scans.splits) == "test"] *= factor
        changed = PooledScans(**vars(scans) | {"features": features})
        model, _, _ = trained(changed, tmp_path / str(factor), epochs=3)
        found.append(model.output.weight)
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_the_learning_rate_follows_the_loss_whatever_chooses_the_epoch(tmp_path):
    scans = made_scans()
    often = {"plateau": {"factor": 0.5, "patience": 0, "threshold": 0.6}, "learning_rate": 3e-3}
    rows = trained(scans, tmp_path, **often).histories["MLP"]
    best, rate, expected = np.inf, 3e-3, []
    for row in rows:
        expected.append(rate)
        better = row["validation_loss"] < 0.4 * best
        best, rate = (row["validation_loss"], rate) if better else (best, rate / 2)
    assert [row["learning_rate"] for row in rows] == pytest.approx(expected)
    assert len(set(expected)) > 3


@pytest.mark.parametrize("chosen_by", ["loss", "accuracy", "macro_f1"])
def test_the_kept_epoch_is_the_best_by_the_measure_asked(chosen_by, tmp_path):
    scans, fabric = made_scans(), Fabric(accelerator="cpu")
    model, histories, _ = trained(scans, tmp_path, chosen_by=chosen_by, learning_rate=3e-3)
    with torch.no_grad():
        kept = validation_scores(
            model.eval(), batches(scans.items("validation"), 8), chosen_by=chosen_by, fabric=fabric
        )
    name = f"validation_{chosen_by}"
    best = (min if chosen_by == "loss" else max)(row[name] for row in histories["MLP"])
    assert kept[name] == pytest.approx(best)


def store(folder, scan_id, **tensors):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / f"{scan_id}.safetensors")


def test_stored_embeddings_are_read_in_the_order_asked(tmp_path):
    made = made_embeddings(3)
    for index, embeddings in enumerate(made):
        store(tmp_path, f"s{index}", embeddings=embeddings, logits=torch.zeros(len(embeddings), 2))
    found = read_embeddings(tmp_path, ["s2", "s0"])
    for read, expected in zip(found, (made[2], made[0]), strict=True):
        torch.testing.assert_close(read, expected, rtol=0, atol=0)


def test_bad_embeddings_are_refused_in_one_sentence(tmp_path):
    store(tmp_path, "narrow", embeddings=torch.zeros(2, 8))
    store(tmp_path, "wide", embeddings=torch.zeros(2, 16))
    store(tmp_path, "flat", embeddings=torch.zeros(8))
    store(tmp_path, "other", logits=torch.zeros(1, 2))
    (tmp_path / "damaged.safetensors").write_bytes(b"nothing")
    with pytest.raises(FileNotFoundError, match=r"gone.safetensors is not there: embed the scans"):
        read_embeddings(tmp_path, ["narrow", "gone"])
    with pytest.raises(ValueError, match=r"wide has embeddings of width 16, the scans before it"):
        read_embeddings(tmp_path, ["narrow", "wide"])
    with pytest.raises(ValueError, match=r"flat.safetensors: embeddings have the shape"):
        read_embeddings(tmp_path, ["flat"])
    for name in ("other", "damaged"):
        with pytest.raises(ValueError, match=rf"{name}.safetensors holds no tensor 'embeddings'"):
            read_embeddings(tmp_path, [name])


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="a pooling is max, mean, both, got 'median'"):
        pool(made_embeddings(2), "median")
    with pytest.raises(ValueError, match="an activation is relu, sigmoid, tanh, got 'gelu'"):
        build(width=4, activation="gelu")
    scans = made_scans()
    alone = PooledScans(**vars(scans) | {"targets": [0] * len(scans)})
    with pytest.raises(ValueError, match="the training part has no scan of the class 'covid'"):
        trained(alone, tmp_path)
    unchosen = PooledScans(**vars(scans) | {"splits": ["train"] * len(scans)})
    with pytest.raises(ValueError, match="the validation part is empty"):
        trained(unchosen, tmp_path)
