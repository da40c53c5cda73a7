"""Figure 1 of 3-D CNN with BERT: one slice on its way from the scanner to the masked lung."""

from collections.abc import Container, Mapping
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lib.data.scan import to_grey
from lib.data.store import open_volume
from lib.reporting.pictures import STYLE, grid, wrapped
from lib.reporting.segmentation_cases import shown_part
from lib.reporting.segmentation_figures import fullest_slice
from lib.segmentation.morphology import body_foreground, published_lungs

PANEL_INCHES = 2.1
WHITE = 255
NETWORK, REFINED = "unet", "unet_refined"  # folders of the masks that the paper shows


def preprocessing_steps(
    voxels: np.ndarray, network: np.ndarray, refined: np.ndarray
) -> dict[str, np.ndarray]:
    """The six pictures of the figure (Tan and Liu 2021, figure 1; FACTS 4.1 to 4.3).

    Args:
        voxels: one slice, int16 HU or uint8, shape (height, width).
        network: the network's lung mask of it, above 0 inside, same shape.
        refined: that mask after refinement, same shape.

    Returns:
        uint8 pictures by their titles, in the order of the figure.

    Raises:
        ValueError: if a mask has another shape.
    """
    for name, mask in (("network's", network), ("refined", refined)):
        if mask.shape != voxels.shape:
            raise ValueError(
                f"the {name} mask has shape {mask.shape}, the slice has {voxels.shape}"
            )
    grey = to_grey(voxels)
    masks = {
        "(b) after binarisation": body_foreground(grey),
        "(c) morphological mask": published_lungs(grey),
        "(d) original U-Net mask": network > 0,
        "(e) refined U-Net mask": refined > 0,
    }
    pictures = {title: np.where(mask, WHITE, 0).astype(np.uint8) for title, mask in masks.items()}
    masked = np.where(refined > 0, grey, 0).astype(np.uint8)
    return {"(a) raw slice": grey} | pictures | {"(f) masked lung": masked}


@matplotlib.rc_context(STYLE)
def preprocessing_figure(steps: Mapping[str, np.ndarray], *, title: str = "") -> Figure:
    """The steps of `preprocessing_steps` side by side, in two rows as in the paper.

    Args:
        steps: pictures by their titles.
        title: of the figure, says which slice it is.
    """
    figure, axes = grid(len(steps), 3, cell=(PANEL_INCHES, PANEL_INCHES + 0.2))
    for axis, (name, picture) in zip(axes, steps.items(), strict=True):
        axis.imshow(picture, cmap="gray", vmin=0, vmax=WHITE, interpolation="nearest")
        axis.set(title=name)
        axis.set_axis_off()
    if title:
        figure.suptitle(wrapped(title, 3 * PANEL_INCHES))
    return figure


def preprocessing_case(
    data: Path, data_set: str, manifest: pd.DataFrame, *, positive: Container[str]
) -> Figure:
    """Figure 1 of a data set, of a slice chosen by a rule.

    The first scan with COVID-19 of the test part (the first scan where there is none, of all parts
    where there is no test part), and of it the slice with the most lung in the refined mask.

    Args:
        data: folder of all data.
        data_set: its name.
        manifest: of the data set.
        positive: labels that count as COVID-19.

    Raises:
        FileNotFoundError: if the scan or one of its masks is not stored.
    """
    part = shown_part(manifest)
    covid = part[[label in positive for label in part["label"]]]
    scan_id = (covid if len(covid) else part)["scan_id"].min()
    name, segmented = f"{scan_id}.b2nd", data / "segmented" / data_set
    refined = open_volume(segmented / REFINED / name).load()
    place = fullest_slice(refined)
    steps = preprocessing_steps(
        open_volume(data / "prepared" / data_set / "scans" / name)[place],
        open_volume(segmented / NETWORK / name)[place],
        refined[place],
    )
    return preprocessing_figure(steps, title=f"{data_set}: {scan_id}, slice {place}")
