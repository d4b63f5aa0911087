"""prepare/layouts.py on small copies of every layout, with lists in their official formats, and the
command prepare/manifest.py on them."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pretrain
import retrieval
from conftest import ROOT, SMALL, by_name, log_of, run_here, write_text
from data import read_manifest
from prepare import layouts, scan

K400 = "label,youtube_id,time_start,time_end,split\n"
DRAWN = [3, 9, 11, 13, 17, 18, 19]      # of a/0.mp4 to a/19.mp4, with a share of 0.2 and seed 0


# ---- layouts

@pytest.fixture
def kinetics(put, tmp_path):
    """A copy with class folders, files outside of them, ids with _ and -, a replaced file, and its
    three lists."""
    put("k/train/playing_guitar/-a_b-c_d--1_000003_000013.mp4")
    put("k/train/Strumming Guitar/strummingAA_000000_000010.mp4")
    put("k/val/surfing water/surfing__-A_000120_000130.mp4", "silent")
    put("k/flat-tap01_000044_000054.mp4")
    put("k/train/playing_guitar/replacedAAA_000001_000011.mp4").write_bytes(b"")
    put("k/replacement/replacement_for_corrupted_k400/replacedAAA_000001_000011.mp4")
    put("k/test/singing/unlistedAAA_000001_000011.mp4")
    write_text(tmp_path / "lists/train.csv", K400 + "playing guitar,-a_b-c_d--1,3,13,train\n"
               "strumming guitar,strummingAA,0,10,train\nplaying guitar,replacedAAA,1,11,train\n"
               "bowling,goneAAAAAAA,5,15,train\nyoga,goneAAAAAAB,5,15,train\n")
    write_text(tmp_path / "lists/validate.csv",
               K400 + "surfing water,surfing__-A,120,130,validate\n")
    write_text(tmp_path / "lists/test.csv", K400.replace("split", "split,is_cc")
               + '"tap dancing",flat-tap01,44,54,test,0\n')
    return tmp_path / "k"


def test_kinetics400(kinetics):
    lists = kinetics.parent / "lists"
    rows, notes = scan.survey("kinetics400", kinetics, annotations=lists)
    assert [row["path"] for row in rows] == [str(path) for path in sorted(kinetics.rglob("*.mp4"))]
    found = {row["path"].removeprefix(f"{kinetics}/"): (row["label"], row["split"], row["reason"])
             for row in rows}
    replacement = "replacement/replacement_for_corrupted_k400/replacedAAA_000001_000011.mp4"
    assert found == {
        "train/playing_guitar/-a_b-c_d--1_000003_000013.mp4": ("playing guitar", "train", ""),
        "train/Strumming Guitar/strummingAA_000000_000010.mp4": ("strumming guitar", "train", ""),
        "val/surfing water/surfing__-A_000120_000130.mp4": ("surfing water", "val", ""),
        "flat-tap01_000044_000054.mp4": ("tap dancing", "test", ""),
        "train/playing_guitar/replacedAAA_000001_000011.mp4":
            ("playing guitar", "train", "empty file"),
        replacement: ("playing guitar", "train", ""),
        "test/singing/unlistedAAA_000001_000011.mp4": ("", "", "not in the official list")}
    assert notes == ["2 official entries not on disk (2 of train)"]
    silent = by_name(rows, "has_audio", "reason")["surfing__-A_000120_000130.mp4"]
    assert silent == (0, "")                               # a file without sound can be used
    rows, _ = scan.survey("kinetics400", kinetics, annotations=lists / "validate.csv")
    assert sum(not row["reason"] for row in rows) == 1


def test_a_list_without_labels(put, tmp_path):
    """Kinetics' list of the test part came without labels. A label in another list counts."""
    for name in ("listedAAAAA", "bothAAAAAAA", "emptyAAAAAA", "testAAAAAAA"):
        put(f"k/{name}_000001_000011.mp4")
    write_text(tmp_path / "lists/train.csv", K400 + "yoga,listedAAAAA,1,11,train\n"
               "yoga,bothAAAAAAA,1,11,train\n,emptyAAAAAA,1,11,train\n")
    write_text(tmp_path / "lists/test.csv", K400.removeprefix("label,")
               + "bothAAAAAAA,1,11,test\ntestAAAAAAA,1,11,test\ngoneAAAAAAA,1,11,test\n")
    no_label = "no label in the official list"
    rows, notes = scan.survey("kinetics400", tmp_path / "k", annotations=tmp_path / "lists")
    assert by_name(rows) == {
        "listedAAAAA_000001_000011.mp4": ("yoga", "train", ""),
        "bothAAAAAAA_000001_000011.mp4": ("yoga", "train", ""),
        "emptyAAAAAA_000001_000011.mp4": ("", "train", no_label),
        "testAAAAAAA_000001_000011.mp4": ("", "test", no_label)}
    assert notes == ["0 official entries not on disk"]


def test_one_of_two_good_copies_is_used(put, tmp_path):
    copies = [put(f"k/{folder}/abcdefghijk_000001_000011.mp4")
              for folder in ("a", "b", "replacement/for", "train")]
    listed = write_text(tmp_path / "train.csv", K400 + "yoga,abcdefghijk,1,11,train\n")
    for _ in range(2):                                     # without the used copy the next one is
        rows = scan.scan(tmp_path / "k", layout="kinetics400", annotations=listed,
                         out=tmp_path / "m.csv")
        used = copies[-2] if len(copies) == 4 else copies[0]
        assert [row["reason"] for row in rows] == ["" if path == used else scan.COPY
                                                   for path in copies]
        copies.remove(used)
        used.unlink()


def test_kinetics_sounds(kinetics):
    lists = kinetics.parent / "lists"
    rows, notes = scan.survey("kinetics-sounds", kinetics, annotations=lists)
    assert {Path(row["path"]).name for row in rows if not row["reason"]} == {
        "-a_b-c_d--1_000003_000013.mp4", "strummingAA_000000_000010.mp4",
        "flat-tap01_000044_000054.mp4", "replacedAAA_000001_000011.mp4"}
    assert notes == ["1 official entries not on disk (1 of train)",
                     "1 files of other classes passed over"]
    rows, notes = scan.survey("kinetics-sounds", kinetics)    # without lists: the class folders
    assert by_name(rows) == {
        "-a_b-c_d--1_000003_000013.mp4": ("playing guitar", "train", ""),
        "strummingAA_000000_000010.mp4": ("strumming guitar", "train", ""),
        "replacedAAA_000001_000011.mp4": ("playing guitar", "train", "empty file"),
        "unlistedAAA_000001_000011.mp4": ("singing", "test", "")}
    assert notes == ["3 files of other classes passed over"]
    for options in ({}, {"annotations": lists}):
        rows = scan.scan(kinetics, layout="kinetics-sounds", classes=31, **options)
        assert "strumming guitar" not in {row["label"] for row in rows}
    assert len(layouts.KINETICS_SOUNDS) == len(set(layouts.KINETICS_SOUNDS)) == 32
    with pytest.raises(ValueError, match="no video of the 32 classes"):
        scan.scan(kinetics / "val", layout="kinetics-sounds")


def test_vggsound(put, tmp_path):
    put("v/--0PQM4-hqg_000030.mp4")
    put("v/more/a_b_c_d_e_f_000009.mp4")
    put("v/unlistedAAA_000030.mp4")
    listed = write_text(tmp_path / "vggsound.csv", '--0PQM4-hqg,30,"waterfall burbling",train\n'
                        'a_b_c_d_e_f,9,"bird chirping, tweeting",test\n'
                        'goneAAAAAAA,1,"bird chirping, tweeting",test\n')
    for annotations in (listed, tmp_path):
        rows, notes = scan.survey("vggsound", tmp_path / "v", annotations=annotations)
        assert by_name(rows) == {
            "--0PQM4-hqg_000030.mp4": ("waterfall burbling", "train", ""),
            "a_b_c_d_e_f_000009.mp4": ("bird chirping, tweeting", "test", ""),
            "unlistedAAA_000030.mp4": ("", "", "not in the official list")}
        assert notes == ["1 official entries not on disk (1 of test)"]


def test_vggsound_lists_of_the_evaluation_code(put, tmp_path):
    put("v/--0PQM4-hqg_000030.mp4")
    put("v/a_b_c_d_e_f_000009.mp4")
    write_text(tmp_path / "lists/train.csv", "--0PQM4-hqg_000030.mp4,waterfall burbling\n")
    write_text(tmp_path / "lists/test.csv", 'a_b_c_d_e_f_000009.mp4,"bird chirping, tweeting"\n')
    write_text(tmp_path / "lists/stat.csv", "waterfall burbling,1050,nature\n")
    rows = scan.scan(tmp_path / "v", layout="vggsound", annotations=tmp_path / "lists")
    assert by_name(rows) == {
        "--0PQM4-hqg_000030.mp4": ("waterfall burbling", "train", ""),
        "a_b_c_d_e_f_000009.mp4": ("bird chirping, tweeting", "test", "")}


@pytest.mark.parametrize("evaluation", (False, True))
def test_vggsound_named_in_milliseconds(put, tmp_path, evaluation):
    put("v/-1pRmoJIGQc_10000_20000.mp4")
    put("v/a_b-c_100_1_0_10000.mp4.webm", "mkv")
    put("v/bothAAAAAAA_000007.mp4")
    put("v/bothAAAAAAA_7000_17000.mp4")
    put("v/-1pRmoJIGQc_11000_21000.mp4")
    entries = [("-1pRmoJIGQc", 10, "train"), ("a_b-c_100_1", 0, "test"),
               ("bothAAAAAAA", 7, "train"), ("goneAAAAAAA", 1, "test")]
    for split in ("train", "test"):
        write_text(tmp_path / f"lists/{split}.csv", "".join(
            f"{name}_{start:06d}.mp4,waves\n" for name, start, own in entries if own == split))
    if not evaluation:
        write_text(tmp_path / "lists/vggsound.csv", "".join(
            f'{name},{start},"waves",{split}\n' for name, start, split in entries))
    rows, notes = scan.survey("vggsound", tmp_path / "v", annotations=tmp_path / "lists")
    assert by_name(rows) == {
        "-1pRmoJIGQc_10000_20000.mp4": ("waves", "train", ""),
        "a_b-c_100_1_0_10000.mp4.webm": ("waves", "test", ""),
        "bothAAAAAAA_000007.mp4": ("waves", "train", ""),
        "bothAAAAAAA_7000_17000.mp4": ("waves", "train", scan.COPY),
        "-1pRmoJIGQc_11000_21000.mp4": ("", "", "not in the official list")}
    assert notes == ["1 official entries not on disk (1 of test)"]


@pytest.fixture
def ucf(put, tmp_path):
    """A copy with two files outside of class folders: one is converted, one is not in the lists."""
    for n in (1, 2, 3):
        put(f"u/YoYo/v_YoYo_g0{n}_c01.avi", "avi")
    put("u/v_HandStandPushups_g01_c01.mp4")
    put("u/v_Other_g01_c01.avi", "avi")
    lists = tmp_path / "split"
    write_text(lists / "classInd.txt", "37 HandstandPushups\r\n101 YoYo\r\n")
    for fold in (1, 2, 3):
        train = "".join(f"YoYo/v_YoYo_g0{n}_c01.avi 101\r\n" for n in (1, 2, 3) if n != fold)
        train += "HandstandPushups/v_HandStandPushups_g01_c01.avi 37\r\n"
        write_text(lists / f"trainlist0{fold}.txt", train)
        write_text(lists / f"testlist0{fold}.txt",
                   f"YoYo/v_YoYo_g0{fold}_c01.avi\r\nYoYo/v_YoYo_g25_c09.avi\r\n")
    return tmp_path / "u"


@pytest.mark.parametrize("fold", (1, 2, 3))
def test_ucf101(ucf, fold):
    rows, notes = scan.survey("ucf101", ucf, annotations=ucf.parent / "split", fold=fold)
    assert by_name(rows) == {
        **{f"v_YoYo_g0{n}_c01.avi": ("YoYo", "test" if n == fold else "train", "")
           for n in (1, 2, 3)},
        "v_HandStandPushups_g01_c01.mp4": ("HandstandPushups", "train", ""),
        "v_Other_g01_c01.avi": ("", "", "not in the official list")}
    assert notes == ["1 official entries not on disk (1 of test)"]


def test_a_film_and_its_conversion_count_once(ucf, put):
    put("u/YoYo/v_YoYo_g01_c01.mp4")
    rows = scan.scan(ucf, layout="ucf101", annotations=ucf.parent / "split")
    reasons = by_name(rows, "reason")
    assert reasons["v_YoYo_g01_c01.avi"] == ("",)
    assert reasons["v_YoYo_g01_c01.mp4"] == (scan.COPY,)


def test_another_fold_changes_the_labels_without_reading(ucf, tmp_path, files_read):
    for fold in (1, 2):
        rows = scan.scan(ucf, layout="ucf101", annotations=tmp_path / "split", fold=fold,
                         out=tmp_path / "m.csv")
        assert by_name(rows)[f"v_YoYo_g0{fold}_c01.avi"] == ("YoYo", "test", "")
    assert len(files_read) == 4


@pytest.mark.parametrize("fold", (1, 2, 3))
def test_hmdb51(put, tmp_path, fold):
    names = ["#20_Rhythm_clap_u_nm_np1_fr_goo_0",
             "(Rad)Schlag_die_Bank!_clap_f_cm_np1_le_med_0", "a [b]+c 50%_d_clap"]
    for name, suffix in zip(names, ("avi", "mp4", "avi")):
        put(f"h/clap/{name}.{suffix}", suffix)
    put("h/brush_hair/x;'&_1.avi", "avi")
    put("h/brush_hair/extra.avi", "avi")
    lists = tmp_path / "split"
    for n in (1, 2, 3):
        lines = "".join(f"{name}.avi {(n + i) % 3} \n" for i, name in enumerate(names))
        write_text(lists / f"clap_test_split{n}.txt", lines)
        write_text(lists / f"brush_hair_test_split{n}.txt",
                   "x;'&_1.avi 2 \ngone.avi 1 \ngone_unused.avi 0 \n")
    use = [("clap", "", f"unused in fold {fold}"), ("clap", "train", ""), ("clap", "test", "")]
    rows, notes = scan.survey("hmdb51", tmp_path / "h", annotations=lists, fold=fold)
    assert by_name(rows) == {
        f"{names[0]}.avi": use[fold % 3], f"{names[1]}.mp4": use[(fold + 1) % 3],
        f"{names[2]}.avi": use[(fold + 2) % 3],
        "x;'&_1.avi": ("brush_hair", "test", ""),
        "extra.avi": ("", "", "not in the official list")}
    assert notes == ["1 official entries not on disk (1 of train)"]


def test_folder(put, tmp_path):
    put("f/a/1.mp4")
    put("f/a/deep/2.MKV", "mkv")
    put("f/3.avi", "avi")
    put("elsewhere/4.mp4")
    put("f/a/x.txt")
    (tmp_path / "f/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "f/a/circle").symlink_to(tmp_path / "f")
    assert by_name(scan.scan(tmp_path / "f")) == {
        "1.mp4": ("a", "", ""), "2.MKV": ("a/deep", "", ""), "3.avi": ("f", "", ""),
        "4.mp4": ("linked", "", "")}


@pytest.mark.parametrize("name, split", [
    ("train", "train"), ("TRAIN", "train"), ("Training", "train"), ("val", "val"), ("valid", "val"),
    ("Validate", "val"), ("Validation", "val"), ("test", "test"), ("Testing", "test"),
    ("eval", ""), ("trains", "")])
def test_folders_of_splits(put, tmp_path, name, split):
    """In the layout `folder` only the first folder can name a split."""
    put(f"r/{name}/bowling/1.mp4")
    put(f"deep/bowling/{name}/2.mp4")
    label = "bowling" if split else f"{name}/bowling"
    assert by_name(scan.scan(tmp_path / "r"), "label", "split") == {"1.mp4": (label, split)}
    assert by_name(scan.scan(tmp_path / "deep"), "label", "split") == {
        "2.mp4": (f"bowling/{name}", "")}
    for root in ("r", "deep"):
        rows = scan.scan(tmp_path / root, layout="kinetics-sounds")
        assert [(row["label"], row["split"]) for row in rows] == [("bowling", split)]


@pytest.mark.parametrize("names, parts, note", [
    (("bus/1", "car/2", "Train/3"), {"bus": "", "car": "", "Train": ""},
     "Train counted among the classes, because bus beside it is no part"),
    (("train/a/1", "test/a/2", "more/a/3"), {"train/a": "", "test/a": "", "more/a": ""},
     "test, train counted among the classes, because more beside it is no part"),
    (("train/a/1", "val/b/2", "stray"), {"a": "train", "b": "val", "r": ""}, None),
    (("train/a/1", "Testing/a/2"), {"a": "train test"}, None)])
def test_only_folders_that_are_all_parts_are_parts(tmp_path, names, parts, note):
    for name in names:
        write_text(tmp_path / f"r/{name}.mp4", "")
    write_text(tmp_path / "r/lists/train.csv", "")        # a folder without videos is no class
    entries, notes = layouts.folder(tmp_path / "r")
    found = {}
    for _, clip in entries:
        found.setdefault(clip.label, set()).add(clip.split)
    assert found == {label: set(splits.split()) or {""} for label, splits in parts.items()}
    assert notes[1:] == ([note] if note else [])


def test_hidden_files_and_folders_are_passed_over(tmp_path):
    for name in ("a/1.mp4", "a/.ipynb_checkpoints/1-checkpoint.mp4", ".Trash-1000/files/old.mp4",
                 "b/2.mp4", "b/._2.mp4", "b/.nothing"):
        write_text(tmp_path / ".cache/r" / name, "")
    entries, notes = layouts.folder(tmp_path / ".cache/r")
    assert [clip.label for _, clip in entries] == ["a", "b"]
    assert notes == ["3 hidden folders and videos passed over"]


# ---- a test part that is drawn

def test_a_drawn_part_has_its_share_and_depends_on_the_seed():
    """Two seeds draw independently: their test parts share share^2 of the files."""
    names, n = [f"class{k % 7}/{k}.mp4" for k in range(4000)], 4000
    for share in (0.05, 0.2, 0.5):
        first, second = ({name for name in names if layouts.draw_split(name, share, seed) == "test"}
                         for seed in (0, 1))
        for part, p in ((first, share), (second, share), (first & second, share ** 2)):
            assert abs(len(part) - p * n) < 4 * (n * p * (1 - p)) ** 0.5, (share, p)
    drawn = [k for k in range(20) if layouts.draw_split(Path(f"a/{k}.mp4"), 0.2, 0) == "test"]
    assert drawn == DRAWN                                 # the same with every version


def test_a_file_keeps_its_part(put, tmp_path, files_read):
    """When other files come or go, when the folder moves, and in a manifest that is renewed."""
    names, out = [f"{label}/{n}.mp4" for label in "ab" for n in range(12)], tmp_path / "m.csv"
    for name in names:
        put(f"r/{name}")

    def parts(root, **options):
        rows = scan.scan(tmp_path / root, test_share=0.4, **options)
        return {str(Path(row["path"]).relative_to(tmp_path / root)): row["split"] for row in rows}

    first = parts("r", out=out)
    assert set(first) == set(names) and set(first.values()) == {"train", "test"}
    for name in names[::3]:
        (tmp_path / "r" / name).unlink()
    for name in ("a/new.mp4", "0/0.mp4", "c/12.mp4"):
        put(f"r/{name}")
    files_read.clear()
    again = parts("r", out=out)
    assert sorted(files_read) == ["0.mp4", "12.mp4", "new.mp4"]
    kept = first.keys() & again.keys()
    assert len(kept) == 16 and all(again[name] == first[name] for name in kept)
    (tmp_path / "r").rename(tmp_path / "moved")
    assert parts("moved") == again
    assert parts("moved", seed=1) != again


def test_test_share_command(put, tmp_path):
    for n in range(10):
        put(f"r/a/{n}.mp4")
    put("own/train/a/1.mp4")
    put("own/test/a/2.mp4")
    out = tmp_path / "m.csv"
    flags = ("--test-share", "0.2", "--out", out)
    status, stdout, _ = command("folder", tmp_path / "r", *flags)
    drawn = [n for n in DRAWN if n < 10]
    assert (status, stdout) == (0, f"{out}: 10 files, 10 usable; {10 - len(drawn)} files in train "
                                   f"and {len(drawn)} in test, drawn with seed 0\n")
    assert [row.path for row in read_manifest(out, "test")[0]] == [
        str(tmp_path / f"r/a/{n}.mp4") for n in drawn]
    for args, code, message in (
            (("folder", tmp_path / "own", *flags), 1,
             f"error: {tmp_path / 'own'} has parts of its own (test, train): "
             "leave out --test-share"),
            (("folder", tmp_path / "r", "--test-share", "20"), 1,
             "error: --test-share 20.0: give a share above 0 and below 1, e.g. 0.2"),
            (("ucf101", tmp_path / "r", *flags), 2,
             "error: --test-share is for the layout folder: ucf101 has official parts"),
            (("folder", tmp_path / "r", "--seed", "1"), 2,
             "error: --seed draws a test part: give --test-share too, e.g. --test-share 0.2")):
        status, stdout, stderr = command(*args)
        assert (status, stdout) == (code, "") and last_line(stderr).endswith(message), stderr
    with pytest.raises(ValueError, match="layout ucf101 takes no --test-share"):
        scan.scan(tmp_path / "r", layout="ucf101", test_share=0.2)


def test_a_drawn_part_is_trained_and_retrieved(tree, tmp_path):
    for path in tree.glob("*/*/*.mp4"):
        split, label, name = path.relative_to(tree).parts
        link = tmp_path / "flat" / label / f"{split}{name}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    data, out = tmp_path / "m.csv", tmp_path / "run"
    rows = scan.scan(tmp_path / "flat", test_share=0.65, out=data)
    tested = sum(row["split"] == "test" for row in rows)
    assert len(rows) == 34 and 20 <= tested <= 30
    assert run_here(pretrain, "--data", data, "--out", out, *SMALL, "--epochs", "1") == 0
    assert run_here(retrieval, "--data", data, "--checkpoint", out / "checkpoint.pt") == 0
    assert log_of(out)[0]["clips"] == 34 - tested
    assert json.loads((out / "retrieval.json").read_text())["pool"] == tested


# ---- names of files

@pytest.mark.parametrize("name, stem", [
    ("a_000001_000011.mp4", "a_000001_000011"), ("a_000001_000011.MP4.webm", "a_000001_000011"),
    ("a.mp4.mkv.Ts", "a"), ("Dr. No (1.5)_[x]_clap.avi", "Dr. No (1.5)_[x]_clap"),
    ("a.txt.mp4", "a.txt"), ("mp4.mp4", "mp4"), (".mp4", ".mp4"), ("a.mp4.part", "a.mp4.part"),
    ("folder.mp4/a.b", "a.b")])
def test_a_stem_has_no_suffix_of_a_video(name, stem):
    assert layouts.stem(Path(name)) == stem


def test_all_suffixes_are_found(put, tmp_path):
    names = ["a", "b.m4v", "c.3GP", "d.ts", "e.mpeg", "f.flv", "g.wmv", "h.vob", "i.mp4", "j.avi",
             "k.mkv", "l.webm", "m.mpg", "n.MOV", "o.mts", "p.m2ts", "q.M2T", "r.ogv", "s.3g2",
             "t.f4v", "u.asf", "v.divx", "w.txt"]
    for name in names:
        put(f"r/a/{name}")
    paths, notes = layouts.find_videos(tmp_path / "r")
    assert [path.name for path in paths] == names[1:-1]
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
    _, notes = layouts.find_videos(tmp_path / "r")
    assert notes == [f"11 other files passed over ({kinds})"]
    (tmp_path / "r/a/1.mp4").unlink()
    with pytest.raises(ValueError, match=r"no video in .*expected .*\.webm.*; 11 other files"):
        scan.scan(tmp_path / "r")
    put("clean/a/1.mp4")
    put("clean/.hidden")
    assert scan.survey("folder", tmp_path / "clean")[1] == []


BOWLING = {"l.csv": K400 + "bowling,--07WQ2iBlw,1,11,train\n"}
# layout: (the stem of a clip, the lists that have it)
LISTS = {
    "kinetics400": ("--07WQ2iBlw_000001_000011", BOWLING),
    "kinetics-sounds": ("--07WQ2iBlw_000001_000011", BOWLING),
    "vggsound": ("--07WQ2iBlw_000001", {"vggsound.csv": '--07WQ2iBlw,1,"a, b",train\n'}),
    "ucf101": ("v_A_g01_c01", {"classInd.txt": "1 A\n", "testlist01.txt": "",
                               "trainlist01.txt": "A/v_A_g01_c01.avi 1\n"}),
    "hmdb51": ("Dr. No [1.5]_clap", {"clap_test_split1.txt": "Dr. No [1.5]_clap.avi 1 \n"})}


@pytest.mark.parametrize("layout", LISTS)
@pytest.mark.parametrize("mark", ("", "\ufeff"))
def test_double_suffixes_and_lists_with_a_byte_order_mark(put, tmp_path, layout, mark):
    """Each layout takes name.mp4.mkv, uses a clip once, counts other files and reads lists that
    begin with a byte order mark."""
    name, lists = LISTS[layout]
    put(f"r/x/{name}.mp4.MKV", "mkv")
    put(f"r/x/{name}.mp4.webm", "mkv")
    put("r/notes.txt")
    for file, content in lists.items():
        (tmp_path / file).write_text(mark + content, encoding="utf-8")
    rows, notes = scan.survey(layout, tmp_path / "r", annotations=tmp_path)
    assert [(row["split"], row["reason"]) for row in rows] == [("train", ""), ("train", scan.COPY)]
    assert notes[0] == "0 official entries not on disk"
    assert notes[-1] == "1 other files passed over (1 .txt)"


def test_kinetics_named_by_the_id_alone(put, tmp_path):
    put("k/once_-AAAA_.mp4")
    put("k/twiceAAAAAA.mp4.mkv")
    put("k/twiceAAAAAA_000005_000015.mp4")
    put("k/bothAAAAAAA.mp4")
    put("k/bothAAAAAAA_000001_000011.mp4")
    put("k/othersAAAAA.mp4")
    write_text(tmp_path / "l/train.csv", K400 + "bowling,once_-AAAA_,1,11,train\n"
               "bowling,twiceAAAAAA,5,15,train\nbowling,bothAAAAAAA,1,11,train\n"
               "yoga,othersAAAAA,1,11,train\n")
    # The second line repeats an entry of train.csv: it is one clip.
    write_text(tmp_path / "l/val.csv", K400 + "bowling,twiceAAAAAA,25,35,val\n"
               "bowling,bothAAAAAAA,1,11,train\n")
    used = ("bowling", "train", "")
    expected = {
        "once_-AAAA_.mp4": used, "twiceAAAAAA_000005_000015.mp4": used, "bothAAAAAAA.mp4": used,
        "bothAAAAAAA_000001_000011.mp4": ("bowling", "train", scan.COPY),
        "twiceAAAAAA.mp4.mkv":
            ("", "", "its name is an id with several clips in the official list")}
    rows, notes = scan.survey("kinetics400", tmp_path / "k", annotations=tmp_path / "l")
    assert by_name(rows) == expected | {"othersAAAAA.mp4": ("yoga", "train", "")}
    assert notes == ["1 official entries not on disk (1 of val)"]
    rows, notes = scan.survey("kinetics-sounds", tmp_path / "k", annotations=tmp_path / "l")
    assert by_name(rows) == expected and notes == [
        "1 official entries not on disk (1 of val)", "1 files of other classes passed over"]


# ---- lists with errors

YOGA = K400 + "yoga,abcdefghijk,1,11,train\n"


@pytest.mark.parametrize("layout, name, content, message", [
    ("kinetics400", "train.csv", YOGA + "\nyoga,abcdefghijk,x,11,train\n", "csv:4: "),
    ("kinetics400", "train.csv", K400 + "yoga,abcdefghijk,1,11\n",
     "train.csv:2: expected label,youtube_id"),
    ("kinetics400", "train.csv", K400 + "yoga,abcdefghijk,1,11,holdout\n", "train.csv:2: "),
    ("kinetics400", "train.csv", K400 + "yoga,abcdefghijk,1,11,train,1\n", "train.csv:2: "),
    ("kinetics400", "train.csv", "abcdefghijk,1,11\n",
     "train.csv:1: expected the columns .* got 'abcdefghijk,1,11'"),
    ("vggsound", "vggsound.csv", 'abcdefghijk,1,"a, b",test\nabcdefghijk_000001.mp4,a\n',
     "vggsound.csv:2: "),
    ("vggsound", "vggsound.csv", 'abcdefghijk,1,"a, b,test\n', "vggsound.csv:1: "),
    ("vggsound", "vggsound.csv", 'abcdefghijk,1,"a" b,test\n', "vggsound.csv:1: "),
    ("ucf101", "classInd.txt", "1 A\nB 2\n", "classInd.txt:2: expected '1 Class', got 'B 2'"),
    ("ucf101", "trainlist01.txt", "A/v_A_g01_c01.avi 1\nA/v_A_g02_c01.avi 2\n",
     "trainlist01.txt:2: .* got .*avi 2'"),
    ("ucf101", "testlist01.txt", "B/v_B_g01_c01.avi\n", "testlist01.txt:1: "),
    ("hmdb51", "clap_test_split1.txt", "x.avi 1 \nx.avi 3 \n",
     "clap_test_split1.txt:2: .* got 'x.avi 3'"),
    ("hmdb51", "clap_test_split1.txt", "\x00\xff\n", "clap_test_split1.txt:1: ")])
def test_an_error_names_the_line(put, tmp_path, layout, name, content, message):
    put("r/a/a.mp4")
    if layout == "ucf101":
        for list_name, line in (("classInd", "1 A"), ("trainlist01", "A/v_A_g1.avi 1"),
                                ("testlist01", "A/v_A_g2.avi")):
            write_text(tmp_path / f"l/{list_name}.txt", line)
    write_text(tmp_path / "l" / name, content)
    with pytest.raises(ValueError, match=message):
        scan.scan(tmp_path / "r", layout=layout, annotations=tmp_path / "l")


@pytest.mark.parametrize("layout", ("kinetics400", "vggsound", "ucf101", "hmdb51"))
def test_missing_lists(put, tmp_path, layout):
    put("r/a/a.mp4")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="needs --annotations: give the "):
        scan.scan(tmp_path / "r", layout=layout)
    for name, problem in (("gone", "does not exist"), ("empty", "has no "),
                          ("r/a/a.mp4", "is of another kind")):
        with pytest.raises(ValueError, match=f"--annotations .*{name} {problem}.*: give the "):
            scan.scan(tmp_path / "r", layout=layout, annotations=tmp_path / name)


# ---- the command

def command(*args):
    """Run prepare.manifest. Returns (exit status, stdout, stderr)."""
    done = subprocess.run([sys.executable, "-m", "prepare.manifest", *map(str, args)], cwd=ROOT,
                          text=True, capture_output=True)
    return done.returncode, done.stdout, done.stderr


def last_line(text):
    return (text.splitlines() or [""])[-1]


@pytest.mark.parametrize("layout, form", [
    ("kinetics400", "'--07WQ2iBlw_000001_000011.mp4' (id_start_end)"),
    ("kinetics-sounds", "'--07WQ2iBlw_000001_000011.mp4' (id_start_end)"),
    ("vggsound", "'--07WQ2iBlw_000001.mp4' (id_start)"), ("ucf101", "'v_A_g01_c01.avi'"),
    ("hmdb51", "'Dr. No [1.5]_clap.avi'")])
def test_an_error_says_which_names_a_layout_expects(put, tmp_path, layout, form):
    put("r/b.mp4")
    put("r/a'.mp4")
    for file, content in LISTS[layout][1].items():
        write_text(tmp_path / "lists" / file, content)
    out = tmp_path / "m.csv"
    status, stdout, stderr = command(layout, tmp_path / "r", "--annotations", tmp_path / "lists",
                                     "--out", out)
    others = "; 0 files of other classes passed over" * (layout == "kinetics-sounds")
    assert (status, stdout) == (1, "")
    assert last_line(stderr) == (
        f"error: {out}: 2 files, 0 usable, 2 left out: 2 not in the official list; "
        f"{layout} expects names like {form}, found e.g. \"a'.mp4\"{others}")
    with open(out, newline="") as file:
        assert [row["reason"] for row in csv.DictReader(file)] == [layouts.UNLISTED] * 2


def test_files_with_right_names_that_cannot_be_used(put, tmp_path):
    """The summary has the reasons alone. The functions do not raise; the command ends with 1."""
    put("r/--07WQ2iBlw_000001_000011.mp4").write_bytes(b"")
    put("r/unlistedAAA.mp4")
    listed, out = write_text(tmp_path / "l.csv", BOWLING["l.csv"]), tmp_path / "m.csv"
    rows, notes = scan.survey("kinetics400", tmp_path / "r", annotations=listed)
    assert [row["reason"] for row in rows] == ["empty file", "not in the official list"]
    assert notes == ["0 official entries not on disk"]
    status, stdout, stderr = command("kinetics400", tmp_path / "r", "--annotations", listed,
                                     "--out", out)
    assert (status, stdout) == (1, "")
    assert last_line(stderr) == (
        f"error: {out}: 2 files, 0 usable, 2 left out: 1 empty file, 1 not in the official "
        "list; 0 official entries not on disk")
    (tmp_path / "r/unlistedAAA.mp4").unlink()
    status, stdout, stderr = command("folder", tmp_path / "r", "--out", out)
    assert (status, stdout) == (1, "")
    assert last_line(stderr) == f"error: {out}: 1 files, 0 usable, 1 left out: 1 empty file"


def test_command(ucf, tmp_path):
    """The command prints a summary. A wrong call gives exit status 1 and one sentence."""
    out = tmp_path / "new/m.csv"
    status, stdout, _ = command("ucf101", ucf, "--annotations", tmp_path / "split", "--fold", 2,
                                "--out", out)
    assert status == 0
    assert stdout == (f"{out}: 5 files, 4 usable, 1 left out: 1 not in the official list; "
                      "1 official entries not on disk (1 of test)\n")
    with open(out) as file:
        assert next(csv.reader(file)) == list(scan.COLUMNS)
    rows, left_out = read_manifest(out, "test")
    assert [(Path(row.path).name, row.label, row.has_audio) for row in rows] == [
        ("v_YoYo_g02_c01.avi", "YoYo", True)]
    assert os.listdir(out.parent) == ["m.csv"]
    for args, message in (
            (("ucf101", ucf, "--out", out), "error: this layout needs --annotations"),
            (("folder", ucf, "--fold", 2, "--out", out), "error: layout folder takes no --fold"),
            (("folder", ucf, "--out", tmp_path / "split/classInd.txt"),
             "is no manifest and would be")):
        status, stdout, stderr = command(*args)
        assert status == 1 and stdout == "" and message in stderr and stderr.count("\n") == 1
