"""Every published number that a table of the study compares with, each with its source.

The only file of the project with results typed by hand. Values stand as printed, in percent. They
are targets, not truths: several contradict the papers' own formulas or could not have been
obtained on the stated number of scans; those carry a remark (FACTS sections 4.10, 5.3 and 8.1).
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


_F1_COLUMNS = ("macro_f1", "f1_covid", "f1_non_covid")
_RACNET_ROWS = [("RACNet", name) for name in (NO_SEGMENTATION, CONVENTIONAL, SAM2CLIP2SAM)]
# The remarks are printed; FACTS 8.1 derives them, as its findings 1, 3 and 4.
_NOT_EQUATION_9 = "not the mean of the two class F1 scores, against equation 9 of the paper"
_OTHER_CLASS_RATIO = "implies another ratio of classes than the competitors, so other scans"
_UNREACHABLE_SENSITIVITY = "no count of scans out of 255 (or the paper's 256) gives this value"

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
    remarks={
        **_remarks(
            [(name, SAM2CLIP2SAM) for name in ("MDAP", "FDVTS", "ACVLab")],
            ["macro_f1"],
            _NOT_EQUATION_9,
        ),
        **_remarks(_RACNET_ROWS, _F1_COLUMNS, _OTHER_CLASS_RATIO),
    },
)

_TABLE_2 = _PrintedTable(
    paper=SAM2CLIP2SAM_PAPER,
    table="Table 2",
    data_set="MosMedData, test",
    metrics=("precision", "sensitivity", "f1_covid"),
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
    remarks=_remarks(
        [
            *[
                (name, SAM2CLIP2SAM)
                for name in ("MC3_18", "DenseNet3D121", "CovidNet3D", "EMARS-APS")
            ],
            *_RACNET_ROWS,
        ],
        ["sensitivity"],
        _UNREACHABLE_SENSITIVITY,
    ),
)

_ICCV_VALIDATION = "COV19-CT-DB (ICCV 2021), validation"
_ICCV_TEST = "COV19-CT-DB (ICCV 2021), test"
_RML_MSC = "3D-CNN-BERT, RML, MSC"
_RML_MSC_AFFINE = "3D-CNN-BERT, RML, MSC+A"

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
    remarks=_remarks(
        [("baseline without MLP", UNET)],
        ["accuracy"],
        "section 5.3.2 names the MSC+A network, whose accuracy in Table 1 is 90.91",
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
            ["macro_f1"],
            "higher than the accuracy of the same row, unusual at 165 to 209 scans",
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
        ("3D-CNN-BERT, best", UNET): (None, 88.22),
        ("3D-CNN-BERT + MLP, best", UNET): (None, 87.4),
    },
    remarks={},
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
