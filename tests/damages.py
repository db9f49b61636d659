"""Damages of checkpoint files and of their records; each draws what it does from a generator of random numbers."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from random import Random
from typing import Any

import torch

from surgery import storage
from surgery.history import Operation

# --- a file, taken apart and put together ---


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header and the bytes of the tensors."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: dict[str, Any] | str, body: bytes) -> bytes:
    text = header if isinstance(header, str) else json.dumps(header, separators=(",", ":"))
    return struct.pack("<Q", len(text.encode())) + text.encode() + body


def sealed(data: bytes) -> bytes:
    """Return the file with the checksum that belongs to it, as a careful forger would."""
    start, _ = storage._place(data)
    return data[:start] + storage.checksum(data).encode() + data[start + 64 :]


def texts(data: bytes) -> tuple[Any, Any]:
    """Return the record and the state of the network."""
    metadata = split(data)[0]["__metadata__"]
    return json.loads(metadata["surgery.record"]), json.loads(metadata["surgery.state"])


def with_texts(data: bytes, record: Any, state: Any) -> bytes:
    """Return the file with another record and state, each JSON or what stands in its place, and the right checksum."""
    header, body = split(data)
    for name, value in (("surgery.record", record), ("surgery.state", state)):
        header["__metadata__"][name] = value if isinstance(value, str) else json.dumps(value)
    return sealed(join(header, body))


# --- bytes: `other` is a second file ---


def _start(data: bytes) -> int:
    return 8 + struct.unpack("<Q", data[:8])[0]


def _range(draw: Random, data: bytes, longest: int = 64) -> tuple[int, int]:
    start = draw.randrange(len(data))
    return start, min(len(data), start + draw.randint(1, longest))


def _flipped(draw: Random, data: bytes, start: int, end: int) -> bytes:
    damaged = bytearray(data)
    damaged[draw.randrange(start, end)] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def bit_anywhere(draw: Random, data: bytes, other: bytes) -> bytes:
    return _flipped(draw, data, 0, len(data))


def bit_at_an_edge(draw: Random, data: bytes, other: bytes) -> bytes:
    edge = draw.choice([0, 8, _start(data) - 1, _start(data), len(data) - 1])
    return _flipped(draw, data, edge, edge + 1)


def bit_in_the_length(draw: Random, data: bytes, other: bytes) -> bytes:
    return _flipped(draw, data, 0, 8)


def bit_in_the_header(draw: Random, data: bytes, other: bytes) -> bytes:
    return _flipped(draw, data, 8, _start(data))


def bit_in_the_texts(draw: Random, data: bytes, other: bytes) -> bytes:
    start = data.index(draw.choice([b"surgery.record", b"surgery.state", b"surgery.sha256"]))
    return _flipped(draw, data, start, start + 300)


def bit_in_the_tensors(draw: Random, data: bytes, other: bytes) -> bytes:
    return _flipped(draw, data, _start(data), len(data))


def truncated(draw: Random, data: bytes, other: bytes) -> bytes:
    return data[: draw.randrange(len(data))]


def inserted(draw: Random, data: bytes, other: bytes) -> bytes:
    at = draw.randrange(len(data))
    return data[:at] + draw.randbytes(draw.randint(1, 16)) + data[at:]


def appended(draw: Random, data: bytes, other: bytes) -> bytes:
    return data + draw.randbytes(draw.randint(1, 16))


def deleted(draw: Random, data: bytes, other: bytes) -> bytes:
    start, end = _range(draw, data)
    return data[:start] + data[end:]


def zeroed(draw: Random, data: bytes, other: bytes) -> bytes:
    start, end = _range(draw, data, 4096)
    return data[:start] + bytes(end - start) + data[end:]


def overwritten(draw: Random, data: bytes, other: bytes) -> bytes:
    start, end = _range(draw, data)
    return data[:start] + draw.randbytes(end - start) + data[end:]


def exchanged_ranges(draw: Random, data: bytes, other: bytes) -> bytes:
    size = draw.randint(1, 64)
    first, second = sorted(draw.sample(range(0, len(data) - size, size), 2))
    a, b = data[first : first + size], data[second : second + size]
    return data[:first] + b + data[first + size : second] + a + data[second + size :]


def duplicated_range(draw: Random, data: bytes, other: bytes) -> bytes:
    start, end = _range(draw, data)
    return data[:end] + data[start:]


def spliced(draw: Random, data: bytes, other: bytes) -> bytes:
    at = draw.randrange(min(len(data), len(other)))
    return data[:at] + other[at:]


def tensors_of_another(draw: Random, data: bytes, other: bytes) -> bytes:
    body = split(other)[1]
    header, own = split(data)
    return join(header, (body + own)[: len(own)])


BYTES = (
    *(bit_anywhere, bit_at_an_edge, bit_in_the_length, bit_in_the_header, bit_in_the_texts, bit_in_the_tensors),
    *(truncated, inserted, appended, deleted, zeroed, overwritten, exchanged_ranges, duplicated_range),
    *(spliced, tensors_of_another),
)

# --- the header: what it says about the tensors, and how it is written ---


def _names(header: dict[str, Any]) -> list[str]:
    return [name for name in header if name != "__metadata__"]


def tensors_exchanged(draw: Random, data: bytes, other: bytes) -> bytes:
    header, body = split(data)
    same: dict[str, list[str]] = {}
    for name in _names(header):
        same.setdefault(str((header[name]["dtype"], header[name]["shape"])), []).append(name)
    a, b = draw.sample(draw.choice([names for names in same.values() if len(names) > 1]), 2)
    header[a], header[b] = header[b], header[a]
    return join(header, body)


def dtype_changed(draw: Random, data: bytes, other: bytes) -> bytes:
    header, body = split(data)
    name = draw.choice([name for name in _names(header) if header[name]["dtype"] == "F32"])
    header[name]["dtype"] = draw.choice(["I32", "U32", "F16", "F64", "I64", "BF16", "BOOL", "nonsense"])
    return join(header, body)


def shape_changed(draw: Random, data: bytes, other: bytes) -> bytes:
    header, body = split(data)
    shape = header[draw.choice([name for name in _names(header) if header[name]["shape"]])]["shape"]
    at = draw.randrange(len(shape))
    change = draw.choice(["flat", "huge", "zero", "negative", "axis"])
    if change == "flat":
        shape[:] = [torch.Size(shape).numel()] if len(shape) > 1 else [1, *shape]
    elif change == "axis":
        shape.insert(at, 1)
    else:
        shape[at] = {"huge": 10**12, "zero": 0, "negative": -1}[change]
    return join(header, body)


def tensor_renamed(draw: Random, data: bytes, other: bytes) -> bytes:
    header, body = split(data)
    old = draw.choice(_names(header))
    new = draw.choice([f"{old}s", old.swapcase(), "", "../../etc/passwd", f"{old}\u0000", "\ud800", "__class__"])
    return join({new if name == old else name: value for name, value in header.items()}, body)


def tensor_dropped(draw: Random, data: bytes, other: bytes) -> bytes:
    header, body = split(data)
    del header[draw.choice(_names(header))]
    return join(header, body)


def last_tensor_dropped(draw: Random, data: bytes, other: bytes) -> bytes:
    """Leave no hole, which safetensors would refuse by itself."""
    header, body = split(data)
    last = max(_names(header), key=lambda name: header[name]["data_offsets"])
    end = header.pop(last)["data_offsets"][0]
    return join(header, body[:end])


def text_dropped(draw: Random, data: bytes, other: bytes) -> bytes:
    header, body = split(data)
    del header["__metadata__"][draw.choice(sorted(header["__metadata__"]))]
    return join(draw.choice([header, {name: header[name] for name in _names(header)}]), body)


def text_twice(draw: Random, data: bytes, other: bytes) -> bytes:
    header, body = split(data)
    name = draw.choice(["surgery.record", "surgery.state"])
    twin = json.dumps({name: split(other)[0]["__metadata__"][name]})[1:-1]
    before, key, behind = json.dumps(header, separators=(",", ":")).partition('"__metadata__":{')
    ways = [f"{before}{key}{twin},{behind}", f"{before}{key}{behind[:-1]},{key}{twin}}}}}"]
    return join(draw.choice(ways), body)


def tensor_twice(draw: Random, data: bytes, other: bytes) -> bytes:
    header, body = split(data)
    a, b = draw.sample(_names(header), 2)
    twin = json.dumps({a: header[b]})[1:-1]
    text = json.dumps(header, separators=(",", ":"))
    return join(draw.choice([f"{{{twin},{text[1:]}", f"{text[:-1]},{twin}}}"]), body)


def bytes_between_the_tensors(draw: Random, data: bytes, other: bytes) -> bytes:
    header, body = split(data)
    at, size = draw.choice(_names(header)), 8 * draw.randint(1, 4)
    start = header[at]["data_offsets"][0]
    for name in _names(header):
        if header[name]["data_offsets"][0] >= start:
            header[name]["data_offsets"] = [offset + size for offset in header[name]["data_offsets"]]
    return join(header, body[:start] + draw.randbytes(size) + body[start:])


def tensors_overlap(draw: Random, data: bytes, other: bytes) -> bytes:
    header, body = split(data)
    a, b = draw.sample(_names(header), 2)
    header[a] = header[b]
    return join(header, body)


def offsets_outside(draw: Random, data: bytes, other: bytes) -> bytes:
    header, body = split(data)
    start, end = header[draw.choice(_names(header))]["data_offsets"]
    for name in draw.sample(_names(header), 1):
        by = draw.choice([2**62, -start - 1, len(body), 2**64])
        header[name]["data_offsets"] = [start + by, end + by]
    return join(header, body)


def written_otherwise(draw: Random, data: bytes, other: bytes) -> bytes:
    """Say the same in other bytes: another order, other spaces, other escapes, a text that nobody reads."""
    header, body = split(data)
    names = _names(header)
    draw.shuffle(names)
    texts_of = header["__metadata__"]
    ways = [
        json.dumps({"__metadata__": texts_of, **{name: header[name] for name in names}}),
        json.dumps(header, indent=1),
        json.dumps(header, separators=(",", ":")) + " " * draw.randint(1, 20),
        json.dumps({**header, "__metadata__": {"a": "b", **texts_of}}, separators=(",", ":")),
        json.dumps(header, separators=(",", ":")).replace("weight", "\\u0077eight"),
    ]
    return join(draw.choice(ways), body)


HEADER = (
    *(tensors_exchanged, dtype_changed, shape_changed, tensor_renamed, tensor_dropped, last_tensor_dropped),
    *(text_dropped, text_twice, tensor_twice, bytes_between_the_tensors, tensors_overlap, offsets_outside),
    *(written_otherwise,),
)

# --- files of other formats ---


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (self.path, "w")


def foreign(bomb: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield files that are none of ours, by name; those that hold code would create the file `bomb`."""
    header, body = split(data)
    plain = json.dumps(header)
    yield "empty", b""
    for protocol in (0, 2, 5):
        yield f"pickle of protocol {protocol}", pickle.dumps(Bomb(bomb), protocol)
    for is_zip in (True, False):
        buffer = io.BytesIO()
        torch.save({"weight": torch.zeros(3), "bomb": Bomb(bomb)}, buffer, _use_new_zipfile_serialization=is_zip)
        yield f"torch.save, zip {is_zip}", buffer.getvalue()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Bomb(bomb), 2))
    yield "zip", buffer.getvalue()
    yield "zip behind a checkpoint", data + buffer.getvalue()
    yield "pickle behind a header", join(header, pickle.dumps(Bomb(bomb)))
    yield "script", f"#!/usr/bin/env python\nopen({bomb!r}, 'w')\n".encode()
    yield "page", b"<!DOCTYPE html><html><body>404</body></html>"
    for length in (2**63, 2**64 - 1, len(data), 10**8, 0):
        yield f"length {length}", struct.pack("<Q", length) + data[8:]
    for text in ("[" * 10**5, '{"a":' * 10**5, "[" * 5000 + "]" * 5000, '{"__metadata__":' * 5000 + "{}" + "}" * 5000):
        yield f"deep {text[:16]} of {len(text)}", join(text, body)
    metadata = ('{"__metadata__":3}', '{"__metadata__":{"surgery.record":3}}')
    for text in ("", "null", "[]", "3", '"text"', "NaN", "{}", *metadata):
        yield f"header {text}", join(text, body)
    first = plain.index('"shape": [') + len('"shape": [')
    for number in ("NaN", "Infinity", "1e999", "9" * 5000, "-1", "1.5"):
        yield f"shape {number[:10]}", join(plain[:first] + f"{number}, " + plain[first:], body)
    for junk in (b"\xff\xfe", b"\xc3", b"\x00", b"\xed\xa0\x80"):
        yield f"junk {junk!r}", data[:20] + junk + data[20 + len(junk) :]


# --- records: each changes a record and a state in place, or returns others ---

NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 10**12, -(10**12), 10**30, 1.5, -0.5, float("nan"), float("inf"), 1e-320),
    *("", "x", "bomb", "os:system", "../../x", "__import__('bomb')", "a\u0000b", "\ud800", "layer1.0", "x" * 10**5),
    *([], [[]], {}, {"": {}}, {"bomb": 1}, [0, 0], [-1], [10**12], json.loads("[" * 200 + "]" * 200)),
)


NETWORKS = (-1, 0, 1, 3, 64, "x", 2.0)


def places(value: Any, found: list[tuple[Any, Any]] | None = None) -> list[tuple[Any, Any]]:
    """Return every container in a JSON value with each of its keys or indices."""
    found = [] if found is None else found
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        found.append((value, key))
        if isinstance(value[key], (dict, list)):
            places(value[key], found)
    return found


def _any(draw: Random, value: Any, kinds: tuple[type, ...] = (object,)) -> tuple[Any, Any]:
    """Choose a place; its depth first, so that long lists do not hide the few fields of what is above them."""
    chosen = [(holder, key) for holder, key in places(value) if type(holder[key]) in kinds or object in kinds]
    names = sorted({str(key) for _, key in chosen})
    name = draw.choice(names)
    return draw.choice([(holder, key) for holder, key in chosen if str(key) == name])


def field_removed(draw: Random, record: Any, state: Any) -> None:
    holder, key = _any(draw, draw.choice([record, record, state]))
    del holder[key]


def field_added(draw: Random, record: Any, state: Any) -> None:
    holder, key = _any(draw, draw.choice([record, record, state]))
    if isinstance(holder, dict):
        holder[draw.choice(["extra", "", f"{key}s", "__class__"])] = draw.choice(NASTY)
    else:
        holder.insert(key, draw.choice(NASTY))


def value_replaced(draw: Random, record: Any, state: Any) -> None:
    holder, key = _any(draw, draw.choice([record, record, record, state]))
    if key != "networks":
        holder[key] = draw.choice(NASTY)


def option_replaced(draw: Random, record: Any, state: Any) -> None:
    options = draw.choice(record["operations"])["options"]
    name = draw.choice(sorted(options))
    options[name] = draw.choice((*NASTY[:10], *NASTY) if name != "networks" else NETWORKS)


def number_changed(draw: Random, record: Any, state: Any) -> None:
    holder, key = _any(draw, record, (int, float))
    if key != "networks":
        holder[key] = draw.choice([-holder[key], holder[key] + 1, holder[key] * 2, 10**12, 10**30, -1, 2**63, 1e300])


def text_changed(draw: Random, record: Any, state: Any) -> None:
    holder, key = _any(draw, record, (str,))
    text = holder[key]
    holder[key] = draw.choice([text.upper(), text[:-1], f"{text}x", "", text[::-1], f"bomb.{text}", f"{text}.0"])


def operations_reordered(draw: Random, record: Any, state: Any) -> None:
    operations = record["operations"]
    change = draw.choice(["exchange", "duplicate", "drop", "drop all", "duplicate many"])
    at = draw.randrange(len(operations))
    if change == "exchange":
        operations.reverse()
    elif change == "duplicate":
        operations.insert(at, operations[at])
    elif change == "duplicate many":
        operations.extend([operations[-1]] * 5)
    else:
        del operations[at if change == "drop" else 0 : len(operations) if change == "drop all" else at + 1]


def decisions_changed(draw: Random, record: Any, state: Any) -> None:
    chosen = [operation for operation in record["operations"] if operation["decisions"]] or record["operations"]
    decisions = draw.choice(chosen)["decisions"]
    change = draw.choice(["drop", "add", "replace", "inside"])
    if change == "add" or not decisions:
        decisions["bomb"] = draw.choice(NASTY)
    elif change == "drop":
        decisions.clear()
    elif change == "replace":
        decisions[draw.choice(sorted(decisions))] = draw.choice(NASTY)
    else:
        holder, key = _any(draw, decisions)
        holder[key] = draw.choice(NASTY)


def sites_changed(draw: Random, record: Any, state: Any) -> None:
    sites = [site for operation in record["operations"] for site in operation["sites"]]
    draw.choice(sites)[draw.choice(["method", "role", "block", "node"])] = draw.choice(["bomb", "", 3, "x = 1; bomb"])


def cut_changed(draw: Random, record: Any, state: Any) -> None:
    plans = [operation["options"] for operation in record["operations"] if operation["kind"] == "prune"]
    if not plans:
        option_replaced(draw, record, state)
        return
    cuts = plans[0]["cuts"]
    cut = draw.choice(cuts)
    change = draw.choice(["keep", "of", "path", "kind", "drop", "twice", "reverse", "fewer"])
    if change == "keep":
        cut["keep"] = draw.choice([[-1], [10**12], [0, 0], [], [cut["of"]], [0], [1.0], ["0"], list(range(cut["of"]))])
    elif change in ("of", "path", "kind"):
        kinds = ["branches", "body", "classes", "inputs", "outputs", "stream", "module", "members", "bomb"]
        paths = ["", "bomb", "layer1", "fc", "x" * 1000]
        pools = {"of": [0, -1, 10**12, 1, cut["of"] + 1], "path": paths, "kind": kinds}
        cut[change] = draw.choice(pools[change])
    elif change == "reverse":
        cuts.reverse()
    elif change == "fewer":
        cut["keep"] = cut["keep"][1:]
    else:
        cuts[:] = [one for one in cuts if one is not cut] if change == "drop" else [*cuts, cut]


def ties_changed(draw: Random, record: Any, state: Any) -> None:
    aliases = state["aliases"]
    names = ["conv1.weight", "fc.weight", "nowhere.weight", "", "bomb"]
    if aliases and draw.random() < 0.5:
        aliases[draw.choice(sorted(aliases))] = draw.choice([*names, *aliases])
    else:
        aliases[draw.choice(names)] = draw.choice(names)


def modes_changed(draw: Random, record: Any, state: Any) -> None:
    name = draw.choice(["frozen", "evaluating", "mode"])
    if name == "mode":
        state[name] = draw.choice(["eval", "train", "bomb", "", None, 3])
    else:
        state[name] = [*state[name], draw.choice(["nowhere", "", "conv1", "conv1.weight", "bomb.weight", "training"])]


def builder_changed(draw: Random, record: Any, state: Any) -> None:
    names = [
        *("os:system", "timm:../../x", "torchvision:__import__", "bomb:explode", "timm:bomb", "timm:", "torchvision:"),
        *("timm:hf-hub:bomb/bomb", "timm:local-dir:/tmp", "timm:resnet18.local-dir:/tmp", "timm:resnet18/../bomb"),
        *("timm:resnet18.bomb", "torchvision:deeplabv3_resnet50", "torchvision:resnet18", "timm:wrn_16_1", ":", "timm"),
    ]
    record["source"]["builder"] = draw.choice(names)


def source_changed(draw: Random, record: Any, state: Any) -> None:
    source = record["source"]
    name = draw.choice(["classes", "in_channels", "class_name", "fingerprint"])
    sizes = [0, -1, 1, 10**6, 10**8, 10**12, 10**18, 10**30, None]
    texts_of = ["bomb.Bomb", "torchvision.models.resnet.ResNet", "torchvision.models.detection.x.X", "", "0" * 64]
    source[name] = draw.choice(sizes if name in ("classes", "in_channels") else texts_of)


def classifier_added(draw: Random, record: Any, state: Any) -> None:
    size = draw.choice([0, -1, 10, 10**9, 10**12, 10**30, None, "3", 2.5])
    args, kwargs = draw.choice([[], ["bomb"], [1, 2, 3], 3]), draw.choice([{}, {"bomb": 1}, {"self": 1}, 3])
    operation = asdict(Operation("classifier", "", {"num_classes": size, "args": args, "kwargs": kwargs}))
    record["operations"].insert(draw.randint(0, len(record["operations"])), operation)


def size_changed(draw: Random, record: Any, state: Any) -> None:
    sizes = [[0, 0], [-1, 5], [1, 1], [10**12, 10**12], [10**30, 1], [32], [32, 32, 32], 32, "32", [16, 48], {}]
    record["operations"][0]["input_size"] = draw.choice(sizes)


def text_is_no_object(draw: Random, record: Any, state: Any) -> tuple[Any, Any]:
    deep = ("[" * 10**5, '{"a":' * 10**5)
    text = draw.choice(["", "null", "[]", "3", "NaN", "{", *deep, "9" * 5000, '{"a": "\\ud800"}'])
    return (text, state) if draw.random() < 0.5 else (record, text)


def name_twice(draw: Random, record: Any, state: Any) -> tuple[Any, Any]:
    text = json.dumps(record)
    key = draw.choice(['"format": ', '"source": ', '"operations": '])
    return text.replace(key, f"{key}{draw.choice(['1', 'null', '[]'])}, {key}", 1), state


RECORDS = (
    *(field_removed, field_added, value_replaced, option_replaced, number_changed, text_changed, operations_reordered),
    *(decisions_changed, sites_changed, cut_changed, ties_changed, modes_changed, builder_changed, source_changed),
    *(classifier_added, size_changed, text_is_no_object, name_twice),
)
