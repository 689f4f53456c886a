"""Parts of models become one trunk: the towers of one checkpoint, or of several.

`plan_trunk` finds what corresponds in the members, from names and symmetries, and refuses what
cannot be one. `merge_trunk` merges it by an average, RegMean or sequential least squares, in the
gauge in which that costs least if asked. The result is a model of the original class, in which the
parts own the same parameters (`alloy.modality.sharing`). No architecture is written down.
"""

from alloy.trunk.distill import distil
from alloy.trunk.members import Member
from alloy.trunk.merging import METHODS, Trunk, merge_trunk
from alloy.trunk.plan import TrunkPlan, plan_trunk

__all__ = ["METHODS", "Member", "Trunk", "TrunkPlan", "distil", "merge_trunk", "plan_trunk"]
