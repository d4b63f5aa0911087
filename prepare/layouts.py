"""How data sets lie on disk: each video file with its label and split (§3.1).

    entries, notes = LAYOUTS["ucf101"](root, annotations="ucfTrainTestlist", fold=1)

Each function in LAYOUTS knows one layout and the format of its official lists. It returns
`entries`, a list of (path, Entry) for the video files below root in the order of their paths, and
`notes`, a list of sentences for the summary of a scan. A file that holds several clips has several
entries. It raises ValueError if the folder, its videos or the official lists are missing, or if a
line of an official list has a wrong format.
"""

import csv
import hashlib
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

SUFFIXES = {".mp4", ".m4v", ".mov", ".3gp", ".3g2", ".mkv", ".webm", ".avi", ".divx", ".mpg",
            ".mpeg", ".vob", ".ts", ".mts", ".m2t", ".m2ts", ".flv", ".f4v", ".wmv", ".asf", ".ogv"}
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validate": "val",
          "validation": "val", "test": "test", "testing": "test"}
UNLISTED = "not in the official list"
AMBIGUOUS = "its name is an id with several clips in the official list"
# The last class is not among the first 31, which is the other number of classes in use.
KINETICS_SOUNDS = (
    "blowing nose,blowing out candles,bowling,chopping wood,dribbling basketball,laughing,"
    "mowing lawn,playing accordion,playing bagpipes,playing bass guitar,playing clarinet,"
    "playing drums,playing guitar,playing harmonica,playing keyboard,playing organ,playing piano,"
    "playing saxophone,playing trombone,playing trumpet,playing violin,playing xylophone,"
    "ripping paper,shoveling snow,shuffling cards,singing,stomping grapes,tap dancing,"
    "tapping guitar,tapping pen,tickling,strumming guitar").split(",")


class Entry(NamedTuple):
    """What the official lists or the folders say about a clip. Equal entries are one clip."""

    label: str
    split: str                          # "" if it is unknown
    reason: str                         # why the clip is left out; "" if it can be used
    name: str | Path | tuple            # tells the clip from the others of its label and split
    start: float | str = ""             # where it begins and ends in the file, s; "" for all of it
    end: float | str = ""
    # A file that has the id of a film for its name may be the clip alone. Then it is used whole, or
    # left out for this reason. None: it is the film.
    if_cut: str | None = None
    source: str = ""                    # the list, for an error about start and end


# ---- video files

def stem(path):
    """The name of a video without all its suffixes: 'id_000010.mp4.webm' -> 'id_000010'."""
    name = os.path.basename(path)
    while os.path.splitext(name)[1].lower() in SUFFIXES:
        name = os.path.splitext(name)[0]
    return name


def find_videos(root):
    """Find the video files below root, also through links, that neither are hidden nor lie in a
    hidden folder, such as the trash.

    Returns their paths, sorted and absolute, and notes about how many others were passed over.
    Raises ValueError if root is not a folder or has no video.
    """
    root = Path(root).resolve()
    if not root.is_dir():
        raise ValueError(f"{root} is no folder: "
                         "give the folder that holds the class folders of videos")
    paths, visited, others = [], set(), 0
    for directory, subdirectories, names in os.walk(root, followlinks=True):
        if os.path.realpath(directory) in visited:        # links may lead in circles
            subdirectories.clear()
            continue
        visited.add(os.path.realpath(directory))
        visible = sorted(name for name in subdirectories if not name.startswith("."))
        videos = [name for name in names if os.path.splitext(name)[1].lower() in SUFFIXES
                  and not name.startswith(".")]
        others += len(subdirectories) + len(names) - len(visible) - len(videos)
        subdirectories[:] = visible
        paths += [Path(directory, name) for name in videos]
    notes = [f"{others} other or hidden files and folders passed over"] if others else []
    if not paths:
        expected = f"[train|val|test/]class/*.mp4 (or {', '.join(sorted(SUFFIXES - {'.mp4'}))})"
        raise ValueError("; ".join([f"no video in {root}: expected {expected}", *notes]))
    return sorted(paths), notes


# ---- official lists

def read_lists(annotations, pattern, expected, parse):
    """A list of parse(path, line) for all lines of the official lists that are not blank.

    The lists are the files in the folder `annotations` that match the pattern, or the csv file
    `annotations` itself. expected: the right format of a line, for an error. Raises ValueError if
    there is no list, or with the file and the number of a wrong line.
    """
    lists, values = Path(annotations), []
    paths = sorted(lists.glob(pattern))
    if lists.is_file() and lists.suffix == Path(pattern).suffix == ".csv":
        paths = [lists]
    if not paths:
        raise ValueError(f"--annotations {lists} has no {pattern}: give the official lists that "
                         "docs/data.md names")
    for path in paths:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            for number, line in enumerate(file, 1):
                try:
                    if line.strip():
                        values.append(parse(path, line))
                # A regular expression that does not match gives an AttributeError.
                except (ValueError, LookupError, AttributeError, csv.Error):
                    raise ValueError(f"{path}:{number}: expected {expected}, "
                                     f"got {line.strip()[:200]!r}") from None
    return values


def split_csv(line):
    """The cells of one line of a csv file."""
    return next(csv.reader([line], strict=True))


def match(paths, notes, official):
    """Look up the stem of each path in the official list.

    official: {stem: [Entry]}, in which a clip may have several stems. Returns (entries, notes) as a
    layout does. The note about the list comes first.
    """
    entries = [(path, entry) for path in paths
               for entry in official.get(stem(path), [Entry("", "", UNLISTED, stem(path))])]
    usable = {entry.name for clips in official.values() for entry in clips if not entry.reason}
    absent = usable - {entry.name for _, entry in entries}
    example = f", e.g. {min(absent)!r}" if absent else ""
    return entries, [f"{len(absent)} official entries not on disk{example}", *notes]


def cut_and_uncut(clips, numbers):
    """{stem: [Entry]} of the files that are clips, and of the uncut films {id: [Entry, ...]}.

    clips: {stem: Entry with start and end}. numbers: how many follow the id in the name of an
    Entry.
    """
    official, films = {}, {}
    for name, clip in clips.items():
        official[name] = [clip._replace(start="", end="")]
        films.setdefault(clip.name.rsplit("_", numbers)[0], {})[clip.name] = clip
    for video, parts in films.items():                    # an id may have a _ too
        reason = AMBIGUOUS if len(parts) > 1 else ""
        official[video] = [clip._replace(if_cut=reason) for clip in parts.values()]
    return official


# ---- layouts

def folder(root, test_share=None, seed=None):
    """ROOT/[train|val|test/]class/*: the folders give the labels and the splits (see SPLITS).

    If ROOT has other folders beside one of these parts, all of its folders are classes. Raises
    ValueError if they are beside two or more.
    test_share: where the folders give no splits, draw this share of the files for the test part.
    seed: of this draw, None for 0.
    """
    if seed is not None and test_share is None:
        raise ValueError("--seed draws a test part: give --test-share too, e.g. --test-share 0.2")
    root = Path(root).resolve()
    paths, notes = find_videos(root)
    entries, tops = [], {path.relative_to(root).parts[0] for path in paths if path.parent != root}
    splits = {name: SPLITS[name.lower()] for name in tops if name.lower() in SPLITS}
    if splits and len(splits) < len(tops):
        other = min(tops - splits.keys())
        if len(set(splits.values())) > 1:
            raise ValueError(f"{root} has the parts {', '.join(sorted(splits))}, and beside them "
                             f"{other}: move that away, or make a manifest of an official list")
        notes.append(f"{', '.join(sorted(splits))} counted among the classes, because "
                     f"{other} beside it is no part")
        splits = {}
    if test_share is not None and splits:
        raise ValueError(f"{root} has parts of its own ({', '.join(sorted(splits))}): leave out "
                         "--test-share")
    if test_share is not None and not 0 < test_share < 1:
        raise ValueError(f"--test-share {test_share}: give a share above 0 and below 1, e.g. 0.2")
    for path in paths:
        name = path.relative_to(root)
        *folders, _ = name.parts
        split = splits[folders.pop(0)] if folders and folders[0] in splits else ""
        if test_share is not None:
            # A hash of the seed and the name, so a file keeps its part when others come or go.
            digest = hashlib.sha256(f"{seed or 0} ".encode() + os.fsencode(name)).digest()
            split = "test" if int.from_bytes(digest[:8]) < test_share * 2 ** 64 else "train"
        entries.append((path, Entry("/".join(folders) or root.name, split, "", path)))
    if test_share is not None:
        counts = Counter(entry.split for _, entry in entries)
        notes.insert(0, f"{counts['train']} files in train and {counts['test']} in test, drawn "
                     f"with seed {seed or 0}")
    return entries, notes


def kinetics400(root, annotations):
    """id_start_end.mp4, or id.mp4 for an uncut film, with the csv files of
    cvdfoundation/kinetics-dataset."""
    return match(*find_videos(root), kinetics_clips(annotations))


def kinetics_clips(annotations):
    """{id_start_end: [Entry], id: [Entry]} of the official lists. Test parts have no labels."""
    columns, headers = ("youtube_id", "time_start", "time_end", "split"), {}

    def parse(path, line):
        cells = split_csv(line)
        cells = dict(zip(headers.setdefault(path, cells), cells, strict=True))
        video, start, stop, split = (cells[name] for name in columns)
        if video == "youtube_id":                         # the header
            return None
        start, stop, label = int(start), int(stop), cells.get("label", "")
        reason = "" if label else "no label in the official list"
        return Entry(label, SPLITS[split], reason, f"{video}_{start:06d}_{stop:06d}", start, stop,
                     source=f"{path}: ")

    clips = read_lists(annotations, "*.csv", f"the columns {','.join(columns)} and label", parse)
    official = {}
    for clip in sorted(filter(None, clips), key=lambda clip: clip.reason):  # labelled ones first
        official.setdefault(clip.name, clip)
    return cut_and_uncut(official, 2)


def kinetics_sounds(root, annotations=None, classes=32):
    """The 32 (or 31) classes of Kinetics-Sounds in a copy of Kinetics. Without a csv, folders named
    after the classes give the labels; they may have _ for a blank."""
    labels, (paths, other_files) = KINETICS_SOUNDS[:classes], find_videos(root)
    entries, notes = [], []
    if annotations is None:
        for path in paths:
            folders = [name.replace("_", " ").lower()
                       for name in path.relative_to(Path(root).resolve()).parts[:-1]]
            label = next((name for name in folders if name in labels), None)
            split = next((SPLITS[name] for name in folders if name in SPLITS), "")
            if label:
                entries.append((path, Entry(label, split, "", stem(path))))
    else:
        official = kinetics_clips(annotations)
        wanted = {name: kept for name, clips in official.items()
                  if (kept := [clip for clip in clips if clip.label in labels or clip.reason])}
        candidates = [path for path in paths
                      if stem(path) in wanted or stem(path) not in official]
        entries, notes = match(candidates, [], wanted)
    if not entries:
        raise ValueError(f"no video of the {classes} classes in {root}: "
                         "name folders by them or give --annotations")
    passed_over = len(paths) - len({path for path, _ in entries})
    return entries, [*notes, f"{passed_over} files of other classes passed over", *other_files]


def vggsound(root, annotations):
    """id_start.mp4 (in s), id_start_end.mp4 (in ms) or id.mp4 (uncut) anywhere below root, with the
    official vggsound.csv (id,start,"label",split; no header) or its train.csv and test.csv
    (id_start.mp4,label)."""
    def parse(path, line):
        cells = split_csv(line)
        if len(cells) == 2:
            name, label = cells
            cells = *stem(name).rsplit("_", 1), label, path.stem
        video, start, label, split = cells
        start = int(start)
        clip = Entry(label, SPLITS[split], "", f"{video}_{start:06d}", start, start + 10,
                     source=f"{path}: ")
        return f"{video}_{start * 1000}_{start * 1000 + 10000}", clip

    is_whole = Path(annotations, "vggsound.csv").exists()
    clips = read_lists(annotations, "vggsound.csv" if is_whole else "t*.csv",
                       'id,start,"label",split or id_start.mp4,label', parse)
    official = cut_and_uncut(dict(clips) | {clip.name: clip for _, clip in clips}, 1)
    return match(*find_videos(root), official)


def ucf101(root, annotations, fold=1):
    """v_Class_gNN_cNN.avi anywhere below root, or converted to another container, with the official
    trainlist01.txt and testlist01.txt (or 02, 03, by the fold)."""
    def parse(path, line):
        label, name = re.fullmatch(r"(\w+)/(\w+)\.avi(?: \d+)?\s*", line).groups()
        return name, [Entry(label, path.name.split("list")[0], "", name)]

    official = {}
    for split in ("train", "test"):
        official |= read_lists(annotations, f"{split}list{fold:02d}.txt",
                               "'Class/v_Class_g01_c01.avi' or the same and a number", parse)
    return match(*find_videos(root), official)


def hmdb51(root, annotations, fold=1):
    """*.avi anywhere below root, or converted to another container, with the official
    <class>_test_split1.txt (or 2, 3, by the fold), in which 1 is train, 2 test and 0 unused."""
    ending, splits = f"_test_split{fold}.txt", {"0": "", "1": "train", "2": "test"}

    def parse(path, line):
        name, use = re.fullmatch(r"(.+)\.avi ([012])\s*", line).groups()
        reason = f"unused in fold {fold}" if use == "0" else ""
        return stem(name), [Entry(path.name.removesuffix(ending), splits[use], reason, stem(name))]

    official = dict(read_lists(annotations, f"*{ending}", "'name.avi 0', 1 or 2", parse))
    return match(*find_videos(root), official)


def listed(root, annotations):
    """The files and segments of a list in its order: path label [start end] [split] on each line,
    divided by commas or, if the line has none, by blanks. Paths are below root or absolute."""
    entries, root = [], Path(root).resolve()
    text = Path(annotations).read_text("utf-8-sig", "surrogateescape")
    for number, line in enumerate(text.split("\n"), 1):
        source, path = f"{annotations}:{number}: ", re.split(r"[,\s]", line.strip())[0]
        try:
            cells = split_csv(line) if "," in line else line.split()
            path, label, *more = [cell.strip() for cell in cells]
            split = SPLITS[more.pop().lower()] if len(more) % 2 else ""
            start, end = map(float, more) if more else ("", "")
            entry = Entry(label, split, "", (path, start, end), start, end, source=source)
        except (ValueError, LookupError, csv.Error):
            reason = (f"wrong line ({source}expected 'path label [start end] [split]', "
                      f"got {line.strip()[:200]!r})")
            entry = Entry("", "", reason, source)
        if line.strip():
            entries.append((root / path, entry))
    return entries, []


LAYOUTS = {"folder": folder, "list": listed, "kinetics400": kinetics400,
           "kinetics-sounds": kinetics_sounds, "vggsound": vggsound, "ucf101": ucf101,
           "hmdb51": hmdb51}
