"""prepare/layouts.py on small copies of every layout, with lists in their official formats, and the
command prepare/manifest.py on them."""

import csv
import os
from pathlib import Path

import pytest

from conftest import by_name, command, write_text
from data import read_manifest
from prepare import layouts, manifest, scan
from prepare.layouts import LAYOUTS

K400 = "label,youtube_id,time_start,time_end,split\n"
DRAWN = [3, 9, 11, 13, 17, 18, 19]      # of a/0.mp4 to a/19.mp4, with a share of 0.2 and seed 0
UNLISTED = "", "", "not in the official list"
EMPTY = "", "", "empty file"
NO_LABEL = "no label in the official list"
ABSENT = "official entries not on disk"
OTHERS = "files of other classes passed over"
PASSED_OVER = None                      # in place of a row


# ---- layouts

# Ids with _ and -, class folders and a file outside of them, and a replaced file. validate.csv
# repeats an entry of train.csv: it is one clip. A list of the test part came without labels; then a
# label in another list counts.
KINETICS_LISTS = {
    "train.csv": K400 + "playing guitar,-a_b-c_d--1,3,13,train\n"
                 "strumming guitar,strummingAA,0,10,train\nplaying guitar,replacedAAA,1,11,train\n"
                 "bowling,goneAAAAAAA,5,15,train\nyoga,goneAAAAAAB,5,15,train\n"
                 "bowling,once_-AAAA_,1,11,train\nbowling,twiceAAAAAA,5,15,train\n"
                 "bowling,bothAAAAAAA,1,11,train\n,emptyAAAAAA,1,11,train\n",
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
    "train/playing_guitar/replacedAAA_000001_000011.mp4": ("playing guitar", "train", "empty file"),
    "replacement/for_k400/replacedAAA_000001_000011.mp4": ("playing guitar", "train", ""),
    "test/singing/unlistedAAA_000001_000011.mp4": UNLISTED,
    "once_-AAAA_.mp4": ("bowling", "train", ""),
    "twiceAAAAAA_000005_000015.mp4": ("bowling", "train", ""),
    "bothAAAAAAA.mp4": ("bowling", "train", ""),
    "bothAAAAAAA_000001_000011.mp4": ("bowling", "train", scan.COPY),
    # It is too short for an uncut film: it is one of the two clips.
    "twiceAAAAAA.mp4.mkv": ("bowling", "val",
                            "its name is an id with several clips in the official list"),
    "emptyAAAAAA_000001_000011.mp4": ("", "train", NO_LABEL),
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
# Two files are outside of class folders. One is converted, and one is not in the lists.
UCF_LISTS = {"classInd.txt": "37 HandstandPushups\r\n101 YoYo\r\n"}
HMDB_NAMES = ("#20_Rhythm_clap_u_nm_np1_fr_goo_0", "Dr. No.txt (1.5) [b]+c 50%_d_clap",
              "(Rad)Schlag_die_Bank!_clap_f_cm_np1_le_med_0")
HMDB_LISTS = {}
for fold in (1, 2, 3):
    UCF_LISTS |= {
        f"trainlist0{fold}.txt": "HandstandPushups/v_HandStandPushups_g01_c01.avi 37\r\n" + "".join(
            f"YoYo/v_YoYo_g0{n}_c01.avi 101\r\n" for n in (1, 2, 3) if n != fold),
        f"testlist0{fold}.txt":
            f"YoYo/v_YoYo_g0{fold}_c01.avi\r\nYoYo/v_YoYo_g25_c09.avi\r\n"}
    HMDB_LISTS |= {
        f"clap_test_split{fold}.txt": "".join(
            f"{name}.avi {(fold + i) % 3} \n" for i, name in enumerate(HMDB_NAMES)),
        f"brush_hair_test_split{fold}.txt":
            "x;'&_1.avi 2 \ngone.avi 1 \ngone_unused.avi 0 \n"}


def ucf(fold):
    """The rows of a copy of UCF101 in a fold. A film and its conversion count once."""
    rows = {f"YoYo/v_YoYo_g0{n}_c01.avi": ("YoYo", "test" if n == fold else "train", "")
            for n in (1, 2, 3)}
    return rows | {"v_HandStandPushups_g01_c01.mp4": ("HandstandPushups", "train", ""),
                   "YoYo/v_YoYo_g01_c01.mp4": (*rows["YoYo/v_YoYo_g01_c01.avi"][:2], scan.COPY),
                   "v_Other_g01_c01.avi": UNLISTED}


def hmdb(fold):
    """The rows of a copy of HMDB51 in a fold."""
    use = [("clap", "", f"unused in fold {fold}"), ("clap", "train", ""), ("clap", "test", "")]
    rows = {f"clap/{name}.{suffix}": use[(fold + n) % 3]
            for n, (name, suffix) in enumerate(zip(HMDB_NAMES, ("avi", "avi", "mp4")))}
    return rows | {"brush_hair/x;'&_1.avi": ("brush_hair", "test", ""),
                   "brush_hair/extra.avi": UNLISTED}


def lay_out(put, tmp_path, files, lists):
    """Write a copy of a data set with these files, and its lists. Returns the two folders."""
    for name, text in lists.items():
        write_text(tmp_path / "lists" / name, text)
    for name, row in files.items():
        path = put(f"root/{name}")
        if row and row[2] == "empty file":
            path.write_bytes(b"")
    return tmp_path / "root", tmp_path / "lists"


@pytest.mark.parametrize("layout, options, lists, files, notes", [
    ("kinetics400", {}, KINETICS_LISTS, KINETICS, [f"2 {ABSENT} (2 of train)"]),
    ("kinetics-sounds", {}, KINETICS_LISTS, KINETICS | {SURFING: PASSED_OVER},
     [f"1 {ABSENT} (1 of train)", f"1 {OTHERS}"]),
    ("kinetics-sounds", {"classes": 31}, KINETICS_LISTS,
     KINETICS | {SURFING: PASSED_OVER, STRUMMING: PASSED_OVER},
     [f"1 {ABSENT} (1 of train)", f"2 {OTHERS}"]),
    ("kinetics-sounds", {}, {}, FOLDERS, [f"2 {OTHERS}"]),
    ("kinetics-sounds", {"classes": 31}, {},
     FOLDERS | {"more/Strumming Guitar/5.mp4": PASSED_OVER}, [f"3 {OTHERS}"]),
    ("vggsound", {}, VGG_LISTS, VGG, [f"1 {ABSENT} (1 of test)"]),
    ("vggsound", {}, VGG_EVALUATION, VGG, [f"1 {ABSENT} (1 of test)"]),
    *[("ucf101", {"fold": fold}, UCF_LISTS, ucf(fold), [f"1 {ABSENT} (1 of test)"])
      for fold in (1, 2, 3)],
    *[("hmdb51", {"fold": fold}, HMDB_LISTS, hmdb(fold), [f"1 {ABSENT} (1 of train)"])
      for fold in (1, 2, 3)]])
def test_layout(put, tmp_path, layout, options, lists, files, notes):
    root, folder = lay_out(put, tmp_path, files, lists)
    annotations = {"annotations": folder} if lists else {}
    rows, found = scan.survey(layout, root, **annotations, **options)
    assert {row["path"].removeprefix(f"{root}/"): (row["label"], row["split"], row["reason"])
            for row in rows} == {name: row for name, row in files.items() if row is not PASSED_OVER}
    paths = [Path(row["path"]) for row in rows]
    assert paths == sorted(paths) and found == notes


def test_one_of_two_good_copies_is_used(put, tmp_path):
    copies = [put(f"k/{folder}/abcdefghijk_000001_000011.mp4")
              for folder in ("a", "b", "replacement/for", "train")]
    listed = write_text(tmp_path / "train.csv", K400 + "yoga,abcdefghijk,1,11,train\n")
    for used in (copies[2], copies[0]):                    # without the used copy the next one is
        rows = scan.scan(tmp_path / "k", layout="kinetics400", annotations=listed,
                         out=tmp_path / "m.csv")
        assert [row["path"] for row in rows if row["reason"] != scan.COPY] == [str(used)]
        used.unlink()


def test_another_fold_changes_the_labels_without_reading(put, tmp_path, files_read):
    root, lists = lay_out(put, tmp_path, ucf(1), UCF_LISTS)
    for fold in (1, 2):
        rows = scan.scan(root, layout="ucf101", annotations=lists, fold=fold,
                         out=tmp_path / "m.csv")
        assert by_name(rows)[f"v_YoYo_g0{fold}_c01.avi"] == ("YoYo", "test", "")
    assert len(files_read) == 5


SUFFIXES = ("mp4 m4v 3GP ts mpeg flv wmv vob avi mkv webm mpg MOV mts m2ts M2T ogv 3g2 f4v asf "
            "divx").split()


@pytest.mark.parametrize("files, notes", [
    ({"a/1.mp4": ("a", ""), "a/deep/2.MKV": ("a/deep", ""), "3.avi": ("root", "")}, []),
    ({f"a/1.{suffix}": ("a", "") for suffix in SUFFIXES}, []),
    ({"bus/1.mp4": ("bus", ""), "Train/3.mp4": ("Train", "")},
     ["Train counted among the classes, because bus beside it is no part"]),
    ({"train/a/1.mp4": ("train/a", ""), "test/a/2.mp4": ("test/a", ""),
      "eval/a/3.mp4": ("eval/a", "")},
     ["test, train counted among the classes, because eval beside it is no part"]),
    # Only the first folder can name a split.
    ({"train/a/1.mp4": ("a", "train"), "val/b/test/2.mp4": ("b/test", "val"),
      "stray.mp4": ("root", "")}, []),
    ({f"{folder}/a/1.mp4": ("a", split) for split, folders in {
        "train": "TRAIN Training", "val": "valid Validate Validation", "test": "test Testing"
      }.items() for folder in folders.split()} | {"lists/train.csv": PASSED_OVER},
     ["1 other files passed over (1 .csv)"]),               # a folder without videos is no class
    ({"a/1.mp4": ("a", ""), "a/.ipynb_checkpoints/1-checkpoint.mp4": PASSED_OVER,
      ".Trash-1000/files/old.mp4": PASSED_OVER, "b/2.mp4": ("b", ""), "b/._2.mp4": PASSED_OVER,
      "b/.nothing": PASSED_OVER}, ["3 hidden folders and videos passed over"]),
    ({"a/1.mp4": ("a", "")} | dict.fromkeys(
        ["a/a.TXT", "a/b.txt", "c.zip", "d.zip", "e.zip", "f.part", "g.json", "h.csv", "i.jpg",
         "1.-j-k", "\udce9.\udce9"], PASSED_OVER),
     ["11 other files passed over (3 .zip, 2 .txt, 2 without suffix, 1 .csv, 1 .jpg, ...)"])])
def test_folder(tmp_path, files, notes):
    """Hidden files do not count, but a root below a hidden folder does."""
    root = tmp_path / ".cache/root"
    for name in files:
        write_text(root / name, "")
    entries, found = LAYOUTS["folder"](root)
    assert {str(path.relative_to(root)): (clip.label, clip.split) for path, clip in entries} == {
        name: row for name, row in files.items() if row is not PASSED_OVER}
    assert found == notes
    for path, _ in entries:
        path.unlink()
    with pytest.raises(ValueError) as error:
        scan.scan(root)
    start = f"no video in {root}: expected [train|val|test/]class/*.mp4 (or .3g2, "
    notes = [note for note in notes if "passed over" in note]
    assert str(error.value).startswith(start)
    assert str(error.value).endswith("; ".join([".wmv)", *notes]))


def test_links_are_followed(tmp_path):
    for name in ("f/a/1.mp4", "f/.trash/2.mp4", "elsewhere/4.mp4"):
        write_text(tmp_path / name, "")
    (tmp_path / "f/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "f/a/circle").symlink_to(tmp_path / "f")
    entries, notes = LAYOUTS["folder"](tmp_path / "f")
    assert [(path.name, clip.label) for path, clip in entries] == [
        ("1.mp4", "a"), ("4.mp4", "linked")]
    assert "1 hidden folders and videos passed over" in notes


# ---- a test part that is drawn

def test_a_drawn_part(tmp_path):
    """Two seeds draw independently: their test parts share share^2 of the files. A file keeps its
    part when other files come or go, and when the folder moves."""
    def parts(root, **options):
        entries, _ = LAYOUTS["folder"](tmp_path / root, test_share=0.4, **options)
        return {str(path.relative_to(tmp_path / root)): clip.split for path, clip in entries}

    names = [f"{label}/{n}.mp4" for label in "ab" for n in range(250)]
    for name in names:
        write_text(tmp_path / "r" / name, "")
    first, second = parts("r"), parts("r", seed=1)
    tests = [{name for name in names if part[name] == "test"} for part in (first, second)]
    for number, p in ((len(tests[0]), 0.4), (len(tests[1]), 0.4), (len(tests[0] & tests[1]), 0.16)):
        assert abs(number - 500 * p) < 4 * (500 * p * (1 - p)) ** 0.5, p
    for name in names[::3]:
        (tmp_path / "r" / name).unlink()
    for name in ("a/new.mp4", "0/0.mp4", "c/12.mp4"):
        write_text(tmp_path / "r" / name, "")
    again = parts("r")
    assert len(again) == 336 and set(again.values()) == {"train", "test"}
    assert all(part == first[name] for name, part in again.items() if name in first)
    (tmp_path / "r").rename(tmp_path / "moved")
    assert parts("moved") == again
    drawn = [k for k in range(20) if layouts.draw_split(Path(f"a/{k}.mp4"), 0.2, 0) == "test"]
    assert drawn == DRAWN                                 # the same with every version


# ---- lists

BOWLING = {"l.csv": K400 + "bowling,--07WQ2iBlw,1,11,train\n"}
# layout: (the stem of a clip, the lists that have it, the form of names as an error tells it)
LISTS = {
    "kinetics400": ("--07WQ2iBlw_000001_000011", BOWLING, "'{}.mp4' (id_start_end)"),
    "kinetics-sounds": ("--07WQ2iBlw_000001_000011", BOWLING, "'{}.mp4' (id_start_end)"),
    "vggsound": ("--07WQ2iBlw_000001", {"vggsound.csv": '--07WQ2iBlw,1,"a, b",train\n'},
                 "'{}.mp4' (id_start)"),
    "ucf101": ("v_A_g01_c01", {"classInd.txt": "1 A\n", "testlist01.txt": "",
                               "trainlist01.txt": "A/v_A_g01_c01.avi 1\n"}, "'{}.avi'"),
    "hmdb51": ("Dr. No [1.5]_clap", {"clap_test_split1.txt": "Dr. No [1.5]_clap.avi 1 \n"},
               "'{}.avi'")}


@pytest.mark.parametrize("layout", LISTS)
@pytest.mark.parametrize("mark", ("", "\ufeff"))
def test_double_suffixes_and_lists_with_a_byte_order_mark(tmp_path, layout, mark):
    """Each layout takes name.mp4.mkv for the same clip, counts other files and reads lists that
    begin with a byte order mark. A single csv may be named without its folder."""
    name, lists, _ = LISTS[layout]
    for file in (f"x/{name}.mp4.MKV", f"x/{name}.mp4.webm", "notes.txt"):
        write_text(tmp_path / "r" / file, "")
    for file, content in lists.items():
        (tmp_path / file).write_text(mark + content, encoding="utf-8")
    annotations = tmp_path / file if mark and file.endswith(".csv") else tmp_path
    ((_, clip), (_, other)), notes = LAYOUTS[layout](tmp_path / "r", annotations=annotations)
    assert clip == other and (clip.split, clip.reason) == ("train", "")
    assert notes[0] == "0 official entries not on disk"
    assert notes[-1] == "1 other files passed over (1 .txt)"


YOGA = K400 + "yoga,abcdefghijk,1,11,train\n"


@pytest.mark.parametrize("layout, name, content, message", [
    ("kinetics400", "train.csv", YOGA + "\nyoga,abcdefghijk,x,11,train\n", "csv:4: "),
    ("kinetics400", "train.csv", K400 + "yoga,abcdefghijk,1,11\n",
     "train.csv:2: expected label,youtube_id"),
    ("kinetics400", "train.csv", K400 + "yoga,abcdefghijk,1,11,holdout\n", "train.csv:2: "),
    ("kinetics400", "train.csv", K400 + "yoga,abcdefghijk,1,11,train,1\n", "train.csv:2: "),
    ("kinetics400", "train.csv", "abcdefghijk,1,11\n",
     "train.csv:1: expected the columns .* got 'abcdefghijk,1,11'"),
    ("kinetics400", "train.csv", "", "train.csv:1: expected the columns .* got ''"),
    ("vggsound", "vggsound.csv", 'abcdefghijk,1,"a, b",test\nabcdefghijk_000001.mp4,a\n',
     'vggsound.csv:2: expected id,start,"label",split or id_start.mp4,label, got'),
    ("vggsound", "vggsound.csv", 'abcdefghijk,1,"a, b,test\n', "vggsound.csv:1: "),
    ("vggsound", "vggsound.csv", 'abcdefghijk,1,"a" b,test\n', "vggsound.csv:1: "),
    ("ucf101", "classInd.txt", "1 A\nB 2\n", "classInd.txt:2: expected '1 Class', got 'B 2'"),
    ("ucf101", "trainlist01.txt", "A/v_A_g01_c01.avi 1\nA/v_A_g02_c01.avi 2\n",
     "trainlist01.txt:2: expected 'Class/v_.* with a class of classInd.txt, got .*avi 2'"),
    ("ucf101", "testlist01.txt", "B/v_B_g01_c01.avi\n", "testlist01.txt:1: "),
    ("hmdb51", "clap_test_split1.txt", "x.avi 1 \nx.avi 3 \n",
     "clap_test_split1.txt:2: expected 'name.avi 0', 1 or 2, got 'x.avi 3'"),
    ("hmdb51", "clap_test_split1.txt", "\x00\xff\n", "clap_test_split1.txt:1: "),
    *[(layout, None, name, f"{problem}: give the ")
      for layout in ("kinetics400", "vggsound", "ucf101", "hmdb51")
      for name, problem in ((None, "this layout needs --annotations"),
                            ("gone", "--annotations .*gone does not exist"),
                            ("empty", "--annotations .*empty has no .*"),
                            ("r/a.mp4", "a.mp4 is of another kind"))]])
def test_lists_with_errors(tmp_path, layout, name, content, message):
    """A list has this name and content or, without a name, `content` stands in its place."""
    write_text(tmp_path / "r/a.mp4", "")
    (tmp_path / "empty").mkdir()
    for file, text in (LISTS["ucf101"][1] | {name or "other": content or ""}).items():
        write_text(tmp_path / "l" / file, text)
    place = "l" if name else content
    with pytest.raises(ValueError, match=message):
        scan.scan(tmp_path / "r", layout=layout, annotations=place and tmp_path / place)


# ---- the command

@pytest.mark.parametrize("args, status, message", [
    (("folder", "own", "--test-share", "0.2"), 1,
     "error: {0}/own has parts of its own (test, train): leave out --test-share"),
    (("folder", "own", "--test-share", "20"), 1,
     "error: --test-share 20.0: give a share above 0 and below 1, e.g. 0.2"),
    (("ucf101", "own", "--test-share", "0.2"), 2,
     "error: --test-share is for the layout folder: ucf101 has official parts"),
    (("folder", "own", "--seed", "1"), 2,
     "error: --seed draws a test part: give --test-share too, e.g. --test-share 0.2"),
    (("kinetics-sounds", "own"), 1, "error: no video of the 32 classes in own: name folders by "
                                    "them or give --annotations"),
    (("hmdb51", "own"), 1, "error: this layout needs --annotations: give the folder of "
                           "<class>_test_split[1-3].txt (testTrainMulti_7030_splits)"),
    (("folder", "own", "--fold", "2"), 1, "error: layout folder takes no --fold"),
    (("folder", "own", "--out", "notes.txt"), 1,
     "error: --out notes.txt is no manifest and would be written over: give another")])
def test_wrong_commands(tmp_path, monkeypatch, args, status, message):
    """A wrong call ends with one sentence."""
    for name in ("own/train/a/1.mp4", "own/test/a/2.mp4"):
        write_text(tmp_path / name, "")
    write_text(tmp_path / "notes.txt", "a note\nand another\n")
    monkeypatch.chdir(tmp_path)
    code, stdout, stderr = command(manifest, *args)
    assert (code, stdout) == (status, "") and not Path("manifest.csv").exists()
    assert stderr.splitlines()[-1].endswith(message.format(tmp_path))
    assert status == 2 or stderr.count("\n") == 1         # argparse prints the usage too


@pytest.mark.parametrize("layout, flags, files, lists, summary", [
    ("ucf101", ("--fold", 2), ucf(2), UCF_LISTS,
     "6 files, 4 usable, 2 left out: 1 another copy of a clip that is used, 1 not in the official "
     f"list; 1 {ABSENT} (1 of test)"),
    ("folder", ("--test-share", 0.2), {f"a/{n}.mp4": None for n in range(10)}, {},
     "10 files, 10 usable; 8 files in train and 2 in test, drawn with seed 0"),
    ("kinetics400", (), {"--07WQ2iBlw_000001_000011.mp4": EMPTY, "unlistedAAA.mp4": UNLISTED},
     BOWLING,
     f"2 files, 0 usable, 2 left out: 1 empty file, 1 not in the official list; 0 {ABSENT}"),
    # If no file is in the list, the summary says which names a layout expects.
    *[(layout, (), {"b.mp4": UNLISTED, "a'.mp4": UNLISTED}, lists,
       "2 files, 0 usable, 2 left out: 2 not in the official list; "
       f"{layout} expects names like {form.format(name)}, found e.g. \"a'.mp4\"{others}")
      for (layout, (name, lists, form)), others in zip(
          LISTS.items(), ("", f"; 0 {OTHERS}", "", "", ""))]])
def test_command(put, tmp_path, layout, flags, files, lists, summary):
    """The command prints a summary, or ends with it as an error if no file can be used."""
    root, folder = lay_out(put, tmp_path, files, lists)
    out, annotations = tmp_path / "new/m.csv", ("--annotations", folder) if lists else ()
    status, stdout, stderr = command(manifest, layout, root, *flags, *annotations, "--out", out)
    assert os.listdir(out.parent) == ["m.csv"]
    with open(out) as file:
        rows = list(csv.DictReader(file))
    assert rows[0].keys() == set(scan.COLUMNS) and len(rows) == len(files)
    if ", 0 usable" in summary:
        assert (status, stdout) == (1, "")
        assert stderr.splitlines()[-1] == f"error: {out}: {summary}"
    else:
        assert (status, stdout) == (0, f"{out}: {summary}\n")
        tested = [Path(row.path).name for row in read_manifest(out, "test")[0]]
        assert tested == {"ucf101": ["v_YoYo_g02_c01.avi"], "folder": ["3.mp4", "9.mp4"]}[layout]
