"""Architectures as they are built: the parts of a network, what each gives, and a drawing of them.

Shapes and numbers come from the modules themselves, run once on an example, so the drawing cannot
say anything else than the code (figure 2 of the paper of the 3-D CNN with BERT, and those alike).
Networks too large for a laptop are built and run under ``torch.device("meta")``, which computes
shapes only.
"""

import textwrap
from collections.abc import Mapping
from functools import partial
from typing import Any

import matplotlib
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from lib.reporting.pictures import LINE_COLOURS, STYLE, panels

WHOLE = "whole network"
COLUMN_INCHES, ROW_INCHES = 3.5, 0.72  # of a network, of one of its parts
BOX_HEIGHT = 0.56  # of a row; the rest is the arrow to the next
PART_CHARACTERS, SHAPE_CHARACTERS = 30, 48  # of a line in a box, beside an arrow
MILLION = 1_000_000


def architecture_steps(model: nn.Module, example: Any, parts: Mapping[str, str]) -> pd.DataFrame:
    """Run a network once and note what goes into its parts and comes out.

    Args:
        model: the network; left as it is, in evaluation while it runs.
        example: its argument, for example one clip; on the device of the network.
        parts: from the names of modules, as ``named_modules`` gives them, to those to be shown.

    Returns:
        One row per part, in the order in which they finish first: part, input, output (see
        `shape_text`), parameters; at the end one of the whole network.

    Raises:
        ValueError: if there is no module of a name, or the network never runs it.
    """
    modules = dict(model.named_modules())
    if unknown := [name for name in parts if name not in modules]:
        raise ValueError(f"the network has no part {', '.join(unknown)}")
    rows: dict[str, dict[str, Any]] = {}
    hooks = [
        modules[name].register_forward_hook(partial(_note, rows, name, shown))
        for name, shown in {**parts, "": WHOLE}.items()
    ]
    was_training = {module: module.training for module in modules.values()}
    try:
        with torch.inference_mode():
            model.eval()(example)
    finally:
        for module, training in was_training.items():
            module.training = training
        for hook in hooks:
            hook.remove()
    if idle := [name for name in parts if name not in rows]:
        raise ValueError(f"the network never runs its part {', '.join(idle)}")
    return pd.DataFrame(rows.values())


def _note(
    rows: dict[str, dict[str, Any]],
    name: str,
    shown: str,
    module: nn.Module,
    given: tuple[Any, ...],
    output: Any,
) -> None:
    """Forward hook: keep the row of a part that ran for the first time."""
    row = {
        "part": shown,
        "input": shape_text(given[0] if len(given) == 1 else given),
        "output": shape_text(output),
        "parameters": sum(weights.numel() for weights in module.parameters()),
    }
    rows.setdefault(name, row)


def shape_text(value: Any) -> str:
    """Shapes of tensors as text, for example ``512 x 4``; what is no tensor is left out.

    Args:
        value: a tensor, torchvision's list of images, or a (named) tuple, list or mapping of what
            may be here. The first axis of a tensor, where its length is 1, is the one example that
            the network was given, and not shown.
    """
    if isinstance(value, ImageList):
        value = value.tensors
    if isinstance(value, Tensor):
        shape = value.shape[1:] if value.ndim > 1 and len(value) == 1 else value.shape
        return " x ".join(str(length) for length in shape)
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        named = ((f"{name}: ", shape_text(one)) for name, one in value.items())
    elif isinstance(value, list | tuple):
        named = (("", shape_text(one)) for one in value)
    else:
        return ""
    return "; ".join(name + text for name, text in named if text)


def count_text(count: int) -> str:
    """A number of parameters as it is read: 1,026 or 63.49 M; nothing where there are none."""
    if count >= MILLION:
        return f"{count / MILLION:.2f} M"
    return f"{count:,}" if count else ""


@matplotlib.rc_context(STYLE)
def architecture_figure(networks: Mapping[str, pd.DataFrame], *, axes: str = "") -> Figure:
    """Networks side by side, each from top to bottom.

    A part is a box with its parameters, filled by its share of all parameters of its network; what
    it gives stands beside the arrow that leaves it, in two lines at most. Where the next part is
    given one tensor of another shape (averaged or turned in between, by no part of its own), that
    follows.

    Args:
        networks: of `architecture_steps`, by the name above the column.
        axes: what the axes of the shapes are, for the line below.

    Raises:
        ValueError: if there is none.
    """
    longest = max((len(steps) - 1 for steps in networks.values()), default=0)
    figure, columns = panels(len(networks), size=(COLUMN_INCHES, ROW_INCHES * (longest + 1)))
    figure.get_layout_engine().set(w_pad=0.12)
    for column, (name, steps) in zip(columns, networks.items(), strict=True):
        column.set(xlim=(0, 1), ylim=(longest, -0.5))
        column.set_axis_off()
        draw_architecture(column, name, steps)
    filled = "blue: share of the parameters of the network"
    figure.supxlabel(f"{axes}; {filled}" if axes else filled, color="0.35", fontsize=8)
    return figure


def draw_architecture(axis: Axes, name: str, steps: pd.DataFrame) -> None:
    """Draw one network from the top, a part to a row.

    Args:
        axis: from 0 to 1 across, down by one for each part; the input stands above 0.
        name: of the network.
        steps: of `architecture_steps`.
    """
    *parts, whole = steps.to_dict("records")
    axis.set_title(f"{name}: {count_text(whole['parameters'])} parameters", fontweight="bold")
    _draw_arrow(axis, -1 + BOX_HEIGHT, _between(whole["input"], parts[0]["input"]))
    following = [part["input"] for part in parts[1:]] + [parts[-1]["output"]]
    for place, (part, taken) in enumerate(zip(parts, following, strict=True)):
        _draw_box(axis, place, part, part["parameters"] / max(1, whole["parameters"]))
        _draw_arrow(axis, place + BOX_HEIGHT, _between(part["output"], taken))


def _between(given: str, taken: str) -> str:
    """What stands beside an arrow: shapes, and the one that the next part takes instead."""
    # a part that takes several tensors takes them from several parts
    single = taken and ";" not in taken and taken != given
    text = f"{given}, taken as {taken}" if single else given
    unbroken = text.replace(" x ", "\N{NO-BREAK SPACE}x\N{NO-BREAK SPACE}")
    lines = textwrap.wrap(unbroken, SHAPE_CHARACTERS, max_lines=2, placeholder=" ...")
    return "\n".join(lines)


def _draw_box(axis: Axes, top: float, part: Mapping[str, Any], share: float) -> None:
    """A part with its name, its parameters, and the share of them."""
    blue = LINE_COLOURS[0]
    axis.add_patch(Rectangle((0, top), share, BOX_HEIGHT, facecolor=blue, alpha=0.25, linewidth=0))
    axis.add_patch(Rectangle((0, top), 1, BOX_HEIGHT, fill=False, edgecolor="0.15", linewidth=1))
    middle = top + BOX_HEIGHT / 2
    axis.text(0.03, middle, textwrap.fill(part["part"], PART_CHARACTERS), va="center", ha="left")
    axis.text(0.97, middle, count_text(part["parameters"]), va="center", ha="right", color="0.35")


def _draw_arrow(axis: Axes, top: float, text: str) -> None:
    """An arrow down to the next row with what it carries."""
    axis.annotate(
        "",
        xy=(0.1, top + 1 - BOX_HEIGHT),
        xytext=(0.1, top),
        arrowprops={"arrowstyle": "-|>", "color": "0.15", "shrinkA": 0, "shrinkB": 0},
    )
    axis.text(0.16, top + (1 - BOX_HEIGHT) / 2, text, va="center", fontsize=8)
