"""From prompts to token ids: what a policy is asked, and batches of what it answered.

Nobody has to say which answer is good: a reward model will. So all that is read of a record is what the user says,
and, in a longer conversation, all that was said before. It becomes ids as part 6 lays a conversation out:

    <|endoftext|> <|user|> prompt <|assistant|>     and the policy goes on:  answer <|end|>

    python part8_ppo/train.py                         # prompts of embedded stories, see instructions.py
    python part8_ppo/train.py --data prompts.jsonl    # a line a record, in one of the layouts of read_prompt
    python part8_ppo/train.py --data hf:hh-rlhf       # a data set of the Hugging Face hub

References: Bai et al. 2022, "Training a Helpful and Harmless Assistant with RLHF", section 2.2 (HH-RLHF); Cui et al.
2023, "UltraFeedback", section 2; Taori et al. 2023, "Alpaca" (instruction, input, output).
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokenizer import BPETokenizer, ByteTokenizer

HELD_OUT = 1 / 50
"""Share of the prompts of a data set that is held out."""
HF_DATASETS = {
    "alpaca": ("tatsu-lab/alpaca", None, "train"),
    "ultrafeedback": ("HuggingFaceH4/ultrafeedback_binarized", None, "train_gen"),
    "hh-rlhf": ("Anthropic/hh-rlhf", None, "train"),
}
"""Data sets with a short name: full name, configuration and split."""
HF_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}
"""What the library `datasets` calls the format of a file, by its ending."""
SPEAKERS = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
"""Names that data sets have for who speaks."""


class UserError(ValueError):
    """A mistake in what the user gave. Scripts print it as one line and exit with status 2."""


# --- records: five layouts, one form ---


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


def read_prompt(record: Any) -> tuple[str, ...]:
    """Bring a record of a known layout into one form: the turns of what is to be answered, an odd number of them.

    {"prompt"}, a text; {"prompt"} or {"messages"} or {"conversations"}, a list of messages, see read_messages: if its
    last one is an answer, that is left out; {"instruction", "input"} as in Alpaca, where the input may be empty; or
    {"chosen"} as in HH-RLHF, a transcript without its last answer, see read_transcript. Whatever else a record has is
    not read.

    Returns:
        None of them if the last thing that the user says is empty: it asks for nothing.

    Raises:
        ValueError: it has none of these layouts.
    """
    if not isinstance(record, dict):
        raise ValueError("it is no record")
    prompt, instruction, more = (record.get(name) for name in ("prompt", "instruction", "input"))
    if isinstance(prompt, str):
        turns = (prompt,)
    elif isinstance(instruction, str) and (more is None or isinstance(more, str)):
        turns = (f"{instruction}\n\n{more}" if more else instruction,)
    elif prompt is None and isinstance(record.get("chosen"), str):
        turns = read_transcript(record["chosen"])[:-1]
    else:
        lists = [record.get(name) for name in ("prompt", "messages", "conversations")]
        messages = next((some for some in lists if isinstance(some, list) and some), None)
        if messages is None or not all(isinstance(message, dict) for message in messages):
            raise ValueError(f"of no layout known here; its columns are {', '.join(record) or 'none'}")
        answered = SPEAKERS.get(str(messages[-1].get("role") or messages[-1].get("from"))) == "assistant"
        # read_messages leaves out what nobody has answered; that is just what we want, so it gets an empty answer.
        turns = read_messages(messages if answered else [*messages, {"role": "assistant", "content": ""}])[:-1]
    return turns if turns and turns[-1].strip() else ()


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


def load_prompts(data: str, tokenizer: BPETokenizer, room: int, n: int) -> tuple[list[list[int]], list[list[int]]]:
    """Load prompts to train on, and held-out ones.

    Args:
        data: the path of a .jsonl file, or hf:<name>[:split].
        tokenizer: with the special tokens of a chat.
        room: ids of a prompt at most; what is too much is cut from the left, see encode_turns.
        n: how many to train on, at most.

    Returns:
        (training, held out), each prompt as encode_prompt gives it. They are split by a hash of the first thing that
        the user says, so that one conversation, which a data set may have at several lengths, is never on both sides;
        if no hash falls into the held-out part, the smallest does.

    Raises:
        UserError: the data cannot be had, is damaged, or has fewer than two prompts.
    """
    path = Path(data)
    if not data.startswith("hf:") and not (path.is_file() and path.suffix == ".jsonl"):
        problem = "no .jsonl file" if path.exists() else "no such file"
        raise UserError(f"--data {data}: {problem}; give one, or one of stories, hf:NAME")
    training, held_out = {}, {}
    for number, record in enumerate(read_hf(data) if data.startswith("hf:") else read_jsonl(path), 1):
        try:
            turns = tuple(map(well_formed, read_prompt(record)))
        except ValueError as error:
            raise UserError(f"--data {data}: record {number}: {error}; see read_prompt in data.py") from None
        if not turns:
            continue
        share = int.from_bytes(hashlib.sha256(turns[0].encode()).digest()[:6], "big") / 2**48
        side = held_out if share < HELD_OUT else training
        prompt = encode_prompt(turns, tokenizer, room)
        if prompt not in side.setdefault(share, []):  # asked twice, it would be drawn twice as often
            side[share].append(prompt)
        if len(training) >= n and len(training) + len(held_out) > 1:
            break
    if len(training) + len(held_out) < 2:
        raise UserError(f"--data {data}: fewer than two different prompts; give more")
    if not held_out or not training:
        some, other = (training, held_out) if training else (held_out, training)
        smallest = min(some)
        other[smallest] = some.pop(smallest)
    return [ids for same in training.values() for ids in same][:n], [ids for same in held_out.values() for ids in same]


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
