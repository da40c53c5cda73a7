import pytest
import safetensors.torch
import torch
from torch import nn

from lib import inference


def test_batches_keep_the_order_and_are_at_most_as_large_as_asked():
    sizes = []

    def run(batch):
        sizes.append(len(batch))
        return [2 * item for item in batch]

    assert inference.in_batches(run, list(range(7)), batch_size=3) == [0, 2, 4, 6, 8, 10, 12]
    assert sizes == [3, 3, 1]
    assert inference.in_batches(run, [], batch_size=3) == []


def test_out_of_memory_halves_the_batch_says_so_and_loses_nothing():
    def run(batch):
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return list(batch)

    with pytest.warns(UserWarning, match="out of memory, going on in batches of 2"):
        assert inference.in_batches(run, list(range(9)), batch_size=8) == list(range(9))


def test_an_item_too_large_for_the_memory_is_an_error():
    def run(batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.warns(UserWarning), pytest.raises(torch.OutOfMemoryError):
        inference.in_batches(run, [1, 2], batch_size=2)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        inference.in_batches(run, [1], batch_size=0)


def test_weights_are_loaded_frozen_and_damage_is_one_sentence(tmp_path):
    trained, network = nn.Linear(3, 2), nn.Linear(3, 2).train()
    path = tmp_path / "best.safetensors"
    safetensors.torch.save_file(trained.state_dict(), path)
    loaded = inference.load_weights(network, path)
    assert torch.equal(loaded.weight, trained.weight)
    assert not loaded.training and not loaded.weight.requires_grad
    with pytest.raises(ValueError, match="does not fit the network"):
        inference.load_weights(nn.Linear(4, 2), path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match="does not fit the network"):
        inference.load_weights(nn.Linear(3, 2), path)
    with pytest.raises(FileNotFoundError, match="run the stage that trains it first"):
        inference.load_weights(nn.Linear(3, 2), tmp_path / "none.safetensors")


def test_one_thread_is_given_back():
    before = torch.get_num_threads()
    with inference.one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
