"""How large a model is; symbols as in `models.transformer`, T the positions of a row."""

from typing import NamedTuple


class Size(NamedTuple):
    """Parameters by what they are for, and FLOPs (a multiply-add counts two) of one token.

    Attention counts causally: half of the square of scores (Hoffmann et al. 2022, appendix F).
    """

    table: int  # all with a row for each id: token table, the head if it is not tied
    positions: int  # position table
    blocks: int  # layers and final norm
    forward_flops: float

    @property
    def total(self) -> int:
        """All parameters."""
        return self.table + self.positions + self.blocks

    @property
    def flops(self) -> float:
        """FLOPs of one token in training; the backward pass has two products for each one."""
        return 3 * self.forward_flops
