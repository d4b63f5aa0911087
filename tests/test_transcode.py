"""The copy shows and sounds the same at the same times as its source, is small, and survives interruptions."""

import csv
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from conftest import ROOT, barcode, make_video, read_barcode

from data import read_clip, read_manifest
from prepare import scan, transcode


def film(path, times, time_base=Fraction(1, 90000), size=(180, 136), sound=(), turned=0, codec="libx264"):
    """A barcode picture at each of times (s), and pieces of sound as (s at which it begins, samples at 44.1 kHz)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"movie_timescale": "90000", "movflags": "faststart"} if path.suffix in (".mp4", ".mov") else {}
    with av.open(str(path), "w", options=options) as out:
        video = out.add_stream(codec, rate=30, width=size[0], height=size[1], pix_fmt="yuv420p", time_base=time_base,
                               options={"crf": "5", "g": "250"} if codec == "libx264" else {})
        video.bit_rate = 2_000_000
        if turned:
            video.set_display_rotation(turned)
        audio = out.add_stream("pcm_s16le", rate=44100, layout="mono") if sound else None
        for start, wave in sound:
            frame = av.AudioFrame.from_ndarray((wave[None] * 32767).astype(np.int16), "s16", "mono")
            frame.sample_rate, frame.time_base, frame.pts = 44100, Fraction(1, 44100), round(start * 44100)
            out.mux(audio.encode(frame))
        for n, t in enumerate(times):
            frame = av.VideoFrame.from_ndarray(barcode(n, size), "rgb24")
            frame.pts, frame.time_base = round(t / time_base), time_base
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        out.mux(audio.encode(None) if audio else [])
    return path


def seen(path):
    """[(time, number in the barcode)] of all frames, which of them are keyframes, and their (width, height)."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    images = [torch.from_numpy(np.rot90(f.to_ndarray(format="rgb24"), f.rotation // 90).copy()) for f in frames]
    return [(f.pts * f.time_base, int(read_barcode(image))) for f, image in zip(frames, images)], \
        [f.key_frame for f in frames], images[0].shape[1::-1]


def heard(path):
    """The sound at 24 kHz from time 0 on, mono."""
    resampler, wave = av.AudioResampler("fltp", "mono", 24000), np.zeros(24000 * 20, np.float32)
    with av.open(str(path)) as container:
        for frame in container.decode(audio=0):
            for part in resampler.resample(frame):
                samples = part.to_ndarray()[0][max(0, -part.pts):]
                wave[max(0, part.pts):max(0, part.pts) + len(samples)] = samples
    return wave


def copy_of(path, tmp_path, short_side=64, gop=15):
    """The one file that the manifest of path's folder leads to, and its row."""
    scan.write([scan.probe((path, "a", "train"))], tmp_path / "in.csv")
    line = transcode.run(tmp_path / "in.csv", tmp_path / "out", short_side, gop, 1)
    assert "1 done" in line, line
    row, = csv.DictReader(open(tmp_path / "out" / "manifest.csv"))
    assert row["path"] == str(tmp_path / "out" / "train" / "a" / f"{path.stem}.mp4") and row["reason"] == ""
    return row["path"], row


@pytest.mark.parametrize("fps,suffix,codec,start", [(30, "mp4", "libx264", 0), (24000 / 1001, "mp4", "libx264", 0),
                                                    (30, "mkv", "libx264", 1.5), (25, "avi", "mpeg4", 0)])
def test_frames_keep_their_times(tmp_path, fps, suffix, codec, start):
    path = make_video(tmp_path / f"a.{suffix}", 5, fps, (180, 136), 50, codec=codec, start=start, gop=100)
    copy, _ = copy_of(path, tmp_path)
    assert seen(copy)[0] == seen(path)[0] and len(seen(copy)[0]) == round(5 * fps)
    assert float(seen(copy)[0][0][0]) == pytest.approx(start, abs=0.05)
    for t0 in (0, 0.77, 1.5):                             # and the loader sees no difference
        (video, audio), (video_copy, audio_copy) = (read_clip(p, t0, (1, 3), (1, 3), 12, 12, 64) for p in (path, copy))
        assert (read_barcode(video) == read_barcode(video_copy)).all()
        assert np.corrcoef(audio.flatten(), audio_copy.flatten())[0, 1] > 0.98


def test_variable_frame_rate(tmp_path):
    times = np.cumsum(np.random.default_rng(0).uniform(0.01, 0.2, 60)) + 0.4321
    path = film(tmp_path / "a.mp4", times)
    copy, _ = copy_of(path, tmp_path)
    assert seen(copy)[0] == seen(path)[0] and np.ptp(np.diff([float(t) for t, _ in seen(copy)[0]])) > 0.15
    assert float(seen(copy)[0][0][0]) == pytest.approx(times[0], abs=1e-4)


@pytest.mark.parametrize("video_at,sound_at", [(0, 0), (1.5, 1.5), (0, 0.63), (0.85, 0)])
def test_sight_and_sound_stay_together(tmp_path, video_at, sound_at):
    """A click where frame 45 appears, and 30 frames later another after 0.7 s without sound: same place in the copy."""
    t = np.arange(44100 * 4) / 44100 + sound_at
    on = sum((t >= video_at + c) & (t < video_at + c + 0.02) for c in (1.5, 2.5))
    click = 0.9 * np.sin(2 * np.pi * 1500 * t) * on
    cut = [round((video_at + s - sound_at) * 44100) for s in (1.7, 2.4)]
    pieces = [(sound_at, click[:cut[0]]), (sound_at + cut[1] / 44100, click[cut[1]:])]
    path = film(tmp_path / "a.mkv", np.arange(120) / 30 + video_at, Fraction(1, 1000), sound=pieces)
    copy, row = copy_of(path, tmp_path)
    shown = {n: float(at) for at, n in seen(copy)[0]}
    loud, source = (np.flatnonzero(abs(heard(p)) > 0.3) / 24000 for p in (copy, path))
    for n, within in ((45, loud < video_at + 2), (75, loud > video_at + 2)):
        assert abs(loud[within].min() - shown[n]) < 0.01, (n, loud[within].min())
    assert abs(loud.min() - source.min()) < 0.003 and abs(loud.max() - source.max()) < 0.003
    assert abs(shown[0] - video_at) < 0.002 and row["has_audio"] == "1"


@pytest.mark.parametrize("size,short_side,turned,expected", [
    ((180, 136), 64, 0, (84, 64)), ((71, 53), 160, 0, (70, 52)), ((71, 53), 32, 0, (42, 32)),
    ((180, 136), 64, 90, (64, 84)), ((180, 136), 64, 180, (84, 64)), ((136, 180), 64, 0, (64, 84))])
def test_sizes(tmp_path, size, short_side, turned, expected):
    codec = "mpeg4" if size[0] % 2 else "libx264"         # which takes odd sizes
    path = film(tmp_path / "a.mov", np.arange(9) / 30, Fraction(1, 30), size, turned=turned, codec=codec)
    copy, row = copy_of(path, tmp_path, short_side)
    assert seen(copy)[2] == expected == (int(row["width"]), int(row["height"]))
    with av.open(str(path)) as a, av.open(copy) as b:
        frame, image = next(a.decode(video=0)), next(b.decode(video=0))
        assert image.rotation == 0 and image.format.name == "yuv420p" and abs(frame.rotation) == turned
        upright = np.rot90(frame.reformat(format="rgb24").to_ndarray(), frame.rotation // 90).astype(float)
        small = image.to_ndarray(format="rgb24").astype(float)
    h, w = small.shape[0] // 2, small.shape[1] // 2       # quarters are as bright as in the upright source
    H, W = upright.shape[0] // 2, upright.shape[1] // 2
    for rows, rows_ in ((slice(h), slice(H)), (slice(h, None), slice(H, None))):
        for columns, columns_ in ((slice(w), slice(W)), (slice(w, None), slice(W, None))):
            assert abs(small[rows, columns].mean() - upright[rows_, columns_].mean()) < 8


@pytest.mark.parametrize("gop", [1, 8, 15])
def test_keyframes_are_close_and_sound_is_mono(tmp_path, gop):
    path = make_video(tmp_path / "a.mp4", 3, 30, (180, 136), layout="stereo", gop=250)
    copy, _ = copy_of(path, tmp_path, gop=gop)
    keys = np.flatnonzero(seen(copy)[1] + [True])
    assert sum(seen(path)[1]) <= 2 and np.diff(keys).max() == gop
    with av.open(copy) as container:
        audio, = container.streams.audio
        assert (audio.rate, audio.channels, audio.codec.name) == (24000, 1, "aac")
        assert container.streams.video[0].codec.name == "h264"


def test_keyframes_of_the_source_are_not_kept(tmp_path):
    path = make_video(tmp_path / "a.mp4", 3, 30, (72, 54), gray=lambda t: 100, gop=5)     # already small: not rescaled
    copy, _ = copy_of(path, tmp_path)
    assert sum(seen(path)[1]) == 18 and sum(seen(copy)[1]) == 6


def test_silent_files_stay_silent(tmp_path):
    copy, row = copy_of(make_video(tmp_path / "a.mp4", 2, tone=None), tmp_path)
    with av.open(copy) as container:
        assert not container.streams.audio and row["has_audio"] == "0"
    assert len(seen(copy)[0]) == 60


def test_second_run_redoes_only_what_is_missing_or_old(tree, tmp_path, capsys):
    scan.write([r for r in scan.scan(tree) if r["split"] == "train"], tmp_path / "in.csv")
    run = lambda **more: transcode.run(tmp_path / "in.csv", tmp_path / "out", 48, 15, **more)
    assert "10 files: 10 done, 0 skipped (already there), 0 failed" in run()
    files = sorted((tmp_path / "out").rglob("*.mp4"))
    first = (tmp_path / "out" / "manifest.csv").read_text()
    before = [f.stat().st_mtime_ns for f in files]
    assert "10 files: 0 done, 10 skipped" in run() and [f.stat().st_mtime_ns for f in files] == before
    assert (tmp_path / "out" / "manifest.csv").read_text() == first
    files[3].unlink()
    assert "1 done, 9 skipped" in run()
    assert [n for n, f in enumerate(files) if f.stat().st_mtime_ns != before[n]] == [3]
    os.utime(files[5], (1, 1))                            # older than its source
    assert "1 done, 9 skipped" in run()
    rows, _ = read_manifest(tmp_path / "out" / "manifest.csv", "train")
    sources, _ = read_manifest(tmp_path / "in.csv", "train")
    assert [(r.label, r.split) for r in rows] == [(r.label, r.split) for r in sources]
    assert [str(tmp_path / "out" / os.path.relpath(s.path, tree)) for s in sources] == [r.path for r in rows]
    with pytest.raises(ValueError, match="was made with"):
        transcode.run(tmp_path / "in.csv", tmp_path / "out", 32, 15)


def test_a_killed_run_leaves_nothing_broken(tmp_path):
    for n in range(6):
        make_video(tmp_path / "in" / "a" / f"{n}.mp4", 12, 30, (320, 240), gray=lambda t: int(40 * t) % 200)
    scan.write(scan.scan(tmp_path / "in"), tmp_path / "in.csv")
    command = [sys.executable, "-m", "prepare.transcode", "in.csv", "out", "--workers", "2"]
    command[3:5] = str(tmp_path / "in.csv"), str(tmp_path / "out")
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    while not any(p.stat().st_size > 0 for p in tmp_path.glob("out/a/*.part") if p.exists()):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert list(tmp_path.glob("out/a/*.part")) and not (tmp_path / "out" / "manifest.csv").exists()
    finished = list(tmp_path.glob("out/a/*.mp4"))
    for path in finished:
        assert len(seen(path)[0]) == 360
    assert len(finished) < 6
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and f"{6 - len(finished)} done, {len(finished)} skipped" in again.stdout, again.stderr
    assert len(list(tmp_path.glob("out/a/*.mp4"))) == 6 and not list(tmp_path.rglob("*.part"))


def test_what_fails_is_named_and_left_out(tmp_path, capsys):
    for name in "abcd":
        make_video(tmp_path / "in" / "x" / f"{name}.mp4", 4, 30, (180, 136))
    rows = scan.scan(tmp_path / "in")
    rows[3] |= {"reason": "not in the list"}
    scan.write(rows, tmp_path / "in.csv")
    broken = tmp_path / "in" / "x" / "b.mp4"
    data = bytearray(broken.read_bytes())
    data[len(data) // 2:len(data) // 2 + 4000] = b"\0" * 4000
    broken.write_bytes(data)
    cut = film(tmp_path / "in" / "x" / "c.mp4", np.arange(120) / 30)
    with av.open(str(cut)) as container:                  # between two packets, so that what is left decodes
        cut_at = [packet.pos for packet in container.demux(video=0) if packet.size][60]
    cut.write_bytes(cut.read_bytes()[:cut_at])
    line = transcode.run(tmp_path / "in.csv", tmp_path / "out", 64, 15)
    assert "3 files: 1 done, 0 skipped (already there), 2 failed: " in line
    assert [p.name for p in (tmp_path / "out").rglob("*.mp4")] == ["a.mp4"] and not list(tmp_path.rglob("*.part"))
    usable, left_out = read_manifest(tmp_path / "out" / "manifest.csv")
    assert [r.path for r in usable] == [str(tmp_path / "out" / "x" / "a.mp4")]
    assert left_out[str(broken)].startswith("cannot be transcoded: ")
    assert "over 1 s before its header says" in left_out[str(tmp_path / "in" / "x" / "c.mp4")]
    assert left_out[str(tmp_path / "in" / "x" / "d.mp4")] == "not in the list"
    assert f"{broken}: cannot be transcoded" in capsys.readouterr().err


def test_sources_of_one_name_get_their_own_copies(tmp_path):
    for n, name in enumerate(("1/same.mp4", "2/same.mp4", "1/other.mp4")):
        make_video(tmp_path / name, 1 + n)
    rows = [scan.probe((tmp_path / name, "x", "")) for name in ("1/same.mp4", "2/same.mp4", "1/other.mp4")]
    scan.write(rows, tmp_path / "in.csv")
    transcode.run(tmp_path / "in.csv", tmp_path / "out", 32)
    copies, _ = read_manifest(tmp_path / "out" / "manifest.csv")
    assert [round(c.duration) for c in copies] == [1, 2, 3] and len({c.path for c in copies}) == 3
    scan.write(rows[::-1], tmp_path / "in.csv")           # the names hang on the paths alone, not on their order
    assert "3 skipped" in transcode.run(tmp_path / "in.csv", tmp_path / "out", 32)
    assert read_manifest(tmp_path / "out" / "manifest.csv")[0] == copies[::-1]


def test_bad_input_is_told_in_a_sentence(tmp_path):
    row = scan.probe((make_video(tmp_path / "in" / "x" / "a.mp4", 1), "x", ""))
    original = (tmp_path / "in" / "x" / "a.mp4").read_bytes()
    good, none, twice, out = (tmp_path / name for name in ("good.csv", "none.csv", "twice.csv", "out"))
    scan.write([row], good)
    scan.write([row | {"reason": "no"}], none)
    scan.write([row, row], twice)
    away = tmp_path / "away.csv"
    scan.write([row | {"label": "../../x"}], away)
    scan.write([row], tmp_path / "own" / "manifest.csv")
    for args, words in (((tmp_path / "no.csv", out), "no manifest"), ((none, out), "no usable row"),
                        ((good, out, 15), "short side of 15"), ((good, out, 64, 0), "gop of 0"),
                        ((good, tmp_path / "in"), "overwrite an original"), ((twice, out), "listed twice"),
                        ((away, out), "leads out of"), ((good, out, 64, 15, 0), "workers of 0"),
                        ((tmp_path / "own" / "manifest.csv", tmp_path / "own"), "would overwrite")):
        with pytest.raises(ValueError, match=words):
            transcode.run(*args)
    assert not out.exists() and (tmp_path / "in" / "x" / "a.mp4").read_bytes() == original
    command = [sys.executable, "-m", "prepare.transcode", str(good), str(out), "--gop", "0"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 1 and told.stderr == "error: a gop of 0: give at least 1\n"
