"""The text of a report: settings, result, caveats and next commands."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from nas.report.charts import conditions_line, counted
from nas.report.following import next_commands
from nas.report.read import RunFiles, number, section
from nas.report.tables import (
    FINAL_HEADER,
    LINEAGE_HEADER,
    NONE,
    STEPS_HEADER,
    decimal,
    duration,
    final_rows,
    lineage_rows,
    markdown,
    percent,
    plain,
    short_count,
    step_rows,
    whole,
    with_interval,
)

LOAD = """\
```python
import json
import timm
from safetensors.torch import load_file

b = json.load(open("best.json"))
model = timm.create_model(b["timm"]["model"], **b["timm"]["kwargs"])
model.load_state_dict(load_file("best.safetensors"), strict=True)
model.eval()
```"""
"""Loads `best.safetensors` in a process that has timm and not this toolkit."""

POWER_80 = (1.960 + 0.842) / 1.960
"""Half widths of a 95 % interval that a difference must have to be found with 80 % power."""


def question_text(run: RunFiles) -> str:
    """Return the run's target and requirements in one sentence."""
    config = run.config
    target, share = number(config, "target_params"), number(config, "params_tolerance")
    aim = "a smaller model"
    if target is not None:
        aim = f"a model of {short_count(target)} parameters"
        if share is not None:
            lo, hi = short_count(target * (1 - share)), short_count(target * (1 + share))
            aim += f" (between {lo} and {hi})"
    bounds = []
    for name, unit in (("min_speedup", "x the seed's throughput"), ("min_throughput", " images/s")):
        least = number(config, name)
        bounds += [] if least is None else [f"at least {least:g}{unit}"]
    bounds += [str(text) for text in config.get("require") or ()]
    bounds = bounds or ["no step slower than the one before"]
    size = run.img_size
    where = f"{config.get('data', '?')}" + (f" at {size} px" if size else "")
    return f"From the seed {run.seed_name} to {aim}, {' and '.join(bounds)}, on {where}."


def outcome_text(run: RunFiles) -> str:
    """Return the run's result so far in a few sentences."""
    if not run.result:
        return f"The run has not ended: {_position(run)}."
    final = section(run.result, "final")
    winner = section(final, "winner")
    if not winner:
        return _sentence(str(run.result.get("message") or run.result.get("status")))
    lines = [_sentence(f"the target is {run.result.get('status')}"), _winner_words(run, winner)]
    verdicts = [str(v) for v in final.get("requirements") or ()]
    if verdicts:
        lines.append(f"Required, timed afresh: {'; '.join(verdicts)}.")
    return " ".join(lines + _comparison_words(final))


def report(run: RunFiles) -> str:
    """Write the whole report in Markdown."""
    status = run.result.get("status", "unfinished")
    lineage, stops = lineage_rows(run), stop_counts(run)
    counts = markdown(("where and why", "candidates"), [[k, str(n)] for k, n in stops])
    parts = [
        f"# {run.seed_name} to {short_count(number(run.config, 'target_params'))} parameters: {status}",
        f"**Asked.** {question_text(run)}\n\n**Came out.** {outcome_text(run)}",
        f"Throughput was measured on: {_device(run)}.",
        "## Result\n\n" + markdown(FINAL_HEADER, final_rows(run)),
        _treatment(run),
        "![Score against parameters and throughput](pareto.png)",
        "## Steps\n\n" + _or_none(markdown(STEPS_HEADER, step_rows(run)), run.steps),
        "## Lineage\n\n" + _or_none(markdown(LINEAGE_HEADER, lineage), lineage),
        "## Where candidates stopped\n\n" + _or_none(counts, stops),
    ]
    if run.best:
        parts.append("## Loading the model\n\nInside this folder; it needs timm and safetensors only.\n\n" + LOAD)
    if (run.folder / "models.csv").exists():
        parts.append(
            "The best of every step is a model of its own, too: `models.csv` lists them with size, throughput and "
            "score; each file in `models/` loads as above."
        )
    parts.append("## How far to trust this\n\n" + "\n".join(f"- {c}" for c in caveats(run)))
    parts.append("## Next\n\n```sh\n" + "\n".join(next_commands(run)) + "\n```")
    return "\n\n".join(part for part in parts if part) + "\n"


def final_table(run: RunFiles) -> str:
    """Lay out the comparison for a terminal, with the outcome under it."""
    return plain(FINAL_HEADER, final_rows(run)) + "\n" + outcome_text(run)


def status_lines(run: RunFiles) -> str:
    """Return the state of a run: asked, position, last candidate, best so far, what remains."""
    lines = [f"{run.folder}: {run.result.get('status', 'unfinished')}", f"asked: {question_text(run)}"]
    lines.append(f"where: {_position(run)}")
    if run.trials:
        last = run.trials[-1]
        end = "kept" if last.stage == "kept" else f"stopped at {last.stage}"
        why = f": {last.reason}" if last.reason and last.stage != "kept" else ""
        lines.append(f"last:  step {last.step}, {last.name} ({last.state}), {end}{why}")
    if run.path:
        best = run.path[-1]
        lines.append(
            f"best:  {best.name}, {whole(best.params)} parameters, "
            f"{with_interval(best.ratio, best.ratio_lo, best.ratio_hi, 'x')} the seed's "
            f"throughput, proxy soft loss {decimal(best.soft_loss)}"
        )
    if run.result:
        lines.append(f"ended: {outcome_text(run)}")
    else:
        lines.append(f"left:  {_remains(run)}")
    lines.append("next:  " + next_commands(run)[0])
    return "\n".join(lines)


def stop_counts(run: RunFiles, most: int = 12) -> list[tuple[str, int]]:
    """Count candidates by stage, state and reason; numbers that differ are shown from the least to the largest."""
    found: dict[str, list[str]] = {}
    for row in run.trials:
        if row.step > 0:
            what = f"{row.stage} ({row.state})" + (f": {row.reason}" if row.reason else "")
            found.setdefault(_NUMBER.sub("\0", what), []).append(what)
    ranked = sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))
    rest = sum(len(alike) for _, alike in ranked[most:])
    shown = [(_spanned(alike), len(alike)) for _, alike in ranked[:most]]
    return shown + ([("other reasons", rest)] if rest else [])


_NUMBER = re.compile(r"\d+(?:[.,]\d+)*(?:e[+-]?\d+)?")


def _spanned(alike: Sequence[str]) -> str:
    """Write texts that differ in their numbers as one, each number as the span of its values."""
    texts = iter(_NUMBER.split(alike[0]))
    made = next(texts)
    for values in zip(*map(_NUMBER.findall, alike), strict=True):
        try:
            ends = sorted(set(values), key=lambda text: float(text.replace(",", "")))
        except ValueError:  # a version or a date
            ends = sorted(set(values))
        made += (ends[0] if len(ends) == 1 else f"{ends[0]} to {ends[-1]}") + next(texts)
    return made


def caveats(run: RunFiles) -> list[str]:
    """Return the limits of the results that a reader should know."""
    config, images, result = run.config, run.holdout_images, run.result
    epochs, init = config.get("proxy_epochs"), config.get("proxy_init")
    short = counted(epochs, "epoch") if epochs else "a short distillation"
    start = {"inherit": ", from the parent's sliced weights", "scratch": ", from scratch"}
    lines = [
        f"A proxy score is the soft loss after {short}{start.get(str(init), '')}, on "
        f"{images if images is not None else 'the'} holdout images that the search chose by. It ranks candidates; it "
        "is not accuracy, and the winner's is flattered by being chosen."
    ]
    distill = config.get("distill", "sparse")
    if distill != "sparse":
        lines.append(
            f"Trainings learned half from the true labels and half from the teacher (`--distill {distill}`); scores "
            "are the soft loss against the teacher's labels all the same."
        )
    if run.run.get("augmentation"):
        lines.append(f"Training images were augmented: {run.run['augmentation']}.")
    lines += [_sentence(str(note)) for note in run.run.get("notes") or ()]
    for part, what in (("proxy_check", "Put to the test (`proxy_check.csv`)"), ("reused", "A replay")):
        message = section(result, part).get("message")
        lines += [f"{what}: {message}."] if message else []
    teacher = section(run.run, "dataset").get("labelled_by")
    if teacher is not None:
        lines.append(
            f"The images have no ground truth: their classes are those that {teacher} sees, and every top-1 here means "
            "agreement with it."
        )
    tested = number(section(section(result, "final"), "winner"), "test_n")
    if tested:
        half = 196 * (0.25 / tested) ** 0.5
        lines.append(
            f"Test top-1 rests on {tested:.0f} images: counting alone leaves +-{half:.1f} points at worst (95 %), and "
            "one random seed of training stands behind each model."
        )
    twice = []
    for one in result.get("finalists") or ():
        first, again = number(one, "soft_loss"), number(one, "soft_loss_again")
        if first is not None and again is not None:
            twice.append(f"`{one.get('key', '?')}` {first:.4f} and {again:.4f}")
    if twice:
        lines.append(
            "Soft loss of the finalists, and from a second random seed (without epochs that a race gave to the first): "
            f"{'; '.join(twice)}."
        )
    second = ", a second one among the finalists too" if twice else ""
    return [
        *lines,
        "A throughput holds for the stated device, batch, dtype and resolution only. Its interval is distribution-free "
        "with about 95 %, and wider where neighbouring blocks resemble each other; slow drifts of a shared machine "
        "cancel in the ratio, not in images/s. Of many candidates timed, those that just passed did so with some luck: "
        "the final timing is afresh.",
        f"One random seed ({config.get('random_seed', '?')}) decided shortlists and training{second}. Another may end "
        "elsewhere.",
    ]


def _winner_words(run: RunFiles, winner: Mapping[str, Any]) -> str:
    params = number(winner, "params")
    words = f"The winner has {whole(params)} parameters"
    if run.seed and run.seed.params and params:
        words += f", {run.seed.params / params:.2f}x fewer than the seed"
    # The interval of the ratio alone: the table's images/s are that ratio's, too.
    speed, ratio = _interval(winner, "images_per_s").partition(" [")[0], _interval(winner, "ratio", "x")
    words += f", and runs at {speed} images/s, {ratio} the seed"
    words += f"; its test top-1 is {percent(number(winner, 'top1'), number(winner, 'top1_se'))}"
    if number(winner, "metric") is not None:
        value = percent(number(winner, "metric"), number(winner, "metric_se"))
        words += f", its {metric_name(run.config)} {value}"
    tested = number(winner, "test_n")
    words += f" on {tested:.0f} images" if tested else ""
    full = number(winner, "params_1000")
    return words + (f" (at 1000 classes and 224 px it counts {whole(full)})." if full else ".")


def _interval(values: Mapping[str, Any], name: str, unit: str = "") -> str:
    middle, lo, hi = (number(values, name + end) for end in ("", "_lo", "_hi"))
    return with_interval(middle, lo, hi, unit)


def _comparison_words(final: Mapping[str, Any]) -> list[str]:
    words = [_sentence(str(final["note"]))] if final.get("note") else []
    published, paired = section(final, "published"), section(final, "paired")
    difference, lo, hi = (number(paired, name) for name in ("difference", "lo", "hi"))
    if not published or difference is None or lo is None or hi is None:
        return words
    beside = f"the published {published.get('name', 'arch')}"
    span = f"{100 * difference:+.1f} points [{100 * lo:+.1f}, {100 * hi:+.1f}]"
    if lo > 0 or hi < 0:
        verdict = f"the winner is {'better' if lo > 0 else 'worse'} than {beside}"
    elif lo == hi:
        verdict = f"the winner and {beside} were right on the very same images, which says little about others"
    else:
        visible = 50 * (hi - lo) * POWER_80
        verdict = (
            f"no difference from {beside} that this test could see (it would find one of {visible:.1f} points four "
            "times in five)"
        )
    by = "" if final.get("metric", "top1") == "top1" else f" by {metric_name(final)}"
    return [*words, f"Paired over the test images{by}, winner less published: {span}: {verdict}."]


def metric_name(values: Mapping[str, Any]) -> str:
    """Return the name of the run's metric for people."""
    return {"balanced_accuracy": "balanced accuracy", "macro_f1": "macro F1"}.get(str(values.get("metric")), "top-1")


def _treatment(run: RunFiles) -> str:
    final = section(run.result, "final")
    if not final:
        return ""
    epochs = final.get("epochs") or run.config.get("final_epochs")
    start = final.get("init") or run.config.get("proxy_init")
    how = {"inherit": "from the seed's sliced weights", "scratch": "from scratch"}
    return (
        f"Winner and published arch had the same treatment ({counted(epochs, 'epoch')}, {how.get(str(start), start)}), "
        "and the test set was used once for each. `x seed` is the throughput ratio to the seed, timed in alternating "
        "blocks; `images/s` is that ratio times what the seed ran at beside the winner, so that the column is of one "
        "moment."
    )


def _device(run: RunFiles) -> str:
    mark = section(run.run, "fingerprint")
    versions = [f"{name} {mark[name]}" for name in ("torch", "timm", "python") if mark.get(name)]
    identity = f"fingerprint {mark['id']}" if mark.get("id") else ""
    return ", ".join([conditions_line(run), *versions] + ([identity] if identity else []))


def _position(run: RunFiles) -> str:
    done, steps = len(run.steps), run.config.get("steps")
    decided = [row for row in run.trials if row.step > 0]
    states = Counter(row.state for row in decided)
    counts = ", ".join(f"{states[name]} {name}" for name in ("complete", "pruned", "failed"))
    if not run.seed:
        return "the seed is not trained yet"
    spent = duration(sum(row.seconds for row in run.trials))
    of = f" of {steps}" if steps else ""
    return f"{done}{of} steps done, {len(decided)} candidates decided ({counts}) in {spent}"


def _remains(run: RunFiles) -> str:
    done, steps = len(run.steps), run.config.get("steps")
    parts = [] if run.seed else ["teacher, labels and the seed's training"]
    if isinstance(steps, int) and steps > done:
        parts.append(f"steps {done + 1} to {steps}" if steps > done + 1 else f"step {steps}")
    return ", ".join([*parts, "the final training and test"])


def _sentence(text: str) -> str:
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!")) else ".")


def _or_none(table: str, rows: object) -> str:
    return table if rows else f"None yet ({NONE})."
