"""Three ways of counting multiply-adds agree, and what cannot be counted is named."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from space_cases import one_thread, random_arch  # noqa: F401
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nas.measure.macs import UnsupportedOperator, fvcore_by_operator, fvcore_macs
from nas.measure.throughput import private_copy
from space import Context, get_family


def flop_counter_macs(model: nn.Module, ctx: Context) -> int:
    """Count the multiply-adds of one image by torch's dispatcher, on the meta device.

    Independent of fvcore's trace: it sees the operators that run. Attention is forced to its plain form, whose two
    matrix products the counter sees whatever kernel the device would have chosen. It passes silently over operators
    that it does not know, so it is a second oracle, not a judge.
    """
    own = private_copy(model, "meta")
    inputs = torch.zeros(1, ctx.in_chans, ctx.img_size, ctx.img_size, device="meta")
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        own(inputs)
    flops = int(counter.get_total_flops())
    assert flops % 2 == 0, "torch counts two operations for each multiply-add"
    return flops // 2


def test_closed_form_fvcore_and_torch_agree() -> None:
    """On random archs and contexts, and the caller's network stays as it was."""
    family, rng = get_family("tinyvit"), random.Random(3)
    for _ in range(4):
        arch = random_arch(rng, most=96, deepest=2)
        ctx = Context(rng.choice([32, 48, 80]), rng.choice([1, 10, 77]), rng.choice([1, 3]))
        model = family.build(arch, ctx)
        model.eval()
        model(torch.zeros(2, ctx.in_chans, ctx.img_size, ctx.img_size))
        counted = family.count_macs(arch, ctx)
        assert fvcore_macs(model, ctx) == counted
        assert flop_counter_macs(model, ctx) == counted
        assert not model.training
        assert next(model.parameters()).device.type == "cpu"


def test_published_5m() -> None:
    """1.255 GMACs at 224 px (the paper's 1.3 G), 0.097 of them in fused attention."""
    family, ctx = get_family("tinyvit"), Context(224, 1000)
    arch = family.seed("5M")
    found = fvcore_by_operator(family.build(arch, ctx), ctx)
    assert found == {"conv": 368_382_784, "linear": 790_290_944, "scaled_dot_product_attention": 96_500_992}
    assert sum(found.values()) == family.count_macs(arch, ctx)


def test_plain_attention_counts_as_much_as_fused() -> None:
    class Attention(nn.Module):
        def __init__(self, fused: bool) -> None:
            super().__init__()
            self.fused = fused

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = x.reshape(1, 2, 12, -1)
            if self.fused:
                return nn.functional.scaled_dot_product_attention(q, q, q)
            return (q @ q.transpose(-2, -1)).softmax(-1) @ q

    ctx = Context(24, 1)
    wanted = 2 * 2 * 12 * 12 * (3 * 24 * 24 // 24)
    for fused in (True, False):
        assert fvcore_macs(Attention(fused), ctx) == wanted
        assert flop_counter_macs(Attention(fused), ctx) == wanted


@pytest.mark.parametrize(
    ("name", "forward"),
    [
        ("cumsum", lambda x: x.cumsum(-1)),
        ("erf", lambda x: x.erf()),
        ("sort", lambda x: x.sort(-1).values),
        ("logsumexp", lambda x: x.logsumexp(-1)),
        ("grid_sampl", lambda x: nn.functional.grid_sample(x, x.new_zeros(1, 4, 4, 2), align_corners=False)),
    ],
)
def test_an_unknown_operator_is_named(name: str, forward: Callable[[torch.Tensor], torch.Tensor]) -> None:
    odd = nn.Module()
    odd.forward = forward
    with pytest.raises(UnsupportedOperator, match=name):
        fvcore_macs(odd, Context(16, 1))
