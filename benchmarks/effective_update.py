"""What low precision leaves of an update, and what it adds to a log-prob: numerics, no speed.

python benchmarks/effective_update.py            writes benchmarks/results/precision_cpu.json (about two minutes)
python benchmarks/effective_update.py --page     writes its tables into docs/precision.md

"Effective update" of a weight W and a LoRA's change dW is f(W + dW) - f(W) as the layer, or the model, acts: its cosine
with the exact change, and the norm of the difference relative to it.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


from benchmarks.rows import machine  # noqa: E402
from benchmarks.trainer_loop import drawn, kept_steps  # noqa: E402
from flowgrpo_fast.models import digits  # noqa: E402
from flowgrpo_fast.ops import flow_log_prob  # noqa: E402
from flowgrpo_fast.precision import FORMATS  # noqa: E402
from flowgrpo_fast.precision.adapters import linear_layers  # noqa: E402
from flowgrpo_fast.recipe import LowPrecision  # noqa: E402
from flowgrpo_fast.recipes import digits as on_digits  # noqa: E402
from flowgrpo_fast.recipes.trajectory import flow_grpo  # noqa: E402
from flowgrpo_fast.sampling.policy import Policy  # noqa: E402
from flowgrpo_fast.sampling.step import row_slices  # noqa: E402
from flowgrpo_fast.sampling.walk import Sampler, walk  # noqa: E402
from flowgrpo_fast.types import Conditioning, FlowModel, Trajectory  # noqa: E402

RESULT = ROOT / "benchmarks/results/precision_cpu.json"
PAGE = ROOT / "docs/precision.md"
SIZE, RANK, TOKENS = 1536, 32, 512
SHARES = (1e-3, 3e-3, 1e-2, 3e-2)  # ||dW|| / ||W||
MODES = ("merged", "bare_layers", "branch", "shared_base")
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
LAYER_ARMS = ("merged bf16", *(f"merged {name}" for name in FORMATS))
MARKS = "<!-- {}: written by benchmarks/effective_update.py -->"


class OneLayer(FlowModel):
    """A layer with an adapter, dressed as a model."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module


def compared(got: Tensor, exact: Tensor) -> dict[str, float]:
    """Cosine, relative error, and slope: how much of the exact change is in the effective one."""
    got, exact = got.double().flatten(), exact.double().flatten()
    dot = torch.dot(got, exact)
    values = {
        "cosine": dot / (got.norm() * exact.norm()),
        "error": (got - exact).norm() / exact.norm(),
        "slope": dot / exact.norm().square(),
    }
    return {name: round(float(value), 4) for name, value in values.items()}


def layer_rows() -> list[dict[str, Any]]:
    """A 1536 x 1536 layer, weights merged; inputs exact, so that weights alone count."""
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(SIZE, SIZE)
    a, b = torch.randn(RANK, SIZE), torch.randn(SIZE, RANK)
    unit = (b @ a) * (weight.norm() / (b @ a).norm())
    inputs = {"random": torch.randn(TOKENS, SIZE), "aligned": torch.randn(TOKENS, RANK) @ a}
    rows = []
    for share in SHARES:
        changed = weight + share * unit
        acting = {"merged bf16": changed.bfloat16().float() - weight.bfloat16().float()}
        for name, form in FORMATS.items():
            values = []
            for each in (changed, weight):
                stored = form.empty(SIZE, SIZE, each.device)
                form.write_(stored, each)
                values.append(form.values(stored, torch.float32))
            acting[f"merged {name}"] = values[0] - values[1]
        for arm, change in acting.items():
            for kind, x in inputs.items():
                rows.append(
                    {
                        "share": share,
                        "arm": arm,
                        "inputs": kind,
                        **compared(x @ change.t(), x @ (share * unit).t()),
                    }
                )
    return rows


def mode_rows() -> list[dict[str, Any]]:
    """The same layer as each mode runs it, activations quantised too, results in fp32 or bf16."""
    rows = []
    for share in SHARES:
        torch.manual_seed(0)
        plain = nn.ModuleDict({"adapted": nn.Linear(SIZE, SIZE, bias=False), "bare": nn.Linear(SIZE, SIZE)})
        plain.requires_grad_(False)
        weight = plain["adapted"].weight.data.normal_(0, 0.02)
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["adapted"])
        module = inject_adapter_in_model(config, plain)
        a, b = (getattr(module["adapted"], name)["default"].weight for name in ("lora_A", "lora_B"))
        b.data.normal_()
        change = b.data @ a.data
        b.data *= share * weight.norm() / change.norm()
        grown, change = b.data.clone(), b.data @ a.data
        x = torch.randn(TOKENS, SIZE)
        exact = x.double() @ change.double().t()
        parts = [("training model", None)]
        parts += [
            (f"{mode} {name}", LowPrecision(mode=mode, format=name)) for mode in MODES for name in FORMATS
        ]
        for arm, part in parts:
            model: Any = OneLayer(copy.deepcopy(module))
            low = None if part is None else part.build(model)
            acting = model if low is None else low.model
            trained = model.module["adapted"].lora_B["default"].weight.data
            for precision in ("fp32", "bf16"):
                outputs = []
                for scale in (1.0, 0.0):
                    trained.copy_(scale * grown)
                    if low is not None:
                        low.refresh()
                    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                        outputs.append(acting.module["adapted"](x).float())
                row = compared(outputs[0] - outputs[1], exact)
                rows.append({"share": share, "arm": arm, "precision": precision, **row})
    return rows


def digits_model(share: float) -> Any:
    """The shipped digits, a LoRA of rank 4 on their attention, every change `share` of its weight's norm."""
    model = digits.shipped()
    model.module.requires_grad_(False)
    model.module.transformer.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(1)
    for layer in linear_layers(model.transformer):
        if layer.wrapper is not None:
            a, b = layer.wrapper.lora_A["default"].weight, layer.wrapper.lora_B["default"].weight
            b.data = torch.randn(b.shape, generator=generator)
            b.data *= share * layer.linear.weight.norm() / (b.data @ a.data).norm()
    return model.module.eval() and model


def model_rows() -> list[dict[str, Any]]:
    """The velocity's change in the shipped digits model, fp32 outside the quantised layers."""
    prompts = digits.prompts() * 48
    latents = torch.randn(len(prompts), 1, 8, 8, generator=torch.Generator().manual_seed(2))
    sigma = torch.rand(len(prompts), generator=torch.Generator().manual_seed(3))
    conditioning = digits_model(0.0).encode(prompts)

    @torch.no_grad()
    def velocity(model: Any, precision: str = "fp32") -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return model.velocity(latents, sigma, conditioning).float()

    arms: list[tuple[str, str]] = [("training model", "bf16")]
    arms += [
        (mode, form) for mode in MODES for form in ("fp8_rows", "fp8_tensor", "nvfp4")
    ]  # too narrow for blocks
    rows = []
    for share in SHARES:
        models = digits_model(0.0), digits_model(share)
        start, end = (velocity(model) for model in models)
        for mode, form in arms:
            if mode == "training model":
                acted = [velocity(model, form) for model in models]
            else:
                part = LowPrecision(mode=mode, format=form)
                acted = [velocity(part.build(copy.deepcopy(model)).model) for model in models]
            row = {
                "share": share,
                "mode": mode,
                "format": form,
                "base_error": compared(acted[0], start)["error"],
            }
            row["velocity_change"] = round(float((end - start).norm() / start.norm()), 6)
            rows.append(row | compared(acted[1] - acted[0], end - start))
    return rows


def log_prob_rows() -> list[dict[str, Any]]:
    """|delta log_prob| by step had the steps with a log-prob run in low precision: rolled out there, scored again."""
    recipe = replace(on_digits(flow_grpo()), num_prompts=10, group_size=24)
    model = digits_model(0.0)
    device = torch.device("cpu")
    draws, plan = drawn(recipe, 10, 0, device), recipe.plan(0)
    conditioning = model.encode(digits.prompts()).rows(draws.prompt_index[draws.group_id])
    rows = []
    arms: dict[str, Any] = {"fp32": (model, "fp32"), "bf16": (model, "bf16")}
    for name in ("fp8_rows", "fp8_tensor", "nvfp4"):
        arms[name] = (LowPrecision(mode="branch", format=name).build(model).model, "fp32")
    for name, (acting, precision) in arms.items():
        sampler = Sampler(policy=Policy(acting, recipe.guidance_scale, precision), forwards=recipe.forwards)
        foreign = walk(sampler, plan, conditioning, draws)
        own = log_probs(Policy(model, recipe.guidance_scale), foreign, conditioning)
        delta = own - torch.stack([t.log_prob for t in foreign.transitions], 1)
        for k, step in enumerate(kept_steps(plan)):
            values = {
                "max": float(delta[:, k].abs().max()),
                "mean": float(delta[:, k].abs().mean()),
                "bias": float(delta[:, k].mean()),
            }
            rows.append(
                {"format": name, "step": step, **{key: float(f"{v:.3g}") for key, v in values.items()}}
            )
    return rows


@torch.no_grad()
def log_probs(policy: Policy, trajectory: Trajectory, conditioning: Conditioning) -> Tensor:
    """`[B, K]` of the stored transitions under another policy, in the rollout's micro-batches; no row has siblings."""
    columns = []
    for whole in trajectory.transitions:
        parts = []
        for rows in row_slices(whole.num_heads, whole.rows):
            part = whole.heads(rows)
            velocity, guidance = policy.predict(part.latents, part.sigma, conditioning.rows(rows))
            transition = (part.latents, velocity, part.next_latents, trajectory.coeffs, part.row)
            parts.append(flow_log_prob(*transition, guidance=guidance))
        columns.append(torch.cat(parts))
    return torch.stack(columns, 1)


def cell(row: dict[str, Any]) -> str:
    return f"{row['error']:.2g} / {row['cosine']:.2f}"


def three(row: dict[str, Any]) -> str:
    return f"{cell(row)} / {row['slope']:.1f}"


def tables(result: dict[str, Any]) -> dict[str, str]:
    """The page's tables, from the result."""

    def markdown(header: list[str], lines: list[list[str]]) -> str:
        return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines))

    def find(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
        return next(row for row in rows if all(row[key] == value for key, value in wanted.items()))

    layer, modes, whole, steps = (result[name] for name in ("layer", "modes", "model", "log_prob"))
    lines = [
        [f"{share:g}", kind, *(cell(find(layer, share=share, arm=arm, inputs=kind)) for arm in LAYER_ARMS)]
        for share in SHARES
        for kind in ("random", "aligned")
    ]
    found = {"layer": markdown(["change", "inputs", *LAYER_ARMS], lines)}
    arms = ["training model", *(f"{mode} fp8_rows" for mode in MODES), "merged nvfp4", "branch nvfp4"]
    lines = [
        [arm, precision, *(cell(find(modes, arm=arm, precision=precision, share=share)) for share in SHARES)]
        for arm in arms
        for precision in ("fp32", "bf16")
    ]
    found["modes"] = markdown(["", "results in", *(f"{share:g}" for share in SHARES)], lines)
    lines = [
        [row["mode"], row["format"], f"{100 * row['base_error']:.2g} %"]
        + [three(find(whole, mode=row["mode"], format=row["format"], share=share)) for share in SHARES]
        for row in whole
        if row["share"] == SHARES[0]
    ]
    header = ["mode", "format", "error before any change", *(f"{share:g}" for share in SHARES)]
    found["model"] = markdown(header, lines)
    shown = sorted({row["step"] for row in steps})[::2]
    lines = [
        [
            name,
            *(
                f"{find(steps, format=name, step=s)['mean']:.1e} / {find(steps, format=name, step=s)['max']:.1e}"
                for s in shown
            ),
        ]
        for name in ("fp32", "bf16", "fp8_rows", "fp8_tensor", "nvfp4")
    ]
    found["log_prob"] = markdown(["", *(f"step {step}" for step in shown)], lines)
    return found


def with_tables(page: str, result: dict[str, Any]) -> str:
    """The page with each table between its marks replaced."""
    for name, table in tables(result).items():
        mark = MARKS.format(name)
        before, old, after = page.partition(mark)
        assert old, f"the page has no mark for {name}"
        page = f"{before}{mark}\n\n{table}\n\n{after[after.index('<!-- end -->') :]}"
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--page", action="store_true", help="write the tables into docs/precision.md")
    if not parser.parse_args().page:
        warnings.simplefilter("ignore", RuntimeWarning)
        about = machine(torch.device("cpu"))
        result = {
            "command": "python benchmarks/effective_update.py",
            "machine": {key: about[key] for key in ("date", "device", "cores", "isa", "torch")},
            "layer": layer_rows(),
            "modes": mode_rows(),
            "model": model_rows(),
            "log_prob": log_prob_rows(),
        }
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    result = json.loads(RESULT.read_text())
    if PAGE.exists():
        PAGE.write_text(with_tables(PAGE.read_text(), result))
    for name, table in tables(result).items():
        print(f"\n{name}\n{table}")


if __name__ == "__main__":
    main()
