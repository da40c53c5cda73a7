import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.data.selection import Selection, read_selections, write_selections

SMALL = Selection("scan_1", "covid", 3, 12, (10, 20, 300, 400))

words = st.text(st.characters(exclude_categories=["Z", "C"]), min_size=1, max_size=12)
numbers = st.integers(0, 10_000)
lengths = st.integers(1, 10_000)


@st.composite
def selections(draw):
    first, xmin, ymin = (draw(numbers) for _ in range(3))
    box = (xmin, ymin, xmin + draw(lengths), ymin + draw(lengths))
    return Selection(draw(words), draw(words), first, first + draw(numbers), box)


@given(st.lists(selections(), unique_by=lambda one: one.scan_id))
def test_what_was_written_is_read_back_in_its_order(tmp_path_factory, chosen):
    path = tmp_path_factory.mktemp("lists") / "new folder" / "train.txt"
    write_selections(chosen, path)
    read = read_selections(path)
    assert list(read.values()) == chosen
    assert list(read) == [one.scan_id for one in chosen]
    assert [file.name for file in path.parent.iterdir()] == ["train.txt"]


def test_a_line_is_the_published_one(tmp_path):
    path = tmp_path / "train.txt"
    write_selections([SMALL, Selection("b", "non-covid", 0, 0, (0, 0, 1, 1))], path)
    assert path.read_bytes() == b"scan_1 covid 3 12 10 20 300 400\nb non-covid 0 0 0 0 1 1\n"


def test_a_published_list_with_folders_and_empty_lines_is_read(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("train/covid/ct_scan_0 covid 3 12  10 20 300 400\r\n\n")
    (one,) = read_selections(path).values()
    assert one == Selection("train/covid/ct_scan_0", "covid", 3, 12, (10, 20, 300, 400))


def test_the_length_counts_both_ends():
    assert len(SMALL) == 10
    assert len(Selection("a", "covid", 4, 4, (0, 0, 1, 1))) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a covid 1 2 0 0 9", "a line holds 8 words (dir label first last xmin ymin xmax ymax), "
                              "this one 7"),
        ("my scan covid 1 2 0 0 9 9", "a line holds 8 words (dir label first last xmin ymin xmax "
                                      "ymax), this one 9"),
        ("a covid 1 two 0 0 9 9", "first last xmin ymin xmax ymax are whole numbers, got 1 two 0 "
                                  "0 9 9"),
        ("a covid -1 2 0 0 9 9", "first last xmin ymin xmax ymax are whole numbers, got -1 2 0 0 "
                                 "9 9"),
        ("a covid 3 2 0 0 9 9", "slices 3 to 2 are no range"),
        ("a covid 1 2 9 0 9 9", "x 9 to 9 and y 0 to 9 are no box"),
        ("a covid 1 2 0 9 9 8", "x 0 to 9 and y 9 to 8 are no box"),
        ("good covid 0 8 0 0 9 9", "scan good is listed twice"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named_in_one_sentence(tmp_path, line, message):
    path = tmp_path / "train.txt"
    path.write_text(f"good covid 0 8 0 0 9 9\n{line}\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2: {message}") + "$"):
        read_selections(path)


@pytest.mark.parametrize("name", ["my scan", "", " a", "a\n"])
def test_names_that_no_line_can_hold_are_refused(name):
    message = re.escape(f"a list of selections holds names of one word, got {name!r}")
    with pytest.raises(ValueError, match=message):
        Selection(name, "covid", 0, 1, (0, 0, 1, 1))
    with pytest.raises(ValueError, match=message):
        Selection("a", name, 0, 1, (0, 0, 1, 1))


def test_a_negative_start_is_refused():
    with pytest.raises(ValueError, match="slices -1 to 2 are no range"):
        Selection("a", "covid", -1, 2, (0, 0, 1, 1))


def test_a_scan_twice_is_refused_and_the_old_list_stays(tmp_path):
    path = tmp_path / "train.txt"
    write_selections([SMALL], path)
    with pytest.raises(ValueError, match=re.escape(f"{path}: scan scan_1 is to be listed twice")):
        write_selections([SMALL, SMALL], path)
    assert read_selections(path) == {"scan_1": SMALL}


def test_a_missing_list_says_which_stage_makes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.txt is not there: run the stage select_sl"):
        read_selections(tmp_path / "none.txt")


def test_several_lists_are_read_as_one(tmp_path):
    paths = [tmp_path / name for name in ("train.txt", "test.txt")]
    other = Selection("scan_2", "covid", 0, 3, (0, 0, 1, 1))
    for path, one in zip(paths, (SMALL, other), strict=True):
        write_selections([one], path)
    assert read_selections(*paths) == {"scan_1": SMALL, "scan_2": other}
    with pytest.raises(
        ValueError, match=re.escape(f"{paths[0]}, line 1: scan scan_1 is listed tw")
    ):
        read_selections(paths[0], paths[0])
