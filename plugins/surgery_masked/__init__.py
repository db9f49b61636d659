"""Masked networks: which branch feeds which is learned, and branches that feed none are cut away."""

from surgery import Method, hookimpl
from surgery_masked.connections import Connections as Connections
from surgery_masked.figures import draw_active as draw_active
from surgery_masked.figures import draw_connections as draw_connections
from surgery_masked.figures import draw_masks as draw_masks
from surgery_masked.masks import set_grad_scaler as set_grad_scaler
from surgery_masked.method import Masked as Masked
from surgery_masked.network import connectivity as connectivity
from surgery_masked.network import freeze as freeze
from surgery_masked.network import used_branches as used_branches


@hookimpl
def surgery_register_methods() -> list[type[Method]]:
    """Provide the method `masked`."""
    return [Masked]
