import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import jaccard_score

from lib.evaluation.detection import (
    THRESHOLDS,
    Lesions,
    average_precisions,
    coco_precisions,
    image_precisions,
    mask_overlaps,
    paper_precisions,
    summarise_precisions,
)

WIDTH = 40


def lesions(*strips, scores=None):
    """Strips (label, first column, last column, row), one row of pixels each."""
    masks = np.zeros((len(strips), 4, WIDTH), bool)
    for mask, (_, start, stop, row) in zip(masks, strips, strict=True):
        mask[row, start:stop] = True
    labels = np.array([strip[0] for strip in strips], int)
    return Lesions(masks, labels, None if scores is None else np.array(scores, float))


def at_half(predicted, true):
    return paper_precisions([predicted], [true], [0.5])[0, 0]


NOTHING = lesions()
NOTHING_FOUND = lesions(scores=[])
ONE = lesions((1, 0, 10, 0))
TWO = lesions((1, 0, 10, 0), (2, 0, 10, 2))


def test_thresholds_are_those_of_coco():
    assert THRESHOLDS == (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


@pytest.mark.parametrize(
    ("predicted", "true", "expected"),
    [
        pytest.param(NOTHING_FOUND, NOTHING, 1, id="neither"),
        pytest.param(NOTHING_FOUND, ONE, 0, id="nothing found"),
        pytest.param(lesions((1, 0, 9, 0), scores=[0.9]), NOTHING, 0, id="nothing to find"),
        pytest.param(lesions((1, 0, 9, 0), scores=[0.9]), ONE, 1, id="hit"),
        pytest.param(lesions((2, 0, 9, 0), scores=[0.9]), ONE, 0, id="wrong class"),
        pytest.param(lesions((1, 0, 5, 0), scores=[0.9]), ONE, 0, id="at the threshold only"),
        pytest.param(lesions((1, 0, 9, 0), scores=[0.9]), TWO, 1 / 2, id="one of two"),
        # false, hit: precision 1/2 at recall 1
        pytest.param(
            lesions((1, 20, 30, 0), (1, 0, 10, 0), scores=[0.9, 0.8]), ONE, 1 / 2, id="false first"
        ),
        pytest.param(
            lesions((1, 20, 30, 0), (1, 0, 10, 0), scores=[0.8, 0.9]), ONE, 1, id="false last"
        ),
        # hit, false, hit: precision 1 up to recall 1/2, then 2/3
        pytest.param(
            lesions((1, 0, 10, 0), (2, 20, 30, 0), (2, 0, 10, 2), scores=[0.9, 0.8, 0.7]),
            TWO,
            5 / 6,
            id="false between",
        ),
        # false, hit, hit: the envelope lifts the first half to 2/3 too
        pytest.param(
            lesions((2, 20, 30, 0), (1, 0, 10, 0), (2, 0, 10, 2), scores=[0.9, 0.8, 0.7]),
            TWO,
            2 / 3,
            id="envelope",
        ),
        # Both fit; the one that overlaps more is the hit although its score is lower
        pytest.param(
            lesions((1, 0, 7, 0), (1, 0, 10, 0), scores=[0.9, 0.8]), ONE, 1 / 2, id="twice found"
        ),
        # The one that overlaps most has the wrong class, the next one is taken
        pytest.param(
            lesions((2, 0, 10, 0), (1, 0, 8, 0), scores=[0.5, 0.9]), ONE, 1, id="class decides"
        ),
    ],
)
def test_the_papers_rule_by_hand(predicted, true, expected):
    assert at_half(predicted, true) == pytest.approx(expected)


def test_coco_by_hand_where_it_differs():
    two_fits = lesions((1, 0, 7, 0), (1, 0, 10, 0), scores=[0.9, 0.8])
    assert coco_precisions([two_fits], [ONE], [0.5]) == pytest.approx(
        [1]
    )  # the higher score is the hit
    at_threshold = lesions((1, 0, 5, 0), scores=[0.9])
    assert coco_precisions([at_threshold], [ONE], [0.5, 0.55]) == pytest.approx([1, 0])
    found, nothing_true = lesions((1, 0, 9, 0), scores=[0.95]), [ONE, NOTHING]
    hit = lesions((1, 0, 10, 0), scores=[0.9])
    # one false positive ranks above the only lesion of the set: precision 1/2 at every recall
    assert coco_precisions([hit, found], nothing_true, [0.5]) == pytest.approx([0.5])
    assert paper_precisions([hit, found], nothing_true, [0.5]).tolist() == [[1], [0]]


def test_both_rules_side_by_side():
    predicted = [lesions((1, 0, 8, 0), scores=[0.9]), NOTHING_FOUND]
    table = average_precisions(predicted, [ONE, NOTHING])  # IoU 0.8
    assert list(table.columns) == ["AP@0.5", "AP@0.75", "mAP"]
    assert table.loc["paper"].tolist() == pytest.approx([1, 1, (1 * 6 + 0.5 * 4) / 10])
    assert table.loc["coco"].tolist() == pytest.approx([1, 1, 0.7])


def test_tables_of_images_and_of_both_rules_with_intervals():
    images = pd.DataFrame({"image_id": list("abcd"), "patient_id": list("ppqr")})
    hit, miss = (lesions((label, 0, 9, 0), scores=[0.9]) for label in (1, 2))
    predicted, true = [hit, hit, miss, hit], [ONE] * 4
    table = image_precisions(images, predicted, true)
    assert table.columns[:3].tolist() == ["image_id", "patient_id", "AP@0.50"]
    assert table.columns[-1] == "AP@0.95" and table.shape == (4, 12)
    assert table["AP@0.85"].tolist() == [1, 1, 0, 1] and not table["AP@0.90"].any()
    summary = summarise_precisions(table, predicted, true, seed=0)
    assert summary.columns.tolist() == ["rule", "metric", "value", "low", "high", "n"]
    assert summary["metric"].tolist() == ["AP@0.5", "AP@0.75", "mAP"] * 2
    expected = average_precisions(predicted, true).to_numpy().ravel()
    np.testing.assert_allclose(summary["value"], expected)
    paper = summary[summary["rule"] == "paper"]
    assert ((paper["low"] < paper["value"]) & (paper["value"] < paper["high"])).all()
    assert summary.loc[summary["rule"] == "coco", ["low", "high"]].isna().all(axis=None)
    assert (summary["n"] == 4).all()


def test_without_images_or_lesions_nothing_is_averaged():
    assert average_precisions([], []).isna().all(axis=None)
    table = average_precisions([NOTHING_FOUND], [NOTHING])
    assert table.loc["paper"].tolist() == [1, 1, 1]
    assert table.loc["coco"].isna().all()


@st.composite
def images(draw, least=1):
    """Disjoint true lesions, predictions near them, distinct scores."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    pairs, ranks = [], random.permutation(15)  # no score twice in all images
    for _ in range(draw(st.integers(1, 3))):
        count = draw(st.integers(least, 4))
        true = [(random.integers(1, 3), 0, random.integers(4, WIDTH), row) for row in range(count)]
        found = [
            (random.integers(1, 3), random.integers(0, 3), random.integers(4, WIDTH), row)
            for row in random.integers(0, 4, draw(st.integers(0, 5)))
        ]
        scores, ranks = ranks[: len(found)] / 15, ranks[len(found) :]
        pairs.append((lesions(*found, scores=scores), lesions(*true)))
    return [list(side) for side in zip(*pairs, strict=True)]


def shuffled(image, seed):
    order = np.random.default_rng(seed).permutation(len(image.labels))
    return Lesions(*(None if part is None else part[order] for part in image))


@settings(max_examples=60, deadline=None)
@given(images(least=0), st.integers(0, 99))
def test_the_order_of_lesions_and_images_does_not_matter(pair, seed):
    predicted, true = pair
    expected = average_precisions(predicted, true)
    mixed = [[shuffled(image, seed + k) for image in side][::-1] for k, side in enumerate(pair)]
    np.testing.assert_allclose(average_precisions(*mixed), expected)


@settings(max_examples=40, deadline=None)
@given(images(), st.integers(0, 99))
def test_the_truth_scores_one_and_nothing_scores_zero(pair, seed):
    _, true = pair
    random = np.random.default_rng(seed)
    perfect = [image._replace(scores=random.random(len(image.labels))) for image in true]
    np.testing.assert_allclose(average_precisions(perfect, true), 1)
    assert not average_precisions([NOTHING_FOUND] * len(true), true).to_numpy().any()


@settings(max_examples=60, deadline=None)
@given(images(least=0))
def test_a_higher_threshold_never_helps(pair):
    by_threshold = paper_precisions(*pair)
    assert ((by_threshold >= 0) & (by_threshold <= 1)).all()
    assert (np.diff(by_threshold) <= 1e-12).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(0, 4))
def test_both_rules_agree_on_one_image_of_one_class_found_once(seed, count, false):
    random = np.random.default_rng(seed)
    true = [(1, 0, 20, row) for row in range(count)]
    found = [(1, 0, 15, row) for row in range(random.integers(0, count + 1))]
    found += [(1, 30, 40, row % 4) for row in range(false)]
    predicted = [lesions(*found, scores=random.permutation(len(found)) / 10)]
    paper = paper_precisions(predicted, [lesions(*true)], [0.5])[0, 0]
    # COCO's 101 recalls are steps of a hundredth, so each of the hits can weigh that much more
    assert coco_precisions(predicted, [lesions(*true)], [0.5])[0] == pytest.approx(paper, abs=0.011)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_overlaps_are_those_of_scikit_learn(seed):
    random = np.random.default_rng(seed)
    first, second = random.random((3, 4, 5)) > 0.6, random.random((2, 4, 5)) > 0.6
    first[0] = second[1] = False
    expected = [
        [jaccard_score(b.ravel(), a.ravel(), zero_division=0.0) for b in second] for a in first
    ]
    np.testing.assert_allclose(mask_overlaps(first, second), expected, rtol=1e-6)


@pytest.mark.parametrize("rule", [paper_precisions, coco_precisions])
@pytest.mark.parametrize(
    ("predicted", "true", "message"),
    [
        ([], [ONE], "0 images with predictions, 1 with the truth"),
        ([ONE], [ONE], "image 0: every prediction needs a score"),
        ([NOTHING_FOUND, NOTHING_FOUND], [ONE, ONE._replace(labels=[])], "image 1: every mask"),
        (
            [Lesions(np.zeros((0, 5, 5), bool), np.zeros(0, int), np.zeros(0))],
            [ONE],
            r"predicted masks are \(5, 5\), true ones \(4, 40\)",
        ),
    ],
)
def test_what_does_not_belong_together_is_refused_in_one_sentence(rule, predicted, true, message):
    with pytest.raises(ValueError, match=message):
        rule(predicted, true)
