"""prepare/manifest.py on miniature copies of every layout, with the lists in their official formats."""

import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest

from conftest import ROOT, make_video
from data import read_manifest
from prepare import layouts, scan, transcode


@pytest.fixture(scope="session")
def films(tmp_path_factory):
    """One film of each kind, to be copied."""
    root = tmp_path_factory.mktemp("films")
    small = dict(seconds=1.0, fps=10, size=(36, 28))
    return {"mp4": make_video(root / "a.mp4", **small), "silent": make_video(root / "s.mp4", tone=None, **small),
            "avi": make_video(root / "a.avi", codec="mpeg4", audio_codec="mp3", **small),
            "mkv": make_video(root / "a.mkv", codec="mpeg4", audio_codec="ac3", **small)}


@pytest.fixture
def put(films, tmp_path):
    """put(path below tmp_path, kind of film) copies it there."""
    def copy(name, kind="mp4"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(films[kind], path)
        return path
    return copy


def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def short(rows, *columns):
    """{file name: the columns of its row}"""
    columns = columns or ("label", "split", "reason")
    return {Path(row["path"]).name: tuple(row[name] for name in columns) for row in rows}


def hand_in(monkeypatch):
    """The names of the files that are read from now on, a list that grows."""
    names, real = [], scan.in_workers

    def watched(work, entries, workers, limit):
        names.extend(Path(entry[0]).name for entry in entries)
        return real(work, entries, workers, limit)
    monkeypatch.setattr(scan, "in_workers", watched)
    return names


def rewrite(source, target, keep=("video", "audio")):
    """A copy without the other kinds of streams."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        streams = {stream: new.add_stream_from_template(stream) for stream in old.streams if stream.type in keep}
        for packet in old.demux(list(streams)):
            if packet.dts is not None:
                packet.stream = streams[packet.stream]
                new.mux(packet)
    return target


# ---- layouts

K400 = "label,youtube_id,time_start,time_end,split\n"


@pytest.fixture
def kinetics(put, tmp_path):
    """A copy with class folders, flat files, ids that hold _ and -, a replaced file, and its three lists."""
    put("k/train/playing_guitar/-a_b-c_d--1_000003_000013.mp4")
    put("k/train/Strumming Guitar/strummingAA_000000_000010.mp4")
    put("k/val/surfing water/surfing__-A_000120_000130.mp4", "silent")
    put("k/flat-tap01_000044_000054.mp4")
    put("k/train/playing_guitar/replacedAAA_000001_000011.mp4").write_bytes(b"")
    put("k/replacement/replacement_for_corrupted_k400/replacedAAA_000001_000011.mp4")
    put("k/test/singing/unlistedAAA_000001_000011.mp4")
    text(tmp_path / "lists/train.csv",
         K400 + "playing guitar,-a_b-c_d--1,3,13,train\nstrumming guitar,strummingAA,0,10,train\n"
         "playing guitar,replacedAAA,1,11,train\nbowling,goneAAAAAAA,5,15,train\nyoga,goneAAAAAAB,5,15,train\n")
    text(tmp_path / "lists/validate.csv", K400 + "surfing water,surfing__-A,120,130,validate\n")
    text(tmp_path / "lists/test.csv", K400.replace("split", "split,is_cc") + '"tap dancing",flat-tap01,44,54,test,0\n')
    return tmp_path / "k"


def test_kinetics400(kinetics):
    rows, notes = scan.survey("kinetics400", kinetics, annotations=kinetics.parent / "lists")
    assert [row["path"] for row in rows] == [str(path) for path in sorted(kinetics.rglob("*.mp4"))]
    assert {row["path"].removeprefix(f"{kinetics}/"): (row["label"], row["split"], row["reason"]) for row in rows} == {
        "train/playing_guitar/-a_b-c_d--1_000003_000013.mp4": ("playing guitar", "train", ""),
        "train/Strumming Guitar/strummingAA_000000_000010.mp4": ("strumming guitar", "train", ""),
        "val/surfing water/surfing__-A_000120_000130.mp4": ("surfing water", "val", ""),
        "flat-tap01_000044_000054.mp4": ("tap dancing", "test", ""),
        "train/playing_guitar/replacedAAA_000001_000011.mp4": ("playing guitar", "train", "empty file"),
        "replacement/replacement_for_corrupted_k400/replacedAAA_000001_000011.mp4": ("playing guitar", "train", ""),
        "test/singing/unlistedAAA_000001_000011.mp4": ("", "", "not in the official list")}
    assert notes == ["2 official entries not on disk (2 of train)"]
    assert short(rows, "has_audio", "reason")["surfing__-A_000120_000130.mp4"] == (0, "")     # silent, and fine
    one, _ = scan.survey("kinetics400", kinetics, annotations=kinetics.parent / "lists/validate.csv")
    assert sum(not row["reason"] for row in one) == 1


def test_of_two_good_copies_the_later_one_is_used(put, tmp_path):
    copies = [put(f"k/{folder}/abcdefghijk_000001_000011.mp4") for folder in ("a", "b", "replacement/for", "train")]
    listed = text(tmp_path / "train.csv", K400 + "yoga,abcdefghijk,1,11,train\n")
    for _ in range(2):                                     # a copy that goes leaves the clip to the next
        rows = scan.scan(tmp_path / "k", layout="kinetics400", annotations=listed, out=tmp_path / "m.csv")
        used = copies[-2] if len(copies) == 4 else copies[0]
        assert [row["reason"] for row in rows] == ["" if path == used else scan.COPY for path in copies]
        copies.remove(used)
        used.unlink()


def test_kinetics_sounds(kinetics):
    rows, notes = scan.survey("kinetics-sounds", kinetics, annotations=kinetics.parent / "lists")
    assert {Path(row["path"]).name for row in rows if not row["reason"]} == {
        "-a_b-c_d--1_000003_000013.mp4", "strummingAA_000000_000010.mp4", "flat-tap01_000044_000054.mp4",
        "replacedAAA_000001_000011.mp4"}
    assert notes == ["1 official entries not on disk (1 of train)", "1 files of other classes passed over"]
    rows, notes = scan.survey("kinetics-sounds", kinetics)                # without the csv: the class folders
    assert short(rows) == {"-a_b-c_d--1_000003_000013.mp4": ("playing guitar", "train", ""),
                           "strummingAA_000000_000010.mp4": ("strumming guitar", "train", ""),
                           "replacedAAA_000001_000011.mp4": ("playing guitar", "train", "empty file"),
                           "unlistedAAA_000001_000011.mp4": ("singing", "test", "")}
    assert notes == ["3 files of other classes passed over"]
    for options in ({}, {"annotations": kinetics.parent / "lists"}):
        rows = scan.scan(kinetics, layout="kinetics-sounds", classes=31, **options)
        assert "strumming guitar" not in {row["label"] for row in rows}
    assert len(layouts.KINETICS_SOUNDS) == len(set(layouts.KINETICS_SOUNDS)) == 32
    with pytest.raises(ValueError, match="no video of the 32 classes"):
        scan.scan(kinetics / "val", layout="kinetics-sounds")


def test_vggsound(put, tmp_path):
    put("v/--0PQM4-hqg_000030.mp4"), put("v/more/a_b_c_d_e_f_000009.mp4"), put("v/unlistedAAA_000030.mp4")
    listed = text(tmp_path / "vggsound.csv", '--0PQM4-hqg,30,"waterfall burbling",train\n'
                  'a_b_c_d_e_f,9,"bird chirping, tweeting",test\ngoneAAAAAAA,1,"bird chirping, tweeting",test\n')
    for annotations in (listed, tmp_path):
        rows, notes = scan.survey("vggsound", tmp_path / "v", annotations=annotations)
        assert short(rows) == {"--0PQM4-hqg_000030.mp4": ("waterfall burbling", "train", ""),
                               "a_b_c_d_e_f_000009.mp4": ("bird chirping, tweeting", "test", ""),
                               "unlistedAAA_000030.mp4": ("", "", "not in the official list")}
        assert notes == ["1 official entries not on disk (1 of test)"]


def test_vggsound_lists_of_the_evaluation_code(put, tmp_path):
    put("v/--0PQM4-hqg_000030.mp4"), put("v/a_b_c_d_e_f_000009.mp4")
    text(tmp_path / "lists/train.csv", '--0PQM4-hqg_000030.mp4,waterfall burbling\n')
    text(tmp_path / "lists/test.csv", 'a_b_c_d_e_f_000009.mp4,"bird chirping, tweeting"\n')
    text(tmp_path / "lists/stat.csv", 'waterfall burbling,1050,nature\n')
    rows = scan.scan(tmp_path / "v", layout="vggsound", annotations=tmp_path / "lists")
    assert short(rows) == {"--0PQM4-hqg_000030.mp4": ("waterfall burbling", "train", ""),
                           "a_b_c_d_e_f_000009.mp4": ("bird chirping, tweeting", "test", "")}


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
def test_duration_with_a_first_stamp_over_0(tmp_path, suffix):
    make_video(tmp_path / "r" / "a" / f"late.{suffix}", 3, 10, start=1.5)
    assert abs(scan.scan(tmp_path / "r")[0]["duration"] - 3) < 0.1


@pytest.fixture
def ucf(put, tmp_path):
    for n in (1, 2, 3):
        put(f"u/YoYo/v_YoYo_g0{n}_c01.avi", "avi")
    put("u/v_HandStandPushups_g01_c01.mp4"), put("u/v_Other_g01_c01.avi", "avi")       # flat and converted; no entry
    text(tmp_path / "split/classInd.txt", "37 HandstandPushups\r\n101 YoYo\r\n")
    for fold in (1, 2, 3):
        train = "".join(f"YoYo/v_YoYo_g0{n}_c01.avi 101\r\n" for n in (1, 2, 3) if n != fold)
        train += "HandstandPushups/v_HandStandPushups_g01_c01.avi 37\r\n"
        text(tmp_path / f"split/trainlist0{fold}.txt", train)
        text(tmp_path / f"split/testlist0{fold}.txt", f"YoYo/v_YoYo_g0{fold}_c01.avi\r\nYoYo/v_YoYo_g25_c09.avi\r\n")
    return tmp_path / "u"


@pytest.mark.parametrize("fold", (1, 2, 3))
def test_ucf101(ucf, fold):
    rows, notes = scan.survey("ucf101", ucf, annotations=ucf.parent / "split", fold=fold)
    assert short(rows) == {
        **{f"v_YoYo_g0{n}_c01.avi": ("YoYo", "test" if n == fold else "train", "") for n in (1, 2, 3)},
        "v_HandStandPushups_g01_c01.mp4": ("HandstandPushups", "train", ""),
        "v_Other_g01_c01.avi": ("", "", "not in the official list")}
    assert notes == ["1 official entries not on disk (1 of test)"]


def test_a_film_and_its_conversion_count_once(ucf, put):
    put("u/YoYo/v_YoYo_g01_c01.mp4")
    got = short(scan.scan(ucf, layout="ucf101", annotations=ucf.parent / "split"), "reason")
    assert got["v_YoYo_g01_c01.avi"] == ("",) and got["v_YoYo_g01_c01.mp4"] == (scan.COPY,)


@pytest.mark.parametrize("fold", (1, 2, 3))
def test_hmdb51(put, tmp_path, fold):
    names = ["#20_Rhythm_clap_u_nm_np1_fr_goo_0", "(Rad)Schlag_die_Bank!_clap_f_cm_np1_le_med_0", "a [b]+c 50%_d_clap"]
    for name, suffix in zip(names, ("avi", "mp4", "avi")):
        put(f"h/clap/{name}.{suffix}", suffix)
    put("h/brush_hair/x;'&_1.avi", "avi"), put("h/brush_hair/extra.avi", "avi")
    for n in (1, 2, 3):
        lines = "".join(f"{name}.avi {(n + i) % 3} \n" for i, name in enumerate(names))
        text(tmp_path / f"split/clap_test_split{n}.txt", lines)
        text(tmp_path / f"split/brush_hair_test_split{n}.txt", "x;'&_1.avi 2 \ngone.avi 1 \ngone_unused.avi 0 \n")
    use = [("clap", "", f"unused in fold {fold}"), ("clap", "train", ""), ("clap", "test", "")]
    rows, notes = scan.survey("hmdb51", tmp_path / "h", annotations=tmp_path / "split", fold=fold)
    assert short(rows) == {
        f"{names[0]}.avi": use[fold % 3], f"{names[1]}.mp4": use[(fold + 1) % 3],
        f"{names[2]}.avi": use[(fold + 2) % 3],
        "x;'&_1.avi": ("brush_hair", "test", ""), "extra.avi": ("", "", "not in the official list")}
    assert notes == ["1 official entries not on disk (1 of train)"]


def test_folder(put, tmp_path):
    put("f/a/1.mp4"), put("f/a/deep/2.MKV", "mkv"), put("f/3.avi", "avi"), put("elsewhere/4.mp4"), put("f/a/x.txt")
    (tmp_path / "f/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "f/a/circle").symlink_to(tmp_path / "f")
    assert short(scan.scan(tmp_path / "f")) == {
        "1.mp4": ("a", "", ""), "2.MKV": ("a/deep", "", ""), "3.avi": ("f", "", ""), "4.mp4": ("linked", "", "")}


# ---- names as tools give them

@pytest.mark.parametrize("name, stem", [
    ("a_000001_000011.mp4", "a_000001_000011"), ("a_000001_000011.MP4.webm", "a_000001_000011"),
    ("a.mp4.mkv.Ts", "a"), ("Dr. No (1.5)_[x]_clap.avi", "Dr. No (1.5)_[x]_clap"),
    ("a.txt.mp4", "a.txt"), ("mp4.mp4", "mp4"), (".mp4", ".mp4"), ("a.mp4.part", "a.mp4.part"),
    ("folder.mp4/a.b", "a.b")])
def test_a_stem_is_without_all_suffixes_of_videos(name, stem):
    assert layouts.stem(Path(name)) == stem


def test_all_suffixes_are_found(put, tmp_path):
    names = ["a", "b.m4v", "c.3GP", "d.ts", "e.mpeg", "f.flv", "g.wmv", "h.vob", "i.mp4", "j.avi",
             "k.mkv", "l.webm", "m.mpg", "n.MOV", "o.txt"]
    for name in names:
        put(f"r/a/{name}")
    found, notes = layouts.videos(tmp_path / "r")
    assert [path.name for path in found] == names[1:-1]
    assert notes == ["2 other files passed over (1 .txt, 1 without suffix)"]


def test_other_files_are_counted(put, tmp_path):
    for name in ("1.mp4", "a.TXT", "deep/b.txt", "c.zip", ".hidden.txt", ".DS_Store"):
        put(f"r/a/{name}")
    rows, notes = scan.survey("folder", tmp_path / "r")
    assert notes == ["3 other files passed over (2 .txt, 1 .zip)"]
    assert scan.summary(rows, notes) == "1 files, 1 usable; " + notes[0]
    for name in ("d.zip", "e.zip", "f.part", "g.json", "h.csv", "i.jpg", "1. j k", "\udce9.\udce9"):
        put(f"r/a/{name}")
    kinds = "3 .zip, 2 .txt, 2 without suffix, 1 .csv, 1 .jpg, ..."
    assert layouts.videos(tmp_path / "r")[1] == [f"11 other files passed over ({kinds})"]
    (tmp_path / "r/a/1.mp4").unlink()
    with pytest.raises(ValueError, match=r"no video in .*expected .*\.webm.*; 11 other files"):
        scan.scan(tmp_path / "r")
    put("clean/a/1.mp4"), put("clean/.hidden")
    assert scan.survey("folder", tmp_path / "clean")[1] == []


BOWLING = {"l.csv": K400 + "bowling,--07WQ2iBlw,1,11,train\n"}
LISTS = {                                        # layout: (name of a clip, lists that have it)
    "kinetics400": ("--07WQ2iBlw_000001_000011", BOWLING),
    "kinetics-sounds": ("--07WQ2iBlw_000001_000011", BOWLING),
    "vggsound": ("--07WQ2iBlw_000001", {"vggsound.csv": '--07WQ2iBlw,1,"a, b",train\n'}),
    "ucf101": ("v_A_g01_c01", {"classInd.txt": "1 A\n", "testlist01.txt": "",
                               "trainlist01.txt": "A/v_A_g01_c01.avi 1\n"}),
    "hmdb51": ("Dr. No [1.5]_clap", {"clap_test_split1.txt": "Dr. No [1.5]_clap.avi 1 \n"})}


@pytest.mark.parametrize("layout", LISTS)
@pytest.mark.parametrize("mark", ("", "\ufeff"))
def test_double_suffixes_and_lists_with_a_mark(put, tmp_path, layout, mark):
    """Each layout takes name.mp4.mkv, uses a clip once, tells others, reads lists with a BOM."""
    name, lists = LISTS[layout]
    put(f"r/x/{name}.mp4.MKV", "mkv"), put(f"r/x/{name}.mp4.webm", "mkv"), put("r/notes.txt")
    for file, content in lists.items():
        (tmp_path / file).write_text(mark + content, encoding="utf-8")
    rows, notes = scan.survey(layout, tmp_path / "r", annotations=tmp_path)
    assert [(row["split"], row["reason"]) for row in rows] == [
        ("train", ""), ("train", scan.COPY)]
    assert notes[0] == "0 official entries not on disk"
    assert notes[-1] == "1 other files passed over (1 .txt)"


def test_kinetics_named_by_the_id_alone(put, tmp_path):
    put("k/once_-AAAA_.mp4"), put("k/twiceAAAAAA.mp4.mkv"), put("k/twiceAAAAAA_000005_000015.mp4")
    put("k/bothAAAAAAA.mp4"), put("k/bothAAAAAAA_000001_000011.mp4"), put("k/othersAAAAA.mp4")
    text(tmp_path / "l/train.csv", K400 + "bowling,once_-AAAA_,1,11,train\n"
         "bowling,twiceAAAAAA,5,15,train\nbowling,bothAAAAAAA,1,11,train\n"
         "yoga,othersAAAAA,1,11,train\n")
    text(tmp_path / "l/val.csv", K400 + "bowling,twiceAAAAAA,25,35,val\n"
         "bowling,bothAAAAAAA,1,11,train\n")               # the same entry once more: one clip
    used = ("bowling", "train", "")
    ours = {"once_-AAAA_.mp4": used, "twiceAAAAAA_000005_000015.mp4": used, "bothAAAAAAA.mp4": used,
            "bothAAAAAAA_000001_000011.mp4": ("bowling", "train", scan.COPY),
            "twiceAAAAAA.mp4.mkv": (
                "", "", "its name is an id with several clips in the official list")}
    rows, notes = scan.survey("kinetics400", tmp_path / "k", annotations=tmp_path / "l")
    assert short(rows) == ours | {"othersAAAAA.mp4": ("yoga", "train", "")}
    assert notes == ["1 official entries not on disk (1 of val)"]
    rows, notes = scan.survey("kinetics-sounds", tmp_path / "k", annotations=tmp_path / "l")
    assert short(rows) == ours and notes == [
        "1 official entries not on disk (1 of val)", "1 files of other classes passed over"]


@pytest.mark.parametrize("evaluation", (False, True))
def test_vggsound_named_in_milliseconds(put, tmp_path, evaluation):
    put("v/-1pRmoJIGQc_10000_20000.mp4"), put("v/a_b-c_100_1_0_10000.mp4.webm", "mkv")
    put("v/bothAAAAAAA_000007.mp4"), put("v/bothAAAAAAA_7000_17000.mp4")
    put("v/-1pRmoJIGQc_11000_21000.mp4")
    entries = [("-1pRmoJIGQc", 10, "train"), ("a_b-c_100_1", 0, "test"),
               ("bothAAAAAAA", 7, "train"), ("goneAAAAAAA", 1, "test")]
    for split in ("train", "test"):
        text(tmp_path / f"lists/{split}.csv", "".join(
            f"{name}_{start:06d}.mp4,waves\n" for name, start, part in entries if part == split))
    if not evaluation:
        text(tmp_path / "lists/vggsound.csv", "".join(
            f'{name},{start},"waves",{part}\n' for name, start, part in entries))
    rows, notes = scan.survey("vggsound", tmp_path / "v", annotations=tmp_path / "lists")
    assert short(rows) == {
        "-1pRmoJIGQc_10000_20000.mp4": ("waves", "train", ""),
        "a_b-c_100_1_0_10000.mp4.webm": ("waves", "test", ""),
        "bothAAAAAAA_000007.mp4": ("waves", "train", ""),
        "bothAAAAAAA_7000_17000.mp4": ("waves", "train", scan.COPY),
        "-1pRmoJIGQc_11000_21000.mp4": ("", "", "not in the official list")}
    assert notes == ["1 official entries not on disk (1 of test)"]


@pytest.mark.parametrize("part, split", [
    ("train", "train"), ("TRAIN", "train"), ("Training", "train"), ("val", "val"), ("valid", "val"),
    ("Validate", "val"), ("Validation", "val"), ("test", "test"), ("Testing", "test"),
    ("eval", ""), ("trains", "")])
def test_folders_of_parts(put, tmp_path, part, split):
    put(f"r/{part}/bowling/1.mp4"), put(f"r/bowling/{part}/2.mp4")
    label = "bowling" if split else f"{part}/bowling"
    assert short(scan.scan(tmp_path / "r"), "label", "split") == {
        "1.mp4": (label, split), "2.mp4": (f"bowling/{part}", "")}       # the first folder alone
    rows = scan.scan(tmp_path / "r", layout="kinetics-sounds")
    assert short(rows, "label", "split") == dict.fromkeys(("1.mp4", "2.mp4"), ("bowling", split))


def test_a_manifest_with_a_mark(put, tmp_path, monkeypatch):
    """All that read a manifest take one that begins with a BOM, as Excel writes it."""
    put("r/a/1.mp4")
    out = tmp_path / "m.csv"
    rows = scan.scan(tmp_path / "r", out=out)
    out.write_bytes(b"\xef\xbb\xbf" + out.read_bytes())
    assert read_manifest(out)[0][0].path == rows[0]["path"]
    assert transcode.read(out)[0]["path"] == rows[0]["path"]
    names = hand_in(monkeypatch)
    assert scan.scan(tmp_path / "r", out=out) == rows and names == []


def command(*args):
    """(exit status, stdout, last line of stderr) of prepare.manifest."""
    done = subprocess.run([sys.executable, "-m", "prepare.manifest", *map(str, args)], cwd=ROOT,
                          text=True, capture_output=True)
    return done.returncode, done.stdout, (done.stderr.splitlines() or [""])[-1]


@pytest.mark.parametrize("layout, form", [
    ("kinetics400", "'--07WQ2iBlw_000001_000011.mp4' (id_start_end)"),
    ("kinetics-sounds", "'--07WQ2iBlw_000001_000011.mp4' (id_start_end)"),
    ("vggsound", "'--07WQ2iBlw_000001.mp4' (id_start)"), ("ucf101", "'v_A_g01_c01.avi'"),
    ("hmdb51", "'Dr. No [1.5]_clap.avi'")])
def test_names_that_do_not_fit_are_told(put, tmp_path, layout, form):
    put("r/b.mp4"), put("r/a'.mp4")
    for file, content in LISTS[layout][1].items():
        text(tmp_path / "lists" / file, content)
    out = tmp_path / "m.csv"
    done = command(layout, tmp_path / "r", "--annotations", tmp_path / "lists", "--out", out)
    others = "; 0 files of other classes passed over" * (layout == "kinetics-sounds")
    assert done == (
        1, "", f"error: {out}: 2 files, 0 usable, 2 left out: 2 not in the official list; "
        f"{layout} expects names like {form}, found e.g. \"a'.mp4\"{others}")
    with open(out, newline="") as file:
        assert [row["reason"] for row in csv.DictReader(file)] == [layouts.UNLISTED] * 2


def test_files_that_are_named_rightly_but_not_usable(put, tmp_path):
    """The reasons alone are told. The functions do not raise, the command ends with 1."""
    put("r/--07WQ2iBlw_000001_000011.mp4").write_bytes(b""), put("r/unlistedAAA.mp4")
    listed, out = text(tmp_path / "l.csv", BOWLING["l.csv"]), tmp_path / "m.csv"
    rows, notes = scan.survey("kinetics400", tmp_path / "r", annotations=listed)
    assert [row["reason"] for row in rows] == ["empty file", "not in the official list"]
    assert notes == ["0 official entries not on disk"]
    assert command("kinetics400", tmp_path / "r", "--annotations", listed, "--out", out) == (
        1, "", f"error: {out}: 2 files, 0 usable, 2 left out: 1 empty file, 1 not in the official "
        "list; 0 official entries not on disk")
    (tmp_path / "r/unlistedAAA.mp4").unlink()
    assert command("folder", tmp_path / "r", "--out", out) == (
        1, "", f"error: {out}: 1 files, 0 usable, 1 left out: 1 empty file")


# ---- lists that do not serve

@pytest.mark.parametrize("layout, name, content, message", [
    ("kinetics400", "train.csv", K400 + "yoga,abcdefghijk,1,11,train\n\nyoga,abcdefghijk,x,11,train\n", "csv:4: "),
    ("kinetics400", "train.csv", K400 + "yoga,abcdefghijk,1,11\n", "train.csv:2: expected label,youtube_id"),
    ("kinetics400", "train.csv", K400 + "yoga,abcdefghijk,1,11,holdout\n", "train.csv:2: "),
    ("kinetics400", "train.csv", K400 + "yoga,abcdefghijk,1,11,train,1\n", "train.csv:2: "),
    ("kinetics400", "train.csv", "abcdefghijk,1,11\n", "train.csv:1: expected the columns .* got 'abcdefghijk,1,11'"),
    ("vggsound", "vggsound.csv", 'abcdefghijk,1,"a, b",test\nabcdefghijk_000001.mp4,a\n', "vggsound.csv:2: "),
    ("vggsound", "vggsound.csv", 'abcdefghijk,1,"a, b,test\n', "vggsound.csv:1: "),
    ("vggsound", "vggsound.csv", 'abcdefghijk,1,"a" b,test\n', "vggsound.csv:1: "),
    ("ucf101", "classInd.txt", "1 A\nB 2\n", "classInd.txt:2: expected '1 Class', got 'B 2'"),
    ("ucf101", "trainlist01.txt", "A/v_A_g01_c01.avi 1\nA/v_A_g02_c01.avi 2\n", "trainlist01.txt:2: .* got .*avi 2'"),
    ("ucf101", "testlist01.txt", "B/v_B_g01_c01.avi\n", "testlist01.txt:1: "),
    ("hmdb51", "clap_test_split1.txt", "x.avi 1 \nx.avi 3 \n", "clap_test_split1.txt:2: .* got 'x.avi 3'"),
    ("hmdb51", "clap_test_split1.txt", "\x00\xff\n", "clap_test_split1.txt:1: ")])
def test_a_line_that_does_not_parse_is_named(put, tmp_path, layout, name, content, message):
    put("r/a/a.mp4")
    if layout == "ucf101":
        for other, line in (("classInd", "1 A"), ("trainlist01", "A/v_A_g1.avi 1"), ("testlist01", "A/v_A_g2.avi")):
            text(tmp_path / f"l/{other}.txt", line)
    text(tmp_path / "l" / name, content)
    with pytest.raises(ValueError, match=message):
        scan.scan(tmp_path / "r", layout=layout, annotations=tmp_path / "l")


@pytest.mark.parametrize("layout", ("kinetics400", "vggsound", "ucf101", "hmdb51"))
def test_missing_lists(put, tmp_path, layout):
    put("r/a/a.mp4")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="needs --annotations: give the "):
        scan.scan(tmp_path / "r", layout=layout)
    for given, problem in (("gone", "does not exist"), ("empty", "has no "), ("r/a/a.mp4", "is of another kind")):
        with pytest.raises(ValueError, match=f"--annotations .*{given} {problem}.*: give the "):
            scan.scan(tmp_path / "r", layout=layout, annotations=tmp_path / given)


def test_command(ucf, tmp_path):
    """The real command: its summary, its exit status and one sentence where it is called in a wrong way."""
    def run(*args):
        command = [sys.executable, "-m", "prepare.manifest", *map(str, args)]
        done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
        return done.returncode, done.stdout, done.stderr
    out = tmp_path / "new/m.csv"
    code, printed, _ = run("ucf101", ucf, "--annotations", tmp_path / "split", "--fold", 2, "--out", out)
    assert code == 0 and printed == (f"{out}: 5 files, 4 usable, 1 left out: 1 not in the official list; "
                                     "1 official entries not on disk (1 of test)\n")
    assert next(csv.reader(open(out))) == list(scan.COLUMNS)
    rows, left_out = read_manifest(out, "test")
    assert [(Path(row.path).name, row.label, row.has_audio) for row in rows] == [("v_YoYo_g02_c01.avi", "YoYo", True)]
    assert os.listdir(out.parent) == ["m.csv"]
    for args, message in ((("ucf101", ucf, "--out", out), "error: this layout needs --annotations"),
                          (("folder", ucf, "--fold", 2, "--out", out), "error: layout folder takes no --fold"),
                          (("folder", ucf, "--out", tmp_path / "split/classInd.txt"), "is no manifest and would be")):
        code, printed, said = run(*args)
        assert code == 1 and printed == "" and message in said and said.count("\n") == 1


# ---- going on

def test_a_second_scan_reads_only_what_is_new_or_changed(put, tmp_path, monkeypatch):
    for name in "abcd":
        put(f"r/{name}/{name}.mp4")
    put("r/e/e.mp4").write_bytes(b"no film")
    names, out, root = hand_in(monkeypatch), tmp_path / "m.csv", tmp_path / "r"
    first = scan.scan(root, out=out)
    whole = out.read_bytes()
    assert sorted(names) == ["a.mp4", "b.mp4", "c.mp4", "d.mp4", "e.mp4"]
    names.clear()
    assert scan.scan(root, out=out) == first and out.read_bytes() == whole and names == []
    os.utime(root / "b/b.mp4")
    put("r/c/c.mp4", "silent")
    put("r/a/new.mp4")
    (root / "d/d.mp4").rename(root / "d/moved.mp4")
    again = scan.scan(root, out=out)
    assert sorted(names) == ["b.mp4", "c.mp4", "moved.mp4", "new.mp4"]
    assert [(Path(row["path"]).stem, row["has_audio"]) for row in again] == [
        ("a", 1), ("new", 1), ("b", 1), ("c", 0), ("moved", 1), ("e", 0)]
    names.clear()
    scan.scan(root, out=out, verify=True)
    assert len(names) == 6                                 # a probed row is not a verified one
    names.clear()
    scan.scan(root, out=out, verify=True), scan.scan(root, out=out)
    assert names == []                                     # but a verified one is a probed one


def test_a_manifest_of_an_earlier_version_is_read_anew(put, tmp_path, monkeypatch):
    put("r/a/a.mp4")
    names, out = hand_in(monkeypatch), tmp_path / "m.csv"
    first = scan.scan(tmp_path / "r", out=out)
    with open(out, newline="") as file:
        rows = [{name: row[name] for name in row if name not in ("video_duration", "note")} for row in csv.DictReader(file)]
    with open(out, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(ValueError, match="m.csv is no manifest of this version, it lacks note, video_duration"):
        read_manifest(out)
    assert scan.scan(tmp_path / "r", out=out) == first and names == ["a.mp4", "a.mp4"]


def test_labels_are_read_anew(ucf, tmp_path, monkeypatch):
    names, out = hand_in(monkeypatch), tmp_path / "m.csv"
    for fold in (1, 2):
        rows = scan.scan(ucf, layout="ucf101", annotations=tmp_path / "split", fold=fold, out=out)
        assert short(rows)[f"v_YoYo_g0{fold}_c01.avi"] == ("YoYo", "test", "")
    assert len(names) == 4


def test_an_interrupted_scan_goes_on(put, tmp_path, monkeypatch):
    for n in range(6):
        put(f"r/a/{n}.mp4")
    out, real = tmp_path / "m.csv", scan.in_workers

    def three(*args):
        for n, done in enumerate(real(*args)):
            if n == 3:
                raise KeyboardInterrupt
            yield done
    monkeypatch.setattr(scan, "in_workers", three)
    with pytest.raises(KeyboardInterrupt):
        scan.scan(tmp_path / "r", out=out)
    assert not out.exists() and len(list(csv.DictReader(open(f"{out}.partial")))) == 3
    monkeypatch.setattr(scan, "in_workers", real)
    names = hand_in(monkeypatch)
    assert len(scan.scan(tmp_path / "r", out=out)) == 6
    assert len(names) == 3 and sorted(path.name for path in tmp_path.glob("m.csv*")) == ["m.csv"]


def test_a_killed_scan_goes_on(put, tmp_path, monkeypatch):
    """Progress is written on the way, not only where Python can clean up."""
    monkeypatch.setattr(scan, "SAVE_EVERY", 0)
    writes, real = [], scan.write

    def write(rows, out):
        writes.append((Path(out).name, len(rows)))
        real(rows, out)
    monkeypatch.setattr(scan, "write", write)
    for n in range(3):
        put(f"r/a/{n}.mp4")
    scan.scan(tmp_path / "r", out=tmp_path / "m.csv")
    assert writes == [("m.csv.partial", 1), ("m.csv.partial", 2), ("m.csv.partial", 3), ("m.csv", 3)]


def test_the_number_of_workers_changes_nothing(put, tmp_path):
    for n in range(20):
        put(f"r/{n % 3}/{n}.mp4", ("mp4", "silent", "avi", "mkv")[n % 4])
    one, four = scan.scan(tmp_path / "r", 1), scan.scan(tmp_path / "r", 4)
    assert one == four and len(one) == 20 and [row["path"] for row in one] == sorted(row["path"] for row in one)


# ---- files that do harm

def work_badly(entry):
    if entry == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if entry == "hangs":
        signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {signal.SIGKILL})
        time.sleep(60)
    if entry == "raises":
        raise MemoryError
    return entry.upper()


@pytest.mark.parametrize("workers", (1, 2))
def test_a_crash_and_a_hang_cost_only_their_own_file(workers):
    entries = ["a", "dies", "b", "hangs", "c", "dies", "raises", "d"]
    start = time.monotonic()
    done = list(scan.in_workers(work_badly, entries, workers, 0.7))
    assert time.monotonic() - start < 6
    assert sorted(entry for entry, *_ in done) == sorted(entries)
    assert {(row, reason) for entry, row, reason in done if len(entry) == 1} == {(name, "") for name in "ABCD"}
    assert {(entry, reason) for entry, row, reason in done if row is None} == {
        ("dies", "crashes the decoder"), ("raises", "crashes the decoder"), ("hangs", "takes over 0.7 s")}


def test_the_processes_end_with_their_parent():
    code = ("from prepare import scan; import time\n"
            "for done in scan.in_workers(str.upper, ['a', 'b', 'c'], 2, 20):\n"
            "    print(done, flush=True); time.sleep(30)")
    scan = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert scan.stdout.readline() in ("('a', 'A', '')\n", "('b', 'B', '')\n")
    scan.kill()
    scan.communicate(timeout=5)                            # their stdout is the same: it closes with the last of them


def test_a_hang_is_named_and_tried_again(put, tmp_path, monkeypatch):
    put("r/a/1.mp4"), put("r/a/3.mp4")
    os.mkfifo(tmp_path / "r/a/2.mp4")                      # opening it waits for a writer that never comes
    monkeypatch.setattr(scan, "SECONDS", 1)
    for _ in range(2):
        rows = scan.scan(tmp_path / "r", out=tmp_path / "m.csv")
        assert short(rows, "reason", "stamp")["2.mp4"] == ("takes over 1 s", "")
        assert [row["reason"] for row in rows if "2.mp4" not in row["path"]] == ["", ""]


def test_reasons(put, films, tmp_path):
    put("r/a/fine.mp4"), put("r/a/silent.mp4", "silent"), put("r/a/empty.mp4").write_bytes(b"")
    text(tmp_path / "r/a/text.mp4", "no film"), (tmp_path / "r/a/gone.mp4").symlink_to(tmp_path / "gone")
    rewrite(films["mp4"], tmp_path / "r/a/sound.mp4", keep=("audio",))
    with av.open(str(films["mp4"])) as old, av.open(str(tmp_path / "r/a/cover.mov"), "w", format="mp4") as new:
        sound = new.add_stream_from_template(old.streams.audio[0])
        cover = new.add_stream("mjpeg", rate=1, width=32, height=32, pix_fmt="yuvj420p")
        cover.disposition = av.stream.Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 99, np.uint8), "rgb24").reformat(format="yuvj420p")
        new.mux(cover.encode(picture) + cover.encode(None))
        for packet in old.demux(old.streams.audio[0]):
            if packet.dts is not None:
                packet.stream = sound
                new.mux(packet)
    with av.open(str(tmp_path / "r/a/named.mp4"), "w") as new:
        new.metadata["title"] = "XXXX"
        video = new.add_stream("mpeg4", rate=10, width=36, height=28, pix_fmt="yuv420p")
        new.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((28, 36, 3), np.uint8), "rgb24")) + video.encode(None))
    named = tmp_path / "r/a/named.mp4"
    named.write_bytes(named.read_bytes().replace(b"XXXX", b"\xe9\xff\xfe\xe9"))
    shutil.copy(films["mp4"], os.fsencode(tmp_path / "r/a") + b"/latin1_\xe9.mp4")
    rows = scan.scan(tmp_path / "r", out=tmp_path / "m.csv")
    assert short(rows, "has_audio", "reason") == {
        "fine.mp4": (1, ""), "silent.mp4": (0, ""), "empty.mp4": (0, "empty file"),
        "text.mp4": (0, "cannot be read: Invalid data found when processing input"),
        "gone.mp4": (0, "cannot be read: No such file or directory"), "sound.mp4": (0, "no video stream"),
        "cover.mov": (0, "no video stream"), "named.mp4": (0, ""),
        "latin1_\udce9.mp4": (0, "its name is not UTF-8")}
    usable, left_out = read_manifest(tmp_path / "m.csv")
    assert len(usable) == 3 and len(left_out) == 6


def test_verify_finds_what_headers_hide(put, tmp_path):
    long = make_video(tmp_path / "r/a/long.mp4", 4.0, 10, (36, 28), gop=5)
    put("r/a/fine.mp4"), put("r/a/silent.mp4", "silent"), put("r/a/fine.avi", "avi"), put("r/a/fine.mkv", "mkv")
    whole = rewrite(long, tmp_path / "r/a/cut.mkv").read_bytes()
    (tmp_path / "r/a/cut.mkv").write_bytes(whole[:len(whole) // 2])
    data = bytearray(long.read_bytes())
    start = data.index(b"mdat")
    quarter = (len(data) - start) // 4                     # the index and the first frames stay
    data[start + quarter:start + 2 * quarter] = b"\x55" * quarter
    (tmp_path / "r/a/damaged.mp4").write_bytes(data)
    assert not any(row["reason"] for row in scan.scan(tmp_path / "r"))
    reasons = short(scan.scan(tmp_path / "r", verify=True), "reason")
    assert {name for name, (reason,) in reasons.items() if reason} == {"cut.mkv", "damaged.mp4"}
    assert "stops too early (at " in reasons["cut.mkv"][0]
    assert reasons["damaged.mp4"][0].startswith("cannot be read to the end: ")


def damaged(films, root, seed=1):
    """680 damaged files: cut, bits turned, zeros, another suffix, streams dropped."""
    rng = random.Random(seed)
    root.mkdir(parents=True)
    for kind in ("mp4", "avi", "mkv", "silent"):
        whole = films[kind].read_bytes()
        for how in ("cut", "bits", "header", "zeros", "swapped"):
            for n in range(34):
                data, suffix = bytearray(whole), films[kind].suffix
                if how == "cut":
                    del data[rng.randrange(len(data)):]
                elif how in ("bits", "header"):
                    last = len(data) if how == "bits" else 600
                    for _ in range(rng.choice((1, 10, 100))):
                        data[rng.randrange(last)] ^= 1 << rng.randrange(8)
                    if how == "header" and kind in ("mp4", "silent"):         # its header stands at the end
                        for _ in range(10):
                            data[-rng.randrange(1, 1500)] ^= 1 << rng.randrange(8)
                elif how == "zeros":
                    at, many = rng.randrange(len(data)), rng.randrange(1, len(data) // 2)
                    data[at:at + many] = bytes(len(data[at:at + many]))
                else:
                    suffix = rng.choice(sorted(layouts.SUFFIXES))
                    data = data[:rng.randrange(len(data))] if n % 2 else data
                (root / f"{kind}_{how}_{n}{suffix}").write_bytes(data)
    for kind in ("mp4", "avi", "mkv"):
        for keep in ("video", "audio"):
            rewrite(films[kind], root / f"{kind}_only_{keep}{films[kind].suffix}", keep=(keep,))


@pytest.mark.parametrize("verify", (False, True))
def test_damaged_files(films, tmp_path, verify):
    damaged(films, tmp_path / "r/a")
    rows = scan.scan(tmp_path / "r", verify=verify)
    assert len(rows) == 4 * 5 * 34 + 6
    for row in rows:
        assert row["reason"] or row["duration"] > 0 and row["width"] > 0 and row["height"] > 0, row
        assert not row["reason"].startswith(("takes over", "crashes")), row
        assert row["reason"] or "only_audio" not in row["path"], row
    assert 100 < sum(not row["reason"] for row in rows) < 600
    assert verify == any("damaged frames (first at " in row["reason"] for row in rows)
    assert all(not row["reason"] for row in rows if "_only_video" in row["path"])
    assert not any(row["reason"] for row in rows for n in range(0, 34, 2) if f"_swapped_{n}." in row["path"])   # whole
