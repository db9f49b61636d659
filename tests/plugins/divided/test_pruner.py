"""Keeping some of the small networks: equal to them alone, printed, saved; criteria that cannot be met."""

from __future__ import annotations

import pytest
import torch

import surgery
from surgery.errors import InvalidOption
from surgery.testing import LAWS, OPTIONAL, check_method, tiny_networks, unsettle
from surgery_divided import Divided, combine, members

IMAGES = torch.rand(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
QUICK = ["modes", "gradients", "pruned_smaller", "pruned_equals_muted", "saves_and_loads", "replays"]


def network(networks=3, **options):
    torch.manual_seed(0)
    source = tiny_networks()["timm resnext"]().double()
    return unsettle(surgery.convert(source, "divided", input_size=32, networks=networks, **options)).eval()


@pytest.mark.parametrize("manner", ["mean_logits", "max_probabilities"])
@pytest.mark.parametrize("keep", [[0], [2, 0], [1, 2], [0, 1, 2]])
def test_a_subset_says_what_its_networks_say(keep, manner):
    model = network(ensemble=manner)
    each = [members(model)[i](IMAGES) for i in sorted(keep)]
    assert torch.equal(surgery.prune(model, members=keep)(IMAGES), combine(each, manner))
    assert len(members(model)) == 3


def test_one_network_is_kept_by_its_index():
    model = network()
    pruned = surgery.prune(model, members=1)
    torch.testing.assert_close(pruned(IMAGES), members(model)[1](IMAGES), rtol=1e-12, atol=0)
    assert surgery.plan(model, members=1).kept_params == pytest.approx(1 / 3)


def test_the_plan_names_what_stays():
    assert "members: 2 of 3 members kept" in str(surgery.plan(network(), members=[0, 2]))


def test_a_subset_saves_and_loads(tmp_path):
    model = network()
    pruned = surgery.prune(model, members=[2, 1])
    surgery.save(pruned, tmp_path / "two.safetensors", factory=lambda: tiny_networks()["timm resnext"]().double())
    loaded = surgery.load(tmp_path / "two.safetensors", factory=lambda: tiny_networks()["timm resnext"]().double())
    assert torch.equal(loaded.eval()(IMAGES), pruned(IMAGES))


@pytest.mark.parametrize("wanted", [None, [], [3], [-1], 3, [0, 0], [True], "0", [0.0], 1.0])
def test_networks_that_do_not_exist_are_refused(wanted):
    with pytest.raises(InvalidOption, match="expected the index of one of 3 networks, or a list of different ones"):
        surgery.plan(network(), members=wanted)


def test_other_criteria_are_refused():
    with pytest.raises(InvalidOption, match="prune expects members=, found classes"):
        surgery.plan(network(), classes=[1])


@pytest.mark.parametrize(
    "options",
    [
        {"networks": 1},
        {"cotraining": -1.0},
        {"cotraining": float("nan")},
        {"warmup": -1.0},
        {"networks": 2.0},
        {"init": "random"},
        {"ensemble": "vote"},
        {"rule": "resnext"},
        {"weight_decay": "half"},
    ],
)
def test_options_that_no_network_could_use_are_refused(options):
    [name] = options
    with pytest.raises(InvalidOption, match=f"divided: option '{name}' is "):
        Divided(**options)


# --- conformance ---


def kept_alone(model, criteria):
    return lambda images: combine([members(model)[i](images) for i in criteria["members"]], "mean_logits")


@pytest.mark.parametrize(("name", "options"), [("timm wide resnet", {}), ("resnext", {"init": "sliced"})])
def test_divided_keeps_every_law(name, options):
    method, criteria = Divided(networks=3, **options), {"members": [0, 2]}
    report = check_method(method, {name: tiny_networks()[name]}, criteria=criteria, muted=kept_alone)
    passed_over = set(report.passed_over[name])
    assert report.held == {name: tuple(law for law in LAWS if law not in OPTIONAL and law not in passed_over)}
    assert passed_over <= {"source_weights_load"}


@pytest.mark.parametrize("number", range(0, len(tiny_networks()), 2))
def test_divided_keeps_the_laws_that_are_quick_to_check(number):
    name = list(tiny_networks())[number]
    method = Divided(init=("fresh", "sliced")[number // 2 % 2])
    report = check_method(
        method, {name: tiny_networks()[name]}, criteria={"members": [1]}, muted=kept_alone, laws=QUICK
    )
    assert report.held == {name: tuple(QUICK)}
