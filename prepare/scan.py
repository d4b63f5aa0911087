"""Video files -> the rows of a manifest: what can be used, and what is left out and why (§3.1).

    rows, notes = survey("folder", root, workers=16, out="manifest.csv")

`python -m prepare.manifest` is the command for this, and docs/data.md says what the columns mean.
"""

import os
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from inspect import signature
from multiprocessing import Pipe, Process
from multiprocessing.connection import wait
from pathlib import Path

import av
from tqdm import tqdm

from prepare.layouts import LAYOUTS
from support.reading import (Damage, Shape, StampCheck, begin, converter, decode, demux, end, mono,
                             open_file, open_streams)
from support.rows import COLUMNS, make_row, read_rows, segment, write_rows

PROBE_LIMIT, VERIFY_LIMIT = 20, 300     # s that one file may take: to probe it, to decode it whole
SAVE_EVERY = 30                         # s between two saves of OUT.partial
CUT = 0.5                               # s by which a clip that was cut out may be too long
COPY = "another copy of a clip that is used"
READER = "r2"                           # change it when other files are read, refused or timed


# ---- all files

def survey(layout, root, workers=2, out=None, verify=False, **options):
    """Scan a copy of a data set.

    layout: a key of LAYOUTS. root: the folder of the copy. workers: the number of processes. out:
    the manifest to write; an earlier one saves the work for unchanged files. verify: decode every
    file to its end. options: annotations, fold, classes, test_share and seed, as far as the layout
    takes them.
    Returns (rows, notes): a row {column: value} for each entry of the layout in their order, and
    sentences for the summary. Values of rows that are reused are texts. Raises ValueError if the
    layout takes no such option or needs another, if it finds no files or lists (see
    prepare.layouts), or if `out` is not a manifest.
    """
    known = signature(LAYOUTS[layout]).parameters
    for name in options.keys() - known:
        raise ValueError(f"layout {layout} takes no --{name.replace('_', '-')}")
    annotations = known.get("annotations")
    if annotations and annotations.default is annotations.empty and "annotations" not in options:
        raise ValueError(f"layout {layout} needs --annotations: docs/data.md says which lists")
    entries, notes = LAYOUTS[layout](root, **options)
    rows = probe_all(entries, workers, verify, out)
    drop_copies(rows, [entry.name for _, entry in entries])
    if out:
        write_rows(rows, out)
        Path(f"{out}.partial").unlink(missing_ok=True)
    return rows, notes


def probe_all(entries, workers, verify, out):
    """The rows of a layout's entries, in their order.

    A file that has a reason to be left out is not opened, nor is one whose row in `out` or
    OUT.partial is still valid. A file of several clips is opened once.
    """
    unfinished, saved = Path(f"{out}.partial"), time.monotonic()
    earlier = earlier_rows(Path(out)) | earlier_rows(unfinished) if out else {}
    files = {path: (path, entry.label, entry.split)
             for path, entry in entries if not entry.reason}
    rows = {path: row for path in files if (row := reuse(earlier.get(str(path)), verify))}
    to_probe = [file for path, file in files.items() if path not in rows]
    done = in_workers(partial(probe, verify=verify), to_probe, workers,
                      VERIFY_LIMIT if verify else PROBE_LIMIT)
    try:
        for file, row, failure in tqdm(done, "scanning", len(files), initial=len(rows),
                                       unit="file", file=sys.stderr):
            rows[file[0]] = row or empty_row(*file, failure)
            if out and time.monotonic() - saved > SAVE_EVERY:
                write_rows(rows.values(), unfinished)
                saved = time.monotonic()
    finally:
        if out and len(rows) < len(files):              # after Ctrl-C, for instance
            write_rows(rows.values(), unfinished)
    return [empty_row(path, entry.label, entry.split, entry.reason) if entry.reason
            else row_of(entry, rows[path]) for path, entry in entries]


def row_of(entry, row):
    """The row of an entry, from the row of its file."""
    row = row | {name: getattr(entry, name) for name in ("label", "split", "start", "end")}
    if entry.start == "" or row["reason"]:
        return row
    if entry.if_cut is not None and (
            float(row["video_duration"]) < entry.end - entry.start + CUT):
        return row | {"start": "", "end": "", "reason": entry.if_cut}
    try:
        segment(row, entry.source)
    except ValueError as error:
        row["reason"] = str(error)
    return row


def reuse(row, verify):
    """An earlier row, or None if there is none or the file must be read again.

    verify: reuse rows of verified files only.
    """
    now = version_of(row["path"]) if row else ""
    valid = {f"{now}:verified"} if verify else {now, f"{now}:verified"}
    if not now or row["stamp"] not in valid:
        return None
    # What was measured can be used. Which copy or segment is used is decided anew.
    return row | {"reason": "" if row["duration"] else row["reason"]}


def drop_copies(rows, names):
    """Of the usable files of one clip keep one, and give the others a reason. The one that stays is
    in a folder of replacements, as Kinetics has, or else it is the first. names: of the clips."""
    def order(pair):
        path = pair[0]["path"]
        return "replac" not in path.lower(), path

    used = {}
    for row, name in sorted(zip(rows, names), key=order):
        clip = row["label"], row["split"], name
        if not row["reason"] and used.setdefault(clip, row) is not row:
            row["reason"] = COPY


def summary(rows, notes=()):
    """'800 files, 798 usable, 2 left out: 1 no video stream, ...; notes', or '9 clips of 2 files'.

    Reasons are counted without their part in brackets.
    """
    reasons = Counter(row["reason"].split(" (")[0] for row in rows if row["reason"])
    files = len({row["path"] for row in rows})
    counted = f"{len(rows)} clips of {files} files" if files < len(rows) else f"{files} files"
    text = f"{counted}, {len(rows) - reasons.total()} usable"
    if reasons:
        counts = ", ".join(f"{number} {reason}" for reason, number in reasons.most_common())
        text += f", {reasons.total()} left out: {counts}"
    return "; ".join([text, *notes])


# ---- the csv

def earlier_rows(path):
    """{path of a video: row with a stamp} of an earlier manifest, if there is one."""
    rows = read_rows(path) if path.exists() else []
    return {row["path"]: row for row in rows if row["stamp"]}


def empty_row(path, label, split, reason=""):
    """A row without measurements."""
    return dict.fromkeys(COLUMNS, "") | {"path": str(path), "label": label, "split": split,
                                         "has_audio": 0, "reason": reason}


def version_of(path):
    """'bytes:mtime in ns:READER' of a file, for the column stamp, or '' if the disk cannot tell."""
    try:
        return "{0.st_size}:{0.st_mtime_ns}:{1}".format(os.stat(path), READER)
    except OSError:
        return ""


# ---- one file

def probe(file, verify=False):
    """The row of one file (path, label, split). verify: decode all of it.

    A row about a failure of the disk has no stamp, because the failure may be temporary and the
    next scan should read the file again.
    """
    path, failure = file[0], "cannot be read to the end" if verify else "cannot be read"
    row = empty_row(*file) | {"stamp": version_of(path) + ":verified" * verify}
    try:
        str(path).encode()
        with open(path, "rb") as data:
            if not data.read(1):
                return row | {"reason": "empty file"}
        with open_file(path) as container:
            return row | measure(container, verify)
    except OSError as error:                # FFmpeg's errors of the disk are OSErrors too
        return row | {"reason": f"cannot be read: {error.strerror or error}", "stamp": ""}
    except av.error.FFmpegError as error:
        return row | {"reason": f"{failure}: {error.strerror or error}"}
    except UnicodeEncodeError:
        return row | {"reason": "its name is not UTF-8"}
    except (ValueError, OverflowError) as error:
        return row | {"reason": f"{failure}: {error}"}


def probe_file(path, label=""):
    """The Row of a file that is in no manifest, or None, and why it cannot be used (or "")."""
    line = probe((path, label, ""))
    return None if line["reason"] else make_row(line), line["reason"]


def measure(container, verify):
    """The measured columns of an open file, after decoding the first frame of each stream or, with
    verify, all frames. If no header tells where a stream ends, all its packets are looked at.

    support.reading.read can read a verified file at every place. If only the sound cannot be used,
    `note` says why and has_audio is 0, because the pictures can be used without it. Raises
    ValueError or FFmpegError if the pictures cannot be used.
    """
    try:
        video, _ = open_streams(container, sound=False)
    except ValueError as error:
        return {"reason": str(error)}
    audio, note = container.streams.best("audio"), ""
    if audio is not None and audio.codec_context is None:
        audio, note = None, "no decoder for its sound"
    tracks = {stream: Track(stream) for stream in (video, audio) if stream is not None}
    stops = {stream: end(container, stream) for stream in tracks}
    to_end = verify or None in stops.values()
    for packet in demux(container, list(tracks)):
        track = tracks[packet.stream]
        if not track.problem:
            track.add(packet, verify or track.stop is None)
        if not to_end and all(track.problem or track.stop is not None for track in tracks.values()):
            break
    for stream, track in tracks.items():
        track.finish(verify, stops[stream])
        stops[stream] = track.reached if stops[stream] is None else stops[stream]
    if tracks[video].problem:
        raise ValueError(tracks[video].problem)
    start, stop = begin(video), stops[video]
    if stop - start < 1e-3:
        raise ValueError("its length is not known")
    row = {"fps": round(float(video.average_rate or 0), 3), "width": video.width,
           "height": video.height, "video_duration": round(stop - start, 3), "sound_start": 0.0}
    if audio is not None:
        row["sound_start"] = round(max(0.0, begin(audio) - start), 3)
        start, stop = max(start, begin(audio)), min(stop, stops[audio])
        if tracks[audio].problem:
            note = f"its sound cannot be read: {tracks[audio].problem}"
        elif stop - start < 1e-3:
            note = "sight and sound do not overlap"
    has_audio = audio is not None and not note
    duration = round(stop - start, 3) if has_audio else row["video_duration"]
    return row | {"has_audio": int(has_audio), "note": note, "duration": duration}


class Track:
    """What a scan learns about one stream: `reached`, when its last packet so far ends (s), `stop`,
    when its last decoded frame ends (s, or None), and `problem`, why the stream cannot be used."""

    def __init__(self, stream):
        self.stream, self.tick, self.stop, self.problem = stream, float(stream.time_base), None, ""
        self.damaged, self.shape, self.formats = Damage(), Shape(stream), {"mono", "stereo"}
        self.time_stamps, self.reached = StampCheck(stream), begin(stream)

    def add(self, packet, to_decode):
        """Check a packet, and decode it and check its frames, as support.reading.read would."""
        is_video = self.stream.type == "video"
        try:
            self.time_stamps.check(packet)
            if packet.pts is not None:
                self.reached = max(self.reached,
                                   (packet.pts + (packet.duration or 0)) * self.tick)
            for frame in decode(self.stream, [packet] * to_decode, self.damaged):
                if frame.pts is None and is_video:
                    raise ValueError("it has no time stamps")
                if frame.pts is None and self.stop is None:
                    continue                # place_sound places it before the first with a stamp
                # Another frame of sound without a time stamp continues the frame before it.
                if self.stop is None:
                    self.damaged.forget_before(frame.time)
                start = self.stop if frame.pts is None else frame.pts * self.tick
                stop = start + (frame.duration or 0) * self.tick
                self.stop = max(stop, self.stop or stop)
                if is_video:
                    self.shape.check(frame)
                    if frame.is_corrupt:
                        self.damaged.append(frame.time)
                form = frame.format.name if is_video else frame.layout.name
                if form not in self.formats:              # raises if a frame cannot be converted
                    self.formats.add(form)
                    converter(self.stream)(frame) if is_video else list(mono([frame]))
        except (ValueError, av.error.FFmpegError) as error:
            self.problem = getattr(error, "strerror", None) or str(error)

    def finish(self, verify, stated):
        """Find the problems that show at the end. verify: whether it was decoded to its end.
        stated: when it should end (s), or None if the file does not tell."""
        if self.problem:
            return
        damaged = self.damaged.inside()
        if self.stop is None:
            self.problem = "it does not decode"
        elif verify and damaged:
            self.problem = f"damaged frames (first at {damaged[0]:.2f} s)"
        elif verify and stated is not None and self.stop < stated - 1:
            self.problem = f"it stops too early (at {self.stop:.2f} s of {stated:.2f} s)"


# ---- worker processes

def in_workers(work, items, workers, limit):
    """Yield (item, work(item), "") as the items are finished. If a process dies or takes more than
    `limit` s, yield (item, None, reason) instead.

    FFmpeg may loop or crash, and Python cannot stop it from inside. So a process that takes too
    long is killed from outside, and a new one continues with the next item.
    """
    waiting, idle, busy = list(reversed(items)), [], {}     # busy: pipe -> (item, deadline)
    processes = {}                                          # pipe -> process
    try:
        while waiting or busy:
            while waiting and len(busy) < workers:
                is_new = not idle
                if is_new:
                    pipe, worker_end = Pipe()
                    processes[pipe] = Process(target=answer, args=(pipe, worker_end, work),
                                              daemon=True)
                    processes[pipe].start()
                    worker_end.close()                    # so the death of the worker ends the pipe
                    idle.append(pipe)
                pipe = idle.pop()
                try:
                    pipe.send(waiting[-1])
                except BrokenPipeError:                   # it was killed while it had no item
                    processes.pop(pipe)
                    if is_new:
                        raise
                else:
                    busy[pipe] = waiting.pop(), time.monotonic() + limit
            patience = min(deadline for _, deadline in busy.values()) - time.monotonic()
            wait(list(busy), max(0, patience))
            for pipe, (item, deadline) in list(busy.items()):
                result, failure, answered = None, f"takes over {limit} s", pipe.poll()
                try:
                    if answered:
                        result, failure = pipe.recv(), ""
                except (EOFError, ConnectionResetError):
                    failure = "crashes the decoder"
                if answered or deadline < time.monotonic():
                    del busy[pipe]
                    if failure:
                        processes.pop(pipe).kill()
                    else:
                        idle.append(pipe)
                    yield item, result, failure
    finally:
        for process in processes.values():
            process.kill()


def answer(parent_end, worker_end, work):
    """Answer each item from the pipe with work(item) until the parent has gone."""
    parent_end.close()                                    # so the death of the parent ends the pipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)          # the parent handles Ctrl-C for all
    with suppress(EOFError, ConnectionError):
        while True:
            worker_end.send(work(worker_end.recv()))
