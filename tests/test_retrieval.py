"""Retrieval against a brute-force copy, chance against random features, and bad input."""

import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import run, run_here, with_damaged

import retrieval
from prepare import scan
from retrieval import chance, ranks, recall_at_k


def brute_force(query, gallery, labels, k):
    """One query after the other; of equal neighbours the wrong ones come first."""
    hits = np.zeros((2, len(query)))
    for i, q in enumerate(query):
        s = gallery @ q
        for level, right in enumerate((np.arange(len(s)) == i, labels == labels[i])):
            order = sorted(range(len(s)), key=lambda j: (-s[j], right[j]))
            hits[level, i] = any(right[j] for j in order[:k])
    return tuple(hits.mean(1))


@pytest.mark.parametrize("ties", [False, True])
def test_recall_is_the_brute_force_one(ties):
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (60,), generator=g)
    size = (60, 3 if ties else 40)
    query, gallery = (torch.randint(-2, 3, size, generator=g).float() for _ in range(2))
    found = recall_at_k(query, gallery, labels, (1, 5, 10, 20))
    for k in found:
        expected = brute_force(query.numpy(), gallery.numpy(), labels.numpy(), k)
        assert found[k] == pytest.approx(expected, abs=1e-12)


def test_recall_of_known_features():
    q, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
    assert recall_at_k(q, q, labels, (1,)) == {1: (1.0, 1.0)}
    swapped = q[[1, 0, 3, 2]]           # each query finds the other clip of its class
    assert recall_at_k(q, swapped, labels, (1, 2)) == {1: (0.0, 1.0), 2: (0.0, 1.0)}
    alike = torch.ones(4, 1)                              # all ties: counted against the model
    found = recall_at_k(alike, alike, labels, (1, 3, 4))
    assert found == {1: (0.0, 0.0), 3: (0.0, 1.0), 4: (1.0, 1.0)}


def test_ranks_do_not_depend_on_how_queries_are_cut():
    g = torch.Generator().manual_seed(1)
    q, v = (torch.randn(70, 8, generator=g).double() for _ in range(2))
    labels = torch.arange(70) % 6
    whole = torch.stack(ranks(q, v, labels))
    for chunk in (1, 7, 70):
        assert torch.stack(ranks(q, v, labels, chunk=chunk)).equal(whole)


@pytest.mark.parametrize("labels", [torch.arange(200) % 8, (torch.arange(200) ** 0.5).long() % 7])
def test_random_features_land_on_chance(labels):
    g = torch.Generator().manual_seed(0)
    ks, trials = (1, 5, 10, 20), 30
    expected = chance(labels, ks)
    draw = lambda: torch.randn(200, 64, generator=g)
    found = [recall_at_k(draw(), draw(), labels, ks) for _ in range(trials)]
    for k in ks:
        for level in (0, 1):
            values = np.array([f[k][level] for f in found])
            error = max(values.std() / trials ** 0.5, 1e-3)
            assert abs(values.mean() - expected[k][level]) < 3 * error, (k, level)


def test_chance_of_a_query_outside_of_the_gallery():
    """Drawing k of the gallery without putting back misses the class in C(n-m, k) of C(n, k)."""
    labels, gallery_labels = torch.tensor([0, 0, 1, 2]), torch.tensor([0] * 3 + [1] * 20 + [3] * 7)
    for k, (_, found) in chance(labels, (1, 5, 20), gallery_labels).items():
        miss = [math.comb(30 - m, k) / math.comb(30, k) for m in (3, 3, 20, 0)]
        assert found == pytest.approx(1 - sum(miss) / 4)


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


def test_command_prints_and_keeps_the_table(brief, capsys):
    for feature in ("y", "z"):
        assert run_here(retrieval, "--checkpoint", brief, "--clips", "2", "--feature", feature) == 0
        text, kept = capsys.readouterr().out, written(brief)
        assert kept["pool"] == 24 and kept["classes"] == 2 and kept["feature"] == feature
        value, error = kept["class, video -> audio"]["R@5"]
        assert f"{100 * value:.1f} +- {100 * error:.1f}" in text and f"feature {feature}" in text
        assert kept["instance, chance"]["R@5"] == pytest.approx(5 / 24)


@pytest.mark.slow
def test_a_file_that_fails_leaves_the_pool(tree, brief, tmp_path):
    """One of 24, on the last process: the numbers are those without it, and the table says so."""
    with_it, without = with_damaged(rows_of(tree, "test"), tmp_path, (13,))
    found = []
    for data, processes in ((without, 1), (with_it, 1), (with_it, 2)):
        done = run("--checkpoint", brief, "--data", data, "--clips", "2", script="retrieval.py",
                   processes=processes)
        kept, many = written(brief), int(data == with_it)
        assert (kept.pop("failed"), kept.pop("videos"), kept["pool"]) == (many, 23 + many, 23)
        assert done.stdout.count("of 2 classes (0 left out; 1 of 24 videos failed)") == many
        assert done.stderr.count(f"failed: {tmp_path / 'bad13.mp4'}: Invalid data") == many
        kept.pop("data")
        found.append(kept)
    assert found[0] == found[1] == found[2]


@pytest.mark.slow
def test_two_processes_count_their_failures_together(tree, brief, tmp_path):
    """One of each process's twelve: each alone is within the share of 24, both are not."""
    data, _ = with_damaged(rows_of(tree, "test"), tmp_path, (4, 13))
    done = run("--checkpoint", brief, "--data", data, "--clips", "2", script="retrieval.py",
               processes=2, check=False)
    assert done.returncode != 0 and "R@20" not in done.stdout
    assert re.search("error(?: on rank 1)?: 2 of 24 videos failed, more than a share of 0.05, the "
                     f"last: {tmp_path}/bad13.mp4: Invalid", done.stderr)


def test_bad_input(tree, brief, tmp_path, capsys):
    rows, data = rows_of(tree, "test"), {}
    for name, changed in (("parts", rows_of(tree)), ("no parts", rows_of(tree, split="")),
                          ("one", rows[:1]), ("silent", rows_of(tree, "test", has_audio=0))):
        data[name] = manifest(changed, tmp_path / f"{name}.csv")
    for name, many, chosen in (("two of 24", 24, (4, 13)), ("one of 20", 20, (13,))):
        (tmp_path / name).mkdir()
        data[name], _ = with_damaged(rows[:many], tmp_path / name, chosen)
    state = torch.load(brief, weights_only=True)
    state["model"]["h_a.3.bias"][:] = torch.nan
    torch.save(state, tmp_path / "nan.pt")
    for flags, sentence in (
            (["--checkpoint", tmp_path / "gone.pt"], "no checkpoint"),
            (["--checkpoint", brief.parent / "video_encoder.pt"],
             "is no checkpoint.pt of this project: it lacks model, settings"),
            (["--checkpoint", tmp_path / "nan.pt", "--data", data["parts"]],
             "features are not finite"),
            (["--data", data["parts"], "--split", "val"], "has no 'val' part"),
            (["--data", data["no parts"]], "no parts.csv has no parts (its split column is empty), "
             "so its clips may be those of the training: make parts with python -m "
             "prepare.manifest folder ROOT --test-share 0.2 and train anew on the rest, or let "
             "sounds and videos search all clips with --split all"),
            (["--data", data["one"]], "1 usable clips in the 'test' part"),
            (["--data", data["silent"]], "0 usable clips in the 'test' part, but R@20 needs 20 or "
             "more; left out: 24 no audio"),
            (["--data", data["one of 20"]], "19 usable clips in the 'test' part, but R@20 needs 20 "
             "or more; left out: 1 failed"),
            (["--data", data["two of 24"]], "2 of 24 videos failed, more than a share of 0.05, the "
             f"last: {tmp_path}/two of 24/bad13.mp4: Invalid data found when processing input; all "
             "are named above")):
        status = run_here(retrieval, "--checkpoint", brief, "--clips", 1, *flags)
        errors = [line for line in capsys.readouterr().err.splitlines()
                  if line.startswith("error: ")]
        assert status == 1 and len(errors) == 1 and sentence in errors[0], errors


@pytest.mark.slow
def test_without_classes_the_table_is_at_instance_level(tree, brief, tmp_path, capsys):
    """The numbers are those with labels, and no line compares by class."""
    rows = rows_of(tree, "test")
    flags = "--checkpoint", brief, "--clips", 1, "--data"
    assert run_here(retrieval, *flags, manifest(rows, tmp_path / "with.csv")) == 0
    expected, text = written(brief), capsys.readouterr().out
    assert expected.pop("classes") == 2 and text.count("\nclass ") == 3
    for label, many in (("", 24), ("", 1), ("one", 24)):
        changed = [row | {"label": label} for row in rows[:many]] + rows[many:]
        assert run_here(retrieval, *flags, manifest(changed, tmp_path / "no.csv")) == 0
        found, text = written(brief), capsys.readouterr().out
        assert "\nclass " not in text and "24 clips (0 left out)" in text
        assert text.endswith("needs two classes or more, and a label for every clip.\n")
        assert found.pop("classes") == 0 and found.pop("data") != expected["data"]
        assert found == {name: value for name, value in expected.items()
                         if name != "data" and "class," not in name}


@pytest.mark.slow
def test_all_parts_are_searched_where_that_is_asked_for(tree, brief, tmp_path, capsys):
    """With and without parts. The table and the file say that clips of the training are among
    them, and say nothing of the kind by default."""
    for split in (None, ""):
        rows = rows_of(tree) if split is None else rows_of(tree, split=split)
        assert run_here(retrieval, "--checkpoint", brief, "--clips", 1, "--split", "all", "--data",
                        manifest(rows, tmp_path / "some.csv")) == 0
        first, kept = capsys.readouterr().out.splitlines()[0], written(brief)
        assert "34 clips of 2 classes, includes training clips (0 left out)" in first
        assert kept["includes_training_clips"] is True and kept["pool"] == 34
    assert run_here(retrieval, "--checkpoint", brief, "--clips", 1) == 0
    assert "training clips" not in capsys.readouterr().out
    assert "includes_training_clips" not in written(brief)
