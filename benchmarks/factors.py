"""What each factor does, one notch at a time: `python -m benchmarks.factors --out FILE.csv`.

From a seed, every slot of every factor is moved by one notch, alone; each such network is counted,
timed beside the seed, and trained from the seed's sliced weights like a candidate of a search, on
the same batches - as is the seed itself once more, the control that every score is compared with,
image by image. The table stands beside what the method's description says a smaller factor does.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from nas import stage
from nas.cells import Writer
from nas.command import Parser, default_cache, guarded
from nas.door import ask_fingerprints, make_config, read_data, resolved
from nas.executor import LocalExecutor
from nas.files import write_atomic
from nas.jobs import Result
from nas.progress import Console
from nas.run import Incumbent, Run
from nas.rundir import RunDir
from space import Arch, Family, get_family
from space.errors import InputError

SAID = {
    "D": "fewer attention heads",
    "N": "less depth",
    "W": "fewer parameters, more throughput",
    "R": "fewer parameters",
    "M": "narrower hidden layer of the MLP",
    "E": "more attention heads, less computation",
}
"""What the description of the method says that a smaller factor brings."""


@dataclass(frozen=True)
class FactorRow:
    """One network, one notch from the seed.

    Changes of parameters and MACs are shares of the seed's. `ratio` is measured throughput over the
    seed's. `loss` is the proxy score less the seed's own after the same training: nats on the
    holdout, paired over images, with 95 % intervals; positive is worse.
    """

    factor: str
    move: str
    params: int
    macs: int
    params_change: float
    macs_change: float
    ratio: float
    ratio_lo: float
    ratio_hi: float
    loss: float | None
    loss_lo: float | None
    loss_hi: float | None
    said: str


def one_notch(family: Family, seed: Arch) -> list[tuple[str, Arch]]:
    """Return every network one notch from the seed: down where a factor can go down, else up."""
    found = []
    for factor in family.factors:
        present = family.to_dict(seed)[factor.field]
        slots = [present] if factor.scalar else list(present)
        for slot, (ladder, value) in enumerate(zip(factor.ladders, slots, strict=True)):
            options = ladder.options(value)
            at = options.index(value)
            if len(options) == 1:
                continue
            moved = options[at - 1] if at > 0 else options[at + 1]
            changed = list(slots)
            changed[slot] = type(value)(moved)
            mapping = {**family.to_dict(seed)}
            mapping[factor.field] = changed[0] if factor.scalar else changed
            try:
                arch = family.arch(mapping)
            except InputError:
                continue  # one notch of this slot alone builds no network
            found.append((factor.symbol, arch))
    return found


def factors(given: argparse.Namespace, console: Console) -> tuple[list[FactorRow], Run]:
    """Measure and train the seed and its neighbours; returns their rows and their run."""
    settings = {
        "seed": given.seed, "target_params": 1, "data": given.data, "effort": given.effort,
        "random_seed": given.random_seed, "measurement_cache": False,
        "bench_blocks": given.blocks, "bench_max_blocks": given.blocks,
    }  # fmt: skip
    for name in ("proxy_epochs", "seed_epochs", "proxy_images", "img_size", "threads"):
        if getattr(given, name) is not None:
            settings[name] = getattr(given, name)
    config = make_config(resolved(settings))
    family = get_family(config.family)
    seed = family.seed(config.seed)
    cache = default_cache() if given.cache_dir is None else given.cache_dir
    data = read_data(config, cache, console)
    with tempfile.TemporaryDirectory(prefix="factors-") as text:
        folder = RunDir(Path(text))
        folder.create()
        worker = LocalExecutor(threads=config.threads, log=folder.path / "worker.log")
        try:
            run = Run(
                config=config, family=family, seed_arch=seed, dataset=data, folder=folder,
                executor=worker, console=console, cache=cache, deadline=None,
                fingerprints=ask_fingerprints(config, worker, None),
            )  # fmt: skip
            return _rows(run, given), run
        finally:
            console.stop()
            worker.close()
            folder.release()


def _rows(run: Run, given: argparse.Namespace) -> list[FactorRow]:
    nets = one_notch(run.family, run.seed_arch)
    if given.only:
        nets = [(symbol, arch) for symbol, arch in nets if symbol in given.only]
    images = len(run.dataset.train.labels)
    cost = (len(nets) + 1) * images * run.config.proxy_epochs * run.image_cost(run.seed_arch)
    run.console.start(stage.expected_cost(run) / 2 + cost)
    seed = stage.prepare_seed(run)
    control = None if given.no_proxy else _losses(run, seed.arch, seed)
    params = run.family.count_params(seed.arch, run.context)
    macs = run.family.count_macs(seed.arch, run.context)
    rows = []
    for symbol, arch in nets:
        measured = run.timings.measure(arch, "gate", reference=run.seed_arch)
        if isinstance(measured, Result):
            raise InputError(f"{run.family.label(arch)} cannot be timed: {measured.reason}")
        loss = lo = hi = None
        if control is not None:
            own = _losses(run, arch, seed)
            difference = own - control
            loss = float(difference.mean())
            half = 1.96 * float(difference.std(ddof=1)) / math.sqrt(len(difference))
            lo, hi = loss - half, loss + half
        count = run.family.count_params(arch, run.context)
        work = run.family.count_macs(arch, run.context)
        ratio, ratio_lo, ratio_hi = measured.interval("speedup")
        row = FactorRow(
            symbol, run.family.describe_moves(seed.arch, arch), count, work, count / params - 1,
            work / macs - 1, ratio, ratio_lo, ratio_hi, loss, lo, hi, SAID.get(symbol, ""),
        )  # fmt: skip
        rows.append(row)
        run.console.line(told(row))
    return rows


def _losses(run: Run, arch: Arch, seed: Incumbent) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Train from the seed's weights and return the soft losses of the holdout's images."""
    from nas.seals import load_arrays

    name = f"notch-{run.key(arch)}"
    out = run.folder.job_folder(name)
    trained = run.train(
        arch, name, out=out, epochs=run.config.proxy_epochs, init="inherit", parent=seed
    )
    if not trained.ok:
        raise InputError(f"{run.family.label(arch)} cannot be trained: {trained.reason}")
    return np.asarray(load_arrays(out / "holdout.safetensors")["soft_loss"], dtype=np.float64)


def told(row: FactorRow) -> str:
    """Write a row as a line for the terminal."""
    line = (
        f"{row.factor}  {row.move:<28} params {row.params_change:+7.2%}  "
        f"MACs {row.macs_change:+7.2%}  "
        f"throughput {row.ratio:.3f} [{row.ratio_lo:.3f}, {row.ratio_hi:.3f}]"
    )
    if row.loss is not None:
        line += f"  proxy loss {row.loss:+.4f} [{row.loss_lo:+.4f}, {row.loss_hi:+.4f}]"
    return line


def draw(rows: Sequence[FactorRow], target: Path, title: str) -> None:
    """Draw what a notch saves, what it wins in throughput and what it costs in score."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = list(reversed(rows))
    figure, axes = pyplot.subplots(
        1, 4, figsize=(13, 0.42 * len(rows) + 2.0), sharey=True, layout="constrained"
    )
    places = np.arange(len(shown))
    columns = (
        ("parameters, change", [r.params_change * 100 for r in shown], None, "%"),
        ("MACs, change", [r.macs_change * 100 for r in shown], None, "%"),
        (
            "measured throughput, x seed",
            [r.ratio for r in shown],
            [(r.ratio - r.ratio_lo, r.ratio_hi - r.ratio) for r in shown],
            "",
        ),
        (
            "proxy loss less the seed's, nats\n(right is worse)",
            [math.nan if r.loss is None else r.loss for r in shown],
            [
                (0.0, 0.0)
                if r.loss is None or r.loss_lo is None or r.loss_hi is None
                else (r.loss - r.loss_lo, r.loss_hi - r.loss)
                for r in shown
            ],
            "",
        ),
    )
    for axis, (label, values, errors, unit) in zip(axes, columns, strict=True):
        if errors is None:
            axis.barh(places, values, color="#0072B2", height=0.6)
        else:
            axis.errorbar(
                values, places, xerr=np.array(errors).T, fmt="o", color="#D55E00", capsize=3
            )
        axis.axvline(1.0 if "throughput" in label else 0.0, color="black", linewidth=0.8)
        axis.set_xlabel(label + (f", {unit}" if unit else ""))
        axis.grid(True, axis="x", alpha=0.3)
    axes[0].set_yticks(places, [f"{r.factor}   {r.move}" for r in shown])
    figure.suptitle(title, fontsize=10)
    out = io.BytesIO()
    figure.savefig(out, format=target.suffix[1:].lower(), dpi=130)
    pyplot.close(figure)
    write_atomic(target, out.getvalue())


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, report."""
    parser = Parser(
        prog="python -m benchmarks.factors", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--seed", default="21M", metavar="ARCH", help="(default: 21M)")
    parser.add_argument("--data", default="digits", help="as nas.contract (default: digits)")
    parser.add_argument("--effort", default="normal", help="as nas.contract (default: normal)")
    parser.add_argument("--img-size", type=int, metavar="PX")
    parser.add_argument("--proxy-images", type=int, metavar="N")
    parser.add_argument("--proxy-epochs", type=int, metavar="N", help="(default: the effort's)")
    parser.add_argument("--seed-epochs", type=int, metavar="N", help="(default: the effort's)")
    parser.add_argument(
        "--blocks", type=int, default=40, metavar="N", help="timed a network (default: 40)"
    )
    parser.add_argument("--threads", type=int, metavar="N")
    parser.add_argument("--random-seed", type=int, default=0, metavar="N")
    parser.add_argument("--only", nargs="+", metavar="FACTOR", help="such as D W (default: all)")
    parser.add_argument("--no-proxy", action="store_true", help="count and time only")
    parser.add_argument("--cache-dir", type=Path, metavar="DIR")
    parser.add_argument("--out", type=Path, metavar="FILE", help="CSV; a figure comes beside it")
    given = parser.parse_args(argv)
    return guarded(lambda: _main(given))


def _main(given: argparse.Namespace) -> int:
    console = Console(stream=sys.stderr)
    rows, run = factors(given, console)
    if given.out is not None:
        out = io.StringIO()
        names = [f.name for f in fields(FactorRow)]
        more = {
            "seed": given.seed, "data": given.data, "img_size": run.context.img_size,
            "proxy_epochs": run.config.proxy_epochs, "setting": run.primary.text,
            "fingerprint": run.timings.fingerprint_under(run.primary),
        }  # fmt: skip
        writer = Writer(out, [*names, *more])
        writer.writeheader()
        for row in rows:
            values = {k: round(v, 5) if isinstance(v, float) else v for k, v in asdict(row).items()}
            writer.writerow({**values, **more})
        write_atomic(given.out, out.getvalue().encode())
        title = (
            f"One notch of each factor from {given.seed} ({given.data}, {run.context.img_size} px, "
            f"{run.primary.text}, {run.config.proxy_epochs} epochs of proxy training; bars: 95 %)"
        )
        draw(rows, given.out.with_suffix(".png"), title)
    print(json.dumps({"rows": len(rows), "out": None if given.out is None else str(given.out)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
