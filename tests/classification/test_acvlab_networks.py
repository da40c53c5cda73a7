import pytest
import torch

from lib.classification import acvlab_networks
from lib.classification.acvlab_networks import SequenceNetwork, Standardise
from tests.classification.made_acvlab import tiny_acvlab

NUMBERS = {"draws": 3, "slices_per_scan": 4, "sequence_slices": 5, "seed": 0}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def random_slices(number, *, size=24):
    return torch.randint(0, 256, (number, size, size), dtype=torch.uint8)


def test_the_lstm_reads_its_last_states_of_both_directions():
    network = SequenceNetwork(embedding_width=6, width=5, hidden_width=4).eval()
    sequences = torch.randn(3, 7, 6)
    outputs, _ = network.recurrent(sequences)
    states = torch.cat([outputs[:, -1, :5], outputs[:, 0, 5:]], 1)
    torch.testing.assert_close(network(sequences), network.head(states).squeeze(1))


def test_standardised_embeddings_have_mean_0_and_deviation_1():
    layer, embeddings = Standardise(3), torch.randn(50, 3) * torch.tensor([1.0, 9.0, 0.1]) + 4
    torch.testing.assert_close(layer(embeddings), embeddings)
    layer.measure(embeddings)
    out = layer(embeddings)
    torch.testing.assert_close(out.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(out.std(0, correction=0), torch.ones(3), atol=1e-4, rtol=0)
    layer.measure(torch.full((4, 3), 2.0))  # a feature that never changes
    assert torch.isfinite(layer(embeddings)).all()


def test_scans_in_pieces_have_the_same_embeddings(monkeypatch):
    model, slices = tiny_acvlab().eval(), random_slices(7)
    whole = model.embed(slices)
    monkeypatch.setattr(acvlab_networks, "SLICES_PER_CHUNK", 3)
    torch.testing.assert_close(model.embed(slices), whole)


def test_drawn_embeddings_are_the_embeddings_of_drawn_slices():
    """One draw of all slices is the plain mean of their probabilities, the published judgement."""
    model, slices = tiny_acvlab().eval(), random_slices(4)
    found = model(slices, **{**NUMBERS, "draws": 1})
    torch.testing.assert_close(found["slices"], model.slices(slices[None]).sigmoid().mean())


@pytest.mark.parametrize("length", [1, 2, 9])
def test_every_member_gives_a_probability(length):
    found = tiny_acvlab().eval()(random_slices(length), **NUMBERS)
    assert list(found) == ["slices", "sequence", "picture"]
    assert all(0 < chance < 1 for chance in found.values())
