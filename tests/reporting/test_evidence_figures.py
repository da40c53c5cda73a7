"""Tests of lib/reporting/evidence_figures.py: what is drawn, read back; which cases are chosen."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from lib.data.files import save_csv
from lib.data.store import save_volume
from lib.evaluation.attention import attention_table
from lib.evaluation.evidence import Evidence, evidence_tables
from lib.reporting.evidence_figures import (
    attention_figure,
    cnn_bert_figures,
    evidence_cases,
    evidence_figure,
)

NAMES = ["a", "b", "c", "d"]
MANIFEST = pd.DataFrame(
    {
        "scan_id": NAMES,
        "patient_id": NAMES,
        "label": ["covid", "covid", "normal", "pneumonia"],
        "split": "test",
    }
)
RUN = "cnn_bert_x_seed0"


def evidence(name, hits):
    """Lesions in slices 10 to 13 of eight; as many of these as said have more attribution."""
    lesions, network = np.zeros((8, 6, 6), np.float32), np.ones((8, 6, 6), np.float32)
    lesions[2:6, 1:4, 1:4] = 1
    network[2 : 2 + hits, 2, 2] = 30
    network[2, 2, 2] = 31
    lungs, grey = np.ones((8, 6, 6), np.float32), np.full((8, 6, 6), 90, np.uint8)
    return Evidence(name, np.arange(8, 16), grey, lungs, lesions, network, lungs, 1.0)


def save_evidence(folder, found):
    tables = evidence_tables(found, MANIFEST, examples=folder / "examples", seed=0)
    for name, table in tables.items():
        save_csv(table, folder / f"{name}.csv")
    return tables


@pytest.fixture
def data(tmp_path):
    """Attention and evidence of a run, and a scan for figure 1."""
    for folder in ("prepared/set/scans", "segmented/set/unet", "segmented/set/unet_refined"):
        (tmp_path / folder).mkdir(parents=True)
        for name in NAMES:
            save_volume(tmp_path / folder / f"{name}.b2nd", np.ones((2, 32, 32), np.uint8))
    embeddings = tmp_path / "embeddings/set" / RUN
    embeddings.mkdir(parents=True)
    for k, name in enumerate(NAMES):
        weights = np.array([[[0.1, 0.2, 0.7], [0.5, 0.5 - k / 10, k / 10]]], np.float32)
        tensors = {"attention": weights, "positions": np.zeros((1, 4), np.int64)}
        save_file(tensors, embeddings / f"{name}.safetensors")
    found = [("a", evidence("a", 4)), ("b", evidence("b", 1)), ("c", None), ("d", evidence("d", 2))]
    save_evidence(tmp_path / "scores/set" / f"evidence_{RUN}", found)
    return tmp_path


def bar_heights(axis):
    return [[bar.get_height() for bar in bars] for bars in axis.containers]


def test_cases_are_the_highest_median_and_lowest_area_with_their_fullest_slice(data):
    cases = evidence_cases(data / "scores/set" / f"evidence_{RUN}")
    titles = [case.title for case in cases]
    assert [title.split(" ")[0] for title in titles] == ["highest", "median", "lowest"]
    assert titles[0] == "highest AUC 1.00: a (covid)" and titles[1].endswith("d (pneumonia)")
    assert all(case.number == 10 and case.attribution.max() == 31 for case in cases)


def test_without_slices_free_of_lesions_the_correlation_chooses(tmp_path):
    everywhere = np.ones((8, 6, 6), np.float32) * np.arange(1, 9)[:, None, None] / 8
    save_evidence(tmp_path, [("a", replace(evidence("a", 4), lesions=everywhere))])
    (case,) = evidence_cases(tmp_path)
    assert case.title.startswith("highest correlation")


def test_bars_are_the_shares_of_the_slices(data):
    folder = data / "scores/set" / f"evidence_{RUN}"
    summary = pd.read_csv(folder / "summary.csv")
    cases = evidence_cases(folder)
    figure = evidence_figure(cases, summary)
    assert len(figure.axes) == 3 * 2 + 3
    attribution, lesions = bar_heights(figure.axes[0])
    np.testing.assert_allclose(lesions, [0, 0, 25, 25, 25, 25, 0, 0])
    np.testing.assert_allclose(attribution, 100 * cases[0].profile["network"])
    assert sum(attribution) == pytest.approx(100)
    assert [axis.get_xlabel()[:7] for axis in figure.axes[6:]] == ["ROC AUC", "Spearma", "Share i"]
    points = [line.get_xdata()[0] for line in figure.axes[6].lines if line.get_marker() == "o"]
    expected = summary[summary["measure"] == "roc_auc"]["value"][:3]
    np.testing.assert_allclose(points, expected)


def test_the_overlay_is_strongest_where_the_attribution_is(data):
    folder = data / "scores/set" / f"evidence_{RUN}"
    case = evidence_cases(folder)[0]
    picture = evidence_figure([case], pd.read_csv(folder / "summary.csv"))
    grey, red = picture.axes[1].images
    np.testing.assert_array_equal(grey.get_array(), case.grey)
    opacity = np.asarray(red.get_array())[..., 3]
    assert np.unravel_index(opacity.argmax(), opacity.shape) == (2, 2)
    assert picture.axes[1].get_title() == "slice 10"


def test_attention_by_class_and_head(data):
    table = attention_table(data / "embeddings/set" / RUN, MANIFEST, positive=["covid"])
    figure = attention_figure(table, seed=0)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["Mean of all heads", "Head 1", "Head 2"]
    tokens = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert tokens == ["class\ntoken", "1\N{EN DASH}2", "3\N{EN DASH}4"]
    points = [
        line.get_ydata(orig=False) for line in figure.axes[2].lines if line.get_marker() == "o"
    ]
    np.testing.assert_allclose(points, [[0.5, 0.45, 0.05], [0.5, 0.25, 0.25]], atol=1e-6)
    assert [t.get_text() for t in figure.legends[0].get_texts()] == [
        "COVID-19 (n = 2)", "no COVID-19 (n = 2)",
    ]  # fmt: skip


def test_no_attention_is_cut_off_whichever_head_has_most(data):
    table = attention_table(data / "embeddings/set" / RUN, MANIFEST, positive=["covid"])
    tokens = table.columns[table.dtypes == np.float64]
    for head in (1, 2):
        uneven = table.copy()
        uneven.loc[table["head"] != head, tokens] /= 3
        for axis in attention_figure(uneven, seed=0).axes:
            shown = np.concatenate([line.get_ydata() for line in axis.lines])
            assert axis.get_ylim()[0] == 0 and axis.get_ylim()[1] > shown.max()


def test_nothing_to_show_is_said():
    with pytest.raises(ValueError, match="needs a scan with attention"):
        attention_figure(pd.DataFrame(), seed=0)
    with pytest.raises(ValueError, match="needs a scan with lesions"):
        evidence_figure([], pd.DataFrame())


def test_a_data_set_has_the_figures_that_it_has_the_files_for(data):
    arguments = {"positive": ["covid"], "seed": 0}
    figures = cnn_bert_figures(data, "set", RUN, MANIFEST, **arguments)
    assert list(figures) == ["figure1", "attention", "evidence"]
    assert figures["evidence"].get_suptitle() == f"set: {RUN}"
    assert list(cnn_bert_figures(data, "set", "other", MANIFEST, **arguments)) == ["figure1"]
    save_evidence(data / "scores/set/evidence_other", [("c", None)])
    assert list(cnn_bert_figures(data, "set", "other", MANIFEST, **arguments)) == ["figure1"]
