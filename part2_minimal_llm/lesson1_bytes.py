"""Lesson 2.1: what becomes of a text before a model sees it.

A model works on numbers below V. Text already lies on disk as such numbers: UTF-8 stores each character as one to four
bytes, and a byte is a number below 256. So the bytes themselves can be the tokens. Nothing is learned, nothing is
unknown, and what went in comes out, even from a file that is broken. The price: texts are long, and some scripts pay
two or three tokens for a character.

    python part2_minimal_llm/lesson1_bytes.py     # 2 seconds; a table of characters and bytes, and a figure

You should see UTF-8 built by hand agree with our tokenizer on every character there is, a text that survives the round
trip, half a character wait for its other half, and what one and the same story costs in three scripts.

References: RFC 3629, "UTF-8, a transformation format of ISO 10646", section 3; Xue et al. 2022, "ByT5", section 3;
Petrov et al. 2023, "Language Model Tokenizers Introduce Unfairness Between Languages".
"""

import codecs
import json
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import tyro

from tokenizer import ByteTokenizer

matplotlib.use("Agg")  # figures go to files; a screen may not be there

RUNS = Path(__file__).resolve().parent.parent / "runs" / Path(__file__).resolve().parent.name

# The same two sentences in an alphabet of one byte a letter, of two, and in a script of three bytes a character.
SCRIPTS = {
    "Latin (English)": "The small cat found a red ball under the old tree. It was happy.",
    "Cyrillic (Russian)": "Маленькая кошка нашла красный мяч под старым деревом. Она была рада.",
    "Han (Chinese)": "小猫在老树下找到了一个红球。它很高兴。",
}
CONTEXT = 256  # tokens that a model sees at once, for comparison


@dataclass
class Config:
    """Follow a text into bytes and back."""

    text: str = "Zoë 猫!"
    """The text that is taken apart."""
    step: int = 1
    """Compare the hand-made UTF-8 with the tokenizer on every step-th character of Unicode."""
    out: Path = RUNS / "lesson1_bytes"
    """Folder for the figure and metrics.json."""
    smoke: bool = False
    """A real but tiny run, in a temporary folder."""


def utf8(code: int) -> list[int]:
    """UTF-8 by hand: the one to four bytes of a character.

    A byte below 128 is a character of its own (ASCII). Otherwise the first byte says by its leading ones how many bytes
    belong together, and each further one carries six bits behind the mark 10: so the start of a character can be found
    from anywhere in a text.

    Args:
        code: the character's number in Unicode, as ord() gives it.
    """
    if code < 0x80:  # 7 bits: 0xxxxxxx
        return [code]
    tail = [0b10000000 | code & 0b111111]  # the last six bits
    code >>= 6
    if code < 0b100000:  # 5 bits are left: 110xxxxx
        return [0b11000000 | code, *tail]
    tail = [0b10000000 | code & 0b111111, *tail]
    code >>= 6
    if code < 0b10000:  # 4 bits are left: 1110xxxx
        return [0b11100000 | code, *tail]
    return [0b11110000 | code >> 6, 0b10000000 | code & 0b111111, *tail]  # 3 and 6 bits: 11110xxx 10xxxxxx


def differing_characters(tokenizer: ByteTokenizer, step: int) -> tuple[int, int]:
    """Compare utf8 with the tokenizer: (characters that differ, characters compared)."""
    # 0xD800 to 0xDFFF are no characters: they are reserved, and Python stores bytes that are no UTF-8 there.
    codes = [code for code in range(0, sys.maxunicode + 1, step) if not 0xD800 <= code <= 0xDFFF]
    return sum(utf8(code) != tokenizer.encode(chr(code)) for code in codes), len(codes)


def draw(path: Path, text: str, costs: dict[str, float]) -> None:
    """Draw the characters of the text above their bytes, and what a character costs in each script."""
    fig, (top, bottom) = plt.subplots(2, 1, figsize=(8, 5), height_ratios=(3, 2))
    x = 0
    for character in text:
        code = utf8(ord(character))
        # The figure's font has no Han: what it may not know is named by its number.
        name = repr(character)[1:-1] if ord(character) < 0x250 else f"U+{ord(character):04X}"
        top.add_patch(plt.Rectangle((x, 1), len(code), 0.8, facecolor="white", edgecolor="black"))
        top.text(x + len(code) / 2, 1.4, "space" if name == " " else name, ha="center", va="center", fontsize=12)
        for i, byte in enumerate(code):
            color = "lightgray" if len(code) == 1 else "tab:orange" if i == 0 else "moccasin"
            top.add_patch(plt.Rectangle((x + i, 0), 1, 0.8, facecolor=color, edgecolor="black"))
            top.text(x + i + 0.5, 0.4, f"{byte}\n{byte:08b}", ha="center", va="center", fontsize=8)
        x += len(code)
    top.add_patch(plt.Rectangle((x, 0), 1, 0.8, facecolor="tab:blue", edgecolor="black"))
    top.text(x + 0.5, 0.4, "256\nend", ha="center", va="center", fontsize=8, color="white")
    top.set(xlim=(-0.1, x + 1.1), ylim=(-0.1, 1.9), title="Characters, and the tokens that the model sees")
    top.axis("off")
    bars = bottom.barh(list(costs), list(costs.values()), color=["lightgray", "tab:orange", "tab:orange"])
    bottom.bar_label(bars, fmt="%.2f", padding=3)
    bottom.invert_yaxis()
    bottom.set(xlim=(0, 3.5), xlabel="tokens (bytes) for each character")
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(config: Config) -> None:
    """Take a text apart, put it together again, and count what it costs."""
    if config.smoke:
        config = replace(config, out=Path(tempfile.mkdtemp()), step=1000)
    tokenizer = ByteTokenizer()

    print(f"{config.text!r} is {len(config.text)} characters and {len(tokenizer.encode(config.text))} tokens:")
    for character in config.text:
        code = utf8(ord(character))
        print(f"  {character!r}  number {ord(character):6d}  bytes {' '.join(f'{b:3d}' for b in code):11s}", end="")
        print(f"  in bits {' '.join(f'{b:08b}' for b in code)}")
    wrong, compared = differing_characters(tokenizer, config.step)
    print(f"UTF-8 by hand against tokenizer.encode: {wrong} of {compared:,} characters differ")

    ids = [*tokenizer.encode(config.text), tokenizer.eot]
    print(f"\na document ends with token {tokenizer.eot}, which no byte can be: {ids}")
    print(f"and back: {tokenizer.decode(ids)!r}, the same text: {tokenizer.decode(ids) == config.text}")

    # A file in an old encoding. Python keeps the stray byte as a surrogate escape, and the tokenizer as what it was.
    old = b"caf\xe9"
    ids = tokenizer.encode(old.decode("utf-8", errors="surrogateescape"))
    print(f"\nbytes that are no UTF-8: {old} -> {ids} -> {tokenizer.decode_bytes(ids)}")
    print(f"decode shows them to a reader as {tokenizer.decode(ids)!r}")
    every = bytes(range(256)) * 2
    kept = tokenizer.decode_bytes(tokenizer.encode(every.decode("utf-8", errors="surrogateescape"))) == every
    print(f"all 256 byte values in a row come back unchanged: {kept}")

    print("\nstreaming: a model writes byte by byte, a reader wants whole characters")
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for byte in tokenizer.encode("猫"):
        at_once, waited = tokenizer.decode([byte]), decoder.decode(bytes([byte]))
        print(f"  token {byte}: decoded at once {at_once!r}, by a decoder that waits {waited!r}")

    print(f"\nthe same two sentences      characters  tokens  tokens per character  characters in {CONTEXT} tokens")
    costs = {}
    for name, text in SCRIPTS.items():
        n_tokens = len(tokenizer.encode(text))
        costs[name] = n_tokens / len(text)
        print(f"  {name:24s}  {len(text):10d}  {n_tokens:6d}  {costs[name]:20.2f}  {CONTEXT / costs[name]:10.0f}")

    config.out.mkdir(parents=True, exist_ok=True)
    metrics = {f"tokens_per_character_{name.split()[0].lower()}": cost for name, cost in costs.items()}
    metrics |= {"characters_compared": compared, "characters_differing": wrong, "bytes_round_trip": int(kept)}
    (config.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    draw(config.out / "bytes.png", config.text, costs)
    print(f"\nwrote bytes.png and metrics.json to {config.out}")


if __name__ == "__main__":
    main(tyro.cli(Config))
