"""From real files to batches: frames by time stamp, pitch by speed, draws, failures."""

import resource

import av
import numpy as np
import pytest
import torch
from conftest import make_video, peak_hz, remux, write_text
from torch.utils.data import DataLoader

import data
from augment import centre_band, crop_at
from data import ActionClips, AudioVisualClips, find_rows, make_loader, read_clip
from frames import read_barcode
from support.batches import TrainingBatches, collate, evaluation_batches
from support.rows import Row

# ---- one clip

@pytest.mark.parametrize("fps,suffix,start,tone", [
    (30, "mp4", 0, 400), (24000 / 1001, "mkv", 1.5, 400), (10, "mp4", 0, None)])
def test_views_come_from_their_times(tmp_path, fps, suffix, start, tone):
    path = make_video(tmp_path / f"a.{suffix}", 6.5, fps, start=start, tone=tone)
    speeds = (1, 3, 4) if tone else ()
    with av.open(str(path)) as container:   # what the file itself says
        times = torch.tensor([frame.time for frame in container.decode(video=0)])
        times -= max(float(s.start_time * s.time_base) for s in container.streams)
    for t0 in (0, 0.73, 2.4):
        video, audio = read_clip(path, t0, (1, 2, 4), speeds, frames=12, fps=12, size=48)
        assert video.shape == (3, 12, 48, 64, 3) and video.dtype == torch.uint8
        assert audio.shape == (len(speeds), 24000) and audio.dtype == torch.float32
        for k, tau in enumerate((1, 2, 4)):     # the nearest frame in time
            error = times[read_barcode(video)[k]] - (t0 + tau * torch.arange(12) / 12)
            assert error.abs().max() < 0.5 / fps + 0.002, (t0, tau)
        for wave, tau in zip(audio, speeds):
            assert abs(peak_hz(wave) - 400 * tau) < 3
            assert abs(wave[2000:-2000].std() - 0.5 / 2 ** 0.5) < 0.02


def test_the_ends_of_what_can_be_read(tmp_path):
    """Of two tracks one is heard. Past the end the last frame stands. Without sound it fails."""
    path = make_video(tmp_path / "a.mp4", 1.0, 30)
    remux(path, tmp_path / "two.mkv", ("video", "audio", "audio"))
    for name in ("a.mp4", "two.mkv"):
        video, audio = read_clip(tmp_path / name, 0.5, frames=30, fps=30, size=48)
        assert read_barcode(video)[0].tolist() == [*range(15, 30), *[29] * 15]
        assert abs(peak_hz(audio[0, :11000]) - 400) < 3 and audio[0, :11000].std() > 0.3
        assert audio[0, 14000:].abs().max() == 0
    with pytest.raises(ValueError, match="silent.mp4: no audio stream"):
        read_clip(remux(path, tmp_path / "silent.mp4", ["video"]), 0)


# ---- what is drawn

def row_of(path, duration=1.0, video_duration=1.0):
    return Row(str(path), "c", "", duration, video_duration, True, "")


def test_a_sample_depends_on_seed_epoch_and_index_alone(put):
    rows = [row_of(put(f"{n}.mp4")) for n in range(6)]
    clips, other_seed = (AudioVisualClips(rows, 4, 16, 24, 2, seed=seed) for seed in (1, 2))
    video, audio, source = clips[3, 5]
    assert video.shape == (2, 4, 24, 24, 3) and audio.shape == (2, 6000)
    assert source == (rows[5].path, [])
    for other in (clips[4, 5], clips[3, 4], other_seed[3, 5]):
        assert not other[1].equal(audio)
    loader = make_loader(clips, 3, 2, epochs=8)     # with two loading processes
    loader.batch_sampler.epoch = 7
    keys = list(loader.batch_sampler)
    assert len(keys) == 2
    for batch, (video, audio, _) in zip(keys, loader, strict=True):
        assert video.equal(torch.stack([clips[key][0] for key in batch]))
        assert audio.equal(torch.stack([clips[key][1] for key in batch]))


@pytest.fixture
def seen(monkeypatch):
    """The arguments with which a clip of made-up content was read, a list that grows."""
    calls = []

    def read(path, t0, tau_v, tau_a, frames, fps, size, window, *others):
        calls.append((t0, tau_v, tau_a, size, window(100, 100)))
        ramp = torch.arange(24, dtype=torch.uint8)[:, None].expand(len(tau_v), frames, 24, 24, 3)
        return ramp, torch.zeros(len(tau_a), 12000)

    monkeypatch.setattr(data, "read_clip", read)
    return calls


@pytest.mark.parametrize("seconds,max_speed,same,speeds", [
    (9.0, 4, False, {(v, a) for v in (1, 2, 3, 4) for a in (1, 2, 3, 4)}),
    (9.0, 4, True, {(s, s) for s in (1, 2, 3, 4)}),
    (1.3, 4, False, {(1, 1), (1, 2), (2, 1), (2, 2)}),  # 0.5 s at speed 3 do not fit
    (9.0, 1, False, {()})])                             # without co-augmentation
def test_draws_of_pre_training(seen, seconds, max_speed, same, speeds):
    """Speeds, place, window and mirror are drawn. The window alone is read."""
    rows, mirrored = [row_of("a.mp4", seconds, seconds)], []
    clips = AudioVisualClips(rows, 4, 8, 24, max_speed, same_speed=same)
    for epoch in range(150):
        video, audio, _ = clips[epoch, 0]
        t0, tau_v, tau_a, size, window = seen[-1]
        assert video.shape[0] == audio.shape[0] == len(tau_v) == (1 if max_speed == 1 else 2)
        assert tau_v[0] == tau_a[0] == 1 and size == 24 and 0.69 < window[2] / 100 < 0.88
        assert 0 <= t0 <= seconds - 0.5 * max(*tau_v, *tau_a)
        mirrored.append(video[0, 0, 0, 0, 0].item() == 23)
    assert {(*call[1][1:], *call[2][1:]) for call in seen} == speeds
    assert 0.3 < np.mean(mirrored) < 0.7 and len({call[4] for call in seen}) == 150
    assert np.ptp([call[0] for call in seen]) > 0.5 * (seconds - 0.5 * max(seen[0][1]))


def test_draws_of_fine_tuning(seen):
    clips = ActionClips([row_of("a.mp4", 1.0, 3.0)], ["b", "c"], 4, 8, 24)
    for epoch in range(30):
        video, label, _ = clips[epoch, 0]
        assert video.shape == (4, 24, 24, 3) and video.equal(clips[epoch, 0][0]) and label == 1
        assert seen[-1] == seen[-2] and seen[-1][2] == () and seen[-1][3] == (24, 24)
    assert len({call[4] for call in seen}) == 30
    assert max(call[0] for call in seen) > 2    # the sound is shorter than the pictures


def test_left_out_and_replaced(put, tmp_path, capsys):
    root, folder = tmp_path / "root", tmp_path / "root/train/c"
    for n in range(3):
        put(f"root/train/c/good{n}.mp4")
    put("root/train/c/silent.mp4", "silent")
    make_video(folder / "short.mp4", 0.2, 10)
    for name in ("train/c/broken.mp4", "test/c/broken.mp4", ".trash"):
        write_text(root / name, "no video at all")
    rows, left_out = find_rows(root, "train", tmp_path / "out")
    assert "1 other or hidden files and folders passed over" in capsys.readouterr().out
    assert (rows, left_out) == find_rows(tmp_path / "out/manifest.csv", "train", tmp_path)
    assert rows[0].label is rows[1].label   # 240,000 copies would take 40 MB in each worker
    clips = AudioVisualClips(rows, frames=8, fps=16, size=24, max_speed=2)
    assert len(clips) == 3 and left_out | clips.left_out == {
        str(folder / "short.mp4"): "shorter than one clip of 0.50 s",
        str(folder / "silent.mp4"): "no audio stream",
        str(folder / "broken.mp4"): "cannot be read: Invalid data found when processing input"}
    for late, usable in ((0.4, True), (0.6, False)):    # frames of 1/16 s by which a file is short
        assert len(AudioVisualClips([row_of("a.mp4", 0.5 - late / 16)], 8, 16)) == usable
    bad = write_text(folder / "good1.mp4", "overwritten")
    video, _, (path, failures) = clips[0, 1]
    assert video.shape[0] == 2 and path in (rows[0].path, rows[2].path)
    assert set(failures) == {f"{bad}: Invalid data found when processing input"}


# ---- batches

def dealt(W, epochs=3, epoch=0, used=0):
    """Deal 50 clips to W processes, from a place on. Returns the keys, (W, steps, 4, 2)."""
    processes = []
    for rank in range(W):
        batches = TrainingBatches(50, 4, epochs, 5, rank, W)
        batches.epoch, batches.used = epoch, used
        processes.append(np.reshape(list(batches), (len(batches), 4, 2)))
    return np.stack(processes)


@pytest.mark.parametrize("W", [1, 3, 5])
def test_every_clip_is_dealt_to_one_process_once(W):
    """From any place on, the batches are the rest of the uninterrupted ones."""
    whole, N, steps = dealt(W), 4 * W, 50 // (4 * W)
    for epoch in range(3):
        keys = whole[:, steps * epoch:][:, :steps].reshape(-1, 2)
        assert len(np.unique(keys, axis=0)) == len(keys) == steps * N
        assert (keys[:, 0] == epoch).all()
        for step in range(steps + 1):
            rest = dealt(W, epoch=epoch, used=step * N)
            assert np.array_equal(rest, whole[:, steps * epoch + step:])
    assert dealt(W, epoch=3).size == 0
    first, second = ([index for _, index in batch] for batch in TrainingBatches(8, 8, 2))
    assert first != second and sorted(first) == sorted(second)
    # 3 processes use 24 clips in 2 steps. Other processes share the rest.
    before, after = dealt(3, epochs=1)[:, :2], dealt(W, epochs=1, used=24)
    keys = np.concatenate([before.reshape(-1, 2), after.reshape(-1, 2)])
    assert len(np.unique(keys, axis=0)) == len(keys) == 24 + 26 // N * N


def test_evaluation_clips_are_evenly_spaced(tmp_path):
    lighter = make_video(tmp_path / "a.mp4", 5, 10, tone=None, gray=lambda t: 20 + 40 * t)
    barcode = make_video(tmp_path / "b.mp4", 1, 10, tone=None)  # its left and right differ
    rows = [row_of(lighter, 3.5, 5.0), row_of(barcode)]
    clips = ActionClips(rows, ["c"], frames=4, fps=8, size=24, clips_per_file=4, crops=3)
    three, label, source = clips[0]
    assert three.shape == (12, 4, 24, 24, 3) and label == 0 and source == (0, None)
    levels = 20 + 40 * torch.tensor([0, 1.5, 3.0, 4.5])
    assert (three[1::3, 0].float().mean((1, 2, 3)) - levels).abs().max() < 4
    band, _ = read_clip(barcode, 0, (1,), (), 4, 8, 24, centre_band)
    assert band.shape == (1, 4, 24, 37, 3)  # 7/8 of 54 lines, 72 columns
    three, _, _ = clips[1]
    for crop, place in enumerate((0, 0.5, 1)):
        assert three[crop].equal(crop_at(band[0], 24, place))
    assert not three[0].equal(three[1]) and not three[1].equal(three[2])


def test_an_evaluation_stops_as_soon_as_too_many_files_fail(put, tmp_path):
    """And not after hours. With more patience it goes on with the rest."""
    rows = [row_of(put(f"{n}.mp4")) for n in range(8)]
    for n in (0, 1, 2, 7):
        write_text(tmp_path / f"{n}.mp4", "damaged since the scan")
    loader = make_loader(AudioVisualClips(rows, 4, 8, 24, clips_per_file=2), 3, 0)
    assert [index for *_, index in evaluation_batches(loader, 0.5)] == [[3, 4, 5], [6]]
    with pytest.raises(ValueError, match="3 of 8 videos failed, .* of 0.25, the last: .*2.mp4: "):
        next(evaluation_batches(loader, 0.25))


def limit_memory(_):
    """Files of this process, those of the shared memory too, have at most 1 MB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 20, 2 ** 20))


@pytest.mark.slow
def test_full_shared_memory_ends_the_loading_with_a_sentence():
    large = torch.zeros(2 ** 21, dtype=torch.uint8), torch.zeros(1), (0, None)
    loader = DataLoader([large], 1, num_workers=1, collate_fn=collate, timeout=60,
                        worker_init_fn=limit_memory)
    with pytest.raises(ValueError, match=r"the shared memory \(/dev/shm\) is full: give more"):
        next(iter(loader))
