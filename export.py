"""Exports a network to ONNX, written for speed or quantised to 8 bits, and times ONNX files.

    python export.py --weights runs/mpii/best.pt --out lapx.onnx
    python export.py --weights runs/mpii/best.pt --out lapx-int8.onnx --int8 --data data/mpii
    python export.py --time lapx.onnx lapx-int8.onnx peer.onnx --threads 1 2 --out runs/timing
    python export.py --profile lapx.onnx

A float32 file is only written if ONNX Runtime computes with it what PyTorch does. All that its
user needs (joints, flip pairs, limbs, input size, mean, deviation, order of the colours) is in the
file, as JSON under the key "lapx" of its metadata; `evaluate.py --weights lapx.onnx` takes it from
there.
"""

import argparse
import copy
import csv
import io
import json
import logging
import math
import operator
import platform
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn

import data
import evaluate
from data import DATASETS
from lapx import (ECA, SKELETONS, STRIDE, Block, ChannelPool, InputError, NonLocal, Stage, Stem,
                  decode, variant_name)

OPSET = 18
TOLERANCE = 1e-5  # of a float32 file: largest difference to PyTorch, relative to the largest value
INT8_TOLERANCE = 0.2  # root mean square; finds a broken file, not a lost point of accuracy


# ---------------------------------------------------------------------------- ONNX operators

@torch.library.custom_op("lapx::softsign", mutates_args=())
def softsign(x: torch.Tensor) -> torch.Tensor:
    """x / (1 + |x|), as one operator; torch would export the formula."""
    return F.softsign(x)


@torch.library.custom_op("lapx::to_bytes", mutates_args=())
def to_bytes(x: torch.Tensor, scale: float, zero: int) -> torch.Tensor:
    """A float tensor in 8 bits: round(x / scale) + zero, within 0..255."""
    return ((x / scale).round() + zero).clamp(0, 255).to(torch.uint8)


@torch.library.custom_op("lapx::from_bytes", mutates_args=())
def from_bytes(x: torch.Tensor, scale: float, zero: int) -> torch.Tensor:
    """The inverse of to_bytes, but for the rounding."""
    return (x.float() - zero) * scale


@torch.library.custom_op("lapx::channels_from_bytes", mutates_args=())
def channels_from_bytes(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Integer weights or biases times a scale for each output channel, (C,...) and (C,)."""
    return x.float() * scale.reshape(-1, *[1] * (x.ndim - 1))


softsign.register_fake(torch.empty_like)
to_bytes.register_fake(lambda x, scale, zero: torch.empty_like(x, dtype=torch.uint8))
from_bytes.register_fake(lambda x, scale, zero: torch.empty_like(x, dtype=torch.float32))
channels_from_bytes.register_fake(lambda x, scale: torch.empty_like(x, dtype=torch.float32))


def translations():
    """How torch's exporter is to write the operators above in ONNX."""
    from onnxscript import opset18 as op

    def parameters(scale, zero):
        import onnx

        return (op.Constant(value=onnx.numpy_helper.from_array(np.array(scale, np.float32))),
                op.Constant(value=onnx.numpy_helper.from_array(np.array(zero, np.uint8))))

    return {
        torch.ops.lapx.softsign.default: lambda x: op.Softsign(x),
        torch.ops.lapx.to_bytes.default:
            lambda x, scale, zero: op.QuantizeLinear(x, *parameters(scale, zero)),
        torch.ops.lapx.from_bytes.default:
            lambda x, scale, zero: op.DequantizeLinear(x, *parameters(scale, zero)),
        torch.ops.lapx.channels_from_bytes.default:
            lambda x, scale: op.DequantizeLinear(x, scale, axis=0),
    }


# ---------------------------------------------------------------------------- deployed, float32

class HalfELU(nn.Module):
    """ELU(2x) / 2 = max(x, softsign(tanh x)), for every x. Any shape -> same.

    ONNX Runtime's ELU computes element by element; these three are vectorised, and one pass over
    memory fewer than max(x, exp(min(x, 0)) - 1).
    """

    def forward(self, x):
        # keeps tanh out of ONNX Runtime's blocked layout, which max can't share
        flat = x.flatten(1)
        return torch.maximum(flat, softsign(torch.tanh(flat))).view(x.shape)


class DoubledELU(HalfELU):
    """ELU(2x), for a stage's features: attention follows, which is not linear."""

    def forward(self, x):
        return 2 * super().forward(x)


def depthwise(scale, bias=None):
    """A 1x1 convolution that scales the channels, (C,), which stays in the blocked layout."""
    C = len(scale)
    conv = nn.Conv2d(C, C, 1, groups=C, bias=bias is not None)
    conv.weight.data = scale.detach().reshape(C, 1, 1, 1).clone()
    if bias is not None:
        conv.bias.data = bias.detach().clone()
    return conv


class DeployedStage(Stage):
    """A Stage whose features_to_next holds both ways to the next one: through the heatmaps too."""

    def forward(self, x):
        y = self.block(self.hourglass(x))
        y = self.attention(self.elu(self.bn(self.conv(y))))
        return self.head(y), x if self.last else x + self.features_to_next(y)


class Heatmaps(nn.Module):
    """images (B,3,H,W) -> a tuple of heatmaps (B,K,h,w): the last stage's, or those of all."""

    def __init__(self, model, all_stages):
        super().__init__()
        self.stem, self.stages, self.all_stages = model.stem, model.stages, all_stages

    def forward(self, images):
        x, outputs = self.stem(images), []
        for stage in self.stages:
            heatmaps, x = stage(x)
            outputs.append(heatmaps)
        return tuple(outputs if self.all_stages else outputs[-1:])


def decoded(heatmaps):
    """Heatmaps (B,K,h,w) -> keypoints (B,K,3): x, y in pixels of the input, score."""
    points, scores = decode(heatmaps)
    return torch.cat([STRIDE * points, scores[..., None]], dim=2)


class WithKeypoints(nn.Module):
    """Heatmaps, and behind them the keypoints that the last ones decode to."""

    def __init__(self, heatmaps):
        super().__init__()
        self.heatmaps = heatmaps

    def forward(self, images):
        outputs = self.heatmaps(images)
        return (*outputs, decoded(outputs[-1]))


def fold(module, conv, norm):
    """A module's BatchNorm into the convolution before it; both are attributes, named here."""
    fused = torch.nn.utils.fusion.fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm))
    setattr(module, conv, fused)
    setattr(module, norm, nn.Identity())


@torch.no_grad()
def folded(model):
    """A trained LAPX -> a copy without BatchNorms: each is in the convolution before it, but for
    the first one of a block, which has none before it and becomes a depthwise convolution."""
    model = copy.deepcopy(model).eval()
    for module in list(model.modules()):
        if isinstance(module, Block):
            norm = module.bn1
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            module.bn1 = depthwise(scale, norm.bias - norm.running_mean * scale)
            fold(module, "pointwise1", "bn2")
            fold(module, "depthwise", "bn3")
        elif isinstance(module, (Stem, Stage)):
            fold(module, "conv", "bn")
    return model


@torch.no_grad()
def merged(model):
    """folded(model) whose gates are depthwise convolutions, and whose stages have one way to the
    next."""
    model = folded(model)
    for module in list(model.modules()):
        if isinstance(module, Block) and module.alpha is not None:
            module.shortcut, module.alpha = depthwise(module.alpha.flatten()), None
        elif isinstance(module, Stage):
            module.__class__ = DeployedStage
            if not module.last:
                there, back, head = module.features_to_next, module.heatmaps_to_next, module.head
                there.weight += torch.einsum("ckij,kdij->cdij", back.weight, head.weight)
                there.bias += back.weight[..., 0, 0] @ head.bias + back.bias
    return model


@torch.no_grad()
def deploy(model):
    """A trained LAPX -> a copy that computes the same function in a form that runs faster.

    It is merged(model) with HalfELU(z/2) = ELU(z)/2 for ELU(z): the convolution before supplies
    z/2, the one behind makes up for the half.
    """
    model = merged(model)
    for module in model.modules():
        if isinstance(module, Block):
            module.bn1.weight /= 2
            for conv in (module.bn1, module.pointwise1, module.depthwise):
                conv.bias /= 2
            module.pointwise2.weight *= 2
            module.elu = HalfELU()
        elif isinstance(module, (Stem, Stage)):
            module.conv.weight /= 2
            module.conv.bias /= 2
            module.elu = HalfELU() if isinstance(module, Stem) else DoubledELU()
    for conv in (model.stem.block1.bn1, model.stem.block1.shortcut):
        conv.weight *= 2
    return model


# ---------------------------------------------------------------------------- deployed, 8 bits

class Quant(nn.Module):
    """A place where values are rounded to 8 bits. Any shape -> same, float32.

    First it observes: its range is that of all values seen, zero included. Then it quantises.
    """

    def __init__(self, reach=0.0):
        super().__init__()
        self.observing, self.low, self.high = True, 0.0, reach

    def scale_and_zero(self):
        scale = max(self.high - self.low, 1e-6) / 255
        return scale, round(-self.low / scale)

    def forward(self, x):
        if self.observing:
            self.low, self.high = min(self.low, x.min().item()), max(self.high, x.max().item())
            return x
        return from_bytes(to_bytes(x, *self.scale_and_zero()), *self.scale_and_zero())

    def freeze(self):
        self.observing = False


class QuantELU(nn.Module):
    """ELU in 8 bits by operators that ONNX Runtime computes in 8 bits. Any shape -> same.

    ELU(z) = max(z, 0) + (e^min(z,0) - 1). The maximum is one of bytes. For the other term,
    sigmoid(z - b) / sigmoid(-b) is e^z to within e^-b / 4 where z < 0; where z > 0 it saturates,
    as 255 stands for 1. So one sigmoid, which is a table of 256 bytes, gives it whole. Its input is
    z with another zero point, and z's range must reach from below 0 to above b.
    """

    REACH = 4.5  # b

    def __init__(self):
        super().__init__()
        self.before, self.behind = Quant(self.REACH), Quant()

    def forward(self, z):
        if self.before.observing:
            return self.behind(F.elu(self.before(z)))
        scale, zero = self.before.scale_and_zero()
        b = min(round(self.REACH / scale), 255 - zero)
        z = to_bytes(z, scale, zero)
        positive = torch.maximum(z, torch.full((), zero, dtype=torch.uint8))
        top = 1 / (1 + math.exp(b * scale))  # sigmoid(-b)
        power = to_bytes(torch.sigmoid(from_bytes(z, scale, zero + b)), top / 255, 0)
        return self.behind(from_bytes(positive, scale, zero) + from_bytes(power, 1 / 255, 255))


class QuantConv(nn.Module):
    """A convolution with 8-bit weights, a scale for each output channel. Like nn.Conv2d.

    before: the Quant that its input comes from, which decides the scale of the 32-bit biases.
    """

    def __init__(self, conv, before):
        super().__init__()
        self.conv, self.before = conv, before

    def forward(self, x):
        if self.before.observing:
            return self.conv(x)
        return F.conv2d(x, channels_from_bytes(self.weight, self.scale),
                        channels_from_bytes(self.bias, self.bias_scale), self.conv.stride,
                        self.conv.padding, self.conv.dilation, self.conv.groups)

    def freeze(self):
        conv, (scale_before, _) = self.conv, self.before.scale_and_zero()
        bias = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias
        scale = torch.maximum(conv.weight.flatten(1).abs().amax(1) / 127,  # (C,)
                              bias.abs() / scale_before / 2**30).clamp(min=1e-12)  # fits 32 bits
        self.scale, self.bias_scale = nn.Buffer(scale), nn.Buffer(scale * scale_before)
        self.weight = nn.Buffer((conv.weight / scale[:, None, None, None]).round().to(torch.int8))
        self.bias = nn.Buffer((bias / self.bias_scale).round().to(torch.int32))


@torch.fx.wrap
def mean_of_pixels(x):
    """(B,C,h,w) -> (B,C,1,1), by a pooling, which ONNX Runtime computes in 8 bits."""
    return F.avg_pool2d(x, x.shape[2:])


@torch.fx.wrap
def maximum_of_pixels(x):
    """(B,C,h,w) -> (B,C,1,1), likewise."""
    return F.max_pool2d(x, x.shape[2:])


class PooledECA(ECA):
    """ECA whose descriptor comes from poolings."""

    def descriptor(self, x):
        return (mean_of_pixels(x) + maximum_of_pixels(x)).flatten(1)


class LastChannelPool(ChannelPool):
    """ChannelPool over the last of the axes, behind which 8-bit values lie in memory anyway."""

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)  # (B,h,w,C)
        return torch.stack([x.amax(3), x.mean(3)], dim=1)


class _Tracer(torch.fx.Tracer):
    """Looks into everything but the Non-Local modules, which stay in float32."""

    def is_leaf_module(self, module, name):
        return isinstance(module, NonLocal) or super().is_leaf_module(module, name)


@torch.no_grad()
def quantise(model, crops, all_stages=False):
    """A trained LAPX -> a Heatmaps that computes in 8 bits.

    Gates, Non-Local modules and heads compute in float32, from 8-bit values.
    crops: normalised images (N,3,H,W) like those it will see, for the ranges of all values.
    """
    model = merged(model)
    for module in model.modules():
        if isinstance(module, ECA):
            module.__class__ = PooledECA
        elif isinstance(module, ChannelPool):
            module.__class__ = LastChannelPool
    root = Heatmaps(model, all_stages)
    graph = _Tracer().trace(root)
    for node in list(graph.nodes):
        if node.op == "call_module" and isinstance(root.get_submodule(node.target), nn.Identity):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    source = {}  # a node of the graph whose values are of 8 bits -> the Quant that they come from

    def quantise_output(node, quant):
        name = f"quant_{node.name}"
        root.add_module(name, quant)
        with graph.inserting_after(node):
            behind = graph.call_module(name, (node,))
        node.replace_all_uses_with(behind, lambda user: user is not behind)
        source[behind] = quant

    def replace(node, module):
        root.add_module(node.name, module)
        node.target = node.name

    for node in list(graph.nodes):
        module = root.get_submodule(node.target) if node.op == "call_module" else None
        quantised = all(argument in source for argument in node.args)  # its inputs are
        if isinstance(module, nn.ELU):
            replace(node, QuantELU())
            source[node] = root.get_submodule(node.target).behind
        elif isinstance(module, nn.Conv2d) and quantised and not node.target.endswith("head"):
            replace(node, QuantConv(module, source[node.args[0]]))
            if not all(user.op == "call_module"
                       and isinstance(root.get_submodule(user.target), nn.ELU)
                       for user in node.users):  # a QuantELU quantises its input itself
                quantise_output(node, Quant())
        elif node.op == "placeholder" or isinstance(module, NonLocal) or (
                node.target is operator.add and quantised):
            quantise_output(node, Quant())
        elif node.target is operator.mul and node.args[0] in source:
            quantise_output(node.args[1], Quant())  # args[1] is an attention's gate
            quantise_output(node, Quant())
        elif node.target in (F.max_pool2d, F.interpolate, mean_of_pixels, maximum_of_pixels):
            # these stay in the range of what they are given
            quantise_output(node, source[node.args[0]])
    quantised = torch.fx.GraphModule(root, graph)
    for start in range(0, len(crops), 8):
        quantised(crops[start:start + 8])
    for module in quantised.modules():
        if isinstance(module, (Quant, QuantConv)):
            module.freeze()
    return quantised


# ---------------------------------------------------------------------------- export

def to_onnx(module, info, size, outputs, batch=None):
    """A module of images (B,3,H,W) -> an onnx.ModelProto. batch: None leaves it open.

    info goes into the metadata. outputs: the names of what the module gives.
    """
    import onnx

    shapes = None if batch else ({0: torch.export.Dim("batch", max=2**20)},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            module, (torch.zeros(batch or 2, 3, *size),), dynamo=True, opset_version=OPSET,
            input_names=["images"], output_names=outputs, dynamic_shapes=shapes, verbose=False,
            external_data=False, custom_translation_table=translations())
    model = program.model_proto
    for node in model.graph.node:  # the exporter notes where in whose files a node comes from
        del node.metadata_props[:]
        node.doc_string = ""
    del model.graph.value_info[:]
    if batch is None:  # torch 2.6 gets some of these wrong
        for item in [*model.graph.input, *model.graph.output]:
            item.type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.helper.set_model_props(model, {"lapx": json.dumps(info)})
    onnx.checker.check_model(model, full_check=True)
    return model


def compare(session, model, images):
    """A file's session against PyTorch, for images (B,3,H,W): of the heatmaps of all its stages the
    largest difference, relative to the largest value, and the root mean square difference, relative
    to that of the values. InputError if its keypoints are not its heatmaps decoded."""
    outputs = dict(zip([output.name for output in session.get_outputs()],
                       map(torch.from_numpy, session.run(None, {"images": images.numpy()}))))
    keypoints = outputs.pop("keypoints", None)
    if keypoints is not None and not torch.allclose(keypoints, decoded(outputs["heatmaps"])):
        raise InputError("the keypoints in the file differ from those decoded by PyTorch")
    with torch.no_grad():
        expected = torch.stack(model(images)[-len(outputs):])
    difference = torch.stack(list(outputs.values())) - expected
    return ((difference.abs().max() / expected.abs().max()).item(),
            (difference.pow(2).mean() / expected.pow(2).mean()).sqrt().item())


def calibration_crops(network, args, count=64):
    """Crops for the ranges of an 8-bit file, normalised (N,3,H,W): of one's own pictures, or of the
    training people of the network's data set."""
    dataset, crops = network.info["dataset"], []
    if args.image:
        for path in evaluate.pictures_in(args.image)[:count]:
            picture, _ = data.open_picture(path, upright=True)
            picture = picture.convert("RGB")
            crops.append(evaluate.crop_of(network, picture, [0, 0, *picture.size])[0][0])
    elif dataset:
        people = DATASETS[dataset].read(args.data or Path("data") / dataset,
                                        DATASETS[dataset].train, network.size, network.skeleton)
        people = people.rows(np.linspace(0, len(people) - 1, min(count, len(people))).astype(int))
        samples = data.PoseDataset(people, network.size, network.skeleton)
        crops = [samples[row][1] for row in range(len(people))]
    else:
        raise InputError("--int8 needs pictures for its ranges; give --image with some")
    print(f"ranges from {len(crops)} pictures")
    return network.prepare(torch.stack(crops)).contiguous()


def export(args):
    """--weights: writes the ONNX file, if ONNX Runtime computes with it what PyTorch does."""
    import onnxruntime

    network = evaluate.Network(args.weights, "cpu", args.input,
                               SKELETONS[args.skeleton] if args.skeleton else None, args.bgr)
    if network.model is None:
        raise InputError(f"{args.weights} is an ONNX file already; export needs a checkpoint")
    model = network.model.to(memory_format=torch.contiguous_format)
    if args.int8:
        crops = calibration_crops(network, args)
        module = quantise(model, crops, args.all_stages)
        n = args.batch or min(2, len(crops))
        tests = [crops[torch.arange(start, start + n) % len(crops)]
                 for start in range(0, min(16, len(crops)), n)]
    else:
        module = Heatmaps(folded(model) if args.plain else deploy(model), args.all_stages).eval()
        generator = torch.Generator().manual_seed(0)
        tests = [torch.randn(args.batch or batch, 3, *network.size, generator=generator)
                 for batch in (1, 2, 3)]
    before = range(1, model.config.stages) if args.all_stages else ()
    outputs = [*(f"heatmaps{number}" for number in before), "heatmaps"]
    if args.keypoints:
        module, outputs = WithKeypoints(module), [*outputs, "keypoints"]
    proto = to_onnx(module, {**network.info, "bits": 8 if args.int8 else 32}, network.size, outputs,
                    args.batch)
    content = proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    largest, rms = np.max([compare(session, model, images) for images in tests], axis=0)
    print(f"{variant_name(model.config)}, opset {OPSET}, {len(content) / 1e6:.1f} MB, "
          + ", ".join(f"{item.name} {item.shape}" for item in
                      [*session.get_inputs(), *session.get_outputs()]))
    print(f"ONNX Runtime {onnxruntime.__version__} against PyTorch {torch.__version__} on "
          f"{len(tests)} inputs: largest difference {largest:.1e}, root mean square {rms:.1e} of "
          "the heatmaps' own")
    limit, value = (INT8_TOLERANCE, rms) if args.int8 else (TOLERANCE, largest)
    if not value <= limit:
        raise InputError(f"that is more than {limit:g}: no file is written")
    data.write_file(args.out, content)
    print(f"wrote {args.out}"
          + (": score it with evaluate.py before you use it" if args.int8 else ""))


# ---------------------------------------------------------------------------- timing

NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16,
               "tensor(uint8)": np.uint8, "tensor(double)": np.float64,
               "tensor(int64)": np.int64, "tensor(int32)": np.int32}


def random_inputs(session, path, size=None):
    """Values for the inputs of any graph: open batches are 1, open heights and widths are size."""
    feed, rng = {}, np.random.default_rng(0)
    for item in session.get_inputs():
        shape, fixed = list(item.shape), [isinstance(side, int) and side > 0 for side in item.shape]
        if shape and not fixed[0]:
            shape[0] = 1
        if len(shape) == 4:  # B,3,H,W or B,H,W,3
            sides = (1, 2) if shape[3] == 3 else (2, 3)
            for side, wanted in zip(sides, size or ()):
                if fixed[side] and shape[side] != wanted:
                    raise InputError(f"{path}: the size of {item.name} {item.shape} is not "
                                     f"{size[0]}x{size[1]}; leave out --input, or this file")
                shape[side] = wanted
        if not all(isinstance(side, int) and side > 0 for side in shape) or (
                item.type not in NUMPY_TYPES):
            raise InputError(f"{path}: the input {item.name} {item.shape} {item.type} can't be "
                             "made up; open heights and widths are given with --input HxW")
        values = rng.integers(0, 255, shape) if "int" in item.type else rng.standard_normal(shape)
        feed[item.name] = values.astype(NUMPY_TYPES[item.type])
    try:
        session.run(None, feed)
    except Exception as error:  # onnxruntime has no public classes of errors
        raise InputError(f"{path} can't be run on {[values.shape for values in feed.values()]} "
                         f"({str(error).splitlines()[0]})") from None
    return feed


def profile_nodes(path, feed, threads=1, runs=1, optimised=True):
    """The calls of a file's nodes, in order, from ONNX Runtime's profile: a list of {"op_name",
    "dur" (microseconds), "input_type_shape", "output_type_shape", ..}."""
    with tempfile.TemporaryDirectory() as folder:
        session = evaluate.open_session(path, threads, str(Path(folder) / "profile"), optimised)
        for _ in range(runs):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
    return [{**event["args"], "dur": event["dur"]} for event in events
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]


def count_onnx(path, feed):
    """An ONNX file's parameters, and the multiply-adds of its convolutions and matrix products for
    these inputs; from the shapes that they have when the graph runs as it is written."""
    import onnx

    graph = onnx.load(path).graph
    constants = [attribute.t for node in graph.node if node.op_type == "Constant"
                 for attribute in node.attribute if attribute.name == "value"]
    parameters = sum(math.prod(tensor.dims) for tensor in [*graph.initializer, *constants]
                     if tensor.data_type not in (onnx.TensorProto.INT64, onnx.TensorProto.BOOL))
    multiply_adds = 0
    for node in profile_nodes(path, feed, optimised=False):
        inputs, outputs = ([next(iter(item.values())) for item in node[f"{side}_type_shape"]]
                           for side in ("input", "output"))
        name = node["op_name"]
        if name in ("Conv", "ConvInteger", "QLinearConv"):
            weight = inputs[3 if name == "QLinearConv" else 1]
            multiply_adds += math.prod(outputs[0]) * math.prod(weight[1:])
        elif name == "ConvTranspose":
            multiply_adds += math.prod(inputs[0]) * math.prod(inputs[1][1:])
        elif name in ("MatMul", "MatMulInteger", "QLinearMatMul"):
            multiply_adds += math.prod(outputs[0]) * inputs[0][-1]
        elif name == "Gemm":  # either matrix may be transposed
            multiply_adds += math.isqrt(math.prod(inputs[0]) * math.prod(inputs[1])
                                        * math.prod(outputs[0]))
    return parameters, multiply_adds


MEMORY_PROBE = """
import re, sys
import numpy, onnxruntime
def peak():
    try:
        return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) / 2**10
    except OSError:  # not Linux
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
before = peak()
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = int(sys.argv[3]), 3
session = onnxruntime.InferenceSession(sys.argv[1], options, ["CPUExecutionProvider"])
feed = dict(numpy.load(sys.argv[2]))
for _ in range(3):
    session.run(None, feed)
print(peak() - before)
"""


def measure_memory(path, feed, threads):
    """Megabytes that creating a session and running it add to a fresh process at its peak, the
    interpreter and the libraries left out; None where the system does not tell (Windows)."""
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "feed.npz", **feed)
        done = subprocess.run([sys.executable, "-c", MEMORY_PROBE, path, Path(folder) / "feed.npz",
                               str(threads)], capture_output=True, text=True)
    return float(done.stdout) if done.returncode == 0 else None


def cpu_name():
    """The processor's name, as the system tells it."""
    match = None
    if sys.platform == "linux":
        match = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    elif sys.platform == "darwin":
        match = re.search(r": (.*)", subprocess.run(
            ["sysctl", "machdep.cpu.brand_string"], text=True, capture_output=True).stdout)
    return match[1] if match else platform.processor() or platform.machine()


WARM_UP = 5  # runs


def time_files(args):
    """--time: times files side by side, run by run in turn, so that noise hurts all alike."""
    import onnxruntime

    sessions = [evaluate.open_session(path) for path in args.time]
    feeds = [random_inputs(session, path, args.input) for session, path in zip(sessions, args.time)]
    counts = [count_onnx(path, feed) for path, feed in zip(args.time, feeds)]
    width = max(28, *(len(path.name) for path in args.time))
    print(f"{cpu_name()}, ONNX Runtime {onnxruntime.__version__}, {args.runs} runs in turn after "
          f"{WARM_UP} to warm up\n{'file':{width}} {'input':>13} {'threads':>7} {'ms':>8} "
          f"{'10..90 %':>15} {'FPS':>7} {'ratio':>6} {'RAM MB':>7} {'params M':>9} {'GMAC':>6}")
    rows = []
    for threads in args.threads:
        sessions = [evaluate.open_session(path, threads) for path in args.time]
        seconds = np.zeros((WARM_UP + args.runs, len(sessions)))
        for run in range(len(seconds)):
            for number, (session, feed) in enumerate(zip(sessions, feeds)):
                start = time.perf_counter()
                session.run(None, feed)
                seconds[run, number] = time.perf_counter() - start
        low, median, high = 1e3 * np.quantile(seconds[WARM_UP:], (0.1, 0.5, 0.9), axis=0)
        for number, (path, feed) in enumerate(zip(args.time, feeds)):
            shape, (parameters, macs) = next(iter(feed.values())).shape, counts[number]
            row = {"file": str(path), "input": "x".join(map(str, shape)), "threads": threads,
                   "ms": median[number], "ms_10": low[number], "ms_90": high[number],
                   "fps": shape[0] * 1e3 / median[number], "ratio": median[0] / median[number],
                   "ram_mb": measure_memory(path, feed, threads), "parameters": parameters,
                   "multiply_adds": macs}
            rows.append(row)
            ram = "-" if row["ram_mb"] is None else f"{row['ram_mb']:.1f}"
            print(f"{path.name:{width}} {row['input']:>13} {threads:7} {row['ms']:8.2f} "
                  f"{row['ms_10']:7.2f}{row['ms_90']:8.2f} {row['fps']:7.1f} {row['ratio']:6.2f} "
                  f"{ram:>7} {parameters / 1e6:9.2f} {macs / 1e9:6.2f}", flush=True)
    if args.out:
        facts = {"cpu": cpu_name(), "onnxruntime": onnxruntime.__version__, "runs": args.runs,
                 "results": rows}
        buffer = io.StringIO()
        table = csv.DictWriter(buffer, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        data.write_file(args.out / "timing.json", json.dumps(facts, indent=1) + "\n")
        data.write_file(args.out / "timing.csv", buffer.getvalue())
        data.write_png(args.out / "timing.png", draw_timing(rows[:len(args.time)], facts))
        print(f"wrote {args.out}/: timing.json, timing.csv, timing.png")


def draw_timing(rows, facts):
    """The paper's Figure 3: multiply-adds against frames per second, a bubble's area its
    parameters."""
    picture = Image.new("RGB", (760, 520), "white")
    draw = ImageDraw.Draw(picture)
    rows = sorted(rows, key=lambda row: -row["fps"])
    axes = data.Axes(draw, (70, 50, 730, 450),
                     [0, 1.4 * max(row["multiply_adds"] / 1e9 for row in rows)],
                     [0, 1.2 * rows[0]["fps"]], "multiply-adds (10^9)",
                     f"frames per second, {facts['cpu']}, {rows[0]['threads']} thread(s); area: "
                     "parameters", margin=0)
    largest = max(row["parameters"] for row in rows) or 1
    colours = (data.RIGHT, data.LEFT, data.MIDDLE, (220, 80, 160), (150, 110, 230))
    lowest = 0  # the label's before; labels are kept apart
    for number, row in enumerate(rows):
        x, y = axes(row["multiply_adds"] / 1e9, row["fps"])
        radius = 24 * math.sqrt(row["parameters"] / largest)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), colours[number % 5], "black")
        lowest = max(y, lowest + 34)
        draw.line((x + radius, y, x + 30, lowest), (0, 0, 0))
        draw.text((x + 34, lowest), f"{Path(row['file']).stem}\n{row['parameters'] / 1e6:.2f} M, "
                  f"{row['fps']:.1f} FPS", (0, 0, 0), data.font(size=13), "lm")
    return picture


def profile(args):
    """--profile: where the time goes in one file, per operator, from ONNX Runtime's own profile."""
    feed = random_inputs(evaluate.open_session(args.profile), args.profile, args.input)
    spent, calls = defaultdict(float), defaultdict(int)
    for node in profile_nodes(args.profile, feed, args.threads[0], args.runs):
        spent[node["op_name"]] += node["dur"] / 1e3 / args.runs
        calls[node["op_name"]] += 1
    total = sum(spent.values())
    print(f"{args.profile}, {cpu_name()}, {args.threads[0]} thread(s), mean of {args.runs} runs, "
          f"the measuring included\n{'operator':24} {'ms':>8} {'share':>7} {'nodes':>6}")
    for name, milliseconds in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"{name:24} {milliseconds:8.2f} {milliseconds / total:7.1%} "
              f"{calls[name] // args.runs:6}")
    print(f"{'total':24} {total:8.2f}")


# ---------------------------------------------------------------------------- command line

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("export")
    group.add_argument("--weights", type=Path, metavar="FILE", help="a checkpoint or .tar file")
    group.add_argument("--skeleton", choices=SKELETONS, help="the joints, if the file does not say")
    group.add_argument("--bgr", action="store_true", help="the network was trained on BGR pictures")
    group.add_argument("--batch", type=data.number_from(1), metavar="N",
                       help="fixes the batch (default: open)")
    group.add_argument("--all-stages", action="store_true",
                       help="heatmaps of all stages as outputs")
    group.add_argument("--keypoints", action="store_true",
                       help="decoded keypoints (B,K,3), in pixels of the input, as an output")
    group.add_argument("--plain", action="store_true", help="the layers of training one by "
                       "one, BatchNorms folded")
    group.add_argument("--int8", action="store_true", help="computes in 8 bits; ranges from 64 "
                       "crops of the data set's training people, or from --image")
    group.add_argument("--data", type=Path, metavar="DIR", help="for --int8: the data set's folder "
                       "(default: data/DATASET)")
    group.add_argument("--image", type=Path, nargs="+", metavar="PATH",
                       help="for --int8: pictures or folders instead, each with one person")
    group = parser.add_argument_group("time")
    group.add_argument("--time", type=Path, nargs="+", metavar="ONNX",
                       help="time files side by side")
    group.add_argument("--profile", type=Path, metavar="ONNX", help="time per operator")
    group.add_argument("--threads", type=data.number_from(1), nargs="+", default=[1],
                       help="default: %(default)s")
    group.add_argument("--runs", type=data.number_from(1), default=50, help="default: %(default)s")
    parser.add_argument("--input", type=data.image_size, metavar="HxW", help="default: what the "
                        "checkpoint says; with --time and --profile for open heights and widths")
    parser.add_argument("--out", type=Path, metavar="PATH", help="the .onnx file to write "
                        "(default: lapx.onnx); with --time the folder for JSON, CSV and the figure")
    args = parser.parse_args()
    if sum(map(bool, (args.weights, args.time, args.profile))) != 1:
        parser.error("give one of --weights FILE, --time ONNX..., --profile ONNX")
    if args.plain and args.int8:
        parser.error("--plain is the float32 network as it was trained, --int8 another one")
    given = [flag for flag in ("skeleton", "bgr", "batch", "all_stages", "keypoints", "plain",
                               "int8") if getattr(args, flag)]
    if given and not args.weights:
        parser.error(f"--{given[0].replace('_', '-')} goes with --weights")
    if (args.data or args.image) and not args.int8:
        parser.error("--data and --image are for --int8")
    if args.weights:
        args.out = args.out or Path("lapx.onnx")
        if args.out.suffix != ".onnx":
            parser.error(f"--out {args.out} must end in .onnx")
    (export if args.weights else time_files if args.time else profile)(args)


if __name__ == "__main__":
    data.run(main)
