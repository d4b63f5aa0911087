"""From real files to batches: frames by time stamp, pitch by speed, sound in step, failures."""

import resource

import av
import numpy as np
import pytest
import torch
from conftest import make_video, peak_hz, remux, write_text
from torch.utils.data import DataLoader, Dataset

import data
from augment import centre_band, crop_at
from data import ActionClips, AudioVisualClips, evenly_spaced, find_rows, make_loader, read_clip
from frames import read_barcode
from prepare.scan import Row
from support.batches import TrainingBatches, collate, evaluation_batches


# ---- one clip

@pytest.mark.parametrize("fps,suffix,start,has_sound", [
    (30, "mp4", 0, True), (24000 / 1001, "mkv", 1.5, True), (10, "mp4", 0, False)])
def test_views_come_from_their_times(tmp_path, fps, suffix, start, has_sound):
    path = make_video(tmp_path / f"a.{suffix}", 6.5, fps, start=start,
                      tone=400 if has_sound else None)
    speeds = (1, 3, 4) if has_sound else ()
    with av.open(str(path)) as container:                 # what the file itself says of its frames
        times = torch.tensor([frame.time for frame in container.decode(video=0)])
        times -= max(float(s.start_time * s.time_base) for s in container.streams)
    for t0 in (0, 0.73, 2.4):
        video, audio = read_clip(path, t0, (1, 2, 4), speeds, frames=12, fps=12, size=48)
        assert video.shape == (3, 12, 48, 64, 3) and video.dtype == torch.uint8
        assert audio.shape == (len(speeds), 24000) and audio.dtype == torch.float32
        for k, tau in enumerate((1, 2, 4)):               # the nearest frame in time
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

def test_a_sample_depends_on_seed_epoch_and_index_alone(put, tmp_path):
    for n in range(6):
        put(f"c/{n}.mp4")
    rows, _ = find_rows(tmp_path, None, tmp_path)
    clips, other_seed = (AudioVisualClips(rows, 4, 16, 24, 2, seed=seed) for seed in (1, 2))
    video, audio, source = clips[3, 5]
    assert video.shape == (2, 4, 24, 24, 3) and audio.shape == (2, 6000)
    assert source == (rows[5].path, [])
    for other in (clips[4, 5], clips[3, 4], other_seed[3, 5]):
        assert not other[1].equal(audio)
    batches = []
    for workers in (0, 2):
        loader = make_loader(clips, 3, workers, epochs=8)
        loader.batch_sampler.epoch = 7
        batches.append(list(loader))
        assert len(batches[-1]) == 2
    for (v0, a0, _), (v2, a2, _) in zip(*batches):
        assert v0.equal(v2) and a0.equal(a2)


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
    (1.3, 4, False, {(1, 1), (1, 2), (2, 1), (2, 2)}),     # a clip of 0.5 s at speed 3 does not fit
    (9.0, 1, False, {()})])                                # without co-augmentation
def test_draws_of_pre_training(seen, seconds, max_speed, same, speeds):
    """Speeds, place, window and mirror are drawn before reading. The window alone is read."""
    row = Row("a.mp4", "c", "", seconds, seconds, True, "")
    clips, mirrored = AudioVisualClips([row], 4, 8, 24, max_speed, same_speed=same), []
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
    row = Row("a.mp4", "c", "", 1.0, 3.0, True, "")
    clips = ActionClips([row], ["b", "c"], 4, 8, 24)
    for epoch in range(30):
        video, label, _ = clips[epoch, 0]
        assert video.shape == (4, 24, 24, 3) and video.equal(clips[epoch, 0][0]) and label == 1
        assert seen[-1] == seen[-2] and seen[-1][2] == () and seen[-1][3] == (24, 24)
    assert len({call[4] for call in seen}) == 30
    assert max(call[0] for call in seen) > 2               # the sound is shorter than the pictures


def test_left_out_and_replaced(put, tmp_path):
    root, folder = tmp_path / "root", tmp_path / "root" / "train" / "c"
    for n in range(3):
        put(f"root/train/c/good{n}.mp4")
    make_video(folder / "short.mp4", 0.2, 10)
    put("root/train/c/silent.mp4", "silent")
    for split in ("train", "test"):
        write_text(root / split / "c" / "broken.mp4", "no video at all" * 100)
    rows, left_out = find_rows(root, "train", tmp_path / "out")
    assert (rows, left_out) == find_rows(tmp_path / "out" / "manifest.csv", "train", tmp_path)
    assert rows[0].label is rows[1].label       # 240,000 copies would take 40 MB in each worker
    clips = AudioVisualClips(rows, frames=8, fps=16, size=24, max_speed=2)
    assert len(clips) == 3 and left_out | clips.left_out == {
        str(folder / "short.mp4"): "shorter than one clip of 0.50 s",
        str(folder / "silent.mp4"): "no audio stream",
        str(folder / "broken.mp4"): "cannot be read: Invalid data found when processing input"}
    for late, usable in ((0.4, True), (0.6, False)):    # frames of 1/16 s by which a file is short
        row = rows[0]._replace(duration=0.5 - late / 16)
        assert len(AudioVisualClips([row], frames=8, fps=16)) == usable
    (folder / "good1.mp4").write_bytes(b"overwritten")
    for index in range(3):
        video, _, (path, failures) = clips[0, index]
        assert video.shape[0] == 2 and not path.endswith("good1.mp4")
        assert {failure.split(": ", 1)[1] for failure in failures} <= {
            "Invalid data found when processing input"} and (index != 1 or failures)


# ---- batches

def dealt(world_size, epochs=3, epoch=0, used=0):
    """Deal 50 clips to processes, from a place on. Returns the list of batches of each process."""
    processes = []
    for rank in range(world_size):
        batches = TrainingBatches(50, 4, epochs, 5, rank, world_size)
        batches.epoch, batches.used = epoch, used
        processes.append(list(batches))
        assert len(batches) == len(processes[-1])
    return processes


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_clip_is_dealt_to_one_process_once(world_size):
    """From any place on, the batches are the rest of the uninterrupted ones."""
    whole, N, steps = dealt(world_size), 4 * world_size, 50 // (4 * world_size)
    for epoch in range(3):
        keys = [key for batches in whole for batch in batches[steps * epoch:][:steps]
                for key in batch]
        assert len(set(keys)) == len(keys) == steps * N and {e for e, _ in keys} == {epoch}
        for step in range(steps + 1):
            rest = [batches[steps * epoch + step:] for batches in whole]
            assert dealt(world_size, epoch=epoch, used=step * N) == rest
    assert dealt(world_size, epoch=3) == [[]] * world_size
    first, second = ([index for _, index in batch] for batch in TrainingBatches(8, 8, 2))
    assert first != second and sorted(first) == sorted(second)


@pytest.mark.parametrize("world_size", [1, 5])
def test_other_processes_are_dealt_the_rest(world_size):
    """3 processes use 24 of 50 clips in 2 steps. Another number of processes shares the rest."""
    N, before = 4 * world_size, [batches[:2] for batches in dealt(3, epochs=1)]
    after = dealt(world_size, epochs=1, used=24)
    before, after = ([key for batches in processes for batch in batches for key in batch]
                     for processes in (before, after))
    assert len(before) == 24 and len(after) == 26 // N * N
    assert len({*before, *after}) == len(before) + len(after)


def test_evaluation_clips_are_evenly_spaced(tmp_path):
    make_video(tmp_path / "c" / "a.mp4", 5, 10, gray=lambda t: 20 + 40 * t, sound_seconds=3.5)
    make_video(tmp_path / "c" / "b.mp4", 5, 10)         # its left and right ends differ
    rows, _ = find_rows(tmp_path, None, tmp_path)
    clips = AudioVisualClips(rows, frames=4, fps=8, size=24, clips_per_file=4)
    video, audio, source = clips[0]
    assert video.shape == (4, 4, 24, 24, 3) and audio.shape == (4, 12000) and source == (0, None)
    levels = 20 + 40 * torch.tensor([0, 1, 2, 3])
    assert (video[:, 0].float().mean((1, 2, 3)) - levels).abs().max() < 4
    crops = ActionClips(rows, ["c"], frames=4, fps=8, size=24, clips_per_file=4, crops=3)
    three, label, source = crops[0]
    assert three.shape == (12, 4, 24, 24, 3) and label == 0 and source == (0, None)
    levels = 20 + 40 * torch.tensor([0, 1.5, 3.0, 4.5])
    assert (three[1::3, 0].float().mean((1, 2, 3)) - levels).abs().max() < 4
    three, sound = evenly_spaced(crops, rows[1].path, rows[1].duration, crops=3, sound=False)
    assert sound.shape[0] == 0 and three.shape[0] == 12
    band, _ = read_clip(rows[1].path, 0, (1,), (), 4, 8, 24, centre_band)
    assert band.shape == (1, 4, 24, 37, 3)                          # 7/8 of 54 lines, 72 columns
    for crop, place in enumerate((0, 0.5, 1)):
        assert three[crop].equal(crop_at(band[0], 24, place))
    assert not three[0].equal(three[1]) and not three[1].equal(three[2])


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_files_that_fail_leave_an_evaluation(put, tmp_path, workers, capfd):
    """Of the batches of three, one fails as a whole and one in part: the rest comes as it is."""
    for n in range(8):
        put(f"c/{n}.mp4")
    rows, _ = find_rows(tmp_path, None, tmp_path)
    clips = AudioVisualClips(rows, frames=4, fps=8, size=24, clips_per_file=2)
    whole = clips[3]
    bad = (0, 1, 2, 7)
    for n in bad:
        (tmp_path / "c" / f"{n}.mp4").write_bytes(b"damaged since the scan")
    path = tmp_path / "c" / "7.mp4"
    failure = (7, f"{path}: Invalid data found when processing input")
    assert clips[7] == (None, None, failure)
    labelled = ActionClips(rows, ["b", "c"], 4, 8, 24, clips_per_file=2, crops=3)
    assert labelled[7] == (None, None, failure)

    batches = list(evaluation_batches(make_loader(clips, 3, workers), 0.5))
    assert [index for *_, index in batches] == [[3, 4, 5], [6]]
    for video, audio, index in batches:
        assert video.equal(torch.stack([whole[0] for _ in index]))
        assert audio.equal(torch.stack([whole[1] for _ in index]))
    said = capfd.readouterr().err
    for n in bad:
        assert said.count(f"failed: {tmp_path / 'c' / f'{n}.mp4'}: Invalid data") == 1
    with pytest.raises(ValueError, match="3 of 8 videos failed, .* of 0.25, the last: .*2.mp4: "):
        next(evaluation_batches(make_loader(clips, 3, workers), 0.25))


def test_a_scan_says_what_it_made_of_the_folders(put, tmp_path, capsys):
    for name in ("bus", "train"):
        put(f"r/{name}/a.mp4")
    rows, _ = find_rows(tmp_path / "r", None, tmp_path)
    assert [row.label for row in rows] == ["bus", "train"]
    assert "train counted among the classes, because bus" in capsys.readouterr().out


class Large(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return torch.zeros(2 ** 21, dtype=torch.uint8), torch.zeros(1), (index, None)


def limit_memory(_):
    """Files of this process, those of the shared memory too, have at most 1 MB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 20, 2 ** 20))


@pytest.mark.slow
def test_full_shared_memory_ends_the_loading_with_a_sentence():
    loader = DataLoader(Large(), 1, num_workers=1, collate_fn=collate, timeout=60,
                        worker_init_fn=limit_memory)
    with pytest.raises(ValueError, match=r"the shared memory \(/dev/shm\) is full: give more"):
        next(iter(loader))
