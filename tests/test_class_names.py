"""Names of classes: what data may have, what stands beside weights, and heads without any."""

from __future__ import annotations

import importlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from label_cases import begun
from safetensors.torch import save_file
from train_cases import VIT, arch_file, evaluation, flags

from benchmarks.throughput.__main__ import DeviceBenchmark
from benchmarks.throughput.flags import parse_flags, plan_of
from nas.contract.checks import check_same_data, read_data
from nas.core.class_match import match_head
from nas.core.class_names import FILES, check_class_names, names_beside
from nas.core.config import RunConfig
from nas.core.io import read_json, write_json
from nas.core.progress import Console
from nas.data import Dataset, DataSpec, prepare
from nas.data import sources as readers
from nas.data.dataset import dataset_card
from nas.distill.label_store import build
from nas.distill.teacher import check_accuracy, make_teacher
from nas.export.load import find_network
from nas.export.teacher_net import in_class_order, load_teacher
from nas.export.weights import save_weights
from nas.inherit.check_files import check_teacher, check_weights
from nas.labels.build import begin_store, build_shards
from nas.labels.jobs import AskTeacherJob, ask_teacher
from nas.labels.request import LabelRequest
from nas.train import __main__ as train
from nas.transfer.__main__ import main as transfer
from space import Context, get_family
from space.errors import InputError
from tests.test_class_match import NAMES, ORDER, PERMUTED, hub, model_of
from tests.test_nas_data_layouts import lay

PREPARE = importlib.import_module("nas.data.prepare")
TEN = [f"kind {number}" for number in range(10)]


def files(folder: Path, name: str, value: object) -> Path:
    """Write weights of ten classes, and a file of names beside them."""
    folder.mkdir(exist_ok=True)
    save_weights(folder / "w.safetensors", timm.create_model("test_resnet", num_classes=10).state_dict())
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return folder / "w.safetensors"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("class_map.txt", "".join(f"{name}\r\n" for name in TEN)),
        ("classes.txt", "\ufeff" + "\n".join(TEN)),
        ("labels.txt", "".join(f"{at} {name}\n" for at, name in reversed([*enumerate(TEN)]))),
        ("w.json", {"classes": TEN}),
        ("class_names.json", TEN),
        ("labels.json", {"labels": TEN}),
        ("id2label.json", {str(at): name for at, name in reversed([*enumerate(TEN)])}),
        ("class_to_idx.json", {name: at for at, name in reversed([*enumerate(TEN)])}),
        ("class_indices.json", {str(at): [name, "a word"] for at, name in enumerate(TEN)}),
        ("config.json", {"label_names": TEN, "hidden": 3}),
        ("config.json", {"id2label": {str(at): name for at, name in reversed([*enumerate(TEN)])}}),
        ("config.json", {"pretrained_cfg": {"label_names": {str(at): name for at, name in enumerate(TEN)}}}),
    ],
)
def test_names_beside_weights_are_read_in_every_usual_form(name: str, value: object, tmp_path: Path) -> None:
    file = files(tmp_path / "w", name, value)
    assert name == "w.json" or name in FILES
    for named in (f"test_resnet:{file}", str(file)):
        assert find_network(named, "--teacher").classes == tuple(TEN), named


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("class_map.txt", "a\n\nb\n", "line 2 empty"),
        ("config.json", {"id2label": {"1": "a", "2": "b"}}, "from 0 on"),
        ("config.json", {"class_to_idx": {"a": 0, "b": 0}}, "from 0 on"),
        ("config.json", {"label_names": ["a", None]}, "a name for each class"),
        ("classes.json", "[", "w/classes.json"),
        ("classes.json", 3, "from 0 on"),
        ("labels.json", {"labels": {"1": "a", "2": "b"}}, "from 0 on"),
        ("classes.txt", "a\nb\n", "2 class names for a head of 10"),
    ],
)
def test_names_that_cannot_be_are_refused_in_one_line(name: str, value: object, words: str, tmp_path: Path) -> None:
    named = find_network(f"test_resnet:{files(tmp_path / 'w', name, value)}", "--teacher")
    with pytest.raises(InputError) as caught:
        match_head(named, 10, NAMES)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value", [{"id2label": {str(at): f"LABEL_{at}" for at in range(10)}}, {"classes": 10}, {"depth": 3}, {"seed": 0}]
)
def test_placeholders_and_other_settings_are_no_names(value: object, tmp_path: Path) -> None:
    for name in ("config.json", "w.json"):
        assert names_beside(files(tmp_path / name, name, value), "--init") is None


def test_a_file_of_names_permutes_a_teacher_and_first_weights(dataset: Dataset, tmp_path: Path) -> None:
    """`MODEL:FILE` and a bare file beside class_map.txt, as a folder of the hub does."""
    file = files(tmp_path / "w", "class_map.txt", "\n".join(PERMUTED))
    named = replace(dataset, classes=NAMES)
    found = find_network(f"test_resnet:{file}", "--teacher")
    info = make_teacher(found, named, tmp_path, random_seed=0, epochs=1, device="cpu", threads=1)
    assert "another order" in info.notes[0]


@given(st.text(min_size=1, max_size=6))
def test_a_name_that_data_may_have_survives_one_line_of_a_class_map(name: str) -> None:
    try:
        check_class_names((name, "other name"), "data")
    except InputError:
        return
    assert [line.strip() for line in f"{name}\n".splitlines()] == [name]  # as timm's reader does


@pytest.mark.parametrize("name", ["cat ", " cat", "a\tb", "a\nb", "a\u2028b", "\u00a0cat", ""])
def test_odd_names_of_folders_are_refused_when_the_data_is_read(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"class 0 .*names on one line"):
        check_class_names((name, "x"), "data")
    if name:
        root = lay(tmp_path / "d", "{a,b}*3")
        (root / "a").rename(root / name)
        with pytest.raises(InputError, match="rename the class"):
            prepare(DataSpec(str(root), img_size=16), tmp_path / "cache")


def test_names_that_are_one_after_normalisation_are_refused() -> None:
    with pytest.raises(InputError, match="classes 0 and 1 both called"):
        check_class_names(("caf\u00e9", "cafe\u0301"), "data")


def test_readers_number_the_names_that_two_classes_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchvision's ImageNet, whose classes are tuples of words and of which two are called crane."""
    from torchvision.datasets import FakeData

    def create(name: str, split: str, cache: Path) -> Any:
        made = FakeData(60, (3, 40, 40), 3, random_offset=0 if split == "train" else 10_000)
        made.classes = [("crane",), ("owl", "bird"), ("crane",)]  # type: ignore[attr-defined]
        return made

    monkeypatch.setattr(readers, "_create", create)
    dataset = prepare(DataSpec("torch/fake"), tmp_path)
    assert dataset.classes == ("crane (0)", "owl, bird", "crane (2)")
    assert any("told apart by their numbers: crane (0), crane (2)" in note for note in dataset.notes)


# Heads without names: one rule wherever weights meet data.
NUMBERS = ("1", "10", "2")


class Unnamed:
    name, flag, classes = "w.pth", "--init", None


@pytest.mark.parametrize(
    ("classes", "taken"),
    [
        *((("a", "b", "c"), True), (NUMBERS, False), (("a", "B"), True), (("B", "a"), False)),
        *((("01", "02", "10"), True), (("ship", "cat"), True), (tuple(map(str, range(12))), True)),
        (tuple(sorted(map(str, range(12)))), False),
    ],
)
def test_a_head_without_names_is_taken_in_order_only_where_orders_agree(classes: tuple[str, ...], taken: bool) -> None:
    """The letters' order, timm's, or a data set's own, which everybody who reads it shares."""
    if taken:
        match = match_head(Unnamed(), len(classes), classes)
        assert match.in_order
        assert f"taken in the order {classes[0]}, {classes[1]}" in match.describe()
        return
    with pytest.raises(InputError, match=r"--init: got w.pth, .* no names, .*timm counts .*; write class_map.txt"):
        match_head(Unnamed(), len(classes), classes)


def test_every_flag_asks_the_same_of_a_head_without_names(
    tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    family = get_family("vit")
    arch, ctx = family.arch(VIT), Context(32, 3)
    (tmp_path / "w").mkdir()
    state = family.build(arch, ctx).state_dict()
    save_file(state, tmp_path / "w" / "vit.safetensors")
    file = str(tmp_path / "w" / "vit.safetensors")
    torch.manual_seed(0)
    save_weights(tmp_path / "w" / "net.safetensors", timm.create_model("test_resnet", num_classes=3).state_dict())
    net = f"test_resnet:{tmp_path / 'w' / 'net.safetensors'}"
    asks: list[Callable[[], object]] = [
        lambda: check_weights(family, arch, ctx, file, "--init", NUMBERS),
        lambda: check_weights(family, arch, ctx, file, "--seed-weights", NUMBERS),
        lambda: check_teacher(net, NUMBERS),
    ]
    for ask in asks:
        with pytest.raises(InputError, match="timm counts 1, 2, 10"):
            ask()
    (tmp_path / "w" / "class_map.txt").write_text("1\n2\n10\n")
    for ask in asks:
        ask()
    root = lay(tmp_path / "d", "{1,10,2}*9")
    (tmp_path / "w" / "class_map.txt").unlink()
    monkeypatch.setattr(PREPARE, "cached", None)  # decoding would fail
    words = [*flags(tmp_path / "cache", arch_file(tmp_path), tmp_path / "out", "--init", file)]
    words[words.index("digits")] = str(root)
    assert train.main(words) == 2
    assert "timm counts 1, 2, 10" in capsys.readouterr().err


def test_weights_of_imagenet_by_timm_are_named_by_wordnet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of n02119789 and so on keeps its rows; 1,001 classes have no names."""
    for many, first in ((1000, "n01440764"), (1001, None), (10, None)):
        made = timm.create_model("test_resnet", num_classes=many)
        monkeypatch.setattr(timm, "create_model", lambda *_, made=made, **__: made)
        named = find_network("test_resnet.r160_in1k", "--init")
        named.weights()
        monkeypatch.undo()
        assert (named.classes or (None,))[0] == first
        if many == 1000:
            match = match_head(named, many, ("n01443537", "n01440764", "zebra"))
            assert match.rows == (1, 0, -1)
            assert "a new head" in match_head(named, many, ("tench", "goldfish")).describe()


# What goes on from an earlier start names the class that differs.
CHANGES: list[tuple[Any, str]] = [
    (lambda names: ("zero", *names[1:]), "class 0 'zero'"),
    (lambda names: (*names, "more"), "class 10 'more'"),
    (lambda names: names[:-1], "class 9 '9'"),
    (lambda names: (names[1], names[0], *names[2:]), "class 0 '1', of the same classes in another order"),
]


@pytest.mark.parametrize(("change", "words"), CHANGES)
def test_a_run_goes_on_only_with_its_classes(change: Any, words: str, dataset: Dataset) -> None:
    card = dataset_card(dataset)
    config = RunConfig(seed="x", target_params=1, family="vit")
    check_same_data(config, card, dataset)
    with pytest.raises(InputError, match=r"--data: got .*want .*the run") as caught:
        check_same_data(config, card, replace(dataset, classes=change(dataset.classes), fingerprint="other"))
    assert words in str(caught.value)


def test_a_run_matches_classes_before_it_decodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PREPARE, "cached", None)
    root = lay(tmp_path / "d", "{a,b,c}*9")
    config = RunConfig(seed="x", target_params=1, family="vit", data=str(root))
    with pytest.raises(InputError, match="class 2 'c', want the 3 classes of the run, class 2 'x'"):
        read_data(config, tmp_path, Console(quiet=True), {"class_names": ["a", "b", "x"]}, None)


@pytest.mark.parametrize("with_checkpoint", [True, False])
def test_a_training_goes_on_only_with_its_classes(
    with_checkpoint: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, cache, out = lay(tmp_path / "d", "{a,b,c}*9"), tmp_path / "cache", tmp_path / "out"
    words = flags(cache, arch_file(tmp_path), out, "--epochs", "1", "--set", "batch_size=6")
    words[words.index("digits")] = str(root)
    assert train.main(words) == 0
    assert read_json(out / "train.json", "")["dataset"]["class_names"] == ["a", "b", "c"]
    (out / "result.json").unlink()
    if not with_checkpoint:
        (out / "checkpoint.safetensors").unlink()
    (root / "b").rename(root / "bee")
    assert train.main(["--resume", str(out), "--cache-dir", str(cache), "--quiet"]) == 2
    told = capsys.readouterr().err
    assert "class 1 'bee', want the 3 classes of the training, class 1 'b'" in told
    assert told.count("\n") == 1


def test_a_store_goes_on_only_with_its_classes(dataset: Dataset, tmp_path: Path) -> None:
    begun(tmp_path / "s", dataset, epochs=1)
    root = lay(tmp_path / "d", "{a,b}*9")
    with pytest.raises(InputError, match="class 0 'a', want the 10 classes of the store, class 0 '0'"):
        build(str(root), out=tmp_path / "s", cache_dir=tmp_path / "cache", img_size=32)


# Teachers.
def test_a_teacher_at_chance_is_told_of_mirrored_images(dataset: Dataset, tmp_path: Path) -> None:
    found = find_network(str(hub(tmp_path / "hub", "test_resnet", NAMES, dataset)), "--teacher")
    named = replace(dataset, classes=NAMES)
    info = make_teacher(found, named, tmp_path, random_seed=0, epochs=1, device="cpu", threads=1)
    judged = replace(info, holdout_images=400, holdout_top1=0.1)
    match = match_head(found, 10, NAMES)
    for epochs, words in ((3, "--hflip 0"), (0, "its own training mirrored images")):
        with pytest.raises(InputError, match=words):
            check_accuracy(replace(judged, epochs=epochs), found, match, lambda: ["warning"])
        with pytest.raises(InputError) as caught:
            check_accuracy(replace(judged, epochs=epochs), found, match)
        assert "mirror" not in str(caught.value)


def test_a_store_is_verified_against_its_teacher_whatever_the_order_of_the_data(
    dataset: Dataset, tmp_path: Path
) -> None:
    net = find_network(str(hub(tmp_path / "hub", "test_resnet", dataset.classes, dataset)), "--teacher")
    options: dict[str, Any] = {"random_seed": 0, "epochs": 1, "device": "cpu", "threads": 1}
    info = make_teacher(net, dataset, tmp_path, **options)
    request = LabelRequest(epochs=1, topk=4)
    store = begin_store(tmp_path / "s", dataset, info, request, made_by={}, named=True)
    build_shards(store, dataset, load_teacher(info))
    folder = shutil.copytree(dataset.folder, tmp_path / "permuted")
    meta = read_json(folder / "meta.json", "")
    write_json(folder / "meta.json", {**meta, "classes": [dataset.classes[at] for at in ORDER]})
    permuted = replace(dataset, classes=tuple(dataset.classes[at] for at in ORDER))
    other = make_teacher(net, permuted, tmp_path, **options)
    assert other.digest != info.digest
    assert in_class_order(other, dataset.classes) == (info.digest, [ORDER.index(at) for at in range(10)])
    for teacher in (info, other):
        job = AskTeacherJob(
            store=tmp_path / "s", dataset=folder, teacher=Path(teacher.folder), device="cpu", records=8, random_seed=0
        )
        found = ask_teacher(job, lambda _: None)
        assert found["good"], found
        assert "another order" in found["notes"][0]


# Files are matched by what their headers say.
def test_weights_are_checked_by_their_headers_alone(tmp_path: Path) -> None:
    """A file of 1.6 GB is refused, or passed, at once: no weight is read."""
    family = get_family("vit")
    arch = family.arch(VIT)
    state = {key: list(t.shape) for key, t in family.build(arch, Context(32, 5)).state_dict().items()}
    for name, changes in (("good", {}), ("bad", {"blocks.0.mlp.fc1.weight": [20_000, 20_000]})):
        at, header = 0, {}
        for key, shape in {**state, **changes}.items():
            size = 4 * int(torch.Size(shape).numel())
            header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header).encode()
        with open(tmp_path / f"{name}.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + at)
    started = time.monotonic()
    check_weights(family, arch, Context(32, 5), str(tmp_path / "good.safetensors"), "--init", list("abcde"))
    with pytest.raises(InputError, match=r"fc1.weight is .20000, 20000. instead of"):
        check_weights(family, arch, None, str(tmp_path / "bad.safetensors"), "--init")
    assert time.monotonic() - started < 2


# Folders, wherever images are read.
def test_transfer_and_throughput_take_the_flags_of_folders(
    tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = lay(tmp_path / "d", "one/{0,1}*9 two/{0,1}*4")
    monkeypatch.setenv("VISION_CONTRACTION_CACHE", str(tmp_path / "cache"))
    model = model_of(tmp_path, dataset, ("1", "0", "x"), (0, 1, 2))
    by_hand = ["--splits", "train=one,test=two", "--max-test-images", "6"]
    assert transfer([str(model), "--data", str(root), "--checks", "knn", "--json", *by_hand]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"][0]["n"] == 6
    words = ["--arch", str(model), "--img-size", "32", "--num-classes", "3", "--accuracy-data", str(root)]
    nets, plan = plan_of(parse_flags([*words, *by_hand, "--reference", "none", "--quiet"], ""))
    bench = DeviceBenchmark(plan, Console(quiet=True))
    folder, rows = bench.match_data(nets[0], Context(32, 3))
    bench.close()
    assert rows == (1, 0), "by name, not by number"
    assert len(read_json(folder / "meta.json", "")["classes"]) == 2


def test_evaluation_names_the_unknown_class_before_it_decodes(
    tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_of(tmp_path, dataset, ("a", "b", "c"), (0, 1, 2))
    root = lay(tmp_path / "d", "{a,b,B_}*5")
    monkeypatch.setattr(PREPARE, "cached", None)
    words = evaluation(model, tmp_path)
    words[words.index("digits")] = str(root)
    assert train.main(words) == 2
    told = capsys.readouterr().err
    assert "1 classes (B_) that the model does not have" in told
