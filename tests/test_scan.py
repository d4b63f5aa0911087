"""prepare/scan.py: repeated and interrupted scans, processes that die, and the reasons of rows."""

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

from conftest import ROOT, by_name, make_video, write_text
from data import read_manifest
from prepare import layouts, scan, transcode


def remux(source, target, keep=("video", "audio"), title="", has_cover=False):
    """Copy the streams of these kinds into another container. Returns its path.

    has_cover: whether it gets a picture as its cover.
    """
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        new.metadata["title"] = title
        streams = {stream: new.add_stream_from_template(stream)
                   for stream in old.streams if stream.type in keep}
        if has_cover:
            cover = new.add_stream("mjpeg", rate=1, width=32, height=32, pix_fmt="yuvj420p")
            cover.disposition = av.stream.Disposition.attached_pic
            new.mux(cover.encode(av.VideoFrame(32, 32, "yuvj420p")) + cover.encode(None))
        for packet in old.demux(list(streams)):
            if packet.dts is not None:
                packet.stream = streams[packet.stream]
                new.mux(packet)
    return target


# ---- repeated scans

def test_a_second_scan_reads_only_new_and_changed_files(put, tmp_path, files_read):
    for name in "abcd":
        put(f"r/{name}/{name}.mp4")
    put("r/e/e.mp4").write_bytes(b"no film")
    out, root = tmp_path / "m.csv", tmp_path / "r"
    first = scan.scan(root, out=out)
    content = out.read_bytes()
    assert sorted(files_read) == ["a.mp4", "b.mp4", "c.mp4", "d.mp4", "e.mp4"]
    files_read.clear()
    assert scan.scan(root, out=out) == first
    assert out.read_bytes() == content and files_read == []
    os.utime(root / "b/b.mp4")
    put("r/c/c.mp4", "silent")
    put("r/a/new.mp4")
    (root / "d/d.mp4").rename(root / "d/moved.mp4")
    again = scan.scan(root, out=out)
    assert sorted(files_read) == ["b.mp4", "c.mp4", "moved.mp4", "new.mp4"]
    assert [(Path(row["path"]).stem, row["has_audio"]) for row in again] == [
        ("a", 1), ("new", 1), ("b", 1), ("c", 0), ("moved", 1), ("e", 0)]
    files_read.clear()
    scan.scan(root, out=out, verify=True)
    assert len(files_read) == 6                            # the rows so far were not verified
    files_read.clear()
    scan.scan(root, out=out, verify=True)
    scan.scan(root, out=out)
    assert files_read == []                                # a verified row serves both


def test_manifests_of_earlier_versions_and_with_a_byte_order_mark(put, tmp_path, files_read,
                                                                  monkeypatch):
    """All readers of a manifest take one that begins with a byte order mark, as Excel writes it."""
    put("r/a/a.mp4")
    out, missing = tmp_path / "m.csv", ("video_duration", "note")
    first = scan.scan(tmp_path / "r", out=out)
    content = out.read_text()
    out.write_text("\ufeff" + content)
    assert read_manifest(out)[0][0].path == transcode.read(out)[0]["path"] == first[0]["path"]
    assert scan.scan(tmp_path / "r", out=out) == first and files_read == ["a.mp4"]
    with monkeypatch.context() as patch:
        patch.setattr(scan, "COLUMNS", [name for name in scan.COLUMNS if name not in missing])
        scan.write(first, out)
    message = "m.csv is no manifest of this version, it lacks note, video_duration"
    with pytest.raises(ValueError, match=message):
        read_manifest(out)
    assert scan.scan(tmp_path / "r", out=out) == first and len(files_read) == 2
    # An earlier reader may have called joined recordings verified.
    scan.scan(tmp_path / "r", out=out, verify=True)
    for verify in (True, False):
        monkeypatch.setattr(scan, "READER", f"later {verify}")
        scan.scan(tmp_path / "r", out=out, verify=verify)
    assert files_read == ["a.mp4"] * 5


@pytest.mark.parametrize("save_every, saved", [(0, 3), (30, 0)])
def test_an_interrupted_scan_continues(put, tmp_path, files_read, monkeypatch, save_every, saved):
    """A killed scan can continue too, because progress is not only saved when Python cleans up."""
    for n in range(6):
        put(f"r/a/{n}.mp4")
    out, in_workers, found = tmp_path / "m.csv", scan.in_workers, []

    def interrupted(*args):
        for n, done in enumerate(in_workers(*args)):
            if n == 3:
                found.append(len(scan.read_rows(tmp_path / "m.csv.partial")))
                raise KeyboardInterrupt
            yield done
    monkeypatch.setattr(scan, "in_workers", interrupted)
    monkeypatch.setattr(scan, "SAVE_EVERY", save_every)
    with pytest.raises(KeyboardInterrupt):
        scan.scan(tmp_path / "r", out=out)
    assert found == [saved] and not out.exists()
    assert len(scan.read_rows(tmp_path / "m.csv.partial")) == 3
    monkeypatch.setattr(scan, "in_workers", in_workers)
    files_read.clear()
    assert len(scan.scan(tmp_path / "r", out=out)) == 6
    assert len(files_read) == 3
    assert sorted(path.name for path in tmp_path.glob("m.csv*")) == ["m.csv"]


def test_the_number_of_workers_changes_nothing(put, tmp_path):
    for n in range(20):
        put(f"r/{n % 3}/{n}.mp4", ("mp4", "silent", "avi", "mkv")[n % 4])
    one, four = scan.scan(tmp_path / "r", 1), scan.scan(tmp_path / "r", 4)
    assert one == four and len(one) == 20
    assert [row["path"] for row in one] == sorted(row["path"] for row in one)


# ---- worker processes

def work_badly(item):
    if item == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "hangs":
        signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {signal.SIGKILL})
        time.sleep(60)
    if item == "raises":
        raise MemoryError
    return item.upper()


@pytest.mark.parametrize("workers", (1, 2))
def test_a_crash_and_a_hang_cost_only_their_own_file(workers):
    items = ["a", "dies", "b", "hangs", "c", "dies", "raises", "d"]
    start = time.monotonic()
    done = list(scan.in_workers(work_badly, items, workers, 0.7))
    assert time.monotonic() - start < 6
    assert sorted(item for item, *_ in done) == sorted(items)
    assert {(result, reason) for item, result, reason in done if len(item) == 1} == {
        (name, "") for name in "ABCD"}
    assert {(item, reason) for item, result, reason in done if result is None} == {
        ("dies", "crashes the decoder"), ("raises", "crashes the decoder"),
        ("hangs", "takes over 0.7 s")}


def test_the_processes_end_with_their_parent():
    code = ("from prepare import scan; import time\n"
            "for done in scan.in_workers(str.upper, ['a', 'b', 'c'], 2, 20):\n"
            "    print(done, flush=True); time.sleep(30)")
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE,
                              text=True)
    assert parent.stdout.readline() in ("('a', 'A', '')\n", "('b', 'B', '')\n")
    parent.kill()
    parent.communicate(timeout=5)       # stdout closes when the last process that has it ends


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

@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
def test_duration_with_a_first_time_stamp_above_0(tmp_path, suffix):
    make_video(tmp_path / "r" / "a" / f"late.{suffix}", 3, 10, start=1.5)
    assert abs(scan.scan(tmp_path / "r")[0]["duration"] - 3) < 0.1


def test_reasons(put, films, tmp_path):
    folder = tmp_path / "r/a"
    put("r/a/fine.mp4")
    put("r/a/silent.mp4", "silent")
    put("r/a/empty.mp4").write_bytes(b"")
    write_text(folder / "text.mp4", "no film")
    (folder / "gone.mp4").symlink_to(tmp_path / "gone")
    remux(films["mp4"], folder / "sound.mp4", keep=("audio",))
    remux(films["mp4"], folder / "cover.mp4", keep=("audio",), has_cover=True)
    titled = remux(films["mp4"], folder / "title.mp4", title="XXXX")
    titled.write_bytes(titled.read_bytes().replace(b"XXXX", b"\xe9\xff\xfe\xe9"))
    shutil.copy(films["mp4"], os.fsencode(folder) + b"/latin1_\xe9.mp4")
    rows = scan.scan(tmp_path / "r", out=tmp_path / "m.csv")
    assert by_name(rows, "has_audio", "reason") == {
        "fine.mp4": (1, ""), "silent.mp4": (0, ""), "empty.mp4": (0, "empty file"),
        "text.mp4": (0, "cannot be read: Invalid data found when processing input"),
        "gone.mp4": (0, "cannot be read: No such file or directory"),
        "sound.mp4": (0, "no video stream"), "cover.mp4": (0, "no video stream"),
        "title.mp4": (1, ""), "latin1_\udce9.mp4": (0, "its name is not UTF-8")}
    usable, left_out = read_manifest(tmp_path / "m.csv")
    assert len(usable) == 3 and len(left_out) == 6


def test_verify_finds_damage_that_headers_hide(put, tmp_path):
    long = make_video(tmp_path / "r/a/long.mp4", 4.0, 10, (36, 28), gop=5)
    put("r/a/fine.mp4")
    put("r/a/silent.mp4", "silent")
    put("r/a/fine.avi", "avi")
    put("r/a/fine.mkv", "mkv")
    whole = remux(long, tmp_path / "r/a/cut.mkv").read_bytes()
    (tmp_path / "r/a/cut.mkv").write_bytes(whole[:len(whole) // 2])
    data = bytearray(long.read_bytes())
    start = data.index(b"mdat")
    quarter = (len(data) - start) // 4  # the index and the first frames stay whole
    data[start + quarter:start + 2 * quarter] = b"\x55" * quarter
    (tmp_path / "r/a/damaged.mp4").write_bytes(data)
    assert not any(row["reason"] for row in scan.scan(tmp_path / "r"))
    reasons = by_name(scan.scan(tmp_path / "r", verify=True), "reason")
    assert {name for name, (reason,) in reasons.items() if reason} == {"cut.mkv", "damaged.mp4"}
    assert "stops too early (at " in reasons["cut.mkv"][0]
    assert reasons["damaged.mp4"][0].startswith("cannot be read to the end: ")


def damage(data, how, rng):
    """Damage a bytearray: cut it, flip bits anywhere or in the header, or zero a piece."""
    if how == "cut":
        del data[rng.randrange(len(data)):]
    elif how == "zeros":
        start, length = rng.randrange(len(data)), rng.randrange(1, len(data) // 2)
        data[start:start + length] = bytes(len(data[start:start + length]))
    else:
        stop = 600 if how == "header" else len(data)
        for _ in range(rng.choice((1, 10, 100))):
            data[rng.randrange(stop)] ^= 1 << rng.randrange(8)


def make_damaged(films, root, seed=1):
    """Write 680 damaged files, and 6 with one stream. Those with an even number among the "swapped"
    files are whole: only their suffix is that of another format."""
    rng = random.Random(seed)
    root.mkdir(parents=True)
    for kind in ("mp4", "avi", "mkv", "silent"):
        whole = films[kind].read_bytes()
        for how in ("cut", "bits", "header", "zeros", "swapped"):
            for n in range(34):
                data, suffix = bytearray(whole), films[kind].suffix
                if how == "swapped":
                    suffix = rng.choice(sorted(layouts.SUFFIXES))
                    if n % 2:
                        damage(data, "cut", rng)
                else:
                    damage(data, how, rng)
                if how == "header" and kind in ("mp4", "silent"):     # it is at the end of an mp4
                    for _ in range(10):
                        data[-rng.randrange(1, 1500)] ^= 1 << rng.randrange(8)
                (root / f"{kind}_{how}_{n}{suffix}").write_bytes(data)
    for kind in ("mp4", "avi", "mkv"):
        for keep in ("video", "audio"):
            remux(films[kind], root / f"{kind}_only_{keep}{films[kind].suffix}", keep=(keep,))


@pytest.mark.parametrize("verify", (False, True))
def test_damaged_files(films, tmp_path, verify):
    make_damaged(films, tmp_path / "r/a")
    rows = scan.scan(tmp_path / "r", verify=verify)
    assert len(rows) == 4 * 5 * 34 + 6
    for row in rows:
        assert row["reason"] or row["duration"] > 0 and row["width"] > 0 and row["height"] > 0, row
        assert not row["reason"].startswith(("takes over", "crashes")), row
        assert row["reason"] or "only_audio" not in row["path"], row
    assert 100 < sum(not row["reason"] for row in rows) < 600
    assert verify == any("damaged frames (first at " in row["reason"] for row in rows)
    assert all(not row["reason"] for row in rows if "_only_video" in row["path"])
    whole = [row for row in rows for n in range(0, 34, 2) if f"_swapped_{n}." in row["path"]]
    assert not any(row["reason"] for row in whole)
