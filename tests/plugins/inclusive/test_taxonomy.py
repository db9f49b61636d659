"""A taxonomy says which group of every level each class belongs to, and refuses what contradicts itself."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from surgery.errors import InvalidOption
from surgery_inclusive.taxonomy import Level, Taxonomy

GROUPS = {"family": [0, 1, 0, 2, 1], "kingdom": [0, 0, 0, 1, 0]}
ANCESTORS = {
    "beagle": ["hound", "dog", "mammal"],
    "tern": ["seabird", "bird", "bird"],
    "basset": ["hound", "dog", "mammal"],
    "siamese": ["cat", "cat", "mammal"],
    "gull": ["seabird", "bird", "bird"],
}
TABLE = """class,family,order
beagle,hound,mammal
tern,seabird,bird
basset,hound,mammal
siamese,cat,mammal
gull,seabird,bird
"""


@pytest.fixture
def write(tmp_path):
    def written(text, encoding="utf-8"):
        path = tmp_path / "birds.csv"
        path.write_bytes(text.encode(encoding))
        return path

    return written


def test_indices_by_level_are_taken_as_they_are():
    taxonomy = Taxonomy.of(GROUPS)
    assert taxonomy.levels == ("family", "kingdom")
    assert taxonomy.sizes == (3, 2)
    assert taxonomy.classes == 5
    assert [level.groups for level in taxonomy.coarse] == [(0, 1, 0, 2, 1), (0, 0, 0, 1, 0)]
    assert taxonomy.coarse[0].names == ("0", "1", "2")


def test_arrays_are_read_like_lists():
    assert Taxonomy.of({level: np.array(groups) for level, groups in GROUPS.items()}) == Taxonomy.of(GROUPS)
    assert Taxonomy.of({level: torch.tensor(groups) for level, groups in GROUPS.items()}) == Taxonomy.of(GROUPS)


def test_ancestors_are_numbered_as_they_appear():
    """Level 1: hound 0, seabird 1, cat 2; level 2: dog 0, bird 1, cat 2; level 3: mammal 0, bird 1."""
    taxonomy = Taxonomy.of(ANCESTORS)
    assert taxonomy.levels == ("level1", "level2", "level3")
    assert [level.groups for level in taxonomy.coarse] == [(0, 1, 0, 2, 1), (0, 1, 0, 2, 1), (0, 1, 0, 0, 1)]
    assert [level.names for level in taxonomy.coarse] == [
        ("hound", "seabird", "cat"),
        ("dog", "bird", "cat"),
        ("mammal", "bird"),
    ]


def test_a_taxonomy_is_returned():
    taxonomy = Taxonomy.of(GROUPS)
    assert Taxonomy.of(taxonomy) is taxonomy


@pytest.mark.parametrize("given", [GROUPS, ANCESTORS])
def test_an_option_survives_json(given):
    taxonomy = Taxonomy.of(given)
    option = json.loads(json.dumps(taxonomy.to_option()))
    assert Taxonomy.of(option) == taxonomy
    assert hash(Taxonomy.of(option)) == hash(taxonomy)


def test_options_are_short_where_groups_have_no_names():
    assert Taxonomy.of(GROUPS).to_option() == GROUPS
    named = {"animal": {"groups": [0, 0, 1], "names": ["dog", "cat"]}}
    assert Taxonomy.of(named).to_option() == named


def test_labels_are_the_groups_of_the_classes():
    """Classes 4, 0, 3 are in the families 1, 0, 2 and the kingdoms 0, 0, 1."""
    taxonomy, target = Taxonomy.of(GROUPS), torch.tensor([4, 0, 3])
    for level, expected in ((0, [4, 0, 3]), (1, [1, 0, 2]), (2, [0, 0, 1])):
        assert torch.equal(taxonomy.labels(target, level), torch.tensor(expected))
        name = ("class", *taxonomy.levels)[level]
        assert torch.equal(taxonomy.labels(target, name), torch.tensor(expected))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_labels_are_indices_for_any_integer_type(dtype):
    labels = Taxonomy.of(GROUPS).labels(torch.tensor([0, 1, 1, 3, 2], dtype=dtype), "family")
    assert torch.equal(labels, torch.tensor([0, 1, 1, 2, 0]))


def test_ignored_targets_stay_ignored():
    """-100 is what cross-entropy leaves out; as an index from the end it would be a class."""
    labels = Taxonomy.of(GROUPS).labels(torch.tensor([-100, 3, -1]), 1)
    assert torch.equal(labels, torch.tensor([-100, 2, -1]))


def test_labels_stay_on_their_device():
    labels = Taxonomy.of(GROUPS).labels(torch.zeros(7, dtype=torch.long, device="meta"), 1)
    assert labels.device.type == "meta"
    assert labels.shape == (7,)


@pytest.mark.parametrize(
    "target",
    [torch.rand(4, 5), torch.rand(4), torch.zeros(4, 5, dtype=torch.long), torch.tensor(1), torch.tensor([True])],
    ids=["mixed", "float", "one-hot", "scalar", "bool"],
)
@pytest.mark.parametrize("level", [0, 1])
def test_soft_targets_are_refused(target, level):
    with pytest.raises(InvalidOption, match="expected one class index for each image; train without soft or mixed"):
        Taxonomy.of(GROUPS).labels(target, level)


@pytest.mark.parametrize("level", [3, -1, True, "order", 1.0, None])
def test_unknown_levels_are_refused(level):
    with pytest.raises(InvalidOption, match=r"expected 0 to 2, or one of \('class', 'family', 'kingdom'\)"):
        Taxonomy.of(GROUPS).labels(torch.tensor([0]), level)


def test_another_number_of_classes_is_refused():
    Taxonomy.of(GROUPS).check(5)
    with pytest.raises(InvalidOption, match="covers 5 classes, expected 10"):
        Taxonomy.of(GROUPS).check(10)


def test_a_group_that_is_divided_names_two_of_its_classes():
    with pytest.raises(InvalidOption, match=r"classes '1' and '3' share '1' of level 'fine', and .* in '0' and '1'"):
        Taxonomy.of({"fine": [0, 1, 0, 1], "coarse": [0, 0, 0, 1]})
    with pytest.raises(InvalidOption, match=r"'beagle' and 'harrier' share 'hound' of .*'level1'.*'dog' and 'hawk'"):
        Taxonomy.of({"beagle": ["hound", "dog"], "harrier": ["hound", "hawk"]})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "found {}, expected the group of every class"),
        ([0, 1], r"found \[0, 1\], expected the group of every class"),
        ("birds.csv", "found 'birds.csv', expected the group of every class"),
        ({"a": 3}, "found 3 for 'a', expected the group of every class"),
        ({"a": "dog"}, "found 'dog' for 'a', expected the group"),
        ({"a": {"groups": [0, 1]}}, "found {'groups'.* for 'a', expected the group"),
        ({"a": {"groups": 1, "names": ["b"]}}, "for 'a', expected the group"),
        ({"a": {"groups": [0, 1], "names": "bc"}}, "for 'a', expected the group"),
        ({"a": []}, "level 'a' has groups none, expected 0 to"),
        ({"a": [0, 2]}, "level 'a' has groups 0, 2, expected 0 to the number of groups - 1, each of them used"),
        ({"a": [1, 2]}, "level 'a' has groups 1, 2, expected 0"),
        ({"a": [-1, 0]}, "level 'a' has groups -1, 0, expected 0"),
        ({"a": [0, 10**12]}, "level 'a' has groups 0, 1000000000000, expected 0"),
        ({"a": [0, 1.0]}, "level 'a', class 1: found 1.0, expected the index"),
        ({"a": [0, True]}, "level 'a', class 1: found True, expected the index"),
        ({"a": [0, "dog"]}, "level 'a', class 1: found 'dog', expected the index"),
        ({"a": [0, 1], "b": [0]}, "numbers of classes {'a': 2, 'b': 1}, expected as many"),
        ({"a": {"groups": [0, 1], "names": ["x", "x"]}}, "groups called x, x, expected 2 different names"),
        ({"a": {"groups": [0, 1], "names": ["x", "y", "x"]}}, "groups called x, y, x, expected 2 different names"),
        ({"a": {"groups": [0, 1], "names": ["x"]}}, "groups called x, expected 2 different names"),
        ({"tern": ["bird"], "dog": ["pet", "mammal"]}, "class 'dog' has 2 groups and 'tern' has 1, expected as many"),
        ({"tern": ["bird"], "dog": [""]}, "groups called bird, , expected 2 different names"),
    ],
)
def test_what_is_no_taxonomy_is_refused(given, message):
    with pytest.raises(InvalidOption, match=f"^taxonomy: .*{message}"):
        Taxonomy.of(given)


@pytest.mark.parametrize("name", ["class", "", " ", "a/b", 3])
def test_level_names_that_no_module_or_tap_could_have_are_refused(name):
    with pytest.raises(InvalidOption, match=f"found a level called {name!r}.*rename it"):
        Taxonomy.of({name: [0, 1]})


def test_levels_have_names_of_their_own():
    with pytest.raises(InvalidOption, match="found the levels a, a, expected one or more, each with a name of its own"):
        Taxonomy((Level("a", (0, 1)), Level("a", (0, 0))))
    with pytest.raises(InvalidOption, match="found the levels none, expected one or more"):
        Taxonomy(())


# --- files ---


def test_a_file_is_read_in_the_order_of_its_rows(write):
    taxonomy = Taxonomy.from_csv(write(TABLE))
    assert taxonomy.levels == ("family", "order")
    assert [level.groups for level in taxonomy.coarse] == [(0, 1, 0, 2, 1), (0, 1, 0, 0, 1)]
    assert [level.names for level in taxonomy.coarse] == [("hound", "seabird", "cat"), ("mammal", "bird")]


def test_a_file_is_read_in_the_order_of_the_classes(write):
    """gull, siamese, tern, basset, beagle: seabird 0, cat 1, hound 2; bird 0, mammal 1."""
    taxonomy = Taxonomy.from_csv(write(TABLE), classes=["gull", "siamese", "tern", "basset", "beagle"])
    assert [level.groups for level in taxonomy.coarse] == [(0, 1, 0, 2, 2), (0, 1, 0, 1, 1)]
    assert [level.names for level in taxonomy.coarse] == [("seabird", "cat", "hound"), ("bird", "mammal")]


def test_spreadsheets_marks_quotes_blank_lines_and_white_space_do_no_harm(write):
    text = "\ufeff" + TABLE.replace("\n", "\r\n").replace("tern,", '\r\n"tern", ') + "\r\n\r\n"
    assert Taxonomy.from_csv(write(text)) == Taxonomy.from_csv(write(TABLE))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "row 1 is '' with 0 rows below it, expected 'class,<level>,...', separated by commas"),
        ("class,family\n", "row 1 is 'class,family' with 0 rows below it"),
        ("class\nbeagle\n", "row 1 is 'class' with 1 rows"),
        ("name,family\nbeagle,hound\n", "row 1 is 'name,family' with 1 rows"),
        (TABLE.replace(",", ";"), "row 1 is 'class;family;order' with 5 rows below it, .*separated by commas"),
        (
            TABLE.replace("tern,seabird,bird", "tern,bird"),
            "row 3 has 2 cells, expected 3, one for each of class",
        ),
        (TABLE.replace("tern,seabird", "tern, "), "row 3, column 'family' is empty, expected a name"),
        (TABLE.replace("tern", ""), "row 3, column 'class' is empty"),
        (
            TABLE.replace("gull", "beagle"),
            "row 6, column 'class': found 'beagle', which row 2 has, expected",
        ),
        (TABLE.replace("basset,hound,mammal", "basset,hound,bird"), "'beagle' and 'basset' share 'hound' .*'family'"),
        (TABLE.replace("order", "family"), "found the levels family, family, expected"),
        (TABLE.replace("order", "class"), "found a level called 'class'"),
        (TABLE.replace("tern", '"te"rn'), "row 3 is no CSV"),
    ],
)
def test_errors_of_a_file_say_where(write, text, message):
    path = write(text)
    with pytest.raises(InvalidOption, match=message) as caught:
        Taxonomy.from_csv(path)
    assert str(caught.value).startswith(f"{path}: ")


NAMES = ["beagle", "tern", "basset", "siamese", "gull"]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (
            [*NAMES, "puffin"],
            "found 'puffin' among the 6 names that were asked for, which has no row",
        ),
        ([*NAMES, "tern"], "found 'tern' among the 6 names that were asked for, twice"),
        (NAMES[:3], "row 6, column 'class': found 'siamese', expected one of beagle, tern, basset; remove the row"),
    ],
)
def test_classes_and_rows_have_to_be_the_same(write, classes, message):
    """The file has a blank line before its row of the tern, so that rows are counted as an editor counts them."""
    path = write(TABLE.replace("tern", "\ntern"))
    with pytest.raises(InvalidOption, match=message) as caught:
        Taxonomy.from_csv(path, classes)
    assert str(caught.value).startswith(f"{path}: ")


def test_files_that_cannot_be_read_are_refused(write, tmp_path):
    with pytest.raises(InvalidOption, match=r"none\.csv: cannot be read \(No such file"):
        Taxonomy.from_csv(tmp_path / "none.csv")
    with pytest.raises(InvalidOption, match=r"cannot be read \(Is a directory\)"):
        Taxonomy.from_csv(tmp_path)
    with pytest.raises(InvalidOption, match=r"birds\.csv: found the byte 0xe9, expected text in UTF-8"):
        Taxonomy.from_csv(write(TABLE.replace("tern", "t\xe9rn"), encoding="latin-1"))
