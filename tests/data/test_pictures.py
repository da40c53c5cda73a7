"""The list of pictures: classes, parts and names of slices, on data sets made on the spot."""

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.data.datasets import (
    COVID,
    NON_COVID,
    NON_INFORMATIVE,
    NORMAL,
    PNEUMONIA,
    ScanSource,
    list_scans,
    read_covidx_list,
    read_name_list,
)
from lib.data.files import save_csv
from lib.data.phantom import CODE, draw_phantom, plan_phantoms, record_text, write_plan
from lib.data.pictures import (
    CLASSES,
    COLUMNS,
    PARTS,
    REMAINING,
    class_of,
    draw_training,
    ictcf_parts,
    list_pictures,
    published_names,
    read_pictures,
)
from lib.data.readers import source_files
from lib.data.scan_map import map_scans
from lib.data.splits import SPLITS, TEST, TRAIN, VALIDATION
from lib.data.store import open_volume, save_volume
from tests.data.made_data_sets import prepare_data_set

LABELS_OF = {"control": [NORMAL, NON_COVID], "pneumonia": [PNEUMONIA], "covid": [COVID]}


def make_scans(*scans: tuple) -> tuple[pd.DataFrame, dict[str, ScanSource]]:
    """Manifest and sources of (scan_id, label, split, files of the slices or their number)."""
    rows, sources = [], {}
    for scan_id, label, split, slices in scans:
        files = (Path("scan.nii.gz"),) if isinstance(slices, int) else tuple(map(Path, slices))
        count = slices if isinstance(slices, int) else len(files)
        patient = f"of_{scan_id}"
        rows.append((scan_id, patient, split, label, count))
        sources[scan_id] = ScanSource(scan_id, patient, files, label, split)
    names = ["scan_id", "patient_id", "split", "label", "slices"]
    return pd.DataFrame(rows, columns=names, dtype=object), sources


def listed(manifest, sources, folder, **changes) -> pd.DataFrame:
    settings = {"data_set": "own", "classes": LABELS_OF, "per_class": None, "seed": 0}
    paths = {"raw": folder, "lesions": folder / "lesions"}
    return list_pictures(manifest, sources, **paths, **(settings | changes))


def save_lesions(folder: Path, scan_id: str, areas: list[int]) -> None:
    """A lesion mask with an area in pixels in each slice, both kinds of lesion."""
    mask = np.zeros((len(areas), 4, 4), np.uint8)
    for index, area in enumerate(areas):
        mask[index].flat[:area] = 1 + index % 2
    (folder / "lesions").mkdir(exist_ok=True)
    save_volume(folder / f"lesions/{scan_id}.b2nd", mask)


def test_every_slice_is_listed_and_those_that_show_their_class_are_judged(tmp_path):
    manifest, sources = make_scans(
        ("a", NORMAL, TRAIN, 2), ("b", COVID, TEST, 4), ("c", PNEUMONIA, VALIDATION, 2)
    )
    save_lesions(tmp_path, "b", [0, 1, 7, 0])
    save_lesions(tmp_path, "c", [0, 3])
    table = listed(manifest, sources, tmp_path)
    assert list(table.columns) == list(COLUMNS)
    assert table.drop(columns="patient_id").fillna(-1).values.tolist() == [
        ["a_0000", "a", 0, TRAIN, "control", -1],
        ["a_0001", "a", 1, TRAIN, "control", -1],
        ["b_0000", "b", 0, "", "", 0],
        ["b_0001", "b", 1, TEST, "covid", 1],
        ["b_0002", "b", 2, TEST, "covid", 7],
        ["b_0003", "b", 3, "", "", 0],
        ["c_0000", "c", 0, "", "", 0],
        ["c_0001", "c", 1, VALIDATION, "pneumonia", 3],
    ]
    assert (table["patient_id"] == "of_" + table["scan_id"]).all()


def test_without_lesion_mask_only_slices_chosen_by_themselves_are_judged(tmp_path):
    files = ["d/NCP_1_2_0056.png", "d/NCP_1_2_0060.png"]
    manifest, sources = make_scans(
        ("whole", COVID, TRAIN, 3),
        ("single", COVID, TRAIN, 1),
        ("NCP_1_2", COVID, TRAIN, files),
        ("unknown", None, TRAIN, 1),
        ("blurred", NON_INFORMATIVE, TRAIN, 1),
    )
    table = listed(manifest, sources, tmp_path)
    judged = table[table["label"] != ""]
    assert judged["image_id"].tolist() == ["single", "NCP_1_2_0056", "NCP_1_2_0060"]
    assert (table["split"] == "").equals(table["label"] == "") and len(table) == 8


def test_a_single_slice_whose_mask_is_empty_is_not_judged(tmp_path):
    manifest, sources = make_scans(("a", COVID, TRAIN, 1), ("b", COVID, TRAIN, 1))
    save_lesions(tmp_path, "a", [0])
    save_lesions(tmp_path, "b", [1])
    assert listed(manifest, sources, tmp_path)["label"].tolist() == ["", "covid"]


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["CP_1_2_0003.png", "CP_1_2_0010.png"], ["CP_1_2_0003", "CP_1_2_0010"]),
        (["CP_1_2_0003.png"], ["CP_1_2_0003"]),
        (["CP_1_2_Smith.png"], []),
        (["Smith_0001.png", "Smith_0002.png"], []),
        (["CP_1_2_0003.png", "CP_1_2.png"], []),
    ],
)
def test_only_names_made_of_the_scan_s_own_are_published(files, names):
    source = ScanSource("CP_1_2", "CP_1", tuple(map(Path, files)))
    assert published_names(source) == names


def test_names_come_in_the_order_of_the_stored_slices(tmp_path):
    names = [f"CP_1_2_{number:04d}.png" for number in (3, 20, 100)]
    for name in names:
        (tmp_path / name).touch()
    lines = "".join(f"{name} 1 0 0 9 9\n" for name in reversed(names))
    for part, text in (("train", lines), ("val", ""), ("test", "")):
        (tmp_path / f"{part}_COVIDx_CT-1.txt").write_text(text)
    (source,) = list_scans("covidx-ct", tmp_path).scans
    stored = [file.stem for file in source_files(source.files)]
    assert published_names(source) == stored == [name[:-4] for name in names]


@pytest.mark.parametrize(
    ("scans", "areas", "message"),
    [
        (
            [("NCP_1_2", COVID, TRAIN, ["NCP_1_2_1.png"])],
            None,
            "3 stored slices, but 1 names and 3",
        ),
        ([("a", COVID, TRAIN, 3)], [1, 1], "3 stored slices, but 3 names and 2 slices of its les"),
        ([("b", COVID, TRAIN, 3)], None, "a is not in the raw data set: run the stage prepare"),
    ],
)
def test_slices_that_do_not_fit_are_refused(scans, areas, message, tmp_path):
    _, sources = make_scans(*scans)
    manifest, _ = make_scans((scans[0][0].replace("b", "a"), COVID, TRAIN, 3))
    if areas:
        save_lesions(tmp_path, "a", areas)
    with pytest.raises(ValueError, match=message):
        listed(manifest, sources, tmp_path)


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        (["covd"], {"covid": ["covid"]}, "labels are covid.*, got 'covd'"),
        (["covid"], {"covid": ["covd"]}, "labels are covid.*, got 'covd'"),
        (["covid"], {"flu": ["covid"]}, "classes are control, pneumonia, covid, got flu"),
        (["covid"], {"covid": ["covid"], "control": ["covid"]}, "belongs to one class only"),
    ],
)
def test_labels_that_are_not_known_are_refused(labels, classes, message):
    with pytest.raises(ValueError, match=message):
        class_of(pd.Series(labels), classes)


# The sample of the training part


@given(
    counts=st.tuples(*[st.integers(0, 12)] * 3).filter(any),
    per_class=st.none() | st.integers(1, 15),
    seed=st.integers(0, 99),
)
def test_a_sample_is_balanced_and_the_rest_remains(counts, per_class, seed):
    labels = np.repeat(CLASSES, counts).tolist()
    table = pd.DataFrame({"label": [*labels, *CLASSES, ""], "split": TRAIN})
    table["image_id"] = [f"image_{index}" for index in range(len(table))]
    table.loc[len(labels) :, "split"] = [TEST] * len(CLASSES) + [""]
    parts = draw_training(table, per_class=per_class, seed=seed)
    changed = parts != table["split"]
    assert (table["split"][changed] == TRAIN).all() and (parts[changed] == REMAINING).all()
    drawn = Counter(table["label"][parts == TRAIN])
    smallest = min(count for count in counts if count)
    wanted = dict(zip(CLASSES, counts, strict=True))
    assert drawn == Counter(
        {name: min(per_class, smallest) if per_class else n for name, n in wanted.items() if n}
    )
    shuffled = draw_training(table.sample(frac=1, random_state=1), per_class=per_class, seed=seed)
    pd.testing.assert_series_equal(shuffled.sort_index(), parts)


def test_another_seed_draws_another_sample_of_many_patients():
    table = pd.DataFrame({"image_id": [f"{k}" for k in range(200)], "label": "covid"})
    table["split"] = TRAIN
    first, second = (draw_training(table, per_class=50, seed=seed) for seed in (0, 1))
    assert (first != second).sum() > 30
    patients = table.index[first == TRAIN] // 10  # of 20 patients of 10 pictures each
    assert len(set(patients)) > 15


def test_a_data_set_without_training_pictures_stays_as_it_is(tmp_path):
    manifest, sources = make_scans(("a", NORMAL, TEST, 2))
    assert set(listed(manifest, sources, tmp_path, per_class=5)["split"]) == {TEST}


@pytest.mark.parametrize("per_class", [0, -3])
def test_a_sample_without_pictures_is_refused(per_class, tmp_path):
    with pytest.raises(ValueError, match=f"positive number of pictures or null, got {per_class}"):
        listed(*make_scans(("a", NORMAL, TRAIN, 2)), tmp_path, per_class=per_class)


# Published lists


def covidx(folder: Path, text: str) -> tuple[pd.DataFrame, dict[str, ScanSource]]:
    """Five slices of training, one of test, with paper 002's list in ``splits/``."""
    (folder / "splits").mkdir()
    (folder / "splits/train_split_classification.txt").write_text(text)
    return make_scans(
        ("NCP_1_2", COVID, TRAIN, [f"NCP_1_2_000{k}.png" for k in range(3)]),
        ("Normal_4_5", NORMAL, TRAIN, [f"Normal_4_5_000{k}.png" for k in range(2)]),
        ("CP_7_8", PNEUMONIA, TEST, ["CP_7_8_0000.png"]),
    )


def test_the_published_sample_of_covidx_trains_and_the_rest_remains(tmp_path):
    scans = covidx(tmp_path, "2_1_2_0001.png\n0_4_5_0000.png\n")
    table = listed(*scans, tmp_path, data_set="covidx-ct", per_class=2)
    assert dict(zip(table["image_id"], table["split"], strict=True)) == {
        "NCP_1_2_0000": REMAINING,
        "NCP_1_2_0001": TRAIN,
        "NCP_1_2_0002": REMAINING,
        "Normal_4_5_0000": TRAIN,
        "Normal_4_5_0001": REMAINING,
        "CP_7_8_0000": TEST,
    }


def test_without_its_list_covidx_gets_a_sample(tmp_path):
    manifest, sources = covidx(tmp_path, "")
    (tmp_path / "splits/train_split_classification.txt").unlink()
    table = listed(manifest, sources, tmp_path, data_set="covidx-ct", per_class=1)
    assert Counter(table["split"]) == {TRAIN: 2, REMAINING: 3, TEST: 1}


def test_listed_slices_that_the_preparation_left_out_are_left_out(tmp_path):
    manifest, sources = covidx(tmp_path, "2_1_2_0001.png\n0_4_5_0000.png\n")
    kept = manifest[manifest["scan_id"] != "NCP_1_2"]
    table = listed(kept, sources, tmp_path, data_set="covidx-ct")
    assert table.loc[table["split"] == TRAIN, "image_id"].tolist() == ["Normal_4_5_0000"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2_1_2_0009.png\n", "names 1 slices that are not in the training part.*NCP_1_2_0009"),
        ("1_7_8_0000.png\n", "names 1 slices that are not in the training part.*CP_7_8_0000"),
        ("2_1_2_0001.png\n2_1_2_0001.png\n", "names 1 slices twice"),
        ("NCP_1_2_0001.png\n", "'NCP_1_2_0001.png' is not <class>_<patient>_<scan>_<slice>.png"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        listed(*covidx(tmp_path, text), tmp_path, data_set="covidx-ct")


def test_ictcf_validates_on_what_neither_list_holds(tmp_path):
    manifest, sources = make_scans(
        ("nCT1", NON_COVID, TRAIN, 1),
        ("pCT2", COVID, TEST, 1),
        ("pCT3", COVID, None, 1),
        ("NiCT4", NON_INFORMATIVE, None, 1),
        ("patient-5-series-0", None, None, 2),
    )
    # the stage prepare has cut a validation part out of the training list and divided the others
    manifest["split"] = [VALIDATION, TEST, TEST, TRAIN, TRAIN]
    table = listed(manifest, sources, tmp_path, data_set="ictcf", per_class=1)
    assert table["split"].tolist() == [TRAIN, TEST, VALIDATION, "", "", ""]
    assert table["label"].tolist() == ["control", "covid", "covid", "", "", ""]
    unlisted = {"pCT3": sources["pCT3"]}
    assert ictcf_parts(unlisted, tmp_path) == {}


# The file


def test_a_list_is_read_as_it_was_written(tmp_path):
    manifest, sources = make_scans(("007", NORMAL, TRAIN, 2), ("b", COVID, TEST, 2))
    save_lesions(tmp_path, "b", [0, 1])
    table = listed(manifest, sources, tmp_path)
    save_csv(table, tmp_path / "pictures.csv")
    pd.testing.assert_frame_equal(read_pictures(tmp_path), table)


def test_a_missing_list_names_its_stage(tmp_path):
    with pytest.raises(FileNotFoundError, match="run the stage list_pictures@mosmed"):
        read_pictures(tmp_path / "mosmed")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "dev"}, "a_0000: its part is none of train, validation, test, remaining"),
        ({"label": "normal"}, "a_0000: its class is none of control, pneumonia, covid"),
        ({"label": ""}, "a_0000: it has a class or a part but not both"),
        ({"split": ""}, "a_0000: it has a class or a part but not both"),
        ({"slice": 1}, "a_0001: it is listed twice"),
    ],
)
def test_a_damaged_list_is_one_sentence(changes, message, tmp_path):
    table = listed(*make_scans(("a", NORMAL, TRAIN, 2)), tmp_path)
    table.loc[0, changes.keys()] = list(changes.values())
    save_csv(table, tmp_path / "pictures.csv")
    with pytest.raises(ValueError, match=message):
        read_pictures(tmp_path)


def test_a_list_with_other_columns_is_refused(tmp_path):
    table = listed(*make_scans(("a", NORMAL, TRAIN, 2)), tmp_path)
    save_csv(table.drop(columns="slice"), tmp_path / "pictures.csv")
    with pytest.raises(ValueError, match="has the columns image_id, scan_id, patient_id"):
        read_pictures(tmp_path)


# Phantoms, drawn and prepared


def test_pictures_of_the_8_bit_phantoms_have_their_true_lesions(tmp_path):
    records = plan_phantoms(
        scans_per_class={TRAIN: 1, TEST: 1}, labels=["covid", "normal"], slices=(4, 6), seed=1000
    )
    raw, prepared = tmp_path / "raw", tmp_path / "prepared"
    write_plan(records, raw)
    map_scans(
        draw_phantom,
        records,
        raw / "scans",
        suffix="",
        parameters={"size": 48, "hounsfield": False},
        inputs=record_text,
        code=CODE,
        description="draw",
        keep_going=False,
    )
    quarantine, manifest = prepare_data_set("phantom-8-bit", raw, prepared)
    assert quarantine.empty and len(manifest) == 4
    sources = {source.scan_id: source for source in list_scans("phantom-8-bit", raw).scans}
    table = listed(manifest, sources, tmp_path / "prepared", data_set="phantom-8-bit")
    assert set(table["label"]) == {"control", "covid", ""}
    for row in table.itertuples():
        assert open_volume(prepared / f"scans/{row.scan_id}.b2nd").dtype == np.uint8
        lesions = open_volume(prepared / f"lesions/{row.scan_id}.b2nd")[row.slice]
        assert row.lesion_pixels == np.isin(lesions, (1, 2)).sum()
        assert (row.label == "covid") == bool(lesions.any())


# The published lists


@pytest.mark.real
def test_real_lists_divide_covidx_ct_as_paper_002_says(real_data, tmp_path):
    lists = {TRAIN: "train", VALIDATION: "val", TEST: "test"}
    files, facts = defaultdict(list), {}
    for split, name in lists.items():
        path = real_data / f"splits/covidx-ct/{name}_COVIDx_CT-1.txt"
        for line in sorted(read_covidx_list(path), key=lambda one: one.name):
            files[line.scan_id].append(line.name)
            facts[line.scan_id] = (line.label, split)
    manifest, sources = make_scans(*((name, *facts[name], files[name]) for name in files))
    raw = real_data / "splits/covid-ct-mask-net"
    settings = {"data_set": "covidx-ct", "raw": raw, "lesions": tmp_path}
    table = list_pictures(manifest, sources, **settings, classes=LABELS_OF, per_class=None, seed=0)
    counts = Counter(zip(table["split"], table["label"], strict=True))
    assert [[counts[part, name] for name in CLASSES] for part in PARTS] == [
        [1000, 1000, 1000],
        [9107, 7400, 4529],
        [9450, 7395, 4346],
        [26201, 21061, 11520],
    ]
    assert (table["split"] == REMAINING).sum() == 58782
    assert table["image_id"].is_unique and len(table) == 104009


@pytest.mark.real
def test_real_lists_divide_ictcf_as_paper_002_says(real_data, tmp_path):
    for name, count in (("nCT", 9979), ("pCT", 4001), ("NiCT", 5)):
        (tmp_path / name).mkdir()
        for number in range(1, count + 1):
            (tmp_path / f"{name}/{name}{number}.jpg").touch()
    (tmp_path / "splits").mkdir()
    for name in ("train_ictcf.txt", "test_ictcf.txt"):
        listing = read_name_list(real_data / f"splits/covid-ct-mask-net/{name}")
        (tmp_path / f"splits/{name}").write_text("\n".join(listing))
    sources = {source.scan_id: source for source in list_scans("ictcf", tmp_path).scans}
    parts = ictcf_parts(sources, tmp_path)
    counts = Counter((part, sources[name].label) for name, part in parts.items())
    assert set(parts.values()) == set(SPLITS)
    assert counts == {
        (TRAIN, NON_COVID): 300,
        (TRAIN, COVID): 300,
        (TEST, NON_COVID): 9275,
        (TEST, COVID): 3701,
        (VALIDATION, NON_COVID): 404,
    }
