"""What `lib/classification/task.py` asks of every classifier of single slices, asked of each."""

from importlib import import_module
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning_fabric import Fabric, seed_everything

PARAMETERS = Path(__file__).resolve().parents[2] / "params.yaml"
CLASSIFIERS = yaml.safe_load(PARAMETERS.read_text())["classify_pictures"]
CPU = Fabric(accelerator="cpu", devices=1)


@pytest.fixture(params=CLASSIFIERS)
def name(request):
    return request.param


@pytest.fixture
def classifier(name):
    return import_module(f"lib.classification.{name}")


@pytest.fixture
def settings(name):
    return CLASSIFIERS[name]["small"]


def test_a_classifier_brings_what_is_asked(name, classifier):
    assert {"paper", "small"} <= set(classifier.VARIANTS)
    assert {"paper", "small"} <= set(CLASSIFIERS[name])
    assert list(signature(classifier.train).parameters) == ["task"]
    asked = ["model", "scans", "settings", "fabric"]
    assert list(signature(classifier.predict).parameters) == asked
    assert list(signature(classifier.shown).parameters) == ["scan", "settings"]


def test_the_card_says_where_a_system_comes_from_and_what_is_ours(classifier):
    card = classifier.CARD
    assert "FACTS" in card.source
    assert all(len(text) > 30 for text in (card.published, card.ours))


def test_every_system_has_a_name_of_its_own():
    names = [import_module(f"lib.classification.{name}").CARD.name for name in CLASSIFIERS]
    assert all(names) and len(set(names)) == len(names)


def test_the_published_size_has_the_parameters_of_the_card(classifier):
    with torch.device("meta"):
        model = classifier.build(**classifier.VARIANTS["paper"])
    assert classifier.CARD.parameters == sum(weights.numel() for weights in model.parameters())


@pytest.mark.parametrize("classes", [2, 3])
def test_pictures_get_probabilities_and_the_same_ones_in_another_order(
    classifier, settings, made_pictures, classes
):
    pictures = made_pictures(3)
    seed_everything(0, verbose=False)
    model = classifier.build(**classifier.VARIANTS["small"], classes=classes)
    asked = {"settings": settings, "fabric": CPU}
    found = classifier.predict(model, pictures, **asked)
    assert (found.shape, found.dtype) == ((6, classes), np.float32)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)
    reverse = classifier.predict(model, pictures[::-1], **asked)
    np.testing.assert_allclose(reverse[::-1], found, atol=1e-5)
    assert model.training


def test_a_picture_shows_what_the_network_sees(classifier, settings, made_pictures):
    size = settings["image_size"]
    seen = classifier.shown(made_pictures(1)[0], settings)
    assert seen.dtype == np.uint8
    assert seen.shape in ((1, size, size), (1, size, size, 3))
