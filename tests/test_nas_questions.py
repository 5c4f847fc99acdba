"""What else a user may ask: another strategy, frozen parts, a plan, a replay, trust."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from conftest import SMALL_ARCH, Finished
from run_cases import Counting, one_calm_thread, settings, table, trials
from safetensors.numpy import save_file

from nas.contract import contract
from nas.contract.__main__ import main
from nas.contract.replay import lineage, load_earlier, read_earlier, replayed_config
from nas.contract.run import plan
from nas.contract.run_folder import SCHEMA
from nas.contract.state import Run
from nas.contract.step import binding_constraint
from nas.core.config import RunConfig
from nas.core.io import read_json, write_json
from nas.core.progress import Console
from nas.distill.jobs import TrainJob, train
from nas.jobs.job import Job, Result
from nas.report import status
from nas.search.constraints import bench_setting, requirements_of
from nas.search.strategies import strategy_names
from nas.search.study import Study, Trial
from nas.train.jobs import pace
from space import Context, get_family
from space.contractions import Band
from space.errors import InputError
from tests._inline import InlineExecutor

FAMILY = get_family("tinyvit")
CTX = Context(img_size=32, num_classes=10)


@pytest.fixture(scope="module", autouse=True)
def calm() -> Iterator[None]:
    """Of archs this small, none is to be too slow by chance; a plan takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nas.search.constraints.NO_SLOWER_SLACK", 0.9)
        patch.setattr("nas.contract.plan.MEASURING_S", 6.0)
        yield from one_calm_thread(patch)


@pytest.fixture(scope="module")
def original(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A contraction of two steps, with weights of its own, to be asked further questions."""
    folder = tmp_path_factory.mktemp("questions") / "original"
    outcome = contract(**settings(finished, beam=2), out=folder, executor=InlineExecutor())
    assert outcome.status == "reached"
    return folder


def test_a_failed_training_is_an_outcome_that_a_resumed_run_repeats(finished: Finished, tmp_path: Path) -> None:
    """It keeps its place: no other candidate is trained instead."""

    class Failing(InlineExecutor):
        failed: str | None = None

        def run(self, job: Job, **more: Any) -> Result:
            if job.function is train and job.key.startswith("s1-") and self.failed in (None, job.key):
                self.failed = job.key
                return Result(job.key, False, {}, "out of memory")
            return super().run(job, **more)

    folder = tmp_path / "run"
    first = contract(**settings(finished), out=folder, executor=Failing())
    assert first.status == "reached"
    before = (folder / "trials.csv").read_bytes()
    assert [r["reason"] for r in trials(folder) if r["state"] == "failed"] == ["out of memory"]
    (folder / "result.json").unlink()
    counting = Counting()
    again = contract(out=folder, resume=True, cache_dir=finished.cache, executor=counting)
    assert again.result["winner"] == first.result["winner"]
    assert (folder / "trials.csv").read_bytes() == before
    assert not [key for function, key in counting.jobs if function is train]


def test_status_tells_what_is_decided_while_a_step_trains(finished: Finished, tmp_path: Path) -> None:
    folder, told = tmp_path / "run", []

    class Looking(InlineExecutor):
        def run(self, job: Job, **more: Any) -> Result:
            if job.function is train and job.key.startswith("s1-"):
                told.append(status(folder))
            return super().run(job, **more)

    contract(**settings(finished, steps=1), out=folder, executor=Looking())
    assert told
    assert "0 of 1 steps done, 1 candidates decided (0 complete, 1 pruned, 0 failed)" in told[0]
    assert "left:  step 1, the final training and test" in told[0]


RIVALS = [s for s in strategy_names() if s not in ("contraction", "uniform")]


@pytest.mark.parametrize("strategy", [s if s == "tpe" else pytest.param(s, marks=pytest.mark.slow) for s in RIVALS])
def test_a_rival_looks_inside_the_targets_band_from_the_start(
    strategy: str, finished: Finished, tmp_path: Path
) -> None:
    """Children of the seed, all on the same batches; its budget is that of the contraction."""
    given = settings(finished, strategy=strategy, baselines=False)
    outcome = contract(**given, out=tmp_path / "run", executor=InlineExecutor())
    assert outcome.status == "reached"
    rows = [r for r in trials(tmp_path / "run") if r["step"] != "0"]
    assert all(360_000 <= int(r["params"]) <= 440_000 for r in rows)
    assert len({r["key"] for r in rows}) == len(rows), "no arch is looked at twice"
    seed = next(r for r in trials(tmp_path / "run") if r["step"] == "0")
    assert {r["parent"] for r in rows} == {seed["key"]}
    kept = {r["key"] for r in rows if r["stage"] == "kept"}
    assert {f["key"] for f in outcome.result["finalists"]} <= kept


@pytest.mark.slow
@pytest.mark.parametrize("strategy", RIVALS)
def test_a_rivals_run_repeats_itself(strategy: str, finished: Finished, tmp_path: Path) -> None:
    given = settings(finished, strategy=strategy, baselines=False)
    once, again = (contract(**given, out=tmp_path / name, executor=InlineExecutor()) for name in ("a", "b"))
    assert [r["key"] for r in trials(tmp_path / "a")] == [r["key"] for r in trials(tmp_path / "b")]
    assert again.result["winner"] == once.result["winner"]


def test_frozen_parts_are_never_moved(finished: Finished, tmp_path: Path) -> None:
    given = settings(finished, freeze=("stage1", "window_sizes"), target_params="500K", steps=1)
    contract(**given, out=tmp_path / "run", executor=InlineExecutor())
    moved = {m.split(" ")[0] for r in trials(tmp_path / "run") for m in r["moves"].split(", ") if m}
    assert moved
    held = ("embed_dims[0]", "depths[0]", "mbconv_expand_ratio", "window_sizes")
    assert not [m for m in moved if m.startswith(held)]
    with pytest.raises(InputError, match="--freeze"):
        contract(**settings(finished, freeze=("stage9",)), out=tmp_path / "no")


def test_every_step_leaves_a_model_that_loads_in_timm(original: Path) -> None:
    import timm
    from safetensors.torch import load_file

    rows = table(original / "models.csv")
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
    scored = [r for r in trials(original) if r["state"] == "complete" and r["step"] != "0"]
    target = int(scored[0]["params"])
    executor = Counting()
    outcome = contract(
        target_params=target, replay=str(original), out=tmp_path / "run", executor=executor, cache_dir=finished.cache
    )
    assert outcome.status == "reached"
    assert outcome.result["reused"]["scores"] >= 1
    trained = [key for job, key in executor.jobs if job is train]
    assert all(key.startswith("final-") for key in trained), "only the final comparison"
    assert outcome.result["winner"] in {r["key"] for r in scored}
    assert str(original) in (tmp_path / "run" / "report.md").read_text()


def test_a_replay_goes_on_from_the_nearest_larger_model(original: Path, finished: Finished, tmp_path: Path) -> None:
    executor = Counting()
    outcome = contract(
        target_params="250K", replay=str(original), out=tmp_path / "run", executor=executor, cache_dir=finished.cache
    )
    assert outcome.status == "reached"
    rows = trials(tmp_path / "run")
    starts = {row["key"] for row in table(original / "models.csv")}
    assert outcome.result["reused"]["start"] in starts
    assert {r["parent"] for r in rows if r["step"] == "1"} == {outcome.result["reused"]["start"]}
    assert not [key for _, key in executor.jobs if key == "seed"], "the seed is in the cache"
    with pytest.raises(InputError, match="--proxy-epochs"):
        contract(target_params="250K", replay=str(original), proxy_epochs=9)
    with pytest.raises(InputError, match="--replay"):
        contract(target_params="250K", replay=str(tmp_path))


def kept_run(folder: Path, rows: list[Trial], **config: Any) -> None:
    """The folder of a run, as far as a replay reads it."""
    folder.mkdir()
    of = RunConfig(seed="small", seed_arch=SMALL_ARCH, target_params=400_000, steps=2, **config)
    told = {"schema": SCHEMA, "config": of.to_dict(), "dataset": {"fingerprint": "data"}}
    (folder / "run.json").write_text(json.dumps(told))
    ledger = Study(folder / "study.db", create=True)
    for row in rows:
        ledger.add(row, SMALL_ARCH, {})
    ledger.close()


def test_a_replay_of_a_replay_finds_the_losses_behind_its_scores(tmp_path: Path) -> None:
    """A replay's own answers have theirs in the run that it replayed, under another step."""
    dataset = cast(Any, SimpleNamespace(fingerprint="data"))
    scored: dict[str, Any] = {"stage": "kept", "state": "complete"}
    rows = [
        Trial(s, k, "", "", "", 1, "", 4, 4, 4, soft_loss=x, epochs=e, **scored)
        for s, k, x, e in ((1, "a", 0.5, 2), (2, "a", 0.4, 2), (1, "b", 0.3, 3))
    ]
    kept_run(tmp_path / "first", rows)
    losses = tmp_path / "first" / "work" / "s1-a" / "holdout.safetensors"
    for name in ("s1-a", "s2-a", "s1-b-more"):
        losses.parent.with_name(name).mkdir(parents=True)
        save_file({"soft_loss": np.zeros(3)}, losses.parent.with_name(name) / losses.name)
    again = [
        Trial(3, k, "", "", "", 1, "", 4, 4, 4, soft_loss=x, **scored) for k, x in (("a", 0.5), ("b", 0.3), ("c", 0.1))
    ]
    kept_run(tmp_path / "second", again, replay=str(tmp_path / "first"))
    kept_run(tmp_path / "third", again[::-1], replay=str(tmp_path / "second"))

    def found(name: str) -> list[str]:
        config = RunConfig(seed="small", target_params=300_000, replay=str(tmp_path / name))
        earlier = load_earlier(config, FAMILY, dataset)
        assert earlier is not None
        return [row.key for row, _ in earlier.scored]

    third = read_earlier(tmp_path / "third", FAMILY, "data")
    assert [each.folder.name for each in lineage(third)] == ["third", "second", "first"]
    assert found("first") == ["a", "a", "b"]
    assert found("second") == ["a", "b"]
    assert found("third") == ["b", "a"]
    losses.unlink()
    assert found("third") == ["b"]
    shutil.rmtree(tmp_path / "first")
    assert found("third") == []
    shutil.move(tmp_path / "second", tmp_path / "first")  # now it says that it replays itself
    assert found("first") == []


@pytest.mark.slow
def test_a_replay_can_be_replayed(original: Path, finished: Finished, tmp_path: Path) -> None:
    scored = [r for r in trials(original) if r["state"] == "complete" and r["step"] != "0"]
    asked: dict[str, Any] = {"target_params": int(scored[0]["params"]), "cache_dir": finished.cache}
    results = []
    for name, before in (("first", original), ("second", tmp_path / "first")):
        outcome = contract(**asked, replay=str(before), out=tmp_path / name, executor=InlineExecutor())
        assert outcome.status == "reached"
        results.append(outcome.result)
    assert results[1]["reused"]["scores"] == results[0]["reused"]["scores"]
    assert results[1]["winner"] == results[0]["winner"]


def test_a_replay_needs_no_file_that_only_the_earlier_run_was_given(tmp_path: Path) -> None:
    lent = tmp_path / "lent.csv"
    kept_run(tmp_path / "first", [], measurements=str(lent))
    asked = {"replay": str(tmp_path / "first"), "target_params": 300_000}
    assert replayed_config(asked).measurements is None
    assert replayed_config({**asked, "measurements": str(lent)}).measurements == str(lent)
    lent.touch()
    assert replayed_config(asked).measurements == str(lent)


def test_what_a_training_learns_is_in_its_key_unless_it_is_sparse(tmp_path: Path) -> None:
    arch = FAMILY.arch(SMALL_ARCH)

    def asked(distill: str, **more: Any) -> tuple[TrainJob, str]:
        """A training's argument, and the name that it is cached by."""
        config = RunConfig(seed="small", target_params=300_000, distill=distill)
        run = cast(Any, object.__new__(Run))
        run.config, run.family, run.context, run.trained = config, FAMILY, CTX, {}
        run.dataset = SimpleNamespace(folder="data", fingerprint="d", train=SimpleNamespace(labels=[0]))
        run.store = {"folder": "store", "id": "s", "use_epochs": 3}
        run.folder, run.fingerprint = SimpleNamespace(path=tmp_path), {"id": "here"}
        jobs: list[Job] = []

        def do_all(tasks: Any, **more: Any) -> list[Result]:
            jobs.extend(task.job for task in tasks)
            return [Result(task.job.key, False, {}, "seen enough") for task in tasks]

        run.do_all = do_all
        run.train(arch, "a", out=tmp_path / "a", epochs=2, init="scratch", **more)
        task = run.training(arch, "a", out=tmp_path / "a", epochs=2, init="scratch")
        return jobs[0].argument, run.training_digest(task.job.argument)

    before, digest = asked("sparse")
    digests = {digest}
    for kind in ("soft", "hard", "token"):
        job, digest = asked(kind)
        assert job == replace(before, distill=kind)
        digests.add(digest)
        assert asked(kind, hard_weight=1.0)[0] == replace(before, hard_weight=1.0)
    assert len(digests) == 4


@pytest.mark.slow
def test_a_run_that_teaches_a_token_goes_on_where_candidates_lose_theirs(finished: Finished, tmp_path: Path) -> None:
    """Seed, candidates, second seeds, trust and the final comparison learn alike."""
    small = {"embed_dim": 64, "depth": 4, "head_dim": 16, "mlp_ratio": 2.0, "patch_size": 8}
    seed = tmp_path / "seed.json"
    seed.write_text(json.dumps({**small, "dist_token": True}))
    jobs: list[Job] = []

    class Watching(InlineExecutor):
        def run(self, job: Job, **more: Any) -> Result:
            jobs.append(job)
            return super().run(job, **more)

    given = settings(
        finished,
        seed=str(seed),
        family="vit",
        distill="token",
        target_params="110K",
        beam=2,
        candidates_per_step=6,
        train_per_step=6,
        steps=1,
        selection="diverse",
        params_tolerance=0.3,
    )
    folder = tmp_path / "run"
    outcome = contract(**given, out=folder, executor=Watching(), check_proxy=3)
    assert outcome.status == "reached"
    trained = [job for job in jobs if job.function is train]
    alone = [job for job in trained if job.key.startswith("check-hard-")]
    assert len(alone) == 3
    for job in trained:
        assert job.argument.distill == ("sparse" if job in alone else "token"), job.key
    lost = set()
    for job in trained:
        told = json.loads((job.argument.out / "result.json").read_text())["values"]
        says = any("no distillation token" in note for note in told["notes"])
        assert says == (job not in alone and not job.argument.arch["dist_token"]), job.key
        lost |= {job.key} if says else set()
    assert any(key.startswith("s1-") for key in lost)
    assert {r["name"] for r in table(folder / "proxy_check.csv")} >= {"proxy (inherit), hard labels"}
    assert "`--distill token`" in (folder / "report.md").read_text()


def test_a_new_pace_replaces_the_old_one_and_no_other_bound(tmp_path: Path) -> None:
    bounds = ("macs<=900000000", "peak_mem_mb<=300@cpu", "speedup>=3@cpu:onnxruntime:float32:b1")
    own = "images_per_s>=50@cpu:eager:float32:b16"
    kept_run(tmp_path / "first", [], min_speedup=1.5, require=(*bounds, own))
    asked = {"replay": str(tmp_path / "first"), "target_params": 300_000}
    before = replayed_config(asked)
    assert (before.min_speedup, before.require) == (1.5, (*bounds, own))
    faster = replayed_config({**asked, "min_speedup": 2.0})
    texts = {r.text for r in requirements_of(faster)}
    want = {r.text for r in requirements_of(before) if r.setting != bench_setting(before)}
    want |= {r.text for r in requirements_of(before) if r.metric == "peak_mem_mb"}
    assert texts == {*want, "speedup>=2@cpu:eager:float32:b16"}
    anew = replayed_config({**asked, "require": ("params<=350000",)})
    assert (anew.min_speedup, anew.require) == (None, ("params<=350000",))


@pytest.mark.parametrize(
    ("asked", "lo", "by"),
    [(1_000_000, 4_500_000, "multiply-adds"), (None, 4_500_000, "parameters"), (1_000_000, 30_000_000, "parameters")],
)
def test_what_keeps_a_band_empty_is_named(asked: int | None, lo: int, by: str) -> None:
    seed = FAMILY.seed("21M")
    here = SimpleNamespace(key=lambda arch: FAMILY.key(arch, CTX), counted={}, family=FAMILY, context=CTX)
    assert binding_constraint(cast(Any, here), [seed], Band(lo, lo + 500_000, asked)) == by


def test_a_plan_trains_nothing_and_foretells_the_counted_work(
    original: Path, finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    executor = Counting()
    made, text = plan(**settings(finished, beam=2), check_proxy=4, executor=executor)
    assert {job.__name__ for job, _ in executor.jobs} <= {"fingerprint", "measure", "pace"}
    work = json.loads((original / "result.json").read_text())["work"]
    assert made.check_proxy is not None
    assert (made.check_proxy.timings, made.check_proxy.trainings) == (4, 20)
    proxy = made.steps[-1].train_gmacs / made.steps[-1].trainings
    assert made.check_proxy.train_gmacs == pytest.approx(4 * (2 + 3 * 10) * proxy, rel=0.35)
    for name in ("train_gmacs", "timings", "trainings"):
        own = getattr(made.work, name) - getattr(made.check_proxy, name)
        assert own == pytest.approx(work[name], rel=0.25), name
    from space.contractions import count_contractions

    seed = FAMILY.seed(finished.flags[1])
    for step in made.steps:
        band = Band(step.band_lo, step.band_hi)
        assert step.contractions == count_contractions(FAMILY, seed, CTX, band)
        assert step.likely > 0
    assert made.floor_params == FAMILY.count_params(FAMILY.floor(seed, CTX), CTX)
    assert made.ceiling_params == FAMILY.count_params(seed, CTX) - 1
    assert 0 < made.hours < 1
    assert "estimate" in text
    assert f"{made.check_proxy.train_gmacs:,.0f} GMACs" in text


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--resume", "run"], "--plan: got --resume"),
        (["--replay", "run"], "--plan: got --replay"),
        (["--replay", "run", "--target-params", "5M"], "--plan: got --replay"),
        (["--seed", "21M", "--target-params", "5M", "--check-proxy", "2"], "--check-proxy: got 2"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(
    flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--plan", *flags]) == 2
    line, *more = capsys.readouterr().err.splitlines()
    assert says in line
    assert not more


def test_a_plan_on_a_batch_that_cannot_be_trained_names_it(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.contract.plan.MEASURING_S", 0.1)

    class Full(InlineExecutor):
        def run(self, job: Job, **more: Any) -> Result:
            if job.function is pace:
                return Result(job.key, False, {}, "out of memory? (see worker.log)")
            return super().run(job, **more)

    with pytest.raises(InputError, match=r"--batch-size: got 65536, .*out of memory\?$"):
        plan(**settings(finished, batch_size=65536, steps=1), executor=Full())


def test_a_token_that_the_seed_has_not_cannot_be_planned(finished: Finished) -> None:
    with pytest.raises(InputError, match=r"--distill: got token for .*hard learns"):
        plan(**settings(finished, distill="token"), executor=InlineExecutor())


def test_trust_is_checked_at_the_door(finished: Finished, tmp_path: Path) -> None:
    """Before anything is spent, also where a run goes on."""
    given = settings(finished)
    with pytest.raises(InputError, match="--check-proxy: got 1000, want at most "):
        contract(**given, out=tmp_path / "run", check_proxy=1000, executor=InlineExecutor())
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="--check-proxy: got 1000, want at most "):
        plan(**given, check_proxy=1000, executor=InlineExecutor())
    folder = tmp_path / "finished"
    shutil.copytree(finished.folder, folder)
    write_json(folder / "proxy_check.json", {"archs": [1, 2, 3]})
    with pytest.raises(InputError, match="--check-proxy: got 4, want the 3 archs named"):
        contract(out=folder, resume=True, check_proxy=4, cache_dir=finished.cache)
    (folder / "proxy_check.json").unlink()
    with pytest.raises(InputError, match="--check-proxy: got 1000, want at most "):
        contract(out=folder, resume=True, check_proxy=1000, cache_dir=finished.cache)
    assert (folder / "result.json").exists()


def test_a_run_without_a_winner_says_that_there_is_no_report(
    original: Path, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(original, folder)
    monkeypatch.setattr("nas.contract.final.pick_winner", lambda run, ranked: "none is fast enough")
    said = io.StringIO()
    outcome = contract(
        out=folder,
        resume=True,
        check_proxy=4,
        cache_dir=finished.cache,
        executor=Counting(),
        console=Console(stream=said),
    )
    assert outcome.status == "stuck"
    assert "proxy check: no report is made of a run that is stuck\n" in said.getvalue()


@pytest.mark.slow
def test_a_trust_report_names_its_archs_first_and_survives_a_stop(
    original: Path, finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--resume", str(original), "--cache-dir", str(finished.cache), "--quiet"]
    assert main([*flags, "--check-proxy", "2"]) == 2
    assert "--check-proxy" in capsys.readouterr().err
    before = (original / "best.safetensors").read_bytes()
    assert main([*flags, "--check-proxy", "4"]) == 0
    result = json.loads((original / "result.json").read_text())
    assert result["proxy_check"]["n"] == 4
    assert len(read_json(original / "proxy_check.json", "archs")["archs"]) == 4
    names = {r["name"] for r in table(original / "proxy_check.csv")}
    assert {"proxy (inherit)", "parameters", "MACs", "synflow", "ceiling: the noise-free truth"} <= (names)
    assert result["proxy_check"]["message"] in (original / "report.md").read_text()
    assert (original / "best.safetensors").read_bytes() == before
    assert main([*flags, "--check-proxy", "4"]) == 0, "and is not made twice"


def test_classes_may_count_alike(finished: Finished, tmp_path: Path) -> None:
    given = settings(finished, metric="balanced_accuracy", steps=1, target_params="450K")
    outcome = contract(**given, out=tmp_path / "run", executor=InlineExecutor())
    assert outcome.status == "reached"
    assert outcome.result["final"]["winner"]["metric"] is not None
    assert "balanced accuracy" in outcome.message
    scored = [r for r in trials(tmp_path / "run") if r["state"] == "complete"]
    assert all(r["metric"] for r in scored)
    assert "balanced accuracy" in (tmp_path / "run" / "report.md").read_text()
    with pytest.raises(InputError, match="--metric"):
        contract(**settings(finished, metric="auc"), out=tmp_path / "no")
