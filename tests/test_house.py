"""The rules of the house: what lies where, what imports what, and how long things are."""

import ast
import re

import pytest
from conftest import ROOT

STAGES = {"pretrain", "finetune", "retrieval"}
# What each file may import of this project, and how many lines it may have.
HOUSE = {"loss": (set(), 185), "augment": (set(), 190), "models": (set(), 200),
         "data": ({"augment", "prepare", "support"}, 325),
         "pretrain": ({"data", "models", "loss", "augment", "support"}, 250),
         "finetune": ({"data", "models", "augment", "support"}, 240),
         "retrieval": ({"data", "models", "augment", "support"}, 265)}
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
    for name, (allowed, lines) in HOUSE.items():
        path = ROOT / f"{name}.py"
        assert imports(path) & ours <= allowed, name
        assert len(path.read_text().splitlines()) <= lines, name
    for path in [*ROOT.glob("support/*.py"), *ROOT.glob("prepare/*.py")]:
        assert not imports(path) & (STAGES | {"data", "experiments"}), path


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_and_functions_are_short(path):
    text = path.read_text()
    assert [line for line in text.splitlines() if len(line) > 100] == []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name != "soft_info_nce":
            names = [argument.arg for argument in node.args.args + node.args.kwonlyargs]
            assert len([name for name in names if name not in ("self", "ctx")]) <= 8, node.name
            assert node.end_lineno - node.lineno < 60, node.name


@pytest.mark.parametrize("path", sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")]),
                         ids=lambda path: path.name)
def test_lines_of_the_documents_are_short(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    assert [line for line in text.splitlines() if len(line) > 100 and line[0] not in "|#"] == []
    if path.name == "README.md":
        assert len([line for line in text.splitlines() if not line.startswith("|")]) <= 110
