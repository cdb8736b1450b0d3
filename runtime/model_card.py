"""The README.md of a checkpoint, which the Hugging Face hub shows with the model."""

import json
from pathlib import Path

CARD = """---
library_name: transformers
pipeline_tag: text-generation
# license: fill in, for example mit
---
# GPT-2 with {n_layer} layers, {n_head} heads, {n_embd} channels

{origin}, on {tokens:,} tokens of `{data}`. License: fill in one that the data allow.

| step | validation loss (nats per token) | bits per byte | HellaSwag accuracy |
|---|---|---|---|
{rows}

`steps.csv` has the training loss of each step. The recipe:

```json
{options}
```
"""


def model_card(record: dict, log: bytes) -> str:
    """Return the card of a checkpoint, from its record and its log.txt: data, losses, recipe, a license to fill in."""
    config, results = record["config"], {}
    for step, name, value in map(str.split, log.decode().splitlines()):
        if name != "train":
            results.setdefault(step, {})[name] = f"{float(value):.4f}"
    rows = [" | ".join([step, *(r.get(name, "") for name in ("val", "bpb", "hella"))]) for step, r in results.items()]
    start, names = config["init_from"], {key: Path(config[key] or "").name for key in ("data", "resume", "log_dir")}
    if start and Path(start).exists():  # no name on the hub
        names["init_from"] = start = Path(start).name
    return CARD.format(
        **config | names,
        origin=f"Fine-tuned from {start}" if start else "Trained",
        tokens=record["step"] * config["total_batch_size"],
        rows="\n".join(f"| {row} |" for row in rows),
        options=json.dumps(config | names, indent=1),
    )
