"""README.md of an exported model: what it is, how it was trained, how it is loaded."""

from __future__ import annotations

import math

from megascale.checkpoint.manifest import Manifest
from megascale.config.schema import Config
from megascale.hf.family import Family

_TEMPLATE = """---
library_name: transformers
pipeline_tag: {pipeline_tag}
tags:
- megascale
- {family}
---

# {title}

A {architecture} with {parameters:,} parameters, pretrained with {program}.

| | |
|---|---|
| layers | {layers} |
| hidden size | {hidden} |
| heads (query / key and value) | {heads} / {kv_heads} |
| context | {length} tokens |
| vocabulary | {vocab} |
| objective | {objective} |
| training | {training} |
| precision of training | {precision} |

```python
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("path/of/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")
```

What it was trained on, what it is meant for and where it fails is for its authors to add here.
"""

_SENTENCE_OBJECTIVES = {
    "nsp": "next sentence (logit 1: the second is from another document)",
    "sop": "sentence order (logit 1: the two are swapped)",
}


def model_card(manifest: Manifest, config: Config, family: Family) -> str:
    """The card of a checkpoint that is written as `family`."""
    model = config.model
    train = manifest.state.get("train")
    training = "none here: imported weights"
    if train is not None:
        training = f"{train['step']:,} steps, {train['tokens_seen']:,} tokens"
    architecture, auto_class = family.loaded_by(manifest.parameters)
    objectives = ["next token" if family.continues_texts else "masked tokens"]
    if config.data.sentence_objective != "none":
        objectives.append(_SENTENCE_OBJECTIVES[config.data.sentence_objective])
    return _TEMPLATE.format(
        family=family.model_type,
        pipeline_tag=family.pipeline_tag,
        auto_class=auto_class,
        title=f"{family.model_type} of step {manifest.step}",
        architecture=architecture,
        parameters=sum(math.prod(shape) for shape in manifest.parameters.values()),
        program=manifest.written_by,
        layers=model.num_layers,
        hidden=model.hidden_size,
        heads=model.num_attention_heads,
        kv_heads=model.resolved_num_kv_heads,
        length=model.seq_length,
        vocab=model.vocab_size,
        objective=", ".join(objectives),
        training=training,
        precision=config.precision.dtype,
    )
