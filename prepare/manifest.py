"""A copy of a data set on disk -> one manifest.csv: what there is, and what is left out and why (§3.1).

    python -m prepare.manifest folder ROOT        # ROOT/[train|val|test/]class/*.mp4, *.mkv, ...
    python -m prepare.manifest kinetics-sounds ROOT --annotations folder/of/csv --out ks.csv --workers 16
    python -m prepare.manifest hmdb51 ROOT --annotations testTrainMulti_7030_splits --fold 1

Columns: path (absolute), label, split ("" where none is known), duration (s that pictures and sound
both cover), video_duration (s of the pictures), fps, width, height, has_audio (0 | 1), reason (why the
file is left out; empty: usable), note (why the sound of a usable file cannot be used), stamp ("bytes:
mtime in ns", and ":verified" after --verify). Run again, files whose stamp still holds are not read
again; with --verify, those verified.
An interrupted scan leaves OUT.partial, from where the next one goes on.
"""

import argparse
import csv
import os
import re
import signal
import sys
import time
from collections import Counter
from functools import partial
from inspect import signature
from multiprocessing import Pipe, Process
from multiprocessing.connection import wait
from pathlib import Path

import av
from tqdm import tqdm

from support.reading import MonoResampler, Shape, begin, decode, end, forget_before, open_streams

COLUMNS = ("path", "label", "split", "duration", "video_duration", "fps", "width", "height",
           "has_audio", "reason", "note", "stamp")
NUMBERS = {"duration": float, "video_duration": float, "fps": float, "width": int, "height": int,
           "has_audio": int}
SUFFIXES = {".mp4", ".m4v", ".mkv", ".webm", ".avi", ".mov", ".mpg", ".mpeg", ".ts", ".vob", ".flv",
            ".wmv", ".3gp"}
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validate": "val",
          "validation": "val", "test": "test", "testing": "test"}
SECONDS, SECONDS_VERIFY = 20, 300                         # one file may take, to probe and to decode whole
SAVE_EVERY = 30                                           # s from one OUT.partial to the next
UNLISTED, COPY = "not in the official list", "another copy of a clip that is used"
SEVERAL = "its name is an id with several clips in the official list"
KINETICS_SOUNDS = """blowing nose,blowing out candles,bowling,chopping wood,dribbling basketball,laughing,mowing lawn,\
playing accordion,playing bagpipes,playing bass guitar,playing clarinet,playing drums,playing guitar,playing harmonica,\
playing keyboard,playing organ,playing piano,playing saxophone,playing trombone,playing trumpet,playing violin,\
playing xylophone,ripping paper,shoveling snow,shuffling cards,singing,stomping grapes,tap dancing,tapping guitar,\
tapping pen,tickling,strumming guitar""".split(",")       # the last is not in the list of 31


def stem(path):
    """The name of a video without all its suffixes: 'id_000010.mp4.webm' -> 'id_000010'."""
    name = os.path.basename(path)
    while os.path.splitext(name)[1].lower() in SUFFIXES:
        name = os.path.splitext(name)[0]
    return name


def videos(root):
    """(all video files under root, through links too, sorted; what the summary says of the others
    but the hidden ones). Raises ValueError where root is no folder or has no video."""
    root, found, others, seen = Path(root).resolve(), [], Counter(), set()
    if not root.is_dir():
        raise ValueError(f"no folder {root}: give the folder that holds the class folders of videos")
    for here, below, names in os.walk(root, followlinks=True):
        below.sort()
        if os.path.realpath(here) in seen:                # links may lead in circles
            below.clear()
            continue
        seen.add(os.path.realpath(here))
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if suffix in SUFFIXES:
                found.append(Path(here, name))
            elif not name.startswith("."):
                plain = re.fullmatch(r"\.\w{1,9}", suffix, re.ASCII)     # 'part 1. notes' has none
                others[suffix if plain else "without suffix"] += 1
    kinds = [f"{others[s]} {s}" for s in sorted(others, key=lambda s: (-others[s], s))]
    kinds[5:] = ["..."] * (len(kinds) > 5)
    notes = [f"{others.total()} other files passed over ({', '.join(kinds)})"] if others else []
    if not found:
        expected = f"[train|val|test/]class/*.mp4 (or {', '.join(sorted(SUFFIXES - {'.mp4'}))})"
        raise ValueError("; ".join([f"no video in {root}: expected {expected}", *notes]))
    return sorted(found), notes


def lists(annotations, pattern, what):
    """The annotation files by that pattern: of a folder, or the csv itself. ValueError where there is none."""
    if annotations is None:
        raise ValueError(f"this layout needs --annotations: give {what}")
    path = Path(annotations)
    if path.is_file() and path.suffix == ".csv" == Path(pattern).suffix:
        return [path]
    found = sorted(path.glob(pattern)) if path.is_dir() else []
    if not found:
        problem = f"has no {pattern}" if path.is_dir() else "is of another kind" if path.exists() else "does not exist"
        raise ValueError(f"--annotations {path} {problem}: give {what}")
    return found


def parse(path, read, expected, skip=0):
    """[read(line)] for the lines of a file that are not blank. Raises ValueError naming file:line where read cannot."""
    values = []
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                if number > skip and line.strip():
                    values.append(read(line.rstrip("\n")))
            except (ValueError, LookupError, AttributeError, csv.Error):  # AttributeError: a pattern does not match
                raise ValueError(f"{path}:{number}: expected {expected}, got {line.strip()[:200]!r}") from None
    return values


def cells(line):
    return next(csv.reader([line], strict=True))


def kinetics_lists(annotations):
    """{id_start_end or id: entry} of label,youtube_id,time_start,time_end,split, for `match`."""
    def read(line):
        row = dict(zip(header, cells(line), strict=True))
        name = f"{row['youtube_id']}_{int(row['time_start']):06d}_{int(row['time_end']):06d}"
        return name, (row["label"], SPLITS[row["split"]], "", name)

    official, columns = {}, "label,youtube_id,time_start,time_end,split"
    for path in lists(annotations, "*.csv", "the official csv (train.csv, validate.csv, ...) or their folder"):
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            header = file.readline().strip().replace('"', "").split(",")
        if not set(columns.split(",")) <= set(header):
            raise ValueError(f"{path}:1: expected the columns {columns}, got {','.join(header)[:200]!r}")
        official = dict(parse(path, read, ",".join(header), skip=1)) | official
    ids = {}
    for name, entry in official.items():
        video = name.rsplit("_", 2)[0]                    # ids hold _ too
        ids[video] = ("", "", SEVERAL, video) if video in ids else entry
    return official | ids


def match(files, official, expects):
    """([(path, label, split, reason, clip)], notes for the summary) of what `videos` returns.

    official: {name without suffixes: (label, split, reason, clip)}; a clip may have several names.
    expects: the note where no file is in the list, with {} for a clip that is.
    """
    paths, notes = files
    found = [(path, *official.get(stem(path), ("", "", UNLISTED, stem(path)))) for path in paths]
    if official and found and all(reason == UNLISTED for *_, reason, _ in found):
        *_, clip = next(iter(official.values()))
        return found, [f"{expects.format(clip)}, found e.g. {paths[0].name!r}", *notes]
    absent = set(official.values()) - {entry[1:] for entry in found}
    splits = Counter(split for _, split, reason, _ in absent if not reason)
    note = f"{splits.total()} official entries not on disk"
    note += f" ({', '.join(f'{n} of {split}' for split, n in sorted(splits.items()))})" if splits else ""
    return found, [note, *notes]


def folder(root):
    """ROOT/[train|val|test/]class/*: the folders name the labels. SPLITS spells the parts."""
    root, (paths, notes), found = Path(root).resolve(), videos(root), []
    for path in paths:
        *above, _ = path.relative_to(root).parts
        split = SPLITS[above.pop(0).lower()] if above and above[0].lower() in SPLITS else ""
        found.append((path, "/".join(above) or root.name, split, "", path))
    return found, notes


def kinetics400(root, annotations=None):
    """id_start_end.mp4, or id.mp4 where the list has the id once, anywhere under root, with the
    official csv (of cvdfoundation/kinetics-dataset)."""
    return match(videos(root), kinetics_lists(annotations),
                 "kinetics400 expects names like '{}.mp4' (id_start_end)")


def kinetics_sounds(root, annotations=None, classes=32):
    """The 32 (or 31) classes of a Kinetics copy. Without a csv class folders name the label, spelt with _ or blanks."""
    names, (paths, others), found, notes = KINETICS_SOUNDS[:classes], videos(root), [], []
    if annotations is not None:
        official = kinetics_lists(annotations)
        ours = {name: entry for name, entry in official.items() if entry[0] in names or entry[2]}
        mine = [path for path in paths if stem(path) in ours or stem(path) not in official]
        expects = "kinetics-sounds expects names like '{}.mp4' (id_start_end)"
        found, notes = match((mine, []), ours, expects)
    for path in paths if annotations is None else ():
        above = [part.replace("_", " ").lower() for part in path.relative_to(Path(root).resolve()).parts[:-1]]
        label = next((part for part in above if part in names), None)
        if label:
            split = next((SPLITS[part] for part in above if part in SPLITS), "")
            found.append((path, label, split, "", stem(path)))
    if not found:
        raise ValueError(f"no video of the {classes} classes in {root}: name folders by them or give --annotations")
    return found, [*notes, f"{len(paths) - len(found)} files of other classes passed over", *others]


def vggsound(root, annotations=None):
    """id_start.mp4 (s) or id_start_end.mp4 (ms) anywhere under root, with the official vggsound.csv
    (id,start,"label",split; no header) or its train.csv and test.csv (id_start.mp4,label)."""
    def read(split, line):
        first, *rest = cells(line)
        if len(rest) == 1:
            first, start = stem(first).rsplit("_", 1)
            rest = start, *rest, split
        start, label, split = rest
        name = f"{first}_{int(start):06d}"
        return name, (label, SPLITS[split], "", name)

    def in_ms(name):
        first, start = name.rsplit("_", 1)
        return f"{first}_{int(start) * 1000}_{int(start) * 1000 + 10000}"

    whole = annotations is None or not Path(annotations).is_dir() or (Path(annotations) / "vggsound.csv").exists()
    official = {}
    for path in lists(annotations, "vggsound.csv" if whole else "t*.csv", "the official vggsound.csv"):
        official |= parse(path, partial(read, path.stem), 'id,start,"label",split or id_start.mp4,label')
    official = {in_ms(name): entry for name, entry in official.items()} | official
    return match(videos(root), official, "vggsound expects names like '{}.mp4' (id_start)")


def ucf101(root, annotations=None, fold=1):
    """v_Class_gNN_cNN.avi, or converted: the stem counts. The lists: trainlist01.txt, testlist01.txt, classInd.txt."""
    def read(split, line):
        label, name, n = re.fullmatch(r"(\w+)/(\w+)\.avi(?: (\d+))?\s*", line).groups()
        if number[label] != (n or number[label]):
            raise ValueError(line)
        return name, (label, split, "", name)

    what = "the folder of trainlist01-03.txt, testlist01-03.txt and classInd.txt (ucfTrainTestlist)"
    [path] = lists(annotations, "classInd.txt", what)
    number = dict(parse(path, lambda line: re.fullmatch(r"(\d+) (\w+)\s*", line).group(2, 1), "'1 Class'"))
    official = {}
    for split in ("train", "test"):
        [path] = lists(annotations, f"{split}list{fold:02d}.txt", what)
        official |= parse(path, partial(read, split), "'Class/v_Class_g01_c01.avi' with a class of classInd.txt")
    return match(videos(root), official, "ucf101 expects names like '{}.avi'")


def hmdb51(root, annotations=None, fold=1):
    """class/*.avi, or converted: the stem counts. The lists: <class>_test_split1.txt (1 train, 2 test, 0 unused)."""
    def read(label, line):
        name, use = re.fullmatch(r"(.+)\.avi ([012])\s*", line).groups()
        return stem(name), (label, *part[use], stem(name))

    part = {"0": ("", f"unused in fold {fold}"), "1": ("train", ""), "2": ("test", "")}
    end, official = f"_test_split{fold}.txt", {}
    for path in lists(annotations, f"*{end}", "the folder of <class>_test_split[1-3].txt (testTrainMulti_7030_splits)"):
        official |= parse(path, partial(read, path.name.removesuffix(end)), "'name.avi 0', 1 or 2")
    return match(videos(root), official, "hmdb51 expects names like '{}.avi'")


LAYOUTS = {"folder": folder, "kinetics400": kinetics400, "kinetics-sounds": kinetics_sounds, "vggsound": vggsound,
           "ucf101": ucf101, "hmdb51": hmdb51}


def last_packets(container, streams):
    """{stream: when its last packet ends, s}. A stream that has no packet at all is not in it."""
    found, back = {}, 2.0                                 # back: how much of the file's end is read
    start = first = min(map(begin, streams))
    while len(found) < len(streams):
        if container.duration:
            start = max(first, first + container.duration / av.time_base - back)
        container.seek(int(start * av.time_base))
        for packet in container.demux(streams):
            if packet.pts is not None:
                time = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                found[packet.stream] = max(found.get(packet.stream, time), time)
        if start == first:
            break
        back *= 8
    return found


def stamp(path):
    """'bytes:mtime in ns' of a file, '' where the disk does not tell."""
    try:
        return "{0.st_size}:{0.st_mtime_ns}".format(os.stat(path))
    except OSError:
        return ""


class Track:
    """What a scan learns of one stream: `last`, when its last frame ends (s), and `problem`, why it
    cannot be used."""

    def __init__(self, stream):
        self.stream, self.tick, self.last, self.problem = stream, float(stream.time_base), None, ""
        self.damaged, self.shape, self.layouts = [], Shape(), {"mono", "stereo"}

    def take(self, packet):
        """Decode a packet and check its frames as support.reading.read would."""
        sight = self.stream.type == "video"
        try:
            for frame in decode(self.stream, [packet], self.damaged):
                if frame.pts is None and (sight or self.last is None):  # sound goes on without
                    raise ValueError("it has no time stamps")
                if self.last is None:
                    forget_before(self.damaged, frame.time)
                start = self.last if frame.pts is None else frame.pts * self.tick
                stop = start + (frame.duration or 0) * self.tick
                self.last = max(stop, self.last or stop)
                if sight:
                    self.shape.check(frame)
                    self.damaged += [start] * frame.is_corrupt
                elif frame.layout.name not in self.layouts:
                    self.layouts.add(frame.layout.name)
                    MonoResampler()(frame)                # raises where it does not know the layout
        except (ValueError, av.error.FFmpegError) as error:
            self.problem = getattr(error, "strerror", None) or str(error)

    def finish(self, stop):
        """Look for problems that show at the end. stop: when the stream should end, s; None if it was
        not decoded to its end."""
        if self.problem:
            return
        if self.last is None:
            self.problem = "it does not decode"
        elif stop is not None and self.damaged:
            self.problem = f"damaged frames (first at {self.damaged[0]:.2f} s)"
        elif stop is not None and self.last < stop - 1:
            self.problem = f"it stops too early (at {self.last:.2f} s of {stop:.2f} s)"


def read(container, verify):
    """What a manifest row says of an open file, after decoding the first frame of each stream or, with
    verify, all frames.

    A verified file is one that support.reading.read can read at every place. If only the sound cannot
    be used, `note` says why and has_audio is 0, because the pictures can be used without it.
    """
    try:
        video, _ = open_streams(container, sound=False)
    except ValueError as error:
        return {"reason": str(error)}
    audio, note = container.streams.best("audio"), ""
    if audio is not None and audio.codec_context is None:
        audio, note = None, "no decoder for its sound"
    tracks = {stream: Track(stream) for stream in (video, audio) if stream is not None}
    for packet in container.demux(list(tracks)):
        track = tracks[packet.stream]
        if not track.problem and (verify or track.last is None):
            track.take(packet)
        if not verify and all(track.problem or track.last is not None for track in tracks.values()):
            break
    stops = {stream: end(container, stream) for stream in tracks}
    unknown = [stream for stream in tracks if stops[stream] is None]
    if unknown and verify:
        stops |= {stream: tracks[stream].last for stream in unknown}
    elif unknown:
        stops |= last_packets(container, unknown)
    for stream, track in tracks.items():
        stops[stream] = stops[stream] or begin(stream)
        track.finish(stops[stream] if verify else None)
    if tracks[video].problem:
        raise ValueError(tracks[video].problem)
    start, stop = begin(video), stops[video]
    if stop - start < 1e-3:
        raise ValueError("its length is not known")
    row = {"fps": round(float(video.average_rate or 0), 3), "width": video.width, "height": video.height,
           "video_duration": round(stop - start, 3)}
    if audio is not None:
        start, stop = max(start, begin(audio)), min(stop, stops[audio])
        if tracks[audio].problem:
            note = f"its sound cannot be read: {tracks[audio].problem}"
        elif stop - start < 1e-3:
            note = "sight and sound do not overlap"
    has_audio = audio is not None and not note
    return row | {"has_audio": int(has_audio), "note": note,
                  "duration": round(stop - start, 3) if has_audio else row["video_duration"]}


def blank(path, label, split, reason=""):
    return dict.fromkeys(COLUMNS, "") | dict(path=str(path), label=label, split=split, has_audio=0, reason=reason)


def probe(entry, verify=False):
    """One row of (path, label, split). A failure of the disk, which may pass, gets no stamp, so it is tried again."""
    path, failure = entry[0], "cannot be read to the end" if verify else "cannot be read"
    row = blank(*entry) | {"stamp": stamp(path) + ":verified" * verify}
    try:
        str(path).encode()
        with open(path, "rb") as file:
            if not file.read(1):
                return row | {"reason": "empty file"}
        with av.open(str(path), metadata_errors="replace") as container:
            return row | read(container, verify)
    except av.error.FFmpegError as error:
        return row | {"reason": f"{failure}: {error.strerror or error}"}
    except OSError as error:
        return row | {"reason": f"cannot be read: {error.strerror or error}", "stamp": ""}
    except UnicodeEncodeError:
        return row | {"reason": "its name is not UTF-8"}
    except (ValueError, OverflowError) as error:
        return row | {"reason": f"{failure}: {error}"}


def serve(ours, pipe, work):
    """What a worker process does: entries in, rows out, until the parent is gone."""
    ours.close()                                          # the parent's end, or its death would not be seen
    signal.signal(signal.SIGINT, signal.SIG_IGN)          # Ctrl-C is the parent's business
    while True:
        try:
            pipe.send(work(pipe.recv()))
        except (EOFError, BrokenPipeError):
            return


def in_workers(work, entries, workers, limit):
    """Yield (entry, work(entry), "") as they end, or (entry, None, reason) where a process dies or takes over limit s.

    FFmpeg may loop or crash where neither Python nor the timeout of av.open (it covers waiting for data alone) has a
    say. So both are kept from outside: a process that takes too long is killed, and a new one goes on with the rest.
    """
    todo, idle, busy = list(reversed(entries)), [], {}    # busy: pipe -> (process, entry, deadline)
    try:
        while todo or busy:
            while todo and len(busy) < workers:
                if not idle:
                    pipe, theirs = Pipe()
                    idle.append((pipe, Process(target=serve, args=(pipe, theirs, work), daemon=True)))
                    idle[0][1].start()
                    theirs.close()                        # so that the death of the process ends the pipe
                pipe, process = idle.pop()
                busy[pipe] = process, todo.pop(), time.monotonic() + limit
                pipe.send(busy[pipe][1])
            for pipe in wait(list(busy), max(0, min(deadline for *_, deadline in busy.values()) - time.monotonic())):
                process, entry, _ = busy.pop(pipe)
                try:
                    row = pipe.recv()
                except (EOFError, ConnectionResetError):
                    yield entry, None, "crashes the decoder"
                else:
                    idle.append((pipe, process))
                    yield entry, row, ""
            for pipe in [pipe for pipe, (*_, deadline) in busy.items() if deadline < time.monotonic()]:
                process, entry, _ = busy.pop(pipe)
                process.kill()
                yield entry, None, f"takes over {limit} s"
    finally:
        for process in [process for _, process in idle] + [process for process, *_ in busy.values()]:
            process.kill()


def read_rows(path):
    """{path: row} of an earlier manifest. Raises ValueError where the file is none."""
    if not path.exists():
        return {}
    with open(path, encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file)
        if not {"path", "label", "reason"} <= set(table.fieldnames or ()):
            raise ValueError(f"--out {path} is no manifest and would be written over: give another")
        if not set(COLUMNS) <= set(table.fieldnames):     # of an earlier version: all is read again
            return {}
        return {row["path"]: row for row in table}


def probe_all(entries, workers=2, verify=False, out=None):
    """The rows of [(path, label, split, reason)] in this order; files with a reason, or read before, are not read."""
    unfinished, rows, todo = Path(f"{out}.partial"), {}, []
    before = read_rows(Path(out)) | read_rows(unfinished) if out else {}
    for path, label, split, reason in entries:
        now, old = stamp(path), before.get(str(path), {})
        if reason:
            rows[path] = blank(path, label, split, reason)
        elif now and old.get("stamp") in (f"{now}:verified", now)[:2 - verify]:
            rows[path] = old | {name: kind(old[name]) if old[name] else "" for name, kind in NUMBERS.items()}
            rows[path] |= {"label": label, "split": split, "reason": "" if old["reason"] == COPY else old["reason"]}
        else:
            todo.append((path, label, split))
    saved = time.monotonic()
    bar = tqdm(total=len(entries), initial=len(rows), desc="scanning", unit="file", file=sys.stderr)
    try:
        limit = SECONDS_VERIFY if verify else SECONDS
        for entry, row, reason in in_workers(partial(probe, verify=verify), todo, workers, limit):
            rows[entry[0]] = row or blank(*entry, reason)
            bar.update()
            if out and time.monotonic() - saved > SAVE_EVERY:
                write(rows.values(), unfinished)
                saved = time.monotonic()
    finally:
        bar.close()
        if out and len(rows) < len(entries):
            write(rows.values(), unfinished)
    return [rows[path] for path, *_ in entries]


def drop_copies(rows, clips):
    """Of the usable files of one clip one stays: the one in a folder of replacements (as of Kinetics) or the first."""
    def order(pair):
        return "replac" not in pair[0]["path"].lower(), pair[0]["path"]

    used = {}
    for row, clip in sorted(zip(rows, clips), key=order):
        clip = row["label"], row["split"], clip
        if not row["reason"] and used.setdefault(clip, row) is not row:
            row["reason"] = COPY


def survey(layout, root, workers=2, out=None, verify=False, **options):
    """(rows, notes for the summary) of a copy. options: annotations, fold, classes, as it takes."""
    for name in options.keys() - signature(LAYOUTS[layout]).parameters:
        raise ValueError(f"layout {layout} takes no --{name}")
    entries, notes = LAYOUTS[layout](root, **options)
    rows = probe_all([entry[:4] for entry in entries], workers, verify, out)
    drop_copies(rows, [clip for *_, clip in entries])
    if out:
        write(rows, out)
        Path(f"{out}.partial").unlink(missing_ok=True)
    return rows, notes


def scan(root, workers=2, layout="folder", **options):
    """The manifest of a copy, a list of rows in the order of the paths. options: those of `survey`."""
    return survey(layout, root, workers, **options)[0]


def write(rows, out):
    """Write rows as a manifest, whole or not at all."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    with open(part, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(part, out)


def summary(rows, notes=()):
    """'800 files, 798 usable, 2 left out: 1 no video stream, ...; notes'. What reasons have in brackets is dropped."""
    reasons = Counter(row["reason"].split(" (")[0] for row in rows if row["reason"])
    left_out = f", {reasons.total()} left out: " + ", ".join(f"{n} {r}" for r, n in reasons.most_common())
    usable = f"{len(rows)} files, {len(rows) - reasons.total()} usable"
    return "; ".join([usable + (left_out if reasons else ""), *notes])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("layout", choices=LAYOUTS, help="how the copy is laid out")
    parser.add_argument("root", help="where it is")
    parser.add_argument("--annotations", help="the official lists: a csv, or the folder of csv or txt files")
    parser.add_argument("--fold", type=int, choices=(1, 2, 3), help="of ucf101 and hmdb51 (default 1)")
    parser.add_argument("--classes", type=int, choices=(32, 31), help="of kinetics-sounds (default 32)")
    parser.add_argument("--out", default="manifest.csv", help="the csv to write (default manifest.csv)")
    parser.add_argument("--workers", type=int, default=2, help="processes that read (default 2)")
    parser.add_argument("--verify", action="store_true", help="decode every file to its end: slow, finds all damage")
    args = vars(parser.parse_args())
    try:
        rows, notes = survey(**{name: value for name, value in args.items() if value is not None})
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped: what was read is kept, run the same command to go on")
    done = f"{args['out']}: {summary(rows, notes)}"
    if all(row["reason"] for row in rows):                # the manifest is written all the same
        sys.exit(f"error: {done}")
    print(done)
