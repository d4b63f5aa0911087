"""prepare/layouts.py on small copies of every layout, with lists in their official formats, and the
command prepare/manifest.py on them."""

import os
from pathlib import Path

import pytest

from conftest import by_name, command, write_text
from prepare import manifest, scan
from prepare.layouts import LAYOUTS

K400 = "label,youtube_id,time_start,time_end,split\n"
UNLISTED = "", "", "not in the official list"
NO_LABEL = "no label in the official list"
ABSENT = "official entries not on disk"
OTHERS = "files of other classes passed over"
PASSED_OVER = None                      # in place of a row


# ---- layouts

# Ids have _ and -. validate.csv repeats an entry of train.csv: it is one clip. A list of the test
# part came without labels; then a label in another list counts.
KINETICS_LISTS = {
    "train.csv": K400 + "playing guitar,-a_b-c_d--1,3,13,train\n"
                 "strumming guitar,strummingAA,0,10,train\nplaying guitar,twoFilesAAA,1,11,train\n"
                 "bowling,goneAAAAAAA,5,15,train\nyoga,goneAAAAAAB,5,15,train\n"
                 "bowling,once_-AAAA_,1,11,train\nbowling,twiceAAAAAA,5,15,train\n"
                 "bowling,bothAAAAAAA,1,11,train\n",
    "validate.csv": K400 + "surfing water,surfing__-A,120,130,validate\n"
                    "bowling,twiceAAAAAA,25,35,val\nbowling,bothAAAAAAA,1,11,train\n",
    "test.csv": K400.replace("split", "split,is_cc") + '"tap dancing",flat-tap01,44,54,test,0\n',
    "no_labels.csv": K400.removeprefix("label,") + "bothAAAAAAA,1,11,test\n"
                     "testAAAAAAA,1,11,test\ngoneAAAAAAC,1,11,test\n"}
SURFING = "val/surfing water/surfing__-A_000120_000130.mp4"
STRUMMING = "train/Strumming Guitar/strummingAA_000000_000010.mp4"
KINETICS = {
    "train/playing_guitar/-a_b-c_d--1_000003_000013.mp4": ("playing guitar", "train", ""),
    STRUMMING: ("strumming guitar", "train", ""),
    SURFING: ("surfing water", "val", ""),
    "flat-tap01_000044_000054.mp4": ("tap dancing", "test", ""),
    "0/twoFilesAAA_000001_000011.mp4": ("playing guitar", "train", "empty file"),
    "playing_guitar/twoFilesAAA_000001_000011.mp4": ("playing guitar", "train", scan.COPY),
    "replacement/for_k400/twoFilesAAA_000001_000011.mp4": ("playing guitar", "train", ""),
    "test/singing/unlistedAAA_000001_000011.mp4": UNLISTED,
    "once_-AAAA_.mp4": ("bowling", "train", ""),
    "twiceAAAAAA_000005_000015.mp4": ("bowling", "train", ""),
    "bothAAAAAAA.mp4": ("bowling", "train", ""),
    "bothAAAAAAA_000001_000011.mp4": ("bowling", "train", scan.COPY),
    # It is too short for an uncut film: it is one of the two clips.
    "twiceAAAAAA.mp4.mkv": ("bowling", "val",
                            "its name is an id with several clips in the official list"),
    "testAAAAAAA_000001_000011.mp4": ("", "test", NO_LABEL)}
# Without lists the class folders count.
FOLDERS = {"TRAIN/playing_guitar/1.mp4": ("playing guitar", "train", ""),
           "validation/surfing water/2.mp4": PASSED_OVER, "3.mp4": PASSED_OVER,
           "x/Test/Singing/4.mp4": ("singing", "test", ""),
           "more/Strumming Guitar/5.mp4": ("strumming guitar", "", "")}
# Files are named by s or by ms.
VGG_LISTS = {"vggsound.csv": '--0PQM4-hqg,30,"waterfall burbling",train\n'
                             'a_b-c_100_1,0,"bird chirping, tweeting",test\n'
                             '-1pRmoJIGQc,10,"bird chirping, tweeting",test\n'
                             'bothAAAAAAA,7,waves,train\ngoneAAAAAAA,1,waves,test\n'}
VGG_EVALUATION = {"train.csv": "--0PQM4-hqg_000030.mp4,waterfall burbling\n"
                               "bothAAAAAAA_000007.mp4,waves\n",
                  "test.csv": 'a_b-c_100_1_000000.mp4,"bird chirping, tweeting"\n'
                              '-1pRmoJIGQc_000010.mp4,"bird chirping, tweeting"\n'
                              'goneAAAAAAA_000001.mp4,waves\n',
                  "stat.csv": "waterfall burbling,1050,nature\n"}
VGG = {"--0PQM4-hqg_000030.mp4": ("waterfall burbling", "train", ""),
       "more/-1pRmoJIGQc_000010.mp4": ("bird chirping, tweeting", "test", ""),
       "a_b-c_100_1_0_10000.mp4.webm": ("bird chirping, tweeting", "test", ""),
       "bothAAAAAAA_000007.mp4": ("waves", "train", ""),
       "bothAAAAAAA_7000_17000.mp4": ("waves", "train", scan.COPY),
       "-1pRmoJIGQc_11000_21000.mp4": UNLISTED, "unlistedAAA_000030.mp4": UNLISTED}
UCF_LISTS = {
    "trainlist01.txt": "HandstandPushups/v_HandStandPushups_g01_c01.avi 37\r\n"
                       "YoYo/v_YoYo_g02_c01.avi 101\r\n",
    "testlist01.txt": "YoYo/v_YoYo_g01_c01.avi\r\n",
    "trainlist02.txt": "HandstandPushups/v_HandStandPushups_g01_c01.avi 37\r\n"
                       "YoYo/v_YoYo_g01_c01.avi 101\r\n",
    "testlist02.txt": "YoYo/v_YoYo_g02_c01.avi\r\nYoYo/v_YoYo_g25_c09.avi\r\n"}
UCF = {"v_HandStandPushups_g01_c01.mp4": ("HandstandPushups", "train", ""),
       "YoYo/v_YoYo_g01_c01.avi": ("YoYo", "train", ""),
       "YoYo/v_YoYo_g01_c01.mp4": ("YoYo", "train", scan.COPY),
       "YoYo/v_YoYo_g02_c01.avi": ("YoYo", "test", ""), "v_Other_g01_c01.avi": UNLISTED}
HMDB_LISTS = {
    "clap_test_split1.txt": "#20_Rhythm_clap_u_nm_np1_fr_goo_0.avi 2 \n",
    "clap_test_split3.txt": "#20_Rhythm_clap_u_nm_np1_fr_goo_0.avi 1 \n"
                            "Dr. No.txt (1.5) [b]+c 50%_d_clap.avi 2 \n"
                            "(Rad)Schlag_die_Bank!_clap_f_cm_np1_le_med_0.avi 0 \n",
    "brush_hair_test_split3.txt": "x;'&_1.avi 2 \ngone.avi 1 \ngone_unused.avi 0 \n"}
HMDB = {"clap/#20_Rhythm_clap_u_nm_np1_fr_goo_0.avi": ("clap", "train", ""),
        "clap/Dr. No.txt (1.5) [b]+c 50%_d_clap.mp4": ("clap", "test", ""),
        "(Rad)Schlag_die_Bank!_clap_f_cm_np1_le_med_0.avi": ("clap", "", "unused in fold 3"),
        "brush_hair/x;'&_1.avi": ("brush_hair", "test", ""), "brush_hair/extra.avi": UNLISTED}


def lay_out(put, tmp_path, files, lists):
    """Write a copy of a data set with these files, and its lists. Returns the two folders."""
    for name, text in lists.items():
        write_text(tmp_path / "lists" / name, "\ufeff" + text)     # as Excel writes them
    for name, row in files.items():
        path = put(f"root/{name}")
        if row and row[2] == "empty file":
            path.write_bytes(b"")
    return tmp_path / "root", tmp_path / "lists"


@pytest.mark.parametrize("layout, options, lists, files, notes", [
    ("kinetics400", {}, KINETICS_LISTS, KINETICS,
     [f"2 {ABSENT}, e.g. 'goneAAAAAAA_000005_000015'"]),
    ("kinetics-sounds", {}, KINETICS_LISTS, KINETICS | {SURFING: PASSED_OVER},
     [f"1 {ABSENT}, e.g. 'goneAAAAAAA_000005_000015'", f"1 {OTHERS}"]),
    ("kinetics-sounds", {"classes": 31}, {},
     FOLDERS | {"more/Strumming Guitar/5.mp4": PASSED_OVER}, [f"3 {OTHERS}"]),
    ("vggsound", {}, VGG_LISTS, VGG, [f"1 {ABSENT}, e.g. 'goneAAAAAAA_000001'"]),
    ("vggsound", {}, VGG_EVALUATION, VGG, [f"1 {ABSENT}, e.g. 'goneAAAAAAA_000001'"]),
    ("ucf101", {"fold": 2}, UCF_LISTS, UCF, [f"1 {ABSENT}, e.g. 'v_YoYo_g25_c09'"]),
    ("hmdb51", {"fold": 3}, HMDB_LISTS, HMDB, [f"1 {ABSENT}, e.g. 'gone'"])])
def test_layout(put, tmp_path, layout, options, lists, files, notes):
    root, folder = lay_out(put, tmp_path, files, lists)
    annotations = {"annotations": folder} if lists else {}
    rows, found = scan.survey(layout, root, **annotations, **options)
    assert {row["path"].removeprefix(f"{root}/"): (row["label"], row["split"], row["reason"])
            for row in rows} == {name: row for name, row in files.items() if row is not PASSED_OVER}
    paths = [Path(row["path"]) for row in rows]
    assert paths == sorted(paths) and found == notes


SUFFIXES = ("mp4 m4v 3GP ts mpeg flv wmv vob avi mkv webm mpg MOV mts m2ts M2T ogv 3g2 f4v asf "
            "divx").split()


@pytest.mark.parametrize("files, notes", [
    ({"a/deep/2.MKV": ("a/deep", ""), "3.avi": ("root", "")}
     | {f"a/1.{suffix}": ("a", "") for suffix in SUFFIXES}, []),
    ({"bus/1.mp4": ("bus", ""), "Train/a/3.mp4": ("Train/a", "")},
     ["Train counted among the classes, because bus beside it is no part"]),
    # Only the first folder can name a split, and a folder without videos is no class.
    ({f"{folder}/a/test/1.mp4": ("a/test", split) for split, folders in {
        "train": "TRAIN Training", "val": "val valid Validate Validation", "test": "test Testing"
      }.items() for folder in folders.split()} | {"stray.mp4": ("root", "")}
     | dict.fromkeys(["lists/train.csv", ".Trash-1000/files/old.mp4", "val/._2.mp4"], PASSED_OVER),
     ["3 other or hidden files and folders passed over"])])
def test_folder(tmp_path, files, notes):
    """Hidden files do not count, but a root below a hidden folder does."""
    root = tmp_path / ".cache/root"
    for name in files:
        write_text(root / name, "")
    entries, found = LAYOUTS["folder"](root)
    assert {str(path.relative_to(root)): (entry.label, entry.split) for path, entry in entries} == {
        name: row for name, row in files.items() if row is not PASSED_OVER}
    assert found == notes


def test_links_are_followed(tmp_path):
    for name in ("f/a/1.mp4", "elsewhere/4.mp4"):
        write_text(tmp_path / name, "")
    (tmp_path / "f/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "f/a/circle").symlink_to(tmp_path / "f")
    assert [(path.name, entry.label) for path, entry in LAYOUTS["folder"](tmp_path / "f")[0]] == [
        ("1.mp4", "a"), ("4.mp4", "linked")]


def test_a_drawn_part(tmp_path):
    """It is the same with every version, when other files come or go, and when the folder moves."""
    def tests(root, **options):
        entries, _ = LAYOUTS["folder"](tmp_path / root, test_share=0.2, **options)
        assert {entry.split for _, entry in entries} == {"train", "test"}
        return [int(path.stem) for path, entry in entries
                if entry.split == "test" and entry.label == "a"]

    for n in range(20):
        write_text(tmp_path / f"r/a/{n}.mp4", "")
    assert sorted(tests("r")) == [3, 9, 11, 13, 17, 18, 19] != sorted(tests("r", seed=1))
    for n in range(0, 18, 3):
        (tmp_path / f"r/a/{n}.mp4").unlink()
        write_text(tmp_path / f"r/0/{n}.mp4", "")
    (tmp_path / "r").rename(tmp_path / "moved")
    assert sorted(tests("moved")) == [11, 13, 17, 18, 19]


# ---- lists with errors, and the command

@pytest.mark.parametrize("layout, name, content, message", [
    ("kinetics400", "train.csv", K400 + "yoga,abcdefghijk,1,11,val\n\nyoga,a,x,11,val\n",
     "train.csv:4: expected the columns youtube_id,time_start,.* got 'yoga,a,x,11"),
    ("kinetics400", "train.csv", K400 + "yoga,abcdefghijk,1,11,holdout\n", "train.csv:2: "),
    ("kinetics400", "train.csv", "abcdefghijk,1,11\n", "train.csv:1: "),
    ("vggsound", "vggsound.csv", 'abcdefghijk,1,"a, b",test\nabcdefghijk_000001.mp4,a\n',
     'vggsound.csv:2: expected id,start,"label",split or id_start.mp4,label, got'),
    ("vggsound", "vggsound.csv", 'abcdefghijk,1,"a, b,test\n', "vggsound.csv:1: "),
    ("hmdb51", "clap_test_split1.txt", "x.avi 1 \nx.avi 3 \n",
     "clap_test_split1.txt:2: expected 'name.avi 0', 1 or 2, got 'x.avi 3'")])
def test_lists_with_errors(tmp_path, layout, name, content, message):
    write_text(tmp_path / "r/a.mp4", "")
    write_text(tmp_path / "l" / name, content)
    with pytest.raises(ValueError, match=message):
        scan.scan(tmp_path / "r", layout=layout, annotations=tmp_path / "l")


@pytest.mark.parametrize("args, message", [
    (("folder", "own", "--test-share", "0.2"),
     "{0}/own has parts of its own (test, train): leave out --test-share"),
    (("folder", "all"), "{0}/all has the parts train, val, and beside them replacement: move that "
                        "away, or make a manifest of an official list"),
    (("folder", "own/test", "--test-share", "20"),
     "--test-share 20.0: give a share above 0 and below 1, e.g. 0.2"),
    (("folder", "own", "--seed", "1"), "--seed draws a test part: give --test-share too"),
    (("kinetics-sounds", "own", "--seed", "2"), "layout kinetics-sounds takes no --seed"),
    (("hmdb51", "own"), "layout hmdb51 needs --annotations: docs/data.md says which lists"),
    (("kinetics400", "own", "--annotations", "notes.txt"), "--annotations notes.txt has no *.csv: "
                                                           "give the official lists that"),
    (("kinetics-sounds", "own"), "no video of the 32 classes in own: name folders by them or give"),
    (("folder", "own", "--out", "notes.txt"), "notes.txt is no manifest of this version, it ")])
def test_wrong_commands(tmp_path, monkeypatch, args, message):
    """A wrong call ends with one sentence."""
    for name in ("own/train/a/1.mp4", "own/test/a/2.mp4", "all/train/1.mp4", "all/val/2.mp4",
                 "all/replacement/3.mp4"):
        write_text(tmp_path / name, "")
    write_text(tmp_path / "notes.txt", "a note\nand another\n")
    monkeypatch.chdir(tmp_path)
    status, stdout, stderr = command(manifest, *args)
    assert (status, stdout, stderr.count("\n")) == (1, "", 1)
    assert stderr.startswith(f"error: {message.format(tmp_path)}")
    assert not Path("manifest.csv").exists()


@pytest.mark.parametrize("words, lists, summary", [
    ("ucf101 root --annotations lists --fold 2", UCF_LISTS,
     "5 files, 3 usable, 2 left out: 1 another copy of a clip that is used, 1 not in the official "
     f"list; 1 {ABSENT}, e.g. 'v_YoYo_g25_c09'"),
    ("folder root --test-share 0.5", {},
     "5 files, 5 usable; 3 files in train and 2 in test, drawn with seed 0"),
    ("kinetics400 root --annotations lists/l.csv",
     {"l.csv": K400 + "bowling,--07WQ2iBlw,1,11,train\n"},
     "5 files, 0 usable, 5 left out: 5 not in the official list; "
     f"1 {ABSENT}, e.g. '--07WQ2iBlw_000001_000011'")])
def test_command(put, tmp_path, monkeypatch, files_read, words, lists, summary):
    """The command prints a summary, or ends with it as an error if no file can be used. Another
    fold changes the labels without reading. A single csv may be named without its folder."""
    lay_out(put, tmp_path, UCF, lists)
    monkeypatch.chdir(tmp_path)
    if "--fold" in words:
        command(manifest, *words.replace("2", "1").split(), "--out", "new/m.csv")
    status, stdout, stderr = command(manifest, *words.split(), "--out", "new/m.csv")
    assert os.listdir("new") == ["m.csv"] and len(files_read) in (0, 4, 5)
    rows = scan.read_table("new/m.csv")
    assert rows[0].keys() == set(scan.COLUMNS) and len(rows) == 5
    if status:
        assert stderr.splitlines()[-1] == f"error: new/m.csv: {summary}"
        assert stderr.count("left out: /") == 5 and stdout == ""
    else:
        assert stdout == f"new/m.csv: {summary}\n"
    if "--fold" in words:
        assert by_name(rows)["v_YoYo_g02_c01.avi"] == ("YoYo", "test", "")
