"""`QALoRAQuantConfig` as transformers takes it: what `from_pretrained` is given."""

from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoint import config as stored


class QALoRAQuantConfig(stored.QALoRAQuantConfig, QuantizationConfigMixin):  # noqa: D101
    __doc__ = stored.QALoRAQuantConfig.__doc__

    @classmethod
    def of(cls, config: stored.QALoRAQuantConfig) -> "QALoRAQuantConfig":
        """Return the config of a checkpoint as transformers takes it; it shares no value."""
        return cls(**config.to_dict())
