"""Attention logits: a pair whose logit is 2, written-out attention in every dress, masks, and growth with scale."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from workbench.probes.attention_logits import AttentionLogits
from workbench.subject import Subject
from workbench.zoo.transformer import transformer


class Given(nn.Module):
    """Attention of the inputs among themselves, in one of several dresses, times a weight."""

    def __init__(self, kind: str, scale: float = 1.0) -> None:
        super().__init__()
        self.kind, self.scale = kind, nn.Parameter(torch.tensor(scale, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        q = x * self.scale
        if self.kind == "sdpa":
            return functional.scaled_dot_product_attention(q, x, x).flatten(1)
        if self.kind == "causal":
            return functional.scaled_dot_product_attention(q, x, x, is_causal=True).flatten(1)
        scores = q @ x.transpose(-2, -1) / math.sqrt(x.shape[-1])
        return (functional.softmax(scores, dim=-1) @ x).flatten(1)


def subject(kind: str, x: Tensor, scale: float = 1.0) -> Subject:
    return Subject(Given(kind, scale), (x, torch.zeros(len(x), dtype=torch.int64)), batch_size=3)


@pytest.mark.parametrize("kind", ["sdpa", "hand"])
def test_one_pair_of_equal_tokens_and_one_of_zero(kind: str) -> None:
    """q = k = (2, 0, 0, 0) has the logit 2; beside a key of zeros its entropy is 0.36533."""
    x = torch.zeros(1, 1, 2, 4, dtype=torch.float64)
    x[..., 0, 0] = 2.0
    data = AttentionLogits().run(subject(kind, x)).data.isel(layer=0, head=0)
    assert float(data.largest) == pytest.approx(2.0)
    assert float(data.smallest) == pytest.approx(0.0)
    assert float(data.entropy) == pytest.approx((0.36533386 + math.log(2)) / 2, rel=1e-6)
    assert float(data.rms) == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ["sdpa", "hand", "causal"])
def test_every_head_against_loops(kind: str) -> None:
    x = torch.randn(7, 3, 5, 4, generator=torch.Generator().manual_seed(0)).double()
    data = AttentionLogits().run(subject(kind, x, 3.0)).data
    for head in range(3):
        seen, entropies, relative = [], [], []
        for example in x[:, head].numpy():
            for i, query in enumerate(example):
                keys = example[: i + 1] if kind == "causal" else example
                z = 3.0 * keys @ query / 2
                seen += list(z)
                p = np.exp(z) / np.exp(z).sum()
                if len(z) > 1:
                    entropies.append(-(p * np.log(p)).sum())
                    relative.append(entropies[-1] / np.log(len(z)))
        found = data.isel(layer=0, head=head)
        assert float(found.largest) == pytest.approx(max(seen))
        assert float(found.smallest) == pytest.approx(min(seen))
        assert float(found.rms) == pytest.approx(np.sqrt(np.mean(np.square(seen))))
        assert float(found.entropy) == pytest.approx(np.mean(entropies))
        assert float(found.relative_entropy) == pytest.approx(np.mean(relative))


@settings(max_examples=15, deadline=None)
@given(st.floats(0.1, 100.0))
def test_logits_grow_with_the_queries_and_entropy_falls(scale: float) -> None:
    x = torch.randn(4, 2, 5, 4, generator=torch.Generator().manual_seed(1)).double()
    one, more = (AttentionLogits().run(subject("sdpa", x, s)).data for s in (scale, 2 * scale))
    assert more.largest.values == pytest.approx(2 * one.largest.values)
    assert more.rms.values == pytest.approx(2 * one.rms.values)
    assert (more.entropy.values <= one.entropy.values + 1e-12).all()


@pytest.mark.parametrize("weights", [False, True])
def test_multihead_attention_is_seen_by_head_with_padding(weights: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.zeros(x.shape[:2], dtype=torch.bool)
            mask[:, -1] = True
            return self.head(self.mix(x, x, x, key_padding_mask=mask, need_weights=weights)[0].mean(1))

    torch.manual_seed(0)
    net, x = Net().double(), torch.randn(5, 4, 6).double()
    data = AttentionLogits().run(Subject(net, (x, torch.arange(5) % 3))).data
    assert list(data["layer"].values) == ["mix"]
    w, b = net.mix.in_proj_weight.detach(), net.mix.in_proj_bias.detach()
    q, k = x @ w[:6].T + b[:6], x[:, :-1] @ w[6:12].T + b[6:12]
    for head in range(2):
        part = slice(3 * head, 3 * head + 3)
        z = torch.einsum("nqd,nkd->nqk", q[..., part], k[..., part]) / math.sqrt(3)
        assert float(data.largest[0, head]) == pytest.approx(float(z.max()))
        assert float(data.rms[0, head]) == pytest.approx(float(z.square().mean().sqrt()))
        p = z.softmax(-1)
        entropy = float(-(p * p.log()).sum(-1).mean())
        assert float(data.entropy[0, head]) == pytest.approx(entropy)
        assert float(data.relative_entropy[0, head]) == pytest.approx(entropy / math.log(3))


def test_layers_of_a_transformer_have_names_and_nothing_stays_behind() -> None:
    net = transformer(tokens=7, outputs=7, length=4, width=8, head=4, depth=2, causal=True).double()
    x = torch.arange(40).reshape(10, 4) % 7
    reading = AttentionLogits(sequences=6).run(Subject(net, (x, x[:, 0])))
    assert list(reading.data["layer"].values) == ["blocks.0", "blocks.1"]
    assert reading.data.largest.shape == (2, 2)
    assert float(reading.data.measured) == 6
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_net_without_attention_says_so() -> None:
    net = nn.Linear(3, 2).double()
    reading = AttentionLogits().run(Subject(net, (torch.randn(4, 3).double(), torch.arange(4) % 2)))
    assert list(reading.data["layer"].values) == ["none"]
    assert any("no attention ran" in note for note in reading.notes)
