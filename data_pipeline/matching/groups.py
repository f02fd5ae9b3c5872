"""Groups of clips that show the same footage, by union and find; each knows which of its members are mirrored."""

from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

Member = TypeVar("Member", bound=Hashable)


class Groups(Generic[Member]):
    """Whoever was never joined is a group alone."""

    def __init__(self) -> None:
        self._parent: dict[Member, Member] = {}
        self._turned: dict[Member, bool] = {}  # against its parent

    def find(self, member: Member) -> tuple[Member, bool]:
        """(who stands for the group, whether the member is mirrored against it)."""
        way = [member]
        while (parent := self._parent.get(way[-1], way[-1])) != way[-1]:
            way.append(parent)
        root, turned = way.pop(), False
        for each in reversed(way):  # whoever is on the way points to the root afterwards
            turned ^= self._turned[each]
            self._parent[each], self._turned[each] = root, turned
        return root, turned

    def join(self, one: Member, two: Member, *, mirrored: bool) -> None:
        """Both show the same; of members of one group that is known already."""
        (root, turned), (other, other_turned) = self.find(one), self.find(two)
        if root != other:
            self._parent[other], self._turned[other] = root, turned ^ other_turned ^ mirrored

    def of(self, members: Iterable[Member]) -> dict[Member, list[Member]]:
        """Who stands for a group -> its members, in the order given."""
        found: dict[Member, list[Member]] = {}
        for member in members:
            found.setdefault(self.find(member)[0], []).append(member)
        return found
