"""A data set -> a smaller copy that decodes fast: small pictures, close keyframes, mono sound, the same time stamps.

    python -m prepare.transcode manifest.csv COPY --workers 16        # COPY/[split/]label/*.mp4 and COPY/manifest.csv

A random clip costs mostly the way from the last keyframe, often 8 s back, through large pictures; the copy saves both,
and x264's fastdecode (no CABAC, no deblocking) makes the rest about 1.4 times as fast for 6 % more bytes.
Run the same command again after an interruption: what is finished stays. One run at a time per COPY. Pictures are
never enlarged here, but training enlarges them where it draws a short side above that of the copy.
"""

import argparse
import csv
import hashlib
import json
import os
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from fractions import Fraction
from functools import partial
from heapq import merge
from itertools import chain, starmap
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from tqdm import tqdm

from prepare.scan import COLUMNS, probe, write
from support.reading import (RATE, SEAM, UPRIGHT, MonoResampler, Shape, begin, decode, display_matrix,
                             end, forget_before, in_order, open_streams, upright)

H264 = {"preset": "veryfast", "tune": "fastdecode", "crf": "23", "flags": "+cgop", "threads": "1"}


class SoundError(ValueError):
    """The pictures of a file can be transcoded, its sound cannot."""


def even_size(width, height, short_side):
    """(width, height) with the shorter side short_side, the aspect kept, even as yuv420p wants it, never enlarged."""
    scale = short_side / min(width, height)
    return tuple(max(2, min(2 * round(side * scale / 2), side // 2 * 2)) for side in (width, height))


class Shrinker:
    """(time stamp, frame) -> the frame for the encoder: small, yuv420p, as a player shows it."""

    def __init__(self, short_side):
        self.short_side, self.shape, self.matrix = short_side, Shape(), None
        self.small = partial(VideoReformatter().reformat, interpolation="AREA", threads=1)

    def __call__(self, stamp, frame):
        size = even_size(*self.shape.check(frame), self.short_side)
        image = self.small(frame, *size, "yuv420p")
        self.matrix = self.matrix or display_matrix(image)
        if self.matrix != UPRIGHT:
            array = upright(self.small(frame, *size, "rgb24").to_ndarray(), self.matrix)
            image = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), "rgb24")
            image = self.small(image, format="yuv420p")
        image.pts, image.time_base = stamp, frame.time_base
        image.pict_type = 0                               # the copy has keyframes of its own
        return image


def pictures(container, video):
    """(time stamp, frame) of all pictures in the order of presentation. If the file says that the
    stream begins before its first picture, that picture comes twice, for there is time 0 of its clips.
    Raises ValueError if a picture is damaged or missing."""
    damaged, last, stop = [], None, begin(video)
    for stamp, frame in in_order(video, container.demux(video), damaged):
        if last is None:
            forget_before(damaged, frame.time)
            last = (video.start_time or 0) - 1
            if stamp > last + 1:
                yield last + 1, frame
        if frame.is_corrupt:
            damaged.append(frame.time)
        if damaged:
            break
        if stamp > last:                                  # an encoder takes each stamp once
            yield stamp, frame
        last, stop = stamp, float((stamp + (frame.duration or 0)) * video.time_base)
    if damaged:
        raise ValueError(f"damaged frames (first at {damaged[0]:.2f} s)")
    if stop < (end(container, video) or 0) - 1:
        raise ValueError(f"its pictures end at {stop:.2f} s, over 1 s before its header says")


def sound_pieces(container, audio):
    """All sound, mono at 24 kHz, in pieces that follow each other from where the stream begins: gaps
    become silence, and what comes twice is left out. Raises SoundError if a packet is damaged."""
    damaged, resample, at, rounding = [], MonoResampler(), round(begin(audio) * RATE), 0
    frames = chain(decode(audio, container.demux(audio), damaged), [None])
    for piece in (piece for frame in frames for piece in resample(frame)):
        if rounding == 0 and piece.pts is not None:
            forget_before(damaged, piece.time)
        due = at if piece.pts is None else round(piece.time * RATE)
        if due < at - SEAM * RATE:
            continue
        if due > at + 3600 * RATE:
            raise SoundError("its sound has a gap of over an hour")
        if due > at + rounding:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, due - at), np.float32), "fltp", "mono")
            silence.sample_rate, silence.time_base, silence.pts = RATE, Fraction(1, RATE), at
            yield silence
            at = due
        piece.pts, piece.time_base = at, Fraction(1, RATE)
        yield piece
        at, rounding = at + piece.samples, SEAM * RATE    # smaller gaps are rounded time stamps
    if damaged:
        raise SoundError(f"its sound is damaged at {damaged[0]:.2f} s")


def encode(source, target, short_side, gop, sound):
    """Write source as target, an mp4 of H.264 and, with sound, AAC. Raises FFmpegError, OSError,
    ValueError, or SoundError if only the sound is at fault."""
    with av.open(str(source)) as eye, av.open(str(source)) as ear:      # each stream in its order
        video, _ = open_streams(eye, sound=False)
        frames = starmap(Shrinker(short_side), pictures(eye, video))
        first = next(frames, None)
        if first is None:
            raise ValueError("no picture decodes")
        scale = video.time_base.denominator               # the mp4's own clock rounds where a track begins: a fine one
        clock = {"movie_timescale": str(scale * -(-10000 // scale))}
        with av.open(str(target), "w", format="mp4", options=clock) as out:
            h264 = H264 | {"g": str(gop)}
            x264 = out.add_stream("libx264", rate=video.average_rate or 30, options=h264,
                                  pix_fmt="yuv420p", width=first.width, height=first.height,
                                  time_base=video.time_base)
            x264.codec_context.colorspace = first.colorspace
            x264.codec_context.color_range = first.color_range
            packets = [(p for frame in chain([first], frames, [None]) for p in x264.encode(frame))]
            if sound:
                try:
                    _, audio = open_streams(ear)
                except ValueError as error:
                    raise SoundError(str(error)) from error
                aac = out.add_stream("aac", rate=RATE, layout="mono", bit_rate=64000)
                pieces = chain(sound_pieces(ear, audio), [None])
                packets.append(p for piece in pieces for p in aac.encode(piece))
            for packet in merge(*packets, key=lambda packet: packet.dts * packet.time_base):
                out.mux(packet)


def work(job, short_side, gop):
    """(manifest row, target) -> the row of the copy, "done" | "skipped" | "failed". What fails leaves no target."""
    row, target = job
    source, part = Path(row["path"]), target.with_name(f"{target.name}.{os.getpid()}.part")
    entry = row["label"], row["split"]
    try:
        if target.exists() and (not source.exists() or target.stat().st_mtime >= source.stat().st_mtime):
            copy = probe((target, *entry)) | {"path": str(target), "note": row["note"]}
            if row["has_audio"] == "1" and not copy["has_audio"]:
                copy["note"] = "its sound could not be transcoded"
            return copy, "skipped"
        target.parent.mkdir(parents=True, exist_ok=True)
        note = row["note"]
        try:
            encode(source, part, short_side, gop, sound=row["has_audio"] == "1")
        except SoundError as error:
            note = str(error)
            encode(source, part, short_side, gop, sound=False)
        copy = probe((part, *entry)) | {"path": str(target), "note": note}
        if copy["reason"]:
            raise ValueError(f"its copy: {copy['reason']}")
        os.replace(part, target)
        return copy, "done"
    except (av.error.FFmpegError, OSError, ValueError, OverflowError) as error:
        part.unlink(missing_ok=True)
        reason = f"cannot be transcoded: {getattr(error, 'strerror', None) or error}"
        return {name: row.get(name, "") for name in COLUMNS} | {"reason": reason}, "failed"


def read(manifest):
    """All rows of a manifest.csv. Raises ValueError where none is usable."""
    if not Path(manifest).is_file():
        raise ValueError(f"no manifest {manifest}: make one with python -m prepare.manifest")
    with open(manifest, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    if not rows or not set(COLUMNS) <= rows[0].keys():
        raise ValueError(f"{manifest} is no manifest with rows: make one with python -m prepare.manifest")
    if all(row["reason"] for row in rows):
        raise ValueError(f"{manifest} has no usable row, each has a reason: look at its last columns")
    return rows


def targets(rows, out):
    """Where each row's copy goes: out/split/label/stem.mp4. Sources that would share one get a hash of their path.

    Raises ValueError where a copy would lie outside of out, twice at one place, or on one of the sources."""
    plain = [out / row["split"] / row["label"] / f"{Path(row['path']).stem}.mp4" for row in rows]
    plain = [Path(os.path.normpath(path)) for path in plain]
    many = Counter(plain)
    paths = [path if many[path] == 1 else
             path.with_name(f"{path.stem}-{hashlib.sha1(row['path'].encode()).hexdigest()[:8]}.mp4")
             for path, row in zip(plain, rows)]
    sources = {os.path.realpath(row["path"]) for row in rows}
    seen = set()
    for path, row in zip(paths, rows):
        if out not in path.parents:
            raise ValueError(f"label {row['label']!r} of {row['path']} leads out of {out}: rename it in the manifest")
        if path in seen:
            raise ValueError(f"{row['path']} is listed twice with label {row['label']!r}: leave one row")
        if os.path.realpath(path) in sources:
            raise ValueError(f"the copy {path} would overwrite an original: choose a folder outside of the data set")
        seen.add(path)
    return paths


def run(manifest, out, short_side=160, gop=15, workers=2):
    """Transcode what MANIFEST lists into the folder out; returns the summary line. Raises ValueError on bad input."""
    for name, value, least in (("short side", short_side, 16), ("gop", gop, 1), ("number of workers", workers, 1)):
        if value < least:
            raise ValueError(f"a {name} of {value}: give at least {least}")
    rows, out = read(manifest), Path(out).resolve()
    usable = [row for row in rows if not row["reason"]]
    jobs = list(zip(usable, targets(usable, out)))
    if os.path.realpath(manifest) == str(out / "manifest.csv"):
        raise ValueError(f"the copy's manifest would overwrite {manifest}: choose another folder than {out}")
    settings, made = {"short_side": short_side, "gop": gop}, out / "transcode.json"
    if made.exists() and json.loads(made.read_text()) != settings:
        raise ValueError(f"{out} was made with {made.read_text()}, not {json.dumps(settings)}: choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    made.write_text(json.dumps(settings))
    for part in out.rglob("*.part"):                      # of a run that was killed
        part.unlink(missing_ok=True)
    copies = []
    try:
        with ProcessPoolExecutor(workers) as pool:
            results = pool.map(partial(work, short_side=short_side, gop=gop), jobs)
            for copy, state in tqdm(results, "transcoding", total=len(jobs), unit="file", file=sys.stderr):
                copies.append((copy, state))
                if state == "failed":
                    tqdm.write(f"{copy['path']}: {copy['reason']}", file=sys.stderr)
    except BrokenProcessPool as error:
        raise ValueError("a worker died (out of memory?): run the same command again, with fewer workers") from error
    turn = iter(copies)                                   # rows that were left out before keep their place and reason
    write([{name: row[name] for name in COLUMNS if name in row} if row["reason"] else next(turn)[0] for row in rows],
          out / "manifest.csv")
    return summary(jobs, copies)


def summary(jobs, copies):
    """'9 files: 7 done, 1 skipped (already there), 1 failed: 1 cannot be ...; 80.0 MB -> 9.1 MB'"""
    states = Counter(state for _, state in copies)
    failed = Counter(copy["reason"] for copy, state in copies if state == "failed")
    there = [(Path(row["path"]), path) for (row, path), (_, state) in zip(jobs, copies) if state != "failed"]
    before, after = (sum(pair[side].stat().st_size for pair in there if pair[side].exists()) / 1e6 for side in (0, 1))
    causes = ": " + ", ".join(f"{n} {reason}" for reason, n in failed.most_common()) if failed else ""
    return (f"{len(jobs)} files: {states['done']} done, {states['skipped']} skipped (already there), "
            f"{states['failed']} failed{causes}; {before:.1f} MB -> {after:.1f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("manifest", help="of the originals, from python -m prepare.manifest")
    parser.add_argument("out", help="the folder of the copy")
    parser.add_argument("--short-side", type=int, default=160, help="of the pictures, pixels (default 160)")
    parser.add_argument("--gop", type=int, default=15, help="frames from keyframe to keyframe (default 15)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    args = parser.parse_args()
    try:
        print(f"{args.out}: {run(args.manifest, args.out, args.short_side, args.gop, args.workers)}")
    except ValueError as error:
        sys.exit(f"error: {error}")
