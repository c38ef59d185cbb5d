"""Low precision: formats, quantised linear layers, and the model that steps without a log-prob run."""

from flowgrpo_fast.precision.apply import LowPrecisionModel, build_low_precision
from flowgrpo_fast.precision.formats import FORMATS, Format, Lora
from flowgrpo_fast.precision.linear import QuantizedLinear
from flowgrpo_fast.precision.rules import check_masters, check_recipe, check_training_precision

__all__ = [
    "FORMATS",
    "Format",
    "Lora",
    "LowPrecisionModel",
    "QuantizedLinear",
    "build_low_precision",
    "check_masters",
    "check_recipe",
    "check_training_precision",
]
