"""Shapes and outputs of the networks, and what they refuse."""

import pytest
import torch
from torch import nn

from models import Mapping, SvaCLR, video_encoder
from support.layers import prepare_layers


@pytest.mark.parametrize("mapping,tensors", [("identity", 0), ("linear", 2), ("mlp", 4)])
def test_svaclr(mapping, tensors):
    """Each encoder is called once, with all views, and each view keeps its place."""
    model, calls = SvaCLR("r2plus1d_10", mapping, D=64).eval(), []
    for encoder in (model.f, model.g):
        encoder.register_forward_hook(lambda m, i, o: calls.append(i[0].shape))
    audio, video = torch.randn(3, 2, 1, 40, 31), torch.randn(3, 2, 3, 4, 24, 24)
    ly_a, ly_v, z_a, z_v = whole = model(audio, video)
    assert ly_v.shape == ly_a.shape == (3, 2, 512) and z_v.shape == z_a.shape == (3, 2, 64)
    assert calls == [(6, 1, 40, 31), (6, 3, 4, 24, 24)]
    y_a, y_v = model.g(audio.flatten(0, 1)), model.f(video.flatten(0, 1))
    for x, y in zip(whole, (model.l(y_a), model.l(y_v), model.h_a(y_a), model.h_v(y_v))):
        torch.testing.assert_close(x.flatten(0, 1), y, atol=1e-4, rtol=1e-3)
    assert len(list(model.l.parameters())) == tensors


def test_what_does_not_fit_gets_a_sentence():
    model = SvaCLR("r2plus1d_10")
    audio, video = torch.zeros(2, 2, 1, 40, 31), torch.zeros(2, 2, 3, 4, 24, 24)
    for a, v in ((audio[0], video[0]), (audio, video[:, 1:]), (audio, video[:, :, 1:]),
                 (audio.expand(2, 2, 3, 40, 31), video), (audio, video.byte())):
        with pytest.raises(ValueError, match=f"video {v.dtype} .*: give floats .B, K, 1, M, F. and "
                                             ".B, K, 3, T, H, W., with"):
            model(a, v)
    model.g.fc = nn.Linear(512, 128)
    with pytest.raises(ValueError, match=r"g gives \(4, 128\) for \(2, 2\) clips and views: "):
        model(audio, video)
    for make, name in ((video_encoder, "r50"), (Mapping, "cubic")):
        with pytest.raises(ValueError, match=f"'{name}': choose "):
            make(name)


@pytest.mark.slow
def test_gradient_of_clips_that_become_two_frames_deep():
    """In bfloat16 on CPUs torch 2.14 leaves part of it unwritten, unless the frames are padded."""
    torch.manual_seed(0)
    f = prepare_layers(video_encoder("r2plus1d_10"), torch.device("cpu"))
    conv = f.layer2[0].conv2[0][3]     # over time, (3, 1, 1)
    weight = conv.weight.detach().requires_grad_()
    for depth in (1, 2, 3):
        x = torch.randn(8, conv.in_channels, depth, 7, 7)
        g = torch.randn(8, conv.out_channels, depth, 7, 7)
        for _ in range(60):
            for power in (16, 18, 20, 22):
                torch.full((1 << power,), torch.inf)      # the allocator hands this memory out next
            conv.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                y = conv(x)
            y.backward(g.to(y.dtype))
            assert torch.isfinite(conv.weight.grad).all(), depth
        exact, = torch.autograd.grad(nn.functional.conv3d(x, weight, padding=(1, 0, 0)), weight, g)
        assert (conv.weight.grad - exact).norm() / exact.norm() < 0.01
