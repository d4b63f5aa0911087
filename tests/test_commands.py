"""The commands of README.md, run as written there where that takes seconds, shortened by flags where it takes longer."""

import re
import shlex
import subprocess
import sys

from conftest import ROOT
from test_pretrain import SMALL, log_of, run

import pretrain
import retrieval

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
    table = run("--checkpoint", tmp_path / "svaclr" / "checkpoint.pt", "--clips", "1", script="retrieval.py").stdout
    assert "224 clips of 8 classes" in table
    assert re.search(r"instance chance +0.4 +2.2 +4.5 +8.9", table)
    assert len(re.findall(r"(?:instance|class) +(?:audio -> video|video -> audio)(?: +[\d.]+ \+- [\d.]+){4}", table)) == 4


def test_two_processes_train_and_retrieve(tree, tmp_path):
    done = run("--data", tree, "--out", tmp_path, *SMALL, "--batch-size", "2", processes=2)
    assert "2 process(es) on cpu" in done.stdout and "global batch 4" in done.stdout and "6 negatives" in done.stdout
    assert [event["step"] for event in log_of(tmp_path)[1:]] == [8]
    tables = [run("--checkpoint", tmp_path / "checkpoint.pt", "--clips", "2", processes=n, script="retrieval.py").stdout
              for n in (1, 2)]
    assert "24 clips of 2 classes" in tables[0] and tables[0] == tables[1]
    gone = run("--data", tmp_path / "gone", "--out", tmp_path / "o", *SMALL, processes=2, check=False)
    assert gone.returncode != 0 and gone.stderr.count("error: --data") == 1


def test_snippet_of_the_loss():
    code, = blocks("python")
    assert len(code.strip().splitlines()) <= 10
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and float(done.stdout.split()[-1]) > 0, done.stderr


def test_commands_of_readme_and_docstrings_parse(monkeypatch):
    """Every pretrain and retrieval command line names existing flags."""
    text = README + pretrain.__doc__ + retrieval.__doc__
    lines = [line.split("#")[0] for line in text.replace("\\\n", " ").splitlines()]
    seen = 0
    for line in lines:
        found = re.search(r"(?<![\w`])(?:python|torchrun) .*?pretrain\.py([^&`]*)", line)
        if found and "`" not in line:
            pretrain.parse(shlex.split(found.group(1)))
            seen += 1
    assert seen >= 5
