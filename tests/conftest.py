"""Helpers and fixtures that all tests share: where the parts are, how to import a file of one, how to run a script.

    from conftest import PARTS, ROOT, load, part, run_script

    model = load(2, "model")  # part2_*/model.py as a module
    result = run_script("part2_minimal_llm/train.py", "--smoke")  # has returncode, stdout and stderr

Several parts have a `model.py`. Each is imported under its plain name, as its siblings do it (`from model import GPT`),
so only one part's files may be importable at a time: `part_on_path` swaps them in and out.
"""

import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PARTS = sorted({int(re.match(r"part(\d+)_", file.parent.name)[1]) for file in ROOT.glob("part[0-9]*_*/*.py")})
"""Numbers of the parts that exist, ascending."""

# No test may touch the network, here or in a script that it starts; and `pytest -n 2` already uses both cores.
QUIET = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
os.environ.update(QUIET)
torch.set_num_threads(1)

_loaded: dict[int, dict[str, ModuleType]] = {}  # part -> the modules of that part imported so far, by name


def part(n: int) -> Path:
    """Folder of part `n`."""
    (folder,) = ROOT.glob(f"part{n}_*")
    return folder


@contextmanager
def part_on_path(n: int) -> Iterator[None]:
    """Inside the block `import model` means part `n`'s; afterwards, what it meant before.

    Every module of the part is imported once: the second time, and from whatever test, it is the same object.
    """
    names = {file.stem for file in ROOT.glob("part[0-9]*_*/*.py")}
    outside = {name: sys.modules.pop(name) for name in names & sys.modules.keys()}
    path = sys.path.copy()
    sys.modules.update(_loaded.setdefault(n, {}))
    sys.path.insert(0, str(part(n)))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        _loaded[n] |= {name: sys.modules.pop(name) for name in names & sys.modules.keys()}
        sys.modules.update(outside)
        sys.path[:] = path


def load(n: int, name: str) -> ModuleType:
    """Import `name`.py of part `n`, with that part alone on the import path.

    An import inside one of its functions runs later, when the function is called. That finds the right sibling in the
    tests of `test_partN.py`, which run with part N on the path; anywhere else wrap the call in `part_on_path(n)`, or it
    raises ModuleNotFoundError. It never finds another part's file.
    """
    with part_on_path(n):
        return importlib.import_module(name)


def run_python(
    *args: str, timeout: float = 120, env: dict[str, str] | None = None, cwd: Path = ROOT
) -> subprocess.CompletedProcess:
    """Run `python *args` offline and on one thread; return its exit status, stdout and stderr.

    Args:
        args: command line after `python`.
        timeout: seconds after which it is killed, and `subprocess.TimeoutExpired` raised.
        env: environment variables to add.
        cwd: folder to start it in.
    """
    variables = os.environ | QUIET | {"PYTHONDONTWRITEBYTECODE": "1"} | (env or {})
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=variables, timeout=timeout, text=True, capture_output=True, check=False)


def run_script(
    path: str | Path, *args: str, timeout: float = 120, env: dict[str, str] | None = None, cwd: Path = ROOT
) -> subprocess.CompletedProcess:
    """Run a script as a reader would: `python path *args`. `path` is absolute or relative to the repository."""
    return run_python(ROOT / path, *args, timeout=timeout, env=env, cwd=cwd)


def repository_files() -> list[Path]:
    """Every file of the repository, relative to it and sorted; what .gitignore names is left out."""
    ignored = {".git"} | {line.strip("/") for line in (ROOT / ".gitignore").read_text().split()}
    files = []
    for entry in sorted(ROOT.iterdir()):
        if entry.name not in ignored:
            files += [entry] if entry.is_file() else sorted(file for file in entry.rglob("*") if file.is_file())
    files = [file.relative_to(ROOT) for file in files]
    return [file for file in files if ignored.isdisjoint(file.parts)]


def copy_repository(folder: Path) -> Path:
    """Copy the repository, as a fresh clone would have it, into a new folder, and return that folder."""
    for file in repository_files():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, folder / file)
    return folder


def read_table(markdown: str, heading: str, columns: list[str]) -> list[list[str]]:
    """Rows of the first table under `## heading`, each a list of cells without the backticks around them.

    Raises:
        AssertionError: there is no such heading, no such table below it, or a row of another length.
    """
    section = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", markdown, re.MULTILINE | re.DOTALL)
    assert section, f"no heading '## {heading}'"
    header = f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"
    assert header in section[1], f"no table under '## {heading}' that starts exactly with\n{header}"
    rows = []
    for line in section[1].split(header)[1].splitlines():
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        assert len(cells) == len(columns), f"'## {heading}': not {len(columns)} cells in {line}"
        rows.append([re.sub(r"^`([^`]*)`$", r"\1", cell) for cell in cells])
    return rows


@pytest.fixture(scope="module", autouse=True)
def own_part(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests of test_partN.py run with part N on the path, so that imports inside its functions work."""
    match = re.fullmatch(r"test_part(\d+)\.py", request.path.name)
    if match is None:
        yield
        return
    with part_on_path(int(match[1])):
        yield


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random numbers, in whatever order and worker it runs."""
    torch.manual_seed(0)


@pytest.fixture
def shakespeare() -> Path:
    """The text of the published benchmarks, which is not part of this repository: without it the test is skipped."""
    file = ROOT.parent / "shared" / "corpora" / "tinyshakespeare.txt"
    if not file.exists():
        pytest.skip("tinyshakespeare.txt is not beside this repository")
    return file
