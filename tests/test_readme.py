"""README.md and docs/: each command runs as written where that takes seconds, or else is parsed."""

import argparse
import re
import runpy
import shlex
import shutil
import sys

import pytest
import torch
from conftest import ROOT, command_lines, make_video, run, write_script, write_text

import finetune
import pretrain
import retrieval
from data import read_manifest
from experiments import search
from loss import soft_info_nce

README = (ROOT / "README.md").read_text()
SNIPPET = re.compile(r"```python\n(.*?)```", re.DOTALL)
DOCUMENTS = {path.name: path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}
SCRIPTS = {f"{script.__name__}.py": script for script in (pretrain, finetune, retrieval)}
PROGRAMS = SCRIPTS | {"experiments.search": search}         # which check more than their parsers


@pytest.mark.slow
def test_first_line_on_the_built_in_set(tmp_path):
    """`python pretrain.py && python retrieval.py` with one epoch of smaller pictures. Two processes
    pre-train, and share the global batch as the eight of README's next command do."""
    line, = [line for line in command_lines(README) if "pretrain.py && python retrieval.py" in line]
    assert line.startswith("python3 -m venv") and "pip install -r requirements.txt" in line
    done = run("--out", tmp_path / "svaclr", "--epochs", "1", "--size", "16", processes=2)
    assert "No --data: training on the built-in set, with arch r2plus1d_10, size 16" in done.stdout
    assert ("576 clips (0 left out), global batch 32 = 2 process(es) x 16 clips, 2 view(s): 62 "
            "negatives per query, 18 steps an epoch" in done.stdout)
    table = run("--checkpoint", tmp_path / "svaclr" / "checkpoint.pt", "--clips", "2",
                script="retrieval.py", fresh=True).stdout
    assert "224 clips of 8 classes" in table
    assert re.search(r"instance chance +0.4 +2.2 +4.5 +8.9", table)
    way = r"(?:instance|class) +(?:audio -> video|video -> audio)(?: +[\d.]+ \+- [\d.]+){4}"
    assert len(re.findall(way, table)) == 4


@pytest.mark.slow
def test_snippets_of_the_loss(capsys):
    _, of_loss = SNIPPET.findall(README)
    from_frames, _ = SNIPPET.findall(DOCUMENTS["readings.md"])
    names = {}
    exec(of_loss, names)
    exec(from_frames, names)
    loss, gradient, one_view, from_frames = map(float, capsys.readouterr().out.split())
    assert loss > 0 and gradient > 0 and one_view > 0 and from_frames > 0
    assert names["ly_v"].shape == (8, 2, 512) and names["video"].shape[:3] == (8, 2, 8)


@pytest.mark.slow
def test_snippet_of_the_encoders(brief, tmp_path):
    code, _ = SNIPPET.findall(README)
    assert 'run, arch = "runs/svaclr", "r2plus1d_10"' in code
    film = make_video(tmp_path / "film.mp4", 2, 10, size=(64, 48), tone=440)
    names = {}
    exec(code.replace("runs/svaclr", str(brief.parent))
         .replace("runs/demo/test/bell/000.mp4", str(film)), names)
    assert names["y_v"].shape == names["y_a"].shape == (1, 512)
    assert names["y_v"].norm() > 0 and not names["f"].training


@pytest.mark.slow
def test_snippet_of_two_processes(tmp_path):
    """The mean loss of the two processes of docs/readings.md is that of one with all clips."""
    _, code = SNIPPET.findall(DOCUMENTS["readings.md"])
    done = run(script=write_script(tmp_path / "two.py", code), processes=2)
    assert "Warning" not in done.stderr
    losses = [float(line.split()[1]) for line in done.stdout.splitlines()]
    parts = []
    for rank in (0, 1):
        torch.manual_seed(rank)
        parts.append([torch.randn(4, 2, width) for width in (512, 512, 256, 256)])
    loss = soft_info_nce(*(torch.cat(x) for x in zip(*parts)))
    assert sum(losses) / 2 == pytest.approx(loss.item(), rel=1e-5)


def parse_only(line, monkeypatch):
    """Parse a command as its program does, without running it. SystemExit if it is refused."""
    words = shlex.split(line)
    first = next(n for n, word in enumerate(words)
                 if word.endswith(".py") or word.startswith(("prepare.", "experiments.")))
    program, *flags = words[first:]
    assert program.endswith(".py") or words[first - 1] == "-m", line
    if program in PROGRAMS:
        PROGRAMS[program].parse(flags)
        return

    def parse_args(self, *args):
        original(self, *args)
        raise StopIteration

    original = argparse.ArgumentParser.parse_args
    with monkeypatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(sys, "argv", [program, *flags])
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        runpy.run_module(program, run_name="__main__")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("name", [*DOCUMENTS, *SCRIPTS])
def test_commands_are_parsed(name, monkeypatch):
    text = DOCUMENTS[name] if name in DOCUMENTS else SCRIPTS[name].__doc__
    count = 0
    for line in command_lines(text):
        for command in line.split(" && "):
            tests = re.fullmatch(r"python -m pytest ([\w/. ]+?)( -n 2 --dist loadfile)?"
                                 r"( -m \"not slow\")?", command)
            if tests:
                assert all((ROOT / path).exists() for path in tests[1].split()), command
            elif not re.search("venv|pip install|two.py", command):
                parse_only(command, monkeypatch)
                count += 1
    assert count or name == "readings.md"


@pytest.mark.slow
def test_prepare_commands_run_as_written(tmp_path):
    """The lines of docs/data.md for the paper's data sets, beside miniatures in their formats."""
    film = make_video(tmp_path / "film.mp4", 1.2, 10, size=(36, 28))
    for name in ("bowling/abcdefghijk_000001_000011.mp4", "abcdefghijk_000001.mp4",
                 "v_Archery_g01_c01.avi", "clap/hands.avi"):
        (tmp_path / "ROOT" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(film, tmp_path / "ROOT" / name)
    for name, text in {
            "train.txt": "clap/hands.avi clap 0.1 1.1 train\n",
            "folder/of/csv/train.csv": "label,youtube_id,time_start,time_end,split\n"
                                       "bowling,abcdefghijk,1,11,train\n",
            "vggsound.csv": 'abcdefghijk,1,"people, clapping",train\n',
            "ucfTrainTestlist/classInd.txt": "1 Archery\n",
            "ucfTrainTestlist/trainlist01.txt": "Archery/v_Archery_g01_c01.avi 1\n",
            "ucfTrainTestlist/testlist01.txt": "",
            "testTrainMulti_7030_splits/clap_test_split1.txt": "hands.avi 1 \n"}.items():
        write_text(tmp_path / name, text)
    lines = [line for line in command_lines(DOCUMENTS["data.md"])
             if re.search(r"prepare\.(manifest (?!folder)|transcode)", line)]
    names = ["own.csv", "k400.csv", "ks.csv", "vgg.csv", "ucf101-1.csv", "hmdb51-1.csv", "k400.csv",
             "COPY/manifest.csv"]
    assert len(lines) == len(names)
    for line, name in zip(lines, names):
        python, m, module, *words = shlex.split(line)
        assert (python, m) == ("python", "-m")
        run(*words, script=module, cwd=tmp_path, fresh=True)
        assert len(read_manifest(tmp_path / name)[0]) == 1, name


def test_links_lead_to_files():
    for name, text in DOCUMENTS.items():
        folder = ROOT if name == "README.md" else ROOT / "docs"
        for link in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert (folder / link).exists(), (name, link)
