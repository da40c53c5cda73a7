"""Tests of lib/reporting/tables.py."""

import numpy as np
import pandas as pd
import pytest

from lib.evaluation.classification import classification_scores, probability_matrix
from lib.evaluation.statistics import holm_adjusted
from lib.reporting.published import published_values
from lib.reporting.tables import (
    CLAIM_METRICS,
    LUNG_PARTS,
    PAIRED_METRICS,
    PART_METRICS,
    SystemRun,
    classification_table,
    data_table,
    expected_runs,
    heading,
    metrics_by_run,
    printable,
    publish_table,
    read_runs,
    read_score_tables,
    segmentation_by_class_table,
    segmentation_claim_table,
    segmentation_paired_table,
    segmentation_table,
    segmentation_tables,
    write_table,
)

COLUMNS = ("macro_f1", "f1_covid", "roc_auc")
RACNET = SystemRun("RACNet", "none", "phantom")
MDAP = SystemRun("MDAP", "sam2clip2sam", "phantom")
UNPUBLISHED = SystemRun("RACNet", "reference", "phantom")


def make_predictions(rows=20):
    generator = np.random.default_rng(0)
    is_covid = np.arange(rows) % 2 == 0
    covid = np.clip(generator.normal(0.4 + 0.2 * is_covid, 0.2), 0, 1)
    return pd.DataFrame(
        {
            "scan_id": [f"scan-{number}" for number in range(rows)],
            "patient_id": np.arange(rows) // 2,
            "split": np.where(np.arange(rows) < 4, "validation", "test"),
            "label": np.where(is_covid, "covid", "non_covid"),
            "probability_covid": covid,
            "probability_non_covid": 1 - covid,
        }
    )


def make_table(predictions, **options):
    options = {"positive": "covid", "columns": COLUMNS, "seed": 0, "repetitions": 50} | options
    return classification_table(predictions, published_values("sam2clip2sam", "Table 1"), **options)


def make_scores(method="unet", rows=12):
    generator = np.random.default_rng(1)
    measured = {
        column.format(part=part): generator.uniform(0.5, 1, rows)
        for column in PART_METRICS.values()
        for part in LUNG_PARTS
    }
    return pd.DataFrame(
        {
            "data_set": "phantom",
            "method": method,
            "scan_id": [f"scan-{number}" for number in range(rows)],
            "patient_id": np.arange(rows) // 2,
            "split": np.where(np.arange(rows) < 2, "train", "test"),
            "label": "covid",
            **measured,
            "empty": np.arange(rows) == 2,
            "lung_missing": False,
            "leak": np.arange(rows) >= 7,
        }
    )


MANIFEST = pd.DataFrame(
    {
        "scan_id": list("abcdef"),
        "patient_id": list("uuvwxy"),
        "split": ["train"] * 3 + ["validation"] + ["test"] * 2,
        "label": ["covid", "covid", "non_covid", None, "covid", "normal"],
        "slices": [10, 20, 30, 40, 1, 2],
    }
)


def test_data_table_counts_per_split_and_in_all():
    table = data_table({"phantom": MANIFEST, "mosmed": MANIFEST[:2]}, {"phantom": 3})
    rows = table.set_index(["data_set", "split"])
    assert [split for name, split in rows.index if name == "phantom"] == [
        "train",
        "validation",
        "test",
        "all",
    ]
    assert [split for name, split in rows.index if name == "mosmed"] == ["train", "all"]
    train = rows.loc[("phantom", "train")]
    assert (train["patients"], train["scans"], train["slices"]) == (2, 3, 60)
    assert (train["slices_fewest"], train["slices_median"], train["slices_most"]) == (10, 20, 30)
    assert (train["label: covid"], train["label: non_covid"], train["label: normal"]) == (2, 1, 0)
    assert pd.isna(train["quarantined"])
    assert rows.loc[("phantom", "validation"), "label: unlabelled"] == 1
    assert rows.loc[("phantom", "all"), "scans"] == 6
    assert rows.loc[("phantom", "all"), "quarantined"] == 3
    assert rows.loc[("mosmed", "all"), "quarantined"] == 0


def test_segmentation_table_averages_the_test_split_per_part():
    scores = make_scores()
    scores.loc[5, "hd95_both"] = np.inf
    table = segmentation_table(scores, seed=0, repetitions=50)
    assert table["part"].tolist() == list(LUNG_PARTS)
    rows, tested = table.set_index("part"), scores[scores["split"] == "test"]
    assert (rows["n"] == 10).all()
    assert (rows["patients"] == 5).all()
    assert rows.at["left", "dice"] == pytest.approx(tested["dice_left"].mean())
    assert rows.at["both", "hd95"] == pytest.approx(tested["hd95_both"].drop(5).mean())
    assert rows["distances_n"].to_dict() == {"right": 10, "left": 10, "both": 9}
    assert rows.at["both", "empty_rate"] == pytest.approx(0.1)
    assert rows.at["both", "leak_rate"] == pytest.approx(0.5)
    assert rows.loc[["right", "left"], "leak_rate"].isna().all()
    assert (rows["dice_low"] < rows["dice"]).all()
    assert (rows["dice"] < rows["dice_high"]).all()


def test_segmentation_table_can_use_every_split():
    table = segmentation_table(make_scores(), seed=0, repetitions=10, split=None)
    assert (table["n"] == 12).all()


def test_segmentation_table_keeps_methods_that_were_not_run():
    table = segmentation_table(
        make_scores().drop(columns="leak"),
        seed=0,
        repetitions=10,
        expected=[("phantom", "sam2clip2sam"), ("phantom", "unet")],
    )
    assert table["method"].tolist() == ["sam2clip2sam"] * 3 + ["unet"] * 3
    text = printable(table)
    assert (text.loc[:2, "Dice"] == "not run").all()
    assert text.at[5, "Leak rate"] == "–"  # measured, but not this


def make_claim_scores(methods=("unet", "sam2clip2sam"), rows=12, data_set="phantom"):
    """Scores of several methods, the later the better, on the same scans."""
    generator = np.random.default_rng(2)
    tables = []
    for number, method in enumerate(methods):
        measured = {
            name: generator.uniform(0.4, 0.6, rows) + number / 4
            for name in dict.fromkeys([*CLAIM_METRICS, *PAIRED_METRICS])
        }
        table = make_scores(method, rows).assign(data_set=data_set, distance_unit="mm", **measured)
        tables.append(table.assign(label=np.where(np.arange(rows) % 4 < 2, "covid", "normal")))
    return pd.concat(tables, ignore_index=True)


def test_claim_table_has_a_row_per_method_in_the_order_of_the_scores():
    scores = make_claim_scores()
    scores.loc[3, "lesions_kept"] = np.nan
    table = segmentation_claim_table(scores, seed=0, repetitions=50)
    assert table["method"].tolist() == ["unet", "sam2clip2sam"]
    unet = scores[(scores["method"] == "unet") & (scores["split"] == "test")]
    row = table.iloc[0]
    assert (row["n"], row["patients"], row["distance_unit"]) == (10, 5, "mm")
    for name in CLAIM_METRICS:
        assert row[name] == pytest.approx(unet[name].mean())
        assert row[name + "_low"] < row[name] < row[name + "_high"]


def test_class_table_tells_labels_apart_and_keeps_scans_without_one():
    scores = make_claim_scores()
    scores.loc[scores["label"] == "normal", "label"] = None
    table = segmentation_by_class_table(scores, seed=0, repetitions=10)
    assert table[["label", "method"]].values.tolist() == [
        ["covid", "unet"],
        ["covid", "sam2clip2sam"],
        ["unlabelled", "unet"],
        ["unlabelled", "sam2clip2sam"],
    ]
    tested = scores[(scores["split"] == "test") & (scores["method"] == "unet")]
    expected = tested.loc[tested["label"] == "covid", "rim_error"].mean()
    assert table.at[0, "rim_error"] == pytest.approx(expected)
    assert table["n"].tolist() == [4, 4, 6, 6]


def test_paired_table_compares_every_method_with_sam2clip2sam_on_the_same_scans():
    scores = make_claim_scores(("unet", "sam2clip2sam", "conventional"))
    scores.loc[5, "dice_both"] = np.nan
    shuffled = scores.sample(frac=1, random_state=0).sort_values("method", kind="stable")
    table = segmentation_paired_table(scores, seed=0, repetitions=200)
    assert table["method"].tolist() == ["unet", "conventional"] * len(PAIRED_METRICS)
    assert set(table["reference"]) == {"sam2clip2sam"}
    assert (table["comparisons"] == 2 * len(PAIRED_METRICS)).all()
    tested = scores[scores["split"] == "test"].pivot(index="scan_id", columns="method")
    gaps = (tested["dice_both"]["unet"] - tested["dice_both"]["sam2clip2sam"]).dropna()
    row = table.iloc[0]
    assert (row["metric"], row["n"], row["patients"]) == ("Dice", 9, 5)
    assert row["difference"] == pytest.approx(gaps.mean())
    assert row["difference_low"] < row["difference"] < row["difference_high"] < 0
    assert row["p_value"] == pytest.approx(2 / 2**5)  # five patients, all worse
    np.testing.assert_allclose(table["p_holm"], holm_adjusted(table["p_value"]))
    again = segmentation_paired_table(shuffled, seed=0, repetitions=200)
    keys = ["metric", "method"]
    pd.testing.assert_frame_equal(
        table.sort_values(keys, ignore_index=True), again.sort_values(keys, ignore_index=True)
    )


def test_paired_table_takes_the_first_method_where_sam2clip2sam_was_not_run():
    scores = make_claim_scores(("morphology", "unet"))
    table = segmentation_paired_table(scores, seed=0, repetitions=10)
    assert set(table["reference"]) == {"morphology"} and set(table["method"]) == {"unet"}
    alone = segmentation_paired_table(make_claim_scores(("unet",)), seed=0, repetitions=10)
    assert alone.empty and "p_holm" in alone


def test_metrics_that_no_scan_has_are_empty_cells_and_no_comparison():
    single_slices = make_claim_scores().assign(
        lesions_kept=np.nan, ground_glass_kept=np.nan, distance_unit="pixels", label=None
    )
    single_slices = single_slices.drop(columns=["neighbour_dice_gap", "consolidation_kept"])
    claim = segmentation_claim_table(single_slices, seed=0, repetitions=10)
    text = printable(claim)
    assert set(text["Infected lung kept"]) == set(text["Neighbour Dice, gap"]) == {"–"}
    assert set(text["Distances in"]) == {"pixels"}
    paired = segmentation_paired_table(single_slices, seed=0, repetitions=10)
    kept = paired[paired["metric"] == "Infected lung kept"]
    assert kept["n"].tolist() == [0] and kept["p_value"].isna().all()
    assert (paired["comparisons"] == len(PAIRED_METRICS) - 1).all()
    assert printable(paired).loc[kept.index[0], "Difference"] == "not run"


def test_without_true_masks_the_tables_are_empty_but_written(tmp_path):
    path = tmp_path / "scores.csv"
    path.write_text("scan_id,patient_id,split,label,data_set,method\n")
    scores = read_score_tables([path, tmp_path / "missing.csv"])
    builders = (
        segmentation_table,
        segmentation_claim_table,
        segmentation_by_class_table,
        segmentation_paired_table,
    )
    for number, build in enumerate(builders):
        table = build(scores, seed=0)
        assert table.empty
        files = write_table(table, tmp_path, f"table{number}", "Nothing.")
        assert files[1].read_text().startswith("**Nothing.**")


def test_all_tables_of_segmentation_are_those_of_their_builders():
    scores = make_claim_scores()
    made = segmentation_tables(scores, seed=0)
    builders = {
        "segmentation": segmentation_table,
        "segmentation_claim": segmentation_claim_table,
        "segmentation_by_class": segmentation_by_class_table,
        "segmentation_paired": segmentation_paired_table,
    }
    assert list(made) == list(builders)
    for name, build in builders.items():
        table, caption = made[name]
        pd.testing.assert_frame_equal(table, build(scores, seed=0))
        assert "means with 95 % intervals over patients" in caption


def test_scores_are_read_in_the_order_given_and_identifiers_stay_text(tmp_path):
    paths = [tmp_path / f"{name}.csv" for name in ("unet", "none", "bcdunet")]
    for path in (paths[0], paths[2]):
        make_scores(path.stem, 2).assign(scan_id="0001").to_csv(path, index=False)
    paths[1].write_text("scan_id,patient_id,split,label,data_set,method\n")
    scores = read_score_tables(paths)
    assert scores["method"].tolist() == ["unet"] * 2 + ["bcdunet"] * 2
    assert set(scores["scan_id"]) == {"0001"}
    assert scores["leak"].dtype == bool


def test_classification_table_puts_published_values_beside_measured_ones():
    predictions = make_predictions()
    row = make_table({RACNET: predictions}).iloc[0]
    tested = predictions[predictions["split"] == "test"]
    expected = classification_scores(
        tested["label"],
        probability_matrix(tested),
        positive="covid",
        classes=("covid", "non_covid"),
    )
    assert (row["system"], row["segmentation"], row["data_set"]) == RACNET
    assert (row["n"], row["n_positive"]) == (16, 8)
    assert [row[name] for name in COLUMNS] == pytest.approx([expected[name] for name in COLUMNS])
    assert row["macro_f1_low"] < row["macro_f1"] < row["macro_f1_high"]
    assert row["macro_f1_published"] == 0.9306
    assert np.isnan(row["roc_auc_published"])
    assert row["published_on"] == "COV19-CT-DB (ECCV 2022), test"
    assert row["remarks"].startswith("F1 (covid): implies another ratio of classes")
    assert row["not_measured"] == ""


def test_classification_table_keeps_systems_that_were_not_run():
    table = make_table({RACNET: make_predictions(), MDAP: None, UNPUBLISHED: make_predictions()})
    assert table["system"].tolist() == ["RACNet", "MDAP", "RACNet"]
    assert table["n"].tolist() == [16, 0, 16]
    text = printable(table)
    assert text.loc[1, ["Macro F1", "ROC AUC"]].tolist() == ["not run", "not run"]
    assert text.at[1, "Macro F1, published"] == "0.8987"
    assert text.at[1, "Remarks"].startswith("Macro F1: not the mean")
    assert text.at[2, "Macro F1, published"] == "–"
    assert text.at[2, "Published on"] == "–"


def test_a_row_that_this_size_of_the_study_leaves_out_says_so():
    runs = {RACNET: make_predictions(), MDAP: None}
    table = make_table(runs, not_measured="only in the full study")
    assert table["not_measured"].tolist() == ["", "only in the full study"]
    text = printable(table)
    assert text["Macro F1"].tolist()[1] == "only in the full study"
    assert text.at[0, "Macro F1"].startswith(f"{table.at[0, 'macro_f1']:.2f} [")
    assert "Not measured" not in text and text.at[1, "Macro F1, published"] == "0.8987"


def test_a_system_of_another_name_finds_its_published_values():
    video = SystemRun("FDVTS (video)", "none", "phantom")
    row = make_table({video: None}, published_as={"FDVTS (video)": "FDVTS"}).iloc[0]
    assert (row["system"], row["macro_f1_published"]) == ("FDVTS (video)", 0.8911)
    assert np.isnan(make_table({video: None}).at[0, "macro_f1_published"])


def test_classification_table_takes_a_threshold_per_system():
    table = make_table(
        {RACNET: make_predictions(), UNPUBLISHED: make_predictions()}, thresholds={UNPUBLISHED: 0.0}
    )
    assert table.at[1, "f1_covid"] == pytest.approx(2 / 3)  # all called covid, half of them are
    assert table.at[0, "f1_covid"] != table.at[1, "f1_covid"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "other"}, r"RACNet / none / phantom: "),
        ({"probability_covid": 2.0}, r"RACNet / none / phantom: .* outside \[0, 1\]"),
    ],
)
def test_classification_table_names_the_system_at_fault(change, message):
    with pytest.raises(ValueError, match=message):
        make_table({RACNET: make_predictions().assign(**change)})


def test_a_part_without_labelled_scans_is_said_to_be_so():
    table = make_table({RACNET: make_predictions().assign(split="validation"), UNPUBLISHED: None})
    assert table["n"].tolist() == [0, 0]
    assert table["not_measured"].tolist() == ["no labelled scan in this part", "not run"]
    assert table.at[0, "macro_f1_published"] > 0


def test_classification_table_needs_published_values_of_one_table():
    published = published_values("sam2clip2sam", "Table 1")
    with pytest.raises(ValueError, match="occur twice; give one table"):
        classification_table(
            {RACNET: None},
            pd.concat([published, published]),
            positive="covid",
            columns=COLUMNS,
            seed=0,
        )


def test_every_system_on_every_segmentation_is_expected():
    runs = expected_runs(["phantom"], ["MDAP", "RACNet"], ["none", "sam2clip2sam"])
    assert runs == [
        SystemRun("MDAP", "none", "phantom"),
        SystemRun("MDAP", "sam2clip2sam", "phantom"),
        SystemRun("RACNet", "none", "phantom"),
        SystemRun("RACNet", "sam2clip2sam", "phantom"),
    ]


def test_runs_are_named_by_their_files_and_expected_ones_come_first(tmp_path):
    predictions = make_predictions().drop(columns="patient_id")
    files = [tmp_path / "phantom" / f"{name}.csv" for name in ("mdap-sam2clip2sam", "mine-unet")]
    (tmp_path / "phantom").mkdir()
    for file in files:
        predictions.to_csv(file, index=False)
    manifest = make_predictions()[["scan_id", "patient_id"]]
    runs = read_runs(
        files, {"phantom": manifest}, systems={"mdap": "MDAP"}, expected=[RACNET, MDAP]
    )
    assert list(runs) == [RACNET, MDAP, SystemRun("mine", "unet", "phantom")]
    assert runs[RACNET] is None
    assert runs[MDAP]["patient_id"].tolist() == manifest["patient_id"].tolist()


def test_metrics_are_keyed_by_data_set_system_and_segmentation():
    table = make_table({RACNET: make_predictions()})
    metrics = metrics_by_run(table, ["macro_f1", "roc_auc"])
    assert metrics == {
        "phantom/RACNet/none": {name: table.at[0, name] for name in ("macro_f1", "roc_auc")}
    }


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ("macro_f1", "Macro F1"),
        ("f1_non_covid", "F1 (non-covid)"),
        ("sensitivity", "Sensitivity"),
        ("sensitivity_covid", "Sensitivity (covid)"),
        ("precision_non_covid", "Precision (non-covid)"),
        ("roc_auc_published", "ROC AUC, published"),
        ("hd95", "HD95"),
        ("lung_missing_rate", "Lung missing rate"),
        ("f1_covid_difference_published", "F1 (covid), difference, published"),
        ("parameters_published", "Parameters, published or computed"),
    ],
)
def test_headings_are_readable(column, expected):
    assert heading(column) == expected


def test_perfect_scores_read_from_a_file_as_whole_numbers_are_printed_as_scores():
    table = pd.DataFrame(
        {"n": [3], "roc_auc": [1], "roc_auc_low": [np.nan], "roc_auc_high": np.nan}
    )
    assert printable(table).loc[0, "ROC AUC"] == "1.00"


def test_printable_joins_values_and_intervals():
    table = pd.DataFrame(
        {
            "system": ["a", "b", "c"],
            "n": [5, 5, 0],
            "dice": [0.9312, 0.5, np.nan],
            "dice_low": [0.8749, np.nan, np.nan],
            "dice_high": [0.971, np.nan, np.nan],
            "dice_published": [0.9, np.nan, 0.98765],
        }
    )
    text = printable(table)
    assert text.columns.tolist() == ["System", "n", "Dice", "Dice, published"]
    assert text["Dice"].tolist() == ["0.93 [0.87, 0.97]", "0.50", "not run"]
    assert text["Dice, published"].tolist() == ["0.9000", "–", "0.9877"]
    assert text["n"].tolist() == ["5", "5", "0"]
    assert printable(table, decimals=3).at[0, "Dice"] == "0.931 [0.875, 0.971]"


def test_small_p_values_are_printed_as_a_bound():
    text = printable(pd.DataFrame({"p_value": [0.0004, 0.0416, np.nan], "p_holm": [1.0, 0.5, 0.1]}))
    assert text["p"].tolist() == ["< 0.001", "0.042", "–"]
    assert text["p, Holm"].tolist() == ["1.000", "0.500", "0.100"]


def test_wide_tables_shrink_to_the_width_of_the_page(tmp_path):
    table = segmentation_claim_table(make_claim_scores(), seed=0, repetitions=10)
    wide = write_table(table, tmp_path, "wide", "Wide.")[2].read_text()
    assert wide.count(r"\resizebox{\textwidth}{!}{%") == wide.count(r"\end{tabular}}") == 1
    assert wide.index("caption") < wide.index("resizebox") < wide.index("tabular")
    narrow = write_table(table[["method", "n"]], tmp_path, "narrow", "Narrow.")[2].read_text()
    assert "resizebox" not in narrow and r"\end{tabular}" in narrow


def test_tables_are_written_three_times_with_the_same_bytes(tmp_path):
    table = make_table({RACNET: make_predictions(), MDAP: None})
    first = write_table(table, tmp_path / "a", "sam2clip2sam_table1", "Scores.")
    second = write_table(table, tmp_path / "b", "sam2clip2sam_table1", "Scores.")
    assert [file.name for file in first] == [
        f"sam2clip2sam_table1.{ending}" for ending in ("csv", "md", "tex")
    ]
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == sorted(
        file.name for file in first
    )
    assert [f.read_bytes() for f in first] == [f.read_bytes() for f in second]


def test_a_published_table_is_given_as_it_stands_in_its_markdown_file(tmp_path):
    table = make_table({RACNET: make_predictions()})
    text = publish_table(table, tmp_path / "a", "scores", "Scores.", decimals=2)
    files = write_table(table, tmp_path / "b", "scores", "Scores.", decimals=2)
    assert text == files[1].read_text()
    assert [(tmp_path / "a" / f.name).read_bytes() for f in files] == [
        f.read_bytes() for f in files
    ]


def test_csv_keeps_every_digit(tmp_path):
    table = make_table({RACNET: make_predictions(), MDAP: None})
    file, *_ = write_table(table, tmp_path, "table", "Scores.")
    again = pd.read_csv(file, keep_default_na=False, na_values=[""])
    text = ["system", "segmentation", "data_set"]
    pd.testing.assert_frame_equal(again[text], table[text], check_dtype=False)
    numbers = table.select_dtypes("number").columns
    pd.testing.assert_frame_equal(
        again[numbers], table[numbers], check_dtype=False, check_exact=True
    )


def test_markdown_and_latex_escape_what_they_must(tmp_path):
    table = pd.DataFrame({"system": ["A|B_50%"], "n": [3], "note": ["long words " * 5]})
    _, markdown, latex = write_table(table, tmp_path, "my_table", "100 % of A_B & \\C")
    lines = markdown.read_text().splitlines()
    assert lines[0] == "**100 % of A_B & \\C**"
    assert lines[4].startswith(r"| A\|B_50%")
    source = latex.read_text()
    assert r"\caption{100 \% of A\_B \& \textbackslash{}C}" in source
    assert r"A|B\_50\% & 3" in source
    assert r"\begin{tabular}{llp{4cm}}" in source
    assert r"\toprule" in source
    assert r"\label{tab:my_table}" in source


@pytest.mark.parametrize("name", ["../table", "a/b", "/tmp/table"])
def test_a_table_stays_in_its_folder(tmp_path, name):
    with pytest.raises(ValueError, match="no path"):
        write_table(MANIFEST, tmp_path / "tables", name, "Caption.")
    assert not (tmp_path / "tables").exists()
