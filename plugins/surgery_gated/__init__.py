"""Gated networks: layers and channels that open per image, or for good."""

from surgery import Method, hookimpl
from surgery_gated.figures import draw_layer_rates as draw_layer_rates
from surgery_gated.figures import draw_polarization as draw_polarization
from surgery_gated.figures import draw_rates as draw_rates
from surgery_gated.gates import AlwaysOn as AlwaysOn
from surgery_gated.gates import Gates as Gates
from surgery_gated.gates import Mode as Mode
from surgery_gated.gates import Stochastic as Stochastic
from surgery_gated.gates import Threshold as Threshold
from surgery_gated.inference import Accuracy as Accuracy
from surgery_gated.inference import Prediction as Prediction
from surgery_gated.inference import evaluate as evaluate
from surgery_gated.inference import inference as inference
from surgery_gated.inference import predict as predict
from surgery_gated.inference import recalibrate as recalibrate
from surgery_gated.inference import set_inference as set_inference
from surgery_gated.macs import block_macs as block_macs
from surgery_gated.macs import network_macs as network_macs
from surgery_gated.method import Gated as Gated
from surgery_gated.transform import gated_blocks as gated_blocks
from surgery_gated.usage import Polarization as Polarization
from surgery_gated.usage import Usage as Usage
from surgery_gated.usage import measure as measure


@hookimpl
def surgery_register_methods() -> list[type[Method]]:
    """Provide the method `gated`."""
    return [Gated]
