"""Exports a network to ONNX, in 32 or 8 bits, and times ONNX files.

    python export.py --weights runs/mpii/best.pt --out lapx.onnx
    python export.py --weights runs/mpii/best.pt --out lapx-int8.onnx --int8
    python export.py --time lapx.onnx lapx-int8.onnx peer.onnx --out runs/timing
    python export.py --profile lapx.onnx

The first file is the same function, written so that ONNX Runtime is quick with
it; --plain writes the layers one by one. A float32 file is only written if ONNX
Runtime computes with it what PyTorch does. All that its user needs (joints,
flip pairs, limbs, input size, mean, std, order of colours) is in the file, as
JSON under the key "lapx" of its metadata; evaluate.py reads it from there.

Measured: 1.5 times as fast as --plain, and 3.1 times with --int8 (one run by
turns, one thread, 1x3x256x192, AMD EPYC Zen 4, ONNX Runtime 1.32, torch 2.13).
"""

import argparse
import copy
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
from lapx import (ECA, SKELETONS, STRIDE, Block, InputError, NonLocal, SpatialAttention, Stage,
                  Stem, decode, reading, variant_name)

OPSET = 18
TOLERANCE = 1e-5  # of a float32 file: largest difference to PyTorch, relative to the largest value
INT8_TOLERANCE = 0.2  # root mean square; finds a broken file, not a lost point of accuracy


# ---------------------------------------------------------------------------- fast float32 form

def replaced(model, kind, form):
    """The same model, in which every module m of class `kind` is now form(m)."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kind):
                setattr(parent, name, form(child))
    return model


def channelwise(scale, bias=None):
    """A 1x1 convolution (B,C,h,w) -> same that scales each channel, by scale (C,), and adds bias.

    As a convolution it stays in the blocked memory layout of ONNX Runtime's other convolutions.
    """
    C = len(scale)
    conv = nn.Conv2d(C, C, 1, groups=C, bias=bias is not None)
    conv.weight = nn.Parameter(scale.detach().reshape(C, 1, 1, 1))
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach())
    return conv


def fold(module, conv, norm):
    """Moves a module's BatchNorm into the convolution before it; both are named attributes."""
    fused = torch.nn.utils.fusion.fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm))
    setattr(module, conv, fused)
    setattr(module, norm, nn.Identity())


@torch.no_grad()
def folded(model):
    """A trained LAPX -> a copy for inference without BatchNorms.

    Each goes into the convolution before it. The first one of a block has none before it, and
    becomes a channelwise convolution.
    """
    model = copy.deepcopy(model).eval()
    for module in list(model.modules()):
        if isinstance(module, Block):
            norm = module.bn1
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            module.bn1 = channelwise(scale, norm.bias - norm.running_mean * scale)
            fold(module, "pointwise1", "bn2")
            fold(module, "depthwise", "bn3")
        elif isinstance(module, (Stem, Stage)):
            fold(module, "conv", "bn")
    return model


class OneWayStage(nn.Module):
    """A folded Stage with one convolution to the next stage in place of two.

    The next stage gets features_to_next(y) + heatmaps_to_next(head(y)), and head, too, is a 1x1
    convolution: the product of its matrix and the one behind it is added to that of the features.
    Inputs and outputs as in Stage.
    """

    def __init__(self, stage):
        super().__init__()
        for name, part in stage.named_children():
            setattr(self, name, part)
        self.last = stage.last
        if not self.last:
            back = self.heatmaps_to_next.weight[..., 0, 0]  # (C,K)
            through = back @ self.head.weight[..., 0, 0]  # (C,K) (K,C) -> (C,C)
            self.features_to_next.weight += through[..., None, None]
            self.features_to_next.bias += back @ self.head.bias + self.heatmaps_to_next.bias
            del self.heatmaps_to_next

    def forward(self, x):
        y = self.block(self.hourglass(x))
        y = self.attention(self.elu(self.conv(y)))  # (B,C,h,w)
        heatmaps = self.head(y)  # (B,K,h,w)
        if self.last:
            return heatmaps, x
        return heatmaps, x + self.features_to_next(y)


class FastSpatialAttention(nn.Module):
    """SpatialAttention, (B,C,h,w) -> same, whose maximum and mean ONNX Runtime computes quickly.

    Over all channels at once it takes 1 ms and more for each, at 208x64x48. The maximum is taken in
    two steps, within groups of channels and over the groups; the mean is a matrix product.
    """

    def __init__(self, attention):
        super().__init__()
        self.conv = attention.conv

    def forward(self, x):
        C, h, w = x.shape[1:]
        group = math.gcd(C, 16)
        maximum = x.unflatten(1, (C // group, group)).amax(2).amax(1, keepdim=True)  # (B,1,h,w)
        share = torch.full((1, C), 1 / C, dtype=x.dtype)
        mean = (share @ x.flatten(2)).unflatten(2, (h, w))  # (1,C) (B,C,h*w) -> (B,1,h,w)
        return x * self.conv(torch.cat([maximum, mean], dim=1)).sigmoid()


class FastELU(nn.Module):
    """ELU as max(x, exp(min(x, 0)) - 1). Any shape -> same.

    Four passes over memory, but each is vectorised; ONNX Runtime's own Elu goes number by number.
    """

    def __init__(self, elu=None):
        super().__init__()

    def forward(self, x):
        return torch.maximum(x, x.clamp(max=0).exp() - 1)


@torch.no_grad()
def fast(model):
    """A trained LAPX -> a copy that is the same function in a form that ONNX Runtime is quick with.
    """
    model = replaced(folded(model), Stage, OneWayStage)
    model = replaced(model, SpatialAttention, FastSpatialAttention)
    return replaced(model, nn.ELU, FastELU)


# ---------------------------------------------------------------------------- to ONNX

class Heatmaps(nn.Module):
    """images (B,3,H,W) -> a tuple of heatmaps (B,K,h,w): the last stage's, or those of all."""

    def __init__(self, model, all_stages=False):
        super().__init__()
        self.stem = model.stem
        self.stages = model.stages
        self.all_stages = all_stages

    def forward(self, images):
        x = self.stem(images)
        outputs = []
        for stage in self.stages:
            heatmaps, x = stage(x)
            outputs.append(heatmaps)
        return tuple(outputs) if self.all_stages else (heatmaps,)


def decoded(heatmaps):
    """Heatmaps (B,K,h,w) -> keypoints (B,K,3): x, y in pixels of the input, score."""
    points, scores = decode(heatmaps)
    return torch.cat([STRIDE * points, scores[..., None]], dim=2)


class WithKeypoints(nn.Module):
    """What a Heatmaps gives, and behind it the keypoints that the last heatmaps decode to."""

    def __init__(self, heatmaps):
        super().__init__()
        self.heatmaps = heatmaps

    def forward(self, images):
        outputs = self.heatmaps(images)
        return (*outputs, decoded(outputs[-1]))


def to_onnx(module, info, size, outputs, batch=None, operators={}):
    """A module of images (B,3,H,W) -> an ONNX file's content, bytes.

    info: goes into the metadata. outputs: the names of what the module gives. batch: None leaves it
    open. operators: {torch operator: function that writes it in ONNX}, where torch's own way is not
    wanted.
    """
    import onnx

    shapes = None if batch else ({0: torch.export.Dim("batch", max=2**20)},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            module, (torch.zeros(batch or 2, 3, *size),), dynamo=True, opset_version=OPSET,
            input_names=["images"], output_names=outputs, dynamic_shapes=shapes, verbose=False,
            external_data=False, custom_translation_table=operators)
    proto = program.model_proto
    for node in proto.graph.node:  # the exporter notes where in whose files a node comes from
        del node.metadata_props[:]
        node.doc_string = ""
    del proto.graph.value_info[:]
    if batch is None:  # torch 2.6 gets some of these wrong
        for item in [*proto.graph.input, *proto.graph.output]:
            item.type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.helper.set_model_props(proto, {"lapx": json.dumps(info)})
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString()


def compare(session, model, images):
    """How far an ONNX Runtime session is from PyTorch on images (B,3,H,W), over all its heatmaps.

    -> the largest difference, relative to the largest value, and the root mean square difference,
    relative to that of the values. InputError if its keypoints are not its heatmaps decoded.
    """
    names = [output.name for output in session.get_outputs()]
    found = session.run(None, {"images": images.numpy()})
    outputs = {name: torch.from_numpy(values) for name, values in zip(names, found)}
    keypoints = outputs.pop("keypoints", None)
    if keypoints is not None and not torch.allclose(keypoints, decoded(outputs["heatmaps"])):
        raise InputError("the keypoints in the file differ from those decoded by PyTorch")
    with torch.no_grad():
        expected = torch.stack(model(images)[-len(outputs):])
    difference = torch.stack(list(outputs.values())) - expected
    largest = difference.abs().max() / expected.abs().max()
    rms = (difference.pow(2).mean() / expected.pow(2).mean()).sqrt()
    return largest.item(), rms.item()


def export(args):
    """--weights: writes the ONNX file, if ONNX Runtime computes with it what PyTorch does."""
    import onnxruntime

    network = evaluate.open_network(args.weights, "cpu", args.input,
                                    evaluate.chosen_skeleton(args), args.bgr)
    if network.model is None:
        raise InputError(f"{args.weights} is an ONNX file already; export needs a checkpoint")
    model = network.model.to(memory_format=torch.contiguous_format)
    if args.int8:
        crops = calibration_crops(network, args)
        module = quantise(model, crops, args.all_stages)
        operators = byte_operators()
        B = args.batch or 2
        tests = [crops[torch.arange(start, start + B) % len(crops)] for start in range(0, 16, B)]
    else:
        module = Heatmaps(folded(model) if args.plain else fast(model), args.all_stages).eval()
        operators = {}
        generator = torch.Generator().manual_seed(0)
        tests = [torch.randn(args.batch or B, 3, *network.size, generator=generator)
                 for B in (1, 2, 3)]
    outputs = ["heatmaps"]
    if args.all_stages:
        outputs = [f"heatmaps{number}" for number in range(1, model.config.stages)] + outputs
    if args.keypoints:
        module = WithKeypoints(module)
        outputs.append("keypoints")
    content = to_onnx(module, network.info | {"bits": 8 if args.int8 else 32}, network.size,
                      outputs, args.batch, operators)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lapx.onnx"
        path.write_bytes(content)
        session = evaluate.open_session(path)
    largest, rms = np.max([compare(session, model, images) for images in tests], axis=0)
    print(f"{variant_name(model.config)}, opset {OPSET}, {len(content) / 1e6:.1f} MB")
    for item in [*session.get_inputs(), *session.get_outputs()]:
        print(f"  {item.name} {item.shape}")
    print(f"ONNX Runtime {onnxruntime.__version__} against PyTorch {torch.__version__} on "
          f"{data.plural(len(tests), 'input')}:\nlargest difference {largest:.1e} of the largest "
          f"value, root mean square {rms:.1e} of the values'")
    value = rms if args.int8 else largest
    limit = INT8_TOLERANCE if args.int8 else TOLERANCE
    if not value <= limit:
        raise InputError(f"that is more than {limit:g}: no file is written")
    data.write_file(args.out, content)
    print(f"wrote {args.out}"
          + (": score it with evaluate.py before you use it" if args.int8 else ""))


# ---------------------------------------------------------------------------- timing

NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16,
               "tensor(double)": np.float64, "tensor(uint8)": np.uint8,
               "tensor(int32)": np.int32, "tensor(int64)": np.int64}
WARM_UP = 5  # runs


def random_inputs(session, path, size=None):
    """Values for the inputs of any graph, {name: array}; open batches are 1.

    size: (height, width) where these are open. InputError if the file can't be run on that.
    """
    def is_number(side):  # an open side is a name, None or 0
        return isinstance(side, int) and side > 0

    feed = {}
    rng = np.random.default_rng(0)
    for item in session.get_inputs():
        shape = list(item.shape)
        if shape and not is_number(shape[0]):
            shape[0] = 1
        if len(shape) == 4 and size:  # B,3,H,W or B,H,W,3
            sides = slice(1, 3) if shape[3] == 3 else slice(2, 4)
            if any(is_number(side) and side != wanted for side, wanted in zip(shape[sides], size)):
                raise InputError(f"{path}: the size of {item.name} {item.shape} is not "
                                 f"{size[0]}x{size[1]}; leave out --input, or this file")
            shape[sides] = size
        if not all(map(is_number, shape)) or item.type not in NUMPY_TYPES:
            raise InputError(f"{path}: the input {item.name} {item.shape} {item.type} can't be "
                             "made up; open heights and widths are given with --input HxW")
        values = rng.integers(0, 255, shape) if "int" in item.type else rng.standard_normal(shape)
        feed[item.name] = values.astype(NUMPY_TYPES[item.type])
    with reading(path, f"a graph that runs on {[values.shape for values in feed.values()]}"):
        session.run(None, feed)
    return feed


def node_calls(path, feed, threads=1, runs=1, optimised=True):
    """The calls of a file's nodes, in order, from ONNX Runtime's profile.

    -> a list of {"op_name", "dur" (microseconds), "input_type_shape", "output_type_shape", ..}.
    """
    with tempfile.TemporaryDirectory() as folder:
        session = evaluate.open_session(path, threads, str(Path(folder) / "profile"), optimised)
        for _ in range(runs):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
    return [event["args"] | {"dur": event["dur"]} for event in events
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]


def count_onnx(path, feed):
    """-> an ONNX file's parameters, and the multiply-adds of its convolutions and matrix products
    for these inputs; from the shapes that they have when the graph runs as it is written."""
    import onnx

    graph = onnx.load(path).graph
    constants = [attribute.t for node in graph.node if node.op_type == "Constant"
                 for attribute in node.attribute if attribute.name == "value"]
    parameters = sum(math.prod(tensor.dims) for tensor in [*graph.initializer, *constants]
                     if tensor.data_type not in (onnx.TensorProto.INT64, onnx.TensorProto.BOOL))
    multiply_adds = 0
    for call in node_calls(path, feed, optimised=False):
        inputs = [next(iter(item.values())) for item in call["input_type_shape"]]
        output = next(iter(call["output_type_shape"][0].values()))
        name = call["op_name"]
        if name in ("Conv", "ConvInteger", "QLinearConv"):
            weight = inputs[3 if name == "QLinearConv" else 1]
            multiply_adds += math.prod(output) * math.prod(weight[1:])
        elif name == "ConvTranspose":
            multiply_adds += math.prod(inputs[0]) * math.prod(inputs[1][1:])
        elif name in ("MatMul", "MatMulInteger", "QLinearMatMul"):
            multiply_adds += math.prod(output) * inputs[0][-1]
        elif name == "Gemm":  # (a,b) (b,c) -> (a,c), and either matrix may be transposed
            multiply_adds += math.isqrt(math.prod(inputs[0]) * math.prod(inputs[1])
                                        * math.prod(output))
    return parameters, multiply_adds


MEMORY_PROBE = """
import re, sys
import numpy, onnxruntime

def peak():  # megabytes
    try:
        return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) / 2**10
    except OSError:  # not Linux
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

before = peak()
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(sys.argv[3])
options.log_severity_level = 3
session = onnxruntime.InferenceSession(sys.argv[1], options, ["CPUExecutionProvider"])
feed = dict(numpy.load(sys.argv[2]))
for _ in range(3):
    session.run(None, feed)
print(peak() - before)
"""


def measure_memory(path, feed, threads):
    """Megabytes that making a session and running it add to a fresh process at its peak, without
    the interpreter and the libraries; None where the system does not tell (Windows)."""
    with tempfile.TemporaryDirectory() as folder:
        values = Path(folder) / "feed.npz"
        np.savez(values, **feed)
        done = subprocess.run([sys.executable, "-c", MEMORY_PROBE, path, values, str(threads)],
                              capture_output=True, text=True)
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


def run_times(paths, feeds, threads, runs):
    """Milliseconds (runs, files): the files take turns, so that noise hurts all alike."""
    sessions = [evaluate.open_session(path, threads) for path in paths]
    seconds = np.zeros((WARM_UP + runs, len(sessions)))
    for run in range(len(seconds)):
        for number, (session, feed) in enumerate(zip(sessions, feeds)):
            start = time.perf_counter()
            session.run(None, feed)
            seconds[run, number] = time.perf_counter() - start
    return 1e3 * seconds[WARM_UP:]


def time_files(args):
    """--time: times files side by side, and writes what was found to the folder --out."""
    import onnxruntime

    feeds = [random_inputs(evaluate.open_session(path), path, args.input) for path in args.time]
    counts = [count_onnx(path, feed) for path, feed in zip(args.time, feeds)]
    shapes = ["x".join(map(str, next(iter(feed.values())).shape)) for feed in feeds]
    print(f"{cpu_name()}, ONNX Runtime {onnxruntime.__version__}\n"
          f"{args.runs} runs in turn after {WARM_UP} to warm up; inputs {', '.join(set(shapes))}\n"
          f"{'file':17} thr {'ms':>7} {'10..90 %':>15} {'FPS':>7} ratio {'MB':>5} {'params':>7} "
          f"{'GMAC':>6}")
    rows = []
    for threads in args.threads:
        milliseconds = run_times(args.time, feeds, threads, args.runs)
        low, median, high = np.quantile(milliseconds, (0.1, 0.5, 0.9), axis=0)
        for number, (path, feed) in enumerate(zip(args.time, feeds)):
            parameters, multiply_adds = counts[number]
            batch = next(iter(feed.values())).shape[0]
            row = {"file": str(path), "input": shapes[number], "threads": threads,
                   "ms": median[number], "ms_10": low[number], "ms_90": high[number],
                   "fps": batch * 1e3 / median[number], "ratio": median[0] / median[number],
                   "ram_mb": measure_memory(path, feed, threads), "parameters": parameters,
                   "multiply_adds": multiply_adds}
            rows.append(row)
            ram = "-" if row["ram_mb"] is None else f"{row['ram_mb']:.0f}"
            print(f"{path.name[-17:]:17} {threads:3} {row['ms']:7.2f} {row['ms_10']:7.2f}"
                  f"{row['ms_90']:8.2f} {row['fps']:7.1f} {row['ratio']:5.2f} {ram:>5} "
                  f"{parameters / 1e6:5.2f} M {multiply_adds / 1e9:6.2f}", flush=True)
    if args.out:
        facts = {"cpu": cpu_name(), "onnxruntime": onnxruntime.__version__, "runs": args.runs,
                 "results": rows}
        data.write_file(args.out / "timing.json", json.dumps(facts, indent=1) + "\n")
        data.write_csv(args.out / "timing.csv", rows)
        data.write_png(args.out / "timing.png", draw_timing(rows, facts))
        print(f"wrote {args.out}/: timing.json, timing.csv, timing.png")


def draw_timing(rows, facts):
    """A figure like PAPER Figure 3: multiply-adds against frames per second, a Pillow picture.

    A bubble's area is the file's parameters; a colour is a file, at every number of threads.
    """
    step = 34  # pixels between labels
    height = max(480, step * (len(rows) + 1))
    picture = Image.new("RGB", (840, height + 80), "white")
    draw = ImageDraw.Draw(picture)
    rows = sorted(rows, key=lambda row: -row["fps"])
    axes = data.Axes(draw, (60, 30, 580, height + 30),
                     [0, 1.2 * max(row["multiply_adds"] / 1e9 for row in rows)],
                     [0, 1.15 * rows[0]["fps"]], "multiply-adds (10^9)",
                     f"frames per second, {facts['cpu']}; area: parameters")
    largest = max(row["parameters"] for row in rows) or 1
    colours = (data.RIGHT, data.LEFT, data.MIDDLE, (220, 80, 160), (150, 110, 230))
    files = sorted({row["file"] for row in rows})
    bottom = height + 30 - step / 2
    lines = [axes(0, row["fps"])[1] for row in rows]  # the heights of the labels
    for number in range(1, len(rows)):
        lines[number] = max(lines[number], lines[number - 1] + step)
    for number in reversed(range(len(rows))):
        lines[number] = min(lines[number], bottom - step * (len(rows) - 1 - number))
    for row, line in zip(rows, lines):
        x, y = axes(row["multiply_adds"] / 1e9, row["fps"])
        radius = 18 * math.sqrt(row["parameters"] / largest)
        colour = colours[files.index(row["file"]) % len(colours)]
        draw.line([(x, y), (560, line), (590, line)], (170, 170, 170))
        draw.circle((x, y), radius, colour, "black")
        draw.circle((600, line), 5, colour)
        draw.text((610, line), f"{Path(row['file']).stem[:28]}, "
                  f"{data.plural(row['threads'], 'thread')}\n{row['fps']:.1f} FPS, "
                  f"{row['parameters'] / 1e6:.2f} M", (0, 0, 0), data.font(size=13), "lm")
    return picture


def profile(args):
    """--profile: where the time goes in one file, operator by operator."""
    threads = args.threads[0]
    feed = random_inputs(evaluate.open_session(args.profile), args.profile, args.input)
    spent = defaultdict(float)
    calls = defaultdict(int)
    for call in node_calls(args.profile, feed, threads, args.runs):
        spent[call["op_name"]] += call["dur"] / 1e3 / args.runs
        calls[call["op_name"]] += 1
    total = sum(spent.values())
    print(f"{args.profile}, {cpu_name()}, {data.plural(threads, 'thread')},\n"
          f"mean of {data.plural(args.runs, 'run')}, the measuring included\n"
          f"{'operator':24} {'ms':>8} {'share':>7} {'nodes':>6}")
    for name, milliseconds in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"{name:24} {milliseconds:8.2f} {milliseconds / total:7.1%} "
              f"{calls[name] // args.runs:6}")
    print(f"{'total':24} {total:8.2f}")


# ---------------------------------------------------------------------------- 8 bits (optional)

# Float32 files need nothing of what follows. ONNX Runtime has a quantiser of its own,
# quantize_static, but its file was 1.5 times as fast as --plain where ours was 2.9 times, in one
# run on an AMD EPYC Zen 5. Here nearly all values between convolutions are bytes, behind ELUs, too:
# each is round(value / scale) + zero, within 0..255, with a scale and a zero for each place in the
# network, from the range of the values seen there.
#
# x86 CPUs without VNNI add two products of bytes in 16 bits, which can saturate; so score a file on
# the kind of CPU that it is for. ONNX Runtime's remedy, session.x64quantprecision = 1, is not used:
# version 1.32 can't load our files with it, and on a CPU with VNNI it, too, made convolutions of
# bytes half as fast.

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
    """Integer weights or biases (C,...) times a scale for each output channel (C,)."""
    return x.float() * scale.reshape(-1, *[1] * (x.ndim - 1))


to_bytes.register_fake(lambda x, scale, zero: torch.empty_like(x, dtype=torch.uint8))
from_bytes.register_fake(lambda x, scale, zero: torch.empty_like(x, dtype=torch.float32))
channels_from_bytes.register_fake(lambda x, scale: torch.empty_like(x, dtype=torch.float32))


def byte_operators():
    """How the three operators above are written in ONNX."""
    import onnx
    from onnxscript import opset18 as op

    def constants(scale, zero):
        arrays = (np.array(scale, np.float32), np.array(zero, np.uint8))
        return [op.Constant(value=onnx.numpy_helper.from_array(array)) for array in arrays]

    lapx = torch.ops.lapx
    return {lapx.to_bytes.default:
            lambda x, scale, zero: op.QuantizeLinear(x, *constants(scale, zero)),
            lapx.from_bytes.default:
            lambda x, scale, zero: op.DequantizeLinear(x, *constants(scale, zero)),
            lapx.channels_from_bytes.default:
            lambda x, scale: op.DequantizeLinear(x, scale, axis=0)}


class Quant(nn.Module):
    """A place where values are rounded to 8 bits. Any shape -> same, float32.

    First it observes: its range is that of all values seen, zero and reach included. Then it
    quantises.
    """

    def __init__(self, reach=0.0):
        super().__init__()
        self.observing = True
        self.low = 0.0
        self.high = reach

    def scale_and_zero(self):
        scale = max(self.high - self.low, 1e-6) / 255
        return scale, round(-self.low / scale)

    def forward(self, x):
        if self.observing:
            self.low = min(self.low, x.min().item())
            self.high = max(self.high, x.max().item())
            return x
        scale, zero = self.scale_and_zero()
        return from_bytes(to_bytes(x, scale, zero), scale, zero)

    def freeze(self):
        self.observing = False


class QuantELU(nn.Module):
    """ELU by operators that ONNX Runtime computes in 8 bits. Any shape -> same, float32.

    ELU(z) = max(z, 0) + (e^min(z,0) - 1). The maximum is one of bytes. For the other term,
    sigmoid(z - b) / sigmoid(-b) is e^z to within e^-b / 4 where z < 0; where z > 0 it saturates,
    as 255 stands for 1. So one sigmoid, which is a table of 256 bytes, gives it whole. Its input is
    z with another zero point, and z's range must reach from below 0 to above b.
    """

    REACH = 4.5  # b

    def __init__(self):
        super().__init__()
        self.before = Quant(self.REACH)
        self.behind = Quant()

    def forward(self, z):
        if self.before.observing:
            return self.behind(F.elu(self.before(z)))
        scale, zero = self.before.scale_and_zero()
        b = min(round(self.REACH / scale), 255 - zero)  # in steps of z
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
        self.conv = conv
        self.before = before

    def forward(self, x):
        conv = self.conv
        if self.before.observing:
            return conv(x)
        return F.conv2d(x, channels_from_bytes(self.weight, self.scale),
                        channels_from_bytes(self.bias, self.bias_scale), conv.stride, conv.padding,
                        conv.dilation, conv.groups)

    def freeze(self):
        conv = self.conv
        scale_before, _ = self.before.scale_and_zero()
        bias = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias
        scale = torch.maximum(conv.weight.flatten(1).abs().amax(1) / 127,  # (C,)
                              bias.abs() / scale_before / 2**30).clamp(min=1e-12)  # fits 32 bits
        self.scale = nn.Buffer(scale)
        self.bias_scale = nn.Buffer(scale * scale_before)
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


class PooledECA(nn.Module):
    """ECA, (B,C,h,w) -> same, whose average and maximum come from poolings."""

    def __init__(self, eca):
        super().__init__()
        self.conv = eca.conv

    def forward(self, x):
        descriptor = (mean_of_pixels(x) + maximum_of_pixels(x)).flatten(1)  # (B,C)
        gate = self.conv(descriptor[:, None]).sigmoid()  # (B,1,C)
        return x * gate.transpose(1, 2)[..., None]


class LastAxisSpatialAttention(nn.Module):
    """SpatialAttention, (B,C,h,w) -> same, that pools over the last axis.

    There the channels lie in memory behind 8-bit convolutions anyway.
    """

    def __init__(self, attention):
        super().__init__()
        self.conv = attention.conv

    def forward(self, x):
        last = x.permute(0, 2, 3, 1)  # (B,h,w,C)
        pooled = torch.stack([last.amax(3), last.mean(3)], dim=1)  # (B,2,h,w)
        return x * self.conv(pooled).sigmoid()


@torch.no_grad()
def merged(model):
    """A trained LAPX -> a copy that is the same function, of modules that can be quantised.

    BatchNorms are folded, soft gates are channelwise convolutions, stages have one way to the next.
    """
    model = replaced(folded(model), Stage, OneWayStage)
    model = replaced(model, SpatialAttention, LastAxisSpatialAttention)
    model = replaced(model, ECA, PooledECA)
    for module in model.modules():
        if isinstance(module, Block) and module.alpha is not None:
            module.shortcut = channelwise(module.alpha.flatten())
            module.alpha = None
    return model


class Tracer(torch.fx.Tracer):
    """Makes a graph of all modules but the Non-Local ones, which stay whole."""

    def is_leaf_module(self, module, name):
        return isinstance(module, NonLocal) or super().is_leaf_module(module, name)


def with_quants(root):
    """A Heatmaps of merged(model) -> a GraphModule of it with a Quant wherever values become bytes,
    QuantELU for ELU, and QuantConv for the convolutions of bytes.

    Gates, Non-Local modules and heads compute in float32, from 8-bit values.
    """
    graph = Tracer().trace(root)
    source = {}  # a node of the graph whose values are of 8 bits -> the Quant that they come from

    def module_of(node):
        return root.get_submodule(node.target) if node.op == "call_module" else None

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
        if isinstance(module_of(node), nn.Identity):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    for node in list(graph.nodes):
        module = module_of(node)
        of_bytes = all(argument in source for argument in node.args)
        if isinstance(module, nn.ELU):
            elu = QuantELU()
            replace(node, elu)
            source[node] = elu.behind
        elif isinstance(module, nn.Conv2d) and of_bytes and not node.target.endswith("head"):
            replace(node, QuantConv(module, source[node.args[0]]))
            if not all(isinstance(module_of(user), nn.ELU) for user in node.users):
                quantise_output(node, Quant())  # a QuantELU does so itself
        elif (node.op == "placeholder" or isinstance(module, NonLocal)
              or node.target is operator.add and of_bytes):
            quantise_output(node, Quant())
        elif node.target is operator.mul and node.args[0] in source:  # features times a gate
            quantise_output(node.args[1], Quant())
            quantise_output(node, Quant())
        elif node.target in (F.max_pool2d, F.interpolate, mean_of_pixels, maximum_of_pixels):
            quantise_output(node, source[node.args[0]])  # they stay in the range of their input
    return torch.fx.GraphModule(root, graph)


@torch.no_grad()
def quantise(model, crops, all_stages=False):
    """A trained LAPX -> what Heatmaps(model, all_stages) is, computed in 8 bits.

    crops: normalised images (B,3,H,W) like those it will see, for the ranges of all values.
    """
    quantised = with_quants(Heatmaps(merged(model), all_stages))
    progress = evaluate.show_progress(len(crops), "pictures looked at for the ranges")
    for start in range(0, len(crops), 8):
        batch = crops[start:start + 8]
        quantised(batch)
        if progress:
            progress(start + len(batch))
    for module in quantised.modules():
        if isinstance(module, (Quant, QuantConv)):
            module.freeze()
    return quantised


def calibration_crops(network, args, count=64):
    """Crops for the ranges of an 8-bit file, normalised (B,3,H,W): of one's own pictures, or of the
    training people of the network's data set."""
    dataset = network.dataset
    if args.image:
        crops = []
        for path in evaluate.pictures_in(args.image)[:count]:
            picture = data.open_picture(path, upright=True)
            crop, _ = evaluate.crop_of(network, picture, [0, 0, *picture.size])
            crops.append(crop[0])
    elif dataset:
        people = data.load_people(dataset, data.data_folder(args.data, dataset),
                                  DATASETS[dataset].train, network.size, network.skeleton)
        rows = np.linspace(0, len(people) - 1, min(count, len(people))).astype(int)
        samples = data.PoseDataset(people, network.size, network.skeleton)
        crops = [samples[row][1] for row in rows]
    else:
        raise InputError("--int8 needs pictures for its ranges; give --image with some")
    print(f"ranges from {data.plural(len(crops), 'picture')}")
    return network.prepare(torch.stack(crops)).contiguous()


# ---------------------------------------------------------------------------- flags

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("export")
    group.add_argument("--weights", metavar="FILE",
                       help="mpii, coco, coco-384x288, a checkpoint or .tar")
    group.add_argument("--skeleton", choices=SKELETONS, help="the joints, if the file does not say")
    group.add_argument("--bgr", action="store_true", help="the network was trained on BGR pictures")
    group.add_argument("--batch", type=data.number_from(1), metavar="B",
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
                       help="time files side by side; the ratio is to the first one")
    group.add_argument("--profile", type=Path, metavar="ONNX", help="time per operator")
    group.add_argument("--threads", type=data.number_from(1), nargs="+", default=[1], metavar="T",
                       help="one or, with --time, several numbers of threads (default: 1)")
    group.add_argument("--runs", type=data.number_from(1), default=50, help="default: %(default)s")
    group = parser.add_argument_group("both")
    group.add_argument("--input", type=data.image_size, metavar="HxW", help="default: what the "
                       "checkpoint says; with --time and --profile for open heights and widths")
    group.add_argument("--out", type=Path, metavar="PATH", help="the .onnx file to write "
                       "(default: lapx.onnx); with --time the folder for JSON, CSV and the figure")
    args = parser.parse_args()
    if sum(map(bool, (args.weights, args.time, args.profile))) != 1:
        parser.error("give one of --weights FILE, --time ONNX..., --profile ONNX")
    if args.time:
        data.refuse_unused(parser, args, "--time", ["time", "threads", "runs", "input", "out"])
        time_files(args)
        return
    if args.profile:
        data.refuse_unused(parser, args, "--profile", ["profile", "threads", "runs", "input"])
        if len(args.threads) > 1:
            parser.error("--profile takes one number of --threads")
        profile(args)
        return
    used = "weights skeleton bgr batch all_stages keypoints plain int8 input out".split()
    mode = "--weights"
    if args.int8:
        used += ["data", "image"]
        mode = "--int8"
    data.refuse_unused(parser, args, mode, used)
    if args.plain and args.int8:
        parser.error("--plain is the float32 network as it was trained, --int8 another one")
    if args.data and args.image:
        parser.error("--data and --image are two places for pictures; give one of them")
    args.out = args.out or Path("lapx.onnx")
    if args.out.suffix != ".onnx":
        parser.error(f"--out {args.out} must end in .onnx")
    export(args)


if __name__ == "__main__":
    data.run(main)
