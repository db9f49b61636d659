"""Divided networks: one wide network becomes several co-trained small ones."""

from surgery import Method, hookimpl
from surgery_divided.concurrent import Concurrent as Concurrent
from surgery_divided.concurrent import concurrent as concurrent
from surgery_divided.distillation import Distillation as Distillation
from surgery_divided.distillation import distil as distil
from surgery_divided.ensemble import Ensemble as Ensemble
from surgery_divided.ensemble import SplitViews as SplitViews
from surgery_divided.ensemble import combine as combine
from surgery_divided.ensemble import ensemble_of as ensemble_of
from surgery_divided.ensemble import members as members
from surgery_divided.fused import Fused as Fused
from surgery_divided.fused import fuse as fuse
from surgery_divided.method import Divided as Divided
from surgery_divided.processes import distribute as distribute
from surgery_divided.processes import gather as gather
from surgery_divided.rules import RULES as RULES
from surgery_divided.rules import Rule as Rule
from surgery_divided.scores import Accuracies as Accuracies
from surgery_divided.scores import accuracies as accuracies
from surgery_divided.scores import best_member as best_member
from surgery_divided.views import SeveralViews as SeveralViews
from surgery_divided.views import Views as Views
from surgery_divided.views import several_views as several_views


@hookimpl
def surgery_register_methods() -> list[type[Method]]:
    """Provide the method `divided`."""
    return [Divided]
