from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from lib.reporting.architecture_figures import (
    architecture_figure,
    architecture_steps,
    count_text,
    shape_text,
    trained_counts,
    trained_figure,
)


class Pooled(NamedTuple):
    embedding: Tensor
    weights: Tensor


class Pooling(nn.Module):
    def forward(self, features: Tensor) -> Pooled:
        return Pooled(features.mean(1), features.softmax(1))


class Network(nn.Module):
    """Convolution, a mean by no part of its own, pooling, output; one part is never run."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(4, 2)  # listed first, run last
        self.trunk = nn.Sequential(OrderedDict(stem=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)))
        self.pooling = Pooling()
        self.spare = nn.Linear(1, 1)
        self.scale = nn.Parameter(torch.ones(()))  # of no part

    def forward(self, pictures: Tensor) -> Tensor:
        features = self.trunk(self.trunk(pictures)[:, :3]).mean(3).transpose(1, 2)
        return self.scale * self.output(self.pooling(features).embedding)


PARTS = {"output": "scores", "trunk.stem": "stem", "pooling": "pooling"}


@pytest.fixture
def steps():
    return architecture_steps(Network(), torch.zeros(1, 3, 8, 9), PARTS)


def test_steps_are_what_ran_in_its_order(steps):
    assert steps.to_dict("list") == {
        "part": ["stem", "pooling", "scores", "whole network"],
        "input": ["3 x 8 x 9", "4 x 4", "4", "3 x 8 x 9"],  # the stem ran twice: first time
        "output": ["4 x 6 x 7", "embedding: 4; weights: 4 x 4", "2", "2"],
        "parameters": [112, 0, 10, 112 + 8 + 10 + 2 + 1],
    }


def test_the_network_is_left_as_it_was():
    network = Network()
    network.trunk.norm.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    architecture_steps(network, torch.randn(2, 3, 8, 9), PARTS)
    assert network.training and network.trunk.training and not network.trunk.norm.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())
    with pytest.raises(RuntimeError):
        architecture_steps(network, torch.zeros(1, 5, 8, 9), PARTS)
    assert network.training and not any(module._forward_hooks for module in network.modules())


def test_shapes_alone_need_no_memory(steps):
    with torch.device("meta"):
        network, example = Network(), torch.empty(1, 3, 8, 9)
    assert architecture_steps(network, example, PARTS).equals(steps)


def test_unknown_and_idle_parts_are_refused():
    example = torch.zeros(1, 3, 8, 9)
    with pytest.raises(ValueError, match=r"the network has no part head, trunk\.tail"):
        architecture_steps(Network(), example, {"head": "a", "trunk.tail": "b"})
    with pytest.raises(ValueError, match="the network never runs its part spare"):
        architecture_steps(Network(), example, {"spare": "a"})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.zeros(1, 2, 3), "2 x 3"),
        (torch.zeros(5, 2), "5 x 2"),
        (torch.zeros(1), "1"),
        ({"boxes": torch.zeros(5, 4), "lost": None}, "boxes: 5 x 4"),
        ([torch.zeros(3, 8, 8), (torch.zeros(1, 2), 7)], "3 x 8 x 8; 2"),
        (ImageList(torch.zeros(1, 3, 8, 8), [(8, 8)]), "3 x 8 x 8"),
        (None, ""),
    ],
)
def test_text_of_shapes(value, text):
    assert shape_text(value) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, ""), (1_026, "1,026"), (999_999, "999,999"), (63_491_975, "63.49 M")]
)
def test_text_of_counts(count, text):
    assert count_text(count) == text


def test_the_figure_says_what_the_steps_say(steps):
    figure = architecture_figure({"ours": steps, "other": steps.iloc[[0, 3]]}, axes="a x b")
    left, right = figure.axes
    assert left.get_title() == "ours: 133 parameters"
    texts = [text.get_text().replace("\N{NO-BREAK SPACE}", " ") for text in left.texts]
    assert [text for text in texts if text] == [
        "3 x 8 x 9",
        "stem",
        "112",
        "4 x 6 x 7, taken as 4 x 4",
        "pooling",
        "embedding: 4; weights: 4 x 4, taken as 4",
        "scores",
        "10",
        "2",
    ]
    filled = [p.get_width() for p in left.patches if isinstance(p, Rectangle) and p.get_fill()]
    np.testing.assert_allclose(filled, [112 / 133, 0, 10 / 133])
    assert figure.get_supxlabel() == "a x b; blue: share of the parameters of the network"
    assert len([p for p in right.patches if isinstance(p, Rectangle) and p.get_fill()]) == 1


def test_texts_stay_inside_their_boxes_and_apart(steps):
    names = ["a stem with a name that needs two lines here", "b", "c", "whole"]
    pyramid = "; ".join(f"{level}: 256 x 64 x 64" for level in range(5))
    long = steps.assign(part=names, output=pyramid)
    figure = architecture_figure({"ours": long})
    figure.canvas.draw()
    extents = [text.get_window_extent() for text in figure.axes[0].texts if text.get_text()]
    inside = figure.axes[0].get_window_extent().expanded(1.01, 1.01)
    assert all(
        inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1) for box in extents
    )
    for number, box in enumerate(extents):
        assert not any(box.overlaps(other) for other in extents[number + 1 :])


def test_what_learns_is_told_from_what_gets_a_gradient(steps):
    network = Network().requires_grad_(False)
    for part in (network.trunk.stem, network.spare, network.output):
        part.requires_grad_(True)
    counts = trained_counts(
        network, lambda: network(torch.rand(2, 3, 8, 9)).sum(), PARTS | {"spare": "spare"}
    )
    assert counts.to_dict("list") == {
        "part": ["scores", "stem", "pooling", "spare", "whole network"],
        "chosen": [10, 112, 0, 2, 124],
        "taught": [10, 112, 0, 0, 122],
    }
    assert all(weights.grad is None for weights in network.parameters())
    with pytest.raises(ValueError, match="the network has no part head"):
        trained_counts(network, lambda: None, {"head": "a"})
    figure = trained_figure("ours", steps, {"most": counts, "all": counts}, axes="a x b")
    left, right = figure.axes
    assert left.get_title() == "ours: 133 parameters"
    cells = ["112", "", "10"]
    written = [text.get_text() for text in right.texts]
    assert written == ["most\n124", *cells, "all\n124", *cells]
    untaught = counts.assign(taught=0)
    figure = trained_figure("ours", steps, {"most": untaught})
    assert [text.get_text() for text in figure.axes[1].texts][1] == "chosen, but\nno gradient"


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match="a figure needs something to show"):
        architecture_figure({})
