"""Features of the prompts seen last, within a bound of memory; those of the empty prompt stay."""

from collections import OrderedDict
from typing import TypeAlias

from torch import Tensor

Key: TypeAlias = tuple[str, int]  # a prompt, and the tokens that it is padded to
Row: TypeAlias = tuple[Tensor, ...]  # its features, as (N, D) tokens and a (V,) pooled vector


class PromptCache:
    """Least recently used first out."""

    def __init__(self, most_bytes: int) -> None:
        self._most, self._held = most_bytes, 0
        self._rows: OrderedDict[Key, Row] = OrderedDict()
        self._null: dict[Key, Row] = {}  # guidance and dropout ask for it at every step

    def get(self, key: Key) -> Row | None:
        """The features of a prompt, if they are kept."""
        if key in self._rows:
            self._rows.move_to_end(key)
        return self._rows.get(key) or self._null.get(key)

    def put(self, key: Key, row: Row) -> None:
        """Keep the features of a prompt that are not kept yet."""
        if not key[0]:
            self._null[key] = row
            return
        self._rows[key] = row
        self._held += _bytes(row)
        while self._held > self._most:
            _, oldest = self._rows.popitem(last=False)
            self._held -= _bytes(oldest)


def _bytes(row: Row) -> int:
    return sum(tensor.nbytes for tensor in row)
