import pandas as pd
import pytest
import torch

from lib.classification import mask_net
from lib.reporting.drawn_networks import (
    cnn_bert_architecture,
    mask_net_architecture,
    ranked_batch_figure,
    ranking_steps,
)


def texts(axis):
    return [text.get_text().replace("\N{NO-BREAK SPACE}", " ") for text in axis.texts]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return mask_net.build(**mask_net.VARIANTS["small"] | {"nms_threshold": 0.4})


@pytest.fixture
def picture():
    return torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_3d_cnn_with_bert_has_its_published_size():
    (axis,) = cnn_bert_architecture().axes
    assert axis.get_title() == "3-D CNN with BERT: 66.65 M parameters"
    assert {"3 x 32 x 224 x 224", "512 x 4 x 14 x 14, taken as 4 x 512", "1,026"} <= set(
        texts(axis)
    )


def test_mask_net_shows_what_learns_under_each_choice():
    left, right = mask_net_architecture(mask_net.VARIANTS["small"], side=64).axes
    assert {"200 x 3; 200 x 12", "64 x 5", "3 x 192 x 192"} <= set(texts(left))
    shown = [text for text in texts(right) if text]
    assert len([text for text in shown if text == "chosen, but\nno gradient"]) == 1
    # S is 64 x 5 x 128 + 128 + 128 x 128 + 128 + 128 x 3 + 3
    assert shown[:1] == ["S\n57,987"]
    assert shown.count("57,987") == 3


def test_ranking_counts_what_is_left(model, picture):
    steps = ranking_steps(model, picture)
    given, every, kept, ranked = steps["output"][:4]
    assert given == "200 x 3; 200 x 12"
    assert every == "400 x 5"
    assert 64 < int(kept.split(" x ")[0]) < 400  # overlaps are gone
    assert ranked == "64 x 5"
    assert steps["part"].iloc[3] == "ranked by score, best kept"
    few = mask_net.build(**mask_net.VARIANTS["small"] | {"head": {"boxes": 500, "width": 4}})
    found = ranking_steps(few, picture)
    assert found["part"].iloc[3] == "ranked by score, repeated where too few"
    assert found["output"].iloc[3] == "500 x 5"
    assert isinstance(steps, pd.DataFrame) and not steps["parameters"].any()
    assert not model.detector.roi_heads.box_predictor._forward_hooks


def test_the_ranked_batch_is_drawn_best_first(model, picture):
    figure = ranked_batch_figure(model, picture, title="a picture")
    (scores,) = [axis for axis in figure.axes if axis.get_ylabel() == "Rank"]
    shown = scores.images[0].get_array()
    assert shown.shape == (64, 1)
    assert (shown[:-1] >= shown[1:]).all()
    assert {axis.get_title() for axis in figure.axes} >= {
        "Ranked boxes",
        "Module S: 57,987 parameters",
    }
