"""The method `inclusive`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from surgery import Architecture, ConvertedNetwork, Method, PrunePlan, Rewriter, Step
from surgery.errors import InvalidOption
from surgery.method import Preserves
from surgery_inclusive.loss import anytime_loss
from surgery_inclusive.pruner import plan_subnetwork
from surgery_inclusive.sparse import nest_sparse
from surgery_inclusive.taxonomy import Taxonomy
from surgery_inclusive.transform import nest


@dataclass(frozen=True)
class Inclusive(Method):
    """Thin networks nested in one, for a prediction at any budget.

    Attributes:
        subnetworks: K, how many there are; sub-network k uses the first k/K of the branches of every block.
        sparse: Whether features are divided, too, and the k-th part depends on the first k alone: one pass then trains
            all sub-networks, and a prediction is refined with all earlier work reused.
        norm: "independent" gives every sub-network its own batch norms; "shared" lets it use the first channels of the
            same ones, as a sparse network has to. Default: independent, unless `sparse`.
        taxonomy: Coarse labels: level -> group of every class, or what else `Taxonomy.of` takes.

    Reference: Lee & Shin, Anytime neural prediction via slicing networks vertically (2018).
    """

    name: ClassVar[str] = "inclusive"
    preserves: ClassVar[Preserves] = "output"

    subnetworks: int = 4
    sparse: bool = False
    norm: Literal["independent", "shared"] | None = None
    taxonomy: Taxonomy | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Refuse values that no network could use."""
        self.check_types(vars(self))
        if self.taxonomy is not None:
            object.__setattr__(self, "taxonomy", Taxonomy.of(self.taxonomy))
        for name, good, expected in (
            ("subnetworks", self.subnetworks > 1, "at least 2"),
            ("norm", not (self.sparse and self.norm == "independent"), "'shared' with sparse=True"),
        ):
            if not good:
                raise InvalidOption(f"inclusive: option {name!r} is {getattr(self, name)!r}, expected {expected}")

    def transform(self, architecture: Architecture, rewriter: Rewriter) -> None:
        """Nest the sub-networks."""
        taxonomy = self._levels
        if taxonomy is not None and architecture.head.classes is not None:
            taxonomy.check(architecture.head.classes)
        if self.sparse:
            nest_sparse(architecture, rewriter, self.subnetworks, taxonomy=taxonomy)
        else:
            independent = self.norm != "shared"
            nest(architecture, rewriter, self.subnetworks, independent=independent, taxonomy=taxonomy)

    def preserved(self) -> Preserves:
        """Return "output", but of a sparse network nothing: its convolutions lose weights."""
        return "nothing" if self.sparse else self.preserves

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Return the anytime loss, see `surgery_inclusive.loss`."""
        return anytime_loss(step, self._levels)

    def plan(self, model: ConvertedNetwork, subnetwork: int | None = None, **criteria: Any) -> PrunePlan:
        """Keep one sub-network alone.

        Args:
            model: An inclusive network.
            subnetwork: 1 (the thinnest) to K.
            **criteria: None.

        Raises:
            InvalidOption: If there are other criteria, or no such sub-network.
        """
        if criteria:
            raise InvalidOption(f"inclusive: prune expects subnetwork=, found {', '.join(criteria)}")
        return plan_subnetwork(model, subnetwork)

    def options(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        taxonomy = self._levels
        return {**super().options(), "taxonomy": None if taxonomy is None else taxonomy.to_option()}

    @property
    def _levels(self) -> Taxonomy | None:
        assert self.taxonomy is None or isinstance(self.taxonomy, Taxonomy)
        return self.taxonomy
