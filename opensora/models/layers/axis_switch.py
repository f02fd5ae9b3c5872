"""Where a model that keeps time and space apart changes from the one to the other."""

from typing import Any

from torch import Tensor, nn


class AxisSwitch(nn.Module):
    """The identity on (B, T, S, ...), whatever is cut; a name for what spreads tokens over processes to replace.

    A model calls one before what runs along space (``axis_switches`` says "space" of it) and one behind ("time"), with
    everything that has a row per frame and place: between them T and S of a process are others than outside.
    """

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        """``context``: what the model's forward was given."""
        return x
