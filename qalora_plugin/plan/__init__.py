"""Memory and disk space of a training run, planned from a model's config.json alone.

The modules in the order of the work: `settings` (the run), `shapes` (the models without numbers),
`simulate` (live bytes of one training step), `memory` (bytes by part), `table` (the plan as text).
"""

from typing import TYPE_CHECKING

from qalora_kernels.lazy import lazy_names

from .settings import PlanSettings

if TYPE_CHECKING:
    from .memory import MethodPlan, plan, plan_method
    from .shapes import ModelShape, count_parameters, load_shape

__all__ = [
    "MethodPlan",
    "ModelShape",
    "PlanSettings",
    "count_parameters",
    "load_shape",
    "plan",
    "plan_method",
]

__getattr__ = lazy_names(
    __name__,
    {
        "MethodPlan": ".memory",
        "ModelShape": ".shapes",
        "count_parameters": ".shapes",
        "load_shape": ".shapes",
        "plan": ".memory",
        "plan_method": ".memory",
    },
)
