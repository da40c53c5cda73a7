"""The whole study, tiny, through DVC and papermill."""

import json
import re
from itertools import product
from pathlib import Path

import pandas as pd
import pytest
import yaml
from dvc.repo import Repo

from lib.evaluation.classification import read_predictions, validate_predictions

from .conftest import change_parameters, run_in

SYSTEM = "racnet-none"


@pytest.fixture(scope="module")
def study(make_study):
    """A study that ran once."""
    folder = make_study("repro")
    run_in(folder, "git", "init", "--quiet")
    run_in(folder, "git", "add", ".")
    identity = ("-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false")
    run_in(folder, "git", *identity, "commit", "--quiet", "-m", "copy")
    run_in(folder, "dvc", "repro")
    return folder


def test_it_leaves_tables_and_figures(study):
    tables = {path.name for path in (study / "reports/tables").iterdir()}
    names = ["data", "segmentation", "classification", "sam2clip2sam_table1", "sam2clip2sam_table2"]
    names += [f"segmentation_{kind}" for kind in ("claim", "by_class", "paired")]
    names += [f"sam2clip2sam_{kind}" for kind in ("ablation", "effect", "systems", "confounder")]
    names += ["cost", "cross_data", "sam2clip2sam_audit", "sam2clip2sam_audit_cells"]
    names += ["mask_net_audit", "mask_net_audit_cells"]
    names += [f"mask_net_table{number}" for number in range(1, 10)]
    names += [f"mask_net_{kind}" for kind in ("table1_parameters", "scans", "effects")]
    names += [
        f"cnn_bert_{kind}"
        for kind in ("table1", "table2", "table3", "effects", "evidence", "audit")
    ]
    assert tables == {f"{name}.{ending}" for name in names for ending in ("csv", "md", "tex")}
    figures = {path.name for path in (study / "reports/figures").iterdir()}
    kinds = ["segmentation", "segmentation_claim", "sam2clip2sam_figure3", "sam2clip2sam_journey"]
    names = [f"{kind}_phantom" for kind in (*kinds, "roc", "confusion")]
    names += [f"cnn_bert_{kind}_phantom" for kind in ("figure1", "attention", "evidence")]
    curves = ["racnet", "densenet3d121", "cnn_bert_rml_msc_affine_seed0"]
    names += [f"learning_curves_phantom_{name}" for name in (*curves, f"{curves[-1]}_mlp")]
    names += ["learning_curves_phantom_light_cnn_seed0"]
    names += [
        f"learning_curves_{name}_mask_net_head_seed0" for name in ("phantom", "phantom-8-bit")
    ]
    names += ["learning_curves_lungs", "learning_curves_lesions"]
    names += ["sam2clip2sam_confounder", "cross_data", "cnn_bert_figure2"]
    kinds = ["figure1", "figure2", "figure6", "confusion", "calibration"]
    names += [f"mask_net_{kind}_phantom" for kind in kinds]
    names += ["mask_net_figure4", "mask_net_figure5", "mask_net_confusion_phantom-8-bit"]
    assert figures == {f"{name}.{ending}" for name in names for ending in ("png", "pdf")}


def test_every_scan_is_segmented_and_predicted_once(study):
    manifest = pd.read_csv(study / "data/prepared/phantom/manifest.csv")
    assert len(manifest) == 3 * (3 + 2 + 3) + 1
    predictions = read_predictions(study / f"data/predictions/phantom/{SYSTEM}.csv")
    validate_predictions(predictions)
    assert sorted(predictions["scan_id"]) == sorted(manifest["scan_id"])
    masks = (study / "data/segmented/phantom/morphology").glob("*.b2nd")
    assert {path.stem for path in masks} == set(manifest["scan_id"])


def test_published_values_stand_beside_measured_ones_of_the_same_input(study):
    table = pd.read_csv(study / "reports/tables/sam2clip2sam_table1.csv")
    rows = table.set_index(["system", "segmentation"])
    row = rows.loc["RACNet", "none"]
    assert (row["macro_f1_published"], row["f1_covid_published"]) == (0.9306, 0.9218)
    assert row["n"] == 9 and row["macro_f1_low"] <= row["macro_f1"]
    other = rows.loc["RACNet", "conventional"]
    assert (other["n"], other["not_measured"]) == (0, "only in the full study")
    assert other["macro_f1_published"] == 0.9506


def test_the_second_papers_tables_have_every_row(study):
    first = pd.read_csv(study / "reports/tables/cnn_bert_table1.csv")
    rows = first[first["part"] == "validation"].set_index("system")
    assert rows.loc["3D-CNN-BERT, RML, MSC+A", ["n", "accuracy_published"]].tolist() == [6, 0.9091]
    other = rows.loc["3D-CNN without BERT, RML, A"]
    assert (other["n"], other["not_measured"]) == (0, "only in the full study")
    assert len(rows) == 9
    second = pd.read_csv(study / "reports/tables/cnn_bert_table2.csv")
    trained = second[(second["part"] == "test") & (second["n"] > 0)]
    assert trained["system"].tolist() == ["baseline without MLP", "MLP, both, sigmoid"]


def test_pictures_are_predicted_once_and_slices_make_diagnoses(study):
    predictions = study / "data/predictions/phantom"
    pictures = pd.read_csv(study / "data/pictures/phantom/pictures.csv", keep_default_na=False)
    judged = pictures[pictures["label"] != ""]
    for run in ("mask_net_head_seed0", "light_cnn_seed0"):
        found = read_predictions(predictions / "pictures" / f"{run}.csv")
        validate_predictions(found)
        assert found["image_id"].tolist() == judged["image_id"].tolist()
    diagnoses = read_predictions(predictions / "diagnoses/mask_net_head_seed0.csv")
    manifest = pd.read_csv(study / "data/prepared/phantom/manifest.csv")
    wanted = manifest.loc[manifest["split"] != "train", "scan_id"]
    assert sorted(diagnoses["scan_id"]) == sorted(wanted)
    slices = pd.read_csv(predictions / "slices/mask_net_head_seed0.csv")
    assert len(slices) == manifest.loc[manifest["split"] != "train", "slices"].sum()


def test_the_third_papers_tables_have_every_row(study):
    fourth = pd.read_csv(study / "reports/tables/mask_net_table4.csv")
    rows = fourth[fourth["data_set"] == "phantom"]
    assert set(rows["system"]) == {
        "COVID-CT-Mask-Net, S",
        "COVID-CT-Mask-Net, S + batch norm",
        "COVID-CT-Mask-Net, all weights",
    }
    absent = rows[rows["system"] == "COVID-CT-Mask-Net, all weights"]
    assert set(absent["not_measured"]) == {"only in the full study"}
    ninth = pd.read_csv(study / "reports/tables/mask_net_table9.csv")
    assert set(ninth["data_set"]) == {"phantom-8-bit"}


def test_executed_notebooks_hold_pictures_and_no_error(study):
    executed = sorted((study / "reports/notebooks").glob("*.ipynb"))
    outs = [out for stage in Repo(study).index.stages for out in stage.outs]
    wanted = {Path(out.fs_path).name for out in outs if out.fs_path.endswith(".ipynb")}
    assert {path.name for path in executed} == wanted
    for path in executed:
        outputs = [o for c in json.loads(path.read_text())["cells"] for o in c.get("outputs", [])]
        kinds = {o["output_type"] for o in outputs}
        assert "error" not in kinds
        assert any("image/png" in o.get("data", {}) for o in outputs), path.name


def test_the_exploring_notebook_falls_back_to_pictures(study):
    output = "explored.ipynb"
    run_in(study, "papermill", "notebooks/explore_sam2clip2sam.ipynb", output)
    cells = json.loads((study / output).read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2


def test_metrics_are_dvc_metrics(study):
    metrics = json.loads(run_in(study, "dvc", "metrics", "show", "--json"))
    (files,) = [entry["data"] for entry in metrics[""]["data"].values()] or [None]
    assert set(files) == {
        "phantom/RACNet/none",
        "phantom/DenseNet3D121/sam2clip2sam",
        "phantom/3D-CNN-BERT/unet_refined",
    }


def test_learning_curves_are_dvc_plots(study):
    output = run_in(study, "dvc", "plots", "show", "--out", "shown")
    assert "index.html" in output
    assert "train_loss" in (study / "shown/index.html").read_text()


def test_a_second_run_finds_nothing_to_do(study):
    assert "Data and pipelines are up to date" in run_in(study, "dvc", "repro")


def test_a_parameter_of_racnet_concerns_racnet_and_the_reports_only(study):
    try:
        change_parameters(study, {"classify": {"racnet": {"small": {"learning_rate": 2.0e-4}}}})
        planned = run_in(study, "dvc", "repro", "--dry", "--force-downstream")
    finally:
        change_parameters(study, {"classify": {"racnet": {"small": {"learning_rate": 1.0e-4}}}})
    stages = set(re.findall(r"Running stage '([\w@-]+)'", planned))
    experiments = {"test_confounder", "cross_data"}  # which find their trainings unchanged
    assert stages == {"classify@phantom-none-racnet", "cost", "tables", "figures"} | experiments


def test_two_data_sets_are_trained_and_tested_crosswise(study):  # last: it changes the scores
    both = ["phantom", "phantom-8-bit"]
    before = yaml.safe_load((study / "params.yaml").read_text())["study"]
    changed = {"data_sets": both, "classification": both, "single_slices": []}
    try:
        change_parameters(study, {"study": changed})
        run_in(study, "dvc", "repro", "--single-item", "segment_none@phantom-8-bit")
        pairs = "overrides: {pairs: [[phantom, phantom-8-bit]]}"
        run_in(study, "papermill", "notebooks/cross_data.ipynb", "crossed.ipynb", "-y", pairs)
    finally:
        change_parameters(study, {"study": {name: before[name] for name in changed}})
    summary = pd.read_csv(study / "data/scores/cross_data/summary.csv")
    rows = summary[summary["comparison"] == "phantom and phantom-8-bit"]
    assert set(zip(rows["trained_on"], rows["tested_on"], strict=True)) == set(product(both, both))
    assert (rows["input"] == "none").all()
    tested = rows.set_index(["trained_on", "tested_on"])["n"]
    assert tested["phantom", "phantom"] == tested["phantom-8-bit", "phantom"] == 9
