"""Checks speeds, crops and the log-mel on signals for which the right result is known."""

import math
from collections import Counter

import numpy as np
import torch
from conftest import peak_hz

from augment import (GDTLogMel, LogMel, crop_at, crop_flip, crop_flip_jitter, frame_times,
                     normalize_frames, sample_speeds, speed_up_audio)


def tone(hz, seconds=1.0, rate=24000):
    return torch.sin(2 * math.pi * hz * torch.arange(round(seconds * rate)) / rate)


def test_speeds_are_uniform_and_independent():
    g = torch.Generator().manual_seed(0)
    drawn = Counter()
    for _ in range(8000):
        (one_v, tau_v), (one_a, tau_a) = sample_speeds(4, g)
        assert one_v == one_a == 1
        drawn[tau_v, tau_a] += 1
    assert set(drawn) == {(v, a) for v in range(1, 5) for a in range(1, 5)}
    assert all(abs(n - 500) < 5 * math.sqrt(500) for n in drawn.values())
    assert sample_speeds(1) == ([1, 1], [1, 1])
    both = [sample_speeds(4, g, same=True) for _ in range(100)]
    assert all(tau_v == tau_a for tau_v, tau_a in both) and {v[1] for v, _ in both} == {1, 2, 3, 4}


def test_a_fast_view_takes_every_sth_time():
    assert frame_times(4, 1, 3).tolist() == [0, 3, 6, 9]
    assert frame_times(4, 1, 1).tolist() == [0, 1, 2, 3]
    assert frame_times(12, 24, 3).equal(frame_times(36, 24, 1)[::3])


def test_speed_up_audio_raises_the_pitch_and_keeps_the_length():
    for s in (1, 2, 3, 4):
        fast = speed_up_audio(tone(500, s), s)            # s L samples -> L
        assert fast.shape == (24000,)
        assert abs(peak_hz(fast) - 500 * s) < 2
        assert abs(fast[2000:-2000].std() - tone(500).std()) < 0.01


def test_speed_up_audio_is_low_passed():
    """Speed 2 moves a tone of 8 kHz past the Nyquist limit, 12 kHz. It must not fold back."""
    assert speed_up_audio(tone(8000, 2), 2)[500:-500].abs().max() < 0.01
    assert speed_up_audio(tone(4100, 2), 2)[500:-500].abs().max() > 0.9


def test_training_view_of_fine_tuning():
    """The view is a crop of 14 to 100 % of the area. Half of the views are mirrored, and 80 %
    change their colours. All frames of a view change alike, and the seed decides how."""
    H, W, many = 60, 80, 300
    x = torch.linspace(0, 240, W).round().to(torch.uint8).expand(H, W)
    y = torch.linspace(0, 240, H).round().to(torch.uint8)[:, None].expand(H, W)
    ramps = torch.stack([x, y, torch.full_like(x, 120)], -1).repeat(3, 1, 1, 1)     # (T, H, W, 3)
    plain = torch.full((3, H, W, 3), 120, dtype=torch.uint8)
    areas, mirrored, changed = [], 0, 0
    for seed in range(many):
        view = crop_flip_jitter(ramps, 32, seed)
        assert view.shape == (3, 32, 32, 3) and view.eq(view[0]).all()
        assert view.equal(crop_flip_jitter(ramps, 32, seed))
        changed += not crop_flip_jitter(plain, 32, seed).equal(plain[:, :32, :32])
        if view[..., 2].eq(120).all():    # the colours are unchanged, so the ramps tell the place
            steps = [view[0, :, :, c].float().mean(c).diff().mean().item() for c in (0, 1)]
            width, height = (step * 32 / 240 for step in steps)     # shares of the whole picture
            areas.append(abs(width * height))
            mirrored += width < 0
            assert height > 0
    assert abs(changed / many - 0.8) < 0.1 and len(areas) > 30
    assert 0.11 < min(areas) < 0.3 and 0.75 < max(areas) < 1.1
    assert abs(mirrored / len(areas) - 0.5) < 3 * 0.5 / len(areas) ** 0.5


def test_crop_flip_is_shared_by_all_frames_and_views():
    H, W = 10, 14
    place = torch.arange(H * W, dtype=torch.int32).reshape(H, W, 1)
    frames = place.expand(2, 5, H, W, 3)  # (K, T, H, W, 3); the value of a pixel tells its place
    seen = set()
    for seed in range(60):
        out = crop_flip(frames, 8, torch.Generator().manual_seed(seed))
        assert out.shape == (2, 5, 8, 8, 3)
        assert (out == out[0, 0]).all()
        first, right, below = (int(out[0, 0, r, c, 0]) for r, c in ((0, 0), (0, 1), (1, 0)))
        assert abs(right - first) == 1 and below - first == W
        seen.add((first, right - first))
    assert {step for _, step in seen} == {1, -1} and len(seen) > 20
    assert crop_flip(frames, 8, torch.Generator().manual_seed(3)).equal(
        crop_flip(frames, 8, torch.Generator().manual_seed(3)))


def test_crops_of_evaluation():
    wide = torch.arange(10 * 14).reshape(10, 14, 1).expand(10, 14, 3)
    assert [int(crop_at(wide, 8, place)[0, 0, 0]) for place in (0, 0.5, 1)] == [14, 14 + 3, 14 + 6]
    high = wide.transpose(0, 1)
    assert [int(crop_at(high, 8, place)[0, 0, 0]) for place in (0, 0.5, 1)] == [14, 14 + 3, 14 + 6]
    assert crop_at(high, 8, 1).equal(crop_at(wide, 8, 1).transpose(0, 1))


def test_normalize_frames():
    frames = torch.randint(0, 256, (2, 2, 4, 6, 6, 3), dtype=torch.uint8)     # (B, K, T, H, W, 3)
    x = normalize_frames(frames)
    assert x.shape == (2, 2, 3, 4, 6, 6)
    torch.testing.assert_close(x[0, 1, 2, 3], (frames[0, 1, 3, :, :, 2] / 255 - 0.45) / 0.225)
    assert x.flatten(0, 1).is_contiguous(memory_format=torch.channels_last_3d)


def test_log_mel():
    log_mel = LogMel()
    waves = torch.stack([tone(300), tone(1200), torch.zeros(24000)])
    x = log_mel(waves)                                    # (3, 1, M, F)
    assert x.shape == (3, 1, 40, 101) and torch.isfinite(x).all()
    top = 2595 * math.log10(1 + 12000 / 700)              # 12 kHz in mel
    centres = [700 * (10 ** (m / 2595) - 1) for m in torch.linspace(0, top, 42)[1:-1].tolist()]
    for row, hz in ((0, 300), (1, 1200)):     # the band nearest to the tone is the loudest one
        band = int(x[row, 0, :, 50].argmax())
        assert abs(centres[band] - hz) == min(abs(centre - hz) for centre in centres)
    torch.testing.assert_close(log_mel(waves[1]), x[1])
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(log_mel(waves), x)
    torch.testing.assert_close(log_mel(10 * waves[:1])[0, 0, :, 50].max() - x[0, 0, :, 50].max(),
                               torch.tensor(2 * math.log(10) / 4.3), atol=1e-3, rtol=0)


def logfbank(samples, rate=24000, nfft=1024, nfilt=40, width=480, step=240):
    """The published formula of python_speech_features.logfbank, loop by loop in float64.

    samples: (L,) integers -> (frames, nfilt). Its defaults are a pre-emphasis of 0.97, a
    rectangular window, and bands from 0 to half the rate.
    """
    x = samples.astype(np.float64)
    x = np.concatenate([x[:1], x[1:] - 0.97 * x[:-1]])
    count = 1 if len(x) <= width else 1 + math.ceil((len(x) - width) / step)
    x = np.concatenate([x, np.zeros((count - 1) * step + width - len(x))])
    frames = np.stack([x[n * step:n * step + width] for n in range(count)])
    power = np.abs(np.fft.rfft(frames, nfft)) ** 2 / nfft               # (frames, nfft // 2 + 1)
    top = 2595 * math.log10(1 + rate / 2 / 700)
    mel = [top * k / (nfilt + 1) for k in range(nfilt + 2)]
    edges = [math.floor((nfft + 1) * 700 * (10 ** (m / 2595) - 1) / rate) for m in mel]
    bands = np.zeros((nfilt, nfft // 2 + 1))
    for band, (low, middle, high) in enumerate(zip(edges, edges[1:], edges[2:])):
        for k in range(low, middle):
            bands[band, k] = (k - low) / (middle - low)
        for k in range(middle, high):
            bands[band, k] = (high - k) / (high - middle)
    energy = power @ bands.T
    return np.log(np.where(energy == 0, np.finfo(float).eps, energy))


def test_gdt_log_mel_is_the_published_formula():
    """Noise, a tone, silence, and sound that starts and ends within silence."""
    g = torch.Generator().manual_seed(0)
    noise, silence = 0.3 * torch.randn(24000, generator=g), torch.zeros(24000)
    part = torch.cat([silence[:7000], 1e-3 * noise[:9000], silence[:8000]])
    waves = torch.stack([noise, 0.8 * tone(440), silence, part])
    x = GDTLogMel()(waves)                                # (4, 1, 40, F)
    assert x.shape == (4, 1, 40, 99) and x.dtype == torch.float32
    assert len(x[2].unique()) == 1 and x[2].max() < -2    # silence is the log of the float64 eps
    for length in (24000, 23990, 24001, 480, 481, 200):   # the last frame is padded
        found = GDTLogMel()(waves[:, :length])
        for wave, row in zip(waves[:, :length], found):
            samples = np.clip(np.rint(wave.double().numpy() * 32768), -32768, 32767)
            expected = (logfbank(samples).T - 1.93) / 17.89
            assert row.shape == (1, *expected.shape), length
            assert np.abs(row[0].numpy() - expected).max() < 1e-4, length
    torch.testing.assert_close(GDTLogMel()(waves.reshape(2, 2, -1)), x.reshape(2, 2, 1, 40, 99))
    with torch.autocast("cpu", torch.bfloat16):
        assert GDTLogMel()(waves).equal(x)
