import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import log_softmax, softmax
from scipy.stats import norm
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression

from lib.classification.scan_diagnosis import (
    TEMPERATURE_RANGE,
    DiagnosisRule,
    check_slice_predictions,
    choice_record,
    choose_rule,
    compared_diagnoses,
    diagnoses_table,
    fit_temperature,
    leave_one_patient_out,
    majority_vote,
    read_slice_predictions,
    scan_probabilities,
    scans_with_class,
    slice_weights,
    temperature_scaled,
    weigh_slices,
)
from lib.evaluation.classification import validate_predictions

CLASSES = ("control", "pneumonia", "covid")
COLUMNS = [f"probability_{name}" for name in CLASSES]
SHARES = (0.1, 0.25, 0.5, 1.0)


def slices_of(**scans):
    """Slice predictions; each scan a list of rows of probabilities."""
    rows = [(name, k, *row) for name, scan in scans.items() for k, row in enumerate(scan)]
    return pd.DataFrame(rows, columns=["scan_id", "slice", *COLUMNS])


def scans_of(labels, split="validation"):
    names = list(labels)
    return pd.DataFrame(
        {
            "scan_id": names,
            "patient_id": [f"patient of {name}" for name in names],
            "split": split,
            "label": list(labels.values()),
        }
    )


def made_study(per_class=5, lesion_share=0.25, seed=0, length=16, noise=0.8, classes=CLASSES):
    """Scans whose diseased ones show their class in some slices only, and their labels."""
    generator = np.random.default_rng(seed)
    scans, labels = {}, {}
    for target, name in enumerate(classes):
        for k in range(per_class):
            logits = noise * generator.normal(size=(length, 3)) + [3.0, 0, 0]
            if target:
                logits[: int(lesion_share * length)] += 5.0 * np.eye(3)[target] - [3.0, 0, 0]
            scans[f"{name}_{k}"] = softmax(logits, axis=1)
            labels[f"{name}_{k}"] = name
    return slices_of(**scans), labels


@st.composite
def made_scans(draw):
    """One to three scans of one to nine slices, with equal slices more often than by chance."""
    scans = {}
    for name in ("a", "b", "c")[: draw(st.integers(1, 3))]:
        counts = draw(arrays(np.int64, (draw(st.integers(1, 9)), 3), elements=st.integers(0, 3)))
        scans[name] = (counts + 1) / (counts + 1).sum(1, keepdims=True)
    return slices_of(**scans)


def test_of_a_few_slices_the_most_suspicious_ones_count():
    weights = slice_weights(np.array([0.1, 0.9, 0.5, 0.7, 0.2]), 0.4)
    assert weights.tolist() == [0, 0.5, 0, 0.5, 0]
    assert slice_weights(np.array([0.3]), 0.1).tolist() == [1]  # one slice counts at least
    assert (slice_weights(np.arange(100) / 100, 0.07) > 0).sum() == 7  # not 8 by rounding


def test_slices_that_tie_share_the_last_places():
    weights = slice_weights(np.array([0.5, 0.9, 0.5, 0.5]), 0.5)
    np.testing.assert_allclose(weights, [1 / 6, 1 / 2, 1 / 6, 1 / 6])


@given(arrays(np.float64, st.integers(1, 30), elements=st.floats(0, 1)), st.floats(0.01, 1))
def test_weights_sum_to_one_and_rise_with_suspicion(suspicion, share):
    weights = slice_weights(suspicion, share)
    assert weights.sum() == pytest.approx(1)
    assert (np.diff(weights[np.argsort(suspicion, kind="stable")]) >= 0).all()
    np.testing.assert_allclose(slice_weights(suspicion, 1.0), 1 / len(suspicion))


@given(made_scans(), st.sampled_from(SHARES), st.randoms())
def test_the_order_of_the_slices_does_not_matter_and_probabilities_sum_to_one(
    slices, share, random
):
    found = scan_probabilities(slices, share)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    order = list(range(len(slices)))
    random.shuffle(order)
    pd.testing.assert_frame_equal(scan_probabilities(slices.iloc[order], share), found)
    pd.testing.assert_frame_equal(majority_vote(slices.iloc[order]), majority_vote(slices))
    assert found.index.tolist() == sorted(set(slices["scan_id"]))
    assert weigh_slices(slices, share).groupby(slices["scan_id"]).sum().to_numpy() == pytest.approx(
        1
    )


@given(
    arrays(np.float64, 3, elements=st.floats(0.01, 1)), st.integers(1, 9), st.sampled_from(SHARES)
)
def test_a_scan_of_equal_slices_has_their_probabilities(row, number, share):
    row = row / row.sum()
    found = scan_probabilities(slices_of(a=[row] * number), share)
    np.testing.assert_allclose(found.loc["a"], row)


def test_all_slices_are_their_mean_and_one_is_the_most_suspicious():
    slices, _ = made_study()
    by_scan = slices.groupby("scan_id")[COLUMNS]
    pd.testing.assert_frame_equal(scan_probabilities(slices, 1.0), by_scan.mean())
    worst = slices.loc[slices.groupby("scan_id")["probability_control"].idxmin()]
    pd.testing.assert_frame_equal(
        scan_probabilities(slices, 0.01), worst.set_index("scan_id")[COLUMNS]
    )


def test_without_a_healthy_class_all_slices_count():
    slices = slices_of(a=[[0.9, 0.1, 0.0], [0.3, 0.7, 0.0]]).drop(columns="probability_control")
    slices[["probability_pneumonia", "probability_covid"]] = [[0.9, 0.1], [0.3, 0.7]]
    np.testing.assert_allclose(scan_probabilities(slices, 0.1).loc["a"], [0.6, 0.4])


def test_votes_are_shares_of_slices_and_a_tie_is_of_the_first_class():
    slices = slices_of(a=[[0.5, 0, 0.5], [0.1, 0.2, 0.7], [0.1, 0.3, 0.6], [0, 1, 0]])
    assert majority_vote(slices).loc["a"].tolist() == [0.25, 0.25, 0.5]


PROBABILITIES = arrays(np.float64, (6, 3), elements=st.floats(1e-3, 1)).map(
    lambda rows: rows / rows.sum(1, keepdims=True)
)


@given(PROBABILITIES, st.floats(*TEMPERATURE_RANGE))
def test_temperature_keeps_the_order_of_classes(rows, temperature):
    scaled = temperature_scaled(rows, temperature)
    np.testing.assert_allclose(scaled.sum(1), 1)
    ranked = np.take_along_axis(scaled, rows.argsort(1), axis=1)
    assert (np.diff(ranked, axis=1) >= -1e-12).all()
    np.testing.assert_allclose(temperature_scaled(rows, 1.0), rows, atol=1e-9)


def targets_and_rows(number=40, sharpness=4.0, seed=0):
    """Probabilities that are too sure by a known factor."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(number, 3))
    chances = softmax(logits, axis=1)
    targets = np.array([generator.choice(3, p=row) for row in chances])
    return targets, softmax(sharpness * logits, axis=1)


def test_temperature_finds_how_much_too_sure_probabilities_are():
    targets, rows = targets_and_rows(4000, sharpness=3.0)
    assert fit_temperature(rows, targets, spread=0.5) == pytest.approx(3.0, rel=0.1)


def test_temperature_is_the_most_probable_of_all():
    targets, rows = targets_and_rows()
    grid = np.exp(np.linspace(*np.log(TEMPERATURE_RANGE), 2001))
    true = np.arange(len(rows)), targets
    likely = [
        log_softmax(np.log(rows) / t, axis=1)[true].sum() + norm.logpdf(np.log(t), 0, 0.5)
        for t in grid
    ]
    expected = grid[np.argmax(likely)]
    assert fit_temperature(rows, targets, spread=0.5) == pytest.approx(expected, rel=3e-3)


def test_temperature_without_a_spread_is_that_of_scikit_learn():
    targets, rows = targets_and_rows()
    network = LogisticRegression().fit(np.eye(3), np.arange(3))
    network.coef_, network.intercept_ = np.eye(3), np.zeros(3)  # passes on what it is given
    everything = [(np.arange(len(rows)), np.arange(len(rows)))]
    scaler = CalibratedClassifierCV(
        FrozenEstimator(network), method="temperature", ensemble=False, cv=everything
    ).fit(np.log(rows), targets)
    ours = temperature_scaled(rows, fit_temperature(rows, targets, spread=np.inf))
    np.testing.assert_allclose(ours, scaler.predict_proba(np.log(rows)), atol=1e-4)


def test_scans_that_are_all_right_do_not_give_certainty_but_more_of_them_give_more():
    rows = np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]])
    found = [
        fit_temperature(np.tile(rows, (times, 1)), np.tile([0, 1, 2], times), spread=0.5)
        for times in (1, 5, 100)
    ]
    assert TEMPERATURE_RANGE[0] < found[2] < found[1] < found[0] < 1
    assert found[1] > 0.4


@pytest.mark.parametrize(("sharpness", "cost"), [(0.5, 0.0), (1.0, 0.0), (2.0, 0.03)])
def test_with_few_scans_a_spread_judges_others_better_than_none_or_hardly_worse(sharpness, cost):
    losses = {0.5: [], np.inf: []}
    for seed in range(30):
        targets, rows = targets_and_rows(115, sharpness=sharpness, seed=seed)
        for spread, found in losses.items():
            temperature = fit_temperature(rows[:15], targets[:15], spread=spread)
            scaled = temperature_scaled(rows[15:], temperature)
            found.append(-np.log(scaled[np.arange(100), targets[15:]]).mean())
    assert np.mean(losses[0.5]) < np.mean(losses[np.inf]) + cost


@pytest.mark.parametrize("sharpness", [0.5, 4.0])
def test_a_spread_holds_the_temperature_near_one(sharpness):
    targets, rows = targets_and_rows(sharpness=sharpness)
    far = [abs(np.log(fit_temperature(rows, targets, spread=s))) for s in (1e-3, 0.3, 1, np.inf)]
    assert far == sorted(far) and far[0] < 0.01 < far[1]


def test_temperature_of_one_class_and_of_an_absent_class_is_defined():
    targets, rows = targets_and_rows()
    for kept in (targets == 1, targets != 1):
        temperature = fit_temperature(rows[kept], targets[kept], spread=0.5)
        assert TEMPERATURE_RANGE[0] <= temperature <= TEMPERATURE_RANGE[1]


def test_a_patient_is_judged_by_the_temperature_of_the_others():
    targets, rows = targets_and_rows(12)
    patients = np.repeat(np.arange(4), 3)
    scaled = leave_one_patient_out(rows, targets, patients, spread=0.5)
    own = patients == 2
    expected = temperature_scaled(rows[own], fit_temperature(rows[~own], targets[~own], spread=0.5))
    np.testing.assert_array_equal(scaled[own], expected)
    changed = leave_one_patient_out(
        rows, np.where(own, (targets + 1) % 3, targets), patients, spread=0.5
    )
    np.testing.assert_array_equal(changed[own], expected)  # its own truth does not matter


@pytest.mark.parametrize(("lesion_share", "expected"), [(0.25, {0.25, 0.5}), (1.0, {1.0})])
def test_the_share_chosen_is_about_that_of_slices_with_lesions(lesion_share, expected):
    slices, labels = made_study(lesion_share=lesion_share, noise=1.5)
    choice = choose_rule(slices, scans_of(labels), shares=SHARES, spread=0.5)
    assert choice.rule.share in expected
    assert choice.losses.index.tolist() == list(SHARES)
    assert choice.losses["left_out"].idxmin() == choice.rule.share
    assert choice.losses.notna().all(axis=None)
    record = json.loads(json.dumps(choice_record(choice), allow_nan=False))
    assert record["share"] == choice.rule.share
    assert [row["share"] for row in record["log_losses"]] == list(SHARES)


def test_the_choice_does_not_depend_on_order_or_on_other_scans():
    slices, labels = made_study()
    scans = scans_of(labels)
    choice = choose_rule(slices, scans, shares=SHARES, spread=0.5)
    others, _ = made_study(seed=1)
    others["scan_id"] = "other " + others["scan_id"]
    more = pd.concat([others, slices]).sample(frac=1, random_state=0, ignore_index=True)
    again = choose_rule(more, scans.sample(frac=1, random_state=1), shares=SHARES[::-1], spread=0.5)
    assert again.rule.share == choice.rule.share
    assert again.rule.temperature == pytest.approx(choice.rule.temperature, rel=1e-4)


def test_of_equally_good_shares_the_largest_is_taken():
    slices, labels = made_study()
    equal = slices.assign(**slices.groupby("scan_id")[COLUMNS].transform("mean"))
    assert choose_rule(equal, scans_of(labels), shares=SHARES, spread=0.5).rule.share == 1.0


def test_the_rule_is_better_than_the_mean_of_all_slices_and_the_vote():
    slices, labels = made_study()
    rule = choose_rule(slices, scans_of(labels), shares=SHARES, spread=0.5).rule
    test_slices, test_labels = made_study(seed=1, per_class=20)
    ways = compared_diagnoses(test_slices, scans_of(test_labels, "test"), rule)
    right = {
        name: (table[COLUMNS].to_numpy().argmax(1) == table["label"].map(CLASSES.index)).mean()
        for name, table in ways.items()
    }
    assert right["vote of slices"] < 0.5 and right["mean of all slices"] < 0.6
    assert right["calibrated"] == right["most suspicious slices"] > 0.95
    for table in ways.values():
        validate_predictions(table)


def test_a_class_that_validation_lacks_can_still_be_diagnosed():
    slices, labels = made_study()
    scans = scans_of(labels)
    rule = choose_rule(slices, scans[scans["label"] != "pneumonia"], shares=SHARES, spread=0.5).rule
    found = diagnoses_table(slices, scans, rule)
    pneumonia = found[found["label"] == "pneumonia"]
    assert (pneumonia[COLUMNS].idxmax(axis=1) == "probability_pneumonia").all()


@pytest.mark.parametrize("column", ["label", "patient_id"])
def test_one_class_or_one_patient_gives_the_mean_of_all_slices(column):
    slices, labels = made_study()
    scans = scans_of(labels)
    choice = choose_rule(
        slices, scans[scans[column] == scans[column].iloc[0]], shares=SHARES, spread=0.5
    )
    assert choice.rule == DiagnosisRule(share=1.0, temperature=1.0)
    assert "nothing can be chosen" in choice.reason
    assert choice.losses["left_out"].isna().all() and choice.losses["uncalibrated"].notna().all()
    text = json.dumps(choice_record(choice), allow_nan=False)
    assert json.loads(text)["log_losses"][0]["left_out"] is None


def test_scans_of_one_slice_are_judged_as_their_slice():
    slices, labels = made_study(length=1, lesion_share=1.0)
    choice = choose_rule(slices, scans_of(labels), shares=SHARES, spread=0.5)
    assert choice.rule.share == 1.0  # all shares are the same one slice
    found = diagnoses_table(slices, scans_of(labels), DiagnosisRule(0.1))
    np.testing.assert_allclose(found[COLUMNS], slices[COLUMNS], atol=3e-6)


def test_diagnoses_are_a_predictions_table_in_the_order_of_the_scans():
    slices, labels = made_study()
    scans = scans_of(labels, "test").iloc[::-1]
    found = diagnoses_table(slices, scans, DiagnosisRule(0.25, 2.0))
    validate_predictions(found)
    assert found.columns.tolist() == ["scan_id", "split", "label", *COLUMNS]
    assert found["scan_id"].tolist() == scans["scan_id"].tolist()
    expected = scan_probabilities(slices, 0.25).loc[scans["scan_id"]].to_numpy() ** 0.5
    np.testing.assert_allclose(found[COLUMNS], expected / expected.sum(1, keepdims=True))


def test_labels_of_the_manifest_become_classes_and_others_are_left_out():
    manifest = scans_of({"a": "non-covid", "b": "covid", "c": None, "d": "pneumonia"})
    scans = scans_with_class(manifest, {"control": ["normal", "non-covid"], "covid": ["covid"]})
    assert scans[["scan_id", "label"]].to_numpy().tolist() == [["a", "control"], ["b", "covid"]]


def test_names_of_digits_stay_names(tmp_path):
    slices = slices_of(**{"007": [[0.2, 0.3, 0.5]]})
    slices.to_csv(tmp_path / "run.csv", index=False)
    pd.testing.assert_frame_equal(read_slice_predictions(tmp_path / "run.csv"), slices)
    slices.assign(probability_covid=0.9).to_csv(tmp_path / "run.csv", index=False)
    with pytest.raises(ValueError, match=r"run.csv: 1 of 1 slices have probabilities that do not"):
        read_slice_predictions(tmp_path / "run.csv")


GOOD = slices_of(a=[[0.2, 0.3, 0.5], [0.2, 0.3, 0.5]])


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        (GOOD.drop(columns="slice"), "slice predictions lack the column slice"),
        (GOOD[["scan_id", "slice", "probability_covid"]], "need two columns probability_<class>"),
        (GOOD[:0], "slice predictions hold no row"),
        (GOOD.assign(slice=0), "1 of 2 slices occur twice, first slice 0 of scan a"),
        (GOOD.assign(probability_covid=1.5), r"2 of 2 slices have a probability outside \[0, 1\]"),
        (GOOD.assign(probability_covid=np.nan), r"have a probability outside \[0, 1\]"),
        (GOOD.assign(probability_covid=0.6), "2 of 2 slices have probabilities that do not sum"),
    ],
)
def test_slices_that_cannot_be_put_together_are_told(slices, message):
    with pytest.raises(ValueError, match=message):
        check_slice_predictions(slices)


@pytest.mark.parametrize(
    ("scans", "shares", "message"),
    [
        (scans_of({"a": "covid"}), [], "there is no share of slices to choose from"),
        (scans_of({"a": "covid"}), [0.0], "the share of slices is above 0 and at most 1, got 0.0"),
        (scans_of({"a": "covid"}, "test"), SHARES, "chosen on the validation part only, got test"),
        (scans_of({"a": "flu"}), SHARES, "flu is none of the classes control, pneumonia, covid"),
        (
            scans_of({"a": "covid", "b": "covid"}),
            SHARES,
            "1 scans have no predicted slice, first b",
        ),
        (scans_of({"a": "covid"})[:0], SHARES, "there is no scan with a class to diagnose"),
    ],
)
def test_scans_that_cannot_be_judged_are_told(scans, shares, message):
    with pytest.raises(ValueError, match=message):
        choose_rule(GOOD, scans, shares=shares, spread=0.5)


def test_a_scan_without_slices_and_a_temperature_without_scans_are_told():
    with pytest.raises(ValueError, match="a scan without a slice has no diagnosis"):
        slice_weights(np.array([]), 0.5)
    with pytest.raises(ValueError, match="a temperature needs scans to be fitted on"):
        fit_temperature(np.zeros((0, 3)), np.array([], int), spread=0.5)
    with pytest.raises(ValueError, match="the spread of the temperature is above 0, got 0"):
        fit_temperature(np.full((1, 3), 1 / 3), np.array([0]), spread=0)


@settings(max_examples=20)
@given(made_scans(), st.sampled_from(SHARES), st.floats(0.1, 10))
def test_diagnoses_of_any_slices_can_be_scored(slices, share, temperature):
    names = sorted(set(slices["scan_id"]))
    scans = scans_of(dict(zip(names, CLASSES, strict=False)), "test")
    validate_predictions(diagnoses_table(slices, scans, DiagnosisRule(share, temperature)))
