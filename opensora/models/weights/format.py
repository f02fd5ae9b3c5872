"""What a family of models says of its weights in files, and of adapters for them: one object in its ``convert.py``.

A *layout* is one way to name and order the same weights, as those of two releases. Everything else about files
(shards, prefixes, types, parts of tensors, kinds of adapters) is the same for every family and stands in this folder.
"""

from collections.abc import Collection, Mapping
from typing import Any, Protocol, TypeAlias

from opensora.models.weights.rows import Shape, Target

# The family's own frozen value. ``metadata()`` gives what safetensors files say of it: dict[str, str]. It may hold what
# a conversion must know of the configuration beside the shapes, as the length of an empty prompt.
Layout: TypeAlias = Any


class WeightFormat(Protocol):
    """Names are without any prefix and without the names of wrappers; shapes are by name."""

    top_level: tuple[str, ...]  # first words of its names, in every layout; what stands before them is a prefix
    original: Layout  # of the first release, which other tools read
    may_lack: tuple[str, ...]  # patterns: what training may draw where the file to start from lacks it
    recomputed: tuple[str, ...]  # patterns: what files hold and the model computes, as tables of positions
    torch_keys: tuple[str, ...] | None  # where a checkpoint of torch.save has the weights; None: none is ever read
    advice: str  # what to do about a file that does not fit the model
    example_layer: str  # how a layer is called that an adapter may be for
    # ``diffusers``: optional, the layout of diffusers' model of the family, in which adapters are exchanged too
    # ``layouts``: optional, those that weights may be written in, by name; there too ``diffusers`` is that of diffusers
    # ``exports_original``: optional, True where exports are in ``original``; then every tensor is made of one
    # ``aliases(known)``: optional, other names that tools have for layers -> the name in ``known``, of adapters
    # ``of_some_sizes``: optional, a regular expression of layers that some sizes lack: adapters of these are left out
    # with a word
    # ``of_some_widths``: optional, likewise of layers that read more in some sizes, where the inputs do not fit

    def layout(self, cfg: Any) -> Layout:
        """How the model of a configuration names and orders its weights."""

    def detect_layout(self, names: Collection[str], metadata: Mapping[str, str]) -> Layout:
        """The layout of a file, by what its metadata states, else by its names.

        Raises:
            UserError: metadata that states no layout of this family.
        """

    def targets(self, shapes: Mapping[str, Shape], source: Layout, to: Layout) -> dict[str, Target]:
        """What every tensor of layout ``to`` is made of, if these tensors are in layout ``source``.

        All of them are used: what is strange passes as it is, so that an error can name it.

        Raises:
            UserError: they are of another family.
        """

    def other_format(self, names: Collection[str]) -> str | None:
        """What a file is that holds such a model under names that are not read, and what to do; None: it is none."""

    def adapter_layout(self, layers: Collection[str], metadata: Mapping[str, str]) -> tuple[Layout, bool]:
        """The layout that adapters of these layers were made for, and whether that is a guess from their names."""

    def adapter_targets(self, shapes: Mapping[str, Shape], layout: Layout, source: Layout) -> dict[str, Target]:
        """Weights that adapters may be for, under every name of every layout, with rows in the order of ``source``.

        Args:
            shapes: of all parameters of the model, in ``layout``.
            source: decides on the order alone, and on what a name means that several layouts have; never on which
                names there are, since it is found by them.

        Returns:
            Name in a file of adapters, with ``.weight`` -> which rows of the model's weights it is.
        """

    def describe_guess(self, source: Layout, to: Layout) -> str:
        """What to say of a layout of adapters that was guessed, where rows changed places by it."""
