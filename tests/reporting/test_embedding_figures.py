import numpy as np
import pytest
from sklearn.decomposition import PCA

from lib.reporting.embedding_figures import embedding_rows, pooled_embeddings

LABELS = ["normal", "covid", "normal"]


def test_sets_stand_below_one_another_classes_together():
    features = np.random.default_rng(0).normal(2, 3, (5, 4))
    features[:, 3] = 1  # a feature that never changes
    figure = embedding_rows([features[:2], features[2:3], features[3:]], LABELS)
    axis = figure.axes[0]
    shown = np.asarray(axis.images[0].get_array())
    ordered = features[[2, 0, 1, 3, 4]]  # covid first
    expected = (ordered - ordered.mean(0)) / np.where(ordered.std(0) > 0, ordered.std(0), 1)
    np.testing.assert_allclose(shown, expected)
    assert [label.get_text() for label in axis.get_yticklabels()] == ["covid", "normal"]
    assert axis.get_yticks().tolist() == [0, 2.5]  # the middle of one row and of four
    assert [line.get_ydata()[0] for line in axis.lines] == [0.5]


def test_scans_lie_where_the_components_of_the_training_part_put_them():
    features = np.random.default_rng(1).normal(size=(9, 5))
    splits = ["train"] * 5 + ["validation"] * 2 + ["test"] * 2
    figure = pooled_embeddings(features, 3 * LABELS, splits)
    axis = figure.axes[0]
    components = PCA(2).fit(features[:5])
    found = np.sort(axis.collections[0].get_offsets(), axis=0)
    np.testing.assert_allclose(found, np.sort(components.transform(features), axis=0))
    share = components.explained_variance_ratio_[0]
    assert axis.get_xlabel() == f"component 1: {share:.0%}"
    named = {text.get_text() for text in axis.get_legend().get_texts()}
    assert {"covid", "normal", "train", "validation", "test"} <= named


@pytest.mark.parametrize("sets", [1, 2])
def test_one_class_has_no_line(sets):
    assert not embedding_rows([np.ones((sets, 3))], ["covid"]).axes[0].lines
