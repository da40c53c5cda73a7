"""Every published number that a table of the study compares with, each with its source.

The only file of the project with results typed by hand. Values stand as printed, in percent. They
are targets, not truths: several contradict the papers' own formulas or could not have been
obtained on the stated number of scans; those carry a remark (FACTS sections 4.10, 5.3 and 8.1).
What the first paper says of its data and of its own margins stands here too; `lib.reporting.audit`
derives the remarks on it, and those on the tables of the second.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import pandas as pd

SAM2CLIP2SAM_PAPER = "sam2clip2sam"  # Kollias et al. 2024, paper 000
CNN_BERT_PAPER = "cnn_bert"  # Tan and Liu 2021, paper 001
MASK_NET_PAPER = "mask_net"  # Ter-Sarkisov 2022, paper 002

NO_SEGMENTATION = "none"
CONVENTIONAL = "conventional"
SAM2CLIP2SAM = "sam2clip2sam"
UNET = "unet"

PERCENT = 100.0
FRACTION_DECIMALS = 4  # percent are printed with two decimals

Key = tuple[str, str]  # system and segmentation


@dataclass(frozen=True)
class PublishedValue:
    """One printed number.

    Attributes:
        paper: ``sam2clip2sam``, ``cnn_bert`` or ``mask_net``.
        table: where it stands, for example ``"Table 1"``.
        system: the classifier.
        segmentation: what prepared its input.
        data_set: data set and part of it that the number was measured on.
        metric: named as in ``lib.evaluation.classification.classification_scores``.
        value: as printed, in percent.
        source: row and column of the number.
        remark: what is known to be wrong with it; empty where nothing is.
    """

    paper: str
    table: str
    system: str
    segmentation: str
    data_set: str
    metric: str
    value: float
    source: str
    remark: str = ""


@dataclass(frozen=True)
class _PrintedTable:
    """A table as printed: one row of values per system and segmentation."""

    paper: str
    table: str
    data_set: str
    metrics: tuple[str, ...]
    rows: Mapping[Key, Sequence[float | None]]  # None where the paper prints a dash
    remarks: Mapping[tuple[str, str, str], str]  # by system, segmentation and metric

    def values(self) -> Iterator[PublishedValue]:
        for (system, segmentation), numbers in self.rows.items():
            for metric, number in zip(self.metrics, numbers, strict=True):
                if number is None:
                    continue
                source = f"{self.table}, row {system} / {segmentation}, column {metric}"
                remark = self.remarks.get((system, segmentation, metric), "")
                yield PublishedValue(
                    self.paper, self.table, system, segmentation, self.data_set,
                    metric, number, source, remark,
                )  # fmt: skip


def _remarks(
    keys: Iterable[Key], metrics: Iterable[str], text: str
) -> dict[tuple[str, str, str], str]:
    """The same remark for several rows and columns."""
    metrics = tuple(metrics)
    return {(*key, metric): text for key in keys for metric in metrics}


def _merged(*parts: Mapping[tuple[str, str, str], str]) -> dict[tuple[str, str, str], str]:
    """Remarks of several findings, those of one cell behind one another."""
    merged: dict[tuple[str, str, str], str] = {}
    for part in parts:
        for cell, text in part.items():
            merged[cell] = f"{merged[cell]}; {text}" if cell in merged else text
    return merged


_F1_COLUMNS = ("macro_f1", "f1_covid", "f1_non_covid")
_CLASS_F1 = _F1_COLUMNS[1:]
_DETECTION_COLUMNS = ("precision", "sensitivity", "f1_covid")
_RACNET_ROWS = [("RACNet", name) for name in (NO_SEGMENTATION, CONVENTIONAL, SAM2CLIP2SAM)]
# The remarks are printed; lib.reporting.audit derives each from the numbers (FACTS 8.1).
_NOT_EQUATION_9 = "not the mean of the two class F1 scores, against equation 9 of the paper"
_OTHER_CLASS_RATIO = "implies another ratio of classes than the competitors, so other scans"
_UNREACHABLE_F1 = "no outcome on the 5,281 test scans gives this pair of class F1 scores"
_UNREACHABLE_PRECISION = "no counts out of 255 and 76 scans (or the paper's 256) give this value"
_UNREACHABLE_SENSITIVITY = "no count of scans out of 255 (or the paper's 256) gives this value"
_ROUND_GAIN = "gains exactly a multiple of 0.25 over the row before"
FDVTS_CITATION = (
    "reached by the team's video transformer (arXiv 2211.14557); the paper cites its report on a "
    "3-D ResNeSt (arXiv 2207.01758)"
)

_TABLE_1 = _PrintedTable(
    paper=SAM2CLIP2SAM_PAPER,
    table="Table 1",
    data_set="COV19-CT-DB (ECCV 2022), test",
    metrics=_F1_COLUMNS,
    rows={
        ("MDAP", NO_SEGMENTATION): (87.87, 78.80, 96.95),
        ("MDAP", SAM2CLIP2SAM): (89.87, 81.50, 97.25),
        ("FDVTS", NO_SEGMENTATION): (89.11, 80.92, 97.31),
        ("FDVTS", SAM2CLIP2SAM): (90.61, 82.22, 97.51),
        ("ACVLab", NO_SEGMENTATION): (89.11, 80.78, 97.45),
        ("ACVLab", SAM2CLIP2SAM): (90.61, 82.08, 97.65),
        ("RACNet", NO_SEGMENTATION): (93.06, 92.18, 93.95),
        ("RACNet", CONVENTIONAL): (95.06, 94.18, 95.95),
        ("RACNet", SAM2CLIP2SAM): (96.81, 95.68, 97.95),
    },
    remarks=_merged(
        _remarks([("FDVTS", NO_SEGMENTATION)], _F1_COLUMNS, FDVTS_CITATION),
        _remarks(
            [(name, SAM2CLIP2SAM) for name in ("MDAP", "FDVTS", "ACVLab")],
            ["macro_f1"],
            _NOT_EQUATION_9,
        ),
        _remarks(_RACNET_ROWS, _CLASS_F1, _OTHER_CLASS_RATIO),
        _remarks(
            [("MDAP", SAM2CLIP2SAM), ("ACVLab", SAM2CLIP2SAM)],
            _CLASS_F1,
            _UNREACHABLE_F1,
        ),
        _remarks(
            [(name, SAM2CLIP2SAM) for name in ("MDAP", "FDVTS", "ACVLab")],
            ["macro_f1"],
            _ROUND_GAIN,
        ),
        _remarks(_RACNET_ROWS[1:], _F1_COLUMNS, _ROUND_GAIN),
    ),
)

_MOSMED_COMPETITORS = ("MC3_18", "DenseNet3D121", "CovidNet3D", "EMARS-APS")

_TABLE_2 = _PrintedTable(
    paper=SAM2CLIP2SAM_PAPER,
    table="Table 2",
    data_set="MosMedData, test",
    metrics=_DETECTION_COLUMNS,
    rows={
        ("MC3_18", NO_SEGMENTATION): (79.43, 98.43, 87.92),
        ("MC3_18", SAM2CLIP2SAM): (80.93, 98.73, 88.95),
        ("DenseNet3D121", NO_SEGMENTATION): (84.23, 92.16, 88.01),
        ("DenseNet3D121", SAM2CLIP2SAM): (85.73, 93.66, 89.51),
        ("CovidNet3D", NO_SEGMENTATION): (79.50, 98.82, 88.11),
        ("CovidNet3D", SAM2CLIP2SAM): (81.50, 98.92, 89.37),
        ("EMARS-APS", NO_SEGMENTATION): (93.52, 90.59, 92.03),
        ("EMARS-APS", SAM2CLIP2SAM): (95.02, 92.09, 93.53),
        ("RACNet", NO_SEGMENTATION): (92.69, 90.85, 91.76),
        ("RACNet", CONVENTIONAL): (94.69, 92.85, 93.76),
        ("RACNet", SAM2CLIP2SAM): (96.12, 94.86, 95.49),
    },
    remarks=_merged(
        _remarks(
            [("DenseNet3D121", SAM2CLIP2SAM)],
            ["precision"],
            _UNREACHABLE_PRECISION,
        ),
        _remarks(
            [*[(name, SAM2CLIP2SAM) for name in _MOSMED_COMPETITORS], *_RACNET_ROWS],
            ["sensitivity"],
            _UNREACHABLE_SENSITIVITY,
        ),
        _remarks(
            [(name, SAM2CLIP2SAM) for name in _MOSMED_COMPETITORS], ["precision"], _ROUND_GAIN
        ),
        _remarks(
            [(name, SAM2CLIP2SAM) for name in ("DenseNet3D121", "EMARS-APS")],
            ["sensitivity", "f1_covid"],
            _ROUND_GAIN,
        ),
        _remarks([("RACNet", CONVENTIONAL)], _DETECTION_COLUMNS, _ROUND_GAIN),
    ),
)


@dataclass(frozen=True)
class PublishedCount:
    """How many scans a part of a data set holds.

    Attributes:
        data_set: data set.
        part: which part, and by whom counted.
        positives: scans with COVID-19; None where only the sum is known.
        negatives: scans without it; None likewise.
        total: scans.
        source: where the number stands.
    """

    data_set: str
    part: str
    positives: int | None
    negatives: int | None
    total: int
    source: str


COV19_CT_DB, MOSMED = "COV19-CT-DB (ECCV 2022)", "MosMedData"
COV19_CT_DB_2021 = "COV19-CT-DB (ICCV 2021)"
RELEASED_TEST, REMAINDER, VALIDATION_PART = "test, as released", "test, remainder", "validation"
SPLIT_FILE, AS_PRINTED, WHOLE = "test, by the split file", "test, as printed", "all"
_DATA_SECTION = "SAM2CLIP2SAM, section 4.1"

SCAN_COUNTS = (
    PublishedCount(COV19_CT_DB, WHOLE, 1550, 5044, 6594, _DATA_SECTION),
    PublishedCount(COV19_CT_DB, "training", 882, 1110, 1992, _DATA_SECTION),
    PublishedCount(COV19_CT_DB, VALIDATION_PART, 215, 289, 504, _DATA_SECTION),
    PublishedCount(COV19_CT_DB, REMAINDER, 453, 3645, 4098, "all less training and validation"),
    PublishedCount(COV19_CT_DB, RELEASED_TEST, None, None, 5281, "FACTS 6.3 and 7.1"),
    PublishedCount(MOSMED, WHOLE, 856, 254, 1110, _DATA_SECTION),
    PublishedCount(MOSMED, "training", 601, 178, 779, _DATA_SECTION),
    PublishedCount(MOSMED, AS_PRINTED, 256, 76, 332, _DATA_SECTION),
    PublishedCount(MOSMED, SPLIT_FILE, 255, 76, 331, "FACTS 7.2"),
    PublishedCount(COV19_CT_DB_2021, VALIDATION_PART, 165, 209, 374, "released lists, FACTS 4.4"),
)


@dataclass(frozen=True)
class PublishedMargin:
    """A difference between rows of a table that the paper's text states.

    Attributes:
        table: the table that the text is about.
        said: the margin and the metric that the text names.
        metric: that metric, as in the table.
        value: as printed, in percentage points.
        better: system and segmentation of the one row.
        worse: of the other.
    """

    table: str
    said: str
    metric: str
    value: float
    better: Key
    worse: Key


_BEST, _PLAIN, _USUAL = _RACNET_ROWS[2], _RACNET_ROWS[0], _RACNET_ROWS[1]
_OVER = "F1 of RACNet with SAM2CLIP2SAM over"
MARGINS = (
    PublishedMargin("Table 1", f"{_OVER} no segmentation", "macro_f1", 3.75, _BEST, _PLAIN),
    PublishedMargin("Table 1", f"{_OVER} conventional", "macro_f1", 1.75, _BEST, _USUAL),
    PublishedMargin(
        "Table 1", f"{_OVER} the best competitor", "macro_f1", 7.69, _BEST, ("FDVTS", "none")
    ),
    PublishedMargin(
        "Table 1", f"{_OVER} the worst competitor", "macro_f1", 8.94, _BEST, ("MDAP", "none")
    ),
    PublishedMargin("Table 2", f"{_OVER} no segmentation", "f1_covid", 3.43, _BEST, _PLAIN),
    PublishedMargin("Table 2", f"{_OVER} conventional", "f1_covid", 1.43, _BEST, _USUAL),
    PublishedMargin(
        "Table 2", f"{_OVER} the best competitor", "f1_covid", 2.6, _BEST, ("EMARS-APS", "none")
    ),
    PublishedMargin(
        "Table 2", f"{_OVER} the worst competitor", "f1_covid", 16.69, _BEST, ("MC3_18", "none")
    ),
    PublishedMargin(
        "Table 2",
        "smallest gain of a competitor by SAM2CLIP2SAM",
        "f1_covid",
        1.03,
        ("MC3_18", SAM2CLIP2SAM),
        ("MC3_18", NO_SEGMENTATION),
    ),
    # The largest F1 gains are 1.50 (DenseNet3D121 and EMARS-APS); 2.00 is CovidNet3D's precision.
    PublishedMargin(
        "Table 2",
        "largest gain of a competitor by SAM2CLIP2SAM",
        "f1_covid",
        2.0,
        ("CovidNet3D", SAM2CLIP2SAM),
        ("CovidNet3D", NO_SEGMENTATION),
    ),
)

_ICCV_VALIDATION = f"{COV19_CT_DB_2021}, validation"
_ICCV_TEST = f"{COV19_CT_DB_2021}, test"
BEST, BEST_WITH_MLP = "3D-CNN-BERT, best", "3D-CNN-BERT + MLP, best"  # on the test part
_RML_MSC = "3D-CNN-BERT, RML, MSC"
_RML_MSC_AFFINE = "3D-CNN-BERT, RML, MSC+A"
MLP_BASELINE = (_RML_MSC_AFFINE, UNET)  # whose embeddings table 2 is about, by section 5.3.2

_BERT_TABLE_1 = _PrintedTable(
    paper=CNN_BERT_PAPER,
    table="Table 1",
    data_set=_ICCV_VALIDATION,
    metrics=("accuracy",),
    rows={
        ("3D-CNN-BERT, RRR, MSC", NO_SEGMENTATION): (89.06,),
        ("3D-CNN-BERT, LLL, MSC", UNET): (89.84,),
        ("3D-CNN-BERT, RRL, MSC", UNET): (90.10,),
        (_RML_MSC, UNET): (91.18,),
        ("3D-CNN-BERT, RML, MSC, cropped", UNET): (87.43,),
        (_RML_MSC_AFFINE, UNET): (90.91,),
        ("3D-CNN-BERT, RML, A", UNET): (87.43,),
        ("3D-CNN without BERT, RML, A", UNET): (68.45,),
    },
    remarks=_remarks(
        [("3D-CNN-BERT, RRR, MSC", NO_SEGMENTATION)],
        ["accuracy"],
        "no count of scans out of 374 gives this accuracy",
    ),
)

_BERT_TABLE_2 = _PrintedTable(
    paper=CNN_BERT_PAPER,
    table="Table 2",
    data_set=_ICCV_VALIDATION,
    metrics=("accuracy",),
    rows={
        ("baseline without MLP", UNET): (91.18,),
        ("MLP, max, ReLU", UNET): (91.44,),
        ("MLP, avg, ReLU", UNET): (90.91,),
        ("MLP, both, ReLU", UNET): (91.18,),
        ("MLP, max, sigmoid", UNET): (91.71,),
        ("MLP, avg, sigmoid", UNET): (91.18,),
        ("MLP, both, sigmoid", UNET): (91.98,),
        ("MLP, both, tanh", UNET): (91.72,),
    },
    remarks=_merged(
        _remarks(
            [("baseline without MLP", UNET)],
            ["accuracy"],
            "section 5.3.2 names the MSC+A network, whose accuracy in Table 1 is 90.91",
        ),
        _remarks(
            [("MLP, both, tanh", UNET)],
            ["accuracy"],
            "no count of scans out of 374 gives this accuracy, neither rounded nor cut off; the "
            "nearest, 343, is printed as 91.71 for max, sigmoid",
        ),
    ),
)

_BERT_TABLE_3_VALIDATION = _PrintedTable(
    paper=CNN_BERT_PAPER,
    table="Table 3",
    data_set=_ICCV_VALIDATION,
    metrics=("accuracy", "macro_f1"),
    # The paper does not name the two validation rows; their accuracies are those of Table 1.
    rows={
        (_RML_MSC, UNET): (91.18, 91.00),
        (f"{_RML_MSC} + MLP", UNET): (92.78, 92.61),
        (_RML_MSC_AFFINE, UNET): (90.91, 91.65),
        (f"{_RML_MSC_AFFINE} + MLP", UNET): (92.25, 92.05),
    },
    remarks={
        **_remarks(
            [(_RML_MSC_AFFINE, UNET)],
            ["accuracy", "macro_f1"],
            "impossible together: the macro F1 of two classes never exceeds the accuracy",
        ),
        **_remarks(
            [(f"{_RML_MSC} + MLP", UNET)],
            ["accuracy"],
            "the abstract calls this accuracy precision",
        ),
    },
)

_BERT_TABLE_3_TEST = _PrintedTable(
    paper=CNN_BERT_PAPER,
    table="Table 3",
    data_set=_ICCV_TEST,
    metrics=("accuracy", "macro_f1"),
    rows={
        (BEST, UNET): (None, 88.22),
        (BEST_WITH_MLP, UNET): (None, 87.4),
    },
    remarks=_remarks(
        [(BEST, UNET), (BEST_WITH_MLP, UNET)],
        ["macro_f1"],
        "the best, of how many and which networks the paper does not say",
    ),
)

_BERT_TEXT = _PrintedTable(
    paper=CNN_BERT_PAPER,
    table="section 5.3.1",
    data_set=_ICCV_VALIDATION,
    metrics=("accuracy",),
    rows={("resneXt3D", UNET): (71.0,)},
    remarks=_remarks(
        [("resneXt3D", UNET)],
        ["accuracy"],
        'approximate: the text says "around 0.71", and not with which augmentation',
    ),
)

_COVIDX_TEST = "COVIDx-CT-1, test"

_MASK_NET_TEXT = _PrintedTable(
    paper=MASK_NET_PAPER,
    table="abstract",
    data_set=_COVIDX_TEST,
    metrics=(
        "sensitivity_covid", "sensitivity_pneumonia", "sensitivity_control",
        "accuracy", "macro_f1",
    ),
    rows={("COVID-CT-Mask-Net", NO_SEGMENTATION): (90.80, 91.62, 92.10, 91.66, 91.50)},
    remarks=_remarks(
        [("COVID-CT-Mask-Net", NO_SEGMENTATION)],
        ["macro_f1"],
        "the mean of the three sensitivities; the macro F1 of the authors' own confusion matrix, "
        "91.67, differs",
    ),
)  # fmt: skip

_MASK_NET_README = _PrintedTable(
    paper=MASK_NET_PAPER,
    table="README of AlexTS1980/COVID-CT-Mask-Net at f06cd37",
    data_set=_COVIDX_TEST,
    metrics=("accuracy", "sensitivity_covid", "sensitivity_pneumonia", "sensitivity_control"),
    rows={
        ("COVID-CT-Mask-Net, both masks", NO_SEGMENTATION): (95.64, 93.88, 95.06, 96.91),
        ("COVID-CT-Mask-Net, merged masks", NO_SEGMENTATION): (96.33, 92.68, None, None),
        ("COVID-CT-Mask-Net, ResNet34", NO_SEGMENTATION): (92.89, 91.76, None, None),
        ("COVID-CT-Mask-Net, ResNet18", NO_SEGMENTATION): (93.95, 91.35, None, None),
    },
    remarks={},
)

PUBLISHED: tuple[PublishedValue, ...] = tuple(
    value
    for table in (
        _TABLE_1,
        _TABLE_2,
        _BERT_TABLE_1,
        _BERT_TABLE_2,
        _BERT_TABLE_3_VALIDATION,
        _BERT_TABLE_3_TEST,
        _BERT_TEXT,
        _MASK_NET_TEXT,
        _MASK_NET_README,
    )
    for value in table.values()
)


def published_values(paper: str, table: str | None = None) -> pd.DataFrame:
    """Published numbers of a paper, in the order printed.

    Args:
        paper: ``sam2clip2sam``, ``cnn_bert`` or ``mask_net``.
        table: for example ``"Table 1"``; all of the paper's without it.

    Returns:
        One row per number with the fields of :class:`PublishedValue` and ``fraction``, the value
        divided by 100, in the unit of measured scores.

    Raises:
        ValueError: when nothing is known of that paper or table.
    """
    chosen = [
        asdict(value)
        for value in PUBLISHED
        if value.paper == paper and table in (None, value.table)
    ]
    if not chosen:
        known = ", ".join(sorted({f"{value.paper} {value.table}" for value in PUBLISHED}))
        raise ValueError(f"no published values of {paper} {table or ''}; there are: {known}")
    frame = pd.DataFrame(chosen)
    fraction = (frame["value"] / PERCENT).round(FRACTION_DECIMALS)  # 0.9218, not 0.92180000000001
    return frame.assign(fraction=fraction)
