"""A model of histories: what comes next after what a person did last.

    score(u, i) = τ · cos(tower(i_1 … i_n), e_i) + b_i

The tower reads a user's latest items, oldest first, and gives a vector for each position that depends on the items up
to it and on none after it. In training each position predicts the item after it; in ranking the last one counts. The
item vectors e are those that the tower reads, too (tied).

h_0 = dropout(√D/2 · e_i + g_gap), and each of the blocks is two steps with residuals:

    h ← h + dropout(mixing(LayerNorm(h)))            mixing: one of BLOCKS, over positions
    h ← h + dropout(W_2 SiLU(W_1 LayerNorm(h)))      each position by itself

- mix: [u; v] = SiLU(W x), y_t = Σ_(s ≤ t) k_h(t - s) v_s, W' (u ⊙ y): a learned kernel over lags for each head h, whose
  weights add up to 1. They begin as exp(-lag / λ_h) with λ from 1 to 100 items. No attention: a kernel is the same for
  all users, so it is one matrix product (gated mixing as in gMLP, Liu et al. 2021, with a kernel in place of a table)
- attention: causal self-attention, with a learned vector a position (SASRec, Kang & McAuley 2018)
- gru: a gated recurrent unit (GRU4Rec, Hidasi et al. 2016)
- mean: the mean of what came before; without g it does not depend on the order

gap: the coarse time since the item before (`gaps.gap_code`). Nothing here reads the time of the item to be predicted:
whoever ranks for a night does not know it.

Letters: R users of a group, T positions of a group, P positions of all groups, D width, H heads, E = D / H, L history.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ncf_dist.gaps import GAP_CODES
from ncf_dist.models.base import Embedding, Recommender, Side, rows_of
from ncf_dist.models.sequences import Sequences, Windows

TEMPERATURE = 0.07
"""τ begins as 1 / 0.07."""
SHORTEST, ROWS = 8, 32
"""Ranking: the shortest bucket of lengths, and the users of every product."""

Shapes = Sequence[tuple[int, int]]
"""(R, T) of groups, whose positions lie one after another: a user's T, then the next user's, then the next group."""


def in_groups(x: Tensor, shapes: Shapes) -> list[Tensor]:
    """(P, D) → each group's (R, T, D)."""
    parts = x.split([rows * positions for rows, positions in shapes])
    return [part.view(rows, positions, -1) for part, (rows, positions) in zip(parts, shapes, strict=True)]


def one_after_another(groups: Sequence[Tensor]) -> Tensor:
    """Each group's (R, T, D) → (P, D)."""
    return torch.cat([group.reshape(-1, group.shape[-1]) for group in groups])


# ---- what mixes positions --------------------------------------------------------------------------------------------


class Mix(nn.Module):
    def __init__(self, width: int, heads: int, history: int) -> None:
        super().__init__()
        self.heads = heads
        self.gate = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        lags, lengths = torch.arange(float(history)), torch.logspace(0, 2, heads)
        self.kernel = nn.Parameter(-lags / lengths[:, None])
        """(H, L) logarithms of the weights, by lag."""

    def forward(self, x: Tensor, shapes: Shapes) -> Tensor:
        u, v = functional.silu(self.gate(x)).chunk(2, -1)
        kernels = lag_matrices(self.kernel[:, : max(positions for _, positions in shapes)])
        y = one_after_another([self._over_lags(kernels, group) for group in in_groups(v, shapes)])
        mixed: Tensor = self.out(u * y)
        return mixed

    def _over_lags(self, kernels: Tensor, v: Tensor) -> Tensor:
        """(R, T, D) → (R, T, D). All users of a group are columns of one product a head."""
        rows, positions, width = v.shape
        columns = v.view(rows, positions, self.heads, -1).permute(2, 1, 0, 3).reshape(self.heads, positions, -1)
        y = torch.bmm(kernels[:, :positions, :positions], columns)
        return y.view(self.heads, positions, rows, -1).permute(2, 1, 0, 3).reshape(rows, positions, width)


def lag_matrices(kernel: Tensor) -> Tensor:
    """(H, T) logarithms of weights by lag → (H, T, T), row t: the weights of positions s ≤ t, which add up to 1.

    >>> lag_matrices(torch.tensor([[0.0, math.log(3)]]))
    tensor([[[1.0000, 0.0000],
             [0.7500, 0.2500]]])
    """
    weights = (kernel - kernel.detach().amax(1, keepdim=True)).float().exp()
    positions = kernel.shape[1]
    # Row t is a stretch of (w_(T-1) … w_1 w_0 0 … 0), which begins one place further left in each next row.
    stretches = functional.pad(weights.flip(1), (0, positions - 1)).unfold(1, positions, 1)
    return stretches.flip(1) / weights.cumsum(1)[:, :, None]


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, history: int) -> None:
        super().__init__()
        self.heads = heads
        # Without a bias: that of keys changes nothing, so that its gradient would be rounding alone.
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, shapes: Shapes) -> Tensor:
        mixed: Tensor = self.out(one_after_another([self._attend(group) for group in in_groups(self.qkv(x), shapes)]))
        return mixed

    def _attend(self, qkv: Tensor) -> Tensor:
        """(R, T, 3 D) → (R, T, D)"""
        rows, positions, _ = qkv.shape
        q, k, v = qkv.view(rows, positions, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return y.transpose(1, 2).reshape(rows, positions, -1)


class Recurrent(nn.Module):
    def __init__(self, width: int, heads: int, history: int) -> None:
        super().__init__()
        self.gru = nn.GRU(width, width, batch_first=True)

    def forward(self, x: Tensor, shapes: Shapes) -> Tensor:
        if x.is_cuda:
            torch.backends.cudnn.allow_tf32 = (
                False  # cuDNN's recurrences alone would round float32 without being asked.
            )
        return one_after_another([self.gru(group)[0] for group in in_groups(x, shapes)])


class Mean(nn.Module):
    def __init__(self, width: int, heads: int, history: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, shapes: Shapes) -> Tensor:
        mixed: Tensor = self.out(one_after_another([_means(group) for group in in_groups(x, shapes)]))
        return mixed


def _means(x: Tensor) -> Tensor:
    """(R, T, D) → the mean of positions 0 to t at t."""
    count = torch.arange(1, x.shape[1] + 1, device=x.device)
    return x.float().cumsum(1) / count[:, None]


BLOCKS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "mix": Mix,
    "attention": Attention,
    "gru": Recurrent,
    "mean": Mean,
}
"""What mixes positions, by `model.block`: made from (width, heads, history), it maps (P, D) of groups to (P, D)."""


class Dropout(nn.Dropout):
    """torch's dropout, whose random bits a CPU draws eight times as fast: four decisions from one number."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return super().forward(x)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        # Of 2^16 equally likely numbers, so many from the least one on are dropped.
        kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= round(self.p * 2**16) - 2**15
        dropped: Tensor = x * kept.to(x.dtype).div_(1 - self.p)
        return dropped


# ---- the tower -------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, block: str, width: int, heads: int, history: int, dropout: nn.Dropout) -> None:
        super().__init__()
        self.before_mixing, self.before_layers = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mixing = BLOCKS[block](width, heads, history)
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = dropout

    def forward(self, h: Tensor, shapes: Shapes) -> Tensor:
        h = h + self.dropout(self.mixing(self.before_mixing(h), shapes))
        wide = functional.silu(self.wide(self.before_layers(h)))
        after: Tensor = h + self.dropout(self.narrow(wide))
        return after


class History(Recommender):
    """A tower over histories whose output is compared with the items' vectors."""

    sequential = True

    def __init__(
        self,
        n_users: int,
        n_items: int,
        width: int,
        history: int,
        *,
        block: str = "mix",
        blocks: int = 2,
        heads: int = 8,
        gaps: bool = True,
        dropout: float = 0.0,
        std: float = 0.05,
    ) -> None:
        """width: D, a multiple of heads. history: L, positions at most. Users have no weights of their own."""
        super().__init__()
        self.users_known, self.history, self.block = n_users, history, block
        self.item = Embedding(n_items, width, std)
        self.item_bias = Embedding(n_items, 1, 0.0)
        self.gap = Embedding(GAP_CODES, width, std) if gaps else None
        self.position = Embedding(history, width, std) if block == "attention" else None
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(Block(block, width, heads, history, self.dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(TEMPERATURE)))
        """log τ"""

    @property
    def n_users(self) -> int:
        return self.users_known

    # ---- the tower

    def tower(self, groups: Sequence[Sequences]) -> Tensor:
        """Groups of (R, T) → (P, D), before the last norm."""
        shapes = [tuple(group.items.shape) for group in groups]
        items, gaps = (torch.cat([getattr(group, part).reshape(-1) for group in groups]) for part in ("items", "gaps"))
        h: Tensor = self.item(items) * (math.sqrt(self.item.embedding_dim) / 2)
        if self.gap is not None:
            h = h + self.gap(gaps)
        if self.position is not None:
            place = torch.cat([torch.arange(t, device=h.device).expand(r, t).reshape(-1) for r, t in shapes])
            h = h + self.position(place)
        h = self.dropout(h)
        for block in self.blocks:
            h = block(h, shapes)
        return h

    def positions(self, windows: Windows) -> Side:
        """The users' side at each of the N known positions, (N, D)."""
        return Side(self._direction(rows_of(self.tower(windows.groups), windows.known)))

    def _direction(self, h: Tensor) -> Tensor:
        """(N, D) → (N, D) of length τ."""
        direction: Tensor = functional.normalize(self.norm(h).float(), dim=-1) * self.log_scale.exp()
        return direction

    # ---- the formula

    def user_side(self, user: Sequences) -> Side:
        """What R users did last → (R, D). A user's row depends on that user alone, to the bit: it is computed among
        ROWS users, on a length that the user's own decides. Zeros for users without items: their score is the bias."""
        dot = self.item.weight.new_zeros(len(user.length), self.item.embedding_dim)
        for which, some in by_own_length(user, self.history):
            last = torch.arange(ROWS, device=dot.device) * some.items.shape[1] + some.length - 1
            dot = dot.index_copy(0, which, self.positions(Windows((some,), last)).dot[: len(which)])  # type: ignore[index]
        return Side(dot)

    def item_side(self, item: Tensor | None) -> Side:
        assert self.item_bias is not None
        return Side(functional.normalize(self.item(item), dim=-1), self.item_bias(item))

    def users(self, user: Sequences) -> Side:
        return self.user_side(user)

    def items(self, item: Tensor) -> Side:
        if item.numel() < self.n_items:
            return self.item_side(item)
        return self.item_side(None).each(lambda part: rows_of(part, item))


def by_own_length(latest: Sequences, history: int) -> Iterator[tuple[Tensor, Sequences]]:
    """R users in groups of ROWS: (which of them, (ROWS, T)), T being the least of 8, 16, 32 … and `history` that has
    room for the user's own items. A group with fewer users is filled up. Users without items are in none.
    Raises ValueError for more items than `history`."""
    length = latest.length.cpu()
    if len(length) and int(length.max()) > history:
        raise ValueError(f"a user has {int(length.max())} latest items; needed at most model.history, {history}")
    least = 0
    for most in bucket_lengths(history):
        users = torch.nonzero((length > least) & (length <= most))[:, 0].to(latest.items.device)
        width = min(most, latest.items.shape[1])
        for which in users.split(ROWS) if len(users) else ():
            some = latest.rows(torch.cat([which, which[:1].expand(ROWS - len(which))]))
            items, gaps = (functional.pad(part[:, :width], (0, most - width)) for part in (some.items, some.gaps))
            yield which, Sequences(items, gaps, some.length)
        least = most


def bucket_lengths(history: int) -> list[int]:
    """
    >>> bucket_lengths(100)
    [8, 16, 32, 64, 100]
    """
    lengths = [SHORTEST]
    while 2 * lengths[-1] < history:
        lengths.append(2 * lengths[-1])
    return [length for length in lengths if length < history] + [history]
