"""From pairs of answers to batches of token ids: what one answer is better than.

A record has a prompt and two answers, and says which of them somebody preferred. All three become ids once, as part 6
lays a conversation out; a pair that was sampled from a model (preferences.py) keeps its ids as they were drawn:

    <|endoftext|> <|user|> prompt <|assistant|>  answer <|end|>
    -------------- Pair.prompt ---------------  Pair.chosen or Pair.rejected

    python part7_reward/train.py                        # pairs sampled from the model of part 6, see preferences.py
    python part7_reward/train.py --data pairs.jsonl     # a line a record, in one of the layouts of read_pair
    python part7_reward/train.py --data hf:hh-rlhf      # a data set of the Hugging Face hub

A batch is B pairs in 2B rows: the chosen answers, then the rejected ones in the same order, padded on the right.

References: Bai et al. 2022, "Training a Helpful and Harmless Assistant with RLHF", section 2.2 (HH-RLHF); Cui et al.
2023, "UltraFeedback", section 2; Tunstall et al. 2023, "Zephyr", section 4.2 (its pairs of a best and a random answer).
"""

import hashlib
import json
import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tokenizer import BPETokenizer, ByteTokenizer

HELD_OUT = 1 / 50
"""Share of the prompts of a data set that is held out."""
LEAST_PROMPT = 16
"""Room that a prompt has at least, in ids, if it is cut: which answer is better cannot be seen without the question."""
HF_DATASETS = {
    "ultrafeedback": ("HuggingFaceH4/ultrafeedback_binarized", None, "train_prefs"),
    "hh-rlhf": ("Anthropic/hh-rlhf", None, "train"),
}
"""Data sets with a short name: full name, configuration and split."""
HF_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}
"""What the library `datasets` calls the format of a file, by its ending."""
SPEAKERS = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
"""Names that data sets have for who speaks."""


class UserError(ValueError):
    """A mistake in what the user gave. Scripts print it as one line and exit with status 2."""


class Pair(NamedTuple):
    """A prompt with two answers, of which one was preferred."""

    prompt: list[int]
    """Ids of all that comes before the answer, <|assistant|> last, see encode_prompt."""
    chosen: list[int]
    """Ids of the preferred answer, exactly as they were drawn; <|end|> last, unless the writer was cut off."""
    rejected: list[int]
    """Ids of the other one."""
    margin: float = 0.0
    """Score of the chosen one minus that of the other, below 0 if a noisy judge erred; 0 if there are no scores."""
    certainty: float = math.nan
    """Probability that the judge prefers the better answer: max(p, 1 - p). nan if nobody knows, as in data sets."""
    text: str = ""
    """The prompt as text; several turns with an empty line between."""


# --- records: several layouts, one form ---


def read_messages(messages: Any) -> tuple[str, ...]:
    """Read a list of who says what: {"role", "content"} as in chat interfaces, or {"from", "value"} as in ShareGPT.

    What a system message says stands before the first thing that the user says. What follows the last answer is left
    out, for nobody has answered it.

    Raises:
        ValueError: it is no such list, or user and assistant do not take turns.
    """
    turns, system = [], ""
    for number, message in enumerate(messages, 1):
        name, text = message.get("role") or message.get("from"), message.get("content")
        text = message.get("value") if text is None else text  # a table has None where a record has no such column
        speaker = SPEAKERS.get(name) if isinstance(name, str) else None
        if speaker is None:
            raise ValueError(f"message {number} is of {name!r}, who is none of {', '.join(SPEAKERS)}")
        if not isinstance(text, str):
            raise ValueError(f"message {number}, of the {speaker}, is no text")
        if speaker == "system" and not turns:
            system += text + "\n\n"
        elif speaker == ("user", "assistant")[len(turns) % 2]:
            turns.append(system + text)
            system = ""
        else:
            raise ValueError(f"message {number} is again, or too early, of the {speaker}")
    return tuple(turns[: len(turns) // 2 * 2])


def read_transcript(text: str) -> tuple[str, ...]:
    """Read a conversation that is one string, as in HH-RLHF: "\\n\\nHuman: Hello.\\n\\nAssistant: Good morning."

    White space around what is said is dropped. Who speaks twice in a row has said both in one turn.

    Raises:
        ValueError: it does not begin with somebody who speaks, or the assistant speaks first.
    """
    before, *parts = re.split(r"(?:\A\s*|\n\n)(Human|Assistant):", text)
    if before.strip() or not parts:
        raise ValueError(f"{text[:40]!r} does not begin with 'Human:'")
    messages = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        if messages and messages[-1]["role"] == speaker.lower():
            messages[-1]["content"] += "\n\n" + said.strip()
        else:
            messages.append({"role": speaker.lower(), "content": said.strip()})
    return read_messages(messages)


def read_pair(record: Any) -> tuple[tuple[str, ...], str, str, float] | None:
    """Bring a record of a known layout into one form: the turns of the prompt, chosen, rejected, and the margin.

    Three strings {"prompt", "chosen", "rejected"}; or "chosen" and "rejected" are whole conversations that begin alike,
    as lists of messages (UltraFeedback; "prompt" may hold their common beginning, see read_messages) or as transcripts
    (HH-RLHF, which has no "prompt", see read_transcript). What they have in common, turn by turn, is the prompt: not
    letter by letter, for two answers may begin with the same words. The margin is "score_chosen" - "score_rejected".

    Returns:
        None if the two are equal, or differ in more than one answer: then nobody said which answer was better.

    Raises:
        ValueError: it has none of these layouts.
    """
    if not isinstance(record, dict):
        raise ValueError("it is no record")
    prompt, both = record.get("prompt"), [record.get("chosen"), record.get("rejected")]
    if all(isinstance(said, str) for said in (prompt, *both)):
        conversations = [(prompt, said) for said in both]
    elif prompt is None and all(isinstance(said, str) for said in both):
        conversations = [read_transcript(said) for said in both]
    elif all(isinstance(said, list) and all(isinstance(m, dict) for m in said) for said in both):
        before = prompt if isinstance(prompt, list) else []
        conversations = [read_messages([*before, *said]) for said in both]
    else:
        raise ValueError(f"of no layout known here; its columns are {', '.join(record) or 'none'}")
    turns, others = conversations
    common = 0
    while common < min(len(turns), len(others)) and turns[common] == others[common]:
        common += 1
    if not len(turns) == len(others) == common + 1:  # both have an even number, so the prompt has an odd one
        return None
    scores = [record.get("score_chosen"), record.get("score_rejected")]
    margin = float(scores[0] - scores[1]) if all(isinstance(score, int | float) for score in scores) else 0.0
    return turns[:common], turns[common], others[common], margin


def read_jsonl(path: Path) -> Iterator[Any]:
    """Read a JSON lines file; UserError with the number of a line that is damaged."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"--data {path}: line {number} is no JSON ({error}); mend or delete it") from None


def read_hf(data: str) -> Iterator[Any]:
    """Read the records of hf:<name>[:split]; nothing is downloaded before it is needed.

    Raises:
        UserError: the data set cannot be had. Nothing else is ever taken in its place.
    """
    from datasets import load_dataset  # takes a second to import, and only this function needs it

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of each vain attempt, we of the last
    name = data.removeprefix("hf:")
    name, _, split = (name, "", "") if Path(name).exists() else name.partition(":")
    full_name, config, default = HF_DATASETS.get(name.lower(), (name, None, "train"))
    source = {"path": full_name, "name": config}
    if Path(name).is_file():
        source = {"path": HF_FORMATS.get(Path(name).suffix, "text"), "data_files": name}
    try:
        yield from load_dataset(**source, split=split or default, streaming=True)
    except Exception as error:  # the libraries below it have dozens of kinds, for the network and for damaged files
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"
        way_out = "check the name and the network, or copy the data set's files here and give hf:FOLDER"
        raise UserError(f"--data {data}: cannot be loaded ({reason}); {way_out}") from error


def load_pairs(data: str, tokenizer: BPETokenizer, block_size: int, n: int) -> tuple[list[Pair], list[Pair], int]:
    """Load pairs to train on, and held-out ones.

    Args:
        data: the path of a .jsonl file, or hf:<name>[:split].
        tokenizer: with the special tokens of a chat.
        block_size: T, ids of prompt and answer at most, see encode_pair.
        n: how many to train on, at most.

    Returns:
        (training, held out, how many were dropped: see read_pair and encode_pair). They are split by a hash of the
        first thing that the user says, so that one conversation, which a data set may have at several lengths, is
        never on both sides; if no hash falls into the held-out part, the smallest does.

    Raises:
        UserError: the data cannot be had, is damaged, or has usable pairs of fewer than two prompts.
    """
    path = Path(data)
    if not data.startswith("hf:") and not (path.is_file() and path.suffix == ".jsonl"):
        problem = "no .jsonl file" if path.exists() else "no such file"
        raise UserError(f"--data {data}: {problem}; give a .jsonl file, a folder of pairs, stories or hf:NAME")
    training, held_out, dropped = {}, {}, 0
    for number, record in enumerate(read_hf(data) if data.startswith("hf:") else read_jsonl(path), 1):
        try:
            found = read_pair(record)
        except ValueError as error:
            raise UserError(f"--data {data}: record {number}: {error}; see read_pair in data.py") from None
        pair = encode_pair(*found, tokenizer, block_size) if found else None
        if pair is None:
            dropped += 1
            continue
        share = int.from_bytes(hashlib.sha256(well_formed(found[0][0]).encode()).digest()[:6], "big") / 2**48
        side = held_out if share < HELD_OUT else training
        side.setdefault(share, []).append(pair)
        if len(training) >= n and len(training) + len(held_out) > 1:
            break
    if len(training) + len(held_out) < 2:
        raise UserError(f"--data {data}: usable pairs of fewer than two prompts, {dropped} others dropped; give more")
    if not held_out or not training:
        some, other = (training, held_out) if training else (held_out, training)
        smallest = min(some)
        other[smallest] = some.pop(smallest)
    sides = [[pair for same in side.values() for pair in same] for side in (training, held_out)]
    return sides[0][:n], sides[1], dropped


# --- ids ---


def chat_tokens(tokenizer: ByteTokenizer | BPETokenizer) -> tuple[int, int, int, int]:
    """Ids of <|user|>, <|assistant|>, <|end|> and <|pad|>; UserError if the tokenizer lacks one."""
    known = getattr(tokenizer, "special_tokens", {})
    names = ("<|user|>", "<|assistant|>", "<|end|>", "<|pad|>")
    missing = [name for name in names if name not in known]
    if missing:
        raise UserError(f"the model's tokenizer has no {', '.join(missing)}; train one with part 4's --tokenizer bpe")
    return tuple(known[name] for name in names)


def encode_turns(turns: tuple[str, ...], tokenizer: BPETokenizer, room: int) -> tuple[list[int], list[int]]:
    """Encode turns behind <|endoftext|>: each begins with who speaks, and an answer ends with <|end|>.

    If that is too long, it is cut from the left, within something that the user says: of an answer before the last, no
    rest stays that would stand there as if the user had said it. The last answer keeps its beginning and loses its end
    if it alone is too long.

    Args:
        turns: what user and assistant say, in turns.
        tokenizer: with the special tokens of a chat.
        room: ids at most, 2 or more.

    Returns:
        The ids, and for each of them in which turn it stands, from 0.
    """
    user, assistant, end, _ = chat_tokens(tokenizer)
    ids, turn_of = [], []
    for i, text in enumerate(turns):
        said = [assistant, *tokenizer.encode(text), end] if i % 2 else [user, *tokenizer.encode(text)]
        ids += said
        turn_of += [i] * len(said)
    if len(ids) + 1 > room:
        last = len(ids) if len(turns) % 2 else turn_of.index(len(turns) - 1)  # where the last answer begins
        first = len(ids) - (room - 2)  # besides <|endoftext|> and <|user|>
        while first < last and (ids[first] == user or turn_of[first] % 2):
            first += 1
        first = min(first, last)
        ids, turn_of = [user, *ids[first:]][: room - 1], [0, *turn_of[first:]][: room - 1]
    return [tokenizer.eot, *ids], [0, *turn_of]


def encode_prompt(turns: tuple[str, ...], tokenizer: BPETokenizer, room: int) -> list[int]:
    """Encode all that comes before an answer, the beginning and <|assistant|> included: what the model goes on from.

    Args:
        turns: an odd number of texts; the last is what is to be answered.
        tokenizer: with the special tokens of a chat.
        room: ids at most, 3 or more; what is too much is cut from the left, see encode_turns.
    """
    return [*encode_turns(turns, tokenizer, room - 1)[0], chat_tokens(tokenizer)[1]]


def well_formed(text: str) -> str:
    """A text that can be encoded: "?" stands for each half of a surrogate pair, which JSON can spell."""
    return text.encode("utf-8", "replace").decode()


def encode_pair(
    turns: tuple[str, ...], chosen: str, rejected: str, margin: float, tokenizer: BPETokenizer, block_size: int
) -> Pair | None:
    """Encode a pair. If it is too long, its prompt is cut from the left, for both answers in the same place.

    An answer is never cut: two that differ only near the end would become equal, and their label could not be learned.
    So a pair is dropped if its longer answer leaves less room than LEAST_PROMPT to a prompt that needs more.

    Args:
        turns: the prompt, an odd number of texts, the user's first and last.
        chosen, rejected: the two answers.
        margin: see Pair.
        tokenizer: with the special tokens of a chat.
        block_size: T, ids of prompt and answer at most.

    Returns:
        None if it does not fit, or if the answers are equal.
    """
    turns = tuple(map(well_formed, turns))
    end = chat_tokens(tokenizer)[2]
    answers = [[*tokenizer.encode(well_formed(answer)), end] for answer in (chosen, rejected)]
    room = block_size - max(map(len, answers))
    prompt = encode_prompt(turns, tokenizer, max(room, LEAST_PROMPT))
    if len(prompt) > room or answers[0] == answers[1]:
        return None
    return Pair(prompt, *answers, margin, math.nan, "\n\n".join(turns))


# --- batches ---


def collate_responses(
    prompts: list[list[int]], responses: list[list[int]], pad: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make one batch of prompts with an answer each, padded on the right.

    Args:
        prompts: N lists of ids.
        responses: N lists of ids, exactly as they were drawn.
        pad: id of <|pad|>.

    Returns:
        idx (N, T) int64, and mask (N, T) booleans: True on the tokens of the answers.
    """
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    idx = np.full((len(prompts), max(lengths)), pad, dtype=np.int64)
    mask = np.zeros(idx.shape, dtype=bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        idx[row, : lengths[row]] = [*prompt, *response]
        mask[row, len(prompt) : lengths[row]] = True
    return torch.from_numpy(idx), torch.from_numpy(mask)


def collate(pairs: list[Pair], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make one batch of B pairs: (2B, T) ids and mask, the chosen answers first, then the rejected ones in that order.

    One pass over both halves, so that what differs between them is the answers and nothing else.
    """
    responses = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    return collate_responses([pair.prompt for pair in pairs] * 2, responses, pad)


def get_batch(
    pairs: list[Pair], order: np.ndarray, batch_size: int, step: int, rank: int = 0, count: int = 1
) -> list[Pair]:
    """Take the pairs of one step, those of one process.

    Args:
        pairs: all.
        order: places in `pairs`, in the order in which they are to be learned, for the whole run.
        batch_size: B, pairs of this process.
        step: which batch of the run, from 0: nothing else decides, so a run that goes on sees what it would have seen.
        rank: which of the processes this is, from 0.
        count: how many processes share a step.
    """
    first = (step * count + rank) * batch_size
    return [pairs[i] for i in order[first : first + batch_size]]
