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
import heapq
import json
import os
import sys
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import chain
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from tqdm import tqdm

from prepare.manifest import COLUMNS, probe, write

RATE = 24000                                              # Hz, mono, what data.read_clip gives
SEAM = RATE // 50                                         # 20 ms: smaller gaps in the sound are rounded time stamps
H264 = {"preset": "veryfast", "tune": "fastdecode", "crf": "23", "flags": "+cgop", "threads": "1"}
REORDER = 4                                               # pictures: AVI tells the stamps of B-frames in another order


def even_size(width, height, short_side):
    """(width, height) with the shorter side short_side, the aspect kept, even as yuv420p wants it, never enlarged."""
    scale = short_side / min(width, height)
    return tuple(max(2, min(2 * round(side * scale / 2), side // 2 * 2)) for side in (width, height))


def picture(frame, reformatter, short_side):
    """The frame as it goes to the encoder: small, yuv420p, upright; `encoded` stamps it."""
    size = even_size(frame.width, frame.height, short_side)
    small = partial(reformatter.reformat, interpolation="AREA", threads=1)
    if frame.rotation % 360:
        upright = np.rot90(small(frame, *size, "rgb24").to_ndarray(), frame.rotation // 90)
        image = small(av.VideoFrame.from_ndarray(np.ascontiguousarray(upright), "rgb24"), format="yuv420p")
    else:
        image = small(frame, *size, "yuv420p")
    image.time_base = frame.time_base
    image.pict_type = 0                                   # the source's keyframes are not those of the copy
    return image


def seamless(parts, at):
    """Decoded pieces of sound, each stamped with where it begins (samples), so that they follow each other from `at` on
    (None: from where the first says). Gaps become silence; what is told twice is left out."""
    for part in parts:
        due = at if part.pts is None else part.pts
        at = due if at is None else at
        if due < at - SEAM:
            continue
        if due > at + SEAM:
            if due > at + 3600 * RATE:
                raise ValueError("its sound has a gap of over an hour")
            silence = av.AudioFrame.from_ndarray(np.zeros((1, due - at), np.float32), "fltp", "mono")
            silence.sample_rate, silence.time_base, silence.pts = RATE, part.time_base, at
            yield silence
            at = due
        part.pts = at
        yield part
        at += part.samples


def first_picture(path, short_side):
    """The first frame as `picture` gives it: the only thing that tells size, rotation and colours alike."""
    with av.open(str(path)) as container:
        video = container.streams.best("video")
        video.codec_context.thread_count = 1
        for frame in container.decode(video):
            return picture(frame, VideoReformatter(), short_side)
    raise ValueError("no picture decodes")


def encode(source, target, short_side, gop):
    """Write source as target, H.264 and AAC in mp4. Raises FFmpegError, OSError, ValueError where it cannot."""
    first = first_picture(source, short_side)
    with av.open(str(source)) as container:
        video, audio = container.streams.best("video"), container.streams.best("audio")
        scale = video.time_base.denominator               # the mp4's own clock rounds where a track begins: a fine one
        clock = {"movie_timescale": str(scale * -(-10000 // scale))}
        with av.open(str(target), "w", format="mp4", options=clock) as out:
            h264 = H264 | {"g": str(gop)}
            sight = out.add_stream("libx264", rate=video.average_rate or 30, options=h264, pix_fmt="yuv420p",
                                   width=first.width, height=first.height, time_base=video.time_base)
            sight.codec_context.colorspace, sight.codec_context.color_range = first.colorspace, first.color_range
            sound = out.add_stream("aac", rate=RATE, layout="mono", bit_rate=64000) if audio is not None else None
            for packet in encoded(container, video, audio, sight, sound, short_side):
                out.mux(packet)


def encoded(container, video, audio, sight, sound, short_side):
    """The packets of the encoders sight and sound for the streams video and audio (or None) of an open container."""
    resampler, reformatter = av.AudioResampler("fltp", "mono", RATE), VideoReformatter()
    pictures, times, last, at, end = deque(), [], None, None, 0           # times: a heap of their stamps
    streams = [video] if audio is None else [video, audio]
    for stream in streams:
        stream.codec_context.thread_count = 1
    for packet in chain(container.demux(streams), [None]):
        for frame in packet.decode() if packet is not None else []:
            if packet.stream is audio:
                for part in seamless(resampler.resample(frame), at):
                    at = part.pts + part.samples
                    yield from sound.encode(part)
            elif frame.pts is not None:
                pictures.append(picture(frame, reformatter, short_side))
                heapq.heappush(times, frame.pts)
                end = max(end, frame.pts + (frame.duration or 0))
        while len(pictures) > (REORDER if packet is not None else 0):
            image, image.pts = pictures.popleft(), heapq.heappop(times)
            if last is None or image.pts > last:
                yield from sight.encode(image)
                last = image.pts
    if video.duration and (video.start_time or 0) + video.duration - end > 1 / video.time_base:
        raise ValueError("its pictures end over 1 s before its header says")
    for part in seamless(resampler.resample(None), at) if at is not None else []:
        yield from sound.encode(part)
    yield from sight.encode(None)
    yield from sound.encode(None) if at is not None else []


def work(job, short_side, gop):
    """(manifest row, target) -> the row of the copy, "done" | "skipped" | "failed". What fails leaves no target."""
    row, target = job
    source, part = Path(row["path"]), target.with_name(f"{target.name}.{os.getpid()}.part")
    entry = row["label"], row["split"]
    try:
        if target.exists() and (not source.exists() or target.stat().st_mtime >= source.stat().st_mtime):
            return probe((target, *entry)) | {"path": str(target)}, "skipped"
        target.parent.mkdir(parents=True, exist_ok=True)
        encode(source, part, short_side, gop)
        copy = probe((part, *entry)) | {"path": str(target)}
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
    with open(manifest, newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"path", "label", "split", "duration", "reason"} <= rows[0].keys():
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
