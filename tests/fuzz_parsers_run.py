"""Readers of archs, recipes, flags and of what a run leaves, with valid inputs to begin from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from fuzz_parser import ARCHS, CONTEXT, WEIGHTS, Parser, both, file_of, json_of, text_of

from space import get_family

# Archs, recipes, words


def _arch_seeds() -> list[bytes]:
    found = []
    for family, arch in ARCHS.items():
        found += both({"family": family, "arch": arch})
    return [*found, json_of(ARCHS["tinyvit"])]


def _arch(path: Path) -> object:
    from nas.train.train_flags import resolve_arch

    return resolve_arch(str(path), None)


def _inline(data: bytes, folder: Path) -> object:
    from benchmarks.throughput.networks import find_nets

    text = text_of(data)
    return find_nets([text if text.startswith("{") else "{" + text], get_family("tinyvit"))


def _finalists(path: Path) -> object:
    from benchmarks.throughput.networks import find_nets

    return find_nets([str(path)], get_family("tinyvit"))


def _finalist_seeds() -> list[bytes]:
    listed = [{"arch": ARCHS["tinyvit"], "label": "a", "predicted_ratio": [1.0, 0.9, 1.1]}]
    return both({"family": "tinyvit", "finalists": listed})


def _recipe_seeds() -> list[bytes]:
    from nas.train.recipe import find_recipe

    told = find_recipe("small", 5_000_000).to_dict()
    return [*both(told), json_of({"config": {"recipe": told}})]


def _recipe(path: Path) -> object:
    from nas.train.recipe import find_recipe

    return find_recipe(str(path), 5_000_000)


def _override(data: bytes, folder: Path) -> object:
    from nas.train.recipe import find_recipe

    return find_recipe("small", 5_000_000, text_of(data).split("\n"))


def _words(data: bytes, folder: Path) -> object:
    """Read the same text as each kind of word that a flag may hold."""
    from nas.core.config import parse_count, parse_share
    from nas.core.requirement import parse_requirement, parse_setting
    from space.errors import InputError
    from space.freeze import freeze

    text, read, refused = text_of(data), [], 0
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
    from nas.core.config import RunConfig

    config = RunConfig(
        seed="5M",
        target_params=4_000_000,
        seed_arch=ARCHS["tinyvit"],
        require=("images_per_s>=100@cpu:b16",),
    )
    return both({"schema": 1, "config": config.to_dict(), "dataset": {"fingerprint": "f"}})


def _run(path: Path) -> object:
    from nas.contract.replay import earlier_config

    return earlier_config(path.parent)


def _named_points(path: Path) -> object:
    from benchmarks.pareto import read_series

    return read_series(path)


def _result_seeds() -> list[bytes]:
    return both({"status": "reached", "exit_code": 0, "message": "done", "path": ["a"]})


def _result(path: Path) -> object:
    from synthetic_run import decided

    from nas.contract.final import read_result
    from nas.report.read import RunFiles
    from nas.report.text import status_lines

    result = read_result(path)
    trials, steps = decided(1)
    run = json.loads(_run_seeds()[0])
    status_lines(RunFiles(path.parent, run, tuple(trials), tuple(steps), result, {}))
    return result


def _best_seeds() -> list[bytes]:
    from nas.export.model_json import model_json

    family = get_family("tinyvit")
    told = model_json(
        family,
        family.arch(ARCHS["tinyvit"]),
        CONTEXT,
        classes=["a", "b", "c"],
        sha256=hashlib.sha256(WEIGHTS).hexdigest(),
        score={"step": 1, "soft_loss": 0.5},
        throughput={"images_per_s": 100.0},
        preprocessing={
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
        },
    )
    return both(told)


def _best(path: Path) -> object:
    from nas.export.model import left_by

    path.with_suffix(".safetensors").write_bytes(WEIGHTS)
    left = left_by(path)
    return left, left.classes, left.preprocessing, left.call


def _milestone(path: Path) -> object:
    from nas.contract.replay import read_models

    path.with_suffix(".safetensors").write_bytes(WEIGHTS)
    return read_models(path.parent.parent, get_family("tinyvit"))


def _train_seeds() -> list[bytes]:
    from nas.train.recipe import find_recipe
    from nas.train.train_config import TrainConfig

    config = TrainConfig(
        family="vit",
        arch=ARCHS["vit"],
        arch_from="a.json",
        data="digits",
        recipe=find_recipe("small", 5_000_000),
    )
    return both({"config": config.to_dict(), "machine": {"threads": 1}})


def _train(path: Path) -> object:
    from nas.train.folder import TrainFolder
    from nas.train.train_config import read_config

    return read_config(TrainFolder(path.parent).read_settings()["config"])


def _train_result(path: Path) -> object:
    from nas.train.folder import TrainFolder

    return TrainFolder(path.parent).read_result()


def _trust(path: Path) -> object:
    from nas.contract.proxy_check import named_archs

    family = get_family("tinyvit")
    return [family.arch(arch) for arch in named_archs(path.parent, 2) or ()]


def _trust_seeds() -> list[bytes]:
    return [*both({"archs": [ARCHS["tinyvit"]] * 2}), json_of([ARCHS["tinyvit"]] * 2)]


RUN = (
    Parser("arch", _arch_seeds, file_of("arch.json", _arch)),
    Parser("inline-arch", lambda: [json_of(ARCHS["tinyvit"])], _inline),
    Parser("finalists", _finalist_seeds, file_of("finalists.json", _finalists)),
    Parser("recipe", _recipe_seeds, file_of("recipe.json", _recipe)),
    Parser("override", lambda: [b"epochs=3\nlr=1e-3", b"policy=none\nclip-norm=off"], _override),
    Parser(
        "words",
        lambda: [
            b"5.4M",
            b"1%",
            b"cuda:0:onnxruntime:float16:b8",
            b"images_per_s>=10.5@cpu:b4",
            b"params<=5M",
            b"depths[2]",
            b"mlp_ratio",
            b"latency_p99_ms<=5@cpu",
        ],
        _words,
    ),
    Parser("run", _run_seeds, file_of("run.json", _run)),
    Parser(
        "points",
        lambda: [b"name,params,images_per_s,score,score_lo\na,5,1.5,0.5,0.4\n"],
        file_of("points.csv", _named_points),
    ),
    Parser("result", _result_seeds, file_of("result.json", _result)),
    Parser("best", _best_seeds, file_of("best.json", _best)),
    Parser("milestone", _best_seeds, file_of("family/01-7.json", _milestone)),
    Parser("train", _train_seeds, file_of("train.json", _train)),
    Parser(
        "train-result",
        lambda: both({"status": "finished", "test_top1": 0.5}),
        file_of("result.json", _train_result),
    ),
    Parser("trust", _trust_seeds, file_of("trust.json", _trust)),
)
