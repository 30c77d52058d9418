"""Exports a network to ONNX, written for speed or quantised to 8 bits, and times ONNX files.

    python export.py --weights runs/mpii/best.pt --out lapx.onnx
    python export.py --weights runs/mpii/best.pt --out lapx-int8.onnx --int8 --data data/mpii
    python export.py --time lapx.onnx lapx-int8.onnx peer.onnx --threads 1 2 --out runs/timing
    python export.py --profile lapx.onnx

A file is only kept if ONNX Runtime computes with it what PyTorch computes. All that its user needs
(joints, flip pairs, limbs, input size, mean, deviation, order of the colours) is in the file, as
JSON under the key "lapx" of its metadata; `evaluate.py --weights lapx.onnx` takes it from there.
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


# ---------------------------------------------------------------------------- ONNX operators

@torch.library.custom_op("lapx::softsign", mutates_args=())
def softsign(x: torch.Tensor) -> torch.Tensor:
    """x / (1 + |x|), as one operator; torch would export the formula."""
    return F.softsign(x)


@torch.library.custom_op("lapx::quantize", mutates_args=())
def quantize(x: torch.Tensor, scale: float, zero: int) -> torch.Tensor:
    """A float tensor in 8 bits: round(x / scale) + zero, within 0..255."""
    return ((x / scale).round() + zero).clamp(0, 255).to(torch.uint8)


@torch.library.custom_op("lapx::dequantize", mutates_args=())
def dequantize(x: torch.Tensor, scale: float, zero: int) -> torch.Tensor:
    """The inverse of quantize, but for the rounding."""
    return (x.float() - zero) * scale


@torch.library.custom_op("lapx::dequantize_channels", mutates_args=())
def dequantize_channels(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Integer weights or biases times a scale for each output channel, (C,...) and (C,)."""
    return x.float() * scale.reshape(-1, *[1] * (x.ndim - 1))


softsign.register_fake(torch.empty_like)
quantize.register_fake(lambda x, scale, zero: torch.empty_like(x, dtype=torch.uint8))
dequantize.register_fake(lambda x, scale, zero: torch.empty_like(x, dtype=torch.float32))
dequantize_channels.register_fake(lambda x, scale: torch.empty_like(x, dtype=torch.float32))


def translations():
    """How torch's exporter is to write the operators above in ONNX."""
    from onnxscript import opset18 as op

    def parameters(scale, zero):
        import onnx

        return (op.Constant(value=onnx.numpy_helper.from_array(np.array(scale, np.float32))),
                op.Constant(value=onnx.numpy_helper.from_array(np.array(zero, np.uint8))))

    return {
        torch.ops.lapx.softsign.default: lambda x: op.Softsign(x),
        torch.ops.lapx.quantize.default:
            lambda x, scale, zero: op.QuantizeLinear(x, *parameters(scale, zero)),
        torch.ops.lapx.dequantize.default:
            lambda x, scale, zero: op.DequantizeLinear(x, *parameters(scale, zero)),
        torch.ops.lapx.dequantize_channels.default:
            lambda x, scale: op.DequantizeLinear(x, scale, axis=0),
    }


# ---------------------------------------------------------------------------- deployed, float32

class HalfELU(nn.Module):
    """ELU(2x) / 2 = max(x, softsign(tanh x)), for every x. Any shape -> same.

    ONNX Runtime's ELU computes element by element; these three are vectorised, and one pass over
    memory fewer than max(x, exp(min(x, 0)) - 1).
    """

    def forward(self, x):
        flat = x.flatten(1)  # keeps tanh out of ONNX Runtime's blocked layout, which max can't share
        return torch.maximum(flat, softsign(torch.tanh(flat))).view(x.shape)


class DoubledELU(HalfELU):
    """ELU(2x), where what follows is not linear."""

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


class DeployedStage(nn.Module):
    """A Stage whose two ways to the next one are a single 1x1 convolution of the features."""

    def __init__(self, stage):
        super().__init__()
        self.hourglass, self.block, self.conv = stage.hourglass, stage.block, stage.conv
        self.bn, self.elu, self.attention = stage.bn, stage.elu, stage.attention
        self.head, self.last = stage.head, stage.last
        if not self.last:
            back = stage.heatmaps_to_next
            self.next = copy.deepcopy(stage.features_to_next)
            self.next.weight += torch.einsum("ckij,kdij->cdij", back.weight, self.head.weight)
            self.next.bias += back.weight[..., 0, 0] @ self.head.bias + back.bias

    def forward(self, x):
        y = self.block(self.hourglass(x))
        y = self.attention(self.elu(self.bn(self.conv(y))))
        return self.head(y), x if self.last else x + self.next(y)


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


class WithKeypoints(nn.Module):
    """Heatmaps, and behind them the keypoints (B,K,3): x, y in pixels of the input, score."""

    def __init__(self, heatmaps):
        super().__init__()
        self.heatmaps = heatmaps

    def forward(self, images):
        outputs = self.heatmaps(images)
        points, scores = decode(outputs[-1])
        return (*outputs, torch.cat([STRIDE * points, scores[..., None]], dim=2))


def fold(module, conv, norm):
    """A module's BatchNorm into the convolution before it; both are attributes, named here."""
    fused = torch.nn.utils.fusion.fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm))
    setattr(module, conv, fused)
    setattr(module, norm, nn.Identity())


@torch.no_grad()
def folded(model):
    """A trained LAPX -> a copy without BatchNorms: each is in the convolution before it, but for the
    first one of a block, which has none before it and becomes a depthwise convolution."""
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
    for module in model.modules():
        if isinstance(module, Block) and module.alpha is not None:
            module.shortcut, module.alpha = depthwise(module.alpha.flatten()), None
    model.stages = nn.ModuleList(DeployedStage(stage) for stage in model.stages)
    return model


@torch.no_grad()
def deploy(model):
    """A trained LAPX -> a copy that computes the same function in a form that runs faster.

    It is merged(model), and what goes into ELUs is halved and what comes out doubled, as far as it
    is convolutions that do both, so that HalfELU can take the ELU's place.
    """
    model = merged(model)
    for module in model.modules():
        if isinstance(module, Block):
            module.bn1.weight /= 2
            for conv in (module.bn1, module.pointwise1, module.depthwise):
                conv.bias /= 2
            module.pointwise2.weight *= 2
            module.elu = HalfELU()
        elif isinstance(module, (Stem, DeployedStage)):
            module.conv.weight /= 2
            module.conv.bias /= 2
            module.elu = DoubledELU()
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

    def observe(self, x):
        self.low, self.high = min(self.low, x.min().item()), max(self.high, x.max().item())
        return x

    def forward(self, x):
        if self.observing:
            return self.observe(x)
        return dequantize(quantize(x, *self.scale_and_zero()), *self.scale_and_zero())


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
        z = quantize(z, scale, zero)
        positive = torch.maximum(z, torch.full((), zero, dtype=torch.uint8))
        top = 1 / (1 + math.exp(b * scale))  # sigmoid(-b)
        power = quantize(torch.sigmoid(dequantize(z, scale, zero + b)), top / 255, 0)
        return self.behind(dequantize(positive, scale, zero) + dequantize(power, 1 / 255, 255))


class QuantConv(nn.Module):
    """A convolution with 8-bit weights, a scale for each output channel. Like nn.Conv2d.

    before: the Quant that its input comes from, which decides the scale of the 32-bit biases.
    """

    def __init__(self, conv, before):
        super().__init__()
        self.conv, self.before = conv, before

    def forward(self, x):
        conv = self.conv
        if self.before.observing:
            return conv(x)
        if not hasattr(self, "weight"):
            scale = conv.weight.flatten(1).abs().amax(1).clamp(min=1e-8) / 127  # (C,)
            weight = (conv.weight / scale[:, None, None, None]).round().to(torch.int8)
            bias_scale = scale * self.before.scale_and_zero()[0]
            bias = torch.zeros(len(scale)) if conv.bias is None else conv.bias
            for name, tensor in (("weight", weight), ("scale", scale), ("bias_scale", bias_scale),
                                 ("bias", (bias / bias_scale).round().to(torch.int32))):
                self.register_buffer(name, tensor.detach())
        return F.conv2d(x, dequantize_channels(self.weight, self.scale),
                        dequantize_channels(self.bias, self.bias_scale), conv.stride, conv.padding,
                        conv.dilation, conv.groups)


@torch.fx.wrap
def mean_of_pixels(x):
    """(B,C,h,w) -> (B,C,1,1), by a pooling, which ONNX Runtime computes in 8 bits."""
    return F.avg_pool2d(x, x.shape[2:])


@torch.fx.wrap
def maximum_of_pixels(x):
    """(B,C,h,w) -> (B,C,1,1), likewise."""
    return F.max_pool2d(x, x.shape[2:])


class PooledECA(ECA):
    """ECA with poolings."""

    def forward(self, x):
        descriptor = (mean_of_pixels(x) + maximum_of_pixels(x)).flatten(1)  # (B,C)
        return x * self.conv(descriptor[:, None]).sigmoid().transpose(1, 2)[..., None]


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

    What gates, the Non-Local modules and the heads compute in float32, from 8-bit values.
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
            if not all(user.op == "call_module" and isinstance(root.get_submodule(user.target), nn.ELU)
                       for user in node.users):  # a QuantELU quantises its input itself
                quantise_output(node, Quant())
        elif node.op == "placeholder" or isinstance(module, NonLocal) or (
                node.target is operator.add and quantised):
            quantise_output(node, Quant())
        elif node.target is operator.mul and node.args[0] in source:  # by a gate of an attention
            quantise_output(node.args[1], Quant())
            quantise_output(node, Quant())
        elif node.target in (F.max_pool2d, F.interpolate, mean_of_pixels, maximum_of_pixels):
            # these stay in the range of what they are given
            quantise_output(node, source[node.args[0]])
    quantised = torch.fx.GraphModule(root, graph)
    for start in range(0, len(crops), 8):
        quantised(crops[start:start + 8])
    for quant in quantised.modules():
        if isinstance(quant, Quant):
            quant.observing = False
    quantised(crops[:1])  # makes the weights
    return quantised


# ---------------------------------------------------------------------------- export

def to_onnx(module, info, size, batch=None):
    """A module of images (B,3,H,W) -> an onnx.ModelProto. batch: None leaves it open.

    info goes into the metadata. Names: images; heatmaps (the last one), heatmaps1.., keypoints.
    """
    import onnx

    with torch.no_grad():
        outputs = module(torch.zeros(batch or 2, 3, *size))
    names = [f"heatmaps{number}" for number in range(1, len(outputs) + 1)]
    if outputs[-1].ndim == 3:
        names = [*names[:-2], "heatmaps", "keypoints"]
    else:
        names[-1] = "heatmaps"
    shapes = None if batch else ({0: torch.export.Dim("batch", max=2**20)},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            module, (torch.zeros(batch or 2, 3, *size),), dynamo=True, opset_version=OPSET,
            input_names=["images"], output_names=names, dynamic_shapes=shapes, verbose=False,
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
    """The last heatmaps of a file's session against PyTorch's, for images (B,3,H,W).

    -> the largest difference, relative to the largest value, and the root mean square difference,
    relative to that of the values.
    """
    names = [output.name for output in session.get_outputs()]
    found = session.run(["heatmaps"], {"images": images.numpy()})[0]
    with torch.no_grad():
        expected = model(images)[-1]
        if "keypoints" in names:
            points, scores = decode(torch.from_numpy(found))
            decoded = torch.cat([STRIDE * points, scores[..., None]], 2).numpy()
            if not np.allclose(session.run(["keypoints"], {"images": images.numpy()})[0], decoded):
                raise InputError("the keypoints in the file differ from those decoded by PyTorch")
    difference = torch.from_numpy(found) - expected
    return ((difference.abs().max() / expected.abs().max()).item(),
            (difference.pow(2).mean() / expected.pow(2).mean()).sqrt().item())


def calibration_crops(network, args):
    """Crops for the ranges of an 8-bit file, normalised (N,3,H,W): of one's own pictures, or of the
    training people of the network's data set."""
    dataset, count = network.info["dataset"], 64
    if args.image:
        people = [data.open_picture(path, upright=True)[0] for path in
                  evaluate.pictures_in(args.image)[:count]]
        crops = [evaluate.crop_of(network, picture, [0, 0, *picture.size])[0][0] for picture in people]
    else:
        root = args.data or Path("data") / dataset
        people = data.load_people(dataset, root, DATASETS[dataset].train, network.size,
                                  network.skeleton)
        rows = np.linspace(0, len(people) - 1, min(count, len(people))).astype(int)
        samples = data.PoseDataset(people.rows(rows), network.size, network.skeleton)
        crops = [samples[row][1] for row in range(len(rows))]
    print(f"ranges from {len(crops)} pictures")
    return network.prepare(torch.stack(crops)).contiguous()


def export(args):
    """--weights: writes the ONNX file, if ONNX Runtime computes with it what PyTorch does."""
    import onnxruntime

    network = evaluate.Network(args.weights, "cpu", args.input,
                               SKELETONS[args.skeleton] if args.skeleton else None)
    if network.model is None:
        raise InputError(f"{args.weights} is an ONNX file already; export needs a checkpoint")
    model = network.model.to(memory_format=torch.contiguous_format)
    info = {**network.info, "input": list(network.size), "bits": 8 if args.int8 else 32}
    generator = torch.manual_seed(0)
    tests = [torch.randn(args.batch or batch, 3, *network.size, generator=generator)
             for batch in (1, 2, 3)]
    if args.int8:
        crops = calibration_crops(network, args)
        module = quantise(model, crops, args.all_stages)
        n = args.batch or 1
        tests = [crops[start:start + n] for start in range(0, len(crops) - n + 1, n)][:16] or [
            crops[:1].expand(n, -1, -1, -1).contiguous()]
    else:
        module = Heatmaps(folded(model) if args.plain else deploy(model), args.all_stages).eval()
    proto = to_onnx(WithKeypoints(module) if args.keypoints else module, info, network.size, args.batch)
    content = proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    largest, rms = np.max([compare(session, model, images) for images in tests], axis=0)
    print(f"{variant_name(model.config)}, {network.size[0]}x{network.size[1]}, opset {OPSET}, "
          f"{len(content) / 1e6:.1f} MB, inputs "
          + ", ".join(f"{item.name} {item.shape}" for item in session.get_inputs()) + ", outputs "
          + ", ".join(f"{item.name} {item.shape}" for item in session.get_outputs()))
    print(f"ONNX Runtime {onnxruntime.__version__} against PyTorch {torch.__version__} on "
          f"{len(tests)} inputs: largest difference {largest:.1e}, root mean square {rms:.1e} of the "
          "heatmaps' own")
    limit, value = (0.2, rms) if args.int8 else (TOLERANCE, largest)
    if not value <= limit:
        raise InputError(f"that is more than {limit:g}: no file is written")
    data.write_file(args.out, content)
    print(f"wrote {args.out}")


# ---------------------------------------------------------------------------- timing

NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8,
               "tensor(double)": np.float64, "tensor(int64)": np.int64, "tensor(int32)": np.int32}


def random_inputs(session, path, size=None):
    """Values for the inputs of any graph: open batches are 1, open heights and widths are size."""
    feed, rng = {}, np.random.default_rng(0)
    for item in session.get_inputs():
        shape = [dimension if isinstance(dimension, int) and dimension > 0 else
                 1 if place == 0 else size[place - len(item.shape)] if size and place >= 2 else None
                 for place, dimension in enumerate(item.shape)]
        if None in shape or item.type not in NUMPY_TYPES:
            raise InputError(f"{path}: the input {item.name} {item.shape} {item.type} can't be made up; "
                             "open heights and widths are given with --input HxW")
        feed[item.name] = (255 * rng.random(shape)).astype(NUMPY_TYPES[item.type]) if (
            item.type.startswith("tensor(u")) else rng.standard_normal(shape).astype(
                NUMPY_TYPES[item.type])
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

    parameters = sum(math.prod(tensor.dims) for tensor in onnx.load(path).graph.initializer
                     if tensor.data_type not in (onnx.TensorProto.INT64, onnx.TensorProto.BOOL))
    multiply_adds = 0
    for node in profile_nodes(path, feed, optimised=False):
        inputs, outputs = ([next(iter(item.values())) for item in node[f"{side}_type_shape"]]
                           for side in ("input", "output"))
        name = node["op_name"]
        if name in ("Conv", "FusedConv", "ConvInteger", "QLinearConv"):
            multiply_adds += math.prod(outputs[0]) * math.prod(inputs[3 * (name[0] == "Q") or 1][1:])
        elif name == "ConvTranspose":
            multiply_adds += math.prod(inputs[0]) * math.prod(inputs[1][1:])
        elif name in ("MatMul", "MatMulInteger", "QLinearMatMul", "FusedMatMul"):
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
    try:
        match = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        return match[1] if match else platform.processor() or platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def time_files(args):
    """--time: times files side by side, run by run in turn, so that noise hurts all alike."""
    import onnxruntime

    print(f"{cpu_name()}, ONNX Runtime {onnxruntime.__version__}, {args.runs} runs in turn after 5 to "
          "warm up\n" + f"{'file':28} {'threads':>7} {'ms':>8} {'10..90 %':>15} {'FPS':>7} "
          f"{'ratio':>6} {'RAM MB':>7} {'params M':>9} {'GMAC':>6}")
    rows = []
    for threads in args.threads:
        sessions = [evaluate.open_session(path, threads) for path in args.time]
        feeds = [random_inputs(session, path, args.input) for session, path in zip(sessions, args.time)]
        seconds = np.zeros((args.runs + 5, len(sessions)))
        for run in range(args.runs + 5):
            for number, (session, feed) in enumerate(zip(sessions, feeds)):
                start = time.perf_counter()
                session.run(None, feed)
                seconds[run, number] = time.perf_counter() - start
        low, median, high = 1e3 * np.quantile(seconds[5:], (0.1, 0.5, 0.9), axis=0)
        for number, (path, feed) in enumerate(zip(args.time, feeds)):
            parameters, macs = count_onnx(path, feed)
            row = {"file": str(path), "threads": threads, "ms": median[number], "ms_10": low[number],
                   "ms_90": high[number], "fps": 1e3 / median[number],
                   "ratio": median[0] / median[number], "ram_mb": measure_memory(path, feed, threads),
                   "parameters": parameters, "multiply_adds": macs}
            rows.append(row)
            ram = "-" if row["ram_mb"] is None else f"{row['ram_mb']:.1f}"
            print(f"{Path(path).name:28} {threads:7} {row['ms']:8.2f} "
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
    largest = max(row["parameters"] for row in rows)
    colours = (data.RIGHT, data.LEFT, data.MIDDLE, (220, 80, 160), (150, 110, 230))
    lowest = 0  # the label's before; labels are kept apart
    for number, row in enumerate(rows):
        x, y = axes(row["multiply_adds"] / 1e9, row["fps"])
        radius = 24 * math.sqrt(row["parameters"] / largest)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), colours[number % 5], (0, 0, 0))
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
    print(f"{args.profile}, {cpu_name()}, {args.threads[0]} thread(s), mean of {args.runs} runs, the "
          f"measuring included\n{'operator':24} {'ms':>8} {'share':>7} {'nodes':>6}")
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
    group.add_argument("--input", type=data.image_size, metavar="HxW",
                       help="default: what the checkpoint says")
    group.add_argument("--skeleton", choices=SKELETONS, help="the joints, if the file does not say")
    group.add_argument("--batch", type=int, metavar="N", help="fixes the batch (default: open)")
    group.add_argument("--all-stages", action="store_true", help="heatmaps of all stages as outputs")
    group.add_argument("--keypoints", action="store_true",
                       help="decoded keypoints (B,K,3), in pixels of the input, as an output")
    group.add_argument("--plain", action="store_true", help="the network as it was trained, its "
                       "BatchNorms folded")
    group.add_argument("--int8", action="store_true", help="computes in 8 bits; ranges from 64 crops "
                       "of the data set's training people, or from --image")
    group.add_argument("--data", type=Path, metavar="DIR", help="for --int8: the data set's folder "
                       "(default: data/DATASET)")
    group.add_argument("--image", type=Path, nargs="+", metavar="PATH",
                       help="for --int8: pictures or folders instead, each with one person")
    group = parser.add_argument_group("time")
    group.add_argument("--time", type=Path, nargs="+", metavar="ONNX", help="time files side by side")
    group.add_argument("--profile", type=Path, metavar="ONNX", help="time per operator")
    group.add_argument("--threads", type=int, nargs="+", default=[1], help="default: %(default)s")
    group.add_argument("--runs", type=int, default=50, help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="PATH", help="the file to write (default: "
                        "lapx.onnx); with --time the folder for JSON, CSV and the figure")
    args = parser.parse_args()
    if sum(map(bool, (args.weights, args.time, args.profile))) != 1:
        parser.error("give one of --weights FILE, --time ONNX..., --profile ONNX")
    if args.plain and args.int8:
        parser.error("--plain is the float32 network as it was trained, --int8 another one")
    if args.runs < 1 or min(args.threads) < 1 or (args.batch is not None and args.batch < 1):
        parser.error("--runs, --threads and --batch are numbers from 1 on")
    if args.weights:
        args.out = args.out or Path("lapx.onnx")
    (export if args.weights else time_files if args.time else profile)(args)


if __name__ == "__main__":
    data.run(main)
