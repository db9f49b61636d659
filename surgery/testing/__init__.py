"""Test your own method: `check_method("mine")` holds it to the laws that every method keeps.

Example:
    >>> import surgery.testing
    >>> def test_my_method_keeps_the_laws():
    ...     surgery.testing.check_method("mine", criteria={"keep": 0.5})
"""

from surgery.testing.case import Case as Case
from surgery.testing.conformance import LAWS as LAWS
from surgery.testing.conformance import OPTIONAL as OPTIONAL
from surgery.testing.conformance import Report as Report
from surgery.testing.conformance import check_method as check_method
from surgery.testing.networks import plain_chain as plain_chain
from surgery.testing.networks import tiny_networks as tiny_networks
from surgery.testing.networks import unsettle as unsettle
from surgery.testing.residual import ResidualSpec as ResidualSpec
from surgery.testing.residual import residual_networks as residual_networks
from surgery.testing.rewrites import assert_rewrites as assert_rewrites
