"""A sub-network predicts the finest level that it is right often enough on, and no coarser one than thinner ones."""

from __future__ import annotations

import pytest
import torch

from surgery.errors import InvalidOption
from surgery_inclusive.levels import Choice, choose_levels, worst


def table(*rows, dtype=torch.float64):
    return torch.tensor(rows, dtype=dtype)


def chosen(choices):
    return [(choice.level, choice.reached) for choice in choices]


# Better with k, and better with d.
REGULAR = table((0.3, 0.4, 0.7), (0.4, 0.6, 0.8), (0.5, 0.7, 0.9), (0.6, 0.8, 0.9))


def test_the_finest_level_that_reaches_what_is_wanted():
    """0.6 is reached by the thinnest on level 2 alone, by 2 and 3 from level 1 on, and by the full one on level 0."""
    assert choose_levels(REGULAR, 0.6) == (
        Choice(1, 2, 0.7, True),
        Choice(2, 1, 0.6, True),
        Choice(3, 1, 0.7, True),
        Choice(4, 0, 0.6, True),
    )


def test_wanted_is_by_default_what_the_full_one_reaches_on_the_finest_level():
    assert choose_levels(REGULAR) == choose_levels(REGULAR, 0.6)


def test_below_all_accuracies_the_finest_level_is_chosen():
    assert chosen(choose_levels(REGULAR, 0.3)) == [(0, True)] * 4


def test_where_no_level_reaches_it_the_best_one_is_chosen_and_marked():
    """Nothing of sub-networks 1 and 2 reaches 0.85; their best is level 2."""
    choices = choose_levels(REGULAR, 0.85)
    assert choices[:2] == (Choice(1, 2, 0.7, False), Choice(2, 2, 0.8, False))
    assert chosen(choices[2:]) == [(2, True), (2, True)]


def test_of_equally_good_levels_the_finest_is_chosen():
    assert choose_levels(table((0.2, 0.5, 0.5)), 0.9) == (Choice(1, 1, 0.5, False),)


def test_a_thinner_one_gives_up_detail_where_a_larger_one_needs_a_coarser_level():
    """By itself sub-network 1 would take level 0 (0.62), and 2 level 1: finer with less. So 1 takes level 1, too."""
    assert choose_levels(table((0.62, 0.7), (0.59, 0.8)), 0.6) == (Choice(1, 1, 0.7, True), Choice(2, 1, 0.8, True))


def test_a_coarser_level_that_misses_is_marked_even_if_a_finer_one_would_reach_it():
    """Sub-network 2 needs level 1; of the levels left for 1, 1 and 2, none reaches 0.6 and 2 is better."""
    choices = choose_levels(table((0.62, 0.5, 0.55), (0.4, 0.8, 0.9)), 0.6)
    assert choices == (Choice(1, 2, 0.55, False), Choice(2, 1, 0.8, True))


def test_levels_never_get_coarser_with_more_branches():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        accuracy = torch.rand(6, 4, dtype=torch.float64, generator=generator)
        choices = choose_levels(accuracy, 0.5)
        levels = [choice.level for choice in choices]
        assert levels == sorted(levels, reverse=True)
        for index, choice in enumerate(choices):
            floor = levels[index + 1] if index + 1 < len(levels) else 0
            rest = accuracy[index, floor:]
            assert choice.subnetwork == index + 1
            assert choice.accuracy == accuracy[index, choice.level]
            assert choice.reached == (choice.accuracy >= 0.5) == bool((rest >= 0.5).any())
            assert not (accuracy[index, floor : choice.level] >= 0.5).any()
            assert choice.reached or choice.accuracy == rest.max()


def test_regular_accuracies_leave_every_sub_network_its_own_choice():
    """Where accuracies rise with k and with d, as they should, no choice depends on another."""
    generator = torch.Generator().manual_seed(0)
    for wanted in (0.2, 0.5, 0.8):
        accuracy = torch.rand(6, 4, dtype=torch.float64, generator=generator).cummax(0).values.cummax(1).values
        expected = [Choice(k, *chosen_alone(row, wanted)) for k, row in enumerate(accuracy.tolist(), start=1)]
        assert list(choose_levels(accuracy, wanted)) == expected


def chosen_alone(row, wanted):
    reaching = [level for level, value in enumerate(row) if value >= wanted]
    level = min(reaching) if reaching else row.index(max(row))
    return level, row[level], bool(reaching)


def test_what_is_wanted_is_read_in_the_precision_of_the_table():
    """0.7 in float32 is 0.699999988, less than 0.7 in float64."""
    assert float(torch.tensor(0.7)) < 0.7
    assert chosen(choose_levels(table((0.7, 0.9), dtype=torch.float32), 0.7)) == [(0, True)]


def test_the_worst_is_the_lowest_accuracy_of_the_choices():
    """On the finest level the lowest is 0.3, with the levels chosen it is 0.6."""
    assert worst(choose_levels(REGULAR, 0.0)) == Choice(1, 0, 0.3, True)
    assert worst(choose_levels(REGULAR)) == Choice(2, 1, 0.6, True)


def test_the_worst_of_none_is_refused():
    with pytest.raises(InvalidOption, match="worst: found no choice, expected one or more"):
        worst(())


@pytest.mark.parametrize(
    "accuracy",
    [torch.rand(4), torch.rand(2, 3, 4), torch.empty(0, 3), torch.empty(3, 0), torch.ones(2, 2, dtype=torch.long)],
)
def test_what_is_no_table_is_refused(accuracy):
    with pytest.raises(InvalidOption, match=r"choose_levels: found accuracies \(.*expected \(sub-networks, levels\)"):
        choose_levels(accuracy)


@pytest.mark.parametrize("value", [60.0, -0.1, float("nan")])
def test_what_is_no_share_is_refused(value):
    with pytest.raises(InvalidOption, match="expected shares from 0 to 1; divide percentages by 100"):
        choose_levels(table((0.5, value)))
    with pytest.raises(InvalidOption, match=f"found wanted={value}, expected a share from 0 to 1"):
        choose_levels(table((0.5, 0.6)), value)
