"""The peer that merges: token merging as a user would write it in PyTorch."""

from __future__ import annotations

from torch import Tensor, nn

from tocom.merging import Matching, cosine_scores, first_positions, merge
from tocom.vit import ReducedViT


class PlainToMe(nn.Module):
    """Token merging as one would write it for torch.onnx.export, which has no stable order as the reference does."""

    def __init__(self, reference: ReducedViT) -> None:
        super().__init__()
        self.reference = reference

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> logits."""
        return self.reference(pixel_values, self._step)

    def _step(self, _block: int, x: Tensor, token_size: Tensor, metric: Tensor, r: int) -> tuple[Tensor, Tensor]:
        protected = self.reference.model.num_prefix_tokens
        first_a, first_b = first_positions(protected)
        best, pick = cosine_scores(metric, protected).max(dim=-1)
        ranked = best.argsort(dim=-1, descending=True)
        src, unm = ranked[:, :r], ranked[:, r:].sort(dim=-1).values
        dst = first_b + 2 * pick.gather(-1, src)
        return merge(x, token_size, Matching(first_a + 2 * src, dst, first_a + 2 * unm, protected))
