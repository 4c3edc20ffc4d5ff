"""Encoding a text of any size into files of token ids, in several processes. Used by data.py, which says what for.

The text streams through in jobs of a million characters: read here, encoded in any process, written here in the order
in which it came. At no time is more in memory than a few jobs.

    train.bin, val.bin   ids of the training part and of the held-out one, two or four bytes each, and nothing else
    info.json            which tokenizer made them from what, and how many there are
"""

import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tokenizer import BPETokenizer, ByteTokenizer

FORMAT = 1
"""Version of what info.json holds; tokens of another version are made anew."""
PIECE = 1_000_000
"""Characters that are read, and encoded, at a time."""
WORD_END = re.compile(r"[^\W_](?=[ ,.])")
"""A place where a long text may be cut: see make_jobs."""


def make_jobs(split: Iterable[tuple[bool, Iterable[str]]]) -> Iterator[list[tuple[bool, str, bool]]]:
    """Cut and collect documents to jobs of about a million characters: (held out?, text, last of its document?).

    A long document is cut where the pieces have the tokens of the whole: pre-tokens of every pattern, ours and
    tiktoken's, end with a word or number that a blank, a comma or a full stop follows. A text without such places
    (Chinese has few) stays in one piece.
    """
    job, size = [], 0
    for held_out, document in split:
        rest = ""
        for chunk in document:
            rest += chunk
            if len(rest) < PIECE:
                continue
            safe = [match.end() for match in WORD_END.finditer(rest, len(rest) - 1000)]
            if safe:
                yield [*job, (held_out, rest[: safe[-1]], False)]
                job, size, rest = [], 0, rest[safe[-1] :]
        job.append((held_out, rest, True))
        size += len(rest)
        if size >= PIECE:
            yield job
            job, size = [], 0
    yield job


def use_tokenizer(tokenizer: ByteTokenizer | BPETokenizer) -> None:
    """Give this process its tokenizer: once, instead of with every job."""
    encode_job.tokenizer = tokenizer


def encode_job(job: list[tuple[bool, str, bool]]) -> list[tuple[np.ndarray, int]]:
    """Encode one job: the ids and the number of finished documents of the training part, then of the held-out one."""
    tokenizer, ids, n_documents = encode_job.tokenizer, [[], []], [0, 0]
    for held_out, text, last in job:
        ids[held_out] += tokenizer.encode(text) + [tokenizer.eot] * last
        n_documents[held_out] += last
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    return [(np.array(part, dtype), n) for part, n in zip(ids, n_documents, strict=True)]


def encode_jobs(jobs: Iterable[list], tokenizer: ByteTokenizer | BPETokenizer, workers: int) -> Iterator[list[tuple]]:
    """Encode jobs, in their order, in this process or in several others; no more are read ahead than keep them busy."""
    if workers < 1:
        use_tokenizer(tokenizer)
        yield from map(encode_job, jobs)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), use_tokenizer, (tokenizer,)) as pool:
        waiting = deque()
        for job in jobs:
            waiting.append(pool.submit(encode_job, job))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        yield from (future.result() for future in waiting)


def fingerprint(value: object) -> str:
    """Sixteen characters that change with anything in a plain value or a tokenizer."""
    if isinstance(value, ByteTokenizer | BPETokenizer):
        value = value.to_json() if isinstance(value, BPETokenizer) else "bytes"
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def write_tokens(target: Path, jobs: Iterable[list], tokenizer: ByteTokenizer | BPETokenizer, workers: int) -> dict:
    """Encode jobs into train.bin and val.bin of a folder, and return what info.json says of them."""
    info = {"format": FORMAT, "tokenizer": fingerprint(tokenizer), "vocab_size": tokenizer.vocab_size}
    info |= {"train_tokens": 0, "train_documents": 0, "val_tokens": 0, "val_documents": 0}
    bar = tqdm(desc="encoding", unit=" tokens", unit_scale=True, disable=None, leave=False, dynamic_ncols=True)
    with bar, (target / "train.bin").open("wb") as train, (target / "val.bin").open("wb") as val:
        for encoded in encode_jobs(jobs, tokenizer, workers):
            for file, part, (ids, n_documents) in zip((train, val), ("train", "val"), encoded, strict=True):
                file.write(ids.tobytes())
                info[f"{part}_tokens"] += len(ids)
                info[f"{part}_documents"] += n_documents
                info["dtype"] = ids.dtype.name
                bar.update(len(ids))
        for file in (train, val):
            file.flush()
            os.fsync(file.fileno())
    return info
