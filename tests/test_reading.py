"""Checks that the right pictures and sound come out of every container.

Most films here show the number of each frame as a barcode. `experiments/frames.py` has a matrix of
50 kinds of films; the other tests make odd and damaged files.
"""

import os
import re
import struct
from fractions import Fraction
from itertools import zip_longest
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import make_video, peak_hz, read_barcode

from data import ActionClips, AudioVisualClips, read_clip, read_manifest
from experiments import frames
from prepare import scan, transcode
from support.reading import (EXACT, RATE, Damage, begin, lead_in, open_file, open_streams, padded,
                             place_sound, read, read_sound)

SHORT_SIDE = 48
STORE_NO_DELAY = {".avi", ".3gp"}     # these do not store the delay of the sound encoder


def shown(path, times, sound=False):
    """Return the numbers of the frames that the reader gives for the times."""
    return frames.read_barcode(frames.ours(path, times, sound))


def scanned(path, verify=True):
    return scan.probe((path, "c", ""), verify)


def usable(path, verify=True):
    """Return the row of a file in which the scan finds no fault."""
    row = scanned(path, verify)
    assert (row["reason"], row["note"]) == ("", ""), row
    return row


def with_copy(path, short_side=SHORT_SIDE, sound=True):
    """Transcode a film, and return the paths of the film and of its copy."""
    copy = path.with_name("copy.mp4")
    transcode.encode(path, copy, short_side, 15, sound)
    return path, copy


def all_right(path, times, numbers, begins):
    """Assert that the reader gives the right frames of a film at random places."""
    found = frames.ask(path, times, numbers, begins)
    assert found == (0, frames.PLACES * frames.FRAMES)


@pytest.mark.slow
@pytest.mark.parametrize("film", frames.FILMS, ids=lambda film: film.name)
def test_matrix(film, tmp_path):
    """The film and its transcoded copy pass --verify. All 240 frames and all beeps are right."""
    priority = os.sched_getscheduler(0), os.sched_getparam(0)
    path = frames.make(film, tmp_path)
    assert (os.sched_getscheduler(0), os.sched_getparam(0)) == priority
    times, numbers, begins = frames.truth(path)
    count = len(film.ticks or range(round(frames.SECONDS * film.fps)))
    assert numbers.tolist() == list(range(count))
    row = usable(path)
    assert row["has_audio"] == int(film.sound is not None)
    assert abs(row["video_duration"] + begins[0] - times[-1]) < 0.25
    _, copy = with_copy(path, sound=film.sound is not None)
    usable(copy)
    for source in (path, copy):
        all_right(source, times, numbers, begins)
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


def joined(path, codec="libx264", sound="aac", seconds=3, start=3.0, first={}, **second):
    """Write two films one after the other into one file, whose format or stamps then change."""
    film, data = dict(codec=codec, audio_codec=sound), b""
    for settings in (first, {"start": start} | second):
        part = make_video(path.with_name("part" + path.suffix), seconds, 25, **film | settings)
        data += part.read_bytes()
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("rate,layout", [(48000, "mono"), (44100, "stereo"), (32000, "stereo")])
def test_sound_may_change_its_format(tmp_path, rate, layout):
    path = joined(tmp_path / "a.ts", first={"tone": 600}, tone=600, rate=rate, layout=layout)
    row = usable(path)
    assert row["has_audio"] == 1 and abs(row["duration"] - 6) < 0.2
    for source in with_copy(path):
        for t0 in (0.5, 2.5, 4.2):
            _, wave = read(source, [t0], RATE, SHORT_SIDE)
            for part in np.split(wave, 4):
                assert abs(peak_hz(part) - 600) < 8 and part.std() > 0.25, (source, t0)


def test_pictures_of_another_shape_are_named(tmp_path):
    path = joined(tmp_path / "a.ts", size=(54, 72))
    assert scanned(path)["reason"] == "cannot be read to the end: its pictures change their shape"
    video, _ = read_clip(path, 0.4, (1,), (1,), 10, 25, 54)
    assert read_barcode(video)[0].tolist() == list(range(10, 20))
    with pytest.raises(ValueError, match="a.ts: its pictures change their shape"):
        read_clip(path, 2.5, (1,), (1,), 25, 25, 54)
    larger_but_of_the_same_shape = joined(path, size=(144, 108))
    assert usable(larger_but_of_the_same_shape)
    assert read_clip(path, 2.5, (1,), (1,), 25, 25, 54)[0].shape == (1, 25, 54, 72, 3)


# ---- values

def film_of(path, frame, codec="ffv1", turned=(0, False, False), exif=0, **settings):
    """Write a film that shows a frame 3 times, at 0, 0.1 and 0.2 s, and return its path.

    turned: the display matrix: degrees counter-clockwise, horizontal and vertical flip. exif: the
    number of a turn, which cameras write into each picture of motion JPEG. settings: of the codec.
    """
    tags = struct.pack("<2sHIHHHIII", b"II", 42, 8, 1, 0x112, 3, 1, exif, 0)
    exif_data = b"\xff\xe1" + struct.pack(">H", len(tags) + 8) + b"Exif\0\0" + tags
    with av.open(str(path), "w") as out:
        video = out.add_stream(codec, rate=10, width=frame.width, height=frame.height,
                               pix_fmt=frame.format.name, options=settings.pop("options", {}))
        degrees, *flips = turned
        if any(turned):
            video.set_display_rotation(degrees, *flips)
        for name, value in settings.items():
            for owner in (video.codec_context, frame):
                if hasattr(owner, name):
                    setattr(owner, name, value)
        for n in range(3):
            frame.pts = n
            for packet in video.encode(frame):
                if exif:
                    data = av.Packet(bytes(packet)[:2] + exif_data + bytes(packet)[2:])
                    data.stream, data.time_base, data.is_keyframe = video, packet.time_base, True
                    data.pts = data.dts = packet.pts
                    packet = data
                out.mux(packet)
        out.mux(video.encode(None))
    return path


def frame_of(planes, pixels="yuv420p"):
    """Return a frame with the given arrays as its first planes. The others are 128: no colour."""
    frame = av.VideoFrame(*planes[0].shape[::-1], pixels)
    for plane, array in zip_longest(frame.planes, planes, fillvalue=np.uint8(128)):
        rows = np.frombuffer(plane, array.dtype).reshape(plane.height, -1)
        rows[:, :plane.width] = array
    return frame


@pytest.mark.parametrize("suffix", ["mp4", "avi", "mov", "mkv"])
@pytest.mark.parametrize("exif,turned,expected", [
    (1, (0, False, False), "abcd"), (2, (0, True, False), "badc"), (3, (180, False, False), "dcba"),
    (4, (0, False, True), "cdab"), (5, (90, False, True), "acbd"), (6, (-90, False, False), "cadb"),
    (7, (90, True, False), "dbca"), (8, (90, False, False), "bdac")])
def test_pictures_as_a_player_shows_them(tmp_path, suffix, exif, turned, expected):
    """A file asks for eight turns and mirror images by a display matrix, here in mp4, or by EXIF.

    The transcoded copy is turned already. The letters name the four corners: top left, top right,
    bottom left, bottom right.
    """
    path, levels = tmp_path / f"a.{suffix}", dict(zip("abcd", (20, 90, 160, 230)))
    corners = np.array([*levels.values()], np.uint8).reshape(2, 2)
    image = np.tile(corners.repeat(32, 0).repeat(48, 1)[..., None], 3)
    frame = av.VideoFrame.from_ndarray(image, "rgb24")
    if suffix == "mp4":
        film_of(path, frame.reformat(format="yuv420p"), "libx264", turned)
    else:
        film_of(path, frame.reformat(format="yuvj420p"), "mjpeg", exif=exif)
    usable(path)
    for source in with_copy(path, 64, sound=False):
        (image,), _ = read(source, [0.1], 0, 64)
        H, W = image.shape[:2]
        assert (H, W) == ((64, 96) if exif < 5 else (96, 64))
        values = image[H // 4::H // 2, W // 4::W // 2].mean(-1).flatten()
        letters = [min(levels, key=lambda c: abs(levels[c] - value)) for value in values]
        assert "".join(letters) == expected, source


def rgb(y, cb, cr, matrix, full):
    """Return the colour of 8-bit Y, Cb, Cr by BT.601 (5), BT.709 (1) or BT.2020 (9)."""
    red, blue = {5: (0.299, 0.114), 1: (0.2126, 0.0722), 9: (0.2627, 0.0593)}[matrix]
    y, cb, cr = ((y / 255, (cb - 128) / 255, (cr - 128) / 255) if full else
                 ((y - 16) / 219, (cb - 128) / 224, (cr - 128) / 224))
    r, b = y + 2 * (1 - red) * cr, y + 2 * (1 - blue) * cb
    return np.clip(255 * np.array([r, (y - red * r - blue * b) / (1 - red - blue), b]), 0, 255)


def check_colours(path, colours, short_sides, tolerance):
    """Assert that a film and its copy show the four colours, (4, 3), in their quarters."""
    for source in with_copy(path, sound=False):
        for short_side in short_sides:
            (image,), _ = read(source, [0.1], 0, short_side)
            H, W = image.shape[:2]
            found = image[H // 4::H // 2, W // 4::W // 2][:2, :2].reshape(4, 3)
            assert abs(found - colours).max() <= tolerance, (source, short_side)


COLOURS = [(60, 90, 200), (200, 60, 110), (126, 128, 128), (235, 128, 128)]     # Y, Cb, Cr


@pytest.mark.parametrize("pixels,matrix,full", [
    ("yuv420p", 5, False), ("yuv420p", 1, False), ("yuv420p", 9, False), ("yuv420p", 1, True),
    ("yuv422p", 5, False), ("yuv444p", 1, False), ("yuv410p", 5, False), ("yuv420p10le", 1, False),
    ("yuv422p10le", 9, False), ("gray", 5, False), ("gray", 5, True), ("gray10le", 5, False)])
def test_colours_at_every_size(tmp_path, pixels, matrix, full):
    """Four colours come out at even and odd sizes, the file's own and larger ones."""
    colours = [rgb(y, *((128, 128) if pixels.startswith("gray") else chroma), matrix, full)
               for y, *chroma in COLOURS]
    for size in ((160, 96), (75, 51)):
        blank, planes = av.VideoFrame(*size, pixels), []
        bits = blank.format.components[0].bits
        for n, plane in enumerate(blank.planes):
            values = np.reshape([colour[n] << (bits - 8) for colour in COLOURS], (2, 2))
            grid = np.ix_(*(np.arange(side) * 2 // side for side in (plane.height, plane.width)))
            planes.append(values[grid].astype(np.uint8 if bits == 8 else np.uint16))
        path = film_of(tmp_path / f"{size[0]}.mkv", frame_of(planes, pixels), colorspace=matrix,
                       color_range=2 if full else 1)
        check_colours(path, colours, (20, 33, 47, 48, 51, 96, 131), tolerance=1)


@pytest.mark.parametrize("name,codec,pixels", [
    ("a.mov", "png", "rgb24"), ("a.avi", "rawvideo", "bgr24"), ("a.mkv", "ffv1", "bgr0"),
    ("a.mkv", "libx264rgb", "rgb24"), ("a.mkv", "ffv1", "gbrp10le"), ("a.avi", "rawvideo", "pal8"),
    ("a.nut", "rawvideo", "nv12")])
def test_colours_that_are_not_stored_as_planes_of_yuv(tmp_path, name, codec, pixels):
    colours = np.array([(200, 30, 60), (20, 180, 240), (128, 128, 128), (255, 255, 255)], np.uint8)
    number = (np.arange(96)[:, None] // 48 * 2 + np.arange(160) // 80).astype(np.uint8)
    palette = np.full((256, 4), 255, np.uint8)
    palette[:4, 1:] = colours
    if pixels == "pal8":
        frame = av.VideoFrame.from_ndarray((number, palette), "pal8")
    else:
        frame = av.VideoFrame.from_ndarray(colours[number], "rgb24").reformat(format=pixels)
    film_of(tmp_path / name, frame, codec, options={"crf": "0"} if codec == "libx264rgb" else {})
    # The copy is made of YUV, which is rounded.
    check_colours(tmp_path / name, colours.astype(int), (33, 48, 96, 131), tolerance=2)


def texture(height, width, period):
    """Return a frame of smooth waves in all directions, in 4:2:0."""
    planes = []
    for n, step in enumerate((1, 2, 2)):
        y, x = step * np.mgrid[:-(-height // step), :-(-width // step)]
        wave = np.sin(2 * np.pi * x / period + n) + np.sin(2 * np.pi * (x + 2 * y) / period / 2)
        planes.append((128 + (30, 15, 15)[n] * wave).round().astype(np.uint8))
    return frame_of(planes)


def test_stripes_of_colour_stay_sharp(tmp_path):
    """Red stripes of 8 pixels, 32 apart, at a quarter of the size: each is 2 of 8 pixels."""
    cr = np.where(np.arange(320) % 16 < 4, 240, 128).astype(np.uint8)
    planes = [np.full(shape, value, np.uint8) for shape, value in (((360, 640), 120),
                                                                   ((180, 320), 128))]
    path = film_of(tmp_path / "a.mkv", frame_of([*planes, np.tile(cr, (180, 1))]), color_range=1)
    for source, tolerance in zip(with_copy(path, 360, sound=False), (6, 40)):
        # H.264 has the chroma half a pixel of the film to the left, an eighth of a pixel here.
        (image,), _ = read(source, [0.1], 0, 90)
        redness = (image[40, 16:32, 0].astype(int) - image[40, 16:32, 1]).tolist()
        assert redness == pytest.approx([225, 225, 0, 0, 0, 0, 0, 0] * 2, abs=tolerance), source


def test_the_file_says_where_the_chroma_lies(tmp_path):
    """The pictures are those of FFmpeg's conversion of the whole frame, which knows the place."""
    path = film_of(tmp_path / "a.mp4", texture(96, 144, 24), "libx264")
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        expected = frame.reformat(72, 48, "rgb24", interpolation=EXACT).to_ndarray().astype(int)
    (image,), _ = read(path, [0], 0, 48)
    assert abs(image - expected).max() <= 1


def test_a_copy_looks_like_its_original(tmp_path):
    """Their pictures differ by less than a level on average, at even and odd sizes."""
    path = film_of(tmp_path / "a.mkv", texture(320, 480, 200), color_range=1)
    path, copy = with_copy(path, 160, sound=False)
    for short_side in range(120, 161, 5):
        (one,), (two,) = (read(source, [0.1], 0, short_side)[0] for source in (path, copy))
        apart = (one.astype(int) - two).mean((0, 1))
        assert one.shape == two.shape and abs(apart).max() < 1, short_side


@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
def test_a_window_is_cut_from_the_picture(tmp_path, degrees):
    """A window shows what is cut out of the whole picture of the same scale. The edges of a window
    are rounded to whole samples of chroma, which are 2 pixels of the file here."""
    path = film_of(tmp_path / "a.mov", texture(96, 144, 48), "mpeg4", (degrees, False, False),
                   bit_rate=20_000_000)
    rng = np.random.default_rng(0)
    for scale in (Fraction(1, 2), Fraction(2, 3), Fraction(1), Fraction(3, 2)):
        (whole,), _ = read(path, [0.1], 0, int(96 * scale))
        H, W = (144, 96) if degrees in (90, -90) else (96, 144)
        assert whole.shape == (H * scale, W * scale, 3)
        for _ in range(10):
            box = [6 * int(n) for n in rng.integers((0, 0, 3, 3), (9, 9, 8, 8))]
            x, y, wide, high = (int(n * scale) for n in box)
            (found,), _ = read(path, [0.1], 0, (high, wide), lambda W, H: box)
            apart = abs(found.astype(int) - whole[y:y + high, x:x + wide])
            assert apart[2:-2, 2:-2].max() <= 1 and apart.max() <= 16, scale
            nearby = np.add(box, (0.4, -0.3, 0.3, -0.4))
            (again,), _ = read(path, [0.1], 0, (high, wide), lambda W, H: nearby)
            assert (again == found).all()


def test_windows_at_the_edges_and_of_any_size(tmp_path):
    """The shape asked for comes out, whatever the window is, and nothing beyond the picture."""
    frame = frame_of([np.full((51, 75), 235, np.uint8)])
    path = film_of(tmp_path / "a.mkv", frame, color_range=1)
    for box in ((0, 0, 75, 51), (74.5, 50.5, 0.5, 0.5), (0, 0, 1e-3, 1e-3), (0, 50.9, 75, 0.1),
                (11.1, 0, 40, 51), (-1e-9, 0, 75 + 2e-9, 51)):
        (image,), _ = read(path, [0.1], 0, (17, 30), lambda W, H: box)
        assert image.shape == (17, 30, 3) and image.min() >= 254, box


@pytest.mark.parametrize("degrees", [0, 90])
@pytest.mark.parametrize("pixel", [Fraction(64, 45), Fraction(8, 9)])
def test_pixels_that_are_not_square(tmp_path, degrees, pixel):
    """A player stretches them, so that a circle is one. The copy has square pixels."""
    y, x = np.mgrid[:144, :180]
    disc = ((x - 90) * float(pixel)) ** 2 + (y - 72) ** 2 < 50 ** 2
    frame = frame_of([np.where(disc, 235, 16).astype(np.uint8)])
    path = film_of(tmp_path / "a.mp4", frame, "libx264", (degrees, False, False),
                   sample_aspect_ratio=pixel)
    wide = round(180 * pixel)
    short, long = sorted((wide, 144))
    for source in with_copy(path, 72, sound=False):
        (image,), _ = read(source, [0.1], 0, 72)
        H, W = image.shape[1::-1] if degrees else image.shape[:2]
        assert (min(H, W), W > H) == (72, wide > 144) and abs(max(H, W) - 72 * long / short) <= 1
        light = image[..., 0] > 127
        across, down = (light.any(axis).sum() for axis in (0, 1))
        assert abs(across - 72 * 100 / short) <= 2 and abs(down - 72 * 100 / short) <= 2
        window = lambda W, H: (W / 2 - 25, H / 2 - 35, 50, 70)          # noqa: E731
        (part,), _ = read(path, [0.1], 0, (40, 30), window)
        assert part.min() > 200
    with av.open(str(source)) as copy:
        assert copy.streams.video[0].sample_aspect_ratio in (None, 1)


@pytest.mark.parametrize("layout", ["mono", "stereo", "2.1", "quad", "5.1", "7.1"])
def test_mono_is_the_mean_of_the_channels(tmp_path, layout):
    """Each channel has a tone of its own, which comes out with its share of the loudness."""
    many = av.AudioLayout(layout).nb_channels
    tones = 300 + 200 * np.arange(many)
    path = make_video(tmp_path / "a.mkv", 3, 10, codec="ffv1", audio_codec="pcm_s16le", rate=48000,
                      layout=layout, wave=lambda t: 0.9 * np.sin(2 * np.pi * tones[:, None] * t))
    path, copy = with_copy(path)
    for wave, tolerance in ((read_sound(path)[0], 0.002), (read(path, [0.5], 48000, 48)[1], 0.002),
                            (read(copy, [0.5], 48000, 48)[1], 0.02)):
        part = wave[6000:30000]                                             # 1 s
        heard = 2 * abs(np.fft.rfft(part))[tones] / len(part)
        assert abs(heard * many - 0.9).max() < tolerance * many, (layout, heard)


# ---- damage

def packets_of(path, kind="video"):
    """Return the place and the size in the file, in bytes, of each packet of a stream."""
    with av.open(str(path)) as container:
        stream = container.streams.best(kind)
        return [(p.pos, p.size) for p in container.demux(stream) if p.size and p.pos]


def damage(path, first, last, kind="video"):
    """Overwrite the video or audio packets number `first` to `last` of a file."""
    data = bytearray(path.read_bytes())
    for pos, size in packets_of(path, kind)[first:last + 1]:
        data[pos:pos + size] = b"\xff" * size
    path.write_bytes(data)


def refused(path, words, *readers, verify=(False, True)):
    """Assert that the scan, the transcoder and the readers, functions of a path, refuse it."""
    for row in (scanned(path, to_the_end) for to_the_end in verify):
        assert re.search(words, row["reason"] + row["note"])
    for reader in (with_copy, *readers):
        with pytest.raises(ValueError, match=words):
            reader(path)


@pytest.mark.parametrize("kind,packet", [("video", 2), ("video", 40), ("audio", 3), ("audio", 60)])
def test_the_transcoder_sees_damage_from_the_first_packets_on(tmp_path, kind, packet):
    path = make_video(tmp_path / "a.mp4", 4, 25, gop=25)
    damage(path, packet, packet, kind)
    refused(path, "damaged frames|its sound is damaged", verify=[True])


def test_clips_with_damage_are_refused_and_the_others_are_right(tmp_path):
    path = make_video(tmp_path / "a.mp4", 8, 25, gop=25)
    damage(path, 80, 85)                                  # in the fourth second
    assert scanned(path, verify=False)["reason"] == ""
    assert scanned(path)["reason"].startswith("cannot be read to the end: damaged frames (first")
    refused(path, r"damaged frames \(first at 3\.", verify=[True])
    count = 0
    for t0 in np.arange(0, 7, 0.3):
        try:
            video, _ = read_clip(path, t0, (1,), (1,), 12, 25, SHORT_SIDE)
            seen = read_barcode(video)[0].numpy() / 25
            assert abs(seen - t0 - np.arange(12) / 25).max() <= 0.5 / 25 + 2e-3, t0
        except ValueError as error:
            assert "a.mp4: damaged at 3." in str(error) and 2.6 < t0 < 4, t0
            count += 1
    assert count in (3, 4, 5)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_file_that_was_cut_is_refused_past_its_end(tmp_path, suffix):
    index_in_front = {"movflags": "faststart"} if suffix == "mp4" else {}
    path = make_video(tmp_path / f"a.{suffix}", 6, 25, codec="mpeg4", audio_codec="ac3", rate=48000,
                      muxer=index_in_front)
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    assert scanned(path)["reason"].startswith("cannot be read to the end: ")
    video, _ = read_clip(path, 1, (1,), (1,), 12, 25, SHORT_SIDE)
    assert read_barcode(video)[0].tolist() == list(range(25, 37))
    for tau_a in ((), (1,)):
        with pytest.raises(ValueError, match=f"a.{suffix}: "):
            read_clip(path, 4, (1,), tau_a, 12, 25, SHORT_SIDE)


@pytest.mark.slow
@pytest.mark.parametrize("suffix,codec,sound", [
    ("ts", "libx264", "aac"), ("ts", "mpeg2video", "mp2"), ("mpg", "mpeg2video", "mp2"),
    ("flv", "libx264", "aac"), ("avi", "mpeg4", "libmp3lame"), ("avi", "libvpx", "pcm_s16le"),
    ("asf", "wmv2", "libmp3lame"), ("mp4", "libx264", None), ("mp4", "libvpx-vp9", None)])
def test_files_that_end_within_a_packet(tmp_path, suffix, codec, sound):
    """Recordings end anywhere. The last whole picture is the end of the film and of its copy."""
    path = tmp_path / f"a.{suffix}"
    fragments = {"movflags": "empty_moov", "frag_duration": "200000"}
    make_video(path, 4, 25, codec=codec, audio_codec=sound, rate=48000, tone=sound and 400,
               muxer=fragments if suffix == "mp4" else {})
    data, whole, (_, _, begins) = path.read_bytes(), pictures_of(path), frames.truth(path)
    late = [(size, pos) for pos, size in packets_of(path) if 0.6 < pos / len(data) < 0.9]
    for size, pos in sorted(late)[-3:]:
        length = pos + size * 2 // 3
        path.write_bytes(data[:length // 188 * 188 if suffix == "ts" else length])
        pictures = pictures_of(path)
        times = np.array([t for t, image in sorted(pictures.items()) if (image == whole[t]).all()])
        numbers = np.array([frames.read_barcode(whole[t]) for t in times])
        assert len(times) >= len(pictures) - 1
        for source in with_copy(path, sound=sound is not None):
            usable(source)
            all_right(source, times, numbers, begins)
        video, _ = read_clip(path, times[-1] - begins[0] - 0.2, (1,), (), 12, 25, SHORT_SIDE)
        assert read_barcode(video)[0, -1] == numbers[-1]


def pictures_of(path):
    """Return {time in s: (H, W, 3)} of all pictures that FFmpeg shows, damaged or not."""
    pictures = {}
    with av.open(str(path)) as container:
        for packet in container.demux(video=0):
            try:
                pictures |= {frame.time: frame.to_ndarray(format="rgb24")
                             for frame in packet.decode()}
            except av.error.FFmpegError:
                pass
    return pictures


def test_wmv3_packets_may_lack_a_last_zero_byte(tmp_path):
    """A zero byte is put behind each packet for the decoder. Nothing else may change."""
    path = make_video(tmp_path / "a.mkv", 2, 25, codec="mpeg4")
    with av.open(str(path)) as container, av.open(str(path)) as again:
        for packet, same in zip(container.demux(video=0), again.demux(video=0)):
            longer = padded(same) if same.size else same
            assert not same.size or bytes(longer) == bytes(packet) + b"\0"
            for name in ("pts", "dts", "duration", "time_base", "is_keyframe", "stream_index"):
                assert getattr(longer, name) == getattr(packet, name), name
            for one, two in zip(packet.decode(), longer.decode(), strict=True):
                assert (one.time, one.duration) == (two.time, two.duration)
                assert (one.to_ndarray() == two.to_ndarray()).all()


@pytest.mark.parametrize("name", [
    "take-12:30.mp4", "pipe:1.mp4", "file:a.mp4", "http:a.mp4", "concat:a|b.mp4", "-i.mp4",
    "%d.mp4", "a?b#c.mp4"])
def test_a_name_is_no_address(tmp_path, monkeypatch, name):
    """FFmpeg takes what stands before a colon for a protocol. All functions read such a file."""
    monkeypatch.chdir(tmp_path)
    make_video(tmp_path / "film.mp4", 2, 25).rename(name)
    for path in (name, Path(name)):
        assert scanned(path)["reason"] == "" and scanned(path)["has_audio"] == 1
        assert shown(path, [1.0], sound=True).tolist() == [25]
        assert len(read_sound(path)[0]) > 1.9 * RATE
        transcode.encode(path, tmp_path / "copy.mp4", SHORT_SIDE, 15, sound=True)


def test_pictures_without_time_stamps_are_refused(tmp_path):
    path = make_video(tmp_path / "a.h264", 2, 25, tone=None)
    with pytest.raises(ValueError, match="a.h264: its pictures have no time stamps"):
        read_clip(path, 0, (1,), (), 12, 25, SHORT_SIDE)


# ---- lengths

def test_a_slide_is_shown_until_the_next_one(tmp_path):
    ticks = [0, 50, 100, 150, *range(200, 256)]           # each of the first four frames lasts 5 s
    path = make_video(tmp_path / "a.mp4", 6, 10, tone=300, ticks=ticks)
    assert abs(usable(path)["video_duration"] - 25.6) < 0.01
    assert shown(path, [0, 2.4, 2.6, 7.6, 12.4, 19.9, 21]).tolist() == [0, 0, 1, 2, 2, 4, 14]


@pytest.mark.parametrize("suffix,codec,sound,seconds", [
    ("mp4", "libx264", "aac", 2), ("mkv", "libx264", "aac", 2), ("flv", "libx264", "aac", 2),
    ("ts", "libx264", "aac", 2), ("avi", "mpeg4", "libmp3lame", 2), ("flv", "flv", "libmp3lame", 2),
    ("webm", "libvpx", "libopus", 2), ("wmv", "wmv2", "wmav2", 2), ("mkv", "libx264", "aac", 6),
    ("webm", "libvpx", "libopus", 6)])
def test_each_track_has_a_length_of_its_own(tmp_path, suffix, codec, sound, seconds):
    """Pictures of 6 s have 2 s in common with sound of 2 s. Some containers do not tell lengths;
    a live stream, here with sound of 6 s, tells none."""
    live = {"live": "1"} if seconds == 6 else {}
    path = make_video(tmp_path / f"a.{suffix}", 6, 25, codec=codec, audio_codec=sound, muxer=live,
                      rate=44100 if suffix in ("flv", "wmv") else 48000, bit_rate=64000,
                      sound_seconds=seconds)
    with av.open(str(path)) as container:
        assert container.duration is None or not live
    for verify in (False, True):
        row = usable(path, verify)
        assert abs(row["duration"] - seconds) < 0.1 and abs(row["video_duration"] - 6) < 0.1, row
    assert not live or shown(path, [3.0, 3.04, 4.0], sound=True).tolist() == [75, 76, 100]


# ---- when streams begin, and whether their stamps run on

@pytest.mark.parametrize("suffix,codec,sound,start", [
    ("ts", "libx264", "aac", 0), ("ts", "libx264", "aac", 2), ("ts", "libx264", "aac", 1000),
    ("mpg", "mpeg2video", "mp2", 0), ("mpg", "mpeg2video", "mp2", 1000),
    ("mkv", "libx264", "aac", 0), ("mkv", "libx264", "aac", 2)])
def test_joined_parts_are_refused(tmp_path, suffix, codec, sound, start):
    """The stamps begin anew or jump where two files were joined. Only --verify looks so far in mkv,
    whose headers say that the file ends with the first part."""
    path = joined(tmp_path / f"a.{suffix}", codec, sound, 4, start, first={"rate": 48000},
                  rate=48000)
    refused(path, "time stamps go from .* to .* as in joined recordings", read_sound,
            verify=[True] if suffix == "mkv" else [True, False])
    for t0 in np.arange(0, 4, 0.5):       # a clip is of one part, or it is refused
        try:
            seen = shown(path, t0 + np.arange(12) / 25, sound=True)
        except ValueError:
            continue
        assert (np.diff(seen) >= 0).all(), t0


@pytest.mark.parametrize("codec,sound", [("libx264", "aac"), ("mpeg2video", "mp2")])
def test_a_stream_that_begins_without_a_keyframe_is_refused(tmp_path, codec, sound):
    path = make_video(tmp_path / "a.ts", 6, 25, codec=codec, audio_codec=sound, rate=48000, gop=12)
    path.write_bytes(path.read_bytes()[packets_of(path)[5][0] // 188 * 188:])
    refused(path, "begin without a keyframe",
            *(lambda path, t0=t0: read(path, [t0], RATE) for t0 in (0, 1, 3)))


def cut_by_edit_list(path, *parts):
    """Let the edit lists of an mp4 show only the parts (beginning, length) in s.

    That is what cutting without encoding does.
    """
    data, at = bytearray(path.read_bytes()), 0
    with av.open(str(path)) as container:
        scales = [stream.time_base.denominator for stream in container.streams]
    for scale in scales:
        at = data.index(b"elst", at) + 8                  # number of entries, and one entry:
        assert int.from_bytes(data[at:at + 4]) == 1       # length, media time, rate
        zero, rate = int.from_bytes(data[at + 8:at + 12]), data[at + 12:at + 16]
        data[at:at + 16] = len(parts).to_bytes(4) + b"".join(
            round(1000 * length).to_bytes(4) + (zero + round(first * scale)).to_bytes(4) + rate
            for first, length in parts)
        for box in (b"elst", b"edts", b"trak", b"moov"):
            start = data.rindex(box, 0, at) - 4           # the boxes around grow too
            size = int.from_bytes(data[start:start + 4]) + 12 * (len(parts) - 1)
            data[start:start + 4] = size.to_bytes(4)
    path.write_bytes(data)


def test_an_edit_list_cuts_off_the_beginning(tmp_path):
    """The edit list begins at 1.5 s, between two keyframes. Earlier frames are decoded, not shown.

    The length does not count them either.
    """
    path = make_video(tmp_path / "a.mp4", 5, 30, gop=30, tone=None)
    cut_by_edit_list(path, (1.5, 3.5))
    assert abs(usable(path)["video_duration"] - 3.5) < 0.05
    assert shown(path, [0, 0.1, 0.6, 3.4]).tolist() == [45, 48, 63, 147]
    assert shown(path, [2.0, 2.1]).tolist() == [105, 108]


@pytest.mark.parametrize("cut", [0.213, 0.5, 0.52, 0.733])
@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_a_cut_without_encoding_keeps_sight_and_sound_together(tmp_path, codec, cut):
    """The picture turns white when the sound begins, at 2 s. The cut is within a picture."""
    path = make_video(tmp_path / "a.mp4", 4, 25, codec=codec, gop=25, gray=lambda t: 235 * (t >= 2),
                      wave=lambda t: 0.5 * np.sin(2 * np.pi * 1000 * t) * (t >= 2))
    cut_by_edit_list(path, (cut, 4))
    assert abs(usable(path)["duration"] - (4 - cut)) < 0.06
    for source in with_copy(path):
        times = np.arange(0, 3, 0.002)
        for samples in (0, 3 * RATE):
            images, wave = read(source, times, samples, SHORT_SIDE)
            turns = times[np.argmax([image.mean() > 120 for image in images])]
            # The nearest picture turns white half a picture before the time stamp of the first one.
            assert abs(turns + 0.02 - (2 - cut)) < 0.005, (source, samples)
        assert abs(np.argmax(abs(wave) > 0.2) / RATE - (2 - cut)) < 0.005, source


def test_an_edit_list_of_several_parts(tmp_path):
    path = make_video(tmp_path / "a.mp4", 6, 25, gop=25)
    cut_by_edit_list(path, (0.213, 1), (2.213, 1))
    refused(path, "edit list has several parts", lambda path: read(path, [1], RATE))


@pytest.mark.parametrize("suffix,codec,rate,bits,lead", [
    ("mp4", "libmp3lame", 24000, 8000, 1.0), ("mp4", "libmp3lame", 24000, 64000, 1.0),
    ("3gp", "libopencore_amrnb", 8000, 4750, 1.0), ("3gp", "libopencore_amrnb", 8000, 12200, 1.0),
    ("mov", "pcm_s16le", 24000, None, 0.2), ("mp4", "flac", 24000, None, 0.2),
    ("mov", "alac", 24000, None, 0.2)])
def test_the_sound_of_a_clip_is_that_of_the_whole_decode(tmp_path, suffix, codec, rate, bits, lead):
    path = make_video(tmp_path / f"a.{suffix}", 6, 25, audio_codec=codec, rate=rate, bit_rate=bits,
                      wave=lambda t: np.random.default_rng(0).normal(0, 0.2, len(t)))
    with open_file(path) as container:
        assert lead_in(open_streams(container)[1]) == lead
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
    begins = []
    for source in with_copy(path):
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
            results.append(list(place_sound(audio, packets, Damage())))
    places, waves = ([[piece[n] for piece in result] for result in results] for n in (0, 1))
    assert np.allclose(*places, atol=RATE / 1000)         # the clock of an mkv ticks in ms
    assert (np.concatenate(waves[0]) == np.concatenate(waves[1])).all()


# ---- sound that cannot be used

def test_sound_never_decides_about_pictures(tmp_path):
    """Fine-tuning sees all pictures of films whose sound is short, damaged or has no decoder."""
    root, film = tmp_path / "r" / "c", dict(seconds=6, fps=25, gray=lambda t: int(20 + 35 * t))
    make_video(root / "short.mp4", sound_seconds=1, **film)
    data = make_video(root / "no_decoder.mkv", **film).read_bytes()
    (root / "no_decoder.mkv").write_bytes(data.replace(b"A_AAC", b"A_ZZZ"))
    damage(make_video(root / "damaged.mp4", **film), 100, 100, "audio")
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
