"""Tests of lib/evaluation/attention.py: means by hand, names of the tokens, bad files."""

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from lib.evaluation.attention import attention_table, mean_attention, read_attention, token_names

SCANS = pd.DataFrame(
    {
        "scan_id": ["a", "b", "c"],
        "patient_id": ["p", "q", "q"],
        "label": ["covid", "normal", "pneumonia"],
    }
)


def store(path, attention):
    attention = np.asarray(attention, np.float32)
    positions = np.zeros((len(attention), 8), np.int64)
    save_file({"attention": attention, "positions": positions}, path)


@pytest.fixture
def folder(tmp_path):
    """Two sets and two heads of scan a, one set of b and c; two time steps."""
    store(tmp_path / "a.safetensors", [[[0.2, 0.3, 0.5], [1, 0, 0]], [[0.4, 0.5, 0.1], [1, 0, 0]]])
    store(tmp_path / "b.safetensors", [[[0, 0, 1], [0, 1, 0]]])
    store(tmp_path / "c.safetensors", [[[0, 1, 0], [0, 1, 0]]])
    return tmp_path


def test_tokens_are_named_by_the_slices_that_they_stand_for():
    assert token_names(4, 32) == ["class token", "1-8", "9-16", "17-24", "25-32"]
    with pytest.raises(ValueError, match="32 slices do not make 5 equal time steps"):
        token_names(5, 32)


def test_attention_is_the_mean_over_the_sets(folder):
    attention, slices = read_attention(folder / "a.safetensors")
    np.testing.assert_allclose(attention, [[0.3, 0.4, 0.3], [1, 0, 0]], atol=1e-7)
    assert slices == 8


def test_a_row_per_scan_and_head(folder):
    table = attention_table(folder, SCANS, positive=["covid"])
    assert table["head"].tolist() == [1, 2] * 3
    assert table["label"].tolist() == ["covid"] * 2 + ["non_covid"] * 4
    np.testing.assert_allclose(table[["class token", "1-4", "5-8"]].sum(axis=1), 1, atol=1e-6)


def test_means_are_those_of_scans_and_heads_with_intervals_over_patients(folder):
    table = attention_table(folder, SCANS, positive=["covid"])
    means = mean_attention(table, seed=0).set_index(["label", "token"])
    np.testing.assert_allclose(means.loc["covid", "value"], [0.65, 0.2, 0.15], atol=1e-7)
    np.testing.assert_allclose(means.loc["non_covid", "value"], [0, 0.75, 0.25], atol=1e-7)
    assert means.loc["non_covid", "scans"].tolist() == [2, 2, 2]
    assert means["low"].isna().all()  # one patient per class says nothing about others
    apart = mean_attention(table.assign(patient_id=table["scan_id"]), seed=0)
    apart = apart.set_index(["label", "token"]).loc["non_covid"]
    assert apart.loc["1-4", ["low", "high"]].tolist() == [0.5, 1.0]
    first = mean_attention(table[table["head"] == 1], seed=0).set_index(["label", "token"])
    np.testing.assert_allclose(first.loc["covid", "value"], [0.3, 0.4, 0.3], atol=1e-7)


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match="is not there: run the stage embed_scans"):
        read_attention(path)
    store(path, np.zeros((2, 0, 5)))
    with pytest.raises(ValueError, match="holds no attention: this network has no BERT head"):
        read_attention(path)
    store(path, [[[0.5, 0.2]]])
    with pytest.raises(ValueError, match=r"sums to 1 over the last, got \(1, 1, 2\)"):
        read_attention(path)
