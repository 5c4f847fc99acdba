"""Every reader of a file or text that a user may bring, with valid inputs to begin from."""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from space import Context, get_family
from space.seal import SEAL, sealed

ARCHS: dict[str, Mapping[str, Any]] = {
    "tinyvit": {
        "embed_dims": [64, 64, 96, 128], "depths": [1, 1, 2, 1], "window_sizes": [7, 14, 7],
        "mbconv_expand_ratio": 4.0, "mlp_ratio": 4.0, "head_dim": 32,
    },
    "vit": {
        "embed_dim": 32, "depth": 2, "head_dim": 16, "mlp_ratio": 2.0, "patch_size": 8,
        "dist_token": False,
    },
}  # fmt: skip
CONTEXT = Context(32, 3)


@dataclass(frozen=True)
class Parser:
    """A reader under a name: `read(data, folder)` has the bytes and a scratch folder of its own;
    it gives a value or raises InputError. `seeds` are valid inputs."""

    name: str
    seeds: Callable[[], list[bytes]]
    read: Callable[[bytes, Path], object]


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _both(value: Mapping[str, Any]) -> list[bytes]:
    """Give an object with its seal and without: a fuzzer gets past the second alone."""
    return [_json(sealed(value)), _json(value)]


def _file(name: str, read: Callable[[Path], object]) -> Callable[[bytes, Path], object]:
    """Have a reader of files read the bytes under a name."""

    def work(data: bytes, folder: Path) -> object:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return read(path)

    return work


# Archs, recipes, words


def _arch_seeds() -> list[bytes]:
    found = []
    for family, arch in ARCHS.items():
        found += _both({"family": family, "arch": arch})
    return [*found, _json(ARCHS["tinyvit"])]


def _arch(path: Path) -> object:
    from nas.train_flags import resolve_arch

    return resolve_arch(str(path), None)


def _inline(data: bytes, folder: Path) -> object:
    from benchmarks.throughput_nets import find_nets

    text = _text(data)
    return find_nets([text if text.startswith("{") else "{" + text], get_family("tinyvit"))


def _finalists(path: Path) -> object:
    from benchmarks.throughput_nets import find_nets

    return find_nets([str(path)], get_family("tinyvit"))


def _finalist_seeds() -> list[bytes]:
    listed = [{"arch": ARCHS["tinyvit"], "label": "a", "predicted_ratio": [1.0, 0.9, 1.1]}]
    return _both({"family": "tinyvit", "finalists": listed})


def _recipe_seeds() -> list[bytes]:
    from nas.training.recipe import find_recipe

    told = find_recipe("small", 5_000_000).to_dict()
    return [*_both(told), _json({"config": {"recipe": told}})]


def _recipe(path: Path) -> object:
    from nas.training.recipe import find_recipe

    return find_recipe(str(path), 5_000_000)


def _override(data: bytes, folder: Path) -> object:
    from nas.training.recipe import find_recipe

    return find_recipe("small", 5_000_000, _text(data).split("\n"))


def _words(data: bytes, folder: Path) -> object:
    """Read the same text as each kind of word that a flag may hold."""
    from nas.config import parse_count, parse_share
    from nas.requirement import parse_requirement, parse_setting
    from space.errors import InputError
    from space.freeze import freeze

    text, read, refused = _text(data), [], 0
    family = get_family("tinyvit")
    seed = family.arch(ARCHS["tinyvit"])
    for parse in (
        lambda: parse_count("--target-params", text),
        lambda: parse_share("--max-broken", text),
        lambda: parse_setting("--require", text, dtype="float32", batch=16),
        lambda: parse_requirement(text, dtype="float32", batch=16),
        lambda: freeze(family, seed, [text]),
    ):
        try:
            read.append(parse())
        except InputError:
            refused += 1
    if not read:
        raise InputError("got text that no flag takes")
    return read


# A run's files


def _run_seeds() -> list[bytes]:
    from nas.config import RunConfig

    config = RunConfig(seed="5M", target_params=4_000_000, seed_arch=ARCHS["tinyvit"],
                       require=("images_per_s>=100@cpu:b16",))  # fmt: skip
    return _both({"schema": 1, "config": config.to_dict(), "dataset": {"fingerprint": "f"}})


def _run(path: Path) -> object:
    from nas.resolve import earlier_config

    return earlier_config(path.parent)


def _cells(kind: Any, rows: list[dict[str, Any]]) -> bytes:
    from nas.cells import Writer

    out = io.StringIO(newline="")
    writer = Writer(out, [field.name for field in fields(kind)])
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def _ledger_seeds() -> list[bytes]:
    from nas.report.files import Candidate

    rows = [
        {"step": step, "key": f"k{step}", "params": 5_000_000 - step, "ratio": 1.5, "macs": 7,
         "soft_loss": 0.5, "stage": "kept", "state": "complete", "reason": "=cmd"}
        for step in (0, 1)
    ]  # fmt: skip
    return [_cells(Candidate, rows)]


def _step_seeds() -> list[bytes]:
    from nas.report.files import Step

    return [_cells(Step, [{"step": 1, "band_lo": 1, "incumbent": "k1", "soft_loss": 0.25}])]


def _tables(path: Path) -> object:
    from nas.report import status
    from nas.report.files import read_run

    (path.parent / "run.json").write_bytes(_run_seeds()[0])
    read = read_run(path.parent)
    status(path.parent)
    return read


def _named_points(path: Path) -> object:
    from benchmarks.pareto import read_series

    return read_series(path)


def _result_seeds() -> list[bytes]:
    return _both({"status": "reached", "exit_code": 0, "message": "done", "path": ["a"],
                  "tables": {}})  # fmt: skip


def _result(path: Path) -> object:
    from nas.finish import read_result

    _tables(path)
    return read_result(path)


_WEIGHTS = b"no weights, but a file"


def _best_seeds() -> list[bytes]:
    from nas.exporting.leave import model_json

    family = get_family("tinyvit")
    told = model_json(
        family, family.arch(ARCHS["tinyvit"]), CONTEXT, classes=["a", "b", "c"],
        sha256=hashlib.sha256(_WEIGHTS).hexdigest(), score={"step": 1, "soft_loss": 0.5},
        throughput={"images_per_s": 100.0},
        preprocessing={"crop_pct": 0.9, "interpolation": "bicubic", "mean": [0.5] * 3,
                       "std": [0.5] * 3},
    )  # fmt: skip
    return _both(told)


def _best(path: Path) -> object:
    from nas.exporting.model import left_by

    path.with_suffix(".safetensors").write_bytes(_WEIGHTS)
    left = left_by(path)
    return left, left.classes, left.preprocessing, left.call


def _milestone(path: Path) -> object:
    from nas.resolve import _milestones

    path.with_suffix(".safetensors").write_bytes(_WEIGHTS)
    return _milestones(path.parent.parent, get_family("tinyvit"))


def _train_seeds() -> list[bytes]:
    from nas.trainer.values import TrainConfig
    from nas.training.recipe import find_recipe

    config = TrainConfig(family="vit", arch=ARCHS["vit"], arch_from="a.json", data="digits",
                         recipe=find_recipe("small", 5_000_000))  # fmt: skip
    return _both({"config": config.to_dict(), "machine": {"threads": 1}})


def _train(path: Path) -> object:
    from nas.trainer.folder import Folder
    from nas.trainer.values import read_config

    return read_config(Folder(path.parent).told()["config"])


def _train_result(path: Path) -> object:
    from nas.trainer.folder import Folder

    return Folder(path.parent).result()


def _trust(path: Path) -> object:
    from nas.trust import named_archs

    family = get_family("tinyvit")
    return [family.arch(arch) for arch in named_archs(path.parent, 2) or ()]


def _trust_seeds() -> list[bytes]:
    return [*_both({"archs": [ARCHS["tinyvit"]] * 2}), _json([ARCHS["tinyvit"]] * 2)]


# Measurements


def _measurement() -> Any:
    from nas.measure.measurement import Measurement

    return Measurement(
        images_per_s=100.0, images_per_s_lo=90.0, images_per_s_hi=110.0, ratio=1.5, ratio_lo=1.4,
        ratio_hi=1.6, reference_images_per_s=66.0, coverage=0.95, blocks=10, passes=3, seconds=1.0,
        img_size=32, num_classes=3, in_chans=3, batch=16, dtype="float32", runtime="eager",
        device="cpu", threads=1, fingerprint="f" * 12, load=0.5, when="2025-01-01T00:00:00",
    )  # fmt: skip


def _measurement_seeds() -> list[bytes]:
    from nas.measure.table import HEADER, MeasurementRow, format_row

    rows = [MeasurementRow("gate", f"k{at}", "a, b", "seed", _measurement()) for at in range(2)]
    return [f"{HEADER}\n{''.join(format_row(row) + chr(10) for row in rows)}".encode()]


def _measurements(path: Path) -> object:
    from nas.measure.table import read_measurements

    return read_measurements(path)


def _measurement_line(data: bytes, folder: Path) -> object:
    """Read a row whose checksum fits, whatever it says: the parser behind the checksum."""
    import zlib

    from nas.measure.table import HEADER, read_measurements

    body = data.replace(b"\n", b" ")
    path = folder / "m.csv"
    path.write_bytes(HEADER.encode() + b"\n" + body + b",%08x\n" % zlib.crc32(body))
    return read_measurements(path)


def _device_seeds() -> list[bytes]:
    from nas.measure.fingerprint import Fingerprint
    from nas.measure.rows import DeviceRow, fingerprint_columns, write_rows

    family = get_family("tinyvit")
    where = Fingerprint(
        device="cpu", device_name="c", physical_cores=1, logical_cores=2, usable_cpus=2.0,
        nominal_mhz=None, driver=None, cuda=None, cudnn=None, torch="2", timm="1", python="3",
        os="Linux", arch="x", threads=1, runtime="eager", runtime_version="2", dtype="float32",
        batch=16, img_size=32,
    )  # fmt: skip
    arch = family.arch(ARCHS["tinyvit"])
    row = DeviceRow(
        arch="=a", family="tinyvit", key=family.key(arch, CONTEXT),
        spec=json.dumps(ARCHS["tinyvit"]),
        img_size=32, num_classes=3, device="cpu", runtime="eager", dtype="float32", batch=16,
        threads=1, state="ok", images_per_s=100.0, images_per_s_lo=90.0, images_per_s_hi=110.0,
        **fingerprint_columns(where),
    )  # fmt: skip
    bad = replace(row, arch="b", state="failed", reason="-out of memory", images_per_s=None)
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder) / "d.csv", [row, bad])
        return [(Path(folder) / "d.csv").read_bytes()]


def _device(path: Path) -> object:
    from nas.measure.device_table import DeviceTable
    from nas.measure.rows import read_rows
    from space.errors import InputError

    rows = read_rows(path, "--device-table")
    family = get_family("tinyvit")
    try:
        DeviceTable([path], family, CONTEXT, family.arch(ARCHS["tinyvit"]))
    except InputError:
        return rows  # a table of other networks
    return rows


def _bundle_seeds() -> list[bytes]:
    network = {"arch": "a", "family": "timm", "key": "a", "spec": "", "img_size": 32,
               "num_classes": 3, "params": 7, "macs": None, "batch": 1, "file": "a.onnx",
               "reference": True}  # fmt: skip
    return _both({"networks": [network, {**network, "reference": False, "arch": "b"}]})


def _bundle(path: Path) -> object:
    from nas.measure.bundled import _networks

    return _networks(path.parent)


# Labels, teachers, tensors


def _spec() -> Any:
    from nas.distill.augment import AugmentSpec
    from nas.distill.spec import StoreSpec

    spec = AugmentSpec(img_size=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return StoreSpec(topk=2, augment=spec, salt=1, codec="plain", preparation="p", train_keys="t",
                     train_images=3, holdout_keys="h", holdout_images=2, teacher_id="i",
                     teacher_hash="x", num_classes=5, threads=1)  # fmt: skip


def _manifest_seeds() -> list[bytes]:
    from nas.data.files import digest_of
    from nas.distill.spec import SCHEMA, identity, library_versions

    spec, libraries = _spec(), library_versions()
    return _both({"schema": SCHEMA, "spec": spec.to_dict(), "libraries": libraries, "epochs": 1,
                  "piece_records": 512, "id": digest_of(identity(spec, libraries)),
                  "files": {"keys.bin": "0" * 64}, "made_by": {}})  # fmt: skip


def _manifest(path: Path) -> object:
    from nas.data.files import digest_of, write_sealed
    from nas.distill.store import LabelStore, read_manifest

    for name, images in (("keys.bin", 3), ("holdout-keys.bin", 2)):
        (path.parent / name).write_bytes(bytes(16 * images))
    try:  # sealed as it comes, so that what is behind the seal is read too
        told = json.loads(path.read_bytes())
        if isinstance(told, dict):
            told.pop(SEAL, None)
            digest_of(told)
            write_sealed(path, told)
    except (ValueError, RecursionError):
        pass
    return LabelStore(path.parent, read_manifest(path.parent))


def _piece_seeds() -> list[bytes]:
    import numpy as np

    from nas.distill.pieces import pieces_of
    from nas.distill.pieces import sealed as sealed_piece

    (piece,) = pieces_of(0, 3, 512)
    return [sealed_piece(piece, "0" * 32, np.arange(12, dtype=np.uint8).reshape(3, 4))]


def _piece(path: Path) -> object:
    from nas.distill.pieces import map_piece, pieces_of
    from nas.distill.store import damaged

    (piece,) = pieces_of(0, 3, 512)
    try:
        return map_piece(path, piece, "0" * 32, 4).copy()
    except (OSError, ValueError) as error:  # as `LabelStore.map` does
        raise damaged(path.parent, error) from None


def _dropped(data: bytes, folder: Path) -> object:
    from nas.distill.store import read_dropped

    return read_dropped(data)


def _head_map(path: Path) -> object:
    from nas.trainer.start import read_head_map

    return read_head_map(path, 4)


def _order(path: Path) -> object:
    from nas.distill.importance import load_order

    return load_order(path)


def _teacher_seeds() -> list[bytes]:
    from nas.distill.teacher import SCHEMA, TeacherInfo

    info = TeacherInfo(
        folder="f", id="t", digest="d", model="test_vit", kwargs={}, num_classes=3,
        mean=(0.5,) * 3, std=(0.5,) * 3, input_size=None, student_mean=(0.5,) * 3,
        student_std=(0.5,) * 3, epochs=1, holdout_top1=0.5, holdout_top1_se=0.1, holdout_images=4,
        notes=(),
    )  # fmt: skip
    return _both({"schema": SCHEMA, "recipe": {}, "info": asdict(info)})


def _teacher(path: Path) -> object:
    from nas.distill.teacher import _read

    return _read(path.parent)


def _hub_seeds() -> list[bytes]:
    return [_json({"architecture": "test_vit", "num_classes": 3, "model_args": {"img_size": 32},
                   "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5] * 3,
                                      "std": [0.5] * 3, "num_classes": 3}})]  # fmt: skip


def _hub(path: Path) -> object:
    from nas.probing.backbone import _described

    (path.parent / "model.safetensors").write_bytes(_WEIGHTS)
    return _described(path.parent, path.parent, None)


def _tensor_seeds() -> list[bytes]:
    import torch

    from nas.training.weights import weights_bytes

    state = {"a": torch.arange(4.0), "b": torch.ones(2, 2, dtype=torch.int64)}
    whole = weights_bytes(state, {"epoch": "2"})
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    del header["__metadata__"][SEAL]
    text = json.dumps(header).encode()
    return [whole, struct.pack("<Q", len(text)) + text + whole[8 + length :]]


def _tensors(path: Path) -> object:
    from nas.seals import load_arrays
    from nas.training.weights import load_checkpoint, load_weights, read_metadata

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
    from nas.training.weights import load_checkpoint

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

    from nas.training.checkpoint import Position, save_checkpoint

    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        model, optimizer = _tiny()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        path = Path(folder) / "c.safetensors"
        save_checkpoint(path, model, optimizer, Position(1, {"a": 1}, {"rows": []}))
        return path.read_bytes()


def _checkpoint_seeds() -> list[bytes]:
    whole = _checkpoint_seeds_once()
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    del header["__metadata__"][SEAL]
    text = json.dumps(header).encode()
    return [whole, struct.pack("<Q", len(text)) + text + whole[8 + length :]]


def _checkpoint(path: Path) -> object:
    import torch

    from nas.training.checkpoint import load_checkpoint_into

    with torch.random.fork_rng(devices=[]):
        model, optimizer = _tiny()
        return load_checkpoint_into(path, model, optimizer, {"a": 1})


PARSERS = (
    Parser("arch", _arch_seeds, _file("arch.json", _arch)),
    Parser("inline-arch", lambda: [_json(ARCHS["tinyvit"])], _inline),
    Parser("finalists", _finalist_seeds, _file("finalists.json", _finalists)),
    Parser("recipe", _recipe_seeds, _file("recipe.json", _recipe)),
    Parser("override", lambda: [b"epochs=3\nlr=1e-3", b"policy=none\nclip-norm=off"], _override),
    Parser(
        "words",
        lambda: [
            b"5.4M", b"1%", b"cuda:0:onnxruntime:float16:b8", b"images_per_s>=10.5@cpu:b4",
            b"params<=5M", b"depths[2]", b"mlp_ratio", b"latency_p99_ms<=5@cpu",
        ],
        _words,
    ),
    Parser("run", _run_seeds, _file("run.json", _run)),
    Parser("ledger", _ledger_seeds, _file("ledger.csv", _tables)),
    Parser("steps", _step_seeds, _file("steps.csv", _tables)),
    Parser(
        "points", lambda: [b"name,params,images_per_s,score,score_lo\na,5,1.5,0.5,0.4\n"],
        _file("points.csv", _named_points),
    ),
    Parser("result", _result_seeds, _file("result.json", _result)),
    Parser("best", _best_seeds, _file("best.json", _best)),
    Parser("milestone", _best_seeds, _file("family/01-7.json", _milestone)),
    Parser("train", _train_seeds, _file("train.json", _train)),
    Parser(
        "train-result", lambda: _both({"status": "finished", "test_top1": 0.5}),
        _file("result.json", _train_result),
    ),
    Parser("trust", _trust_seeds, _file("trust.json", _trust)),
    Parser("measurements", _measurement_seeds, _file("measurements.csv", _measurements)),
    Parser(
        "measurement-line",
        lambda: [_measurement_seeds()[0].split(b"\n")[1].rpartition(b",")[0]],
        _measurement_line,
    ),
    Parser("device-table", _device_seeds, _file("device.csv", _device)),
    Parser("bundle", _bundle_seeds, _file("networks.json", _bundle)),
    Parser("manifest", _manifest_seeds, _file("manifest.json", _manifest)),
    Parser("piece", _piece_seeds, _file("00000.bin", _piece)),
    Parser("dropped", lambda: [b"key,name\n" + b"0" * 32 + b",'=a.png\n"], _dropped),
    Parser("head-map", lambda: [b"0\n-1\n2\n1\n"], _file("map.txt", _head_map)),
    Parser(
        "order", lambda: _both({"criterion": "l1", "order": {"a": [2, 0, 1]}}),
        _file("order.json", _order),
    ),
    Parser("teacher", _teacher_seeds, _file("info.json", _teacher)),
    Parser("hub", _hub_seeds, _file("config.json", _hub)),
    Parser("tensors", _tensor_seeds, _file("w.safetensors", _tensors)),
    Parser("pickle", _pickle_seeds, _file("w.pt", _pickled)),
    Parser("checkpoint", _checkpoint_seeds, _file("c.safetensors", _checkpoint)),
)  # fmt: skip
"""Images have a test of their own, `study.db` too."""
