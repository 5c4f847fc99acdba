"""Peak learning rates, as a pure function of where a training starts and how large the net is."""

from __future__ import annotations

import math

from space.errors import refuse

SCRATCH_LR = 1e-3
"""From fresh weights, for nets of at most `SCRATCH_PARAMS` parameters."""
SCRATCH_PARAMS = 5_400_000
INHERIT_LR = 5e-4
"""From a parent's sliced weights."""
INITS = ("scratch", "inherit")


def peak_lr(init: str, params: int) -> float:
    """Return the peak rate for "scratch" or "inherit" (the batch is the default's).

    From scratch it falls with the root of the parameters, which is about the width: wider layers
    bear less of it (Yang et al. 2022, Tensor Programs V, scale Adam's with 1 / width).
    """
    if init not in INITS:
        raise refuse("--proxy-init", init, f"one of {', '.join(INITS)}")
    if init == "inherit":
        return INHERIT_LR
    return SCRATCH_LR * min(1.0, math.sqrt(SCRATCH_PARAMS / params))
