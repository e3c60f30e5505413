"""Less memory for more time: a network's blocks keep only their inputs, and are computed again in backward."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager

from torch import nn
from torch.utils.checkpoint import checkpoint

from ..errors import AdapterError
from ..families import block_classes


@contextmanager
def checkpointed(networks: Iterable[nn.Module]) -> Generator[None]:
    """Within the block every known block of `networks` is computed again in backward; gradients are the same.

    Hooks inside a block, those of adapters for instance, run again too, so they must still be there in backward.
    The blocks' own forwards come back on leaving, also by an exception.
    Raises AdapterError for networks without a block that is known.
    """
    blocks = known_blocks(networks)
    before = [(block, block.__dict__.get("forward")) for block in blocks]
    try:
        for block in blocks:
            block.forward = _again_in_backward(block.forward)
        yield
    finally:
        for block, forward in before:
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.forward = forward


def known_blocks(networks: Iterable[nn.Module]) -> list[nn.Module]:
    """`outermost_blocks` of all networks.  Raises AdapterError where there is none."""
    blocks = list(dict.fromkeys(block for network in networks for block in outermost_blocks(network)))
    if not blocks:
        raise AdapterError("gradient_checkpointing knows none of this network's blocks; turn it off for this base")
    return blocks


def outermost_blocks(network: nn.Module) -> list[nn.Module]:
    """Blocks that lie in no other, for what is inside one is computed again with it."""
    if type(network).__name__ in block_classes():  # by name, since no library and no host is imported here
        return [network]
    return [block for child in network.children() for block in outermost_blocks(child)]


def _again_in_backward(forward: Callable) -> Callable:
    def run(*args, **kwargs):
        # Networks note in their options where they are; in backward each block has to find its own place again.
        places, named = _dicts_copied(args), _dicts_copied_by_name(kwargs)

        def block():
            return forward(*_dicts_copied(places), **_dicts_copied_by_name(named))

        # Dropout is off, so there is no randomness to replay, and the global generator stays unread.
        return checkpoint(block, use_reentrant=False, preserve_rng_state=False)

    return run


def _dicts_copied(values: tuple) -> tuple:
    return tuple(dict(value) if isinstance(value, dict) else value for value in values)


def _dicts_copied_by_name(values: dict) -> dict:
    return dict(zip(values, _dicts_copied(tuple(values.values())), strict=True))
