"""README.md and docs/: commands run as written if that takes seconds, or else are parsed."""

import argparse
import re
import shlex
import shutil
import sys
from importlib import import_module

import pytest
import torch
from conftest import ROOT, command, command_lines, make_video, run, write_script, write_text

from data import read_manifest
from loss import soft_info_nce

SNIPPET = re.compile(r"```python\n(.*?)```", re.DOTALL)
DOCUMENTS = {path.name: path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}


@pytest.mark.slow
def test_first_line_on_the_built_in_set(tmp_path):
    """With one epoch of smaller pictures, which two processes share."""
    assert re.search(r"\npython3 -m venv .* && pip install -r requirements.txt && "
                     r"python pretrain.py && python retrieval.py\n", DOCUMENTS["README.md"])
    done = run("--out", tmp_path / "svaclr", "--epochs", "1", "--size", "16", processes=2)
    assert ("No --data: training on the built-in set, with arch r2plus1d_10, size 16, frames 4, "
            "fps 4, epochs 1, warmup 0.1, max_speed 4, affinity clip\n" in done.stdout)
    assert ("576 clips (0 left out), global batch 32 = 2 process(es) x 16 clips, 2 view(s): 62 "
            "negatives per query, 18 steps an epoch" in done.stdout)
    table = run("--checkpoint", tmp_path / "svaclr" / "checkpoint.pt", "--clips", "2",
                script="retrieval.py", fresh=True).stdout
    assert "224 clips of 8 classes" in table
    assert re.search(r"instance chance +0.4 +2.2 +4.5 +8.9", table)
    way = r"(?:instance|class) +(?:audio -> video|video -> audio)(?: +[\d.]+ \+- [\d.]+){4}"
    assert len(re.findall(way, table)) == 4


@pytest.mark.slow
def test_snippets_of_the_loss(tmp_path, capsys):
    """In two processes its mean is the loss of one process with all clips."""
    of_loss, _ = SNIPPET.findall(DOCUMENTS["README.md"])
    from_frames, of_two = SNIPPET.findall(DOCUMENTS["readings.md"])
    exec(of_loss, {})
    exec(from_frames, names := {})
    printed = [float(word) for word in capsys.readouterr().out.split()]
    assert printed[:2] == pytest.approx([2.85, 2.02], abs=0.01)         # as README says
    assert len(printed) == 3 and printed[2] > 0
    assert names["ly_v"].shape == (8, 2, 512) and names["video"].shape[:3] == (8, 2, 8)
    done = run(script=write_script(tmp_path / "two.py", of_two), processes=2)
    assert "Warning" not in done.stderr
    losses = [float(line.split()[1]) for line in done.stdout.splitlines()]
    parts = []
    for rank in (0, 1):
        torch.manual_seed(rank)
        parts.append([torch.randn(4, 2, width) for width in (512, 512, 256, 256)])
    loss = soft_info_nce(*(torch.cat(x) for x in zip(*parts)))
    assert sum(losses) / 2 == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.slow
def test_snippets_of_the_encoders(brief, tmp_path, monkeypatch):
    """After the export they give the same outputs, for any number of clips."""
    monkeypatch.chdir(tmp_path)
    for name in ("svaclr", "k400"):
        shutil.copytree(brief.parent, f"runs/{name}")
    make_video(tmp_path / "runs/demo/test/bell/000.mp4", 2, 10)
    _, use = SNIPPET.findall(DOCUMENTS["README.md"])
    export, = SNIPPET.findall(DOCUMENTS["using.md"].partition("## Export")[2])
    exec(use, names := {})
    assert names["y_v"].shape == (1, 1, 512) and names["z_a"].shape == (1, 1, 256)
    assert names["y_v"].norm() > 0 and names["settings"].size == 16
    f, g = names["model"].f, names["model"].g
    exec(export.replace("30, 128, 128", "4, 16, 16"), {})
    for name, net, shape in (("f", f, (3, 4, 16, 16)), ("g", g, (1, 40, 101))):
        exported = torch.export.load(f"{name}.pt2").module()
        for n in (1, 3):
            x = torch.rand(n, *shape)
            with torch.no_grad():
                torch.testing.assert_close(exported(x), net(x))


@pytest.mark.parametrize("name", [*DOCUMENTS, "pretrain", "finetune", "retrieval"])
def test_commands_are_parsed(name, monkeypatch):
    """By their programs, which stop then."""
    def parse_args(self, *args):
        original(self, *args)
        raise StopIteration

    original = argparse.ArgumentParser.parse_args
    text = DOCUMENTS[name] if name in DOCUMENTS else import_module(name).__doc__
    others = "venv|pip install|two.py|^python -m pytest tests -n 2 --dist loadfile$"
    prose = " ".join(re.sub(r"```.*?```", "", text, flags=re.DOTALL).split())
    inline = re.findall("`(python [^`]+)`", prose)
    lines = [part for line in [*command_lines(text), *inline] for part in line.split(" && ")
             if not re.search(others, part)]
    assert lines or name == "readings.md"
    for line in lines:
        script, module, flags = re.fullmatch(
            r".*? (?:(\w+)\.py|-m ((?:prepare|experiments)\.\w+))( .*)?", line).groups()
        program, flags = import_module(script or module), shlex.split(flags or "")
        if hasattr(program, "parse"):           # it checks more than its parser
            program.parse(flags)
            continue
        with monkeypatch.context() as patch, pytest.raises(StopIteration):
            patch.setattr(sys, "argv", [module, *flags])
            patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
            program.main()


@pytest.mark.slow
def test_prepare_commands_run_as_written(put, tmp_path, monkeypatch):
    """The lines for the paper's data sets, beside miniatures in their formats."""
    for name in ("bowling/abcdefghijk.mp4", "v_Archery_g01_c01.avi", "clap/hands.avi"):
        put(f"ROOT/{name}")
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
    monkeypatch.chdir(tmp_path)
    lines = [line for line in command_lines(DOCUMENTS["data.md"])
             if re.search(r"prepare\.(manifest (?!folder)|transcode)", line)]
    assert len(lines) == 8
    for line in lines:
        _, _, module, *words = shlex.split(line)
        out = "COPY/manifest.csv" if "COPY" in words else words[words.index("--out") + 1]
        status, _, errors = command(import_module(module), *words)
        assert status == 0 and len(read_manifest(out)[0]) == 1, (line, errors)


def test_links_lead_to_files_and_tables_are_whole():
    """Behind a blank line a row would be text."""
    for path in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        for link in re.findall(r"\]\((?!http)([^)#]+)", path.read_text()):
            assert (path.parent / link).exists(), (path, link)
        assert not re.search(r"\n\n\|.*\n(?!\|---)", path.read_text()), path
