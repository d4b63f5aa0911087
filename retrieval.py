"""Audio <-> video retrieval (§3.3, Tables 1 and 3).

    python retrieval.py                                 # the built-in set, after python pretrain.py
    python retrieval.py --data kinetics --checkpoint runs/k400/checkpoint.pt
    torchrun --nproc_per_node=8 retrieval.py --data kinetics --checkpoint runs/k400/checkpoint.pt
    python retrieval.py --query song.mp3 film.mp4       # files of your own (docs/running.md)

The sound of each test clip queries the videos of all test clips, and its video queries all sounds,
at speed 1. Two rules stand side by side, each with its standard error and its chance.
Instance-level: the clip's own other half is among the top k. Class-level: a clip of the query's
class is among the top k. (Table 3 lies at the class-level chance for 34 classes.) The script prints
the table and writes retrieval.json beside the checkpoint.

Symbols: n clips in the pool, D feature width, B files of a batch, T frames, L samples.
"""

import argparse

import torch

from augment import normalize_frames
from data import ActionClips, AudioVisualClips, evenly_spaced, find_rows, make_loader, probe
from models import C, SvaCLR, video_encoder
from prepare.weights import sound_input
from support import pools
from support.batches import evaluation_batches
from support.checkpoints import load_encoder, load_svaclr
from support.pools import RANKS
from support.processes import at_least, autocast, choose_precision, launch, share


def parse(argv=None):
    """The arguments of the command line. Bad ones end the script with a sentence and status 2."""
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--checkpoint", default="runs/svaclr/checkpoint.pt",
                   help="checkpoint.pt of pretrain.py (runs/svaclr/checkpoint.pt); for --pair "
                   "video-video also video_encoder.pt, torchvision's file, torchvision or none")
    p.add_argument("--data", help="folder or manifest.csv (default: the training data's)")
    p.add_argument("--split", default="test", help="part to search, or all (test)")
    p.add_argument("--clips", type=at_least(1), default=10,
                   help="clips of a file, averaged (10; paper silent, GDT)")
    p.add_argument("--feature", default="z", choices=["z", "y"],
                   help="projections z or encoder outputs y (z; our choice)")
    p.add_argument("--max-failures", type=share, default=0.05,
                   help="share of videos that may fail to be read and are then left out; more stop "
                   "the script (0.05; our choice)")
    pools.add_flags(p)
    args = p.parse_args(argv)
    pools.check_flags(p, args)
    return args


@torch.no_grad()
def embed(model, log_mel, dtype, feature, frames, waves):
    """Features of files at speed 1: frames (B, n, T, H, W, 3), waves (B, n, L) -> (2, B, D).

    [0] is of the sound and [1] of the pictures. A file's feature is the mean over its n clips'
    unit-length features, brought to unit length again. feature: see `extract`.
    """
    device = next(model.parameters()).device
    audio, video = log_mel(waves.to(device)), normalize_frames(frames.to(device))
    with autocast(device, dtype):
        ly_a, ly_v, z_a, z_v = model(audio, video)                      # (B, n, C or D)
    both = {"y": (ly_a, ly_v), "z": (z_a, z_v)}
    return torch.cat([pools.average(torch.stack(both[kind])) for kind in feature], 2)


def extract(model, clips, dtype, feature="z", sound=None, workers=None, max_failures=0.05):
    """Features of all clips on every process: audio (n, D), video (n, D), and their n rows.

    Features are kept by index, so no clip counts twice with any number of processes.

    Args:
        clips: AudioVisualClips with clips_per_file.
        dtype: of autocast.
        feature: "z", the projections | "y", the encoder outputs (l(y) if l is not the identity) |
            "yz", first y and then z, each of unit length: D is the sum of their widths.
        sound: the input of g, see prepare.weights.sound_input.
        max_failures: share of the files that may fail to be read; ValueError if more do.
    """
    model.eval()
    device = next(model.parameters()).device
    log_mel, widths = sound_input(sound).to(device), {"y": C, "z": model.h_v[-1].out_features}
    batches = evaluation_batches(make_loader(clips, 8, workers), max_failures)
    encoded = ((embed(model, log_mel, dtype, feature, frames, waves), index)
               for frames, waves, index in batches)
    D = sum(widths[kind] for kind in feature)
    (audio, video), found = pools.keep_by_index(encoded, (2, len(clips), D), device)
    return audio, video, [clips.rows[n] for n in found]


def ranks(query, gallery, labels, first=0, last=None, chunk=256):
    """How many of the gallery come before the answer of each of the queries first..last.

    Instance-level, the answer is the clip's own other half. Class-level, it is the nearest clip of
    the query's class, the own half included. A tie counts against the query. The similarities of
    `chunk` queries are held at a time: O(chunk n) memory. query, gallery: (n, D), row i of both
    from clip i. labels: (n,) int64. Returns two (last - first,) int64, instance- and class-level.
    """
    instance, classes = [], []
    last = len(query) if last is None else last
    for i in torch.arange(first, last, device=query.device).split(chunk):
        s = query[i] @ gallery.T                                        # (chunk, n)
        own = s.gather(1, i[:, None])                                   # (chunk, 1)
        instance.append((s >= own).sum(1) - 1)
        same = labels[i][:, None] == labels                             # (chunk, n)
        best = s.masked_fill(~same, -torch.inf).amax(1, keepdim=True)   # (chunk, 1)
        classes.append((s.masked_fill_(same, -torch.inf) >= best).sum(1))
    empty = query.new_zeros(0, dtype=torch.int64)
    return torch.cat([empty, *instance]), torch.cat([empty, *classes])


def recall_at_k(query, gallery, labels, ks=RANKS):
    """Share of queries whose answer is in their k nearest: {k: (instance-level, class-level)}."""
    return shares(torch.stack(ranks(query, gallery, labels)), ks)


def shares(before, ks=RANKS):
    """{k: (instance-level, class-level)} of the ranks (2, n), which count from 0."""
    return {k: tuple((before < k).double().mean(1).tolist()) for k in ks}


def chance(labels, ks=RANKS):
    """Recall of random features: {k: (instance-level, class-level)}. labels: (n,) int64."""
    by_class = class_chance(labels, labels, ks)
    return {k: (k / len(labels), by_class[k]) for k in ks}


def class_chance(labels, gallery_labels, ks=RANKS):
    """Class-level recall of random features: {k: share}.

    It is 1 - C(n-m, k) / C(n, k) for a query whose class has m of the n clips, averaged.
    """
    n = len(gallery_labels)
    m = torch.bincount(gallery_labels, minlength=int(labels.max()) + 1)[labels].double()
    draws = torch.arange(max(ks), device=m.device)                      # neighbours drawn before
    miss = ((n - m[:, None] - draws).clamp(min=0) / (n - draws)).cumprod(1)     # (queries, max k)
    return {k: 1 - miss[:, k - 1].mean().item() for k in ks}


def find_part(args, split):
    """The usable rows of a part of --data, or of "all", and {path: reason} of the other files."""
    rows, left_out = find_rows(args.data, None if split == "all" else split,
                               pools.beside(args.checkpoint, "retrieval"))
    pools.check_parts(rows, split, args.data)
    return rows, left_out


def load(args):
    """The model and settings of --checkpoint, the clips of --data, and {path: reason left out}."""
    model, settings = load_svaclr(args.checkpoint, SvaCLR)
    args.data = args.data or pools.data_of(args.checkpoint, settings.data)
    rows, left_out = find_part(args, args.split)
    clips = AudioVisualClips(rows, settings.frames, settings.fps, settings.size,
                             clips_per_file=args.clips)
    return model, settings, clips, left_out | clips.left_out


def evaluate(args, device):
    """§3.3: extract the features of the part, rank both ways, report."""
    if args.query or args.pair == "video-video":
        return search(args, device) if args.query else compare_videos(args, device)
    model, settings, clips, left_out = load(args)
    pools.check_size(clips.rows, args.split, left_out)                # complain before the work
    dtype, _ = choose_precision("auto", device)
    features = extract(model.to(device), clips, dtype, "yz", settings.sound,
                       max_failures=args.max_failures)
    pool = pools.make_pool(args, model, settings, *features)
    failed = {row.path for row in clips.rows} - set(pool.paths)
    pools.check_size(pool.paths, args.split, left_out | dict.fromkeys(failed, "failed"))
    audio, video = (pool.features[f"{args.feature}_{kind}"] for kind in ("audio", "video"))
    labels, results = pools.number(pool.labels).to(device), {}
    for way, q, g in (("audio -> video", audio, video), ("video -> audio", video, audio)):
        results[way] = shares(pools.on_shares(
            lambda first, last: ranks(q, g, labels, first, last), len(labels), device))
    pools.report_pool(args, pool, results, chance(labels), len(left_out), len(clips))


def read_query(path, settings, n):
    """Read n clips of a file, spaced as in evaluation: frames (1, n, T, H, W, 3), waves (1, n, L).

    A modality that the file lacks is zero, and named in the third result, {modality: cause}. A file
    shorter than a clip ends in its last frame and in silence. ValueError if both are missing.
    """
    T, fps, size = settings.frames, settings.fps, settings.size
    row, no_video = probe(path)
    if no_video:
        waves = pools.sound_clips(path, no_video, n, T / fps)         # (n, L)
        black = torch.zeros(1, n, T, size, size, 3, dtype=torch.uint8)
        return black, waves[None], {"video": no_video}
    clips = ActionClips([row], [row.label], T, fps, size, views=(n, 1))
    try:
        frames, waves = evenly_spaced(clips, path, row.duration, sound=row.has_audio)
    except ValueError as error:
        raise ValueError(f"--query {error}") from error
    if row.has_audio:
        return frames[None], waves[None], {}
    silence = waves.new_zeros(1, n, waves.shape[1])
    return frames[None], silence, {"audio": row.note or "no audio stream"}


@torch.no_grad()
def search(args, device):
    """--query: the sound of a file finds videos of the pool, and its pictures find sounds."""
    if args.pool:
        model, settings = load_svaclr(args.checkpoint, SvaCLR)
        pool = pools.read_pool(args, model, device)
    else:
        model, settings, clips, left_out = load(args)
        pools.check_size(clips.rows, args.split, left_out, 1)
    model, log_mel = model.to(device).eval(), sound_input(settings.sound).to(device)
    dtype, _ = choose_precision("auto", device)
    queries, n = [], pool.settings["clips_per_file"] if args.pool else args.clips
    for path in args.query:                                             # complain before the work
        frames, waves, missing = read_query(path, settings, n)
        features = pools.named(*embed(model, log_mel, dtype, "yz", frames, waves))    # (1, D)
        shown = {"audio": log_mel(waves.to(device))[0, n // 2, 0].cpu(),
                 "video": frames[0, n // 2, settings.frames // 2]}
        queries += pools.ask(path, features, shown, missing)
    if not args.pool:
        features = extract(model, clips, dtype, "yz", settings.sound,
                           max_failures=args.max_failures)
        pool = pools.make_pool(args, model, settings, *features)
    pools.answer(args, queries, pool)


@torch.no_grad()
def compare_videos(args, device):
    """--pair video-video: videos of --split query those of --gallery by y_v, the output of f."""
    arch, clip = pools.video_settings(args)
    torch.manual_seed(0)                                # random weights are alike on all processes
    f = load_encoder(args.checkpoint, video_encoder(arch), arch).to(device).eval()
    dtype, _ = choose_precision("auto", device)

    def encode(frames):
        with autocast(device, dtype):
            y_v = f(normalize_frames(frames.to(device)).flatten(0, 1))  # (B n, C)
        return pools.average(y_v.unflatten(0, frames.shape[:2])[None])            # (1, B, C)

    found = [find_part(args, part) for part in (args.split, args.gallery)]
    pools.check_videos(args, found)
    parts = []
    for rows, _ in found:
        clips = ActionClips(rows, sorted({row.label for row in rows}), **clip)
        batches = evaluation_batches(make_loader(clips, 8), args.max_failures)
        encoded = ((encode(frames), index) for frames, _, index in batches)
        (y_v,), read = pools.keep_by_index(encoded, (1, len(rows), C), device)    # (n, C)
        parts.append((y_v, [rows[n].label for n in read]))
    (q, of_q), (g, of_g) = parts                                        # (n, C), (m, C), labels
    failed = dict.fromkeys(range(len(found[1][0]) - len(g)), "failed")
    pools.check_size(of_g, args.gallery, found[1][1] | failed)
    labels = pools.number(of_q + of_g).to(device)                       # (n + m,)
    labels, gallery_labels = labels[:len(q)], labels[len(q):]
    results = pools.on_shares(lambda first, last: pools.video_ranks(
        q[first:last], g, labels[first:last], gallery_labels), len(q), device)
    pools.report_videos(args, clip, results, class_chance(labels, gallery_labels), (of_q, of_g),
                        found)


if __name__ == "__main__":
    launch(evaluate, parse())
