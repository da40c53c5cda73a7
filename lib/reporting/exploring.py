"""SAM2CLIP2SAM by hand: choose scan, slice, thresholds and sentences, and see every step anew."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ipywidgets
from IPython.display import display
from matplotlib.figure import Figure

from lib.data.masks import separate_lungs
from lib.data.store import open_volume
from lib.reporting.segmentation_figures import fullest_slice, journey_figure
from lib.segmentation.sam2clip2sam import (
    Journey,
    Sam2Clip2SamSegmenter,
    build_segmenter,
    weight_files,
)

GENERATOR = ("points_per_side", "pred_iou_thresh", "stability_score_thresh", "mode")
WIDE = ipywidgets.Layout(width="480px")


def journey_picture(journey: Journey) -> Figure:
    """The figure of one slice's way.

    Args:
        journey: of `Sam2Clip2SamSegmenter.choose`.
    """
    return journey_figure(
        journey.sight.grey,
        list(journey.sight.proposals.masks),
        journey.crops,
        journey.similarities,
        journey.chosen,
        journey.boxes,
        separate_lungs(journey.lungs),
    )


class SliceExplorer:
    """Draws the journey of any slice of some scans under any settings.

    Args:
        build: from settings (``generator``, ``choice``) to a segmenter.
        settings: what to start from, as `lib.segmentation.sam2clip2sam.preset` gives them.
        volumes: stored scans by scan_id.

    Raises:
        ValueError: without a scan.
    """

    def __init__(
        self,
        build: Callable[..., Sam2Clip2SamSegmenter],
        settings: Mapping[str, Any],
        volumes: Mapping[str, Path],
    ) -> None:
        if not volumes:
            raise ValueError("there is no scan to explore; prepare a data set first")
        self.build, self.settings, self.volumes = build, settings, volumes

    def journey(self, scan_id: str, slice_number: int, **changes: Any) -> Journey:
        """The way of one slice.

        Args:
            scan_id: one of the scans.
            slice_number: from 0 at the head; beyond the last it is the last.
            changes: of the generator or of the choice, by the names of their settings.

        Returns:
            Every step.
        """
        generator = {key: value for key, value in changes.items() if key in GENERATOR}
        choice = {key: value for key, value in changes.items() if key not in GENERATOR}
        changed = {
            **self.settings,
            "generator": {**self.settings["generator"], **generator},
            "choice": {**self.settings["choice"], **choice},
        }
        volume = open_volume(self.volumes[scan_id])
        voxels = volume[min(slice_number, len(volume) - 1)][None]
        segmenter = self.build(**changed)
        (journey,) = segmenter.choose(segmenter.look(voxels))
        return journey

    def draw(self, scan_id: str, slice_number: int, **changes: Any) -> Figure:
        """The figure of `journey`."""
        return journey_picture(self.journey(scan_id, slice_number, **changes))

    def widgets(self) -> ipywidgets.Widget:
        """Controls that redraw the figure; a fault of a setting is said below them."""
        controls, output = self._controls(), ipywidgets.Output()

        def redraw(_: object = None) -> None:
            values = {name: control.value for name, control in controls.items()}
            values["sentences"] = [s.strip() for s in values["sentences"].splitlines() if s.strip()]
            output.clear_output(wait=True)
            with output:
                try:
                    display(self.draw(values.pop("scan_id"), values.pop("slice_number"), **values))
                except ValueError as error:
                    print(error)

        for control in controls.values():
            control.observe(redraw, names="value")
        redraw()
        return ipywidgets.VBox([*controls.values(), output])

    def _controls(self) -> dict[str, ipywidgets.Widget]:
        """One control per setting, at its present value."""
        generator, choice = self.settings["generator"], self.settings["choice"]
        longest = max(len(open_volume(path)) for path in self.volumes.values())
        share = {"min": 0.0, "max": 1.0, "step": 0.01, "readout_format": ".2f", "layout": WIDE}
        slider = {"continuous_update": False, "style": {"description_width": "140px"}}
        floor = choice["similarity_floor"]
        return {
            "scan_id": ipywidgets.Dropdown(options=list(self.volumes), description="scan"),
            "slice_number": ipywidgets.IntSlider(
                value=longest // 2, max=longest - 1, description="slice", layout=WIDE, **slider
            ),
            "points_per_side": ipywidgets.SelectionSlider(
                options=(4, 8, 16, 32), value=generator["points_per_side"],
                description="points per side", layout=WIDE, **slider,
            ),
            "pred_iou_thresh": ipywidgets.FloatSlider(
                value=generator["pred_iou_thresh"], description="predicted IoU", **share, **slider
            ),
            "stability_score_thresh": ipywidgets.FloatSlider(
                value=generator["stability_score_thresh"], description="stability",
                **share, **slider,
            ),
            "area": ipywidgets.FloatRangeSlider(
                value=choice["area"], description="area", **share | {"step": 0.005}, **slider
            ),
            "regions": ipywidgets.IntSlider(
                value=choice["regions"], min=1, max=4, description="regions", layout=WIDE, **slider
            ),
            "cut_to_box": ipywidgets.Checkbox(value=choice["cut_to_box"], description="cut crops"),
            "similarity_floor": ipywidgets.FloatSlider(
                value=-1.0 if floor is None else floor, description="least similarity",
                **share | {"min": -1.0}, **slider,
            ),
            "sentences": ipywidgets.Textarea(
                value="\n".join(choice["sentences"]), description="sentences", rows=6,
                continuous_update=False, layout=ipywidgets.Layout(width="720px"),
            ),
        }  # fmt: skip


def stored_journey(
    scan: Path, mask: Path, *, models: Path, settings: Mapping[str, Any], trained_on: str
) -> Figure:
    """The way of the slice in which a scan's mask shows the most lung, judged by itself.

    Args:
        scan: file of the scan in the store.
        mask: file of its mask.
        models: folder of all weights.
        settings: as `lib.segmentation.sam2clip2sam.preset` gives them.
        trained_on: the data set of the small networks.
    """
    weights = weight_files(models, settings, trained_on)
    explorer = SliceExplorer(partial(build_segmenter, *weights), settings, {scan.stem: scan})
    return explorer.draw(scan.stem, fullest_slice(open_volume(mask).load()))


def middle_slice(volume: Path) -> int:
    """The number of a stored scan's middle slice."""
    return len(open_volume(volume)) // 2
