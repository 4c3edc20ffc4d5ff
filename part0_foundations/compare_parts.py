"""What changed between two parts: a table of definitions, then the diff, in the terminal or as a web page.

Parts copy forward, byte for byte, what they do not teach, so the difference between two parts is the lesson of the
later one. `git diff --no-index` shows it as lines; this script says first which functions, classes and assigned names
are unchanged, changed, new or removed, found in the syntax tree.

    python part0_foundations/compare_parts.py 1 2                    # table, and the diff of every changed file
    python part0_foundations/compare_parts.py 1 2 --file data.py     # one file only, also one that is wholly new
    python part0_foundations/compare_parts.py 1 2 --html             # one self-contained page, side by side

A file that is new or removed as a whole is only named, unless --file asks for it: its lines would bury the changed
ones. Takes a second. Lessons are named and not compared: each is about its own part. NO_COLOR in the environment turns
colours off (https://no-color.org). References: Myers 1986, "An O(ND) Difference Algorithm", section 2 (what a diff is).
"""

import ast
import difflib
import html
import os
import re
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / Path(__file__).resolve().parent.name


@dataclass
class Config:
    """Compare two parts."""

    old: tyro.conf.Positional[int] = 1
    """Number of the earlier part."""
    new: tyro.conf.Positional[int] = 2
    """Number of the later part."""
    file: str | None = None
    """Compare this file only, for example model.py."""
    html: bool = False
    """Write a web page instead of printing the diff."""
    root: Path = ROOT
    """Folder that holds the parts."""
    out: Path = RUNS
    """Folder for the web page."""
    smoke: bool = False
    """A real but tiny run, in a temporary folder."""


# --- what a part holds -----------------------------------------------------------------------------------------------


class UserError(ValueError):
    """A mistake of the person at the keyboard: one line, no traceback."""


def find_part(root: Path, n: int) -> Path:
    """Folder of part n. Raises UserError, naming the parts that there are, if it does not exist."""
    folders = {int(path.name[4 : path.name.index("_")]): path for path in root.glob("part[0-9]*_*") if path.is_dir()}
    if n not in folders:
        there = ", ".join(str(key) for key in sorted(folders)) or "none"
        raise UserError(f"there is no part {n} in {root} (there: {there})")
    return folders[n]


def read_part(folder: Path) -> dict[str, str]:
    """The Python files of a part, name -> text, without tests and caches."""
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))}


def definitions(source: str) -> dict[str, str]:
    """What a file defines at its top level, in order: name -> its text, to the byte.

    A definition is a function, a class or an assigned name, with its decorators, the comment lines directly above it
    (not the rules `# ---`) and, after an assignment, the string that documents it. Any other statement goes by its
    first line; imports and the module's docstring are left to the diff.

    Raises:
        SyntaxError: the file is no Python.
    """
    lines, found, names = source.splitlines(), {}, []
    for node in ast.parse(source).body:
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.Import | ast.ImportFrom) or (is_text and not names):
            continue
        start = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))]) - 1
        while start > 0 and lines[start - 1].startswith("#") and not lines[start - 1].startswith("# ---"):
            start -= 1
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            inner = [item for target in targets for item in ast.walk(target)]
            names = [item.id for item in inner if isinstance(item, ast.Name) and isinstance(item.ctx, ast.Store)]
            names = names or [lines[node.lineno - 1]]
        elif not is_text:  # a string below an assignment documents it, and goes by its names
            names = [lines[node.lineno - 1].split("  #")[0]]
        text = "\n".join(lines[start : node.end_lineno])
        for name in names:
            found[name] = f"{found[name]}\n{text}" if name in found else text
    return found


def compare(old: str | None, new: str | None) -> dict[str, list[str]]:
    """Names of definitions by what became of them: unchanged, changed, new, removed. None: there is no such file."""
    before, after = definitions(old or ""), definitions(new or "")
    return {
        "unchanged": [name for name in after if before.get(name) == after[name]],
        "changed": [name for name in after if name in before and before[name] != after[name]],
        "new": [name for name in after if name not in before],
        "removed": [name for name in before if name not in after],
    }


# --- in the terminal -------------------------------------------------------------------------------------------------

COLORS = {"unchanged": "2", "changed": "33", "new": "32", "removed": "31", "place": "36", "title": "1"}


def paint(text: str, kind: str, color: bool) -> str:
    """The text in the colour of its kind (ANSI escape codes), or as it is."""
    return f"\033[{COLORS[kind]}m{text}\033[0m" if color else text


def state_of(name: str, old: dict[str, str], new: dict[str, str]) -> str:
    """What became of a whole file."""
    if name not in old or name not in new:
        return "new" if name in new else "removed"
    return "unchanged" if old[name] == new[name] else "changed"


def summary(names: list[str], old: dict[str, str], new: dict[str, str], color: bool) -> list[str]:
    """Lines of the table: for every file, its definitions by what became of them."""
    lines = []
    for name in names:
        state = state_of(name, old, new)
        lines.append(paint(name, "title", color) + "  " + paint(state, state, color))
        for kind, found in compare(old.get(name), new.get(name)).items():
            for start in range(0, len(found), 6):  # six names a line
                title = f"{kind} ({len(found)})" if start == 0 else ""
                lines.append("  " + paint(f"{title:16s}", kind, color) + ", ".join(found[start : start + 6]))
    return lines


def unified(name: str, folders: list[str], old: dict[str, str], new: dict[str, str], color: bool) -> list[str]:
    """Lines of the unified diff of one file, /dev/null for the side that has no such file; empty if unchanged."""
    texts = [part.get(name, "").splitlines() for part in (old, new)]
    places = [f"{a}/{name}" if name in part else "/dev/null" for a, part in zip(folders, (old, new), strict=True)]
    lines = []
    for line in difflib.unified_diff(*texts, *places, lineterm=""):
        kinds = {"+++": "title", "---": "title"} if len(lines) < 2 else {}  # only the first two lines are headings
        kind = kinds.get(line[:3]) or {"+": "new", "-": "removed", "@": "place"}.get(line[0])
        lines.append(paint(line, kind, color) if kind else line)
    return lines


# --- as a web page ---------------------------------------------------------------------------------------------------

STYLE = """
:root { --back: #ffffff; --text: #1f2328; --dim: #6e7781; --line: #d8dee4; --panel: #f6f8fa;
  --new: #dafbe1; --new2: #9be9a8; --removed: #ffebe9; --removed2: #ffb3ad; --tag-changed: #9a6700;
  --tag-new: #1a7f37; --tag-removed: #cf222e; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --back: #0d1117; --text: #e6edf3; --dim: #8b949e; --line: #30363d;
  --panel: #161b22; --new: #12321d; --new2: #1f6f36; --removed: #3c1a1d; --removed2: #8e2b2f;
  --tag-changed: #d29922; --tag-new: #3fb950; --tag-removed: #f85149; } }
body { margin: 0 auto; padding: 1.5rem; max-width: 120rem; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2.5rem 0 .5rem; font-family: ui-monospace, monospace; }
table { border-collapse: collapse; width: 100%; }
.names td { border-top: 1px solid var(--line); padding: .3rem .8rem .3rem 0; vertical-align: top; }
.names td + td { font: 13px/1.6 ui-monospace, monospace; } .names td:first-child { white-space: nowrap; width: 1%; }
.changed { color: var(--tag-changed); } .new { color: var(--tag-new); } .removed { color: var(--tag-removed); }
.unchanged, .dim { color: var(--dim); } a { color: inherit; }
.diff { table-layout: fixed; border: 1px solid var(--line); font: 12.5px/1.5 ui-monospace, monospace; }
summary { color: var(--dim); cursor: pointer; margin-top: .5rem; }
.diff td { white-space: pre-wrap; overflow-wrap: anywhere; vertical-align: top; padding: 0 .5rem; }
.diff .n { width: 2.6rem; text-align: right; color: var(--dim); background: var(--panel); user-select: none; }
.diff .add { background: var(--new); } .diff .del { background: var(--removed); }
.diff .none { background: var(--panel); }
.diff .add b { background: var(--new2); font-weight: inherit; } .diff .del b { background: var(--removed2);
  font-weight: inherit; } .diff .skip td { text-align: center; color: var(--dim); background: var(--panel); }
"""


def mark(old: str, new: str) -> tuple[str, str]:
    """Two versions of a line as HTML, with the words that differ in <b>; unmarked if hardly anything is alike."""
    a, b = (re.findall(r"\w+|\s+|.", text) for text in (old, new))  # words, not letters: easier on the eye
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    if matcher.ratio() < 0.5:
        return html.escape(old), html.escape(new)
    sides = ["", ""]
    for tag, a1, a2, b1, b2 in matcher.get_opcodes():
        for i, words in enumerate((a[a1:a2], b[b1:b2])):
            text = html.escape("".join(words))
            sides[i] += text if tag == "equal" or not text else f"<b>{text}</b>"
    return sides[0], sides[1]


def row(n_old: int | None, old: str | None, n_new: int | None, new: str | None, changed: bool) -> str:
    """One row of the side-by-side table; None is a side that has no such line. The texts are HTML already."""
    cells = ""
    for n, text, kind in ((n_old, old, "del"), (n_new, new, "add")):
        name = "none" if text is None else kind if changed else ""
        cells += f'<td class="n">{n or ""}</td><td class="{name}">{text or ""}</td>'
    return f"<tr>{cells}</tr>\n"


def side_by_side(old: str, new: str, context: int = 4) -> str:
    """Both versions of a file as an HTML table, equal stretches cut down to `context` lines around each change."""
    a, b = old.splitlines(), new.splitlines()
    rows = ""
    for group in difflib.SequenceMatcher(None, a, b, autojunk=False).get_grouped_opcodes(context):
        rows += f'<tr class="skip"><td colspan="4">line {group[0][1] + 1} | line {group[0][3] + 1}</td></tr>\n'
        for tag, a1, a2, b1, b2 in group:
            for k in range(max(a2 - a1, b2 - b1)):
                i, j = (a1 + k if a1 + k < a2 else None), (b1 + k if b1 + k < b2 else None)
                texts = [html.escape(a[i]) if i is not None else None, html.escape(b[j]) if j is not None else None]
                if tag == "replace" and None not in (i, j):
                    texts = list(mark(a[i], b[j]))
                places = [None if place is None else place + 1 for place in (i, j)]
                rows += row(places[0], texts[0], places[1], texts[1], changed=tag != "equal")
    columns = '<col style="width:3.6rem"><col><col style="width:3.6rem"><col>'
    return f'<table class="diff"><colgroup>{columns}</colgroup>\n{rows}</table>\n' if rows else ""


def page(names: list[str], lessons: str, folders: list[str], old: dict[str, str], new: dict[str, str]) -> str:
    """The whole comparison as one self-contained web page: no script, no font, no picture from elsewhere."""
    title = html.escape(f"{folders[0]} -> {folders[1]}")
    body = f"<h1>{title}</h1>\n<p class=dim>{html.escape(lessons)}</p>\n<p>"
    body += " &nbsp; ".join(f'<a href="#{name}" class="{state_of(name, old, new)}">{name}</a>' for name in names)
    body += "</p>\n<p class=dim>green: new, red: removed, yellow: changed, grey: the same byte for byte</p>\n"
    for name in names:
        state = state_of(name, old, new)
        body += f'<h2 id="{name}">{name} <span class="{state}">{state}</span></h2>\n<table class="names">\n'
        for kind, found in compare(old.get(name), new.get(name)).items():
            cell = html.escape(", ".join(found))
            body += f'<tr><td class="{kind}">{kind} ({len(found)})</td><td>{cell}</td></tr>\n' if found else ""
        body += "</table>\n"
        table = side_by_side(old.get(name, ""), new.get(name, ""))
        if table:  # a file that is new or gone as a whole waits folded
            body += f"<details{' open' if state == 'changed' else ''}><summary>lines</summary>\n{table}</details>\n"
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    return f"<!doctype html>\n<html lang=en><head>{head}<style>{STYLE}</style></head>\n<body>\n{body}</body></html>\n"


def run(config: Config) -> None:
    """Compare as the config says. Raises UserError where it makes no sense."""
    if config.old == config.new:
        raise UserError(f"both parts are {config.old}: name two different ones, for example 1 2")
    folders = [find_part(config.root, n) for n in (config.old, config.new)]
    old, new = (read_part(folder) for folder in folders)
    lessons = [[name for name in part if name.startswith("lesson")] for part in (old, new)]
    names = [name for name in dict.fromkeys([*new, *old]) if not name.startswith("lesson")]  # the later part's order
    if config.file is not None:
        if config.file not in {*old, *new}:
            raise UserError(f"--file {config.file}: in neither part (there: {', '.join(names) or 'no shared files'})")
        names = [config.file]
    titles = [folder.name for folder in folders]
    listed = "; ".join(
        f"lessons of {a}, not compared: {', '.join(b) or 'none'}" for a, b in zip(titles, lessons, strict=True)
    )
    if config.html:
        config.out.mkdir(parents=True, exist_ok=True)
        path = config.out / f"compare_{config.old}_{config.new}.html"
        path.write_text(page(names, listed, titles, old, new), encoding="utf-8")
        print("\n".join(summary(names, old, new, color=False)), f"\nwrote {path}")
        return
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(paint(f"{titles[0]} -> {titles[1]}", "title", color), listed.replace("; ", "\n"), sep="\n", end="\n\n")
    print("\n".join(summary(names, old, new, color)))
    whole = [name for name in names if state_of(name, old, new) in ("new", "removed") and config.file is None]
    for name in names:
        lines = unified(name, titles, old, new, color) if name not in whole else []
        print("\n" + "\n".join(lines) if lines else "", end="\n" if lines else "")
    if whole:
        print(f"\nnot printed, new or removed as a whole: {', '.join(whole)} (to see one: --file {whole[0]})")


def main(config: Config) -> None:
    """Run, and turn a mistake into one line and exit status 2."""
    if config.smoke:
        config = replace(config, html=True, out=Path(tempfile.mkdtemp()))
    try:
        run(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except SyntaxError as error:
        print(f"error: a file cannot be read as Python: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:  # the reader has left: compare_parts.py 1 2 | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main(tyro.cli(Config))
