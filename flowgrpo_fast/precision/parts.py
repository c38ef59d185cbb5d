"""Parts of a recipe: in which precision the steps without a log-prob run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from flowgrpo_fast.checks import one_of, require
from flowgrpo_fast.precision.apply import Chosen, LowPrecisionModel, build_low_precision
from flowgrpo_fast.precision.formats import FORMATS
from flowgrpo_fast.types import FlowModel


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPrecision:
    """As in the update: `Machine.precision` and nothing less."""

    # As of `LowPrecision`. Without annotations these are no fields: a run file does not set them.
    format = ""
    format_name = "bf16"
    bytes_per_weight = 0.0
    shares_base = False

    def build(self, model: FlowModel) -> LowPrecisionModel | None:
        """None: these steps run the training model."""
        return None

    def check_replay(self, same_batches: bool) -> None:
        """Rollout and replay run one precision, whatever their batches."""

    def low_share(self, linear: float, adapted: float) -> float:
        """All linear layers run in `format_name`."""
        return 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LowPrecision:
    """Linear layers in FP8 or FP4. Only steps without a log-prob may use it.

    `mode` trades speed for a faithful update (docs/precision.md): "merged": a copy with the adapter merged in,
    refreshed in place after every update; "bare_layers": only layers without an adapter; "branch": frozen base in
    low precision, the adapter beside it in the precision of the update; "shared_base": one low-precision base in
    rollout and update.
    """

    format: Literal["fp8_rows", "fp8_tensor", "fp8_blocks", "nvfp4"] = "fp8_rows"
    mode: Literal["merged", "bare_layers", "branch", "shared_base"] = "branch"
    # "all": every linear layer but the sensitive ones of the family. "published": the set that Sol-RL quantises.
    layers: Literal["all", "published"] = "all"
    skip: tuple[str, ...] = ()  # regular expressions: layers left alone, besides the family's own
    emulate: bool = True  # where the device lacks the format: dequantise and multiply, slowly; else refuse

    def __post_init__(self) -> None:
        """Known names."""
        one_of(self, ("fp8_rows", "fp8_tensor", "fp8_blocks", "nvfp4"), format=self.format)
        one_of(self, ("merged", "bare_layers", "branch", "shared_base"), mode=self.mode)
        one_of(self, ("all", "published"), layers=self.layers)

    @property
    def shares_base(self) -> bool:
        """Whether all steps, and the update's forwards, run one base in low precision."""
        return self.mode == "shared_base"

    @property
    def format_name(self) -> str:
        """The kind of matrix product, as devices state their rates: "fp8" or "fp4"."""
        return "fp4" if self.format == "nvfp4" else "fp8"

    @property
    def bytes_per_weight(self) -> float:
        """Of the low-precision form: the codes, and in FP4 a scale for 16 of them."""
        return 0.5625 if self.format == "nvfp4" else 1.0

    def build(self, model: FlowModel) -> LowPrecisionModel:
        """The low-precision model of a training model; with `shared_base` that model is changed in place.

        Raises:
            ValueError: no layer can be quantised, the family has no published set, an adapter is not plain LoRA, `skip`
                matches no layer, or the device lacks the format and `emulate` is false.
        """
        only: tuple[str, ...] = ()
        if self.layers == "published":
            only = model.published
            require(
                bool(only),
                f"LowPrecision.layers is 'published', and no set is known for {model.family()}; use layers='all'",
            )
        return build_low_precision(
            model, FORMATS[self.format], self.mode, Chosen(only, self.skip), self.emulate
        )

    def check_replay(self, same_batches: bool) -> None:
        """Refuses a shared base whose activations are scaled by batches that the replay does not see again.

        Raises:
            ValueError: names the format and the remedy.
        """
        require(
            same_batches or not (self.shares_base and FORMATS[self.format].scale_of_batch),
            f"rollout_precision: {self.format} scales activations by their whole batch, and this recipe replays other "
            "batches than it rolls out: the first ratio would not be 1. Use fp8_rows or fp8_blocks, or another mode",
        )

    def low_share(self, linear: float, adapted: float) -> float:
        """Share of the work in linear layers that it covers, where `adapted` of `linear` is in layers with adapters."""
        return 1 - adapted / linear if self.mode == "bare_layers" and linear else 1.0


RolloutPrecision: TypeAlias = TrainingPrecision | LowPrecision
