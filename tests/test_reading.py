"""Checks that the right pictures and sound come out of every container.

Most films here show the number of each frame as a barcode. `experiments/frames.py` has a matrix of
50 kinds of films; the other tests make odd and damaged files.
"""

import os
import re
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import make_video, peak_hz, read_barcode

from data import ActionClips, AudioVisualClips, read_clip, read_manifest
from experiments import frames
from prepare import scan, transcode
from support.reading import (RATE, begin, lead_in, open_file, open_streams, place_sound, read,
                             read_sound)

SHORT_SIDE = 48
STORE_NO_DELAY = {".avi", ".3gp"}     # these do not store the delay of the sound encoder


def shown(path, times, sound=False):
    """Return the numbers of the frames that the reader gives for the times."""
    return frames.read_barcode(frames.ours(path, times, None, sound))


def scanned(path, verify=True):
    return scan.probe((path, "c", ""), verify)


@pytest.mark.parametrize("film", frames.FILMS, ids=lambda film: film.name)
def test_matrix(film, tmp_path):
    """The film and its transcoded copy pass --verify. All 240 frames and all beeps are right."""
    priority = os.sched_getscheduler(0), os.sched_getparam(0)
    path = frames.make(film, tmp_path)
    assert (os.sched_getscheduler(0), os.sched_getparam(0)) == priority
    times, numbers, begins = frames.truth(path)
    count = len(film.ticks or range(round(frames.SECONDS * film.fps)))
    assert numbers.tolist() == list(range(count))
    row = scanned(path)
    assert (row["reason"], row["note"], row["has_audio"]) == ("", "", int(film.sound is not None))
    assert abs(row["video_duration"] + begins[0] - times[-1]) < 0.25
    none_wrong = 0, frames.PLACES * frames.FRAMES
    assert frames.ask(path, frames.ours, times, numbers, begins) == none_wrong
    copy = tmp_path / "copy.mp4"
    transcode.encode(path, copy, SHORT_SIDE, 15, sound=film.sound is not None)
    row = scanned(copy)
    assert (row["reason"], row["note"]) == ("", "")
    assert frames.ask(copy, frames.ours, times, numbers, begins) == none_wrong
    if film.sound is None:
        return
    # The film beeps at 0.5 s, 1.5 s and so on by its own clock, which shows `zero` at the reader's
    # time 0. The whole film is read from its beginning, without a seek.
    length = times[-1] - max(begins)
    zero = max(begins) - times[0] + (film.ticks or [0])[0] / film.fps
    whole = beeps_of(path, 0, length) + zero
    late = whole - np.arange(len(whole)) - 0.5
    assert len(whole) >= 4
    assert (abs(late) < (0.05 if path.suffix in STORE_NO_DELAY else 0.01)).all()
    for source in (path, copy):
        for t0 in np.random.default_rng(0).uniform(0, length - 1.5, 6):
            beeps = beeps_of(source, t0, 1.5) + zero
            assert len(beeps) and abs(whole[:, None] - beeps).min(0).max() < 0.01, (source, t0)


def beeps_of(path, t0, seconds):
    """Return when the beeps of a clip begin, in s after zero, but not a beep that the clip cuts."""
    _, wave = read(path, [t0], round(seconds * RATE), SHORT_SIDE)
    beeps = frames.onsets(wave, RATE)
    return t0 + beeps[beeps > 0.025]


def ts(path, seconds=3, start=0.0, **settings):
    """Return the bytes of an MPEG-TS film.

    Two such films, one after the other, are one film whose format changes in mid-stream.
    """
    return make_video(path, seconds, 25, start=start, audio_codec="aac", **settings).read_bytes()


@pytest.mark.parametrize("rate,layout", [(48000, "mono"), (44100, "stereo"), (32000, "stereo")])
def test_sound_may_change_its_format(tmp_path, rate, layout):
    path = tmp_path / "a.ts"
    one = ts(tmp_path / "1.ts", tone=600)
    two = ts(tmp_path / "2.ts", start=3, tone=600, rate=rate, layout=layout)
    path.write_bytes(one + two)
    row = scanned(path)
    assert (row["reason"], row["note"], row["has_audio"]) == ("", "", 1)
    assert abs(row["duration"] - 6) < 0.2
    transcode.encode(path, tmp_path / "copy.mp4", SHORT_SIDE, 15, sound=True)
    for source in (path, tmp_path / "copy.mp4"):
        for t0 in (0.5, 2.5, 4.2):
            _, wave = read(source, [t0], RATE, SHORT_SIDE)
            for part in np.split(wave, 4):
                assert abs(peak_hz(part) - 600) < 8 and part.std() > 0.25, (source, t0)


def test_pictures_of_another_shape_are_named(tmp_path):
    path, one = tmp_path / "a.ts", ts(tmp_path / "1.ts")
    path.write_bytes(one + ts(tmp_path / "2.ts", start=3, size=(54, 72)))
    assert scanned(path)["reason"] == "cannot be read to the end: its pictures change their shape"
    video, _ = read_clip(path, 0.4, (1,), (1,), 10, 25, 54)
    assert read_barcode(video)[0].tolist() == list(range(10, 20))
    with pytest.raises(ValueError, match="a.ts: its pictures change their shape"):
        read_clip(path, 2.5, (1,), (1,), 25, 25, 54)
    larger_but_of_the_same_shape = ts(tmp_path / "2.ts", start=3, size=(144, 108))
    path.write_bytes(one + larger_but_of_the_same_shape)
    assert scanned(path)["reason"] == ""
    assert read_clip(path, 2.5, (1,), (1,), 25, 25, 54)[0].shape == (1, 25, 54, 72, 3)


@pytest.mark.parametrize("degrees,hflip,vflip,expected", [
    (0, False, False, "abcd"), (180, False, False, "dcba"), (-90, False, False, "cadb"),
    (90, False, False, "bdac"), (0, True, False, "badc"), (0, False, True, "cdab"),
    (90, True, False, "dbca"), (90, False, True, "acbd")])
def test_pictures_as_a_player_shows_them(tmp_path, degrees, hflip, vflip, expected):
    """A file can ask for eight turns and mirror images. The transcoded copy is turned already.

    The letters name the four corners: top left, top right, bottom left, bottom right.
    """
    levels = dict(zip("abcd", (20, 90, 160, 230)))
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=10, width=96, height=64, pix_fmt="yuv420p")
        video.set_display_rotation(degrees, hflip=hflip, vflip=vflip)
        corners = np.array([levels[c] for c in "abcd"], np.uint8).reshape(2, 2)
        image = np.tile(corners.repeat(32, 0).repeat(48, 1)[..., None], 3)
        for _ in range(10):
            out.mux(video.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        out.mux(video.encode(None))
    transcode.encode(path, tmp_path / "copy.mp4", 64, 15, sound=False)
    for source in (path, tmp_path / "copy.mp4"):
        (image,), _ = read(source, [0.3], 0, 64)
        H, W = image.shape[:2]
        assert (H, W) == ((96, 64) if degrees in (90, -90) else (64, 96))
        values = [image[y, x].mean() for y in (H // 4, 3 * H // 4) for x in (W // 4, 3 * W // 4)]
        letters = [min(levels, key=lambda c: abs(levels[c] - value)) for value in values]
        assert "".join(letters) == expected, source


def damage(path, first, last, kind="video"):
    """Overwrite the video or audio packets number `first` to `last` of a file."""
    with av.open(str(path)) as container:
        stream = container.streams.best(kind)
        spans = [(p.pos, p.size) for p in container.demux(stream) if p.size]
    data = bytearray(path.read_bytes())
    for pos, size in spans[first:last + 1]:
        data[pos:pos + size] = b"\xff" * size
    path.write_bytes(data)


@pytest.mark.parametrize("kind,packet", [("video", 2), ("video", 40), ("audio", 3), ("audio", 60)])
def test_the_transcoder_sees_damage_from_the_first_packets_on(tmp_path, kind, packet):
    path = make_video(tmp_path / "a.mp4", 4, 25, gop=25)
    damage(path, packet, packet, kind)
    row = scanned(path)
    assert "damaged frames" in row["reason"] + row["note"]
    with pytest.raises(ValueError, match="damaged"):
        transcode.encode(path, tmp_path / "copy.mp4", SHORT_SIDE, 15, sound=True)


def test_clips_with_damage_are_refused_and_the_others_are_right(tmp_path):
    path = make_video(tmp_path / "a.mp4", 8, 25, gop=25)
    damage(path, 80, 85)                                  # in the fourth second
    assert scanned(path, verify=False)["reason"] == ""
    reason = scanned(path)["reason"]
    assert reason.startswith("cannot be read to the end: damaged frames (first at 3.")
    refused = 0
    for t0 in np.arange(0, 7, 0.3):
        try:
            video, _ = read_clip(path, t0, (1,), (1,), 12, 25, SHORT_SIDE)
            seen = read_barcode(video)[0].numpy() / 25
            assert abs(seen - t0 - np.arange(12) / 25).max() <= 0.5 / 25 + 2e-3, t0
        except ValueError as error:
            assert "a.mp4: damaged at 3." in str(error) and 2.6 < t0 < 4, t0
            refused += 1
    assert refused in (3, 4, 5)
    with pytest.raises(ValueError, match="damaged frames"):
        transcode.encode(path, tmp_path / "copy.mp4", SHORT_SIDE, 15, sound=True)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_file_that_was_cut_is_refused_past_its_end(tmp_path, suffix):
    whole, path = tmp_path / f"whole.{suffix}", tmp_path / f"a.{suffix}"
    make_video(whole, 6, 25, codec="mpeg4", audio_codec="ac3", rate=48000)
    if suffix == "mp4":                   # move the index from the end of the file to the front
        to_front = {"movflags": "faststart"}
        with av.open(str(whole)) as old, av.open(str(path), "w", options=to_front) as new:
            streams = {stream: new.add_stream_from_template(stream) for stream in old.streams}
            for packet in old.demux():
                if packet.dts is not None:
                    packet.stream = streams[packet.stream]
                    new.mux(packet)
        whole = path
    path.write_bytes(whole.read_bytes()[:whole.stat().st_size // 2])
    assert scanned(path)["reason"].startswith("cannot be read to the end: ")
    video, _ = read_clip(path, 1, (1,), (1,), 12, 25, SHORT_SIDE)
    assert read_barcode(video)[0].tolist() == list(range(25, 37))
    for tau_a in ((), (1,)):
        with pytest.raises(ValueError, match=f"a.{suffix}: "):
            read_clip(path, 4, (1,), tau_a, 12, 25, SHORT_SIDE)


def test_pictures_without_time_stamps_are_refused(tmp_path):
    path = make_video(tmp_path / "a.h264", 2, 25, tone=None)
    with pytest.raises(ValueError, match="a.h264: its pictures have no time stamps"):
        read_clip(path, 0, (1,), (), 12, 25, SHORT_SIDE)


def test_a_slide_is_shown_until_the_next_one(tmp_path):
    ticks = [0, 50, 100, 150, *range(200, 256)]           # each of the first four frames lasts 5 s
    path = make_video(tmp_path / "a.mp4", 6, 10, tone=300, ticks=ticks)
    row = scanned(path)
    assert row["reason"] == "" and abs(row["video_duration"] - 25.6) < 0.01
    assert shown(path, [0, 2.4, 2.6, 7.6, 12.4, 19.9, 21]).tolist() == [0, 0, 1, 2, 2, 4, 14]


# ---- lengths

def test_each_track_has_a_length_of_its_own(tmp_path):
    """Pictures of 6 s and sound of 2 s have 2 s in common. Some containers do not tell lengths."""
    for suffix, codec, sound in (("mp4", "libx264", "aac"), ("mkv", "libx264", "aac"),
                                 ("flv", "libx264", "aac"), ("ts", "libx264", "aac"),
                                 ("avi", "mpeg4", "libmp3lame"), ("webm", "libvpx", "libopus"),
                                 ("flv", "flv", "libmp3lame"), ("wmv", "wmv2", "wmav2")):
        rate = 44100 if suffix in ("flv", "wmv") else 48000
        path = make_video(tmp_path / f"a.{suffix}", 6, 25, rate=rate, codec=codec,
                          audio_codec=sound, sound_seconds=2, bit_rate=64000)
        for verify in (False, True):
            row = scanned(path, verify)
            assert row["reason"] == row["note"] == "", (suffix, row)
            assert abs(row["duration"] - 2) < 0.1, (suffix, row)
            assert abs(row["video_duration"] - 6) < 0.1, (suffix, row)


@pytest.mark.parametrize("suffix,codec,sound", [
    ("webm", "libvpx", "libopus"), ("mkv", "libx264", "aac")])
def test_a_live_stream_without_any_length(tmp_path, suffix, codec, sound):
    path = make_video(tmp_path / f"a.{suffix}", 5, 25, rate=48000, codec=codec, audio_codec=sound,
                      muxer={"live": "1"})
    with av.open(str(path)) as container:
        assert container.duration is None
    for verify in (False, True):
        row = scanned(path, verify)
        assert row["reason"] == "" and abs(row["duration"] - 5) < 0.1, row
    assert shown(path, [3.0, 3.04, 4.0], sound=True).tolist() == [75, 76, 100]


def test_an_edit_list_cuts_off_the_beginning(tmp_path):
    """The edit list begins at 1.5 s, between two keyframes. Earlier frames are decoded, not shown.

    The length does not count them either.
    """
    path = make_video(tmp_path / "a.mp4", 5, 30, gop=30, tone=None)
    data = bytearray(path.read_bytes())
    at = data.index(b"elst") + 12         # length and media time of the first entry
    assert int.from_bytes(data[at - 4:at]) == 1
    with av.open(str(path)) as container:
        scale = container.streams.video[0].time_base.denominator
    length, begins = int.from_bytes(data[at:at + 4]), int.from_bytes(data[at + 4:at + 8])
    data[at:at + 8] = (length * 7 // 10).to_bytes(4) + (begins + 3 * scale // 2).to_bytes(4)
    path.write_bytes(data)
    row = scanned(path)
    assert row["reason"] == "" and abs(row["video_duration"] - 3.5) < 0.05
    assert shown(path, [0, 0.1, 0.6, 3.4]).tolist() == [45, 48, 63, 147]
    assert shown(path, [2.0, 2.1]).tolist() == [105, 108]


# ---- when streams begin, and whether their stamps run on

@pytest.mark.parametrize("suffix,codec,sound,start", [
    ("ts", "libx264", "aac", 0), ("ts", "libx264", "aac", 2), ("ts", "libx264", "aac", 1000),
    ("mpg", "mpeg2video", "mp2", 0), ("mpg", "mpeg2video", "mp2", 1000),
    ("mkv", "libx264", "aac", 0), ("mkv", "libx264", "aac", 2)])
def test_joined_parts_are_refused(tmp_path, suffix, codec, sound, start):
    """The stamps begin anew or jump where two files were joined. Only --verify looks so far in mkv,
    whose headers say that the file ends with the first part."""
    path, words = tmp_path / f"a.{suffix}", "time stamps go from .* to .* as in joined recordings"
    film = dict(codec=codec, audio_codec=sound, rate=48000)
    one = make_video(tmp_path / f"1.{suffix}", 4, 25, **film).read_bytes()
    two = make_video(tmp_path / f"2.{suffix}", 4, 25, start=start, **film).read_bytes()
    path.write_bytes(one + two)
    for verify in (True,) if suffix == "mkv" else (True, False):
        row = scanned(path, verify)
        assert re.search(words, row["reason"]), row
    with pytest.raises(ValueError, match=words):
        transcode.encode(path, tmp_path / "copy.mp4", SHORT_SIDE, 15, sound=True)
    with pytest.raises(ValueError, match=words):
        read_sound(path)
    for t0 in np.arange(0, 4, 0.5):       # a clip is of one part, or it is refused
        try:
            seen = shown(path, t0 + np.arange(12) / 25, sound=True)
        except ValueError:
            continue
        assert (np.diff(seen) >= 0).all(), t0


@pytest.mark.parametrize("suffix,codec,sound", [
    ("ts", "libx264", "aac"), ("ts", "mpeg2video", "mp2")])
def test_a_stream_that_begins_without_a_keyframe_is_refused(tmp_path, suffix, codec, sound):
    path, words = tmp_path / f"a.{suffix}", "begin without a keyframe"
    make_video(path, 6, 25, codec=codec, audio_codec=sound, rate=48000, gop=12)
    data = path.read_bytes()
    with av.open(str(path)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.size]
    path.write_bytes(data[places[5] // 188 * 188:])
    for verify in (False, True):
        assert words in scanned(path, verify)["reason"]
    for t0 in (0, 1, 3):
        with pytest.raises(ValueError, match=words):
            read(path, [t0], RATE)
    with pytest.raises(ValueError, match=words):
        transcode.encode(path, tmp_path / "copy.mp4", SHORT_SIDE, 15, sound=True)


def cut_by_edit_list(path, seconds, parts=1):
    """Let the edit lists of an mp4 begin so many s later, in so many parts of 1 s.

    That is what cutting without encoding does.
    """
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        scales = [stream.time_base.denominator for stream in container.streams]
    at = 0
    for scale in scales:
        at = data.index(b"elst", at) + 4                  # version, number of entries, entries
        begins = int.from_bytes(data[at + 12:at + 16])
        entries = b"".join((1000).to_bytes(4) + (begins + round((seconds + 2 * n) * scale)
                                                 ).to_bytes(4) + data[at + 16:at + 20]
                           for n in range(parts)) if parts > 1 else (
            data[at + 8:at + 12] + (begins + round(seconds * scale)).to_bytes(4)
            + data[at + 16:at + 20])
        data[at + 4:at + 20] = parts.to_bytes(4) + entries
        for box, place in ((b"elst", at), (b"edts", at), (b"trak", at), (b"moov", at)):
            start = data.rindex(box, 0, place) - 4        # the boxes around grow too
            size = int.from_bytes(data[start:start + 4]) + 12 * (parts - 1)
            data[start:start + 4] = size.to_bytes(4)
    path.write_bytes(data)


@pytest.mark.parametrize("cut", [0.213, 0.5, 0.52, 0.733])
@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_a_cut_without_encoding_keeps_sight_and_sound_together(tmp_path, codec, cut):
    """The picture turns white when the sound begins, at 2 s. The cut is within a picture."""
    path, copy = tmp_path / "a.mp4", tmp_path / "copy.mp4"
    make_video(path, 4, 25, codec=codec, gop=25, gray=lambda t: 235 * (t >= 2),
               wave=lambda t: 0.5 * np.sin(2 * np.pi * 1000 * t) * (t >= 2))
    cut_by_edit_list(path, cut)
    row = scanned(path)
    assert row["reason"] == row["note"] == "" and abs(row["duration"] - (4 - cut)) < 0.06
    transcode.encode(path, copy, SHORT_SIDE, 15, sound=True)
    for source in (path, copy):
        times = np.arange(0, 3, 0.002)
        for samples in (0, 3 * RATE):
            images, wave = read(source, times, samples, SHORT_SIDE)
            turns = times[np.argmax([image.mean() > 120 for image in images])]
            # The nearest picture turns white half a picture before the time stamp of the first one.
            assert abs(turns + 0.02 - (2 - cut)) < 0.005, (source, samples)
        assert abs(np.argmax(abs(wave) > 0.2) / RATE - (2 - cut)) < 0.005, source


def test_an_edit_list_of_several_parts(tmp_path):
    path = make_video(tmp_path / "a.mp4", 6, 25, gop=25)
    cut_by_edit_list(path, 0.213, parts=2)
    for verify in (False, True):
        assert "edit list has several parts" in scanned(path, verify)["reason"]
    with pytest.raises(ValueError, match="edit list has several parts"):
        read(path, [1], RATE)


@pytest.mark.parametrize("suffix,codec,rate,bits", [
    ("mp4", "libmp3lame", 24000, 8000), ("mp4", "libmp3lame", 24000, 64000),
    ("3gp", "libopencore_amrnb", 8000, 4750), ("3gp", "libopencore_amrnb", 8000, 12200),
    ("mov", "pcm_s16le", 24000, None), ("mp4", "flac", 24000, None), ("mov", "alac", 24000, None)])
def test_the_sound_of_a_clip_is_that_of_the_whole_decode(tmp_path, suffix, codec, rate, bits):
    path = tmp_path / f"a.{suffix}"
    make_video(path, 6, 25, audio_codec=codec, rate=rate, bit_rate=bits, gop=12, tone=1,
               wave=lambda t: np.random.default_rng(0).normal(0, 0.2, len(t)))
    with open_file(path) as container:
        lead = lead_in(open_streams(container)[1])
    assert lead == (1.0 if codec in ("libmp3lame", "libopencore_amrnb") else 0.2)
    whole, _ = read_sound(path)
    for t0 in np.random.default_rng(1).integers(1000, 4500, 8) / 1000:
        _, wave = read(path, [t0], RATE, SHORT_SIDE)
        error = wave - whole[round(t0 * RATE):][:RATE]
        assert np.sqrt((error ** 2).mean()) < 1e-3 * np.sqrt((wave ** 2).mean()), t0


@pytest.mark.parametrize("rate", [12000, 24000, 48000])
@pytest.mark.parametrize("suffix,codec", [("webm", "libvpx"), ("mkv", "libx264"),
                                          ("mp4", "libx264")])
def test_opus_begins_and_ends_where_it_did(tmp_path, suffix, codec, rate):
    path = make_video(tmp_path / f"a.{suffix}", 2, 25, codec=codec, audio_codec="libopus",
                      rate=rate, wave=lambda t: 0.5 * np.sin(2 * np.pi * 1000 * t) * (t >= 1))
    transcode.encode(path, tmp_path / "copy.mp4", SHORT_SIDE, 15, sound=True)
    begins = []
    for source in (path, tmp_path / "copy.mp4"):
        with open_file(source) as container:
            video, audio = open_streams(container)
            begins.append(begin(audio) - begin(video))
        _, wave = read(source, [0], 2 * RATE, SHORT_SIDE)
        assert abs(begins[-1] + np.argmax(abs(wave) > 0.2) / RATE - 1) < 0.003, source
    assert abs(begins[0] - begins[1]) < 1e-3
    wave, _ = read_sound(path)
    assert len(wave) == 2 * RATE and abs(np.argmax(abs(wave) > 0.2) / RATE - 1) < 0.003


def test_sound_whose_first_frames_have_no_stamp_is_placed_by_the_next(tmp_path):
    path = make_video(tmp_path / "a.mkv", 2, 25, audio_codec="pcm_s16le")
    results = []
    for unstamped in (0, 3):
        with open_file(path) as container:
            audio = container.streams.audio[0]
            packets = list(container.demux(audio))
            for packet in packets[:unstamped]:
                packet.pts = None
            results.append(list(place_sound(audio, packets, [])))
    places, waves = ([[piece[n] for piece in result] for result in results] for n in (0, 1))
    assert np.allclose(*places, atol=RATE / 1000)         # the clock of an mkv ticks in ms
    assert (np.concatenate(waves[0]) == np.concatenate(waves[1])).all()


# ---- sound that cannot be used

def test_sound_never_decides_about_pictures(tmp_path):
    """Fine-tuning sees all pictures of films whose sound is short, damaged or has no decoder."""
    root = tmp_path / "r" / "c"
    lighter = lambda t: int(20 + 35 * t)
    make_video(root / "short.mp4", 6, 25, sound_seconds=1, gray=lighter)
    data = make_video(root / "no_decoder.mkv", 6, 25, gray=lighter).read_bytes()
    (root / "no_decoder.mkv").write_bytes(data.replace(b"A_AAC", b"A_ZZZ"))
    damage(make_video(root / "damaged.mp4", 6, 25, gray=lighter), 100, 100, "audio")
    scan.write(scan.scan(tmp_path / "r", verify=True), tmp_path / "m.csv")
    rows, left_out = read_manifest(tmp_path / "m.csv")
    assert not left_out
    notes = {Path(row.path).stem: row.note for row in rows}
    assert notes["short"] == "" and notes["no_decoder"] == "no decoder for its sound"
    assert notes["damaged"].startswith("its sound cannot be read: damaged frames (first at 2.")
    clips = ActionClips(rows, ["c"], frames=5, fps=25, size=SHORT_SIDE, views=(4, 1))
    for index in range(3):
        assert abs(rows[index].video_duration - 6) < 0.05
        video, _, _ = clips[index]
        levels = video.float().mean((1, 2, 3, 4))         # the clips begin at 0, 1.93, 3.87, 5.8 s
        middles = torch.tensor([0.08, 2.01, 3.95, 5.88])
        assert (levels - 20 - 35 * middles).abs().max() < 5
    sounding = AudioVisualClips(rows, frames=8, fps=16, size=24)
    assert [Path(row.path).stem for row in sounding.rows] == ["short"]
    assert set(sounding.left_out.values()) == {notes["no_decoder"], notes["damaged"]}
    transcode.run(tmp_path / "m.csv", tmp_path / "copy", SHORT_SIDE)
    copies, left_out = read_manifest(tmp_path / "copy" / "manifest.csv")
    assert not left_out and [row.note for row in copies] == [row.note for row in rows]
    assert all(abs(row.video_duration - 6) < 0.05 for row in copies)

