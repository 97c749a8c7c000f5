"""Runs of a shard that are worked on at once."""

from __future__ import annotations

import pytest
import torch

from agvm_ds.shards import base, in_chunks


@pytest.mark.parametrize("sizes", [[5], [3, 3, 3], [1, 1, 1, 1, 1, 1, 1], [25, 1], [2, 19, 4], [0, 4, 0], []])
def test_chunks_are_the_elements_in_order_and_none_is_too_large(
    sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "CHUNK_ON_CPU", 8)
    whole = torch.arange(float(sum(sizes)))
    chunks = list(in_chunks(whole.split(sizes)))
    assert torch.equal(torch.cat([*chunks, torch.empty(0)]), whole)
    assert all(chunk.numel() <= 8 for chunk in chunks)
    assert len(chunks) <= 1 + len([size for size in sizes if size > 8]) + 2 * sum(sizes) // 8


def test_small_neighbours_are_put_together_and_one_alone_is_not_copied() -> None:
    small = [torch.ones(2), torch.ones(3)]
    [chunk] = in_chunks(small)
    assert chunk.tolist() == [1.0] * 5
    [alone] = in_chunks([small[1]])
    assert alone.data_ptr() == small[1].data_ptr()


def test_any_layout_in_memory() -> None:
    turned = torch.arange(6.0).view(2, 3).T
    [chunk] = in_chunks([turned])
    assert sorted(chunk.tolist()) == [0, 1, 2, 3, 4, 5]
