"""prepare/transcode.py: the copy shows and sounds the same at the same times as its source, is
small, and survives interruptions."""

import os
import shutil
import signal
from fractions import Fraction

import av
import numpy as np
import pytest

from conftest import Job, command, make_video
from data import read_clip, read_manifest
from frames import read_barcode, truth
from prepare import scan, transcode
from support.reading import begin, open_file, open_streams


def transcode_one(path, tmp_path, short_side=64, gop=15):
    """Transcode one file. Returns the path of its copy and the copy's row."""
    scan.write([scan.probe((path, "a", "train"))], tmp_path / "in.csv")
    line = transcode.run(tmp_path / "in.csv", tmp_path / "out", short_side, gop, 1)
    assert "1 done" in line, line
    row, = scan.read_table(tmp_path / "out" / "manifest.csv")
    assert row["path"] == str(tmp_path / "out" / "train" / "a" / f"{path.stem}.mp4")
    assert row["reason"] == ""
    return row["path"], row


# ---- pictures and sound

# 60 pictures after uneven times, in units of 1/90000 s.
UNEVEN = np.random.default_rng(0).integers(900, 18000, 60).cumsum() + 38889


@pytest.mark.parametrize("name, gop, film", [
    ("a.mp4", 8, {"fps": 24000 / 1001, "gop": 100}),
    ("a.mkv", 1, {"start": 1.5, "layout": "stereo"}), ("a.avi", 15, {"codec": "mpeg4", "gop": 100}),
    ("a.mp4", 15, {"ticks": UNEVEN.tolist(), "time_base": Fraction(1, 90000), "seconds": 5,
                   "muxer": {"movie_timescale": "90000"}})])
def test_all_frames_keep_their_times(tmp_path, name, gop, film):
    """The copy has keyframes of its own and mono sound. read_clip sees no difference."""
    film = {"seconds": 4, "size": (180, 136), "tone": 50} | film
    path = make_video(tmp_path / name, **film)
    copy, row = transcode_one(path, tmp_path, gop=gop)
    (times, numbers, _), (source_times, source_numbers, _) = truth(copy), truth(path)
    assert times == pytest.approx(source_times, abs=1e-6) and len(times) >= 60
    assert (numbers == source_numbers).all()
    with av.open(copy) as container:
        video, audio = container.streams
        assert (video.codec.name, audio.codec.name, audio.channels) == ("h264", "aac", 1)
        keys = [frame.key_frame for frame in container.decode(video)]
    assert np.diff(np.flatnonzero(keys + [True])).max() == gop and row["has_audio"] == "1"
    for t0 in (0, 0.77):
        (video, audio), (video_copy, audio_copy) = (
            read_clip(file, t0, (1, 3), (1, 3), 12, 12, 64) for file in (path, copy))
        assert (read_barcode(video) == read_barcode(video_copy)).all()
        assert np.corrcoef(audio.flatten(), audio_copy.flatten())[0, 1] > 0.98


@pytest.mark.parametrize("suffix, video_start, sound_start", [
    ("mkv", 1.5, 1.5), ("mkv", 0, 0.63), ("mkv", 0.85, 0), ("mov", 0, 0.01), ("mov", 0, 2.0)])
def test_sight_and_sound_stay_together(tmp_path, suffix, video_start, sound_start):
    """Time 0 of the copy is that of its source: what the encoder puts before the sound, 42.7 ms,
    does not count. A click at 2.5 s and, after 0.7 s without sound, one at 3.5 s keep their times.
    """
    t = np.arange(44100 * 4) / 44100 + sound_start
    wave = sum(0.9 * np.sin(2 * np.pi * 1500 * t) * ((t >= c) & (t < c + 0.02)) for c in (2.5, 3.5))
    pieces = [(sound_start, wave)]
    if suffix == "mkv":                                    # mov does not store a gap
        gap = [round((s - sound_start) * 44100) for s in (2.7, 3.4)]
        pieces = [(sound_start, wave[:gap[0]]), (sound_start + gap[1] / 44100, wave[gap[1]:])]
    path = make_video(tmp_path / f"a.{suffix}", 4, 30, (180, 136), start=video_start, gop=250,
                      time_base=Fraction(1, 1000), ticks=[round(n / 0.03) for n in range(120)],
                      audio_codec="pcm_s16le", pieces=pieces)
    copy, row = transcode_one(path, tmp_path)
    assert row["has_audio"] == "1"
    zero = max(video_start, sound_start)
    for file in (path, copy):
        with open_file(file) as container:
            video, audio = open_streams(container)
            late = begin(audio) - begin(video)
        assert late == pytest.approx(sound_start - video_start, abs=1e-3), file
        video, (wave,) = read_clip(file, 0, (1,), (1,), 120, 30, 64)
        clicks = np.flatnonzero(abs(wave.numpy()) > 0.3) / 24000 + zero
        assert clicks[0] == pytest.approx(2.5, abs=0.002), file
        assert clicks[clicks > 3][0] == pytest.approx(3.5, abs=0.002), file
        assert read_barcode(video)[0, 0] == pytest.approx(30 * (zero - video_start), abs=0.51)


def test_stamps_below_0(tmp_path):
    """FFmpeg gives such stamps to a transport stream that begins just before its clock wraps, after
    26.5 h. The copy has all pictures, and its sound stays beside them."""
    path = make_video(tmp_path / "a.ts", 6, 25, start=2 ** 33 / 90000 - 3 - 1.4,
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


@pytest.mark.parametrize("size, short_side, degrees, expected", [
    ((180, 136), 64, 0, (84, 64)), ((136, 180), 64, 0, (64, 84)), ((180, 136), 64, 90, (64, 84)),
    ((180, 136), 64, 180, (84, 64)), ((71, 53), 160, 0, (70, 52)), ((71, 53), 32, 0, (42, 32))])
def test_sizes(tmp_path, size, short_side, degrees, expected):
    """The pictures keep their size or become smaller, upright."""
    quarters = np.array([[40, 90], [140, 200]])
    lower, right = (np.arange(side) * 2 // side for side in size[::-1])
    image = av.VideoFrame.from_ndarray(np.uint8(quarters[lower[:, None], right]), "gray")
    # mpeg4 takes odd sizes.
    path = make_video(tmp_path / "a.mov", 1, 10, tone=None, codec="mpeg4",
                      image=image.reformat(format="yuv420p"), turned=(degrees, False, False))
    copy, row = transcode_one(path, tmp_path, short_side)
    with av.open(copy) as container:
        frames = list(container.decode(video=0))
    assert len(frames) == 10 and {(frame.rotation, frame.format.name) for frame in frames} == {
        (0, "yuv420p")}
    width, height = int(row["width"]), int(row["height"])
    assert (width, height) == expected == (frames[0].width, frames[0].height)
    shown = frames[0].to_ndarray(format="gray")[height // 4::height // 2, width // 4::width // 2]
    upright = np.rot90(quarters, degrees // 90)
    assert abs(shown.astype(int) - upright).max() < 8


# ---- many files

def test_a_second_run_makes_only_missing_and_old_copies(put, tmp_path):
    """Sources of one name get copies of their own, whose names do not depend on the order."""
    sources = [put(f"in/{n}/{name}.mp4") for n in (1, 2) for name in ("same", f"other{n}")]
    rows = [scan.probe((path, "x", "train")) for path in sources]
    listed, out = tmp_path / "in.csv", tmp_path / "out"

    def run(order=1):
        scan.write(rows[::order], listed)
        return transcode.run(listed, out, 32), read_manifest(out / "manifest.csv", "train")[0]

    line, copies = run()
    assert line == "4 done, 0 skipped (already there), 0 failed; 4 files, 4 usable"
    paths = [out / os.path.relpath(row.path, out) for row in copies]
    assert {path.parent for path in paths} == {out / "train" / "x"} and len(set(paths)) == 4
    assert [path.stem for path in paths[1::2]] == ["other1", "other2"]
    before = [path.stat().st_mtime_ns for path in paths]
    line, again = run(order=-1)
    assert "0 done, 4 skipped" in line and again == copies[::-1]
    paths[1].unlink()
    os.utime(paths[2], (1, 1))                             # now it is older than its source
    assert "2 done, 2 skipped" in run()[0]
    assert [path.stat().st_mtime_ns == old for path, old in zip(paths, before)] == [
        True, False, False, True]
    with pytest.raises(ValueError, match="was made with .*choose another folder"):
        transcode.run(listed, out, 64)


@pytest.mark.slow
def test_a_killed_run_leaves_no_broken_copy(tmp_path):
    film = make_video(tmp_path / "in" / "a" / "0.mp4", 12, 30, (320, 240),
                      gray=lambda t: int(40 * t) % 200)
    for n in (1, 2, 3):
        shutil.copy(film, film.with_name(f"{n}.mp4"))
    out, listed = tmp_path / "out", tmp_path / "in.csv"
    scan.write(scan.scan(tmp_path / "in"), listed)
    job = Job("prepare.transcode", listed, out, "--workers", 2)
    job.wait_for(lambda: any(path.stat().st_size > 0 for path in out.glob("a/*.part")
                             if path.exists()))
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    assert list(out.glob("a/*.part")) and not (out / "manifest.csv").exists()
    finished = list(out.glob("a/*.mp4"))
    for path in finished:
        assert len(truth(path)[0]) == 360
    assert len(finished) < 4
    again = command(transcode, listed, out)
    assert again[0] == 0 and f"{4 - len(finished)} done, {len(finished)} skipped" in again[1], again
    assert len(list(out.glob("a/*.mp4"))) == 4 and not list(tmp_path.rglob("*.part"))


def test_failures_are_named_and_left_out(put, tmp_path, capsys):
    folder, out = tmp_path / "in" / "x", tmp_path / "out"
    broken, cut = (make_video(folder / f"{name}.mp4", 4, 30, tone=None,
                              muxer={"movflags": "faststart"}) for name in ("broken", "cut"))
    put("in/x/fine.mp4")
    put("in/x/unlisted.mp4")
    rows = scan.scan(tmp_path / "in")
    rows[3] |= {"reason": "not in the list"}
    scan.write(rows, tmp_path / "in.csv")
    data = broken.read_bytes()
    middle = len(data) // 2
    broken.write_bytes(data[:middle] + bytes(1000) + data[middle + 1000:])
    with av.open(str(cut)) as container:                   # cut between packets: the rest decodes
        length = [packet.pos for packet in container.demux(video=0) if packet.size][60]
    cut.write_bytes(cut.read_bytes()[:length])
    for words in ("1 done, 0 skipped (already there), 2 failed; 4 files, 1 usable, 3 left out: 1 ",
                  "0 done, 1 skipped"):
        assert words in transcode.run(tmp_path / "in.csv", out, 32)
        assert [*out.rglob("*.mp4"), *out.rglob("*.part")] == [out / "x" / "fine.mp4"]
        usable, left_out = read_manifest(out / "manifest.csv")
        assert [row.path for row in usable] == [str(out / "x" / "fine.mp4")]
        assert left_out.keys() == {str(broken), str(cut), str(folder / "unlisted.mp4")}
        assert left_out[str(broken)].startswith("cannot be transcoded: damaged frames (first at ")
        assert "over 1 s before its header says" in left_out[str(cut)]
    assert f"{broken}: cannot be transcoded" in capsys.readouterr().err


@pytest.mark.parametrize("name, folder, words", [
    ("gone", "out", "No such file"), ("good", "in", "overwrite an original"),
    ("away", "out", "leads out of"), ("own/manifest", "own", "would overwrite"),
    ("none", "out", "none.csv has no usable row, each has a reason")])
def test_wrong_input_gives_one_sentence(put, tmp_path, name, folder, words):
    source = put("in/x/a.mp4")
    row, content = scan.probe((source, "x", "")), source.read_bytes()
    if name != "gone":
        row["label"] = "../../x" if name == "away" else "x"
        row["reason"] = "empty file" if name == "none" else ""
        scan.write([row], tmp_path / f"{name}.csv")
    status, stdout, stderr = command(transcode, tmp_path / f"{name}.csv", tmp_path / folder)
    assert (status, stdout) == (1, "") and stderr.count("\n") == 1
    assert stderr.startswith("error: ") and words in stderr
    assert not (tmp_path / "out").exists() and source.read_bytes() == content


def test_flags_out_of_bounds():
    status, _, stderr = command(transcode, "in.csv", "out", "--short-side=15")
    assert status == 2 and "'15' is not " in stderr
