from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from lightning_fabric import Fabric
from open_clip.loss import ClipLoss

from lib import training
from lib.data import store
from lib.data.scan import LEFT_LUNG, RIGHT_LUNG
from lib.foundation import clip
from lib.foundation import clip_training as ct
from lib.foundation.regions import slice_regions
from lib.inference import one_thread

PHRASES = {kind: [f"this is {kind}", f"{kind}, seen well"] for kind in ct.KINDS}
TEMPLATES = ["{}", "a slice with {}"]
SENTENCES = ["A lung on a slice.", "There is a lung."]


def disc(row: int, column: int, radius: int) -> np.ndarray:
    rows, columns = np.ogrid[:64, :64]
    return (rows - row) ** 2 + (columns - column) ** 2 <= radius**2


def chest(generator: np.random.Generator, *, lungs: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """A small patient, whose lungs are noisy and hold a bright vessel."""
    voxels, mask = np.full((64, 64), -1000.0), np.zeros((64, 64), np.uint8)
    voxels[disc(32, 32, 28)] = 50
    if lungs:
        mask[disc(32, 20, 9)], mask[disc(32, 44, 9)] = RIGHT_LUNG, LEFT_LUNG
        voxels[mask > 0] = -820
        voxels[30:34, 18:21] = 40
    voxels[disc(26, 32, 2)] = -1000
    voxels[disc(50, 32, 4)] = 700
    return (voxels + generator.normal(0, 15, voxels.shape)).astype(np.int16), mask


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> list[tuple]:
    """Two stored scans of three slices; the last of each has no lungs."""
    folder, generator = tmp_path_factory.mktemp("scans"), np.random.default_rng(0)
    pairs = []
    for number in range(2):
        slices = [chest(generator, lungs=place < 2) for place in range(3)]
        pair = tuple(folder / f"{part}{number}.b2nd" for part in ("scan", "lungs"))
        for path, volume in zip(pair, map(np.stack, zip(*slices, strict=True)), strict=True):
            store.save_volume(path, volume)
        pairs.append(pair)
    return pairs


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return clip.build_clip("small")


@pytest.fixture(scope="module")
def crops(model, scans) -> ct.Crops:
    return ct.collect_crops(model, scans, slices=12, smallest_share=0.001, seed=0)


masks = hnp.arrays(bool, (12, 15)).filter(np.any)


@settings(max_examples=60, deadline=None)
@given(mask=masks, seed=st.integers(0, 1000))
def test_a_disturbed_mask_stays_near_the_mask(mask, seed):
    disturbed = ct.disturb(mask, np.random.default_rng(seed))
    assert disturbed.shape == mask.shape and disturbed.dtype == bool and disturbed.any()
    near = np.pad(mask, 1)
    near = np.max([np.roll(near, (r, c), (0, 1)) for r in (-1, 0, 1) for c in (-1, 0, 1)], axis=0)[
        1:-1, 1:-1
    ]
    assert not (disturbed & ~near).any()  # at this size one pixel at most


def test_masks_are_disturbed_in_every_way():
    mask = disc(30, 30, 12)
    found = [ct.disturb(mask, np.random.default_rng(seed)) for seed in range(40)]
    areas = np.array([one.sum() for one in found])
    shifted = [one for one in found if one.sum() == mask.sum() and (one != mask).any()]
    assert (areas > mask.sum()).any() and (areas < mask.sum()).any() and shifted
    assert all(
        (one >= mask).all() for one, area in zip(found, areas, strict=True) if area > mask.sum()
    )


@settings(max_examples=60, deadline=None)
@given(mask=masks, share=st.floats(0, 0.99), seed=st.integers(0, 1000))
def test_a_cut_takes_the_share_from_one_side(mask, share, seed):
    part = ct.cut(mask, share, np.random.default_rng(seed))
    assert part.any() and not (part & ~mask).any()
    assert part.sum() >= np.floor((1 - share) * mask.sum())


def test_crops_of_a_slice_are_what_their_kind_says():
    generator = np.random.default_rng(3)
    voxels, lungs = chest(generator)
    drawn = ct.draw_crops(voxels, slice_regions(voxels, lungs), generator)
    kinds = {kind for kind, _ in drawn}
    assert {"lung", "lung fragment", "lungs and mediastinum", "vessel", "body", "bone"} <= kinds
    assert kinds <= set(ct.KINDS)
    for kind, mask in drawn:
        in_lungs = lungs[mask].astype(bool).mean()
        if kind == "lung":
            largest = max((mask & (lungs == side)).sum() / (lungs == side).sum() for side in (1, 2))
            assert in_lungs > 0.6 and largest > 0.6
        if kind == "lung fragment":
            assert in_lungs == 1 and mask.sum() <= 0.52 * (lungs > 0).sum()
        if kind == "vessel":
            assert in_lungs == 1 and voxels[mask].min() > -320
        if kind == "lungs and mediastinum":
            assert 0.1 < in_lungs < 0.9


def test_crops_are_collected_from_every_slice_and_do_not_depend_on_chance(model, scans, crops):
    again = ct.collect_crops(model, scans, slices=12, smallest_share=0.001, seed=0)
    other = ct.collect_crops(model, scans, slices=12, smallest_share=0.001, seed=1)
    assert all(torch.equal(*pair) for pair in zip(crops, again, strict=True))
    assert len(other.squares) != len(crops.squares) or not torch.equal(
        *[c.squares for c in (crops, other)]
    )
    assert set(crops.slices.tolist()) == set(range(6)) and crops.squares.shape[1:] == (32, 32)
    lungs = crops.kinds == ct.KINDS.index("lung")
    assert set(crops.slices[lungs].tolist()) == {0, 1, 3, 4}
    few = ct.collect_crops(model, scans, slices=2, smallest_share=0.001, seed=0)
    assert set(few.slices.tolist()) == {0, 5}
    assert len(crops.kinds) > 1.8 * len(
        ct.collect_crops(model, scans, slices=6, smallest_share=0.001, seed=0).kinds
    )
    with pytest.raises(ValueError, match="there are none"):
        ct.collect_crops(model, [], slices=3, smallest_share=0, seed=0)


def test_small_crops_are_left_out(model, scans):
    found = ct.collect_crops(model, scans, slices=6, smallest_share=0.03, seed=0)
    assert not set(found.kinds.tolist()) & {ct.KINDS.index(kind) for kind in ("gas", "vessel")}


def test_every_kind_needs_phrases():
    tokens = ct.caption_tokens(PHRASES, TEMPLATES, 48)
    assert [t.shape for t in tokens] == [(4, 48)] * len(ct.KINDS)
    with pytest.raises(ValueError, match=r"missing \['gas'\], unknown \['liver'\]"):
        ct.caption_tokens({**PHRASES, "gas": [], "liver": ["a liver"]}, TEMPLATES, 48)
    with pytest.raises(ValueError, match="0 templates"):
        ct.caption_tokens(PHRASES, [], 48)


def test_words_are_left_out_and_the_rest_keeps_its_order():
    torch.manual_seed(0)
    (tokens,) = clip.tokenize(["one two three four five six seven"], 16)
    thinned = ct.leave_words_out(tokens.repeat(200, 1), share=0.3)
    words = tokens[1:8].tolist()
    lengths = []
    for row in thinned.tolist():
        end = row.index(tokens.max().item())
        assert row[0] == tokens[0] and not any(row[end + 1 :])
        assert row[1:end] == [word for word in words if word in row[1:end]]
        lengths.append(end - 1)
    assert np.mean(lengths) == pytest.approx(7 * 0.7, abs=0.3)
    assert torch.equal(ct.leave_words_out(tokens[None], share=0.0)[0], tokens)


def unit_rows(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, 8, generator=generator), dim=1)


def test_with_one_match_each_the_loss_is_open_clips():
    images, texts, scale = unit_rows(6, 0), unit_rows(6, 1), torch.tensor(7.0)
    expected = ClipLoss()(images, texts, scale)
    assert torch.allclose(
        ct.contrastive_loss(images, texts, torch.eye(6, dtype=bool), scale), expected
    )


def test_matching_captions_are_no_negatives_of_each_other():
    kinds, caption_kinds = torch.tensor([0, 0, 1]), torch.tensor([0, 0, 1, 2])
    matches = kinds[:, None] == caption_kinds
    axes = torch.eye(3)
    aligned = ct.contrastive_loss(axes[kinds], axes[caption_kinds], matches, torch.tensor(50.0))
    # all that is left is the choice among equals: two of two captions, two of two crops
    assert aligned.item() == pytest.approx((np.log(2) * 2 / 3 + np.log(2) * 2 / 3) / 2, abs=1e-4)
    apart = axes[[0, 1, 1, 2]]  # the same captions, one of them elsewhere
    assert ct.contrastive_loss(axes[kinds], apart, matches, torch.tensor(50.0)) > aligned + 1


def test_a_floor_parts_lungs_from_the_rest_half_way():
    similarities = np.array([0.1, 0.2, 0.3, 0.6, 0.7, 0.8])
    lungs = np.array([False, False, False, True, True, True])
    assert ct.best_floor(similarities, lungs) == pytest.approx(0.45)
    assert ct.best_floor(similarities, ~lungs) <= 0.1  # nothing parts them: everything is called


def test_the_report_counts_what_the_floor_gets_wrong():
    validation = {"part": "validation", "slice": [0, 0, 1, 1], "similarity": [0.9, 0.2, 0.7, 0.1]}
    test = {"part": "test", "slice": [0, 0, 0, 1, 2], "similarity": [0.4, 0.3, 0.8, 0.6, 0.1]}
    validation["kind"] = ["lung", "gas", "lung", "bone"]
    test["kind"] = ["lung", "lung fragment", "lung", "gas", "body"]
    table = pd.concat([pd.DataFrame(validation), pd.DataFrame(test)])
    report = ct.similarity_report(table, chosen_on="validation")
    assert report["similarity_floor"] == pytest.approx(0.45)
    assert report["validation"] | {"auc": 1.0} == report["validation"]
    assert report["validation"]["fragments_below_lungs"] is None
    expected = {"auc": 0.75, "lungs_below": 0.5, "others_above": 0.5, "empty_slices_above": 0.5}
    expected |= {"fragments_below_lungs": 1.0, "lungs": 2, "others": 2, "empty_slices": 2}
    assert report["test"] == pytest.approx(expected)


def test_training_learns_and_is_the_same_every_time(crops, tmp_path):
    found = []
    for number in range(2):
        torch.manual_seed(0)
        model = clip.build_clip("small")
        tokens = ct.caption_tokens(PHRASES, TEMPLATES, model.context_length)
        with one_thread():
            history = training.fit(
                model,
                fabric=Fabric(accelerator="cpu"),
                optimizers=[ct.build_optimizer(model, learning_rate=1e-3)],
                train_batches=ct.captioned_batches(crops, tokens, batch_crops=24, steps=5),
                validation_batches=[crops],
                loss=ct.batch_loss,
                score=partial(ct.lung_auc, sentences=SENTENCES),
                epochs=3,
                folder=tmp_path / str(number),
                seed=0,
                fingerprint={},
            )
        found.append((history, ct.similarity_table(model.eval(), {"test": crops}, SENTENCES)))
    (history, table), (again, same) = found
    assert history == again and table.equals(same)
    assert history[-1]["train_loss"] < 0.97 * history[0]["train_loss"]
    assert 0 <= history[-1]["validation_score"] <= 1
