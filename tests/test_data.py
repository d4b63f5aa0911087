"""From real files to batches: frames by time stamp, pitch by speed, sound in step, failures."""

import pickle
import random
import tracemalloc

import av
import numpy as np
import pytest
import torch
from conftest import make_video, peak_hz, read_barcode

import data
from augment import centre_band, crop_at
from data import (ActionClips, AudioVisualClips, evenly_spaced, find_rows, make_loader, read_clip,
                  read_manifest)
from prepare import scan
from support.batches import TrainingBatches, evaluation_batches


def rows_of(root, out, split=None):
    scan.write(scan.scan(root), out)
    return read_manifest(out, split)


def test_class_names_are_kept_once(tmp_path):
    """A fork server hands each worker a copy of the rows: 240,000 of them take 65 MB."""
    row = scan.empty_row("", "", "train") | {"duration": 10.0, "video_duration": 10.0,
                                             "has_audio": 1}
    scan.write([row | {"path": f"/data/kinetics/train/abcdefghijk_{n:06}_{n:06}.mp4",
                       "label": f"playing the instrument {n % 400}"} for n in range(24_000)],
               tmp_path / "m.csv")
    sent = pickle.dumps(read_manifest(tmp_path / "m.csv")[0])
    tracemalloc.start()
    rows = pickle.loads(sent)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rows) == 24_000 and 10 * size < 80e6


@pytest.mark.parametrize("fps,suffix,codec,start", [
    (30, "mp4", "libx264", 0), (10, "mp4", "libx264", 0), (60, "mkv", "libx264", 0),
    (24000 / 1001, "mp4", "libx264", 0), (25, "avi", "mpeg4", 0), (30, "mkv", "libx264", 1.5),
    (25, "mpg", "mpeg2video", 0), (30, "webm", "libvpx", 0)])
def test_views_come_from_their_times(tmp_path, fps, suffix, codec, start):
    audio_codec = {"avi": "libmp3lame", "mpg": "mp2", "webm": "libopus"}.get(suffix, "aac")
    path = make_video(tmp_path / f"a.{suffix}", 7, fps, codec=codec, audio_codec=audio_codec,
                      rate=48000, start=start)
    with av.open(str(path)) as container:                 # what the file itself says of its frames
        times = torch.tensor([frame.time for frame in container.decode(video=0)])
        times -= max(float(s.start_time * s.time_base) for s in container.streams)
    assert abs(times - torch.arange(7 * fps) / fps).max() < 0.05
    for t0 in (0, 0.73, 2.4):
        video, audio = read_clip(path, t0, (1, 2, 4), (1, 3, 4), frames=12, fps=12, size=48)
        assert video.shape == (3, 12, 48, 64, 3) and video.dtype == torch.uint8
        assert audio.shape == (3, 24000) and audio.dtype == torch.float32
        for k, tau in enumerate((1, 2, 4)):               # the nearest frame in time
            error = times[read_barcode(video)[k]] - (t0 + tau * torch.arange(12) / 12)
            # After a seek in MPEG-PS, FFmpeg's stamps are half a frame out.
            off = 1 if suffix == "mpg" else 0.5
            assert error.abs().max() < off / fps + 0.002, (t0, tau)
        for k, tau in enumerate((1, 3, 4)):
            assert abs(peak_hz(audio[k]) - 400 * tau) < 3
            assert abs(audio[k][2000:-2000].std() - 0.5 / 2 ** 0.5) < 0.02


@pytest.mark.parametrize("rate,layout,audio_codec", [
    (8000, "mono", "pcm_s16le"), (22050, "stereo", "pcm_s16le"), (44100, "stereo", "aac"),
    (48000, "mono", "aac")])
def test_flash_and_beep_coincide(tmp_path, rate, layout, audio_codec):
    """A white frame and a click come every second from 0.5 s on, together at every speed."""
    on = lambda t: abs(t % 1 - 0.5) < 1e-6
    click = lambda t: 0.9 * np.sin(2 * np.pi * 1500 * t) * ((t % 1 >= 0.5) & (t % 1 < 0.52))
    path = make_video(tmp_path / "a.mkv", 9, 30, rate=rate, layout=layout, wave=click,
                      audio_codec=audio_codec, gray=lambda t: 255 if on(t) else 0)
    for t0 in (0.0, 0.2, 1.37, 3.9):
        for tau in (1, 2, 3, 4):
            video, audio = read_clip(path, t0, (tau,), (tau,), frames=30, fps=30, size=16)
            light, loud = video[0].float().mean((1, 2, 3)), audio[0].abs()
            # At speed tau a flash may fall between two frames: only the others are looked at.
            for n in (light > 128).nonzero().flatten().tolist():
                heard = loud[max(0, 800 * n - 1200):800 * n + 1200] > 0.3
                assert heard.any(), (t0, tau, n)
            onset = int((loud > 0.3).float().argmax()) / 24000 * tau + t0           # s in the file
            assert abs(onset % 1 - 0.5) < 1 / 30, (t0, tau, onset)


def test_a_rotated_film_is_read_upright(tmp_path):
    """Turned a quarter clockwise, the left end of the barcode comes to the top."""
    path = make_video(tmp_path / "a.mp4", 2, 30, turned=-90)
    video, _ = read_clip(path, 0, (1,), (1,), frames=30, fps=30, size=54)
    assert video.shape == (1, 30, 72, 54, 3)
    assert read_barcode(video.transpose(2, 3))[0].tolist() == list(range(30))


def test_variable_frame_rate(tmp_path):
    ticks = [0, 1, 2, 9, 10, 30, 31, 45, 60, 62, 75, 89]
    path = make_video(tmp_path / "a.mkv", 0.4, 30, ticks=ticks, tone=400, wave=lambda t: 0 * t)
    video, _ = read_clip(path, 0, (1, 2), (), frames=30, fps=20, size=54)
    for k, tau in enumerate((1, 2)):
        for n, seen in enumerate(read_barcode(video)[k].tolist()):
            distance = [abs(t - 1.5 * tau * n) for t in ticks]
            assert distance[seen] <= min(distance) + 0.1, (tau, n)


def test_surround_sound_odd_sizes_and_several_tracks(tmp_path):
    one = make_video(tmp_path / "one.webm", 2, 30, size=(73, 55), codec="libvpx",
                     audio_codec="libopus", layout="5.1", rate=48000)
    video, audio = read_clip(one, 0.3, (1,), (2,), frames=15, fps=30, size=55)
    assert video.shape == (1, 15, 55, 73, 3) and abs(peak_hz(audio[0]) - 800) < 5
    with av.open(str(one)) as source, av.open(str(tmp_path / "two.mkv"), "w") as out:
        tracks = [out.add_stream_from_template(source.streams[n]) for n in (0, 1, 1)]
        for packet in source.demux():
            for track in tracks[:1] if packet.stream.type == "video" else tracks[1:]:
                if packet.dts is not None:
                    copy = av.Packet(bytes(packet))
                    copy.pts, copy.dts, copy.duration = packet.pts, packet.dts, packet.duration
                    copy.time_base, copy.is_keyframe = packet.time_base, packet.is_keyframe
                    copy.stream = track
                    out.mux(copy)
    again = read_clip(tmp_path / "two.mkv", 0.3, (1,), (2,), frames=15, fps=30, size=55)
    assert again[0].equal(video) and abs(peak_hz(again[1][0]) - 800) < 5


def test_past_the_end_the_last_frame_stands(tmp_path):
    path = make_video(tmp_path / "a.mp4", 1.0, 30)
    video, audio = read_clip(path, 0.5, frames=30, fps=30, size=48)
    assert read_barcode(video)[0].tolist() == [*range(15, 30), *[29] * 15]
    assert audio[0, :11000].std() > 0.3 and audio[0, 14000:].abs().max() == 0


def test_failures_name_path_and_cause(tmp_path):
    silent = make_video(tmp_path / "silent.mp4", 1, tone=None)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video at all" * 100)
    for path, cause in ((silent, "no audio stream"), (broken, "Invalid data"),
                        (tmp_path / "gone.mp4", "No such file")):
        with pytest.raises(ValueError, match=f"{path.name}: {cause}"):
            read_clip(path, 0)


def test_damaged_files_are_read_or_named(tmp_path):
    """Cut, flipped, blanked and renamed files give right shapes, or a ValueError with the name."""
    rng = random.Random(0)
    kinds = (("mp4", "libx264", "aac"), ("avi", "mpeg4", "libmp3lame"), ("mkv", "libx264", "aac"),
             ("mpg", "mpeg2video", "mp2"))
    whole = [make_video(tmp_path / f"whole.{suffix}", 2, 25, codec=codec, audio_codec=audio_codec,
                        rate=48000).read_bytes() for suffix, codec, audio_codec in kinds]
    read = failed = 0
    for n in range(400):
        data = bytearray(rng.choice(whole))
        at = rng.randrange(len(data))
        if n % 4 == 0:
            data = data[:at]
        elif n % 4 == 1:
            data[at:at + 3000] = bytes(len(data[at:at + 3000]))
        else:                                             # anywhere, or in the header
            for _ in range(rng.choice((1, 20, 400))):
                data[rng.randrange(len(data) if n % 4 == 2 else 2000)] ^= 1 << rng.randrange(8)
        path = tmp_path / f"damaged.{rng.choice(('mp4', 'avi', 'mkv', 'mpg'))}"
        path.write_bytes(data)
        try:
            video, audio = read_clip(path, rng.choice((0, 0.7, 1.4)), (1, 2), (1, 2), frames=8,
                                     fps=16, size=36)
            assert video.shape[:2] == (2, 8) and audio.shape == (2, 12000)
            read += 1
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")
            failed += 1
    assert read > 50 and failed > 50


@pytest.fixture(scope="module")
def clips(tree, tmp_path_factory):
    rows, _ = rows_of(tree, tmp_path_factory.mktemp("m") / "m.csv", "train")
    return AudioVisualClips(rows, frames=4, fps=8, size=24, max_speed=4, seed=1)


def test_a_sample_depends_on_seed_epoch_and_index_alone(clips):
    video, audio, source = clips[3, 5]
    assert video.shape == (2, 4, 24, 24, 3) and audio.shape == (2, 12000)
    assert source == (clips.rows[5].path, [])
    again = clips[3, 5]
    assert again[0].equal(video) and again[1].equal(audio)
    other_seed = AudioVisualClips(clips.rows, 4, 8, 24, 4, seed=2)
    for other in (clips[4, 5], clips[3, 6], other_seed[3, 5]):
        assert not other[1].equal(audio)
    batches = []
    for workers in (0, 2):
        loader = make_loader(clips, 3, workers, epochs=8)
        loader.batch_sampler.epoch = 7
        batches.append(list(loader))
        assert len(batches[-1]) == 3
    for (v0, a0, _), (v2, a2, _) in zip(*batches):
        assert v0.equal(v2) and a0.equal(a2)


def test_the_window_is_drawn_before_reading(tmp_path, monkeypatch):
    """Pre-training and fine-tuning read the drawn window alone, and mirror half of the clips."""
    make_video(tmp_path / "c" / "a.mp4", 3, 10)
    rows, _ = rows_of(tmp_path, tmp_path / "m.csv")
    read, seen = data.read_clip, []

    def watched(*arguments):
        seen.append(arguments)
        return read(*arguments)

    monkeypatch.setattr(data, "read_clip", watched)
    clips, mirrored = AudioVisualClips(rows, 4, 8, 24), []
    for epoch in range(12):
        video, _, _ = clips[epoch, 0]
        plain, _ = read(*seen[-1])
        mirrored.append(not video.equal(plain))
        assert video.equal(plain.flip(-2)) or not mirrored[-1]
        assert seen[-1][6] == 24 and 0.69 < seen[-1][7](100, 100)[2] / 100 < 0.88
    assert {*mirrored} == {True, False}
    fine = ActionClips(rows, ["c"], 4, 8, 24)
    for epoch in range(3):
        video, label, _ = fine[epoch, 0]
        assert video.shape == (4, 24, 24, 3) and video.equal(fine[epoch, 0][0]) and label == 0
        assert seen[-1][6] == (24, 24) and seen[-1][7](100, 100) == seen[-2][7](100, 100)
    assert len({arguments[7](100, 100) for arguments in seen}) == 12 + 3


def test_one_view_without_co_augmentation(clips):
    video, audio, _ = AudioVisualClips(clips.rows, 4, 8, 24, max_speed=1)[0, 0]
    assert video.shape[0] == audio.shape[0] == 1


def test_speeds_that_do_not_fit_are_not_drawn(tmp_path):
    """A window of 0.5 s fits into 1.3 s at speed 2, not at 3 or 4: no tone is above 800 Hz."""
    make_video(tmp_path / "c" / "a.mp4", 1.3, 30)
    rows, _ = rows_of(tmp_path, tmp_path / "m.csv")
    clips = AudioVisualClips(rows, frames=8, fps=16, size=24, max_speed=4)
    heard = {round(peak_hz(clips[e, 0][1][1]) / 400) for e in range(20)}
    assert heard == {1, 2}


def test_one_speed_for_video_and_sound_alike(clips, monkeypatch):
    drawn = []

    def read(path, t0, tau_v, tau_a, *_):
        drawn.append((tau_v[1], tau_a[1]))
        return torch.zeros(2, 4, 24, 24, 3, dtype=torch.uint8), torch.zeros(2, 12000)

    monkeypatch.setattr(data, "read_clip", read)
    same = AudioVisualClips(clips.rows, 4, 8, 24, max_speed=4)
    same.same_speed = True
    for epoch in range(30):
        same[epoch, 0]
    assert set(drawn) == {(s, s) for s in (1, 2, 3, 4)}
    for epoch in range(30):
        clips[epoch, 0]
    assert any(tau_v != tau_a for tau_v, tau_a in drawn[30:])


def test_left_out_and_replaced(tmp_path):
    root = tmp_path / "root"
    for n in range(3):
        make_video(root / "c" / f"good{n}.mp4", 2)
    make_video(root / "c" / "short.mp4", 0.3)
    make_video(root / "c" / "silent.mp4", 2, tone=None)
    (root / "c" / "broken.mp4").write_bytes(b"\0" * 5000)
    (root / "c" / "notes.txt").write_text("not a video")
    rows, left_out = rows_of(root, tmp_path / "m.csv")
    clips = AudioVisualClips(rows, frames=8, fps=16, size=24, max_speed=2)
    reasons = {path.rsplit("/")[-1]: reason for path, reason in (left_out | clips.left_out).items()}
    assert len(clips) == 3 and reasons.keys() == {"short.mp4", "silent.mp4", "broken.mp4"}
    assert reasons["short.mp4"].startswith("shorter than one clip of 0.50 s")
    assert reasons["silent.mp4"] == "no audio stream"
    assert reasons["broken.mp4"].startswith("cannot be read: Invalid data")

    (root / "c" / "good1.mp4").write_bytes(b"overwritten")
    for index in range(3):
        video, _, (path, failures) = clips[0, index]
        assert len(failures) == (index == 1) or "good1.mp4: Invalid data" in failures[0]
        assert video.shape[0] == 2 and not path.endswith("good1.mp4")
    _, _, (_, failures) = clips[0, 1]
    assert failures[0].endswith("Invalid data found when processing input")
    for n in (0, 2):
        (root / "c" / f"good{n}.mp4").unlink()
    with pytest.raises(ValueError, match="10 files in a row failed, the last: .*good"):
        clips[0, 0]


def test_every_clip_is_dealt_to_one_process_once():
    for world_size in (1, 2, 3):
        N, dealt = 4 * world_size, []
        for rank in range(world_size):
            batches = TrainingBatches(50, 4, 3, 5, rank, world_size)
            batches.epoch = 2
            whole = list(batches)
            assert len(whole) == len(batches) == batches.steps_per_epoch == 50 // N
            dealt += [key for batch in whole for key in batch]
            batches.used = 2 * N
            assert list(batches) == whole[2:]
        assert len(set(dealt)) == len(dealt) == 50 // N * N
        assert {epoch for epoch, _ in dealt} == {2}
    first, second = ([index for _, index in batch] for batch in TrainingBatches(8, 8, 2))
    assert first != second and sorted(first) == sorted(second)


def test_what_is_left_of_all_epochs_follows():
    """From any place on, the batches are the rest of the uninterrupted ones."""
    whole = list(TrainingBatches(50, 4, 3, 5, 1, 2))
    assert len(whole) == 18 and [batch[0][0] for batch in whole] == [0] * 6 + [1] * 6 + [2] * 6
    for epoch in range(3):
        for steps in range(7):
            batches = TrainingBatches(50, 4, 3, 5, 1, 2)
            batches.epoch, batches.used = epoch, 8 * steps
            assert list(batches) == whole[6 * epoch + steps:]
            assert len(batches) == 18 - 6 * epoch - steps
    batches.epoch, batches.used = 3, 0
    assert list(batches) == [] and len(batches) == 0


def test_other_processes_are_dealt_the_rest():
    """3 processes use 24 of 50 clips in 2 steps. Another number of processes shares the rest."""
    before = [key for rank in range(3)
              for batch in list(TrainingBatches(50, 4, 1, 0, rank, 3))[:2] for key in batch]
    for world_size in (1, 2, 5):
        N, after = 4 * world_size, []
        for rank in range(world_size):
            batches = TrainingBatches(50, 4, 1, 0, rank, world_size)
            batches.used = len(before)
            after += [key for batch in batches for key in batch]
        assert len(after) == 26 // N * N
        assert len({*before, *after}) == len(before) + len(after)


def test_evaluation_clips_are_evenly_spaced(tmp_path):
    make_video(tmp_path / "c" / "a.mp4", 5, gray=lambda t: 20 + 40 * t)
    make_video(tmp_path / "c" / "b.mp4", 5)             # its left and right ends differ
    rows, _ = rows_of(tmp_path, tmp_path / "m.csv")
    clips = AudioVisualClips(rows, frames=4, fps=8, size=24, clips_per_file=4)
    video, audio, source = clips[0]
    assert video.shape == (4, 4, 24, 24, 3) and audio.shape == (4, 12000) and source == (0, None)
    levels = 20 + 40 * torch.tensor([0, 1.5, 3.0, 4.5])
    assert (video[:, 0].float().mean((1, 2, 3)) - levels).abs().max() < 4
    crops = ActionClips(rows, ["c"], frames=4, fps=8, size=24, views=(4, 3))
    three, label, source = crops[0]
    assert three.shape == (12, 4, 24, 24, 3) and label == 0 and source == (0, None)
    assert (three[1::3, 0].float().mean((1, 2, 3)) - levels).abs().max() < 4
    for n in (0, 1):
        three, sound = evenly_spaced(crops, rows[n].path, rows[n].duration, sound=False)
        assert sound.shape[0] == 0 and three.shape[0] == 12
    band, _ = read_clip(rows[1].path, 0, (1,), (), 4, 8, 24, centre_band)
    assert band.shape == (1, 4, 24, 37, 3)                          # 7/8 of 54 lines, 72 columns
    for crop, place in enumerate((0, 0.5, 1)):
        assert three[crop].equal(crop_at(band[0], 24, place))
    assert not three[0].equal(three[1]) and not three[1].equal(three[2])


@pytest.mark.parametrize("workers", (0, 2))
def test_files_that_fail_leave_an_evaluation(tmp_path, workers, capfd):
    """Of the batches of three, one fails as a whole and one in part: the rest comes as it is."""
    for n in range(8):
        make_video(tmp_path / "c" / f"{n}.mp4", 2, 10)
    rows, _ = rows_of(tmp_path, tmp_path / "m.csv")
    clips = AudioVisualClips(rows, frames=4, fps=8, size=24, clips_per_file=2)
    whole = [clips[n] for n in range(8)]
    bad = (0, 1, 2, 7)
    for n in bad:
        (tmp_path / "c" / f"{n}.mp4").write_bytes(b"damaged since the scan")
    path = tmp_path / "c" / "7.mp4"
    failure = (7, f"{path}: Invalid data found when processing input")
    assert clips[7] == (None, None, failure)
    assert ActionClips(rows, ["b", "c"], 4, 8, 24, views=(2, 3))[7] == (None, 1, failure)

    batches = list(evaluation_batches(make_loader(clips, 3, workers), 0.5))
    assert [index for *_, index in batches] == [[3, 4, 5], [6]]
    for video, audio, index in batches:
        assert video.equal(torch.stack([whole[n][0] for n in index]))
        assert audio.equal(torch.stack([whole[n][1] for n in index]))
    said = capfd.readouterr().err
    for n in bad:
        assert said.count(f"failed: {tmp_path / 'c' / f'{n}.mp4'}: Invalid data") == 1
    seen = []
    with pytest.raises(ValueError, match=f"4 of 8 videos failed, .* of 0.45, the last: {path}: "):
        for _, _, index in evaluation_batches(make_loader(clips, 3, workers), 0.45):
            seen += index
    assert seen == [3, 4, 5]
    with pytest.raises(ValueError, match="3 of 8 videos failed, .* of 0.25, the last: .*2.mp4: "):
        next(evaluation_batches(make_loader(clips, 3, workers), 0.25))


def test_a_silent_film_can_be_read_without_sound(tmp_path):
    path = make_video(tmp_path / "silent.mp4", 2, tone=None)
    video, audio = read_clip(path, 0.5, (1, 2), (), frames=10, fps=20, size=48)
    assert audio.shape == (0, 12000)
    expected = 0.5 + torch.tensor([[1], [2]]) * torch.arange(10) / 20       # s
    assert (read_barcode(video) / 30 - expected).abs().max() < 0.5 / 30 + 0.002


def test_manifest_of_a_folder(tree, tmp_path):
    rows = scan.scan(tree)
    assert len(rows) == 34 and [row["path"] for row in rows] == sorted(row["path"] for row in rows)
    assert {(row["split"], row["label"]) for row in rows} == {
        (split, label) for split in ("train", "test") for label in ("low", "high")}
    for row in rows:
        assert abs(row["duration"] - 3) < 0.05 and row["fps"] == 10 and row["has_audio"] == 1
    scan.write(rows, tmp_path / "m.csv")
    assert len(read_manifest(tmp_path / "m.csv", "train")[0]) == 10
    with pytest.raises(ValueError, match="no 'val' part, it has 'test', 'train'"):
        read_manifest(tmp_path / "m.csv", "val")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no video in .*empty"):
        scan.scan(tmp_path / "empty")
    with pytest.raises(ValueError, match="no folder .*gone"):
        scan.scan(tmp_path / "gone")


def test_rows_are_found_in_folders_and_manifests(tree, tmp_path):
    rows, left_out = find_rows(tree, "train", tmp_path / "out")
    assert len(rows) == 10 and left_out == {}
    assert {row.split for row in rows} == {"train"}
    assert find_rows(tmp_path / "out" / "manifest.csv", "train", tmp_path / "other") == (rows, {})
    assert not (tmp_path / "other").exists()
    for data, sentence in ((tmp_path / "gone", "no folder .*gone"),
                           (tmp_path / "gone.csv", "gone.csv: no such manifest")):
        with pytest.raises(ValueError, match=f"--data .*{sentence}"):
            find_rows(data, "train", tmp_path / "out")


def test_files_that_cannot_be_used_are_found_with_their_reasons(tmp_path):
    good = make_video(tmp_path / "films" / "train" / "c" / "good.mp4", 1, 10)
    for split in ("train", "test"):
        path = tmp_path / "films" / split / "c" / "broken.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no video at all" * 100)
    for data in (tmp_path / "films", tmp_path / "out" / "manifest.csv"):
        rows, left_out = find_rows(data, "train", tmp_path / "out")
        assert [row.path for row in rows] == [str(good)]
        assert list(left_out) == [str(good.with_name("broken.mp4"))]
        assert left_out[str(good.with_name("broken.mp4"))].startswith("cannot be read: Invalid")
