"""Checks that the right pictures and sound come out of every container.

Most films here show the number of each frame as a barcode. `frames.py` has a matrix of
50 kinds of films; the other tests make still pictures, and odd and damaged files.
"""

import itertools
import re
import struct
from contextlib import suppress
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import make_video, peak_hz, remux

import frames
from data import read_manifest
from frames import beeps_of, shown
from prepare import scan, transcode
from support.reading import (EXACT, RATE, Damage, begin, lead_in, open_file, open_streams, padded,
                             place_sound, read, read_sound)

SIDE = 48
STORE_NO_DELAY = {".avi", ".3gp"}     # these do not store the delay of the sound encoder


def usable(path, verify=True):
    """Return the row of a file in which the scan finds no fault."""
    row = scan.probe((path, "c", ""), verify)
    assert (row["reason"], row["note"]) == ("", ""), row
    return row


def with_copy(path, short_side=SIDE, sound=True):
    """Transcode a film, and return the paths of the film and of its copy."""
    copy = path.with_name("copy.mp4")
    transcode.encode(path, copy, short_side, 15, sound)
    return path, copy


@pytest.mark.slow
@pytest.mark.parametrize("film", frames.FILMS, ids=lambda film: film.name)
def test_matrix(film, tmp_path):
    """The film and its transcoded copy pass --verify. All 240 frames and all beeps are right."""
    path = frames.make(film, tmp_path)
    times, numbers, begins = frames.truth(path)
    row = usable(path)
    assert row["has_audio"] == int(film.sound is not None)
    assert abs(row["video_duration"] + begins[0] - times[-1]) < 0.25
    _, copy = with_copy(path, sound=film.sound is not None)
    usable(copy)
    for source in (path, copy):
        assert frames.ask(source, times, numbers, begins) == 0
    if film.sound is None:
        return
    # The film beeps at 0.5 s, 1.5 s and so on by its own clock, which shows `zero` at time 0.
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


# ---- still pictures

# The colours of the four quarters: top left, top right, bottom left, bottom right.
YUV = [(60, 90, 200), (200, 60, 110), (126, 128, 128), (235, 128, 128)]
RGB = [(200, 30, 60), (20, 180, 240), (128, 128, 128), (255, 255, 255)]


def still(path, frame, codec="ffv1", **film):
    """Write a film that shows a frame 3 times, at 0, 0.1 and 0.2 s, and return its path."""
    return make_video(path, 0.3, 10, tone=None, codec=codec, image=frame, **film)


def quarters(colours, width=160, height=96):
    """Return an image (height, width, n) of four colours (4, n)."""
    lower, right = (np.arange(side) * 2 // side for side in (height, width))
    return np.uint8(colours)[lower[:, None] * 2 + right]


def frame_of(image, pixels="yuv420p"):
    """Return the frame of an image (H, W, 3) of Y, Cb and Cr."""
    frame = av.VideoFrame(*image.shape[1::-1], pixels)
    bits = frame.format.components[0].bits
    for n, plane in enumerate(frame.planes):
        samples = np.frombuffer(plane, np.uint8 if bits == 8 else np.uint16)
        step_y, step_x = -(-frame.height // plane.height), -(-frame.width // plane.width)
        values = image[::step_y, ::step_x, n].astype(samples.dtype) << (bits - 8)
        samples.reshape(plane.height, -1)[:, :plane.width] = values
    return frame


def rgb(y, cb, cr, matrix, full):
    """Return the colour of 8-bit Y, Cb, Cr by BT.601 (5), BT.709 (1) or BT.2020 (9)."""
    red, blue = {5: (0.299, 0.114), 1: (0.2126, 0.0722), 9: (0.2627, 0.0593)}[matrix]
    y, cb, cr = ((y / 255, (cb - 128) / 255, (cr - 128) / 255) if full else
                 ((y - 16) / 219, (cb - 128) / 224, (cr - 128) / 224))
    r, b = y + 2 * (1 - red) * cr, y + 2 * (1 - blue) * cb
    return np.clip(255 * np.array([r, (y - red * r - blue * b) / (1 - red - blue), b]), 0, 255)


def check_quarters(path, colours, tolerance, short_sides=(20, 33, 47, 48, 51, 96, 131), aspect=5/3):
    """Assert that a film and its copy show the four colours, in pictures W / H = aspect."""
    usable(path)
    expected = np.reshape(colours, (2, 2, 3))
    for source in with_copy(path, sound=False):
        for short_side in short_sides:
            (image,), _ = read(source, [0.1], 0, short_side)
            H, W = image.shape[:2]
            assert min(H, W) == short_side and abs(W / H / aspect - 1) < 0.03
            found = image[H // 4::H // 2, W // 4::W // 2][:2, :2]
            assert abs(found - expected).max() <= tolerance, (source, short_side)
    # Windows at the edges and of any size, in shares of W and H, and their quarters.
    for share, quarter in (((0.55, 0.05, 0.4, 0.4), 1), ((0, 0, 1e-5, 1e-5), 0),
                           ((-1e-9, 0.55, 0.45, 0.45), 2), ((0.995, 0.9, 0.005, 0.1 + 1e-9), 3)):
        (part,), _ = read(path, [0.1], 0, (40, 30), lambda W, H: np.multiply(share, (W, H, W, H)))
        assert part.shape == (40, 30, 3) and abs(part - colours[quarter]).max() <= tolerance, share


@pytest.mark.parametrize("pixels,matrix,full", [
    ("yuv420p", 5, False), ("yuv420p", 9, False), ("yuv420p", 1, True), ("yuv444p", 1, False),
    ("yuv410p", 5, False), ("yuv422p10le", 9, False), ("gray", 5, True), ("gray10le", 5, False)])
@pytest.mark.parametrize("size", [(160, 96), (75, 51)])
def test_colours(tmp_path, pixels, matrix, full, size):
    """Four colours come out at even and odd sizes, the file's own and larger ones."""
    colours = [rgb(y, *((128, 128) if pixels.startswith("gray") else chroma), matrix, full)
               for y, *chroma in YUV]
    settings = {"colorspace": matrix, "color_range": 2 if full else 1}
    path = still(tmp_path / "a.mkv", frame_of(quarters(YUV, *size), pixels), settings=settings)
    check_quarters(path, colours, 1, aspect=size[0] / size[1])
    if size == (160, 96) and pixels != "yuv410p":         # at half the size, edges stay sharp
        (image,), _ = read(path, [0.1], 0, 48)
        assert abs(image - quarters(colours, 80, 48).astype(int)).max() <= 6


@pytest.mark.parametrize("name,codec,pixels", [
    ("a.mov", "png", "rgb24"), ("a.avi", "rawvideo", "bgr24"), ("a.mkv", "ffv1", "bgr0"),
    ("a.mkv", "libx264rgb", "rgb24"), ("a.mkv", "ffv1", "gbrp10le"), ("a.avi", "rawvideo", "pal8"),
    ("a.nut", "rawvideo", "nv12")])
def test_colours_that_are_not_stored_as_planes_of_yuv(tmp_path, name, codec, pixels):
    palette = np.full((256, 4), 255, np.uint8)
    palette[:4, 1:] = RGB
    if pixels == "pal8":
        number = quarters([[0], [1], [2], [3]])[..., 0]
        frame = av.VideoFrame.from_ndarray((number, palette), "pal8")
    else:
        frame = av.VideoFrame.from_ndarray(quarters(RGB), "rgb24").reformat(format=pixels)
    still(tmp_path / name, frame, codec, options={"crf": "0"} if codec == "libx264rgb" else {})
    # The copy is made of YUV, which is rounded.
    check_quarters(tmp_path / name, RGB, 2)


@pytest.mark.parametrize("exif,turned,corners", [
    (1, (0, False, False), "abcd"), (2, (0, True, False), "badc"), (3, (180, False, False), "dcba"),
    (4, (0, False, True), "cdab"), (5, (90, False, True), "acbd"), (6, (-90, False, False), "cadb"),
    (7, (90, True, False), "dbca"), (8, (90, False, False), "bdac")])
def test_turned_pictures(tmp_path, exif, turned, corners):
    """A file asks for eight turns and mirror images by a display matrix, or by EXIF, which cameras
    write into each picture of motion JPEG. A player stretches pixels that are not square."""
    tags = struct.pack("<2sHIHHHIII", b"II", 42, 8, 1, 0x112, 3, 1, exif, 0)
    mark = b"\xff\xe1" + struct.pack(">H", len(tags) + 8) + b"Exif\0\0" + tags
    jpeg = still(tmp_path / "plain.mov", frame_of(quarters(YUV), "yuvj420p"), "mjpeg")
    jpeg = remux(jpeg, tmp_path / f"a.{('mov', 'avi', 'mkv')[exif % 3]}", ["video"],
                 lambda data: data[:2] + mark + data[2:])
    pixel = (Fraction(1), Fraction(64, 45), Fraction(8, 9))[exif % 3]
    film = still(tmp_path / "a.mp4", frame_of(quarters(YUV)), "libx264", turned=turned,
                 settings={"sample_aspect_ratio": pixel})
    for path, full, aspect in ((jpeg, True, 5 / 3), (film, False, 5 / 3 * pixel)):
        colours = [rgb(*YUV["abcd".index(corner)], 5, full) for corner in corners]
        check_quarters(path, colours, 10, (48, 64), aspect if exif < 5 else 1 / aspect)


@pytest.mark.parametrize("degrees", [0, 90])
def test_a_window_is_cut_from_the_picture(tmp_path, degrees):
    """A window shows what is cut out of the whole picture, which is that of FFmpeg's conversion.
    Its edges are rounded to whole samples of chroma, which are 2 pixels of the file here."""
    y, x, n = np.ogrid[:96, :144, :3]
    wave = np.sin(2 * np.pi * x / 48 + n) + np.sin(2 * np.pi * (x + 2 * y) / 96)
    texture = frame_of((128 + np.array((30, 15, 15)) * wave).round())
    path = still(tmp_path / "a.mp4", texture, "libx264", turned=(degrees, False, False))
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    rng = np.random.default_rng(0)
    for scale in (Fraction(1, 2), Fraction(1), Fraction(3, 2)):
        size = int(144 * scale), int(96 * scale)
        whole = frame.reformat(*size, "rgb24", interpolation=EXACT).to_ndarray().astype(int)
        whole = np.rot90(whole, degrees // 90)
        (found,), _ = read(path, [0.1], 0, int(96 * scale))
        assert abs(found - whole).max() <= 1, scale
        for _ in range(10):
            box = [6 * int(n) for n in rng.integers((0, 0, 3, 3), (9, 9, 8, 8))]
            x, y, wide, high = (int(n * scale) for n in box)
            (found,), _ = read(path, [0.1], 0, (high, wide), lambda W, H: box)
            apart = abs(found - whole[y:y + high, x:x + wide])
            assert apart[2:-2, 2:-2].max() <= 2 and apart.max() <= 16, scale
            nearby = np.add(box, (0.4, -0.3, 0.3, -0.4))
            (again,), _ = read(path, [0.1], 0, (high, wide), lambda W, H: nearby)
            assert (again == found).all()


# ---- files with faults

def joined(path, codec="libx264", sound="aac", seconds=3, start=3.0, first={}, **second):
    """Write two films one after the other into one file, whose format or stamps then change."""
    film, data = dict(codec=codec, audio_codec=sound, rate=48000), b""
    for settings in (first, {"start": start} | second):
        part = make_video(path.with_name("part" + path.suffix), seconds, 25, **film | settings)
        data += part.read_bytes()
    path.write_bytes(data)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("second", [{"rate": 32000, "layout": "stereo"}, {"size": (144, 108)}])
def test_the_format_may_change(tmp_path, second):
    path = joined(tmp_path / "a.ts", seconds=2, start=2, first={"tone": 600}, tone=600, **second)
    row = usable(path)
    assert row["has_audio"] == 1 and abs(row["duration"] - 4) < 0.2
    for source in with_copy(path):
        for t0 in (0.5, 1.5, 2.7):
            images, wave = read(source, [t0, t0 + 0.9], RATE, SIDE)
            assert [image.shape for image in images] == [(48, 64, 3)] * 2
            for part in np.split(wave, 4):
                assert abs(peak_hz(part) - 600) < 8 and part.std() > 0.25, (source, t0)


def packets_of(path, kind="video"):
    """Return the place and the size in the file, in bytes, of each packet of a stream."""
    with av.open(str(path)) as container:
        stream = container.streams.best(kind)
        return [(p.pos, p.size) for p in container.demux(stream) if p.size and p.pos]


def damaged(path, first, last, kind="video", **film):
    """Write a film of 5 s, and overwrite the video or audio packets number `first` to `last`."""
    data = bytearray(make_video(path, 5, 25, gop=25, **film).read_bytes())
    for pos, size in packets_of(path, kind)[first:last + 1]:
        data[pos:pos + size] = b"\xff" * size
    path.write_bytes(data)


def cut(path):
    """Write the first half of a film of 6 s."""
    index_in_front = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    make_video(path, 6, 25, codec="mpeg4", audio_codec="ac3", rate=48000, muxer=index_in_front)
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def without_keyframe(path):
    """Write a film of 6 s without its first 5 pictures."""
    make_video(path, 6, 25, rate=48000)
    path.write_bytes(path.read_bytes()[packets_of(path)[5][0] // 188 * 188:])


def in_two_parts(path):
    """Write a film whose edit list shows two parts of it, by changing one of a late film."""
    data = bytearray(make_video(path, 5, 25, start=1).read_bytes())
    at = data.index(b"elst") + 16           # the first of two entries says: show nothing for 1 s
    assert data[at:at + 4] == b"\xff" * 4
    data[at:at + 4] = (3000).to_bytes(4)
    path.write_bytes(data)


JOINED = "time stamps go from .* to .* as in joined recordings"
DAMAGED = r"damaged frames \(first at {0}|damaged at {0}"


@pytest.mark.parametrize("name,make,words,fine,bad", [
    # Pictures that do not decode spoil the others up to the next keyframe.
    ("a.mp4", partial(damaged, first=40, last=45), DAMAGED.format(r"1\."), (0.2, 2, 3.3),
     (1.4, 1.7)),
    ("a.mp4", partial(damaged, first=3, last=3, kind="audio"), "sound.*damaged|damaged at 0", (1,),
     (0,)),
    ("a.mp4", partial(damaged, first=60, last=60, kind="audio"), "sound.*damaged|damaged at 1",
     (0, 1.5), (1.2,)),
    ("a.mp4", cut, "ends? at|too early", (1,), (4,)),
    ("a.mkv", cut, "ends? at|too early", (1,), (4,)),
    # The stamps begin anew or jump where two files were joined.
    ("a.ts", partial(joined, start=0), JOINED, (0, 1), ()),
    ("a.ts", partial(joined, start=1000), JOINED, (0, 1), (2.7,)),
    ("a.mpg", partial(joined, codec="mpeg2video", sound="mp2", start=0), JOINED, (0, 1), ()),
    ("a.mkv", partial(joined, start=2), JOINED, (0, 1), (2.7,)),
    ("a.ts", partial(joined, size=(54, 72)), "its pictures change their shape", (0.4,), (2.9,)),
    ("a.ts", without_keyframe, "begin without a keyframe", (), (0, 1, 3)),
    ("a.mp4", in_two_parts, "edit list has several parts", (), (0, 1)),
    ("a.h264", lambda path: make_video(path, 2, 25, tone=None), "no time stamps", (), (0,))])
def test_refused(tmp_path, name, make, words, fine, bad):
    """The scan and the transcoder refuse the file. So does the reader, for clips of 0.48 s which
    begin at the times `bad`, but those of the times `fine` are right."""
    path = tmp_path / name
    make(path)
    # Without --verify the scan looks at the beginning, and at all stamps of JOINABLE files.
    is_seen_at_once = not fine or words == JOINED and path.suffix != ".mkv"
    for verify in {True, not is_seen_at_once}:
        row = scan.probe((path, "c", ""), verify)
        assert re.search(words, row["reason"] + row["note"])
    has_sound, of_sound = path.suffix != ".h264", "sound" in words
    with pytest.raises(ValueError, match=words):
        with_copy(path, sound=has_sound)
    if words == JOINED:
        with pytest.raises(ValueError, match=words):
            read_sound(path)
        for t0 in (1.8, 2.7):
            with suppress(ValueError):                    # what comes out is of one part
                assert (np.diff(shown(path, t0 + np.arange(12) / 25, sound=True)) >= 0).all()
    for t0 in fine:
        for sound in (False, True):
            seen = shown(path, t0 + np.arange(12) / 25, sound)
            assert abs(seen - 25 * t0 - np.arange(12)).max() <= 1, t0
    for t0 in bad:
        for sound in {has_sound, of_sound}:
            with pytest.raises(ValueError, match=words):
                shown(path, t0 + np.arange(12) / 25, sound)


@pytest.mark.slow
@pytest.mark.parametrize("suffix,codec,sound", [
    ("ts", "libx264", "aac"), ("mpg", "mpeg2video", "mp2"), ("flv", "libx264", "aac"),
    ("avi", "mpeg4", "libmp3lame"), ("asf", "wmv2", "libmp3lame"), ("mp4", "libvpx-vp9", None)])
def test_files_that_end_within_a_packet(tmp_path, suffix, codec, sound):
    """Recordings end anywhere. The last whole picture is the end of the film and of its copy."""
    path = tmp_path / f"a.{suffix}"
    fragments = {"movflags": "empty_moov", "frag_duration": "200000"}
    make_video(path, 4, 25, codec=codec, audio_codec=sound, rate=48000, tone=sound and 400,
               muxer=fragments if suffix == "mp4" else {})
    data, whole, (_, _, begins) = path.read_bytes(), pictures_of(path), frames.truth(path)
    size, pos = max((size, pos) for pos, size in packets_of(path) if 0.6 < pos / len(data) < 0.9)
    length = pos + size * 2 // 3
    path.write_bytes(data[:length // 188 * 188 if suffix == "ts" else length])
    pictures = pictures_of(path)
    times = np.array([t for t, image in sorted(pictures.items()) if (image == whole[t]).all()])
    numbers = np.array([frames.read_barcode(whole[t]) for t in times])
    assert len(times) >= len(pictures) - 1
    for source in with_copy(path, sound=sound is not None):
        usable(source)
        assert frames.ask(source, times, numbers, begins) == 0
    last = times[-1] - begins[0] - 0.2
    assert shown(path, last + np.arange(12) / 25)[-1] == numbers[-1]


@pytest.mark.parametrize("tone", [None, 400])
def test_the_only_picture_is_damaged(tmp_path, tone):
    """A sentence, which training understands, and no other error."""
    path = make_video(tmp_path / "a.mkv", 0.1, 10, codec="libvpx", tone=tone, sound_seconds=1)
    (pos, size), = packets_of(path)
    data = bytearray(path.read_bytes())
    data[pos + size // 8:pos + size] = b"\xff" * (size - size // 8)
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged at 0.00 s"):
        shown(path, [0.0], tone is not None)


def pictures_of(path):
    """Return {time in s: (H, W, 3)} of all pictures that FFmpeg shows, damaged or not."""
    pictures = {}
    with av.open(str(path)) as container:
        for packet in container.demux(video=0):
            with suppress(av.error.FFmpegError):
                for frame in packet.decode():
                    pictures[frame.time] = frame.to_ndarray(format="rgb24")
    return pictures


def test_wmv3_packets_may_lack_a_last_zero_byte(tmp_path):
    with av.open(str(make_video(tmp_path / "a.mkv", 1, 25))) as container:
        packet = next(container.demux(video=0))
        longer = padded(packet)
        assert bytes(longer) == bytes(packet) + b"\0"
        for name in ("pts", "dts", "duration", "time_base", "is_keyframe", "stream_index"):
            assert getattr(longer, name) == getattr(packet, name), name


@pytest.mark.parametrize("name", ["take-12:30.mp4", "concat:a|b.mp4", "-i.mp4", "%d.mp4"])
def test_a_name_is_no_address(tmp_path, monkeypatch, name):
    """FFmpeg takes what stands before a colon for a protocol. All functions read such a file."""
    monkeypatch.chdir(tmp_path)
    make_video(tmp_path / "film.mp4", 1, 25).rename(name)
    assert usable(name)["has_audio"] == 1
    assert shown(name, [0.6], sound=True).tolist() == [15]
    assert len(read_sound(name)[0]) > 0.9 * RATE
    transcode.encode(name, tmp_path / "copy.mp4", SIDE, 15, sound=True)


# ---- where pictures and sound begin and end

@pytest.mark.parametrize("suffix,codec,sound,seconds", [
    ("mp4", "libx264", "aac", 2), ("mkv", "libx264", "aac", 2), ("flv", "libx264", "aac", 2),
    ("ts", "libx264", "aac", 2), ("avi", "mpeg4", "libmp3lame", 2), ("wmv", "wmv2", "wmav2", 2),
    ("webm", "libvpx", "libopus", 4)])
def test_each_track_has_a_length_of_its_own(tmp_path, suffix, codec, sound, seconds):
    """Pictures of 4 s have 2 s in common with sound of 2 s. Some containers do not tell lengths;
    a live stream, here with sound of 4 s, tells none."""
    live = {"live": "1"} if seconds == 4 else {}
    path = make_video(tmp_path / f"a.{suffix}", 4, 25, codec=codec, audio_codec=sound, muxer=live,
                      rate=44100 if suffix in ("flv", "wmv") else 48000, bit_rate=64000,
                      sound_seconds=seconds)
    with av.open(str(path)) as container:
        assert container.duration is None or not live
    for verify in (False, True):
        row = usable(path, verify)
        assert abs(row["duration"] - seconds) < 0.1 and abs(row["video_duration"] - 4) < 0.1, row
    assert not live or shown(path, [2.0, 2.04, 3.0], sound=True).tolist() == [50, 51, 75]


@pytest.mark.parametrize("codec,cut", [("libx264", 0.213), ("libx264", 1.733), ("mpeg4", 0.52)])
def test_a_cut_without_encoding_keeps_sight_and_sound_together(tmp_path, codec, cut):
    """The edit list of an mp4 hides what comes before time 0, here of pictures between two
    keyframes. The sound begins at 2 s of the whole film."""
    path = make_video(tmp_path / "a.mp4", 5, 25, codec=codec, gop=25, start=-cut,
                      time_base=Fraction(1, 1000), ticks=list(range(0, 5000, 40)),
                      wave=lambda t: 0.5 * np.sin(2 * np.pi * 1000 * t) * (t >= 2))
    assert abs(usable(path)["duration"] - (5 - cut)) < 0.06
    for source in with_copy(path):
        for t0, sound in itertools.product((0, 0.61, 2.91), (False, True)):
            expected = np.maximum(np.round(25 * (t0 + cut) + np.arange(5)), np.ceil(25 * cut))
            assert shown(source, t0 + np.arange(5) / 25, sound).tolist() == expected.tolist()
        _, wave = read(source, [0.1], 2 * RATE, SIDE)
        assert abs(0.1 + np.argmax(abs(wave) > 0.2) / RATE - (2 - cut)) < 0.005, source


# ---- sound

@pytest.mark.parametrize("suffix,codec,rate,bits,lead", [
    ("mp4", "libmp3lame", 24000, 8000, 1.0), ("3gp", "libopencore_amrnb", 8000, 4750, 1.0),
    ("mov", "pcm_s16le", 24000, None, 0.2), ("mp4", "flac", 24000, None, 0.2)])
def test_the_sound_of_a_clip_is_that_of_the_whole_decode(tmp_path, suffix, codec, rate, bits, lead):
    path = make_video(tmp_path / f"a.{suffix}", 6, 25, audio_codec=codec, rate=rate, bit_rate=bits,
                      wave=lambda t: np.random.default_rng(0).normal(0, 0.2, len(t)))
    with open_file(path) as container:
        assert lead_in(open_streams(container)[1]) == lead
    whole, _ = read_sound(path)
    for t0 in np.random.default_rng(1).integers(1000, 4500, 8) / 1000:
        _, wave = read(path, [t0], RATE, SIDE)
        error = wave - whole[round(t0 * RATE):][:RATE]
        assert np.sqrt((error ** 2).mean()) < 1e-3 * np.sqrt((wave ** 2).mean()), t0


@pytest.mark.parametrize("layout", ["stereo", "5.1"])
def test_mono_is_the_mean_of_the_channels(tmp_path, layout):
    """Each channel has a tone of its own, which comes out with its share of the loudness."""
    many = av.AudioLayout(layout).nb_channels
    tones = 300 + 200 * np.arange(many)
    path = make_video(tmp_path / "a.mkv", 3, 10, codec="ffv1", audio_codec="pcm_s16le", rate=48000,
                      layout=layout, wave=lambda t: 0.9 * np.sin(2 * np.pi * tones[:, None] * t))
    for wave in (read_sound(path)[0], read(path, [0.5], 48000)[1]):
        part = wave[6000:30000]                                             # 1 s
        heard = 2 * abs(np.fft.rfft(part))[tones] / len(part)
        assert abs(heard * many - 0.9).max() < 0.002 * many, heard


@pytest.mark.parametrize("suffix,codec,rate", [
    ("webm", "libvpx", 48000), ("mkv", "libx264", 12000), ("mp4", "libx264", 24000)])
def test_opus_begins_and_ends_where_it_did(tmp_path, suffix, codec, rate):
    path = make_video(tmp_path / f"a.{suffix}", 2, 25, codec=codec, audio_codec="libopus",
                      rate=rate, wave=lambda t: 0.5 * np.sin(2 * np.pi * 1000 * t) * (t >= 1))
    wave, _ = read_sound(path)
    assert len(wave) == 2 * RATE and abs(np.argmax(abs(wave) > 0.2) / RATE - 1) < 0.003
    for source in with_copy(path):
        with open_file(source) as container:
            video, audio = open_streams(container)
            late = begin(audio) - begin(video)
        _, wave = read(source, [0], 2 * RATE, SIDE)
        assert abs(late + np.argmax(abs(wave) > 0.2) / RATE - 1) < 0.003, source


def test_sound_whose_first_frames_have_no_stamp_is_placed_by_the_next(tmp_path):
    path = make_video(tmp_path / "a.mkv", 2, 25, audio_codec="pcm_s16le")
    results = []
    for unstamped in (0, 3):
        with open_file(path) as container:
            audio = container.streams.audio[0]
            packets = list(container.demux(audio))
            for packet in packets[:unstamped]:
                packet.pts = None
            places, waves = zip(*place_sound(audio, packets, Damage()))
            results.append((places[0], np.concatenate(waves)))
    (place, wave), (other_place, other_wave) = results
    assert abs(place - other_place) < RATE / 1000         # the clock of an mkv ticks in ms
    assert (wave == other_wave).all()


@pytest.mark.slow
def test_sound_never_decides_about_pictures(tmp_path):
    """All pictures of films are kept whose sound is short, damaged or has no decoder."""
    root = tmp_path / "r" / "c"
    make_video(root / "short.mp4", 5, 25, sound_seconds=1)
    data = make_video(root / "no_decoder.mkv", 5, 25).read_bytes()
    (root / "no_decoder.mkv").write_bytes(data.replace(b"A_AAC", b"A_ZZZ"))
    damaged(root / "damaged.mp4", 100, 100, "audio")
    scan.write(scan.scan(tmp_path / "r", verify=True), tmp_path / "m.csv")
    transcode.run(tmp_path / "m.csv", tmp_path / "copy", SIDE)
    for manifest in (tmp_path / "m.csv", tmp_path / "copy" / "manifest.csv"):
        rows, left_out = read_manifest(manifest)
        notes = {Path(row.path).stem: row.note for row in rows}
        assert not left_out and notes["short"] == ""
        assert notes["no_decoder"] == "no decoder for its sound"
        assert notes["damaged"].startswith("its sound cannot be read: damaged frames (first at 2.")
        for row in rows:
            assert abs(row.video_duration - 5) < 0.05
            assert shown(row.path, [4.6, 4.8]).tolist() == [115, 120]
