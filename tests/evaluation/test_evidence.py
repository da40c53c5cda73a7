"""Tests of lib/evaluation/evidence.py: measures against references, controls, what is left out."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from lib.data.files import save_csv
from lib.evaluation.evidence import (
    ATTRIBUTIONS,
    MEASURES,
    Evidence,
    evidence_row,
    evidence_scores,
    evidence_tables,
    read_evidence,
    read_example,
    save_example,
    slice_profile,
    summarise_evidence,
)

SHAPE = (6, 4, 5)
pixels = hnp.arrays(np.float32, SHAPE, elements=st.sampled_from([0.0, 0.25, 0.5, 1.0]))


def made(scan_id="a", *, seed=0, pointing=True, **changed):
    """Lungs in all slices, a lesion in slices 2 and 3; the network sees it or only noise."""
    generator = np.random.default_rng(seed)
    lungs, lesions = np.zeros(SHAPE, np.float32), np.zeros(SHAPE, np.float32)
    lungs[:, 1:3, 1:4] = 1
    lesions[2:4, 1, 1:3] = 1
    lesions[3, 2, 1] = 0.5
    noise = generator.normal(size=(2, *SHAPE)).astype(np.float32)
    network = noise[0] * (0.01 + lesions) if pointing else noise[0]
    parts = {
        "slices": np.arange(10, 16),
        "grey": np.zeros(SHAPE, np.uint8),
        "lungs": lungs,
        "lesions": lesions,
        "network": network,
        "random_weights": noise[1],
        "output_change": float(network.sum(dtype=np.float64)),
    }
    return Evidence(scan_id, **(parts | changed))


@settings(max_examples=60, deadline=None)
@given(pixels, pixels)
def test_measures_are_those_of_scikit_learn_and_scipy(attribution, lesions):
    scores = evidence_scores(attribution, lesions)
    per_slice, area = attribution.mean((1, 2)), lesions.mean((1, 2))
    if not area.any():
        assert np.isnan(list(scores.values())).all()
        return
    if (area > 0).all():
        assert np.isnan(scores["roc_auc"])
    else:
        assert scores["roc_auc"] == pytest.approx(roc_auc_score(area > 0, per_slice))
    if np.ptp(area) == 0 or np.ptp(per_slice) == 0:
        assert np.isnan(scores["spearman"])
    else:
        assert scores["spearman"] == pytest.approx(spearmanr(per_slice, area).statistic)
    if attribution.any():
        expected = np.sum([a * b for a, b in zip(attribution.flat, lesions.flat, strict=True)])
        assert scores["lesion_share"] == pytest.approx(expected / attribution.sum(), rel=1e-5)
    else:
        assert np.isnan(scores["lesion_share"])


def test_perfect_and_opposite_attribution():
    lesions = made().lesions
    assert evidence_scores(lesions, lesions)["roc_auc"] == 1
    assert evidence_scores(lesions, lesions)["spearman"] == pytest.approx(1)
    opposite = evidence_scores(1 - lesions, lesions)
    assert opposite["roc_auc"] == 0 and opposite["spearman"] == pytest.approx(-1)


def test_following_the_lungs_has_the_lesions_share_of_the_lung():
    evidence = made()
    assert evidence_row(evidence)["lesion_share_lung_area"] == pytest.approx(4.5 / 36)
    assert evidence_row(evidence)["roc_auc_lung_area"] == 0.5  # as much lung in every slice


@pytest.mark.parametrize(
    ("attribution", "message"),
    [
        (np.ones((6, 4, 4)), r"differ in shape: \(6, 4, 4\) and \(6, 4, 5\)"),
        (-np.ones(SHAPE), "an attribution is negative"),
    ],
)
def test_bad_attribution_is_named(attribution, message):
    with pytest.raises(ValueError, match=message):
        evidence_scores(attribution, np.ones(SHAPE))


def test_parts_of_another_shape_are_named():
    with pytest.raises(ValueError, match=r"a: lesions has shape \(6, 4, 4\), expected \(6, 4, 5\)"):
        made(lesions=np.zeros((6, 4, 4)))
    with pytest.raises(ValueError, match=r"a: grey has shape \(6, 4, 5\), expected \(5, 4, 5\)"):
        made(slices=np.arange(5))


def test_a_row_holds_network_and_controls_by_absolute_attribution():
    row = evidence_row(made())
    assert row["roc_auc_network"] == 1 and row["slices"] == 6 and row["slices_with_lesion"] == 2
    assert row["unexplained"] == pytest.approx(0, abs=1e-6)
    changed = evidence_row(made(network=-made().network, output_change=2.0))
    assert {k: changed[k] for k in row if "_network" in k} == {
        k: row[k] for k in row if "_network" in k
    }
    assert changed["unexplained"] == pytest.approx(abs(-made().network.sum() - 2) / 2, rel=1e-5)
    same = evidence_row(made(random_weights=2 * made().network))
    assert same["similarity_random_weights"] == pytest.approx(1)


@pytest.fixture
def table(tmp_path):
    """Eight scans of four patients, one of them without lesions."""
    names = [f"scan_{k}" for k in range(8)]
    manifest = pd.DataFrame(
        {"scan_id": names, "patient_id": [f"p{k // 2}" for k in range(8)], "label": "covid"}
    )
    lungs = made().lungs * np.linspace(0.5, 1, 6, dtype=np.float32)[:, None, None]
    found = [(name, made(name, seed=k, lungs=lungs)) for k, name in enumerate(names[:-1])]
    found = [*found, (names[-1], None)]
    return evidence_tables(found, manifest, examples=tmp_path, seed=0)["evidence"]


def test_scans_without_lesions_are_counted_and_left_out(table):
    assert table["slices_with_lesion"].tolist() == [2] * 7 + [0]
    assert table.iloc[-1][[f"{m}_{a}" for m in MEASURES for a in ATTRIBUTIONS]].isna().all()
    summary = summarise_evidence(table, seed=0)
    assert (summary["measured"] == 7).all() and (summary["without_lesion"] == 1).all()
    means = summary.set_index(["measure", "attribution"])["value"]
    for measure in MEASURES:
        for name in ATTRIBUTIONS:
            assert means[measure, name] == pytest.approx(table[f"{measure}_{name}"][:7].mean())
        assert means[measure, "network - lung_area"] == pytest.approx(
            means[measure, "network"] - means[measure, "lung_area"]
        )
    assert means["similarity", "network, random_weights"] == pytest.approx(
        table["similarity_random_weights"].mean()
    )


def test_intervals_enclose_the_mean_and_patients_are_what_is_drawn(table):
    summary = summarise_evidence(table, seed=0)
    spread = summary.dropna(subset="low")  # without where all resamples agree
    assert len(spread) and (spread["low"] <= spread["value"] + 1e-12).all()
    assert (spread["value"] <= spread["high"] + 1e-12).all()
    pd.testing.assert_frame_equal(summary, summarise_evidence(table, seed=0))
    one_patient = summarise_evidence(table.assign(patient_id="p"), seed=0)
    assert one_patient[["low", "high"]].isna().all(axis=None)


def test_a_scan_whose_every_slice_holds_lesion_is_undefined_for_the_area_alone(tmp_path):
    everywhere = made("b", lesions=made().lungs * np.arange(1, 7)[:, None, None] / 6)
    manifest = pd.DataFrame({"scan_id": ["a", "b"], "patient_id": ["p", "q"], "label": "covid"})
    found = [("a", made()), ("b", everywhere)]
    tables = evidence_tables(found, manifest, examples=tmp_path, seed=0)
    summary = tables["summary"].set_index(["measure", "attribution"])
    assert summary.loc[("roc_auc", "network"), ["measured", "undefined"]].tolist() == [1, 1]
    assert summary.loc[("lesion_share", "network"), ["measured", "undefined"]].tolist() == [2, 0]
    for label, rows in tables["by_label"].groupby("label"):
        own = tables["evidence"][tables["evidence"]["label"] == label]
        share = rows.set_index(["measure", "attribution"]).loc[("lesion_share", "network")]
        assert share["value"] == pytest.approx(own["lesion_share_network"].mean())
    assert tables["slices"].groupby("scan_id").size().to_dict() == {"a": 6, "b": 6}
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("found", [[("a", None)], []])
def test_without_any_lesion_there_are_tables_but_no_mean(found, tmp_path):
    manifest = pd.DataFrame({"scan_id": ["a"], "patient_id": ["p"], "label": ["normal"]})
    tables = evidence_tables(found, manifest, examples=tmp_path / "examples", seed=0)
    for name, table in tables.items():
        save_csv(table, tmp_path / f"{name}.csv")
    read = read_evidence(tmp_path)
    assert [len(read[name]) for name in read] == [len(found), 0, 0, 0]
    assert all(list(read[name]) == list(tables[name]) for name in read)


def test_a_profile_holds_shares_of_the_scan():
    profile = slice_profile(made())
    assert profile["slice"].tolist() == [10, 11, 12, 13, 14, 15]
    np.testing.assert_allclose(profile[["lesion_area", *ATTRIBUTIONS]].sum(), 1)
    np.testing.assert_allclose(profile["lesion_area"], [0, 0, 2 / 4.5, 2.5 / 4.5, 0, 0])
    nothing = slice_profile(made(random_weights=np.zeros(SHAPE, np.float32)))
    assert nothing["random_weights"].isna().all()


def test_the_slice_with_the_most_attribution_is_kept(tmp_path):
    evidence = made(network=-made().lesions)
    save_example(evidence, tmp_path / "examples" / "a.safetensors")
    example = read_example(tmp_path / "examples" / "a.safetensors")
    assert example["slice"].tolist() == [13]
    np.testing.assert_array_equal(example["attribution"], evidence.lesions[3])
    np.testing.assert_array_equal(example["lesions"], evidence.lesions[3])
    assert example["grey"].dtype == np.uint8
