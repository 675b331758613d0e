"""A mixture of experts (Mixtral, arXiv:2401.04088, section 2) in PyTorch, for checking.

With shared experts (DeepSeekMoE, arXiv:2401.06066, section 3.2), if a model has any.

Every expert works on every token, and what a token has not chosen counts nothing: all the
work that a mixture is there to save, and nothing that could be sorted wrongly.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class Mixture(nn.Module):
    """The feed-forward of a layer with experts.

    Shares are a softmax over all experts, in at least float32, cut to the largest and divided
    by their sum. What all tokens share is added as it is.
    """

    def __init__(
        self, dim: int, n_chosen: int, experts: list[nn.Module], shared: nn.Module | None
    ) -> None:
        super().__init__()
        self.router = nn.Linear(dim, len(experts), bias=False)
        self.experts = nn.ModuleList(experts)
        self.shared = shared
        self.n_chosen = n_chosen

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Each position on its own."""
        wide = torch.promote_types(x.dtype, torch.float32)
        all_shares = F.linear(x.to(wide), self.router.weight.to(wide)).softmax(-1)
        smallest = all_shares.topk(self.n_chosen).values[..., -1:]
        shares = torch.where(all_shares >= smallest, all_shares, 0)
        shares = shares / shares.sum(-1, keepdim=True)
        made = [expert(x).to(wide) * shares[..., e, None] for e, expert in enumerate(self.experts)]
        mixed = torch.stack(made).sum(0).to(x.dtype)
        return mixed if self.shared is None else mixed + self.shared(x)
