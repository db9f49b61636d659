"""Damage: what is not byte by byte what was saved is refused by name, runs no code, and never becomes other weights."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load as load_tensors
from torch import nn

import surgery
from surgery import sources
from surgery.errors import CheckpointError, PluginError, PruneError, SurgeryError
from surgery.history import Conversion
from surgery.models import CifarResNet, resnext
from surgery.pruning import PrunePlan
from surgery.testing import tiny_networks
from tests import damages
from tests.damages import BYTES, HEADER, RECORDS, foreign, sealed, texts, with_texts

Factory = Callable[[], nn.Module]

SEEDS = {"bytes": 12, "header": 6, "resealed": 6, "record": 10}
"""How often every kind of damage is done."""
LONGEST = 20.0
"""Seconds that one refusal may take; it takes a tenth of one."""


def tied() -> nn.Module:
    torch.manual_seed(0)
    model = CifarResNet(resnext(4, 2, depth=20, base=8), num_classes=10)
    model.layer1[1].conv2.weight = model.layer1[0].conv2.weight
    return model


def registered() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnext11_4x4d", num_classes=4)


@dataclass(frozen=True)
class Case:
    """What is saved: a network, a method with its options, and what is done then."""

    build: Factory
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    criteria: Mapping[str, Any] | None = None
    classes: int | None = None


TINY = tiny_networks()["resnext"]
CASES = {
    "coded": Case(registered, "coded"),
    "coded pruned": Case(TINY, "coded", criteria={"classes": [3, 5]}),
    "gated": Case(TINY, "gated", classes=7),
    "gated pruned": Case(TINY, "gated", {"granularity": "channel", "dependent": False}, {"tau": 0.5}),
    "masked": Case(TINY, "masked", {"connectivity": "random"}),
    "masked pruned": Case(registered, "masked", criteria={}),
    "inclusive": Case(TINY, "inclusive", {"subnetworks": 2}),
    "divided": Case(registered, "divided"),
    "divided pruned": Case(TINY, "divided", criteria={"members": 1}),
    "tied": Case(tied, "gated"),
}
NAMES = tuple(CASES)


@cache
def saved(name: str, folder: Path) -> bytes:
    case = CASES[name]
    torch.manual_seed(1)
    network = surgery.convert(case.build().eval(), case.method, **case.options)
    if case.classes is not None:
        network.reset_classifier(case.classes)
    if case.criteria is not None:
        network = surgery.prune(network, **case.criteria)
    surgery.save(network, folder / "saved.safetensors", factory=factory_of(name))
    return (folder / "saved.safetensors").read_bytes()


def factory_of(name: str) -> Factory | None:
    build = CASES[name].build
    return None if build is registered else build


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], bytes]:
    return partial(saved, folder=tmp_path_factory.mktemp("saved"))


# --- no code runs ---

FORBIDDEN = ("os.", "subprocess.", "socket.", "pickle.", "shutil.", "urllib.", "webbrowser.", "ctypes.", "pty.")
HARMLESS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.putenv", "os.unsetenv")


class Watch:
    """Notes what this thread does that loading must not do: an audit hook cannot be removed, so it is switched."""

    def __init__(self) -> None:
        self.thread: int | None = None
        self.seen: list[str] = []
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.thread is None or threading.get_ident() != self.thread:
            return
        writes = event == "open" and _writes(arguments)
        names_bomb = event in ("import", "compile") and "bomb" in repr(arguments[0])
        if writes or names_bomb or (event.startswith(FORBIDDEN) and event not in HARMLESS):
            self.seen.append(f"{event} {arguments!r:.200}")

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        self.seen.clear()
        self.thread = threading.get_ident()
        try:
            yield
        finally:
            self.thread = None


def _writes(arguments: tuple[Any, ...]) -> bool:
    path, mode, flags = arguments
    if "__pycache__" in str(path):
        return False
    return any(letter in (mode or "") for letter in "wax+") if mode else bool((flags or 0) & 3)


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


def test_the_watch_sees_code_that_runs(watch, tmp_path):
    import pickle

    with watch.watching():
        pickle.loads(pickle.dumps(damages.Bomb(str(tmp_path / "bomb")))).close()
    assert {event.partition(" ")[0] for event in watch.seen} >= {"pickle.find_class", "open"}
    with watch.watching(), pytest.raises(ModuleNotFoundError):
        import bomb  # noqa: F401
    assert watch.seen


# --- the law ---


def outcome(path: Path, data: bytes, factory: Factory | None, watch: Watch) -> surgery.ConvertedNetwork | SurgeryError:
    """Load a file; return the network, or the error if it is one of ours that says where and what to do."""
    path.write_bytes(data)
    start = time.perf_counter()
    with watch.watching():
        try:
            found: surgery.ConvertedNetwork | SurgeryError = surgery.load(path, factory=factory)
        except (CheckpointError, PluginError) as error:
            found = error
    assert not watch.seen
    assert time.perf_counter() - start < LONGEST
    assert "bomb" not in sys.modules
    assert list(path.parent.iterdir()) == [path]
    if isinstance(found, SurgeryError):
        message = str(found)
        assert message.startswith(f"{path}: ")
        assert any(cure in message for cure in CURES), message
    return found


CURES = ("restore the file", "save the model again", "pass ", "upgrade", "install")


def assert_holds_the_file(network: surgery.ConvertedNetwork, data: bytes) -> None:
    """Every stored tensor is there under its name, bit by bit, and what is not stored is tied to one that is."""
    stored, weights = load_tensors(data), network.state_dict()
    aliases = texts(data)[1]["aliases"]
    assert weights.keys() == stored.keys() | aliases.keys()
    for name, tensor in weights.items():
        expected = stored[name] if name in stored else stored[aliases[name]]
        assert tensor.dtype == expected.dtype
        assert tensor.shape == expected.shape
        assert tensor.reshape(-1).view(torch.uint8).equal(expected.reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_damaged_loads(name, files, watch, tmp_path):
    network = outcome(tmp_path / "a.safetensors", files(name), factory_of(name), watch)
    assert isinstance(network, surgery.ConvertedNetwork), network
    assert_holds_the_file(network, files(name))


@pytest.mark.parametrize("damage", [*BYTES, *HEADER], ids=lambda damage: damage.__name__)
def test_no_damaged_file_loads(damage, files, watch, tmp_path):
    for seed in range(SEEDS["bytes"] if damage in BYTES else SEEDS["header"]):
        draw = Random(f"{damage.__name__} {seed}")
        name, other = draw.sample(NAMES, 2)
        data = files(name)
        while (damaged := damage(draw, data, files(other))) == data:
            pass
        found = outcome(tmp_path / "a.safetensors", damaged, factory_of(name), watch)
        assert isinstance(found, CheckpointError), f"{damage.__name__}, seed {seed} of {name!r} loads"


@pytest.mark.parametrize("damage", HEADER, ids=lambda damage: damage.__name__)
def test_header_forged_with_its_checksum_loads_what_it_says_or_nothing(damage, files, watch, tmp_path):
    for seed in range(SEEDS["resealed"]):
        draw = Random(f"resealed {damage.__name__} {seed}")
        name, other = draw.sample(NAMES, 2)
        forged = sealed(damage(draw, files(name), files(other)))
        found = outcome(tmp_path / "a.safetensors", forged, factory_of(name), watch)
        if isinstance(found, surgery.ConvertedNetwork):
            assert_holds_the_file(found, forged)


@pytest.mark.parametrize("damage", RECORDS, ids=lambda damage: damage.__name__)
def test_record_forged_with_its_checksum_loads_what_it_says_or_nothing(damage, files, watch, tmp_path):
    for seed in range(SEEDS["record"]):
        draw = Random(f"{damage.__name__} {seed}")
        name = draw.choice(NAMES)
        record, state = texts(files(name))
        classes, channels = record["source"]["classes"], record["source"]["in_channels"]
        changed = damage(draw, record, state)
        forged = with_texts(files(name), *(changed or (record, state)))
        found = outcome(tmp_path / "a.safetensors", forged, factory_of(name), watch)
        if isinstance(found, surgery.ConvertedNetwork):
            assert_holds_the_file(found, forged)
            source = found.meta["conversion"].source
            assert (source.classes, source.in_channels) == (classes, channels), f"{damage.__name__}, seed {seed}"


def test_at_least_500_damages_are_tried(files):
    others = sum(1 for _ in foreign("bomb", files("coded")))
    done = {"bytes": len(BYTES), "header": len(HEADER), "resealed": len(HEADER), "record": len(RECORDS)}
    assert sum(SEEDS[kind] * count for kind, count in done.items()) + others >= 500


def test_foreign_files_are_refused_and_run_nothing(files, watch, tmp_path):
    (tmp_path / "file").mkdir()
    for kind, data in foreign(str(tmp_path / "bomb"), files("coded")):
        found = outcome(tmp_path / "file" / "a.safetensors", data, None, watch)
        assert isinstance(found, CheckpointError), kind
        assert not (tmp_path / "bomb").exists(), kind


# --- sizes ---


def test_sizes_that_no_network_has_are_refused_before_anything_is_made(files, watch, tmp_path):
    """A forger who works out the fingerprint, too, is stopped by the number of parameters: 10**12 x 256 is 10**15."""
    record, state = texts(files("coded"))
    before = peak_since_now()
    for name in ("classes", "in_channels"):
        source = replace(Conversion.from_json(json.dumps(record)).source, **{name: 10**12})
        with sources._Hollow():
            huge = sources.fingerprint(sources.build(source.builder, source))
        forged = record | {"source": asdict(replace(source, fingerprint=huge))}
        found = outcome(tmp_path / "a.safetensors", with_texts(files("coded"), forged, state), None, watch)
        assert "parameters, expected at most 2,147,483,648" in str(found)
    record["operations"].append(_classifier(10**12))
    found = outcome(tmp_path / "a.safetensors", with_texts(files("coded"), record, state), None, watch)
    assert "parameters, expected at most 2,147,483,648" in str(found)
    assert peak() - before < 200_000


def peak_since_now() -> int:
    """Forget the peak of the resident memory so far, which earlier tests made, and return what `peak` begins with."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """Return the peak of the resident memory in KiB."""
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def _classifier(classes: int) -> dict[str, Any]:
    return asdict(Conversion(None).with_classifier(classes, (), {}).operations[0])  # type: ignore[arg-type]


def test_file_saved_without_ties_does_not_load_into_a_network_that_has_some(files, watch, tmp_path):
    """Both stored tensors would go into the one weight, the second over the first."""

    def loose() -> nn.Module:
        model = tied()
        model.layer1[1].conv2.weight = nn.Parameter(model.layer1[1].conv2.weight + 1)
        return model

    surgery.save(surgery.convert(loose(), "gated"), tmp_path / "a.safetensors", factory=loose)
    data = (tmp_path / "a.safetensors").read_bytes()
    assert "other ties" in str(outcome(tmp_path / "a.safetensors", data, tied, watch))


def test_tie_that_hides_a_stored_tensor_is_refused(files, watch, tmp_path):
    record, state = texts(files("gated"))
    shapes = {name: tensor.shape for name, tensor in load_tensors(files("gated")).items()}
    hidden, shown = [name for name in sorted(shapes) if shapes[name] == shapes["layer1.0.bn1.weight"]][:2]
    state["aliases"][hidden] = shown
    found = outcome(tmp_path / "a.safetensors", with_texts(files("gated"), record, state), factory_of("gated"), watch)
    assert f"ties ['{hidden}']" in str(found)


def test_errors_of_the_factory_are_its_own(files, tmp_path):
    """What the user's function raises is not blamed on the file."""

    def broken() -> nn.Module:
        return {}["network"]

    (tmp_path / "a.safetensors").write_bytes(files("tied"))
    with pytest.raises(KeyError, match="network"):
        surgery.load(tmp_path / "a.safetensors", factory=broken)


# --- records by themselves ---


def test_changed_records_are_refused_or_are_read_as_they_are_written(files):
    for seed in range(200):
        draw = Random(f"record {seed}")
        record, state = texts(files(draw.choice(NAMES)))
        changed = (draw.choice(RECORDS))(draw, record, state)
        record = changed[0] if changed else record
        text = record if isinstance(record, str) else json.dumps(record)
        try:
            again = Conversion.from_json(text)
        except CheckpointError:
            continue
        assert _sorted(again.to_json()) == _sorted(text), seed


def _sorted(text: str) -> str:
    return json.dumps(json.loads(text), sort_keys=True)


def test_record_that_gives_a_name_twice_is_refused(files):
    """Two readers may take it for two records: one takes the first, the other the last."""
    text = json.dumps(texts(files("coded"))[0])
    with pytest.raises(CheckpointError, match="given twice"):
        Conversion.from_json(text.replace('"operations": ', '"operations": [], "operations": ', 1))


PRUNED = tuple(name for name in NAMES if CASES[name].criteria is not None)


def test_changed_plans_are_refused_or_are_read_as_they_are_written(files):
    for seed in range(200):
        draw = Random(f"plan {seed}")
        plan = texts(files(draw.choice(PRUNED)))[0]["operations"][-1]["options"]
        holder, key = damages._any(draw, plan)
        if draw.random() < 0.2:
            del holder[key]
        else:
            holder[key] = draw.choice(damages.NASTY)
        try:
            again = PrunePlan.from_dict(plan)
        except PruneError:
            continue
        assert _sorted(json.dumps(again.to_dict())) == _sorted(json.dumps(plan)), seed
        assert all(0 <= index < cut.of for cut in again.cuts for index in cut.keep), seed
