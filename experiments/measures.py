"""What the ablation measures of a run of pretrain.py, on the test part of its data.

Symbols: n test clips, C and D the widths of y and z.
"""

import json
import math
import statistics
from argparse import Namespace
from pathlib import Path

import torch

from augment import centre_crop
from data import read_clip
from prepare import demo
from prepare.weights import sound_input
from retrieval import RANKS, embed, extract, load, recall_at_k
from support.classification import fit_linear, subset
from support.processes import choose_precision, start

LEVELS = "instance", "class"
WAYS = "video -> audio", "audio -> video"       # as in Table 3
SPEEDS = 1, 2, 3, 4
PROBES = ("video probe", "audio probe", "video probe, 2 labels", "audio probe, 2 labels")


def recall_names(level):
    """The names of the measures of Table 3 at a level."""
    return [f"{level}, {way}, R@{k}" for way in WAYS for k in RANKS]


def recalls(audio, video, labels):
    """Table 3 of features (n, D) in %, and the means of both directions: {metric: %}."""
    found = {}
    for way, pair in zip(WAYS, ((video, audio), (audio, video))):
        for k, shares in recall_at_k(*pair, labels).items():
            found |= {f"{level}, {way}, R@{k}": 100 * share for level, share in zip(LEVELS, shares)}
    return found | {f"{level} R@{k}": statistics.mean(found[f"{level}, {way}, R@{k}"]
                                                      for way in WAYS)
                    for level in LEVELS for k in RANKS}


def classes_and_clips(checkpoint):
    """{metric: %}: retrieval and linear classifiers, on the mean of 2 clips per film.

    "clips/s" is the rate of training, and "clips" is n. Raises ValueError if a film cannot be read.
    """
    device = start()
    dtype, _ = choose_precision("auto", device)
    y, rows, labels = {}, {}, {}
    for split in ("train", "test"):
        model, _, clips, _ = load(
            Namespace(checkpoint=checkpoint, data=None, split=split, clips=2))
        rows[split], names = clips.rows, sorted({row.label for row in clips.rows})
        labels[split] = torch.tensor([names.index(row.label) for row in clips.rows], device=device)
        model = model.to(device)
        model.l = torch.nn.Identity()           # y are encoder outputs, whatever the mapping was
        y[split] = extract(model, clips, dtype, "y", max_failures=0)[:2]        # (n, C) x 2
    audio, video, _ = extract(model, clips, dtype, max_failures=0)              # (n, D) x 2
    result = recalls(audio, video, labels["test"])
    draws = [[rows["train"].index(row) for row in subset(rows["train"], 2 / demo.TRAIN, draw)]
             for draw in range(5)]

    def probe(n, labelled):
        classifier = fit_linear(y["train"][n][labelled], labels["train"][labelled])
        answers = classifier(y["test"][n]).argmax(1)                            # (n,)
        return 100 * (answers == labels["test"]).double().mean().item()

    for n, name in enumerate(("audio probe", "video probe")):
        result[name] = probe(n, list(range(len(rows["train"]))))
        result[f"{name}, 2 labels"] = statistics.mean(probe(n, labelled) for labelled in draws)
    _, rate = from_log(checkpoint)
    return result | {"clips/s": rate, "clips": len(rows["test"])}


@torch.no_grad()
def timing(checkpoint):
    """{metric: %}: retrieval of the middle clip of each file, at speed 1 and at four speeds.

    "mixed" are those of a pool in which clip i has sound and video at speed 1 + i mod 4. "same
    speed" is the share of its 5 nearest that have the query's speed. "loss" is that of about the
    last epoch of training, in % of the loss of a model that cannot tell clips apart,
    log(1 + K (N - 1)). "clips/s" is the rate of training, and "clips" is n. Raises ValueError if a
    film cannot be read.
    """
    device = start()
    dtype, _ = choose_precision("auto", device)
    model, settings, clips, _ = load(
        Namespace(checkpoint=checkpoint, data=None, split="test", clips=1))
    model, own = model.to(device).eval(), torch.arange(len(clips), device=device)
    z = torch.stack([embed_at(model, settings, clips, dtype, tau) for tau in SPEEDS])   # (4,2,n,D)
    found = recalls(*z[0], own)
    speeds = own % len(SPEEDS)                                                          # (n,)
    audio, video = z[speeds, :, own].unbind(1)                                          # (n, D) x 2
    nearest = torch.cat([(audio @ video.T).topk(5).indices, (video @ audio.T).topk(5).indices])
    same = speeds[nearest] == speeds.repeat(2)[:, None]                                 # (2 n, 5)
    N, K = settings.batch_per_process, 1 if settings.max_speed == 1 else 2
    loss, rate = from_log(checkpoint)
    return found | {"mixed R@5": recalls(audio, video, own)["instance R@5"],
                    "mixed, same speed": 100 * same.double().mean().item(),
                    "loss": 100 * loss / math.log(1 + K * (N - 1)), "clips/s": rate,
                    "clips": len(clips)}


def embed_at(model, settings, clips, dtype, tau):
    """z of sound and of video of the middle of each file, both at speed tau: (2, n, D).

    Raises ValueError if a file cannot be read.
    """
    log_mel = sound_input(settings.sound).to(next(model.parameters()).device)
    z = []
    for row in clips.rows:
        t0 = max(0, row.duration - tau * clips.seconds) / 2
        video, audio = read_clip(row.path, t0, (tau,), (tau,), clips.frames, clips.fps, clips.size,
                                 centre_crop)                           # (1, T, H, W, 3), (1, L)
        z.append(embed(model, log_mel, dtype, "z", video[None], audio[None]))       # (2, 1, D)
    return torch.cat(z, 1)


def from_log(checkpoint):
    """The mean loss of about the last epoch of training, and the median clips/s, from a run's log.

    The first line that counts may cover some steps of the epoch before.
    """
    lines = map(json.loads, Path(checkpoint).with_name("log.jsonl").read_text().splitlines())
    events = [line for line in lines if "loss" in line]
    first = events[-1]["epoch"] - 1
    return (statistics.mean(line["loss"] for line in events if line["epoch"] > first),
            statistics.median(line["clips_per_s"] for line in events))
