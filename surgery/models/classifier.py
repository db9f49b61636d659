"""What the networks here have in common: pooling, a classifier, and the methods that users of timm expect of one."""

from __future__ import annotations

from abc import ABC, abstractmethod

from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn


class ResidualClassifier(nn.Module, ABC):
    """Features, pooled, through dropout and a linear layer.

    A subclass sets `num_features` and `head_drop` and makes its first convolution before it sets the classifier.
    """

    num_features: int
    head_drop: nn.Module
    global_pool: SelectAdaptivePool2d
    fc: nn.Module
    grad_checkpointing: bool

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.forward_head(self.forward_features(x))

    @abstractmethod
    def forward_features(self, x: Tensor) -> Tensor:
        """Return the feature map of the last stage."""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool a feature map and classify it; with `pre_logits`, stop before the classifier."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)

    def get_classifier(self) -> nn.Module:
        """Return the last layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one for `num_classes`; None keeps the pooling."""
        self._set_classifier(num_classes, self.global_pool.pool_type if global_pool is None else global_pool)
        init_classifier(self.fc)
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    # No call of super(): a converted network takes these methods over without being a subclass.
    def _has_bias(self) -> bool:
        return True

    def _set_classifier(self, num_classes: int, global_pool: str) -> None:
        self.num_classes = num_classes
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        first = next(self.parameters())
        self.fc = new_classifier(self.head_hidden_size, num_classes, bias=self._has_bias(), like=first)


def new_classifier(inputs: int, classes: int, *, bias: bool, like: Tensor) -> nn.Module:
    """Return a linear layer with the device and dtype of `like`; for no classes, the identity."""
    if classes <= 0:
        return nn.Identity()
    return nn.Linear(inputs, classes, bias=bias, device=like.device, dtype=like.dtype)


def init_classifier(fc: nn.Module) -> None:
    """Draw the weights of a fresh classifier; one that was left out has none."""
    if isinstance(fc, nn.Linear):
        nn.init.normal_(fc.weight, std=1e-3)  # Zhao et al., 2022: near-uniform predictions at the start
        if fc.bias is not None:
            nn.init.zeros_(fc.bias)
