"""Checks speeds, crops and the log-mel on signals for which the right result is known."""

import math
from collections import Counter

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
    assert set(drawn) == {(v, a) for v in range(1, 5) for a in range(1, 5)}
    assert all(abs(n - 500) < 5 * math.sqrt(500) for n in drawn.values())
    both = [sample_speeds(4, g, same=True) for _ in range(100)]
    assert all(tau_v == tau_a for tau_v, tau_a in both) and {v[1] for v, _ in both} == {1, 2, 3, 4}
    for speed in (0, 2.5):
        with pytest.raises(ValueError, match=f"max_speed is {speed}: give a whole speed of 1 or"):
            sample_speeds(speed)


def test_a_fast_view_takes_every_sth_time():
    assert frame_times(4, 1, 3).tolist() == [0, 3, 6, 9]
    assert frame_times(12, 24, 3).equal(frame_times(36, 24, 1)[::3])


def test_speed_up_audio():
    """The pitch rises, and the length and loudness stay. Speed 2 moves a tone of 8 kHz past the
    Nyquist limit, 12 kHz. It must not fold back."""
    for s in (1, 2, 3, 4):
        fast = speed_up_audio(tone(500, s), s)            # s L samples -> L
        assert fast.shape == (24000,)
        assert abs(peak_hz(fast) - 500 * s) < 2
        assert abs(fast[2000:-2000].std() - tone(500).std()) < 0.01
    assert speed_up_audio(tone(8000, 2), 2)[500:-500].abs().max() < 0.01
    assert speed_up_audio(tone(4100, 2), 2)[500:-500].abs().max() > 0.9
    wave = tone(440)
    expected = speed_up_audio(wave, torch.tensor(2))
    with torch.autocast("cpu", torch.bfloat16):
        assert speed_up_audio(wave, 2).equal(expected)
    for wave, tau in ((wave.short(), 2), (wave, 0), (wave, 1.5), (wave, math.nan)):
        with pytest.raises(ValueError, match="give floats, and a whole speed of 1 or more"):
            speed_up_audio(wave, tau)


def test_colours_and_mirror_of_fine_tuning():
    """Half of the clips are mirrored, and 80 % change their colours. All frames of a clip change
    alike, and the seed decides how. The caller's generator stays."""
    state = torch.get_rng_state()
    x = torch.linspace(0, 240, 80).round().to(torch.uint8).expand(6, 80)
    frames = torch.stack([x, torch.full_like(x, 120), torch.full_like(x, 120)], -1)     # (H, W, 3)
    frames, mirrored, changed, many = frames.repeat(3, 1, 1, 1), 0, 0, 300
    for seed in range(many):
        view = flip_jitter(frames, seed)
        assert view.shape == frames.shape and view.eq(view[0]).all()
        assert view.equal(flip_jitter(frames, seed))
        mirrored += bool(view[0, 0, 0, 0] > view[0, 0, -1, 0])
        changed += not view.equal(frames) and not view.equal(frames.flip(-2))
    assert abs(changed / many - 0.8) < 0.1 and abs(mirrored / many - 0.5) < 0.1
    assert torch.get_rng_state().equal(state)
    for wrong in (frames.float(), frames.movedim(-1, 1)):
        with pytest.raises(ValueError, match="give uint8 .T, H, W, 3., the colours last"):
            flip_jitter(wrong, 0)


def boxes_of(windows, W, H):
    """The windows of a picture of W x H, (n, 4), all of which are within it."""
    boxes = np.array([window(W, H) for window in windows])
    assert boxes.min() >= 0 and (boxes[:, :2] + boxes[:, 2:] <= (W + 1e-9, H + 1e-9)).all()
    return boxes


@pytest.mark.parametrize("W,H", [(160, 90), (90, 160)])
def test_crop_of_pre_training(W, H):
    """A square of 7/8 to 7/10 of the shorter side, anywhere, half of the time mirrored."""
    g = torch.Generator().manual_seed(0)
    windows, mirrored = zip(*[random_crop(g) for _ in range(2000)])
    boxes = boxes_of(windows, W, H)
    assert np.array_equal(boxes[:, 2], boxes[:, 3])
    zoom = 90 / boxes[:, 2] * 7             # uniform in 8 to 10
    assert zoom.min() >= 8 and zoom.max() <= 10 and abs(zoom.mean() - 9) < 0.05
    place = boxes[:, :2] / (np.array([W, H]) - boxes[:, 2:])        # uniform over the room
    assert (abs(place.mean(0) - 0.5) < 0.03).all() and place.min() < 0.01 and place.max() > 0.99
    assert abs(np.corrcoef([*place.T, zoom]) - np.eye(3)).max() < 0.08
    assert abs(np.mean(mirrored) - 0.5) < 0.05


@pytest.mark.parametrize("W,H", [(160, 90), (90, 160)])
def test_crop_of_fine_tuning(W, H):
    """14 to 100 % of the area, an aspect of 3/4 to 4/3. Where none fits, the largest one counts."""
    g = torch.Generator().manual_seed(0)
    windows = [random_resized_crop(g) for _ in range(1000)]
    boxes = boxes_of(windows, W, H)
    area, aspect = boxes[:, 2] * boxes[:, 3] / (W * H), boxes[:, 2] / boxes[:, 3]
    assert 0.14 <= area.min() < 0.16 and area.max() > 0.95 * 0.75
    assert aspect.min() >= 0.7499 and aspect.max() <= 1.3334 and abs(np.log(aspect).mean()) < 0.1
    for W, H, expected in ((1000, 10, (500 - 20 / 3, 0, 40 / 3, 10)),
                           (10, 1000, (0, 500 - 20 / 3, 10, 40 / 3))):
        assert any(box == pytest.approx(expected) for box in boxes_of(windows, W, H))


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


def test_normalize_frames():
    frames = torch.randint(0, 256, (2, 2, 4, 6, 6, 3), dtype=torch.uint8)     # (B, K, T, H, W, 3)
    x = normalize_frames(frames)
    assert x.shape == (2, 2, 3, 4, 6, 6)
    torch.testing.assert_close(x[0, 1, 2, 3], (frames[0, 1, 3, :, :, 2] / 255 - 0.45) / 0.225)
    assert x.flatten(0, 1).is_contiguous(memory_format=torch.channels_last_3d)
    for wrong in (frames.movedim(-1, 2), frames[0, 0, 0], frames / 255):
        with pytest.raises(ValueError, match="give uint8 .*, T, H, W, 3., the colours last"):
            normalize_frames(wrong)


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
    silence = (math.log(1e-6) + 0.9) / 4.3
    torch.testing.assert_close(x[2], torch.full_like(x[2], silence))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(log_mel(waves[1]), x[1])
    torch.testing.assert_close(log_mel(10 * waves[:1])[0, 0, :, 50].max() - x[0, 0, :, 50].max(),
                               torch.tensor(2 * math.log(10) / 4.3), atol=1e-3, rtol=0)
    for wrong, given in ((waves.short(), "int16"), (waves[..., :512], "float32")):
        with pytest.raises(ValueError, match=f"the wave is {given} .*: give floats in .-1, 1."):
            log_mel(wrong)
    assert LogMel(96000)(tone(300, rate=96000)).shape == (1, 40, 101)   # its window is longer
