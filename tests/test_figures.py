"""The three pictures, made by the real commands from a real run."""

import re
import subprocess
import sys

import av
import pytest
import torch
from conftest import ROOT, make_video

from experiments.figures import spread
from loss import cross_affinity
from prepare import scan


def figures(*args):
    return subprocess.run([sys.executable, "-m", "experiments.figures", *map(str, args)], cwd=ROOT, capture_output=True, text=True)


def pixels(path):
    with av.open(str(path)) as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")


def test_affinity(brief, tmp_path):
    done = figures("affinity", "--checkpoint", brief, "--show", 3, "--out", tmp_path / "a.png")
    assert done.returncode == 0, done.stderr
    means = [float(m) for m in re.findall(r"([\d.]+) \+-", done.stdout)]
    assert len(means) == 4 and abs(sum(means) - 1) < 1e-3 and max(means) < 0.9
    assert pixels(tmp_path / "a.png").std() > 20 and (tmp_path / "a.png").stat().st_size < 300_000


def test_curves(brief, tmp_path):
    done = figures("curves", brief.parent, "--out", tmp_path / "c.png")
    assert done.returncode == 0, done.stderr
    assert pixels(tmp_path / "c.png").shape == (216, 792, 3)
    gone = figures("curves", tmp_path / "gone", "--out", tmp_path / "g.png")
    assert gone.returncode == 1 and gone.stderr.startswith("error: no ") and "log.jsonl: give the --out folder" in gone.stderr


def test_neighbours(brief, tmp_path):
    done = figures("neighbours", "--checkpoint", brief, "--show", 2, "--clips", 2, "--out", tmp_path / "n.png")
    assert done.returncode == 0, done.stderr
    assert pixels(tmp_path / "n.png").std() > 20


def test_neighbours_without_a_film_that_fails(tree, brief, tmp_path):
    rows = [row for row in scan.scan(tree) if row["split"] == "test"]
    rows[0]["path"] = str(tmp_path / "gone.mp4")          # the first would be shown
    scan.write(rows, tmp_path / "m.csv")
    done = figures("neighbours", "--checkpoint", brief, "--data", tmp_path / "m.csv", "--show", 2,
                   "--clips", 2, "--out", tmp_path / "n.png")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"failed: {tmp_path / 'gone.mp4'}: No such file") == 1


def test_clips_too_short_for_speed_4(brief, tmp_path):
    make_video(tmp_path / "d" / "test" / "c" / "a.mp4", 1.2, 10)
    done = figures("affinity", "--checkpoint", brief, "--data", tmp_path / "d", "--out", tmp_path / "x.png")
    assert done.returncode == 1 and "no clip of the 'test' part lasts 2.0 s, as speed 4 needs" in done.stderr.splitlines()[-1]


def test_lambda_of_four_sounds_with_one_video():
    g = torch.Generator().manual_seed(0)
    y_a, y_v = torch.randn(1, 4, 8, generator=g), torch.randn(1, 1, 8, generator=g)
    lam = cross_affinity(y_a, y_v)
    assert lam.shape == (1, 4, 1)
    cos = torch.cosine_similarity(y_a[0], y_v[0])
    torch.testing.assert_close(lam[0, :, 0], cos.exp() / cos.exp().sum())


@pytest.mark.parametrize("n,of,expected", [(3, 7, [0, 3, 6]), (6, 2, [0, 1]), (1, 5, [0])])
def test_spread(n, of, expected):
    assert spread(n, of) == expected
