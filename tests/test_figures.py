"""experiments/figures.py: the pictures of a real run."""

import numpy as np
import pytest
import torch
from conftest import command, make_video
from matplotlib.image import imread

from augment import LogMel, centre_crop, normalize_frames
from data import read_clip, read_manifest
from experiments import figures
from experiments.ablation import COLUMNS, EQUAL, write_csv
from models import SvaCLR
from prepare import scan
from support.checkpoints import load_svaclr
from support.rows import write_rows


@pytest.mark.slow
@torch.no_grad()
def test_affinities(tree, brief, tmp_path):
    """The softmax of the cosines of y_v and the y_a of four speeds."""
    write_rows(scan.survey("folder", tree)[0][10:13], tmp_path / "m.csv")  # the test part's
    assert command(figures, "affinity", "--checkpoint", brief, "--data", tmp_path / "m.csv",
                   "--show", 2, "--out", tmp_path / "a.png")[0] == 0
    assert imread(tmp_path / "a.png")[..., :3].std() > 20 / 255
    model, lams = load_svaclr(brief, SvaCLR)[0].eval(), []
    for row in read_manifest(tmp_path / "m.csv")[0]:
        video, waves = read_clip(row.path, (row.duration - 2) / 2, (1,), (1, 2, 3, 4), 4, 8, 16,
                                 centre_crop)
        y_a, y_v = model.g(LogMel()(waves)), model.f(normalize_frames(video))
        lams.append(torch.cosine_similarity(y_a, y_v).softmax(0))
    lams = torch.stack(lams)  # (3, 4)
    expected = torch.stack([torch.arange(1, 5), lams.mean(0), lams.std(0)], 1)
    found = np.loadtxt(tmp_path / "a.csv", delimiter=",", skiprows=1)
    assert found == pytest.approx(expected.numpy(), rel=1e-3, abs=1e-6)


def test_curves(brief, tmp_path):
    assert command(figures, "curves", brief.parent, "--out", tmp_path / "c.png")[0] == 0
    assert imread(tmp_path / "c.png").shape == (216, 792, 4)


def test_links_are_drawn_from_the_csv_files_of_the_ablation(tmp_path, monkeypatch):
    """Three sets by two rows, of each the mean over seeds."""
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, out: drawn.append(figure))
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    for n, step in enumerate(("", "-hide-kind", "-hide-kind-rhythm")):
        lines = [{"row": row, "class R@1": 10 * n + m, "instance R@5": 20 * n + m, "clips": 224}
                 for row in ("raw y", *EQUAL) for m in (1, 3)]
        write_csv(lines, COLUMNS, "", tmp_path / f"ablation{step}.csv")
    assert command(figures, "links", "--out", tmp_path / "l.png")[0] == 0
    for axis, tens in zip(drawn[0].axes, (10, 20)):
        points = [container[0].get_ydata().tolist() for container in axis.containers]
        assert points == [[2, tens + 2, 2 * tens + 2]] * 2


def test_bad_input(brief, tmp_path):
    make_video(tmp_path / "test" / "c" / "a.mp4", 1.2, 10)
    status, _, errors = command(figures, "affinity", "--checkpoint", brief, "--data", tmp_path,
                                "--out", tmp_path / "x")
    assert status == 1
    assert "error: no clip of the 'test' part lasts 2.0 s, as this picture needs\n" in errors
