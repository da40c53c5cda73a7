"""RACNet as its paper reads: every scan is fed as 700 slices, black ones behind the real ones.

Kollias et al. 2024, 3.2; FACTS 2. Network and weights are those of `lib.classification.racnet`,
which is the one to use: this is there to be compared with, by tests and by the benchmark.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lib.classification.racnet import RACNet, routing_positions


def padded_slices(slices: Tensor, lengths: Sequence[int], positions: int) -> Tensor:
    """Scans of equal length, black slices behind the real ones.

    Args:
        slices: scans one after another, shape (total slices, channels, height, width).
        lengths: number of slices of each scan.
        positions: number of slices that each scan gets.

    Returns:
        Shape (scans, positions, channels, height, width).
    """
    padded = slices.new_zeros(len(lengths), positions, *slices.shape[1:])
    for scan, part in zip(padded, slices.split(list(lengths)), strict=True):
        scan[: len(part)] = part
    return padded


def routed_outputs(outputs: Tensor, lengths: Sequence[int], routing: str) -> Tensor:
    """Route all outputs of the GRU to their places and mask those of padding.

    Outputs of real slices take the places of `routing_positions`; those of padding fill the gaps in
    order, and the Mask Layer zeroes them there.

    Args:
        outputs: of the GRU, shape (scans, positions, width).
        lengths: number of real slices of each scan.
        routing: see `routing_positions`.

    Returns:
        Shape (scans, positions, width).
    """
    positions = outputs.shape[1]
    scans = []
    for scan, length in zip(outputs, lengths, strict=True):
        mask = torch.zeros(positions, dtype=torch.bool, device=outputs.device)
        mask[routing_positions(length, positions, routing)] = True
        source = torch.empty(positions, dtype=torch.int64, device=outputs.device)
        source[mask] = torch.arange(length, device=outputs.device)
        source[~mask] = torch.arange(length, positions, device=outputs.device)
        scans.append(scan[source] * mask[:, None])
    return torch.stack(scans)


def padded_logits(model: RACNet, slices: Tensor, lengths: Sequence[int]) -> Tensor:
    """Class scores of each scan, from all ``model.positions`` slices of it.

    Args:
        model: the network.
        slices: uint8, as `RACNet.forward` takes them.
        lengths: likewise.

    Returns:
        Logits, shape (scans, classes); in evaluation those of ``model(slices, lengths)``.
    """
    padded = padded_slices(slices, lengths, model.positions).flatten(0, 1)
    features = model.dropout(model.normalisation(model.slice_features(padded)))
    sequences = features.view(len(lengths), model.positions, -1).transpose(0, 1)
    outputs, _ = model.recurrent(sequences)  # (positions, scans, width)
    routed = routed_outputs(outputs.transpose(0, 1), lengths, model.routing)
    weights = model.dense.table.view(-1, model.dense.hidden_width)
    hidden = routed.flatten(1) @ weights + model.dense.bias
    return model.output(torch.relu(hidden))
