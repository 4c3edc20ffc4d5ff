"""From text to batches of token ids.

Documents become one long row of tokens, each document closed by the end token. A batch is B windows of T + 1 tokens
cut from random places of that row: the first T are the input, the last T, shifted by one, are the targets, so that
each window holds T questions "what comes next?" and their answers.

    python part2_minimal_llm/lesson2_batches.py   # shows the shift as two aligned rows

Nothing that is held out is ever trained on: stories are split by what they are about (see stories.py), the language
reference and files by position: the last tenth is held out.
"""

from pathlib import Path

import torch

from stories import documents
from tokenizer import ByteTokenizer


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


def load_documents(data: str, n_stories: int) -> tuple[list[str], list[str]]:
    """Load the documents to train on and the held-out ones.

    Args:
        data: "stories", "pydoc" or the path of a text file.
        n_stories: how many stories to generate; a twentieth as many are held out. Only for "stories".

    Returns:
        (training documents, held-out documents). A text that is not made of documents is cut once, after nine tenths.

    Raises:
        UserError: there is no such file, or it is empty.
    """
    if data == "stories":
        return documents(n_stories, 0, held_out=False), documents(max(n_stories // 20, 1), 0, held_out=True)
    text = python_reference() if data == "pydoc" else read_file(Path(data))
    cut = len(text) * 9 // 10
    return [text[:cut]], [text[cut:]]


# --- tokens ---


def encode_documents(texts: list[str], tokenizer: ByteTokenizer) -> torch.Tensor:
    """Encode documents into one row of ids, (N,) int64, each document followed by the end token."""
    ids = []
    for text in texts:
        ids += tokenizer.encode(text)
        ids.append(tokenizer.eot)
    return torch.tensor(ids)


def load_tokens(
    data: str, n_stories: int, tokenizer: ByteTokenizer, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Load the training and the held-out tokens.

    Args:
        data: "stories", "pydoc" or the path of a text file.
        n_stories: how many stories to generate, for "stories".
        tokenizer: turns text into ids.
        block_size: T; both parts must be longer.

    Returns:
        Two rows of ids, (N,) int64 each.

    Raises:
        UserError: no such file, an empty one, or one that is too short for a window of T + 1 tokens.
    """
    train, held_out = (encode_documents(texts, tokenizer) for texts in load_documents(data, n_stories))
    for name, tokens in (("training", train), ("held-out", held_out)):
        if len(tokens) <= block_size:
            raise UserError(
                f"--data {data}: its {name} part has {len(tokens)} tokens, too few for --block_size {block_size}; "
                "give a longer text or a smaller --block_size"
            )
    return train, held_out


# --- batches ---


def get_batch(
    tokens: torch.Tensor, batch_size: int, block_size: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut B windows from random places of the tokens.

    Args:
        tokens: (N,) ids, N > block_size.
        batch_size: B, number of windows.
        block_size: T, length of a window.
        generator: decides where the windows start.

    Returns:
        x and y, (B, T) each: y[b, t] is the token that follows x[b, t], that is x[b, t + 1].
    """
    starts = torch.randint(len(tokens) - block_size, (batch_size,), generator=generator)
    windows = tokens.unfold(0, block_size + 1, 1)[starts]  # a view (N - T, T + 1) of all windows, then B of them
    return windows[:, :-1], windows[:, 1:]
