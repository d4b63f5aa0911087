"""finetune.py: the protocol, oracles, and runs on a small UCF101."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import (ROOT, captured, command_lines, error_of, make_video, run, run_here,
                      with_damaged, write_text)
from torch.nn import functional as F

import finetune
from data import ActionClips, read_manifest
from experiments import predict
from finetune import classifier, evaluate, learning_rates, parse
from models import video_encoder
from prepare import scan
from support.checkpoints import say_torchvision
from support.classification import fit_linear, subset
from support.rows import Row, read_rows, write_rows

SMALL = ("--arch r2plus1d_10 --size 16 --frames 4 --fps 8 --train-clips 2 --test-clips 2 "
         "--global-batch 4 --epochs 1 --workers 1 --precision fp32").split()


def test_learning_rates():
    """The head's, by epochs of 12. Those of the trunk are a tenth."""
    expected = {0: 2.5e-3, 1: (2.5e-3 + 2e-2) / 2, 2: 2e-2, 5.99: 2e-2, 6: 1e-3, 9.99: 1e-3,
                10: 5e-5, 11.9: 5e-5}
    for epoch, head in expected.items():
        assert learning_rates(epoch, 12, 2e-2) == pytest.approx((head, head / 10))
        assert learning_rates(2 * epoch, 24, 2e-2) == pytest.approx((head, head / 10))


def test_defaults_are_the_protocols():
    protocol = dict(frames=32, fps=30, size=128, epochs=12, global_batch=32, train_clips=10,
                    test_clips=10, lr=2e-2, weight_decay=5e-3, arch="r2plus1d_18", fraction=1.0)
    assert vars(parse(["--data", "x"])).items() >= protocol.items()
    assert vars(parse([])).items() >= finetune.DEMO.items()
    head = classifier(video_encoder("r2plus1d_10"), 5).head
    torch.testing.assert_close(head.weight @ head.weight.T, torch.eye(5), atol=1e-5, rtol=0)
    assert head.bias.eq(0).all()


@pytest.mark.parametrize("flags,sentence", [
    ("--data u.csv --fold 1", "--fold and a {fold} in --data need each other: "),
    ("--data u{fold}.csv", "--fold and a {fold} in --data need each other: "),
    ("--fraction 0", "--fraction: '0' is not a share above 0 and at most 1")])
def test_bad_flags(flags, sentence):
    status, _, errors = captured(lambda: parse(flags.split()))
    assert status == 2 and sentence in errors


def test_subset_of_the_labels():
    rows = [Row(f"{label}{n}", label, "train", 1, 1, True, "")
            for label, many in (("a", 40), ("b", 3)) for n in range(many)]
    least, quarter, half = (subset(rows, share, 0) for share in (0.01, 0.25, 0.5))
    assert [row.label for row in least] == ["a", "b"] and subset(rows, 1.0, 0) == rows
    assert [len(quarter), len(half)] == [11, 22]
    assert set(least) < set(quarter) < set(half)
    assert subset(rows, 0.25, 0) == quarter != subset(rows, 0.25, 1)


def test_linear_fit_is_the_minimum():
    """Of softmax regression on standardised features: its gradient is zero."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 4
    x = 3 + 5 * torch.randn(200, 12, generator=g) + 4 * F.one_hot(labels, 12)
    linear = fit_linear(x, labels, decay=0.1).requires_grad_()
    standardised = linear.weight * x.std(0)
    loss = F.cross_entropy(linear(x), labels)
    (loss + 0.05 * standardised.square().sum()).backward()
    assert max(x.grad.abs().max() for x in linear.parameters()) < 1e-4
    assert standardised.abs().max() > 0.05


@pytest.fixture(scope="module")
def ucf(tmp_path_factory):
    """Dark and light films that grow lighter: in a fold six to train, then two to test, and one in
    the third, so that the folds do not all score alike."""
    root = tmp_path_factory.mktemp("ucf")
    for label, level in (("dark", 50), ("light", 150)):
        for n in range(1, 5):
            make_video(root / "films" / label / f"{n}.avi", 1 + n / 5, 10, (32, 24), tone=None,
                       codec="mpeg4", gray=lambda t: level + 5 * n + 30 * t)
    rows, _ = scan.survey("folder", root / "films")
    for fold in (1, 2, 3):
        part = lambda row: "test" if row["path"].endswith(f"{fold}.avi") else "train"
        lines = [row | {"split": part(row)} for row in sorted(rows, key=part, reverse=True)]
        write_rows(lines[:7] if fold == 3 else lines, root / f"ucf101-{fold}.csv")
    return root


@pytest.fixture(scope="module")
def tuned(ucf):
    """The docs' line for UCF101 in two processes: its flags, and its output."""
    (ucf / "runs" / "k400").mkdir(parents=True)
    torch.save(video_encoder("r2plus1d_10").state_dict(), ucf / "runs/k400/checkpoint.pt")
    line, other = (line for line in command_lines((ROOT / "docs/running.md").read_text())
                   if "torchrun --nproc_per_node=8 finetune.py " in line)
    assert line == other.replace("hmdb51", "ucf101")
    flags = [*line.split()[3:], *SMALL]
    return flags, run(*flags, processes=2, script="finetune.py", cwd=ucf).stdout


@torch.no_grad()
def test_evaluation_averages_softmax_over_clips_and_crops(ucf):
    rows, _ = read_manifest(ucf / "ucf101-1.csv", "train")
    clips = ActionClips(rows, ["dark", "light"], 4, 8, 16, clips_per_file=3, crops=3)
    torch.manual_seed(0)
    model = classifier(video_encoder("r2plus1d_10"), 2)
    model.head.weight *= 100  # so that its clips differ
    scores, hits, found = evaluate(model, clips, torch.float32)
    assert found == rows
    for n in (0, 5):
        video, label, _ = clips[n]
        p = model(((video / 255 - 0.45) / 0.225).movedim(-1, 1)).softmax(1)  # (9, 2)
        assert len(p) == 9 and p[:, 0].std() > 0.01
        torch.testing.assert_close(scores[n], p.mean(0))
        expected = torch.tensor([(p.argmax(1) == label).float().mean(), 1.0])
        torch.testing.assert_close(hits[n], expected)


@pytest.mark.slow
def test_commands_of_the_docs_on_a_small_ucf101(ucf, tuned, monkeypatch):
    """One process has nothing to train, and evaluates to the same results."""
    monkeypatch.chdir(ucf)
    (flags, printed), out = tuned, Path("runs/ucf101")
    assert "clips of 4 frames of 16 pixels, 8 per s; 6 training and 2 test videos" in printed
    assert "global batch 4 = 2 process(es) x 2 clips, 3 steps an epoch, 3 steps in all" in printed
    kept = json.loads((out / "results.json").read_text())
    assert kept["protocol"]["epochs"] == 1 and kept["epoch"] == "last"
    mean = sum(kept[f"fold {n}"]["clip top-1"] for n in (1, 2, 3)) / 3
    assert kept["mean"]["clip top-1"] == pytest.approx(mean)
    assert f"clip top-1 {mean:.1f} %" in printed.split("mean: ")[1]
    again = run(*flags, script="finetune.py").stdout
    assert again.count("has been trained to its last step") == 3
    assert again.splitlines()[-5:-1] == printed.splitlines()[-5:-1]
    run(*flags, "--fold", "2", script="finetune.py")  # leaves the mean alone
    assert json.loads((out / "results.json").read_text()) == kept
    fold = json.loads((out / "fold2" / "results.json").read_text())
    assert fold["fold 2"] == kept["fold 2"] and "fold 1" not in fold
    assert (out / "fold3" / "confusion.csv").exists()


@pytest.mark.slow
def test_files_that_fail_are_left_out(ucf, tmp_path):
    """A training video and one of two test videos fail, each on another process."""
    with_them, _ = with_damaged(read_rows(ucf / "ucf101-2.csv"), tmp_path, (4, 7))
    flags = f"--data {with_them} --checkpoint none --linear --out {tmp_path} --max-failures 0.5"
    done = run(*flags.split(), *SMALL, processes=2, script="finetune.py")
    result = json.loads((tmp_path / "results.json").read_text())["test"]
    assert result["failed"] == result["failed in training"] == result["test videos"] == 1
    assert "1 of 2 test videos failed" in done.stdout
    assert "1 of 6 training videos failed" in done.stdout
    assert (tmp_path / "confusion.csv").read_text().endswith("\ndark,1,0\nlight,0,0\n")
    assert "\ndark,1,1,1.0000\n" in (tmp_path / "classes.csv").read_text()
    assert result["video top-1"] == 100  # it is plain to see


def test_a_tie_counts_against_the_model(ucf, tmp_path, monkeypatch):
    """A head of zeros gives all classes one score: no answer is right."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finetune, "train",
                        lambda args, model, *_: torch.nn.init.zeros_(model.head.weight))
    rows = read_rows(ucf / "ucf101-1.csv")
    write_rows([*rows, rows[-1]], "m.csv")
    run(*"--data m.csv --checkpoint none --out .".split(), *SMALL, script="finetune.py")
    result = json.loads(Path("results.json").read_text())["test"]
    assert result["video top-1"] == result["clip top-1"] == 0
    assert result["video top-5"] == result["clip top-5"] == 100  # there are two classes
    assert Path("confusion.csv").read_text() == ",dark,light\ndark,0,1\nlight,2,0\n"
    assert Path("classes.csv").read_text().endswith("\ndark,1,0,0.0000\nlight,2,0,0.0000\n")


@pytest.mark.slow
def test_predictions_are_those_of_the_test(ucf, tuned, tmp_path, capsys):
    """Two of four files fail."""
    out, film = ucf / "runs/ucf101/fold1", str(ucf / "films/dark/1.avi")
    text = write_text(tmp_path / "text.mp4", "no film")
    cut = make_video(tmp_path / "cut.mp4", 4, 30, (180, 136), None, muxer={"movflags": "faststart"})
    cut.write_bytes(cut.read_bytes()[:cut.stat().st_size // 2])
    wide = str(make_video(tmp_path / "a, wide.mp4", 1.5, 10, (96, 32)))  # its crops differ
    row, _ = scan.probe_file(wide, "dark")
    clips = ActionClips([row], ["dark", "light"], 4, 8, 16, clips_per_file=2, crops=3)
    model = classifier(video_encoder("r2plus1d_10"), 2)
    model.load_state_dict(torch.load(out / "checkpoint.pt", weights_only=True)["model"])
    (p,), *_ = evaluate(model, clips, torch.float32)
    assert run_here(predict, out, text, cut, wide, film) == 1
    printed, errors = capsys.readouterr()
    assert "epoch 1 of 1, 2 classes, 2 clips x 3 crops, float32 (as asked)" in printed
    for path, cause in ((text, "cannot be read: "), (cut, "its video ends at 1.17 s")):
        assert errors.count(f"failed: {path}: {cause}") == 1
    best = p.argmax()
    assert f"\n{wide}\n   1  {p[best]:6.3f}  {clips.classes[best]}\n" in printed
    _, first, second, *others = csv.reader((out / "predictions.csv").read_text().splitlines())
    assert first[:3] == [wide, "1", clips.classes[best]]
    assert second[:3] == [wide, "2", clips.classes[1 - best]]
    assert float(first[3]) == pytest.approx(p[best].item(), abs=1e-4)
    assert [path for path, *_ in others] == [film] * 2
    assert run_here(predict, out, film) == 0
    assert run_here(predict, tmp_path, film) == 1
    assert (f"{tmp_path} has no checkpoint.pt of a fine-tuning with its class names "
            "(--linear writes none)" in error_of(capsys.readouterr().err))


def test_the_input_of_torchvisions_weights_is_said(capsys):
    say_torchvision("runs/a.pt", 32, 30, 128)
    assert capsys.readouterr().out == ""
    say_torchvision("torchvision", 32, 30, 128)
    assert "here they get --frames 32 --fps 30 --size 128" in capsys.readouterr().out


@pytest.mark.slow
def test_bad_input(ucf, tuned, tmp_path, monkeypatch, capsys):
    """Neither another encoder nor the other protocol writes over results."""
    monkeypatch.chdir(shutil.copytree(ucf, tmp_path / "ucf"))
    flags = "--data ucf101-1.csv --checkpoint none --out new".split() + SMALL
    assert run_here(finetune, *flags, "--linear", "--out", "linear") == 0
    Path("runs/ucf101/fold1/results.json").unlink()  # as of a run that was stopped
    torch.save(video_encoder("r2plus1d_10").state_dict(), "runs/k400/checkpoint.pt")
    torch.save({"settings": {"arch": "r3d_18"}, "model": {}}, "r3d.pt")
    rows = read_rows("ucf101-1.csv")
    write_rows([row | {"split": ""} for row in rows], "undivided.csv")
    write_rows([*rows[:-1], rows[-1] | {"label": "Diving"}], "strange.csv")
    write_rows(rows, "part-1.csv")
    with_damaged(rows, Path(), (0, 1, 2))
    capsys.readouterr()
    for more, sentence in (
            (" ".join(tuned[0]), "made with other settings (encoder was "),
            ("--linear --out runs/ucf101", "runs/ucf101 holds another training"),
            ("--linear --out runs/ucf101/fold1", "runs/ucf101/fold1 holds another training"),
            ("--out linear", "linear holds a linear probe: give"),
            ("--data with.csv --linear --max-failures 0.5",
             "all training videos of a class failed: mend or replace those named above"),
            ("--data strange.csv",
             "1 of the test part's classes are not in its train part: Diving"),
            ("--data undivided.csv", "has no train and test parts (its split column is empty)"),
            ("--data part-{fold}.csv --fold 1 3", "part-3.csv: no such manifest"),   # said at once
            ("--checkpoint r3d.pt", "; it was trained with --arch r3d_18"),
            ("--checkpoint torchvision",
             "torchvision has no weights for r2plus1d_10: choose r2plus1d_18 or r3d_18"),
            ("--global-batch 64", "12 training clips do not fill a batch of 64")):
        assert run_here(finetune, *flags, *more.split()) == 1
        assert sentence in error_of(capsys.readouterr().err)
    assert not Path("new/fold1").exists()
