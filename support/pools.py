"""Parts of retrieval that §3.3 does not mention.

These are the flags for files of one's own and for videos alone, features kept by index, a pool of
features as a file, queries, and the tables and pictures of results.

Symbols: n clips in the pool, D feature width, B files of a batch.
"""

import io
import json
import zipfile
import zlib
from collections import Counter, namedtuple
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from models import C
from support.checkpoints import read_state, write_atomic
from support.classification import say_torchvision
from support.processes import at_least, rank, say, world_size
from support.reading import RATE, read, read_sound

RANKS = (1, 5, 10, 20)
FEATURES = ("y_audio", "y_video", "z_audio", "z_video")
OTHER = {"audio": "video", "video": "audio"}
ASKS = {"audio": "sound finds these videos", "video": "pictures find these sounds"}
NEIGHBOURS = 20                         # of kNN (our choice)
# paths and labels: n strings. features: {one of FEATURES: (n, D)}, of unit length.
Pool = namedtuple("Pool", "paths labels features settings")
# One modality of a file. features: {one of FEATURES: (D,)}. picture: a frame (H, W, 3) or a log-mel
# (M, F), to be shown.
Query = namedtuple("Query", "path modality features picture")


# ---- flags

def add_flags(parser):
    """Add the flags for files of one's own and for videos alone."""
    own = parser.add_argument_group("your own files")
    own.add_argument("--query", nargs="+", metavar="FILE", help="sound or video files: print what "
                     "they find in the pool, in place of the table (none)")
    own.add_argument("--top", type=at_least(1), default=5,
                     help="clips that a query finds (5; our choice)")
    own.add_argument("--figure", help="picture of the queries and what they find, to write (none)")
    own.add_argument("--save", help="npz to write: paths, labels and features of the pool (none)")
    own.add_argument("--pool", help="npz of an earlier --save, to search in place of --data (none)")
    videos = parser.add_argument_group("videos alone")
    videos.add_argument("--pair", default="audio-video", choices=["audio-video", "video-video"],
                        help="what queries what (audio-video: §3.3); video-video: by y_v, as "
                        "in SpeedAug")
    videos.add_argument("--gallery", default="train",
                        help="part that the videos of --split query (train; SeLaVi)")
    videos.add_argument("--arch", choices=["r2plus1d_18", "r3d_18", "r2plus1d_10"],
                        help="video encoder f (the checkpoint's, else r2plus1d_18: §2.3)")
    videos.add_argument("--frames", type=at_least(1), help="T (the checkpoint's, else 32: GDT)")
    videos.add_argument("--fps", type=at_least(1),
                        help="frames per s (the checkpoint's, else 30: GDT)")
    videos.add_argument("--size", type=at_least(16),
                        help="H = W in pixels (the checkpoint's, else 128: Table 2)")


def check_flags(parser, args):
    """End the script with a sentence and status 2 if a flag would not be read."""
    def refuse(names, reason):
        for name in names.split():
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"--{name.replace('_', '-')} {reason}")

    if args.query is None:
        refuse("top figure pool", "is for --query FILE: give both or none")
    if args.pool:
        refuse("data split clips max_failures save",
               "is not read with --pool, which has its own: leave it out")
    for name, path, ends in (("save", args.save, [".npz"]),
                             ("figure", args.figure, [".png", ".pdf", ".svg"])):
        if path and Path(path).suffix not in ends:
            parser.error(f"--{name} {path}: give a name that ends in {' or '.join(ends)}")
        if path and not Path(path).absolute().parent.is_dir():
            parser.error(f"--{name} {path}: there is no folder {Path(path).parent}, make it first")
    if args.figure and not find_spec("matplotlib"):
        parser.error("--figure needs matplotlib: pip install matplotlib")
    if args.pair == "audio-video":
        refuse("gallery arch frames fps size", "is for --pair video-video: give both or none")
        return
    refuse("query save feature", "is for --pair audio-video: leave out --pair video-video")
    if args.split == args.gallery or "all" in (args.split, args.gallery):
        parser.error(f"--split {args.split} --gallery {args.gallery}: a video would find itself, "
                     "give two different parts")


def data_of(checkpoint, trained_on):
    """The data of a checkpoint: the manifest beside it, else those that it was trained on.

    trained_on: None is the built-in set, "" is unknown. Raises ValueError if it is unknown.
    """
    manifest = beside(checkpoint, "manifest.csv")
    if manifest.exists():
        return str(manifest)
    if trained_on == "":
        raise ValueError(f"--checkpoint {checkpoint} does not say what data it is to be measured "
                         "on: give --data")
    return trained_on


def video_settings(args):
    """What --pair video-video needs: arch, and the arguments of ActionClips. Also fills --data.

    The flags decide, then the settings in a checkpoint.pt, then the defaults of finetune.py.
    """
    named = args.checkpoint in ("none", "torchvision")
    known = {} if named else read_state(args.checkpoint).get("settings", {})
    clip = {"frames": args.frames or known.get("frames", 32),
            "fps": args.fps or known.get("fps", 30),
            "size": args.size or known.get("size", 128), "views": (args.clips, 1)}
    args.data = args.data or data_of(args.checkpoint, known.get("data", ""))
    say_torchvision(args.checkpoint, clip["frames"], clip["fps"], clip["size"])
    return args.arch or known.get("arch", "r2plus1d_18"), clip


# ---- features and ranks

def average(x):
    """A file's feature is the mean over its clips' unit-length features, at unit length again.

    (..., B, clips of a file, D) -> (..., B, D), float32.
    """
    return F.normalize(F.normalize(x.float(), dim=-1).mean(-2), dim=-1)


def keep_by_index(batches, shape, device):
    """Features (A, n, D) of all files on every process, and the n indices of the files.

    batches: yields (features (A, B, D), their B indices), on each process of other files. shape: of
    the features if no file fails. Raises ValueError if a feature is not finite.
    """
    features, found = torch.zeros(shape, device=device), torch.zeros(shape[1], device=device)
    for x, index in batches:
        features[:, index] = x
        found[index] = 1
    dist.all_reduce(features)           # one process has filled each index, the others have zeros
    dist.all_reduce(found)
    if not torch.isfinite(features).all():
        raise ValueError("features are not finite: the checkpoint's training has diverged")
    found = found.nonzero().flatten().tolist()
    return features[:, found], found


def on_shares(job, n, device):
    """Share n queries out among the processes: (2, n) int64 on all of them.

    job(first, last) returns two (last - first,) tensors for the queries first..last.
    """
    first, last = n * rank() // world_size(), n * (rank() + 1) // world_size()
    results = torch.zeros(2, n, dtype=torch.int64, device=device)
    results[0, first:last], results[1, first:last] = job(first, last)
    dist.all_reduce(results)
    return results


def video_ranks(query, gallery, labels, gallery_labels, chunk=256):
    """Compare videos by class: query (n, D) of labels (n,), gallery (m, D) of gallery_labels (m,).

    Returns two (n,) int64. The first is how many of the gallery come before the nearest of the
    query's class: a tie counts against the query, and all m do if the gallery lacks the class. The
    second is 1 if the majority of the NEIGHBOURS nearest has the query's class. Of classes with
    equally many votes that of the nearest neighbour wins, and of equally near neighbours the first
    in the gallery is the nearest.
    """
    before, right = [], []
    for q, label in zip(query.split(chunk), labels.split(chunk)):
        s, same = q @ gallery.T, label[:, None] == gallery_labels       # (chunk, m) x 2
        best = s.masked_fill(~same, -torch.inf).amax(1, keepdim=True)   # (chunk, 1)
        before.append((s.masked_fill(same, -torch.inf) >= best).sum(1))
        order = s.sort(dim=1, descending=True, stable=True).indices[:, :NEIGHBOURS]
        near = gallery_labels[order]                                    # (chunk, NEIGHBOURS)
        votes = (near[:, :, None] == near[:, None]).sum(2)              # for each one's class
        right.append(near.gather(1, votes.argmax(1, keepdim=True))[:, 0] == label)
    empty = labels.new_zeros(0)
    return torch.cat([empty, *before]), torch.cat([empty, *right])


# ---- a pool as a file

def named(audio, video):
    """{one of FEATURES: (n, D)} of audio and video (n, C + D), where y comes before z."""
    return {"y_audio": audio[:, :C].contiguous(), "z_audio": audio[:, C:].contiguous(),
            "y_video": video[:, :C].contiguous(), "z_video": video[:, C:].contiguous()}


def make_pool(args, model, settings, audio, video, rows):
    """The pool of the features (n, C + D) of n rows. --save writes it."""
    pool = Pool([row.path for row in rows], [row.label for row in rows], named(audio, video),
                {"checkpoint": str(args.checkpoint), "weights": checksum(model), "data": args.data,
                 "split": args.split, "clips_per_file": args.clips,
                 "seconds": settings.frames / settings.fps})
    if args.save:
        save_pool(pool, args.save)
    return pool


def checksum(model):
    """Tell the weights of models apart: crc32 of all tensors, 8 hexadecimal digits."""
    crc = 0
    for x in model.state_dict().values():
        crc = zlib.crc32(x.cpu().contiguous().numpy().tobytes(), crc)
    return f"{crc:08x}"


def save_pool(pool, path):
    """Write a pool as an npz, whole or not at all. Only process 0 does."""
    if rank() > 0:
        return
    arrays = {name: pool.features[name].cpu().numpy() for name in FEATURES}
    buffer = io.BytesIO()
    np.savez(buffer, paths=np.array(pool.paths), labels=np.array(pool.labels),
             settings=json.dumps(pool.settings), **arrays)
    write_atomic(buffer.getbuffer(), Path(path))
    print(f"{path}: y and z of {len(pool.paths)} clips, {buffer.tell() / 1e6:.1f} MB")


def read_pool(args, model, device):
    """Read --pool. Raises ValueError if the file is no pool, or if another model made it."""
    path, weights = args.pool, checksum(model)
    try:
        with np.load(path) as arrays:
            settings = json.loads(str(arrays["settings"]))
            pool = Pool(arrays["paths"].tolist(), arrays["labels"].tolist(),
                        {name: torch.from_numpy(arrays[name]).to(device) for name in FEATURES},
                        settings)
            saved_by = settings["weights"], settings["checkpoint"]
    except OSError as error:
        raise ValueError(f"cannot read --pool {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, EOFError, TypeError, AttributeError, zipfile.BadZipFile,
            zlib.error) as error:
        raise ValueError(f"--pool {path} is no pool, or it is damaged: give a file that "
                         "retrieval.py --save wrote") from error
    if saved_by[0] != weights:
        raise ValueError(f"--pool {path} has features of another model, {saved_by[1]} with the "
                         f"weights {saved_by[0]}, but {args.checkpoint} has {weights}: give the "
                         "same --checkpoint, or save a pool of this one")
    return pool


# ---- queries

def sound_clips(path, no_video, n, seconds):
    """n clips of a file's sound, evenly spaced over all of it: (n, L) float32.

    A sound shorter than a clip is continued by silence. no_video: why the file has no pictures.
    Raises ValueError if it has no sound either.
    """
    try:
        wave, damaged = read_sound(path)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        cause = getattr(error, "strerror", None) or error
        raise ValueError(f"--query {path} has no pictures ({no_video}) and no sound ({cause}): "
                         "give a sound or video file") from error
    L = round(RATE * seconds)
    wave = F.pad(torch.from_numpy(wave), (0, max(0, L - len(wave))))
    room = len(wave) - L
    starts = [round(t) for t in (np.linspace(0, room, n) if n > 1 else [room / 2])]
    for t in damaged:
        if any(start <= t * RATE <= start + L for start in starts):
            raise ValueError(f"--query {path}: its sound is damaged at {t:.2f} s: mend the file, "
                             "or give another number of --clips, so that none lies there")
    return torch.stack([wave[start:start + L] for start in starts])


def ask(path, features, pictures, missing):
    """The queries of a file, one for each modality that is not missing. Says which is missing.

    features: {one of FEATURES: (1, D)}. pictures: {modality: see Query}. missing: {modality: why}.
    """
    for modality, cause in missing.items():
        what = {"audio": "sound", "video": "pictures"}[modality]
        say(f"{path}: its {what} cannot be used ({cause}), so only the rest of it is a query")
    return [Query(path, modality, {name: x[0] for name, x in features.items()}, pictures[modality])
            for modality in OTHER if modality not in missing]


def answer(args, queries, pool):
    """Print what each query finds in the pool, and draw it if asked. Only process 0 does.

    The sound of a query finds videos, and its pictures find sounds, by the cosine of their
    features. Of equally near ones the first in the pool comes first.
    """
    if rank() > 0:
        return
    about, found = pool.settings, []
    print(f"{about['checkpoint']}, pool of {len(pool.paths)} clips{training_note(about)}, "
          f"{about['clips_per_file']} clips per file, feature {args.feature}")
    for query in queries:
        gallery = pool.features[f"{args.feature}_{OTHER[query.modality]}"]      # (n, D)
        s, order = (gallery @ query.features[f"{args.feature}_{query.modality}"]).sort(
            descending=True, stable=True)
        found.append(list(zip(s[:args.top].tolist(), order[:args.top].tolist())))
        print(f"{query.path}: its {ASKS[query.modality]}")
        for place, (similarity, n) in enumerate(found[-1], 1):
            print(f"{place:4}  {similarity:6.3f}  {pool.labels[n] or '-'}  {pool.paths[n]}")
    if args.figure:
        draw(queries, pool, found, args.figure)


def draw(queries, pool, found, out):
    """Write a picture: on each line a query, and a frame of each of the films that it finds.

    The frame is from the film's first clip. A query that is a sound is shown by its log-mel.
    found: for each query [(similarity, index in the pool)].
    """
    from matplotlib.figure import Figure

    columns = 1 + max(map(len, found))
    figure = Figure(figsize=(1.9 * columns, 2.4 * len(queries)), layout="constrained")
    axes = figure.subplots(len(queries), columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for line, query, hits in zip(axes, queries, found):
        show(line[0], query.picture)
        line[0].set_title({"audio": "sound of", "video": "pictures of"}[query.modality], fontsize=8)
        line[0].set_xlabel(Path(query.path).name[-28:], fontsize=7, parse_math=False)
        for place, (axis, (similarity, n)) in enumerate(zip(line[1:], hits), 1):
            axis.set_title(f"{place}: {similarity:.3f}", fontsize=8)
            axis.set_xlabel(f"{pool.labels[n]}\n{pool.paths[n][-30:]}", fontsize=7,
                            parse_math=False)
            try:
                show(axis, read(pool.paths[n], [pool.settings["seconds"] / 2], 0, 96)[0][0])
            except (av.error.FFmpegError, OSError, ValueError):
                axis.text(0.5, 0.5, "cannot be read", ha="center", va="center", fontsize=8)
    figure.savefig(out, dpi=100)
    print(f"{out}: the queries and what they find")


def show(axis, picture):
    """Draw a frame (H, W, 3), or a log-mel (M, F) with the low bands below."""
    log_mel = picture.ndim == 2
    axis.imshow(np.asarray(picture), origin="lower" if log_mel else "upper", cmap="magma",
                aspect="auto" if log_mel else "equal")


# ---- tables

def check_parts(rows, split, data):
    """Raise ValueError if one part is asked for, but the data have no parts."""
    if split != "all" and rows and not any(row.split for row in rows):
        raise ValueError(f"--data {data} has no parts (its split column is empty), so its clips "
                         "may be those of the training: make parts with python -m "
                         "prepare.manifest folder ROOT --test-share 0.2 and train anew on the "
                         "rest, or let sounds and videos search all clips with --split all")


def check_size(rows, split, left_out, least=max(RANKS)):
    """Raise ValueError if a part has fewer than `least` rows. left_out: {path: reason}."""
    if len(rows) < least:
        causes = ", ".join(f"{n} {why}" for why, n in Counter(left_out.values()).most_common(3))
        needs = f"R@{least}" if least > 1 else "a query"
        raise ValueError(f"{len(rows)} usable clips in the {split!r} part, but {needs} needs "
                         f"{least} or more; left out: {causes or 'none'}")


def check_videos(args, found):
    """Raise ValueError if two parts [(rows, left_out)] cannot be compared by class."""
    (queries, left_out), (gallery, gallery_left_out) = found
    check_size(gallery, args.gallery, gallery_left_out)
    check_size(queries, args.split, left_out, 1)
    if "" in {row.label for row in queries + gallery} or len({row.label for row in gallery}) < 2:
        raise ValueError("--pair video-video compares by class: it needs a label for every video, "
                         "and two classes or more in the gallery, see the label column")


def number(labels):
    """(n,) int64: each label's place among the sorted classes."""
    classes = {label: n for n, label in enumerate(sorted(set(labels)))}
    return torch.tensor([classes[label] for label in labels])


def training_note(settings):
    """", includes training clips" if all parts or the training part were searched, else ""."""
    return ", includes training clips" if settings["split"] in ("all", "train") else ""


def beside(checkpoint, name):
    """A file beside the checkpoint. "none" and "torchvision" have no place: theirs is runs/."""
    named = checkpoint in ("none", "torchvision")
    return Path("runs", name) if named else Path(checkpoint).with_name(name)


def report_pool(args, pool, results, base, left_out, videos):
    """Print and write the results {way: {k: (instance-level, class-level)}} and their chance."""
    names, n = set(pool.labels), len(pool.paths)
    classes = 0 if "" in names or len(names) < 2 else len(names)        # to compare by class
    failures = f"; {videos - n} of {videos} videos failed" * (n < videos)
    head = {"checkpoint": str(args.checkpoint), "data": args.data, "split": args.split,
            "clips_per_file": args.clips, "feature": args.feature, "pool": n, "classes": classes,
            "left_out": left_out, "videos": videos, "failed": videos - n}
    if training_note(head):
        head["includes_training_clips"] = True
    clips = f"{n} clips" + f" of {classes} classes" * (classes > 0) + training_note(head)
    title = (f"{args.checkpoint}, {clips} ({left_out} left out{failures}), {args.clips} clips per "
             f"file, feature {args.feature}, R@k in % +- standard error")
    lines = []
    for level, name in enumerate(("instance", "class") if classes else ("instance",)):
        for way, found in [*results.items(), ("chance", base)]:
            lines.append((name, way, {f"R@{k}": found[k][level] for k in RANKS}))
    report(head, title, lines, n)
    if not classes:
        say("No class-level recall: it needs two classes or more, and a label for every clip.")


def report_videos(args, clip, results, base, labels, found):
    """Print and write how videos find videos.

    clip: from video_settings. results: from video_ranks. base: {k: chance}. labels: of the queries
    and of the gallery. found: the two parts before files failed, [(rows, left_out)].
    """
    (before, right), (of_queries, of_gallery) = results, labels
    n, m, classes = len(of_queries), len(of_gallery), set(of_gallery)
    left_out = sum(len(reasons) for _, reasons in found)
    videos = sum(len(rows) for rows, _ in found)
    without = sum(label not in classes for label in of_queries)
    head = {"checkpoint": str(args.checkpoint), "pair": args.pair, "data": args.data,
            "split": args.split, "gallery": args.gallery, "clips_per_file": args.clips,
            "feature": "y_v", **{name: clip[name] for name in ("frames", "fps", "size")},
            "queries": n, "pool": m, "classes": len(classes), "left_out": left_out,
            "videos": videos, "failed": videos - n - m, "queries_without_class": without}
    failures = f"; {videos - n - m} of {videos} videos failed" * (n + m < videos)
    title = (f"{args.checkpoint}, {n} videos of {args.split!r} query {m} of {args.gallery!r} of "
             f"{head['classes']} classes ({left_out} left out{failures}), {args.clips} clips per "
             f"file, feature y_v, R@k and {NEIGHBOURS}-NN accuracy in % +- standard error")
    recall = {f"R@{k}": (before < k).double().mean().item() for k in RANKS}
    recall[f"{NEIGHBOURS}-NN"] = right.double().mean().item()
    base = {f"R@{k}": p for k, p in base.items()}
    report(head, title, [("class", "video -> video", recall), ("class", "chance", base)], n)
    if without:
        say(f"{without} of {n} queries miss always: the gallery has no video of their class.")


def report(head, title, lines, n):
    """Print the table, and write it to retrieval.json beside the checkpoint. Only process 0 does.

    lines: [(level, way, {column: share of the n queries})]. Those of chance have no standard error.
    """
    if rank() > 0:
        return
    print(title)
    print(f"{'':24}" + "".join(f"{column:>13}" for column in lines[0][2]))
    for level, way, shares in lines:
        errors = [(p * (1 - p) / n) ** 0.5 for p in shares.values()]
        values = zip(shares.values(), errors)
        print(f"{level:9}{way:15}"
              + "".join(f"{100 * p:6.1f}" + (f"{'':7}" if way == "chance" else
                                             f" +- {100 * e:3.1f}") for p, e in values))
        head[f"{level}, {way}"] = shares if way == "chance" else {
            column: [p, e] for (column, p), e in zip(shares.items(), errors)}
    stem = Path(head["checkpoint"]).stem.removeprefix("checkpoint")
    name = f"retrieval{'-' * (stem[:1] not in ('', '-'))}{stem}.json"
    path = beside(head["checkpoint"], name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head, indent=1))
