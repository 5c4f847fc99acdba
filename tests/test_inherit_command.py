"""The tool: what a child takes, layer by layer, against the nets themselves; files; refusals."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from space_cases import FAMILY, meta_build, random_arch, random_context

from nas.export.weights import load_weights, save_weights
from nas.inherit.__main__ import compare, main, table
from nas.jobs.job import Result
from nas.jobs.local import LocalExecutor
from space import Context
from tests._inline import InlineExecutor
from tests.train_cases import TINY

ARCH: dict[str, Any] = {**TINY, "depths": [2, 1, 3, 1]}
CHILD = {**ARCH, "depths": [2, 1, 2, 1], "mlp_ratio": 1.0}
CTX = Context(64, 5)


def written(folder: Path, name: str, values: dict[str, Any]) -> str:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(values))
    return str(path)


@pytest.mark.parametrize("seed", range(8))
def test_every_layer_of_random_pairs_is_told_as_it_is(seed: int) -> None:
    rng = random.Random(seed)
    pair = [random_arch(rng, most=64, deepest=2) for _ in range(2)]
    contexts = [Context(rng.randint(16, 160), rng.choice([2, 10]), 3) for _ in range(2)]
    was, now = (
        {k: tuple(v.shape) for k, v in meta_build(a, c).state_dict().items()}
        for a, c in zip(pair, contexts, strict=True)
    )
    layers = compare(FAMILY, *pair, *contexts)
    slicing = FAMILY.slicing(*pair, *contexts)
    shown = {x.name: x for x in layers if not x.block and x.now is not None}
    modules = {k.rpartition(".")[0] for k in now}
    assert {n.removesuffix(".attention_biases") for n in shown} == modules
    for name, layer in shown.items():
        key = name if name in now else f"{name}.weight"
        assert layer.now == now[key]
        source = slicing.get(key)
        if source is not None:
            assert layer.was == was[source.source]
            assert (layer.origin == "resampled") == bool(source.blends)
            if layer.was != layer.now:
                assert layer.changed
        else:
            assert layer.origin == "new"
    blocks = [
        {k.rpartition(".blocks.")[0] + ".blocks." + k.split(".")[3] for k in s if ".blocks." in k} for s in (was, now)
    ]
    used = {".".join(s.source.split(".")[:4]) for s in slicing.values() if ".blocks." in s.source}
    assert {x.name for x in layers if x.block and x.now is None} == blocks[0] - used
    assert {x.name for x in layers if x.block and x.was is None} <= blocks[1]


@pytest.mark.parametrize("seed", range(4))
def test_a_child_like_its_parent_has_no_line(seed: int) -> None:
    rng = random.Random(seed)
    arch, ctx = random_arch(rng, most=64), random_context(rng)
    layers = compare(FAMILY, arch, arch, ctx, ctx)
    assert layers
    assert not any(layer.changed or layer.block or layer.origin for layer in layers)
    params = FAMILY.count_params(arch, ctx)
    assert len(table([], (params, params))) == 2


def test_a_best_json_says_what_it_was_made_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parent = written(tmp_path, "parent", ARCH)
    child = written(tmp_path, "best", {"arch": CHILD, "img_size": 64, "num_classes": 5})
    assert main([parent, child, "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    values = json.loads(lines[-1])
    assert values["params_is"] == FAMILY.count_params(FAMILY.arch(CHILD), CTX)
    assert any(line.startswith("blocks: spread evenly here") for line in lines)
    assert main([parent, child, "--img-size", "32", "--json"]) == 0
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert values["params_is"] == FAMILY.count_params(FAMILY.arch(CHILD), Context(32, 5))


def test_the_table_says_what_changed_and_only_that(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = written(tmp_path, "a", ARCH), written(tmp_path, "b", CHILD)
    flags = ["--img-size", "64", "--num-classes", "5"]
    assert main([*names, *flags, "--json"]) == 0
    *lines, note, last = capsys.readouterr().out.splitlines()
    assert note.startswith("blocks: ")
    rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    assert rows[0] == ["layer", "was", "is", "from"]
    assert ["stages.2.blocks.1.mlp.fc1", "128x64", "64x64"] in [r[:3] for r in rows]
    assert [r[:3] for r in rows if "dropped" in r] == [["stages.2.blocks.1", "block", "dropped"]]
    assert ["stages.2.blocks.1", "block", "block", "taken from blocks.2"] in rows
    params = [FAMILY.count_params(FAMILY.arch(v), CTX) for v in (ARCH, CHILD)]
    assert rows[-1][:3] == ["parameters", *(f"{n:,}" for n in params)]
    assert all("mlp" in r[0] or r[0].startswith("stages.2.blocks") for r in rows[1:-1])
    values = json.loads(last)
    assert [values["params_was"], values["params_is"]] == params
    assert [x["layer"] for x in values["layers"]] == [r[0] for r in rows[1:-1]]
    assert main([*names, *flags, "--all"]) == 0
    everything = capsys.readouterr().out.splitlines()
    assert len(everything) > len(lines)
    assert sum(line.startswith("patch_embed") for line in everything) == 4


def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let jobs run here: a process of its own takes seconds to start."""
    monkeypatch.setattr("nas.inherit.__main__.LocalExecutor", lambda threads: InlineExecutor())


@pytest.mark.parametrize("criterion", ["prefix", "l1", "l2"])
def test_the_childs_weights_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, criterion: str
) -> None:
    if criterion != "l1":
        inline(monkeypatch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parent = FAMILY.build(FAMILY.arch(ARCH), CTX)
        with torch.no_grad():
            for parameter in parent.parameters():
                parameter.add_(torch.rand_like(parameter) * 0.1)
            for block in range(3):  # units that are nothing, among the first
                parent.get_submodule(f"stages.2.blocks.{block}.mlp.fc1").weight[:32].zero_()
                parent.get_submodule(f"stages.2.blocks.{block}.mlp.fc2").weight[:, :32].zero_()
    weights, out = tmp_path / "p.safetensors", tmp_path / "new" / "c.safetensors"
    save_weights(weights, parent.state_dict())
    names = written(tmp_path, "a", ARCH), written(tmp_path, "b", CHILD)
    flags = ["--weights", str(weights), "--out", str(out), "--importance", criterion, "--json"]
    flags += ["--img-size", "64"]
    assert main([*names, *flags]) == 0
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert values["context"] == values["parent_context"] == vars(CTX)
    assert values["kept"] == 0
    state = load_weights(out)
    model = FAMILY.build(FAMILY.arch(CHILD), CTX)
    model.load_state_dict(state)
    zeros = int((state["stages.2.blocks.1.mlp.fc1.weight"] == 0).all(1).sum())
    assert zeros == (32 if criterion == "prefix" else 0)
    source = "stages.2.blocks.2.mlp.norm.weight"
    assert torch.equal(state["stages.2.blocks.1.mlp.norm.weight"], parent.state_dict()[source])
    inline(monkeypatch)
    # A parent on its own comes out as it went in, and another head is the child's own.
    assert main([names[0], names[0], *flags]) == 0
    assert all(torch.equal(v, load_weights(out)[k]) for k, v in parent.state_dict().items())
    assert main([names[0], names[0], *flags, "--num-classes", "7"]) == 0
    assert load_weights(out)["head.fc.weight"].shape[0] == 7


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["9M", "5M"], "PARENT: got 9M"),
        (["5M", "9M"], "CHILD: got 9M"),
        (["5M", "5M", "--img-size", "3"], "img_size: got 3"),
        (["5M", "5M", "--num-classes", "0"], "num_classes: got 0"),
        (["5M", "5M", "--family", "resnet"], "--family: got resnet"),
        (["5M", "5M", "--out", "c.safetensors"], "--out: got no --weights"),
        (["5M", "5M", "--weights", "p.safetensors"], "--weights: got no --out"),
        (["5M", "5M", "--weights", "p.safetensors", "--out", "c.pt"], "--out: got c.pt"),
        (["5M", "5M", "--importance", "taylor"], "taylor needs images"),
        (["5M", "5M", "--importance", "l3"], "--importance: got l3"),
        (["5M", "5M", "--weights", "no/p.safetensors", "--out", "c.safetensors"], "--weights"),
        (["5M"], "CHILD"),
    ],
)
def test_bad_input_is_one_line_and_two(
    flags: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inline(monkeypatch)
    try:
        status = main(flags)
    except SystemExit as left:  # argparse's own
        status = int(str(left.code))
    streams = capsys.readouterr()
    assert status == 2
    assert says in streams.err
    assert len(streams.err.splitlines()) == 1
    assert not streams.out


def test_weights_of_another_arch_and_a_job_that_fails_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_weights(tmp_path / "p.safetensors", {"a": torch.zeros(2)})
    names = [written(tmp_path, "a", ARCH), written(tmp_path, "b", CHILD)]
    arguments = [*names, "--weights", str(tmp_path / "p.safetensors"), "--out", str(tmp_path / "c.safetensors")]
    reason = "the worker was killed by SIGKILL; out of memory?"
    monkeypatch.setattr(LocalExecutor, "run", lambda self, job: Result(job.key, False, {}, reason))
    assert main(arguments) == 2
    line, *more = capsys.readouterr().err.splitlines()
    assert line.startswith("error: CHILD: got ")
    assert "out of memory" in line
    assert not more
    inline(monkeypatch)
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: --weights: got ")
    assert not (tmp_path / "c.safetensors").exists()
