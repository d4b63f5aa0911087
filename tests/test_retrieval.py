"""Retrieval against a brute-force copy, chance against its formula, and bad input."""

import json
import math
import re
from argparse import Namespace
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import error_of, run, run_here, with_damaged

import retrieval
from experiments.search import video_ranks
from prepare import scan
from support.rows import write_rows
from retrieval import chance, ranks, recall_at_k


def brute_force(query, gallery, answers):
    """How many come before the nearest answer of each query. Of equal ones the wrong come first."""
    before = []
    for q, right in zip(query, answers):
        s = gallery @ q
        nearest = max(s[right], default=-np.inf)
        before.append(int((s[~right] >= nearest).sum()))
    return before


def plain_video_ranks(query, gallery, labels, gallery_labels):
    """How many come before the class of each query, and is it that of the majority?"""
    before = brute_force(query, gallery, labels[:, None] == gallery_labels)
    right = []
    for q, label in zip(query, labels):
        s = gallery @ q
        near = sorted(range(len(s)), key=lambda j: (-s[j], j))[:20]
        votes = Counter(gallery_labels[near].tolist())
        winner, _ = votes.most_common(1)[0]     # of a tie the nearest's
        right.append(bool(winner == label))
    return before, right


@pytest.mark.parametrize("ties", [False, True])
def test_ranks_and_recall_are_the_brute_force_ones(ties):
    """However the queries are cut. The gallery of video_ranks lacks a class."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (60,), generator=g)
    size = (60, 3 if ties else 40)
    query, gallery = (torch.randint(-2, 3, size, generator=g).float() for _ in range(2))
    videos = query, gallery[labels > 0], labels, labels[labels > 0]
    expected = torch.tensor([brute_force(query, gallery, answers) for answers in (
        torch.eye(60).bool(), labels[:, None] == labels)])
    of_videos = plain_video_ranks(*videos)
    for chunk in (256, 60, 7, 1):
        assert torch.stack(ranks(query, gallery, labels, chunk)).equal(expected)
        assert tuple(x.tolist() for x in video_ranks(*videos, chunk)) == of_videos
    for k, found in recall_at_k(query, gallery, labels).items():
        assert found == pytest.approx((expected < k).double().mean(1), abs=1e-12)


def test_chance():
    """Drawing k of n clips without putting back misses a class of m in C(n-m, k) of C(n, k)."""
    gallery = torch.tensor([0] * 3 + [1] * 20 + [3] * 7)
    for m, found in (([3] * 3 + [20] * 20 + [7] * 7, chance(gallery)),
                     ([3, 3, 20, 0], chance(torch.tensor([0, 0, 1, 2]), gallery))):
        for k, levels in found.items():
            miss = np.mean([math.comb(30 - x, k) / math.comb(30, k) for x in m])
            assert levels == pytest.approx((k / 30, 1 - miss))


def written(checkpoint, name="retrieval.json"):
    """The results beside a checkpoint."""
    return json.loads(checkpoint.with_name(name).read_text())


def rows_of(tree, part=None, **changes):
    """The rows of the tree's part, or of all, with columns changed."""
    rows, _ = scan.survey("folder", tree)
    return [row | changes for row in rows if part in (None, row["split"])]


def test_the_data_is_that_of_the_training(tree, tmp_path):
    """A manifest beside the checkpoint is of a scan: of the training's, or of a try before it."""
    rows = rows_of(tree, "test")
    write_rows(rows, tmp_path / "manifest.csv")
    write_rows(rows[:12], tmp_path / "own.csv")
    for trained_on, n in ((f"{tmp_path}/own.csv", 12), (str(tree), 24), (None, 24)):
        args = Namespace(checkpoint=tmp_path / "checkpoint.pt", data=None)
        assert len(retrieval.find_part(args, "test", trained_on)[0]) == n


@pytest.mark.slow
def test_files_that_fail_leave_the_pool(tree, brief, tmp_path):
    """One of 24 is left out, and the table says so. Two are too many, one on each process."""
    with_it, without = with_damaged(rows_of(tree, "test"), tmp_path, (13,))
    found, flags = [], ["--checkpoint", brief, "--clips", "2", "--data"]
    for data, processes in ((without, 1), (with_it, 1), (with_it, 2)):
        done = run(*flags, data, script="retrieval.py", processes=processes)
        kept, many = written(brief), int(data == with_it)
        assert (kept.pop("failed"), kept.pop("videos")) == (many, 23 + many)
        assert kept.pop("data") == str(data)
        assert done.stdout.count("of 2 classes (0 left out; 1 of 24 videos failed)") == many
        assert " files on cpu, float32 (as asked)\n" in done.stdout     # as it was trained
        assert done.stderr.count(f"failed: {tmp_path / 'bad13.mp4'}: Invalid data") == many
        found.append(kept)
    assert found[0] == found[1] == found[2] and kept["pool"] == 23
    two, _ = with_damaged(rows_of(tree, "test"), tmp_path, (4, 13))
    done = run(*flags, two, script="retrieval.py", processes=2, check=False)
    assert done.returncode != 0 and "R@20" not in done.stdout
    assert re.search("error(?: on rank 1)?: 2 of 24 videos failed, more than a share of 0.05, the "
                     f"last: {tmp_path}/bad13.mp4: Invalid", done.stderr)
    few, _ = with_damaged(rows_of(tree, "test")[:20], tmp_path, (13,))
    done = run(*flags, few, script="retrieval.py", check=False)
    assert done.returncode == 1 and ("19 usable clips in the 'test' part, but R@20 needs 20 or "
                                     "more; left out: 1 failed") in error_of(done.stderr)


@pytest.mark.slow
def test_features_that_are_not_finite(brief, tmp_path, capsys):
    state = torch.load(brief, weights_only=True)
    state["model"]["h_a.3.bias"][:] = torch.nan
    torch.save(state, tmp_path / "nan.pt")
    assert run_here(retrieval, "--checkpoint", tmp_path / "nan.pt", "--clips", 1) == 1
    assert "features are not finite" in error_of(capsys.readouterr().err)


@pytest.mark.slow
def test_command_prints_and_keeps_the_table(tree, brief, tmp_path, capsys):
    """Without classes the numbers are the same, at instance level alone."""
    def table(rows, *more):
        write_rows(rows, tmp_path / "some.csv")
        assert run_here(retrieval, "--checkpoint", brief, "--clips", 1, *more, "--data",
                        tmp_path / "some.csv") == 0
        return written(brief), capsys.readouterr().out

    rows = rows_of(tree, "test")
    expected, text = table(rows)
    assert expected.pop("classes") == 2 and text.count("\nclass ") == 3
    value, error = expected["class, video -> audio"]["R@5"]
    assert f"{100 * value:.1f} +- {100 * error:.1f}" in text and "feature z" in text
    assert expected["instance, chance"]["R@5"] == pytest.approx(5 / 24)
    assert "training clips" not in text and "includes_training_clips" not in expected
    for label, many in (("", 1), ("one", 24)):
        found, text = table([row | {"label": label} for row in rows[:many]] + rows[many:])
        assert "\nclass " not in text and "24 clips (0 left out)" in text
        assert text.endswith("needs two classes or more, and a label for every clip.\n")
        assert found.pop("classes") == 0
        assert found == {name: value for name, value in expected.items() if "class," not in name}
    found, text = table(rows_of(tree, split=""), "--split", "all", "--feature", "y")
    assert "34 clips of 2 classes, includes training clips (0 left out)" in text
    assert found["includes_training_clips"] is True and found["pool"] == 34
    assert found["feature"] == "y" and "feature y" in text
    assert run_here(retrieval, "--checkpoint", brief, "--data", tmp_path / "some.csv") == 1
    assert "some.csv has no parts (its split column is empty)" in error_of(capsys.readouterr().err)
