"""prepare/layouts.py on small copies of every layout, with lists in their official formats, and
the command prepare/manifest.py."""

import os
from pathlib import Path

import pytest

from conftest import by_name, command, write_text
from prepare import manifest, scan
from support.rows import COLUMNS, read_rows

K400 = "label,youtube_id,time_start,time_end,split\n"
UNLISTED = "", "", "not in the official list"
ABSENT = "official entries not on disk"
PASSED_OVER = None      # in place of a row

# ---- layouts

SUFFIXES = ("mp4 m4v 3GP ts mpeg flv wmv vob avi mkv webm mpg MOV mts m2ts M2T ogv 3g2 f4v asf "
            "divx").split()
# Only the first folder can name a split, and a folder without videos is no class.
PARTS = {f"{folder}/a/test/1.mp4": ("a/test", split, "") for folder, split in {
    "TRAIN": "train", "Training": "train", "val": "val", "valid": "val", "Validate": "val",
    "Validation": "val", "test": "test", "Testing": "test"}.items()}
PARTS |= {"stray.mp4": ("root", "", ""), "lists/train.csv": PASSED_OVER,
          ".Trash-1000/files/old.mp4": PASSED_OVER, "val/._2.mp4": PASSED_OVER}
# The draw is the same in every version and folder, whatever other files come or go.
DRAWN = {f"a/{n}.mp4": ("a", "test" if n in (3, 9, 11) else "train", "") for n in range(12)}
# Ids have _ and -. validate.csv repeats an entry of train.csv: it is one clip. A list of the test
# part came without labels; then a label in another list counts.
KINETICS_LISTS = {
    "train.csv": K400 + "strumming guitar,-a_b-c_d--1,3,13,train\nbowling,both,1,11,train\n"
        "playing guitar,two,1,11,train\nbowling,twice,5,15,train\n"
        "bowling,gone,5,15,train\nyoga,missing,5,15,train\n",
    "validate.csv": K400 + "surfing water,surfing__-A,120,130,validate\n"
        "bowling,twice,25,35,val\nbowling,both,1,11,train\n",
    "test.csv": K400.replace("split", "split,is_cc") + '"tap dancing",flat-tap01,44,54,test,0\n',
    "no_labels.csv": K400.removeprefix("label,")
        + "both,1,11,test\nunnamed,1,11,test\nnowhere,1,11,test\n"}
SURFING = "val/surfing water/surfing__-A_000120_000130.mp4"
KINETICS = {
    "train/guitar/-a_b-c_d--1_000003_000013.mp4": ("strumming guitar", "train", ""),
    SURFING: ("surfing water", "val", ""),
    "flat-tap01_000044_000054.mp4": ("tap dancing", "test", ""),
    "playing_guitar/two_000001_000011.mp4": ("playing guitar", "train", scan.COPY),
    "replacement/two_000001_000011.mp4": ("playing guitar", "train", ""),
    "test/singing/new_000001_000011.mp4": UNLISTED,
    "twice_000005_000015.mp4": ("bowling", "train", ""),
    "both.mp4": ("bowling", "train", ""),
    "both_000001_000011.mp4": ("bowling", "train", scan.COPY),
    # Too short for an uncut film: one of the two clips.
    "twice.mp4.mkv": (
        "bowling", "val", "its name is an id with several clips in the official list"),
    "unnamed_000001_000011.mp4": ("", "test", "no label in the official list")}
# Without lists the class folders count.
FOLDERS = {
    "TRAIN/playing_guitar/1.mp4": ("playing guitar", "train", ""),
    "x/Test/Singing/4.mp4": ("singing", "test", ""),
    "validation/surfing water/2.mp4": PASSED_OVER, "3.mp4": PASSED_OVER,
    "more/Strumming Guitar/5.mp4": PASSED_OVER}     # the last class of 32
# Files are named by s or by ms.
VGG_LISTS = {
    "vggsound.csv": '--0PQM4-hqg,30,"waterfall",train\nboth,7,waves,train\ngone,1,waves,test\n'
        'a_b-c_100_1,0,"birds, tweeting",test\n-1pRmoJIGQc,10,"birds, tweeting",test\n'}
VGG_EVALUATION = {
    "train.csv": "--0PQM4-hqg_000030.mp4,waterfall\nboth_000007.mp4,waves\n",
    "test.csv": 'a_b-c_100_1_000000.mp4,"birds, tweeting"\n'
        '-1pRmoJIGQc_000010.mp4,"birds, tweeting"\ngone_000001.mp4,waves\n',
    "stat.csv": "waterfall,1050,nature\n"}
VGG = {"--0PQM4-hqg_000030.mp4": ("waterfall", "train", ""),
       "more/-1pRmoJIGQc_000010.mp4": ("birds, tweeting", "test", ""),
       "a_b-c_100_1_0_10000.mp4.webm": ("birds, tweeting", "test", ""),
       "both_000007.mp4": ("waves", "train", ""),
       "both_7000_17000.mp4": ("waves", "train", scan.COPY),
       "-1pRmoJIGQc_11000_21000.mp4": UNLISTED}
UCF_LISTS = {
    "trainlist01.txt": "HandstandPushups/v_HandStandPushups_g01_c01.avi 37\r\n",
    "testlist01.txt": "YoYo/v_YoYo_g01_c01.avi\r\nYoYo/v_YoYo_g02_c01.avi\r\n",
    "trainlist02.txt": "HandstandPushups/v_HandStandPushups_g01_c01.avi 37\r\n"
        "YoYo/v_YoYo_g01_c01.avi 101\r\n",
    "testlist02.txt": "YoYo/v_YoYo_g02_c01.avi\r\nYoYo/v_YoYo_g25_c09.avi\r\n"}
UCF = {"v_HandStandPushups_g01_c01.mp4": ("HandstandPushups", "train", ""),
       "YoYo/v_YoYo_g01_c01.avi": ("YoYo", "train", ""),
       "YoYo/v_YoYo_g01_c01.mp4": ("YoYo", "train", scan.COPY),
       "YoYo/v_YoYo_g02_c01.avi": ("YoYo", "test", ""), "v_Other_g01_c01.avi": UNLISTED}
HMDB_LISTS = {
    "clap_test_split1.txt": "#20_Rhythm_clap_0.avi 2 \n",
    "clap_test_split3.txt": "#20_Rhythm_clap_0.avi 1 \n(Rad)Schlag!_clap_0.avi 0 \n"
        "No.txt (1.5) [b]+c 50%_clap.avi 2 \n",
    "brush_hair_test_split3.txt": "x;'&_1.avi 2 \ngone.avi 1 \ngone_unused.avi 0 \n"}
HMDB = {"clap/#20_Rhythm_clap_0.avi": ("clap", "train", ""),
        "clap/No.txt (1.5) [b]+c 50%_clap.mp4": ("clap", "test", ""),
        "(Rad)Schlag!_clap_0.avi": ("clap", "", "unused in fold 3"),
        "brush_hair/x;'&_1.avi": ("brush_hair", "test", ""), "brush_hair/extra.avi": UNLISTED}


def lay_out(put, tmp_path, files, lists):
    """Write a data set of these files, in a hidden folder, and its lists."""
    for name in files:
        put(f".cache/root/{name}")
    for name, text in lists.items():
        write_text(tmp_path / "lists" / name, "\ufeff" + text)     # as Excel writes them


@pytest.mark.parametrize("layout, options, lists, files, notes", [
    ("folder", {}, {}, {f"a/1.{suffix}": ("a", "", "") for suffix in SUFFIXES}
     | {"a/deep/2.MKV": ("a/deep", "", ""), "3.avi": ("root", "", "")}, []),
    ("folder", {}, {}, {"bus/1.mp4": ("bus", "", ""), "Train/a/3.mp4": ("Train/a", "", "")},
     ["Train counted among the classes, because bus beside it is no part"]),
    ("folder", {}, {}, PARTS, ["3 other or hidden files and folders passed over"]),
    ("folder", {"test_share": 0.2}, {}, DRAWN,
     ["9 files in train and 3 in test, drawn with seed 0"]),
    ("folder", {"test_share": 0.2, "seed": 1}, {},
     {"a/2.mp4": ("a", "test", ""), "a/3.mp4": ("a", "train", "")},
     ["1 files in train and 1 in test, drawn with seed 1"]),
    ("kinetics400", {}, KINETICS_LISTS, KINETICS,
     [f"2 {ABSENT}, e.g. 'gone_000005_000015'"]),
    ("kinetics-sounds", {}, KINETICS_LISTS, KINETICS | {SURFING: PASSED_OVER},
     [f"1 {ABSENT}, e.g. 'gone_000005_000015'", "1 files of other classes passed over"]),
    ("kinetics-sounds", {"classes": 31}, {}, FOLDERS, ["3 files of other classes passed over"]),
    ("vggsound", {}, VGG_LISTS, VGG, [f"1 {ABSENT}, e.g. 'gone_000001'"]),
    ("vggsound", {}, VGG_EVALUATION, VGG, [f"1 {ABSENT}, e.g. 'gone_000001'"]),
    ("ucf101", {"fold": 2}, UCF_LISTS, UCF, [f"1 {ABSENT}, e.g. 'v_YoYo_g25_c09'"]),
    ("hmdb51", {"fold": 3}, HMDB_LISTS, HMDB, [f"1 {ABSENT}, e.g. 'gone'"])])
def test_layout(put, tmp_path, layout, options, lists, files, notes):
    lay_out(put, tmp_path, files, lists)
    root = tmp_path / ".cache/root"
    annotations = {"annotations": tmp_path / "lists"} if lists else {}
    rows, found = scan.survey(layout, root, **annotations, **options)
    expected = {f"{root}/{name}": row for name, row in files.items() if row is not PASSED_OVER}
    assert expected == {
        row["path"]: (row["label"], row["split"], row["reason"]) for row in rows}
    paths = [Path(row["path"]) for row in rows]
    assert paths == sorted(paths) and found == notes


# ---- the command

@pytest.mark.parametrize("words, lists, message", [
    ("folder own --test-share 0.2", {},
     "{0}/own has parts of its own (test, train): leave out --test-share"),
    ("folder all", {}, "{0}/all has the parts train, val, and beside them replacement: move that "
     "away, or make a manifest of an official list"),
    ("folder own/test --test-share 20", {},
     "--test-share 20.0: give a share above 0 and below 1, e.g. 0.2"),
    ("folder own --seed 1", {}, "--seed draws a test part: give --test-share too"),
    ("kinetics-sounds own --seed 2", {}, "layout kinetics-sounds takes no --seed"),
    ("hmdb51 own", {}, "layout hmdb51 needs --annotations: docs/data.md says which lists"),
    ("kinetics400 own --annotations notes.txt", {"notes.txt": ""},
     "--annotations notes.txt has no *.csv: give the official lists that"),
    ("kinetics-sounds own", {}, "no video of the 32 classes in own: name folders by them or give"),
    ("folder own --out notes.txt", {"notes.txt": "a note\n"},
     "notes.txt is no manifest of this version, it lacks duration, end, "),
    ("kinetics400 own --annotations l",
     {"l/a.csv": K400 + "yoga,a,1,11,val\n\nyoga,a,x,11,val\n"},
     "l/a.csv:4: expected the columns youtube_id,time_start,time_end,split and label, got 'yoga,a"),
    ("vggsound own --annotations l",
     {"l/vggsound.csv": 'a,1,"b, c",test\na_000001.mp4,b\n'},
     'l/vggsound.csv:2: expected id,start,"label",split or id_start.mp4,label, got'),
    ("vggsound own --annotations l", {"l/vggsound.csv": 'a,1,"b,test\n'}, "l/vggsound.csv:1: "),
    ("hmdb51 own --annotations l", {"l/clap_test_split1.txt": "x.avi 1 \nx.avi 3 \n"},
     "l/clap_test_split1.txt:2: expected 'name.avi 0', 1 or 2, got 'x.avi 3'")])
def test_wrong_commands_and_lists(tmp_path, monkeypatch, words, lists, message):
    """They end with one sentence."""
    for name in ("own/train/1.mp4", "own/test/2.mp4", "all/train/1.mp4", "all/val/2.mp4",
                 "all/replacement/3.mp4", *lists):
        write_text(tmp_path / name, lists.get(name, ""))
    monkeypatch.chdir(tmp_path)
    status, stdout, stderr = command(manifest, *words.split())
    assert (status, stdout, stderr.count("\n")) == (1, "", 1)
    assert stderr.startswith(f"error: {message.format(tmp_path)}")
    assert not Path("manifest.csv").exists()


def test_command(put, tmp_path, monkeypatch, files_read):
    """It prints a summary, or ends with it as an error if no file can be used. Another fold
    changes the labels without reading. A single csv may be named without its folder."""
    lay_out(put, tmp_path, UCF, UCF_LISTS | {"l.csv": K400 + "bowling,--07,1,11,train\n"})
    monkeypatch.chdir(tmp_path)
    words = ".cache/root --out new/m.csv --annotations lists".split()
    command(manifest, "ucf101", *words, "--fold", 1)
    status, stdout, _ = command(manifest, "ucf101", *words, "--fold", 2)
    assert (status, stdout) == (
        0, "new/m.csv: 5 files, 3 usable, 2 left out: 1 another copy of a clip that is used, "
        f"1 not in the official list; 1 {ABSENT}, e.g. 'v_YoYo_g25_c09'\n")
    rows = read_rows("new/m.csv")
    assert rows[0].keys() == set(COLUMNS) and len(rows) == 5 and len(files_read) == 4
    assert by_name(rows)["v_YoYo_g01_c01.avi"] == ("YoYo", "train", "")
    words[-1] = "lists/l.csv"
    status, stdout, stderr = command(manifest, "kinetics400", *words)
    assert (status, stdout, stderr.count("left out: /")) == (1, "", 5)
    assert stderr.endswith(
        "\nerror: new/m.csv: 5 files, 0 usable, 5 left out: 5 not in the official list; "
        f"1 {ABSENT}, e.g. '--07_000001_000011'\n")
    assert os.listdir("new") == ["m.csv"]
    assert set(by_name(read_rows("new/m.csv")).values()) == {UNLISTED}
