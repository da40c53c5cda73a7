"""COVID-CT-MD: whole DICOM scans of three classes."""

from collections.abc import Iterator
from pathlib import Path

from lib.data.datasets.folders import entries, find_layout, safe_id, subfolders
from lib.data.datasets.source import (
    COVID,
    NORMAL,
    PNEUMONIA,
    DataSet,
    Entry,
    ListingProblem,
    Reason,
    ScanSource,
)

CLASS_FOLDERS = {
    "covid-19 subjects": COVID,
    "cap subjects": PNEUMONIA,
    "normal subjects": NORMAL,
}


def find_covid_ct_md(root: Path) -> Iterator[Entry]:
    """A scan is a subject's folder of DICOM files."""
    for folder in subfolders(find_layout(root, CLASS_FOLDERS)):
        label = CLASS_FOLDERS.get(folder.name.lower())
        for subject in subfolders(folder) if label else ():
            if any(not entry.is_dir() for entry in entries(subject)):
                scan_id = safe_id(subject.name)
                yield ScanSource(scan_id, scan_id, (subject,), label)
            else:
                yield ListingProblem(Reason.SCAN_WITHOUT_SLICES, subject)


COVID_CT_MD = DataSet(
    name="covid-ct-md",
    title="COVID-CT-MD",
    where="https://github.com/ShahinSHH/COVID-CT-MD",
    licence="see its page",
    layout="'COVID-19 subjects', 'Cap subjects' and 'Normal subjects' with <subject>/*.dcm",
    citation="Afshar 2021",
    find=find_covid_ct_md,
)
