"""Search with files of one's own, features as a file, and videos that find videos.

    python -m experiments.search --query song.mp3 film.mp4 --top 5 --figure found.png
    python -m experiments.search --save features.npz
    python -m experiments.search --query song.mp3 --pool features.npz
    python -m experiments.search --pair video-video --data ucf101-1.csv --checkpoint torchvision

docs/using.md explains each. The pool is that of retrieval.py: a part of the training data.

A pool is a dict: paths and labels, two lists of n strings; y_audio, z_audio, y_video and z_video,
tensors (n, C or D) of unit length; settings, a dict. Symbols: n clips in the pool, m in the
gallery, D feature width, T frames, H, W pixels, L samples.
"""

import io
import json
import zipfile
import zlib
from collections import namedtuple
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F

from data import ActionClips, AudioVisualClips
from finetune import features
from models import ARCHS, SvaCLR, video_encoder
from prepare.scan import probe_file
from prepare.weights import sound_input
from retrieval import RANKS, average, chance, embed, extract, find_part, load, parser
from support.batches import gather_results
from support.checkpoints import (checksum, load_encoder, load_svaclr, read_state,
                                 say_torchvision)
from support.commands import at_least
from support.files import write_atomic
from support.launch import launch
from support.precision import choose_precision
from support.processes import rank, say
from support.reading import RATE, read, read_sound
from support.recall_table import check_size, write_table

# What each modality is called, what it finds, and in which words.
ASKS = {"audio": ("sound", "video", "sound finds these videos"),
        "video": ("pictures", "audio", "pictures find these sounds")}
NEIGHBOURS = 20                         # of kNN (our choice)
# feature: (D,). picture, to be drawn: a frame (H, W, 3) or a log-mel (M, F).
Query = namedtuple("Query", "path modality feature picture")


# ---- flags

def parse(argv=None):
    """The arguments of the command line. Bad ones end the script with a sentence and status 2."""
    p = parser(__doc__)
    own = p.add_argument_group("your own files")
    own.add_argument("--query", nargs="+", metavar="FILE",
                     help="sound or video files: print what they find in the pool (none)")
    own.add_argument("--top", type=at_least(1), default=5,
                     help="clips that a query finds (5; our choice)")
    own.add_argument("--figure", help="picture of the queries and what they find, to write (none)")
    own.add_argument("--save", help="npz to write: paths, labels and features of the pool (none)")
    own.add_argument("--pool", help="npz of an earlier --save, to search in place of --data (none)")
    videos = p.add_argument_group("videos alone")
    videos.add_argument("--pair", default="audio-video", choices=["audio-video", "video-video"],
                        help="what queries what (audio-video: §3.3); video-video: by y_v, as in "
                        "SpeedAug, and --checkpoint may also be video_encoder.pt, torchvision's "
                        "file, torchvision or none")
    videos.add_argument("--gallery", default="train",
                        help="part that the videos of --split query (train; SeLaVi)")
    videos.add_argument("--arch", choices=ARCHS,
                        help="video encoder f (the checkpoint's, else r2plus1d_18: §2.3)")
    videos.add_argument("--frames", type=at_least(1), help="T (the checkpoint's, else 32: GDT)")
    videos.add_argument("--fps", type=at_least(1),
                        help="frames per s (the checkpoint's, else 30: GDT)")
    videos.add_argument("--size", type=at_least(16),
                        help="H = W in pixels (the checkpoint's, else 128: Table 2)")
    args = p.parse_args(argv)
    check_flags(p, args)
    return args


def check_flags(parser, args):
    """End the script with a sentence and status 2 if a flag would not be read, or if none asks."""
    def refuse(names, reason):
        for name in names.split():
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"--{name.replace('_', '-')} {reason}")

    if args.query is None:
        refuse("top figure pool", "is for --query FILE: give both or none")
    if args.pool:
        refuse("data split clips workers max_failures save",
               "is not read with --pool, which has its own: leave it out")
    for name in ("save", "figure"):
        path = Path(getattr(args, name) or "")
        if not path.parent.is_dir():
            parser.error(f"--{name} {path}: there is no folder {path.parent}, make it first")
    if args.figure and Path(args.figure).suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"--figure {args.figure}: give a name that ends in .png, .pdf or .svg")
    if args.pair == "audio-video":
        refuse("gallery arch frames fps size", "is for --pair video-video: give both or none")
        if not args.query and not args.save:
            parser.error("nothing to search: give --query FILE, --save FILE.npz or --pair "
                         "video-video (retrieval.py prints the table of sounds and videos)")
        return
    refuse("query save feature", "is for --pair audio-video: leave out --pair video-video")
    if args.split == args.gallery or "all" in (args.split, args.gallery):
        parser.error(f"--split {args.split} --gallery {args.gallery}: a video would find itself, "
                     "give two different parts")


def search(args, device):
    """Compare videos, or let files find the clips of a pool, or keep the pool, as args say."""
    if args.pair == "video-video":
        compare_videos(args, device)
        return
    if args.pool:
        model, settings = load_svaclr(args.checkpoint, SvaCLR)
        pool = read_pool(args, model, device)
        args.clips = pool["settings"]["clips_per_file"]
    else:
        model, settings, clips, left_out = load(args)
        check_size(len(clips), args.split, left_out, 1)
    model = model.to(device).eval()
    dtype, _ = choose_precision(settings.precision, device)
    # The files come first, so that a bad one is named before the work.
    queries = [query for path in args.query or ()
               for query in read_queries(path, model, settings, dtype, args.feature, args.clips)]
    if not args.pool:
        pool = make_pool(args, model, settings, clips, dtype)
    if args.save and rank() == 0:
        save_pool(pool, args.save)
    if queries and rank() == 0:
        answer(args, queries, pool)


# ---- a pool as a file

def make_pool(args, model, settings, clips, dtype):
    """The pool of the clips of --data, on every process."""
    found, rows = extract(model, clips, dtype, settings.sound, args.workers, args.max_failures)
    device = next(model.parameters()).device
    arrays = {f"{kind}_{modality}": x[:, n].to(device) for kind, x in found.items()
              for n, modality in enumerate(ASKS)}                       # (n, C or D)
    about = {"checkpoint": str(args.checkpoint), "weights": checksum(model), "data": args.data,
             "split": args.split, "clips_per_file": args.clips,
             "seconds": settings.frames / settings.fps}
    return {"paths": [row.path for row in rows], "labels": [row.label for row in rows],
            "starts": [row.video_start for row in rows], "settings": about, **arrays}


def save_pool(pool, path):
    """Write a pool as an npz, whole or not at all."""
    arrays = {name: x.cpu().numpy() if torch.is_tensor(x) else x for name, x in pool.items()}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays | {"settings": json.dumps(pool["settings"])})
    write_atomic(buffer.getbuffer(), Path(path))
    print(f"{path}: y and z of {len(pool['paths'])} clips, {buffer.tell() / 1e6:.1f} MB")


def read_pool(args, model, device):
    """Read --pool. Raises ValueError if the file is no pool, or if another model made it."""
    path, weights = args.pool, checksum(model)
    try:
        with np.load(path) as arrays:
            pool = {f"{kind}_{modality}": torch.from_numpy(arrays[f"{kind}_{modality}"]).to(device)
                    for kind in "yz" for modality in ASKS}
            pool |= {name: arrays[name].tolist() for name in ("paths", "labels", "starts")}
            pool["settings"] = json.loads(str(arrays["settings"]))
    except (OSError, ValueError, KeyError, EOFError, TypeError, AttributeError, zipfile.BadZipFile,
            zlib.error) as error:
        raise ValueError(f"--pool {path} is missing, damaged or no pool: give a file that "
                         "experiments.search --save wrote") from error
    about = pool["settings"]
    if about["weights"] != weights:
        raise ValueError(f"--pool {path} has features of another model, {about['checkpoint']} with "
                         f"the weights {about['weights']}, but {args.checkpoint} has {weights}: "
                         "give the same --checkpoint, or save a pool of this one")
    return pool


# ---- queries

def read_queries(path, model, settings, dtype, feature, n):
    """The queries of a file, of n clips: one for each modality it has. Says which is missing."""
    frames, waves, missing = read_clips(path, settings, n)
    device = next(model.parameters()).device
    log_mel = sound_input(settings.sound).to(device)
    y, z = embed(model, log_mel, dtype, frames, waves)                  # (1, 2, C), (1, 2, D)
    x = {"y": y, "z": z}[feature][0]                                    # (2, C or D)
    pictures = {"audio": log_mel(waves.to(device))[0, n // 2, 0].cpu().numpy(),
                "video": frames[0, n // 2, settings.frames // 2].numpy()}
    for modality, cause in missing.items():
        say(f"{path}: its {ASKS[modality][0]} cannot be used ({cause}), so only the rest of it is "
            "a query")
    return [Query(path, modality, x[n], pictures[modality])
            for n, modality in enumerate(ASKS) if modality not in missing]


def read_clips(path, settings, n):
    """Read n clips of a file, spaced as in evaluation: frames (1, n, T, H, W, 3), waves (1, n, L).

    A modality that the file lacks is zero, and named in the third result, {modality: cause}. A file
    shorter than a clip ends in its last frame and in silence. ValueError if both are missing.
    """
    T, fps, size = settings.frames, settings.fps, settings.size
    row, no_video = probe_file(path)
    if no_video:
        waves = sound_clips(path, no_video, n, T / fps)                 # (n, L)
        black = torch.zeros(1, n, T, size, size, 3, dtype=torch.uint8)
        return black, waves[None], {"video": no_video}
    try:
        frames, waves = AudioVisualClips((), T, fps, size, clips_per_file=n).read(row)
    except ValueError as error:
        raise ValueError(f"--query {error}") from error
    if row.has_audio:
        return frames[None], waves[None], {}
    silence = waves.new_zeros(1, n, waves.shape[1])
    return frames[None], silence, {"audio": row.note or "no audio stream"}


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


def answer(args, queries, pool):
    """Print what each query finds in the pool, by the cosine of features, and draw it if asked.

    Of equally near ones the first in the pool comes first.
    """
    about = pool["settings"]
    paths = [f"{path} [from {start:.2f} s]" if start else path
             for path, start in zip(pool["paths"], pool["starts"])]
    note = ", includes training clips" if about["split"] in ("all", "train") else ""
    print(f"{about['checkpoint']}, pool of {len(paths)} clips{note}, "
          f"{about['clips_per_file']} clips per file, feature {args.feature}")
    found = []
    for query in queries:
        _, other, words = ASKS[query.modality]
        s, order = (pool[f"{args.feature}_{other}"] @ query.feature).sort(                  # (n,)
            descending=True, stable=True)
        found.append(list(zip(s[:args.top].tolist(), order[:args.top].tolist())))
        print(f"{query.path}: its {words}")
        for place, (similarity, n) in enumerate(found[-1], 1):
            print(f"{place:4}  {similarity:6.3f}  {pool['labels'][n] or '-'}  {paths[n]}")
    if args.figure:
        draw(queries, pool, found, args.figure)


def draw(queries, pool, found, out):
    """Write a picture: on each line a query, and a frame of each of the films that it finds.

    The frame is from the film's first clip. A query that is a sound is shown by its log-mel, low
    bands below. found: for each query [(similarity, index in the pool)].
    """
    from matplotlib.figure import Figure

    columns, seconds = 1 + max(map(len, found)), pool["settings"]["seconds"]
    figure = Figure(figsize=(1.9 * columns, 2.4 * len(queries)), layout="constrained")
    axes = figure.subplots(len(queries), columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for (first, *others), query, hits in zip(axes, queries, found):
        of_sound = query.modality == "audio"
        first.imshow(query.picture, cmap="magma", aspect="auto" if of_sound else "equal",
                     origin="lower" if of_sound else "upper")
        first.set_title(f"{ASKS[query.modality][0]} of", fontsize=8)
        first.set_xlabel(Path(query.path).name[-28:], fontsize=7, parse_math=False)
        for place, (axis, (similarity, n)) in enumerate(zip(others, hits), 1):
            path = pool["paths"][n]
            axis.set_title(f"{place}: {similarity:.3f}", fontsize=8)
            axis.set_xlabel(f"{pool['labels'][n]}\n{path[-30:]}", fontsize=7, parse_math=False)
            try:
                axis.imshow(read(path, [pool["starts"][n] + seconds / 2], 0, 96)[0][0])
            except (av.error.FFmpegError, OSError, ValueError):     # a pool outlives its videos
                axis.text(0.5, 0.5, "cannot be read", ha="center", va="center", fontsize=8)
    figure.savefig(out, dpi=100)
    print(f"{out}: the queries and what they find")


# ---- videos find videos

def compare_videos(args, device):
    """--pair video-video: videos of --split query those of --gallery by y_v, the output of f."""
    named = args.checkpoint in ("none", "torchvision")
    known = {} if named else read_state(args.checkpoint).get("settings", {})
    arch = args.arch or known.get("arch", "r2plus1d_18")
    clip = {"frames": args.frames or known.get("frames", 32),
            "fps": args.fps or known.get("fps", 30), "size": args.size or known.get("size", 128)}
    say_torchvision(args.checkpoint, **clip)
    torch.manual_seed(0)                                # random weights are alike on all processes
    f = load_encoder(args.checkpoint, video_encoder(arch), arch).to(device).eval()
    parts = [find_part(args, part, known.get("data", "")) for part in (args.split, args.gallery)]
    (queries, left_out), (gallery, gallery_left_out) = parts
    check_size(len(gallery), args.gallery, gallery_left_out, max(RANKS))
    check_size(len(queries), args.split, left_out, 1)
    if "" in {row.label for row in queries + gallery} or len({row.label for row in gallery}) < 2:
        raise ValueError("--pair video-video compares by class: it needs a label for every video, "
                         "and two classes or more in the gallery, see the label column")
    dtype, _ = choose_precision(known.get("precision", "auto"), device)
    q, q_names = encode(args, f, queries, clip, dtype)                  # (n, C)
    g, g_names = encode(args, f, gallery, clip, dtype)                  # (m, C)
    failed = dict.fromkeys(range(len(gallery) - len(g)), "failed")
    check_size(len(g), args.gallery, gallery_left_out | failed, max(RANKS))
    _, labels = np.unique(q_names + g_names, return_inverse=True)       # (n + m,)
    labels, gallery_labels = torch.from_numpy(labels).to(device).split([len(q), len(g)])
    before, right = video_ranks(q, g, labels, gallery_labels)

    n, videos, classes = len(q), len(queries) + len(gallery), len(gallery_labels.unique())
    without = int((~torch.isin(labels, gallery_labels)).sum())
    head = {"checkpoint": str(args.checkpoint), "pair": args.pair, "data": args.data,
            "split": args.split, "gallery": args.gallery, "clips_per_file": args.clips,
            "feature": "y_v", **clip, "queries": n, "pool": len(g), "classes": classes,
            "left_out": len(left_out) + len(gallery_left_out), "videos": videos,
            "failed": videos - n - len(g), "queries_without_class": without}
    recall = {f"R@{k}": (before < k).double().mean().item() for k in RANKS}
    recall[f"{NEIGHBOURS}-NN"] = right.double().mean().item()
    by_chance = {f"R@{k}": by_class for k, (_, by_class)
                 in chance(labels, gallery_labels=gallery_labels).items()}
    lines = [("class", "video -> video", recall), ("class", "chance", by_chance)]
    write_table(head, f"{n} videos of {args.split!r} query {len(g)} of {args.gallery!r} of "
                f"{classes} classes", f"R@k and {NEIGHBOURS}-NN accuracy", lines, n)
    if without:
        say(f"{without} of {n} queries miss always: the gallery has no video of their class.")


def encode(args, f, rows, clip, dtype):
    """y_v (n, C) of the videos of rows that can be read, on every process, and their n labels."""
    clips = ActionClips(rows, sorted({row.label for row in rows}), **clip,
                        clips_per_file=args.clips)
    found = {index: average(y) for index, _, y                          # y: (clips, C)
             in features(f, clips, dtype, args.workers, args.max_failures)}
    y_v, read = gather_results(found, "features")                       # (n, C)
    return y_v.to(next(f.parameters()).device), [rows[n].label for n in read]


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
    return torch.cat(before), torch.cat(right)


if __name__ == "__main__":
    launch(search, parse())
