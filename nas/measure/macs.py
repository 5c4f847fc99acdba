"""Multiply-adds of a built network by two counters that know nothing of our closed form."""

from __future__ import annotations

import logging
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

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
"""Not multiply-adds by convention: elementwise work, norms (fused away, or linear in the
activations), activations, softmax, pooling, resampling and copies. fvcore ignores pure data
movement (views, transposes, indexing) by itself. Whatever is in neither list is an error."""


class UnsupportedOperator(NotImplementedError):
    """A traced operator that is neither counted nor known to hold no multiply-adds."""


def fvcore_macs(model: nn.Module, ctx: Context) -> int:
    """Count the multiply-adds of one image by fvcore's trace, on a private CPU copy.

    fvcore knows neither fused attention (given a handle here) nor that norms are no multiply-adds.
    Raises `UnsupportedOperator`, naming them, for operators outside `COUNTED` and `NOT_COUNTED`.
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
                counter.set_op_handle(name, _nothing)
            found = {name: int(count) for name, count in counter.by_operator().items() if count}
            unknown = sorted(counter.unsupported_ops())
    finally:
        noise.setLevel(level)
    unknown += sorted(name for name in found if f"aten::{name}" not in _reported_names())
    if unknown:
        raise UnsupportedOperator("no multiply-add count for " + ", ".join(unknown))
    return dict(sorted(found.items()))


def flop_counter_macs(model: nn.Module, ctx: Context) -> int:
    """Count the multiply-adds of one image by torch's dispatcher, on the meta device.

    Independent of fvcore's trace: it sees the operators that run. Attention is forced to its plain
    form, whose two matrix products the counter sees whatever kernel the device would have chosen.
    It passes silently over operators that it does not know, so it is a second oracle, not a judge.
    """
    own = private_copy(model, "meta")
    inputs = torch.zeros(1, ctx.in_chans, ctx.img_size, ctx.img_size, device="meta")
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        own(inputs)
    flops = int(counter.get_total_flops())
    assert flops % 2 == 0, "torch counts two operations for each multiply-add"
    return flops // 2


def _reported_names() -> frozenset[str]:
    # fvcore reports some handles under a shorter name than the operator's.
    return COUNTED | {"aten::conv"}


def _nothing(inputs: list[Any], outputs: list[Any]) -> int:
    return 0


def _attention_macs(inputs: list[Any], outputs: list[Any]) -> int:
    # softmax(Q K^T + bias) V: one product of [L, E] x [E, S], one of [L, S] x [S, Ev], per head.
    query, key, value = (node.type().sizes() for node in inputs[:3])
    heads = 1
    for extent in query[:-2]:
        heads *= extent
    length, width = query[-2:]
    return int(heads * length * key[-2] * (width + value[-1]))
