"""What `lib/classification/task.py` asks of every classifier of the study, asked of each."""

from importlib import import_module
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning_fabric import Fabric, seed_everything

PARAMETERS = Path(__file__).resolve().parents[2] / "params.yaml"
CLASSIFIERS = yaml.safe_load(PARAMETERS.read_text())["classify"]
PUBLISHED_MILLIONS = {"mdap": 33.41, "mc3_18": 11.47, "densenet3d121": 11.24, "cnn_bert": 66.65}


@pytest.fixture(params=CLASSIFIERS)
def name(request):
    return request.param


@pytest.fixture
def classifier(name):
    return import_module(f"lib.classification.{name}")


@pytest.fixture
def settings(name):
    return CLASSIFIERS[name]["small"]


@pytest.fixture
def scans(made_scans, black_scan):
    """One of a single slice, one of many slices, one of which the mask leaves nothing."""
    single, many = made_scans(2)
    return [single, many, black_scan]


def test_a_classifier_brings_what_is_asked(name, classifier):
    assert set(classifier.VARIANTS) == {"paper", "small"} <= set(CLASSIFIERS[name])
    assert list(signature(classifier.train).parameters) == ["task"]
    assert list(signature(classifier.predict).parameters) == [
        "model",
        "scans",
        "settings",
        "fabric",
    ]
    assert list(signature(classifier.shown).parameters) == ["scan", "settings"]


def test_the_card_says_where_a_system_comes_from_and_what_is_ours(classifier):
    card = classifier.CARD
    assert "FACTS" in card.source
    assert all(len(text) > 30 for text in (card.published, card.ours))


def test_every_system_has_a_name_of_its_own():
    names = [import_module(f"lib.classification.{name}").CARD.name for name in CLASSIFIERS]
    assert all(names) and len(set(names)) == len(names)


def test_the_published_size_has_the_parameters_of_the_card(name, classifier):
    with torch.device("meta"):
        model = classifier.build(**classifier.VARIANTS["paper"])
    count = sum(weights.numel() for weights in model.parameters())
    assert classifier.CARD.parameters in (count, None)
    assert PUBLISHED_MILLIONS.get(name) in (round(count / 1e6, 2), None)


def test_any_scan_gets_probabilities_and_the_same_ones_in_another_order(
    classifier, settings, scans
):
    seed_everything(0, verbose=False)
    model = classifier.build(**classifier.VARIANTS["small"])
    asked = {"settings": settings, "fabric": Fabric(accelerator="cpu", devices=1)}
    found = classifier.predict(model, scans, **asked)
    assert (found.shape, found.dtype) == ((3, 2), np.float32)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)
    reverse = classifier.predict(model, scans[::-1], **asked)
    np.testing.assert_allclose(reverse[::-1], found, atol=1e-5)
    assert model.training


def test_pictures_show_what_the_network_sees(classifier, settings, scans):
    size, number = settings["image_size"], settings.get("depth", settings.get("slices"))
    for scan in scans:
        pictures = classifier.shown(scan, settings)
        assert pictures.dtype == np.uint8
        assert pictures.shape[1:] in ((size, size), (size, size, 3))
        if isinstance(number, int):  # else slices of the scan's own number, or a section
            assert len(pictures) == number
        assert len(pictures) >= 1
