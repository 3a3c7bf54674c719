"""The models that people arrive with, in PyTorch: what StarGAN v1 and torchvision have."""

import torch
from torch import nn


def instance_norm(features):
    return nn.InstanceNorm2d(features, affine=True, track_running_stats=True)


class Residual(nn.Module):
    def __init__(self, features):
        super().__init__()
        conv = {"kernel_size": 3, "padding": 1, "bias": False}
        self.main = nn.Sequential(
            nn.Conv2d(features, features, **conv),
            instance_norm(features),
            nn.ReLU(),
            nn.Conv2d(features, features, **conv),
            instance_norm(features),
        )

    def forward(self, x):
        return x + self.main(x)


class Generator(nn.Module):
    """Choi et al., StarGAN, 2018, table 4."""

    def __init__(self, features=64, labels=5, blocks=6):
        super().__init__()
        f, options = features, {"bias": False}
        layers = [nn.Conv2d(3 + labels, f, 7, 1, 3, **options), instance_norm(f), nn.ReLU()]
        for _ in range(2):
            layers += [nn.Conv2d(f, 2 * f, 4, 2, 1, **options), instance_norm(2 * f), nn.ReLU()]
            f *= 2
        layers += [Residual(f) for _ in range(blocks)]
        for _ in range(2):
            up = nn.ConvTranspose2d(f, f // 2, 4, 2, 1, **options)
            layers += [up, instance_norm(f // 2), nn.ReLU()]
            f //= 2
        layers += [nn.Conv2d(f, 3, 7, 1, 3, **options), nn.Tanh()]
        self.main = nn.Sequential(*layers)

    def forward(self, x, labels):
        everywhere = labels[:, :, None, None].expand(-1, -1, *x.shape[2:])
        return self.main(torch.cat([x, everywhere], dim=1))


class BasicBlock(nn.Module):
    def __init__(self, before, features, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, features, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(features)
        self.downsample = None
        if stride != 1 or before != features:
            self.downsample = nn.Sequential(
                nn.Conv2d(before, features, 1, stride, bias=False), nn.BatchNorm2d(features)
            )

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet18(nn.Module):
    """torchvision.models.resnet18, by its names."""

    def __init__(self, classes=1000, features=64):
        super().__init__()
        self.conv1 = nn.Conv2d(3, features, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(features)
        before = features
        for k in range(4):
            now = features * 2**k
            blocks = [BasicBlock(before, now, 2 if k else 1), BasicBlock(now, now, 1)]
            setattr(self, f"layer{k + 1}", nn.Sequential(*blocks))
            before = now
        self.fc = nn.Linear(before, classes)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = nn.functional.max_pool2d(x, 3, 2, 1)
        for k in range(4):
            x = getattr(self, f"layer{k + 1}")(x)
        return self.fc(x.mean((2, 3)))
