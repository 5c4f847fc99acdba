"""What else a user may ask: another strategy, frozen parts, a plan, a replay, a proxy check."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator, Sequence
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
    """It keeps its place: no other candidate is trained instead. `--status` tells what is decided meanwhile."""
    folder, lines, failed = tmp_path / "run", list[str](), set[str]()

    def fail(job: Job) -> Result | None:
        if job.function is train and job.key.startswith("s1-"):
            lines.append(status(folder))
            if failed <= {job.key}:
                failed.add(job.key)
                return Result(job.key, False, {}, "out of memory")
        return None

    first = contract(**settings(finished), out=folder, executor=InlineExecutor(fail))
    assert first.status == "reached"
    assert "0 of 2 steps done, 1 candidates decided (0 complete, 1 pruned, 0 failed)" in lines[0]
    assert "left:  steps 1 to 2, the final training and test" in lines[0]
    before = (folder / "trials.csv").read_bytes()
    assert [r["reason"] for r in trials(folder) if r["state"] == "failed"] == ["out of memory"]
    (folder / "result.json").unlink()
    counting = Counting()
    again = contract(out=folder, resume=True, cache_dir=finished.cache, executor=counting)
    assert again.result["winner"] == first.result["winner"]
    assert (folder / "trials.csv").read_bytes() == before
    assert "train" not in counting.kinds


RIVALS = [s for s in strategy_names() if s not in ("contraction", "uniform")]


@pytest.mark.parametrize("strategy", [s if s == "tpe" else pytest.param(s, marks=pytest.mark.slow) for s in RIVALS])
def test_a_rival_looks_inside_the_targets_band_from_the_start(
    strategy: str, finished: Finished, tmp_path: Path
) -> None:
    """Children of the seed, all on the same batches; its budget is that of the contraction."""
    given = settings(finished, strategy=strategy, baselines=False)
    outcome = contract(**given, out=tmp_path / "run", executor=InlineExecutor())
    assert outcome.status == "reached"
    seed, *rows = trials(tmp_path / "run")
    assert all(360_000 <= int(r["params"]) <= 440_000 for r in rows)
    assert len({r["key"] for r in rows}) == len(rows), "no arch is looked at twice"
    assert {r["parent"] for r in rows} == {seed["key"]}
    kept = {r["key"] for r in rows if r["stage"] == "kept"}
    assert {f["key"] for f in outcome.result["finalists"]} <= kept
    if strategy != "tpe":
        again = contract(**given, out=tmp_path / "again", executor=InlineExecutor())
        assert [r["key"] for r in trials(tmp_path / "again")[1:]] == [r["key"] for r in rows]
        assert again.result["winner"] == outcome.result["winner"]


def test_frozen_parts_are_never_moved_and_classes_may_count_alike(finished: Finished, tmp_path: Path) -> None:
    frozen, metric = ("stage1", "window_sizes"), "balanced_accuracy"
    given = settings(finished, freeze=frozen, metric=metric, target_params="500K", steps=1)
    outcome = contract(**given, out=tmp_path / "run", executor=InlineExecutor())
    rows = trials(tmp_path / "run")
    moved = {m.split(" ")[0] for r in rows for m in r["moves"].split(", ") if m}
    assert moved
    held = ("embed_dims[0]", "depths[0]", "mbconv_expand_ratio", "window_sizes")
    assert not [m for m in moved if m.startswith(held)]
    assert outcome.result["final"]["winner"]["metric"] is not None
    assert "balanced accuracy" in outcome.message
    assert all(r["metric"] for r in rows if r["state"] == "complete")
    assert "balanced accuracy" in (tmp_path / "run" / "report.md").read_text()
    for bad, flag in (({"freeze": ("stage9",)}, "--freeze"), ({"metric": "auc"}, "--metric")):
        with pytest.raises(InputError, match=flag):
            contract(**settings(finished, **bad), out=tmp_path / "no")


def test_every_step_leaves_a_model_that_loads_in_timm_and_finalists_have_a_second_seed(original: Path) -> None:
    import timm
    from safetensors.torch import load_file

    rows = table(original / "models.csv")
    assert [r["kind"] for r in rows] == ["proxy", "proxy", "final"]
    assert float(rows[0]["params"]) > float(rows[1]["params"])
    for row in rows:
        call = json.loads((original / row["file"]).with_suffix(".json").read_text())["timm"]
        model = timm.create_model(call["model"], **call["kwargs"])
        model.load_state_dict(load_file(original / row["file"]), strict=True)
        assert sum(p.numel() for p in model.parameters()) == int(row["params"])
    finalists = json.loads((original / "result.json").read_text())["finalists"]
    assert len(finalists) == 2
    assert all(f["soft_loss_again"] not in (None, f["soft_loss"]) for f in finalists)


def test_a_replay_answers_from_scores_without_training_a_candidate(
    original: Path, finished: Finished, tmp_path: Path
) -> None:
    """The replay can be replayed in turn."""
    scored = [r for r in trials(original) if r["state"] == "complete" and r["step"] != "0"]
    target, results = int(scored[0]["params"]), []
    for name, before in (("first", original), ("second", tmp_path / "first")):
        executor, out = Counting(), tmp_path / name
        given: dict[str, Any] = {"target_params": target, "replay": str(before), "cache_dir": finished.cache}
        outcome = contract(**given, out=out, executor=executor)
        assert outcome.status == "reached"
        assert outcome.result["reused"]["scores"] >= 1
        trained = [key for job, key in executor.jobs if job is train]
        assert all(key.startswith("final-") for key in trained), "only the final comparison"
        assert outcome.result["winner"] in {r["key"] for r in scored}
        assert str(before) in (out / "report.md").read_text()
        results.append(outcome.result)
    assert results[1]["reused"]["scores"] == results[0]["reused"]["scores"]
    assert results[1]["winner"] == results[0]["winner"]


def test_a_replay_continues_from_the_nearest_larger_model(original: Path, finished: Finished, tmp_path: Path) -> None:
    executor = Counting()
    given: dict[str, Any] = {"target_params": "250K", "replay": str(original), "cache_dir": finished.cache}
    outcome = contract(**given, out=tmp_path / "run", executor=executor)
    assert outcome.status == "reached"
    start = outcome.result["reused"]["start"]
    assert start in {row["key"] for row in table(original / "models.csv")}
    assert {r["parent"] for r in trials(tmp_path / "run") if r["step"] == "1"} == {start}
    assert not [key for _, key in executor.jobs if key == "seed"], "the seed is in the cache"
    for bad, flag in (({"proxy_epochs": 9}, "--proxy-epochs"), ({"replay": str(tmp_path)}, "--replay")):
        with pytest.raises(InputError, match=flag):
            contract(**{**given, **bad})


def kept_run(folder: Path, rows: Sequence[Trial] = (), **config: Any) -> dict[str, Any]:
    """Make the folder of a run, as far as a replay reads it; return the settings of its replay."""
    folder.mkdir()
    of = RunConfig(seed="small", seed_arch=SMALL_ARCH, target_params=400_000, steps=2, **config)
    write_json(folder / "run.json", {"schema": SCHEMA, "config": of.to_dict(), "dataset": {"fingerprint": "data"}})
    study = Study(folder / "study.db", create=True)
    for row in rows:
        study.add(row, SMALL_ARCH, {})
    study.close()
    return {"replay": str(folder), "target_params": 300_000}


def scored(step: int, key: str, loss: float, epochs: int = 0) -> Trial:
    more: dict[str, Any] = {"stage": "kept", "state": "complete", "soft_loss": loss, "epochs": epochs}
    return Trial(step, key, "", "", "", 1, "", 4, 4, 4, **more)


def test_a_replay_of_a_replay_finds_the_losses_behind_its_scores(tmp_path: Path) -> None:
    """A replay's own answers have theirs in the run that it replayed, under another step."""
    dataset = cast(Any, SimpleNamespace(fingerprint="data"))
    first, second = tmp_path / "first", tmp_path / "second"
    kept_run(first, [scored(1, "a", 0.5, 2), scored(2, "a", 0.4, 2), scored(1, "b", 0.3, 3)])
    for name in ("s1-a", "s2-a", "s1-b-more"):
        (first / "work" / name).mkdir(parents=True)
        save_file({"soft_loss": np.zeros(3)}, first / "work" / name / "holdout.safetensors")
    again = [scored(3, "a", 0.5), scored(3, "b", 0.3), scored(3, "c", 0.1)]
    kept_run(second, again, replay=str(first))
    kept_run(tmp_path / "third", again[::-1], replay=str(second))

    def found(name: str) -> list[str]:
        config = RunConfig(seed="small", target_params=300_000, replay=str(tmp_path / name))
        earlier = load_earlier(config, FAMILY, dataset)
        assert earlier is not None
        return [row.key for row, _ in earlier.scored]

    third = read_earlier(tmp_path / "third", FAMILY, "data")
    assert [each.folder.name for each in lineage(third)] == ["third", "second", "first"]
    assert [found(name) for name in ("first", "second", "third")] == [["a", "a", "b"], ["a", "b"], ["b", "a"]]
    (first / "work" / "s1-a" / "holdout.safetensors").unlink()
    assert found("third") == ["b"]
    shutil.rmtree(first)
    assert found("third") == []
    shutil.move(second, first)  # its replay is now itself
    assert found("first") == []


def test_a_replay_needs_no_file_that_only_the_earlier_run_was_given(tmp_path: Path) -> None:
    lent = tmp_path / "lent.csv"
    asked = kept_run(tmp_path / "first", measurements=str(lent))
    assert replayed_config(asked).measurements is None
    assert replayed_config({**asked, "measurements": str(lent)}).measurements == str(lent)
    lent.touch()
    assert replayed_config(asked).measurements == str(lent)


def test_what_a_training_learns_is_in_its_key(tmp_path: Path) -> None:
    run = cast(Any, object.__new__(Run))
    run.family, run.context, run.fingerprint = FAMILY, CTX, {"id": "here"}
    run.dataset = SimpleNamespace(folder="data", fingerprint="d", train=SimpleNamespace(labels=[0]))
    run.store, run.folder = {"folder": "store", "id": "s", "use_epochs": 3}, SimpleNamespace(path=tmp_path)

    def asked(distill: str, **more: Any) -> TrainJob:
        run.config = RunConfig(seed="small", target_params=300_000, distill=distill, proxy_init="scratch")
        arch = FAMILY.arch(SMALL_ARCH)
        job: TrainJob = run.training(arch, "a", out=tmp_path / "a", epochs=2, **more).job.argument
        return job

    before = asked("sparse")
    assert before.init == "scratch", "as the run's proxies start"
    digests = {run.training_digest(before)}
    for kind in ("soft", "hard", "token"):
        job = asked(kind)
        assert job == replace(before, distill=kind)
        digests.add(run.training_digest(job))
        assert asked(kind, hard_weight=1.0) == replace(before, hard_weight=1.0)
    assert len(digests) == 4


@pytest.mark.slow
def test_a_run_that_teaches_a_token_goes_on_where_candidates_lose_theirs(finished: Finished, tmp_path: Path) -> None:
    """Seed, candidates, second seeds, proxy check and the final comparison learn alike."""
    small = {"embed_dim": 64, "depth": 4, "head_dim": 16, "mlp_ratio": 2.0, "patch_size": 8}
    seed = tmp_path / "seed.json"
    seed.write_text(json.dumps({**small, "dist_token": True}))
    jobs: list[Job] = []
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
    outcome = contract(**given, out=folder, executor=InlineExecutor(jobs.append), check_proxy=3)
    assert outcome.status == "reached"
    trained = [job for job in jobs if job.function is train]
    alone = [job for job in trained if job.key.startswith("check-hard-")]
    assert len(alone) == 3
    for job in trained:
        assert job.argument.distill == ("sparse" if job in alone else "token"), job.key
    lost = set()
    for job in trained:
        values = json.loads((job.argument.out / "result.json").read_text())["values"]
        noted = any("no distillation token" in note for note in values["notes"])
        assert noted == (job not in alone and not job.argument.arch["dist_token"]), job.key
        lost |= {job.key} if noted else set()
    assert any(key.startswith("s1-") for key in lost)
    assert {r["name"] for r in table(folder / "proxy_check.csv")} >= {"proxy (inherit), hard labels"}
    assert "`--distill token`" in (folder / "report.md").read_text()


def test_a_new_pace_replaces_the_old_one_and_no_other_bound(tmp_path: Path) -> None:
    bounds = ("macs<=900000000", "peak_mem_mb<=300@cpu", "speedup>=3@cpu:onnxruntime:float32:b1")
    own = "images_per_s>=50@cpu:eager:float32:b16"
    asked = kept_run(tmp_path / "first", min_speedup=1.5, require=(*bounds, own))
    before = replayed_config(asked)
    assert (before.min_speedup, before.require) == (1.5, (*bounds, own))
    texts = {r.text for r in requirements_of(replayed_config({**asked, "min_speedup": 2.0}))}
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
    assert {job.__name__ for job, _ in executor.jobs} <= {"check_labels", "fingerprint", "visit", "pace"}
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
    ("flags", "refusal"),
    [
        (["--resume", "run"], "--plan: got --resume"),
        (["--replay", "run"], "--plan: got --replay"),
        (["--replay", "run", "--target-params", "5M"], "--plan: got --replay"),
        (["--seed", "21M", "--target-params", "5M", "--check-proxy", "2"], "--check-proxy: got 2"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(
    flags: list[str], refusal: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--plan", *flags]) == 2
    line, *more = capsys.readouterr().err.splitlines()
    assert refusal in line
    assert not more


def test_a_plan_on_a_batch_that_cannot_be_trained_names_it(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.contract.plan.MEASURING_S", 0.1)

    def full(job: Job) -> Result | None:
        return Result(job.key, False, {}, "out of memory? (see worker.log)") if job.function is pace else None

    with pytest.raises(InputError, match=r"--batch-size: got 65536, .*out of memory\?$"):
        plan(**settings(finished, batch_size=65536, steps=1), executor=InlineExecutor(full))
    with pytest.raises(InputError, match=r"--distill: got token for .*hard learns"):
        plan(**settings(finished, distill="token"), executor=InlineExecutor())


def test_a_proxy_check_is_refused_before_anything_is_spent(finished: Finished, tmp_path: Path) -> None:
    """Also where a run continues."""
    folder, few = tmp_path / "finished", "--check-proxy: got 1000, want at most "
    shutil.copytree(finished.folder, folder)
    resume: dict[str, Any] = {"out": folder, "resume": True, "cache_dir": finished.cache}
    new = settings(finished, executor=InlineExecutor())
    calls = (lambda **more: contract(**new, out=tmp_path / "run", **more), lambda **more: plan(**new, **more))
    for call in (*calls, lambda **more: contract(**resume, **more)):
        with pytest.raises(InputError, match=few):
            call(check_proxy=1000)
    assert not (tmp_path / "run").exists()
    write_json(folder / "proxy_check.json", {"archs": [1, 2, 3]})
    with pytest.raises(InputError, match="--check-proxy: got 4, want the 3 archs named"):
        contract(**resume, check_proxy=4)
    assert (folder / "result.json").exists()


def test_a_run_without_a_winner_says_that_there_is_no_report(
    original: Path, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, lines = tmp_path / "run", io.StringIO()
    shutil.copytree(original, folder)
    monkeypatch.setattr("nas.contract.final.pick_winner", lambda run, ranked: "none is fast enough")
    given: dict[str, Any] = {"cache_dir": finished.cache, "executor": Counting(), "console": Console(stream=lines)}
    assert contract(out=folder, resume=True, check_proxy=4, **given).status == "stuck"
    assert "proxy check: no report is made of a run that is stuck\n" in lines.getvalue()


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
