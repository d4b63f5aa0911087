"""The rules of the house: what imports what, and how long lines are."""

import ast
import re

from conftest import ROOT

# What each file may import of this project.
HOUSE = {"loss.py": set(), "augment.py": set(), "models.py": set(),
         "data.py": {"augment", "prepare", "support"},
         "pretrain.py": {"data", "models", "loss", "augment", "support"},
         "finetune.py": {"data", "models", "augment", "support"},
         "retrieval.py": {"data", "models", "augment", "support", "prepare"},       # GDT's input
         "support": {"support"}, "support/layers.py": set(),        # to be copied with models.py
         "prepare": {"support", "prepare"},
         "prepare/weights.py": {"augment", "models", "support"}}


def test_a_top_level_file_is_a_section_of_the_paper():
    files = {path.name for path in ROOT.glob("*.py")}
    assert files == {name for name in HOUSE if name.endswith(".py") and "/" not in name}
    ours = {name.removesuffix(".py") for name in files} | {"support", "prepare", "experiments",
                                                           "tests"}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), *ROOT.glob("prepare/*.py")]:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        names |= {alias.name for node in nodes if isinstance(node, ast.Import)
                  for alias in node.names}
        allowed = HOUSE.get(str(path.relative_to(ROOT)), HOUSE.get(path.parent.name))
        assert {name.split(".")[0] for name in names} & ours <= allowed, path


def test_lines_are_short_and_findings_exist():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("*.md"),
                 *ROOT.glob("docs/*.md")]:
        text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
        free = "|#" if path.suffix == ".md" else ""     # tables and headings may be wider
        long = [line for line in text.splitlines() if len(line) > 100 and line[0] not in free]
        assert not long, (path, long)
        for name in re.findall(r"findings/[\w-]+\.sh", text):
            assert (ROOT / name).exists(), (path, name)
