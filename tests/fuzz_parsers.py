"""Every reader of a file or text that a user may bring, with valid inputs to begin from.

Images and `study.db` have tests of their own.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from synthetic_run import decided

from benchmarks.faults.references import ARCH as TINYVIT
from benchmarks.faults.references import VIT
from benchmarks.pareto import read_series
from benchmarks.throughput.networks import find_nets
from nas.contract.final import read_result
from nas.contract.proxy_check import named_archs
from nas.contract.replay import earlier_config, read_models
from nas.core.config import RunConfig, parse_count
from nas.core.dataclass_json import to_json
from nas.core.io import digest_of, load_arrays
from nas.core.requirement import Setting, parse_requirement, parse_setting
from nas.core.settings import parse_share
from nas.core.table import format_table
from nas.data.augment.spec import AugmentSpec
from nas.export import teacher_net
from nas.export.load import find_network
from nas.export.save import model_json
from nas.export.weights import load_weights, read_metadata, weights_bytes
from nas.inherit.importance import load_order
from nas.inherit.slice import read_head_map
from nas.labels import store
from nas.measure.bundle import read_networks
from nas.measure.device_table import DeviceRow, DeviceTable, fingerprint_columns, read_rows, write_rows
from nas.measure.fingerprint import Fingerprint
from nas.measure.measurement import Measurement, Throughput
from nas.measure.measurement_table import MeasurementRow, read_measurements
from nas.report.read import RunFiles
from nas.report.text import status_lines
from nas.train.checkpoint import Position, load_checkpoint_into, save_checkpoint
from nas.train.folder import TrainFolder
from nas.train.recipe import find_recipe
from nas.train.train_config import TrainConfig, read_config
from nas.transfer.backbone import _described
from space import Context, get_family
from space.errors import InputError
from space.freeze import freeze

FAMILY, CONTEXT = get_family("tinyvit"), Context(32, 3)
ARCH = FAMILY.arch(TINYVIT)
WEIGHTS = b"no weights, but a file"
THIRD = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Parser:
    """A reader: `read(data, folder)` has the bytes and a scratch folder of its own, and returns a value or raises
    InputError. `seeds` returns valid inputs."""

    name: str
    seeds: Callable[[], list[bytes]]
    read: Callable[[bytes, Path], object]


PARSERS: list[Parser] = []


def json_of(value: Any) -> bytes:
    return json.dumps(value).encode()


def of_file(name: str, file: str, seeds: Callable[[], list[bytes]]) -> Callable[[Callable[[Path], object]], None]:
    """Register a reader of a file, which is called with the file's path."""

    def register(read: Callable[[Path], object]) -> None:
        def work(data: bytes, folder: Path) -> object:
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            return read(path)

        PARSERS.append(Parser(name, seeds, work))

    return register


def of_text(name: str, seeds: list[bytes], read: Callable[[str], object]) -> None:
    """Register a reader of a text."""
    PARSERS.append(Parser(name, lambda: list(seeds), lambda b, _: read(b.decode("utf-8", "surrogateescape"))))


# Archs, recipes, words

NAMED = [json_of({"family": f, "arch": a}) for f, a in (("tinyvit", TINYVIT), ("vit", VIT))]
of_file("arch", "arch.json", lambda: [*NAMED, json_of(TINYVIT)])(lambda p: find_network(p, "--arch").arch())
of_text(
    "inline-arch", [json_of(TINYVIT)], lambda text: find_nets([text if text.startswith("{") else "{" + text], FAMILY)
)

FINALIST = {"arch": TINYVIT, "label": "a", "predicted_ratio": [1.0, 0.9, 1.1]}
of_file("finalists", "finalists.json", lambda: [json_of({"family": "tinyvit", "finalists": [FINALIST]})])(
    lambda path: find_nets([str(path)], FAMILY)
)


def recipe_seeds() -> list[bytes]:
    values = find_recipe("small", 5_000_000).to_dict()
    return [json_of(values), json_of({"config": {"recipe": values}})]


of_file("recipe", "recipe.json", recipe_seeds)(lambda path: find_recipe(str(path), 5_000_000))
of_text(
    "override",
    [b"epochs=3\nlr=1e-3", b"policy=none\nclip-norm=off"],
    lambda text: find_recipe("small", 5_000_000, text.split("\n")),
)


def words(text: str) -> object:
    """Read the same text as each kind of word that a flag may hold."""
    found: list[object] = []
    for parse in (
        lambda: parse_count("--target-params", text),
        lambda: parse_share("--max-corrupt", text),
        lambda: parse_setting("--require", text, dtype="float32", batch=16),
        lambda: parse_requirement(text, dtype="float32", batch=16),
        lambda: freeze(FAMILY, ARCH, [text]),
    ):
        with contextlib.suppress(InputError):
            found.append(parse())
    if not found:
        raise InputError("got text that no flag takes")
    return found


WORDS = [
    *(b"5.4M", b"1%", b"cuda:0:onnxruntime:float16:b8", b"images_per_s>=10.5@cpu:b4"),
    *(b"params<=5M", b"depths[2]", b"mlp_ratio", b"latency_p99_ms<=5@cpu"),
]
of_text("words", WORDS, words)

# A run's files


def run_seeds() -> list[bytes]:
    require = ("images_per_s>=100@cpu:b16",)
    config = RunConfig(seed="5M", target_params=4_000_000, seed_arch=TINYVIT, require=require)
    return [json_of({"schema": 1, "config": config.to_dict(), "dataset": {"fingerprint": "f"}})]


of_file("run", "run.json", run_seeds)(lambda path: earlier_config(path.parent))
POINTS = b"name,params,images_per_s,score,score_lo\na,5,1.5,0.5,0.4\n"
of_file("points", "points.csv", lambda: [POINTS])(read_series)


@of_file("result", "result.json", lambda: [json_of(RESULT)])
def result(path: Path) -> object:
    found = read_result(path)
    trials, steps = decided(1)
    run = json.loads(run_seeds()[0])
    status_lines(RunFiles(path.parent, run, tuple(trials), tuple(steps), found, {}))
    return found


RESULT = {"status": "reached", "exit_code": 0, "message": "done", "path": ["a"]}


def best_seeds() -> list[bytes]:
    preprocessing = {"crop_pct": 0.9, "interpolation": "bicubic", "mean": THIRD, "std": THIRD}
    value = model_json(
        FAMILY,
        ARCH,
        CONTEXT,
        classes=["a", "b", "c"],
        sha256=hashlib.sha256(WEIGHTS).hexdigest(),
        score={"step": 1, "soft_loss": 0.5, "soft_loss_se": 0.1},
        throughput={"images_per_s": 100.0, "ratio": 1.5},
        preprocessing=preprocessing,
    )
    return [json_of(value)]


@of_file("best", "best.json", best_seeds)
def best(path: Path) -> object:
    path.with_suffix(".safetensors").write_bytes(WEIGHTS)
    left = find_network(path, "MODEL").saved()
    return left, left.classes, left.preprocessing, left.timm_call


@of_file("milestone", "models/01-7.json", best_seeds)
def milestone(path: Path) -> object:
    path.with_suffix(".safetensors").write_bytes(WEIGHTS)
    return read_models(path.parent.parent, FAMILY)


def train_seeds() -> list[bytes]:
    recipe = find_recipe("small", 5_000_000)
    config = TrainConfig(family="vit", arch=VIT, arch_from="a.json", data="digits", recipe=recipe)
    return [json_of({"config": config.to_dict(), "machine": {"threads": 1}})]


of_file("train", "train.json", train_seeds)(
    lambda path: read_config(TrainFolder(path.parent).read_settings()["config"])
)
of_file("train-result", "result.json", lambda: [json_of({"status": "finished", "test_top1": 0.5})])(
    lambda path: TrainFolder(path.parent).read_result()
)
of_file("proxy-check", "proxy_check.json", lambda: [json_of({"archs": [TINYVIT] * 2})])(
    lambda path: [FAMILY.arch(arch) for arch in named_archs(path.parent, 2) or ()]
)

# Measurements


def any_values(kind: Any, **own: Any) -> dict[str, Any]:
    """Return values for the fields of a dataclass without a default: numbers are 1, texts a."""
    kinds = {"int": 1, "float": 1.0, "str": "a"}
    needed = [f for f in fields(kind) if f.default is MISSING]
    return {f.name: kinds.get(str(f.type).split(" ")[0]) for f in needed} | own


def measurement_seeds() -> list[bytes]:
    shape = {"img_size": 32, "num_classes": 3, "in_chans": 3, "batch": 16, "threads": 1}
    how = {"dtype": "float32", "runtime": "eager", "device": "cpu", "fingerprint": "f" * 12}
    own = {"ratio": 1.0, "images_per_s_lo": 0.9, "images_per_s_hi": 1.1, "ratio_lo": 0.9, "ratio_hi": 1.1}
    when = {"when": "2025-01-01T00:00:00", "coverage": 0.95, "blocks": 10, "visits": 4}
    one = Measurement(**any_values(Measurement, **shape, **how, **own, **when))
    rows = [MeasurementRow("gate", f"k{at}", "a, b", "seed", one) for at in range(2)]
    return [format_table(rows, MeasurementRow).encode()]


of_file("measurements", "measurements.csv", measurement_seeds)(read_measurements)


def device_seeds() -> list[bytes]:
    own: dict[str, Any] = {"dtype": "float32", "batch": 16, "img_size": 32, "threads": 1}
    own |= {"device": "cpu", "runtime": "eager", "runtime_version": "2"}
    where = Fingerprint(**any_values(Fingerprint, **own))
    row = DeviceRow(
        arch="=a",
        family="tinyvit",
        key=FAMILY.key(ARCH, CONTEXT),
        spec=json.dumps(TINYVIT),
        img_size=32,
        num_classes=3,
        setting=Setting("cpu", "eager", "float32", 16),
        threads=1,
        state="ok",
        throughput=Throughput(**any_values(Throughput, images_per_s_lo=0.9, images_per_s_hi=1.1, coverage=0.95)),
        **fingerprint_columns(where),
    )
    bad = replace(row, arch="b", state="failed", reason="-out of memory", throughput=None)
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder) / "d.csv", [row, bad])
        return [(Path(folder) / "d.csv").read_bytes()]


@of_file("device-table", "device.csv", device_seeds)
def device_table(path: Path) -> object:
    rows = read_rows(path, "--device-table")
    try:
        DeviceTable([path], FAMILY, CONTEXT, ARCH)
    except InputError:
        return rows  # a table of other networks
    return rows


NETWORK = {"arch": "a", "family": "timm", "key": "a", "spec": "", "file": "a.onnx"}
NETWORK |= {"img_size": 32, "num_classes": 3, "params": 7, "macs": None, "batch": 1}
PAIR = [{**NETWORK, "reference": True}, {**NETWORK, "reference": False, "arch": "b"}]


of_file("bundle", "networks.json", lambda: [json_of({"networks": PAIR})])(lambda path: read_networks(path.parent))

# Labels, teachers, tensors


def manifest_seeds() -> list[bytes]:
    augment = AugmentSpec(img_size=16, mean=THIRD, std=THIRD)
    own = {"topk": 2, "augment": augment, "codec": "plain", "classes": tuple("abcde")}
    own |= {"train_images": 3, "holdout_images": 2}
    spec = store.StoreSpec(**any_values(store.StoreSpec, **own))
    libraries = store.library_versions()
    return [
        json_of(
            {
                "schema": store.SCHEMA,
                "spec": to_json(spec),
                "libraries": libraries,
                "epochs": 1,
                "shard_records": 512,
                "id": digest_of(store.identity(spec, libraries)),
                "files": {"keys.bin": "0" * 64},
                "made_by": {},
            }
        )
    ]


@of_file("manifest", "manifest.json", manifest_seeds)
def manifest(path: Path) -> object:
    for name, images in (("keys.bin", 3), ("holdout-keys.bin", 2)):
        (path.parent / name).write_bytes(bytes(16 * images))
    return store.load_store(path.parent)


(SHARD,) = store.shards_of(0, 3, 512)


def shard_seeds() -> list[bytes]:
    return [store.with_checksum(SHARD, "0" * 32, np.arange(12, dtype=np.uint8).reshape(3, 4))]


@of_file("shard", "00000.bin", shard_seeds)
def shard(path: Path) -> object:
    try:
        return store.map_shard(path, SHARD, "0" * 32, 4).copy()
    except (OSError, ValueError) as error:  # as `LabelStore.map` does
        raise store.damaged(path.parent, error) from None


DROPPED = b"key,name\n" + b"0" * 32 + b",'=a.png\n"
of_file("dropped", "dropped.csv", lambda: [DROPPED])(lambda path: store.read_dropped(path.read_bytes()))
of_file("head-map", "map.txt", lambda: [b"0\n-1\n2\n1\n"])(lambda p: read_head_map(p, 4))
ORDER = json_of({"criterion": "l1", "order": {"a": [2, 0, 1]}})
of_file("order", "order.json", lambda: [ORDER])(load_order)


def teacher_seeds() -> list[bytes]:
    own = {"model": "test_vit", "kwargs": {}, "classes": tuple("abc"), "notes": (), "input_size": None}
    own |= dict.fromkeys(("mean", "std", "student_mean", "student_std"), THIRD)
    info = teacher_net.TeacherInfo(**any_values(teacher_net.TeacherInfo, **own))
    return [json_of({"schema": teacher_net.SCHEMA, "recipe": {}, "info": asdict(info)})]


of_file("teacher", "info.json", teacher_seeds)(lambda path: teacher_net.read_teacher(path.parent))


def hub_seeds() -> list[bytes]:
    own = {"input_size": [3, 32, 32], "mean": THIRD, "std": THIRD, "num_classes": 3}
    model = {"architecture": "test_vit", "num_classes": 3, "model_args": {"img_size": 32}}
    return [json_of({**model, "pretrained_cfg": own})]


@of_file("hub", "config.json", hub_seeds)
def hub(path: Path) -> object:
    (path.parent / "model.safetensors").write_bytes(WEIGHTS)
    return _described(path.parent, path.parent, None)


def tensor_seeds() -> list[bytes]:
    state = {"a": torch.arange(4.0), "b": torch.ones(2, 2, dtype=torch.int64)}
    return [weights_bytes(state, {"epoch": "2"})]


of_file("tensors", "w.safetensors", tensor_seeds)(
    lambda p: (load_weights(p), read_metadata(p), find_network(p, "--init").weights(), load_arrays(p))
)


def pickle_seeds() -> list[bytes]:
    out = []
    for legacy in (False, True):
        file = io.BytesIO()
        state = {"state_dict": {"module.a": torch.arange(3.0)}}
        torch.save(state, file, _use_new_zipfile_serialization=not legacy)
        # The older format names a storage by its address.
        out.append(re.sub(rb"\d{13,16}", lambda at: b"1" * len(at[0]), file.getvalue()))
    return out


of_file("pickle", "w.pt", pickle_seeds)(lambda path: find_network(path, "--init").weights())


def tiny() -> tuple[Any, Any]:
    torch.manual_seed(1)
    model = torch.nn.Linear(2, 2)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


@cache
def checkpoint_bytes() -> bytes:
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        model, optimizer = tiny()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        path = Path(folder) / "c.safetensors"
        save_checkpoint(path, model, optimizer, Position(1, {"a": 1}, {"rows": []}))
        return path.read_bytes()


@of_file("checkpoint", "c.safetensors", lambda: [checkpoint_bytes()])
def checkpoint(path: Path) -> object:
    with torch.random.fork_rng(devices=[]):
        model, optimizer = tiny()
        return load_checkpoint_into(path, model, optimizer, {"a": 1})
