"""Adapters of five kinds: W = W0 + scale * lora_up lora_down.

lora               both factors train                                     Hu et al. 2021
orthogonal         lora_down is frozen to columns of a shared basis       Po et al. 2024, Eq. 4
block              only a block of output rows is written                 Zhu et al. 2025, Eq. 3
block_orthogonal   both at once
full               the whole weight: lora_down is the identity            Kumari et al. 2023 (Custom Diffusion)

Po writes delta = A B^T with B frozen, Zhu writes delta = (M * B) A; lora_up is the one beside the output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import AdapterError
from ..settings.training import LAYOUTS

if TYPE_CHECKING:
    from jaxtyping import Float, Float32, Int64

    from .basis import OrthogonalBasis

KINDS = ("lora", "orthogonal", "block", "block_orthogonal", "full")
FROZEN_DOWN = ("orthogonal", "block_orthogonal", "full")
MAX_WEIGHT = 2**27  # numbers; twice the largest layer of any model that has been adapted
MAX_SIZE = 1e12  # of a factor, alpha or delta; what is larger is no weight, and its squares overflow


@dataclass(frozen=True)
class ConvGeometry:
    """How a convolution walks over its input; lora_down walks the same way, lora_up is 1x1."""

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] | str = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1

    @classmethod
    def of(cls, module: nn.Conv2d) -> ConvGeometry:
        """Read the geometry of a module.  Raises AdapterError for padding other than zeros."""
        if module.padding_mode != "zeros":
            raise AdapterError(
                f"a convolution pads with {module.padding_mode!r}; adapters know only zero padding, "
                "leave this layer out of the targets"
            )
        return cls(module.stride, module.padding, module.dilation, module.groups)


@dataclass(frozen=True, eq=False)
class LowRank:
    """One layer's adapter: delta = alpha / rank * lora_up lora_down.  Plain data; tensors may be parameters.

    lora_up: (out, rank), or (len(rows), rank) for the block kinds.
    lora_down: (rank, in) for Linear, (rank, in / groups, kh, kw) for Conv2d.
    rows: int64 output rows that lora_up writes, for the block kinds, else None.
    full: lora_down is the identity, of rank in (* kh * kw), and no product ever takes the way through it.
    Shapes are trusted here; `check_adapter` is for the boundary where they come from outside.
    """

    lora_up: Tensor
    lora_down: Tensor
    alpha: float
    kind: str
    rows: Tensor | None
    out_features: int

    @property
    def rank(self) -> int:
        return self.lora_down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def is_idle(self) -> bool:
        """Whether no number of the delta can reach the smallest normal one of float32."""
        up, down = (float(factor.detach().abs().amax()) for factor in (self.lora_up, self.lora_down))
        return abs(self.alpha) * up * down < torch.finfo(torch.float32).tiny

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight that this adapter is for: (out, in) or (out, in / groups, kh, kw)."""
        return (self.out_features, *self.lora_down.shape[1:])

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the factors that training must not move."""
        return ("lora_down",) if self.kind in FROZEN_DOWN else ()

    def trainable(self) -> dict[str, Tensor]:
        """Name -> factor, for the factors that training moves."""
        return {name: getattr(self, name) for name in ("lora_up", "lora_down") if name not in self.frozen}

    def replace(self, **changes) -> LowRank:
        return replace(self, **changes)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LowRank:
        """Move both factors; `rows` change device and stay int64."""
        return self.replace(
            lora_up=self.lora_up.to(device=device, dtype=dtype),
            lora_down=self.lora_down.to(device=device, dtype=dtype),
            rows=None if self.rows is None else self.rows.to(device=device),
        )

    def full_up(self) -> Float[Tensor, "out rank"]:
        """lora_up over all output rows, (out, rank): zero outside `rows`."""
        return scatter_rows(self.lora_up, self.rows, self.out_features, dim=0)

    def delta(self) -> Float[Tensor, "out inp *kernel"]:
        """delta = scale * lora_up lora_down, shaped as the weight; float32, or float64 if the factors are."""
        up, down = at_least_float32(self.lora_up), at_least_float32(self.lora_down)
        dtype = torch.promote_types(up.dtype, down.dtype)
        product = up if self.kind == "full" else up.to(dtype) @ down.to(dtype).flatten(1)
        return scatter_rows(self.scale * product, self.rows, self.out_features, dim=0).reshape(self.weight_shape)

    def residual(
        self, x: Float[Tensor, "*_"], conv: ConvGeometry | None = None, erasure: Float[Tensor, " rows"] | None = None
    ) -> Float[Tensor, "*_"]:
        """What the adapter adds to the layer's output: scale * up(down(x)), computed in x.dtype.

        x: (..., in) for Linear, (B, C, H, W) with `conv` for Conv2d.
        erasure: 0/1 of shape (lora_up rows,), training only; see `erasure_mask`.
        Returns (..., out) or (B, out, H', W'); only a grouped convolution forms the weight-shaped delta.
        """
        up = self.lora_up if erasure is None else self.lora_up * erasure.to(self.lora_up)[:, None]
        if self.kind == "full":
            return full_product(x, (self.scale * up).reshape(self.weight_shape), conv)
        return low_rank_product(x, self.scale * up, self.lora_down, conv, self.rows, self.out_features)

    def stock(self) -> LowRank:
        """The same delta in fewer numbers where a full adapter is wider than it is high: identity times delta."""
        if self.kind != "full" or self.out_features >= self.rank:
            return self
        up = torch.eye(self.out_features, dtype=self.lora_up.dtype, device=self.lora_up.device)
        down = (self.lora_up if self.scale == 1 else self.delta().to(self.lora_up)).reshape(self.weight_shape)
        return LowRank(up, down.contiguous(), float(self.out_features), "lora", None, self.out_features)


def together(adapters: Sequence[LowRank]) -> list[LowRank]:
    """The adapters, those that lie on another device than the first moved there; the others as they are."""
    device = adapters[0].lora_up.device
    return [adapter if adapter.lora_up.device == device else adapter.to(device) for adapter in adapters]


def low_rank_product(
    x: Float[Tensor, "*_"],
    up: Float[Tensor, "height rank"],
    down: Float[Tensor, "rank inp *kernel"],
    conv: ConvGeometry | None = None,
    rows: Int64[Tensor, " height"] | None = None,
    out_features: int = 0,
    scales: Float[Tensor, " rank"] | None = None,
) -> Float[Tensor, "*_"]:
    """up (down x) for a Linear (..., in) or, with `conv`, a Conv2d (B, C, H, W) layer, in x.dtype.

    up: (out, rank) or (len(rows), rank); down: (rank, in) or (rank, in / groups, kh, kw).
    out_features: needed with `rows` alone.  scales: (rank,), a diagonal between the two.
    A 4-dimensional down needs `conv`; a 2-dimensional one with `conv` is taken as 1x1.
    """
    up, down = up.to(x), down.to(x)
    if conv is None:
        if down.dim() != 2:
            raise AdapterError("a convolution's adapter was applied without the convolution's geometry")
        hidden = F.linear(x, down)
        hidden = hidden if scales is None else hidden * scales
        return scatter_rows(F.linear(hidden, up), rows, out_features, dim=-1)
    if down.dim() == 2:
        down = down[:, :, None, None]
    if conv.groups != 1:
        up = up if scales is None else up * scales
        weight = scatter_rows(up @ down.flatten(1), rows, out_features, dim=0).unflatten(1, down.shape[1:])
        return F.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    hidden = F.conv2d(x, down, None, conv.stride, conv.padding, conv.dilation)
    hidden = hidden if scales is None else hidden * scales[:, None, None]
    return scatter_rows(F.conv2d(hidden, up[:, :, None, None]), rows, out_features, dim=1)


def full_product(
    x: Float[Tensor, "*_"], weight: Float[Tensor, "out inp *kernel"], conv: ConvGeometry | None = None
) -> Float[Tensor, "*_"]:
    """What a weight-shaped delta adds to the output of a Linear or, with `conv`, a Conv2d layer, in x.dtype."""
    weight = weight.to(x)
    if conv is None:
        if weight.dim() != 2:
            raise AdapterError("a convolution's adapter was applied without the convolution's geometry")
        return F.linear(x, weight)
    weight = weight[:, :, None, None] if weight.dim() == 2 else weight
    return F.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)


def scatter_rows(values: Tensor, rows: Tensor | None, size: int, dim: int) -> Tensor:
    """Put `values` at `rows` of a zero tensor, `size` long along `dim`; unchanged when rows is None."""
    if rows is None:
        return values
    shape = list(values.shape)
    shape[dim] = size
    return values.new_zeros(shape).index_copy(dim, rows.to(values.device), values)


def narrowed(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same product in float64, through no more numbers than the product has rows or columns.

    up: (rows, rank), down: (rank, ...); the second that is returned is flat.  What is measured on factors takes rank x
    rank numbers, and a rank may be far beyond the weight's: of a sum of many concepts, or in any file.
    """
    up, down = up.detach().double(), down.detach().flatten(1).double()
    rows, columns = len(up), down.shape[1]
    if len(down) <= min(rows, columns):
        return up, down
    product = up @ down
    one = torch.eye(min(rows, columns)).to(product)
    return (one, product) if rows <= columns else (product, one)


def measure_energy(adapter: LowRank) -> float:
    """|delta|^2, the sum of squares, from the factors."""
    up, down = narrowed(adapter.lora_up, adapter.lora_down)
    return float(adapter.scale**2 * ((up.mT @ up) * (down @ down.mT)).sum())


def at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def new_lora(
    out: int,
    inp: int,
    rank: int,
    alpha: float | None,
    generator: torch.Generator,
    kernel: Sequence[int] | None = None,
) -> LowRank:
    """Standard LoRA: lora_down ~ U(-1/sqrt(in), 1/sqrt(in)) (kaiming, a = sqrt 5), lora_up = 0.

    inp counts the input channels of one group; kernel is (kh, kw) for Conv2d.  alpha None means alpha = rank.
    """
    down = _uniform_down(inp, rank, generator, kernel)
    return LowRank(torch.zeros(out, rank), down, _alpha(alpha, rank), "lora", None, out)


def new_orthogonal(
    out: int,
    inp: int,
    rank: int,
    alpha: float | None,
    basis: OrthogonalBasis,
    indices: Sequence[int] | Tensor,
    kernel: Sequence[int] | None = None,
) -> LowRank:
    """Orthogonal adapter: lora_down = `indices` columns of the shared basis, frozen; lora_up = 0.

    The basis' width is in, or in * kh * kw for Conv2d (orthonormal filters).
    Source: Po et al. 2024, section 3.5 (their B_i; rank columns of a shared orthogonal O).
    """
    return new_frozen(out, _basis_down(inp, rank, basis, indices, kernel), alpha)


def new_block(
    out: int,
    inp: int,
    rank: int,
    alpha: float | None,
    rows: Int64[Tensor, " height"],
    generator: torch.Generator,
    kernel: Sequence[int] | None = None,
) -> LowRank:
    """Block adapter: both factors train, only `rows` of the output are written.  Zhu et al. 2025, Eq. 3."""
    down = _uniform_down(inp, rank, generator, kernel)
    return LowRank(torch.zeros(len(rows), rank), down, _alpha(alpha, rank), "block", rows, out)


def new_block_orthogonal(
    out: int,
    inp: int,
    alpha: float | None,
    rows: Tensor,
    basis: OrthogonalBasis,
    indices: Sequence[int] | Tensor,
    kernel: Sequence[int] | None = None,
) -> LowRank:
    """Both separations at once: lora_down frozen to basis columns, one for each rank, lora_up confined to `rows`."""
    return new_frozen(out, _basis_down(inp, len(indices), basis, indices, kernel), alpha, rows)


def new_frozen(
    out: int,
    down: Float[Tensor, "rank inp *kernel"],
    alpha: float | None,
    rows: Int64[Tensor, " height"] | None = None,
) -> LowRank:
    """Adapter on a given frozen lora_down (rank, in[, kh, kw]): basis columns, or the Gaussian variant."""
    rank = down.shape[0]
    kind, height = ("orthogonal", out) if rows is None else ("block_orthogonal", len(rows))
    return LowRank(torch.zeros(height, rank), down, _alpha(alpha, rank), kind, rows, out)


def new_full(out: int, inp: int, kernel: Sequence[int] | None = None) -> LowRank:
    """The whole weight trains: lora_up is the delta, zero at first, and lora_down the identity, frozen."""
    width = inp * math.prod(kernel or (1,))
    down = torch.eye(width).reshape(width, inp, *(kernel or ()))
    return LowRank(torch.zeros(out, width), down, float(width), "full", None, out)


def is_identity(down: Float[Tensor, "rank inp *kernel"]) -> bool:
    """Whether a lora_down (rank, in[, kh, kw]) hands its input on as it is."""
    flat = down.flatten(1)
    square = flat.shape[0] == flat.shape[1]
    return square and bool((flat.diagonal() == 1).all()) and int(flat.count_nonzero()) == len(flat)


def block_rows(out: int, blocks: int, slot: int, layout: str = "contiguous") -> Int64[Tensor, " height"]:
    """Output rows of one of `blocks` disjoint slots that together cover all rows; int64, ascending.

    contiguous: as numpy's array_split, the first out % blocks slots are one row longer.
    strided: every blocks-th row, from row `slot` on.
    Raises AdapterError for a slot or a number of blocks that the layer cannot hold.
    """
    if not 1 <= blocks <= out:
        raise AdapterError(
            f"{blocks} blocks asked of a layer with {out} output rows; choose between 1 and {out} blocks"
        )
    if not 0 <= slot < blocks:
        raise AdapterError(
            f"block slot {slot} does not exist: {blocks} blocks have slots 0 to {blocks - 1}; "
            "choose a free one, or train all concepts with more blocks"
        )
    if layout not in LAYOUTS:
        raise AdapterError(f"block layout {layout!r} is unknown; choose one of {', '.join(LAYOUTS)}")
    if layout == "strided":
        return torch.arange(slot, out, blocks)
    size, longer = divmod(out, blocks)
    start = slot * size + min(slot, longer)
    return torch.arange(start, start + size + (slot < longer))


def erasure_mask(out_rows: int, probability: float, generator: torch.Generator) -> Float32[Tensor, " {out_rows}"]:
    """r(lambda) of BlockLoRA: (out_rows,) float32 of 0/1, each row erased with `probability`.

    Training only; one draw per layer and forward pass, shared over batch and tokens; not rescaled by
    1 / (1 - probability), as in Zhu et al. 2025, Eq. 3.
    """
    if not 0.0 <= probability < 1.0:
        raise AdapterError(f"erasure probability is {probability}; it must be at least 0 and below 1")
    return (torch.rand(out_rows, generator=generator) >= probability).float()


def check_adapter(name: str, adapter: LowRank, weight_shape: Sequence[int] | None = None) -> None:
    """Check one adapter at a boundary (file, merge, model); `name` is the layer's.

    weight_shape: shape of the model's weight, when it is known.
    Raises AdapterError that says what disagrees.
    """
    up, down, rows, out = adapter.lora_up, adapter.lora_down, adapter.rows, adapter.out_features
    if adapter.kind not in KINDS:
        raise AdapterError(f"{name}: adapter kind {adapter.kind!r} is unknown; we read {', '.join(KINDS)}")
    if up.dim() != 2 or down.dim() not in (2, 4):
        raise AdapterError(
            f"{name}: lora_up has {up.dim()} and lora_down {down.dim()} dimensions; we need 2, and 2 or 4"
        )
    if not all(up.shape) or not all(down.shape):
        raise AdapterError(f"{name}: lora_up {tuple(up.shape)} or lora_down {tuple(down.shape)} is empty")
    if up.shape[1] != down.shape[0]:
        raise AdapterError(
            f"{name}: lora_up has rank {up.shape[1]} but lora_down has rank {down.shape[0]}; "
            "the file is damaged or mixes two adapters"
        )
    if math.prod(adapter.weight_shape) > MAX_WEIGHT:
        raise AdapterError(
            f"{name}: a weight of shape {adapter.weight_shape} is larger than any model's layer; the file is damaged"
        )
    if not math.isfinite(adapter.alpha):
        raise AdapterError(f"{name}: alpha is {adapter.alpha}; it must be a finite number")
    if (rows is not None) != adapter.kind.startswith("block"):
        raise AdapterError(f"{name}: a {adapter.kind} adapter {'has' if rows is not None else 'lacks'} block rows")
    if up.shape[0] != (out if rows is None else len(rows)):
        raise AdapterError(
            f"{name}: lora_up has {up.shape[0]} rows, expected {out if rows is None else len(rows)}; "
            "the file is damaged or made for another model"
        )
    if rows is not None:
        _check_rows(name, rows, out)
    if adapter.kind == "full" and not is_identity(down):
        raise AdapterError(f"{name}: lora_down of a full adapter is not the identity; the file is damaged")
    if weight_shape is not None and tuple(weight_shape) != adapter.weight_shape:
        raise AdapterError(
            f"{name}: the adapter is for a weight of shape {adapter.weight_shape}, the model has "
            f"{tuple(weight_shape)}; it was trained on another architecture"
        )


@torch.no_grad()
def check_size(name: str, adapter: LowRank) -> None:
    """Raise AdapterError where a file's finite numbers make a delta that is not, or one that no weight survives."""
    up = _length(adapter.lora_up)
    down = 1.0 if adapter.kind == "full" else _length(adapter.lora_down)
    largest = max(up, down, abs(adapter.alpha), abs(adapter.scale) * up * down)
    if not largest <= MAX_SIZE:
        raise AdapterError(
            f"{name}: its numbers make a change of up to {largest:.1e}, which no weight survives; the training "
            "diverged or the file is damaged"
        )


def _length(factor: Tensor) -> float:
    """The Frobenius norm, without overflow."""
    return torch.linalg.vector_norm(factor, dtype=torch.float64).item()


def shaped_for(adapter: LowRank, weight_shape: Sequence[int]) -> LowRank:
    """The same adapter with lora_down in the weight's shape, where only its dimensions differ.

    Some programs write a convolution's lora_down as (rank, in * kh * kw), or a Linear's as (rank, in, 1, 1).
    """
    wanted, there = tuple(weight_shape[1:]), tuple(adapter.lora_down.shape[1:])
    plain = len(wanted) != len(there) and math.prod(wanted) == math.prod(there)
    if not plain or (len(there) == 3 and there[1:] != (1, 1)):
        return adapter
    return adapter.replace(lora_down=adapter.lora_down.reshape(adapter.rank, *wanted))


def _check_rows(name: str, rows: Tensor, out: int) -> None:
    if rows.dtype != torch.int64 or rows.dim() != 1:
        raise AdapterError(f"{name}: block rows must be a list of whole numbers")
    values = rows.tolist()
    if min(values) < 0 or max(values) >= out:
        raise AdapterError(f"{name}: block rows reach outside the layer's {out} output rows")
    if len(set(values)) != len(values):
        raise AdapterError(f"{name}: block rows name the same output row twice")


def _alpha(alpha: float | None, rank: int) -> float:
    return float(rank if alpha is None else alpha)


def _uniform_down(inp: int, rank: int, generator: torch.Generator, kernel: Sequence[int] | None) -> Tensor:
    if rank < 1:
        raise AdapterError(f"rank is {rank}; it must be at least 1")
    shape = (rank, inp, *(kernel or ()))
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return (2 * torch.rand(shape, generator=generator) - 1) * bound


def _basis_down(
    inp: int,
    rank: int,
    basis: OrthogonalBasis,
    indices: Sequence[int] | Tensor,
    kernel: Sequence[int] | None,
) -> Tensor:
    if len(indices) != rank:
        raise AdapterError(f"rank is {rank} but {len(indices)} basis columns were chosen; they must be equal")
    shape = (inp, *(kernel or ()))
    return basis.columns(math.prod(shape), indices).reshape(rank, *shape)
