"""The rules of the house: what lies where, what imports what, and how long lines are."""

import ast
import re

from conftest import ROOT

STAGES = {"pretrain", "finetune", "retrieval"}
# What each file may import of this project.
HOUSE = {"loss": set(), "augment": set(), "models": set(),
         "data": {"augment", "prepare", "support"},
         "pretrain": {"data", "models", "loss", "augment", "support"},
         "finetune": {"data", "models", "augment", "support"},
         "retrieval": {"data", "models", "augment", "support", "prepare"}}     # GDT's input
SOURCES = sorted([*ROOT.glob("*.py"), *ROOT.glob("*/*.py")])


def imports(path):
    """The top-level names that a file imports."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in names}


def test_a_top_level_file_is_a_section_of_the_paper():
    assert {path.stem for path in ROOT.glob("*.py")} == HOUSE.keys()
    ours = HOUSE.keys() | {"support", "prepare", "experiments", "tests"}
    for name, allowed in HOUSE.items():
        assert imports(ROOT / f"{name}.py") & ours <= allowed, name
    for path in [*ROOT.glob("support/*.py"), *ROOT.glob("prepare/*.py")]:
        assert not imports(path) & (STAGES | {"data", "experiments"}), path


def test_lines_are_short():
    for path in [*SOURCES, ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        text, free = path.read_text(), ""
        if path.suffix == ".md":                # tables, headings and code may be wider
            text, free = re.sub(r"```.*?```", "", text, flags=re.DOTALL), "|#"
        long = [line for line in text.splitlines() if len(line) > 100 and line[0] not in free]
        assert not long, (path, long)
