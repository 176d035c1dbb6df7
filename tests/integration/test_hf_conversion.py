"""Models of transformers in, trained on, and out again; logits equal at every station."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megascale.checkpoint.reader import CheckpointReader
from megascale.cli.convert import _shapes
from megascale.config.load import load_config
from megascale.hf.exporting import export_model
from megascale.hf.importing import import_model
from megascale.training.inference import LoadedModel
from tests.distributed import Pools
from tests.hf_models import TINY, save_model, tiny_model, token_ids
from tests.integration.runs import call, clean_environment, make_dataset, make_tokenizer, metrics

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def logits_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def assert_equal_logits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    scale = theirs.abs().max().item()
    assert (ours - theirs).abs().max().item() <= 1e-5 * scale


@pytest.mark.parametrize("family", TINY)
def test_in_and_out_keeps_logits(family: str, tokenizer: Path, tmp_path: Path) -> None:
    reference, ids = tiny_model(family), token_ids()
    expected = logits_of(reference, ids)
    folder = save_model(reference, tmp_path / "theirs", tokenizer)
    assert (folder / "model.safetensors.index.json").exists()
    imported = import_model(str(folder), str(tmp_path / "ours"), _shapes)
    assert imported.num_parameters == sum(p.numel() for p in reference.parameters())
    loaded = LoadedModel(imported.checkpoint, CPU)
    with torch.no_grad():
        assert_equal_logits(loaded.module.logits(ids), expected)  # type: ignore[operator]
    config = load_config(imported.config_file, ["data.path=given"])
    assert config.model == loaded.config.model
    assert config.checkpoint.init_from == imported.checkpoint

    out = str(tmp_path / "again")
    reader = CheckpointReader(imported.checkpoint)
    done = export_model(reader, loaded.tokenizer, out, family_name=family, shard_bytes=20_000)
    assert done.num_files > 1
    assert done.num_parameters == imported.num_parameters
    back, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert type(back) is type(reference)
    assert back.dtype == torch.float32
    assert_equal_logits(logits_of(back.eval(), ids), expected)
    text = "the quick brown fox, 123"
    encoded = AutoTokenizer.from_pretrained(out)(text)["input_ids"]
    assert loaded.tokenizer is not None
    assert encoded == loaded.tokenizer.encode_batch([text])[0]
    # a second import of what was exported gives the same files of weights
    again = import_model(out, str(tmp_path / "twice"), _shapes)
    first, second = (
        {file.path: file.xxh3_128 for file in CheckpointReader(path).manifest.files}
        for path in (imported.checkpoint, again.checkpoint)
    )
    assert first["weights_00000.safetensors"] == second["weights_00000.safetensors"]


def test_weights_without_the_head_and_in_half_precision(tokenizer: Path, tmp_path: Path) -> None:
    """A GPT-2 as it was published: names without "transformer.", buffers of masks, fp16 here."""
    from safetensors.torch import save_file

    reference, ids = tiny_model("gpt2"), token_ids()
    save_model(reference, tmp_path / "theirs", tokenizer)
    for file in (tmp_path / "theirs").glob("*.safetensors*"):
        file.unlink()
    tensors = {n.removeprefix("transformer."): p.half() for n, p in reference.named_parameters()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    tensors["h.1.attn.masked_bias"] = torch.tensor(-1e4)
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    save_file(tensors, tmp_path / "theirs" / "model.safetensors")
    done = import_model(str(tmp_path / "theirs"), str(tmp_path / "ours"), _shapes)
    reader = CheckpointReader(done.checkpoint)
    size = next(f.bytes for f in reader.manifest.files if f.path.endswith(".safetensors"))
    assert 2 * done.num_parameters < size < 3 * done.num_parameters
    expected = logits_of(reference.half().float(), ids)
    with torch.no_grad():
        ours = LoadedModel(done.checkpoint, CPU).module.logits(ids)  # type: ignore[operator]
    assert_equal_logits(ours, expected)
    export_model(reader, None, str(tmp_path / "bf16"), dtype=torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16")
    assert loaded.dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["gemma2"])
def test_from_hf_train_to_hf(family: str, tokenizer: Path, tmp_path: Path, pools: Pools) -> None:
    """The commands as a user types them; the training on a rank of the pool."""
    folder = save_model(tiny_model(family), tmp_path / "theirs", tokenizer)
    data = make_dataset(tmp_path, tokenizer)
    done = call("convert", "from-hf", folder, tmp_path / "ours", "--dtype", "fp32")
    assert done.code == 0, done.output
    assert "train on from it: megascale train " in done.stdout
    changes = [f"data.path={data}", "train.max_steps=3", "model.seq_length=16"]
    changes += ["train.global_batch_size=4", "logging.tensorboard=false", "optimizer.lr=1e-2"]
    ((first, second),) = pools(1).run(
        train_on, config=str(tmp_path / "ours" / "config.yaml"), changes=changes
    )
    assert first == pytest.approx(second)  # the loss before training is that of the import
    lines = metrics(tmp_path / "ours" / "run")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[-1]["loss"] < lines[0]["loss"]

    checkpoint = tmp_path / "ours" / "run" / "checkpoints" / "step_00000003"
    done = call("convert", "to-hf", checkpoint, tmp_path / "out", "--shard-size", "30KB")
    assert done.code == 0, done.output
    assert f"{tmp_path / 'out'}: {family}, " in done.stdout
    ids = token_ids(length=16)
    loaded = LoadedModel(str(checkpoint), CPU)
    with torch.no_grad():
        ours = loaded.module.logits(ids)  # type: ignore[operator]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert_equal_logits(ours, logits_of(theirs, ids))
    assert theirs.config.eos_token_id == loaded.tokenizer.eod_id  # type: ignore[union-attr]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<|endoftext|>"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "3 steps, 192 tokens" in card
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == loaded.tokenizer.eod_id  # type: ignore[union-attr]


def train_on(config: str, changes: list[str]) -> tuple[float, float]:
    """Runs on the rank: train, and give the first loss and that of the imported weights."""
    from megascale.config.schema import Config
    from megascale.training.assemble import assemble

    loaded: Config = load_config(config, changes, world_size=1)
    started = assemble(loaded, CPU)
    batches = started.trainer.parts.loader.load(0)
    imported = LoadedModel(str(loaded.checkpoint.init_from), CPU)
    with torch.no_grad():
        sums = imported.forward(batches)
    expected = float(sum(loss for loss, _ in sums) / sum(count for _, count in sums))
    started.trainer.fit()
    started.engine.close()
    first = metrics(Path(loaded.run.output_dir))[0]["loss"]
    return first, expected


_MEASURE = """
import sys
import torch
from pathlib import Path
import megascale.training.tasks.registry, megascale.engine.factory, megascale.training.inference
from megascale.checkpoint.reader import CheckpointReader
from megascale.cli.convert import _shapes
from megascale.config.load import load_config
from megascale.hf.exporting import export_model
from megascale.hf.importing import import_model

def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

folder, shard = Path(sys.argv[1]), int(sys.argv[2])
# torch loads 30 MB of code for its first model on the meta device: that is no weight
_shapes(load_config({"data": {"path": "none"}, "model": {"vocab_size": 8}}))
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
before = memory("VmRSS")
done = import_model(str(folder / "theirs"), str(folder / "ours"), _shapes)
export_model(CheckpointReader(done.checkpoint), None, str(folder / "out"), shard_bytes=shard)
print(memory("VmHWM") - before)
"""


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_conversion_needs_the_memory_of_a_shard(family: str, tmp_path: Path) -> None:
    """300 MB in shards of 50 MB, its largest tensor 33 MB: both ways below 1.3 shards."""
    shard = 50_000_000
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
    sizes |= {"num_hidden_layers": 13, "num_key_value_heads": 8, "vocab_size": 16000}
    if family == "gpt2":
        sizes = {"n_embd": 512, "n_layer": 21, "n_head": 8, "vocab_size": 16000}
    model = tiny_model(family, **sizes)
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert 280e6 < size < 330e6
    save_model(model, tmp_path / "theirs", None, shard_size="50MB")
    del model
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path), str(shard)],
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*.safetensors"))) >= 6
    peak = int(done.stdout)
    assert 0 < peak < 1.3 * shard, f"{peak / 1e6:.0f} MB"
