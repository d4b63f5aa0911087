"""The commands of README.md, run as written there where that takes seconds, shortened by flags where it takes longer."""

import csv
import os
import re
import shlex
import shutil
import subprocess
import sys

from conftest import ROOT, make_video
from test_pretrain import SMALL, log_of, run

import finetune
import pretrain
import retrieval
from data import read_manifest
from experiments import table1

README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_first_line_on_the_built_in_set(tmp_path):
    """`python pretrain.py && python retrieval.py` with one epoch: builds the set, trains, prints retrieval by chance."""
    line = next(block for block in blocks("sh") if "python pretrain.py && python retrieval.py" in block)
    assert "pip install -r requirements.txt" in line
    done = run("--out", tmp_path / "svaclr", "--epochs", "1")
    assert "No --data: the built-in set" in done.stdout and "576 clips (0 left out)" in done.stdout
    files = sorted((tmp_path / "demo").rglob("*.mp4"))
    assert len(files) == 800 and sum(path.stat().st_size for path in files) < 25e6
    checkpoint = tmp_path / "svaclr" / "checkpoint.pt"
    table = run("--checkpoint", checkpoint, "--clips", "2", script="retrieval.py").stdout
    assert "224 clips of 8 classes" in table
    assert re.search(r"instance chance +0.4 +2.2 +4.5 +8.9", table)
    assert len(re.findall(r"(?:instance|class) +(?:audio -> video|video -> audio)(?: +[\d.]+ \+- [\d.]+){4}", table)) == 4

    # beside this built-in set: the ablation goes on from its csv, past a run that fails
    kept = {path: path.read_text() for path in (table1.RESULTS / "table1.csv", table1.RESULTS / "table1.md")}
    (tmp_path / "06-9").touch()                           # where the run's folder would be; the others are in the csv
    command = [sys.executable, "-m", "experiments.table1", "--out", tmp_path, "--rows", "raw y", "--seeds", "0", "1", "2", "9"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "error: raw y, seed 9: pretrain.py ended with 1: see " in done.stderr
    assert done.stdout.strip() == kept[table1.RESULTS / "table1.md"].strip()
    assert all(path.read_text() == text for path, text in kept.items())


def test_two_processes_train_and_retrieve(tree, tmp_path):
    done = run("--data", tree, "--out", tmp_path, *SMALL, "--batch-size", "2", processes=2)
    assert "2 process(es) on cpu" in done.stdout and "global batch 4" in done.stdout and "6 negatives" in done.stdout
    assert [event["step"] for event in log_of(tmp_path)[1:]] == [8]
    tables = [run("--checkpoint", tmp_path / "checkpoint.pt", "--clips", "2", processes=n, script="retrieval.py").stdout
              for n in (1, 2)]
    rows = [re.findall(r"^(?:instance|class) .*", table, re.MULTILINE) for table in tables]     # gloo of torch 2.10 prints too
    assert "24 clips of 2 classes" in tables[0] and len(rows[0]) == 6 and rows[0] == rows[1]
    gone = run("--data", tmp_path / "gone", "--out", tmp_path / "o", *SMALL, processes=2, check=False)
    assert gone.returncode != 0 and gone.stderr.count("error: --data") == 1


def test_snippet_of_the_loss():
    code, = blocks("python")
    assert len(code.strip().splitlines()) <= 10
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and float(done.stdout.split()[-1]) > 0, done.stderr


def command_lines(text=README):
    """Every command line of the sh blocks (of a docstring: every indented one), comments cut, continuations joined."""
    text = "\n".join(blocks("sh")) if text is README else text
    lines = (line.split("#")[0].strip() for line in text.replace("\\\n", " ").splitlines())
    return [line for line in lines if re.match(r"(\w+=\w+ )?(python|python3|torchrun) ", line) and "`" not in line]


def script_arguments(text, script):
    """The argument lists with which the lines of `text` call a script."""
    parts = [part for line in command_lines(text) for part in line.split("&&")]
    return [shlex.split(part.split(script)[1]) for part in parts if script in part]


def test_training_and_retrieval_commands_parse(monkeypatch):
    called = []
    for text, least in ((README, 4), (pretrain.__doc__, 3)):
        found = script_arguments(text, "pretrain.py")
        assert len(found) >= least
        for argv in found:
            pretrain.parse(argv)
    for text, least in ((README, 4), (finetune.__doc__, 3)):
        found = script_arguments(text, "finetune.py")
        assert len(found) >= least
        for argv in found:
            finetune.parse(argv)
    monkeypatch.setattr(retrieval, "run", lambda job, args: called.append(args))
    for text, least in ((README, 2), (retrieval.__doc__, 3)):
        found = script_arguments(text, "retrieval.py")
        assert len(found) >= least
        for argv in found:
            monkeypatch.setattr(sys, "argv", ["retrieval.py", *argv])
            retrieval.main()
    assert called[0].checkpoint == "runs/svaclr/checkpoint.pt"


def test_prepare_commands_run_as_written(tmp_path):
    """README's manifest and transcode lines, word for word, beside a miniature with the lists in their formats."""
    film = make_video(tmp_path / "film.mp4", 1.2, 10, size=(36, 28))
    names = ["bowling/abcdefghijk_000001_000011.mp4", "abcdefghijk_000001.mp4", "v_Archery_g01_c01.avi", "clap/hands.avi"]
    for name in names:
        (tmp_path / "ROOT" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(film, tmp_path / "ROOT" / name)
    for name, text in {
            "folder/of/csv/train.csv": "label,youtube_id,time_start,time_end,split\nbowling,abcdefghijk,1,11,train\n",
            "vggsound.csv": 'abcdefghijk,1,"people, clapping",train\n',
            "ucfTrainTestlist/classInd.txt": "1 Archery\n",
            "ucfTrainTestlist/trainlist01.txt": "Archery/v_Archery_g01_c01.avi 1\n",
            "ucfTrainTestlist/testlist01.txt": "",
            "testTrainMulti_7030_splits/clap_test_split1.txt": "hands.avi 1 \n"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    lines = [line for line in command_lines() if "prepare." in line]
    assert [line.split()[3] for line in lines] == ["kinetics400", "kinetics-sounds", "vggsound", "ucf101", "hmdb51", "k400.csv"]
    for line in lines:
        done = subprocess.run([sys.executable, *shlex.split(line)[1:]], cwd=tmp_path, capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, (line, done.stderr)
    for name in ("k400.csv", "ks.csv", "vgg.csv", "ucf101-1.csv", "hmdb51-1.csv", "COPY/manifest.csv"):
        usable, _ = read_manifest(tmp_path / name)
        assert len(usable) == 1, name


def test_bench_of_the_step(tmp_path):
    """README's line, with fewer rounds, two batches and a profile; what it measures goes into a csv."""
    line, = [line for line in command_lines() if "experiments.bench step" in line]
    done = subprocess.run([sys.executable, *line.split()[1:], "--rounds", "2", "--batch-size", "2", "4", "--profile",
                           "--csv", tmp_path / "b.csv"], cwd=ROOT, capture_output=True, text=True)
    assert len(re.findall(r"^ *[\d.]+ % +\d+ x  aten::convolution_backward$", done.stdout, re.MULTILINE)) == 2, done.stdout
    assert re.search(r"step / bare encoders: [\d.]+ .* % of the [\d.]+ of a \w+ matmul", done.stdout, re.DOTALL), done.stderr
    with open(tmp_path / "b.csv", newline="") as file:
        lines = {(line["what"].split()[2], line["quantity"]): float(line["value"]) for line in csv.DictReader(file)}
    for B in ("B2", "B4"):
        assert lines[B, "clips per s"] > 0 and 0 < lines[B, "share of matmul rate"] < 2 and lines[B, "step / bare"] > 0.5
