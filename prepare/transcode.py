"""A data set -> a smaller copy that decodes fast and keeps the time stamps.

    python -m prepare.transcode manifest.csv COPY --workers 16    # also writes COPY/manifest.csv

The copies are COPY/[split/]label/*.mp4 with small pictures, close keyframes and mono sound: to read
a random clip, a decoder must begin at the last keyframe, often 8 s earlier. The x264 tuning
"fastdecode" makes the rest about 1.4 times as fast for 6 % more bytes.

An interrupted run continues by the same command. docs/data.md says more.
"""

import argparse
import hashlib
import json
import os
import sys
from collections import Counter
from fractions import Fraction
from functools import partial
from heapq import merge
from itertools import chain
from math import ceil
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Colorspace
from tqdm import tqdm

from prepare.scan import READER, in_workers, probe, summary
from support.commands import at_least, errors_in_one_line
from support.reading import (RATE, UPRIGHT, Cutter, Damage, StampCheck, begin, bytes_of, demux, end,
                             in_order, open_file, open_streams, place_sound, upright)
from support.rows import read_rows, write_rows

PRIMING = 1024                          # samples that the AAC encoder puts before the first one
LIMIT = 24 * 3600                       # s that one film may take
H264 = {"preset": "veryfast", "tune": "fastdecode", "crf": "23", "flags": "+cgop", "threads": "1"}


# ---- one file

class SoundError(ValueError):
    """The pictures of a file can be transcoded, but its sound cannot."""


def shrink(video, pictures, ticks, short_side):
    """Turn (time stamp, frame) into frames for the encoder: small, yuv420p, as a player shows them.

    ticks: how much later the stamps shall be.
    """
    def view(W, H):
        """See Cutter. The sides of the copy are even, because yuv420p needs that."""
        scale = short_side / min(W, H)
        size = [max(2, min(2 * round(side * scale / 2), round(side) // 2 * 2))  # never enlarged
                for side in (W, H)]
        return (0, 0, W, H), size

    cut = Cutter(video, view)
    for stamp, frame in pictures:
        image = cut(frame, "yuv420p")
        if cut.matrix != UPRIGHT:
            image = turn(image, cut.matrix)
        image.pts, image.time_base = stamp + ticks, frame.time_base
        image.pict_type = 0                               # the encoder chooses its own keyframes
        yield image


def turn(image, matrix):
    """Turn and mirror a frame of yuv420p by the display matrix."""
    planes = [upright(bytes_of(plane)[:, :plane.width], matrix) for plane in image.planes]
    turned = av.VideoFrame(*planes[0].shape[::-1], "yuv420p")
    for plane, array in zip(turned.planes, planes):
        bytes_of(plane)[:, :plane.width] = array
    turned.colorspace, turned.color_range = image.colorspace, image.color_range
    return turned


def pictures(container, video):
    """Yield (time stamp, frame) of all pictures in the order of presentation.

    If the stream begins before its first picture, that picture comes twice, because the beginning
    of the stream is time 0 of its clips. Pictures that an edit list hides are left out. Raises
    ValueError if a picture is damaged or missing, or if the stamps do not run on.
    """
    tick = float(video.time_base)
    first = round(begin(video) / tick)
    damaged, last, stop = Damage(), None, begin(video)
    packets = map(StampCheck(video).check, demux(container, video))
    for stamp, frame in in_order(video, packets, damaged):
        if last is None:
            damaged.forget_before(frame.time)
            last = first - 1
        if frame.is_corrupt:
            damaged.append(frame.time)
        if damaged.inside():
            break
        if stamp > first > last and not frame.is_corrupt:
            yield first, frame
        if stamp > last and not frame.is_corrupt:         # an encoder takes each stamp once
            yield stamp, frame
        last, stop = max(last, stamp), (stamp + (frame.duration or 0)) * tick
    if damaged.inside():
        raise ValueError(f"damaged frames (first at {damaged.inside()[0]:.2f} s)")
    stated = end(container, video)
    if stated is not None and stop < stated - 1:
        raise ValueError(f"its pictures end at {stop:.2f} s, over 1 s before its header says")


def sound_pieces(container, audio, start):
    """Yield all sound as mono frames at 24 kHz without gaps, from the beginning of the stream on.

    start: the stamp of the first sample, in samples. Gaps become silence, and sound that comes
    twice is left out. Raises SoundError if a packet is damaged, or without stamps that run on.
    """
    # position: of the next piece, in samples
    damaged, position = Damage(), round(begin(audio) * RATE)
    shift = start - position
    try:
        packets = map(StampCheck(audio).check, demux(container, audio))
        for place, samples in place_sound(audio, packets, damaged):
            gap = round(place) - position
            if gap > 3600 * RATE:
                raise SoundError("its sound has a gap of over an hour")
            wave = np.concatenate([np.zeros(max(0, gap), np.float32), samples[max(0, -gap):]])
            if len(wave):
                piece = av.AudioFrame.from_ndarray(wave[None], "fltp", "mono")
                piece.sample_rate, piece.time_base = RATE, Fraction(1, RATE)
                piece.pts = position + shift
                yield piece
            position += len(wave)
    except ValueError as error:
        raise SoundError(str(error)) from error
    if damaged.inside():
        raise SoundError(f"its sound is damaged at {damaged.inside()[0]:.2f} s")


def ticks_later(video, audio):
    """Return how many ticks of the video stream the copy's stamps come later than the file's.

    An mp4 has no stamps below 0. Sound that begins above 0 must leave room for PRIMING.
    """
    tick, room = float(video.time_base), PRIMING / RATE
    ticks = max(0, ceil(-min(begin(stream) for stream in (video, audio) if stream) / tick))
    if audio and 0.5 / RATE < begin(audio) + ticks * tick < room:
        ticks += ceil(room / tick)
    return ticks


def encode(source, target, short_side, gop, sound):
    """Write source as target, an mp4 of H.264 and, with sound, AAC. Raises FFmpegError, OSError,
    ValueError, or SoundError if only the sound is at fault."""
    # The pictures and the sound are read from containers of their own, each in its own order.
    with open_file(source) as container, open_file(source) as sound_container:
        video, audio = open_streams(container, sound=False)
        if sound:
            _, audio = open_streams(sound_container)
        ticks = ticks_later(video, audio)
        frames = shrink(video, pictures(container, video), ticks, short_side)
        first = next(frames, None)
        if first is None:
            raise ValueError("no picture decodes")
        # The mp4 rounds the beginning of a track to its own clock, so this clock must be fine.
        scale = video.time_base.denominator
        scale *= -(-10000 // scale)
        clock = {"movie_timescale": str(scale)}
        with av.open(str(target), "w", format="mp4", options=clock) as out:
            x264 = out.add_stream("libx264", rate=video.average_rate or 30,
                                  options=H264 | {"g": str(gop)}, pix_fmt="yuv420p",
                                  width=first.width, height=first.height,
                                  time_base=video.time_base)
            x264.codec_context.colorspace = first.colorspace or Colorspace.ITU601   # 0: RGB
            x264.codec_context.color_range = first.color_range
            packets = [packets_of(x264, chain([first], frames))]
            if sound:
                aac = out.add_stream("aac", rate=RATE, layout="mono", bit_rate=64000)
                start = round((begin(audio) + ticks * float(video.time_base)) * RATE)
                packets.append(packets_of(aac, sound_pieces(sound_container, audio, start)))
            for packet in merge(*packets, key=lambda packet: packet.dts * float(packet.time_base)):
                out.mux(packet)
        if sound and start > 0:
            hide_priming(Path(target), start, scale)


def hide_priming(path, start, scale):
    """Hide what the AAC encoder puts before the first sample, in the edit list of a finished mp4.

    FFmpeg hides it only where the sound begins at 0. start: where the sound begins, in samples.
    scale: ticks in 1 s of the mp4's clock.
    """
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"elst") + 4                      # that of the sound, which is the last
    width = 8 if data[entry] else 4                       # bytes of a number, by the version
    empty, edit = entry + 8, entry + 8 + 2 * width + 4    # two entries: (length, media time)
    length = int.from_bytes(data[edit:edit + width]) - round(PRIMING / RATE * scale)
    for place, number in ((empty, round(start / RATE * scale)), (edit, length),
                          (edit + width, PRIMING)):
        data[place:place + width] = number.to_bytes(width)
    path.write_bytes(data)


def packets_of(stream, frames):
    """Yield the packets of the encoded frames."""
    for frame in chain(frames, [None]):                   # None: all that the encoder still holds
        yield from stream.encode(frame)


def copy_file(job, short_side, gop):
    """(manifest row, target) -> the copy's row and "done" or "skipped", or None and the cause."""
    row, target = job
    source, temporary = Path(row["path"]), target.with_name(f"{os.getpid()}.part")
    sound, note = row["has_audio"] == "1", row["note"]
    try:
        # The source may have gone.
        if target.exists() and not (source.exists()
                                    and source.stat().st_mtime > target.stat().st_mtime):
            copy = probe((target, row["label"], row["split"]))
            lost = sound and not copy["has_audio"]
            return copy | {"note": "its sound could not be transcoded" if lost else note}, "skipped"
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            encode(source, temporary, short_side, gop, sound)
        except SoundError as error:
            note = str(error)
            encode(source, temporary, short_side, gop, False)
        copy = probe((temporary, row["label"], row["split"]))
        if copy["reason"]:
            raise ValueError(f"its copy: {copy['reason']}")
        os.replace(temporary, target)
        return copy | {"path": str(target), "note": note}, "done"
    except (av.error.FFmpegError, OSError, ValueError, OverflowError) as error:
        if os.path.exists(temporary):
            temporary.unlink()
        return None, getattr(error, "strerror", None) or str(error)


# ---- all files

def plan(rows, out):
    """What to copy: [(row, path of the copy)] with the first row of each source, in their order.

    A copy is out/split/label/stem.mp4. If several sources would have the same, theirs get a hash of
    the source's path, so that the order of the sources does not matter. Raises ValueError if a copy
    would be outside of `out` or in the place of a source.
    """
    first, jobs = {}, []
    for row in rows:
        first.setdefault(row["path"], row)
    paths = {source: Path(os.path.normpath(out / row["split"] / row["label"]
                                           / f"{Path(source).stem}.mp4"))
             for source, row in first.items()}
    number, originals = Counter(paths.values()), set(map(os.path.realpath, first))
    for source, row in first.items():
        path = paths[source]
        if number[path] > 1:
            digest = hashlib.sha1(source.encode()).hexdigest()
            path = path.with_name(f"{path.stem}-{digest[:8]}.mp4")
        if out not in path.parents:
            raise ValueError(f"label {row['label']!r} of {source} leads out of {out}: "
                             "rename it in the manifest")
        if os.path.realpath(path) in originals:
            raise ValueError(f"the copy {path} would overwrite an original: "
                             "choose a folder outside of the data set")
        jobs.append((row, path))
    return jobs


def run(manifest, out, short_side=160, gop=15, workers=2):
    """Transcode the files of a manifest into the folder `out`. Returns a summary, one line.

    short_side: of the pictures in pixels, 16 or more. gop: frames from keyframe to keyframe, 1 or
    more. workers: processes, 1 or more. Raises ValueError if the manifest or the folder is not as
    it should be.
    """
    rows, out = read_rows(manifest), Path(out).resolve()
    jobs = plan([row for row in rows if not row["reason"]], out)
    if not jobs:
        raise ValueError(f"{manifest} has no usable row, each has a reason: look at its last "
                         "columns")
    if os.path.realpath(manifest) == str(out / "manifest.csv"):
        raise ValueError(f"the copy's manifest would overwrite {manifest}: "
                         f"choose another folder than {out}")
    settings = {"reader": READER, "short_side": short_side, "gop": gop}
    settings_file = out / "transcode.json"
    if settings_file.exists() and json.loads(settings_file.read_text()) != settings:
        raise ValueError(f"{out} was made with {settings_file.read_text()}, "
                         f"not {json.dumps(settings)}: choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    settings_file.write_text(json.dumps(settings))
    for temporary in out.rglob("*.part"):                 # a killed run leaves such files
        temporary.unlink(missing_ok=True)
    copies, states = {}, Counter()
    copy_one = partial(copy_file, short_side=short_side, gop=gop)
    for (row, _), result, failure in tqdm(in_workers(copy_one, jobs, workers, LIMIT),
                                          "transcoding", len(jobs), unit="file", file=sys.stderr):
        copy, state = result or (None, failure)
        if copy is None:
            copy, state = row | {"reason": f"cannot be transcoded: {state}"}, "failed"
            tqdm.write(f"{copy['path']}: {copy['reason']}", file=sys.stderr)
        copies[row["path"]] = copy
        states[state] += 1
    # Rows that were left out before stay as they were. The others are of the same part of the copy.
    part = "label", "split", "start", "end"
    rows = [row if row["reason"] else copies[row["path"]] | {name: row[name] for name in part}
            for row in rows]
    write_rows(rows, out / "manifest.csv")
    return (f"{states['done']} done, {states['skipped']} skipped (already there), "
            f"{states['failed']} failed; {summary(rows)}")


def main():
    """Run the command. An error becomes one line on stderr and exit status 1, Ctrl-C 130."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("manifest", help="of the originals, from python -m prepare.manifest")
    parser.add_argument("out", help="the folder of the copy")
    parser.add_argument("--short-side", type=at_least(16), default=160,
                        help="of the pictures, pixels (default 160)")
    parser.add_argument("--gop", type=at_least(1), default=15,
                        help="frames from keyframe to keyframe (default 15)")
    parser.add_argument("--workers", type=at_least(1), default=len(os.sched_getaffinity(0)),
                        help="processes (default: one per core)")
    args = parser.parse_args()
    with errors_in_one_line(": finished copies are kept, run the same command to go on"):
        print(f"{args.out}: {run(**vars(args))}")


if __name__ == "__main__":
    main()
