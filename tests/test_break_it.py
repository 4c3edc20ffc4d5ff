"""The "Break it" tables: every mistake that a README invites the reader to make is caught by the test it names.

Each row is one edit of one line. It is applied to a copy of the repository, where the named test must then fail; and
unedited it must pass, or its failure would say nothing.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from conftest import PARTS, copy_repository, part, read_table, run_python

COLUMNS = ["file", "replace", "by", "symptom", "caught by"]
PASSED, FAILED = 0, 1  # pytest's exit status; 2 is an error in collection, 4 and 5 a test that was not found


@dataclass
class Edit:
    """One row of a "Break it" table."""

    file: str
    """File to edit, with its part's folder."""
    replace: str
    """Text to look for, which stands there exactly once."""
    by: str
    """Text to put there instead."""
    test: str
    """The test that must notice, as pytest names it."""


def edits(n: int) -> list[Edit]:
    """Rows of part `n`'s table; none where there is no README yet, which a house rule reports."""
    readme = part(n) / "README.md"
    if n == 0 or not readme.exists():
        return []
    rows = read_table(readme.read_text(), "Break it", COLUMNS)
    return [Edit(f"{part(n).name}/{row[0]}", row[1], "" if row[2] == "(nothing)" else row[2], row[4]) for row in rows]


def run_tests(folder: Path, tests: list[str]) -> tuple[int, str]:
    """Run some tests of the repository in `folder`, up to the first failure: pytest's exit status and output."""
    plain = ["-p", "no:xdist", "-p", "no:cacheprovider", "-o", "addopts=", "-x", "-q", "--no-header"]
    result = run_python("-m", "pytest", *plain, *tests, cwd=folder, timeout=300, env={"PYTEST_ADDOPTS": ""})
    return result.returncode, result.stdout[-3000:] + result.stderr[-3000:]


def complaint(edit: Edit, folder: Path) -> str | None:
    """Make the edit in the repository in `folder`; say why its row is wrong, or None if the named test fails."""
    file = folder / edit.file
    source = file.read_text()
    if source.count(edit.replace) != 1 or edit.replace == edit.by:
        return f"{edit.replace!r} stands {source.count(edit.replace)} times in {edit.file}, to become {edit.by!r}"
    broken = source.replace(edit.replace, edit.by)
    try:
        compile(broken, edit.file, "exec")
    except SyntaxError as error:
        return f"the edit is no Python: {error}"
    file.write_text(broken)
    status, output = run_tests(folder, [edit.test])
    if status == PASSED:
        return f"{edit.test} passes all the same:\n{output}"
    if status != FAILED:
        return f"{edit.test} did not run (pytest's exit status {status}):\n{output}"
    return None


def cases() -> list:
    """All rows of all parts, each a test of its own."""
    return [
        pytest.param(edit, id=f"part{n}-row{row}-{Path(edit.file).stem}-{edit.test.split('::')[-1]}")
        for n in PARTS
        for row, edit in enumerate(edits(n), 1)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("edit", cases())
def test_mistake_is_caught(edit: Edit, tmp_path: Path) -> None:
    """The named test fails once the edit is made."""
    problem = complaint(edit, copy_repository(tmp_path / "clone"))
    assert problem is None, problem


@pytest.mark.slow
@pytest.mark.parametrize("n", [n for n in PARTS if edits(n)])
def test_named_tests_pass_unedited(n: int, tmp_path: Path) -> None:
    """All tests that a part's table names pass in a copy where nothing was edited."""
    tests = sorted({edit.test for edit in edits(n)})
    status, output = run_tests(copy_repository(tmp_path / "clone"), tests)
    assert status == PASSED, output


@pytest.mark.parametrize("n", [n for n in PARTS if n >= 1])
def test_part_has_mistakes_to_make(n: int) -> None:
    """At least five rows a part, each with its symptom and a test of that part's own file."""
    rows = read_table((part(n) / "README.md").read_text(), "Break it", COLUMNS)
    assert len(rows) >= 5
    assert all(row[3] for row in rows), "a row without its symptom"
    assert all(re.match(rf"tests/test_part{n}\.py::test_\w+", row[4]) for row in rows)


# --- the check itself, on a repository of two files ---


@pytest.fixture
def tiny_repository(tmp_path: Path) -> Path:
    """A part that adds and a test that watches only part of it."""
    (tmp_path / "part1_tiny").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "part1_tiny" / "model.py").write_text(
        "def add(a, b):\n    return a + b\n\n\ndef unwatched(a):\n    return 2 * a\n"
    )
    (tmp_path / "tests" / "test_part1.py").write_text(
        "import sys\nsys.path.insert(0, 'part1_tiny')\nimport model\n\n\n"
        "def test_add():\n    assert model.add(1, 2) == 3\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    ("replace", "by", "test", "reason"),
    [
        ("a + b", "a - b", "test_add", None),
        ("return a + b", "raise ValueError", "test_add", None),
        ("2 * a", "3 * a", "test_add", "passes all the same"),
        ("a + b", "a - b", "test_missing", "did not run"),
        ("def add(", "def plus(", "test_add", None),
        ("def unwatched(a)", "model = undefined", "test_add", "no Python"),
        ("    return 2 * a", "    pass\n\n\nundefined()", "test_add", "did not run"),
        ("return", "yield", "test_add", "stands 2 times"),
        ("a * b", "a - b", "test_add", "stands 0 times"),
        ("a + b", "a + b", "test_add", "to become"),
    ],
)
def test_check_can_fail(tiny_repository: Path, replace: str, by: str, test: str, reason: str | None) -> None:
    """A row is right only where the edit can be made once and the named test is run by it and fails."""
    problem = complaint(Edit("part1_tiny/model.py", replace, by, f"tests/test_part1.py::{test}"), tiny_repository)
    assert problem is None if reason is None else reason in problem
