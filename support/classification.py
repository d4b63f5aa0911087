"""Action recognition beside the paper: subsets, a linear classifier, hits and tables."""

import csv
import json
import statistics
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from support.files import write_atomic
from support.processes import rank, run_once, say


def subset(rows, fraction, seed):
    """The share `fraction` of each class's rows, at least one. Shares by one seed are nested."""
    groups = {}
    for row in rows:
        groups.setdefault(row.label, []).append(row)
    chosen = []
    for label in sorted(groups):
        order = np.random.default_rng([seed, *label.encode()]).permutation(len(groups[label]))
        number = max(1, round(fraction * len(order)))
        chosen += [groups[label][n] for n in sorted(order[:number])]
    return chosen


def shared_classes(data, train, test):
    """The sorted classes of both parts. Raises ValueError if the parts cannot be used together."""
    if any(row.split == "" for row in train + test):
        raise ValueError(f"--data {data} has no train and test parts (its split column is empty): "
                         "make its manifest from the official lists, or put the files under "
                         "ROOT/train and ROOT/test")
    classes = sorted({row.label for row in train})
    unknown = sorted({row.label for row in test} - set(classes))
    if unknown:
        raise ValueError(f"--data {data}: {len(unknown)} of the test part's classes are not in its "
                         f"train part: {', '.join(unknown[:5])}; both need the same classes")
    if not test or len(classes) < 2:
        raise ValueError(f"--data {data} has {len(test)} usable test videos and {len(classes)} "
                         "classes to train: it needs at least 1 and 2")
    return classes


def fit_linear(y, labels, decay=1e-3):
    """Softmax regression of features y (n, C) on labels (n,): an nn.Linear. It minimises
    cross-entropy plus decay / 2 times the squared weights on standardised features (our choice).
    """
    mean, std = y.mean(0), y.std(0) + 1e-6                              # (C,) x 2
    x = (y - mean) / std                                                # (n, C)
    linear = nn.Linear(y.shape[1], int(labels.max()) + 1, device=y.device)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    # L-BFGS needs no learning rate.
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(linear(x), labels) + decay / 2 * linear.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():               # from standardised features back to y
        linear.weight /= std
        linear.bias -= linear.weight @ mean
    return linear.requires_grad_(False)


def top_1_and_5(scores, labels):
    """Whether the label is among the best 1 and the best 5 classes: (n, 2) float32.

    A class with the label's own score counts as better, as a tie does in retrieval. scores: (n,
    classes). labels: (n,), or one label for all rows.
    """
    labels = torch.as_tensor(labels, device=scores.device).expand(len(scores))
    own = scores.gather(1, labels[:, None])                             # (n, 1)
    better = (scores >= own).sum(1) - 1                                 # (n,)
    return (better[:, None] < torch.tensor([1, 5], device=scores.device)).float()


def predictions(scores, labels):
    """The class that each row of scores (n, classes) names: (n,). The label loses a tie."""
    others = scores.scatter(1, labels[:, None], -torch.inf).argmax(1)   # (n,)
    return labels.where(top_1_and_5(scores, labels)[:, 0] == 1, others)


def write_classes(out, classes, labels, predictions):
    """Process 0 writes confusion.csv (rows: the true class) and classes.csv (their accuracies)."""
    if rank() > 0:
        return
    counts = torch.zeros(len(classes), len(classes), dtype=torch.int64)     # (true class, answer)
    counts.index_put_((labels, predictions), torch.tensor(1), accumulate=True)
    confusion, accuracy = [["", *classes]], [["class", "videos", "correct", "accuracy"]]
    for n, (name, row) in enumerate(zip(classes, counts.tolist())):
        confusion.append([name, *row])
        accuracy.append([name, sum(row), row[n], f"{row[n] / max(1, sum(row)):.4f}"])
    for name, table in (("confusion.csv", confusion), ("classes.csv", accuracy)):
        with open(out / name, "w", newline="") as file:
            csv.writer(file).writerows(table)


def check_protocol(args):
    """Raise ValueError on all processes if args.out holds the results of the other protocol: of a
    linear probe in place of a fine-tuning, or the reverse."""
    def check():
        results, linear = Path(args.out, "results.json"), args.linear
        if results.exists():
            linear = json.loads(results.read_text())["protocol"]["linear"]
        elif results.with_name("checkpoint.pt").exists():
            linear = False
        if linear != args.linear:
            found = "a linear probe" if linear else "another training"
            raise ValueError(f"--out {args.out} holds {found}: give another --out")

    run_once(check)


def mean_of(folds):
    """The mean {name: accuracy} of the results {fold: {name: value}}."""
    names = [name for name in next(iter(folds.values())) if "top" in name]
    return {name: statistics.mean(result[name] for result in folds.values()) for name in names}


def write_results(args, folds):
    """Process 0 writes the results {fold: {name: value}} and their mean to args.out."""
    if rank() == 0:
        results = {"protocol": vars(args), "epoch": "last", **folds, "mean": mean_of(folds)}
        write_atomic(json.dumps(results, indent=1).encode(), Path(args.out, "results.json"))


def print_results(args, folds):
    """Process 0 prints the results, which args.out has, and their mean if there are several."""
    for name, result in (folds | ({"mean": mean_of(folds)} if len(folds) > 1 else {})).items():
        values = [f"{key} {x:.1f} %" if "top" in key else f"{x} {key}"
                  for key, x in result.items() if "failed" not in key]
        if failed := result.get("failed"):
            values.append(f"{failed} of {failed + result['test videos']} test videos failed")
        say(f"{name}: {', '.join(values)}")
    how = "linear probe" if args.linear else f"epoch {args.epochs} of {args.epochs}"
    say(f"({how}, {args.test_clips} clips x 3 crops; {args.out}/results.json)")
