"""Make QALORA a PEFT method: a member of PEFT's enum, and an entry in its tables.

PEFT's `register_peft_method` wants a `PeftType` that exists, and PEFT has no entry points: so the
enum is extended here, which works the same on Python 3.11 and 3.12, and `import qalora_plugin` is
needed before an adapter is loaded.
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.peft_types import PeftType, register_peft_method

from ..errors import ConfigError
from . import counting
from .config import PEFT_TYPE, QALoRAConfig
from .model import QALoRAModel


def _extend_enum() -> None:
    """Add PeftType.QALORA, as enum's own machinery would have made it."""
    member = str.__new__(PeftType, PEFT_TYPE)
    member._name_ = PEFT_TYPE
    member._value_ = PEFT_TYPE
    member._sort_order_ = len(PeftType._member_names_)
    member.__objclass__ = PeftType
    PeftType._member_names_.append(PEFT_TYPE)
    PeftType._member_map_[PEFT_TYPE] = member
    PeftType._value2member_map_[PEFT_TYPE] = member
    type.__setattr__(PeftType, PEFT_TYPE, member)  # EnumType refuses a plain assignment


def register() -> None:
    """Register the method with PEFT; a second call does nothing.

    Raises:
        ConfigError: another package has registered a method of this name.
    """
    counting.install()
    if PEFT_TYPE not in PeftType.__members__:
        _extend_enum()
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType(PEFT_TYPE))
    if registered is QALoRAConfig:
        return
    if registered is not None:
        raise ConfigError(
            f"PEFT already has a method {PEFT_TYPE}: {registered.__module__}."
            f"{registered.__qualname__}; remove the package that registers it"
        )
    register_peft_method(
        name=PEFT_TYPE.lower(),
        config_cls=QALoRAConfig,
        model_cls=QALoRAModel,
        prefix=QALoRAModel.prefix,
    )
