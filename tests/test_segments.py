"""Segments of films: rows with a start and an end, lists of them, and uncut films.

The grey of a picture tells its time, and so does the loudness of the tone in each second.
"""

import numpy as np
import pytest
import torch
from conftest import command, make_video, write_text

import data
from data import ActionClips, AudioVisualClips, read_manifest
from prepare import manifest, scan, transcode
from support.rows import write_rows
from support.run import fingerprint


def shown(video):
    """When the pictures (..., H, W, 3) of a film are shown, s."""
    return (video.float().mean((-3, -2, -1)) - 16) / 28


def heard(wave):
    """From which second of a film each whole tenth of a second of a wave (L,) is."""
    return wave[:len(wave) // 2400 * 2400].reshape(-1, 2400).std(1) * 2 ** 0.5 * 10 - 1


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with film.mkv and late.mkv, whose sound begins 1 s after its pictures."""
    folder = tmp_path_factory.mktemp("films")
    t = np.arange(24000 * 8) / 24000
    sound = (1 + np.floor(t)) / 10 * np.sin(800 * np.pi * t)
    for name, late in (("film.mkv", 0), ("late.mkv", 1)):
        make_video(folder / name, 8, 30, (32, 32), gray=lambda t: 16 + 28 * t % 200, rate=24000,
                   audio_codec="pcm_s16le", pieces=[(late, sound)])
    return folder


@pytest.fixture
def listed(root, tmp_path, monkeypatch):
    """listed(*lines): the rows of a list, those left out, and what the command says."""
    def read(*lines):
        annotations = write_text(tmp_path / "train.txt", "\n".join(lines))
        status, text, errors = command(manifest, "list", root, "--annotations", annotations,
                                       "--out", tmp_path / "m.csv")
        assert status == 0, errors
        return *read_manifest(tmp_path / "m.csv"), text + errors
    monkeypatch.setattr(data, "flip_jitter", lambda video, seed: video)
    return read


@pytest.mark.slow
def test_draws_stay_in_the_segment(listed):
    """A clip of 1 s at speed 4 fills the segment. Nothing is from elsewhere."""
    rows, *_ = listed("film.mkv a 2 6")
    clips, starts, spans = AudioVisualClips(rows, 8, 8, 16, max_speed=4), set(), set()
    for epoch in range(60):
        video, audio, _ = clips[epoch, 0]
        times, seconds = shown(video), torch.stack([heard(wave) for wave in audio])
        assert 1.92 < times.min() and times.max() < 5.95
        assert 1.9 < seconds.min() and seconds.max() < 5.1
        starts.add(int(2 * times[0, 0]))
        spans.add(round(float(times[1, -1] - times[1, 0]) * 8 / 7))
    assert starts >= {4, 5, 6, 7, 8, 9} and spans == {1, 2, 3, 4}
    drawn = [shown(ActionClips(rows, ["a"], 8, 8, 16)[epoch, 0][0]) for epoch in range(20)]
    assert 1.92 < min(map(min, drawn)) < 2.8 and 5.2 < max(map(max, drawn)) < 5.95


def test_a_segment_shorter_than_a_clip_ends_in_its_last_frame(listed):
    rows, *_ = listed("film.mkv a 3 3.5", "film.mkv a 5 5.98", "film.mkv b 0 0.3")
    for n in (None, 2):
        clips = ActionClips(rows, ["a", "b"], 15, 15, 16, clips_per_file=n)
        for index, row in enumerate(rows):
            times = shown(clips[index if n else (0, index)][0])
            assert times.min() > row.video_start - 0.08
            assert row.video_stop - 0.16 < times.max() < row.video_stop
    clips = AudioVisualClips(rows, 15, 15, 16, clips_per_file=1)
    assert [row.start for row in clips.rows] == [5]
    assert list(clips.left_out) == [f"{rows[0].path} [{name} s]" for name in ("3.0-3.5", "0.0-0.3")]
    _, audio, _ = clips[0]
    assert audio[0, 23000:23500].std() > 0.3 and audio[0, 23521:].abs().max() == 0


def test_late_sound_does_not_move_a_segment(listed):
    """The sound begins 1 s after the pictures. Both datasets show these from 2 s on."""
    rows, *_ = listed("late.mkv a 2 4", "late.mkv a 0 3")
    assert [row.duration for row in rows] == pytest.approx([2, 2], abs=0.1)
    for index, first in enumerate((2, 1)):      # there is no sound before 1 s
        video, audio, _ = AudioVisualClips(rows, 8, 8, 16, clips_per_file=2)[index]
        assert abs(shown(video)[:, 0] - torch.tensor([first, first + 1])).max() < 0.1
        assert all(abs(heard(audio[n])[:9] - (first - 1 + n)).max() < 0.1 for n in range(2))
    video, _, _ = ActionClips(rows, ["a"], 8, 8, 16, clips_per_file=2)[0]
    assert abs(shown(video)[:, 0] - torch.tensor([2, 3])).max() < 0.1


def test_forms_of_a_list_and_of_a_manifest(root, listed, files_read, tmp_path):
    path = str(root / "film.mkv")
    rows, *_ = listed("\ufefffilm.mkv 7", f"{path}\tdog  1 2.5 train", "",
                      'film.mkv,"singing, loud",3,4', "film.mkv, cat, 4, 5, Validation",
                      "film.mkv cat test", "film.mkv cat 7 8.9")
    assert [row[:3] + row[7:9] for row in rows] == [
        (path, "7", "", 0, None), (path, "dog", "train", 1, 2.5),
        (path, "singing, loud", "", 3, 4), (path, "cat", "val", 4, 5),
        (path, "cat", "test", 0, None), (path, "cat", "", 7, 8)]    # the film ends at 8 s
    assert [row.duration for row in rows] == pytest.approx([8, 1.5, 1, 1, 8, 1])
    rows, left_out, _ = listed("film.mkv cat 2 3", "film.mkv cat 2 3")
    assert files_read == ["film.mkv"] and rows[0].start == 2      # it was read once
    assert left_out == {f"{path} [2.0-3.0 s]": scan.COPY}
    other, *_ = listed("film.mkv cat 2 4")
    assert fingerprint(rows) != fingerprint(other)
    row, *_ = scan.survey("folder", root)[0]       # whose places are then written by hand
    places = ("", ""), ("2", "5"), ("2", ""), ("", "3"), ("3", "2"), ("8", "9"), ("a", "9")
    write_rows([row | dict(start=start, end=end) for start, end in places], tmp_path / "m.csv")
    rows, left_out = read_manifest(tmp_path / "m.csv")
    assert [row[7:9] for row in rows] == [(0, None), (2, 5), (2, 8), (0, 3)]
    assert len(left_out) == 3
    assert all("expected 0 <= start < end <= 8.00 s" in why for why in left_out.values())


def test_bad_lines_are_left_out(listed, tmp_path):
    rows, _, said = listed("film.mkv", "film.mkv a 3 2", "film.mkv a 5 20", "film.mkv a 9 10",
                           "film.mkv a 1 x", "film.mkv a 1 2 train 3", "gone.mkv a 1 2",
                           "film.mkv a -1 2", "film.mkv good 1 2")
    assert [row.label for row in rows] == ["good"]
    assert "8 left out: 4 its segment does not lie in the film, 3 wrong line, 1 cannot" in said
    for number in range(1, 7):
        expected = "0 <= start < end <= 8.00 s" if number in (2, 3, 4) else (
            "'path label [start end] [split]'")
        sentence, = [text for text in said.splitlines() if f"train.txt:{number}:" in text]
        assert f"expected {expected}, got " in sentence and "film.mkv" in sentence
    status, _, errors = command(manifest, "list", tmp_path, "--annotations", tmp_path / "none.txt")
    assert status == 1 and errors.count("\n") == 1 and "No such file" in errors


@pytest.mark.parametrize("layout, lines, cut", [
    ("vggsound", "a_b,3,x,train a_b,15,y,test c,30,z,test", "a_b_000003.mkv"),
    ("kinetics400", "label,youtube_id,time_start,time_end,split x,a_b,3,13,train y,a_b,15,25,test "
     "z,c,30,40,test", "a_b_000015_000025.mkv")])
def test_uncut_films(tmp_path, layout, lines, cut):
    """A file as short as a clip is the clip, and one clip is used once."""
    make_video(tmp_path / "r/a_b.mkv", 26, 5, tone=None)
    make_video(tmp_path / "r/c.mkv", 10, 5, tone=None)
    write_text(tmp_path / "l.csv", lines.replace(" ", "\n"))
    options = dict(layout=layout, annotations=tmp_path / "l.csv", out=tmp_path / "m.csv")
    rows, notes = scan.survey(root=tmp_path / "r", **options)
    assert scan.summary(rows, notes[:1]) == (
        "3 clips of 2 files, 3 usable; 0 official entries not on disk")
    assert [(row.label, row.split, row.video_start, row.video_stop)
            for row in read_manifest(tmp_path / "m.csv")[0]] == [
        ("x", "train", 3, 13), ("y", "test", 15, 25), ("z", "test", 0, None)]
    make_video(tmp_path / "r" / cut, 10, 5, tone=None)
    rows, _ = scan.survey(root=tmp_path / "r", **options)
    assert [row["reason"] for row in rows] == ["", "", scan.COPY, ""]


def test_copies_keep_segments_apart(listed, tmp_path):
    rows, *_ = listed("film.mkv a 2 3 test", "film.mkv b 5 6 test", "film.mkv b 9 10 test")
    line = transcode.run(tmp_path / "m.csv", tmp_path / "copy", 32, workers=1)
    assert line.startswith("1 done") and "3 clips of 2 files, 2 usable, 1 left out: 1 its " in line
    copies, left_out = read_manifest(tmp_path / "copy/manifest.csv")
    assert len({row.path for row in copies}) == len(left_out) == 1
    assert [row[1:3] + row[7:] for row in copies] == [row[1:3] + row[7:] for row in rows]
