"""Coded ResNeXt: every class flows through its own branches."""

from surgery import Method, hookimpl
from surgery_coded.analysis import Agreement as Agreement
from surgery_coded.analysis import Collected as Collected
from surgery_coded.analysis import agreement as agreement
from surgery_coded.analysis import binary_reports as binary_reports
from surgery_coded.analysis import collect as collect
from surgery_coded.analysis import energy_by_class as energy_by_class
from surgery_coded.assignment import assign as assign
from surgery_coded.assignment import taxonomy_similarity as taxonomy_similarity
from surgery_coded.binary import BinaryReport as BinaryReport
from surgery_coded.binary import choose_threshold as choose_threshold
from surgery_coded.binary import judge as judge
from surgery_coded.calibration import CalibrationTable as CalibrationTable
from surgery_coded.calibration import Calibrator as Calibrator
from surgery_coded.calibration import calibration_table as calibration_table
from surgery_coded.calibration import fit_calibrator as fit_calibrator
from surgery_coded.decoding import early_decode as early_decode
from surgery_coded.method import Coded as Coded
from surgery_coded.probes import OutputDistribution as OutputDistribution
from surgery_coded.probes import RemovalAccuracy as RemovalAccuracy
from surgery_coded.probes import output_distribution as output_distribution
from surgery_coded.probes import removal_accuracy as removal_accuracy
from surgery_coded.pruner import mask_branches as mask_branches
from surgery_coded.pruner import switch_branches as switch_branches
from surgery_coded.reliability import CalibrationError as CalibrationError
from surgery_coded.reliability import calibration_error as calibration_error
from surgery_coded.scheme import CodingScheme as CodingScheme


@hookimpl
def surgery_register_methods() -> list[type[Method]]:
    """Provide the method `coded`."""
    return [Coded]
