import numpy as np
import pytest
import torch
from lightning_fabric import Fabric

from lib.classification.cnn_bert import VARIANTS, build, embed_scan
from lib.reporting.clip_benchmarks import (
    arithmetic,
    batches,
    clips_figure,
    compare_embedding,
    compare_preparation,
    compare_training,
    draw_scans,
    peak_arithmetic,
    plain_embeddings,
    plain_training_clip,
    random_batch,
    scan_lengths,
    stored_clips,
    take_steps,
)

SETTINGS = {
    "channels": "RML",
    "cropped": False,
    "slices": 8,
    "resized_size": 40,
    "image_size": 32,
    "channel_statistics": {"R": [0.6, 0.3], "M": [0.3, 0.5], "L": [0.1, 0.2]},
    "batch_scans": 2,
    "affine_ranges": {
        "degrees": 10,
        "translation": 0.1,
        "scale": 0.2,
        "shear_degrees": 10,
        "brightness": 0.5,
        "contrast": 0.3,
    },
}
TINY = VARIANTS["small"] | {
    "slices": 8,
    "trunk": {"widths": [4, 4, 8, 8], "blocks": [1, 1, 1, 1]},
    "head": {"heads": 2, "feed_forward": 8, "dropout": 0.0, "kept": 1.0},
}
FABRIC = Fabric(accelerator="cpu", devices=1)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    return draw_scans([3, 13, 20], tmp_path_factory.mktemp("scans"), drawn=6, size=64)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build(**TINY)


def test_lengths_are_those_of_the_published_list():
    lengths = scan_lengths(3455)
    assert lengths == sorted(lengths)
    assert np.median(lengths) == 49
    assert sum(length < 32 for length in lengths) == pytest.approx(875, abs=40)
    assert 2 <= lengths[0] <= 8
    assert 400 < lengths[-1] <= 548


def test_a_scan_is_written_both_ways_to_its_length(scans):
    for scan, length in zip(scans, (3, 13, 20), strict=True):
        assert len(scan.pictures) == len(scan.masks) == length
        assert all(file.is_file() for file in scan.pictures + scan.masks)


@pytest.mark.parametrize("in_memory", [False, True])
def test_both_ways_make_the_same_clips(scans, in_memory):
    """But for JPEG, two roundings, and the pixel that both see at an edge."""
    ours = stored_clips(scans, settings=SETTINGS, in_memory=in_memory)
    for seed, scan in enumerate(scans):
        plain = plain_training_clip(scan, seed, settings=SETTINGS)
        found = ours(scan, seed)
        assert found.shape == plain.shape == (3, 8, 32, 32)
        difference = (found - plain).abs()
        assert difference.median() < 0.06
        for one, other in zip(found, plain, strict=True):
            assert np.corrcoef(one.flatten(), other.flatten())[0, 1] > 0.97


def test_both_ways_find_the_same_embeddings(scans, model):
    for scan in scans:
        plain = plain_embeddings(model, scan, settings=SETTINGS, fabric=FABRIC)
        found = embed_scan(model, scan.item, settings=SETTINGS, fabric=FABRIC)["embeddings"]
        assert found.shape == plain.shape
        assert torch.cosine_similarity(found, plain).min() > 0.97


def test_a_step_is_taken_for_every_batch(scans, model):
    drawn = []

    def clip(scan, seed):
        drawn.append((scan.item.scan_id, seed))
        return torch.randn(3, 8, 32, 32)

    before = model.output.weight.clone()
    made = list(batches(clip, scans, settings=SETTINGS))
    assert [len(batch) for batch in made] == [2, 1]
    assert drawn == [("scan0", 0), ("scan1", 1), ("scan2", 2)]
    assert np.isfinite(take_steps(model, iter(made[:1]), fabric=FABRIC))
    assert not torch.equal(model.output.weight, before)


def test_comparisons_report_clips_per_second(scans, model):
    options = {"settings": SETTINGS, "repetitions": 1}
    results = {
        "prepare": compare_preparation(scans, in_memory=True, **options),
        "train": compare_training(model, scans[:2], in_memory=False, fabric=FABRIC, **options),
        "embed": compare_embedding(model, scans, fabric=FABRIC, **options),
    }
    assert [result["clips"] for result in results.values()] == [3, 2, 1 + 2 + 3]
    assert results["embed"]["lengths"] == [3, 13, 20]
    for result in results.values():
        assert result["slices"] == 8 * result["clips"]
        assert result["clips_per_second"] == pytest.approx(
            result["ratio"] * result["reference_clips_per_second"], rel=0.01
        )
    figure = clips_figure(results | {"other": {"share_of_peak": 1}}, wanted=3)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == list(results)


def test_arithmetic_is_counted_and_compared_with_the_peak(model):
    found = arithmetic(model, random_batch(SETTINGS, fabric=FABRIC), fabric=FABRIC, repetitions=1)
    assert found["clips_per_second"] > 0
    assert 0 < found["share_of_peak"] < 1
    assert found["peak_teraflops_per_second"] > found["teraflops_per_second"]
    assert peak_arithmetic(FABRIC, size=64, repetitions=1) > 0
