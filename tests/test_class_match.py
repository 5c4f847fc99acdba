"""Classes are matched by name wherever weights or labels meet data, never by their number alone."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from label_cases import built
from train_cases import TINY, VIT, arch_file, evaluation, flags

from nas.contract.checks import check_files
from nas.core.class_match import check_same_classes, match_classes
from nas.core.config import RunConfig
from nas.data import Dataset, DataSpec, prepare
from nas.distill.student import ParentNetwork, start_model
from nas.distill.teacher import make_teacher
from nas.export.load import find_network
from nas.export.save import write_model
from nas.export.teacher_net import load_teacher
from nas.export.weights import save_weights, weights_bytes
from nas.inherit.slice import load_initial_weights, load_seed_weights
from nas.labels import __main__ as labels
from nas.labels.reader import LabelReader, holdout_batches
from nas.labels.store import open_store
from nas.train import __main__ as train
from space import Context, get_family
from space.errors import InputError
from tests._inline import InlineExecutor

NAMES = tuple("abcdefghij")
ORDER = (3, 0, 2, 1, 9, 8, 7, 6, 5, 4)
PERMUTED = tuple(NAMES[at] for at in ORDER)


@given(st.lists(st.text(min_size=1), unique=True, max_size=12), st.randoms())
def test_a_match_finds_each_name_where_it_is_and_nothing_else(names: list[str], random: Any) -> None:
    have = [unicodedata.normalize("NFC", name) for name in names]
    have = list(dict.fromkeys(have))
    want = random.sample(have, len(have))
    match = match_classes([unicodedata.normalize("NFD", name) for name in have], want)
    assert [have[row] for row in match.rows] == want
    assert match.whole
    assert match.in_order == (have == want)
    assert (match.describe() == "") == match.in_order


@pytest.mark.parametrize(
    ("have", "want", "rows", "words"),
    [
        (("a", "b"), ("a", "b"), (0, 1), ""),
        (("a", "b"), ("b", "a"), (1, 0), "in another order"),
        (("a", "b", "c"), ("c", "x"), (2, -1), "1 of the data's 2 classes are kept by name (of its 3), 1 start fresh"),
        (("a", "b"), ("x", "y"), (-1, -1), "a new head (2 -> 2 classes), as none of its 2 class names"),
        (("Cat ", "dog"), ("cat", "dog"), (-1, 1), "not taken for the same: 'Cat ' and 'cat'"),
        (("ice_cream",), ("ice cream",), (-1,), "not taken for the same"),
        (("crane", "b", "crane"), ("crane", "b", "crane"), (0, 1, 2), ""),
        (("crane", "b", "crane"), ("b", "crane", "crane"), (1, -1, -1), "2 start fresh"),
        (None, ("a", "b"), (0, 1), "carry no names"),
        (None, ("a", "b", "c"), (-1, -1, -1), "a new head (2 -> 3 classes)"),
    ],
)
def test_what_is_not_the_same_is_described(
    have: tuple[str, ...] | None, want: tuple[str, ...], rows: tuple[int, ...], words: str
) -> None:
    match = match_classes(have, want, 2)
    assert match.rows == rows
    assert words in match.describe()
    assert bool(words) == bool(match.describe())


def test_two_sides_that_must_be_the_same_name_their_first_differing_classes() -> None:
    assert check_same_classes(NAMES, PERMUTED, "store", "").rows == ORDER
    with pytest.raises(InputError, match=r"got 3 classes, class 1 'dog', want the 3 .* class 2 'Dog' \('dog' differs"):
        check_same_classes(("cat", "dog", "owl"), ("cat", "owl", "Dog"), "store", "")


def test_stored_labels_follow_the_names_of_the_classes(dataset: Dataset, tmp_path: Path) -> None:
    """Equal pictures under renamed or reordered classes: permuted when read, or refused."""
    built(tmp_path / "s", dataset, epochs=1, topk=4)
    order = np.array(ORDER)
    classes = tuple(dataset.classes[at] for at in ORDER)
    other = replace(dataset, classes=classes)
    rows = np.arange(len(dataset.train))
    first, second = (LabelReader(d.train, open_store(tmp_path / "s", use=d), 8, 0) for d in (dataset, other))
    one, two = first.labels(0, rows), second.labels(0, rows)
    assert [[classes[i] for i in row] for row in two.index] == [[dataset.classes[i] for i in row] for row in one.index]
    assert np.array_equal(order[two.index], one.index)
    assert np.array_equal(one.prob, two.prob)
    assert first.notes == ()
    assert "another order" in second.notes[0]
    held = [next(holdout_batches(d, open_store(tmp_path / "s", use=d), 4)) for d in (dataset, other)]
    assert torch.equal(torch.from_numpy(order)[held[1].index], held[0].index)
    renamed = replace(dataset, classes=("zero", *dataset.classes[1:]))
    with pytest.raises(InputError, match=r"class 0 '0', want the 10 classes of the data, class 0 'zero'; "):
        open_store(tmp_path / "s", use=renamed)


@pytest.mark.parametrize("family_name", ["tinyvit", "vit"])
@pytest.mark.parametrize(
    ("classes", "rows", "words"),
    [
        (NAMES, tuple(range(10)), ""),
        (PERMUTED, ORDER, "another order"),
        (("x", "b", "a"), (-1, 1, 0), "2 of the data's 3 classes are kept by name (of its 10), 1 start fresh ('x')"),
        (tuple("klmnopqrst"), (-1,) * 10, "a new head (10 -> 10 classes)"),
    ],
)
def test_first_weights_follow_the_names_of_the_classes(
    family_name: str, classes: tuple[str, ...], rows: tuple[int, ...], words: str, tmp_path: Path
) -> None:
    """As `--init` and `--seed-weights` take them; of every head that a net has."""
    family = get_family(family_name)
    arch = family.arch(TINY if family_name == "tinyvit" else {**VIT, "dist_token": True})
    heads = ("head.fc",) if family_name == "tinyvit" else ("head", "head_dist")
    ctx = Context(32, len(classes))
    torch.manual_seed(1)
    file = tmp_path / "w.safetensors"
    state = family.build(arch, Context(32, 10)).state_dict()
    save_weights(file, state)
    file.with_suffix(".json").write_text(json.dumps({"classes": list(NAMES)}))
    fresh, _ = start_model(family, arch, ctx, random_seed=0)
    for flag in ("--init", "--seed-weights"):
        if flag == "--init":
            model, _ = start_model(family, arch, ctx, random_seed=0)
            note = load_initial_weights(model, family, arch, ctx, str(file), classes, resize="own", head_map=None)
        else:
            out = tmp_path / "adopted.safetensors"
            made_in, found, note = load_seed_weights(family, arch, ctx, str(file), out, classes)
            assert found == rows
            parent = ParentNetwork(arch=arch, weights=out, context=made_in, class_rows=found)
            model, _ = start_model(family, arch, ctx, random_seed=0, parent=parent)
        assert words in note, flag
        assert bool(words) == (", " in note)
        for key, value in model.state_dict().items():
            if key.rpartition(".")[0] not in heads:
                assert torch.equal(value, state[key]), key
                continue
            for at, row in enumerate(rows):
                want = state[key][row] if row >= 0 else fresh.state_dict()[key][at]
                assert torch.equal(value[at], want), (flag, key, at)


def test_weights_without_names_are_taken_in_order_and_it_is_said(tmp_path: Path) -> None:
    family, ctx = get_family("vit"), Context(32, 10)
    arch = family.arch(VIT)
    state = family.build(arch, ctx).state_dict()
    save_weights(tmp_path / "w.safetensors", state)
    model, _ = start_model(family, arch, ctx, random_seed=0)
    source = str(tmp_path / "w.safetensors")
    note = load_initial_weights(model, family, arch, ctx, source, PERMUTED, resize="own", head_map=None)
    assert "carry no names" in note
    assert torch.equal(model.state_dict()["head.weight"], state["head.weight"])
    (tmp_path / "w.json").write_text(json.dumps({"classes": ["a", "b"]}))
    with pytest.raises(InputError, match="2 class names for a head of 10"):
        load_initial_weights(model, family, arch, ctx, source, PERMUTED, resize="own", head_map=None)


def hub(folder: Path, model: str, names: tuple[str, ...], dataset: Dataset) -> Path:
    """Write a folder in timm's hub layout."""
    folder.mkdir()
    torch.manual_seed(5)
    save_weights(folder / "model.safetensors", timm.create_model(model, num_classes=len(names)).state_dict())
    cfg = {"input_size": [3, 32, 32], "mean": list(dataset.mean), "std": list(dataset.std)}
    config = {"architecture": model, "num_classes": len(names), "label_names": list(names), "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("model", ["test_resnet", "mobilenetv3_small_050"])
def test_a_teacher_follows_the_names_of_its_classes(model: str, dataset: Dataset, tmp_path: Path) -> None:
    """Permuted heads are kept and permuted; shared rows are kept and fine-tuned; another head is new."""
    named = replace(dataset, classes=NAMES)
    options: dict[str, Any] = {"random_seed": 0, "epochs": 1, "device": "cpu", "threads": 1}
    teacher = find_network(str(hub(tmp_path / "hub", model, PERMUTED, dataset)), "--teacher")
    plain = find_network(str(hub(tmp_path / "plain", model, NAMES, dataset)), "--teacher")
    images = torch.randn(4, 3, 32, 32)
    permuted, same = (make_teacher(net, named, tmp_path, **options) for net in (teacher, plain))
    assert permuted.classes == same.classes == NAMES
    logits = [load_teacher(info)(images) for info in (permuted, same)]
    torch.testing.assert_close(logits[0][:, list(ORDER)], logits[1])
    assert "is kept" in permuted.notes[0]
    assert "another order" in permuted.notes[0]
    assert same.notes[0].endswith("is kept")
    if model != "test_resnet":
        return
    some = make_teacher(plain, replace(dataset, classes=(*NAMES[:8], "x", "y")), tmp_path, **options)
    assert "8 of the data's 10 classes are kept by name (of its 10), 2 start fresh ('x', 'y')" in some.notes[0]
    none = make_teacher(plain, replace(dataset, classes=tuple("klmnopqrst")), tmp_path, **options)
    assert "a new head (10 -> 10 classes)" in none.notes[0]
    assert (some.epochs, none.epochs) == (1, 1)
    assert "is kept" not in some.notes[0] + none.notes[0]


@pytest.mark.parametrize(("images", "refused"), [(49, False), (50, True), (400, True)])
def test_a_teacher_at_chance_is_refused_with_the_likely_reason(
    images: int, refused: bool, dataset: Dataset, tmp_path: Path
) -> None:
    from nas.distill.teacher import check_accuracy

    save_weights(tmp_path / "w.safetensors", timm.create_model("test_resnet", num_classes=10).state_dict())
    named = find_network(f"test_resnet:{tmp_path / 'w.safetensors'}", "--teacher")
    info = make_teacher(named, dataset, tmp_path, random_seed=0, epochs=1, device="cpu", threads=1)
    unnamed = match_classes(None, NAMES, 10)
    judged = replace(info, holdout_images=images, holdout_top1=4 / images)
    if refused:
        with pytest.raises(InputError, match=r"--teacher: got .* chance is 10.0%, .* likely reason: .* another order"):
            check_accuracy(judged, named, unnamed)
    else:
        assert "warning" in check_accuracy(judged, named, unnamed).notes[-1]
    good = replace(judged, holdout_top1=1.0)
    assert check_accuracy(good, named, unnamed) == good
    none = replace(judged, holdout_images=0, holdout_top1=0.0)
    assert check_accuracy(none, named, unnamed) == none
    few = replace(info, classes=NAMES[:2], holdout_images=1000, holdout_top1=0.71)
    with pytest.raises(InputError, match=r"a teacher above 75.0%"):
        check_accuracy(few, named, unnamed)
    assert check_accuracy(replace(few, holdout_top1=0.9), named, unnamed).holdout_top1 == 0.9


def model_of(folder: Path, dataset: Dataset, classes: tuple[str, ...], rows: tuple[int, ...]) -> Path:
    """Save one random net whose outputs have the given rows of its head, under these class names."""
    family = get_family("vit")
    arch, ctx = family.arch(VIT), Context(32, len(classes))
    torch.manual_seed(0)
    state = dict(family.build(arch, Context(32, 12)).state_dict())
    state |= {key: state[key][list(rows)] for key in ("head.weight", "head.bias")}
    named = replace(dataset, classes=classes)
    about: dict[str, Any] = {"family": family, "arch": arch, "ctx": ctx, "dataset": named}
    write_model(folder / "best", weights_bytes(state, {}), **about, score={}, throughput=None)
    return folder / "best.json"


def test_evaluation_follows_the_names_of_the_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = prepare(DataSpec("digits", img_size=32, max_images=200), tmp_path)
    ten = dataset.classes
    swapped = tuple(ten[at] for at in ORDER)
    cases = {
        "same": (ten, tuple(range(10))),
        "permuted": (swapped, ORDER),
        "more": (("x", *ten, "y"), (10, *range(10), 11)),
    }
    found = {}
    for name, (classes, rows) in cases.items():
        (tmp_path / name).mkdir()
        model = model_of(tmp_path / name, dataset, classes, rows)
        assert train.main([word for word in evaluation(model, tmp_path) if word != "--quiet"]) == 0
        out, err = capsys.readouterr()
        found[name] = json.loads(out.splitlines()[-1])
        assert ("another order" in err) == (name == "permuted")
        assert ("10 of the model's 12 classes" in err) == (name == "more")
    assert found["permuted"] == pytest.approx(found["same"])
    assert found["more"]["loss"] > found["same"]["loss"], "told from all"
    (tmp_path / "other").mkdir()
    model = model_of(tmp_path / "other", dataset, (*ten[:8], "EIGHT", "nine"), tuple(range(10)))
    assert train.main(evaluation(model, tmp_path)) == 2
    assert "--data: got 2 classes (8, 9) that the model does not have" in capsys.readouterr().err


def damaged_files(folder: Path, dataset: Dataset) -> dict[str, str]:
    family = get_family("vit")
    (folder / "cut.safetensors").write_bytes(b"no weights")
    other = family.build(family.arch({**VIT, "depth": 3}), Context(40, 7)).state_dict()
    save_weights(folder / "other.safetensors", other)
    (folder / "map.txt").write_text("one")
    save_weights(folder / "good.safetensors", family.build(family.arch(VIT), Context(40, 7)).state_dict())
    store = built(folder / "store", dataset, epochs=1).folder
    (store / "keys.bin").write_bytes(b"")
    return {name: str(folder / name) for name in ("cut.safetensors", "other.safetensors", "map.txt", "store")}


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (("--init", "cut.safetensors"), "--init"),
        (("--init", "other.safetensors"), "--init: got blocks.2"),
        (("--init", "good.safetensors", "--head-map", "map.txt"), "--head-map"),
        (("--teacher", "test_vit:cut.safetensors"), "--teacher"),
        (("--labels", "store"), "label store"),
    ],
)
def test_a_training_opens_its_files_before_any_data(
    words: tuple[str, ...],
    flag: str,
    dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damaged_files(tmp_path, dataset)
    monkeypatch.setattr(train, "prepared", None)  # data would fail
    monkeypatch.chdir(tmp_path)
    assert train.main(flags(tmp_path / "cache", arch_file(tmp_path), tmp_path / "out", *words)) == 2
    assert flag in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_runs_and_labels_open_their_files_before_any_data(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = damaged_files(tmp_path, dataset)
    monkeypatch.setattr("nas.contract.checks.LocalExecutor", lambda **_: InlineExecutor())
    monkeypatch.setattr("nas.distill.label_store.LocalExecutor", lambda **_: InlineExecutor())
    monkeypatch.setattr("nas.distill.label_store.prepared", None)
    family = get_family("vit")
    seed = family.arch(VIT)
    config = RunConfig(seed="x", target_params=1, family="vit")
    check_files(config, family, seed, None)
    good = replace(config, seed_weights=str(tmp_path / "good.safetensors"))
    check_files(good, family, seed, None)
    check_files(good, family, seed, Context(40, 10), InlineExecutor())
    for wrong in (
        {"seed_weights": files["cut.safetensors"]},
        {"seed_weights": files["other.safetensors"]},
        {"seed_weights": str(tmp_path / "nowhere.safetensors")},
        {"teacher": f"test_vit:{files['cut.safetensors']}"},
        {"labels": files["store"]},
    ):
        with pytest.raises(InputError, match=r"--seed-weights|--teacher|label store"):
            check_files(replace(config, **wrong), family, seed, None)
    with pytest.raises(InputError, match="--teacher"):
        labels.build("digits", teacher=f"test_vit:{files['cut.safetensors']}", cache_dir=tmp_path)
