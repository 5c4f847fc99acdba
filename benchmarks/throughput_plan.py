"""How `python -m benchmarks.throughput` measures, as one value."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.throughput_nets import Net
from nas.core.requirement import Setting


@dataclass(frozen=True)
class Plan:
    """What to measure, apart from the networks. With `auto`, each network has its own batch."""

    settings: tuple[Setting, ...]
    auto: bool
    sizes: tuple[int, ...]
    num_classes: int
    reference: Net | None
    reference_runtime: str | None
    threads: int
    blocks: int
    max_blocks: int
    precision: float | None
    latency_passes: int
    memory: bool
    accuracy_data: str | None
    random_seed: int = 0
