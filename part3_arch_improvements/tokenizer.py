"""Bytes as tokens: the simplest tokenizer that can read and write every text.

A computer already stores text as bytes, numbers from 0 to 255 (UTF-8). Taking them as token ids needs no training,
has no unknown words, and costs one token a byte; part 4 learns larger tokens. One more id, 256, ends a text: no byte
can be mistaken for it.

    python part2_minimal_llm/lesson1_bytes.py     # shows what becomes of a text

Reference: Xue et al. 2022, "ByT5: Towards a Token-Free Future with Pre-trained Byte-to-Byte Models", section 3.
"""


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
