import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from lib.data.scan import LEFT_LUNG, RIGHT_LUNG, to_grey
from lib.foundation import regions

AIR, LUNG, FAT, MUSCLE, BONE = -1000, -800, -100, 50, 700
DISJOINT = ("right lung", "left lung", "gas", "bone", "fat", "soft tissue")
DISJOINT += ("background", "table and clothes")


def disc(row: int, column: int, radius: int, size: int = 128) -> np.ndarray:
    rows, columns = np.ogrid[:size, :size]
    return (rows - row) ** 2 + (columns - column) ** 2 <= radius**2


def chest() -> tuple[np.ndarray, np.ndarray]:
    """A round patient: fat, muscle, two lungs, a windpipe, a spine, and a table."""
    voxels = np.full((128, 128), AIR, np.int16)
    voxels[disc(60, 64, 50)] = FAT
    voxels[disc(60, 64, 42)] = MUSCLE
    lungs = np.zeros((128, 128), np.uint8)
    lungs[disc(60, 42, 16)], lungs[disc(60, 86, 16)] = RIGHT_LUNG, LEFT_LUNG
    voxels[lungs > 0] = LUNG
    voxels[disc(52, 64, 3)] = AIR
    voxels[disc(90, 64, 6)] = BONE
    voxels[118:121, 20:108] = MUSCLE
    return voxels, lungs


def by_name(found: list[regions.Region]) -> dict[str, np.ndarray]:
    return {region.name: region.mask for region in reversed(found)}  # the largest of a kind


def test_every_part_of_a_chest_is_found_where_it_is():
    voxels, lungs = chest()
    found = by_name(regions.slice_regions(voxels, lungs))
    assert set(found) == {*regions.LUNG_REGIONS, *regions.OTHER_REGIONS} - {"lung piece"}
    assert (found["right lung"] == (lungs == RIGHT_LUNG)).all()
    assert (found["left lung"] == (lungs == LEFT_LUNG)).all()
    assert (found["both lungs"] == (lungs > 0)).all()
    assert (found["gas"] == disc(52, 64, 3)).all()
    inside = {"body": (60, 64), "bone": (90, 64), "fat": (60, 17), "mediastinum": (60, 64)}
    inside |= {"chest wall": (105, 64), "background": (2, 2), "table and clothes": (119, 64)}
    for name, place in inside.items():
        assert found[name][place], name
    assert not found["mediastinum"][lungs > 0].any()
    assert not (found["mediastinum"] & found["chest wall"]).any()
    assert not found["body"][119, 30] and found["body"][lungs > 0].all()


def test_a_slice_without_lungs_has_no_part_that_needs_them():
    voxels, lungs = chest()
    names = {r.name for r in regions.slice_regions(voxels, np.zeros_like(lungs))}
    assert not names & {*regions.LUNG_REGIONS, "mediastinum", "chest wall"}
    assert {"body", "background", "gas", "bone"} <= names  # the lungs are gas to a slice without


def test_a_lung_that_a_slice_cuts_twice_is_one_region_and_two_pieces():
    voxels, lungs = chest()
    lungs[58:62, :64] = 0
    voxels[58:62, 20:60] = MUSCLE
    found = regions.slice_regions(voxels, lungs)
    (right,) = [r.mask for r in found if r.name == "right lung"]
    pieces = [r.mask for r in found if r.name == "lung piece"]
    assert len(pieces) == 2 and (pieces[0] | pieces[1] == right).all()
    assert all(r.is_lung == (r.name in regions.LUNG_REGIONS) for r in found)


def test_a_picture_of_8_bits_has_no_kinds_of_tissue():
    voxels, lungs = chest()
    names = {r.name for r in regions.slice_regions(to_grey(voxels), lungs)}
    assert not names & {"bone", "fat", "soft tissue"}
    assert {"right lung", "left lung", "body", "gas", "mediastinum", "chest wall"} <= names


def test_a_given_body_is_used():
    voxels, lungs = chest()
    body = disc(60, 64, 45)
    assert (by_name(regions.slice_regions(voxels, lungs, body=body))["body"] == body).all()


@settings(max_examples=40, deadline=None)
@given(
    voxels=hnp.arrays(np.int16, (12, 15), elements=st.integers(-1100, 1500)),
    lungs=hnp.arrays(np.uint8, (12, 15), elements=st.sampled_from([0, 0, 1, 2])),
)
def test_regions_of_any_slice(voxels, lungs):
    found = regions.slice_regions(voxels, lungs)
    assert found
    for region in found:
        assert region.mask.any() and region.mask.shape == voxels.shape
        assert region.name in regions.LUNG_REGIONS + regions.OTHER_REGIONS
    parts = [region.mask for region in found if region.name in DISJOINT]
    assert not parts or np.sum(parts, axis=0).max() == 1
    both = [r.mask for r in found if r.name == "both lungs"]
    assert bool(both) == (len(np.unique(lungs[lungs > 0])) == 2)
    assert all((mask == (lungs > 0)).all() for mask in both)
    body = [r.mask for r in found if r.name == "body"]
    assert all(mask[lungs > 0].all() for mask in body)
    for region in found:
        if region.name in ("gas", "bone", "background", "lung piece"):
            assert ndimage.label(region.mask)[1] == 1


@pytest.mark.parametrize(("value", "name"), [(-1000, "background"), (0, "body")])
def test_a_constant_slice_still_has_a_region(value, name):
    empty = np.zeros((32, 32), np.uint8)
    (region, *_) = regions.slice_regions(np.full((32, 32), value, np.int16), empty)
    assert region.name == name and region.mask.mean() > 0.95  # a body has round corners
    assert regions.slice_regions(np.full((32, 32), 7, np.uint8), empty)


def test_specks_are_left_out():
    voxels, lungs = chest()
    voxels[60, 64] = AIR
    few = regions.slice_regions(voxels, lungs, smallest_share=0.001)
    assert sum(r.name == "gas" for r in few) == 1
    all_of_them = regions.slice_regions(voxels, lungs, smallest_share=0)
    assert sum(r.name == "gas" for r in all_of_them) == 2


def test_wrong_input_is_one_sentence():
    voxels, lungs = chest()
    with pytest.raises(TypeError, match="int16 or uint8"):
        regions.slice_regions(voxels.astype(float), lungs)
    with pytest.raises(ValueError, match="differ in shape"):
        regions.slice_regions(voxels, lungs[1:])
    with pytest.raises(ValueError, match=r"0, 1 [(]right lung[)] and 2"):
        regions.slice_regions(voxels, 255 * lungs)
