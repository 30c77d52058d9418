"""LAPX, the Lightweight Hourglass Network with Global Context (arXiv 2512.16089), in one file.

    import torch
    from lapx import STRIDE, create_model, decode

    model = create_model(weights="mpii").eval()  # the authors'; create_model() is untrained
    images = torch.zeros(1, 3, 256, 256)         # RGB, (values in 0..1 - MEAN) / STD
    with torch.no_grad():
        heatmaps = model(images)                 # a list of S heatmaps, the last is the best
    keypoints, scores = decode(heatmaps[-1])
    print(STRIDE * keypoints)                    # (B,K,2), x and y in pixels of the input

It needs torch alone: copy it and it works. The network at 256 x 256 (PAPER Figure 1):

    images 3x256x256 -> stem -> x 208x64x64
    in each of S = 3 stages:
        x -> hourglass -> block -> conv -> attention -> features 208x64x64
        features -> head -> heatmaps 16x64x64, one map for each joint
        x + features_to_next(features) + heatmaps_to_next(heatmaps) -> x of the next stage, if any

    stem:       conv 52x128x128 -> block1 104x128x128 -> pooling -> block2 208x64x64 -> block3
                -> attention
    hourglass:  64x64 -> 32x32 -> 16x16 -> 8x8 -> 4x4 -> bottom -> neck    (208 channels all along)
                 skip     skip     skip    skip                     |
                64x64 <- 32x32 <- 16x16 <- 8x8 <- 4x4 <-------------+

Every stage learns the same heatmaps; each is given those of the one before, and improves on them. A
heatmap says where a joint may be: convolutions learn that more easily than coordinates. Of 2.31
million parameters 1.77 are in hourglass blocks, 0.37 behind, 0.12 in the stem, 0.04 in attention.

Glossary. One letter means one thing, unless a docstring says otherwise:
    B batch    C channels    K joints    S stages, from 1 in logs, from 0 in names of tensors
    H, W       height and width of the network's input; sizes are written (height, width)
    h, w       height and width of a feature map or a heatmap, H/4 and W/4 for heatmaps
    N, M, I    persons of a split, all persons in a COCO file, its pictures (the paper's N: joints)
    D, G, T    detections, persons of a picture, thresholds of average precision; L labelled joints
    F(x)       what the convolutions of a block make of x; the shortcut leads x around them
    alpha      the soft gate: one learnt number per channel of a shortcut
    gamma      how much global context is added: one learnt number per Non-Local module
    attention  ECA and CBAM are gates: numbers that channels or pixels are multiplied by. Non-Local
               alone weighs all cells, which are positions (y, x) of a map, for each cell
    neck       the attention at the bottom of an hourglass, where the map is smallest (the paper)
    annotated  of a joint: somebody marked it, even if it is occluded (COCO: labelled)

`grep -nE "PAPER|DIFFERS" *.py` finds the ties to the paper. `PAPER` with a section, an equation, a
table or a figure: it stands there. `PAPER SILENT`: we had to choose. `DIFFERS`: we do something
else. "Authors' weights": the names and shapes that their model code makes; no file was opened.
"""

import hashlib
import pickle
import re
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# PAPER SILENT: colours and normalisation. RGB with ImageNet's mean and standard deviation, as in
# HRNet (SimpleBaseline feeds BGR with the same numbers: evaluate.py --bgr).
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
STRIDE = 4  # heatmap pixel (x, y) lies on input pixel (4x, 4y); there is no half-pixel term


# ---------------------------------------------------------------------------- the network

@dataclass(frozen=True)
class LAPXConfig:
    """All that decides the network's shape; the default is LAPX."""

    num_joints: int = 16
    channels: int = 208
    stages: int = 3
    soft_gate: bool = True  # inside the hourglasses
    # kinds of attention, see make_attention
    stem_attention: str | None = "ECA-CBAM"  # at the end of the stem
    stage_attention: str | None = "ECA-CBAM"  # after every hourglass
    # PAPER SILENT: the neck of stage 2. The paper says that it has no ECA-NonLocal; the authors'
    # weights have a plain ECA there, and so have we.
    neck_attention: tuple = ("ECA-NonLocal", "ECA", "ECA-NonLocal")  # of each stage; (): none


class LAPX(nn.Module):
    """The whole network: images (B,3,H,W), normalised RGB -> list of S heatmaps (B,K,h,w).

    PAPER Figure 1. The same in training and in evaluation; the last element is the prediction. Any
    H and W from 64 on: 64 / 4 = 16, which an hourglass halves four times."""

    # PAPER SILENT: initial weights. PyTorch's defaults, but for alpha and gamma, which are 0.
    def __init__(self, config=LAPXConfig()):
        super().__init__()
        self.config = config
        self.stem = Stem(config)
        necks = config.neck_attention or (None,) * config.stages
        self.stages = nn.ModuleList(
            Stage(config, necks[index], last=index == config.stages - 1)
            for index in range(config.stages))

    def forward(self, images):
        x = self.stem(images)  # (B,C,h,w)
        outputs = []
        for stage in self.stages:
            features, heatmaps = stage(x)  # (B,C,h,w), (B,K,h,w)
            outputs.append(heatmaps)
            if not stage.last:
                x = x + stage.features_to_next(features) + stage.heatmaps_to_next(heatmaps)
        return outputs

    def non_locals(self):
        """The Non-Local modules: {stage, counted from 1: module}."""
        return {number: stage.hourglass.neck.non_local
                for number, stage in enumerate(self.stages, start=1)
                if hasattr(stage.hourglass.neck, "non_local")}  # named in make_attention


class Stem(nn.Module):
    """Brings the picture to a quarter of its size: (B,3,H,W) -> (B,C,h,w). PAPER Figure 1."""

    def __init__(self, config):
        super().__init__()
        C = config.channels
        self.conv = nn.Conv2d(3, C // 4, 7, stride=2, padding=3, bias=False)
        self.bn = nn.BatchNorm2d(C // 4)
        self.elu = nn.ELU(inplace=True)
        self.block1 = Block(C // 4, C // 2)
        self.block2 = Block(C // 2, C)
        self.block3 = Block(C, C)
        self.attention = make_attention(config.stem_attention, C)

    def forward(self, images):
        x = self.elu(self.bn(self.conv(images)))  # (B,C/4,H/2,W/2)
        x = F.max_pool2d(self.block1(x), 2)  # (B,C/2,h,w)
        x = self.block3(self.block2(x))  # (B,C,h,w)
        return self.attention(x)


class Stage(nn.Module):
    """An hourglass and what follows it: x (B,C,h,w) -> features (B,C,h,w), heatmaps (B,K,h,w).

    PAPER Figure 1. It also holds the convolutions that lead to a next stage: LAPX applies them."""

    def __init__(self, config, neck_attention, last):
        super().__init__()
        C = config.channels
        K = config.num_joints
        self.last = last
        self.hourglass = Hourglass(config, neck_attention)
        self.block = Block(C, C)
        self.conv = nn.Conv2d(C, C, 1, bias=False)
        self.bn = nn.BatchNorm2d(C)
        self.elu = nn.ELU(inplace=True)
        self.attention = make_attention(config.stage_attention, C)
        self.head = nn.Conv2d(C, K, 1)
        if not last:
            self.features_to_next = nn.Conv2d(C, C, 1)
            self.heatmaps_to_next = nn.Conv2d(K, C, 1)

    def forward(self, x):
        features = self.block(self.hourglass(x))
        features = self.attention(self.elu(self.bn(self.conv(features))))
        return features, self.head(features)


class Hourglass(nn.Module):
    """Down and up four times, a skip at each size but the last: (B,C,h,w) -> same. PAPER Figure 2.
    """

    def __init__(self, config, neck_attention, depth=4):
        super().__init__()
        C = config.channels
        # PAPER SILENT: which blocks are gated. In the authors' weights, those in the hourglasses.
        self.levels = nn.ModuleList()  # [0] is the deepest, as in the authors' names
        for _ in range(depth):
            self.levels.append(nn.ModuleDict({
                "skip": Block(C, C, config.soft_gate),  # before the pooling
                "down": Block(C, C, config.soft_gate),  # after the pooling
                "up": Block(C, C, config.soft_gate)}))  # before the upsampling
        self.bottom = Block(C, C, config.soft_gate)
        self.neck = make_attention(neck_attention, C)

    def forward(self, x):
        skips = []
        for level in reversed(self.levels):  # from the outermost one down
            skips.append(level["skip"](x))
            x = level["down"](F.max_pool2d(x, 2))
        x = self.neck(self.bottom(x))
        for level in self.levels:  # from the deepest one up
            skip = skips.pop()
            # DIFFERS: upsampling of odd sizes. The authors' code doubles the size and so fails at
            # 384x288, where 9 columns are pooled to 4; we upsample to the size of the skip.
            x = skip + F.interpolate(level["up"](x), size=skip.shape[2:], mode="nearest")
        return x


class Block(nn.Module):
    """A pre-activation bottleneck with a shortcut: (B,inputs,h,w) -> (B,outputs,h,w). PAPER §3.1.

    F(x): 1x1, depthwise 3x3 and 1x1 convolutions, each after BatchNorm and ELU. y = F(x) + x, or
    with a soft gate (Bulat et al. 2020; PAPER §3.4) y = F(x) + alpha * x, channel by channel.
    Where inputs and outputs differ, the shortcut is a 1x1 convolution."""

    def __init__(self, inputs, outputs, soft_gate=False):
        super().__init__()
        inner = outputs // 2
        self.elu = nn.ELU(inplace=True)  # overwrites BatchNorm's output, which nothing else needs
        self.bn1 = nn.BatchNorm2d(inputs)
        self.pointwise1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.depthwise = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.bn3 = nn.BatchNorm2d(inner)
        self.pointwise2 = nn.Conv2d(inner, outputs, 1)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)
        # PAPER SILENT: start of alpha. 0 in the authors' code: at first nothing takes the shortcut.
        self.alpha = nn.Parameter(torch.zeros(1, outputs, 1, 1)) if soft_gate else None

    def forward(self, x):
        y = self.pointwise1(self.elu(self.bn1(x)))
        y = self.depthwise(self.elu(self.bn2(y)))
        y = self.pointwise2(self.elu(self.bn3(y)))  # F(x)
        x = self.shortcut(x)  # x itself, where inputs and outputs are equal
        if self.alpha is None:
            return y + x
        alpha = self.alpha.to(x.dtype)  # times a float32 alpha bfloat16 would become float32
        return y + alpha * x


# ---------------------------------------------------------------------------- attention

def make_attention(kind, channels):
    """The attention of that name, modules one after the other, each (B,C,h,w) -> same."""
    if kind is None:
        parts = {}  # x stays x
    elif kind == "ECA":
        parts = {"eca": ECA()}
    elif kind == "ECA-CBAM":  # PAPER §3.4
        parts = {"eca": ECA(), "spatial": SpatialAttention()}
    elif kind == "ECA-NonLocal":  # PAPER §3.3
        parts = {"eca": ECA(), "non_local": NonLocal(channels)}
    elif kind == "CBAM":  # PAPER Table 3, row 5
        parts = {"mlp": ChannelMLP(channels), "spatial": SpatialAttention()}
    else:
        raise ValueError(f"there is no attention called {kind!r}")
    return nn.Sequential(OrderedDict(parts))


class ECA(nn.Module):
    """Efficient channel attention: a gate for each channel from itself and its six neighbours.

    PAPER §3.3: average plus maximum over the pixels, a kernel of 7 channels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 7, padding=3, bias=False)

    def forward(self, x):
        # max, not amax, which shares its gradient among all elements that equal the maximum: in
        # torch.compile's bfloat16 none does, as the maximum is rounded, and the shares are 0 / 0
        maximum = x.flatten(2).max(2).values  # (B,C)
        descriptor = x.mean((2, 3)) + maximum  # (B,C)
        gate = self.conv(descriptor[:, None]).sigmoid()  # (B,1,C)
        return x * gate.transpose(1, 2)[..., None]  # (B,C,1,1) scales (B,C,h,w)


class SpatialAttention(nn.Module):
    """The second half of ECA-CBAM and of CBAM: a gate for each pixel. PAPER §3.4."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x):
        maximum = x.max(1, keepdim=True).values  # (B,1,h,w)
        pooled = torch.cat([maximum, x.mean(1, keepdim=True)], dim=1)  # (B,2,h,w)
        return x * self.conv(pooled).sigmoid()


class NonLocal(nn.Module):
    """Global context (Wang et al. 2018): every cell adds what it finds in all cells. PAPER §3.3.

    Cell i gets context_i = sum over j of A_ij value_j, where A_ij is the softmax over j of
    query_i . key_j (theta, phi, g: query, key, value), and puts out gamma * out(context_i) + x_i.
    gamma starts at 0, and alone decides how much is added: there is no other switch. The module
    stands where the map is smallest: A is 16 x 16 for 4x4 cells, and 4096 x 4096 for 64x64."""

    def __init__(self, channels):
        super().__init__()
        self.query = nn.Conv2d(channels, channels // 8, 1)
        self.key = nn.Conv2d(channels, channels // 8, 1)
        self.value = nn.Conv2d(channels, channels // 8, 1)
        self.out = nn.Conv2d(channels // 8, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def attention_map(self, x):
        """Where each cell looks: (B,C,h,w) -> A (B,h*w,h*w); each row sums to 1."""
        query = self.query(x).flatten(2)  # (B,C/8,h*w)
        key = self.key(x).flatten(2)  # (B,C/8,h*w)
        # PAPER SILENT: scale of the attention. The authors' code divides by nothing.
        return (query.transpose(1, 2) @ key).softmax(dim=-1)

    def forward(self, x):
        value = self.value(x).flatten(2)  # (B,C/8,h*w)
        context = value @ self.attention_map(x).transpose(1, 2)  # (B,C/8,h*w), column i: cell i's
        context = self.out(context.unflatten(2, x.shape[2:]))  # (B,C,h,w)
        gamma = self.gamma.to(x.dtype)  # as alpha
        return gamma * context + x


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


def make_variants():
    """Every network of PAPER Table 3 by its row, and LAP, the predecessor. Rows 11 to 14 are LAPX;
    they differ in the gamma that training aims at (train.py)."""
    row1 = LAPXConfig(stages=2, channels=256, soft_gate=False, stem_attention=None,
                      stage_attention=None, neck_attention=())
    row2 = replace(row1, stages=3, channels=208)
    # DIFFERS: channels of row 3. Table 3 prints 190, the text 180; only 180 gives its 2.25 M.
    row3 = replace(row2, stages=4, channels=180)
    row4 = replace(row2, stages=5, channels=160)
    row5 = replace(row2, stage_attention="CBAM")
    row6 = replace(row2, stage_attention="ECA-CBAM")
    row7 = replace(row2, soft_gate=True)
    row8 = replace(row6, soft_gate=True)
    row9 = replace(row6, stem_attention="ECA-CBAM")
    row10 = replace(row8, stem_attention="ECA-CBAM")
    lapx = replace(row10, neck_attention=LAPXConfig.neck_attention)
    lap = replace(row1, stem_attention="CBAM", stage_attention="CBAM",
                  neck_attention=("CBAM", "CBAM"))
    rows = (row1, row2, row3, row4, row5, row6, row7, row8, row9, row10, lapx, lapx, lapx, lapx)
    return {"lapx": lapx, "lap": lap} | {f"row{n}": row for n, row in enumerate(rows, start=1)}


VARIANTS = make_variants()


# ---------------------------------------------------------------------------- decoding

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
    y = (peak / w).floor()  # peak // w, by operators that other ONNX engines have
    x = peak - w * y

    padded = F.pad(flat, (w, w))  # so that every peak has neighbours

    def higher(step):  # 1, 0 or -1: is the pixel after the peak higher than the one before it?
        return (padded.gather(2, peak + w + step) - padded.gather(2, peak + w - step)).sign()

    keypoints = torch.cat([x, y], dim=2).to(flat.dtype)  # (B,K,2)
    if quarter_offset:
        # neighbours beyond the border are those of other rows: no offset there
        inside = torch.minimum(x, w - x).minimum(y).minimum(h - y) > 1  # (B,K,1)
        keypoints = keypoints + 0.25 * inside * torch.cat([higher(1), higher(w)], dim=2)
    return keypoints * (scores > 0), scores[..., 0]


# ============================================= Behind the scenes: joints, files of weights

class InputError(ValueError):
    """What ends a script with one sentence: which thing, what was expected, the way out."""


@dataclass(frozen=True)
class Skeleton:
    """The joints of a data set. A new set is one more entry in SKELETONS."""

    joints: tuple  # K names, in the order of the heatmaps
    flip_pairs: tuple  # pairs of joint indices that change places in a mirror; (): never mirrored
    limbs: tuple  # pairs of joint indices that are joined by a line in drawings
    sigmas: tuple = ()  # K falloffs of the object keypoint similarity (OKS), COCO's metric

    def __post_init__(self):
        K = len(self.joints)
        paired = [index for a, b in self.flip_pairs for index in (a, b)]
        drawn = [index for a, b in self.limbs for index in (a, b)]
        if (isinstance(self.joints, str) or len({*self.joints}) < K
                or len({*paired}) < len(paired) or not {*paired, *drawn} <= {*range(K)}
                or len(self.sigmas) not in (0, K)):
            raise ValueError(
                "a skeleton has joints of different names, each in one of flip_pairs at most, "
                f"indices from 0 to {K - 1} (COCO's files count limbs from 1), and as many sigmas "
                f"or none: {self}")


SKELETONS = {
    "mpii": Skeleton(
        joints=("right ankle", "right knee", "right hip", "left hip", "left knee", "left ankle",
                "pelvis", "thorax", "upper neck", "head top", "right wrist", "right elbow",
                "right shoulder", "left shoulder", "left elbow", "left wrist"),
        flip_pairs=((0, 5), (1, 4), (2, 3), (10, 15), (11, 14), (12, 13)),
        limbs=((0, 1), (1, 2), (2, 6), (6, 3), (3, 4), (4, 5), (6, 7), (7, 8), (8, 9),
               (10, 11), (11, 12), (12, 7), (7, 13), (13, 14), (14, 15))),
    "coco": Skeleton(
        joints=("nose", "left eye", "right eye", "left ear", "right ear", "left shoulder",
                "right shoulder", "left elbow", "right elbow", "left wrist", "right wrist",
                "left hip", "right hip", "left knee", "right knee", "left ankle", "right ankle"),
        flip_pairs=((1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12), (13, 14), (15, 16)),
        limbs=((0, 1), (0, 2), (1, 3), (2, 4), (5, 6), (5, 7), (7, 9), (6, 8), (8, 10), (5, 11),
               (6, 12), (11, 12), (11, 13), (13, 15), (12, 14), (14, 16)),
        sigmas=(.026, .025, .025, .035, .035, .079, .079, .072, .072, .062, .062, .107, .107,
                .087, .087, .089, .089)),
}


def create_model(num_joints=None, variant=None, weights=None):
    """A LAPX with fresh weights (default: 16 joints, variant "lapx"), or with those of a file.

    weights: a checkpoint of train.py, which holds its configuration and what becomes model.info; a
    plain state_dict or an authors' file, whose names tell the variant; or a name in WEIGHTS.
    ValueError, or what torch raises, if the file is damaged, unsafe or does not fit."""
    if weights is None:
        return LAPX(replace(VARIANTS[variant or "lapx"], num_joints=num_joints or 16))
    if num_joints or variant:
        raise InputError("a file of weights says what it is: leave out num_joints and variant, or "
                         "use load_fitting")
    content = load_file(weights_path(weights))
    tensors = find_weights(content)
    with torch.device("meta"):  # shapes alone, no numbers
        if "config" in content:
            model = LAPX(LAPXConfig(**content["config"]))
        else:
            for known in VARIANTS.values():  # if none fits, the last one, LAPX, tells what differs
                model = LAPX(replace(known, num_joints=len(tensors["stages.0.head.weight"])))
                if model.state_dict().keys() == tensors.keys():
                    break
    model.load_state_dict(tensors, assign=True)
    model.info = content.get("info")
    return model.float()


def load_fitting(model, weights):
    """Fine-tuning: gives a LAPX a file's weights in every layer whose shape fits.

    For joints of one's own: model = create_model(num_joints=5); load_fitting(model, "mpii").
    -> the names of the tensors that did not fit and keep their values. InputError if none fits."""
    own = model.state_dict()
    tensors = find_weights(load_file(weights_path(weights)))
    fitting = {name: tensor for name, tensor in tensors.items()
               if name in own and own[name].shape == tensor.shape}
    if not any("pointwise" in name for name in fitting):  # attention fits any width
        raise InputError(f"{weights} has no layer of the shape of one of this network; choose the "
                         "variant that it was trained as")
    model.load_state_dict(fitting, strict=False)
    return [name for name in own if name not in fitting]


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

    That is fetched once, into torch.hub's folder; InputError if it can't be, or is another file. A
    file of one's own that is called mpii is given as ./mpii."""
    if str(weights) not in WEIGHTS:
        return Path(weights)
    name, expected = WEIGHTS[str(weights)]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.exists():
        return path
    print(f"fetching {AUTHORS}{name} to {path}", flush=True)
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


class Inert(dict):
    """Stands in for whatever a file holds beside tensors and plain types. It does nothing."""

    def __init__(self, *arguments):
        super().__init__()

    def __setstate__(self, state):
        pass


def load_file(path):
    """What torch.save wrote to a file, a dictionary of tensors and plain types, on the CPU.

    Nothing else is ever unpickled, since that can run any code: other things become Inert.
    InputError if the file holds what torch refuses even so."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # there is more in it
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    try:
        with torch.serialization.safe_globals([(Inert, name) for name in foreign]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} holds {', '.join(foreign)}, which could run any code; if you trust it, save "
            "the tensors alone: content = torch.load(FILE, weights_only=False); torch.save("
            "content['state_dict'], 'weights.pt'), or content.state_dict() of a model") from error


def find_weights(content):
    """The network's tensors in a file's content, {our name: tensor}: the first dictionary that has
    some, without what the tool thop adds. ValueError if there is none, or one has NaN."""
    for found in dictionaries(content):
        tensors = {our_name(name, tensor.ndim): tensor for name, tensor in found.items()
                   if isinstance(tensor, torch.Tensor) and "total_" not in str(name)}
        if "stages.0.head.weight" in tensors:
            break
    else:
        raise ValueError("no tensor is named stages.0.head.weight (by the authors score.0.weight); "
                         "if it is a whole model, save its state_dict() alone")
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} has NaN or infinity; take an earlier checkpoint")
    return tensors


def dictionaries(item):
    """All dictionaries in a file's content, from the outermost on."""
    if isinstance(item, dict):
        yield item
        for value in item.values():
            yield from dictionaries(value)


# The authors' tensor names and ours, from top to bottom. hg.S.hg.D.B.0: stage S, level D, block B.
AUTHORS_NAMES = (
    (r"^(module\.|_orig_mod\.)+", ""),  # of DistributedDataParallel and torch.compile
    (r"^conv1\.", "stem.conv."), (r"^bn1\.", "stem.bn."),
    (r"^layer(\d)\.0\.", r"stem.block\1."), (r"^stem_attention\.", "stem.attention."),
    (r"^hg\.(\d)\.hg\.(\d)\.0\.0\.", r"stages.\1.hourglass.levels.\2.skip."),
    (r"^hg\.(\d)\.hg\.(\d)\.1\.0\.", r"stages.\1.hourglass.levels.\2.down."),
    (r"^hg\.(\d)\.hg\.(\d)\.2\.0\.", r"stages.\1.hourglass.levels.\2.up."),
    (r"^hg\.(\d)\.hg\.0\.3\.0\.", r"stages.\1.hourglass.bottom."),
    (r"^hg\.(\d)\.attention\.", r"stages.\1.hourglass.neck."),
    (r"^res\.(\d)\.0\.", r"stages.\1.block."), (r"^fc\.(\d)\.", r"stages.\1."),
    (r"^backbone_attention\.(\d)\.", r"stages.\1.attention."),
    (r"^score\.(\d)\.", r"stages.\1.head."),
    (r"^fc_\.(\d)\.conv\.", r"stages.\1.features_to_next."),
    (r"^score_\.(\d)\.", r"stages.\1.heatmaps_to_next."),
    (r"\.channel_attention\.", ".eca."), (r"\.spatial_conv\.", ".spatial.conv."),
    (r"\.position_attention\.", ".non_local."), (r"\.theta\.", ".query."),
    (r"\.phi\.", ".key."), (r"\.g\.", ".value."), (r"\.out_proj\.", ".out."),
    (r"\.fc\.0\.", ".mlp.squeeze."), (r"\.fc\.2\.", ".mlp.excite."),
    (r"\.pw_conv(\d)\.", r".pointwise\1."), (r"\.dw_conv\.", ".depthwise."),
    (r"\.downsample\.0\.", ".shortcut."),
)


def our_name(name, dimensions):
    """A tensor's name in our naming. `dimensions`: how many the tensor has."""
    name = str(name)
    for theirs, ours in AUTHORS_NAMES:
        name = re.sub(theirs, ours, name)
    # the authors' plain ECA and the second half of their CBAM are both called conv
    part = "spatial" if dimensions == 4 else "eca"
    return re.sub(r"\.(attention|neck)\.conv\.", rf".\1.{part}.conv.", name)
