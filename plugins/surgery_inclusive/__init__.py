"""Inclusive networks: thin networks nested in one, for a prediction at any budget."""

from surgery import Method, hookimpl
from surgery_inclusive.anytime import Prediction as Prediction
from surgery_inclusive.anytime import anytime as anytime
from surgery_inclusive.anytime import predict_within as predict_within
from surgery_inclusive.anytime import subnetwork_macs as subnetwork_macs
from surgery_inclusive.contributions import branch_norms as branch_norms
from surgery_inclusive.figures import draw_branch_norms as draw_branch_norms
from surgery_inclusive.figures import draw_errors as draw_errors
from surgery_inclusive.figures import draw_levels as draw_levels
from surgery_inclusive.levels import Choice as Choice
from surgery_inclusive.levels import choose_levels as choose_levels
from surgery_inclusive.levels import worst as worst
from surgery_inclusive.method import Inclusive as Inclusive
from surgery_inclusive.selection import use as use
from surgery_inclusive.series import Series as Series
from surgery_inclusive.taxonomy import Taxonomy as Taxonomy
from surgery_inclusive.training import passes as passes


@hookimpl
def surgery_register_methods() -> list[type[Method]]:
    """Provide the method `inclusive`."""
    return [Inclusive]
