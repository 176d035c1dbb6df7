"""The checkpoint's files: safetensors both ways, damaged headers and manifests, box arithmetic."""

from __future__ import annotations

import io
import itertools
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megascale.checkpoint.manager import CheckpointManager
from megascale.checkpoint.manifest import FileEntry, Manifest, Piece, dump_manifest, read_manifest
from megascale.checkpoint.reader import CheckpointReader, _overlaps
from megascale.checkpoint.storage import Storage
from megascale.checkpoint.tensor_file import TensorFile, write_tensors
from megascale.errors import UserError
from megascale.parallel.fragment import Fragment, global_runs, whole_box

# Tensor files ---------------------------------------------------------------------------------


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "master/a.weight": torch.randn(5, 7, generator=generator),
        "half": torch.randn(3, generator=generator).to(torch.float16),
        "brain": torch.randn(2, 2, 2, generator=generator).to(torch.bfloat16),
        "not contiguous": torch.randn(4, 6, generator=generator).t(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "größe/\u4eac": torch.arange(-3, 3),
        "rng/torch_cpu": torch.arange(256, dtype=torch.uint8),
    }


def _opened(content: bytes) -> TensorFile:
    return TensorFile(io.BytesIO(content), "some/file", len(content))


def test_the_safetensors_library_reads_what_we_write() -> None:
    stream = io.BytesIO()
    size, digest = write_tensors(stream, _tensors())
    content = stream.getvalue()
    assert (size, digest) == (len(content), xxhash.xxh3_128_hexdigest(content))
    loaded = safetensors.torch.load(content)
    assert loaded.keys() == _tensors().keys()
    for key, tensor in _tensors().items():
        assert loaded[key].dtype == tensor.dtype
        assert torch.equal(loaded[key], tensor), key


def test_we_read_what_the_safetensors_library_writes() -> None:
    tensors = {key: tensor.contiguous() for key, tensor in _tensors().items()}
    file = _opened(safetensors.torch.save(tensors, metadata={"made by": "the library"}))
    assert set(file.keys()) == set(tensors)
    for key, tensor in tensors.items():
        flat = tensor.reshape(-1)
        assert file.numel(key) == flat.numel()
        assert torch.equal(file.read(key), flat), key
        for start, numel in ((0, 1), (1, 2), (flat.numel() - 1, 1)):
            if start >= 0 and start + numel <= flat.numel():
                assert torch.equal(file.read(key, start, numel), flat[start : start + numel])


@pytest.mark.parametrize(("start", "numel"), [(-1, 2), (0, 36), (35, 1), (3, -1), (36, None)])
def test_a_range_outside_the_tensor_is_refused(start: int, numel: int | None) -> None:
    file = _opened(safetensors.torch.save({"w": torch.zeros(5, 7)}))
    with pytest.raises(UserError, match="35 elements"):
        file.read("w", start, numel)


def test_unknown_tensors_and_truncated_data_are_refused(tmp_path: Path) -> None:
    content = safetensors.torch.save({"w": torch.zeros(5, 7)})
    with pytest.raises(UserError, match="no tensor 'v'"):
        _opened(content).read("v")
    # the directory entry may still show the old size while the bytes are gone
    lying = TensorFile(io.BytesIO(content[:-4]), "some/file", len(content))
    with pytest.raises(UserError, match="ends in the middle"):
        lying.read("w")


def _file(header: Any, data: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _entry(begin: Any, end: Any, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


DAMAGED = {
    "no header": b"",
    "half a length": b"\x08\0\0",
    "huge header": struct.pack("<Q", 2**63) + b"{}" + bytes(64),
    "header longer than the file": struct.pack("<Q", 100) + b"{}" + bytes(64),
    "not JSON": _file(b"{tensors}"),
    "not UTF-8": _file(b'{"\xff": 1}'),
    "deeply nested": _file(b"[" * 100_000),
    "a list": _file([1, 2]),
    "entry is no object": _file({"w": 3}),
    "no offsets": _file({"w": {"dtype": "F32", "shape": [2]}}),
    "three offsets": _file({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}),
    "unknown dtype": _file({"w": _entry(0, 8, dtype="F31")}),
    "dtype is a list": _file({"w": _entry(0, 8, dtype=["F32"])}),
    "negative offset": _file({"w": _entry(-8, 0)}),
    "begin after end": _file({"w": _entry(8, 0)}),
    "end after the file": _file({"w": _entry(0, 16, (4,))}),
    "begin after the file": _file({"w": _entry(8, 16)}),
    "huge offsets": _file({"w": _entry(2**64, 2**64 + 8)}),
    "shape of another size": _file({"w": _entry(0, 8, (3,))}),
    "negative shape": _file({"w": _entry(0, 8, (-1, -2))}),
    "fractional shape": _file({"w": _entry(0, 8, (2.0,))}),
    "boolean shape": _file({"w": _entry(0, 8, (True, 2))}),
    "shape is text": _file({"w": _entry(0, 8, "2")}),
    "NaN offset": _file({"w": _entry(float("nan"), 8)}),
    "overlap": _file({"v": _entry(0, 8), "w": _entry(4, 12)}, bytes(12)),
    "same bytes twice": _file({"v": _entry(0, 8), "w": _entry(0, 8)}),
    "hole": _file({"v": _entry(0, 8), "w": _entry(12, 20)}, bytes(20)),
    "bytes of nobody": _file({"w": _entry(0, 8)}, bytes(12)),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_header_that_does_not_describe_its_file_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="some/file is not an intact safetensors file"):
        _opened(DAMAGED[name])


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 255))
def test_a_changed_header_byte_is_read_or_refused_but_never_crashes(at: int, change: int) -> None:
    content = bytearray(safetensors.torch.save({"v": torch.zeros(3), "w": torch.ones(2, 2)}))
    header = 8 + int.from_bytes(content[:8], "little")
    content[at % header] ^= change
    try:
        file = _opened(bytes(content))
    except UserError:
        return
    for key in list(file.keys()):
        assert file.read(key).numel() == file.numel(key)


# Box arithmetic -------------------------------------------------------------------------------

Part = tuple[tuple[tuple[int, int], ...], int, int]  # box, start, numel


@st.composite
def _shapes(draw: st.DrawFn) -> tuple[int, ...]:
    return tuple(draw(st.lists(st.integers(1, 5), min_size=0, max_size=4)))


@st.composite
def _parts(draw: st.DrawFn, shape: tuple[int, ...]) -> Part:
    box = []
    for size in shape:
        begin = draw(st.integers(0, size - 1))
        box.append((begin, draw(st.integers(begin + 1, size))))
    volume = math.prod(stop - begin for begin, stop in box)
    start = draw(st.integers(0, volume - 1))
    return tuple(box), start, draw(st.integers(1, volume - start))


def _reference(shape: tuple[int, ...], part: Part) -> np.ndarray:
    """Global flat index of each element of a part, by slicing an array of indices."""
    box, start, numel = part
    indices = np.arange(math.prod(shape)).reshape(shape)
    return indices[tuple(slice(*interval) for interval in box)].reshape(-1)[start : start + numel]


def _expand(begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    runs = [np.arange(b, b + n) for b, n in zip(begins, lengths, strict=True)]
    return np.concatenate(runs) if runs else np.zeros(0, dtype=np.int64)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_global_runs_equal_slicing(data: st.DataObject) -> None:
    shape = data.draw(_shapes())
    part = data.draw(_parts(shape))
    begins, lengths = global_runs(shape, *part)
    assert (lengths > 0).all()
    assert np.array_equal(_expand(begins, lengths), _reference(shape, part))


def test_a_whole_tensor_and_trailing_whole_dimensions_are_few_runs() -> None:
    shape = (6, 4, 5)
    assert len(global_runs(shape, whole_box(shape), 7, 100)[0]) == 1
    assert len(global_runs(shape, ((2, 4), (0, 4), (0, 5)), 0, 40)[0]) == 1  # cut along dim 0
    assert len(global_runs(shape, ((0, 6), (1, 3), (0, 5)), 0, 60)[0]) == 6  # along dim 1
    assert len(global_runs(shape, ((0, 6), (0, 4), (0, 2)), 0, 48)[0]) == 24  # along dim 2
    assert len(global_runs((), (), 0, 1)[0]) == 1
    assert len(global_runs(shape, whole_box(shape), 3, 0)[0]) == 0


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_overlaps_equal_set_intersection(data: st.DataObject) -> None:
    shape = data.draw(_shapes())
    wanted, held = data.draw(_parts(shape)), data.draw(_parts(shape))
    into, source, lengths = _overlaps(global_runs(shape, *wanted), global_runs(shape, *held))
    ours = _reference(shape, wanted)
    theirs = _reference(shape, held)
    copied = np.full(len(ours), -1)
    for begin, at, length in zip(into, source, lengths, strict=True):
        assert length > 0
        assert (copied[begin : begin + length] == -1).all(), "an element is copied twice"
        copied[begin : begin + length] = theirs[at : at + length]
    assert np.array_equal(copied, np.where(np.isin(ours, theirs), ours, -1))


def _cuts(data: st.DataObject, size: int, most: int) -> list[tuple[int, int]]:
    inner = st.lists(st.integers(1, max(size - 1, 1)), max_size=most - 1, unique=True)
    marks = [0, *sorted(mark for mark in data.draw(inner) if mark < size), size]
    return list(itertools.pairwise(marks))


def _layout(data: st.DataObject, shape: tuple[int, ...]) -> list[Part]:
    """A tensor-parallel cut along one dim, each box cut flat into ZeRO partitions."""
    parts: list[Part] = []
    dim = data.draw(st.integers(0, len(shape) - 1))
    for interval in _cuts(data, shape[dim], 3):
        box = tuple(interval if axis == dim else (0, n) for axis, n in enumerate(shape))
        volume = math.prod(stop - begin for begin, stop in box)
        parts += [(box, a, b - a) for a, b in _cuts(data, volume, 4)]
    return parts


def _write(folder: Path, shape: tuple[int, ...], parts: list[Part], values: np.ndarray) -> None:
    """A checkpoint of one parameter "w", as if each part were of another rank."""
    files, pieces = [], []
    for rank, (box, start, numel) in enumerate(parts):
        path = f"rank_{rank:05d}.safetensors"
        held = values[_reference(shape, (box, start, numel))]
        with open(folder / path, "wb") as stream:
            size, digest = write_tensors(stream, {"master/w": torch.from_numpy(held)})
        files.append(FileEntry(path=path, bytes=size, xxh3_128=digest))
        pieces.append(
            Piece(file=path, name="w", kinds=("master",), box=box, start=start, numel=numel)
        )
    manifest = Manifest(
        written_by="a test",
        step=3,
        world_size=len(parts),
        kinds=("master",),
        parameters={"w": shape},
        files=tuple(files),
        pieces=tuple(pieces),
        state={"nested": {"number": 0.1, "text": "größe"}},
    )
    (folder / "manifest.json").write_bytes(dump_manifest(manifest))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_layout_is_read_into_any_other(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    shape = data.draw(_shapes().filter(bool))
    values = np.arange(math.prod(shape), dtype=np.float32)
    folder = tmp_path_factory.mktemp("checkpoint")
    _write(folder, shape, _layout(data, shape), values)
    reader = CheckpointReader(str(folder))
    assert reader.damage() is None
    total = 0
    for part in _layout(data, shape):
        box, start, numel = part
        tensor = torch.full((numel,), torch.nan)
        reader.fill(Fragment("w", "master", shape, box, start, tensor))
        assert np.array_equal(tensor.numpy(), values[_reference(shape, part)])
        total += numel
    reader.close()
    assert reader.bytes_read == 4 * total  # nothing but what was asked for


def test_elements_that_no_piece_holds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not committed: the pieces of 'w' hold 8 of its 12"):
        _write(tmp_path, (4, 3), [(((0, 4), (0, 2)), 0, 8)], np.zeros(12, np.float32))
    assert not (tmp_path / "manifest.json").exists()
    _write(tmp_path, (4, 3), [(((0, 4), (0, 3)), 0, 12)], np.zeros(12, np.float32))
    reader = CheckpointReader(str(tmp_path))
    with pytest.raises(UserError, match=r"(?s)exp_avg of w is incomplete.*12 elements.*hold 0"):
        reader.fill(Fragment("w", "exp_avg", (4, 3), whole_box((4, 3)), 0, torch.zeros(12)))
    reader.close()


# The manifest ---------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    parts: list[Part] = [(((0, 4), (0, 2)), 0, 8), (((0, 4), (2, 3)), 0, 4)]
    _write(tmp_path, (4, 3), parts, np.arange(12, dtype=np.float32))
    return tmp_path


def _resealed(folder: Path, change: Any) -> None:
    """Change the manifest's contents as a writer with a bug would: with a fitting checksum."""
    path = folder / "manifest.json"
    content = json.loads(path.read_bytes())
    content.pop("checksum")
    change(content)
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    content["checksum"] = xxhash.xxh3_128_hexdigest(text.encode())
    path.write_text(json.dumps(content))


def _refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_manifest(Storage(str(folder)))
    assert caught.value.rule
    assert caught.value.remedy
    return caught.value.what


def test_a_manifest_is_read_back_as_it_was_written(checkpoint: Path) -> None:
    manifest = read_manifest(Storage(str(checkpoint)))
    assert manifest.step == 3
    assert manifest.state == {"nested": {"number": 0.1, "text": "größe"}}
    before = (checkpoint / "manifest.json").read_bytes()
    assert dump_manifest(manifest) == before


def test_every_flipped_bit_of_a_manifest_is_noticed_or_means_the_same(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    whole = path.read_bytes()
    expected = read_manifest(Storage(str(checkpoint)))
    noticed = 0
    for at in range(0, len(whole), 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        try:
            assert read_manifest(Storage(str(checkpoint))) == expected  # changed white space
        except UserError:
            noticed += 1
    assert noticed > len(whole) / 3 * 0.4


@pytest.mark.parametrize("cut", [0, 1, 50, -2])
def test_a_truncated_manifest_is_refused(checkpoint: Path, cut: int) -> None:
    path = checkpoint / "manifest.json"
    path.write_bytes(path.read_bytes()[:cut])
    assert "manifest.json is damaged" in _refused(checkpoint)


def test_a_newer_version_is_told_even_when_it_has_other_fields(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    content = json.loads(path.read_bytes())
    path.write_text(json.dumps({**content, "version": 7, "something": "new"}))
    assert "format version 7" in _refused(checkpoint)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "./x", "a//b", "", "a\\b"])
def test_a_file_outside_the_folder_is_refused(checkpoint: Path, name: str) -> None:
    def escape(content: dict[str, Any]) -> None:
        content["files"][0]["path"] = name
        content["pieces"][0]["file"] = name

    _resealed(checkpoint, escape)
    assert "is damaged: files.0.path" in _refused(checkpoint)


ILLEGAL_PIECES = {
    "unknown parameter": {"name": "v"},
    "file that is not listed": {"file": "rank_00009.safetensors"},
    "box of other rank": {"box": [[0, 4]]},
    "box beyond the tensor": {"box": [[0, 4], [2, 4]]},
    "empty box": {"box": [[0, 4], [1, 1]], "numel": 1},
    "reversed box": {"box": [[0, 4], [2, 0]]},
    "negative box": {"box": [[-1, 4], [0, 2]]},
    "longer than its box": {"numel": 9},
    "starts behind its box": {"start": 8, "numel": 1},
    "negative start": {"start": -1},
    "no elements": {"numel": 0},
    "unknown field": {"colour": "red"},
}


@pytest.mark.parametrize("name", ILLEGAL_PIECES)
def test_an_illegal_piece_is_refused(checkpoint: Path, name: str) -> None:
    _resealed(checkpoint, lambda content: content["pieces"][0].update(ILLEGAL_PIECES[name]))
    _refused(checkpoint)


def test_a_manifest_that_lacks_a_piece_is_refused(checkpoint: Path) -> None:
    _resealed(checkpoint, lambda content: content["pieces"].pop())
    assert "elements" in _refused(checkpoint)


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    assert "not a complete checkpoint" in _refused(tmp_path)
    assert "not a complete checkpoint" in _refused(tmp_path / "nowhere")


def test_a_kill_between_the_renames_of_a_replacement_loses_nothing(tmp_path: Path) -> None:
    """The replaced checkpoint gets its name back; one that was replaced is removed."""
    manager = CheckpointManager(str(tmp_path))
    for name in (".replaced_step_00000002", ".replaced_step_00000004", "step_00000004"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(name)
    assert manager.steps() == [4]
    manager.recover()
    assert manager.steps() == [2, 4]
    assert (tmp_path / "step_00000002" / "manifest.json").read_text() == ".replaced_step_00000002"
    assert (tmp_path / "step_00000004" / "manifest.json").read_text() == "step_00000004"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000004"]


# Manifests that no writer writes ----------------------------------------------------------------


def _twice(content: dict[str, Any]) -> None:
    content["files"].append(content["files"][0])


def _overlapping(content: dict[str, Any]) -> None:
    content["pieces"][1] = {**content["pieces"][1], "box": [[0, 4], [1, 2]]}


def _overlapping_ranges(content: dict[str, Any]) -> None:
    piece = content["pieces"][0]
    content["pieces"][0] = {**piece, "numel": 5}
    content["pieces"].append({**piece, "start": 4, "numel": 4})


def _more_than_the_file(content: dict[str, Any]) -> None:
    content["files"][0]["bytes"] = 7


def _huge(content: dict[str, Any]) -> None:
    content["parameters"]["w"] = [1 << 60, 1 << 60]


def _negative_shape(content: dict[str, Any]) -> None:
    content["parameters"]["w"] = [-4, -3]


def _many_dims(content: dict[str, Any]) -> None:
    content["parameters"]["w"] = [1] * 10_000


def _long_numbers(content: dict[str, Any]) -> None:
    content["pieces"][0]["start"] = 10**400


def _state(**values: Any) -> Any:
    return lambda content: content["state"].update(values)


HOSTILE = {
    "a position that is text": (_state(train="x"), "state.train"),
    "no position": (_state(train=None), "state.train"),
    "half a position": (_state(train={"step": 3}), "state.train.updates"),
    "a position before the first": (
        _state(train={"step": 3, "updates": -1, "samples_seen": 0, "tokens_seen": 0}),
        "state.train.updates",
    ),
    "callbacks that are a list": (_state(callbacks=[4]), "state.callbacks"),
    "a callback that is a number": (_state(callbacks={"ledger": 4}), "state.callbacks.ledger"),
    "an engine with text": (_state(engine={"loss_scaler.scale": "x"}), "state.engine.loss_scaler"),
    "stages that are none": (_state(data={"stages": 1, "paths": {}, "order": {}}), "state.data"),
    "a file listed twice": (_twice, "listed twice"),
    "boxes that overlap": (_overlapping, "overlap"),
    "ranges that overlap": (_overlapping_ranges, "overlap"),
    "more elements than bytes": (_more_than_the_file, "larger than the file"),
    "a huge shape": (_huge, "impossible shape"),
    "a negative shape": (_negative_shape, "parameters.w.0"),
    "a box of other dimensions": (_many_dims, "not legal"),
    "a number of 400 digits": (_long_numbers, ""),
    "no list of files": (lambda content: content.update(files={}), "files"),
    "a step before the first": (lambda content: content.update(step=-1), "step"),
    "version 0": (lambda content: content.update(version=0), "version"),
    "a weight that no piece holds": (lambda content: content["pieces"].pop(), "8 of its 12"),
    "text for a number": (lambda content: content.update(step="3"), "step"),
    "a number that is none": (lambda content: content.update(step=float("nan")), ""),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_manifest_is_refused(checkpoint: Path, name: str) -> None:
    change, says = HOSTILE[name]
    _resealed(checkpoint, change)
    assert says in _refused(checkpoint)


WRONG = (None, True, -1, 1 << 70, 1.5, float("nan"), "", "../x", [], [[]], {}, {"a": 1}, [0] * 999)


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each value inside a JSON value."""
    items: Any = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*at, key)
        if isinstance(inner, dict | list):
            yield from _places(inner, (*at, key))


@settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_manifest_with_anything_anywhere_is_read_or_refused(
    checkpoint: Path, data: st.DataObject
) -> None:
    """Its checksum fits: as if a program with other ideas had written it."""
    path = checkpoint / "manifest.json"
    whole = path.read_bytes()

    def change(content: dict[str, Any]) -> None:
        *way, last = data.draw(st.sampled_from(list(_places(content))))
        holder: Any = content
        for key in way:
            holder = holder[key]
        if data.draw(st.booleans()):
            holder[last] = data.draw(st.sampled_from(WRONG))
        elif isinstance(holder, list):
            holder.append(holder[last])
        else:
            del holder[last]

    try:
        _resealed(checkpoint, change)
        reader = CheckpointReader(str(checkpoint))
        reader.damage()
        reader.fill(Fragment("w", "master", (4, 3), whole_box((4, 3)), 0, torch.zeros(12)))
        reader.close()
    except UserError:
        pass
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("text", ["[" * 10**6, '{"a":' * 10**5, '"' + "x" * 10**6, "1" * 10**5])
def test_deep_and_long_json_is_refused(checkpoint: Path, text: str) -> None:
    (checkpoint / "manifest.json").write_text(text)
    assert "damaged" in _refused(checkpoint)


def test_a_key_that_is_there_twice_is_refused(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    text = path.read_text()
    for key in ("step", "numel", "nested"):
        assert f'"{key}":' in text
        path.write_text(text.replace(f'"{key}":', f'"{key}": 1, "{key}":', 1))
        assert f"the key '{key}' is there twice" in _refused(checkpoint)


def test_a_manifest_behind_a_link_is_refused(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    path.rename(checkpoint.parent / "elsewhere.json")
    path.symlink_to(checkpoint.parent / "elsewhere.json")
    assert "it is a link" in _refused(checkpoint)


def test_a_tensor_file_that_leads_out_of_the_folder_is_not_read(checkpoint: Path) -> None:
    path = checkpoint / "rank_00000.safetensors"
    path.rename(checkpoint.parent / "elsewhere.safetensors")
    path.symlink_to(checkpoint.parent / "elsewhere.safetensors")
    reader = CheckpointReader(str(checkpoint))
    assert "is a link" in str(reader.damage())
    with pytest.raises(UserError, match="is a link"):
        reader.fill(Fragment("w", "master", (4, 3), whole_box((4, 3)), 0, torch.zeros(12)))
