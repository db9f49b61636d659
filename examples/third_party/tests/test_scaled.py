from collections.abc import Mapping
from typing import Any

import pytest
from surgery_scaled import Scale

from surgery import ConvertedNetwork
from surgery.testing import check_method, tiny_networks


def silenced(model: ConvertedNetwork, criteria: Mapping[str, Any]) -> ConvertedNetwork:
    """What a network without these bodies computes: a factor of zero leaves the shortcut alone."""
    for scale in model.modules():
        if isinstance(scale, Scale) and scale.factor.abs() < criteria["below"]:
            scale.factor.data.zero_()
    return model


@pytest.mark.parametrize("network", tiny_networks())
def test_scaled_keeps_the_laws(network: str) -> None:
    check_method("scaled", {network: tiny_networks()[network]}, criteria={"below": 2.0}, muted=silenced)
