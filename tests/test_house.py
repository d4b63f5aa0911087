"""The rules of the house: what lies where, what imports what, and how long lines are."""

import ast
import re

import pytest
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


def test_the_citation_names_the_paper():
    text = (ROOT / "CITATION.cff").read_text()
    assert "cff-version: 1.2.0" in text and "arXiv:2309.13942" in text


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_are_short(path):
    assert [line for line in path.read_text().splitlines() if len(line) > 100] == []


@pytest.mark.parametrize("path", sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")]),
                         ids=lambda path: path.name)
def test_lines_of_the_documents_are_short(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    assert [line for line in text.splitlines() if len(line) > 100 and line[0] not in "|#"] == []
