"""experiments/figures.py: the pictures of a real run."""

import csv
from argparse import Namespace

import av
import pytest
import torch
from conftest import make_video

from augment import LogMel, centre_crop, normalize_frames
from data import read_clip
from experiments import figures
from experiments.ablation import COLUMNS, EQUAL
from experiments.figures import SHIFTS, lambda_by_speeds, similarity_by_shift
from loss import cross_affinity
from prepare import scan
from retrieval import load


def pixels(path):
    with av.open(str(path)) as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")


def values(path, column):
    """A column of a csv, as numbers."""
    with open(path, newline="") as file:
        return [float(line[column]) for line in csv.DictReader(file)]


def draw(*args):
    figures.main([str(arg) for arg in args])


@pytest.fixture
def some(tree, brief, tmp_path):
    """The model in evaluation mode, its settings, and the clips of m.csv, three of two classes."""
    rows = [row for row in scan.scan(tree) if row["split"] == "test"]
    scan.write(rows[10:13], tmp_path / "m.csv")
    model, settings, clips, _ = load(Namespace(checkpoint=brief, data=tmp_path / "m.csv",
                                               split="test", clips=1))
    return model.eval(), settings, clips


@pytest.mark.slow
def test_affinities(brief, tmp_path):
    draw("affinity", "--checkpoint", brief, "--show", 3, "--out", tmp_path / "a.png")
    assert pixels(tmp_path / "a.png").std() > 20
    means = values(tmp_path / "a.csv", "lambda")
    assert len(means) == 4 and abs(sum(means) - 1) < 1e-3 and max(means) < 0.9


def test_curves(brief, tmp_path):
    draw("curves", brief.parent, "--out", tmp_path / "c.png")
    assert pixels(tmp_path / "c.png").shape == (216, 792, 3)


def test_links_are_drawn_from_the_csv_files_of_the_ablation(tmp_path, monkeypatch):
    """Three sets by two rows, of each the mean over seeds."""
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, out: drawn.append(figure))
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    for n, step in enumerate(("", "-hide-kind", "-hide-kind-rhythm")):
        with open(tmp_path / f"ablation{step}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="0")
            writer.writeheader()
            writer.writerows({"row": row, "class R@1": 10 * n + m, "instance R@5": 20 * n + m,
                              "clips": 224} for row in ("raw y", *EQUAL) for m in (1, 3))
    draw("links", "--out", tmp_path / "l.png")
    for axis, tens in zip(drawn[0].axes, (10, 20)):
        points = [container[0].get_ydata().tolist() for container in axis.containers]
        assert points == [[2, tens + 2, 2 * tens + 2]] * 2


@pytest.mark.parametrize("what,data,sentence", [
    ("affinity", "short", "no clip of the 'test' part lasts 2.0 s, as this picture needs"),
    ("ratios", "m.csv", ".*gone.mp4: No such file")])
def test_bad_input(what, data, sentence, tree, brief, tmp_path):
    if data == "short":
        make_video(tmp_path / "short" / "test" / "c" / "a.mp4", 1.2, 10)
    rows = [row | {"path": str(tmp_path / "gone.mp4")} for row in scan.scan(tree)]
    scan.write(rows, tmp_path / "m.csv")
    with pytest.raises(SystemExit, match=f"error: {sentence}"):
        draw(what, "--checkpoint", brief, "--data", tmp_path / data, "--out", tmp_path / "x")


@pytest.mark.slow
@torch.no_grad()
def test_ratios_show_the_lambda_of_training(some, brief, tmp_path):
    """Each pair of speeds as in training: two views of each modality, the first at speed 1."""
    model, settings, clips = some
    lams = lambda_by_speeds(model, settings, clips, "test")             # (3, 4, 4)
    for row, lam in zip(clips.rows, lams, strict=True):
        for tau_a, tau_v in ((1, 1), (2, 4), (4, 3)):
            video, waves = read_clip(row.path, (row.duration - 2) / 2, (1, tau_v), (1, tau_a), 4, 8,
                                     16, centre_crop)
            y_a, y_v, _, _ = model(LogMel()(waves)[None], normalize_frames(video)[None])
            expected = cross_affinity(y_a, y_v)[0, 1, 1]
            assert abs(lam[tau_a - 1, tau_v - 1] - expected) < 1e-5
        assert abs(lam[0, 0] - 0.25) < 1e-6             # the same view twice
    draw("ratios", "--checkpoint", brief, "--data", tmp_path / "m.csv", "--out", tmp_path / "r.png")
    assert pixels(tmp_path / "r.png").std() > 20
    mean = lams.mean(0).flatten().tolist()
    assert values(tmp_path / "r.csv", "lambda") == pytest.approx(mean, rel=1e-3)


@pytest.mark.slow
@torch.no_grad()
def test_shifts_move_the_sound(some, brief, tmp_path):
    model, _, clips = some
    own, others = similarity_by_shift(model, LogMel(), clips, "test")
    assert own.shape == others.shape == (3, len(SHIFTS))
    for shift in (-1, 0, 0.5):
        z = []                                          # of the clips: (z_a with the shift, z_v)
        for row in clips.rows:
            t0 = (row.duration - 0.5) / 2
            video, _ = read_clip(row.path, t0, (1,), (1,), 4, 8, 16, centre_crop)
            _, waves = read_clip(row.path, t0 + shift, (1,), (1,), 4, 8, 16, centre_crop)
            z.append(model(LogMel()(waves)[None], normalize_frames(video)[None])[2:])
        for n, (_, z_v) in enumerate(z):
            s = [torch.cosine_similarity(z_a[0, 0], z_v[0, 0], 0).item() for z_a, _ in z]
            k = SHIFTS.index(shift)
            assert abs(own[n, k] - s[n]) < 2e-3
            assert abs(others[n, k] - (sum(s) - s[n]) / 2) < 2e-3
    draw("shifts", "--checkpoint", brief, "--data", tmp_path / "m.csv", "--out", tmp_path / "s.png")
    assert values(tmp_path / "s.csv", "shift, s") == SHIFTS
    for name, s in (("sound of the same file", own), ("sounds of other files", others)):
        assert values(tmp_path / "s.csv", name) == pytest.approx(s.mean(0).tolist(), abs=1e-3)
