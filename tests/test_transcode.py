"""prepare/transcode.py: the copy shows and sounds the same at the same times as its source, is
small, and survives interruptions."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from conftest import ROOT, barcode, command, make_video, read_barcode
from data import read_clip, read_manifest
from prepare import scan, transcode
from support.reading import begin, open_file, open_streams


def film(path, times, time_base=Fraction(1, 90000), sound=()):
    """Write a film with a barcode picture at each of the times (s).

    sound: pieces (time at which the piece begins in s, samples at 44.1 kHz).
    """
    muxer = {"movie_timescale": "90000"} if path.suffix in (".mp4", ".mov") else {}
    with av.open(str(path), "w", options=muxer) as out:
        video = out.add_stream("libx264", rate=30, width=180, height=136, pix_fmt="yuv420p",
                               time_base=time_base, options={"crf": "5", "g": "250"})
        audio = out.add_stream("pcm_s16le", rate=44100, layout="mono") if sound else None
        for start, wave in sound:
            samples = (wave[None] * 32767).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(samples, "s16", "mono")
            frame.sample_rate, frame.time_base = 44100, Fraction(1, 44100)
            frame.pts = round(start * 44100)
            out.mux(audio.encode(frame))
        for n, t in enumerate(times):
            frame = av.VideoFrame.from_ndarray(barcode(n, (180, 136)), "rgb24")
            frame.pts, frame.time_base = round(t / time_base), time_base
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        out.mux(audio.encode(None) if audio else [])
    return path


def read_frames(path):
    """All frames: [(time, number in the barcode)], [is a keyframe], and their (width, height)."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    images = [torch.from_numpy(np.rot90(frame.to_ndarray(format="rgb24"),
                                        frame.rotation // 90).copy()) for frame in frames]
    numbers = [(frame.pts * frame.time_base, int(read_barcode(image)))
               for frame, image in zip(frames, images)]
    return numbers, [frame.key_frame for frame in frames], images[0].shape[1::-1]


def read_sound(path):
    """The sound (480000,) at 24 kHz from time 0 on, mono."""
    resampler, wave = av.AudioResampler("fltp", "mono", 24000), np.zeros(24000 * 20, np.float32)
    with av.open(str(path)) as container:
        for frame in container.decode(audio=0):
            for piece in resampler.resample(frame):
                samples = piece.to_ndarray()[0][max(0, -piece.pts):]
                wave[max(0, piece.pts):max(0, piece.pts) + len(samples)] = samples
    return wave


def transcode_one(path, tmp_path, short_side=64, gop=15, crop=None):
    """Transcode one file. Returns the path of its copy and the copy's row."""
    scan.write([scan.probe((path, "a", "train"))], tmp_path / "in.csv")
    line = transcode.run(tmp_path / "in.csv", tmp_path / "out", short_side, gop, 1, crop)
    assert "1 done" in line, line
    with open(tmp_path / "out" / "manifest.csv") as file:
        [row] = csv.DictReader(file)
    assert row["path"] == str(tmp_path / "out" / "train" / "a" / f"{path.stem}.mp4")
    assert row["reason"] == ""
    return row["path"], row


# ---- pictures and sound

@pytest.mark.parametrize("fps, suffix, codec, start", [
    (30, "mp4", "libx264", 0), (24000 / 1001, "mp4", "libx264", 0), (30, "mkv", "libx264", 1.5),
    (25, "avi", "mpeg4", 0)])
def test_frames_keep_their_times(tmp_path, fps, suffix, codec, start):
    path = make_video(tmp_path / f"a.{suffix}", 5, fps, (180, 136), 50, codec=codec, start=start,
                      gop=100)
    copy, _ = transcode_one(path, tmp_path)
    frames = read_frames(copy)[0]
    assert frames == read_frames(path)[0] and len(frames) == round(5 * fps)
    assert float(frames[0][0]) == pytest.approx(start, abs=0.05)
    for t0 in (0, 0.77, 1.5):                              # read_clip sees no difference either
        video, audio = read_clip(path, t0, (1, 3), (1, 3), 12, 12, 64)
        video_copy, audio_copy = read_clip(copy, t0, (1, 3), (1, 3), 12, 12, 64)
        assert (read_barcode(video) == read_barcode(video_copy)).all()
        assert np.corrcoef(audio.flatten(), audio_copy.flatten())[0, 1] > 0.98


def test_variable_frame_rate(tmp_path):
    times = np.cumsum(np.random.default_rng(0).uniform(0.01, 0.2, 60)) + 0.4321
    path = film(tmp_path / "a.mp4", times)
    copy, _ = transcode_one(path, tmp_path)
    frames = read_frames(copy)[0]
    assert frames == read_frames(path)[0]
    assert np.ptp(np.diff([float(t) for t, _ in frames])) > 0.15
    assert float(frames[0][0]) == pytest.approx(times[0], abs=1e-4)


@pytest.mark.parametrize("video_start, sound_start", [(0, 0), (1.5, 1.5), (0, 0.63), (0.85, 0)])
def test_sight_and_sound_stay_together(tmp_path, video_start, sound_start):
    """There is a click when frame 45 appears and, after 0.7 s in which the file has no sound,
    another click 30 frames later. Both are at the same place in the copy."""
    t = np.arange(44100 * 4) / 44100 + sound_start
    clicks = [(t >= video_start + c) & (t < video_start + c + 0.02) for c in (1.5, 2.5)]
    wave = 0.9 * np.sin(2 * np.pi * 1500 * t) * sum(clicks)
    gap = [round((video_start + s - sound_start) * 44100) for s in (1.7, 2.4)]
    pieces = [(sound_start, wave[:gap[0]]), (sound_start + gap[1] / 44100, wave[gap[1]:])]
    path = film(tmp_path / "a.mkv", np.arange(120) / 30 + video_start, Fraction(1, 1000),
                sound=pieces)
    copy, row = transcode_one(path, tmp_path)
    times = {number: float(time) for time, number in read_frames(copy)[0]}
    loud, source = (np.flatnonzero(abs(read_sound(file)) > 0.3) / 24000 for file in (copy, path))
    for number, within in ((45, loud < video_start + 2), (75, loud > video_start + 2)):
        click = loud[within].min()
        assert abs(click - times[number]) < 0.01, (number, click)
    assert abs(loud.min() - source.min()) < 0.003 and abs(loud.max() - source.max()) < 0.003
    assert abs(times[0] - video_start) < 0.002 and row["has_audio"] == "1"


@pytest.mark.parametrize("before", [1, 3, 40])
def test_stamps_below_0(tmp_path, before):
    """FFmpeg gives such stamps to a transport stream that begins so many s before its clock wraps,
    after 26.5 h. The copy has all pictures, and its sound stays beside them."""
    path = make_video(tmp_path / "a.ts", 6, 25, (72, 54), start=2 ** 33 / 90000 - before - 1.4,
                      wave=lambda t: 0.5 * np.sin(2 * np.pi * 1000 * t) * (t >= 2))
    copy, row = transcode_one(path, tmp_path)
    assert float(row["video_duration"]) == pytest.approx(6, abs=0.05)
    for t0 in (0, 2.51, 4.51):
        (video, _), (video_copy, _) = (read_clip(file, t0, (1,), (1,), 12, 25, 54)
                                       for file in (path, copy))
        assert (read_barcode(video) == read_barcode(video_copy)).all()
    begins = [np.argmax(abs(read_clip(file, 0, (1,), (1,), 75, 25, 54)[1][0].numpy()) > 0.2)
              for file in (path, copy)]
    assert abs(begins[0] - begins[1]) < 24


@pytest.mark.parametrize("late", [0, 0.01, 0.04, 0.63, 2.0])
def test_time_0_of_the_copy_is_that_of_its_source(tmp_path, late):
    """The encoder puts 42.7 ms before the sound, which must not begin earlier by them."""
    t = np.arange(44100 * 3) / 44100 + late
    wave = 0.9 * np.sin(2 * np.pi * 1500 * t) * ((t >= 2.5) & (t < 2.52))
    path = film(tmp_path / "a.mov", np.arange(120) / 30, Fraction(1, 30), sound=[(late, wave)])
    copy, _ = transcode_one(path, tmp_path)
    begins = []
    for file in (path, copy):
        with open_file(file) as container:
            video, audio = open_streams(container)
            begins.append(begin(audio) - begin(video))
        _, (wave,) = read_clip(file, 0, (1,), (1,), 90, 30, 64)
        click = np.flatnonzero(abs(wave.numpy()) > 0.3)[0] / 24000
        assert click == pytest.approx(2.5 - late, abs=0.002), file
    assert begins == pytest.approx([late, late], abs=1e-3)


@pytest.mark.parametrize("size, short_side, turned, expected", [
    ((180, 136), 64, 0, (84, 64)), ((71, 53), 160, 0, (70, 52)), ((71, 53), 32, 0, (42, 32)),
    ((180, 136), 64, 90, (64, 84)), ((180, 136), 64, 180, (84, 64)), ((136, 180), 64, 0, (64, 84))])
def test_sizes(tmp_path, size, short_side, turned, expected):
    codec = "mpeg4" if size[0] % 2 else "libx264"          # mpeg4 takes odd sizes
    path = make_video(tmp_path / "a.mov", 0.3, 30, size, None, turned=turned, codec=codec)
    copy, row = transcode_one(path, tmp_path, short_side)
    assert read_frames(copy)[2] == expected == (int(row["width"]), int(row["height"]))
    with av.open(str(path)) as a, av.open(copy) as b:
        frame, image = next(a.decode(video=0)), next(b.decode(video=0))
        assert image.rotation == 0 and image.format.name == "yuv420p"
        assert abs(frame.rotation) == turned
        upright = np.rot90(frame.reformat(format="rgb24").to_ndarray(), frame.rotation // 90)
        small = image.to_ndarray(format="rgb24")
    # Each quarter of the copy is as bright as that of the upright source.
    assert np.abs(quarters(small) - quarters(upright)).max() < 8


def quarters(image):
    """The mean brightness of the four quarters of an image (H, W, 3)."""
    h, w = image.shape[0] // 2, image.shape[1] // 2
    return np.array([image[rows, columns].mean() for rows in (slice(h), slice(h, None))
                     for columns in (slice(w), slice(w, None))])


@pytest.mark.parametrize("turned, expected", [(0, 200), (180, 40)])
def test_a_part_of_the_pictures(tmp_path, turned, expected):
    """The lower right quarter of the upright picture is kept, and then made smaller."""
    path = tmp_path / "quarters.mp4"
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=10, width=128, height=96, pix_fmt="yuv420p")
        video.set_display_rotation(turned)
        image = np.kron([[40, 90], [140, 200]], np.ones((48, 64))).astype(np.uint8)
        for _ in range(10):
            out.mux(video.encode(av.VideoFrame.from_ndarray(image, "gray")))
        out.mux(video.encode(None))
    copy, _ = transcode_one(path, tmp_path, 16, crop=(40, 32, 80, 56))
    with av.open(copy) as container:
        images = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
    assert len(images) == 10 and images[0].shape == (16, 20)
    assert np.abs(np.stack(images).astype(float) - expected).max() < 8
    line = transcode.run(tmp_path / "in.csv", tmp_path / "other", 16, crop=(40, 32, 100, 56),
                         workers=1)
    assert "--crop 40:32:100:56 is not within its pictures of 128 x 96 pixels" in line
    with pytest.raises(ValueError, match="was made with .*choose another folder"):
        transcode.run(tmp_path / "in.csv", tmp_path / "out", 16, workers=1)


@pytest.mark.parametrize("gop, source_gop, size", [
    (1, 250, (180, 136)), (8, 250, (180, 136)), (15, 5, (72, 54))])
def test_keyframes_are_close_and_sound_is_mono(tmp_path, gop, source_gop, size):
    """Keyframes of the source are not kept, not even in small pictures, which keep their size."""
    path = make_video(tmp_path / "a.mp4", 3, 30, size, layout="stereo", gop=source_gop)
    copy, _ = transcode_one(path, tmp_path, gop=gop)
    distance, source_distance = (np.diff(np.flatnonzero(read_frames(file)[1] + [True])).max()
                                 for file in (copy, path))
    assert distance == gop and (source_distance < gop) == (source_gop < gop)
    with av.open(copy) as container:
        [audio] = container.streams.audio
        assert (audio.rate, audio.channels, audio.codec.name) == (24000, 1, "aac")
        assert container.streams.video[0].codec.name == "h264"


def test_silent_files_stay_silent(tmp_path):
    copy, row = transcode_one(make_video(tmp_path / "a.mp4", 2, tone=None), tmp_path)
    with av.open(copy) as container:
        assert not container.streams.audio and row["has_audio"] == "0"
    assert len(read_frames(copy)[0]) == 60


# ---- many files

def test_a_second_run_makes_only_missing_and_old_copies(tree, tmp_path):
    train = [row for row in scan.scan(tree) if row["split"] == "train"]
    scan.write(train, tmp_path / "in.csv")
    manifest = tmp_path / "out" / "manifest.csv"

    def run():
        return transcode.run(tmp_path / "in.csv", tmp_path / "out", 48, 15)

    assert "10 files: 10 done, 0 skipped (already there), 0 failed" in run()
    files = sorted((tmp_path / "out").rglob("*.mp4"))
    first, before = manifest.read_text(), [file.stat().st_mtime_ns for file in files]
    assert "10 files: 0 done, 10 skipped" in run()
    assert [file.stat().st_mtime_ns for file in files] == before
    assert manifest.read_text() == first
    files[3].unlink()
    assert "1 done, 9 skipped" in run()
    assert [n for n, file in enumerate(files) if file.stat().st_mtime_ns != before[n]] == [3]
    os.utime(files[5], (1, 1))                             # now it is older than its source
    assert "1 done, 9 skipped" in run()
    rows, _ = read_manifest(manifest, "train")
    sources, _ = read_manifest(tmp_path / "in.csv", "train")
    assert [(row.label, row.split) for row in rows] == [(row.label, row.split) for row in sources]
    expected = [str(tmp_path / "out" / os.path.relpath(row.path, tree)) for row in sources]
    assert expected == [row.path for row in rows]
    with pytest.raises(ValueError, match="was made with"):
        transcode.run(tmp_path / "in.csv", tmp_path / "out", 32, 15)


@pytest.mark.slow
def test_a_killed_run_leaves_no_broken_copy(tmp_path):
    film = make_video(tmp_path / "in" / "a" / "0.mp4", 12, 30, (320, 240),
                      gray=lambda t: int(40 * t) % 200)
    for n in (1, 2, 3):
        shutil.copy(film, film.with_name(f"{n}.mp4"))
    out, listed = tmp_path / "out", tmp_path / "in.csv"
    scan.write(scan.scan(tmp_path / "in"), listed)
    words = [sys.executable, "-m", "prepare.transcode", str(listed), str(out), "--workers", "2"]
    process = subprocess.Popen(words, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    while not any(path.stat().st_size > 0 for path in out.glob("a/*.part") if path.exists()):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert list(out.glob("a/*.part")) and not (out / "manifest.csv").exists()
    finished = list(out.glob("a/*.mp4"))
    for path in finished:
        assert len(read_frames(path)[0]) == 360
    assert len(finished) < 4
    again = command(transcode, listed, out)
    assert again[0] == 0 and f"{4 - len(finished)} done, {len(finished)} skipped" in again[1], again
    assert len(list(out.glob("a/*.mp4"))) == 4 and not list(tmp_path.rglob("*.part"))


def test_failures_are_named_and_left_out(tmp_path, capsys):
    folder, out = tmp_path / "in" / "x", tmp_path / "out"
    film = make_video(folder / "a.mp4", 4, 30, (180, 136))
    for name in "bcd":
        shutil.copy(film, folder / f"{name}.mp4")
    rows = scan.scan(tmp_path / "in")
    rows[3] |= {"reason": "not in the list"}
    scan.write(rows, tmp_path / "in.csv")
    broken = folder / "b.mp4"
    data = bytearray(broken.read_bytes())
    data[len(data) // 2:len(data) // 2 + 4000] = b"\0" * 4000
    broken.write_bytes(data)
    cut = make_video(folder / "c.mp4", 4, 30, (180, 136), None, muxer={"movflags": "faststart"})
    with av.open(str(cut)) as container:                   # cut between packets: the rest decodes
        length = [packet.pos for packet in container.demux(video=0) if packet.size][60]
    cut.write_bytes(cut.read_bytes()[:length])
    line = transcode.run(tmp_path / "in.csv", out, 64, 15)
    assert "3 files: 1 done, 0 skipped (already there), 2 failed: " in line
    assert [path.name for path in out.rglob("*.mp4")] == ["a.mp4"]
    assert not list(tmp_path.rglob("*.part"))
    usable, left_out = read_manifest(out / "manifest.csv")
    assert [row.path for row in usable] == [str(out / "x" / "a.mp4")]
    assert left_out[str(broken)].startswith("cannot be transcoded: ")
    assert "over 1 s before its header says" in left_out[str(cut)]
    assert left_out[str(folder / "d.mp4")] == "not in the list"
    assert f"{broken}: cannot be transcoded" in capsys.readouterr().err


def test_long_names(tmp_path):
    """A name may have 255 bytes. A copy whose name would be longer is left out with this reason."""
    folder, out = tmp_path / "in" / "x", tmp_path / "out"
    data = make_video(tmp_path / "a.ts", 1, 25).read_bytes()
    folder.mkdir(parents=True)
    for name in ("x" * 252 + ".ts", "y" * 251 + ".ts", "z.ts"):
        (folder / name).write_bytes(data)
    scan.scan(tmp_path / "in", out=tmp_path / "in.csv")
    for words in ("2 done, 0 skipped (already there), 1 failed", "0 done, 2 skipped"):
        assert words in transcode.run(tmp_path / "in.csv", out, 32, workers=1)
        usable, left_out = read_manifest(out / "manifest.csv")
        assert [row.path for row in usable] == [f"{out}/x/{stem}.mp4" for stem in ("y" * 251, "z")]
        assert list(left_out.values()) == ["cannot be transcoded: File name too long"]


def test_sources_of_one_name_get_their_own_copies(tmp_path):
    names, manifest = ("1/same.mp4", "2/same.mp4", "1/other.mp4"), tmp_path / "in.csv"
    for n, name in enumerate(names):
        make_video(tmp_path / name, 1 + n)
    rows = [scan.probe((tmp_path / name, "x", "")) for name in names]
    scan.write(rows, manifest)
    transcode.run(manifest, tmp_path / "out", 32)
    copies, _ = read_manifest(tmp_path / "out" / "manifest.csv")
    assert [round(copy.duration) for copy in copies] == [1, 2, 3]
    assert len({copy.path for copy in copies}) == 3
    scan.write(rows[::-1], manifest)                       # the names do not depend on the order
    assert "3 skipped" in transcode.run(manifest, tmp_path / "out", 32)
    assert read_manifest(tmp_path / "out" / "manifest.csv")[0] == copies[::-1]


@pytest.mark.parametrize("name, folder, words", [
    ("no", "out", "no manifest"), ("none", "out", "has no usable row"),
    ("good", "in", "overwrite an original"), ("twice", "out", "listed twice"),
    ("away", "out", "leads out of"), ("own/manifest", "own", "would overwrite")])
def test_wrong_input_gives_one_sentence(put, tmp_path, name, folder, words):
    source = put("in/x/a.mp4")
    row, content = scan.probe((source, "x", "")), source.read_bytes()
    manifests = {"good": [row], "none": [row | {"reason": "no"}], "twice": [row, row],
                 "away": [row | {"label": "../../x"}], "own/manifest": [row], "no": []}
    if manifests[name]:
        scan.write(manifests[name], tmp_path / f"{name}.csv")
    status, stdout, stderr = command(transcode, tmp_path / f"{name}.csv", tmp_path / folder)
    assert (status, stdout) == (1, "") and stderr.count("\n") == 1
    assert stderr.startswith("error: ") and words in stderr
    assert not (tmp_path / "out").exists() and source.read_bytes() == content


@pytest.mark.parametrize("flag, value, words", [
    ("--short-side", "15", "whole number of "), ("--gop", "0", "whole number of "),
    ("--workers", "0", "whole number of "),
    *[("--crop", value, "width:height:x:y in pixels")
      for value in ("1:2:3", "1:2:3:x", "0:2:3:4", "-1:2:3:4")]])
def test_flags_out_of_bounds(flag, value, words):
    status, _, stderr = command(transcode, "in.csv", "out", f"{flag}={value}")
    assert status == 2 and f"argument {flag}: '{value}' is not " in stderr and words in stderr
