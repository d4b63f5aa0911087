"""Retrieval against a brute-force copy, chance against random features, and bad input."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import make_video, run, run_here, with_damaged

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
    parts = [torch.stack(ranks(q, v, labels, first, last, 9))
             for first, last in ((0, 23), (23, 23), (23, 70))]
    assert torch.cat(parts, 1).equal(whole)


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


def test_command_prints_and_keeps_the_table(brief, capsys):
    for feature in ("y", "z"):
        assert run_here(retrieval, "--checkpoint", brief, "--clips", "2", "--feature", feature) == 0
        text = capsys.readouterr().out
        kept = json.loads((brief.parent / "retrieval.json").read_text())
        assert kept["pool"] == 24 and kept["classes"] == 2 and kept["feature"] == feature
        value, error = kept["class, video -> audio"]["R@5"]
        assert f"{100 * value:.1f} +- {100 * error:.1f}" in text and f"feature {feature}" in text
        assert kept["instance, chance"]["R@5"] == pytest.approx(5 / 24)


def damaged(tree, tmp_path, chosen):
    """`with_damaged` of the tree's test part."""
    rows = [row for row in scan.scan(tree) if row["split"] == "test"]
    return with_damaged(rows, tmp_path, chosen)


@pytest.mark.slow
def test_a_file_that_fails_leaves_the_pool(tree, brief, tmp_path):
    """One of 24, on the last process: the numbers are those without it, and the table says so."""
    with_it, without = damaged(tree, tmp_path, (13,))
    found = []
    for data, processes in ((without, 1), (with_it, 1), (with_it, 2)):
        done = run("--checkpoint", brief, "--data", data, "--clips", "2", script="retrieval.py",
                   processes=processes)
        kept = json.loads((brief.parent / "retrieval.json").read_text())
        many = int(data == with_it)
        assert (kept.pop("failed"), kept.pop("videos"), kept["pool"]) == (many, 23 + many, 23)
        assert done.stdout.count("of 2 classes (0 left out; 1 of 24 videos failed)") == many
        assert done.stderr.count(f"failed: {tmp_path / 'bad13.mp4'}: Invalid data") == many
        kept.pop("data")
        found.append(kept)
    assert found[0] == found[1] == found[2]


@pytest.mark.slow
def test_two_processes_count_their_failures_together(tree, brief, tmp_path):
    """One of each process's twelve: each alone is within the share of 24, both are not."""
    data, _ = damaged(tree, tmp_path, (4, 13))
    done = run("--checkpoint", brief, "--data", data, "--clips", "2", script="retrieval.py",
               processes=2, check=False)
    assert done.returncode != 0 and "R@20" not in done.stdout
    assert re.search("error(?: on rank 1)?: 2 of 24 videos failed, more than a share of 0.05, the "
                     f"last: {tmp_path}/bad13.mp4: Invalid", done.stderr)


def test_bad_input(brief, tmp_path, capsys):
    made = make_video(tmp_path / "silent" / "test" / "c" / "0.mp4", 1, 10, tone=None)
    for n in range(1, 22):
        (made.parent / f"{n}.mp4").write_bytes(made.read_bytes())
    made = make_video(tmp_path / "one" / "test" / "c" / "0.mp4", 1, 10)
    for n in range(1, 22):
        (made.parent / f"{n}.mp4").write_bytes(made.read_bytes())
    (tmp_path / "few" / "test" / "c").mkdir(parents=True)
    (tmp_path / "few" / "test" / "c" / "0.mp4").write_bytes(made.read_bytes())
    state = torch.load(brief, weights_only=True)
    state["model"]["h_a.3.bias"][:] = torch.nan
    torch.save(state, tmp_path / "nan.pt")
    for n in range(22):
        path = tmp_path / "bad" / f"class{n % 2}" / f"bad{n}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(made.read_bytes())
    scan.write(scan.scan(tmp_path / "bad"), tmp_path / "bad.csv")
    for n in (0, 2):
        (tmp_path / "bad" / "class0" / f"bad{n}.mp4").write_bytes(b"damaged since the scan")
    with open(tmp_path / "bad.csv") as file, open(tmp_path / "twenty.csv", "w") as twenty:
        twenty.writelines(line for line in file if not re.search("bad[23].mp4", line))
    for flags, sentence in (
            (["--checkpoint", tmp_path / "gone.pt"], "no checkpoint"),
            (["--checkpoint", brief.parent / "video_encoder.pt"],
             "is no checkpoint.pt of this project: it lacks model, settings"),
            (["--data", tmp_path / "silent"], "0 usable clips in the 'test' part, but R@20 needs "
             "20 or more; left out: 22 no audio"),
            (["--data", tmp_path / "few"], "1 usable clips in the 'test' part"),
            (["--data", tmp_path / "bad.csv"], "2 of 22 videos failed, more than a share of 0.05, "
             f"the last: {tmp_path}/bad/class0/bad2.mp4: Invalid data found when processing input; "
             "all are named above"),
            (["--data", tmp_path / "twenty.csv"], "19 usable clips in the 'test' part, but R@20 "
             "needs 20 or more; left out: 1 failed"),
            (["--checkpoint", tmp_path / "nan.pt"], "features are not finite"),
            (["--data", tmp_path / "one"], "all clips are of one class, 'c'"),
            (["--data", tmp_path / "one", "--split", "val"], "has no 'val' part")):
        status = run_here(retrieval, "--checkpoint", brief, *flags)
        errors = [line for line in capsys.readouterr().err.splitlines()
                  if line.startswith("error: ")]
        assert status == 1 and len(errors) == 1 and sentence in errors[0], errors
