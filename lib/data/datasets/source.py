"""What a data set adapter returns: the scans of a raw folder, as paths, labels and splits.

An adapter reads names, lists and tables, never a picture. It is a generator that yields a
`ScanSource` for every scan it finds and a `ListingProblem` for everything that does not fit;
problems are reported and never stop the listing. What cannot be listed at all (a damaged table, a
path that leaves the data set) raises `DataSetProblem` with one sentence.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

COVID, NON_COVID, PNEUMONIA, NORMAL = "covid", "non-covid", "pneumonia", "normal"
NON_INFORMATIVE = "non-informative"  # iCTCF: slices on which the lung parenchyma cannot be judged
LABELS = (COVID, NON_COVID, PNEUMONIA, NORMAL, NON_INFORMATIVE)

ANY_NONZERO = tuple(range(1, 256))  # for 8-bit masks whose one class has no agreed value


class DataSetProblem(ValueError):  # noqa: N818 -- named after what the user has
    """A data set that cannot be listed, in one sentence for the user."""


class DataSetMissing(DataSetProblem):
    """A data set of which no scan was found: where to get it, where to put it, what is expected."""


class Reason(StrEnum):
    """Why something in a raw folder was left out or is incomplete."""

    FILE_MISSING = "listed file missing"
    LABEL_WITHOUT_SCAN = "label without scan"
    SCAN_WITHOUT_LABEL = "scan without label"
    SCAN_WITHOUT_SLICES = "scan without slices"
    SCAN_WITHOUT_MASK = "scan without mask"
    MASK_WITHOUT_SCAN = "mask without scan"
    SPLIT_MISSING = "published split missing"
    SCAN_WITHOUT_SPLIT = "scan outside the published split"
    WRONG_CLASS_FOLDER = "scan in the wrong class folder"
    UNRECOGNISED = "unrecognised name"


@dataclass(frozen=True)
class ScanSource:
    """Where one scan lies, and what its data set says about it.

    Attributes:
        scan_id: pseudonymous, unique in the data set, stable, safe as a file name
            (letters, digits, ``.``, ``_``, ``-``).
        patient_id: pseudonymous; equal for scans that may show one patient.
        files: one file, one folder of slices, or the slices one by one in order.
        label: one of `LABELS`, or None where the data set has none.
        split: one of `lib.data.splits.SPLITS` as published, or None.
        lung_mask: files of the same slices, or None.
        lesion_mask: files of the same slices, or None.
        attributes: what else is known, for example ``{"severity": "mild"}``.
    """

    scan_id: str
    patient_id: str
    files: tuple[Path, ...]
    label: str | None = None
    split: str | None = None
    lung_mask: tuple[Path, ...] | None = None
    lesion_mask: tuple[Path, ...] | None = None
    attributes: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class ListingProblem:
    """Something in a raw folder that does not fit.

    Attributes:
        reason: what is wrong, for counting.
        file: the file or folder at fault.
        detail: a few words more; never patient identity.
    """

    reason: Reason
    file: Path
    detail: str = ""


Entry = ScanSource | ListingProblem


@dataclass(frozen=True)
class Listing:
    """The scans of a data set in the order of their ids, and what did not fit."""

    scans: list[ScanSource]
    problems: list[ListingProblem]


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set: how to obtain it, how to list it, and how to read its masks.

    Attributes:
        name: short name, also the name of its folder.
        title: full name.
        where: address, or how to obtain it.
        licence: as far as it is known here.
        layout: the files that are looked for, in one line.
        citation: key of its paper, first author and year.
        find: yields the scans and problems below a root; keyword options belong to the data set.
        lung_values: values of the source mask that are lung; () where there is no lung mask.
        lung_sides_known: whether the lung mask already tells right (1) from left (2).
        lesion_values: value of the source mask -> value of the study's lesion mask.
        transposed: whether rows and columns of every slice and mask are swapped.
    """

    name: str
    title: str
    where: str
    licence: str
    layout: str
    citation: str
    find: Callable[..., Iterator[Entry]]
    lung_values: tuple[int, ...] = ()
    lung_sides_known: bool = False
    lesion_values: Mapping[int, int] = field(default_factory=dict)
    transposed: bool = False
