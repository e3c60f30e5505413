"""Networks of other libraries, as type checkers see them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:

    class LibraryNetwork(nn.Module):
        """A network of diffusers or transformers: beyond a module's parts it has what its library gives it.

        Their annotations do not tell: diffusers' say that a config is a plain dict, and torch's that whatever a module
        has is a tensor or a module.
        """

        def __getattr__(self, name: str) -> Any: ...
else:
    LibraryNetwork = nn.Module
