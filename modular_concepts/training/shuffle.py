"""In which order pictures come: shuffled for each epoch, each as often as it is repeated, sizes kept apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Shuffle:
    """Endless sequence of the entries, shuffled for each epoch; `pending` is what is left of it.

    entries: (N,) int64, a number for each time that it comes in an epoch.
    groups: one number for each entry's value; what is taken together is of one group (pictures of one size).
    batch: how many are taken at once, by which what is pending can be told to be possible.
    """

    def __init__(
        self, entries: Tensor, generator: torch.Generator, groups: Sequence[int] | None = None, batch: int = 1
    ):
        self.entries, self.generator, self.batch = entries, generator, batch
        self.groups = None if groups is None or len(set(groups)) == 1 else torch.tensor(groups)
        self.pending = torch.empty(0, dtype=torch.int64)

    def take(self, batch: int) -> Tensor:
        """The next entry and those after it in its group; the others stay, in their order."""
        while len(mates := self._mates(batch)) < batch:
            shuffled = torch.randperm(len(self.entries), generator=self.generator)
            self.pending = torch.cat([self.pending, self.entries[shuffled]])
        taken = self.pending[mates]
        left = torch.ones(len(self.pending), dtype=torch.bool)
        left[mates] = False
        self.pending = self.pending[left]
        return taken

    def set_pending(self, pending: Tensor) -> None:
        """Go on from what was left, without what there is no more."""
        self.pending = self.possible(pending)

    def possible(self, pending: Tensor) -> Tensor:
        """What of it can be left: the entries that there are, each no more often than the epochs held here have it."""
        pending = pending[torch.isin(pending, self.entries)]
        if not len(pending):
            return pending
        # Others wait while a size of which there is one picture fills its batch, epoch after epoch.
        epochs = 1 if self.groups is None else self.batch + 1
        most = epochs * torch.bincount(self.entries)
        by_value = torch.argsort(pending, stable=True)
        counts = torch.bincount(pending)
        first = torch.cumsum(counts, 0) - counts  # where each value begins in `by_value`
        before = torch.empty_like(pending)  # how often each came before
        before[by_value] = torch.arange(len(pending)) - first[pending[by_value]]
        return pending[before < most[pending]]

    def _mates(self, batch: int) -> Tensor:
        """Places in `pending` of the first entries of one group, `batch` at most."""
        if self.groups is None or not len(self.pending):
            return torch.arange(min(batch, len(self.pending)))
        groups = self.groups[self.pending]
        return torch.nonzero(groups == groups[0]).flatten()[:batch]
