from __future__ import annotations

import pytest
import torch

from megascale.models.dropout import CounterDropout, keep_mask, sample_keys, splitmix64

MASK = (1 << 64) - 1


def reference_splitmix64(state: int) -> int:
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def as_unsigned(values: torch.Tensor) -> list[int]:
    return [value & MASK for value in values.tolist()]


def keys_of(*ids: int, seed: int = 11) -> torch.Tensor:
    return sample_keys(seed, torch.tensor(ids))


def test_splitmix64_is_the_published_function() -> None:
    states = [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF]
    hashed = splitmix64(torch.tensor(states))
    assert as_unsigned(hashed) == [reference_splitmix64(state & MASK) for state in states]
    assert as_unsigned(hashed[:1]) == [0xE220A8397B1DCDAF]  # its first output for seed 0


def test_sample_keys_depend_on_seed_and_sample_only() -> None:
    keys = keys_of(3, 9, 2**40)
    assert keys.dtype == torch.int64
    assert keys.shape == (3,)
    assert keys_of(9).item() == keys[1].item()
    assert len({*keys.tolist(), *keys_of(3, 9, 2**40, seed=12).tolist()}) == 6
    wide = sample_keys(2**64 - 1, torch.tensor([3], dtype=torch.int32))
    assert wide.item() == sample_keys(-1, torch.tensor([3])).item()


def test_sample_keys_never_change() -> None:
    """Runs are resumed by later versions: the arithmetic is fixed for good."""
    seed, sample = 42, 7
    expected = reference_splitmix64(sample ^ reference_splitmix64(seed))
    assert as_unsigned(sample_keys(seed, torch.tensor([sample]))) == [expected]


@pytest.mark.parametrize(
    ("full", "offset", "local"),
    [((5, 6), (2, 0), (3, 6)), ((4, 6, 7), (2, 1, 3), (2, 4, 4)), ((9,), (4,), (5,))],
)
def test_slice_of_the_tensor_gets_the_slice_of_the_mask(
    full: tuple[int, ...], offset: tuple[int, ...], local: tuple[int, ...]
) -> None:
    keys = keys_of(1, 2, 3)
    whole = keep_mask(keys, 17, full, 0.4)
    intervals = [(o, o + n) for o, n in zip(offset, local, strict=True)]
    places = [torch.arange(*interval) for interval in intervals]
    part = keep_mask(keys, 17, local, 0.4, coordinates=places, global_shape=full)
    box = (slice(None), *(slice(*interval) for interval in intervals))
    assert torch.equal(part, whole[box])


def test_mask_element_is_the_hash_of_key_site_and_index() -> None:
    key = keys_of(5)
    site, p, shape = 19, 0.3, (3, 4)
    stream = reference_splitmix64((key.item() & MASK) ^ reference_splitmix64(site))
    expected = [
        reference_splitmix64((stream + index * 0x9E3779B97F4A7C15) & MASK) / 2**64 >= p
        for index in range(12)
    ]
    assert keep_mask(key, site, shape, p).flatten().tolist() == expected


def test_mask_does_not_depend_on_the_batch() -> None:
    together = keep_mask(keys_of(4, 8, 15), 3, (6, 5), 0.5)
    for row, sample in enumerate((4, 8, 15)):
        assert torch.equal(together[row], keep_mask(keys_of(sample), 3, (6, 5), 0.5)[0])


@pytest.mark.parametrize("p", [0.02, 0.1, 0.5, 0.9])
def test_keep_rate_and_independence(p: float) -> None:
    keys = sample_keys(0, torch.arange(40))
    kept = torch.stack([keep_mask(keys, site, (50, 40), p) for site in (0, 1, 8)]).double()
    sigma = (p * (1 - p)) ** 0.5
    assert abs(kept.mean() - (1 - p)) < 5 * sigma / kept.numel() ** 0.5
    # Uncorrelated over sites, samples, rows and columns.
    centred = (kept - (1 - p)) / sigma
    for dim in range(4):
        head = centred.narrow(dim, 0, centred.shape[dim] - 1)
        products = head * centred.narrow(dim, 1, centred.shape[dim] - 1)
        assert abs(products.mean()) < 5 / products.numel() ** 0.5, dim


def test_dropout_scales_and_its_gradient_is_the_mask() -> None:
    dropout = CounterDropout(0.25, site=5)
    keys = keys_of(1, 2)
    x = torch.randn(2, 30, 8, requires_grad=True)
    y = dropout(x, keys)
    keep = keep_mask(keys, 5, (30, 8), 0.25)
    torch.testing.assert_close(y, x * keep / 0.75)
    y.sum().backward()
    torch.testing.assert_close(x.grad, keep / 0.75)
    assert 0 < keep.sum() < keep.numel()
    assert torch.equal(y, dropout(x, keys))


def test_declared_shards_see_their_part_of_the_mask() -> None:
    keys = keys_of(1, 2)
    whole = CounterDropout(0.5, site=2)(torch.ones(2, 4, 6, 3), keys)
    for rank in range(2):
        for half in range(3):
            dropout = CounterDropout(0.5, site=2)
            dropout.set_shard(0, rank, 2)
            dropout.set_shard(1, half, 3)
            part = dropout(torch.ones(2, 2, 2, 3), keys)
            assert torch.equal(part, whole[:, 2 * rank : 2 * rank + 2, 2 * half : 2 * half + 2])


def test_chunks_of_a_sequence_and_slices_of_them_see_their_part_of_the_mask() -> None:
    """Context parallelism gives a rank two chunks, sequence parallelism cuts what they make up."""
    keys = keys_of(1, 2)
    whole = CounterDropout(0.5, site=2)(torch.ones(2, 24, 3), keys)
    for rank in range(2):
        chunks = (rank, 3 - rank)
        held = torch.cat([whole[:, 6 * chunk : 6 * chunk + 6] for chunk in chunks], dim=1)
        for part in range(3):
            dropout = CounterDropout(0.5, site=2)
            dropout.set_chunks(0, chunks, 4)
            assert torch.equal(dropout(torch.ones(2, 12, 3), keys), held)
            dropout.set_shard(0, part, 3)
            cut = dropout(torch.ones(2, 4, 3), keys)
            assert torch.equal(cut, held[:, 4 * part : 4 * part + 4])


def test_identity_when_off_and_error_without_keys() -> None:
    x = torch.randn(2, 3)
    assert CounterDropout(0.0, 1)(x, None) is x
    dropout = CounterDropout(0.5, 1)
    with pytest.raises(ValueError, match=r"p=0.5.*dropout_keys.*sample_keys"):
        dropout(x, None)
    assert dropout.eval()(x, None) is x
