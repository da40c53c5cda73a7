"""Training the small CLIP: crops of what slices show, with captions about lungs and all the rest.

Both come from the regions of a slice (`lib.foundation.regions`). Crops are made as SAM would make
them, not from perfect masks: outlines a little off, dense parts of a lung left out, and near misses
(a piece cut out of a lung, lungs with what lies between them) that are no lungs and say so in their
captions. The captions are worded otherwise than the sentences that the study asks with.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from lightning_fabric import Fabric
from open_clip import CLIP
from scipy import ndimage
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lib.data.masks import tissue_threshold
from lib.data.scan import to_grey
from lib.data.splits import SPLITS, TRAIN, VALIDATION
from lib.data.store import open_volume
from lib.foundation import regions
from lib.foundation.clip import (
    crop_to_mask,
    embed_sentences,
    encode_crops,
    prepare_crops,
    similarity,
    to_input,
    tokenize,
)
from lib.foundation.regions import Region, slice_regions
from lib.training import Row, fit, schedules

LUNG = "lung"
FRAGMENT, THORAX, VESSEL = "lung fragment", "lungs and mediastinum", "vessel"
KINDS = (LUNG, FRAGMENT, THORAX, VESSEL, *regions.OTHER_REGIONS)  # a kind has captions

OUTLINE_ERROR = 0.015  # of the slice's longer side; how far an outline is off at most
LUNG_VIEWS = 3  # crops of each lung region per draw: lungs are a fifth of all crops
PIECES_OF_A_KIND = 3  # of bones, fat and so on, drawn among all
WHOLE_ENOUGH = 0.8  # share of a lung that a crop needs in order to count as lung
CHANGED_SHARE = 0.3  # of lung crops that lack an end, and of those that lack dense parts
CUT_OFF_SHARES = (0.5, 0.9)  # of a lung that a fragment lacks
CAPTIONS_OF_A_KIND = 2  # per batch
WORDS_LEFT_OUT = 0.2  # share of a caption's words
LARGEST_SCALE = 100.0  # of the logits, as in CLIP (Radford et al. 2021, section 2.5)

WHOLE_LUNGS = (regions.RIGHT_LUNG_REGION, regions.LEFT_LUNG_REGION, regions.BOTH_LUNGS)

Crop = tuple[str, np.ndarray]  # kind and mask
Generator = np.random.Generator


class Crops(NamedTuple):
    """Crops of many slices, ready for the network.

    Attributes:
        squares: uint8, shape (crops, size, size), from `lib.foundation.clip.prepare_crops`.
        kinds: int64, shape (crops,), indices of `KINDS`.
        slices: int64, shape (crops,), which slice each crop is of.
    """

    squares: Tensor
    kinds: Tensor
    slices: Tensor


class Batch(NamedTuple):
    """Crops, and captions of every kind of crop.

    Attributes:
        squares: uint8, shape (crops, size, size).
        kinds: int64, shape (crops,).
        tokens: int64, shape (captions, context length).
        caption_kinds: int64, shape (captions,), every kind at least once.
    """

    squares: Tensor
    kinds: Tensor
    tokens: Tensor
    caption_kinds: Tensor


# ---- masks as SAM would make them -------------------------------------------------------------


def disturb(mask: np.ndarray, generator: Generator) -> np.ndarray:
    """A mask whose outline is a little off: grown, shrunk, shifted, or as it is.

    Args:
        mask: bool, shape (height, width), not empty.
        generator: of random numbers.

    Returns:
        bool, same shape, not empty.
    """
    reach = max(1, round(OUTLINE_ERROR * max(mask.shape)))
    steps = int(generator.integers(1, reach + 1))
    change = generator.choice(["none", "grow", "shrink", "shift"])
    if change == "none":
        return mask
    if change == "shift":
        rows, columns = generator.integers(-reach, reach + 1, 2)
        changed = _shifted(mask, rows, columns, reach)
    else:
        distance = _distances(mask if change == "shrink" else ~mask, mask, reach)
        changed = mask & (distance > steps) if change == "shrink" else mask | (distance <= steps)
    return changed if changed.any() else mask


def _distances(inside: np.ndarray, mask: np.ndarray, reach: int) -> np.ndarray:
    """Chessboard distance to the border of a set, found only around the mask."""
    box = ndimage.find_objects(mask.astype(np.uint8))[0]
    box = tuple(slice(max(0, side.start - reach - 1), side.stop + reach + 1) for side in box)
    distances = np.full(mask.shape, np.inf)
    distances[box] = ndimage.distance_transform_cdt(inside[box], "chessboard")
    return distances


def _shifted(mask: np.ndarray, rows: int, columns: int, reach: int) -> np.ndarray:
    """A mask moved by whole pixels, at most ``reach``; what leaves the picture is lost."""
    height, width = mask.shape
    top, left = reach - rows, reach - columns
    return np.pad(mask, reach)[top : top + height, left : left + width]


def cut(mask: np.ndarray, share: float, generator: Generator) -> np.ndarray:
    """A mask without the part beyond a straight line in a random direction.

    Args:
        mask: bool, shape (height, width), not empty.
        share: of the mask's pixels to cut off, below 1.
        generator: of random numbers.

    Returns:
        bool, same shape, not empty.
    """
    places = np.argwhere(mask)
    angle = generator.uniform(0, 2 * np.pi)
    heights = places @ [np.cos(angle), np.sin(angle)]
    kept = places[heights >= np.quantile(heights, share) - 1e-6]  # rounding must not lose ties
    part = np.zeros_like(mask)
    part[kept[:, 0], kept[:, 1]] = True
    return part


def _lung_crops(region: Region, dense: np.ndarray, generator: Generator) -> Iterator[Crop]:
    """Views of a lung that count as lung: outline off, an end lost, dense parts left out."""
    for _ in range(LUNG_VIEWS):
        view = disturb(region.mask, generator)
        if generator.random() < CHANGED_SHARE:
            view = cut(view, generator.uniform(0, 1 - WHOLE_ENOUGH), generator)
        airy = view & ~dense
        if generator.random() < CHANGED_SHARE and airy.sum() >= WHOLE_ENOUGH * region.mask.sum():
            view = airy
        yield LUNG, view


def _near_misses(lungs: list[Region], dense: np.ndarray, generator: Generator) -> Iterator[Crop]:
    """What is almost a lung: pieces cut out of one, and the vessels in it."""
    for region in lungs:
        yield FRAGMENT, cut(region.mask, generator.uniform(*CUT_OFF_SHARES), generator)
        vessels = region.mask & dense
        if vessels.any():
            yield VESSEL, vessels


def _merged(found: Mapping[str, list[Region]], generator: Generator) -> Iterator[Crop]:
    """Masks that took in too much, and the body with its lungs left out."""
    lungs = [region.mask for name in WHOLE_LUNGS for region in found.get(name, [])]
    for between in found.get(regions.MEDIASTINUM, []):
        for lung in lungs:
            yield THORAX, disturb(lung | between.mask, generator)
    for body in found.get(regions.BODY, []):
        for wall in found.get(regions.CHEST_WALL, []):
            yield THORAX, disturb(body.mask & ~wall.mask, generator)
        if lungs:
            yield regions.BODY, body.mask & ~np.logical_or.reduce(lungs)


def draw_crops(voxels: np.ndarray, found: Sequence[Region], generator: Generator) -> list[Crop]:
    """Kinds and masks of crops of one slice, drawn at random.

    Args:
        voxels: shape (height, width), int16 HU or uint8.
        found: its regions, from `lib.foundation.regions.slice_regions`.
        generator: of random numbers.

    Returns:
        About 25; masks are bool, shape (height, width), none is empty.
    """
    dense = voxels > tissue_threshold(voxels)
    named = {name: [r for r in found if r.name == name] for name in {r.name for r in found}}
    lung_regions = [region for region in found if region.is_lung]
    crops = [crop for region in lung_regions for crop in _lung_crops(region, dense, generator)]
    crops += _near_misses(lung_regions, dense, generator)
    crops += _merged(named, generator)
    for name in regions.OTHER_REGIONS:
        choice = named.get(name, [])
        order = generator.permutation(len(choice))[:PIECES_OF_A_KIND]
        crops += [(name, disturb(choice[index].mask, generator)) for index in order]
    return [(kind, mask) for kind, mask in crops if mask.any()]


# ---- data -------------------------------------------------------------------------------------


def collect_crops(
    model: CLIP,
    volumes: Sequence[tuple[Path, Path]],
    *,
    slices: int,
    smallest_share: float,
    seed: int,
) -> Crops:
    """Crops of evenly spaced slices of scans with lung masks.

    Args:
        model: CLIP, for the size of the squares.
        volumes: stored scan and lung mask of each.
        slices: how many to look at. With fewer slices at hand each is drawn from several times.
        smallest_share: smallest crop, as a share of the slice; CLIP never sees the specks that the
            area filter of equation 2 drops.
        seed: of the random disturbances.

    Raises:
        ValueError: without scans.
    """
    every = [(scan, mask, at) for scan, mask in volumes for at in range(len(open_volume(scan)))]
    if not every:
        raise ValueError("CLIP is trained on scans with lung masks; there are none")
    chosen = np.unique(np.linspace(0, len(every) - 1, min(slices, len(every))).round().astype(int))
    draws = max(1, round(slices / len(every)))
    generator = np.random.default_rng(seed)
    squares, kinds, numbers = [], [], []
    for number in chosen:
        scan, mask, at = every[number]
        voxels, lungs = open_volume(scan)[at], open_volume(mask)[at]
        found, grey = slice_regions(voxels, lungs, smallest_share=smallest_share), to_grey(voxels)
        drawn = [crop for _ in range(draws) for crop in draw_crops(voxels, found, generator)]
        drawn = [(kind, part) for kind, part in drawn if part.mean() >= smallest_share]
        squares.append(prepare_crops(model, [crop_to_mask(grey, part) for _, part in drawn]))
        kinds += [KINDS.index(kind) for kind, _ in drawn]
        numbers += [int(number)] * len(drawn)
    return Crops(torch.cat(squares), torch.tensor(kinds), torch.tensor(numbers))


def collect_parts(
    model: CLIP,
    scans: Mapping[str, Sequence[tuple[Path, Path]]],
    *,
    settings: Mapping[str, Any],
    seed: int,
) -> dict[str, Crops]:
    """`collect_crops` of every part.

    Args:
        model: CLIP, for the size of its pictures.
        scans: (scan, mask) of the parts, of `lib.data.manifest.scans_with_lungs`.
        settings: the section ``train_clip`` of params.yaml.
        seed: of the random disturbances.
    """
    return {
        split: collect_crops(
            model,
            scans[split],
            slices=settings["slices"][split],
            smallest_share=settings["smallest_share"],
            seed=seed,
        )
        for split in SPLITS
    }


def train_small_clip(
    model: CLIP,
    crops: Mapping[str, Crops],
    *,
    sentences: Sequence[str],
    settings: Mapping[str, Any],
    data: Sequence[str],
    folder: Path,
    seed: int,
) -> list[Row]:
    """Train the small CLIP; the best epoch by how well the study's sentences part lungs from rest.

    Args:
        model: with random weights; has those of the best epoch afterwards.
        crops: of `collect_parts`.
        sentences: the study's own, worded otherwise than any caption.
        settings: the section ``train_clip`` of params.yaml.
        data: hashes of what the crops were cut from.
        folder: where weights and learning curve go.
        seed: of everything random.

    Returns:
        The learning curve.
    """
    tokens = caption_tokens(settings["phrases"], settings["templates"], model.context_length)
    optimizer = build_optimizer(model, learning_rate=settings["learning_rate"])
    history = fit(
        model,
        fabric=Fabric(precision=settings["precision"]),
        optimizers=[optimizer],
        schedulers=schedules([optimizer], **settings["schedule"]),
        train_batches=captioned_batches(
            crops[TRAIN],
            tokens,
            batch_crops=settings["batch_crops"],
            steps=settings["steps_per_epoch"],
        ),
        validation_batches=[crops[VALIDATION]],
        loss=batch_loss,
        score=partial(lung_auc, sentences=sentences),
        score_name="validation_auc",
        epochs=settings["epochs"],
        folder=folder,
        seed=seed,
        fingerprint={**settings, "sentences": sentences, "data": data},
    )
    model.eval()
    return history


def caption_tokens(
    phrases: Mapping[str, Sequence[str]], templates: Sequence[str], context_length: int
) -> list[Tensor]:
    """Tokens of the captions of every kind, in the order of `KINDS`: each phrase in each template.

    Args:
        phrases: what is seen, by kind.
        templates: sentences with ``{}`` in the place of a phrase.
        context_length: of the network.

    Returns:
        One tensor per kind, int64, shape (captions, context_length).

    Raises:
        ValueError: if a kind has no phrase, or there is a kind that does not exist.
    """
    missing, unknown = set(KINDS) - set(phrases), set(phrases) - set(KINDS)
    missing |= {kind for kind, some in phrases.items() if not some}
    if missing or unknown or not templates:
        raise ValueError(
            "every kind of crop needs phrases, and these need templates; "
            f"missing {sorted(missing)}, unknown {sorted(unknown)}, {len(templates)} templates"
        )
    return [
        tokenize(
            [text.format(phrase) for text in templates for phrase in phrases[kind]], context_length
        )
        for kind in KINDS
    ]


def captioned_batches(
    crops: Crops, tokens: Sequence[Tensor], *, batch_crops: int, steps: int
) -> Iterable[Batch]:
    """A shuffling loader; for every batch captions are drawn anew.

    Args:
        crops: from `collect_crops`.
        tokens: from `caption_tokens`.
        batch_crops: crops per batch.
        steps: batches per epoch, the same work whatever the size of the training part.
    """
    every = TensorDataset(crops.squares, crops.kinds)
    return DataLoader(
        every,
        batch_size=batch_crops,
        sampler=RandomSampler(every, num_samples=steps * batch_crops),
        collate_fn=partial(_captioned, tokens),
    )


def _captioned(tokens: Sequence[Tensor], items: Sequence[tuple[Tensor, Tensor]]) -> Batch:
    """Put a batch together, half of it mirrored: no caption tells right from left."""
    squares, kinds = (torch.stack(part) for part in zip(*items, strict=True))
    mirrored = torch.rand(len(squares)) < 0.5
    squares[mirrored] = squares[mirrored].flip(-1)
    drawn = [some[torch.randint(len(some), (CAPTIONS_OF_A_KIND,))] for some in tokens]
    caption_kinds = torch.arange(len(tokens)).repeat_interleave(CAPTIONS_OF_A_KIND)
    return Batch(squares, kinds, leave_words_out(torch.cat(drawn)), caption_kinds)


def leave_words_out(tokens: Tensor, share: float = WORDS_LEFT_OUT) -> Tensor:
    """Captions without some of their words, so that no wording is learnt by heart.

    Args:
        tokens: int64, shape (captions, context length), from `caption_tokens`.
        share: of the words, drawn at random.

    Returns:
        Same shape; start and end are kept, the rest moves up.
    """
    end = tokens.argmax(dim=1, keepdim=True)  # the end has the largest number
    place = torch.arange(tokens.shape[1])
    left_out = (torch.rand(tokens.shape) < share) & (place > 0) & (place < end)
    order = left_out.int().argsort(dim=1, stable=True)
    return tokens.masked_fill(left_out, 0).gather(1, order)


# ---- learning ---------------------------------------------------------------------------------


def contrastive_loss(images: Tensor, texts: Tensor, matches: Tensor, scale: Tensor) -> Tensor:
    """CLIP's symmetric cross entropy where a crop has several captions and a caption several crops.

    The target of a row is spread evenly over its matches, as in UniCL (Yang et al. 2022, section
    3.2), so captions that say the same are never negatives of each other. Where row i matches
    column i alone this is CLIP's loss. A caption without a crop in the batch is a negative of all.

    Args:
        images: shape (crops, embedding), rows of length 1.
        texts: shape (captions, embedding), rows of length 1.
        matches: bool, shape (crops, captions), with one match or more in every row.
        scale: of the cosines, a scalar.

    Returns:
        A scalar.
    """
    logits = scale * images @ texts.T
    matched = matches.any(dim=0)
    to_captions = _spread_cross_entropy(logits, matches)
    to_crops = _spread_cross_entropy(logits.T[matched], matches.T[matched])
    return (to_captions + to_crops) / 2


def _spread_cross_entropy(logits: Tensor, matches: Tensor) -> Tensor:
    """Cross entropy with the target spread evenly over the matches of each row."""
    return nn.functional.cross_entropy(logits, matches / matches.sum(dim=1, keepdim=True))


def batch_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Loss of a batch, for `lib.training.fit`."""
    images, texts, scale = model(to_input(model, batch.squares), batch.tokens)
    matches = batch.kinds[:, None] == batch.caption_kinds
    return contrastive_loss(images, texts, matches, scale.clamp(max=LARGEST_SCALE))


def build_optimizer(model: CLIP, *, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW with a shorter memory than usual, for a training of some hundred steps."""
    return torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )


def lung_similarities(
    model: CLIP, crops: Crops, sentences: Sequence[str], *, batch_crops: int = 256
) -> np.ndarray:
    """Cosine similarity of crops with the sentences about lungs (equations 3 to 5).

    Args:
        model: CLIP.
        crops: from `collect_crops`.
        sentences: about lungs.
        batch_crops: largest number of crops at once.

    Returns:
        float32, shape (crops,).
    """
    images = [encode_crops(model, squares).cpu() for squares in crops.squares.split(batch_crops)]
    return similarity(torch.cat(images), embed_sentences(model, sentences)).numpy()


def lung_auc(model: CLIP, batches: Sequence[Crops], *, sentences: Sequence[str]) -> float:
    """ROC AUC of lungs against all that is no lung, for `lib.training.fit`.

    A fragment of a lung is neither, and left out.

    Args:
        model: CLIP.
        batches: crops.
        sentences: about lungs, those that the study asks with.
    """
    similarities = np.concatenate([lung_similarities(model, crops, sentences) for crops in batches])
    kinds = torch.cat([crops.kinds for crops in batches]).numpy()
    judged = kinds != KINDS.index(FRAGMENT)
    return float(roc_auc_score(kinds[judged] == KINDS.index(LUNG), similarities[judged]))


def best_floor(similarities: np.ndarray, are_lungs: np.ndarray) -> float:
    """The similarity that parts lungs from all else with the smallest mean of both error rates.

    Half way between the two neighbouring similarities; of the validation part only.

    Args:
        similarities: shape (crops,).
        are_lungs: bool, shape (crops,).
    """
    false_rate, true_rate, reached = roc_curve(are_lungs, similarities, drop_intermediate=False)
    best = reached[1 + np.argmax((true_rate - false_rate)[1:])]  # the first would call nothing
    below = similarities[similarities < best]
    return float((best + below.max()) / 2) if len(below) else float(best)


def similarity_table(
    model: CLIP, parts: Mapping[str, Crops], sentences: Sequence[str]
) -> pd.DataFrame:
    """Similarity of every crop to the sentences.

    Args:
        model: the trained CLIP.
        parts: crops by part of the data set.
        sentences: about lungs.

    Returns:
        One row per crop: part, slice, kind, similarity.
    """
    names = np.array(KINDS)
    tables = [
        pd.DataFrame(
            {
                "part": part,
                "slice": crops.slices.numpy(),
                "kind": names[crops.kinds.numpy()],
                "similarity": lung_similarities(model, crops, sentences),
            }
        )
        for part, crops in parts.items()
    ]
    return pd.concat(tables, ignore_index=True)


def similarity_report(table: pd.DataFrame, *, chosen_on: str) -> dict[str, Any]:
    """How well similarity tells lungs from the rest, with one floor chosen on one part.

    Args:
        table: from `similarity_table`.
        chosen_on: the part that the floor is chosen on.

    Returns:
        ``similarity_floor``, and for every part, fragments of lungs left out: ``auc``,
        ``lungs_below`` and ``others_above`` the floor, ``empty_slices_above`` (share of the slices
        without lungs that have a crop above it), ``fragments_below_lungs`` (the chance that a
        fragment is less similar than a lung), and the numbers of lungs, others and empty slices.
        What there are no cases for is None.
    """
    chosen = table[(table["part"] == chosen_on) & (table["kind"] != FRAGMENT)]
    floor = best_floor(chosen["similarity"].to_numpy(), (chosen["kind"] == LUNG).to_numpy())
    parts = {part: _part_report(rows, floor) for part, rows in table.groupby("part", sort=False)}
    return {"similarity_floor": floor, **parts}


def _part_report(rows: pd.DataFrame, floor: float) -> dict[str, Any]:
    """The figures of one part, see `similarity_report`."""
    lungs = rows.loc[rows["kind"] == LUNG, "similarity"]
    fragments = rows.loc[rows["kind"] == FRAGMENT, "similarity"]
    others = rows.loc[~rows["kind"].isin([LUNG, FRAGMENT]), "similarity"]
    empty = rows[~rows["slice"].isin(rows.loc[rows["kind"] == LUNG, "slice"])]
    best_of_empty = empty.groupby("slice")["similarity"].max()
    return {
        "auc": _chance_of_order(others, lungs),
        "lungs_below": _mean(lungs < floor),
        "others_above": _mean(others >= floor),
        "empty_slices_above": _mean(best_of_empty >= floor),
        "fragments_below_lungs": _chance_of_order(fragments, lungs),
        **{"lungs": len(lungs), "others": len(others), "empty_slices": len(best_of_empty)},
    }


def _mean(values: pd.Series) -> float | None:
    """Mean, or None of nothing."""
    return float(values.mean()) if len(values) else None


def _chance_of_order(lower: pd.Series, upper: pd.Series) -> float | None:
    """The chance that one of ``lower`` is below one of ``upper``, a ROC AUC; None without cases."""
    if lower.empty or upper.empty:
        return None
    return float(roc_auc_score(np.repeat([0, 1], [len(lower), len(upper)]), [*lower, *upper]))
