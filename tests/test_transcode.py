"""prepare/transcode.py: a copy shows and sounds the same as its source at the same times."""

import os
import signal
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from conftest import Job, command, make_video
from data import read_manifest
from frames import UNEVEN, beep, beeps_of, shown, truth
from prepare import scan, transcode
from support.rows import read_rows, write_rows


def transcode_one(path, tmp_path, short_side=64, gop=15):
    """Transcode one file. Returns the path of its copy and the copy's row."""
    write_rows([scan.probe((path, "a", "train"))], tmp_path / "in.csv")
    assert "1 done" in transcode.run(tmp_path / "in.csv", tmp_path / "out", short_side, gop, 1)
    row, = read_rows(tmp_path / "out/manifest.csv")
    assert row["path"] == str(tmp_path / f"out/train/a/{path.stem}.mp4") and row["reason"] == ""
    return row["path"], row


# ---- pictures and sound

@pytest.mark.parametrize("name, gop, film", [
    ("a.mp4", 8, {"fps": 24000 / 1001}), ("a.mkv", 1, {"start": 1.5, "layout": "stereo"}),
    ("a.avi", 15, {"codec": "mpeg4"}),
    ("a.mp4", 15, {"ticks": [38889 + 3001 * n for n in UNEVEN],
                   "time_base": Fraction(1, 90000), "muxer": {"movie_timescale": "90000"}}),
    # A transport stream whose clock wraps, after 26.5 h: FFmpeg gives it stamps below 0.
    ("a.ts", 15, {"start": 2 ** 33 / 90000 - 2.4, "fps": 24})])
def test_all_frames_keep_their_times(tmp_path, name, gop, film):
    """The copy has keyframes of its own and mono sound. The reader finds no difference."""
    path = make_video(tmp_path / name, 4, **{"size": (180, 136), "gop": 100, "wave": beep} | film)
    copy, row = transcode_one(path, tmp_path, gop=gop)
    (times, numbers, _), (source_times, source_numbers, begins) = truth(copy), truth(path)
    shift = times[0] - source_times[0] if min(begins) < 0 else 0    # no mp4 begins below 0
    assert times == pytest.approx(source_times + shift, abs=1e-6) and len(times) >= 52
    assert (numbers == source_numbers).all()
    with av.open(copy) as container:
        video, audio = container.streams
        assert (video.codec.name, audio.codec.name, audio.channels) == ("h264", "aac", 1)
        keys = [frame.key_frame for frame in container.decode(video)]
    assert np.diff(np.flatnonzero(keys + [True])).max() == gop and row["has_audio"] == "1"
    for t0 in (0, 2.575):
        asked = t0 + np.arange(36) / 12
        assert (shown(copy, asked, sound=True) == shown(path, asked, sound=True)).all()
        assert beeps_of(copy, t0, 3) == pytest.approx(beeps_of(path, t0, 3), abs=1e-3)


@pytest.mark.parametrize("suffix, video_start, sound_start", [
    ("mkv", 1.5, 1.5), ("mkv", 0, 0.63), ("mkv", 0.9, 0), ("mov", 0, 0.01), ("mov", 0, 2.0)])
def test_sight_and_sound_stay_together(tmp_path, suffix, video_start, sound_start):
    """The 42.7 ms that the encoder puts before the sound do not count. The beeps keep their times,
    also after 0.7 s without sound."""
    t = np.arange(44100 * 4) / 44100 + sound_start
    parts = [t[t < 2.7], t[t >= 3.4]] if suffix == "mkv" else [t]   # mov does not store a gap
    path = make_video(tmp_path / f"a.{suffix}", 4, 30, (180, 136), start=video_start, gop=250,
                      audio_codec="pcm_s16le", pieces=[(part[0], beep(part)) for part in parts])
    copy, row = transcode_one(path, tmp_path)
    assert row["has_audio"] == "1"
    zero = max(video_start, sound_start)
    beeps = [time for time in np.arange(0.5, sound_start + 4) if time > zero + 0.025]
    for file in (path, copy):
        _, _, (video, audio) = truth(file)      # when they begin
        assert audio - video == pytest.approx(sound_start - video_start, abs=1e-3), file
        assert zero + beeps_of(file, 0, 4) == pytest.approx(beeps, abs=0.002), file
        number, = shown(file, [0], sound=True)
        assert number == pytest.approx(30 * (zero - video_start), abs=0.51)


@pytest.mark.parametrize("size, short_side, degrees, expected", [
    ((180, 136), 64, 0, (84, 64)), ((136, 180), 64, 0, (64, 84)), ((180, 136), 64, 90, (64, 84)),
    ((71, 53), 160, 0, (70, 52)), ((71, 53), 32, 0, (42, 32))])
def test_sizes(tmp_path, size, short_side, degrees, expected):
    """They stay or become smaller. (test_turned_pictures looks at the pictures.)"""
    path = make_video(tmp_path / "a.mov", 1, 10, size, tone=None, turned=(degrees, False, False),
                      codec="mpeg4")    # which takes odd sizes
    copy, row = transcode_one(path, tmp_path, short_side)
    with av.open(copy) as container:
        frame = next(container.decode(video=0))
    assert (frame.rotation, frame.format.name) == (0, "yuv420p")
    assert (int(row["width"]), int(row["height"])) == expected == (frame.width, frame.height)


# ---- many files

def test_a_second_run_makes_only_missing_and_old_copies(put, tmp_path):
    """Sources of one name get copies of their own, whose names do not depend on the order."""
    listed, out = tmp_path / "in.csv", tmp_path / "out"
    rows = [scan.probe((put(f"in/{name}.mp4"), "x", "train"))
            for name in ("1/same", "1/one", "2/same", "2/two")]

    def run(rows):
        write_rows(rows, listed)
        return transcode.run(listed, out, 32), read_manifest(out / "manifest.csv", "train")[0]

    line, copies = run(rows)
    assert line == "4 done, 0 skipped (already there), 0 failed; 4 files, 4 usable"
    paths = [Path(row.path) for row in copies]
    assert {path.parent for path in paths} == {out / "train/x"} and len(set(paths)) == 4
    assert [path.stem for path in paths[1::2]] == ["one", "two"]
    line, again = run(rows[::-1])
    assert "0 done, 4 skipped" in line and again == copies[::-1]
    before = [path.stat().st_mtime_ns for path in paths]
    paths[1].unlink()
    os.utime(paths[2], (1, 1))      # now it is older than its source
    assert "2 done, 2 skipped" in run(rows)[0]
    assert [path.stat().st_mtime_ns == old for path, old in zip(paths, before)] == [
        True, False, False, True]
    with pytest.raises(ValueError, match="was made with .*choose another folder"):
        transcode.run(listed, out, 64)


@pytest.mark.slow
def test_a_killed_run_leaves_no_broken_copy(tmp_path):
    out, listed = tmp_path / "out", tmp_path / "in.csv"
    film = make_video(tmp_path / "in/a/0.mp4", 12, 30, (320, 240))
    for n in (1, 2, 3):
        os.link(film, film.with_name(f"{n}.mp4"))
    scan.survey("folder", tmp_path / "in", out=listed)
    job = Job("prepare.transcode", listed, out, "--workers", 2)
    job.wait_for(lambda: any(path.stat().st_size > 0 for path in out.glob("a/*.part")
                             if path.exists()))
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    assert list(out.glob("a/*.part")) and not (out / "manifest.csv").exists()
    many = len(list(out.glob("a/*.mp4")))
    status, stdout, _ = command(transcode, listed, out)
    assert status == 0 and f"{4 - many} done, {many} skipped" in stdout and many < 4
    copies = list(out.glob("a/*.mp4"))
    assert [len(truth(path)[0]) for path in copies] == [360] * 4 and not list(out.rglob("*.part"))


def test_failures_are_named_and_left_out(put, tmp_path, capsys):
    folder, out = tmp_path / "in/x", tmp_path / "out"
    cut = make_video(folder / "cut.mp4", 4, 30, tone=None, muxer={"movflags": "faststart"})
    broken, _, _ = (put(f"in/x/{name}.mp4") for name in ("broken", "fine", "unlisted"))
    rows, _ = scan.survey("folder", tmp_path / "in")
    rows[3]["reason"] = "not in the list"
    write_rows(rows, tmp_path / "in.csv")
    broken.write_bytes(b"damaged since the scan")
    with av.open(str(cut)) as container:    # cut between packets: the rest decodes
        length = [packet.pos for packet in container.demux(video=0) if packet.size][60]
    cut.write_bytes(cut.read_bytes()[:length])
    for words in ("1 done, 0 skipped (already there), 2 failed; 4 files, 1 usable, 3 left out: 1 ",
                  "0 done, 1 skipped"):
        assert words in transcode.run(tmp_path / "in.csv", out, 32)
        assert [*out.rglob("*.mp4"), *out.rglob("*.part")] == [out / "x/fine.mp4"]
        usable, left_out = read_manifest(out / "manifest.csv")
        assert [row.path for row in usable] == [str(out / "x/fine.mp4")]
        assert left_out.keys() == {str(broken), str(cut), str(folder / "unlisted.mp4")}
        assert left_out[str(broken)].startswith("cannot be transcoded: Invalid data")
        assert "over 1 s before its header says" in left_out[str(cut)]
    assert f"{broken}: cannot be transcoded" in capsys.readouterr().err


@pytest.mark.parametrize("folder, change, words", [
    ("in", {}, "overwrite an original"), ("out", {"label": "../../x"}, "leads out of"),
    ("own", {}, "would overwrite"), ("out", None, "No such file"),
    ("out", {"reason": "empty file"}, "manifest.csv has no usable row, each has a reason")])
def test_wrong_input_gives_one_sentence(put, tmp_path, folder, change, words):
    source, listed = put("in/x/a.mp4"), tmp_path / "own/manifest.csv"
    content = source.read_bytes()
    if change is not None:
        write_rows([scan.probe((source, "x", "")) | change], listed)
    status, stdout, stderr = command(transcode, listed, tmp_path / folder)
    assert (status, stdout) == (1, "") and stderr.count("\n") == 1
    assert stderr.startswith("error: ") and words in stderr
    assert not (tmp_path / "out").exists() and source.read_bytes() == content


def test_flags_out_of_bounds():
    status, _, stderr = command(transcode, "in.csv", "out", "--short-side=15")
    assert status == 2 and "'15' is not " in stderr
