"""Lists the models of the zoo by library; their weights are not downloaded.

A model is built without memory for its arrays (on PyTorch's "meta" device) where that works. Large
models have smaller configurations; those of torchvision that take more than 1 GB are left out.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

MOST = 10**9  # the most bytes that a model may have

# torchvision registers shape rules for operators of its compiled extension, which does not load
# with every build of PyTorch. Building a model does not need them.
_operators = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, _name):
        _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

TIMM = (
    "resnet50 resnet50_gn resnetv2_50x1_bit seresnet50 ecaresnet50d resnest50d res2net50_26w_4s "
    "regnety_032 regnetz_c16_evos nfnet_f0 dm_nfnet_f0 efficientnet_b0 tf_efficientnetv2_s "
    "mobilenetv3_large_100 mobilenetv4_conv_small hgnetv2_b0 hgnet_small convnext_tiny "
    "convnextv2_tiny densenet121 dla34 dpn68 vgg16_bn xception41 inception_v4 inception_resnet_v2 "
    "hrnet_w18 cspdarknet53 darknet53 vovnet39a ghostnet_100 repvgg_a2 rexnet_100 poolformer_s12 "
    "vit_base_patch16_224 vit_small_patch16_dinov3 deit_small_patch16_224 cait_xxs24_224 "
    "beit_base_patch16_224 eva02_tiny_patch14_224 swin_tiny_patch4_window7_224 "
    "swinv2_tiny_window8_256 maxvit_tiny_tf_224 coatnet_0_rw_224 levit_128 efficientformer_l1 "
    "edgenext_small mobilevit_s fastvit_t8 tiny_vit_5m_224 davit_tiny mixer_b16_224 resmlp_12_224 "
    "gmlp_s16_224 volo_d1_224 xcit_nano_12_p16_224 crossvit_9_240 pvt_v2_b0 twins_svt_small "
    "focalnet_tiny_srf"
)
SMP = "Unet UnetPlusPlus MAnet Linknet FPN PSPNet PAN DeepLabV3 DeepLabV3Plus UPerNet Segformer"

Maker = Callable[[], torch.nn.Module]


def zoo() -> Iterator[tuple[str, Maker]]:
    """Yields the name of every model and a function that makes it."""
    yield from torchvision()
    yield from timm()
    yield from monai()
    yield from segmentation_models()
    yield from transformers()


def torchvision() -> Iterator[tuple[str, Maker]]:
    """Lists all models of torchvision: for images, segmentation, detection, video, optical flow."""
    from torchvision import models

    for name in models.list_models():
        if name.startswith("quantized_"):  # their state dicts contain packed integer tensors
            continue
        arguments = {"weights": None}
        if {"weights_backbone"} & set(models.get_model_builder(name).__annotations__):
            arguments["weights_backbone"] = None
        yield f"torchvision {name}", functools.partial(models.get_model, name, **arguments)


def timm() -> Iterator[tuple[str, Maker]]:
    """Lists architectures that cover the norm layers of timm."""
    import timm

    for name in TIMM.split():
        yield f"timm {name}", functools.partial(timm.create_model, name, pretrained=False)


def monai() -> Iterator[tuple[str, Maker]]:
    """Lists UNets for volumes and images, with batch, instance, group and layer norm."""
    from monai.networks import nets

    shape = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}
    unet = {**shape, "channels": (8, 16, 32), "strides": (2, 2)}
    steps = {"kernel_size": (3, 3, 3), "strides": (1, 2, 2), "upsample_kernel_size": (2, 2)}
    for norm in ("batch", "instance", ("group", {"num_groups": 2}), ("instance", {"affine": True})):
        name = norm if isinstance(norm, str) else f"{norm[0]} {norm[1]}"
        yield (
            f"monai UNet, {name}",
            functools.partial(nets.UNet, **unet, norm=norm, num_res_units=2),
        )
    yield "monai BasicUNet", functools.partial(nets.BasicUNet, **shape)
    yield "monai DynUNet", functools.partial(nets.DynUNet, **shape, **steps)
    yield "monai SegResNet", functools.partial(nets.SegResNet, **shape)
    yield "monai AttentionUnet", functools.partial(nets.AttentionUnet, **unet)
    yield "monai VNet", nets.VNet
    yield "monai UNETR", functools.partial(nets.UNETR, 1, 2, (32, 32, 32), hidden_size=192)
    yield "monai SwinUNETR", functools.partial(nets.SwinUNETR, 1, 2, feature_size=24)
    yield "monai HighResNet", functools.partial(nets.HighResNet, **shape)


def segmentation_models() -> Iterator[tuple[str, Maker]]:
    """Lists every decoder of segmentation-models-pytorch."""
    import segmentation_models_pytorch as smp

    for name in SMP.split():
        make = getattr(smp, name)
        yield f"smp {name}", functools.partial(make, "resnet34", encoder_weights=None)
    make = functools.partial(smp.Unet, "tu-efficientnet_b0", encoder_weights=None)
    yield "smp Unet, efficientnet-b0", make


def transformers() -> Iterator[tuple[str, Maker]]:
    """Lists transformers of Hugging Face with fewer layers."""
    import transformers as hf

    few = {"num_hidden_layers": 3}
    configurations: list[tuple[Any, dict[str, Any]]] = [
        (hf.BertForMaskedLM, few),
        (hf.GPT2LMHeadModel, {"n_layer": 3}),
        (hf.LlamaForCausalLM, {**few, "hidden_size": 512, "intermediate_size": 1024}),
        (hf.Wav2Vec2ForCTC, few),
        (hf.ViTForImageClassification, few),
        (hf.T5ForConditionalGeneration, {"num_layers": 3}),
        (hf.RobertaForMaskedLM, few),
        (hf.DistilBertForMaskedLM, {"n_layers": 3}),
        (hf.ConvNextForImageClassification, {}),
        (hf.CLIPModel, {}),
        (hf.MistralForCausalLM, {**few, "hidden_size": 512, "intermediate_size": 1024}),
        (hf.WhisperForConditionalGeneration, {"encoder_layers": 2, "decoder_layers": 2}),
        (hf.SegformerForSemanticSegmentation, {}),
        (hf.ResNetForImageClassification, {}),
    ]
    for model, changes in configurations:
        yield f"transformers {model.__name__}", functools.partial(_configured, model, changes)


def _configured(model: Any, changes: dict[str, Any]) -> torch.nn.Module:
    return model(model.config_class(**changes))
