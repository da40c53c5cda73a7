"""Every published number that a table of the study compares with, each with its source.

The only file of the project with results typed by hand. Values stand as printed, in percent. They
are targets, not truths: several contradict the papers' own formulas or could not have been
obtained on the stated number of scans; those carry a remark (FACTS sections 4.10, 5.3 and 8.1).
What the first paper says of its data and of its own margins stands here too; `lib.reporting.audit`
derives the remarks on it and on the tables of the second, `lib.reporting.mask_net_audit` those on
the third.
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
        metric: named as in ``lib.evaluation.classification.classification_scores``, for lesions as
            in ``lib.evaluation.detection``.
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
    origin: str = ""  # where the numbers stand, if not in the table itself

    def values(self) -> Iterator[PublishedValue]:
        for (system, segmentation), numbers in self.rows.items():
            for metric, number in zip(self.metrics, numbers, strict=True):
                if number is None:
                    continue
                cell = f"{self.table}, row {system} / {segmentation}, column {metric}"
                remark = self.remarks.get((system, segmentation, metric), "")
                yield PublishedValue(
                    self.paper, self.table, system, segmentation, self.data_set,
                    metric, number, self.origin or cell, remark,
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
_LESION_TEST = "CNCB lesions, test"
_HEADLINE_METRICS = (
    "sensitivity_covid", "sensitivity_pneumonia", "sensitivity_control",
    "accuracy", "balanced_accuracy",
)  # fmt: skip
_HEADLINE = (90.80, 91.62, 92.10, 91.66, 91.50)
_CALLED_F1 = (
    "printed as F1-score; it is the mean of the three sensitivities, while the macro F1 of the "
    "authors' own confusion matrix is 91.67 and its class-weighted F1 91.72"
)
_MASK_NET_CODE = "AlexTS1980/COVID-CT-Mask-Net at f06cd37"
HEADLINE_CODE = "AlexTS1980/COVID-CT-Mask-Net at 5e68df1"
MASK_NET, MASK_NET_BEST = "COVID-CT-Mask-Net", "COVID-CT-Mask-Net, S + batch norm"
BOTH_MASKS = f"{MASK_NET}, both masks"

# Of its tables the text at hand gives no body (FACTS 10); what the prose, the abstract, the README
# and the comparators' own papers say of a table stands under its name, and nothing else does.
MASK_NET_UNKNOWN = {
    "Table 1": "parameters and images of the competitors, but for those in the text",
    "Table 2": "the printed settings; the code's are used instead (FACTS 5.3)",
    "Table 3": "the printed settings but for those in the text; the code's are used instead",
    "Table 4": "the rows of S alone and of all weights; all precisions",
    "Table 5": "every competitor but one sensitivity; their own publications are used instead",
    "Table 6": "all but the mean average precision of the full model",
    "Table 7": "all scores on the 58,782 remaining images",
    "Table 8": "images per class of iCTCF",
    "Table 9": "all scores on iCTCF",
}


def _headline(table: str, system: str, source: str, remark: str = "") -> _PrintedTable:
    """The five numbers of the abstract, as a row of some table."""
    key = (system, NO_SEGMENTATION)
    return _PrintedTable(
        MASK_NET_PAPER, table, _COVIDX_TEST, _HEADLINE_METRICS, {key: _HEADLINE},
        _merged(
            _remarks([key], ["balanced_accuracy"], _CALLED_F1),
            _remarks([key], _HEADLINE_METRICS, remark) if remark else {},
        ),
        source,
    )  # fmt: skip


_MASK_NET_HEADLINES = (
    _headline("abstract", MASK_NET, "abstract"),
    _headline(
        "Table 4", MASK_NET_BEST, "abstract; section 4 names the variant",
        "the row is inferred: the best sensitivity to COVID-19, which section 4 gives this variant",
    ),
    _headline("Table 5", f"{MASK_NET} (best)", "abstract; section 4 names the row"),
)  # fmt: skip

_MASK_NET_SAID = _PrintedTable(
    paper=MASK_NET_PAPER,
    table="Table 5",
    data_set="90 images of the competitor",
    metrics=("sensitivity_covid",),
    rows={("ResNet18", NO_SEGMENTATION): (81.20,)},
    remarks=_remarks(
        [("ResNet18", NO_SEGMENTATION)],
        ["sensitivity_covid"],
        "no count out of 30 COVID-19 images gives this value; it is near the precision of that "
        "paper, 81.3 (assumed: not verified in the publication itself)",
    ),
    origin="section 1, text",
)

_MASK_NET_LESIONS = _PrintedTable(
    paper=MASK_NET_PAPER,
    table="Table 6",
    data_set=_LESION_TEST,
    metrics=("mAP",),
    rows={("Mask R-CNN, full", NO_SEGMENTATION): (35.2,)},
    remarks=_remarks(
        [("Mask R-CNN, full", NO_SEGMENTATION)],
        ["mAP"],
        "printed as 0.352; section 4 says that the full model is the better one",
    ),
    origin="section 6, text",
)

MASK_NET_README = "README"
_README_ORIGIN = f"README of {_MASK_NET_CODE}"
_MASK_NET_README = _PrintedTable(
    paper=MASK_NET_PAPER,
    table=MASK_NET_README,
    data_set=_COVIDX_TEST,
    metrics=("accuracy", "sensitivity_covid", "sensitivity_pneumonia", "sensitivity_control"),
    rows={
        (BOTH_MASKS, NO_SEGMENTATION): (95.64, 93.88, 95.06, 96.91),
        (f"{MASK_NET}, merged masks", NO_SEGMENTATION): (96.33, 92.68, None, None),
        (f"{MASK_NET}, ResNet34", NO_SEGMENTATION): (92.89, 91.76, None, None),
        (f"{MASK_NET}, ResNet18", NO_SEGMENTATION): (93.95, 91.35, None, None),
    },
    remarks={},
    origin=_README_ORIGIN,
)

_MASK_NET_README_LESIONS = _PrintedTable(
    paper=MASK_NET_PAPER,
    table=MASK_NET_README,
    data_set=_LESION_TEST,
    metrics=("AP@0.5", "AP@0.75", "mAP"),
    rows={
        ("Mask R-CNN, both masks", NO_SEGMENTATION): (50.20, 41.98, 38.71),
        ("Mask R-CNN, merged masks", NO_SEGMENTATION): (61.92, 45.22, 44.68),
        ("Mask R-CNN, ResNet34", NO_SEGMENTATION): (59.88, 45.06, 44.76),
        ("Mask R-CNN, ResNet18", NO_SEGMENTATION): (49.95, 37.78, 39.32),
    },
    remarks={},
    origin=_README_ORIGIN,
)

MASK_NET_OWN = "own publications of Table 5"
RESNET18_COVID_IMAGES = 30  # of its 90 test images; assumed, FACTS 6.10
_ASSUMED = "assumed: not verified in the publication itself"


def _own(
    system: str, data_set: str, scores: Mapping[str, float], source: str, assumed: Sequence[str]
) -> _PrintedTable:
    """What a competitor of table 5 says of itself, on its own data."""
    key = (system, NO_SEGMENTATION)
    remarks = _remarks([key], assumed, _ASSUMED)
    metrics, values = tuple(scores), tuple(scores.values())
    return _PrintedTable(
        MASK_NET_PAPER, MASK_NET_OWN, data_set, metrics, {key: values}, remarks, source
    )


_COVNET = {
    "sensitivity_covid": 90.0, "sensitivity_pneumonia": 87.0, "sensitivity_control": 94.0,
    "specificity_covid": 96.0, "specificity_pneumonia": 92.0, "specificity_control": 96.0,
    "roc_auc_covid": 96.0, "roc_auc_pneumonia": 95.0, "roc_auc_control": 98.0,
}  # fmt: skip
_LIGHT_CNN = {
    "accuracy": 83.0, "sensitivity_covid": 85.0, "specificity_covid": 81.0,
    "precision_covid": 81.73, "f1_covid": 83.33,
}  # fmt: skip
_RESNET18 = {"accuracy": 86.7, "sensitivity_covid": 86.7, "precision_covid": 81.3}
_MASK_NET_COMPETITORS = (
    _own(
        "COVIDNet-CT-A", _COVIDX_TEST,
        {
            "accuracy": 99.1, "sensitivity_control": 100.0, "sensitivity_pneumonia": 99.0,
            "sensitivity_covid": 97.3, "precision_control": 99.4, "precision_pneumonia": 98.4,
            "precision_covid": 99.7,
        },
        "README of haydengunraj/COVIDNet-CT at c34e787, FACTS 6.7", ["sensitivity_control"],
    ),
    _own(
        "COVIDNet-CT-B", _COVIDX_TEST,
        {
            "accuracy": 98.5, "sensitivity_control": 99.8, "sensitivity_pneumonia": 99.2,
            "sensitivity_covid": 94.7, "precision_control": 99.4, "precision_pneumonia": 96.8,
            "precision_covid": 99.8,
        },
        "README of haydengunraj/COVIDNet-CT at c34e787, FACTS 6.7", [],
    ),
    _own("COVNet", "434 exams, its own", _COVNET, "Radiology 2020, FACTS 6.8", list(_COVNET)),
    _own(
        "LightCNN", "COVID-19 against others, its own", _LIGHT_CNN,
        "preprint, FACTS 6.9; the journal's abstract prints an accuracy of 85.03",
        list(_LIGHT_CNN),
    ),
    _own("ResNet18", "90 images, its own", _RESNET18, "FACTS 6.10", list(_RESNET18)),
)  # fmt: skip

# Rows true, columns predicted: control, common pneumonia, COVID-19. FACTS 5.3.
HEADLINE_CONFUSION = ((8703, 738, 9), (406, 6767, 213), (14, 386, 3946))
COVIDX_IMAGES = {  # by the released lists of COVIDx-CT-1, same order of classes; FACTS 7.3
    "training": (27201, 22061, 12520),
    "validation": (9107, 7400, 4529),
    "test": (9450, 7395, 4346),
}
LESION_IMAGES = {"training": 650, "test": 100}  # by the released lists, FACTS 5.1
ICTCF_IMAGES = {"training": 600, "test": 12_976, "all": 13_980}  # lists; all: assumed, FACTS 7.5
# Counted by building the layers, FACTS 5.1 and 5.2.
MASK_NET_PARAMETERS = {
    "Mask R-CNN": 31_728_744,
    "running statistics": 53_120,  # of the backbone; as many as it has affine parameters
    "batch norm": 53_120,
    "batch norm, named so": 45_440,  # the code goes by the name, which misses the shortcuts'
    "mask branch": 2_360_320 + 263_171,
    "S": 2_364_419,
}
S_WIDTHS = (1280, 1024, 1024, 3)  # of the classifier, in the code


@dataclass(frozen=True)
class PublishedNumber:
    """A size, a count or a setting that COVID-CT-Mask-Net states: no score.

    Attributes:
        table: the table that the number belongs to.
        subject: what it is of.
        name: of the quantity.
        value: as stated.
        source: where it stands.
    """

    table: str
    subject: str
    name: str
    value: float
    source: str


def _stated(table: str, subject: str, source: str, **values: float) -> tuple[PublishedNumber, ...]:
    named = ((name.replace("_", " "), value) for name, value in values.items())
    return tuple(PublishedNumber(table, subject, name, value, source) for name, value in named)


_PAPER_TEXT, _HEAD_CODE = "text", f"code, {_MASK_NET_CODE}"
MASK_NET_NUMBERS: tuple[PublishedNumber, ...] = (
    *_stated(
        "Table 1", MASK_NET, _PAPER_TEXT, training_images=3000, validation_images=21036,
        test_images=21192, test_to_training=7.06, percent_of_training_list_about=5,
        percent_of_all_about=3,
    ),
    *_stated(
        "Table 1", "COVIDNet-CT", _PAPER_TEXT, images=104_900, training_images_about=60_000,
        training_percent=60, validation_percent=20, test_percent=20, test_to_training=0.353,
    ),
    *_stated("Table 1", "COVNet", _PAPER_TEXT, images_about=500),
    *_stated("Table 1", "ResNet18", _PAPER_TEXT, test_images=90),
    *_stated(
        "Table 1", "validation split", _PAPER_TEXT, control_percent=43, pneumonia_percent=35,
        covid_percent=22,
    ),
    *_stated(
        "Table 1", "test split", _PAPER_TEXT, control_percent=45, pneumonia_percent=35,
        covid_percent=20,
    ),
    *_stated("Table 1", "Mask R-CNN", _PAPER_TEXT, training_images=650, test_images=100),
    *_stated("Table 1", "Mask R-CNN", MASK_NET_README, training_images=500, test_images=150),
    *_stated("Table 1", "S", _PAPER_TEXT, million_parameters=2.26),
    *_stated("Table 1", "S", MASK_NET_README, million_parameters=2.36),
    *_stated("Table 1", "Mask R-CNN", MASK_NET_README, million_parameters=31.78),
    *_stated("Table 1", MASK_NET, MASK_NET_README, million_parameters=34.14),
    *_stated("Table 1", "Mask R-CNN, ResNet34", MASK_NET_README, million_parameters=11.45),
    *_stated("Table 1", "Mask R-CNN, ResNet18", MASK_NET_README, million_parameters=6.12),
    *_stated(
        "Table 2", "Mask R-CNN", _PAPER_TEXT, epochs=100, learning_rate=1e-5, weight_decay=1e-3,
        anchor_scales=6, smallest_scale=0.1, largest_scale=2,
    ),
    *_stated(
        "Table 2", "Mask R-CNN", _HEAD_CODE, anchor_sizes=5, rpn_foreground_iou=0.7,
        rpn_background_iou=0.3, rpn_batch=256, rpn_nms=0.75, rpn_output_training=2000,
        rpn_output_test=1000, roi_foreground_iou=0.75, roi_background_iou=0.5, roi_batch=256,
        roi_output=128, roi_score=0.75, roi_nms=0.75,
    ),
    *_stated(
        "Table 3", MASK_NET, _PAPER_TEXT, roi_output=256, roi_score=-0.01, rpn_nms=0.75,
        roi_nms=0.75, epochs=50, learning_rate=1e-5, weight_decay=1e-3,
    ),
    *_stated("Table 3", MASK_NET, _HEAD_CODE, rpn_output=1000),
    *_stated("Table 7", MASK_NET, _PAPER_TEXT, images=58_782),
    *_stated("Table 8", "iCTCF", _PAPER_TEXT, training_images=600, test_images=12_976),
    *_stated("Table 9", MASK_NET, _PAPER_TEXT, epochs=10),
)  # fmt: skip


def stated_number(table: str, subject: str, name: str, *, source: str = _PAPER_TEXT) -> float:
    """One number of `MASK_NET_NUMBERS`.

    Raises:
        ValueError: when it is not there.
    """
    for number in MASK_NET_NUMBERS:
        if (number.table, number.subject, number.name, number.source) == (
            table, subject, name, source,
        ):  # fmt: skip
            return number.value
    raise ValueError(f"{table} of COVID-CT-Mask-Net states no {name} of {subject} ({source})")


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
        *_MASK_NET_HEADLINES,
        _MASK_NET_SAID,
        _MASK_NET_LESIONS,
        _MASK_NET_README,
        _MASK_NET_README_LESIONS,
        *_MASK_NET_COMPETITORS,
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
