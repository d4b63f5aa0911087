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
from prepare import scan
from retrieval import load


def pixels(path):
    with av.open(str(path)) as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")


def draw(*args):
    figures.main([str(arg) for arg in args])


@pytest.mark.slow
@torch.no_grad()
def test_affinities(tree, brief, tmp_path):
    """Of three clips of two classes: the softmax of the cosines of y_v and the y_a of 4 speeds."""
    rows = [row for row in scan.scan(tree) if row["split"] == "test"]
    scan.write(rows[10:13], tmp_path / "m.csv")
    draw("affinity", "--checkpoint", brief, "--data", tmp_path / "m.csv", "--show", 2, "--out",
         tmp_path / "a.png")
    assert pixels(tmp_path / "a.png").std() > 20
    model, _, clips, _ = load(Namespace(checkpoint=brief, data=tmp_path / "m.csv", split="test",
                                        clips=1))
    model.eval()
    lams = []
    for row in clips.rows:
        video, waves = read_clip(row.path, (row.duration - 2) / 2, (1,), (1, 2, 3, 4), 4, 8, 16,
                                 centre_crop)
        y_a, y_v = model.g(LogMel()(waves)), model.f(normalize_frames(video))
        lams.append(torch.cosine_similarity(y_a, y_v).softmax(0))
    lams = torch.stack(lams)                                            # (3, 4)
    with open(tmp_path / "a.csv", newline="") as file:
        lines = [[float(x) for x in line] for line in [*csv.reader(file)][1:]]
    for line, expected in zip(lines, zip((1, 2, 3, 4), lams.mean(0), lams.std(0)), strict=True):
        assert line == pytest.approx([float(x) for x in expected], rel=1e-3, abs=1e-6)


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


@pytest.mark.parametrize("data,sentence", [
    ("short", "no clip of the 'test' part lasts 2.0 s, as this picture needs"),
    ("m.csv", ".*gone.mp4: No such file")])
def test_bad_input(data, sentence, tree, brief, tmp_path):
    if data == "short":
        make_video(tmp_path / "short" / "test" / "c" / "a.mp4", 1.2, 10)
    rows = [row | {"path": str(tmp_path / "gone.mp4")} for row in scan.scan(tree)]
    scan.write(rows, tmp_path / "m.csv")
    with pytest.raises(SystemExit, match=f"error: {sentence}"):
        draw("affinity", "--checkpoint", brief, "--data", tmp_path / data, "--out", tmp_path / "x")
