"""LAPX, the Lightweight Hourglass Network with Global Context (arXiv 2512.16089), in one file.

    import torch
    from lapx import STRIDE, decode, lapx

    model = lapx(weights="mpii").eval()     # the authors' weights; lapx(num_joints=16): untrained
    images = torch.zeros(1, 3, 256, 256)    # RGB, (values in 0..1 - MEAN) / STD
    with torch.no_grad():
        heatmaps = model(images)            # a list of S heatmaps (B,K,h,w), the last is the best
    keypoints, scores = decode(heatmaps[-1])
    print(STRIDE * keypoints)               # (B,K,2), x and y in pixels of the input

It needs torch alone: copy it into a project and it works. `python lapx.py` prints the size and the
cost of every variant beside the paper's figures.

A stem brings the picture to a quarter of its size. Then come S stages. Each stage is an hourglass
(down to 1/64 of the picture, and up again), which ends in one heatmap per joint. The next stage
sees the features and the heatmaps, and does better. The last stage's heatmaps are the prediction.

What each module puts out for one picture of 256 x 256, channels x height x width (PAPER Figure 1):

    stem.conv                            52 x 128 x 128
    stem.block1                         104 x 128 x 128    a 2x2 max pooling follows
    stem.block2                         208 x 64 x 64
    stem.block3                         208 x 64 x 64
    stem.attention                      208 x 64 x 64
    stages.0.hourglass.levels.3.skip    208 x 64 x 64      levels 2, 1, 0: at 32, 16, 8
    stages.0.hourglass.levels.3.down    208 x 32 x 32      levels 2, 1, 0: at 16, 8, 4
    stages.0.hourglass.levels.0.down    208 x 4 x 4
    stages.0.hourglass.bottom           208 x 4 x 4
    stages.0.hourglass.neck             208 x 4 x 4        Non-Local: each cell sees all 16
    stages.0.hourglass.levels.0.up      208 x 4 x 4        upsampled, then added to its skip
    stages.0.hourglass.levels.3.up      208 x 32 x 32
    stages.0.hourglass                  208 x 64 x 64
    stages.0.block                      208 x 64 x 64
    stages.0.conv                       208 x 64 x 64
    stages.0.attention                  208 x 64 x 64
    stages.0.head                        16 x 64 x 64      the heatmaps of stage 1
    stages.0.features_to_next           208 x 64 x 64
    stages.0.heatmaps_to_next           208 x 64 x 64      the last stage has no *_to_next

Glossary. One letter means one thing, unless a docstring says otherwise:
    B batch    C channels    K joints    S stages    N persons of a data set
    H, W       height and width of the network's input; sizes are written (height, width)
    h, w       height and width of a feature map or a heatmap, H/4 and W/4 for heatmaps
    visible    of a joint: annotated, even if occluded (COCO says labelled)
    alpha      the soft gate: one learnt factor per channel of a residual
    gamma      the factor of the global context: one number per Non-Local module
    neck       the attention at the bottom of an hourglass, where the map is smallest (the paper)
    width      of a block: the number of channels inside it; of a picture or box: pixels
    cell       one position (y, x) of a feature map

Three tags tie the code to the paper; `grep -nE "PAPER|DIFFERS" *.py` finds them all. `PAPER` with a
section, an equation, a table or a figure: it stands there. `PAPER SILENT`: we had to choose.
`DIFFERS`: we do something else. The README lists the last two in a table.
"""

import argparse
import hashlib
import pickle
import re
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# PAPER SILENT: colours and normalisation. RGB with ImageNet's mean and standard deviation, as HRNet
# has it (SimpleBaseline feeds BGR with the same numbers: evaluate.py --bgr).
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
STRIDE = 4  # heatmap pixel (x, y) lies on input pixel (4x, 4y); there is no half-pixel term
MIN_SIZE = 64  # an hourglass halves the heatmap four times, so H/4 and W/4 are at least 16


class InputError(ValueError):
    """A user's mistake, told in one sentence: which thing, what was expected, the way out."""


@dataclass(frozen=True)
class Skeleton:
    """The joints of a data set. A new set of joints is one more entry in SKELETONS. ValueError if
    its parts do not fit together."""

    joints: tuple  # K names, in the order of the heatmaps
    flip_pairs: tuple  # pairs of joint indices that change places in a mirror; (): never mirrored
    limbs: tuple  # pairs of joint indices that are joined by a line in drawings
    sigmas: tuple = ()  # K falloffs of the object keypoint similarity (OKS), COCO's metric

    def __post_init__(self):
        try:
            K = len(self.joints)
            paired = [index for a, b in self.flip_pairs for index in (a, b)]
            drawn = [index for a, b in self.limbs for index in (a, b)]
            faults = {
                "joints are no tuple of different names": isinstance(self.joints, str) or {
                    type(name) for name in self.joints} != {str} or len({*self.joints}) < K,
                f"flip_pairs and limbs are not all of indices from 0 to {K - 1} (in COCO's files "
                "limbs count from 1)": not {*paired, *drawn} <= {*range(K)},
                "a joint is in two flip_pairs": len({*paired}) < len(paired),
                f"sigmas are not {K} numbers, or none": len(self.sigmas) not in (0, K)}
        except (TypeError, ValueError) as error:
            raise ValueError(f"all must be tuples, pairs as in ((0, 1),): {self}") from error
        for fault in [fault for fault, found in faults.items() if found]:
            raise ValueError(f"{fault}: {self}")


SKELETONS = {
    "mpii": Skeleton(
        joints=("right ankle", "right knee", "right hip", "left hip", "left knee", "left ankle",
                "pelvis", "thorax", "upper neck", "head top", "right wrist", "right elbow",
                "right shoulder", "left shoulder", "left elbow", "left wrist"),
        flip_pairs=((0, 5), (1, 4), (2, 3), (10, 15), (11, 14), (12, 13)),
        limbs=((0, 1), (1, 2), (2, 6), (6, 3), (3, 4), (4, 5), (6, 7), (7, 8), (8, 9),
               (10, 11), (11, 12), (12, 7), (7, 13), (13, 14), (14, 15)),
    ),
    "coco": Skeleton(
        joints=("nose", "left eye", "right eye", "left ear", "right ear", "left shoulder",
                "right shoulder", "left elbow", "right elbow", "left wrist", "right wrist",
                "left hip", "right hip", "left knee", "right knee", "left ankle", "right ankle"),
        flip_pairs=((1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12), (13, 14), (15, 16)),
        limbs=((0, 1), (0, 2), (1, 3), (2, 4), (5, 6), (5, 7), (7, 9), (6, 8), (8, 10), (5, 11),
               (6, 12), (11, 12), (11, 13), (13, 15), (12, 14), (14, 16)),
        sigmas=(.026, .025, .025, .035, .035, .079, .079, .072, .072, .062, .062, .107, .107,
                .087, .087, .089, .089),
    ),
}


# ---------------------------------------------------------------------------- attention

# Every part below maps (B,C,h,w) -> the same shape and is made with the number of channels C.
# Maxima are taken by max, whose gradient goes to one place. amax shares it among all elements that
# equal the maximum. None do where torch.compile compares them with a maximum that it has rounded to
# bfloat16, and the shares are 0 / 0. (In export.py, without gradients, amax is right.)

class ECA(nn.Module):
    """Efficient channel attention: a gate for each channel from itself and its six neighbours.

    PAPER §3.3: average plus maximum over the pixels, a kernel of 7 channels."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 7, padding=3, bias=False)

    def forward(self, x):
        maximum = x.flatten(2).max(2).values  # (B,C)
        descriptor = x.mean((2, 3)) + maximum  # (B,C)
        gate = self.conv(descriptor[:, None]).sigmoid()  # (B,1,C)
        return x * gate.transpose(1, 2)[..., None]  # (B,C,1,1) scales (B,C,h,w)


class ChannelMLP(nn.Module):
    """The first half of CBAM (Woo et al. 2018): a gate for each channel, from all of them.

    PAPER Table 3, row 5."""

    def __init__(self, channels):
        super().__init__()
        self.squeeze = nn.Linear(channels, channels // 16, bias=False)
        self.excite = nn.Linear(channels // 16, channels, bias=False)

    def gate(self, descriptor):
        return self.excite(self.squeeze(descriptor).relu()).sigmoid()  # (B,C) -> (B,C)

    def forward(self, x):
        # PAPER SILENT: CBAM's gate. The authors' code takes a sigmoid of each descriptor and adds
        # the two, so that the gate runs from 0 to 2; Woo et al. add first and take one sigmoid.
        maximum = x.flatten(2).max(2).values  # (B,C)
        gate = self.gate(maximum) + self.gate(x.mean((2, 3)))  # (B,C)
        return x * gate[..., None, None]


class SpatialAttention(nn.Module):
    """The second half of CBAM and of ECA-CBAM: a gate for each pixel. PAPER §3.3."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x):
        maximum = x.max(1, keepdim=True).values  # (B,1,h,w)
        pooled = torch.cat([maximum, x.mean(1, keepdim=True)], dim=1)  # (B,2,h,w)
        return x * self.conv(pooled).sigmoid()


class NonLocal(nn.Module):
    """Global context (Wang et al. 2018): every cell adds what it finds in all cells. PAPER §3.3.

    Cell i gets context_i = sum over j of A_ij value_j, where A_ij is the softmax over j of
    query_i . key_j, and puts out gamma * out(context_i) + x_i. gamma starts at 0, and gamma alone
    decides how much is added: there is no other switch."""

    def __init__(self, channels):
        super().__init__()
        self.query = nn.Conv2d(channels, channels // 8, 1)
        self.key = nn.Conv2d(channels, channels // 8, 1)
        self.value = nn.Conv2d(channels, channels // 8, 1)
        self.out = nn.Conv2d(channels // 8, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def attention(self, x):
        """Where each cell looks: (B,C,h,w) -> A (B,h*w,h*w); each row sums to 1."""
        query = self.query(x).flatten(2)  # (B,C/8,h*w)
        key = self.key(x).flatten(2)  # (B,C/8,h*w)
        # PAPER SILENT: scale of the attention. The authors' code divides by nothing.
        return (query.transpose(1, 2) @ key).softmax(dim=-1)

    def forward(self, x):
        value = self.value(x).flatten(2)  # (B,C/8,h*w)
        context = value @ self.attention(x).transpose(1, 2)  # (B,C/8,h*w)
        context = self.out(context.unflatten(2, x.shape[2:]))  # (B,C,h,w)
        return self.gamma.to(context.dtype) * context + x  # else bfloat16 would become float32


ATTENTION = {
    None: {},  # the identity
    "ECA": {"eca": ECA},
    "CBAM": {"mlp": ChannelMLP, "spatial": SpatialAttention},  # PAPER Table 3, row 5
    "ECA-CBAM": {"eca": ECA, "spatial": SpatialAttention},  # PAPER §3.3
    "ECA-NonLocal": {"eca": ECA, "non_local": NonLocal},  # PAPER §3.3
}


def attention(kind, channels):
    """The parts of a kind of attention, one after the other."""
    return nn.Sequential(OrderedDict(
        (name, part(channels)) for name, part in ATTENTION[kind].items()))


# ---------------------------------------------------------------------------- the network

class Block(nn.Module):
    """Residual block, a pre-activation bottleneck: (B,inputs,h,w) -> (B,outputs,h,w). PAPER §3.

    1x1, depthwise 3x3 and 1x1 convolutions, each after BatchNorm and ELU. With a soft gate (Bulat
    et al. 2020; PAPER Table 3, row 7) the residual is multiplied by alpha, channel by channel.
    Where the number of channels changes, the residual is a 1x1 convolution of x."""

    def __init__(self, inputs, outputs, soft_gate=False):
        super().__init__()
        width = outputs // 2
        self.elu = nn.ELU(inplace=True)  # over BatchNorm's output, which nothing else needs
        self.bn1 = nn.BatchNorm2d(inputs)
        self.pointwise1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.pointwise2 = nn.Conv2d(width, outputs, 1)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)
        # PAPER SILENT: start of alpha. 0 in the authors' code: at first no residual passes.
        self.alpha = nn.Parameter(torch.zeros(1, outputs, 1, 1)) if soft_gate else None

    def forward(self, x):
        y = self.pointwise1(self.elu(self.bn1(x)))
        y = self.depthwise(self.elu(self.bn2(y)))
        y = self.pointwise2(self.elu(self.bn3(y)))
        residual = self.shortcut(x)
        if self.alpha is not None:
            residual = self.alpha.to(residual.dtype) * residual  # else bfloat16 becomes float32
        return y + residual


class Stem(nn.Module):
    """Brings the picture to a quarter of its size: (B,3,H,W) -> (B,C,h,w). PAPER Figure 1."""

    def __init__(self, config):
        super().__init__()
        C = config.channels
        self.conv = nn.Conv2d(3, C // 4, 7, stride=2, padding=3, bias=False)
        self.bn = nn.BatchNorm2d(C // 4)
        self.elu = nn.ELU(inplace=True)
        # PAPER SILENT: which blocks are gated. In the authors' weights, those in the hourglasses.
        self.block1 = Block(C // 4, C // 2)
        self.block2 = Block(C // 2, C)
        self.block3 = Block(C, C)
        self.attention = attention(config.stem_attention, C)

    def forward(self, images):
        x = self.elu(self.bn(self.conv(images)))  # (B,C/4,H/2,W/2)
        x = F.max_pool2d(self.block1(x), 2)  # (B,C/2,h,w)
        x = self.block3(self.block2(x))  # (B,C,h,w)
        return self.attention(x)


class Hourglass(nn.Module):
    """Down four times, up four times, a skip at each size: (B,C,h,w) -> same. PAPER Figure 1."""

    def __init__(self, config, neck_attention, depth=4):
        super().__init__()
        C = config.channels
        self.levels = nn.ModuleList()  # [0] is the deepest
        for _ in range(depth):
            self.levels.append(nn.ModuleDict({
                "skip": Block(C, C, config.soft_gate),  # before the pooling
                "down": Block(C, C, config.soft_gate),  # after the pooling
                "up": Block(C, C, config.soft_gate)}))  # before the upsampling
        self.bottom = Block(C, C, config.soft_gate)
        self.neck = attention(neck_attention, C)

    def forward(self, x):
        skips = []
        for level in reversed(self.levels):
            skips.append(level["skip"](x))
            x = level["down"](F.max_pool2d(x, 2))
        x = self.neck(self.bottom(x))
        for level in self.levels:
            skip = skips.pop()
            # DIFFERS: upsampling of odd sizes. The authors' code doubles the size and so fails at
            # 384x288, where 9 columns are pooled to 4; we upsample to the size of the skip.
            x = skip + F.interpolate(level["up"](x), size=skip.shape[2:], mode="nearest")
        return x


class Stage(nn.Module):
    """An hourglass, its heatmaps, and what the next stage starts from. PAPER Figure 1.

    x (B,C,h,w) -> heatmaps (B,K,h,w), next x (B,C,h,w). The last stage returns its x unchanged."""

    def __init__(self, config, index):
        super().__init__()
        C = config.channels
        K = config.num_joints
        self.hourglass = Hourglass(config, config.neck_attention[index])
        self.block = Block(C, C)
        self.conv = nn.Conv2d(C, C, 1, bias=False)
        self.bn = nn.BatchNorm2d(C)
        self.elu = nn.ELU(inplace=True)
        self.attention = attention(config.stage_attention, C)
        self.head = nn.Conv2d(C, K, 1)
        self.last = index == config.stages - 1
        if not self.last:
            self.features_to_next = nn.Conv2d(C, C, 1)
            self.heatmaps_to_next = nn.Conv2d(K, C, 1)

    def forward(self, x):
        y = self.block(self.hourglass(x))
        y = self.attention(self.elu(self.bn(self.conv(y))))  # (B,C,h,w)
        heatmaps = self.head(y)  # (B,K,h,w), no activation
        if self.last:
            return heatmaps, x
        return heatmaps, x + self.features_to_next(y) + self.heatmaps_to_next(heatmaps)


@dataclass(frozen=True)
class LAPXConfig:
    """All that decides the network's shape, and the value to which training raises gamma."""

    num_joints: int = 16
    channels: int = 208
    soft_gate: bool = True  # inside the hourglasses
    stem_attention: str | None = "ECA-CBAM"  # at the end of the stem
    stage_attention: str | None = "ECA-CBAM"  # after every hourglass
    # PAPER SILENT: the neck of stage 2. The paper says that it has no ECA-NonLocal; the authors'
    # weights have a plain ECA there, and so have we.
    neck_attention: tuple = ("ECA-NonLocal", "ECA", "ECA-NonLocal")  # one per stage
    gamma_target: float = 0.2

    @property
    def stages(self):
        return len(self.neck_attention)


class LAPX(nn.Module):
    """The whole network: images (B,3,H,W), normalised RGB -> list of S heatmaps (B,K,h,w).

    PAPER Figure 1. The same in training and in evaluation; the last element is the prediction. Any
    H and W from 64 on. InputError for images of another shape."""

    # PAPER SILENT: initial weights. PyTorch's defaults, but for alpha and gamma, which are 0.
    def __init__(self, config=LAPXConfig()):
        super().__init__()
        self.config = config
        self.stem = Stem(config)
        self.stages = nn.ModuleList(Stage(config, index) for index in range(config.stages))

    def forward(self, images):
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < MIN_SIZE:
            raise InputError(f"LAPX takes images (B, 3, H, W) with H and W from {MIN_SIZE} on, not "
                             f"a tensor of shape {tuple(images.shape)}")
        x = self.stem(images)
        outputs = []
        for stage in self.stages:
            heatmaps, x = stage(x)
            outputs.append(heatmaps)
        return outputs

    def non_locals(self):
        """The Non-Local modules: {stage, counted from 1: module}."""
        return {number: stage.hourglass.neck.non_local
                for number, stage in enumerate(self.stages, start=1)
                if hasattr(stage.hourglass.neck, "non_local")}


def make_variants():
    """Every network of PAPER Table 3 by its row, LAPX (row 12) and its predecessor LAP."""
    row2 = LAPXConfig(soft_gate=False, stem_attention=None, stage_attention=None,
                      neck_attention=(None,) * 3)
    row1 = replace(row2, channels=256, neck_attention=(None,) * 2)
    # DIFFERS: channels of row 3. Table 3 prints 190, the text 180; only 180 gives its 2.25 M.
    row3 = replace(row2, channels=180, neck_attention=(None,) * 4)
    row4 = replace(row2, channels=160, neck_attention=(None,) * 5)
    row5 = replace(row2, stage_attention="CBAM")
    row6 = replace(row2, stage_attention="ECA-CBAM")
    row7 = replace(row2, soft_gate=True)
    row8 = replace(row6, soft_gate=True)
    row9 = replace(row6, stem_attention="ECA-CBAM")
    row10 = replace(row8, stem_attention="ECA-CBAM")
    row11 = replace(row10, neck_attention=LAPXConfig.neck_attention, gamma_target=0.1)
    row12 = replace(row11, gamma_target=0.2)
    row13 = replace(row11, gamma_target=0.3)
    row14 = replace(row11, gamma_target=0.4)
    lap = replace(row1, stem_attention="CBAM", stage_attention="CBAM",
                  neck_attention=("CBAM",) * 2)
    rows = (row1, row2, row3, row4, row5, row6, row7, row8, row9, row10, row11, row12, row13, row14)
    return {"lapx": row12, "lap": lap} | {f"row{n}": row for n, row in enumerate(rows, start=1)}


VARIANTS = make_variants()


# ---------------------------------------------------------------------------- decoding

def heatmap_size(height, width):
    """The size (h, w) of the heatmaps for an input of that size: the stem's convolution halves it
    and rounds up, its pooling halves it and rounds down."""
    return (height + 1) // 2 // 2, (width + 1) // 2 // 2


def decode(heatmaps, quarter_offset=True):
    """Heatmaps (B,K,h,w) -> keypoints (B,K,2), scores (B,K).

    A keypoint is (x, y) in heatmap pixels, whole numbers at pixel centres; times STRIDE it is in
    pixels of the network's input. Its score is the height of the peak.

    The keypoint is the highest pixel, the first one if several are equal. With the quarter offset
    it then moves a quarter of a pixel towards the higher neighbour, left or right, up or down,
    unless it lies in columns or rows 0, 1 or the last (SimpleBaseline's border). If no pixel of a
    map is above 0, the keypoint is (0, 0)."""
    h, w = heatmaps.shape[2:]
    flat = heatmaps.flatten(2)  # (B,K,h*w)
    peak = flat.argmax(dim=2, keepdim=True)  # (B,K,1)
    scores = flat.gather(2, peak)  # (B,K,1)
    x = peak % w
    y = peak // w

    def higher(step):  # 1, 0 or -1: is the pixel after the peak higher than the one before?
        after = flat.gather(2, (peak + step).clamp(max=h * w - 1))
        before = flat.gather(2, (peak - step).clamp(min=0))
        return (after - before).sign()

    keypoints = torch.cat([x, y], dim=2).to(flat.dtype)  # (B,K,2)
    if quarter_offset:
        inside = (x > 1) & (x < w - 1) & (y > 1) & (y < h - 1)  # (B,K,1)
        keypoints = keypoints + 0.25 * inside * torch.cat([higher(1), higher(w)], dim=2)
    return keypoints * (scores > 0), scores[..., 0]


# ---------------------------------------------------------------------------- weights

@contextmanager
def reading(path, wanted):
    """Around the reading of somebody's file: whatever goes wrong becomes one sentence.

    The InputError names the file, what it must be (`wanted`) and the entry that the code inside was
    at (by `where.entry = ...`, `where` being what this context manager gives)."""
    where = SimpleNamespace(entry="")
    try:
        yield where
    except (InputError, NameError, ImportError, AssertionError, MemoryError):
        raise  # a sentence already, or no fault of the file
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such file") from error
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror or error}); it must be {wanted}"
                         ) from error
    except Exception as error:  # a damaged file can make a parser raise anything
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        reason = " ".join(reason.split())[:500] or type(error).__name__
        at = f" ({where.entry})" if where.entry else ""
        raise InputError(f"{path} must be {wanted}, but it is not{at}: {reason}") from error


# The authors' weights by name: the file, and git's hash of its content.
AUTHORS = ("https://github.com/Yigemanhahahaha/LAPX/raw/0c46a23982029779d09e320124022146efa69d7c/"
           "resources/pretrained/")
WEIGHTS = {
    "mpii": ("LAPX_MPII_256_256.tar", "fc3a9172d5d6490850b2bd283a8bb537af5baa65"),
    "coco": ("LAPX_COCO_256_192.tar", "0a24643242bc7a19659e65526d45ef959d0dc4d2"),
    "coco-384x288": ("LAPX_COCO_384_288.tar", "28bd1ff6d39d0b479b8a2ee1af787c926eff3774"),
}


def weights_path(weights):
    """A file of weights: `weights` itself, or the authors' file if it is a name in WEIGHTS.

    The authors' file is fetched once, into torch.hub's folder. A file of one's own that is called
    mpii is given as ./mpii. InputError if the file can't be fetched or is another one."""
    if str(weights) not in WEIGHTS:
        return Path(weights)
    name, expected = WEIGHTS[str(weights)]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.exists():
        return path
    print(f"fetching {AUTHORS}{name}, the authors' weights, to {path}", flush=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(AUTHORS + name, str(path))  # all or nothing
        content = path.read_bytes()
        found = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # as git does it
        if found != expected:
            path.unlink()
            raise OSError(f"git's hash of what came is {found}, not {expected}")
    except Exception as error:  # urllib raises classes of its own
        raise InputError(f"the weights {weights!r} can't be fetched ({error}); fetch them by hand: "
                         f"curl -L --create-dirs -o '{path}' {AUTHORS}{name}") from error
    return path


class Inert:
    """Stands in for whatever a file holds beside tensors and plain types. It does nothing."""

    def __init__(self, *arguments):
        pass

    __setstate__ = __init__
    __setitem__ = __init__


SAVE = ("of a file that you trust, save the tensors alone: content = torch.load(FILE, "
        "weights_only=False); torch.save(content['state_dict'], 'weights.pt'), or "
        "content.state_dict() if it is a whole model")


def load_file(path):
    """What torch.save wrote to a file, on the CPU: tensors and plain types.

    Nothing else is ever unpickled, since that can run any code: other things are replaced by Inert.
    InputError if the file is missing or damaged, or holds what torch refuses even so."""
    with reading(path, "a file of tensors that torch.save wrote, the whole of it"):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # there is more in it
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        try:
            with torch.serialization.safe_globals([(Inert, name) for name in foreign]):
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise InputError(f"{path} holds {', '.join(foreign)}, which could run any code and is "
                             f"not loaded; {SAVE}") from error


# The authors' tensor names and ours, applied from top to bottom. Theirs count the levels of an
# hourglass from the deepest, as ours do: hg.S.hg.D.B.0 is stage S, level D, block B.
AUTHORS_NAMES = (
    (r"^conv1\.", "stem.conv."),
    (r"^bn1\.", "stem.bn."),
    (r"^layer(\d)\.0\.", r"stem.block\1."),
    (r"^stem_attention\.", "stem.attention."),
    (r"^hg\.(\d)\.hg\.(\d)\.0\.0\.", r"stages.\1.hourglass.levels.\2.skip."),
    (r"^hg\.(\d)\.hg\.(\d)\.1\.0\.", r"stages.\1.hourglass.levels.\2.down."),
    (r"^hg\.(\d)\.hg\.(\d)\.2\.0\.", r"stages.\1.hourglass.levels.\2.up."),
    (r"^hg\.(\d)\.hg\.0\.3\.0\.", r"stages.\1.hourglass.bottom."),
    (r"^hg\.(\d)\.attention\.", r"stages.\1.hourglass.neck."),
    (r"^res\.(\d)\.0\.", r"stages.\1.block."),
    (r"^fc\.(\d)\.", r"stages.\1."),
    (r"^backbone_attention\.(\d)\.", r"stages.\1.attention."),
    (r"^score\.(\d)\.", r"stages.\1.head."),
    (r"^fc_\.(\d)\.conv\.", r"stages.\1.features_to_next."),
    (r"^score_\.(\d)\.", r"stages.\1.heatmaps_to_next."),
    (r"\.channel_attention\.", ".eca."),
    (r"\.spatial_conv\.", ".spatial.conv."),
    (r"\.position_attention\.theta\.", ".non_local.query."),
    (r"\.position_attention\.phi\.", ".non_local.key."),
    (r"\.position_attention\.g\.", ".non_local.value."),
    (r"\.position_attention\.out_proj\.", ".non_local.out."),
    (r"\.position_attention\.", ".non_local."),
    (r"\.fc\.0\.", ".mlp.squeeze."),
    (r"\.fc\.2\.", ".mlp.excite."),
    (r"\.pw_conv(\d)\.", r".pointwise\1."),
    (r"\.dw_conv\.", ".depthwise."),
    (r"\.downsample\.0\.", ".shortcut."),
)


def our_name(name, dimensions):
    """A tensor's name in our naming. `dimensions`: how many the tensor has.

    Prefixes of DistributedDataParallel and torch.compile are dropped."""
    name = re.sub(r"^(module\.|_orig_mod\.)+", "", name)
    for theirs, ours in AUTHORS_NAMES:
        name = re.sub(theirs, ours, name)
    # the authors' plain ECA and the second half of their CBAM are both called conv
    part = "spatial" if dimensions == 4 else "eca"
    return re.sub(r"\.(attention|neck)\.conv\.", rf".\1.{part}.conv.", name)


def dictionaries(item, depth=9):
    """All dictionaries in a file's content, from the outermost on. depth: how far down to look, as
    a list can contain itself."""
    if isinstance(item, dict):
        yield item
        item = list(item.values())
    if isinstance(item, (list, tuple)) and depth > 0:
        for part in item:
            yield from dictionaries(part, depth - 1)


def find_weights(content, path):
    """The network's tensors in a file's content, wherever they lie: {our name: tensor}.

    The first dictionary with the tensors of a LAPX is taken; InputError if there is none. What the
    tool thop adds to a model (total_ops, total_params) is left out, which is printed."""
    with reading(path, "the weights of a LAPX network"):
        for found in dictionaries(content):
            tensors = {our_name(name, tensor.ndim): tensor for name, tensor in found.items()
                       if isinstance(name, str) and isinstance(tensor, torch.Tensor)}
            if "stages.0.head.weight" in tensors:
                break
        else:
            raise InputError(f"{path} holds no weights of a LAPX network: no tensor is named "
                             f"stages.0.head.weight (or score.0.weight, by the authors); {SAVE}")
        extra = [name for name in tensors if name.endswith(("total_ops", "total_params"))]
        for name in extra:
            del tensors[name]
        if extra:
            print(f"{path}: {len(extra)} tensors left out, which the tool thop adds to a model "
                  f"({extra[0]}, ...)")
    return tensors


def check_finite(model, path):
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise InputError(f"{path}: {name} has NaN or infinity; take an earlier checkpoint")


def infer_config(tensors):
    """The LAPXConfig that tensors under our names belong to, from names and shapes alone; but for
    gamma_target, which leaves no trace in them and is the default."""
    def kind_at(prefix):
        parts = {name[len(prefix):].split(".")[0] for name in tensors if name.startswith(prefix)}
        for kind, known in ATTENTION.items():
            if set(known) == parts:
                return kind
        raise ValueError(f"there is no attention of {sorted(parts)}")

    num_joints, channels, _, _ = tensors["stages.0.head.weight"].shape
    stages = sum(bool(re.fullmatch(r"stages\.\d+\.head\.weight", name)) for name in tensors)
    return LAPXConfig(
        num_joints, channels, "stages.0.hourglass.bottom.alpha" in tensors,
        kind_at("stem.attention."), kind_at("stages.0.attention."),
        tuple(kind_at(f"stages.{stage}.hourglass.neck.") for stage in range(stages)))


def variant_name(config):
    """The name in VARIANTS of a configuration, whatever its joints; "custom" if it has none."""
    return next((name for name, known in VARIANTS.items()
                 if replace(known, num_joints=config.num_joints) == config), "custom")


def from_checkpoint(content, path):
    """A LAPX with the weights in a file's content (what load_file returned for that path).

    Every tensor must fit; InputError names those that do not."""
    tensors = find_weights(content, path)
    with reading(path, "the weights of a LAPX network"):
        with torch.device("meta"):  # shapes alone, no memory, until they are compared
            model = LAPX(infer_config(tensors))
        model.load_state_dict(tensors, assign=True)
        check_finite(model, path)
        return model.float()


def lapx(num_joints=None, variant=None, weights=None):
    """A LAPX with fresh weights (default: 16 joints, variant "lapx"), or with those of a file.

    weights: a checkpoint of train.py, a plain state_dict, one of the authors' files, or a name in
    WEIGHTS. The file says how many joints and which variant it has. InputError where num_joints or
    variant contradicts it (see load_fitting), where it is damaged, unsafe or does not fit."""
    if variant not in (None, *VARIANTS):
        raise InputError(f"unknown variant {variant!r}; there are {', '.join(VARIANTS)}")
    if weights is None:
        return LAPX(replace(VARIANTS[variant or "lapx"], num_joints=num_joints or 16))
    path = weights_path(weights)
    model = from_checkpoint(load_file(path), path)
    found = model.config
    wanted = replace(VARIANTS[variant] if variant else found, gamma_target=found.gamma_target,
                     num_joints=num_joints or found.num_joints)
    if wanted != found:
        raise InputError(f"{path} is {variant_name(found)} with {found.num_joints} joints, which "
                         "contradicts num_joints or variant; leave them out, or use load_fitting")
    return model


def load_fitting(model, weights):
    """Fine-tuning: gives a LAPX a file's weights in every layer whose shape fits.

    For joints of one's own: model = lapx(num_joints=5); load_fitting(model, "mpii").
    -> the names of the tensors that did not fit and keep their values. InputError if none fits."""
    path = weights_path(weights)
    tensors = find_weights(load_file(path), path)
    own = model.state_dict()
    fitting = {name: tensor for name, tensor in tensors.items()
               if name in own and own[name].shape == tensor.shape}
    if not any("pointwise" in name for name in fitting):  # attention fits any width
        raise InputError(f"{path} has no layer of the shape of one of this network; choose the "
                         "variant that it was trained as")
    with reading(path, "the weights of a LAPX network"):
        model.load_state_dict(fitting, strict=False)
        check_finite(model, path)
    return [name for name in own if name not in fitting]


# ---------------------------------------------------------------------------- counting

class Cost(NamedTuple):
    """What count() counts; thop: the paper's way."""

    parameters: int
    thop_parameters: int
    multiply_adds: int
    thop_flops: int


def count(config, height, width):
    """The Cost of a network for one picture of height x width."""
    # PAPER SILENT: counting of parameters and FLOPs. The figures of PAPER Tables 1 to 3 are those
    # of the tool thop. It leaves out bare parameters (alpha and gamma). Its FLOPs are the
    # multiply-adds, plus 4 per element that a BatchNorm puts out, plus 1 per element that an
    # adaptive average pooling (one in each channel attention) takes in.
    extra = []

    def add(module, inputs, output):  # a forward hook
        if isinstance(module, nn.BatchNorm2d):
            extra.append(4 * output.numel())
        elif isinstance(module, (ECA, ChannelMLP)):
            extra.append(output.numel())

    counter = FlopCounterMode(display=False)
    with torch.device("meta"), torch.no_grad(), counter:  # shapes alone, no numbers
        model = LAPX(config).eval()
        for module in model.modules():
            module.register_forward_hook(add)
        model(torch.zeros(1, 3, height, width))
    multiply_adds = counter.get_total_flops() // 2  # torch counts multiplications and additions
    parameters = {name: parameter.numel() for name, parameter in model.named_parameters()}
    bare = sum(n for name, n in parameters.items() if name.endswith((".alpha", ".gamma")))
    total = sum(parameters.values())
    return Cost(total, total - bare, multiply_adds, multiply_adds + sum(extra))


# What PAPER Tables 1 to 3 print: variant, input (H, W), joints, 10^6 parameters, 10^9 FLOPs.
PRINTED = [("lapx", 256, 256, 16, "2.30", "3.45"), ("lapx", 256, 192, 17, "2.30", "2.59"),
           ("lapx", 384, 288, 17, "2.30", "5.82"), ("lap", 256, 256, 16, "2.34", "3.70")]
PRINTED += [(f"row{row}", 256, 256, 16, millions, "") for row, millions in enumerate(
    "2.30 2.26 2.25 2.23 2.28 2.26 2.26 2.26 2.26 2.26 2.30 2.30 2.30 2.30".split(), start=1)]


def main():
    argparse.ArgumentParser(
        description="Prints parameters and cost of every variant beside the paper's figures. "
        "thop: counted as the paper's tool counts; paper: printed in the paper.").parse_args()
    print(f"{'variant, input, joints':22}|  S   C |{'parameters':^23}|{'10^9':^26}\n"
          f"{'':22}|        |    true    thop paper | multiply-adds  thop paper")
    for name, height, width, joints, millions, gigaflops in PRINTED:
        config = replace(VARIANTS[name], num_joints=joints)
        cost = count(config, height, width)
        print(f"{name:7}{height:5}x{width}{joints:5}  |{config.stages:3}{config.channels:4} |"
              f"{cost.parameters:8}{cost.thop_parameters:8}{millions:>6} |"
              f"{cost.multiply_adds / 1e9:14.4f}{cost.thop_flops / 1e9:6.2f}{gigaflops:>6}")


if __name__ == "__main__":
    main()
