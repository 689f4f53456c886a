"""Units of all models merged many to many: which can be, how they cluster, and the search."""

from alloy.alignment.zip.search import ZipPlan, ZipSearch, check_sizes, plan
from alloy.alignment.zip.units import zip_units

__all__ = ["ZipPlan", "ZipSearch", "check_sizes", "plan", "zip_units"]
