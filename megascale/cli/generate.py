"""`megascale generate CKPT --prompt ...`: continue a text with a trained model."""

from __future__ import annotations

from typing import Annotated

import typer

from megascale.cli.evaluate import CheckpointFolder, Device, Weights


def generate(
    checkpoint: CheckpointFolder,
    prompt: Annotated[list[str], typer.Option(help="Text to continue; may be repeated.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 100,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="0 means all tokens.")] = 0,
    top_p: Annotated[float, typer.Option(help="1 means all tokens.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    weights: Weights = "trained",
    device: Device = "auto",
) -> None:
    """Generate text from a checkpoint."""
    from megascale.launcher.environment import process_info
    from megascale.launcher.rendezvous import choose_device
    from megascale.training.continuation import continue_prompts
    from megascale.training.generation import Sampling

    texts = continue_prompts(
        checkpoint,
        prompt,
        choose_device(device, process_info()),
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_k, top_p),
        seed=seed,
        weights=weights,
    )
    for text in texts:
        typer.echo(text)
