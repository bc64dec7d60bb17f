"""The conformance suite: what every attention must do, whoever wrote it.

>>> from astbench_registry.conformance import check
>>> {result.status for result in check("dense", properties=["causality"])}
{'pass'}
"""

from astbench_registry.conformance.suite import PROPERTIES, Result, buildable, check, check_module

__all__ = ["PROPERTIES", "Result", "buildable", "check", "check_module"]
