"""Architectures as they are built: the parts of a network, what each gives, and a drawing of them.

Shapes and numbers come from the modules themselves, run once on an example, so the drawing cannot
say anything else than the code (figure 2 of the paper of the 3-D CNN with BERT, and those alike).
Networks too large for a laptop are built and run under ``torch.device("meta")``, which computes
shapes only.
"""

import textwrap
from collections.abc import Callable, Mapping
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

from lib.reporting.pictures import LINE_COLOURS, STYLE, new_figure, panels

WHOLE = "whole network"
COLUMN_INCHES, ROW_INCHES = 3.5, 0.72  # of a network, of one of its parts
BOX_HEIGHT = 0.56  # of a row; the rest is the arrow to the next
PART_CHARACTERS, SHAPE_CHARACTERS = 30, 48  # of a line in a box, beside an arrow
CELL_INCHES = 1.0  # of a part under one choice of what is trained
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


def trained_counts(
    model: nn.Module, loss: Callable[[], Tensor], parts: Mapping[str, str]
) -> pd.DataFrame:
    """How many parameters of each part are to learn, and how many a loss can teach.

    The two differ where a step of the network has no derivative, or is cut off from it.

    Args:
        model: with ``requires_grad`` set; its gradients are gone afterwards.
        loss: one forward run of it, to a scalar.
        parts: from the names of modules to those to be shown.

    Returns:
        One row per part, in the given order, and at the end one of the whole network: part, chosen,
        taught.

    Raises:
        ValueError: if there is no module of a name.
    """
    modules = dict(model.named_modules())
    if unknown := [name for name in parts if name not in modules]:
        raise ValueError(f"the network has no part {', '.join(unknown)}")
    model.zero_grad(set_to_none=True)
    loss().backward()
    rows = [
        {
            "part": shown,
            "chosen": sum(w.numel() for w in modules[name].parameters() if w.requires_grad),
            "taught": sum(w.numel() for w in modules[name].parameters() if w.grad is not None),
        }
        for name, shown in {**parts, "": WHOLE}.items()
    ]
    model.zero_grad(set_to_none=True)
    return pd.DataFrame(rows)


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


@matplotlib.rc_context(STYLE)
def trained_figure(
    name: str, steps: pd.DataFrame, trained: Mapping[str, pd.DataFrame], *, axes: str = ""
) -> Figure:
    """A network from top to bottom, and beside each part how much of it learns.

    Args:
        name: of the network.
        steps: of `architecture_steps`.
        trained: of `trained_counts`, by the name of a choice of what is trained; parts that no
            parameters of learn are left empty.
        axes: what the axes of the shapes are, for the line below.
    """
    rows, widths = len(steps) - 1, [COLUMN_INCHES, 0.2 + CELL_INCHES * len(trained)]
    figure = new_figure((sum(widths), ROW_INCHES * (rows + 1)))
    left, right = figure.subplots(1, 2, width_ratios=widths)
    for axis, width, edge in ((left, 1, 0), (right, len(trained), 0.02)):
        axis.set(xlim=(-edge, width + edge), ylim=(rows, -0.5))
        axis.set_axis_off()
    draw_architecture(left, name, steps)
    right.set_title("of these are trained", fontweight="bold")
    totals = steps.set_index("part")["parameters"]
    for place, (choice, counts) in enumerate(trained.items()):
        whole = counts.set_index("part").loc[WHOLE, "chosen"]
        text = f"{choice}\n{count_text(whole)}"
        right.text(place + 0.5, -1 + BOX_HEIGHT + 0.22, text, ha="center", va="center")
        for row, part in enumerate(steps["part"][:-1]):
            counted = counts.set_index("part").loc[part]
            _draw_cell(right, place, row, counted, totals[part])
    filled = "blue: share of the parameters of the network, right: of the part"
    figure.supxlabel(f"{axes}; {filled}" if axes else filled, color="0.35", fontsize=8)
    return figure


def _draw_cell(axis: Axes, left: int, top: int, counted: pd.Series, parameters: int) -> None:
    """What of one part learns under one choice."""
    share = counted["taught"] / max(1, parameters)
    edges = {"edgecolor": "0.8", "linewidth": 0.6}
    axis.add_patch(Rectangle((left, top), share, BOX_HEIGHT, facecolor=LINE_COLOURS[0], alpha=0.25))
    axis.add_patch(Rectangle((left, top), 1, BOX_HEIGHT, fill=False, **edges))
    text = count_text(counted["taught"])
    if counted["chosen"] and not counted["taught"]:
        text = "chosen, but\nno gradient"
    axis.text(left + 0.5, top + BOX_HEIGHT / 2, text, ha="center", va="center", fontsize=8)


def draw_architecture(axis: Axes, name: str, steps: pd.DataFrame) -> None:
    """Draw one network from the top, a part to a row.

    Args:
        axis: from 0 to 1 across, down by one for each part; the input stands above 0.
        name: of the network.
        steps: of `architecture_steps`.
    """
    *parts, whole = steps.to_dict("records")
    count = count_text(whole["parameters"])
    axis.set_title(f"{name}: {count} parameters" if count else name, fontweight="bold")
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
    unbroken = text
    for glued in (" x ", ": "):
        unbroken = unbroken.replace(glued, glued.replace(" ", "\N{NO-BREAK SPACE}"))
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
