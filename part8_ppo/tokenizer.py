"""Text to token ids and back: bytes, and byte pair encoding (BPE) learned from a text.

Bytes need no training and know every text, but a text has many of them. BPE starts from the 256 bytes and again and
again makes one new token of the two neighbours that occur together most often. What is frequent becomes short: three to
four bytes of English are one token, so a context of T tokens reaches three to four times as far. Whatever has no token
of its own is still spelled in bytes: nothing is unknown, and every text comes back exactly.

    python part4_scaling/lesson1_bpe.py     # the naive way, the merges as they happen, tokens in colours

All of it is plain Python below; for speed `encode` lets the library tiktoken do the same merges.

References: Gage 1994, "A New Algorithm for Data Compression"; Sennrich et al. 2016, "Neural Machine Translation of Rare
Words with Subword Units", section 3.2; Radford et al. 2019, "Language Models are Unsupervised Multitask Learners",
section 2.2 (bytes, and no merges across kinds of characters); Xue et al. 2022, "ByT5", section 3 (bytes alone).
"""

import hashlib
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from heapq import heapify, heappop, heappush
from itertools import islice, pairwise
from pathlib import Path

import regex
import tiktoken
from tqdm import tqdm

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>")

# A text is first cut into pre-tokens, and no token reaches across a cut: else "dog.", "dog," and "dog!" would each be
# learned. The kinds are GPT-4's; but white space comes in bounded lengths, for a million blanks would exhaust the stack
# of tiktoken's matcher. "++" takes all it can and gives nothing back.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)"  # endings: I'm, she'll
    r"|[^\r\n\p{L}\p{N}]?+\p{L}++"  # a word, with the blank or whatever stands before it
    r"|\p{N}{1,3}+"  # up to three digits: long numbers have no tokens of their own
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+"  # punctuation, with line ends after it
    r"|\s{0,99}[\r\n]"  # white space up to the last line end
    r"|\s{1,99}(?!\S)"  # other white space, but for the blank that belongs to the next word
    r"|\s"
)
FORMAT = "byte-level BPE, version 1"
ESCAPED = regex.compile("([\ud800-\udfff]+)")  # what Python has in place of bytes that are no UTF-8


class ByteTokenizer:
    """Text to byte values and back, with one token more for the end of a text."""

    vocab_size = 257
    """V: 256 byte values and the end."""
    eot = 256
    """Id of `<|endoftext|>`, which stands between two documents and ends a generated one."""

    def encode(self, text: str) -> list[int]:
        """Turn a text into ids from 0 to 255, one for each byte of its UTF-8 form.

        Bytes of a file that are no UTF-8 arrive as Python's surrogate escapes and become the bytes they were.
        """
        return list(text.encode("utf-8", errors="surrogateescape"))

    def decode_bytes(self, ids: list[int]) -> bytes:
        """Turn ids back into exactly the bytes that they stand for; the end token stands for none."""
        return bytes(i for i in ids if i != self.eot)

    def decode(self, ids: list[int]) -> str:
        """Turn ids back into text; bytes that are no UTF-8, as in half a character, show as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def byte_lengths(self) -> list[int]:
        """How many bytes of text each id stands for: what bits per byte divides by."""
        return [1] * 256 + [0]


# --- training ---


def split_text(text: str, pattern: str = PATTERN) -> list[str]:
    """Cut a text into pre-tokens, which joined are the text again. Bytes that are no UTF-8 stand apart."""
    pieces = []
    for i, stretch in enumerate(ESCAPED.split(text)):  # text, escapes, text, escapes, ...
        pieces += [stretch] if i % 2 else regex.findall(pattern, stretch)
    return pieces


def count_words(texts: Iterable[str]) -> dict[bytes, int]:
    """Count the pre-tokens of some texts: " the" occurs thousands of times, and is worked on once."""
    counts = Counter()
    for text in texts:
        counts.update(split_text(text))
    return {word.encode("utf-8", errors="surrogateescape"): count for word, count in counts.items()}


def replace_pair(parts: list, pair: tuple, new: object) -> list:
    """Put `new` wherever the two parts of `pair` stand side by side, from left to right: a a a becomes aa a."""
    first, second = pair
    replaced, i, last = [], 0, len(parts) - 1
    while i <= last:
        if parts[i] == first and i < last and parts[i + 1] == second:
            replaced.append(new)
            i += 2
        else:
            replaced.append(parts[i])
            i += 1
    return replaced


def find_merges(words: dict[bytes, int]) -> Iterator[tuple[tuple[int, int], int]]:
    """Learn merges, one after the other, until no pair is left.

    A merge changes few words: an index says which ones hold the pair, and only these are counted anew. The most
    frequent pair lies on top of a heap; an entry whose count has fallen since goes back with the count of now.

    Args:
        words: how often each pre-token occurs.

    Yields:
        A pair of ids and how often it occurs; the n-th pair, from 0, becomes token 256 + n. Of equally frequent pairs
        the smaller is taken: by its first id, then by its second.
    """
    spelled, counts = [list(word) for word in words], list(words.values())
    pair_counts, where = defaultdict(int), defaultdict(set)
    for i, word in enumerate(spelled):
        for pair in pairwise(word):
            pair_counts[pair] += counts[i]
            where[pair].add(i)
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapify(heap)
    new = 256
    while heap:
        count, pair = heappop(heap)
        if -count != pair_counts[pair]:
            if pair_counts[pair]:
                heappush(heap, (-pair_counts[pair], pair))
            continue
        yield pair, -count
        fresh = set()  # the pairs with the new token: only their counts can have risen
        for i in where.pop(pair):
            for old in pairwise(spelled[i]):
                pair_counts[old] -= counts[i]
            spelled[i] = replace_pair(spelled[i], pair, new)
            for now in pairwise(spelled[i]):
                pair_counts[now] += counts[i]
                if new in now:
                    where[now].add(i)
                    fresh.add(now)
        for pair in fresh:
            heappush(heap, (-pair_counts[pair], pair))
        new += 1


# --- encoding ---


def merge_bytes(piece: bytes, ranks: dict[bytes, int], limit: float = math.inf) -> list[bytes]:
    """Cut one pre-token into tokens: its bytes, merged in the order in which the merges were learned.

    A merge is known by the token that it makes: the bytes of a token only ever come about from one pair, because
    between two cuts that stay, merging goes its way whatever stands outside. So `ranks`, the id of each token in the
    order of learning, is all that there is to keep. Merges from rank `limit` on are left out.
    """
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > 1:
        pair = min(pairwise(parts), key=lambda pair: ranks.get(pair[0] + pair[1], math.inf))
        if ranks.get(pair[0] + pair[1], math.inf) >= limit:
            break
        parts = replace_pair(parts, pair, pair[0] + pair[1])
    return parts


class BPETokenizer:
    """Text to learned tokens and back.

    Args:
        ranks: id of each token that stands for bytes; the lower, the earlier it was learned. All 256 bytes are in it.
        special_tokens: ids of the tokens that stand for no text, by name. `encode` never gives one, whatever the text:
            who means the token writes `tokenizer.special_tokens["<|user|>"]`, and a user who types it gets letters.
        pattern: regular expression of a pre-token.
    """

    def __init__(self, ranks: dict[bytes, int], special_tokens: dict[str, int], pattern: str = PATTERN) -> None:
        self.ranks, self.special_tokens, self.pattern = ranks, special_tokens, pattern
        self.vocab_size = max([*ranks.values(), *special_tokens.values()]) + 1
        self.eot = special_tokens[END_OF_TEXT]
        # Ids that stand for no bytes: special tokens, and the gaps that some of tiktoken's vocabularies have.
        self.token_bytes = dict.fromkeys(range(self.vocab_size), b"") | {i: token for token, i in ranks.items()}
        self.fast = self.to_tiktoken()

    @classmethod
    def train(
        cls, text: str | Iterable[str], vocab_size: int, special_tokens: Iterable[str] = SPECIAL_TOKENS
    ) -> "BPETokenizer":
        """Learn `vocab_size` tokens from a text, or from several: 256 bytes, then merges, then the special tokens.

        `<|endoftext|>` is always one of the special tokens.

        Raises:
            UserError: vocab_size leaves no room for bytes and special tokens, or asks for more than the text holds.
        """
        names = list(dict.fromkeys([END_OF_TEXT, *special_tokens]))
        n_tokens = vocab_size - len(names)
        if n_tokens < 256:
            least = f"the 256 bytes and {len(names)} special tokens; give at least {256 + len(names)}"
            raise user_error(f"vocab_size {vocab_size}: smaller than {least}")
        merges = find_merges(count_words([text] if isinstance(text, str) else text))
        tokens = [bytes([i]) for i in range(256)]
        bar = tqdm(total=n_tokens - 256, desc="merges", disable=None, leave=False, dynamic_ncols=True)
        for (first, second), _ in islice(merges, n_tokens - 256):
            tokens.append(tokens[first] + tokens[second])
            bar.update()
        bar.close()
        if len(tokens) < n_tokens:
            most = f"it has no pairs left after {len(tokens) + len(names)}; give a longer text, or that size"
            raise user_error(f"vocab_size {vocab_size}: the text is too short, {most}")
        ranks = {token: i for i, token in enumerate(tokens)}
        return cls(ranks, {name: n_tokens + i for i, name in enumerate(names)})

    def encode(self, text: str) -> list[int]:
        """Turn a text into ids, none of them special, with the help of tiktoken.

        Bytes of a file that are no UTF-8 arrive as Python's surrogate escapes and become the bytes they were: the slow
        way, for tiktoken would put U+FFFD in their place.
        """
        ids = []
        for i, stretch in enumerate(ESCAPED.split(text)):  # text, escapes, text, escapes, ...
            ids += self.encode_slowly(stretch) if i % 2 else self.fast.encode_ordinary(stretch)
        return ids

    def encode_slowly(self, text: str) -> list[int]:
        """What `encode` does, in plain Python.

        The ids are the same wherever both libraries know the characters: `regex` may know a younger Unicode than
        tiktoken, and so keep in a word as a letter what the other cuts off as a sign.
        """
        words = [piece.encode("utf-8", errors="surrogateescape") for piece in split_text(text, self.pattern)]
        known = {word: [self.ranks[part] for part in merge_bytes(word, self.ranks)] for word in set(words)}
        return [i for word in words for i in known[word]]

    def decode_bytes(self, ids: list[int]) -> bytes:
        """Turn ids back into exactly the bytes that they stand for; special tokens stand for none."""
        return b"".join(self.token_bytes[i] for i in ids)

    def decode(self, ids: list[int]) -> str:
        """Turn ids back into text; bytes that are no UTF-8, as in half a character, show as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def byte_lengths(self) -> list[int]:
        """How many bytes of text each id stands for: what bits per byte divides by."""
        return [len(self.token_bytes[i]) for i in range(self.vocab_size)]

    def merges(self) -> list[tuple[bytes, bytes]]:
        """The merges in the order of learning, read back from the ranks: a token by the merges before it is a pair."""
        learned = sorted((rank, token) for token, rank in self.ranks.items() if len(token) > 1)
        return [tuple(merge_bytes(token, self.ranks, limit=rank)) for rank, token in learned]

    def to_tiktoken(self) -> tiktoken.Encoding:
        """The same tokenizer as one of tiktoken's, which merges by ranks too, in Rust."""
        parts = {"pat_str": self.pattern, "mergeable_ranks": self.ranks, "special_tokens": self.special_tokens}
        return tiktoken.Encoding(f"bpe-{self.vocab_size}", **parts)

    @classmethod
    def from_tiktoken(cls, encoding: tiktoken.Encoding) -> "BPETokenizer":
        """Take over one of tiktoken's vocabularies; our special tokens that it does not have come after its last id.

        Then ids that stand for nothing fill up to a multiple of 64: GPUs multiply matrices of odd sizes slowly.
        """
        missing = [name for name in SPECIAL_TOKENS if name not in encoding._special_tokens]
        missing += [f"<|reserved_{i}|>" for i in range(-(encoding.n_vocab + len(missing)) % 64)]
        added = {name: encoding.n_vocab + i for i, name in enumerate(missing)}
        return cls(encoding._mergeable_ranks, encoding._special_tokens | added, encoding._pat_str)

    # --- the file ---

    def to_json(self) -> str:
        """The whole tokenizer, readable: checksum, pattern, special tokens, then a line for each token."""
        tokens = {token.decode("utf-8", errors="surrogateescape"): i for token, i in self.ranks.items()}
        state = {"format": FORMAT, "pattern": self.pattern, "special_tokens": self.special_tokens, "tokens": tokens}
        text = json.dumps({"sha256": checksum(state), **state}, indent=1, ensure_ascii=False)
        return text.encode("utf-8", errors="backslashreplace").decode()  # half a character: "\\udce7", byte E7

    @classmethod
    def from_json(cls, text: str) -> "BPETokenizer":
        """Make the tokenizer that `to_json` wrote; ValueError, KeyError or TypeError if the text is damaged."""
        state = json.loads(text)
        if state.pop("sha256") != checksum(state) or state["format"] != FORMAT:
            raise ValueError("not what was written")
        ranks = {token.encode("utf-8", errors="surrogateescape"): i for token, i in state["tokens"].items()}
        return cls(ranks, state["special_tokens"], state["pattern"])

    def save(self, path: Path | str) -> None:
        """Write one JSON file: whole or not at all, because it takes its name only when all of it is on the disk."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            with unfinished.open("w", encoding="utf-8") as file:
                file.write(self.to_json() + "\n")
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)  # only there if something went wrong

    @classmethod
    def load(cls, path: Path | str) -> "BPETokenizer":
        """Read the file that `save` wrote.

        Raises:
            UserError: there is no such file, or it is damaged.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise user_error(f"tokenizer {path}: {error.strerror}; give a file that BPETokenizer.save wrote") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise user_error(f"tokenizer {path}: damaged, or not written by BPETokenizer.save; train it anew") from None


def checksum(state: dict) -> str:
    """SHA-256 of a tokenizer's state, which any change of it changes."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def user_error(message: str) -> ValueError:
    """A UserError, which is imported late because data.py itself imports this file."""
    from data import UserError

    return UserError(message)


def load_tokenizer(name: str) -> ByteTokenizer | BPETokenizer:
    """Find a tokenizer by name: "bytes", the path of a JSON file, or "gpt2" and others that tiktoken downloads once.

    Raises:
        UserError: an unknown name, a damaged file, or a vocabulary that cannot be had.
    """
    if name == "bytes":
        return ByteTokenizer()
    if name in tiktoken.list_encoding_names():
        try:
            return BPETokenizer.from_tiktoken(tiktoken.get_encoding(name))
        except (OSError, ValueError) as error:  # no network, or something else came
            problem = f"tiktoken cannot download its vocabulary ({type(error).__name__})"
            way_out = "get it where there is a network, into a folder named by TIKTOKEN_CACHE_DIR, and copy that folder"
            raise user_error(f"tokenizer {name}: {problem}; {way_out}, or train your own") from None
    if not name.endswith(".json") and not Path(name).is_file():
        known = ", ".join(["bytes", *tiktoken.list_encoding_names()])
        raise user_error(f"tokenizer {name}: unknown; give one of {known}, or the path of a JSON file")
    return BPETokenizer.load(name)


def describe_tokenizer(tokenizer: ByteTokenizer | BPETokenizer) -> str:
    """A tokenizer as one string, for a checkpoint; restore_tokenizer makes it again."""
    return tokenizer.to_json() if isinstance(tokenizer, BPETokenizer) else "bytes"


def restore_tokenizer(description: str) -> ByteTokenizer | BPETokenizer:
    """The tokenizer that describe_tokenizer described."""
    return ByteTokenizer() if description == "bytes" else BPETokenizer.from_json(description)
