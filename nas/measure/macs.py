"""Multiply-adds of a built network, counted by fvcore without the families' closed forms."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn

from nas.measure.throughput import private_copy
from space import Context

_PRODUCTS = """
    _convolution conv2d linear matmul mm bmm addmm einsum scaled_dot_product_attention
"""
_OTHERS = """
    add add_ sub sub_ rsub mul mul_ div div_ neg pow sqrt rsqrt exp sigmoid tanh softmax
    gelu gelu_ relu relu_ silu silu_ hardtanh hardtanh_ hardswish hardswish_ hardsigmoid
    batch_norm layer_norm group_norm instance_norm
    mean sum max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d
    clone dropout pad constant_pad_nd upsample_nearest2d upsample_bilinear2d upsample_bicubic2d
"""

COUNTED = frozenset("aten::" + name for name in _PRODUCTS.split())
"""Operators whose multiply-adds count: convolutions and matrix products, attention's included."""

NOT_COUNTED = frozenset("aten::" + name for name in _OTHERS.split())
"""Not multiply-adds by convention: elementwise work, norms (fused away, or linear in the activations), activations,
softmax, pooling, resampling and copies. fvcore ignores pure data movement (views, transposes, indexing) by itself.
Whatever is in neither list is an error."""


class UnsupportedOperator(NotImplementedError):
    """A traced operator that is neither counted nor known to hold no multiply-adds."""


def fvcore_macs(model: nn.Module, ctx: Context) -> int:
    """Count the multiply-adds of one image by fvcore's trace, on a private CPU copy.

    fvcore knows neither fused attention (given a handle here) nor that norms are no multiply-adds. Raises
    `UnsupportedOperator`, naming them, for operators outside `COUNTED` and `NOT_COUNTED`.
    """
    return sum(fvcore_by_operator(model, ctx).values())


def fvcore_by_operator(model: nn.Module, ctx: Context) -> dict[str, int]:
    """Break `fvcore_macs` down by operator; same errors."""
    inputs = torch.zeros(1, ctx.in_chans, ctx.img_size, ctx.img_size)
    noise = logging.getLogger("fvcore")
    level = noise.level
    noise.setLevel(logging.ERROR)
    try:
        with torch.no_grad():
            counter = FlopCountAnalysis(private_copy(model, "cpu"), inputs)
            counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
            counter.tracer_warnings("none")
            counter.set_op_handle("aten::scaled_dot_product_attention", _attention_macs)
            for name in NOT_COUNTED:
                counter.set_op_handle(name, lambda inputs, outputs: 0)
            found = {name: int(count) for name, count in counter.by_operator().items() if count}
            unknown = sorted(counter.unsupported_ops())
    finally:
        noise.setLevel(level)
    reported = COUNTED | {"aten::conv"}  # fvcore reports convolutions under a shorter name
    unknown += sorted(name for name in found if f"aten::{name}" not in reported)
    if unknown:
        raise UnsupportedOperator("no multiply-add count for " + ", ".join(unknown))
    return dict(sorted(found.items()))


def _attention_macs(inputs: list[Any], outputs: list[Any]) -> int:
    # softmax(Q K^T + bias) V: one product of [L, E] x [E, S], one of [L, S] x [S, Ev], per head.
    query, key, value = (node.type().sizes() for node in inputs[:3])
    return int(math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1]))
