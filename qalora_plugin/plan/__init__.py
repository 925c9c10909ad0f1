"""Memory and disk space of a training run, from a model's config.json alone."""

from .memory import MethodPlan, plan, plan_method
from .settings import PlanSettings
from .shapes import ModelShape, load_shape

__all__ = ["MethodPlan", "ModelShape", "PlanSettings", "load_shape", "plan", "plan_method"]
