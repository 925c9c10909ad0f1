"""Memory and disk space of a training run, planned from a model's config.json alone.

The modules in the order of the work: `settings` (the run), `shapes` (the models without numbers),
`simulate` (live bytes of one training step), `memory` (bytes by part), `table` (the plan as text).
"""

from .memory import MethodPlan, plan, plan_method
from .settings import PlanSettings
from .shapes import ModelShape, load_shape

__all__ = ["MethodPlan", "ModelShape", "PlanSettings", "load_shape", "plan", "plan_method"]
