"""PyTorch models that the tests convert, with the names of well-known implementations."""

import functools

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
    """The generator of Choi et al., StarGAN, 2018, table 4."""

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


def shortcut(before, features, stride):
    """Returns a projection if the shape changes, and None otherwise."""
    if stride == 1 and before == features:
        return None
    return nn.Sequential(
        nn.Conv2d(before, features, 1, stride, bias=False), nn.BatchNorm2d(features)
    )


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, before, features, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, features, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(features)
        self.downsample = shortcut(before, features, stride)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, before, features, stride):
        super().__init__()
        after = self.expansion * features
        self.conv1 = nn.Conv2d(before, features, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(features)
        self.conv3 = nn.Conv2d(features, after, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(after)
        self.downsample = shortcut(before, after, stride)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """The models torchvision.models.resnet18 to resnet152, with their names."""

    def __init__(self, block, blocks, classes=1000, features=64):
        super().__init__()
        self.conv1 = nn.Conv2d(3, features, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(features)
        before = features
        for k, number in enumerate(blocks):
            stage = []
            for i in range(number):
                stage.append(block(before, features * 2**k, 2 if k and not i else 1))
                before = features * 2**k * block.expansion
            setattr(self, f"layer{k + 1}", nn.Sequential(*stage))
        self.fc = nn.Linear(before, classes)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = nn.functional.max_pool2d(x, 3, 2, 1)
        for k in range(4):
            x = getattr(self, f"layer{k + 1}")(x)
        return self.fc(x.mean((2, 3)))


ResNet18 = functools.partial(ResNet, BasicBlock, (2, 2, 2, 2))
ResNet50 = functools.partial(ResNet, Bottleneck, (3, 4, 6, 3))


class Conv1D(nn.Module):
    """The Linear of Hugging Face's GPT-2, with a weight of shape (inputs, outputs)."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.c_attn = Conv1D(3 * width, width)
        self.c_proj = Conv1D(width, width)

    def forward(self, x):
        parts = self.c_attn(x).split(x.shape[-1], dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.c_fc = Conv1D(4 * width, width)
        self.c_proj = Conv1D(width, 4 * width)

    def forward(self, x):
        return self.c_proj(nn.functional.gelu(self.c_fc(x), approximate="tanh"))


class GPT2Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT2Model(nn.Module):
    def __init__(self, layers, heads, width, vocabulary, positions):
        super().__init__()
        self.wte = nn.Embedding(vocabulary, width)
        self.wpe = nn.Embedding(positions, width)
        self.h = nn.ModuleList(GPT2Block(width, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        for embedding in (self.wte, self.wpe):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, ids):
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.h:
            x = block(x)
        return self.ln_f(x)


class GPT2(nn.Module):
    """The model transformers.GPT2LMHeadModel, with its names."""

    def __init__(self, layers=12, heads=12, width=768, vocabulary=50257, positions=1024):
        super().__init__()
        self.transformer = GPT2Model(layers, heads, width, vocabulary, positions)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.transformer.wte.weight

    def forward(self, ids):
        return self.lm_head(self.transformer(ids))


# ---- Models with changed values ----


@torch.no_grad()
def moved(model, *inputs):
    """Returns the model in evaluation, with changed scales, biases and running statistics.

    The variance of some channels is so small that a wrong epsilon has an effect.
    """
    for module in model.modules():
        if "Norm" in type(module).__name__:
            module.momentum = 0.9  # the initial statistics have little weight
            module.weight.uniform_(0.5, 1.5)
            module.bias.uniform_(-0.5, 0.5)
        elif getattr(module, "bias", None) is not None:
            module.bias.uniform_(-0.1, 0.1)
        if "Conv2d" in type(module).__name__:
            module.weight.mul_(10 ** torch.empty(len(module.weight), 1, 1, 1).uniform_(-1.5, 0))
    for _ in range(3):
        model(*inputs)
    return model.eval()
