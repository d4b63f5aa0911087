"""Retrieval against a brute-force copy, chance against its formula, and bad input."""

import json
import math
import re
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import error_of, run, run_here, with_damaged

import retrieval
from prepare import scan
from retrieval import chance, ranks, recall_at_k


def brute_force(query, gallery, labels):
    """One query after the other: how many come before its own clip, and before its class. Of equal
    neighbours the wrong ones come first."""
    before = np.zeros((2, len(query)), int)
    for i, q in enumerate(query):
        s = gallery @ q
        for level, right in enumerate((np.arange(len(s)) == i, labels == labels[i])):
            order = sorted(range(len(s)), key=lambda j: (-s[j], right[j]))
            before[level, i] = [right[j] for j in order].index(True)
    return before


@pytest.mark.parametrize("ties", [False, True])
def test_ranks_and_recall_are_the_brute_force_ones(ties):
    """However the queries are cut."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (60,), generator=g)
    size = (60, 3 if ties else 40)
    query, gallery = (torch.randint(-2, 3, size, generator=g).float() for _ in range(2))
    expected = brute_force(query.numpy(), gallery.numpy(), labels.numpy())
    for chunk in (256, 60, 7, 1):
        assert np.array_equal(torch.stack(ranks(query, gallery, labels, chunk)), expected)
    for k, found in recall_at_k(query, gallery, labels).items():
        assert found == pytest.approx((expected < k).mean(1), abs=1e-12)


def test_chance():
    """Drawing k of n clips without putting back misses a class of m in C(n-m, k) of C(n, k)."""
    gallery = torch.tensor([0] * 3 + [1] * 20 + [3] * 7)
    for m, found in (([3] * 3 + [20] * 20 + [7] * 7, chance(gallery)),
                     ([3, 3, 20, 0], chance(torch.tensor([0, 0, 1, 2]), gallery))):
        for k, levels in found.items():
            miss = np.mean([math.comb(30 - x, k) / math.comb(30, k) for x in m])
            assert levels == pytest.approx((k / 30, 1 - miss))


# ---- the command

def written(checkpoint):
    """The results beside a checkpoint."""
    return json.loads((checkpoint.parent / "retrieval.json").read_text())


def rows_of(tree, part=None, **changes):
    """The rows of the tree's part, or of all, with columns changed."""
    return [row | changes for row in scan.scan(tree) if part in (None, row["split"])]


def manifest(rows, path):
    """Write a manifest, and return its path."""
    scan.write(rows, path)
    return path


def test_the_data_is_that_of_the_training(tree, tmp_path):
    """A manifest beside the checkpoint is of a scan: of the training's, or of a try before it."""
    rows = rows_of(tree, "test")
    manifest(rows, tmp_path / "manifest.csv")
    own = manifest(rows[:12], tmp_path / "own.csv")
    for trained_on, n in ((str(own), 12), (str(tree), 24), (None, 24)):
        args = Namespace(checkpoint=tmp_path / "checkpoint.pt", data=None)
        assert len(retrieval.find_part(args, "test", trained_on)[0]) == n


def test_command_prints_and_keeps_the_table(brief, capsys):
    for feature in ("y", "z"):
        assert run_here(retrieval, "--checkpoint", brief, "--clips", "2", "--feature", feature) == 0
        text, kept = capsys.readouterr().out, written(brief)
        assert kept["pool"] == 24 and kept["classes"] == 2 and kept["feature"] == feature
        value, error = kept["class, video -> audio"]["R@5"]
        assert f"{100 * value:.1f} +- {100 * error:.1f}" in text and f"feature {feature}" in text
        assert kept["instance, chance"]["R@5"] == pytest.approx(5 / 24)
    assert "training clips" not in text and "includes_training_clips" not in kept


@pytest.mark.slow
def test_files_that_fail_leave_the_pool(tree, brief, tmp_path):
    """One of 24, on the last process: the numbers are those without it, and the table says so. One
    of each process's twelve: each alone is within the share of 24, both are not."""
    (tmp_path / "two").mkdir()
    with_it, without = with_damaged(rows_of(tree, "test"), tmp_path, (13,))
    two, _ = with_damaged(rows_of(tree, "test"), tmp_path / "two", (4, 13))
    found, flags = [], ["--checkpoint", brief, "--clips", "2", "--data"]
    for data, processes in ((without, 1), (with_it, 1), (with_it, 2)):
        done = run(*flags, data, script="retrieval.py", processes=processes)
        kept, many = written(brief), int(data == with_it)
        assert (kept.pop("failed"), kept.pop("videos"), kept["pool"]) == (many, 23 + many, 23)
        assert done.stdout.count("of 2 classes (0 left out; 1 of 24 videos failed)") == many
        assert done.stderr.count(f"failed: {tmp_path / 'bad13.mp4'}: Invalid data") == many
        kept.pop("data")
        found.append(kept)
    assert found[0] == found[1] == found[2]
    done = run(*flags, two, script="retrieval.py", processes=2, check=False)
    assert done.returncode != 0 and "R@20" not in done.stdout
    assert re.search("error(?: on rank 1)?: 2 of 24 videos failed, more than a share of 0.05, the "
                     f"last: {tmp_path}/two/bad13.mp4: Invalid", done.stderr)


@pytest.mark.slow
def test_bad_input(tree, brief, tmp_path, capsys):
    rows, data = rows_of(tree, "test"), {}
    for name, changed in (("parts", rows), ("no parts", rows_of(tree, split="")),
                          ("silent", rows_of(tree, "test", has_audio=0))):
        data[name] = manifest(changed, tmp_path / f"{name}.csv")
    data["one of 20"], _ = with_damaged(rows[:20], tmp_path, (13,))
    state = torch.load(brief, weights_only=True)
    state["model"]["h_a.3.bias"][:] = torch.nan
    torch.save(state, tmp_path / "nan.pt")
    for flags, sentence in (
            (["--checkpoint", tmp_path / "nan.pt", "--data", data["parts"]],
             "features are not finite"),
            (["--data", data["no parts"]], "no parts.csv has no parts (its split column is empty)"),
            (["--data", data["silent"]], "0 usable clips in the 'test' part, but R@20 needs 20 or "
             "more; left out: 24 no audio"),
            (["--data", data["one of 20"]], "19 usable clips in the 'test' part, but R@20 needs 20 "
             "or more; left out: 1 failed")):
        assert run_here(retrieval, "--checkpoint", brief, "--clips", 1, *flags) == 1
        assert sentence in error_of(capsys.readouterr().err)


@pytest.mark.slow
def test_the_table_of_data_without_classes_or_parts(tree, brief, tmp_path, capsys):
    """Without classes the numbers are those with them, at instance level alone. Where all parts are
    searched, the table and the file say that clips of the training are among them."""
    def table(rows, *more):
        assert run_here(retrieval, "--checkpoint", brief, "--clips", 1, *more, "--data",
                        manifest(rows, tmp_path / "some.csv")) == 0
        return written(brief), capsys.readouterr().out

    rows = rows_of(tree, "test")
    expected, text = table(rows)
    assert expected.pop("classes") == 2 and text.count("\nclass ") == 3
    for label, many in (("", 1), ("one", 24)):
        found, text = table([row | {"label": label} for row in rows[:many]] + rows[many:])
        assert "\nclass " not in text and "24 clips (0 left out)" in text
        assert text.endswith("needs two classes or more, and a label for every clip.\n")
        assert found.pop("classes") == 0
        assert found == {name: value for name, value in expected.items() if "class," not in name}
    found, text = table(rows_of(tree, split=""), "--split", "all")
    assert "34 clips of 2 classes, includes training clips (0 left out)" in text
    assert found["includes_training_clips"] is True and found["pool"] == 34
