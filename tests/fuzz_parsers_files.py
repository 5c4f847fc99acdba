"""Readers of measurements, bundles, labels, teachers and weights, with valid inputs."""

from __future__ import annotations

import io
import json
import re
import struct
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from fuzz_parser import ARCHS, CONTEXT, WEIGHTS, Parser, both, file_of, json_of

from space import get_family
from space.seal import SEAL

# Measurements


def _measurement() -> Any:
    from nas.measure.measurement import Measurement

    return Measurement(
        images_per_s=100.0,
        images_per_s_lo=90.0,
        images_per_s_hi=110.0,
        ratio=1.5,
        ratio_lo=1.4,
        ratio_hi=1.6,
        reference_images_per_s=66.0,
        coverage=0.95,
        blocks=10,
        passes=3,
        seconds=1.0,
        img_size=32,
        num_classes=3,
        in_chans=3,
        batch=16,
        dtype="float32",
        runtime="eager",
        device="cpu",
        threads=1,
        fingerprint="f" * 12,
        load=0.5,
        when="2025-01-01T00:00:00",
    )


def _measurement_seeds() -> list[bytes]:
    from nas.measure.measurement_table import HEADER, MeasurementRow, format_row

    rows = [MeasurementRow("gate", f"k{at}", "a, b", "seed", _measurement()) for at in range(2)]
    return [f"{HEADER}\n{''.join(format_row(row) + chr(10) for row in rows)}".encode()]


def _measurements(path: Path) -> object:
    from nas.measure.measurement_table import read_measurements

    return read_measurements(path)


def _measurement_line(data: bytes, folder: Path) -> object:
    """Read a row whose checksum fits, whatever it says: the parser behind the checksum."""
    import zlib

    from nas.measure.measurement_table import HEADER, read_measurements

    body = data.replace(b"\n", b" ")
    path = folder / "m.csv"
    path.write_bytes(HEADER.encode() + b"\n" + body + b",%08x\n" % zlib.crc32(body))
    return read_measurements(path)


def _device_seeds() -> list[bytes]:
    from nas.measure.device_rows import DeviceRow, fingerprint_columns, write_rows
    from nas.measure.fingerprint import Fingerprint

    family = get_family("tinyvit")
    where = Fingerprint(
        device="cpu",
        device_name="c",
        physical_cores=1,
        logical_cores=2,
        usable_cpus=2.0,
        nominal_mhz=None,
        driver=None,
        cuda=None,
        cudnn=None,
        torch="2",
        timm="1",
        python="3",
        os="Linux",
        arch="x",
        threads=1,
        runtime="eager",
        runtime_version="2",
        dtype="float32",
        batch=16,
        img_size=32,
    )
    arch = family.arch(ARCHS["tinyvit"])
    row = DeviceRow(
        arch="=a",
        family="tinyvit",
        key=family.key(arch, CONTEXT),
        spec=json.dumps(ARCHS["tinyvit"]),
        img_size=32,
        num_classes=3,
        device="cpu",
        runtime="eager",
        dtype="float32",
        batch=16,
        threads=1,
        state="ok",
        images_per_s=100.0,
        images_per_s_lo=90.0,
        images_per_s_hi=110.0,
        **fingerprint_columns(where),
    )
    bad = replace(row, arch="b", state="failed", reason="-out of memory", images_per_s=None)
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder) / "d.csv", [row, bad])
        return [(Path(folder) / "d.csv").read_bytes()]


def _device(path: Path) -> object:
    from nas.measure.device_rows import read_rows
    from nas.measure.device_table import DeviceTable
    from space.errors import InputError

    rows = read_rows(path, "--device-table")
    family = get_family("tinyvit")
    try:
        DeviceTable([path], family, CONTEXT, family.arch(ARCHS["tinyvit"]))
    except InputError:
        return rows  # a table of other networks
    return rows


def _bundle_seeds() -> list[bytes]:
    network = {
        "arch": "a",
        "family": "timm",
        "key": "a",
        "spec": "",
        "img_size": 32,
        "num_classes": 3,
        "params": 7,
        "macs": None,
        "batch": 1,
        "file": "a.onnx",
        "reference": True,
    }
    return both({"networks": [network, {**network, "reference": False, "arch": "b"}]})


def _bundle(path: Path) -> object:
    from nas.measure.bundle import _networks

    return _networks(path.parent)


# Labels, teachers, tensors


def _spec() -> Any:
    from nas.data.augment.spec import AugmentSpec
    from nas.labels.store import StoreSpec

    spec = AugmentSpec(img_size=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return StoreSpec(
        topk=2,
        augment=spec,
        salt=1,
        codec="plain",
        preparation="p",
        train_keys="t",
        train_images=3,
        holdout_keys="h",
        holdout_images=2,
        teacher_id="i",
        teacher_hash="x",
        num_classes=5,
        threads=1,
    )


def _manifest_seeds() -> list[bytes]:
    from nas.data.sealed_files import digest_of
    from nas.labels.store import SCHEMA, identity, library_versions

    spec, libraries = _spec(), library_versions()
    return both(
        {
            "schema": SCHEMA,
            "spec": spec.to_dict(),
            "libraries": libraries,
            "epochs": 1,
            "shard_records": 512,
            "id": digest_of(identity(spec, libraries)),
            "files": {"keys.bin": "0" * 64},
            "made_by": {},
        }
    )


def _manifest(path: Path) -> object:
    from nas.labels.store import load_store

    for name, images in (("keys.bin", 3), ("holdout-keys.bin", 2)):
        (path.parent / name).write_bytes(bytes(16 * images))
    return load_store(path.parent)


def _shard_seeds() -> list[bytes]:
    import numpy as np

    from nas.labels.store import shards_of, with_checksum

    (shard,) = shards_of(0, 3, 512)
    return [with_checksum(shard, "0" * 32, np.arange(12, dtype=np.uint8).reshape(3, 4))]


def _shard(path: Path) -> object:
    from nas.labels.store import damaged, map_shard, shards_of

    (shard,) = shards_of(0, 3, 512)
    try:
        return map_shard(path, shard, "0" * 32, 4).copy()
    except (OSError, ValueError) as error:  # as `LabelStore.map` does
        raise damaged(path.parent, error) from None


def _dropped(data: bytes, folder: Path) -> object:
    from nas.labels.store import read_dropped

    return read_dropped(data)


def _head_map(path: Path) -> object:
    from nas.inherit.checkpoint_start import read_head_map

    return read_head_map(path, 4)


def _order(path: Path) -> object:
    from nas.inherit.importance import load_order

    return load_order(path)


def _teacher_seeds() -> list[bytes]:
    from nas.export.trained_teacher import SCHEMA, TeacherInfo

    info = TeacherInfo(
        folder="f",
        id="t",
        digest="d",
        model="test_vit",
        kwargs={},
        num_classes=3,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        input_size=None,
        student_mean=(0.5,) * 3,
        student_std=(0.5,) * 3,
        epochs=1,
        holdout_top1=0.5,
        holdout_top1_se=0.1,
        holdout_images=4,
        notes=(),
    )
    return both({"schema": SCHEMA, "recipe": {}, "info": asdict(info)})


def _teacher(path: Path) -> object:
    from nas.export.trained_teacher import read_teacher as _read

    return _read(path.parent)


def _hub_seeds() -> list[bytes]:
    return [
        json_of(
            {
                "architecture": "test_vit",
                "num_classes": 3,
                "model_args": {"img_size": 32},
                "pretrained_cfg": {
                    "input_size": [3, 32, 32],
                    "mean": [0.5] * 3,
                    "std": [0.5] * 3,
                    "num_classes": 3,
                },
            }
        )
    ]


def _hub(path: Path) -> object:
    from nas.transfer.backbone import _described

    (path.parent / "model.safetensors").write_bytes(WEIGHTS)
    return _described(path.parent, path.parent, None)


def _sealed_or_not(whole: bytes) -> list[bytes]:
    """Give a safetensors file with its seal and without."""
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    del header["__metadata__"][SEAL]
    text = json.dumps(header).encode()
    return [whole, struct.pack("<Q", len(text)) + text + whole[8 + length :]]


def _tensor_seeds() -> list[bytes]:
    import torch

    from nas.export.weights import weights_bytes

    state = {"a": torch.arange(4.0), "b": torch.ones(2, 2, dtype=torch.int64)}
    return _sealed_or_not(weights_bytes(state, {"epoch": "2"}))


def _tensors(path: Path) -> object:
    from nas.core.seals import load_arrays
    from nas.export.weights import load_checkpoint, load_weights, read_metadata

    return load_weights(path), read_metadata(path), load_checkpoint(str(path)), load_arrays(path)


def _pickle_seeds() -> list[bytes]:
    import torch

    out = []
    for legacy in (False, True):
        file = io.BytesIO()
        state = {"state_dict": {"module.a": torch.arange(3.0)}}
        torch.save(state, file, _use_new_zipfile_serialization=not legacy)
        # The older format names a storage by its address.
        out.append(re.sub(rb"\d{13,16}", lambda at: b"1" * len(at[0]), file.getvalue()))
    return out


def _pickled(path: Path) -> object:
    from nas.export.weights import load_checkpoint

    return load_checkpoint(str(path))


def _tiny() -> tuple[Any, Any]:
    import torch

    torch.manual_seed(1)
    model = torch.nn.Linear(2, 2)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


@cache
def _checkpoint_seeds_once() -> bytes:
    import tempfile

    import torch

    from nas.train.checkpoint import Position, save_checkpoint

    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        model, optimizer = _tiny()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        path = Path(folder) / "c.safetensors"
        save_checkpoint(path, model, optimizer, Position(1, {"a": 1}, {"rows": []}))
        return path.read_bytes()


def _checkpoint_seeds() -> list[bytes]:
    return _sealed_or_not(_checkpoint_seeds_once())


def _checkpoint(path: Path) -> object:
    import torch

    from nas.train.checkpoint import load_checkpoint_into

    with torch.random.fork_rng(devices=[]):
        model, optimizer = _tiny()
        return load_checkpoint_into(path, model, optimizer, {"a": 1})


FILES = (
    Parser("measurements", _measurement_seeds, file_of("measurements.csv", _measurements)),
    Parser(
        "measurement-line",
        lambda: [_measurement_seeds()[0].split(b"\n")[1].rpartition(b",")[0]],
        _measurement_line,
    ),
    Parser("device-table", _device_seeds, file_of("device.csv", _device)),
    Parser("bundle", _bundle_seeds, file_of("networks.json", _bundle)),
    Parser("manifest", _manifest_seeds, file_of("manifest.json", _manifest)),
    Parser("shard", _shard_seeds, file_of("00000.bin", _shard)),
    Parser("dropped", lambda: [b"key,name\n" + b"0" * 32 + b",'=a.png\n"], _dropped),
    Parser("head-map", lambda: [b"0\n-1\n2\n1\n"], file_of("map.txt", _head_map)),
    Parser(
        "order",
        lambda: both({"criterion": "l1", "order": {"a": [2, 0, 1]}}),
        file_of("order.json", _order),
    ),
    Parser("teacher", _teacher_seeds, file_of("info.json", _teacher)),
    Parser("hub", _hub_seeds, file_of("config.json", _hub)),
    Parser("tensors", _tensor_seeds, file_of("w.safetensors", _tensors)),
    Parser("pickle", _pickle_seeds, file_of("w.pt", _pickled)),
    Parser("checkpoint", _checkpoint_seeds, file_of("c.safetensors", _checkpoint)),
)
