"""Folders as people lay them out: which folders are splits, which are classes, what is an image, annotations."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nas.data import Dataset, DataSpec, prepare
from nas.data.folders import folder
from nas.data.roles import word_role
from space.errors import InputError

RNG = np.random.default_rng(5)


def lay(root: Path, text: str) -> Path:
    """Make folders of small images: `train/{a,b}*3` holds 0.png to 2.png in each of two; `x/` is an empty folder."""
    for item in text.split():
        path, _, many = item.partition("*")
        choices = [part.split(",") for part in re.findall(r"{(.*?)}", path)]
        for chosen in itertools.product(*choices):
            names = iter(chosen)
            at = root / re.sub(r"{.*?}", lambda _, names=names: next(names), path)
            at.mkdir(parents=True, exist_ok=True)
            for number in range(int(many or 0)):
                picture(at / f"{number}.png")
    return root


def picture(path: Path, kind: str = "PNG") -> Path:
    """Write one image, unlike all others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (16, 18, 3), dtype=np.uint8)).save(path, kind)
    return path


def ready(root: Path, **changes: object) -> Dataset:
    spec = {"img_size": 16, "max_corrupt": 0.0, **changes}
    return prepare(DataSpec(str(root), **spec), root.parent / "cache")  # type: ignore[arg-type]


def tops(dataset: Dataset) -> dict[str, dict[str, int]]:
    """Count the images of each side by their top folder; "cut": those of train and holdout together."""
    found = {
        side: Counter(n.split("/")[0] for n in getattr(dataset, side).names) for side in ("holdout", "train", "test")
    }
    cut = dict(found["train"] + found["holdout"])
    return {"cut": cut, **{side: dict(found[side]) for side in ("holdout", "test")}}


@pytest.mark.parametrize(
    "names",
    [
        "train val",
        "Training Validation",
        "TRAIN_SET Test_Set",
        "dogs-train dogs-valid",
        "train2017 val2017",
        "seg_train seg_test",
        "trainset testset",
        "train dev",
    ],
)
def test_the_second_of_two_splits_is_the_test_set_and_the_holdout_is_cut_from_train(names: str, tmp_path: Path) -> None:
    train, test = names.split()
    found = ready(lay(tmp_path / "d", f"{train}/{{a,b}}*5 {test}/{{a,b}}*2"))
    assert found.classes == ("a", "b")
    assert tops(found) == {"cut": {train: 10}, "holdout": {train: 2}, "test": {test: 4}}
    assert f"{train}/: for training, and the holdout is cut from it, 10 images in 2 classes" in found.notes
    assert f"{test}/: the test set, 4 images in 2 classes" in found.notes


@pytest.mark.parametrize("names", ["train val test", "Train Valid Test", "x_training x_validation x_testing"])
def test_of_three_splits_each_has_its_own_role(names: str, tmp_path: Path) -> None:
    train, val, test = names.split()
    found = ready(lay(tmp_path / "d", f"{train}/{{a,b}}*3 {val}/{{a,b}}*2 {test}/{{a,b}}*1"))
    assert tops(found) == {"cut": {train: 6, val: 4}, "holdout": {val: 4}, "test": {test: 2}}
    assert len([n for n in found.notes if n.endswith("in 2 classes")]) == 3


LAYOUTS = {
    "test among others is a class": ("{train,bus,car}*4", ("bus", "car", "train")),
    "test/ beside the classes": ("{a,b}*4 test/{a,b}*1", ("a", "b")),
    "splits inside the classes": ("{a,b}/train*4 {a,b}/test*1", ("a", "b")),
    "one folder in a zip": ("download/set/train/{a,b}*4 download/set/val/{a,b}*1", ("a", "b")),
    "images inside each split": ("train/images/{a,b}*4 val/images/{a,b}*1", ("a", "b")),
    "images inside each class": ("train/{a,b}/images*4 val/{a,b}/images*1", ("a", "b")),
    "train alone": ("train/{a,b}*5", ("a", "b")),
    "nested sub-folders of one class each": ("a/{x,y}*3 b/z*3", ("a", "b")),
    "two words": ("{train,bus}_station*4", ("bus_station", "train_station")),
    "one class is missing in test": ("train/{a,b,c}*4 test/{a,b}*1 test/c/", ("a", "b", "c")),
    "documents beside the classes": ("{a,b}*4 docs/", ("a", "b")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_usual_layouts_have_the_classes_that_people_mean(layout: str, tmp_path: Path) -> None:
    text, classes = LAYOUTS[layout]
    root = lay(tmp_path / "d", text)
    if (root / "docs").is_dir():
        (root / "docs" / "labels.csv").write_text("no class")
    found = ready(root)
    assert found.classes == classes
    assert sum(len(s) for s in (found.train, found.holdout, found.test)) == len([*root.rglob("*.png")])
    for split in (found.train, found.holdout, found.test):
        for name, label in zip(split.names, split.labels, strict=True):
            assert found.classes[label] in name.split("/")
            assert "test" not in name.split("/") or split is found.test


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ("{left,right}/{a,b}*2", "--classes top .left, right. or --classes leaf .a, b."),
        ("train/{a,b}*2 extra/{a,b}*2", "extra/ beside train/"),
        ("train*2 test*2 bus*2", "bus/ beside test/, train/"),
        ("{pictures2,test}*3", "pictures2/ beside test/"),
        ("images*3 annotations/trimaps*3", "annotations/ beside images/"),
        ("{train,Training}/{a,b}*2 test/{a,b}*2", "train/, Training/|Training/, train/"),
        ("val/{a,b}*2 test/{a,b}*2", "want a folder to train on"),
        ("train*3 test/{a,b}*1", "class folders in test/ but none in train/"),
        ("train/{a,b}*2 train/void/ val/{a,b}*1", "no image in .*train/void"),
    ],
)
def test_what_could_be_read_in_two_ways_is_a_question(layout: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words) as caught:
        ready(lay(tmp_path / "d", layout))
    assert "\n" not in str(caught.value)


def test_the_other_splits_of_a_folder_to_evaluate_on_are_no_loose_images(tmp_path: Path) -> None:
    root = lay(tmp_path / "d", "train/{a,b}*3 val/{a,b}*2 test/{a,b}*2 test*1")
    found = ready(root, test_only=True)
    assert tops(found) == {"cut": {}, "holdout": {}, "test": {"test": 4}}
    assert [note for note in found.notes if "loose" in note] == [
        "1 loose image outside the class folders left out: 1 in test/"
    ]


def test_the_questions_are_answered_by_two_flags(tmp_path: Path) -> None:
    root = lay(tmp_path / "d", "{left,right}/{a,b}*3")
    assert ready(root, classes="top").classes == ("left", "right")
    assert ready(root, classes="leaf").classes == ("a", "b")
    by_hand = ready(root, splits="train=left,test=right")
    assert (by_hand.classes, tops(by_hand)["test"]) == (("a", "b"), {"right": 6})
    three = ready(lay(tmp_path / "e", "{x,y,z}/{a,b}*2"), splits="train=x, holdout=y,test=z/")
    assert tops(three) == {"cut": {"x": 4, "y": 4}, "holdout": {"y": 4}, "test": {"z": 4}}
    assert ready(lay(tmp_path / "f", "{train,test,bus}*3"), splits="train=.").classes == ("bus", "test", "train")
    assert ready(lay(tmp_path / "g", "{a,b,odd}*4 odd/{a,b}*1"), splits="train=.,test=odd").classes == ("a", "b")
    for wrong in ("left", "train=left,test=nowhere", "teach=left", "train=left,holdout=right", "train=left,test=left"):
        with pytest.raises(InputError, match="--splits"):
            ready(root, splits=wrong)


def test_a_flat_split_beside_class_folders_has_no_truth_and_is_left_out(tmp_path: Path) -> None:
    root = lay(tmp_path / "d", "train/{a,b}*5 test*3")
    found = ready(root)
    assert not any(name.startswith("test/") for name in found.test.names)
    assert any(n.startswith("test/: 3 images in no class folders, without ground truth, left out") for n in found.notes)
    lay(root, "val/{a,b}*1")
    assert tops(ready(root))["test"] == {"val": 2}


def test_what_is_left_out_is_counted_and_what_is_an_image_is_decided_by_content(tmp_path: Path) -> None:
    root = lay(tmp_path / "d", "{a,b}*4 a/@eaDir*2 b/.ipynb_checkpoints*1 __MACOSX/a*3")
    picture(root / "a" / "._0.png")
    picture(root / "a" / "without-ending")
    picture(root / "a" / "odd.name", "GIF")
    picture(root / "b" / "new.avif", "AVIF")
    picture(root / "b" / "old.jfif", "JPEG")
    for name in ("a/Thumbs.db", "a/notes.txt", "b/more.txt", "b/phone.heic", "b/drawing.svg", "b/clip.mp4"):
        (root / name).write_bytes(b"not an image")
    found = ready(root)
    assert sum(len(s) for s in (found.train, found.holdout, found.test)) == 12
    assert not found.broken
    (others,) = [n for n in found.notes if "are no images" in n]
    assert all(words in others for words in ("2 .txt", "1 .heic", "1 .svg", "1 .mp4", "pillow-heif"))
    (system,) = [n for n in found.notes if "hidden" in n]
    counts = (
        "@eaDir (2 files)",
        "__MACOSX (3 files)",
        ".ipynb_checkpoints (1 file)",
        "._* (1 file)",
        "thumbs.db (1 file)",
    )
    assert all(words in system for words in counts)


def test_linked_folders_are_followed_once_and_never_in_circles(tmp_path: Path) -> None:
    store = lay(tmp_path / "store", "{cat,dog}*4")
    root = tmp_path / "d"
    root.mkdir()
    for name in ("cat", "dog"):
        (root / name).symlink_to(store / name)
    (store / "cat" / "self").symlink_to(store / "cat")
    (root / "twin").symlink_to(store / "dog")
    (root / "up").symlink_to(tmp_path)
    found = ready(root)
    assert found.classes == ("cat", "dog")
    assert sum(len(s) for s in (found.train, found.holdout, found.test)) == 8
    assert any(n.startswith("3 linked folders to what is read anyway left out") for n in found.notes)


def test_names_are_compared_in_one_unicode_form_and_by_case(tmp_path: Path) -> None:
    composed, split_up = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    root = lay(tmp_path / "d", f"train/{{{composed},b}}*4 val/{{{split_up},b}}*1")
    assert ready(root).classes == ("b", composed)
    lay(root, "train/B*2")
    assert any(n.endswith("kept apart: B, b") for n in ready(root).notes)


def kaggle(root: Path, rows: str, header: str = "id,breed", name: str = "labels.csv") -> Path:
    (root / name).write_text("\n".join([header, *rows.split()]) + "\n", encoding="utf-8-sig")
    return root / name


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("id,breed", "{stem},{name}"),
        ("Unnamed: 0,Filename,Label", "7,{stem}.png,{name}"),
        ("image_id;label;label_name", "{stem};{number};{name}"),
        ("path\tspecies", "train/{stem}.png\t{name}"),
        ("file_path,class", "/home/me/data/train/{stem}.png,{name}"),
        ("img,category,fold", "data\\train\\{stem}.png,{name},3"),
    ],
)
def test_a_csv_file_gives_a_flat_folder_its_classes(header: str, row: str, tmp_path: Path) -> None:
    root = lay(tmp_path / "d", "train*12 test*12")
    names = ["cat", "dog"]
    rows = " ".join(row.format(stem=at, name=names[at % 2], number=at % 2).replace("\t", "~") for at in range(12))
    path = kaggle(root, rows, header)
    path.write_text(path.read_text("utf-8-sig").replace("~", "\t"))
    found = ready(root, annotations="labels.csv")
    assert found.classes == ("cat", "dog")
    assert tops(found)["cut"].keys() | tops(found)["test"].keys() == {"train"}
    for split in (found.train, found.holdout, found.test):
        for name, label in zip(split.names, split.labels, strict=True):
            assert int(label) == int(Path(name).stem) % 2
    assert any("test/: 12 images in no class folders" in n for n in found.notes)


@pytest.mark.parametrize(
    "text",
    [
        "".join(f"{at}.png,{'ab'[at % 2]}\n" for at in range(12)),
        "".join(f"{at},{'ab'[at % 2]}\n" for at in range(12)),
        "".join(f"./images/{at}.png {'ab'[at % 2]}\n" for at in range(12)),
        "".join(f"{at}.png;{'ab'[at % 2]};{'val' if at < 2 else 'train'}\n" for at in range(12)),
        "image_id,a,b\n" + "".join(f"{at},{at % 2 == 0:d},{at % 2:d}\n" for at in range(12)),
        "image,a,b\n" + "".join(f"{at}.png,{float(at % 2 == 0)},{float(at % 2)}\n" for at in range(12)),
        "ImageId,PredictionString\n" + "".join(f"{at},{'ab'[at % 2]}\n" for at in range(12)),
    ],
)
def test_annotations_without_a_header_and_one_column_a_class_are_read(text: str, tmp_path: Path) -> None:
    root = lay(tmp_path / "d", "images*12")
    (root / "labels.csv").write_text(text)
    found = ready(root, annotations="labels.csv")
    assert found.classes == ("a", "b")
    read = [
        (int(Path(name).stem), int(label))
        for split in (found.train, found.holdout, found.test)
        for name, label in zip(split.names, split.labels, strict=True)
    ]
    assert sorted(read) == [(at, at % 2) for at in range(12)]


def test_annotations_hold_splits_and_subsets_and_serve_a_flat_val(tmp_path: Path) -> None:
    root = lay(tmp_path / "d", "images*12")
    rows = [f"{at}.png,{'ab'[at % 2]},{['train', 'valid', 'test'][at % 3]}" for at in range(10)]
    found = ready(root, annotations=str(kaggle(root, " ".join(rows), "file,class,split")))
    assert (len(found.train), len(found.holdout), len(found.test)) == (4, 3, 3)
    assert any("2 images of the folder not named in labels.csv" in n for n in found.notes)
    assert {int(Path(name).stem) % 3 for name in found.holdout.names} == {1}
    net = lay(tmp_path / "net", "train/{n1,n2}*4 val*4")
    want = {"cut": {"train": 8}, "holdout": {"train": 2}, "test": {"val": 3}}
    for name, rows_of in {
        "val.csv": "val/0,n1 val/1,n2 val/2,n1",
        "val/names.csv": "0.png,n1 1.png,n2 2.png,n1",
    }.items():
        csv = kaggle(net, rows_of, "ImageId,class", name)
        assert tops(ready(net, annotations=str(csv))) == want


@pytest.mark.parametrize(
    ("rows", "header", "words"),
    [
        ("0,a 1,b 99,a", "id,class", r"1 of 3 lines that cannot be used, e.g. 99 \(not there\)"),
        ("0,a 1,b 0,b", "id,class", r"0 \(both a and b\)"),
        ("0,a 1,b 2,", "id,class", r"2 \(without a class\)"),
        ("0,1,0 1,0,2", "id,healthy,rust", "columns id, healthy, rust"),
        ("0,1,0 1,1,1 2,0,0", "id,healthy,rust", r"none or several of healthy, rust in 2 lines \(the first: 3\)"),
        ("0,1~2~3~4 1,a", "id,PredictionString", "'1 2 3 4' in PredictionString .1 line., boxes or several classes"),
        ("0,cat~0.9 1,a", "id,PredictionString", "boxes or several classes"),
        ("0,3~4 1,5", "id,label", "boxes or several classes"),
        ("b,1.png", "a,0.png", "columns a, 0.png"),
        ("0,a,here 1,b,there", "id,class,split", "split 'here'"),
        ("0,a,train 1,b, 2,a,test", "id,class,set", r"set '' in .* \(1 line\)"),
        ("0,a,x 1,a,y 2,b,y", "id,class,label", "class and label, which differ"),
        ("", "id,class", "without lines"),
    ],
)
def test_annotations_that_contradict_are_named(rows: str, header: str, words: str, tmp_path: Path) -> None:
    root = lay(tmp_path / "d", "images*12")
    path = kaggle(root, rows, header)
    path.write_text(path.read_text("utf-8-sig").replace("~", " "))
    with pytest.raises(InputError, match=words) as caught:
        folder(DataSpec(str(root), annotations=str(path)))
    assert str(caught.value).startswith("--annotations: got ")


def test_a_name_that_fits_two_images_is_refused_and_odd_lines_are_tolerated_as_asked(tmp_path: Path) -> None:
    root = lay(tmp_path / "d", "{x,y}*3")
    path = kaggle(root, "0,a 1,b", "id,class")
    with pytest.raises(InputError, match=r"0 in .*, which is x/0.png or y/0.png"):
        folder(DataSpec(str(root), annotations=str(path)))
    kaggle(root, "x/0,a x/1,b x/2,a y/9,b y/1,b", "id,class")
    found = folder(DataSpec(str(root), annotations=str(path), max_corrupt=0.3))
    assert any("1 line of labels.csv left out, e.g. y/9 (not there)" in n for n in found.notes)
    for wrong in ("nowhere.csv", str(root), str(picture(tmp_path / "no.csv"))):
        with pytest.raises(InputError, match="--annotations"):
            folder(DataSpec(str(root), annotations=wrong))


def test_a_test_set_alone_is_all_of_a_folder_or_the_split_that_is_given(tmp_path: Path) -> None:
    whole = ready(lay(tmp_path / "d", "{a,b}*7"), test_only=True)
    assert (len(whole.train), len(whole.test), whole.classes) == (0, 14, ("a", "b"))
    assert len(ready(lay(tmp_path / "e", "train/{a,b}*5 val/a*2"), test_only=True).test) == 2
    capped = ready(tmp_path / "d", test_only=True, max_test_images=6)
    assert len(capped.test) == 6
    assert any("6 of 14 test images used (--max-test-images)" in n for n in capped.notes)
    with pytest.raises(InputError, match="images with classes to evaluate on"):
        ready(lay(tmp_path / "f", "images*4"), test_only=True)


def test_an_archive_is_refused_with_its_remedy(tmp_path: Path) -> None:
    (tmp_path / "d.zip").write_bytes(b"PK")
    with pytest.raises(InputError, match="unpack it"):
        folder(DataSpec(str(tmp_path / "d.zip")))


def test_words_that_name_a_split() -> None:
    usual = {
        "train": "train Training TRAIN_SET training-set trainset train_images",
        "holdout": "val valid Validation dev_set",
        "test": "test Testing test-set TestData",
    }
    for role, words in usual.items():
        assert {word_role(word) for word in words.split()} == {role}
    assert not any(
        word_role(word) for word in ("trainer", "contest", "value", "train station", "untrained", "testimony")
    )
