"""LAPX, the Lightweight Hourglass Network with Global Context (arXiv 2512.16089), in one file.

    from lapx import decode, lapx
    model = lapx(weights="LAPX_MPII_256_256.tar").eval()  # or lapx(num_joints=16), untrained
    heatmaps = model(images)                  # images (B,3,H,W), (RGB / 255 - MEAN) / STD
                                              # -> list of S heatmaps (B,K,H/4,W/4)
    keypoints, scores = decode(heatmaps[-1])  # (B,K,2) heatmap pixels, times 4 input pixels; (B,K)

It needs torch alone: copy it into a project and it works. `python lapx.py` prints the parameters
and multiply-adds of every variant beside the figures of the paper.

The network looks at a picture through a stem (to a quarter of its size), then through S stages.
Every stage is an hourglass (down to 1/64, up again), which ends in one heatmap per joint; the next
stage sees the features and the heatmaps and does better. The last stage's heatmaps are the answer.

Glossary, one letter for one thing in all files
    B batch    C channels    K joints    S stages    H, W input size
    h, w size of the map at hand: H/4, W/4 of heatmaps, about H/64, W/64 at an hourglass's bottom
    N number of things: cells h*w in the Non-Local module, persons in data sets
    alpha  soft gate, one learnt factor per channel of a residual
    gamma  how much global context is added; one number per Non-Local module
"""

import re
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

# Constants that a caller needs. The pictures are RGB in 0..1, normalised per channel.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STRIDE = 4  # heatmap pixel (x, y) lies on input pixel (4x, 4y), without a half-pixel term
MIN_SIZE = 64  # an hourglass halves the heatmap four times: H/4 and W/4 must be at least 16


class InputError(ValueError):
    """A user's mistake, told in one sentence: which thing, what was expected, the way out."""


@dataclass(frozen=True)
class Skeleton:
    """The joints of a data set. A new set of joints is one more entry in SKELETONS."""

    joints: tuple  # K names, in the order of the heatmaps
    flip_pairs: tuple  # pairs of joint indices that trade places when a picture is mirrored
    limbs: tuple  # pairs of joint indices that are joined by a line in drawings
    sigmas: tuple = ()  # K falloffs of the object keypoint similarity (OKS); COCO's metric only


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


# ---------------------------------------------------------------------------- configuration

@dataclass(frozen=True)
class LAPXConfig:
    """All that decides the network's shape, and the value to which training raises gamma."""

    num_joints: int = 16
    stages: int = 3
    channels: int = 208
    soft_gate: bool = True  # inside the hourglasses
    stem_attention: str | None = "ECA-CBAM"  # at the end of the stem
    stage_attention: str | None = "ECA-CBAM"  # after every hourglass
    neck_attention: tuple = ("ECA-NonLocal", "ECA", "ECA-NonLocal")  # at the bottom of each one
    gamma_target: float = 0.2

    def __post_init__(self):
        if len(self.neck_attention) != self.stages:
            raise InputError(f"{self.stages} stages need as many neck_attention, not "
                             f"{self.neck_attention}")


def _variants():
    none = (None,) * 5
    necks = ("ECA-NonLocal", "ECA", "ECA-NonLocal")
    # DIFFERS FROM THE PAPER: it only says that stage 2 has no ECA-NonLocal; the authors' released
    # model has a plain ECA there, and so have we.
    table = {
        #        stages  C  soft gate   stem        stage       neck            gamma   Table 3
        "lapx":  (3, 208, True,  "ECA-CBAM", "ECA-CBAM", necks,            0.2),  # row 12
        "lap":   (2, 256, False, "CBAM",     "CBAM",     ("CBAM", "CBAM"), 0.2),  # the predecessor
        "row1":  (2, 256, False, None,       None,       none[:2],         0.2),
        "row2":  (3, 208, False, None,       None,       none[:3],         0.2),
        "row3":  (4, 180, False, None,       None,       none[:4],         0.2),  # printed as 190
        "row4":  (5, 160, False, None,       None,       none[:5],         0.2),
        "row5":  (3, 208, False, None,       "CBAM",     none[:3],         0.2),
        "row6":  (3, 208, False, None,       "ECA-CBAM", none[:3],         0.2),
        "row7":  (3, 208, True,  None,       None,       none[:3],         0.2),
        "row8":  (3, 208, True,  None,       "ECA-CBAM", none[:3],         0.2),
        "row9":  (3, 208, False, "ECA-CBAM", "ECA-CBAM", none[:3],         0.2),
        "row10": (3, 208, True,  "ECA-CBAM", "ECA-CBAM", none[:3],         0.2),
        "row11": (3, 208, True,  "ECA-CBAM", "ECA-CBAM", necks,            0.1),
        "row12": (3, 208, True,  "ECA-CBAM", "ECA-CBAM", necks,            0.2),  # lapx
        "row13": (3, 208, True,  "ECA-CBAM", "ECA-CBAM", necks,            0.3),
        "row14": (3, 208, True,  "ECA-CBAM", "ECA-CBAM", necks,            0.4),
    }
    return {name: LAPXConfig(16, *row) for name, row in table.items()}


VARIANTS = _variants()


# ---------------------------------------------------------------------------- attention

class ECA(nn.Module):
    """Efficient channel attention: every channel is scaled by what its neighbours say.

    (B,C,h,w) -> (B,C,h,w). DIFFERS FROM THE PAPER of ECA-Net: the descriptor is the average plus
    the maximum over the pixels, and the kernel always spans 7 channels, as the released weights do.
    """

    def __init__(self, channels=None):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 7, padding=3, bias=False)

    def descriptor(self, x):
        return x.mean((2, 3)) + x.amax((2, 3))  # (B,C)

    def forward(self, x):
        gate = self.conv(self.descriptor(x)[:, None]).sigmoid()  # (B,1,C)
        return x * gate.transpose(1, 2)[..., None]  # (B,C,1,1) scales (B,C,h,w)


class ChannelPool(nn.Module):
    """The maximum and the mean over the channels: (B,C,h,w) -> (B,2,h,w)."""

    def forward(self, x):
        return torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], dim=1)


class SpatialAttention(nn.Module):
    """The second half of CBAM (Woo et al. 2018): every pixel is scaled. (B,C,h,w) -> same."""

    def __init__(self):
        super().__init__()
        self.pool = ChannelPool()
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x):
        return x * self.conv(self.pool(x)).sigmoid()


class ECACBAM(SpatialAttention):
    """ECA-CBAM: the channels by ECA, then the pixels. (B,C,h,w) -> same."""

    def __init__(self, channels=None):
        super().__init__()
        self.eca = ECA()

    def forward(self, x):
        return super().forward(self.eca(x))


class CBAM(SpatialAttention):
    """CBAM as LAP has it: the channels by a bottleneck MLP, then the pixels. (B,C,h,w) -> same.

    DIFFERS FROM THE PAPER of CBAM: each descriptor has a sigmoid of its own after the MLP and the
    two are added, so that the gate runs from 0 to 2, as the released model computes it.
    """

    def __init__(self, channels, reduction=16):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(channels, channels // reduction, bias=False),
            nn.ReLU(),
            nn.Linear(channels // reduction, channels, bias=False),
        )

    def forward(self, x):
        gate = self.mlp(x.amax((2, 3))).sigmoid() + self.mlp(x.mean((2, 3))).sigmoid()  # (B,C)
        return super().forward(x * gate[..., None, None])


class NonLocal(nn.Module):
    """Global context (Wang et al. 2018): every cell adds what it finds in all the others.

    out = gamma * W(A g(x)) + x with A = softmax over keys of theta(x)^T phi(x), unscaled.
    (B,C,h,w) -> same. gamma starts at 0 and alone decides how much is added (paper, section 3.3).
    """

    def __init__(self, channels):
        super().__init__()
        self.theta = nn.Conv2d(channels, channels // 8, 1)
        self.phi = nn.Conv2d(channels, channels // 8, 1)
        self.g = nn.Conv2d(channels, channels // 8, 1)
        self.out = nn.Conv2d(channels // 8, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def attention(self, x):
        """Where each cell looks: (B,C,h,w) -> A (B,N,N), each row a distribution over N cells."""
        query, key = self.theta(x).flatten(2), self.phi(x).flatten(2)  # (B,C/8,N) each
        return (query.transpose(1, 2) @ key).softmax(dim=-1)

    def forward(self, x):
        value = self.g(x).flatten(2)  # (B,C/8,N)
        found = value @ self.attention(x).transpose(1, 2)  # (B,C/8,N)
        return self.gamma * self.out(found.unflatten(2, x.shape[2:])) + x


class ECANonLocal(nn.Module):
    """ECA, then global context. (B,C,h,w) -> same."""

    def __init__(self, channels):
        super().__init__()
        self.eca = ECA()
        self.non_local = NonLocal(channels)

    def forward(self, x):
        return self.non_local(self.eca(x))


ATTENTION = {None: nn.Identity, "ECA": ECA, "CBAM": CBAM, "ECA-CBAM": ECACBAM,
             "ECA-NonLocal": ECANonLocal}


# ---------------------------------------------------------------------------- the network

class Block(nn.Module):
    """Pre-activation bottleneck with a depthwise 3x3: (B,inputs,h,w) -> (B,outputs,h,w).

    Soft gate (Bulat et al. 2020): F(x) + alpha * residual, alpha learnt per channel and starting
    at 0 as in the authors' code. Where the widths differ the residual is a 1x1 conv of the raw x.
    """

    def __init__(self, inputs, outputs, soft_gate=False):
        super().__init__()
        neck = outputs // 2
        self.elu = nn.ELU()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.pointwise1 = nn.Conv2d(inputs, neck, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(neck)
        self.depthwise = nn.Conv2d(neck, neck, 3, padding=1, groups=neck, bias=False)
        self.bn3 = nn.BatchNorm2d(neck)
        self.pointwise2 = nn.Conv2d(neck, outputs, 1)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)
        self.alpha = nn.Parameter(torch.zeros(1, outputs, 1, 1)) if soft_gate else None

    def forward(self, x):
        y = self.pointwise1(self.elu(self.bn1(x)))
        y = self.depthwise(self.elu(self.bn2(y)))
        y = self.pointwise2(self.elu(self.bn3(y)))
        residual = self.shortcut(x)
        return y + (residual if self.alpha is None else self.alpha * residual)


class Stem(nn.Module):
    """The picture to features at a quarter of its size: (B,3,H,W) -> (B,C,h,w)."""

    def __init__(self, config):
        super().__init__()
        C = config.channels
        self.conv = nn.Conv2d(3, C // 4, 7, stride=2, padding=3, bias=False)
        self.bn = nn.BatchNorm2d(C // 4)
        self.elu = nn.ELU()
        self.block1 = Block(C // 4, C // 2)
        self.block2 = Block(C // 2, C)
        self.block3 = Block(C, C)
        self.attention = ATTENTION[config.stem_attention](C)

    def forward(self, images):
        x = self.elu(self.bn(self.conv(images)))  # (B,C/4,H/2,W/2)
        x = F.max_pool2d(self.block1(x), 2)  # (B,C/2,h,w)
        return self.attention(self.block3(self.block2(x)))


class Level(nn.Module):
    """The three blocks that one resolution of an hourglass has."""

    def __init__(self, config):
        super().__init__()
        C, gate = config.channels, config.soft_gate
        self.skip = Block(C, C, gate)  # beside the smaller resolutions
        self.down = Block(C, C, gate)  # after the pooling
        self.up = Block(C, C, gate)  # before the upsampling


class Hourglass(nn.Module):
    """Down four times, up four times, with a skip at each resolution: (B,C,h,w) -> same.

    DIFFERS FROM THE PAPER's released code: it upsamples by exactly 2 and so fails at 384x288, where
    9 rows are pooled to 4; here each map is upsampled to the size of the skip that it meets.
    """

    def __init__(self, config, neck_attention, depth=4):
        super().__init__()
        self.levels = nn.ModuleList(Level(config) for _ in range(depth))  # [0] is the deepest
        self.bottom = Block(config.channels, config.channels, config.soft_gate)
        self.neck = ATTENTION[neck_attention](config.channels)

    def forward(self, x):
        skips = []
        for level in reversed(self.levels):
            skips.append(level.skip(x))
            x = level.down(F.max_pool2d(x, 2))
        x = self.neck(self.bottom(x))
        for level in self.levels:
            skip = skips.pop()
            x = skip + F.interpolate(level.up(x), size=skip.shape[2:], mode="nearest")
        return x


class Stage(nn.Module):
    """An hourglass, its heatmaps, and what the next stage starts from.

    x (B,C,h,w) -> heatmaps (B,K,h,w), next x (B,C,h,w); the last stage returns its x untouched.
    """

    def __init__(self, config, index):
        super().__init__()
        C, K = config.channels, config.num_joints
        self.hourglass = Hourglass(config, config.neck_attention[index])
        self.block = Block(C, C)  # not gated
        self.conv = nn.Conv2d(C, C, 1, bias=False)
        self.bn = nn.BatchNorm2d(C)
        self.elu = nn.ELU()
        self.attention = ATTENTION[config.stage_attention](C)
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


class LAPX(nn.Module):
    """The whole network: images (B,3,H,W), normalised RGB -> list of S heatmaps (B,K,h,w).

    The same in training and in evaluation; the last element is the prediction. Any H, W from 64
    on; h = H/4, rounded. Weights start as PyTorch's defaults, alpha and gamma at 0.
    """

    def __init__(self, config=LAPXConfig()):
        super().__init__()
        self.config = config
        self.stem = Stem(config)
        self.stages = nn.ModuleList(Stage(config, index) for index in range(config.stages))

    def forward(self, images):
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < MIN_SIZE:
            raise InputError(f"LAPX takes images (B, 3, H, W) with H and W from {MIN_SIZE} on, not "
                             f"a tensor of shape {tuple(images.shape)}")
        x, outputs = self.stem(images), []
        for stage in self.stages:
            heatmaps, x = stage(x)
            outputs.append(heatmaps)
        return outputs

    def gammas(self):
        """The gamma of every Non-Local module, in the order of the stages."""
        return [module.gamma for module in self.modules() if isinstance(module, NonLocal)]


def heatmap_size(height, width):
    """The size (h, w) of the heatmaps of an input of that size: two halvings, rounding up, down."""
    return (height + 1) // 2 // 2, (width + 1) // 2 // 2


def decode(heatmaps, quarter_offset=True):
    """Joint positions: heatmaps (B,K,h,w) -> keypoints (B,K,2) as x, y in heatmap pixels (centres
    at whole numbers), scores (B,K), the heights of the peaks.

    The first highest pixel, moved a quarter pixel towards its higher neighbour in each axis; not in
    the columns and rows 0, 1 and the last, and only where both axes allow (SimpleBaseline). A joint
    whose map nowhere exceeds 0 is put at (0, 0).
    """
    h, w = heatmaps.shape[2:]
    flat = heatmaps.flatten(2)  # (B,K,h*w)
    peak = flat.argmax(dim=2, keepdim=True)  # (B,K,1)
    scores = flat.gather(2, peak)
    x, y = peak % w, peak // w

    def slope(step):  # the sign of the height difference of the two neighbours, -1, 0 or 1
        after = flat.gather(2, (peak + step).clamp(max=h * w - 1))
        return (after - flat.gather(2, (peak - step).clamp(min=0))).sign()

    keypoints = torch.cat([x, y], dim=2).to(flat.dtype)  # (B,K,2)
    if quarter_offset:
        inside = (x > 1) & (x < w - 1) & (y > 1) & (y < h - 1)
        keypoints = keypoints + 0.25 * inside * torch.cat([slope(1), slope(w)], dim=2)
    return keypoints * (scores > 0), scores[..., 0]


# ---------------------------------------------------------------------------- weights

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
    (r"\.spatial_conv\.", ".conv."),
    (r"\.position_attention\.", ".non_local."),
    (r"\.out_proj\.", ".out."),
    (r"\.fc\.", ".mlp."),
    (r"\.pw_conv(\d)\.", r".pointwise\1."),
    (r"\.dw_conv\.", ".depthwise."),
    (r"\.downsample\.0\.", ".shortcut."),
)


def our_name(name):
    """A tensor's name in our naming, without prefixes of DistributedDataParallel and compile."""
    name = re.sub(r"^(module\.|_orig_mod\.)+", "", name)
    for theirs, ours in AUTHORS_NAMES:
        name = re.sub(theirs, ours, name)
    return name


class _Skipped:
    """Stands in for a numpy scalar in somebody's checkpoint: numpy's own code is never called."""

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        pass


_NUMPY_SCALARS = [(_Skipped, name) for name in
                  ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype")]


def load_file(path):
    """What torch.save wrote to a file: tensors and plain types, on the CPU; nothing else is ever
    unpickled, since unpickling other classes can run any code. InputError if that is not enough."""
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file of weights") from None
    except Exception as error:  # a damaged file can make the unpickler raise anything
        needs = re.search(r"GLOBAL (\S+)", str(error))
        if needs:
            raise InputError(
                f"{path} needs {needs[1]} to be unpickled, which could run any code; only tensors "
                "and plain types are loaded. Save its state_dict alone to a file and use that"
            ) from None
        raise InputError(f"{path} is not a file of weights that torch.save wrote, or not the whole "
                         "of it") from None


def find_weights(content, path):
    """The state_dict in a file's content, wherever it lies, under our names: {name: tensor}.

    The first dictionary in the file that has the tensors of a LAPX network is taken.
    """
    queue = [content]
    while queue:
        item = queue.pop(0)
        if isinstance(item, dict):
            tensors = {our_name(name): tensor for name, tensor in item.items()
                       if isinstance(name, str) and isinstance(tensor, torch.Tensor)}
            if "stages.0.head.weight" in tensors:
                broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
                if broken:
                    raise InputError(f"{path}: {len(broken)} tensors hold NaN or infinity (first: "
                                     f"{broken[0]}); take an earlier checkpoint")
                return tensors
            queue.extend(item.values())
        elif isinstance(item, (list, tuple)):
            queue.extend(item)
    raise InputError(f"{path} holds no weights of a LAPX network: no tensor is named "
                     "stages.0.head.weight (or score.0.weight in the authors' naming)")


def infer_config(tensors):
    """The LAPXConfig that weights under our names belong to, from names and shapes alone.

    gamma_target leaves no trace in the weights and is the default.
    """
    def attention(prefix):
        for kind, trace in (("ECA-NonLocal", "non_local.gamma"), ("ECA-CBAM", "eca.conv.weight"),
                            ("CBAM", "mlp.0.weight"), ("ECA", "conv.weight")):
            if f"{prefix}.{trace}" in tensors:
                return kind
        return None

    num_joints, channels = tensors["stages.0.head.weight"].shape[:2]
    stages = sum(bool(re.fullmatch(r"stages\.\d+\.head\.weight", name)) for name in tensors)
    return LAPXConfig(
        num_joints, stages, channels,
        soft_gate="stages.0.hourglass.bottom.alpha" in tensors,
        stem_attention=attention("stem.attention"),
        stage_attention=attention("stages.0.attention"),
        neck_attention=tuple(attention(f"stages.{s}.hourglass.neck") for s in range(stages)),
    )


def variant_name(config):
    """The name in VARIANTS of a configuration, whatever its joints; "custom" if it has none."""
    names = (name for name, known in VARIANTS.items()
             if replace(known, num_joints=config.num_joints) == config)
    return next(names, "custom")


def from_checkpoint(content, path):
    """A LAPX with the weights in a file's content (what load_file returned for path), strictly."""
    tensors = find_weights(content, path)
    config, own = (infer_config(tensors),
                   content.get("config") if isinstance(content, dict) else None)
    if isinstance(own, dict) and "gamma_target" in own:  # a checkpoint of ours
        config = replace(config, gamma_target=own["gamma_target"])
    model = LAPX(config)
    expected = model.state_dict()
    problems = (
        [f"missing {name}" for name in expected if name not in tensors]
        + [f"unexpected {name}" for name in tensors if name not in expected]
        + [f"{name} is {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}"
           for name, tensor in expected.items()
           if name in tensors and tensors[name].shape != tensor.shape]
    )
    if problems:
        shown = "\n  ".join(problems[:20] + ["..."] * (len(problems) > 20))
        raise InputError(f"{path} does not fit {variant_name(config)} with {config.num_joints} "
                         f"joints, {len(problems)} tensors differ:\n  {shown}")
    model.load_state_dict(tensors)
    return model


def lapx(num_joints=16, variant="lapx", weights=None):
    """A network of VARIANTS with fresh weights, or the network that a file holds.

    weights: our checkpoints, a plain state_dict or the authors' .tar files. The number of joints
    and the variant are then those of the file, and the other two arguments are not looked at.
    InputError for an unknown variant, and for a file that is damaged, unsafe or does not fit.
    """
    if weights is not None:
        return from_checkpoint(load_file(weights), weights)
    if variant not in VARIANTS:
        raise InputError(f"unknown variant {variant!r}; there are {', '.join(VARIANTS)}")
    return LAPX(replace(VARIANTS[variant], num_joints=num_joints))


# ---------------------------------------------------------------------------- counting

def count(config, height, width):
    """Size and cost of a network for one picture of height x width.

    -> true parameters, parameters the paper's way, multiply-adds, FLOPs the paper's way. The
    paper's figures are those of the tool thop: it leaves out bare parameters (alpha and gamma), and
    its FLOPs are the multiply-adds plus 4 per element that a BatchNorm puts out plus 1 per element
    that an adaptive average pool (one in each channel attention) takes in.
    """
    multiply_adds, extra = [], []

    def add(module, inputs, output):  # a forward hook
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            multiply_adds.append(output.numel() * module.weight[0].numel())
        elif isinstance(module, NonLocal):  # two products of N x N with N x C/8
            multiply_adds.append(2 * output[0, 0].numel() ** 2 * module.g.out_channels)
        elif isinstance(module, nn.BatchNorm2d):
            extra.append(4 * output.numel())
        elif isinstance(module, (ECA, CBAM)):
            extra.append(inputs[0].numel())

    with torch.device("meta"), torch.no_grad():  # shapes alone, no numbers
        model = LAPX(config).eval()
        for module in model.modules():
            module.register_forward_hook(add)
        model(torch.zeros(1, 3, height, width))
    parameters = {name: parameter.numel() for name, parameter in model.named_parameters()}
    bare = sum(n for name, n in parameters.items() if name.endswith((".alpha", ".gamma")))
    total, multiply_adds = sum(parameters.values()), sum(multiply_adds)
    return total, total - bare, multiply_adds, multiply_adds + sum(extra)


# What the paper prints: millions of parameters, then GFLOPs at the sizes of COUNT_SIZES.
COUNT_SIZES = ((256, 256, 16), (256, 192, 17), (384, 288, 17))  # H, W and the data set's joints
PAPER = {"lapx": ("2.30", "3.45", "2.59", "5.82"), "lap": ("2.34", "3.70", "", "")} | {
    f"row{row}": (millions, "", "", "") for row, millions in enumerate(
        "2.30 2.26 2.25 2.23 2.28 2.26 2.26 2.26 2.26 2.26 2.30 2.30 2.30 2.30".split(), start=1)}


def main():
    print("Parameters with 16 joints. thop: counted the paper's way (see count()); paper: what the "
          "paper prints.")
    print(f"{'':18}|{'parameters':^25} |" + "|".join(
        f"{f'{h}x{w}, {k} joints':^29}" for h, w, k in COUNT_SIZES))
    print(f"{'variant':8}{'S':>4}{'C':>5} |{'true':>9}{'thop':>10}{'paper':>6} "
          + f"|{'multiply-adds':>14}{'thop':>8}{'paper':>6} " * 3)
    for name, config in VARIANTS.items():
        line = f"{name:8}{config.stages:4}{config.channels:5} "
        for (height, width, joints), paper in zip(COUNT_SIZES, PAPER[name][1:]):
            true, thop, multiply_adds, flops = count(
                replace(config, num_joints=joints), height, width)
            if joints == 16:
                line += f"|{true:9}{thop:10}{PAPER[name][0]:>6} "
            line += f"|{multiply_adds / 1e9:12.4f} G{flops / 1e9:6.3f} G{paper:>6} "
        print(line)
    print("row3: Table 3 prints 190 channels, its text 180; only 180 gives the 2.25 M printed.")


if __name__ == "__main__":
    main()
