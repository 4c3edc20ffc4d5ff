"""Key/value caches: what attention has computed of a token is kept, so that it is computed once.

Attention at a new token needs the keys and values of all visible tokens before it, and those never change. A cache
keeps them, says at which position each one stands, and leaves it to `visible` in model.py who sees whom. So the result
is the one of the full pass, whatever order the slots are in.

    python part3_arch_improvements/lesson4_kv_cache.py      # the plain cache: speed and memory
    python part3_arch_improvements/lesson6_rolling.py       # the rolling one: the slots as tokens arrive

Shapes: B batch, T new tokens, S slots, D head dimension.

References: Jiang et al. 2023, "Mistral 7B", section 2; Xiao et al. 2023, "Efficient Streaming Language Models with
Attention Sinks", section 3.2.
"""

import torch

from rope import rope, rope_angles


class KVCache:
    """The keys and values of all tokens so far, so that each is computed once.

    Allocated in full at the start: slot s of a row holds its token s. Rows of unequal length are padded on the *left*,
    so that all rows write to the same slot; the padding stands at negative positions.

    Memory: 2 * n_layer * B * n_kv_head * S * D numbers.

    Args:
        shape: (n_layer, B, n_kv_head, S, D); S tokens fit, padding included.
        like: a tensor with the device and the dtype of the cache.
        n_pad: (B,) how many tokens at the left of each row are padding; None for none.
    """

    def __init__(self, shape: tuple[int, ...], like: torch.Tensor, n_pad: torch.Tensor | None = None) -> None:
        self.k = like.new_zeros(shape)
        self.v = like.new_zeros(shape)
        self.n_pad = n_pad
        self.length = 0  # tokens so far, padding included

    def positions(self, T: int) -> torch.Tensor:
        """Positions of the next T tokens, (1 or B, T)."""
        return self._count(self.length, self.length + T)

    def key_positions(self, T: int) -> torch.Tensor:
        """Positions of the keys that `update` will return for the next T tokens, (1 or B, S)."""
        return self._count(0, self.length + T)

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store keys and values of the next T tokens, (B, n_kv_head, T, D) each, and return all of that layer.

        Raises:
            ValueError: the cache is full.
        """
        end = self.length + k.shape[2]
        if end > self.k.shape[3]:
            raise ValueError(f"{end} tokens do not fit into a cache of {self.k.shape[3]} slots")
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]  # views: nothing is copied

    def advance(self, T: int) -> None:
        """Count T tokens as stored, once every layer has stored them."""
        self.length += T

    def _count(self, start: int, end: int) -> torch.Tensor:
        """Positions of the tokens from `start` to `end`, (1 or B, end - start)."""
        count = torch.arange(start, end, device=self.k.device)[None]
        return count if self.n_pad is None else count - self.n_pad[:, None]


class RollingKVCache(KVCache):
    """A cache of constant size for streams without an end: the sinks, and a ring of the last `window` tokens.

    Position p is kept in slot p if it is a sink, else in slot n_sink + (p - n_sink) mod window, where it takes the
    place of p - window, which no later query can see (Jiang et al. 2023, section 2; Xiao et al. 2023, section 3.2).

    Absolute positions, the default, give exactly the windowed full pass. With `in_cache`, a sink is never seen from
    farther away than the cache is long, as in StreamingLLM: then a stream can outgrow the distances met in training.

    Args:
        shape: (n_layer, B, n_kv_head, S, D); S = n_sink + window.
        like: a tensor with the device and the dtype of the cache.
        n_sink: first positions that are kept for ever.
        n_pad: (B,) how many tokens at the left of each row are padding; None for none.
        frequency: (D/2,) of rope, to use positions in the cache; None for absolute ones.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        like: torch.Tensor,
        n_sink: int,
        n_pad: torch.Tensor | None = None,
        frequency: torch.Tensor | None = None,
    ) -> None:
        super().__init__(shape, like, n_pad)
        _, batch_size, _, n_slots, _ = shape
        self.n_sink, self.window, self.frequency = n_sink, n_slots - n_sink, frequency
        # The position that each slot holds. Empty slots stand in the future, where nobody looks.
        empty = torch.iinfo(torch.long).max
        self.held = torch.full((batch_size, n_slots), empty, device=like.device)  # (B, S)

    def key_positions(self, T: int) -> torch.Tensor:
        """Positions of the keys that `update` will return: the slots', then those of the T new tokens, (B, S + T)."""
        return torch.cat([self.held, self.positions(T).expand(len(self.held), T)], dim=1)

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store keys and values of the next T tokens, (B, n_kv_head, T, D) each; return old slots and new tokens.

        The new tokens are returned beside the slots and not in them: the first of many must still see what the last of
        them overwrites.

        Raises:
            ValueError: several tokens at once where each needs its own distance to the sinks.
        """
        T = k.shape[2]
        keys = torch.cat([self.k[layer], k], dim=2)  # (B, n_kv_head, S, D) and (.., T, D) -> (.., S + T, D)
        values = torch.cat([self.v[layer], v], dim=2)
        if self.frequency is not None and self.n_sink:
            keys[:, :, : self.n_sink] = self._move_sinks(keys[:, :, : self.n_sink], T)
        for start in range(0, T, self.window):  # at most `window` at once, so that no two want the same slot
            piece = slice(start, start + self.window)
            slot = self._slots(self.positions(T)[:, piece])[:, None, :, None].expand_as(k[:, :, piece])
            self.k[layer].scatter_(2, slot, k[:, :, piece])
            self.v[layer].scatter_(2, slot, v[:, :, piece])
        return keys, values

    def advance(self, T: int) -> None:
        """Count T tokens as stored, once every layer has stored them."""
        positions = self.positions(T).expand(len(self.held), T)
        for piece in positions.split(self.window, dim=1):
            self.held.scatter_(1, self._slots(piece), piece)
        self.length += T

    def _slots(self, positions: torch.Tensor) -> torch.Tensor:
        """The slot that keeps each position, (B, T) -> (B, T)."""
        ring = self.n_sink + (positions - self.n_sink) % self.window
        slots = torch.where((positions >= 0) & (positions < self.n_sink), positions, ring)
        return slots.expand(len(self.held), -1)

    def _move_sinks(self, sinks: torch.Tensor, T: int) -> torch.Tensor:
        """Turn the sinks' keys on, to stand right before the window: rope(rope(k, p), gap) = rope(k, p + gap).

        Args:
            sinks: (B, n_kv_head, n_sink, D) keys, turned to their absolute positions.
            T: number of new tokens.
        """
        gap = (self.positions(T)[:, -1:] - (self.n_sink + self.window - 1)).clamp(min=0)  # (1 or B, 1)
        if T > 1 and gap.max() > 0:
            raise ValueError("positions in the cache differ from token to token: give one at a time once it is full")
        return rope(sinks, *rope_angles(gap, self.frequency))
