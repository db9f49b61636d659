"""Laws of pruning and of leaving the library: what a plan promises is what the smaller network is."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

import surgery
from surgery.cost import cost
from surgery.errors import PruneError
from surgery.pruning import PrunePlan
from surgery.testing.case import Case, NotApplicable, evaluate, fail, require, require_close, require_equal
from surgery.testing.conversion_laws import saved_and_loaded


def empty_plan(case: Case) -> None:
    """A plan without cuts gives an identical network and leaves the model alone."""
    model = case.settled()
    nothing = PrunePlan.of(model, case.method.name, [], {})
    require(nothing.before == nothing.after, f"a plan without cuts expects {nothing.after} instead of {nothing.before}")
    pruned = surgery.prune(model, nothing)
    require(pruned is not model, "prune returned the model itself, expected a copy")
    require_equal(evaluate(pruned, case.images()), evaluate(model, case.images()), "output after a plan without cuts")


def pruned_smaller(case: Case) -> None:
    """A plan survives JSON, its figures are those of the pruned network, and these are smaller."""
    model = case.settled()
    before = evaluate(model, case.images())
    decided = case.plan(model)
    twin = PrunePlan.from_dict(decided.to_dict())
    require(str(twin) == str(decided), "the plan read back from JSON values differs")
    pruned = surgery.prune(model, twin)
    require_equal(evaluate(model, case.images()), before, "output of the full network after pruning a copy")
    params = sum(parameter.numel() for parameter in pruned.parameters())
    require(
        params == decided.after.params,
        f"the plan expects {decided.after.params} parameters, the pruned network has {params}",
    )
    macs = cost(pruned).macs
    require(
        macs == decided.after.macs,
        f"the plan expects {decided.after.macs} multiply-adds, the pruned network needs {macs}",
    )
    require(
        params < decided.before.params, f"pruning left all {params} parameters; choose criteria= that remove something"
    )
    require(
        macs < decided.before.macs, f"pruning left all {macs} multiply-adds; choose criteria= that remove something"
    )
    require(bool(evaluate(pruned, case.images()).isfinite().all()), "the output of the pruned network is not finite")


def pruned_equals_muted(case: Case) -> None:
    """The pruned network computes what the full one computes with the same parts switched off, in float64."""
    if case.muted is None:
        raise NotApplicable("pass muted= to compare the pruned network with the full one whose parts are switched off")
    model = case.settled().double().eval()
    images = case.images(dtype=torch.float64)
    pruned = surgery.prune(model, case.plan(model))
    expected = evaluate(case.muted(model, case.criteria or {}), images)
    require_close(evaluate(pruned, images), expected, "output of the pruned network", rtol=1e-10)


def pruned_saves_and_loads(case: Case) -> None:
    """The pruned network survives the way through a file, and is not pruned again."""
    model = case.settled()
    pruned = surgery.prune(model, case.plan(model))
    twin = saved_and_loaded(case, pruned)
    require_equal(evaluate(twin, case.images()), evaluate(pruned, case.images()), "output of the loaded pruned network")
    try:
        surgery.prune(twin, **(case.criteria or {}))
    except PruneError:
        return
    fail("a pruned network was pruned again, expected PruneError")


def exports(case: Case) -> None:
    """`torch.export` captures the network in eval mode, full and pruned, and the program computes the same."""
    for name, (model, program) in case.exported.items():
        require_close(
            evaluate(program.module().forward, case.images()),
            evaluate(model, case.images()),
            f"exported {name} network",
            rtol=1e-5,
        )


def exports_to_onnx(case: Case) -> None:
    """The network, full and pruned, is written as a valid ONNX file that computes the same to 1e-4 of its scale.

    Needs the extra `export`, and onnxruntime.
    """
    import onnx  # optional dependencies
    import onnxruntime

    images = case.images()
    for name, (model, program) in case.exported.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            torch.onnx.export(program, (), path, dynamo=True, verbose=False)
            onnx.checker.check_model(path)
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            outputs = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        require(len(outputs) == 1, f"the ONNX file of the {name} network has {len(outputs)} outputs, expected one")
        found = torch.from_numpy(outputs[0])
        require_close(found, evaluate(model, images), f"ONNX file of the {name} network", rtol=1e-4)
