"""Benchmarks: ours against a reference, timed in turn, and a file that says where and on what.

A benchmark file holds the machine, the versions, the commit, the sizes, every repetition and, for
each comparison, the ratio to the reference that was measured in the same run: times of two machines
cannot be compared, ratios roughly can. No host name, user name or path goes into it.
"""

import json
import os
import platform
import re
import resource
import subprocess
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from timeit import timeit
from typing import Any

import gdcm
import nibabel
import numpy as np
from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from lib.data.files import whole_file
from lib.data.scan import HOUNSFIELD_LOWEST, Scan, to_grey

MEASURED_CODE = ("lib", "notebooks", "params.yaml", "requirements.txt")
MEBIBYTE, GIBIBYTE = 2**20, 2**30
BOOTSTRAP_SAMPLES = 2000
JPEG_QUALITY = 92


# ---------------------------------------------------------------------------- measuring


def compare(
    reference: Callable[[], object], ours: Callable[[], object], *, repetitions: int, slices: int
) -> dict[str, Any]:
    """Time two ways to do the same work, in alternation: reference, ours, reference, ours, ...

    Alternation lets both meet the same load and the same temperature of the processor. One call of
    each goes before, untimed, so that files are cached and modules imported. Results are dropped;
    dropping them is timed.

    Args:
        reference: the work as a bare library does it.
        ours: the same work as the study does it.
        repetitions: timed calls of each.
        slices: that one call works through.

    Returns:
        ``reference_seconds`` and ``our_seconds``, every repetition; ``reference_median`` and
        ``our_median``; ``ratio`` = reference median / our median, so above 1 ours is faster;
        ``ratio_interval``, its 95 % bootstrap interval over pairs of neighbouring calls;
        ``slices``, and ``slices_per_second`` of ours by its median.

    Raises:
        ValueError: without a repetition.
    """
    if repetitions < 1:
        raise ValueError(f"a comparison needs at least one repetition, got {repetitions}")
    reference()
    ours()
    pairs = [[timeit(work, number=1) for work in (reference, ours)] for _ in range(repetitions)]
    seconds = np.array(pairs)
    medians = np.median(seconds, axis=0)
    interval = np.quantile(_resampled_ratios(seconds), [0.025, 0.975])
    return {
        "slices": slices,
        "slices_per_second": round(slices / float(medians[1]), 1),
        "reference_seconds": _rounded(seconds[:, 0]),
        "our_seconds": _rounded(seconds[:, 1]),
        "reference_median": round(float(medians[0]), 6),
        "our_median": round(float(medians[1]), 6),
        "ratio": round(float(medians[0] / medians[1]), 3),
        "ratio_interval": _rounded(interval, decimals=3),
    }


def peak_memory(work: Callable[[], object]) -> float:
    """Largest resident memory of a fresh process that does one piece of work, in MiB.

    The interpreter and all that the work imports are included; what this process holds is not.

    Args:
        work: can be pickled: a function of a module, or a ``functools.partial`` of one.

    Raises:
        BrokenProcessPool: the process died, for example because memory ran out.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        return executor.submit(_peak_after, work).result()


def _peak_after(work: Callable[[], object]) -> float:
    work()
    return own_peak_memory()


def own_peak_memory() -> float:
    """Largest resident memory of this process so far, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss of Linux starts at the size of the process that started this
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MEBIBYTE  # bytes on macOS


def _resampled_ratios(seconds: np.ndarray) -> np.ndarray:
    """Ratio of medians of bootstrap samples; ``seconds`` has a row per pair of calls."""
    rng = np.random.default_rng(0)
    chosen = rng.integers(len(seconds), size=(BOOTSTRAP_SAMPLES, len(seconds)))
    medians = np.median(seconds[chosen], axis=1)  # (samples, 2)
    return medians[:, 0] / medians[:, 1]


def _rounded(values: np.ndarray, *, decimals: int = 6) -> list[float]:
    return [round(value, decimals) for value in values.tolist()]


# ---------------------------------------------------------------------------- where and what


def machine(packages: Iterable[str]) -> dict[str, Any]:
    """The machine and its software; nothing that names its owner or its place.

    Args:
        packages: installed distributions whose versions matter, for example ``"numpy"``.

    Returns:
        processor, cores that this process may use, memory in GiB, load (of the last minute: call
        this before measuring), system, and versions of Python and the packages.
    """
    usable = getattr(os, "sched_getaffinity", None)  # Linux has it
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": _processor(),
        "cores": len(usable(0)) if usable else os.cpu_count(),
        "memory_gib": round(memory / GIBIBYTE, 1),
        "load": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", info.read_text() if info.exists() else "", re.M)
    return model[1] if model else platform.processor() or platform.machine()


def commit(root: Path) -> dict[str, Any]:
    """The commit of the code that is measured.

    Args:
        root: the repository's.

    Returns:
        commit, and modified: whether `MEASURED_CODE` differs from it. Both are None outside git.
    """
    try:
        head = _git(root, "rev-parse", "HEAD")
        changes = _git(root, "status", "--porcelain", "--", *MEASURED_CODE)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return {"commit": None, "modified": None}
    return {"commit": head.strip(), "modified": bool(changes)}


def _git(root: Path, *arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout


def write_benchmark(
    path: Path,
    *,
    measured_on: Mapping[str, Any],
    code: Mapping[str, Any],
    sizes: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write a benchmark file, whole or not at all.

    Args:
        path: of the JSON file; its stem is the benchmark's name.
        measured_on: from `machine`.
        code: from `commit`.
        sizes: of the work, for example ``{"slices": 60}``.
        results: by case, from `compare` and `peak_memory`, with what belongs to them (target, ...).
    """
    content = {
        "benchmark": path.stem,
        "date": datetime.now(UTC).date().isoformat(),
        **code,
        "machine": measured_on,
        "sizes": sizes,
        "results": results,
    }
    text = json.dumps(content, indent=1, allow_nan=False)
    with whole_file(path) as partial_file:
        partial_file.write_text(text + "\n", encoding="utf-8", newline="\n")


# ---------------------------------------------------------------------------- files to read


def save_pictures(scan: Scan, folder: Path) -> None:
    """Write a scan as JPEG files ``<k>.jpg``, head first, in the lung window."""
    for index, voxels in enumerate(scan.voxels):
        picture = Image.fromarray(to_grey(voxels))
        picture.save(folder / f"{index}.jpg", quality=JPEG_QUALITY)


def save_nifti(scan: Scan, folder: Path) -> None:
    """Write a scan as ``scan.nii.gz`` with the axes of most converters: left, front, head."""
    between_slices, between_rows, between_columns = scan.spacing_mm
    affine = np.diag([-between_columns, between_rows, between_slices, 1.0])
    image = nibabel.Nifti1Image(scan.voxels[::-1, ::-1].T, affine)
    nibabel.save(image, folder / "scan.nii.gz")


def save_dicom(scan: Scan, folder: Path, *, transfer_syntax: str | None = None) -> None:
    """Write a scan as DICOM files ``<k>.dcm`` that hold no more than reading needs.

    Headers of scanners are longer, which costs a bare decoder more than it costs `read_scan`.

    Args:
        scan: Hounsfield units with a known spacing.
        folder: an existing one.
        transfer_syntax: a lossless one as GDCM names it, for example ``"RLELossless"``; None leaves
            the pixels uncompressed.

    Raises:
        RuntimeError: where GDCM cannot encode a file.
    """
    series = generate_uid()
    for index in range(len(scan.voxels)):
        file = folder / f"{index}.dcm"
        _dicom_slice(scan, index, series).save_as(file, enforce_file_format=True)
        if transfer_syntax:
            _compress(file, transfer_syntax)


def _dicom_slice(scan: Scan, index: int, series: str) -> Dataset:
    between_slices, *in_plane = (round(distance, 4) for distance in scan.spacing_mm)
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.SOPClassUID, header.SOPInstanceUID = CTImageStorage, generate_uid()
    header.Modality, header.SeriesInstanceUID = "CT", series
    header.ImagePositionPatient = [0, 0, round(-index * between_slices, 4)]
    header.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    header.PixelSpacing, header.SliceThickness = in_plane, between_slices
    header.RescaleSlope, header.RescaleIntercept = 1, HOUNSFIELD_LOWEST
    stored = scan.voxels[index] - np.int16(HOUNSFIELD_LOWEST)
    header.set_pixel_data(stored, "MONOCHROME2", bits_stored=16)
    return header


def _compress(file: Path, transfer_syntax: str) -> None:
    """Compress a DICOM file in place; pydicom itself encodes no JPEG Lossless."""
    reader, writer = gdcm.ImageReader(), gdcm.ImageWriter()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, transfer_syntax)))
    reader.SetFileName(str(file))
    done = reader.Read()
    change.SetInput(reader.GetImage())
    done = done and change.Change()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(file))
    if not (done and writer.Write()):
        raise RuntimeError(f"GDCM cannot encode {file.name} as {transfer_syntax}")


LAYOUTS: dict[str, Callable[[Scan, Path], None]] = {
    "JPEG pictures": save_pictures,
    "NIfTI, gzip": save_nifti,
    "DICOM": save_dicom,
    "DICOM, RLE": partial(save_dicom, transfer_syntax="RLELossless"),
    "DICOM, JPEG Lossless": partial(save_dicom, transfer_syntax="JPEGLosslessProcess14_1"),
    "DICOM, JPEG 2000": partial(save_dicom, transfer_syntax="JPEG2000Lossless"),
}
BARE_DECODERS: dict[str, Callable[[Path], np.ndarray]] = {
    ".jpg": lambda file: np.asarray(Image.open(file)),
    ".gz": lambda file: np.asarray(nibabel.load(file).dataobj),
    ".dcm": lambda file: dcmread(file).pixel_array,
}


def write_layouts(
    scan: Scan, folder: Path, names: Iterable[str] = tuple(LAYOUTS)
) -> dict[str, Path]:
    """Write one scan in several layouts, each in a folder of its own.

    Args:
        scan: Hounsfield units with a known spacing.
        folder: made where it does not exist.
        names: keys of `LAYOUTS`.

    Returns:
        The folders by name; none holds anything else.
    """
    folders = {name: folder / str(number) for number, name in enumerate(names)}
    for name, path in folders.items():
        path.mkdir(parents=True)
        LAYOUTS[name](scan, path)
    return folders


def decode_files(folder: Path) -> list[np.ndarray]:
    """The values of every file of a folder, as the bare library of its format gives them."""
    files = sorted(folder.iterdir())
    decode = BARE_DECODERS[files[0].suffix]
    return [decode(file) for file in files]
