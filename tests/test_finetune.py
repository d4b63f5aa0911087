"""Fine-tuning, the linear probe and their test: the protocol, oracles, runs on a small UCF101."""

import csv
import json
import shutil

import pytest
import torch
from conftest import ROOT, command_lines, error_of, make_video, run, run_here, with_damaged

import finetune
from data import ActionClips, probe_file, read_manifest
from finetune import classifier, evaluate, learning_rates, parse
from models import video_encoder
from prepare import scan
from prepare.scan import Row
from support.classification import fit_linear, say_torchvision, subset

SMALL = ["--arch", "r2plus1d_10", "--size", "16", "--frames", "4", "--fps", "8",
         "--train-clips", "2", "--test-clips", "2", "--global-batch", "4", "--epochs", "1",
         "--workers", "1", "--precision", "fp32"]


def test_learning_rates():
    """Head 2.5e-3 -> 2e-2 in two epochs, times 0.05 at 6 and again at 10; the trunk a tenth."""
    expected = {0: 2.5e-3, 1: (2.5e-3 + 2e-2) / 2, 2: 2e-2, 5.99: 2e-2, 6: 1e-3, 9.99: 1e-3,
                10: 5e-5, 11.9: 5e-5}
    for epoch, head in expected.items():
        assert learning_rates(epoch, 12, 2e-2) == pytest.approx((head, head / 10))
        assert learning_rates(2 * epoch, 24, 2e-2) == pytest.approx((head, head / 10))


def test_defaults_are_the_protocols():
    args = parse(["--data", "x"])
    protocol = dict(frames=32, fps=30, size=128, epochs=12, global_batch=32, train_clips=10,
                    test_clips=10, lr=2e-2, weight_decay=5e-3, arch="r2plus1d_18", fraction=1.0)
    assert {name: getattr(args, name) for name in protocol} == protocol
    demo = parse([])
    assert {name: getattr(demo, name) for name in finetune.DEMO} == finetune.DEMO


@pytest.mark.parametrize("flags,sentence", [
    (["--data", "u.csv", "--fold", "1"], "--fold and a {fold} in --data need each other: "),
    (["--data", "u{fold}.csv"], "--fold and a {fold} in --data need each other: "),
    (["--fraction", "0"], "--fraction: '0' is not a share above 0 and at most 1"),
    (["--predict", "a.mp4", "--data", "u", "--train-clips", "16", "--linear"],
     "(which --linear does not write): leave out --data --train-clips --linear")])
def test_bad_flags(flags, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(flags)
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


def test_head_at_the_start():
    head = classifier(video_encoder("r2plus1d_10"), 5).head
    torch.testing.assert_close(head.weight @ head.weight.T, torch.eye(5), atol=1e-5, rtol=0)
    assert head.bias.eq(0).all()


def test_subset_of_the_labels():
    rows = [Row(f"{label}{n}", label, "train", 1.0, 1.0, True, "")
            for label, many in (("a", 40), ("b", 3)) for n in range(many)]
    least, quarter, half, all_rows = (subset(rows, share, 0) for share in (0.01, 0.25, 0.5, 1.0))
    assert [row.label for row in least] == ["a", "b"]
    assert [len(quarter), len(half)] == [11, 22] and all_rows == rows
    assert set(least) < set(quarter) < set(half)
    assert subset(rows, 0.25, 0) == quarter != subset(rows, 0.25, 1)


def test_linear_fit_is_the_minimum():
    """Softmax regression on standardised features: at the minimum its gradient is zero."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 4
    x = 3 + 5 * torch.randn(200, 12, generator=g) + 4 * torch.nn.functional.one_hot(labels, 12)
    linear = fit_linear(x, labels, decay=0.1)
    mean, std = x.mean(0), x.std(0)
    weight = (linear.weight * std).requires_grad_()         # for the standardised features
    bias = (linear.bias + linear.weight @ mean).requires_grad_()
    logits = (x - mean) / std @ weight.T + bias
    loss = torch.nn.functional.cross_entropy(logits, labels) + 0.05 * weight.square().sum()
    loss.backward()
    assert weight.grad.abs().max() < 1e-4 and bias.grad.abs().max() < 1e-4
    assert weight.abs().max() > 0.05


@pytest.fixture(scope="module")
def ucf(tmp_path_factory):
    """A small UCF101 with the manifests of its three folds.

    It has 2 classes of different brightness and 4 groups. Its films grow lighter.
    """
    root = tmp_path_factory.mktemp("ucf")
    for label, level in (("Archery", 50), ("Bowling", 150)):
        for group in range(1, 5):
            make_video(root / "UCF-101" / label / f"v_{label}_g{group:02d}_c01.avi",
                       1.0 + 0.2 * group, 10, size=(32, 24), tone=None, codec="mpeg4",
                       gray=lambda t: level + 5 * group + 30 * t)
    rows = scan.scan(root / "UCF-101")
    for fold in (1, 2, 3):
        split = lambda row: "test" if f"_g{fold:02d}_" in row["path"] else "train"
        scan.write([row | {"split": split(row)} for row in rows], root / f"ucf101-{fold}.csv")
    return root


def test_evaluation_averages_softmax_over_clips_and_crops(ucf):
    rows, _ = read_manifest(ucf / "ucf101-1.csv", "train")
    clips = ActionClips(rows, ["Archery", "Bowling"], frames=4, fps=8, size=16, clips_per_file=3,
                        crops=3)
    torch.manual_seed(0)
    model = classifier(video_encoder("r2plus1d_10"), 2)
    model.head.weight.data *= 100                         # so that the clips of a video differ
    scores, hits, found = evaluate(model, clips, torch.float32)
    assert found == rows
    for n in (0, 5):
        video, label, _ = clips[n]
        with torch.no_grad():
            p = model(((video / 255 - 0.45) / 0.225).movedim(-1, 1)).softmax(1)     # (9, 2)
        assert len(p) == 9 and p[:, 0].std() > 0.01
        torch.testing.assert_close(scores[n], p.mean(0))
        expected = torch.tensor([(p.argmax(1) == label).float().mean(), 1.0])
        torch.testing.assert_close(hits[n], expected)


@pytest.mark.slow
def test_commands_of_the_docs_on_a_small_ucf101(ucf, tmp_path, monkeypatch):
    """The line for UCF101 word for word, but for the number of processes and SMALL. results.json,
    confusion.csv, classes.csv and the printed lines of the three folds agree. The same command with
    one process has nothing to train, and evaluates to the same results."""
    out = tmp_path / "runs" / "ucf101"
    (tmp_path / "runs" / "k400").mkdir(parents=True)
    model = {f"f.{name}": x for name, x in video_encoder("r2plus1d_10").state_dict().items()}
    torch.save({"settings": {}, "model": model}, tmp_path / "runs" / "k400" / "checkpoint.pt")
    for fold in (1, 2, 3):
        shutil.copy(ucf / f"ucf101-{fold}.csv", tmp_path)
    lines = [line.split() for line in command_lines((ROOT / "docs" / "running.md").read_text())
             if line.startswith("torchrun --nproc_per_node=8 finetune.py ") and "{fold}" in line]
    assert [line[-2:] for line in lines] == [["--out", "runs/ucf101"], ["--out", "runs/hmdb51"]]
    assert [word.replace("hmdb51", "ucf101") for word in lines[1]] == lines[0]
    command = [*lines[0][3:], *SMALL]
    done = run(*command, processes=2, script=ROOT / "finetune.py", cwd=tmp_path)
    kept = json.loads((out / "results.json").read_text())
    assert kept["protocol"]["epochs"] == 1 and kept["epoch"] == "last"
    for name in ("video top-1", "clip top-1"):
        mean = sum(kept[f"fold {n}"][name] for n in (1, 2, 3)) / 3
        assert kept["mean"][name] == pytest.approx(mean)
        assert f"{name} {mean:.1f} %" in done.stdout.split("mean: ")[1]
    for fold in (1, 2, 3):
        head, *rows = read_csv(out / f"fold{fold}" / "confusion.csv")
        counts = [[int(x) for x in row[1:]] for row in rows]
        assert head == ["", "Archery", "Bowling"] and [sum(row) for row in counts] == [1, 1]
        _, *classes = read_csv(out / f"fold{fold}" / "classes.csv")
        assert [int(correct) for _, _, correct, _ in classes] == [counts[0][0], counts[1][1]]
        assert kept[f"fold {fold}"]["video top-1"] == 100 * (counts[0][0] + counts[1][1]) / 2
    again = run(*command, script=ROOT / "finetune.py", cwd=tmp_path, fresh=True)
    assert again.stdout.count("has been trained to its last step") == 3
    assert again.stdout.splitlines()[-5:-1] == done.stdout.splitlines()[-5:-1]
    place = command.index("--fold") + 1
    monkeypatch.chdir(tmp_path)                             # one fold leaves the mean as it is
    assert run_here(finetune, *command[:place], "2", *command[place + 3:]) == 0
    assert json.loads((out / "results.json").read_text()) == kept
    fold = json.loads((out / "fold2" / "results.json").read_text())
    assert fold["fold 2"] == kept["fold 2"] and "fold 1" not in fold


def read_csv(path):
    """The lines of a csv, the head included."""
    with open(path, newline="") as file:
        return list(csv.reader(file))


def damaged(ucf, tmp_path, chosen):
    """`with_damaged` of fold 2: six training videos, then two of the test."""
    rows = scan.read_table(ucf / "ucf101-2.csv")
    return with_damaged(sorted(rows, key=lambda row: row["split"] == "test"), tmp_path, chosen)


@pytest.mark.slow
def test_two_processes_evaluate_as_one_and_without_files_that_fail(ucf, tmp_path):
    """One of the six training videos of --linear and one of the two test videos fail, each on
    another process: the result is that without them, and says so."""
    with_them, without = damaged(ucf, tmp_path, (4, 7))
    torch.save(video_encoder("r2plus1d_10").state_dict(), tmp_path / "video_encoder.pt")
    results = []
    for data, processes in ((without, 1), (with_them, 1), (with_them, 2)):
        done = run("--data", data, "--checkpoint", tmp_path / "video_encoder.pt", "--linear",
                   "--out", tmp_path / "out", *SMALL, "--max-failures", "0.5",
                   processes=processes, script="finetune.py")
        kept = json.loads((tmp_path / "out" / "results.json").read_text())["test"]
        many = int(data == with_them)
        assert (kept.pop("failed"), kept.pop("failed in training")) == (many, many)
        for said in ("1 of 2 test videos failed", "1 of 6 training videos failed"):
            assert done.stdout.count(said) == many
        for n in (4, 7):
            assert done.stderr.count(f"failed: {tmp_path / f'bad{n}.avi'}: Invalid data") == many
        results.append((kept, read_csv(tmp_path / "out" / "confusion.csv")))
    assert results[0] == results[1] == results[2] and results[0][0]["test videos"] == 1
    assert results[0][0]["video top-1"] == 100            # brightness is plain to see


def test_a_tie_counts_against_the_model(ucf, tmp_path, monkeypatch):
    """A head of zeros gives all classes one score: no answer is right, in any of the results."""
    def train_nothing(args, model, clips, dtype):
        torch.nn.init.zeros_(model.head.weight)

    monkeypatch.setattr(finetune, "train", train_nothing)
    assert run_here(finetune, "--data", ucf / "ucf101-1.csv", "--checkpoint", "none", "--out",
                    tmp_path, *SMALL) == 0
    result = json.loads((tmp_path / "results.json").read_text())["test"]
    assert result["video top-1"] == result["clip top-1"] == 0
    assert result["video top-5"] == result["clip top-5"] == 100         # there are two classes
    assert [correct for _, _, correct, _ in read_csv(tmp_path / "classes.csv")[1:]] == ["0", "0"]
    assert [row[1:] for row in read_csv(tmp_path / "confusion.csv")[1:]] == [["0", "1"], ["1", "0"]]


@pytest.mark.slow
def test_predictions_are_those_of_the_test(ucf, tmp_path, capsys):
    """A fine-tuned model names the classes of files as the test does, and two files that fail."""
    out, (rows, _) = tmp_path / "out", read_manifest(ucf / "ucf101-1.csv", "test")
    command = ["--data", ucf / "ucf101-1.csv", "--checkpoint", "none", "--out", out, *SMALL]
    assert run_here(finetune, *command) == 0
    (tmp_path / "text.mp4").write_text("no film")
    cut = make_video(tmp_path / "cut.mp4", 4, 30, (180, 136), None, muxer={"movflags": "faststart"})
    cut.write_bytes(cut.read_bytes()[:cut.stat().st_size // 2])
    capsys.readouterr()
    wide, _ = probe_file(str(make_video(tmp_path / "a, wide.mp4", 1.5, 10, (96, 32))), "Archery")
    rows = [rows[0], wide]                      # which has other pictures to the left and right
    files = [rows[0].path, tmp_path / "text.mp4", cut, wide.path]
    assert run_here(finetune, "--out", out, "--predict", *files) == 1
    printed, errors = capsys.readouterr()
    assert "epoch 1 of 1, 2 classes, 2 clips x 3 crops, float32 (as asked)" in printed
    for name, cause in (("text.mp4", "cannot be read: "), ("cut.mp4", "its video ends at 1.17 s")):
        assert errors.count(f"failed: {tmp_path / name}: {cause}") == 1
    _, *lines = read_csv(out / "predictions.csv")
    clips = ActionClips(rows, ["Archery", "Bowling"], 4, 8, 16, clips_per_file=2, crops=3)
    model = classifier(video_encoder("r2plus1d_10"), 2).eval()
    model.load_state_dict(torch.load(out / "checkpoint.pt", weights_only=True)["model"])
    assert [path for path, *_ in lines] == [row.path for row in rows for _ in clips.classes]
    for n, row in enumerate(rows):
        with torch.no_grad():
            p = model(((clips.read(row)[0] / 255 - 0.45) / 0.225).movedim(-1, 1)).softmax(1).mean(0)
        best = p.argmax()
        assert f"\n{row.path}\n   1  {p[best]:6.3f}  {clips.classes[best]}\n" in printed
        assert [line[1:3] for line in lines[2 * n:2 * n + 2]] == [
            ["1", clips.classes[best]], ["2", clips.classes[1 - best]]]
        assert float(lines[2 * n][3]) == pytest.approx(p[best].item(), abs=1e-4)
    assert run_here(finetune, "--out", out, "--predict", rows[0].path) == 0
    assert run_here(finetune, "--out", tmp_path, "--predict", rows[0].path) == 1
    assert (f"--out {tmp_path} has no checkpoint.pt of a fine-tuning with its class names "
            "(--linear writes none)" in error_of(capsys.readouterr().err))


def test_the_input_of_torchvisions_weights_is_said(capsys):
    say_torchvision("runs/a.pt", 32, 30, 128)
    assert capsys.readouterr().out == ""
    say_torchvision("torchvision", 32, 30, 128)
    assert "here they get --frames 32 --fps 30 --size 128" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_continues_with_its_encoder_alone(ucf, tmp_path, capsys):
    """A linear probe in its folder would write over its results."""
    encoder, state = tmp_path / "encoder.pt", video_encoder("r2plus1d_10").state_dict()
    torch.save(state, encoder)
    command = ["--data", ucf / "ucf101-1.csv", "--checkpoint", encoder, "--out", tmp_path, *SMALL]
    assert run_here(finetune, *command) == 0
    state["stem.0.weight"] += 1
    torch.save(state, encoder)                              # another one of that name
    assert run_here(finetune, *command) == 1
    assert "made with other settings (encoder was " in error_of(capsys.readouterr().err)
    for name in ("results.json", "checkpoint.pt"):
        assert run_here(finetune, *command, "--linear") == 1
        assert f"--out {tmp_path} holds another training" in error_of(capsys.readouterr().err)
        (tmp_path / name).unlink()
    assert run_here(finetune, *command, "--linear") == 0
    assert run_here(finetune, *command) == 1
    assert f"--out {tmp_path} holds a linear probe: give" in error_of(capsys.readouterr().err)


@pytest.mark.slow
def test_bad_input(ucf, tmp_path, capsys):
    rows = scan.read_table(ucf / "ucf101-1.csv")
    strange = lambda row: {"label": "Diving"} if row["split"] == "test" else {}
    for name, change in (("strange", strange), ("undivided", lambda row: {"split": ""})):
        scan.write([row | change(row) for row in rows], tmp_path / f"{name}.csv")
    model = {f"f.{name}": x for name, x in video_encoder("r3d_18").state_dict().items()}
    torch.save({"settings": {"arch": "r3d_18"}, "model": model}, tmp_path / "r3d.pt")
    archery_bad, _ = damaged(ucf, tmp_path, (0, 1, 2))
    for flags, sentence in (
            (["--data", archery_bad, "--linear", "--max-failures", "0.5"],
             "all training videos of a class failed: mend or replace those named above"),
            (["--data", tmp_path / "strange.csv"],
             "1 of the test part's classes are not in its train part: Diving"),
            (["--data", tmp_path / "undivided.csv"],
             "has no train and test parts (its split column is empty)"),
            (["--data", ucf / "hmdb51-{fold}.csv", "--fold", "2"],
             "hmdb51-2.csv: no such manifest"),
            (["--checkpoint", tmp_path / "r3d.pt"], "; it was trained with --arch r3d_18"),
            (["--checkpoint", "torchvision"],
             "torchvision has no weights for r2plus1d_10: choose r2plus1d_18 or r3d_18"),
            (["--global-batch", "64"], "12 training clips do not fill a batch of 64")):
        assert run_here(finetune, "--data", ucf / "ucf101-1.csv", "--checkpoint", "none", "--out",
                        tmp_path / "o", *SMALL, *flags) == 1
        assert sentence in error_of(capsys.readouterr().err)
