"""Speeds, crops and the log-mel of signals whose right result is known."""

import math
import re
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from conftest import peak_hz

from augment import (LogMel, centre_band, centre_crop, crop_at, flip_jitter, frame_times,
                     normalize_frames, random_crop, random_resized_crop, sample_speeds,
                     speed_up_audio)


def tone(hz, seconds=1.0, rate=24000):
    return torch.sin(2 * math.pi * hz * torch.arange(round(seconds * rate)) / rate)


def test_speeds_are_uniform_and_independent():
    g = torch.Generator().manual_seed(0)
    drawn = Counter()
    for _ in range(8000):
        (one_v, tau_v), (one_a, tau_a) = sample_speeds(4, g)
        assert one_v == one_a == 1
        drawn[tau_v, tau_a] += 1
    assert set(drawn) == {*product(range(1, 5), repeat=2)}
    assert all(abs(n - 500) < 5 * math.sqrt(500) for n in drawn.values())
    for speed in (0, 2.5):
        with pytest.raises(ValueError, match=f"max_speed is {speed}: give a whole speed"):
            sample_speeds(speed)


def test_a_fast_view():
    """Length and loudness stay. What passes 12 kHz must not fold back."""
    for s in (1, 2, 3, 4):
        fast = speed_up_audio(tone(500, s), s)
        assert fast.shape == (24000,)
        assert abs(peak_hz(fast) - 500 * s) < 2
        assert abs(fast[2000:-2000].std() - tone(500).std()) < 0.01
        assert frame_times(12, 30, s).equal(frame_times(12 * s, 30, 1)[::s])
    for fps, s in ((30, 0), (30, 1.5), (0, 1), (30, [1, 3])):
        sentence = re.escape(f"tau is {s} and fps is {fps}: give one whole speed")
        with pytest.raises(ValueError, match=sentence):
            frame_times(12, fps, s)
    assert speed_up_audio(tone(8000, 2), 2)[500:-500].abs().max() < 0.01
    assert speed_up_audio(tone(4100, 2), 2)[500:-500].abs().max() > 0.9
    wave = tone(440)
    expected = speed_up_audio(wave, torch.tensor(2))
    with torch.autocast("cpu", torch.bfloat16):
        assert speed_up_audio(wave, 2).equal(expected)
    for wave, tau in ((wave.short(), 2), (wave.numpy(), 2), (wave, 0), (wave, 1.5),
                      (wave, math.nan)):
        with pytest.raises(ValueError, match="a tensor of floats in .-1, 1. .*, and one whole "):
            speed_up_audio(wave, tau)


def test_colours_and_mirror_of_fine_tuning():
    """Half are mirrored, 80 % change colours: all frames alike, by the seed alone."""
    state, mirrored, changed = torch.get_rng_state(), 0, 0
    frames = torch.full((3, 6, 80, 3), 120, dtype=torch.uint8)
    frames[..., 0] = torch.linspace(0, 240, 80)     # from left to right
    for seed in range(300):
        view = flip_jitter(frames, seed)
        assert view.shape == frames.shape and view.eq(view[0]).all()
        assert view.equal(flip_jitter(frames, seed))
        mirrored += bool(view[0, 0, 0, 0] > view[0, 0, -1, 0])
        changed += not view.equal(frames) and not view.equal(frames.flip(-2))
    assert abs(changed / 300 - 0.8) < 0.1 and abs(mirrored / 300 - 0.5) < 0.1
    assert torch.get_rng_state().equal(state)
    for wrong in (frames.float(), frames.movedim(-1, 1), frames[None], frames.numpy()):
        with pytest.raises(ValueError, match="a tensor .T, H, W, 3. of uint8, the colours last"):
            flip_jitter(wrong, 0)


@pytest.mark.parametrize("W,H", [(160, 90), (90, 160)])
def test_crop_of_pre_training(W, H):
    """A square of 7/8 to 7/10 of the shorter side, anywhere, half of the time mirrored."""
    g = torch.Generator().manual_seed(0)
    windows, mirrored = zip(*[random_crop(g) for _ in range(2000)])
    x, y, w, h = np.array([window(W, H) for window in windows]).T
    zoom, places = 90 / w * 7, (x / (W - w), y / (H - h))
    assert np.array_equal(w, h)
    assert zoom.min() >= 8 and zoom.max() <= 10 and abs(zoom.mean() - 9) < 0.05
    for place in places:                    # uniform over the room
        assert abs(place.mean() - 0.5) < 0.03
        assert 0 <= place.min() < 0.01 and 0.99 < place.max() <= 1
    assert abs(np.corrcoef([*places, zoom]) - np.eye(3)).max() < 0.08
    assert abs(np.mean(mirrored) - 0.5) < 0.05


@pytest.mark.parametrize("W,H", [(160, 90), (90, 160)])
def test_crop_of_fine_tuning(W, H):
    """14 to 100 % of the area, and an aspect of 3/4 to 4/3, or else the largest one."""
    g = torch.Generator().manual_seed(0)
    x, y, w, h = np.array([random_resized_crop(g)(W, H) for _ in range(1000)]).T
    assert min(x) >= 0 and max(x + w) <= W + 1e-9
    assert min(y) >= 0 and max(y + h) <= H + 1e-9
    area, aspect = w * h / (W * H), w / h
    assert 0.14 <= min(area) < 0.16 and max(area) > 0.95 * 0.75
    assert min(aspect) >= 0.7499 and max(aspect) <= 1.3334
    assert abs(np.log(aspect).mean()) < 0.1
    largest = random_resized_crop(g)
    assert largest(1000, 10) == pytest.approx((500 - 20 / 3, 0, 40 / 3, 10))
    assert largest(10, 1000) == pytest.approx((0, 500 - 20 / 3, 10, 40 / 3))


def test_windows_and_crops_of_evaluation():
    assert centre_crop(160, 80) == (45, 5, 70, 70) and centre_crop(80, 160) == (5, 45, 70, 70)
    assert centre_band(160, 80) == (0, 5, 160, 70) and centre_band(80, 160) == (5, 0, 70, 160)
    wide = torch.arange(10 * 14).reshape(10, 14, 1).expand(10, 14, 3)
    for place, first in ((0, 14), (0.5, 14 + 3), (1, 14 + 6)):
        crop = crop_at(wide, 8, place)
        assert crop.shape == (8, 8, 3) and crop[0, 0, 0] == first
        assert crop_at(wide.transpose(0, 1), 8, place).equal(crop.transpose(0, 1))
    for size, place in ((15, 0.5), (8, 2)):
        with pytest.raises(ValueError, match=f"a crop of {size} pixels at place {place} does not"):
            crop_at(wide, size, place)
    for wrong, given in ((wide.movedim(-1, 0), r"int64 \(3, 10, 14\)"), (wide.numpy(), "ndarray")):
        with pytest.raises(ValueError, match=rf"frames are {given}: give a tensor \(..., H, W, 3"):
            crop_at(wrong, 3)


def test_normalize_frames():
    frames = torch.randint(0, 256, (2, 2, 4, 6, 6, 3), dtype=torch.uint8)
    x = normalize_frames(frames)
    torch.testing.assert_close(x[0, 1, 2, 3], (frames[0, 1, 3, :, :, 2] / 255 - 0.45) / 0.225)
    assert x.flatten(0, 1).is_contiguous(memory_format=torch.channels_last_3d)
    for wrong in (frames.movedim(-1, 2), frames[0, 0, 0], frames / 255, frames.numpy()):
        with pytest.raises(ValueError, match="a tensor .*T, H, W, 3. of uint8, the colours last"):
            normalize_frames(wrong)


def test_log_mel():
    log_mel = LogMel()
    waves = torch.stack([tone(300), tone(1200), torch.zeros(24000)])
    x = log_mel(waves)
    assert x.shape == (3, 1, 40, 101) and torch.isfinite(x).all()
    top = 2595 * math.log10(1 + 12000 / 700)              # 12 kHz in mel
    centres = 700 * (10 ** (torch.linspace(0, top, 42)[1:-1] / 2595) - 1)
    for row, hz in ((0, 300), (1, 1200)):     # the band nearest to the tone is the loudest one
        assert x[row, 0, :, 50].argmax() == abs(centres - hz).argmin()
    assert abs(x[2] - (math.log(1e-6) + 0.9) / 4.3).max() < 1e-5            # silence
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(log_mel(waves[1]), x[1])
    louder = log_mel(10 * waves[0])[0, :, 50].max() - x[0, 0, :, 50].max()
    assert abs(louder - 2 * math.log(10) / 4.3) < 1e-3
    for wrong, given in ((waves.short(), "int16"), (waves[..., :512], "float32"),
                         (waves.numpy(), "ndarray")):
        with pytest.raises(ValueError, match=f"the wave is {given}.*: give a tensor of floats in "):
            log_mel(wrong)
    assert LogMel(96000)(tone(300, rate=96000)).shape == (1, 40, 101)   # its window is longer
