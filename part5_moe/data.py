"""From text of any size to batches of token ids.

Documents become one long row of tokens, each document closed by the end token. Encoding a large text takes longer than
one wants to wait at every start, and its tokens may not fit into memory. So they are written once to a file, two or
four bytes a token, and the file is mapped: it looks like an array, and only the pages that a batch touches are read.

A batch is B windows of T + 1 tokens cut from random places of that row: the first T are the input, the last T, shifted
by one, are the targets, so that each window holds T questions "what comes next?" and their answers.

    python part5_moe/train.py --data hf:tinystories    # downloads, encodes and trains; the second time, only trains
    python part5_moe/train.py --data texts.jsonl       # a line a document: {"text": "Once upon a time ..."}

Nothing that is held out is ever trained on: stories are split by what they are about (see stories.py), the language
reference and text files by position: the last tenth is held out, and documents of a data set by a hash of their text.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np
import torch

from stories import documents
from token_files import FORMAT, PIECE, fingerprint, make_jobs, write_tokens
from tokenizer import SPECIAL_TOKENS, BPETokenizer, ByteTokenizer, load_tokenizer

HELD_OUT = 1 / 200
"""Share of the documents of a data set that is held out."""
HF_DATASETS = {
    "tinystories": ("roneneldan/TinyStories", None, "text"),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT", "text"),
    "wikipedia": ("wikimedia/wikipedia", "20231101.en", "text"),
}
"""Data sets with a short name: full name, configuration, and the column that holds the text."""
LARGE = 100_000_000
"""Bytes from which on a text is encoded by several processes."""
HF_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}
"""What the library `datasets` calls the format of a file, by its ending."""


class UserError(ValueError):
    """A mistake in what the user gave. Scripts print it as one line and exit with status 2."""


# --- text ---


def read_file(path: Path) -> str:
    """Read a text file whatever is in it: bytes that are no UTF-8 are kept as surrogate escapes.

    Raises:
        UserError: there is no such file, or it is empty.
    """
    if not path.is_file():
        raise UserError(f"--data {path}: no such file; give a text file, or one of stories, pydoc")
    text = path.read_bytes().decode("utf-8", errors="surrogateescape")
    if not text:
        raise UserError(f"--data {path}: the file is empty; give a file with some text in it")
    return text


def python_reference() -> str:
    """The reference of the Python language as it ships inside CPython: real English, offline, 370 kB.

    Its topics quote each other, so a paragraph that has been seen before is left out: else held-out text would be
    known.
    """
    from pydoc_data.topics import topics  # a large module, and only this function needs it

    paragraphs = "\n\n\n".join(topics.values()).split("\n\n")
    return "\n\n".join(dict.fromkeys(paragraphs))


def read_chunks(file: IO[str], n_chars: int) -> Iterator[str]:
    """Read up to `n_chars` characters, so many at a time that no large file has to fit into memory."""
    while n_chars > 0 and (chunk := file.read(min(n_chars, PIECE))):
        n_chars -= len(chunk)
        yield chunk


def read_tenths(path: Path) -> Iterator[tuple[bool, Iterable[str]]]:
    """Read a text file as two documents, both in chunks: the first nine tenths, then the last, which is held out."""
    how = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}  # every byte comes back as it was
    with path.open(**how) as file:
        n_chars = sum(len(chunk) for chunk in read_chunks(file, sys.maxsize))
    cut = n_chars * 9 // 10
    with path.open(**how) as file:
        training = read_chunks(file, cut)
        yield False, training
        for _ in training:  # whoever wanted only the held-out part has not read this one
            pass
        yield True, read_chunks(file, n_chars - cut)


def read_jsonl(path: Path) -> Iterator[str]:
    """Read the "text" of each line of a JSON lines file; UserError with its number if a line is damaged."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"--data {path}: line {number} is no JSON ({error}); mend or delete it") from None
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise UserError(f'--data {path}: line {number} is no record {{"text": "..."}}; mend or delete it')
            yield record["text"]


def find_hf(data: str) -> tuple[str, str | None, str]:
    """Full name, configuration and text column of hf:<name>[:column]; the name may be a local file or folder."""
    name = data.removeprefix("hf:")
    name, _, column = (name, "", "") if Path(name).exists() else name.partition(":")
    full_name, config, default = HF_DATASETS.get(name.lower(), (name, None, "text"))
    return full_name, config, column or default


def read_hf(data: str) -> Iterator[str]:
    """Read the text of each record of hf:<name>[:column]; nothing is downloaded before it is needed.

    Raises:
        UserError: the data set cannot be had, or it has no such column. Nothing else is ever taken in its place.
    """
    from datasets import load_dataset  # takes a second to import, and only this function needs it

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of each vain attempt, we of the last
    name, config, column = find_hf(data)
    source = {"path": name, "name": config}
    if Path(name).is_file():
        source = {"path": HF_FORMATS.get(Path(name).suffix, "text"), "data_files": name}
    try:
        for record in load_dataset(**source, split="train", streaming=True):
            if not isinstance(record.get(column, 0), str | None):
                columns = ", ".join(record)
                raise UserError(f"--data {data}: no text in column {column}; give hf:NAME:COLUMN, one of {columns}")
            yield record[column] or ""
    except UserError:
        raise
    except Exception as error:  # the libraries below it have dozens of kinds, for the network and for damaged files
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"
        way_out = "check the name and the network, or copy the data set's files here and give hf:FOLDER"
        raise UserError(f"--data {data}: cannot be loaded ({reason}); {way_out}") from error


def hold_out(texts: Iterable[str], data: str) -> Iterator[tuple[bool, Iterable[str]]]:
    """Say of each document whether it is held out: about one in 200 is, and at least one.

    The hash of a text is a number in [0, 1), and below 1/200 the text is held out: wherever it stands, however often,
    and however many others there are. If no hash is that small, the smallest is held out; so the document with the
    smallest hash so far is kept back until the end.

    Yields:
        (held out?, [text]) of each document that is not empty; UserError, which names `data`, if none is.
    """
    smallest, kept, found = 1.0, [], False
    for text in texts:
        if not text:
            continue
        raw = text.encode("utf-8", errors="replace")  # "?" for half a surrogate pair, which JSON can spell
        document, share = [raw.decode()], int.from_bytes(hashlib.sha256(raw).digest()[:6], "big") / 2**48
        if share < HELD_OUT:
            found = True
            yield True, document
        elif found or share > smallest:
            yield False, document
        elif share == smallest:  # the same text once more
            kept.append(document)
        else:
            yield from ((False, earlier) for earlier in kept)
            smallest, kept = share, [document]
    if not found and not kept:
        raise UserError(f"--data {data}: there is no text in it; give data with some")
    yield from ((not found, document) for document in kept)


def split_documents(data: str, n_stories: int) -> Iterator[tuple[bool, Iterable[str]]]:
    """Read all documents once, as pairs (held out?, the text in one or more chunks). See load_documents."""
    if data == "stories":
        yield from ((False, [text]) for text in documents(n_stories, 0, held_out=False))
        yield from ((True, [text]) for text in documents(max(n_stories // 20, 1), 0, held_out=True))
    elif data == "pydoc":
        text = python_reference()
        cut = len(text) * 9 // 10
        yield from ((False, [text[:cut]]), (True, [text[cut:]]))
    elif data.startswith("hf:"):
        yield from hold_out(read_hf(data), data)
    else:
        path = Path(data)
        if not path.is_file():
            problem = "a folder without info.json" if path.is_dir() else "no such file"
            if (path / "info.json").is_file():
                problem = (
                    "a folder of tokens, from which no text comes back (for training, --tokenizer has to name theirs)"
                )
            kinds = "a text file, a .jsonl file, or one of stories, pydoc, hf:NAME"
            raise UserError(f"--data {data}: {problem}; give {kinds}")
        if path.stat().st_size == 0:
            raise UserError(f"--data {data}: the file is empty; give a file with some text in it")
        yield from hold_out(read_jsonl(path), data) if path.suffix == ".jsonl" else read_tenths(path)


def load_documents(data: str, n_stories: int) -> tuple[Iterator[str], Iterator[str]]:
    """Load the documents to train on and the held-out ones, as two iterators that each read the data for themselves.

    Args:
        data: "stories", "pydoc", the path of a text file or of a .jsonl file with a "text" in each line, or
            hf:<name>[:column] for what the library `datasets` can load, which may be a local file or folder.
        n_stories: how many stories to generate; a twentieth as many are held out. Only for "stories".

    Returns:
        (training documents, held-out documents). A text that is not made of documents is cut once, after nine tenths.

    Raises:
        UserError: on reading, if the data cannot be had, is damaged or empty.
    """
    training, held_out = split_documents(data, n_stories), split_documents(data, n_stories)
    return ("".join(chunks) for held, chunks in training if not held), ("".join(c) for held, c in held_out if held)


# --- tokens ---


def find_tokenizer(
    data: str, n_stories: int, name: str, vocab_size: int, path: Path, learn: bool
) -> ByteTokenizer | BPETokenizer:
    """Load the tokenizer that is asked for; "bpe" is learned from the training text.

    Args:
        data, n_stories: as for load_documents; of many documents the first 100,000 are learned from.
        name: bpe, or what load_tokenizer knows.
        vocab_size: V of the one that is learned.
        path: where that one is kept.
        learn: learn it; else it has been learned by another process, and is read.
    """
    if name != "bpe":
        return load_tokenizer(name)
    if learn:
        texts, _ = load_documents(data, n_stories)
        BPETokenizer.train(islice(texts, 100_000), vocab_size, list(SPECIAL_TOKENS)).save(path)
    return BPETokenizer.load(path)


def encode_documents(texts: list[str], tokenizer: ByteTokenizer) -> torch.Tensor:
    """Encode documents into one row of ids, (N,) int64, each document followed by the end token."""
    ids = []
    for text in texts:
        ids += tokenizer.encode(text)
        ids.append(tokenizer.eot)
    return torch.tensor(ids)


def describe_source(data: str, n_stories: int) -> dict:
    """What the tokens are made from, so that they are made anew if it changes: files by their sizes and times."""
    if data == "stories":
        generator = Path(__file__).with_name("stories.py").read_text(encoding="utf-8")
        return {"data": data, "n_stories": n_stories, "generator": fingerprint(generator)}
    if data == "pydoc":
        return {"data": data, "text": fingerprint(python_reference())}
    name, config, column = find_hf(data) if data.startswith("hf:") else (data, None, "text")
    files = [Path(name)] if Path(name).is_file() else sorted(f for f in Path(name).rglob("*") if f.is_file())
    states = {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
    return {"data": data, "name": name, "config": config, "column": column, "files: bytes, time": states}


def count_workers(data: str) -> int:
    """How many processes to encode with: as many as there are processors for a large text, 0 for a small one."""
    path = Path(data.removeprefix("hf:"))
    files = [path] if path.is_file() else path.rglob("*")
    small = data in ("stories", "pydoc") or (path.exists() and sum(f.stat().st_size for f in files) < LARGE)
    return 0 if small else os.cpu_count() or 1


def open_tokens(folder: Path, data: str, tokenizer: ByteTokenizer | BPETokenizer, block_size: int) -> list[np.memmap]:
    """Map train.bin and val.bin of a folder; UserError if they are damaged, too short, or of another tokenizer."""
    try:
        info = json.loads((folder / "info.json").read_text())
        maker, dtype = (info["tokenizer"], info["format"]), np.dtype(info["dtype"])
        for part in ("train", "val"):
            size, right = (folder / f"{part}.bin").stat().st_size, info[f"{part}_tokens"] * dtype.itemsize
            if size != right:
                raise ValueError(f"{part}.bin has {size} bytes instead of {right}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is damaged ({type(error).__name__}: {error}); delete it and encode anew") from None
    if maker != (fingerprint(tokenizer), FORMAT):
        problem = f"made by tokenizer {maker[0]} in format {maker[1]}, not by {fingerprint(tokenizer)} in {FORMAT}"
        raise UserError(f"{folder} was {problem}; give the tokenizer that made it, or encode the text anew")
    for part, name in (("train", "training"), ("val", "held-out")):
        if info[f"{part}_tokens"] <= block_size:
            raise UserError(
                f"--data {data}: its {name} part has {info[f'{part}_tokens']} tokens, too few for --block_size "
                f"{block_size}; give a longer text or a smaller --block_size"
            )
    return [np.memmap(folder / f"{part}.bin", dtype, mode="r") for part in ("train", "val")]


def load_tokens(
    data: str,
    n_stories: int,
    tokenizer: ByteTokenizer | BPETokenizer,
    block_size: int,
    folder: Path,
    workers: int | None = None,
) -> tuple[np.memmap, np.memmap]:
    """Load the training and the held-out tokens; the first time, encode the text and keep its tokens.

    They lie in folder/<name>-<fingerprint>/ as train.bin, val.bin and info.json. Before they are whole, the folder has
    another name; and with another text or tokenizer, another fingerprint.

    Args:
        data: as for load_documents, or a folder of tokens that this function made.
        n_stories: how many stories to generate, for "stories".
        tokenizer: turns text into ids.
        block_size: T; both parts must be longer.
        folder: where folders of tokens are kept.
        workers: processes that encode; 0: this one. None: all processors for what is downloaded or above 100 MB, which
            is worth the seconds that processes take to start, else this one.

    Returns:
        Two rows of ids, (N,) uint16 or, for more than 65,536 tokens, uint32.

    Raises:
        UserError: the data cannot be had, is damaged, or too short for a window of T + 1 tokens; its tokens are damaged
            or were made by another tokenizer; the disk is full.
    """
    if (Path(data) / "info.json").is_file():
        return tuple(open_tokens(Path(data), data, tokenizer, block_size))
    source = describe_source(data, n_stories)
    name = re.sub(r"[^\w.-]+", "-", Path(data.removeprefix("hf:")).stem)[-60:]
    target = folder / f"{name}-{fingerprint([FORMAT, source, fingerprint(tokenizer)])}"
    if not target.exists():
        unfinished = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        workers = count_workers(data) if workers is None else workers
        try:
            unfinished.mkdir(parents=True, exist_ok=True)
            info = write_tokens(unfinished, make_jobs(split_documents(data, n_stories)), tokenizer, workers)
            (unfinished / "info.json").write_text(json.dumps(info | {"source": source}, indent=1) + "\n")
            unfinished.rename(target)
        except OSError as error:
            if not target.exists():  # else another process was faster, with the same content
                raise UserError(
                    f"cannot write {target} ({error.strerror}); free some space, or use another disk"
                ) from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return tuple(open_tokens(target, data, tokenizer, block_size))


# --- batches ---


def get_batch(
    tokens: np.ndarray, batch_size: int, block_size: int, step: int, seed: int, rank: int = 0, count: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut the B windows of one process from random places of the tokens.

    All processes draw the same places for all batch_size * count windows of a step, and each takes its own rows. So the
    batch of a step as a whole does not depend on how many processes share it. And because the draw depends on nothing
    but the seed and the step, the position in the data *is* the step: a run that resumes at step 1,000, on however many
    processes, goes on with the batch that it would have seen.

    Args:
        tokens: (N,) ids, N > block_size.
        batch_size: B, windows of this process; to split among micro-batches, if gradients are accumulated.
        block_size: T, length of a window.
        step: which batch of the run, from 0.
        seed: another seed, another order of batches.
        rank: which of the processes this is, from 0.
        count: how many processes share a step.

    Returns:
        x and y, (B, T) int64 each: y[b, t] is the token that follows x[b, t], that is x[b, t + 1].
    """
    generator = np.random.default_rng([seed % 2**64, step])  # both are mixed: neighbours have nothing in common
    starts = generator.integers(len(tokens) - block_size, size=batch_size * count)
    mine = starts[rank * batch_size : (rank + 1) * batch_size]  # (B,)
    windows = tokens[mine[:, None] + np.arange(block_size + 1)]  # (B, 1) + (T + 1,) -> (B, T + 1) places, read at once
    windows = torch.from_numpy(windows.astype(np.int64))
    return windows[:, :-1], windows[:, 1:]
