"""Model surgery on torchvision and timm networks: convert, train, prune, save."""

import surgery.models as models
from surgery.analysis import inspect as inspect
from surgery.architecture import Architecture as Architecture
from surgery.architecture import Block as Block
from surgery.architecture import Branch as Branch
from surgery.architecture import Stage as Stage
from surgery.calibration import recalibrate_bn as recalibrate_bn
from surgery.checkpoint import load as load
from surgery.checkpoint import revert as revert
from surgery.checkpoint import save as save
from surgery.conversion import convert as convert
from surgery.cost import Cost as Cost
from surgery.cost import cost as cost
from surgery.errors import NothingConverted as NothingConverted
from surgery.errors import Refusal as Refusal
from surgery.errors import SurgeryError as SurgeryError
from surgery.history import Conversion as Conversion
from surgery.history import Site as Site
from surgery.method import Method as Method
from surgery.method import ParameterRule as ParameterRule
from surgery.method import Step as Step
from surgery.network import ConvertedNetwork as ConvertedNetwork
from surgery.objective import Objective as Objective
from surgery.objective import param_groups as param_groups
from surgery.plugins import hookimpl as hookimpl
from surgery.plugins import methods as methods
from surgery.pruning import Cut as Cut
from surgery.pruning import PrunePlan as PrunePlan
from surgery.pruning import plan as plan
from surgery.pruning import prune as prune
from surgery.rewriter import Rewriter as Rewriter
from surgery.taps import Tap as Tap
from surgery.taps import Taps as Taps
from surgery.taps import record as record

__all__ = [
    "Architecture",
    "Block",
    "Branch",
    "Conversion",
    "ConvertedNetwork",
    "Cost",
    "Cut",
    "Method",
    "NothingConverted",
    "Objective",
    "ParameterRule",
    "PrunePlan",
    "Refusal",
    "Rewriter",
    "Site",
    "Stage",
    "Step",
    "SurgeryError",
    "Tap",
    "Taps",
    "convert",
    "cost",
    "hookimpl",
    "inspect",
    "load",
    "methods",
    "models",
    "param_groups",
    "plan",
    "prune",
    "recalibrate_bn",
    "record",
    "revert",
    "save",
]
