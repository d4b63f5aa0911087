"""prepare/scan.py: repeated and interrupted scans, processes that die, and the reasons of rows."""

import errno
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import pytest

from conftest import ROOT, by_name, make_video, remux, write_text
from data import read_clip, read_manifest
from prepare import scan

# ---- repeated scans


def test_a_second_scan_reads_only_new_and_changed_files(put, tmp_path, files_read):
    for name in "abcd":
        put(f"r/{name}/{name}.mp4")
    put("r/e/e.mp4").write_bytes(b"no film")
    out, root = tmp_path / "m.csv", tmp_path / "r"
    first = scan.scan(root, 1, out=out)
    content = out.read_bytes()
    assert scan.scan(root, 4) == first and len(scan.scan(root, 4, out=out)) == 5
    assert sorted(files_read) == sorted(2 * [f"{name}.mp4" for name in "abcde"])
    assert out.read_bytes() == content
    files_read.clear()
    os.utime(root / "b/b.mp4")
    put("r/c/c.mp4", "silent")
    put("r/a/new.mp4")
    (root / "d/d.mp4").rename(root / "d/moved.mp4")
    again = scan.scan(root, out=out)
    assert sorted(files_read) == ["b.mp4", "c.mp4", "moved.mp4", "new.mp4"]
    assert [(Path(row["path"]).stem, int(row["has_audio"])) for row in again] == [
        ("a", 1), ("new", 1), ("b", 1), ("c", 0), ("moved", 1), ("e", 0)]
    files_read.clear()
    for verify in (True, True, False):                     # a verified row serves both
        scan.scan(root, out=out, verify=verify)
        assert len(files_read) == 6                        # the rows so far were not verified


def test_a_failure_of_the_disk_is_no_property_of_the_file(put, tmp_path, monkeypatch):
    """FFmpeg passes it on. The row says so, and has no stamp, so the next scan reads the file."""
    path = put("r/a/a.mp4")
    for number, kept in ((errno.EIO, False), (errno.ESTALE, False), (errno.EINVAL, True)):
        with monkeypatch.context() as patch:
            patch.setattr(scan, "open_file", lambda path: av.error.err_check(-number))
            row = scan.probe((path, "a", ""))
        assert row["reason"].startswith("cannot be read: ") and bool(row["stamp"]) == kept


def test_manifests_of_another_reader_and_with_a_byte_order_mark(put, tmp_path, files_read,
                                                                monkeypatch):
    """Excel writes such a mark. An earlier reader may have called joined recordings verified."""
    put("r/a/a.mp4")
    out = tmp_path / "m.csv"
    first = scan.scan(tmp_path / "r", out=out, verify=True)
    out.write_text("\ufeff" + out.read_text())
    assert read_manifest(out)[0][0].path == first[0]["path"]
    assert len(scan.scan(tmp_path / "r", out=out)) == 1 and files_read == ["a.mp4"]
    for verify in (True, False):
        monkeypatch.setattr(scan, "READER", f"later {verify}")
        scan.scan(tmp_path / "r", out=out, verify=verify)
    assert files_read == ["a.mp4"] * 3
    out.write_text(out.read_text().replace("note", "no"))
    with pytest.raises(ValueError, match="m.csv is no manifest of this version, it lacks note"):
        read_manifest(out)
    out.write_text(",".join(scan.COLUMNS))
    with pytest.raises(ValueError, match="m.csv has no rows: make it anew"):
        read_manifest(out)


@pytest.mark.parametrize("save_every,saved", [(0, 3), (30, 0)])
def test_an_interrupted_scan_continues(put, tmp_path, files_read, monkeypatch, save_every, saved):
    """A killed scan can continue too, because progress is not only saved when Python cleans up."""
    for n in range(6):
        put(f"r/a/{n}.mp4")
    in_workers, found = scan.in_workers, []

    def interrupted(*args):
        for n, done in enumerate(in_workers(*args)):
            if n == 3:
                found.append(len(scan.read_rows(tmp_path / "m.csv.partial")))
                raise KeyboardInterrupt
            yield done
    monkeypatch.setattr(scan, "SAVE_EVERY", save_every)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scan, "in_workers", interrupted)
        scan.scan(tmp_path / "r", out=tmp_path / "m.csv")
    assert sorted(path.name for path in tmp_path.glob("m.csv*")) == ["m.csv.partial"]
    assert found == [saved] and len(scan.read_rows(tmp_path / "m.csv.partial")) == 3
    files_read.clear()
    assert len(scan.scan(tmp_path / "r", out=tmp_path / "m.csv")) == 6 and len(files_read) == 3
    assert sorted(path.name for path in tmp_path.glob("m.csv*")) == ["m.csv"]


# ---- worker processes

def test_a_scan_needs_no_torch():
    """A process of a scan that had to load it would start late, and take 0.7 GB."""
    code = "import sys, prepare.manifest; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def work_badly(item):
    if item == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "hangs":
        signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {signal.SIGKILL})
        time.sleep(60)
    if item == "raises":
        raise MemoryError
    return item.upper()


def test_a_crash_and_a_hang_cost_only_their_own_file():
    items = ["a", "dies", "b", "hangs", "c", "dies", "raises", "d"]
    done = list(scan.in_workers(work_badly, items, 2, 0.7))
    crash = None, "crashes the decoder"
    expected = {"dies": crash, "raises": crash, "hangs": (None, "takes over 0.7 s")}
    expected |= {name: (name.upper(), "") for name in "abcd"}
    assert sorted(item for item, *_ in done) == sorted(items)
    assert {item: (result, reason) for item, result, reason in done} == expected


def test_a_process_that_is_killed_between_two_files_costs_none():
    """As by a lack of memory."""
    done = scan.in_workers(str.upper, ["a", "b"], 1, 20)
    first = next(done)
    worker, = multiprocessing.active_children()
    worker.kill()
    worker.join()
    assert sorted([first, *done]) == [("a", "A", ""), ("b", "B", "")]


def test_the_processes_end_with_their_parent():
    code = ("from prepare import scan; import time\n"
            "for done in scan.in_workers(str.upper, ['a', 'b', 'c'], 2, 20):\n"
            "    print(done, flush=True); time.sleep(30)")
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE,
                              text=True)
    assert parent.stdout.readline() in ("('a', 'A', '')\n", "('b', 'B', '')\n")
    parent.kill()
    parent.communicate(timeout=5)       # stdout closes when the last process that has it ends


@pytest.mark.slow
def test_a_hang_is_named_and_tried_again(put, tmp_path, monkeypatch):
    put("r/a/1.mp4")
    put("r/a/3.mp4")
    os.mkfifo(tmp_path / "r/a/2.mp4")   # to open it is to wait for a writer, which never comes
    monkeypatch.setattr(scan, "PROBE_LIMIT", 1)
    for _ in range(2):
        rows = scan.scan(tmp_path / "r", out=tmp_path / "m.csv")
        assert by_name(rows, "reason", "stamp")["2.mp4"] == ("takes over 1 s", "")
        assert [row["reason"] for row in rows if "2.mp4" not in row["path"]] == ["", ""]


# ---- rows

def test_reasons(put, films, tmp_path):
    """Only --verify finds damage that headers hide."""
    folder = tmp_path / "r/a"
    for name, kind in (("mp4.mp4", "mp4"), ("silent.mp4", "silent"), ("mpg.mpg", "mpg")):
        put(f"r/a/{name}", kind)
    put("r/a/empty.mp4").write_bytes(b"")
    write_text(folder / "text.mp4", "no film")
    (folder / "gone.mp4").symlink_to(tmp_path / "gone")
    remux(films["mp4"], folder / "sound.mp4", ["audio"])
    remux(films["mp4"], folder / "cover.mp4", ["audio"], has_cover=True)
    titled = remux(films["mp4"], folder / "title.mp4", title="XXXX")
    titled.write_bytes(titled.read_bytes().replace(b"XXXX", b"\xe9\xff\xfe\xe9"))
    shutil.copy(films["mp4"], os.fsencode(folder) + b"/latin1_\xe9.mp4")
    long = make_video(tmp_path / "long.mp4", 4.0, 10, (36, 28), gop=5)
    whole = remux(long, folder / "cut.mkv").read_bytes()
    (folder / "cut.mkv").write_bytes(whole[:len(whole) // 2])
    data = bytearray(long.read_bytes())
    start = data.index(b"mdat")
    quarter = (len(data) - start) // 4  # the index and the first frames stay whole
    data[start + quarter:start + 2 * quarter] = b"\x55" * quarter
    (folder / "damaged.mp4").write_bytes(data)
    rows = scan.scan(tmp_path / "r", out=tmp_path / "m.csv")
    usable, left_out = read_manifest(tmp_path / "m.csv")
    assert len(usable) == 6 and len(left_out) == 6
    expected = {
        "mp4.mp4": (1, ""), "silent.mp4": (0, ""), "mpg.mpg": (1, ""),
        "empty.mp4": (0, "empty file"), "title.mp4": (1, ""), "cut.mkv": (1, ""),
        "damaged.mp4": (1, ""), "text.mp4": (0, "cannot be read: Invalid data found when "
                                                "processing input"),
        "gone.mp4": (0, "cannot be read: No such file or directory"),
        "sound.mp4": (0, "no video stream"), "cover.mp4": (0, "no video stream"),
        "latin1_\udce9.mp4": (0, "its name is not UTF-8")}
    assert by_name(rows, "has_audio", "reason") == expected
    length, = by_name(rows, "video_duration")["mpg.mpg"]   # which no header tells
    assert length == pytest.approx(1, abs=0.05)
    verified = by_name(scan.scan(tmp_path / "r", verify=True), "has_audio", "reason")
    assert "it stops too early (at " in verified.pop("cut.mkv")[1]
    assert verified.pop("damaged.mp4")[1].startswith("cannot be read to the end: ")
    assert verified.pop("text.mp4")[1].startswith("cannot be read to the end: Invalid data")
    assert verified.items() <= expected.items()


@pytest.mark.parametrize("many, verify", [
    (6, False), pytest.param(34, True, marks=pytest.mark.slow)])
def test_damaged_files(films, tmp_path, many, verify):
    """Each file, which is cut or has flipped bits or many zeros, is usable or has a reason. A clip
    comes out of it, or a sentence with its name."""
    rng = random.Random(1)
    for kind in ("mp4", "avi", "mkv", "mpg", "silent"):
        whole = films[kind].read_bytes()
        for how in ("cut", "bits", "header", "zeros"):
            for n in range(many):
                data = bytearray(whole)
                start, length = rng.randrange(len(data)), rng.randrange(1, len(data) // 2)
                if how == "cut":
                    del data[start:]
                elif how == "zeros":
                    data[start:start + length] = bytes(len(data[start:start + length]))
                else:
                    stop = 600 if how == "header" else len(data)
                    for _ in range(rng.choice((1, 10, 100))):
                        data[rng.randrange(stop)] ^= 1 << rng.randrange(8)
                (tmp_path / f"{kind}_{how}_{n}{films[kind].suffix}").write_bytes(data)
    rows, read = scan.scan(tmp_path, verify=verify), 0
    assert len(rows) == 5 * 4 * many
    for row in rows:
        assert row["reason"] or row["duration"] > 0 and row["width"] > 0 and row["height"] > 0, row
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
