"""prepare/scan.py: repeated and interrupted scans, processes that die, the reasons of rows."""

import errno
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import av
import pytest

from conftest import ROOT, by_name, command, remux, write_text
from data import read_clip, read_manifest
from prepare import manifest, scan

# ---- repeated scans

def test_a_second_scan_reads_only_new_and_changed_files(put, tmp_path, files_read, monkeypatch):
    """Also if Excel put a byte order mark before the manifest. Links may lead in a circle."""
    out, root = tmp_path / "m.csv", tmp_path / "r"
    for name in ("r/a/a.mp4", "r/b/b.mp4", "elsewhere/c.mp4", "r/d/d.mp4"):
        put(name)
    (root / "c").symlink_to(tmp_path / "elsewhere")
    (root / "a/circle").symlink_to(root)
    write_text(root / "e/e.mp4", "no film")
    first, _ = scan.survey("folder", root, 1, out=out)
    content = out.read_bytes()
    assert scan.survey("folder", root, 4)[0] == first
    assert len(scan.survey("folder", root, 4, out=out)[0]) == 5
    assert sorted(files_read) == sorted(2 * [f"{name}.mp4" for name in "abcde"])
    assert out.read_bytes() == content
    out.write_text("\ufeff" + out.read_text())
    files_read.clear()
    os.utime(root / "b/b.mp4")
    put("r/c/c.mp4", "silent")
    put("r/a/new.mp4")
    (root / "d/d.mp4").rename(root / "d/moved.mp4")
    again, _ = scan.survey("folder", root, out=out)
    assert sorted(files_read) == ["b.mp4", "c.mp4", "moved.mp4", "new.mp4"]
    assert [(row["label"], Path(row["path"]).stem, int(row["has_audio"])) for row in again] == [
        ("a", "a", 1), ("a", "new", 1), ("b", "b", 1), ("c", "c", 0), ("d", "moved", 1),
        ("e", "e", 0)]
    files_read.clear()
    # The rows so far were not verified. A verified row serves both, but no later reader:
    # an earlier one may have called joined recordings verified.
    now = scan.READER
    for verify, reader, many in ((True, now, 6), (True, now, 6), (False, now, 6),
                                 (True, "r98", 12), (False, "r99", 18)):
        monkeypatch.setattr(scan, "READER", reader)
        scan.survey("folder", root, out=out, verify=verify)
        assert len(files_read) == many
    head, first, *_ = out.read_text().splitlines()
    for rows, sentence in (([], "m.csv has no rows: make it anew"),
                           ([first, first.rpartition(",")[0]], "m.csv:3: the row has not the 15"),
                           ([f"{first},x"], "m.csv:2: the row has not the 15 columns")):
        out.write_text("\n".join([head, *rows]))
        with pytest.raises(ValueError, match=sentence):
            read_manifest(out)


def test_a_failure_of_the_disk_is_no_property_of_the_file(put, monkeypatch):
    """FFmpeg passes it on. The row has no stamp, so that the next scan reads the file again."""
    path = put("r/a/a.mp4")
    for number, kept in ((errno.EIO, False), (errno.ESTALE, False), (errno.EINVAL, True)):
        monkeypatch.setattr(scan, "open_file", lambda path: av.error.err_check(-number))
        row = scan.probe((path, "a", ""))
        assert row["reason"].startswith("cannot be read: ") and bool(row["stamp"]) == kept


@pytest.mark.parametrize("save_every,saved", [(0, 3), (30, 0)])
def test_an_interrupted_scan_continues(put, tmp_path, files_read, monkeypatch, save_every, saved):
    """A killed scan can continue too: progress is not only saved when Python cleans up."""
    def interrupted(*args):
        yield from islice(in_workers(*args), 3)
        found.append(len(scan.earlier_rows(partial)))
        raise KeyboardInterrupt

    for n in range(6):
        put(f"r/a/{n}.mp4")
    out, partial = tmp_path / "m.csv", tmp_path / "m.csv.partial"
    in_workers, found = scan.in_workers, []
    monkeypatch.setattr(scan, "SAVE_EVERY", save_every)
    with monkeypatch.context() as patch:
        patch.setattr(scan, "in_workers", interrupted)
        status, _, errors = command(manifest, "folder", tmp_path / "r", "--out", out)
    assert status == 130 and "\nstopped: what was read is kept, run the same command" in errors
    assert sorted(os.listdir(tmp_path)) == ["m.csv.partial", "r"]
    assert found == [saved] and len(scan.earlier_rows(partial)) == 3
    files_read.clear()
    assert len(scan.survey("folder", tmp_path / "r", out=out)[0]) == 6 and len(files_read) == 3
    assert sorted(os.listdir(tmp_path)) == ["m.csv", "r"]


# ---- worker processes

def work_badly(item):
    if item == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "hangs":
        signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {signal.SIGKILL})
        time.sleep(60)
    return item.upper()


def test_a_crash_and_a_hang_cost_only_their_own_file():
    items = ["a", "dies", "b", "hangs", "c", "dies", "d"]
    assert sorted(scan.in_workers(work_badly, items, 2, 0.7)) == [
        ("a", "A", ""), ("b", "B", ""), ("c", "C", ""), ("d", "D", ""),
        ("dies", None, "crashes the decoder"), ("dies", None, "crashes the decoder"),
        ("hangs", None, "takes over 0.7 s")]


def test_a_process_that_is_killed_between_two_files_costs_none():
    """As by a lack of memory."""
    others = set(multiprocessing.active_children())         # that earlier tests have left
    done = scan.in_workers(str.upper, ["a", "b"], 1, 20)
    first = next(done)
    worker, = set(multiprocessing.active_children()) - others
    worker.kill()
    worker.join()
    assert sorted([first, *done]) == [("a", "A", ""), ("b", "B", "")]


def test_the_processes_need_no_torch_and_end_with_their_parent():
    """With torch, each would start late, and take 0.7 GB."""
    code = ("from prepare import manifest, scan; import sys, time\n"
            "for name, *_ in scan.in_workers(str.upper, ['a', 'b', 'c'], 2, 20):\n"
            "    print(name, 'torch' in sys.modules, flush=True); time.sleep(30)")
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE,
                              text=True)
    assert parent.stdout.readline() in ("a False\n", "b False\n")
    parent.kill()
    parent.communicate(timeout=5)   # stdout closes when the last process that has it ends


@pytest.mark.slow
def test_a_hang_is_named_and_tried_again(put, tmp_path, files_read, monkeypatch):
    put("r/a/1.mp4")
    os.mkfifo(tmp_path / "r/a/2.mp4")   # to open it is to wait for a writer, which never comes
    monkeypatch.setattr(scan, "PROBE_LIMIT", 1)
    for many in (2, 3):
        rows, _ = scan.survey("folder", tmp_path / "r", out=tmp_path / "m.csv")
        assert by_name(rows, "reason") == {"1.mp4": ("",), "2.mp4": ("takes over 1 s",)}
        assert len(files_read) == many


# ---- rows

def test_reasons(put, films, tmp_path):
    expected = {
        "silent.mp4": (0, ""), "mpg.mpg": (1, ""), "title.mp4": (1, ""),
        "empty.mp4": (0, "empty file"), "latin1_\udce9.mp4": (0, "its name is not UTF-8"),
        "text.mp4": (0, "cannot be read: Invalid data found when processing input"),
        "gone.mp4": (0, "cannot be read: No such file or directory"),
        "sound.mp4": (0, "no video stream"), "cover.mp4": (0, "no video stream")}
    folder = put("r/a/silent.mp4", "silent").parent
    put("r/a/mpg.mpg", "mpg")
    put("r/a/latin1_\udce9.mp4")
    write_text(folder / "empty.mp4", "")
    write_text(folder / "text.mp4", "no film")
    (folder / "gone.mp4").symlink_to(tmp_path / "gone")
    remux(films["mp4"], folder / "sound.mp4", ["audio"])
    remux(films["mp4"], folder / "cover.mp4", ["audio"], has_cover=True)
    titled = remux(films["mp4"], folder / "title.mp4", title="XXXX")
    titled.write_bytes(titled.read_bytes().replace(b"XXXX", b"\xe9\xff\xfe\xe9"))
    rows, _ = scan.survey("folder", tmp_path / "r", out=tmp_path / "m.csv")
    assert by_name(rows, "has_audio", "reason") == expected
    length, = by_name(rows, "video_duration")["mpg.mpg"]    # which no header tells
    assert length == pytest.approx(1, abs=0.05)
    verified = by_name(scan.survey("folder", tmp_path / "r", verify=True)[0], "has_audio", "reason")
    assert verified.pop("text.mp4")[1].startswith("cannot be read to the end: Invalid data")
    assert verified.items() <= expected.items()


@pytest.mark.parametrize("many, verify", [
    (6, False), pytest.param(34, True, marks=pytest.mark.slow)])
def test_damaged_files(films, tmp_path, many, verify):
    """Each file is usable or has a reason, and gives a clip, or a sentence with its name."""
    rng = random.Random(1)
    for kind, film in films.items():
        for how in ("cut", "bits", "header", "zeros"):
            for n in range(many):
                data = bytearray(film.read_bytes())
                start, length = rng.randrange(len(data)), rng.randrange(1, len(data) // 2)
                if how == "cut":
                    del data[start:]
                elif how == "zeros":
                    data[start:start + length] = bytes(len(data[start:start + length]))
                else:
                    stop = 600 if how == "header" else len(data)
                    for _ in range(rng.choice((1, 10, 100))):
                        data[rng.randrange(stop)] ^= 1 << rng.randrange(8)
                (tmp_path / f"{kind}_{how}_{n}{film.suffix}").write_bytes(data)
    rows, read = scan.survey("folder", tmp_path, verify=verify)[0], 0
    assert len(rows) == 5 * 4 * many
    for row in rows:
        assert row["reason"] or min(row["duration"], row["width"], row["height"]) > 0, row
        assert not row["reason"].startswith(("takes over", "crashes")), row
        tau_a = () if "silent" in row["path"] else (1, 2)
        try:
            video, audio = read_clip(row["path"], 0.3, (1, 2), tau_a, frames=4, fps=16, size=20)
            assert video.shape[:2] == (2, 4) and audio.shape == (len(tau_a), 6000)
            read += 1
        except ValueError as error:
            assert str(error).startswith(f"{row['path']}: ")
    usable = sum(not row["reason"] for row in rows)
    assert 0.15 < usable / len(rows) < 0.9 and 0.15 < read / len(rows) < 0.9
    assert verify == any("damaged frames (first at " in row["reason"] for row in rows)
