"""Malformed data through the whole preparation: each its own reason, and nothing else is lost."""

import errno
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import RLELossless

from lib.data import prepare
from lib.data.datasets import DataSetMissing, DataSetProblem
from lib.data.manifest import read_manifest, read_quarantine
from lib.data.scan import to_grey
from lib.data.scan_map import ScanMapError
from tests.data.made_data_sets import chest, contents, lungs, own_id, prepare_data_set
from tests.data.readers.made_files import cut, put, write_nifti, write_series
from tests.data.readers.test_scans import MALFORMED

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")

# A writer puts one scan into a new, empty folder, `<raw>/covid/<name>`.


def nifti(volume: np.ndarray, name: str = "scan.nii") -> Callable[[Path], object]:
    return lambda folder: write_nifti(folder / name, volume)


def series(volume: np.ndarray) -> Callable[[Path], object]:
    return lambda folder: write_series(folder, volume)


def pictures(images: Iterable[np.ndarray], mode: str | None = None) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        for number, grey in enumerate(images):
            image = Image.fromarray(grey)
            image.convert(mode or image.mode).save(folder / f"{number}.png", compress_level=1)

    return write


def link(target: str) -> Callable[[Path], object]:
    """A scan of which one slice is a link; the target is seen from the raw data set's parent."""
    return lambda folder: (folder / "1.png").symlink_to(folder.parents[2] / target)


def damaged_series(damage: Callable[[Path], object], seed: int) -> Callable[[Path], object]:
    """A series of which one file was compressed and then damaged."""

    def write(folder: Path) -> None:
        file = next(write_series(folder, chest(seed=seed)).iterdir())
        header = pydicom.dcmread(file)
        header.compress(RLELossless)
        header.save_as(file)
        damage(file)

    return write


def noise(slices: int, seed: int, side: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (slices, side, side), dtype=np.uint8)


def from_table(make: Callable[[Path], Path]) -> Callable[[Path], object]:
    """A writer that does what one of `MALFORMED` does, without its inner folder."""

    def write(folder: Path) -> None:
        made = make(folder)
        made = made if made.is_dir() else made.parent
        if made != folder:
            for file in made.iterdir():
                file.rename(folder / file.name)
            made.rmdir()

    return write


GOOD = {
    "good series": series(chest(seed=1)),
    "good volume": nifti(chest(seed=2), "scan.nii.gz"),
    "good pictures": pictures(to_grey(chest(seed=3))),
}

REFUSED = {
    **{
        name: (reason, from_table(make))
        for name, (reason, make) in MALFORMED.items()
        if name != "missing file"  # what is not there is not listed
    },
    "constant air": ("constant intensity", nifti(np.full((3, 40, 40), -1000, np.int16))),
    "constant grey": ("constant intensity", pictures(np.full((3, 40, 40), 9, np.uint8))),
    "air only": ("implausible Hounsfield units", nifti(chest() // 100 - 990)),
    "beyond metal": (
        "implausible Hounsfield units",
        nifti(np.where(chest() > 60, 30_000, chest()).astype(np.int16)),
    ),
    "offset applied twice": ("implausible Hounsfield units", series(chest().clip(0) - 1024)),
    "offset lost": ("intensity not in Hounsfield units", nifti(chest() + 1024)),
    "no slices in the volume": ("no readable slices", nifti(np.zeros((0, 40, 40), np.int16))),
    "31 rows": ("slice too small", nifti(chest()[:, :31])),
    "thumbnails": ("slice too small", pictures(noise(3, 4, side=16))),
    "link out of the root": ("outside the data folder", link("outside.png")),
    "link to nowhere": ("no such file", link("raw/nowhere.png")),
    "no permission": ("no permission", pictures(noise(2, 5))),
    "compressed pixels cut short": ("damaged file", damaged_series(cut, seed=6)),
    "header cut short": (
        "damaged file",
        damaged_series(lambda file: put(file, file.read_bytes()[:400]), seed=7),
    ),
}

ACCEPTED = {  # name -> slices, flags, writer
    "1 slice": (1, "", pictures(noise(1, 6))),
    "2 slices": (2, "", pictures(noise(2, 7))),
    "700 slices": (700, "", pictures(noise(700, 8))),
    "701 slices": (701, "", pictures(noise(701, 9))),
    "1500 slices": (1500, "", pictures(noise(1500, 10))),
    "RGB": (3, "", pictures(noise(3, 11), "RGB")),
    "RGBA": (3, "", pictures(noise(3, 12), "RGBA")),
    "palette": (3, "", pictures(noise(3, 13), "P")),
    "mixed sizes": (
        3,
        "mixed slice sizes",
        pictures([noise(1, seed, side)[0] for seed, side in enumerate((40, 40, 36))]),
    ),
    "blank slices": (4, "2 blank slices", pictures([*noise(2, 14), *np.zeros((2, 32, 32), "u1")])),
}

ALIKE = {
    "twin a": nifti(chest(seed=4)),
    "twin b": series(chest(seed=4)),
    "twin c": nifti(chest(seed=4)[::2], "other.nii.gz"),
}


def write_raw(raw: Path, writers: dict[str, Callable[[Path], object]]) -> Path:
    for name, write in writers.items():
        (raw / "covid" / name).mkdir(parents=True)
        write(raw / "covid" / name)
    return raw


def refuse_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may run as root, whom no file mode keeps out."""
    path_open = Path.open

    def opened(path, *arguments, **keywords):
        if path.parent.name == "no permission":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return path_open(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "open", opened)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """``good/`` is prepared from the good scans alone, ``all/`` from those among all others."""
    folder = tmp_path_factory.mktemp("bad_input")
    Image.fromarray(noise(1, 0)[0]).save(folder / "outside.png")
    refused = {name: write for name, (_, write) in REFUSED.items()}
    accepted = {name: write for name, (*_, write) in ACCEPTED.items()}
    raw = write_raw(folder / "raw", GOOD)
    prepare_data_set("own", raw, folder / "good")
    write_raw(raw, refused | accepted | ALIKE)
    with pytest.MonkeyPatch.context() as monkeypatch:
        refuse_permission(monkeypatch)
        prepare_data_set("own", raw, folder / "all")
    return folder


def test_there_are_many_different_malformed_scans(folder):
    different = {tuple(contents(folder / "raw" / "covid" / name).items()) for name in REFUSED}
    assert len(different) >= 60
    assert len({reason for reason, _ in REFUSED.values()}) >= 25


@pytest.mark.parametrize(
    "name",
    list(REFUSED),
)
def test_a_malformed_scan_is_listed_once_with_its_reason_and_file(folder, name):
    quarantine = read_quarantine(folder / "all").set_index("scan_id")
    row = quarantine.loc[own_id(name)]
    assert row.ndim == 1  # a second row would make it a table
    assert (row["left_out"], row["reason"]) == ("scan", REFUSED[name][0])
    place = f"covid/{name}"
    assert row["file"] == place or row["file"].startswith((f"{place}/", f"{place}, file "))
    assert "\n" not in " ".join(row)
    assert not (folder / "all" / "scans" / f"{own_id(name)}.b2nd").exists()


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_unusual_scan_is_kept(folder, name):
    row = read_manifest(folder / "all").set_index("scan_id").loc[own_id(name)]
    slices, flags, _ = ACCEPTED[name]
    assert (row["slices"], row["flags"] or "") == (slices, flags)


def test_of_scans_with_the_same_pixels_the_first_stays(folder):
    first, *others = sorted(own_id(name) for name in ALIKE)
    quarantine = read_quarantine(folder / "all")
    left_out = quarantine[quarantine["reason"] == "same pixels under two names"]
    assert left_out["scan_id"].tolist() == others
    assert all(f"own/{first}" in detail for detail in left_out["detail"])
    assert first in set(read_manifest(folder / "all")["scan_id"])


def test_every_scan_is_either_in_the_manifest_or_in_the_quarantine(folder):
    kept = read_manifest(folder / "all")["scan_id"].tolist()
    left_out = read_quarantine(folder / "all")["scan_id"].tolist()
    everything = [own_id(name) for name in (*GOOD, *REFUSED, *ACCEPTED, *ALIKE)]
    assert sorted(kept + left_out) == sorted(everything)


def test_the_good_scans_are_untouched_to_the_byte(folder):
    alone, among_others = contents(folder / "good" / "scans"), contents(folder / "all" / "scans")
    assert len(alone) == 2 * len(GOOD)  # the volume and its sidecar
    assert {name: among_others[name] for name in alone} == alone
    manifests = [read_manifest(folder / run).set_index("scan_id") for run in ("good", "all")]
    good = manifests[0].index
    assert manifests[1].loc[good].equals(manifests[0])
    assert read_quarantine(folder / "good").empty


# Faults of the listing: nothing is read, nothing prepared earlier is lost

HEADER = "path,label,scan_id,split"
LISTING_FAULTS = {
    "semicolons": ("path;label\nscan.nii;covid\n", "must be separated by ','"),
    "tabs": ("path\tlabel\nscan.nii\tcovid\n", "must be separated by ','"),
    "missing column": ("path,scan_id\nscan.nii,1\n", "lacks the column label"),
    "no column": ("", "lacks the column path, label; it has none"),
    "no header": ("scan.nii,covid\n", "lacks the column path, label"),
    "unknown label": (f"{HEADER}\nscan.nii,flu,1,\n", "line 2: unknown label 'flu'"),
    "unknown split": (f"{HEADER}\nscan.nii,covid,1,dev\n", "line 2: unknown split 'dev'"),
    "duplicate id": (f"{HEADER}\nscan.nii,covid,1,\nother.nii,covid,1,\n", "line 3: the scan of"),
    "duplicate path": ("path,label\nscan.nii,covid\nscan.nii,normal\n", "line 3: the scan of"),
    "path above the root": ("path,label\n../outside.nii,covid\n", "line 2: the path must lie"),
    "absolute path": ("path,label\n/etc/hostname,covid\n", "line 2: the path must lie"),
    "drive letter": ("path,label\nC:\\scan.nii,covid\n", "line 2: the path must lie"),
    "link out of the root": ("path,label\nlink.nii,covid\n", "line 2: the path must lie"),
    "short row": (f"{HEADER}\nscan.nii,covid\n", "line 2: 4 values expected"),
    "long row": ("path,label\nscan.nii,covid,1\n", "line 2: 2 values expected"),
    "UTF-16": ("path,label\nscan.nii,covid\n".encode("utf-16"), "is not UTF-8 text"),
    "no row": ("path,label\n", "No scan of your own scans"),
    "only missing files": ("path,label\nnowhere.nii,covid\n", "first: listed file missing"),
}


@pytest.fixture
def listed(tmp_path) -> Path:
    """A raw folder with two scans and a table; `prepared/` beside it holds both."""
    raw = tmp_path / "raw"
    raw.mkdir()
    write_nifti(tmp_path / "outside.nii", chest(seed=5))
    for number, name in enumerate(("scan.nii", "other.nii")):
        write_nifti(raw / name, chest(seed=number))
    write_nifti(raw / "lungs.nii", lungs())
    (raw / "link.nii").symlink_to(tmp_path / "outside.nii")
    put(raw / "scans.csv", f"{HEADER}\nscan.nii,covid,1,\nother.nii,normal,2,\n".encode())
    prepare_data_set("own", raw, tmp_path / "prepared")
    return raw


@pytest.mark.parametrize("name", LISTING_FAULTS)
def test_a_table_that_cannot_be_read_is_one_sentence_and_costs_nothing(listed, name):
    text, message = LISTING_FAULTS[name]
    before = contents(listed.parent / "prepared")
    assert len(before) == 7  # two scans with their sidecars, three tables
    put(listed / "scans.csv", text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataSetProblem) as error:
        prepare_data_set("own", listed, listed.parent / "prepared")
    sentence = str(error.value)
    assert message in sentence and "\n" not in sentence
    assert "scans.csv" in sentence
    assert contents(listed.parent / "prepared") == before


def test_a_byte_order_mark_makes_no_difference(listed):
    before = contents(listed.parent / "prepared")
    put(listed / "scans.csv", b"\xef\xbb\xbf" + (listed / "scans.csv").read_bytes())
    prepare_data_set("own", listed, listed.parent / "prepared")
    assert contents(listed.parent / "prepared") == before


def test_a_listed_file_that_is_missing_is_remarked_and_the_rest_goes_on(listed):
    (listed / "other.nii").unlink()
    quarantine, manifest = prepare_data_set("own", listed, listed.parent / "prepared")
    assert quarantine.empty and len(manifest) == 1
    assert (
        'listed file missing,"scans.csv'
        in (listed.parent / "prepared" / "findings.csv").read_text()
    )


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (lungs()[1:], "mask does not fit the scan"),
        (lungs().astype(np.int16) - 1, "not a label mask"),
        (lungs().astype(np.float32) / 2, "not a label mask"),
    ],
    ids=["other shape", "negative", "fractions"],
)
def test_a_scan_outlives_its_bad_mask(listed, mask, reason):
    write_nifti(listed / "lungs.nii", mask)
    put(listed / "scans.csv", b"path,label,lung_mask\nscan.nii,covid,lungs.nii\nother.nii,covid,\n")
    quarantine, manifest = prepare_data_set("own", listed, listed.parent / "prepared")
    assert len(manifest) == 2
    (row,) = quarantine.to_dict("records")
    assert (row["left_out"], row["reason"], row["file"]) == ("lungs", reason, "lungs.nii")


# Faults of the stage


def test_a_missing_data_set_says_where_to_get_it(tmp_path):
    with pytest.raises(DataSetMissing, match=r"get it from .* and put it there"):
        prepare_data_set("cov19-ct-db-2022", tmp_path / "absent", tmp_path / "prepared")
    assert not (tmp_path / "prepared").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_stops_the_stage_and_the_next_run_goes_on(listed, monkeypatch, number):
    wanted, folder = contents(listed.parent / "prepared"), listed.parent / "interrupted"
    complete = []

    def save_until_full(path, voxels, **keywords):
        if complete:
            path.write_bytes(b"half")
            raise OSError(number, "no space")
        save_volume(path, voxels, **keywords)
        complete.append(path.stem)

    save_volume = prepare.save_volume
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "save_volume", save_until_full)
        with pytest.raises(ScanMapError) as error:
            prepare_data_set("own", listed, folder)
    assert f"the disk that holds {folder / 'scans'} was full at scan" in str(error.value)
    assert "\n" not in str(error.value)
    first = f"scans/{complete[0]}"
    assert sorted(contents(folder)) == [f"{first}.b2nd", f"{first}.json"]
    times = {path: path.stat().st_mtime_ns for path in (folder / "scans").glob("scan-*")}
    prepare_data_set("own", listed, folder)
    assert contents(folder) == wanted
    assert {path: path.stat().st_mtime_ns for path in times} == times  # not made again


def test_too_many_bad_scans_stop_the_stage_after_naming_them(listed):
    put(listed / "other.nii", b"")
    with pytest.raises(RuntimeError, match=r"1 of 2 scans of own are unusable, .*quarantine.csv"):
        prepare_data_set("own", listed, listed.parent / "prepared", largest_share=0.05)
    assert read_quarantine(listed.parent / "prepared")["file"].tolist() == ["other.nii"]
