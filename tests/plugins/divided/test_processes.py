"""One member a process: two gloo processes train as one process does, and exchange predictions only."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn

import surgery
from surgery.errors import SurgeryError, UnsupportedModel
from surgery.testing import tiny_networks
from surgery_divided.concurrent import concurrent
from surgery_divided.ensemble import ensemble_of, members
from surgery_divided.fused import fuse
from surgery_divided.processes import distribute, gather

STEPS, IMAGES = 2, 6
SOURCE = tiny_networks()["wide resnet"]
CLASSES = SOURCE().get_classifier().out_features


def divided(networks=2):
    torch.manual_seed(0)
    options = {"ensemble": "mean_probabilities", "weight_decay": "exponential"}
    model = surgery.convert(SOURCE(), "divided", networks=networks, **options)
    return model.double()


def batches():
    """Return one batch of two views a step, with labels."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(STEPS, IMAGES, 6, 32, 32, dtype=torch.float64, generator=generator)
    return list(zip(images, torch.randint(CLASSES, (STEPS, IMAGES), generator=generator), strict=True))


def train(model, seen=lambda images: images):
    """Return the terms of the loss and the training outputs of every step."""
    groups = surgery.param_groups(model, lr=0.1, weight_decay=0.01)
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    criterion = surgery.Objective(model.train(), nn.CrossEntropyLoss(label_smoothing=0.1))
    terms, outputs = [], []
    for epoch, (images, labels) in enumerate(batches()):
        outputs.append(model(seen(images)))
        optimizer.zero_grad()
        criterion(outputs[-1], labels, progress=epoch + 10.0).backward()
        optimizer.step()
        terms.append(dict(criterion.terms))
    return terms, [output.detach() for output in outputs]


def refusal(call):
    try:
        call()
    except SurgeryError as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def refusals(model, part, folder):
    """Return what is said to calls that cannot work in a process that has a part of `model`."""
    lonely = dist.new_group([0])
    return {
        "twice": refusal(lambda: distribute(part)),
        "prune": refusal(lambda: surgery.prune(part, members=[0])),
        "three": refusal(lambda: distribute(divided(3))),
        "outside": refusal(lambda: distribute(model, lonely)),
        "fuse": refusal(lambda: fuse(part)),
        "concurrent": refusal(lambda: concurrent(part, ["cpu"])),
        "save": refusal(lambda: surgery.save(part, f"{folder}/part.safetensors", factory=SOURCE)),
    }


def count_exchanges():
    """Return a list that gets the shape of whatever is exchanged from now on."""
    sent, all_gather, broadcast = [], dist.all_gather, dist.broadcast

    def counted(received, own, group=None):
        sent.append((tuple(own.shape), own.requires_grad))
        return all_gather(received, own, group)

    def counted_broadcast(values, **options):
        sent.append((tuple(values.shape), values.requires_grad))
        return broadcast(values, **options)

    dist.all_gather, dist.broadcast = counted, counted_broadcast
    return sent


def work(rank, folder):
    """Train in one of two processes and write what happened to a file."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    sent = count_exchanges()
    model = divided()
    found = {"before": copy.deepcopy(model.state_dict())}
    part, partly = distribute(model), distribute(model)
    found["keys"] = list(part.state_dict())
    found["parameters"] = [name for name, _ in part.named_parameters()]
    found["terms"], found["outputs"] = train(part)
    found["sent"] = list(sent)
    found["own view"] = train(partly, lambda images: images.chunk(2, dim=1)[rank])[0]
    found["model after"] = model.state_dict()
    (images, _), _ = batches()
    with torch.no_grad():
        found["eval"] = part.eval()(images)
        found["copied"] = copy.deepcopy(part)(images)
    with torch.inference_mode():
        found["inference"] = part(images).clone()
    found["refused"] = {
        "sizes": refusal(lambda: part(images[: 3 + rank])),
        **refusals(model, part, folder),
    }
    if rank == 1:
        part.to(memory_format=torch.channels_last)
    whole = gather(part)
    found["whole"], found["whole eval"] = whole.state_dict(), whole(images).detach()
    found["mode"] = [whole.training, ensemble_of(whole).training, gather(part.train()).training]
    if rank == 0:
        surgery.save(whole, f"{folder}/whole.safetensors", factory=SOURCE)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(work, (str(path),), nprocs=2)
    return path


@pytest.fixture(scope="module")
def ranks(folder):
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def single():
    """The whole network, trained in this process; its terms and its outputs."""
    model = divided()
    return model, *train(model)


def test_training_in_two_processes_is_that_in_one(ranks, single):
    model, terms, outputs = single
    weights = model.state_dict()
    for found in ranks:
        assert found["terms"] == terms
        assert [list(step) for step in found["terms"]] == [["task", "cotraining"]] * STEPS
        assert all(torch.equal(a, b) for a, b in zip(found["outputs"], outputs, strict=True))
        assert found["whole"].keys() == weights.keys()
        assert all(torch.equal(found["whole"][key], value) for key, value in weights.items())
        assert any(not torch.equal(found["before"][key], value) for key, value in weights.items())


def test_views_of_other_members_need_not_be_there(ranks, single):
    assert all(found["own view"] == single[1] for found in ranks)


def test_evaluation_in_two_processes_is_that_in_one(ranks, single):
    (images, _), _ = batches()
    with torch.no_grad():
        expected = copy.deepcopy(single[0]).eval()(images)
    for found in ranks:
        for kind in ("eval", "copied", "inference", "whole eval"):
            # channels_last and inference mode may choose other kernels
            torch.testing.assert_close(found[kind], expected, rtol=1e-10, atol=1e-12)


def test_only_predictions_are_exchanged(ranks):
    """In each step the sizes, two numbers, and the logits; no gradient, no weight."""
    for found in ranks:
        assert found["sent"] == [((2,), False), ((IMAGES, CLASSES), False)] * STEPS


def test_every_process_holds_its_own_member_only(ranks):
    whole = list(ranks[0]["before"])
    for rank, found in enumerate(ranks):
        assert found["keys"] == [key for key in whole if key.startswith(f"members.{rank}.")]
        assert found["parameters"]
        assert set(found["parameters"]) < set(found["keys"])


def test_distribute_leaves_the_model_untouched(ranks):
    for found in ranks:
        assert all(torch.equal(found["model after"][key], value) for key, value in found["before"].items())


def test_gathered_network_is_whole_and_keeps_its_mode(ranks):
    assert all(found["mode"] == [False, False, True] for found in ranks)


def test_gathered_network_saves_and_loads(folder, ranks, single):
    loaded = surgery.load(folder / "whole.safetensors", factory=SOURCE)
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in single[0].state_dict().items())
    assert len(members(loaded)) == 2


def test_what_cannot_work_is_refused_in_every_process(ranks):
    for rank, found in enumerate(ranks):
        refused = found["refused"]
        assert refused["sizes"].startswith(f"InvalidOption: distribute: found logits (3, {CLASSES}), (4, {CLASSES})")
        assert refused["twice"].startswith("SurgeryError: distribute: found a distributed network")
        assert "surgery_divided.gather(model)" in refused["prune"]
        for call in ("fuse", "concurrent"):
            assert refused[call].startswith("UnsupportedModel: found the small network of one process, expected all")
        assert refused["save"].startswith("CheckpointError: save: found the small network of one process, expected all")
        assert refused["three"].startswith("InvalidOption: distribute: found 2 processes, expected 3")
        outside = ("found 1 processes, expected 2", "found a process outside of the group")[rank]
        assert outside in refused["outside"]


def test_without_processes_it_is_refused():
    with pytest.raises(SurgeryError, match="distribute: found no process group"):
        distribute(divided())
    with pytest.raises(UnsupportedModel, match="expected a network converted by 'divided'"):
        distribute(SOURCE())
    with pytest.raises(UnsupportedModel, match="gather: expected what distribute returned"):
        gather(divided())
