"""Parts of action recognition that the paper does not mention: subsets of labels, the classifier of
the linear probe, tables of each class."""

import csv

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


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


def fit_linear(y, labels, decay=1e-3):
    """Softmax regression of features y (n, C) on labels (n,): an nn.Linear.

    It minimises cross-entropy plus decay / 2 times the squared weights on standardised features, by
    L-BFGS, which needs no learning rate (paper silent; our choice).
    """
    mean, std = y.mean(0), y.std(0) + 1e-6                              # (C,) x 2
    x = (y - mean) / std                                                # (n, C)
    linear = nn.Linear(y.shape[1], int(labels.max()) + 1, device=y.device)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
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


def write_classes(out, classes, labels, answers):
    """Write confusion.csv (rows: the true class) and classes.csv (the accuracy of each class)."""
    counts = torch.zeros(len(classes), len(classes), dtype=torch.int64)     # (true class, answer)
    counts.index_put_((labels, answers), torch.tensor(1), accumulate=True)
    counts = list(zip(classes, counts.tolist()))
    table = [[name, sum(row), row[n], f"{row[n] / max(1, sum(row)):.4f}"]
             for n, (name, row) in enumerate(counts)]
    for name, head, lines in (
            ("confusion.csv", ["", *classes], [[name, *row] for name, row in counts]),
            ("classes.csv", ["class", "videos", "correct", "accuracy"], table)):
        with open(out / name, "w", newline="") as file:
            csv.writer(file).writerows([head, *lines])
