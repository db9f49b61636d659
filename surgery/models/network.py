"""The network that a `Layout` describes, with the methods that users of timm expect of a classifier."""

from __future__ import annotations

from timm.models import checkpoint_seq
from torch import Tensor, nn

from surgery.models.blocks import BasicBlock, Bottleneck
from surgery.models.classifier import ResidualClassifier, init_classifier
from surgery.models.layout import Layout


class CifarResNet(ResidualClassifier):
    """Residual network for small images: stem, `layer1` to `layer3`, pooling, classifier.

    Args:
        cfg: Widths and depth; the name is the one timm's model builder passes it by.
        num_classes: Classes; 0 leaves the classifier out.
        in_chans: Channels of the images.
        global_pool: Pooling of `timm.layers.SelectAdaptivePool2d`; empty leaves it out.
        drop_rate: Probability of dropout before the classifier, in [0, 1).
        zero_init_last: Whether the last normalization of a block starts at zero, that is, the block as its shortcut.

    Shape:
        (N, in_chans, H, W) to (N, num_classes).
    """

    def __init__(
        self,
        cfg: Layout,
        *,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        zero_init_last: bool = True,
    ) -> None:
        super().__init__()
        self.layout = cfg
        self.num_features = 4 * cfg.output
        self.grad_checkpointing = False
        self.feature_info = _feature_info(cfg)

        self.conv1 = nn.Conv2d(in_chans, cfg.stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(cfg.stem)
        self.act1 = nn.ReLU(inplace=True)
        self.layer1 = _stage(cfg, 0)
        self.layer2 = _stage(cfg, 1)
        self.layer3 = _stage(cfg, 2)
        self.head_drop = nn.Dropout(drop_rate)
        self._set_classifier(num_classes, global_pool)
        init_residual(self, zero_init_last=zero_init_last)
        init_classifier(self.fc)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the feature map of the last stage, (N, num_features, H / 4, W / 4)."""
        x = self.act1(self.bn1(self.conv1(x)))
        features: Tensor
        if self.grad_checkpointing:
            features = checkpoint_seq([self.layer1, self.layer2, self.layer3], x, flatten=True)
        else:
            features = self.layer3(self.layer2(self.layer1(x)))
        return features

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return the patterns by which timm groups parameters for layer-wise learning rates."""
        return {"stem": r"^conv1|^bn1", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def _has_bias(self) -> bool:
        return self.layout.classifier_bias


def init_residual(network: nn.Module, *, zero_init_last: bool) -> None:
    """Draw the convolutions of a fresh network after He et al. and, if wanted, start its blocks as their shortcuts."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif zero_init_last and isinstance(module, BasicBlock | Bottleneck):
            nn.init.zeros_(module.last_norm.weight)


def _feature_info(cfg: Layout) -> list[dict[str, int | str]]:
    stem: dict[str, int | str] = {"num_chs": cfg.stem, "reduction": 1, "module": "act1"}
    return [stem] + [{"num_chs": cfg.output << i, "reduction": 1 << i, "module": f"layer{i + 1}"} for i in range(3)]


def _stage(cfg: Layout, index: int) -> nn.Sequential:
    outputs = cfg.output << index
    inputs = cfg.stem if index == 0 else outputs // 2
    first = _block(cfg, index, inputs, stride=2 if index else 1)
    return nn.Sequential(first, *(_block(cfg, index, outputs, stride=1) for _ in range(cfg.blocks - 1)))


def _block(cfg: Layout, index: int, inputs: int, *, stride: int) -> nn.Module:
    hidden, outputs = cfg.hidden << index, cfg.output << index
    if cfg.block == "basic":
        return BasicBlock(inputs, outputs, stride=stride, shortcut=cfg.shortcut)
    squeeze = None if cfg.reduction is None else outputs // cfg.reduction
    return Bottleneck(inputs, hidden, outputs, groups=cfg.groups, stride=stride, shortcut=cfg.shortcut, squeeze=squeeze)
