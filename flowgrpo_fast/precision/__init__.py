"""Low precision: formats, quantised linear layers, and the model that steps without a log-prob run."""

from flowgrpo_fast.precision.apply import LowPrecisionModel
from flowgrpo_fast.precision.formats import FORMATS, Format, Lora
from flowgrpo_fast.precision.linear import QuantizedLinear
from flowgrpo_fast.precision.parts import LowPrecision, RolloutPrecision, TrainingPrecision
from flowgrpo_fast.precision.rules import check_masters, check_training_precision

__all__ = [
    "FORMATS",
    "Format",
    "Lora",
    "LowPrecision",
    "LowPrecisionModel",
    "QuantizedLinear",
    "RolloutPrecision",
    "TrainingPrecision",
    "check_masters",
    "check_training_precision",
]
