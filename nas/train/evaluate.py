"""How good a model is on a split: top-1, top-5 and by class, each with a standard error."""

from __future__ import annotations

import argparse
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from nas.core.class_match import ClassMatch, match_head
from nas.core.cli import default_cache
from nas.core.config import effort_defaults
from nas.core.data_config import DataConfig
from nas.core.progress import Console, Tick, no_tick
from nas.core.table import Writer
from nas.data import DataSpec, Split
from nas.data.augment.spec import AugmentSpec, preset_spec
from nas.data.augment.views import outputs
from nas.data.prepare import prepared
from nas.export.load import find_network
from nas.export.named_network import NamedNetwork
from nas.export.saved_model import SavedModel
from nas.export.weights import place
from nas.measure.fingerprint import take_fingerprint
from nas.train.distributed import Ranks, world_of
from nas.train.losses import both_heads, fuse, has_token
from nas.train.train_config import ALL_IMAGES
from space.errors import refuse

CLASS_COLUMNS = ("class", "n", "top1", "top1_se", "top5", "top5_se", "most_taken_for")
SCORES = ("loss", "top1", "top1_se", "top5")
"""What a log keeps of `EvalResult.summary`."""
CROP_DIFFERENCE = 0.01
"""Of two shares that are cropped, from which on it is said."""
ONE_PROCESS = Ranks(0, 1, "cpu")


@dataclass(frozen=True, eq=False)
class EvalResult:
    """Per image of a split, in its order.

    `loss`: cross-entropy float32 [n] in nats; `rank`: how many classes scored above the true one;
    `predicted` and `truth`: classes. All but the loss are int64 [n].
    """

    loss: NDArray[np.float32]
    rank: NDArray[np.int64]
    predicted: NDArray[np.int64]
    truth: NDArray[np.int64]

    def summary(self, prefix: str = "") -> dict[str, Any]:
        """Return top-1, top-5, their standard errors, mean loss in nats and the images, by name."""
        (top1, se), (top5, se5) = (share_se(self.rank < k) for k in (1, 5))
        values = {"top1": top1, "top1_se": se, "top5": top5, "top5_se": se5}
        values |= {"loss": float(self.loss.mean(dtype=np.float64)), "n": len(self.truth)}
        return {f"{prefix}{name}": value for name, value in values.items()}

    def by_class(self, classes: Sequence[str], only: Sequence[int] | None = None) -> str:
        """Return a table by class, or of some classes by number, as CSV with `CLASS_COLUMNS`."""
        out = io.StringIO()
        writer = Writer(out)
        writer.writerow(CLASS_COLUMNS)
        for number in range(len(classes)) if only is None else only:
            name = classes[number]
            at = self.truth == number
            wrong = self.predicted[at & (self.predicted != number)]
            most = classes[int(np.bincount(wrong).argmax())] if len(wrong) else ""
            tops = [f"{x:.6f}" for k in (1, 5) for x in share_se(self.rank[at] < k)]
            writer.writerow([name, int(at.sum()), *(tops if at.any() else [""] * 4), most])
        return out.getvalue()


def share_se(hits: NDArray[np.bool_]) -> tuple[float, float]:
    """Return a share and its binomial standard error; 0 and 0 of nothing."""
    n = len(hits)
    share = float(hits.mean()) if n else 0.0
    return share, math.sqrt(share * (1 - share) / n) if n else 0.0


def evaluate(
    network: Callable[[Tensor], Tensor],
    split: Split,
    spec: AugmentSpec,
    *,
    num_classes: int,
    device: str = "cpu",
    ranks: Ranks = ONE_PROCESS,
    tick: Tick = no_tick,
) -> EvalResult:
    """Evaluate on a labelled split, each process on its share of the images; all get the whole.

    A module is put through train() into eval mode, which drops what it may have cached of older weights, and stays
    there. Float32. A class that ties with the true one does not count as above it; outputs that are not numbers are
    wrong.
    """
    if isinstance(network, nn.Module):
        network.train().eval()
    n = len(split)
    # One table for all processes to add up: each row is filled by one of them.
    table = torch.zeros((n, 3), dtype=torch.float64, device=device)
    own_rows = np.arange(ranks.rank, n, ranks.world)
    labels = torch.from_numpy(np.array(split.labels, dtype=np.int64))
    for rows, logits in outputs(network, split, spec, device=device, rows=own_rows):
        truth = labels[torch.from_numpy(rows)].to(device)
        assert logits.shape[1] == num_classes, (logits.shape, num_classes)
        of_truth = logits.gather(1, truth[:, None])
        found = torch.stack(
            [
                functional.cross_entropy(logits, truth, reduction="none").double(),
                (~(logits <= of_truth)).sum(1).double(),  # what is not a number ranks above all
                logits.argmax(1).double(),
            ],
            dim=1,
        )
        table[torch.from_numpy(rows).to(device)] = found
        tick(float(len(rows)))
    loss, rank, predicted = ranks.sum(table).cpu().numpy().T
    return EvalResult(loss.astype(np.float32), rank.astype(np.int64), predicted.astype(np.int64), labels.numpy())


def _is_fresh(saved: SavedModel, data: str) -> bool:
    """Return whether a folder is another one than the model's run held images out of."""
    config = saved.run.get("config")
    known = config.get("data") if isinstance(config, dict) else None
    return known is None or Path(str(known)).expanduser().resolve() != Path(data).expanduser().resolve()


def _data_spec(given: argparse.Namespace, saved: SavedModel) -> DataSpec:
    """Return the data to evaluate on; the folder of the model's own run is read and cut as it was there.

    Flags that are given hold in both cases.
    """
    told = saved.run.get("config")
    config = told if isinstance(told, dict) else {}
    fresh = _is_fresh(saved, given.data)
    values: dict[str, Any] = {} if fresh else {f.name: config[f.name] for f in fields(DataConfig) if f.name in config}
    values |= {name: getattr(given, name) for name in given.given if name in {f.name for f in fields(DataConfig)}}
    values |= {"data": given.data, "img_size": saved.context.img_size}
    if fresh or "recipe" in config:  # for nas.train None stands for all, for nas.contract for a default
        values |= {name: ALL_IMAGES for name in ("max_images", "max_test_images") if values.get(name) is None}
    elif "max_images" not in given.given and "effort" in config:
        usual = effort_defaults(config["effort"])["max_images"]
        values["images_may_grow"] = values.get("max_images") == usual is not None
    seed = int(config.get("data_seed", config.get("random_seed", 0)) or 0)
    seed = given.data_seed if fresh or "data_seed" in given.given else seed
    return DataSpec(**values, random_seed=seed, test_only=fresh and given.split == "test", grey_bits=saved.grey_bits)


def _match(named: NamedNetwork, saved: SavedModel, classes: Sequence[str]) -> ClassMatch:
    """Match the data's classes to those of the model, of which there may be some. Raises InputError."""
    many, shown = saved.context.num_classes, ", ".join(saved.classes[:3])
    match = match_head(named, many, classes)
    if match.fresh or not classes:
        unknown = ", ".join(match.fresh[:3])
        got = f"{len(match.fresh)} classes ({unknown}) that the model does not have{match.near_names()}"
        want = f"classes of the {many} of {saved.path}" + (f" ({shown}, ...)" if shown else "")
        raise refuse("--data", got if match.fresh else "images without classes", want)
    if not match.kept:
        raise refuse("--data", f"{len(classes)} classes", f"the {many} of {saved.path}, which have no names")
    return match


def evaluate_model(given: argparse.Namespace) -> dict[str, Any]:
    """Evaluate a saved model on a split of a data set, as `nas.train --evaluate` asks.

    Returns what `--json` prints. Raises InputError.
    """
    if world_of()[1] > 1:
        raise refuse("--evaluate", "several processes", "one", "start it without torchrun")
    if given.data is None:
        raise refuse("--data", "nothing", "the data set to evaluate on")
    named = find_network(given.evaluate, "--evaluate")
    saved = named.saved()
    size, channels = saved.context.img_size, saved.context.in_chans
    if channels != 3:
        raise refuse("--evaluate", f"input of {channels} channels", "3, as images here are RGB")
    if given.img_size not in (None, size):
        raise refuse("--img-size", given.img_size, f"the model's own {size}", "leave it out")
    device = given.device or "cpu"
    take_fingerprint(device, 1)  # refuses a device that is not there
    console = Console(quiet=given.quiet)
    cache = Path(given.cache_dir) if given.cache_dir else default_cache()
    dataset = prepared(_data_spec(given, saved), cache, console, lambda source: _match(named, saved, source.classes))
    match = _match(named, saved, dataset.classes)
    crop_pct = saved.preprocessing["crop_pct"]
    notes = [*named.notes]
    if abs(crop_pct - dataset.crop_pct) > CROP_DIFFERENCE:
        notes.append(f"{saved.path.name}: made for a crop of {crop_pct:g}; here {dataset.crop_pct:.3f}")
    if match.whole and match.describe():
        notes.append(f"{saved.path.name}: {match.describe()}")
    for note in notes:
        console.line(note)
    classes, split = saved.classes or list(dataset.classes), getattr(dataset, given.split)
    split = replace(split, labels=np.array(match.rows, dtype=np.int64)[split.labels])
    present = sorted(set(split.labels.tolist()))
    if len(present) < len(classes):
        names = ", ".join(classes[number] for number in present[:3]) + (", ..." if len(present) > 3 else "")
        console.line(f"images of {len(present)} of the model's {len(classes)} classes ({names}), told from all of them")
    network: Callable[[Tensor], Tensor]
    network = model = place(saved.build(), device)
    if given.fusion != "logits" and has_token(model):
        network = lambda inputs: fuse(both_heads(model, inputs), given.fusion)  # noqa: E731
    # The model's own, whatever the data's are.
    mean, std = ((v[0], v[1], v[2]) for v in (saved.preprocessing[name] for name in ("mean", "std")))
    spec, many = replace(preset_spec("default", dataset), mean=mean, std=std), len(classes)
    with console.bar(float(len(split)), "images"):
        result = evaluate(network, split, spec, num_classes=many, device=device, tick=console.advance)
    table = result.by_class(classes, present)
    if given.out is not None:
        try:
            Path(given.out).write_text(table, encoding="utf-8")
        except OSError as error:
            raise refuse("--out", given.out, "a CSV file to write", error.strerror or "") from None
    summary = {"split": given.split, **result.summary()}
    console.line(
        "{split}: top-1 {top1:.2%} +- {top1_se:.2%}, top-5 {top5:.2%} +- {top5_se:.2%} on {n} images".format(**summary)
    )
    for line in table.splitlines() if given.out is None else ():
        console.line(line)
    return summary
