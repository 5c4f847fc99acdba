"""The flags of `python -m nas.contract`, as one parser."""

from __future__ import annotations

import argparse

from nas.core.cli import Parser
from nas.core.config import EFFORTS, STEP_KEEPS


def _defaults(name: str) -> str:
    return ", ".join(f"{effort} {values[name]}" for effort, values in EFFORTS.items())


def build_parser() -> Parser:
    """Return the parser. Flags that are not given are absent, so that an effort can set them."""
    parser = Parser(
        prog="python -m nas.contract",
        description="Contract a seed model step by step to a parameter budget and a measured "
        "throughput; leaves a plain timm model in the run folder.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    goal = parser.add_argument_group("what to reach")
    goal.add_argument(
        "--seed", metavar="ARCH", help="where contraction starts: 5M, 11M, 21M, or a JSON file"
    )
    goal.add_argument("--target-params", metavar="N", help="parameters to reach: 5M, 350K, ...")
    goal.add_argument(
        "--params-tolerance",
        metavar="SHARE",
        help="the target is a band of this share either way (default: 0.10)",
    )
    goal.add_argument(
        "--min-throughput",
        type=float,
        metavar="IMAGES_PER_S",
        help="least throughput on the device (default: no such bound)",
    )
    goal.add_argument(
        "--min-speedup",
        type=float,
        metavar="RATIO",
        help="least throughput relative to the seed, timed interleaved (default: no such bound; "
        "with neither, a contraction must not be slower than what it came from, less 2 %%)",
    )
    goal.add_argument(
        "--require",
        action="append",
        metavar="REQUIREMENT",
        help="METRIC>=VALUE@DEVICE[:RUNTIME][:DTYPE][:bBATCH], may be repeated: "
        "'speedup>=1.9@cpu:onnxruntime:b1', 'images_per_s>=3000@cuda:b256', "
        "'latency_ms<=20@cpu:b1', "
        "'latency_p99_ms<=30@cpu', 'peak_mem_mb<=400@cpu:b1', 'macs<=1.2G', 'params<=5.2M'",
    )
    goal.add_argument(
        "--device-table",
        nargs="+",
        metavar="FILE",
        help="measurements of a device that is not this one, made there by python -m "
        "benchmarks.throughput; what it has not measured is predicted, and nothing is promised "
        "before the finalists are measured there (--finalists)",
    )
    goal.add_argument("--family", help="kind of model (default: tinyvit)")
    data = parser.add_argument_group("data and teacher")
    data.add_argument(
        "--data",
        metavar="SOURCE",
        help="digits, fractals, an image folder, or torch/..., hfds/..., wds/... (default: digits)",
    )
    data.add_argument(
        "--img-size", type=int, metavar="PX", help="resolution (default: smoke 48, else from data)"
    )
    data.add_argument(
        "--proxy-images",
        type=int,
        metavar="N",
        help="train and score on a stratified subset of N images (default: smoke 800, else 10000)",
    )
    data.add_argument(
        "--max-broken", metavar="SHARE", help="broken images tolerated (default: 1%%)"
    )
    data.add_argument(
        "--no-pixel-cache",
        dest="pixel_cache",
        action="store_false",
        help="decode a folder's images each time instead of keeping their pixels",
    )
    data.add_argument(
        "--teacher",
        metavar="MODEL",
        help="auto, a timm name with pretrained weights, or MODEL:FILE (default: auto)",
    )
    data.add_argument("--labels", metavar="STORE", help="use this soft-label store")
    data.add_argument(
        "--missing-labels",
        metavar="POLICY",
        help="images without a label in --labels: refuse, or skip them (default: refuse)",
    )
    data.add_argument(
        "--label-epochs",
        type=int,
        metavar="N",
        help="epochs of labels to store (default: those of the longest training)",
    )
    data.add_argument(
        "--beyond",
        metavar="POLICY",
        help="training past the stored epochs: refuse, or cycle through them (default: refuse)",
    )
    data.add_argument(
        "--topk",
        type=int,
        metavar="K",
        help="classes kept a label (default: 10, or 100 of more than 10,000; at most classes-1)",
    )
    data.add_argument("--codec", help="plain or packed records (default: packed)")
    data.add_argument(
        "--augment",
        metavar="PRESET",
        help="default, 22k, 1k, finetune or batched (default: default)",
    )
    data.add_argument(
        "--distill",
        metavar="KIND",
        help="what seed, candidates and winner learn: sparse (the teacher's stored labels alone), "
        "or half from the true labels and half from the teacher's: soft (KL, batchmean), hard (its "
        "best class) or token (hard, on the distillation token's own head; candidates that lose "
        "their token learn hard on their one head) (default: sparse). Half and temperature 1 are "
        "the defaults of DeiT's code; its paper's usual soft distillation is 0.1 and 3. Scores "
        "stay the loss against the teacher's labels",
    )
    data.add_argument(
        "--seed-weights",
        metavar="FILE|TAG",
        help="start the seed from a checkpoint or a timm tag (default: from scratch)",
    )
    size = parser.add_argument_group("how hard to look")
    size.add_argument(
        "--effort",
        help="smoke, normal or high: sets what names them as its defaults (default: normal)",
    )
    cuts = ", ".join(f"{effort} {1 - keeps:.0%}" for effort, keeps in STEP_KEEPS.items())
    size.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="steps from seed to target (default: as many as cut about this share each: "
        f"{cuts})".replace("%", "%%"),
    )
    for name, text in (
        ("shortlist", "candidates timed a step"),
        ("proxied", "candidates trained a step"),
        ("beam", "incumbents kept a step"),
        ("draws", "shortlists drawn before a step is stuck"),
        ("teacher_epochs", "epochs of the auto teacher"),
        ("seed_epochs", "epochs of the seed"),
        ("proxy_epochs", "epochs of a candidate"),
        ("final_epochs", "epochs of the final comparison"),
    ):
        size.add_argument(
            "--" + name.replace("_", "-"),
            type=int,
            metavar="N",
            help=f"{text} (default: {_defaults(name)})",
        )
    size.add_argument("--batch-size", type=int, metavar="N", help="training batch (default: 32)")
    size.add_argument(
        "--proxy-init", help="inherit the parent's sliced weights, or scratch (default: inherit)"
    )
    size.add_argument(
        "--strategy",
        metavar="NAME",
        help="who lists the candidates: contraction, random, uniform, evolution, tpe, nsga2, gp "
        "(default: contraction); all but the first look inside the target's band at once",
    )
    size.add_argument(
        "--choose",
        metavar="HOW",
        help="which of contraction's candidates are trained: near (the nearest to their parent "
        "first) or spread (those that differ most) (default: near)",
    )
    size.add_argument(
        "--importance",
        metavar="NAME",
        help="which units and blocks of its parent a child takes: prefix (the first ones), l1, l2 "
        "or taylor (default: l1)",
    )
    size.add_argument(
        "--no-racing",
        dest="racing",
        action="store_false",
        help="train every candidate to the end, also those that cannot win any more",
    )
    size.add_argument(
        "--freeze",
        action="append",
        metavar="PART",
        help="keep a factor, a slot or a stage as it is, may be repeated: window_sizes, "
        "'embed_dims[3]', stage1",
    )
    size.add_argument(
        "--metric",
        metavar="NAME",
        help="top1, balanced_accuracy or macro_f1 (default: top1); for the latter two every class "
        "counts alike in the scores",
    )
    size.add_argument(
        "--no-anchors",
        dest="anchors",
        action="store_false",
        help="do not add uniform scaling and published archs to the shortlists",
    )
    device = parser.add_argument_group("device and measuring")
    device.add_argument("--device", help="cpu, cuda or cuda:N (default: cpu)")
    device.add_argument(
        "--threads", type=int, metavar="N", help="torch threads (default: the usable CPUs)"
    )
    device.add_argument(
        "--bench-batch", type=int, metavar="N", help=f"images a pass ({_defaults('bench_batch')})"
    )
    device.add_argument(
        "--bench-runtime",
        metavar="NAME",
        help="what executes the networks that are timed: eager, eager-fused, compile, onnxruntime, "
        "openvino, ... (default: eager)",
    )
    device.add_argument("--bench-device", help="where they are timed (default: --device)")
    device.add_argument(
        "--no-measurement-cache",
        dest="measurement_cache",
        action="store_false",
        help="time everything anew instead of taking what earlier runs measured on this device",
    )
    device.add_argument("--bench-dtype", help="float32, bfloat16 or float16 (default: float32)")
    device.add_argument(
        "--bench-blocks",
        type=int,
        metavar="N",
        help=f"timed blocks at least ({_defaults('bench_blocks')})",
    )
    device.add_argument(
        "--bench-max-blocks",
        type=int,
        metavar="N",
        help=f"timed blocks at most ({_defaults('bench_max_blocks')})",
    )
    device.add_argument(
        "--measurements",
        metavar="FILE",
        help="reuse the measurements of equal fingerprint from another run's measurements.csv",
    )
    device.add_argument("--random-seed", type=int, metavar="N", help="of every draw (default: 0)")
    means = parser.add_argument_group(
        "what works on it (changes no answer; may differ on --resume)"
    )
    means.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="jobs at a time (default: 1, or one a GPU with --device cuda); the cores are shared "
        "among them unless --threads says how many each has",
    )
    means.add_argument(
        "--executor",
        metavar="NAME",
        help="local (processes of this machine) or ray (a cluster; needs the extra [ray]) "
        "(default: local)",
    )
    means.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="of a running cluster: HOST:PORT or auto (default: one of this machine alone)",
    )
    means.add_argument(
        "--measure-on",
        metavar="RESOURCE",
        help="with Ray, time on nodes that have this resource, such as orin (default: here)",
    )
    means.add_argument(
        "--ship",
        action="store_true",
        help="with Ray, send files also to nodes that see this machine's (a slow shared disk)",
    )
    means.add_argument(
        "--retries",
        type=int,
        metavar="N",
        help="how often a job is tried again whose worker or node died (default: 2)",
    )
    means.add_argument(
        "--job-memory-gb",
        type=float,
        metavar="GB",
        help="memory that a job may take; more is its failure (default: no limit)",
    )
    means.add_argument(
        "--gpu-share", type=float, metavar="SHARE", help="of a GPU that a job takes (default: 1)"
    )
    means.add_argument(
        "--job-minutes",
        type=float,
        metavar="M",
        help="a job that takes longer is ended and counts as lost (default: no limit)",
    )
    process = parser.add_argument_group("the run")
    process.add_argument(
        "--out", metavar="DIR", help="run folder (default: results/runs/DATE-TIME-SEED-TARGET)"
    )
    process.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="DIR",
        help="continue a run that was interrupted (DIR, or the --out folder)",
    )
    process.add_argument(
        "--finalists",
        metavar="FILE",
        help="with --resume: the finalists as measured on the device of --device-table",
    )
    process.add_argument(
        "--plan",
        action="store_true",
        help="tell what the run would do and cost after about a minute of measuring, and exit",
    )
    process.add_argument(
        "--replay",
        metavar="DIR",
        help="answer from what an earlier run measured and scored, training only what is missing",
    )
    process.add_argument(
        "--trust",
        type=int,
        metavar="N",
        help="afterwards train N kept and rejected candidates about 10x longer on several random "
        "seeds, and report how far the proxy scores can be trusted",
    )
    process.add_argument(
        "--storage",
        metavar="URL",
        help="keep the study in a PostgreSQL database that many runs share: "
        "postgresql://USER@HOST:PORT/DATABASE (default: study.db in the run folder). A password in "
        "it is never written down: on --resume it comes from --storage given again, PGPASSWORD or "
        "~/.pgpass",
    )
    process.add_argument("--status", metavar="DIR", help="tell where a run stands, and exit")
    process.add_argument("--max-hours", type=float, metavar="H", help="stop in time, exit status 3")
    process.add_argument(
        "--cache-dir",
        metavar="DIR",
        help="datasets, teachers, labels, seeds (default: $VISION_CONTRACTION_CACHE, or the "
        "user's cache folder)",
    )
    process.add_argument("--quiet", action="store_true", help="print nothing but errors")
    process.add_argument("--json", action="store_true", help="print the result as a last JSON line")
    return parser
