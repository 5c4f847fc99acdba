"""Nothing executes what it reads, and no name in a file leads out of its folder."""

from __future__ import annotations

import ast
import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas.core.io import digest_of, member, read_json, write_json
from nas.data import DataSpec, open_dataset, prepare
from nas.data.cache import hold
from nas.export.teacher_net import SCHEMA, read_teacher
from nas.labels.build import merge_stores
from nas.labels.store import open_store
from nas.measure.bundle import LIST, main
from space.errors import InputError
from tests.label_cases import built
from tests.test_architecture import modules

RUNS_CODE = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle", "yaml", "ruamel"}
RUNS_CODE |= {"jsonpickle", "code", "codeop"}
"""Modules that make objects, or code, of what they read."""
CALLS = {"eval", "exec", "compile", "__import__"}
CALLS |= {f"builtins.{name}" for name in CALLS}
CALLS |= {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
CALLS |= {"torch.jit.load", "torch.package"}


def dotted(node: ast.AST) -> str:
    """Write a call's name out: torch.load."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def literal(call: ast.Call, name: str) -> object:
    """Give a keyword's literal value, None where it is absent."""
    for keyword in call.keywords:
        if keyword.arg is None:
            return "unknown"  # **more may hold anything
        if keyword.arg == name:
            is_literal = isinstance(keyword.value, ast.Constant)
            return keyword.value.value if is_literal else "unknown"
    return None


def flaws(tree: ast.AST) -> list[str]:
    """List what could execute what it reads."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names]
            if isinstance(node, ast.ImportFrom):
                if node.module == "pickle" and names == ["UnpicklingError"]:
                    continue  # an exception, which torch.load raises
                names = [node.module or ""]
            found += [f"imports {n}" for n in names if n.split(".")[0] in RUNS_CODE]
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        last = name.split(".")[-1]
        if name in CALLS or last in ("full_load", "unsafe_load"):
            found.append(f"calls {name}")
        if name == "torch.load" and literal(node, "weights_only") is not True:
            found.append("torch.load without weights_only=True")
        if name in ("np.load", "numpy.load") and literal(node, "allow_pickle") not in (None, False):
            found.append("numpy.load with allow_pickle")
        starts = last in ("run", "Popen", "call", "check_call", "check_output")
        if starts and literal(node, "shell") not in (None, False):
            found.append("shell=True")
    return found


def test_nothing_executes_what_it_reads() -> None:
    seen = {module: flaws(ast.parse(path.read_text())) for module, path in modules().items()}
    assert len(seen) > 100
    assert {module: found for module, found in seen.items() if found} == {}


BAD = """import pickle
from joblib import load
import yaml
eval('1')
exec(x)
torch.load(p)
torch.load(p, weights_only=False)
torch.load(p, **more)
torch.load(p, weights_only=flag)
np.load(p, allow_pickle=True)
numpy.load(p, allow_pickle=x)
subprocess.run(x, shell=True)
os.system(x)
torch.jit.load(p)
from pickle import loads"""
GOOD = """import json
torch.load(p, weights_only=True)
np.load(p)
model.eval()
np.load(p, allow_pickle=False)
re.compile('x')
subprocess.run(['ls'], check=True)
from pickle import UnpicklingError"""


@pytest.mark.parametrize(("count", "text"), [(n, t) for n, lines in ((1, BAD), (0, GOOD)) for t in lines.split("\n")])
def test_the_law_sees_each_flaw_and_lets_the_rest_pass(count: int, text: str) -> None:
    assert len(flaws(ast.parse(text))) == count


# Names in a folder's own JSON

PARTS = st.sampled_from(["..", ".", "a", "b.bin", "sub", "", "/", "~"])
NAMES = st.one_of(st.text(), st.lists(PARTS, min_size=1, max_size=4).map("/".join))


@given(NAMES)
def test_a_member_lies_in_its_folder_or_is_refused(name: str) -> None:
    folder = Path("/tmp/no/such/folder")
    inside = os.path.normpath(os.path.join(folder, name))
    stays = inside == str(folder) or inside.startswith(f"{folder}{os.sep}")
    found = None
    try:
        found = member(folder, name, "x.json: files")
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017
    if found is not None:
        assert stays
        assert os.path.normpath(found) == inside
    elif name and "\0" not in name and name.isprintable():
        # What goes up and comes back is refused, too: nobody writes that.
        assert not stays or ".." in name.split("/")


@pytest.mark.parametrize("value", [None, 3, ["a"], {"a": 1}, True])
def test_a_member_is_text(value: object, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"x\.json: files: got "):
        member(tmp_path, value, "x.json: files")


def test_links_that_lead_out_or_in_circles_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret").write_text("x")
    (folder / "file").write_text("x")
    (folder / "out").symlink_to(tmp_path / "secret")
    (folder / "up").symlink_to("..", target_is_directory=True)
    (folder / "in").symlink_to("file")
    (folder / "circle").symlink_to("circle")
    assert member(folder, "in", "f") == folder / "in"
    assert member(folder, "sub/new", "f") == folder / "sub" / "new"
    for name in ("out", "up/secret"):
        with pytest.raises(InputError, match="a link that leads out"):
            member(folder, name, "f")
        assert member(folder, name, "f", links=True) == folder / name
    with pytest.raises(InputError, match="circle"):
        member(folder, "circle/x", "f")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    return prepare(DataSpec("digits", img_size=16, max_images=60), cache).folder


@pytest.mark.parametrize("name", ["../out.bin", "/etc/hostname", "sub/../../out.bin", "manifest.json"])
def test_a_store_names_its_own_three_files_only(name: str, digits: Path, tmp_path: Path) -> None:
    """A merge copies them by name: another one would be written anywhere."""
    folder = built(tmp_path / "store", open_dataset(digits), epochs=1).folder
    manifest = read_json(folder / "manifest.json", "a manifest")
    manifest["files"][name] = "0" * 64
    write_json(folder / "manifest.json", manifest)
    before = sorted(tmp_path.rglob("*"))
    for read in (lambda: open_store(folder), lambda: merge_stores(tmp_path / "all", [folder])):
        with pytest.raises(InputError, match=r"manifest\.json: files: got ") as caught:
            read()
        assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_teacher_lies_where_it_is_found(tmp_path: Path) -> None:
    """Its info.json cannot send a reader to other weights."""
    info = {"folder": "/elsewhere", "id": "t", "digest": "d", "model": "m", "kwargs": {}, "classes": ["a", "b"]}
    info |= {"mean": [0.0], "std": [1.0], "student_mean": [0.0], "student_std": [1.0], "input_size": None, "notes": []}
    info |= {"epochs": 1, "holdout_top1": 0.5, "holdout_top1_se": 0.1, "holdout_images": 4}
    write_json(tmp_path / "info.json", {"schema": SCHEMA, "info": info})
    assert read_teacher(tmp_path).folder == str(tmp_path)


@pytest.mark.parametrize("name", ["../net.onnx", "/net.onnx", 7, None])
def test_a_bundle_times_its_own_networks_only(name: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = {"batch": 1, "img_size": 32, "reference": True, "file": name}
    write_json(tmp_path / LIST, {"networks": [network]})
    assert main(["--networks", str(tmp_path), "--out", str(tmp_path / "t.csv")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{LIST}: file: got" in line


def test_images_that_are_decoded_on_access_stay_in_their_folder(tmp_path: Path) -> None:
    from nas.data.dataset import KeyTable, NameTable
    from nas.data.layout import DecodedFiles, file_of, write_table

    (tmp_path / "in").mkdir()
    shutil.copyfile(__file__, tmp_path / "out.png")
    names = NameTable.of(["../out.png", str(tmp_path / "out.png"), "a/../../out.png"])
    tables = {"keys": KeyTable.of(["0" * 32] * 3).raw, "names": names.text, "ends": names.ends}
    for name, table in tables.items():
        write_table(tmp_path / file_of("train", name), table)
    images = DecodedFiles(tmp_path, "train", tmp_path / "in", 16, 16)
    for row in range(3):
        with pytest.raises(InputError, match="want a name inside"):
            images[row]


def test_what_a_cache_folder_describes_is_its_own(digits: Path, tmp_path: Path) -> None:
    """Its tables have fixed names: none that the description brings along is looked at."""
    folder = tmp_path / digits.name
    shutil.copytree(digits, folder)
    meta = read_json(folder / "meta.json", "m")
    meta["files"]["../../x"] = {"bytes": 1, "sha256": "0" * 64}
    write_json(folder / "meta.json", meta)
    assert hold(folder)
    assert open_dataset(folder).fingerprint == meta["fingerprint"]
    assert digest_of(json.loads("{}")) == digest_of({})
