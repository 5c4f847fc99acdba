"""A race spends what losers save on those that remain, and a rung's stop leaves no trace."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from run_cases import settings
from safetensors.numpy import save_file

from nas.contract import contract
from nas.contract.race import race, rungs_of
from nas.contract.state import MORE, Incumbent, Run, Task
from nas.contract.step import Step, rank
from nas.core.config import choices_of
from nas.core.per_image import losses_of, per_image, with_metric
from nas.distill.jobs import EarlierRung, TrainJob, train
from nas.jobs.job import CHECKPOINT, Job, Result, failed_before, keep_failure, run_job
from nas.search.study import Trial
from nas.train.optim import SCRATCH_LR
from space import Context
from space.contractions import Candidate
from space.errors import InputError
from tests._inline import InlineExecutor


@pytest.mark.parametrize("epochs", range(1, 65))
def test_rungs_end_with_the_whole_length_and_halve_down_to_one(epochs: int) -> None:
    rungs = rungs_of(epochs)
    assert rungs[0] == 1
    assert rungs[-1] == epochs
    assert all(a < b <= 2 * a for a, b in itertools.pairwise(rungs))


class Rows:
    """What a race needs of a study."""

    def __init__(self) -> None:
        self.rows: list[Trial] = []

    def add(self, trial: Trial, arch: Any, violations: Any) -> None:
        self.rows.append(trial)

    def arch(self, step: int, key: str) -> str:
        return key


class MadeUpRun(Run):
    """What a race needs of a run: made-up losses by candidate, and a diary of its trainings.

    An arch is its own key.
    """

    def __init__(
        self,
        root: Path,
        means: dict[str, float],
        *,
        racing: bool = True,
        failing: str = "",
        fails_late: bool = False,
        stepwise: bool = True,
        keep: int = 1,
        epochs: int = 8,
        stored: int = 100,
    ) -> None:
        self.root, self.means, self.failing, self.fails_late = root, means, failing, fails_late
        self.diary: list[dict[str, Any]] = []
        same: Any = SimpleNamespace
        more = {"proxy_init": "inherit", "importance": "prefix", "metric": "top1", "steps": 3}
        self.config = same(racing=racing, proxy_epochs=epochs, beam=keep, **more)
        self.strategy = same(stepwise=stepwise)
        self.settings = ()
        self.store = {"use_epochs": stored}
        self.folder = same(job_folder=lambda name: self.root / name, drop_weights=self._drop)
        self.family = same(
            key=lambda arch, context: arch,
            label=str,
            describe_moves=lambda parent, arch: "",
            count_params=lambda arch, context: 1,
            to_dict=str,
            arch=str,
        )
        self.context = self.seed_arch = same()
        self.study = Rows()  # type: ignore[assignment]

    def band(self, step: int) -> Any:
        return SimpleNamespace(hi=1)

    def _drop(self, name: str) -> None:
        (self.root / name / "weights.safetensors").unlink(missing_ok=True)

    def training(self, arch: Any, name: str, **more: Any) -> Task:
        return Task(Job(train, {"key": str(arch), **more}, name), self.root / name, 0.0)

    def train_all(self, tasks: Any, **options: Any) -> list[Result]:
        """Do the jobs one by one."""
        found = []
        for task in tasks:
            more = {k: v for k, v in task.job.argument.items() if k != "key"}
            result = failed_before(task.out) or self.train(task.job.argument["key"], task.job.key, out=task.out, **more)
            if not result.ok:
                keep_failure(task.out, result)
            found.append(result)
        return found

    def train(self, key: str, name: str, **more: Any) -> Result:
        self.diary.append({"key": key, "name": name, **more})
        if key in self.failing and not (self.fails_late and more.get("before") is None):
            return Result(name, False, {}, "out of memory")
        before = more.get("before")
        if before is not None:
            assert (before[1] / CHECKPOINT).exists(), "a rung goes on from where one stood"
        out = more["out"]
        out.mkdir(exist_ok=True)
        rng = np.random.default_rng(7)
        noise = rng.normal(size=400).astype(np.float32) * 0.3
        truth = np.zeros(400, dtype=np.int64)
        arrays = {"soft_loss": self.means[key] + noise, "predicted": truth, "truth": truth}
        save_file(arrays, out / "holdout.safetensors")
        left = CHECKPOINT if more.get("rung") is not None else "weights.safetensors"
        (out / left).write_bytes(b"x")
        values = {"soft_loss": self.means[key], "soft_loss_se": 0.01, "top1": 0.5, "top1_se": 0.1}
        return Result(name, True, values, None, 1.0)


PARENT = Incumbent(cast(Any, "parent"), "parent", Path("parent"), 1.0, 1.0, 1.0)


def step_of(run: MadeUpRun, incumbents: Sequence[Incumbent] = ()) -> Step:
    """A first step whose candidates are all equally fast."""
    timed = {"images_per_s": 1.0, "ratio": 1.0}
    found = [Candidate(cast(Any, key), key, 1, 1, 1, (), None, PARENT.arch, **timed) for key in run.means]
    return Step(1, PARENT, incumbents, [PARENT], {}, candidates={each.key: each for each in found})


def run_race(run: MadeUpRun) -> list[Trial]:
    step = step_of(run)
    return race(run, step, list(step.candidates.values()))


def test_losers_stop_and_those_that_remain_get_their_epochs(tmp_path: Path) -> None:
    means = {"a": 1.0, "b": 1.01, **{f"z{i}": 3.0 + i for i in range(6)}}
    run = MadeUpRun(tmp_path, means, keep=2)
    raced = run_race(run)
    assert [t.key for t in raced] == list(means), "in the order of the candidates"
    through = [t for t in raced if t.stage != "race"]
    stopped = [t for t in raced if t.stage == "race"]
    assert {t.key for t in through} == {"a", "b"}
    assert all(t.epochs == 1 and "after 1 of 8 epochs" in t.reason for t in stopped)
    # Six stopped after one of eight epochs: 42 saved, 21 more for each of two.
    assert {t.epochs for t in through} == {8 + 21}
    folders = {run.trial_folder(t).name for t in through}
    assert all(name.endswith(MORE) for name in folders)
    assert sum(t.epochs for t in raced) <= 8 * len(means)
    assert not list(tmp_path.glob(f"*/{CHECKPOINT}")), "no checkpoint is left"
    assert {p.parent.name for p in tmp_path.glob("*/weights.safetensors")} == folders
    for trial in raced:
        assert (run.trial_folder(trial) / "holdout.safetensors").exists()


@pytest.mark.parametrize("racing", [False, True])
def test_equals_all_reach_the_end_and_nothing_is_raced_needlessly(tmp_path: Path, racing: bool) -> None:
    run = MadeUpRun(tmp_path, dict.fromkeys("abcd", 1.0), racing=racing, epochs=4)
    assert all((t.stage, t.epochs) == ("proxy", 4) for t in run_race(run))
    assert len(run.diary) == (4 * len(rungs_of(4)) if racing else 4)
    few = MadeUpRun(tmp_path / "few", {"a": 1.0, "b": 9.0}, keep=2, epochs=4)
    few.root.mkdir()
    assert all(t.stage == "proxy" for t in run_race(few))
    assert len(few.diary) == 2, "as many places as candidates: nothing to race for"


def test_a_failure_is_an_outcome_of_its_own(tmp_path: Path) -> None:
    run = MadeUpRun(tmp_path, {"a": 1.0, "b": 1.0, "c": 1.0}, failing="b", epochs=2)
    raced = run_race(run)
    assert [t.state for t in raced] == ["complete", "failed", "complete"]
    assert raced[1].reason == "out of memory"
    assert [d["key"] for d in run.diary].count("b") == 1, "and is not trained any further"
    done = len(run.diary)
    assert run_race(run) == raced
    assert [d["key"] for d in run.diary[done:]].count("b") == 0, "nor on resuming"


@pytest.mark.parametrize("stored", [3, 9, 100])
def test_saved_epochs_stay_within_the_stored_labels(tmp_path: Path, stored: int) -> None:
    run = MadeUpRun(tmp_path, {"a": 1.0, "b": 1.0, **{f"z{i}": 5.0 for i in range(4)}}, epochs=2, stored=stored)
    run_race(run)
    more = [d for d in run.diary if d["name"].endswith(MORE)]
    assert more
    assert all(d["first_epoch"] + d["epochs"] <= stored for d in more)


def test_where_steps_are_compared_all_train_equally_long(tmp_path: Path) -> None:
    means = {"a": 1.0, "b": 1.01, **{f"z{i}": 3.0 + i for i in range(6)}}
    raced = run_race(MadeUpRun(tmp_path, means, stepwise=False, keep=2))
    assert {t.epochs for t in raced if t.stage != "race"} == {8}
    assert not list(tmp_path.glob(f"*{MORE}"))


def test_a_race_that_nobody_ends_is_a_recorded_outcome(tmp_path: Path) -> None:
    means = {"a": 1.0, **{f"z{i}": 5.0 + i for i in range(3)}}
    run = MadeUpRun(tmp_path, means, failing="a", fails_late=True, epochs=4)
    raced = run_race(run)
    assert [t.state for t in raced] == ["failed", "pruned", "pruned", "pruned"]
    assert rank(run, step_of(run), raced) == []
    assert {t.key: (t.stage, t.state) for t in run.study.rows} == {
        "a": ("proxy", "failed"),
        **dict.fromkeys(("z0", "z1", "z2"), ("race", "pruned")),
    }


def test_an_arch_trained_again_holds_one_place(tmp_path: Path) -> None:
    run = MadeUpRun(tmp_path, {"a": 1.0, "b": 2.0}, stepwise=False, keep=2, epochs=2)
    raced, kept = run_race(run), list[Incumbent]()
    for _ in range(2):
        kept = rank(run, step_of(run, kept), raced)
        assert [i.key for i in kept] == ["a", "b"]


def test_that_a_job_failed_is_kept_and_success_is_not_in_its_way(tmp_path: Path) -> None:
    out = tmp_path / "work" / "l1-x.json"
    assert failed_before(out) is None
    keep_failure(out, Result("order", False, {}, "out of memory", 2.0))
    again = failed_before(out)
    assert again is not None
    assert (again.ok, again.reason, again.seconds) == (False, "out of memory", 2.0)
    assert failed_before(out.with_name("l1-y.json")) is None
    for damaged in ("[]", "{}", "{"):
        out.with_name("l1-x.json.failed.json").write_text(damaged)
        with pytest.raises(InputError, match=r"l1-x\.json\.failed\.json"):
            failed_before(out)


def test_rare_classes_weigh_as_much_as_frequent_ones(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    truth = np.repeat([0, 1, 2], [90, 9, 1])
    losses = rng.uniform(0, 2, 100).astype(np.float32)
    predicted = np.where(rng.uniform(size=100) < 0.7, truth, (truth + 1) % 3)
    arrays = {"soft_loss": losses, "predicted": predicted, "truth": truth}
    for split in ("holdout", "test"):
        save_file(arrays, tmp_path / f"{split}.safetensors")
    by_class = [losses[truth == c].mean() for c in range(3)]
    assert losses_of(tmp_path, "macro_f1").mean() == pytest.approx(np.mean(by_class), rel=1e-6)
    assert losses_of(tmp_path).mean() == pytest.approx(losses.mean(), rel=1e-6)
    values = with_metric({"soft_loss": 9.0}, tmp_path, "balanced_accuracy", 3)
    recall = [(predicted[truth == c] == c).mean() for c in range(3)]
    assert values["metric"] == values["test_metric"] == pytest.approx(np.mean(recall))
    assert values["soft_loss"] == pytest.approx(np.mean(by_class), rel=1e-6)
    assert (per_image(tmp_path, "test").truth == truth).all()


def test_a_training_cut_into_rungs_ends_in_the_same_bits(finished: Any, tmp_path: Path) -> None:
    """One training of two epochs, straight and as two jobs."""
    (job_argument,) = _scratch_trainings(finished)
    assert (job_argument.init, job_argument.lr) == ("scratch", SCRATCH_LR)
    job_argument = replace(job_argument, epochs=2, checkpoint=False, shared=False, test=False)
    whole = run_job(Job(train, replace(job_argument, out=tmp_path / "whole"), "whole"))
    first = run_job(Job(train, replace(job_argument, rung=1, out=tmp_path / "first"), "first"))
    ticks: list[float] = []
    past = EarlierRung(epochs=1, checkpoint=tmp_path / "first" / CHECKPOINT)
    job = Job(train, replace(job_argument, continue_from=past, out=tmp_path / "second"), "second")
    part = tmp_path / "second.part"  # where a worker was killed while it wrote
    part.mkdir()
    (part / f".{CHECKPOINT}.abc123.tmp").write_bytes(b"half")
    second = run_job(job, ticks.append)
    assert not list((tmp_path / "second").glob(".*")), "left behind by the one that was killed"
    assert all(result.ok for result in (whole, first, second)), [whole, first, second]
    assert whole.values["weights_digest"] == second.values["weights_digest"]
    assert first.values["weights_digest"] != second.values["weights_digest"]
    names = [sorted(p.name for p in (tmp_path / n).glob("*.safetensors")) for n in ("whole", "first", "second")]
    assert names[0] == names[2] == ["holdout.safetensors", "weights.safetensors"]
    assert names[1] == [CHECKPOINT, "holdout.safetensors"]
    trained = sum(ticks) - whole.values["holdout_images"]
    assert trained == whole.values["images"] / 2, "the first rung's images are not counted twice"


def _scratch_trainings(finished: Any) -> list[TrainJob]:
    """Return the argument of a scratch training on the finished run's data and labels."""
    found: list[TrainJob] = []

    def listen(job: Job) -> Result | None:
        if job.function is not train:
            return None
        found.append(job.argument)
        return Result(job.key, False, {}, "enough")

    out = finished.folder.parent / "listening"
    with pytest.raises(InputError, match="enough"):
        contract(**settings(finished, seed_epochs=2), out=out, executor=InlineExecutor(listen))
    return found


def test_a_trainings_key_is_that_of_what_it_reads(tmp_path: Path) -> None:
    """More labels than a training comes to change nothing; a checkpoint counts by its content."""
    run = SimpleNamespace(
        dataset=SimpleNamespace(fingerprint="d"),
        fingerprint={"id": "f"},
        config=SimpleNamespace(threads=1, metric="top1"),
    )

    def digest(label_epochs: int, **more: Any) -> str:
        job = TrainJob(
            **dict.fromkeys(("family", "missing", "label_overflow", "device", "store_id"), ""),
            arch={},
            context=Context(32, 10),
            **dict.fromkeys(("dataset", "store", "out"), Path()),
            batch_size=1,
            random_seed=0,
            lr=0.1,
            epochs=4,
            label_epochs=label_epochs,
            **{"init": "scratch", **more},
        )
        return Run.training_digest(run, job)  # type: ignore[arg-type]

    assert digest(4) == digest(9) == digest(100)
    assert len({digest(3), digest(2), digest(4)}) == 3, "where labels start again, it counts"
    assert digest(4, first_epoch=2) != digest(6, first_epoch=2) == digest(60, first_epoch=2)
    assert len({digest(4, distill=kind) for kind in choices_of("distill")}) == 4, "what it learns counts"
    path = tmp_path / "weights.safetensors"
    keys = []
    for content in (b"one", b"one", b"two"):
        path.write_bytes(content)
        keys.append(digest(4, init=f"file:{path}"))
    assert keys[0] == keys[1] != keys[2]
