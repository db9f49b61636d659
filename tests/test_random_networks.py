"""Random residual networks hold all laws under every method with its defaults, or are refused with a reason."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

import surgery
from surgery.errors import InvalidOption, NothingConverted
from surgery.testing import LAWS, OPTIONAL, ResidualSpec, residual_networks
from tests.methods import NAMES, keeps_laws, takes

SIZE = 16
NETWORKS = 12  # of each method

REFUSED = {
    "coded": [
        (ResidualSpec((1,), groups=4), "stages.0: 4 branches have too few codewords for 10 classes"),
        (
            ResidualSpec((1, 1), groups=1, width=1, stride=1),
            "stage1: its blocks of 1/2 channels have no common divisor",
        ),
    ],
    "inclusive": [
        (ResidualSpec((1,), groups=2), "'subnetworks' is 4, but the blocks have 2 branches; expected one of 2"),
        (ResidualSpec((1,), groups=1, width=1), "1 branches; expected blocks with a common divisor"),
    ],
    "divided": [
        (ResidualSpec((1,), groups=1, width=1), "no width that can change is wide enough to be divided by 2"),
        (ResidualSpec((1,), "basic", 1, 1, projection="pad"), "no width that can change is wide enough"),
    ],
    "masked": [
        (ResidualSpec((1,)), "stages.0.0: no block that can be masked comes right before or after it"),
        (ResidualSpec((2,), attention="inside"), "stages.0.0.inside mixes the branches before they are joined"),
        (ResidualSpec((2,), attention="behind"), "are read by stages.0.0.behind, as squeeze-excite does"),
        (
            ResidualSpec((1, 1), projection="pad"),
            "stages.1.0.shortcut (PadShortcut) cannot be applied to several streams",
        ),
        (ResidualSpec((2,), groups=1, width=1), "the blocks have 1 branches, expected a common divisor above 1"),
    ],
}


@pytest.mark.parametrize("method", NAMES)
def test_random_networks_keep_all_laws(method):
    """Each fails by itself with its spec; what the method cannot take is not drawn, so that as many are checked."""

    @settings(max_examples=NETWORKS, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
    @given(residual_networks().filter(lambda spec: takes(method, spec)))
    def check(spec):
        report = keeps_laws(method, {str(spec): spec.build}, size=SIZE)
        assert report.held == {str(spec): tuple(law for law in LAWS if law not in OPTIONAL)}

    check()


@pytest.mark.parametrize(("method", "spec", "reason"), [(m, *row) for m, rows in REFUSED.items() for row in rows])
def test_what_a_method_cannot_take_it_refuses_with_a_reason(method, spec, reason):
    assert not takes(method, spec)
    with pytest.raises((NothingConverted, InvalidOption)) as caught:
        surgery.convert(spec.build(), method, input_size=SIZE)
    refusals = getattr(caught.value, "refusals", (caught.value,))
    assert any(reason in str(refusal) for refusal in refusals), refusals
    assert all("expected" in str(refusal) or refusal.cure for refusal in refusals)


def test_padded_shortcuts_hold_widths_that_only_the_rule_for_wide_networks_needs():
    spec = ResidualSpec((1, 1), "basic", groups=4, width=1, projection="pad")
    report = keeps_laws("divided", {"padded": spec.build}, laws=["modes", "pruned_equals_muted"], size=SIZE)
    assert report.held == {"padded": ("modes", "pruned_equals_muted")}
    reason = (
        "rule 'wide' does not fit ResidualNetwork: found stages.0.0.convs.1, whose number of channels something else"
    )
    with pytest.raises(InvalidOption, match=reason):
        surgery.convert(spec.build(), "divided", rule="wide", input_size=SIZE)
