"""The data sets of the study: which scans lie in a raw folder, in each set's published layout.

One module per data set; `source` says what they return and `folders` how names are read.
"""

from collections import Counter
from pathlib import Path

from lib.data.datasets.cncb_lesions import CNCB_LESIONS
from lib.data.datasets.cov19_ct_db import COV19_CT_DB_2021, COV19_CT_DB_2022
from lib.data.datasets.covid_ct import COVID_CT
from lib.data.datasets.covid_ct_md import COVID_CT_MD
from lib.data.datasets.covid_semiseg import COVID_SEMISEG
from lib.data.datasets.covidx_ct import COVIDX_CT, ListedSlice, covidx_name, read_covidx_list
from lib.data.datasets.finding_lungs import FINDING_LUNGS, fixed_split
from lib.data.datasets.folders import read_name_list
from lib.data.datasets.ictcf import ICTCF
from lib.data.datasets.mosmed import MOSMED
from lib.data.datasets.own import OWN
from lib.data.datasets.phantom import PHANTOM, PHANTOM_8_BIT
from lib.data.datasets.source import (
    COVID,
    LABELS,
    NON_COVID,
    NON_INFORMATIVE,
    NORMAL,
    PNEUMONIA,
    DataSet,
    DataSetMissing,
    DataSetProblem,
    Listing,
    ListingProblem,
    Reason,
    ScanSource,
)

__all__ = [
    "COVID",
    "DATA_SETS",
    "LABELS",
    "NON_COVID",
    "NON_INFORMATIVE",
    "NORMAL",
    "PNEUMONIA",
    "DataSet",
    "DataSetMissing",
    "DataSetProblem",
    "ListedSlice",
    "Listing",
    "ListingProblem",
    "Reason",
    "ScanSource",
    "covidx_name",
    "fixed_split",
    "list_scans",
    "read_covidx_list",
    "read_name_list",
]

DATA_SETS: dict[str, DataSet] = {
    data_set.name: data_set
    for data_set in (
        PHANTOM,
        PHANTOM_8_BIT,
        COV19_CT_DB_2021,
        COV19_CT_DB_2022,
        MOSMED,
        COVIDX_CT,
        CNCB_LESIONS,
        ICTCF,
        FINDING_LUNGS,
        COVID_CT_MD,
        COVID_CT,
        COVID_SEMISEG,
        OWN,
    )
}


def list_scans(name: str, root: Path, **options: str) -> Listing:
    """The scans of a data set below a folder, and what did not fit there.

    Args:
        name: a key of `DATA_SETS`.
        root: the folder the data set was put into.
        **options: of the data set, for example ``published_split="png"`` of mosmed.

    Returns:
        Scans sorted by id, and problems in the order they were met. No picture has been opened.

    Raises:
        DataSetMissing: where no scan is found.
        DataSetProblem: for an unknown data set, a damaged table, or two scans of one id.
    """
    if name not in DATA_SETS:
        raise DataSetProblem(f"there is no data set {name!r}, only {', '.join(DATA_SETS)}.")
    data_set, root = DATA_SETS[name], Path(root)
    found = list(data_set.find(root, **options)) if root.is_dir() else []
    scans = [entry for entry in found if isinstance(entry, ScanSource)]
    problems = [entry for entry in found if isinstance(entry, ListingProblem)]
    if not scans:
        raise DataSetMissing(_missing(data_set, root, problems))
    scan_id, count = Counter(scan.scan_id for scan in scans).most_common(1)[0]
    if count > 1:
        raise DataSetProblem(f"{count} scans of {data_set.title} in {root} have the id {scan_id}.")
    return Listing(sorted(scans, key=lambda scan: scan.scan_id), problems)


def _missing(data_set: DataSet, root: Path, problems: list[ListingProblem]) -> str:
    """Where to get a data set, where to put it, and what was looked for, in one sentence."""
    first = f", and {len(problems)} problems, first: {problems[0].reason}" if problems else ""
    return (
        f"No scan of {data_set.title} in {root}: get it from {data_set.where} and put it there "
        f"(looked for {data_set.layout}{first})."
    )
