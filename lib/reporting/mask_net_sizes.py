"""Sizes and settings of COVID-CT-Mask-Net: its tables 1, 2, 3 and 8, what is stated beside ours.

Parameters are counted in the modules as they are built, settings read from them. The bodies of
these tables are not in the text at hand (FACTS 10): stated is what its prose, the README and the
code say, each with its source.
"""

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import pandas as pd
import torch
from torch import nn
from torchvision.models.detection import MaskRCNN

from lib.classification import (
    covidnet_ct,
    covnet,
    light_cnn,
    mask_net,
    mask_net_head,
    resnet18_location,
)
from lib.classification.mask_net_head import MaskNet
from lib.classification.ranked_boxes import ranked_boxes
from lib.data.pictures import CLASSES, PARTS, REMAINING
from lib.data.splits import TEST, TRAIN, VALIDATION
from lib.reporting import published
from lib.reporting.mask_net_tables import PICTURE, SCAN
from lib.segmentation import mask_rcnn

COMPARATORS = (covidnet_ct, covnet, resnet18_location, light_cnn)  # in the order of section 1
LESION_MODELS = {"paper": "head2023", "small": "small"}  # variants of the presets
PARAMETERS = "million parameters"  # as it is stated
DETECTOR, SCANS_OF = "Mask R-CNN", "COVNet"
# What of the classifier is trained, as table 4 has it.
TRAINED = {"head": "S", "head_and_norms": "S + batch norm", "everything": "all weights"}
LEARNING = ("epochs", "learning rate", "weight decay")
S_ALONE, FINE_TUNING = "epochs where S alone is trained", "epochs of fine-tuning"


class Size(NamedTuple):
    """Parameters of a network.

    Attributes:
        parameters: all of them, without statistics of norms.
        trained: those that learn.
    """

    parameters: int
    trained: int


def network_sizes(preset: str) -> dict[tuple[str, str], Size]:
    """Parameters of the systems of table 1.

    Nothing is computed: the networks are built without memory for their weights.

    Args:
        preset: ``paper`` or ``small``.

    Returns:
        Size by system and by what of it is trained.
    """
    with torch.device("meta"):
        lesions = mask_rcnn.build(
            classes=mask_net.LESIONS, **mask_rcnn.VARIANTS[LESION_MODELS[preset]]
        )
        classifier = mask_net.build(**mask_net.VARIANTS[preset])
        others = {
            system.CARD: system.build(**system.VARIANTS[preset], classes=len(CLASSES))
            for system in COMPARATORS
        }
    sizes = {}
    for part in (mask_rcnn.HEADS, mask_rcnn.FULL):
        mask_rcnn.choose_trained(lesions, part)
        sizes[DETECTOR, part] = _size(lesions)
    sizes["S", "all"] = _size(classifier.head)
    for variant in mask_net_head.TRAINED:
        mask_net_head.trainable(classifier, variant)
        sizes[published.MASK_NET, TRAINED[variant]] = _size(classifier)
    for card, network in others.items():
        sizes[card.name, "all, approximation" if card.approximation else "all"] = _size(network)
    return sizes


def _size(network: nn.Module) -> Size:
    counts = [(weights.numel(), weights.requires_grad) for weights in network.parameters()]
    return Size(sum(n for n, _ in counts), sum(n for n, learns in counts if learns))


def parameter_table() -> pd.DataFrame:
    """Table 1, numbers of parameters: counted in our modules beside those that are stated.

    Returns:
        One row per system and what of it is trained: parameters and those trained, of the paper's
        preset and the small one, what is ``stated`` (millions, with its source) and ``remarks``.
    """
    sizes = {preset: network_sizes(preset) for preset in LESION_MODELS}
    rows = []
    for system, part in sizes["paper"]:
        counts = {
            f"{name}_{preset}": getattr(found[system, part], name)
            for preset, found in sizes.items()
            for name in Size._fields
        }
        stated = _stated_texts("Table 1", system, PARAMETERS)
        remarks = _REMARKS.get(system, "") if stated else ""
        rows.append(
            {"system": system, "trained": part} | counts | {"stated": stated, "remarks": remarks}
        )
    return pd.DataFrame(rows)


_REMARKS = {
    DETECTOR: "stated with the 53,120 statistics of the norms",
    "S": "2.26 in the text fits no number of layers; 2.36 does",
    published.MASK_NET: "stated as the sum of S and all of Mask R-CNN; ours is without its masks",
}


def _stated_texts(table: str, subject: str, name: str) -> str:
    """All stated values of a quantity with their sources, for example ``2.26 (text)``."""
    found = [
        f"{plain(number.value)} ({_source(number.source)})"
        for number in published.MASK_NET_NUMBERS
        if (number.table, number.subject, number.name) == (table, subject, name)
    ]
    return "; ".join(found)


def _source(source: str) -> str:
    return "code" if source.startswith("code") else source


def plain(value: float) -> str:
    """A number as short as it is exact: ``1e-5``, ``0.75``, ``21,036``."""
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:g}".replace("e-0", "e-")


def picture_count_table(pictures: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Table 1, numbers of pictures: how much each system learns from and is tested on.

    Lesion models learn from all slices with lesions, so from those too that `REMAINING` names;
    COVNet judges scans, of which it sees the slices that are pictures.

    Args:
        pictures: list of pictures of each data set.

    Returns:
        One row per data set and system: what it ``counts``, training, validation and test part,
        the ratio ``test_to_training``, each with what is stated, and ``remarks``.
    """
    systems = [DETECTOR, published.MASK_NET, *(system.CARD.name for system in COMPARATORS)]
    rows = []
    for data_set, listed in pictures.items():
        for system in systems:
            counts = _part_counts(listed, system)
            unit = SCAN if system == SCANS_OF else PICTURE
            about = {"data_set": data_set, "system": system, "counts": f"{unit}s"}
            rows.append(about | _with_stated(counts, system) | {"remarks": _also(system)})
    return pd.DataFrame(rows)


def _part_counts(listed: pd.DataFrame, system: str) -> dict[str, int]:
    """Pictures (of COVNet, scans) of each part that a system is trained and tested on."""
    used = listed
    if system == DETECTOR:
        used = listed[listed["lesion_pixels"].fillna(0) > 0].replace({"split": {REMAINING: TRAIN}})
    elif system == SCANS_OF:
        used = listed.drop_duplicates(["scan_id", "split"])
    counts = used["split"].value_counts()
    return {split: int(counts.get(split, 0)) for split in (TRAIN, VALIDATION, TEST)}


def _with_stated(counts: Mapping[str, int], system: str) -> dict[str, str]:
    """Counts as text, each followed by what is stated of it."""
    cells = {}
    for split, count in counts.items():
        name = "training" if split == TRAIN else split
        cells[split] = plain(count)
        texts = [_stated_texts("Table 1", system, f"{name} images")]
        about = _stated_texts("Table 1", system, f"{name} images about")
        texts += [f"about {about}"] if about else []
        cells[f"{split}_stated"] = "; ".join(filter(None, texts))
    ratio = counts[TEST] / counts[TRAIN] if counts[TRAIN] else float("nan")
    cells["test_to_training"] = f"{ratio:.2f}" if counts[TRAIN] else ""
    stated = _stated_texts("Table 1", system, "test to training")
    return cells | {"test_to_training_stated": stated}


def _also(system: str) -> str:
    """What else is stated of the number of pictures of a system."""
    names = {"images": "{} in all", "images about": "about {} in all"}
    found = {text: _stated_texts("Table 1", system, name) for name, text in names.items()}
    return "; ".join(text.format(value) for text, value in found.items() if value)


def two_class_table(pictures: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Table 8: pictures of the data sets of two classes, on which is fine-tuned.

    Args:
        pictures: list of pictures of each.

    Returns:
        One row per data set and part with pictures: ``patients``, ``pictures``, those of each
        class, the share with COVID-19, and what is ``stated`` of iCTCF.
    """
    rows = []
    for data_set, listed in pictures.items():
        for part in (part for part in PARTS if (listed["split"] == part).any()):
            own = listed[listed["split"] == part]
            counts = own["label"].value_counts()
            name = "training" if part == TRAIN else part
            stated = _stated_texts("Table 8", "iCTCF", f"{name} images")
            rows.append(
                {"data_set": data_set, "part": part}
                | {"patients": own["patient_id"].nunique(), "pictures": len(own)}
                | {
                    label: int(counts.get(label, 0))
                    for label in CLASSES
                    if label in set(listed["label"])
                }
                | {"share_of_covid": counts.get("covid", 0) / len(own)}
                | {"stated": f"iCTCF: {stated}" if stated else ""}
            )
    return pd.DataFrame(rows)


LESION_SETTINGS: dict[str, Callable[[MaskRCNN], float]] = {
    "anchor scales": lambda model: len(model.rpn.anchor_generator.aspect_ratios[0]),
    "smallest scale": lambda model: min(model.rpn.anchor_generator.aspect_ratios[0]),
    "largest scale": lambda model: max(model.rpn.anchor_generator.aspect_ratios[0]),
    "anchor sizes": lambda model: len(model.rpn.anchor_generator.sizes[0]),
    "rpn foreground iou": lambda model: model.rpn.proposal_matcher.high_threshold,
    "rpn background iou": lambda model: model.rpn.proposal_matcher.low_threshold,
    "rpn batch": lambda model: model.rpn.fg_bg_sampler.batch_size_per_image,
    "rpn nms": lambda model: model.rpn.nms_thresh,
    "rpn output training": lambda model: model.rpn._post_nms_top_n["training"],
    "rpn output test": lambda model: model.rpn._post_nms_top_n["testing"],
    "roi foreground iou": lambda model: model.roi_heads.proposal_matcher.high_threshold,
    "roi background iou": lambda model: model.roi_heads.proposal_matcher.low_threshold,
    "roi batch": lambda model: model.roi_heads.fg_bg_sampler.batch_size_per_image,
    "roi output": lambda model: model.roi_heads.detections_per_img,
    "roi score": lambda model: model.roi_heads.score_thresh,
    "roi nms": lambda model: model.roi_heads.nms_thresh,
}
_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(ranked_boxes).parameters.items()
}
CLASSIFIER_SETTINGS: dict[str, Callable[[MaskNet], float]] = {
    "roi output": lambda model: model.head.boxes,
    "roi score": lambda model: model.ranking.get("score_threshold", _DEFAULTS["score_threshold"]),
    "rpn nms": lambda model: model.ranking["rpn_nms_threshold"],
    "roi nms": lambda model: model.ranking["nms_threshold"],
    "rpn output": lambda model: model.detector.rpn._post_nms_top_n["testing"],
}


def lesion_settings(variant: str) -> dict[str, float]:
    """Settings of a variant of Mask R-CNN, read from the model as built."""
    with torch.device("meta"):
        model = mask_rcnn.build(classes=mask_net.LESIONS, **mask_rcnn.VARIANTS[variant])
    return {name: read(model) for name, read in LESION_SETTINGS.items()}


def classifier_settings(variant: str) -> dict[str, float]:
    """Settings of a variant of COVID-CT-Mask-Net, likewise."""
    with torch.device("meta"):
        model = mask_net.build(**mask_net.VARIANTS[variant])
    return {name: read(model) for name, read in CLASSIFIER_SETTINGS.items()}


def lesion_setting_table(presets: Mapping[str, Mapping[str, float]]) -> pd.DataFrame:
    """Table 2: settings of Mask R-CNN, stated beside ours.

    Args:
        presets: ``paper`` and ``small`` of the section of params.yaml that trains it, with epochs,
            learning_rate and weight_decay.

    Returns:
        As `setting_table`; the paper's preset in the sizes of two states of its code.
    """
    ours = {
        name: lesion_settings(name) | _learning(presets["small" if name == "small" else "paper"])
        for name in ("head2023", "paper2020", "small")
    }
    return setting_table("Table 2", DETECTOR, ours)


def classifier_setting_table(presets: Mapping[str, Mapping]) -> pd.DataFrame:
    """Table 3: settings of COVID-CT-Mask-Net, stated beside ours.

    Args:
        presets: section of the classifier in params.yaml: ``paper`` and ``small`` as for
            `lesion_setting_table`; what changes where S is trained alone, ``configurations``, and
            in fine-tuning, ``fine_tuned``.

    Returns:
        As `setting_table`.
    """
    ours = {}
    for name in LESION_MODELS:
        alone = presets["configurations"][mask_net.HEAD][name]
        further = {
            S_ALONE: (presets[name] | alone)["epochs"],
            FINE_TUNING: (presets[name] | presets["fine_tuned"][name])["epochs"],
        }
        ours[name] = classifier_settings(name) | _learning(presets[name]) | further
    tuning = published.stated_number("Table 9", published.MASK_NET, "epochs")
    further = {S_ALONE: ("", ""), FINE_TUNING: (plain(tuning), "text")}
    return setting_table("Table 3", published.MASK_NET, ours, further=further)


def _learning(preset: Mapping[str, float]) -> dict[str, float]:
    """Of a preset what the paper states of learning too."""
    return {name: preset[name.replace(" ", "_")] for name in LEARNING}


def setting_table(
    table: str,
    subject: str,
    ours: Mapping[str, Mapping[str, float]],
    *,
    further: Mapping[str, tuple[str, str]] = MappingProxyType({}),
) -> pd.DataFrame:
    """Each setting as stated, with its source, beside ours.

    Args:
        table: ``"Table 2"`` or ``"Table 3"``.
        subject: of `published.MASK_NET_NUMBERS`.
        ours: settings of each column, by the names that are stated.
        further: rows at the end, with what is stated of them and where.

    Returns:
        One row per setting: ``setting``, ``stated``, ``stated_in`` and our columns, as text.

    Raises:
        ValueError: if nothing is stated of the subject in this table.
    """
    stated = {
        number.name: (plain(number.value), _source(number.source))
        for number in published.MASK_NET_NUMBERS
        if (number.table, number.subject) == (table, subject)
    }
    if not stated:
        raise ValueError(f"nothing is stated of {subject} in {table}")
    return pd.DataFrame(
        {"setting": _setting_name(name), "stated": value, "stated_in": source}
        | {column: plain(values[name]) if name in values else "" for column, values in ours.items()}
        for name, (value, source) in (stated | further).items()
    )


def _setting_name(name: str) -> str:
    """Names of the paper: RPN, RoI, NMS, IoU."""
    words = {"rpn": "RPN", "roi": "RoI", "nms": "NMS", "iou": "IoU"}
    text = " ".join(words.get(word, word) for word in name.split())
    return text[:1].upper() + text[1:]
