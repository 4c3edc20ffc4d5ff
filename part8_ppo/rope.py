"""Rotary positions: each query and key is turned by an angle that grows with its position.

Two vectors that are both turned keep an angle between them that depends on the difference of the turns alone, so a
score depends on how far apart two tokens are, and on nothing else about where they stand. No parameters, and nothing is
added to the residual stream.

    python part3_arch_improvements/lesson2_rope.py      # by hand in two dimensions, then in D

Shapes: B batch, T time (tokens), D head dimension.

References: Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding", section 3; Chen et al.
2023, "Extending Context Window of Large Language Models via Positional Interpolation", section 2.3 (linear scaling).
"""

import torch
import torch.nn.functional as F


def rope_frequencies(
    head_dim: int, base: float = 10000.0, scaling: dict[str, float | str] | None = None
) -> torch.Tensor:
    """How fast each pair of channels turns: base^(-2i/D) radians a token for pair i (Su et al. 2021, section 3.2.2).

    Stretching a model's context slows the turning down: "linear" by the same factor for all pairs; "llama3" only the
    slow pairs, which never finished a turn in the trained context, with a ramp between (Llama 3.1's release).

    Args:
        head_dim: D, even.
        base: the slowest pair turns by about 1 / base radians a token.
        scaling: a rope_type with its numbers, under the names of Hugging Face's config.json; None for none.

    Returns:
        (D/2,) radians a token, falling.

    Raises:
        ValueError: another rope_type.
    """
    frequency = base ** (-torch.arange(0, head_dim, 2).float() / head_dim)  # (D/2,)
    if scaling is None:
        return frequency
    if scaling["rope_type"] == "linear":
        return frequency / scaling["factor"]
    if scaling["rope_type"] == "llama3":
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * torch.pi)  # in the trained context
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: a fast pair, left alone; 0: a slow one, stretched
        return keep * frequency + (1 - keep) * frequency / scaling["factor"]
    raise ValueError(f"rope_type {scaling['rope_type']!r} is not implemented, only linear and llama3")


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs of channels by angles that grow with the position (Su et al. 2021, equation 34).

    Channel i makes a pair with channel i + D/2 ("half-split", the layout of Llama in Hugging Face's format).

    Args:
        x: (B, heads, T, D) queries or keys.
        cos, sin: (1 or B, 1, T, D/2) of position times frequency.

    Returns:
        (B, heads, T, D) of the same lengths; q . k now depends on the distance between the two positions only.
    """
    a, b = x.chunk(2, dim=-1)  # (B, heads, T, D/2) each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def rope_angles(positions: torch.Tensor, frequency: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of each position times each frequency, (B, T) and (D/2,) -> 2 x (B, 1, T, D/2)."""
    angle = positions[:, None, :, None] * frequency
    return angle.cos(), angle.sin()


def count_from_start(documents: torch.Tensor) -> torch.Tensor:
    """Position of each token in its own document, where a row holds several one after the other.

    [0 0 0 1 1 2] -> [0 1 2 0 1 0]

    Args:
        documents: (B, T) which document each token is of; those of a document are neighbours.

    Returns:
        (B, T) positions.
    """
    place = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)  # (B, T)
    begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)  # (B, T), the first of each document
    return place - (place * begins).cummax(dim=1).values
