"""COVID-CT: single pictures cut out of papers, with its official split."""

import re
from collections.abc import Iterator
from pathlib import Path

from lib.data.datasets.folders import (
    SPLIT_NAMES,
    files_in,
    find_layout,
    pseudonym,
    safe_id,
    subfolders,
)
from lib.data.datasets.source import COVID, NON_COVID, DataSet, Entry, ScanSource

CLASS_FOLDERS = {"CT_COVID": COVID, "CT_NonCOVID": NON_COVID}
# A name is <paper>-p<page>-<figure>%<part>, <paper>_<figure>%<part> or <case>%<part>.
_END_OF_GROUP = re.compile(r"-p\d+-|_\d+%|%")


def find_covid_ct(root: Path) -> Iterator[Entry]:
    """Every picture as a scan of one slice.

    Figures of one paper may show one patient, so pictures are grouped by paper (non-COVID: by
    case). The official split tears many papers apart; it is kept, and the integrity check says so.
    """
    for folder in subfolders(find_layout(root, SPLIT_NAMES)):
        split = SPLIT_NAMES.get(folder.name.lower())
        for name, label in CLASS_FOLDERS.items() if split else ():
            for picture in files_in(folder / name):
                yield ScanSource(
                    scan_id=_picture_id(label, picture.name),
                    patient_id=f"{label}-{_group(picture.stem)}",
                    files=(picture,),
                    label=label,
                    split=split,
                )


def _picture_id(label: str, name: str) -> str:
    """Class, readable name, and a hash that tells ``1%1`` from ``1_1``."""
    return f"{label}-{safe_id(Path(name).stem)}-{pseudonym(name, 8)}"


def _group(name: str) -> str:
    """The paper or case that a picture comes from."""
    return safe_id(_END_OF_GROUP.split(name, maxsplit=1)[0])


COVID_CT = DataSet(
    name="covid-ct",
    title="COVID-CT",
    where="https://github.com/UCSD-AI4H/COVID-CT",
    licence="see its page",
    layout="{train,val,test}/{CT_COVID,CT_NonCOVID} with *.png and *.jpg",
    citation="Yang 2020",
    find=find_covid_ct,
)
