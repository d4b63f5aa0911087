"""The layouts of data sets on disk and their official lists -> the files with label and split (§3.1)."""

import csv
import os
import re
from collections import Counter
from functools import partial
from pathlib import Path

SUFFIXES = {".mp4", ".m4v", ".mkv", ".webm", ".avi", ".mov", ".mpg", ".mpeg", ".ts", ".vob", ".flv",
            ".wmv", ".3gp"}
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validate": "val",
          "validation": "val", "test": "test", "testing": "test"}
UNLISTED = "not in the official list"
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
