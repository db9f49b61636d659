"""What the example measures inside a coded network, as numbers, lines of text and figures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import surgery
import surgery_coded
from batches import labelled_batches
from splits import Split
from surgery_coded import figures

BATCH, CALIBRATION_SPLITS = 256, 10


@dataclass(frozen=True, eq=False)
class Inside:
    """Findings on the test part; no calibration where a class has a single image."""

    seen: surgery_coded.Collected
    removal: surgery_coded.RemovalAccuracy
    agreement: surgery_coded.Agreement
    calibration: surgery_coded.CalibrationTable | None

    def metrics(self) -> dict[str, Any]:
        """Return the numbers in a form that JSON can hold."""
        found = self.agreement
        groups = zip(found.count.tolist(), found.share.tolist(), found.accuracy.tolist(), strict=True)
        calibration = None
        if self.calibration is not None:
            calibration = {name: {"ece": ece, "mce": mce} for name, (ece, mce) in self.calibration.means.items()}
        return {
            "early_decoders": self.seen.decoder_accuracy,
            "removal": asdict(self.removal),
            "agreement": [
                {"decoders": n, "images": count, "share": share, "accuracy": None if math.isnan(hit) else hit}
                for n, (count, share, hit) in enumerate(groups)
            ],
            "calibration": calibration,
        }

    def lines(self) -> Iterator[str]:
        """Yield what a reader should know, a line each."""
        yield "early decoders: " + ", ".join(f"{b} {100 * a:.1f} %" for b, a in self.seen.decoder_accuracy.items())
        active, inactive = self.removal.active, self.removal.inactive
        yield (
            f"{self.removal.block} without {max(active)} active branches {100 * active[max(active)]:.1f} %, "
            f"without {max(inactive)} inactive ones {100 * inactive[max(inactive)]:.1f} %"
        )
        share, accuracy = float(self.agreement.share[-1]), float(self.agreement.accuracy[-1])
        yield f"all decoders agree on {100 * share:.1f} % of the images" + (
            "" if math.isnan(accuracy) else f", {100 * accuracy:.1f} % of them are right"
        )
        if self.calibration is not None:
            errors = (f"{name} {100 * e:.2f} % ({100 * m:.1f} %)" for name, (e, m) in self.calibration.means.items())
            yield "calibration error, expected (maximum): " + ", ".join(errors)

    def draw(self, folder: Path) -> None:
        """Write the figures."""
        axes = {
            "early_decoders": figures.draw_decoders(self.seen),
            "removal": figures.draw_removal(self.removal),
            "agreement": figures.draw_agreement(self.agreement),
        }
        if self.calibration is not None:
            axes["calibration"] = figures.draw_calibration(self.calibration)
        for name, drawn in axes.items():
            drawn.figure.savefig(folder / f"{name}.png")


def look_inside(coded: surgery.ConvertedNetwork, test: Split) -> Inside:
    """Measure what the paper's Fig. 2a and Tables 3 and 6 show."""
    seen = surgery_coded.collect(coded, labelled_batches(test, BATCH))
    blocks = [block for block in coded.meta["architecture"].blocks if block.path in seen.energies]
    stages = list(dict.fromkeys(block.stage for block in blocks))
    chosen = [block.path for block in blocks if block.stage == stages[-2:][0]][-1]
    evidence = seen.logits, seen.targets, seen.decoded
    alone = bool((torch.bincount(seen.targets) == 1).any())
    return Inside(
        seen,
        surgery_coded.removal_accuracy(coded, labelled_batches(test, BATCH), chosen),
        surgery_coded.agreement(seen.decoded, seen.logits, seen.targets),
        None if alone else surgery_coded.calibration_table(*evidence, splits=CALIBRATION_SPLITS),
    )
