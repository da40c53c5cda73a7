import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning_fabric import Fabric
from torch import nn

from lib.classification.imagenet import LITE0, imagenet_weights
from lib.classification.racnet import (
    CARD,
    VARIANTS,
    RACNet,
    RoutedDense,
    SelectedRowsAdam,
    build,
    build_optimizers,
    predict,
    routing_positions,
    run_packed,
    shown,
    train,
    unchanged_statistics,
)
from lib.classification.task import Task
from lib.data.store import open_volume

WIDTH, POSITIONS = 6, 12


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def tiny_backbone():
    return nn.Sequential(
        nn.Conv2d(3, WIDTH, 3, stride=2, bias=False),
        nn.BatchNorm2d(WIDTH),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def tiny_racnet(**changes):
    numbers = {"positions": POSITIONS, "recurrent_width": 5, "hidden_width": 4, **changes}
    return RACNet(backbone=tiny_backbone(), feature_width=WIDTH, **numbers)


def random_slices(total, channels=1, size=16):
    return torch.randint(0, 256, (total, channels, size, size), dtype=torch.uint8)


# ------------------------------------------------------------------------------- the whole network


def test_parameters_of_the_parts_of_the_papers_network():
    with torch.device("meta"):
        model = build(**VARIANTS["paper"])
    parts = [model.backbone, model.normalisation, model.recurrent, model.dense, model.output]
    counts = [sum(weights.numel() for weights in part.parameters()) for part in parts]
    assert counts == [4_007_548, 2_560, 541_440, 11_468_928, 258]


@pytest.mark.parametrize(
    ("changes", "lengths", "channels", "expected"),
    [
        ({}, [3, 1, 12], 1, (3, 2)),
        ({"routing": "first"}, [3], 3, (1, 2)),
        ({"classes": 3}, [1, 1], 1, (2, 3)),
        ({"slices_per_chunk": 2}, [4, 3], 1, (2, 2)),
    ],
)
def test_shapes(changes, lengths, channels, expected):
    model = tiny_racnet(**changes)
    assert model(random_slices(sum(lengths), channels), lengths).shape == expected


@pytest.mark.parametrize(
    ("lengths", "message"),
    [([3, 3], "sum to 6"), ([13], "1 to 12 slices"), ([13, 0], "1 to 12 slices")],
)
def test_lengths_that_cannot_be_are_refused(lengths, message):
    total = 13 if 13 in lengths else 5
    with pytest.raises(ValueError, match=message):
        tiny_racnet()(random_slices(total), lengths)


def test_unknown_routing_is_refused():
    with pytest.raises(ValueError, match="routing is one of"):
        tiny_racnet(routing="last")


def test_grey_slices_equal_the_same_slices_in_three_channels():
    model = tiny_racnet().eval()
    slices = random_slices(5)
    torch.testing.assert_close(
        model(slices, [2, 3]), model(slices.repeat(1, 3, 1, 1), [2, 3]), rtol=0, atol=0
    )


def test_scans_do_not_influence_each_other():
    model = tiny_racnet().eval()
    slices = random_slices(9)
    together = model(slices, [2, 4, 3])
    alone = [model(part, [len(part)]) for part in slices.split([2, 4, 3])]
    torch.testing.assert_close(together, torch.cat(alone))


def plain_racnet(model, slices):
    """The paper's computation for one scan, padded to all positions with black slices."""
    length = len(slices)
    padded = torch.cat([slices, slices.new_zeros(POSITIONS - length, *slices.shape[1:])])
    pictures = padded.repeat(1, 3, 1, 1) / 255
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pictures = (pictures - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)
    outputs, _ = model.recurrent(model.normalisation(model.backbone(pictures)))  # all positions
    places = routing_positions(length, POSITIONS, model.routing)
    rest = [place for place in range(POSITIONS) if place not in places]
    routed = torch.empty_like(outputs)
    routed[places], routed[rest] = outputs[:length], outputs[length:]
    mask = torch.zeros(POSITIONS, 1)
    mask[places] = 1
    width = outputs.shape[1]
    weight = model.dense.table.view(POSITIONS, width, -1).permute(2, 0, 1).flatten(1)
    hidden = nn.functional.linear((routed * mask).flatten(), weight, model.dense.bias)
    return model.output(hidden.relu())


@pytest.mark.parametrize("routing", ["alignment", "first"])
def test_packed_equals_the_papers_padded_computation(routing):
    model = tiny_racnet(routing=routing).eval()
    nn.init.normal_(model.dense.table)
    slices = random_slices(5 + 1 + 12)
    lengths = [5, 1, 12]
    expected = [plain_racnet(model, part) for part in slices.split(lengths)]
    torch.testing.assert_close(model(slices, lengths), torch.stack(expected))


def test_gru_on_real_slices_equals_gru_on_padded_ones():
    recurrent = nn.GRU(WIDTH, 5)
    lengths = [4, 9, 1]
    features = torch.randn(sum(lengths), WIDTH)
    padded = nn.utils.rnn.pad_sequence(list(features.split(lengths)))
    padded[padded == 0] = 3.0  # whatever is in the padding
    outputs, _ = recurrent(padded)
    expected = torch.cat([outputs[:length, i] for i, length in enumerate(lengths)])
    torch.testing.assert_close(run_packed(recurrent, features, lengths), expected)


@pytest.mark.parametrize("chunk", [None, 4])
def test_a_single_slice_can_be_trained_on(chunk):
    """Its batch statistics would be those of nothing, so the running ones normalise it."""
    model = tiny_racnet(slices_per_chunk=chunk, dropout=0.0).train()
    before = copy.deepcopy(model.normalisation.state_dict())
    slices = random_slices(1)
    logits = model(slices, [1])
    logits.sum().backward()
    assert all(weights.grad.isfinite().all() for weights in model.parameters())
    for name, values in model.normalisation.state_dict().items():
        assert torch.equal(values, before[name]), name


# ---------------------------------------------------------------------------------- stored scans

TINY = {"backbone": "test_efficientnet", "positions": 8, "recurrent_width": 8, "hidden_width": 8}
SETTINGS = {
    "image_size": 32,
    "batch_scans": 4,
    "learning_rate": 5e-3,
    "head_learning_rate": 5e-3,
    "mirrored": False,
    "left_out": 0.0,
    "slices_per_chunk": None,
    "epochs": 8,
    "patience": None,
    "chosen_by": "loss",
    "schedule": {"kind": "cosine", "T_max": 8},
    "loader_processes": 0,
    "cache_slices": True,
}


def make_task(scans, training, variant, settings, folder, seed=3):
    splits = training * ["train"] + (len(scans) - training) * ["validation"]
    fabric = Fabric(accelerator="cpu", devices=1)
    return Task(
        scans=scans, splits=splits, variant=variant, settings=settings, fabric=fabric,
        folder=folder, seed=seed,
    )  # fmt: skip


def test_it_learns_from_stored_scans_and_predicts_the_same_again(made_scans, black_scan, tmp_path):
    """Scans of one slice, of more slices than places, and one of which the mask leaves nothing."""
    scans = made_scans(24)
    found = []
    for run in ("first", "second"):
        task = make_task(scans, 16, TINY, SETTINGS, tmp_path / run)
        model, histories, _ = train(task)
        assert list(histories) == [CARD.name]
        found.append(predict(model, [*scans, black_scan], settings=SETTINGS, fabric=task.fabric))
    first, second = found
    np.testing.assert_array_equal(first, second)
    assert first.shape == (25, 2)
    assert np.isfinite(first).all()
    truth = [scan.target for scan in scans]
    print(histories, first[:, 1].round(2), truth)
    assert (first[:24].argmax(1) == truth).mean() >= 0.9


def test_a_scan_with_more_slices_than_places_is_thinned_not_refused(made_scans):
    scan = made_scans(2, slices=20)[1]
    assert len(open_volume(scan.volume)) == 21
    model = build(**TINY | {"positions": 5})
    seen = []
    model.backbone.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    fabric = Fabric(accelerator="cpu", devices=1)
    probabilities = predict(model, [scan], settings=SETTINGS, fabric=fabric)
    assert seen == [5]
    assert np.isfinite(probabilities).all()


def test_what_is_shown_is_every_slice_at_the_networks_size(made_scans):
    pictures = shown(made_scans(2)[1], SETTINGS)
    assert pictures.shape == (8, 32, 32)
    assert pictures.dtype == np.uint8


# ----------------------------------------------------------------------------------------- routing


@pytest.mark.parametrize(
    ("length", "positions", "routing", "expected"),
    [
        (3, 7, "first", [0, 1, 2]),
        (3, 7, "alignment", [0, 3, 6]),
        (1, 7, "alignment", [0]),
        (1, 7, "first", [0]),
        (7, 7, "alignment", [0, 1, 2, 3, 4, 5, 6]),
        (3, 6, "alignment", [0, 3, 5]),
        (2, 700, "alignment", [0, 699]),
    ],
)
def test_routing_positions(length, positions, routing, expected):
    assert routing_positions(length, positions, routing).tolist() == expected


@given(data=st.data(), positions=st.integers(1, 700))
def test_alignment_is_strictly_increasing_over_the_whole_range(data, positions):
    length = data.draw(st.integers(1, positions))
    places = routing_positions(length, positions, "alignment")
    assert len(places) == length
    assert (np.diff(places) >= 1).all()
    assert places[0] == 0
    assert places[-1] == (positions - 1 if length > 1 else 0)


# --------------------------------------------------------------------------------- the dense layer


def test_routed_dense_equals_a_dense_layer_on_zero_padded_input():
    layer = RoutedDense(positions=10, width=3, hidden_width=4)
    plain = nn.Linear(30, 4)
    with torch.no_grad():
        plain.weight.copy_(layer.table.view(10, 3, 4).permute(2, 0, 1).reshape(4, 30))
        plain.bias.copy_(layer.bias)
    features, places = torch.randn(5, 3, requires_grad=True), torch.tensor([0, 4, 9, 2, 3])
    padded = torch.zeros(2, 10, 3)
    padded[[0, 0, 0, 1, 1], places] = features
    expected = plain(padded.flatten(1))
    outputs = layer(features, places, [3, 2])
    torch.testing.assert_close(outputs, expected)
    weights = torch.randn(2, 4)
    (features_gradient,) = torch.autograd.grad(
        (outputs * weights).sum(), features, retain_graph=True
    )
    (expected_gradient,) = torch.autograd.grad(
        (expected * weights).sum(), features, retain_graph=True
    )
    torch.testing.assert_close(features_gradient, expected_gradient)
    (outputs * weights).sum().backward()
    (expected * weights).sum().backward()
    table = layer.table.grad.view(10, 3, 4).permute(2, 0, 1).reshape(4, 30)
    torch.testing.assert_close(table, plain.weight.grad)


def test_routed_dense_starts_as_a_dense_layer_does():
    layer, plain = RoutedDense(positions=50, width=8, hidden_width=16), nn.Linear(400, 16)
    for ours, theirs in ((layer.table, plain.weight), (layer.bias, plain.bias)):
        assert ours.abs().max() <= 400**-0.5
        assert theirs.abs().max() <= 400**-0.5
    ours, theirs = (weights.flatten().sort().values for weights in (layer.table, plain.weight))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.003)  # same distribution


def train_steps(model, optimizers, lengths, steps):
    targets = torch.arange(len(lengths)) % 2
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        logits = model(random_slices(sum(lengths)), lengths)
        nn.functional.cross_entropy(logits, targets).backward()
        for optimizer in optimizers:
            optimizer.step()


def test_unselected_weights_and_their_moments_stay_as_they_are():
    model = tiny_racnet()
    optimizers = build_optimizers(model, learning_rate=0.01)
    train_steps(model, optimizers, [12, 12], 3)  # every row has moments now
    state = optimizers[1].state[model.dense.table]
    watched = [model.dense.table, state["exp_avg"], state["exp_avg_sq"]]
    before = [values.detach().clone() for values in watched]
    train_steps(model, optimizers, [2, 3], 5)
    selected = sorted({0, 11} | {0, 6, 11})
    rest = [place for place in range(POSITIONS) if place not in selected]
    for now, then in zip(watched, before, strict=True):
        assert (now[selected] != then[selected]).any(dim=1).all()
        assert torch.equal(now[rest], then[rest])


def test_a_whole_training_on_short_scans_leaves_the_other_places_alone(made_scans, tmp_path):
    """Bit for bit, through `train` with its chunks, schedule and choice of the best epoch."""
    settings = SETTINGS | {"epochs": 2, "slices_per_chunk": 4}
    variant = TINY | {"positions": 40}
    task = make_task(made_scans(8), 6, variant, settings, tmp_path)  # of 1 and of 7 to 9 slices
    places = {p for n in (1, 7, 8, 9) for p in routing_positions(n, 40).tolist()}
    rest = [place for place in range(40) if place not in places]
    model, _, _ = train(task)
    torch.manual_seed(task.seed)
    start = build(**variant).dense.table
    changed = (model.dense.table != start).any(dim=1)
    assert len(rest) > 10
    assert not changed[rest].any()
    assert changed[[0, 39]].all()


def test_autocast_leaves_the_gradient_of_unselected_places_exactly_zero():
    layer = RoutedDense(positions=10, width=3, hidden_width=4)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = layer(torch.randn(2, 3, dtype=torch.bfloat16), torch.tensor([0, 9]), [2])
    outputs.square().sum().backward()
    assert layer.table.grad.any(dim=1).nonzero().flatten().tolist() == [0, 9]


def test_rows_that_are_always_selected_move_as_under_adam():
    sparse = tiny_racnet(dropout=0.0)
    dense = copy.deepcopy(sparse)
    train = random_slices(POSITIONS)
    ordinary = torch.optim.Adam(dense.parameters(), lr=0.01)
    for model, optimizers in (
        (sparse, build_optimizers(sparse, learning_rate=0.01)),
        (dense, [ordinary]),
    ):
        for _ in range(3):
            model.zero_grad()
            nn.functional.cross_entropy(model(train, [POSITIONS]), torch.tensor([1])).backward()
            for optimizer in optimizers:
                optimizer.step()
    torch.testing.assert_close(sparse.dense.table, dense.dense.table, rtol=1e-3, atol=1e-4)


def test_selected_rows_move_as_under_sparse_adam():
    """Rows that are selected now and then, over several steps, against PyTorch's own."""
    start = torch.randn(6, 3)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = SelectedRowsAdam([ours], lr=0.1), torch.optim.SparseAdam([theirs], lr=0.1)
    for rows in ([0, 1, 2], [2, 3], [0, 4], [0, 1, 4]):
        gradient = torch.zeros(6, 3)
        gradient[rows] = torch.randn(len(rows), 3)
        ours.grad, theirs.grad = gradient, gradient.to_sparse(1)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(ours[5], start[5])


def test_optimizers_hold_every_trained_weight_once():
    model = tiny_racnet()
    optimizers = build_optimizers(model, learning_rate=1e-4, head_learning_rate=1e-3)
    held = [w for o in optimizers for group in o.param_groups for w in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))
    rates = {
        id(w): group["lr"] for o in optimizers for group in o.param_groups for w in group["params"]
    }
    assert rates[id(model.backbone[0].weight)] == 1e-4
    assert rates[id(model.dense.table)] == rates[id(model.output.bias)] == 1e-3


# ------------------------------------------------------------------------- memory and frozen parts


def test_chunks_change_neither_outputs_nor_gradients_of_a_frozen_batch_norm():
    whole = tiny_racnet(freeze_batch_norm=True, dropout=0.0).train()
    chunked = copy.deepcopy(whole)
    chunked.slices_per_chunk = 3
    slices, lengths = random_slices(11), [4, 7]
    for model in (whole, chunked):
        nn.functional.cross_entropy(model(slices, lengths), torch.tensor([0, 1])).backward()
    for expected, found in zip(whole.parameters(), chunked.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


def test_no_chunk_is_longer_than_asked_or_much_shorter_than_the_others():
    model, seen = tiny_racnet(slices_per_chunk=4).eval(), []
    model.backbone.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    with torch.inference_mode():
        model(random_slices(9), [9])
    assert seen == [3, 3, 3]


def saved_bytes(run):
    """Bytes that autograd keeps for the backward pass, weights aside."""
    kept = {}

    def keep(values):
        if not isinstance(values, nn.Parameter):
            storage = values.untyped_storage()
            kept[storage._cdata] = values, storage.nbytes()  # held, so that no address comes twice
        return values

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda values: values):
        run()
    return sum(size for _, size in kept.values())


def test_five_scans_of_700_slices_train_within_24_gigabytes():
    """Counted on layers without memory, single precision; half of it is left to scratch memory."""
    with torch.device("meta"):
        model, size = build(**VARIANTS["paper"]), 256
        chunk = torch.empty((64, 1, size, size), dtype=torch.uint8)
        features = torch.empty((5 * 700, 1280), requires_grad=True)
        one_chunk = saved_bytes(lambda: model._chunk_features(chunk))
        places = torch.zeros(5 * 700, dtype=torch.int64)
        outputs = torch.empty((5 * 700, 128), requires_grad=True)
        behind = saved_bytes(
            lambda: (
                model.dropout(model._normalised(features)),
                model.dense(outputs, places, 5 * [700]),
            )
        )
    weights = 4 * 4 * CARD.parameters  # values, gradients, two moments
    assert one_chunk == pytest.approx(64 * 110 * 2**20, rel=0.01)
    assert one_chunk + behind + 5 * 700 * size**2 + weights < 12e9


def test_recomputed_chunks_count_once_in_the_running_statistics():
    model = tiny_racnet(slices_per_chunk=3).train()
    reference = copy.deepcopy(model.backbone)
    slices = random_slices(8)
    logits = model(slices, [8])
    forward_only = copy.deepcopy(model.backbone[1].state_dict())
    logits.sum().backward()
    after = model.backbone[1].state_dict()
    with torch.no_grad():
        for chunk in slices.split(3):
            reference((chunk.repeat(1, 3, 1, 1) / 255 - model.mean) / model.deviation)
    for name, values in reference[1].state_dict().items():
        if name.startswith("running") or name == "num_batches_tracked":
            assert torch.equal(after[name], forward_only[name]), name
            torch.testing.assert_close(after[name], values)


def test_unchanged_statistics_restores_the_layers():
    backbone = tiny_backbone().train()
    with unchanged_statistics(backbone):
        backbone(torch.randn(4, 3, 16, 16))
    assert backbone[1].num_batches_tracked == 0
    assert (backbone[1].running_mean == 0).all()
    backbone(torch.randn(4, 3, 16, 16))
    assert backbone[1].num_batches_tracked == 1
    assert (backbone[1].running_mean != 0).all()


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_batch_norm_keeps_its_statistics_in_training(frozen):
    model = tiny_racnet(freeze_batch_norm=frozen).train()
    before = model.backbone[1].running_mean.clone()
    model(random_slices(6), [6])
    assert torch.equal(model.backbone[1].running_mean, before) == frozen
    assert (model.normalisation.running_mean != 0).any()  # RACNet's own stays trained


def test_frozen_blocks_do_not_train():
    model = build(backbone=LITE0, frozen_blocks=3, freeze_batch_norm=True, positions=8)
    trained = {name for name, w in model.backbone.named_parameters() if w.requires_grad}
    assert trained == {name for name, _ in model.backbone.named_parameters() if "rest." in name}
    build_optimizers(model, learning_rate=1e-4)
    with pytest.raises(ValueError, match="freeze_batch_norm"):
        build(backbone=LITE0, frozen_blocks=3)


def test_the_small_variant_starts_from_imagenet():
    model = build(**VARIANTS["small"])
    weights = list(imagenet_weights().values())[:-2]  # without the 1,000-class layer
    found = list(model.backbone.state_dict().values())
    assert len(found) == len(weights)
    assert all(torch.equal(*pair) for pair in zip(found, weights, strict=True))
    assert model.mean.flatten().tolist() == [0.5, 0.5, 0.5]  # as those weights were trained


def test_features_of_frozen_stages_give_what_the_slices_give():
    model = build(backbone=LITE0, frozen_blocks=5, freeze_batch_norm=True, positions=8).eval()
    slices = random_slices(5, size=32)
    features = torch.from_numpy(model.frozen_features(slices[:, 0].numpy()))
    assert features.dtype == torch.float32 and len(features) == 5
    with torch.no_grad():
        torch.testing.assert_close(model(features, [2, 3]), model(slices, [2, 3]))


def test_a_tiny_network_learns_to_see_a_bright_slice():
    """Class 1: some slice holds a bright patch, at any place in scans of any length."""
    rng = np.random.default_rng(0)

    def scan(positive):
        slices = rng.integers(0, 100, (rng.integers(3, POSITIONS + 1), 1, 16, 16))
        if positive:
            slices[rng.integers(len(slices)), 0, 4:12, 4:12] += 150
        return torch.from_numpy(slices.astype(np.uint8))

    scans = [scan(i % 2) for i in range(100)]
    targets = torch.arange(100) % 2
    model = tiny_racnet(recurrent_width=16, hidden_width=16)
    optimizers = build_optimizers(model, learning_rate=0.01)
    for step in range(80):
        chosen = torch.randperm(60, generator=torch.Generator().manual_seed(step))[:12].tolist()
        for optimizer in optimizers:
            optimizer.zero_grad()
        logits = model(torch.cat([scans[i] for i in chosen]), [len(scans[i]) for i in chosen])
        nn.functional.cross_entropy(logits, targets[chosen]).backward()
        for optimizer in optimizers:
            optimizer.step()
    model.eval()
    with torch.inference_mode():
        logits = model(torch.cat(scans[60:]), [len(part) for part in scans[60:]])
    assert (logits.argmax(1) == targets[60:]).float().mean() > 0.9
