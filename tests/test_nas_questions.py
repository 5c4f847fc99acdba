"""What else a user may ask: another strategy, frozen parts, a plan, a replay, trust."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Finished

from nas.contract import contract, main, plan
from nas.executor import InlineExecutor
from nas.jobs import Job, Result
from nas.measure.watch import Disturbance
from nas.search.strategies import strategy_names
from space import Context, get_family
from space.errors import InputError

FAMILY = get_family("tinyvit")
CTX = Context(img_size=32, num_classes=10)


def settings(finished: Finished, **more: Any) -> dict[str, Any]:
    """The flags of the finished run, for Python."""
    return {
        "seed": finished.flags[1], "target_params": "400K", "effort": "smoke", "threads": 1,
        "img_size": 32, "proxy_images": 200, "teacher_epochs": 2, "cache_dir": finished.cache,
        "bench_blocks": 6, "bench_max_blocks": 6, "shortlist": 3, "proxied": 2, "final_epochs": 1,
        **more,
    }  # fmt: skip


class Calm:
    """Other tests run beside these: nothing disturbs."""

    def __init__(self, device: str) -> None: ...

    def read(self) -> Disturbance:
        return Disturbance(0.0, "")


@pytest.fixture(scope="module", autouse=True)
def calm() -> Iterator[None]:
    """One thread, as an inline executor has its process's; of archs this small, none is to be too
    slow by chance; a plan of seconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nas.measure.rounds.Watch", Calm)
        patch.setattr("nas.search.constraints.NO_SLOWER_SLACK", 0.9)
        patch.setattr("nas.plan.MEASURING_S", 6.0)
        yield
    torch.set_num_threads(before)


class Counting(InlineExecutor):
    """Runs jobs here and remembers which there were."""

    def __init__(self) -> None:
        self.jobs: list[tuple[str, str]] = []

    def run(self, job: Job, **more: Any) -> Result:
        self.jobs.append((job.kind, job.key))
        return super().run(job, **more)


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as lines:
        return list(csv.DictReader(lines))


def ledger(folder: Path) -> list[dict[str, str]]:
    return table(folder / "ledger.csv")


@pytest.fixture(scope="module")
def original(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A contraction of two steps, with weights of its own, to be asked further questions."""
    folder = tmp_path_factory.mktemp("questions") / "original"
    outcome = contract(**settings(finished, beam=2), out=folder, executor=InlineExecutor())
    assert outcome.status == "reached"
    return folder


def test_a_failed_training_is_an_outcome_that_a_resumed_run_repeats(
    finished: Finished, tmp_path: Path
) -> None:
    """It keeps its place: no other candidate is trained instead."""

    class Failing(InlineExecutor):
        failed: str | None = None

        def run(self, job: Job, **more: Any) -> Result:
            if job.kind == "train" and job.key.startswith("s1-") and self.failed in (None, job.key):
                self.failed = job.key
                return Result(job.key, False, {}, "out of memory")
            return super().run(job, **more)

    folder = tmp_path / "run"
    first = contract(**settings(finished), out=folder, executor=Failing())
    assert first.status == "reached"
    before = (folder / "ledger.csv").read_bytes()
    assert [r["reason"] for r in ledger(folder) if r["state"] == "failed"] == ["out of memory"]
    (folder / "result.json").unlink()
    counting = Counting()
    again = contract(out=folder, resume=True, cache_dir=finished.cache, executor=counting)
    assert again.result["winner"] == first.result["winner"]
    assert (folder / "ledger.csv").read_bytes() == before
    assert not [key for kind, key in counting.jobs if kind == "train"]


@pytest.mark.parametrize(
    "strategy",
    [s if s == "tpe" else pytest.param(s, marks=pytest.mark.slow)
     for s in strategy_names() if s not in ("contraction", "uniform")],
)  # fmt: skip
def test_a_rival_looks_inside_the_targets_band_from_the_start(
    strategy: str, finished: Finished, tmp_path: Path
) -> None:
    """Children of the seed, all on the same batches; its budget is that of the contraction."""
    given = settings(finished, strategy=strategy, anchors=False)
    outcome = contract(**given, out=tmp_path / "run", executor=InlineExecutor())
    assert outcome.status == "reached"
    rows = [r for r in ledger(tmp_path / "run") if r["step"] != "0"]
    assert all(360_000 <= int(r["params"]) <= 440_000 for r in rows)
    assert len({r["key"] for r in rows}) == len(rows), "no arch is looked at twice"
    seed = next(r for r in ledger(tmp_path / "run") if r["step"] == "0")
    assert {r["parent"] for r in rows} == {seed["key"]}
    kept = {r["key"] for r in rows if r["stage"] == "kept"}
    assert {f["key"] for f in outcome.result["finalists"]} <= kept
    again = contract(**given, out=tmp_path / "again", executor=InlineExecutor())
    assert [r["key"] for r in ledger(tmp_path / "again")][1:] == [r["key"] for r in rows]
    assert again.result["winner"] == outcome.result["winner"]


def test_frozen_parts_are_never_moved(finished: Finished, tmp_path: Path) -> None:
    given = settings(finished, freeze=("stage1", "window_sizes"), target_params="500K", steps=1)
    contract(**given, out=tmp_path / "run", executor=InlineExecutor())
    moved = {m.split(" ")[0] for r in ledger(tmp_path / "run") for m in r["moves"].split(", ") if m}
    assert moved
    held = ("embed_dims[0]", "depths[0]", "mbconv_expand_ratio", "window_sizes")
    assert not [m for m in moved if m.startswith(held)]
    with pytest.raises(InputError, match="--freeze"):
        contract(**settings(finished, freeze=("stage9",)), out=tmp_path / "no")


def test_every_step_leaves_a_model_that_loads_in_timm(original: Path) -> None:
    import timm
    from safetensors.torch import load_file

    rows = table(original / "family.csv")
    assert [r["kind"] for r in rows] == ["proxy", "proxy", "final"]
    assert float(rows[0]["params"]) > float(rows[1]["params"])
    for row in rows:
        told = json.loads((original / row["file"]).with_suffix(".json").read_text())
        model = timm.create_model(told["timm"]["model"], **told["timm"]["kwargs"])
        model.load_state_dict(load_file(original / row["file"]), strict=True)
        assert sum(p.numel() for p in model.parameters()) == int(row["params"])


def test_finalists_have_a_second_random_seed(original: Path) -> None:
    result = json.loads((original / "result.json").read_text())
    assert len(result["finalists"]) == 2
    assert all(f["soft_loss_again"] not in (None, f["soft_loss"]) for f in result["finalists"])


def test_a_replay_answers_from_scores_without_training_a_candidate(
    original: Path, finished: Finished, tmp_path: Path
) -> None:
    scored = [r for r in ledger(original) if r["state"] == "complete" and r["step"] != "0"]
    target = int(scored[0]["params"])
    executor = Counting()
    outcome = contract(
        target_params=target, replay=str(original), out=tmp_path / "run", executor=executor,
        cache_dir=finished.cache,
    )  # fmt: skip
    assert outcome.status == "reached"
    assert outcome.result["reused"]["scores"] >= 1
    trained = [key for kind, key in executor.jobs if kind == "train"]
    assert all(key.startswith("final-") for key in trained), "only the final comparison"
    assert outcome.result["winner"] in {r["key"] for r in scored}
    assert str(original) in (tmp_path / "run" / "report.md").read_text()


def test_a_replay_goes_on_from_the_nearest_larger_model(
    original: Path, finished: Finished, tmp_path: Path
) -> None:
    executor = Counting()
    outcome = contract(
        target_params="250K", replay=str(original), out=tmp_path / "run", executor=executor,
        cache_dir=finished.cache,
    )  # fmt: skip
    assert outcome.status == "reached"
    rows = ledger(tmp_path / "run")
    starts = {row["key"] for row in table(original / "family.csv")}
    assert outcome.result["reused"]["start"] in starts
    assert {r["parent"] for r in rows if r["step"] == "1"} == {outcome.result["reused"]["start"]}
    assert not [key for _, key in executor.jobs if key == "seed"], "the seed is in the cache"
    with pytest.raises(InputError, match="--proxy-epochs"):
        contract(target_params="250K", replay=str(original), proxy_epochs=9)
    with pytest.raises(InputError, match="--replay"):
        contract(target_params="250K", replay=str(tmp_path))


def test_a_plan_trains_nothing_and_foretells_the_counted_work(
    original: Path, finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    executor = Counting()
    made, text = plan(**settings(finished, beam=2), executor=executor)
    assert {kind for kind, _ in executor.jobs} <= {"hello", "measure", "pace"}
    work = json.loads((original / "result.json").read_text())["work"]
    assert made.work.train_gmacs == pytest.approx(work["train_gmacs"], rel=0.25)
    assert made.work.timings == pytest.approx(work["timings"], rel=0.25)
    assert made.work.trainings == pytest.approx(work["trainings"], rel=0.25)
    from space.neighbours import Band, count_contractions

    seed = FAMILY.seed(finished.flags[1])
    for step in made.steps:
        band = Band(step.band_lo, step.band_hi)
        assert step.contractions == count_contractions(FAMILY, seed, CTX, band)
        assert step.likely > 0
    assert made.floor_params == FAMILY.count_params(FAMILY.floor(seed, CTX), CTX)
    assert made.ceiling_params == FAMILY.count_params(seed, CTX) - 1
    assert 0 < made.hours < 1
    assert "estimate" in text
    flags = [*finished.flags, "--plan"]
    assert main([*flags, "--resume", str(original)]) == 2
    assert "--plan" in capsys.readouterr().err


@pytest.mark.slow
def test_a_trust_report_names_its_archs_first_and_survives_a_stop(
    original: Path, finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--resume", str(original), "--cache-dir", str(finished.cache), "--quiet"]
    assert main([*flags, "--trust", "2"]) == 2
    assert "--trust" in capsys.readouterr().err
    before = (original / "best.safetensors").read_bytes()
    assert main([*flags, "--trust", "4"]) == 0
    result = json.loads((original / "result.json").read_text())
    assert result["trust"]["n"] == 4
    assert len(json.loads((original / "trust.json").read_text())) == 4
    names = {r["name"] for r in table(original / "trust.csv")}
    assert {
        "proxy (inherit)",
        "parameters",
        "MACs",
        "synflow",
        "ceiling: the noise-free truth",
    } <= (names)
    assert result["trust"]["says"] in (original / "report.md").read_text()
    assert (original / "best.safetensors").read_bytes() == before
    assert main([*flags, "--trust", "4"]) == 0, "and is not made twice"


def test_classes_may_count_alike(finished: Finished, tmp_path: Path) -> None:
    given = settings(finished, metric="balanced_accuracy", steps=1, target_params="450K")
    outcome = contract(**given, out=tmp_path / "run", executor=InlineExecutor())
    assert outcome.status == "reached"
    assert outcome.result["final"]["winner"]["metric"] is not None
    scored = [r for r in ledger(tmp_path / "run") if r["state"] == "complete"]
    assert all(r["metric"] for r in scored)
    assert "balanced accuracy" in (tmp_path / "run" / "report.md").read_text()
    with pytest.raises(InputError, match="--metric"):
        contract(**settings(finished, metric="auc"), out=tmp_path / "no")
