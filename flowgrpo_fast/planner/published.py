"""Published pipelines as data: the `config.json` of each part, shortened to what differs from diffusers' defaults.

`published.json` holds them. A part is a class of diffusers or transformers and its configuration, or the name of one
that several pipelines have (of Qwen2.5-VL the language half; each `AutoencoderKL` has a shift of its own, which is
added whatever it is). `tokens` is how many text tokens the transformer sees at its usual prompt length (SD3's: 77 of
CLIP beside 128 of T5, as Flow-GRPO trains), `names` where the weights are published, `options` what the pipeline is
told besides its parts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeAlias

Part: TypeAlias = tuple[str, dict[str, Any]]


def _read() -> dict[str, dict[str, Any]]:
    content = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))

    def part(entry: str | list[Any]) -> Part:
        kind, config = content["parts"][entry] if isinstance(entry, str) else entry
        return kind, config

    models: dict[str, dict[str, Any]] = content["models"]
    for entry in models.values():
        entry |= {
            name: part(entry[name]) for name in ("transformer", "transformer_2", "vae") if name in entry
        }
        entry["text_encoders"] = tuple(part(encoder) for encoder in entry["text_encoders"])
    return models


PUBLISHED: dict[str, dict[str, Any]] = _read()
