from dataclasses import replace

import pandas as pd
import pytest

from lib.classification import experiment
from lib.classification.experiment import (
    Case,
    Run,
    System,
    code_files,
    compared_runs,
    confounded_cases,
    cross_runs,
    part,
    prepared_cases,
    read_result,
    run_all,
    run_inputs,
)
from lib.data.phantom_sets import confounded_plans
from lib.data.scan_map import worker_processes

SETTINGS = {
    "slices": 16,
    "image_size": 32,
    "batch_scans": 4,
    "rounds": 1,
    "learning_rate": 5.0e-3,
    "weight_decay": 5.0e-4,
    "epochs": 1,
    "patience": None,
    "chosen_by": "loss",
    "schedule": None,
    "precision": "32-true",
    "loader_processes": 0,
    "cache_volumes": True,
}
SYSTEM = System(classifier="densenet3d121", preset="small", settings=SETTINGS)


@pytest.fixture
def found(made_scans):
    """Eight scans, two of them to test on."""
    parts = 4 * ["train"] + 2 * ["validation"] + 2 * ["test"]
    return [
        Case(*row, f"patient {k}") for k, row in enumerate(zip(made_scans(8), parts, strict=True))
    ]


def make_run(found, **about):
    about = {"system": "densenet3d121", "input": "true lungs", "seed": 0} | about
    return Run(system=SYSTEM, about=about, learned=found, tested={"here": part(found, "test")})


def test_a_run_that_is_there_is_not_trained_again(found, tmp_path, monkeypatch):
    folders = {"folder": tmp_path / "e/runs", "unfinished": tmp_path / "unfinished"}
    run = make_run(found)
    first = run_all([run], **folders, classifiers=["densenet3d121"])
    assert first["scan_id"].tolist() == [case.scan.scan_id for case in found[6:]]
    assert first["patient_id"].tolist() == ["patient 6", "patient 7"]
    assert set(first["tested_on"]) == {"here"} and set(first["input"]) == {"true lungs"}
    assert not any(folders["unfinished"].iterdir())
    pd.testing.assert_frame_equal(read_result(folders["folder"] / f"{run.name}.csv"), first)

    trained = []
    monkeypatch.setattr(experiment, "train_and_judge", _note(trained))
    again = run_all([run, make_run(found, seed=1)], **folders, classifiers=["densenet3d121"])
    assert trained == ["densenet3d121-true_lungs-1"]
    pd.testing.assert_frame_equal(again[again["seed"] == 0], first)


def test_processes_train_what_one_process_does(found, tmp_path):
    results = []
    for processes in (1, 2):
        with worker_processes(processes) as executor:
            results += [
                run_all(
                    [make_run(found), make_run(found, seed=1)],
                    tmp_path / f"by {processes}/runs",
                    unfinished=tmp_path / f"unfinished by {processes}",
                    classifiers=["densenet3d121"],
                    executor=executor,
                )
            ]
    pd.testing.assert_frame_equal(*results, check_exact=True)


def _note(trained):
    """Work that leaves a copy of the first run's result, and notes which run asked for it."""

    def work(run, path, *, unfinished):
        trained.append(run.name)
        other = path.parents[2] / "densenet3d121-true_lungs-0.csv"
        pd.read_csv(other).assign(**run.about).to_csv(path, index=False)
        return {}

    return work


def test_a_result_depends_on_the_run_and_its_scans(found):
    run = make_run(found)
    other_settings = replace(run, system=replace(SYSTEM, settings=SETTINGS | {"epochs": 2}))
    unmasked = [replace(case, scan=replace(case.scan, mask=None)) for case in found]
    other_split = [replace(found[0], split="validation"), *found[1:]]
    others = [
        make_run(found, seed=1),
        other_settings,
        make_run(found[1:]),
        make_run(unmasked),
        make_run(other_split),
    ]
    text = run_inputs(run, classifiers=[])[0]
    assert run_inputs(make_run(list(found)), classifiers=[])[0] == text
    assert all(run_inputs(other, classifiers=[])[0] != text for other in others)


def test_a_result_depends_on_its_own_classifier_and_no_other():
    names = {p.stem for p in code_files("racnet", {"racnet", "mdap", "mc3_18"})}
    assert {"racnet", "inputs", "task", "experiment"} <= names
    assert not names & {"mdap", "mc3_18"}


def test_confounded_cases_come_from_where_each_scan_was_drawn(tmp_path):
    plan = confounded_plans([1.0], seed=0, scans_per_class={"train": 2}, slices=(2, 2))[1.0]
    manifests = {
        tube: pd.DataFrame(
            {
                "scan_id": [record.scan_id for record in plan],  # more than were asked for
                "patient_id": "p",
                "split": "train",
                "label": [record.label for record in plan],
            }
        )
        for tube in ("with_tube", "without_tube")
    }
    for record in plan:
        for kind in ("scans", "lungs"):
            tube = tmp_path / ("with_tube" if record.confounder else "without_tube") / kind
            tube.mkdir(parents=True, exist_ok=True)
            (tube / f"{record.scan_id}.b2nd").touch()
    found = confounded_cases(plan, manifests, tmp_path, lungs_only=True, positive=["covid"])
    assert [case.scan.scan_id for case in found] == sorted(record.scan_id for record in plan)
    worn = {record.scan_id: record.confounder for record in plan}
    assert set(worn.values()) == {True, False}
    for case in found:
        tube = "with_tube" if worn[case.scan.scan_id] else "without_tube"
        assert case.scan.volume.parent == tmp_path / tube / "scans"
        assert case.scan.mask.parent == tmp_path / tube / "lungs"


def test_runs_of_one_name_and_no_run_are_refused(found, tmp_path):
    for runs in ([], [make_run(found), make_run(found)]):
        with pytest.raises(ValueError, match="needs runs with different names"):
            run_all(runs, tmp_path, unfinished=tmp_path, classifiers=[])


def test_every_data_set_is_trained_on_and_tested_on(found):
    there = [replace(case, patient_id=f"other {case.patient_id}") for case in found]
    systems = {"A": SYSTEM, "B": replace(SYSTEM, preset="paper")}
    runs = list(cross_runs({"A": found, "B": there}, systems, {"seed": 4}))
    assert [run.name for run in runs] == ["A-4", "B-4"]
    assert [run.system.preset for run in runs] == ["small", "paper"]
    for run in runs:
        assert {name: len(cases) for name, cases in run.tested.items()} == {"A": 2, "B": 2}
        assert run.tested["B"] == there[6:]
    assert [run.learned[0].patient_id for run in runs] == ["patient 0", "other patient 0"]


def test_every_classifier_is_run_in_every_comparison_with_the_preset_of_its_data_set(found):
    settings = {
        "mdap": {"small": {"a": 1}, "paper": {"a": 2}},
        "mc3_18": {"small": {}, "paper": {}},
    }
    compared = {("scanners", "none", 0): {"A": found, "B": found}, ("pair", "x", 1): {"A": found}}
    runs = compared_runs(
        compared, ["mdap", "mc3_18"], presets={"A": "small", "B": "paper"}, settings=settings
    )
    assert [run.name for run in runs] == [
        "A-scanners-mdap-none-0",
        "B-scanners-mdap-none-0",
        "A-scanners-mc3_18-none-0",
        "B-scanners-mc3_18-none-0",
        "A-pair-mdap-x-1",
        "A-pair-mc3_18-x-1",
    ]
    assert [run.system.settings for run in runs[:2]] == [{"a": 1}, {"a": 2}]
    assert list(runs[-1].tested) == ["A"]


def test_the_labelled_scans_of_a_prepared_data_set_are_its_cases(tmp_path):
    (tmp_path / "prepared/mosmed").mkdir(parents=True)
    (tmp_path / "prepared/mosmed/manifest.csv").write_text(
        "scan_id,patient_id,split,label,slices,height,width\n"
        "a,p,train,covid,1,2,2\nb,p,train,,1,2,2\nc,q,test,normal,1,2,2\n"
    )
    for folder in ("prepared/mosmed/scans", "segmented/mosmed/unet"):
        (tmp_path / folder).mkdir(parents=True)
        for name in "ac":
            (tmp_path / folder / f"{name}.b2nd").touch()
    found = prepared_cases(tmp_path, "mosmed", "unet", positive={"covid"})
    assert [(c.scan.scan_id, c.scan.target, c.split, c.patient_id) for c in found] == [
        ("a", 1, "train", "p"),
        ("c", 0, "test", "q"),
    ]
    assert found[0].scan.mask == tmp_path / "segmented/mosmed/unet/a.b2nd"
