"torchvision's Mask R-CNN with the parts of scratchdet's: GroupNorm everywhere, R-50-FPN, 4conv1fc box head."
from functools import partial

import torch
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.resnet import Bottleneck, ResNet

from scratchdet.masks import unpack_masks


def torchvision_mask_rcnn(num_classes, size, *, blocks=(3, 4, 6, 3), channels=256, fc=1024, groups=32, rois=512,
                          post_nms_train=1000, **kwargs):
    "torchvision's model for images of `size` (h, w), which its transform then leaves as they are; its own initialization."
    norm = partial(nn.GroupNorm, groups)
    body = ResNet(Bottleneck, list(blocks), norm_layer=norm)
    backbone = BackboneWithFPN(body, {f'layer{i}': str(i - 1) for i in range(1, 5)}, [256, 512, 1024, 2048], channels, norm_layer=norm)
    model = MaskRCNN(
        backbone, min_size=min(size), max_size=max(size),
        rpn_anchor_generator=AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), ((.5, 1., 2.),) * 5),
        rpn_post_nms_top_n_train=post_nms_train, box_batch_size_per_image=rois,
        box_head=FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [fc], norm_layer=norm),
        box_predictor=FastRCNNPredictor(fc, num_classes + 1),
        mask_head=MaskRCNNHeads(channels, [channels] * 4, 1, norm_layer=norm),
        mask_predictor=MaskRCNNPredictor(channels, channels, num_classes + 1), **kwargs)
    return model


def torchvision_inputs(batch):
    "The images (float 0..1) and target dicts of torchvision for a scratchdet `Batch`."
    images, targets = [], []
    for i, (h, w) in enumerate(batch.sizes.tolist()):
        images.append(batch.images[i, :, :h, :w].float() / 255)
        if batch.masks is None: continue
        real = batch.valid[i]
        masks = unpack_masks(batch.masks[i][real], batch.images.shape[-1])[:, :h, :w].to(torch.uint8)
        targets.append(dict(boxes=batch.boxes[i][real], labels=batch.labels[i][real] + 1, masks=masks))
    return images, targets


class AsDetector(nn.Module):
    "torchvision's model behind the interface of `Detector`, so that the same loop trains it and the same code evaluates it."
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.mask_head = model.roi_heads.mask_head

    def forward(self, batch, keys=None):
        "Losses in training; else detections with 28x28 masks, before torchvision pastes them."
        model, images, targets = self.model, *torchvision_inputs(batch)
        if self.training: return model(images, targets)
        images, _ = model.transform(images)
        features = model.backbone(images.tensors)
        proposals, _ = model.rpn(images, features)
        found, _ = model.roi_heads(features, proposals, images.image_sizes)
        return [dict(boxes=o['boxes'], scores=o['scores'], labels=o['labels'] - 1, mask_probs=o['masks'][:, 0]) for o in found]
