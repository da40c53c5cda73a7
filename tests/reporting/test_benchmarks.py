"""The module that measures: what is timed in which order, what is written, what is kept out."""

import json
import platform
import subprocess
import time
from functools import partial

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.data.readers import read_scan
from lib.data.scan import Scan, apply_window
from lib.reporting import benchmarks


def slice_values(shape, low=-1024, high=1500):
    """Smooth Hounsfield units, so that JPEG keeps them."""
    positions = np.linspace(0, 1, np.prod(shape)).reshape(shape)
    return (low + positions * (high - low)).astype(np.int16)


COMPRESSED = ("DICOM, RLE", "DICOM, JPEG Lossless", "DICOM, JPEG 2000")
SCAN = Scan(slice_values((3, 32, 40)), spacing_mm=(5.0, 0.7, 0.8))


# ---------------------------------------------------------------------------- compare


def test_calls_alternate_after_one_warm_up_of_each():
    calls = []
    benchmarks.compare(
        partial(calls.append, "A"), partial(calls.append, "B"), repetitions=3, slices=1
    )
    assert "".join(calls) == "AB" * 4


def test_the_faster_way_has_a_ratio_above_one():
    slow, fast = partial(time.sleep, 0.05), partial(time.sleep, 0.001)
    result = benchmarks.compare(slow, fast, repetitions=3, slices=1)
    assert min(result["reference_seconds"]) >= 0.05
    assert 1 < result["ratio"] <= 50.5


@given(st.lists(st.tuples(*[st.floats(1e-3, 1e3)] * 2), min_size=1, max_size=9))
def test_medians_and_ratio_are_those_of_the_repetitions(pairs):
    clock = iter([seconds for pair in pairs for seconds in pair])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmarks, "timeit", lambda work, number: next(clock))
        result = benchmarks.compare(list, list, repetitions=len(pairs), slices=60)
    reference, ours = map(np.array, zip(*pairs, strict=True))
    assert result["reference_seconds"] == pytest.approx(reference.tolist(), abs=1e-6)
    assert result["our_median"] == pytest.approx(np.median(ours), abs=1e-6)
    assert result["ratio"] == pytest.approx(np.median(reference) / np.median(ours), abs=1e-3)
    assert result["slices_per_second"] == pytest.approx(60 / np.median(ours), abs=0.1)
    low, high = result["ratio_interval"]
    assert min(reference) / max(ours) - 1e-3 <= low <= high
    assert high <= max(reference) / min(ours) + 1e-3


def test_repetitions_that_agree_leave_no_spread():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmarks, "timeit", lambda work, number: 2.0)
        result = benchmarks.compare(list, list, repetitions=5, slices=1)
    assert result["ratio_interval"] == [1, 1]


def test_a_comparison_without_repetitions_is_refused():
    with pytest.raises(ValueError, match="at least one repetition, got 0"):
        benchmarks.compare(list, list, repetitions=0, slices=1)


# ---------------------------------------------------------------------------- peak_memory


def test_peak_memory_is_that_of_the_work_alone():
    held = np.ones(512 * 2**20, np.uint8)  # of this process, which must not count
    peak = benchmarks.peak_memory(partial(np.ones, 256 * 2**20, np.uint8))
    assert 256 < peak < held.nbytes / 2**20


# ---------------------------------------------------------------------------- machine, commit, file


def test_the_machine_is_described_without_its_name():
    described = benchmarks.machine(["numpy"])
    assert described["versions"] == {
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
    assert described["cores"] >= 1 and described["memory_gib"] > 0 and described["processor"]
    assert platform.node() not in json.dumps(described)


@pytest.fixture
def small_repository(tmp_path):
    """A repository with one commit that holds lib/a.py."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/a.py").write_text("A = 1\n")
    for command in (
        "init --quiet",
        "add lib",
        "-c user.name=a -c user.email=a@example.org commit --quiet --message first",
    ):
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True)
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "modified"),
    [(None, False), ("README.md", False), ("lib/a.py", True), ("lib/new.py", True)],
)
def test_commit_and_whether_the_code_was_modified(small_repository, changed, modified):
    if changed:
        (small_repository / changed).write_text("A = 2\n")
    (branch,) = (small_repository / ".git/refs/heads").iterdir()
    head = branch.read_text().strip()
    assert benchmarks.commit(small_repository) == {"commit": head, "modified": modified}


def test_no_commit_outside_a_repository(tmp_path):
    assert benchmarks.commit(tmp_path) == {"commit": None, "modified": None}


def test_the_file_says_where_what_and_how_fast(tmp_path):
    result = {"our_seconds": [0.1, 0.25], "ratio": 0.9, "slices": 60}
    path = tmp_path / "new" / "example.json"
    benchmarks.write_benchmark(
        path,
        measured_on={"cores": 2},
        code={"commit": "abc", "modified": False},
        sizes={"slices": 60},
        results={"case": result},
    )
    content = json.loads(path.read_text())
    assert content.pop("date") == time.strftime("%Y-%m-%d", time.gmtime())
    assert content == {
        "benchmark": "example",
        "commit": "abc",
        "modified": False,
        "machine": {"cores": 2},
        "sizes": {"slices": 60},
        "results": {"case": result},
    }


def test_a_benchmark_that_did_not_measure_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="nan"):
        benchmarks.write_benchmark(
            tmp_path / "a.json", measured_on={}, code={}, sizes={}, results={"a": {"ratio": np.nan}}
        )
    assert not any(tmp_path.iterdir())


# ---------------------------------------------------------------------------- files to read


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    return benchmarks.write_layouts(SCAN, tmp_path_factory.mktemp("layouts"))


@pytest.mark.parametrize("name", ["NIfTI, gzip", "DICOM", *COMPRESSED])
def test_every_layout_with_a_geometry_is_the_scan(layouts, name):
    scan = read_scan(layouts[name])
    np.testing.assert_array_equal(scan.voxels, SCAN.voxels)
    assert scan.spacing_mm == pytest.approx(SCAN.spacing_mm)
    assert scan.flags == ()


def test_pictures_are_the_scan_in_the_lung_window(layouts):
    voxels = read_scan(layouts["JPEG pictures"]).voxels
    assert (voxels.shape, voxels.dtype) == (SCAN.voxels.shape, np.uint8)
    np.testing.assert_allclose(voxels, apply_window(SCAN.voxels).astype(float), atol=4)


@pytest.mark.parametrize("name", ["DICOM", *COMPRESSED])
def test_bare_decoders_give_what_the_reader_starts_from(layouts, name):
    stored = np.sort(np.stack(benchmarks.decode_files(layouts[name])), axis=0)
    np.testing.assert_array_equal(stored, SCAN.voxels + 1024)


@pytest.mark.parametrize(
    ("name", "transfer_syntax"),
    [
        ("DICOM", pydicom.uid.ExplicitVRLittleEndian),
        ("DICOM, RLE", pydicom.uid.RLELossless),
        ("DICOM, JPEG Lossless", pydicom.uid.JPEGLosslessSV1),
        ("DICOM, JPEG 2000", pydicom.uid.JPEG2000Lossless),
    ],
)
def test_dicom_is_compressed_as_its_name_says(layouts, name, transfer_syntax):
    file = sorted(layouts[name].iterdir())[0]
    assert pydicom.dcmread(file).file_meta.TransferSyntaxUID == transfer_syntax


def test_only_the_layouts_asked_for_are_written(tmp_path):
    layouts = benchmarks.write_layouts(SCAN, tmp_path / "new", ["DICOM"])
    assert sorted(tmp_path.rglob("*.*")) == [
        layouts["DICOM"] / f"{index}.dcm" for index in range(3)
    ]


def test_pixels_that_gdcm_cannot_encode_are_refused(tmp_path):
    with pytest.raises(RuntimeError, match=r"cannot encode 0\.dcm as MPEG2MainProfile"):
        benchmarks.save_dicom(SCAN, tmp_path, transfer_syntax="MPEG2MainProfile")
