import pytest
import torch
import torch.nn.functional as F

from tests.convert.golden import GOLDEN, load
from vmoe.models.siglino_attention import SinkAttention, golden_frequencies, patch_positions, rotation


@pytest.mark.parametrize("case", ["siglino_moe_k3", "siglino_mixed", "siglino_dense_plain_norm"])
def test_frequencies_are_the_released_ones(case):
    args, figures = load(case, GOLDEN / "released")
    theirs = torch.tensor(figures["state/freqs_cis_golden"])
    ours = golden_frequencies(*theirs.shape[:2], args["rope_min_freqs"], args["rope_max_freqs"])
    torch.testing.assert_close(ours, theirs)


def test_positions():
    shapes = torch.tensor([[2, 8], [1, 3]])
    positions = patch_positions(shapes, 16)
    assert positions[0, 0].tolist() == pytest.approx([-0.5, -2.0])  # the corners of a grid 4 times as wide as high
    assert positions[0, 15].tolist() == pytest.approx([0.5, 2.0])
    assert positions[0, 8].tolist() == pytest.approx([0.5, -2.0])
    assert positions[1, 1].tolist() == pytest.approx([-(3**-0.5), 0.0])


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_sink_is_a_sigmoid_of_the_scores(num_kv_heads):
    torch.manual_seed(0)
    attn = SinkAttention(24, 4, 8, num_kv_heads, qk_norm=True).double()
    torch.nn.init.normal_(attn.sinks, std=2.0)
    x = torch.randn(2, 5, 24, dtype=torch.double, requires_grad=True)
    position = torch.randn(2, 5, 2, dtype=torch.double)
    turn = rotation(position, golden_frequencies(4, 2, 1.0, 20.0).double())
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    bias = torch.zeros(2, 1, 1, 5, dtype=torch.double).masked_fill(~mask[:, None, None], -torch.inf)
    q, k, v = attn.qkv(x).unflatten(-1, (-1, 8)).transpose(1, 2).split([4, num_kv_heads, num_kv_heads], dim=1)
    sin, cos = turn.chunk(2, dim=-1)

    def rotated(heads):
        still, turned = F.rms_norm(heads, (8,)).chunk(2, dim=-1)
        other = torch.stack([-turned[..., 1::2], turned[..., ::2]], dim=-1).flatten(-2)
        return torch.cat([still, turned * cos + other * sin], dim=-1)

    k, v = (each.repeat_interleave(4 // num_kv_heads, dim=1) for each in (k, v))
    scores = rotated(q) @ rotated(k).transpose(-1, -2) / 8**0.5 + bias
    share = torch.sigmoid(scores.logsumexp(-1, keepdim=True) - attn.sinks.view(1, 4, 1, 1))
    wanted = attn.proj((share * (scores.softmax(-1) @ v)).transpose(1, 2).flatten(2))
    found = attn(x, turn, bias)
    torch.testing.assert_close(found, wanted)
    weights = torch.randn_like(wanted)
    ours, theirs = (
        torch.autograd.grad((each * weights).sum(), [x, attn.sinks], retain_graph=True) for each in (found, wanted)
    )
    torch.testing.assert_close(ours, theirs)
