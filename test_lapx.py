"""What this project promises, one fact a test, in the order of the files: lapx, data, evaluate,
train, export.

    python -m pytest -q        # CPU only, no data set, no network, three to four minutes
    LAPX_GPU=1 python -m pytest -q -k gpu    # what needs a GPU, a minute or two

Numbers that stand in a table here were computed by the reference implementations (the authors'
network, SimpleBaseline's and HRNet's protocol, pycocotools) on input that is made again below.
"""

import os

# for the tests and the processes that they start; torch reads the first when it is loaded
os.environ["OMP_NUM_THREADS"] = "1"  # many threads beside other programs wait for one another
os.environ["PYTHONUTF8"] = "1"
if "LAPX_GPU" not in os.environ:  # tests fork, which a process that trains can't if it sees a GPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import argparse
import ast
import contextlib
import copy
import csv
import hashlib
import io
import itertools
import json
import multiprocessing
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import unicodedata
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image, ImageDraw
from torch import nn

import data
import evaluate
import export
import lapx
import train
from data import DATASETS, PoseDataset, affine, transform
from lapx import LAPX, SKELETONS, VARIANTS, InputError, LAPXConfig, decode

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text(encoding="utf-8")
MPII = SKELETONS["mpii"]
COCO = SKELETONS["coco"]
TINY = LAPXConfig(16, 16, 2, neck_attention=("ECA-NonLocal", "ECA"))  # a network for fast tests
ONE_STAGE = replace(TINY, stages=1, neck_attention=("ECA-NonLocal",))
FILES = ("lapx.py", "data.py", "train.py", "evaluate.py", "export.py")
SCRIPTS = {"train.py": train, "evaluate.py": evaluate, "export.py": export}
VARIANTS |= {"tiny": TINY, "one stage": ONE_STAGE}  # known to create_model and to train.py
PAPERS = [name for name in VARIANTS if name not in ("tiny", "one stage")]


@pytest.fixture
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("LAPX_GPU=1 python -m pytest -k gpu runs this where there is a GPU")
    return torch.device("cuda")


def write_file(path, content):
    """Writes bytes, text, or plain types as JSON; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, (bytes, str)):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def call(script, arguments):
    """Calls a script as the command line does; of the variant tiny gamma aims at 0.1."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        patch.setitem(train.GAMMA_TARGETS, "tiny", 0.1)
        data.run(SCRIPTS[script].main)


def run(script, *arguments, check=True):
    """Calls a script in this process -> what it printed; or, unchecked, (status, that)."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    printed = io.StringIO()
    status = 0
    with (pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed),
          contextlib.redirect_stderr(printed)):
        patch.setattr(data, "keep_memory", lambda: None)  # it is for a process of its own
        try:
            call(script, arguments)
        except SystemExit as exit:
            status = exit.code if isinstance(exit.code, int) else 1
            print(exit.code)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert not check or status == 0, printed.getvalue()
    return printed.getvalue() if check else (status, printed.getvalue())


def in_child(log, commands, environment):
    sys.stdout = sys.stderr = open(log, "w", encoding="utf-8", buffering=1)
    os.environ.update(environment)
    for script, *arguments in commands:
        call(script, arguments)


class Started:
    """A process of its own in which `commands`, lists of a script and its arguments, run one after
    the other; it writes to the file `log` what they print."""

    def __init__(self, log, *commands, **environment):
        # a fork has torch loaded already; where there is none (Windows), a process loads it
        method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
        self.log = log
        self.process = multiprocessing.get_context(method).Process(
            target=in_child, args=(log, commands, environment))
        self.process.start()

    def printed(self):
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""

    def wait_for(self, text):
        while text not in self.printed():
            assert self.process.is_alive(), self.printed()
            time.sleep(0.01)

    def end(self, seconds=100):
        """-> the exit status, when the process has ended."""
        self.process.join(seconds)
        status = self.process.exitcode
        self.process.kill()
        return status


def box_of(center, scale):
    """A box as wide and high as SimpleBaseline's scale says."""
    return np.array([*center, 200 * scale, 0])


def other_side(name):
    """The name of a joint's mirror image."""
    swap = {"left": "right", "right": "left"}
    return " ".join(swap.get(word, word) for word in name.split())


def partners(skeleton):
    """The index of each joint's mirror image, by the names."""
    return [skeleton.joints.index(other_side(name)) for name in skeleton.joints]


def figure(seed, number):
    """A synthetic person: an entry as in MPII's JSON, the body's center in the picture's, with
    joints of -1 outside; the picture."""
    entry, picture = data.synthetic_person(seed, number)
    joints = np.array(entry["joints"])
    joints[np.array(entry["joints_vis"]) == 0] = -1
    center = np.array(picture.size) / 2 + 1 - (0, 15 * entry["scale"])
    return entry | {"image": f"{number}.jpg", "center": center.tolist(),
                    "joints": joints.tolist()}, picture


@pytest.fixture(scope="session")
def mpii(tmp_path_factory):
    """A folder in MPII's layout: six synthetic people to train on, four others to validate on."""
    root = tmp_path_factory.mktemp("mpii")
    (root / "images").mkdir()
    for split, numbers in (("train", range(6)), ("valid", range(6, 10))):
        entries = []
        for number in numbers:
            entry, picture = figure(5, number)
            picture.save(root / f"images/{number}.jpg", quality=95)
            entries.append(entry)
        write_file(root / f"annot/{split}.json", entries)
    return root


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory):
    """The folder of the synthetic people."""
    root = tmp_path_factory.mktemp("data") / "synthetic"
    data.load_people("synthetic", root, "valid", MPII)
    return root


@pytest.fixture(scope="session")
def coco(tmp_path_factory):
    """A folder in COCO's layout: six synthetic people on three pictures, and a crowd."""
    root = tmp_path_factory.mktemp("coco")
    (root / "images/val2017").mkdir(parents=True)
    images = []
    annotations = []
    detections = []
    for number in range(3):
        sheet = Image.new("RGB", (660, 330))
        for place in range(2):
            entry, picture = figure(6, 2 * number + place)
            sheet.paste(picture, (330 * place, 0))
            joints = np.array(entry["joints"])[[9, 13, 12, 15, 10, 14]]  # some joints, as COCO's
            visible = 2 * np.array(entry["joints_vis"])[[9, 13, 12, 15, 10, 14]]
            keypoints = np.zeros((17, 3))
            keypoints[[0, 5, 6, 9, 10, 7]] = np.column_stack(
                [joints - 1 + (330 * place, 0), visible])
            keypoints[keypoints[:, 2] == 0] = 0
            box = [330 * place + 10, 5, picture.width - 20, picture.height - 10]
            annotations.append({"id": 10 + len(annotations), "image_id": 7 + number,
                                "category_id": 1, "iscrowd": 0, "bbox": box,
                                "area": 0.6 * box[2] * box[3],
                                "keypoints": keypoints.ravel().tolist(),
                                "num_keypoints": int((keypoints[:, 2] > 0).sum())})
            detections.append({"image_id": 7 + number, "category_id": 1, "bbox": box, "score": 0.9})
        sheet.save(root / f"images/val2017/{number}.jpg", quality=95)
        images.append({"id": 7 + number, "file_name": f"{number}.jpg", "width": 660, "height": 330})
    annotations.append({**annotations[0], "id": 99, "iscrowd": 1})
    write_file(root / "annotations/person_keypoints_val2017.json", {
        "images": images, "annotations": annotations,
        "categories": [{"id": 1, "name": "person", "keypoints": list(COCO.joints)}]})
    write_file(root / "annotations/image_info_test2017.json", {"images": images})
    (root / "images/test2017").symlink_to(root / "images/val2017")
    write_file(root / "detections.json", detections)
    return root


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Checkpoints of untrained networks: (MPII's joints, COCO's joints)."""
    folder = tmp_path_factory.mktemp("weights")
    paths = []
    for name, size in (("mpii", (64, 64)), ("coco", (64, 64))):
        torch.manual_seed(0)
        model = LAPX(replace(ONE_STAGE, num_joints=len(SKELETONS[name].joints)))
        paths.append(folder / f"{name}.pt")
        torch.save({"config": asdict(model.config), "model": model.state_dict(),
                    "info": evaluate.model_info(name, SKELETONS[name], size)}, paths[-1])
    return paths


# ---------------------------------------------------------------------------- lapx.py: the network

def test_rows_11_to_14_differ_in_the_gamma_that_training_aims_at():
    rows = [f"row{number}" for number in (11, 12, 13, 14)]
    recipes = [train.new_recipe({"dataset": "mpii", "variant": row}) for row in rows]
    assert [recipe["gamma_target"] for recipe in recipes] == [0.1, 0.2, 0.3, 0.4]
    assert {VARIANTS[row] for row in rows} == {VARIANTS["lapx"]} == {LAPXConfig()}
    assert list(LAPX(VARIANTS["lapx"]).non_locals()) == [1, 3]


def test_fresh_weights_are_pytorchs_but_for_alpha_and_gamma_which_are_0():
    torch.manual_seed(0)
    model = lapx.create_model()
    for name, tensor in model.state_dict().items():
        if name.endswith(("alpha", "gamma")):
            assert not tensor.any(), name
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and not module.bias.any()
            assert (module.eps, module.momentum) == (1e-5, 0.1)
        if isinstance(module, (nn.Conv1d, nn.Conv2d)):  # uniform within 1 / sqrt(inputs)
            limit = module.weight[0].numel() ** -0.5
            assert 0.6 * limit < module.weight.abs().max() <= limit, name
            assert module.bias is None or 0 < module.bias.abs().max() <= limit, name


def test_joints_are_in_the_order_of_the_published_annotations():
    mpii = ("r ankle, r knee, r hip, l hip, l knee, l ankle, pelvis, thorax, upper neck, head top, "
            "r wrist, r elbow, r shoulder, l shoulder, l elbow, l wrist")
    names = re.sub(r"\br\b", "right", re.sub(r"\bl\b", "left", mpii))
    assert MPII.joints == tuple(names.split(", "))
    coco = ("nose left_eye right_eye left_ear right_ear left_shoulder right_shoulder left_elbow "
            "right_elbow left_wrist right_wrist left_hip right_hip left_knee right_knee left_ankle "
            "right_ankle")
    assert COCO.joints == tuple(name.replace("_", " ") for name in coco.split())


@pytest.mark.parametrize("skeleton", [MPII, COCO])
def test_left_and_right_joints_are_partners_by_name_and_limbs_have_mirror_images(skeleton):
    order = partners(skeleton)
    assert data.flip_order(skeleton).tolist() == order
    limbs = {frozenset(limb) for limb in skeleton.limbs}
    assert {frozenset(order[index] for index in limb) for limb in limbs} == limbs
    assert frozenset().union(*limbs) == set(range(len(skeleton.joints)))


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_help_page_fits_80_columns(script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, run(script, "--help").splitlines())) <= 80


def authors_tensors(config):
    """The authors' names of a configuration's tensors, written down from their checkpoints."""
    def block(prefix, gate, widened=False):
        parts = ["pw_conv1.weight", "dw_conv.weight", "pw_conv2.weight", "pw_conv2.bias"]
        parts += [f"bn{n}.{part}" for n in (1, 2, 3) for part in BN]
        parts += ["alpha"] * gate + ["downsample.0.weight", "downsample.0.bias"] * widened
        return [f"{prefix}.{part}" for part in parts]

    def attention(prefix, kind):
        eca = ["channel_attention.conv.weight"]
        parts = {None: [], "ECA": ["conv.weight"], "ECA-CBAM": eca + ["spatial_conv.weight"],
                 "CBAM": ["fc.0.weight", "fc.2.weight", "conv.weight"],
                 "ECA-NonLocal": eca + ["position_attention.gamma"] + [
                     f"position_attention.{part}.{kind}"
                     for part in ("theta", "phi", "g", "out_proj")
                     for kind in ("weight", "bias")]}[kind]
        return [f"{prefix}.{part}" for part in parts]

    BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = ["conv1.weight"] + [f"bn1.{part}" for part in BN]
    for number, widened in ((1, True), (2, True), (3, False)):
        names += block(f"layer{number}.0", False, widened)
    names += attention("stem_attention", config.stem_attention)
    for s in range(config.stages):
        for level in range(4):
            for part in range(4 if level == 0 else 3):
                names += block(f"hg.{s}.hg.{level}.{part}.0", config.soft_gate)
        names += attention(f"hg.{s}.attention", (config.neck_attention or {s: None})[s])
        names += block(f"res.{s}.0", False) + [f"fc.{s}.conv.weight"]
        names += [f"fc.{s}.bn.{part}" for part in BN]
        names += attention(f"backbone_attention.{s}", config.stage_attention)
        names += [f"score.{s}.weight", f"score.{s}.bias"]
        if s + 1 < config.stages:
            names += [f"{part}.{kind}" for part in (f"fc_.{s}.conv", f"score_.{s}")
                      for kind in ("weight", "bias")]
    return names


def translated(name, ours):
    """The authors' name -> ours; a 4-D conv of their CBAM is told from ECA's by what ours has."""
    return next(ours_name for ours_name in (lapx.our_name(name, 4), lapx.our_name(name, 3))
                if ours_name in ours)


def authors_weights(variant):
    """A state_dict under the authors' names whose values are a function of the names."""
    ours = LAPX(VARIANTS[variant]).state_dict()
    tensors = {}
    for name in authors_tensors(VARIANTS[variant]):
        shape = ours[translated(name, ours)].shape
        leaf = name.rsplit(".", 1)[1]
        z = np.random.default_rng(zlib.crc32(f"dev:{name}".encode())).standard_normal(shape)
        value = (np.array(1) if leaf == "num_batches_tracked" else
                 1 + 0.2 * np.abs(z) if leaf == "running_var" else
                 0.1 * z if leaf == "running_mean" else 0.6 + 0.1 * z if leaf == "alpha" else
                 0.2 + 0 * z if leaf == "gamma" else 0.05 * z if leaf == "bias" else
                 1 + 0.1 * z if len(shape) == 1 else z / np.sqrt(np.prod(shape[1:])))
        tensors[name] = torch.from_numpy(np.asarray(
            value, np.int64 if leaf == "num_batches_tracked" else np.float32))
    return tensors


# the largest absolute value of the stacked heatmaps (S,1,16,64,64); the standard deviation of each
# stage's; flat position -> value
AUTHORS_OUTPUTS = {
    "lapx": (0.85197973, (0.15799697, 0.08529199, 0.19203138),
             {64049: 0.384586, 62603: 0.372027, 63390: 0.348266, 29053: -0.330424,
                          99328: 0.250702, 91649: -0.202541, 73687: -0.198028, 94117: -0.177361,
                          139132: 0.576618, 177766: -0.422627, 184103: -0.408666,
                          159809: 0.393942}),
    "lap": (16.56843, (0.50659895, 0.8653543),
            {45209: -1.810972, 61: -1.661902, 13569: -1.414785, 47553: -1.13602,
                       98316: 8.665175, 98353: 5.737714, 77880: -2.809857, 88768: -0.985041}),
    "row5": (614.8595, (4.137809, 5.8570704, 18.437069),
             {63314: 18.428648, 62603: 16.48992, 7348: -12.515835, 20599: -10.494693,
                        70080: -95.32608, 99328: -2.995225, 93705: -0.109802, 92019: -0.109802,
                        192001: 176.085251, 183232: -155.829163, 166525: -14.723883}),
}


@pytest.mark.parametrize("variant", AUTHORS_OUTPUTS)
def test_same_function_as_the_authors_network(variant, tmp_path):
    torch.save(authors_weights(variant), tmp_path / "LAPX_MPII_256_256.tar")
    model = lapx.create_model(weights=tmp_path / "LAPX_MPII_256_256.tar").eval().double()
    rng = np.random.default_rng(zlib.crc32(b"dev:input:1x256x256"))
    images = torch.from_numpy(rng.standard_normal((1, 3, 256, 256)).astype(np.float32)).double()
    with torch.no_grad():
        outputs = torch.stack(model(images))
    largest, deviations, expected = AUTHORS_OUTPUTS[variant]
    assert outputs.std((1, 2, 3, 4), correction=1).tolist() == pytest.approx(deviations, rel=1e-6)
    outputs = outputs.flatten().numpy()
    # Rounding: without gates the values of row5 grow to 600, and the authors' float32 numbers are
    # 2e-5 away from our float64; the others agree to 1e-6.
    tolerance = (3e-5 if variant == "row5" else 1e-6) * largest
    assert np.abs(outputs[list(expected)] - list(expected.values())).max() < tolerance


@pytest.mark.parametrize("variant", PAPERS[:-4])  # rows 11 to 14 are lapx
def test_variant_and_joints_are_read_from_the_authors_names(variant, tmp_path):
    with torch.device("meta"):  # shapes alone
        ours = LAPX(replace(VARIANTS[variant], num_joints=17)).state_dict()
    names = authors_tensors(VARIANTS[variant])
    assert sorted(translated(name, ours) for name in names) == sorted(ours)
    torch.save({name: torch.zeros(ours[translated(name, ours)].shape) for name in names},
               tmp_path / "file")
    assert lapx.create_model(weights=tmp_path / "file").config == replace(
        VARIANTS[variant], num_joints=17)


def test_state_dict_is_found_wherever_it_lies_and_prefixes_are_dropped(tmp_path):
    model = LAPX(TINY)
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 3, "best": np.float64(88.6),
                "optimizer": {"state": {0: {"m": torch.ones(2)}}},
                "nested": {"state_dict": wrapped}}, tmp_path / "file.tar")
    loaded = lapx.create_model(weights=tmp_path / "file.tar")
    assert loaded.config == TINY
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(),
                                                 model.state_dict().values()))


def test_weights_of_16_bits_become_a_network_of_32(tmp_path):
    model = LAPX(TINY).half()
    torch.save(model.state_dict(), tmp_path / "half.pt")
    loaded = lapx.create_model(weights=tmp_path / "half.pt")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.stem.conv.weight, model.stem.conv.weight.float())


@pytest.mark.parametrize("change, complaint", [
    (lambda tensors: tensors.pop("stages.0.conv.weight"), "Missing.*stages.0.conv.weight"),
    (lambda tensors: tensors.update(extra=torch.ones(1)), "Unexpected.*extra"),
    (lambda tensors: tensors.update({"stem.bn.bias": torch.ones(3)}),
     "size mismatch for stem.bn.bias"),
    (lambda tensors: tensors["stem.bn.bias"].fill_(float("nan")), "NaN"),
    (lambda tensors: tensors.update({"stem.bn.bias": torch.ones(4).to_sparse()}), "Sparse"),
    (lambda tensors: tensors.update({"stages.0.head.weight": torch.ones(1).expand(9, 9**5, 1, 1)}),
     "size mismatch"),
    (lambda tensors: tensors.update({"stem.bn.bias": torch.ones(4).to(torch.float8_e4m3fn)}),
     "must be the weights of a LAPX network, the whole file, but it is not"),
    (lambda tensors: tensors.pop("stages.0.head.weight"), "no tensor is named stages.0.head")])
def test_weights_that_do_not_fit_are_listed(change, complaint, tmp_path):
    tensors = LAPX(TINY).state_dict()
    change(tensors)
    torch.save(tensors, tmp_path / "file.pt")
    with pytest.raises(InputError, match=complaint):
        evaluate.open_predictor(tmp_path / "file.pt")


class Dangerous:
    """What it is unpickled with would run a command."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_other_things_in_a_file_are_replaced_and_nothing_foreign_runs(tmp_path):
    model = LAPX(TINY)
    torch.save({"args": argparse.Namespace(lr=1), "path": tmp_path, "array": np.arange(3.),
                "score": np.float64(1), "evil": Dangerous(eval, "1 / 0"),
                "model": model.state_dict()}, tmp_path / "file.pt")
    assert lapx.create_model(weights=tmp_path / "file.pt").config == TINY
    torch.save({"evil": Dangerous(os.system, "false"), "model": model.state_dict()},
               tmp_path / "evil.pt")
    with pytest.raises(InputError, match="system, which could run any code(?s:.)*save the tensors"):
        lapx.create_model(weights=tmp_path / "evil.pt")
    torch.save(model, tmp_path / "whole.pt")
    with pytest.raises(InputError, match="no tensor is named(?s:.)*save its state_dict()"):
        evaluate.open_predictor(tmp_path / "whole.pt")


def test_what_thop_adds_to_a_model_is_left_out(tmp_path):
    tensors = LAPX(TINY).state_dict()
    torch.save(tensors | {"total_ops": torch.zeros(1), "stem.bn.total_params": torch.zeros(1)},
               tmp_path / "file.pt")
    assert lapx.create_model(weights=tmp_path / "file.pt").config == TINY


def test_a_file_says_what_its_network_is_and_no_argument_may(weights):
    for more in (dict(num_joints=17), dict(num_joints=16), dict(variant="lap")):
        with pytest.raises(InputError, match="leave out num_joints and variant"):
            lapx.create_model(weights=weights[0], **more)
    assert lapx.create_model(weights=weights[0]).config == ONE_STAGE


def test_a_checkpoint_holds_its_configuration(tmp_path):
    config = LAPXConfig(3, 32, 1, False, "CBAM", None, ("ECA",))  # no variant has that
    torch.save({"config": asdict(config), "model": LAPX(config).state_dict()}, tmp_path / "a.pt")
    assert lapx.create_model(weights=tmp_path / "a.pt").config == config


@pytest.fixture
def authors(tmp_path, monkeypatch):
    """A stand-in for the authors' repository, and a folder for torch.hub."""
    monkeypatch.setattr(lapx, "AUTHORS", f"file://{tmp_path}/there/")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "there").mkdir()
    torch.save({"state_dict": LAPX(TINY).state_dict()}, tmp_path / "there/LAPX_MPII_256_256.tar")
    content = (tmp_path / "there/LAPX_MPII_256_256.tar").read_bytes()
    git = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    monkeypatch.setitem(lapx.WEIGHTS, "mpii", ("LAPX_MPII_256_256.tar", git))
    return tmp_path


def test_the_authors_weights_are_fetched_once_by_name(authors, capsys, monkeypatch):
    write_file(authors / "mpii", "a file of that name, which is ./mpii")
    monkeypatch.chdir(authors)
    assert lapx.create_model(weights="mpii").config == TINY
    assert f"fetching {lapx.AUTHORS}" in capsys.readouterr().out
    (authors / "there/LAPX_MPII_256_256.tar").unlink()
    network = evaluate.open_predictor("mpii")
    assert network.size == (256, 256) and network.skeleton == MPII
    with pytest.raises(InputError, match="./mpii must be the weights of a LAPX network"):
        evaluate.open_predictor("./mpii")


@pytest.mark.parametrize("spoil, complaint", [
    (lambda file: file.unlink(), "can't be fetched"),
    (lambda file: file.write_bytes(file.read_bytes()[:5000]), "git's hash of what came is"),
    (lambda file: file.write_bytes(b"<html>"), "git's hash of what came is")])
def test_a_download_that_fails_says_how_to_fetch_by_hand_and_leaves_nothing(
        spoil, complaint, authors):
    spoil(authors / "there/LAPX_MPII_256_256.tar")
    with pytest.raises(InputError, match=complaint + "(?s:.)*by hand: curl -L --create-dirs -o "):
        lapx.create_model(weights="mpii")
    assert list((authors / "hub/checkpoints").iterdir()) == []


def test_the_example_in_the_docstring_runs_as_pasted(capsys):
    code = re.search(r"\n\n((?:    .*\n|\n)+)", lapx.__doc__)[1]
    exec(textwrap.dedent(code).replace('weights="mpii"', 'num_joints=16'), {})
    assert "tensor" in capsys.readouterr().out


def test_the_shapes_in_the_docstrings_drawing_are_the_networks():
    model = lapx.create_model().eval()
    shapes = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, inputs, output, name=name: shapes.update(
            {name: "x".join(map(str, getattr(output, "shape", (0,))[1:]))}))
    model(torch.zeros(1, 3, 256, 256))
    drawing = lapx.__doc__.split("PAPER Figure 1):")[1].split("Every stage")[0]
    stem = dict(re.findall(r"(conv|block\d) (\d+x\d+x\d+)", drawing.split("stem: ")[1]))
    assert stem == {name: shapes[f"stem.{name}"] for name in ("conv", "block1", "block2")}
    assert shapes["stem"] == shapes["stem.block3"] == shapes["stages.0.hourglass"] == "208x64x64"
    for name in ("stem -> x", "features", "heatmaps"):
        shape = re.search(rf"{name} (\d+x\d+x\d+)", drawing)[1]
        assert shape == shapes["stages.0.head" if name == "heatmaps" else "stem"]
    down = re.findall(r"\b\d+x\d+\b(?!x)", drawing.split("hourglass: ")[1].splitlines()[0])
    up = re.findall(r"\b\d+x\d+\b(?!x)", drawing.split("hourglass: ")[1].splitlines()[2])
    sizes = [shapes[f"stages.0.hourglass.levels.{level}.skip"][4:] for level in (3, 2, 1, 0)]
    assert down == up == [*sizes, shapes["stages.0.hourglass.neck"][4:]]


def test_under_bfloat16_nothing_in_the_stream_becomes_float32():
    model = LAPX(TINY)
    kinds = []
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.ELU)):
            module.register_forward_hook(lambda module, x, output: kinds.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 3, 64, 64))
    assert set(kinds) == {torch.bfloat16}


def test_the_tags_in_the_code_and_the_table_in_the_readme_are_the_same():
    code = "".join((HERE / file).read_text("utf-8") for file in FILES)
    for tag in ("PAPER SILENT", "DIFFERS"):
        tags = sorted(re.findall(rf"# {tag}: (.+?)\. ", code))
        rows = re.findall(rf"^\| {tag} \| ([^|]+) \|", README, re.M)
        assert tags and tags == sorted("; ".join(row.strip() for row in rows).split("; "))


def first_parts():
    """{file: the lines above its heading "Behind the scenes"}."""
    texts = {file: (HERE / file).read_text("utf-8") for file in FILES}
    assert all(text.count("= Behind the scenes: ") == 1 for text in texts.values())
    return {file: text.split("= Behind the scenes: ")[0].splitlines()
            for file, text in texts.items()}


def test_the_core_is_at_most_1000_lines_and_the_readme_names_all_of_it():
    section = README.split("## Where to start reading")[1].split("\n## ")[0]
    named = {file: [] for file in FILES}
    for file, functions in re.findall(r"^\|[^|]*\| \[(\w+.py)\]\S* \|(.*)\|$", section, re.M):
        named[file] += re.findall(r"`(\w+)`", functions)
    lines = 0
    for file, first in first_parts().items():
        nodes = [node for node in ast.parse("\n".join(first)).body if hasattr(node, "name")]
        assert [node.name for node in nodes] == named[file]  # in the order of the file
        lines += len(first) - nodes[0].lineno + 1  # below its docstring, imports and constants
    assert 500 < lines <= 1000


def test_the_network_and_all_functions_are_short():
    assert len((HERE / "lapx.py").read_text("utf-8").splitlines()) <= 600
    for file in FILES:
        for node in ast.walk(ast.parse((HERE / file).read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 75, node.name


@pytest.mark.parametrize("script", ["data", "train", "evaluate", "export"])
@pytest.mark.parametrize("given, found", [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "x"}, "x")])
def test_threads_are_told_to_sleep_before_torch_is_loaded(script, given, found):
    code = f"""
import os, sys
class Finder:
    def find_spec(name, *others):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Finder)
import {script}"""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, env=environment | given,
                          capture_output=True, encoding="utf-8")
    assert done.stdout.strip() == found, done.stderr


def test_every_package_that_is_imported_is_a_dependency_and_no_other_packages_name_is_taken():
    project = (HERE / "pyproject.toml").read_text("utf-8")
    imported = set()
    for file in FILES:
        for node in ast.walk(ast.parse((HERE / file).read_text("utf-8"))):
            names = [alias.name for alias in getattr(node, "names", ())]
            names = [node.module] if isinstance(node, ast.ImportFrom) else names
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                imported |= {name.split(".")[0] for name in names}
    imported -= {*sys.stdlib_module_names, *(file[:-3] for file in FILES)}
    imported = {{"PIL": "pillow"}.get(name, name) for name in imported}
    named = set(re.findall(r"^    \"(\w+)", project.split("dependencies")[1], re.M))
    assert named == imported | {"onnxscript"}  # which torch's exporter imports
    assert 'name = "lapx-pose"' in project  # trackers install another lapx from PyPI
    assert 'py-modules = ["lapx"]' in project


def test_a_missing_a_truncated_and_a_foreign_file_get_a_sentence(tmp_path):
    torch.save(LAPX(TINY).state_dict(), tmp_path / "file.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "file.pt").read_bytes()[:5000])
    write_file(tmp_path / "text.pt", "hello")
    for name, complaint in (("none.pt", "no such file"), ("half.pt", "must be the weights of"),
                            ("text.pt", "must be the weights of")):
        with pytest.raises(InputError, match=complaint):
            evaluate.open_predictor(tmp_path / name)


@pytest.mark.parametrize("height, width", [(384, 288), (256, 192), (64, 64), (131, 250)])
def test_every_input_size_works(height, width):
    outputs = LAPX(TINY).eval()(torch.zeros(2, 3, height, width))
    assert [output.shape for output in outputs] == [(2, 16, *data.heatmap_size(height, width))] * 2


def test_gamma_alone_decides_what_the_non_local_branch_contributes():
    model = LAPX(TINY).eval()
    images = torch.randn(1, 3, 64, 64)
    before = model(images)[-1]
    for name, parameter in model.named_parameters():
        if "non_local" in name and not name.endswith("gamma"):
            parameter.data.normal_()
    assert torch.equal(model(images)[-1], before)  # gamma is 0
    model.non_locals()[1].gamma.data.fill_(0.2)
    assert not torch.equal(model(images)[-1], before)


def test_elus_write_over_their_input_which_spares_memory_and_changes_no_gradient():
    model = LAPX(TINY).double()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    kept = {}  # what autograd keeps for the backward pass: {inplace: bytes}
    gradients = {}
    for inplace in (True, False):  # first as it is
        blocks = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            blocks[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = sum(heatmaps.square().sum() for heatmaps in model(images))
        kept[inplace] = sum(blocks.values())
        model.zero_grad()
        loss.backward()
        gradients[inplace] = [parameter.grad for parameter in model.parameters()]
        for module in model.modules():
            if isinstance(module, nn.ELU):
                module.inplace = False
    assert kept[True] < 0.8 * kept[False]
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(*gradients.values()))


@pytest.mark.parametrize("kind", ["ECA", "CBAM", "ECA-CBAM"])
def test_a_maximum_gives_its_gradient_to_one_place(kind):
    # amax gives it to all that equals the maximum: NaN in torch.compile's bfloat16, where none does
    found = []
    waiting = [lapx.make_attention(kind, 16)(torch.ones(1, 16, 2, 2, requires_grad=True)).grad_fn]
    while waiting:
        node = waiting.pop()
        found.append(node.name())
        waiting += [child for child, _ in node.next_functions if child]
    assert "MaxBackward0" in found and "AmaxBackward0" not in found


def test_attention_rows_are_distributions():
    rows = lapx.NonLocal(16).attention_map(torch.randn(2, 16, 3, 4))
    assert rows.shape == (2, 12, 12) and torch.allclose(rows.sum(2), torch.ones(2, 12))


def decode_slowly(heatmap, offset):
    """SimpleBaseline's decoding of one map, pixel by pixel."""
    h, w = heatmap.shape
    y, x = divmod(int(heatmap.argmax()), w)  # numpy's argmax is the first maximum
    if heatmap[y, x] <= 0:
        return 0, 0
    if offset and 1 < x < w - 1 and 1 < y < h - 1:
        return (x + 0.25 * np.sign(heatmap[y, x + 1] - heatmap[y, x - 1]),
                y + 0.25 * np.sign(heatmap[y + 1, x] - heatmap[y - 1, x]))
    return x, y


@pytest.mark.parametrize("offset", [True, False])
def test_decoding_ties_borders_and_empty_maps(offset):
    heatmaps = torch.randint(-2, 3, (40, 5, 6, 7), generator=torch.manual_seed(0)).float()
    heatmaps[0, 0] = -1
    heatmaps[1].clamp_(max=0)  # a peak of 0 is none
    keypoints, scores = decode(heatmaps, offset)
    for map, point in zip(heatmaps.flatten(0, 1).numpy(), keypoints.flatten(0, 1).numpy()):
        assert tuple(point) == decode_slowly(map, offset)
    assert torch.equal(scores, heatmaps.amax((2, 3)))


# ---------------------------------------------------------------------------- data.py

@pytest.mark.parametrize("center, scale, degrees, size, point, expected", [
    ((315, 245.427525), 2.20229375, 30, (256, 256), (17.25, -3.5), (-94.21069679, 89.23165974)),
    ((390.1400146, 217.5700073), 1.6190999746, 0, (256, 192), (17.25, -3.5),
     (-125.09468592, -3.07726653)),
    ((390.1400146, 217.5700073), 1.6190999746, 45, (256, 192), (96, 128),
     (-64.87392278, 213.76784384)),
    ((963.6627605, 383.4415188), 4.7920052209, 80, (256, 192), (0, 0),
     (-13.17274810, 304.78219173))])
def test_affine_is_the_published_one(center, scale, degrees, size, point, expected):
    matrix = affine(box_of(center, scale), size, degrees)
    moved = transform(np.array([point]), matrix)
    assert np.allclose(moved, [expected], atol=1e-4)
    assert np.allclose(transform(moved, np.linalg.inv(matrix)), [point])


def test_a_flipped_crop_is_the_crop_of_the_mirrored_picture():
    people = dotted_people()
    picture = people.picture(0)
    mirrored = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    box = people.box[0]
    size = (128, 96)
    once = affine(box, size, 20, flip=True)
    twice = affine(box * (-1, 1, 1, 1) + (picture.width - 1, 0, 0, 0), size, 20)
    difference = data.crop(picture, once, size).astype(int) - data.crop(mirrored, twice, size)
    assert np.abs(difference).max() <= 1  # Pillow truncates, on either side
    joints = people.joints[0] * (-1, 1) + (picture.width - 1, 0)
    assert np.allclose(transform(people.joints[0], once), transform(joints, twice))


# A colour for each joint, far from one another and from those of the picture's four quarters.
COLOURS = np.array(list(itertools.product((80, 160, 250), repeat=3)))[:17]
QUARTERS = np.array([[(50, 0, 0), (0, 50, 0)], [(50, 0, 50), (0, 50, 50)]])


def dotted_people(seed=0, skeleton=MPII):
    """One person, twice, in a picture of 160x200 that shows each joint as a dot of its colour. The
    right wrist is not annotated."""
    rng = np.random.default_rng(seed)
    K = len(skeleton.joints)
    cells = rng.permutation(24)[:K]  # of 6 by 4
    joints = np.column_stack([cells % 6 * 26 + 35, cells // 6 * 28 + 38])
    joints = joints + rng.uniform(-5, 5, (K, 2))
    picture = Image.fromarray(np.kron(QUARTERS, np.ones((80, 100, 1))).astype(np.uint8))
    for joint, colour in zip(joints, COLOURS.tolist()):
        ImageDraw.Draw(picture).circle(tuple(joint), 7, tuple(colour))
    annotated = np.array([name != "right wrist" for name in skeleton.joints])
    return data.People(
        folder=Path(), loaded=picture, files=np.array(["", ""]), image_id=np.zeros(2, int),
        box=np.array([[100., 80, 250, 250]] * 2), joints=np.array([joints] * 2),
        annotated=np.array([annotated] * 2), box_score=np.ones(2), head_size=np.full(2, 20.))


def turns_left(points):
    """Whether the triangle of pelvis, upper neck and head top is run through counter-clockwise."""
    a, b, c = np.asarray(points, float)[[6, 8, 9]]
    return np.linalg.det([b - a, c - a]) < 0


@pytest.mark.parametrize("size", [(128, 128), (128, 96)])
def test_each_joint_of_an_augmented_sample_lies_on_what_the_picture_shows_there(size):
    people = dotted_people()
    dataset = PoseDataset(people, size, MPII, augmentation=(0.25, 40), seed=3)
    flips = 0
    for epoch in range(40):
        row, image, joints, visible = dataset[epoch, 0]
        # the pelvis, upper neck and head top change places with no other joint
        mirrored = turns_left(joints) != turns_left(people.joints[0])
        flips += mirrored
        for joint, (x, y) in enumerate(joints.round().int().tolist()):
            if 3 < x < size[1] - 4 and 3 < y < size[0] - 4:
                # in a mirrored picture the left wrist is where the right one was
                there = COLOURS[partners(MPII)[joint] if mirrored else joint]
                assert np.abs(image[y, x].numpy() - there).max() < 12
        not_annotated = "left wrist" if mirrored else "right wrist"
        assert [name for name, seen in zip(MPII.joints, visible) if not seen] == [not_annotated]
        assert row == 0 and image.dtype == torch.uint8 and image.shape == (*size, 3)
    assert 10 < flips < 30


def test_augmentation_enlarges_and_turns_the_box_within_its_limits():
    people = dotted_people()
    unchanged = PoseDataset(people, (128, 128), MPII)[0][2].numpy()

    def changes(augmentation):
        """How many times larger the unflipped samples of 300 epochs are, and how far turned."""
        dataset = PoseDataset(people, (128, 128), MPII, augmentation)
        samples = [dataset[epoch, 0][2].numpy() for epoch in range(300)]
        vectors = np.array([joints[9] - joints[6] for joints in samples
                            if turns_left(joints) == turns_left(unchanged)])
        ratio = vectors @ (1, 1j) / ((unchanged[9] - unchanged[6]) @ (1, 1j))
        return np.abs(ratio), np.degrees(np.angle(ratio))

    sizes, degrees = changes((0.25, 0))
    assert sizes.min() == pytest.approx(1 / 1.25, rel=1e-5)  # a larger box, a smaller person
    assert sizes.max() == pytest.approx(1 / 0.75, rel=1e-5)
    for end in (sizes.min(), sizes.max()):  # a normal distribution cut at one sigma
        assert 0.1 < np.isclose(sizes, end).mean() < 0.22
    assert np.allclose(degrees, 0, atol=1e-3)
    sizes, degrees = changes((0, 40))
    assert np.allclose(sizes, 1) and 35 < np.abs(degrees).max() <= 40.001


def test_samples_vary_with_seed_epoch_and_person_and_repeat_themselves():
    people = dotted_people()
    datasets = [PoseDataset(people, (64, 64), MPII, (0.25, 40), seed) for seed in range(2)]
    joints = {(seed, epoch, row): datasets[seed][epoch, row][2]
              for seed, epoch, row in itertools.product(range(2), repeat=3)}
    for one, other in itertools.combinations(joints, 2):
        assert not torch.allclose(joints[one], joints[other], atol=0.01), (one, other)
    again = PoseDataset(people, (64, 64), MPII, (0.25, 40), 1)
    assert torch.equal(again[1, 1][2], joints[1, 1, 1])
    assert torch.equal(again[1][2], joints[1, 0, 1])  # dataset[row] is epoch 0
    plain = PoseDataset(people, (64, 64), MPII)
    assert torch.equal(plain[5, 0][2], plain[0][2])


def test_crops_are_normalised_by_channel():
    crops = torch.tensor([[[[255, 0, 51]]]], dtype=torch.uint8)  # one red pixel
    assert np.allclose(data.normalise(crops).flatten(),
                       [(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225])
    assert np.allclose(data.normalise(crops, bgr=True).flatten(),
                       [(0.2 - 0.485) / 0.229, -0.456 / 0.224, (1 - 0.406) / 0.225])
    assert np.allclose(data.normalise(crops, False, (0.5, 0.5, 0.5), (2., 4., 1.)).flatten(),
                       [0.25, -0.125, -0.3])
    picture = torch.arange(2 * 4 * 5 * 3, dtype=torch.uint8).reshape(2, 4, 5, 3)
    images = data.normalise(picture, False, (0., 0., 0.), (1., 1., 1.))
    assert torch.allclose(images, picture.permute(0, 3, 1, 2) / 255)
    assert images.dtype == torch.float32


@pytest.mark.parametrize("center, scale, degrees", [((70, 50), 0.5, 0), ((10, 5), 0.9, 33)])
def test_crop_is_exact_bilinear_rounded_down_and_black_outside(center, scale, degrees):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8))
    size = (48, 64)
    matrix = affine(box_of(center, scale), size, degrees)
    padded = np.zeros((94, 124, 3))
    padded[2:-2, 2:-2] = np.asarray(picture)
    v, u = np.mgrid[:48, :64]
    x, y = np.moveaxis(transform(np.stack([u, v], 2).astype(float), np.linalg.inv(matrix)), 2, 0)
    x = np.clip(x, -2, 120.999)
    y = np.clip(y, -2, 90.999)
    x0 = np.floor(x).astype(int)
    y0 = np.floor(y).astype(int)
    fx = (x - x0)[..., None]
    fy = (y - y0)[..., None]
    exact = sum(padded[y0 + dy + 2, x0 + dx + 2] * np.abs(1 - dx - fx) * np.abs(1 - dy - fy)
                for dx in (0, 1) for dy in (0, 1))
    difference = exact - data.crop(picture, matrix, size)
    assert -1e-2 < difference.min() and difference.max() < 1.01


def test_crop_outside_the_picture_is_black():
    assert not data.crop(Image.new("RGB", (50, 50), "white"),
                         affine(box_of((500, 500), 0.5), (64, 64)), (64, 64)).any()


def slow_targets(joints, visible, size, sigma):
    """SimpleBaseline's targets, joint by joint and pixel by pixel."""
    h = size[0] // 4
    w = size[1] // 4
    targets = np.zeros((len(joints), h, w))
    weights = np.array([float(seen) for seen in visible])
    for joint, (x, y) in enumerate(joints):
        mx = int(x / 4 + 0.5)
        my = int(y / 4 + 0.5)
        left = mx - 3 * sigma
        top = my - 3 * sigma
        right = mx + 3 * sigma + 1
        bottom = my + 3 * sigma + 1
        if left >= w or top >= h or right < 0 or bottom < 0:
            weights[joint] = 0
        for row in range(h):
            for column in range(w):
                if weights[joint] and left <= column < right and top <= row < bottom:
                    targets[joint, row, column] = np.exp(
                        -((column - mx) ** 2 + (row - my) ** 2) / (2 * sigma ** 2))
    return targets, weights


@pytest.mark.parametrize("size, sigma", [((128, 96), 2), ((256, 64), 2), ((96, 260), 3)])
def test_targets_are_simple_baselines_to_the_last_pixel(size, sigma):
    edges = np.array([-40, -34, -30, -26, -6, -5.9, -2.1, -2, 0, 1.9, 2, 50.3])
    joints = np.array([(x, y) for x in [*edges, *(size[1] - edges)]
                       for y in [*edges, *(size[0] - edges)]])
    visible = np.arange(len(joints)) % 7 > 0
    targets, weights = data.gaussian_targets(torch.from_numpy(joints)[None].float(),
                                             torch.from_numpy(visible)[None].float(), size)
    expected, expected_weights = slow_targets(joints, visible, size, sigma)
    assert np.abs(targets[0].numpy() - expected).max() < 1e-6
    assert (weights[0].numpy() == expected_weights).all()


def test_mpii_reader_adjusts_center_and_scale_and_counts_from_zero(tmp_path):
    entry = {"image": "a.jpg", "center": [100.0, 50.0], "scale": 2.0,
             "joints": [[11, 21]] * 15 + [[-1, -1]], "joints_vis": [1] * 15 + [0]}
    for name in ("annot/valid.json", "annotations/mpii_val.json"):  # HRNet's and mmpose's names
        root = tmp_path / name[:6]
        other = {**entry, "center": [-1, -1], "image": "b.jpg"}
        write_file(root / name, [entry, other, other])
        people = data.read_mpii(root, "valid")
        assert people.box.tolist() == [[99, 79, 500, 500], [-2, -2, 400, 400], [-2, -2, 400, 400]]
        assert people.joints[0].tolist() == [[10, 20]] * 15 + [[-2, -2]]
        assert people.annotated[0].tolist() == [True] * 15 + [False]
        assert people.head_size.tolist() == [50] * 3 and people.box_score.tolist() == [1] * 3
        assert people.folder / people.files[1] == root / "images/b.jpg"
        assert people.image_id[1] == people.image_id[2] != people.image_id[0]
    nobody = {"image": "a.jpg", "center": [100.0, 50.0], "scale": 2.0}
    write_file(tmp_path / "annot/test.json", [nobody])
    assert not data.read_mpii(tmp_path, "test").annotated.any()


def test_joints_and_head_sizes_come_from_the_mat_file_that_lies_beside_the_json(tmp_path):
    from scipy.io import savemat

    entry = {"image": "a.jpg", "center": [100.0, 50.0], "scale": 2.0, "joints": [[11, 21]] * 16,
             "joints_vis": [1] * 16}
    joints = np.arange(64.).reshape(16, 2, 2)  # (joints, x y, persons)
    missing = np.zeros((16, 2))
    missing[3, 1] = 1
    corners = np.array([[[10, 20], [10, 20]], [[13, 29], [14, 32]]])  # (2 corners, x y, persons)
    for names in (("annot/valid.json", "annot/gt_valid.mat"),
                  ("annotations/mpii_val.json", "annotations/mpii_gt_val.mat")):
        write_file(tmp_path / names[0], [entry, entry])
        savemat(tmp_path / names[1], {"pos_gt_src": joints, "jnt_missing": missing,
                                      "headboxes_src": corners})
        people = data.read_mpii(tmp_path, "valid")
        assert people.joints[1, 5].tolist() == [5 * 4 + 1 - 1, 5 * 4 + 3 - 1]
        assert people.head_size.tolist() == pytest.approx([0.6 * 5, 0.6 * 15])
        assert not people.annotated[1, 3] and people.annotated.sum() == 31
        (tmp_path / names[0]).unlink()


@pytest.mark.parametrize("key, value", [
    ("joints", [[0, 0]] * 15), ("scale", 0), ("scale", float("nan")), ("scale", 10**400),
    ("joints_vis", None), ("center", [1, 2, 3])])
def test_a_malformed_mpii_entry_is_named_with_its_file(key, value, mpii, tmp_path):
    entries = data.read_json(mpii / "annot/train.json")
    entries[4][key] = value
    write_file(tmp_path / "annot/train.json", entries)
    with pytest.raises(InputError, match=rf"train.json.* .*{key}") as caught:
        data.read_mpii(tmp_path, "train")
    assert "person 4, counted from 0" in str(caught.value) or value == 10**400


def test_missing_annotations_and_pictures_are_listed_with_where_to_get_them(mpii, tmp_path):
    with pytest.raises(InputError, match="annot/trainval.json(?s:.)*mpii_trainval.json(?s:.)*READ"):
        data.read_mpii(mpii, "trainval")
    (tmp_path / "annot").symlink_to(mpii / "annot")
    (tmp_path / "images").mkdir()
    with pytest.raises(InputError, match=r"6 of 6 pictures are not there; the first ones:"
                                         r"(?s:.)*images/0.jpg\n(?s:.)*images/4.jpg$"):
        data.load_people("mpii", tmp_path, "train", MPII)
    for number in range(5):
        shutil.copy(mpii / f"images/{number}.jpg", tmp_path / "images")
    with pytest.raises(InputError, match="1 of 6 pictures (?s:.)*5.jpg$"):
        data.load_people("mpii", tmp_path, "train", MPII)
    write_file(tmp_path / "images/5.jpg", b"broken")
    with pytest.raises(InputError, match="5.jpg can't be read"):  # one of the five that are opened
        data.load_people("mpii", tmp_path, "train", MPII)
    shutil.copy(mpii / "images/5.jpg", tmp_path / "images")
    write_file(tmp_path / "images/4.jpg", b"broken, which shows when it is opened")
    assert len(data.load_people("mpii", tmp_path, "train", MPII)) == 6


def test_whether_all_pictures_are_there_is_one_listing_of_each_folder(tmp_path, monkeypatch):
    names = [f"{folder}{number}.jpg" for folder in ("", "a/", "a/b/") for number in range(4)]
    for name in names:
        write_file(tmp_path / name, b"")
    listings = []
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listings.append(path) or real(path))
    monkeypatch.setattr(Path, "is_file", lambda path: pytest.fail("a file was looked at"))
    assert data.find_pictures(tmp_path, names) == names and len(listings) == 3
    monkeypatch.undo()
    with pytest.raises(InputError, match="4 of 16 pictures") as caught:
        data.find_pictures(tmp_path, [*names, "a/9.jpg", "c/1.jpg", "", "a/"])
    assert str(caught.value).split("\n  ")[1:] == [
        str(tmp_path / name) for name in ("a/9.jpg", "c/1.jpg", "", "a")]
    # a file system that does not tell capitals from small letters
    monkeypatch.setattr(Path, "is_file", lambda path: path.name.lower() == "1.jpg")
    assert data.find_pictures(tmp_path, ["a/1.JPG"]) == ["a/1.JPG"]
    with pytest.raises(InputError, match="1 of 2 pictures (?s:.)*9.JPG$"):
        data.find_pictures(tmp_path, ["a/1.JPG", "a/9.JPG"])


def test_a_file_is_found_whatever_the_way_its_name_is_written(tmp_path):
    composed = unicodedata.normalize("NFC", "é/ü.jpg")
    for name in (unicodedata.normalize("NFD", composed), "sub/1.jpg", "odd\\2.jpg"):
        write_file(tmp_path / name, b"")
    names = [composed, "sub\\1.jpg", "./sub/1.jpg", "odd/2.jpg", "odd\\2.jpg"]
    found = data.find_pictures(tmp_path, names)
    assert all((tmp_path / name).is_file() for name in found) and found[0] != composed
    with pytest.raises(InputError, match="1 of 6 pictures"):
        data.find_pictures(tmp_path, [*names, "sub\\2.jpg"])


def test_train_and_valid_people_are_others_and_are_counted(mpii, capsys):
    train_people = data.load_people("mpii", mpii, "train", MPII)
    valid_people = data.load_people("mpii", mpii, "valid", MPII)
    assert (len(train_people), len(valid_people)) == (6, 4)
    assert not {*train_people.files} & {*valid_people.files}
    assert capsys.readouterr().out == ("mpii train: 6 persons in 6 pictures\n"
                                       "mpii valid: 4 persons in 4 pictures\n")
    assert [(info.skeleton, info.splits) for info in DATASETS.values()] == [
        ("mpii", ("train", "valid")), ("mpii", ("train", "valid")),
        ("coco", ("train2017", "val2017"))]


def test_coco_reader_cleans_boxes_and_leaves_out_crowds_and_the_unlabelled(tmp_path, capsys):
    def annotation(id, bbox, **change):
        return {"id": id, "image_id": 3, "category_id": 1, "iscrowd": 0, "bbox": bbox, "area": 5,
                "keypoints": [7, 8, 1] + [0] * 48, "num_keypoints": 1, **change}

    crowd = annotation(3, [0, 0, 9, 9], iscrowd=1)
    del crowd["keypoints"]
    write_file(tmp_path / "annotations/person_keypoints_val2017.json", {
        "images": [{"id": 3, "file_name": "3.jpg", "width": 200, "height": 100},
                   {"id": 2, "file_name": "2.jpg", "width": 200, "height": 100}],
        "annotations": [annotation(1, [10, 10, 31, 41], image_id=2),
                        annotation(2, [-10, 80, 31, 61]),
                        crowd,
                        annotation(4, [0, 0, 9, 9], keypoints=[0] * 51),
                        annotation(5, [0, 0, 9, 9], category_id=2),
                        annotation(6, [0, 0, 9, 9], area=0),
                        annotation(7, [5, 5, 0, 0]), annotation(8, [5, 5, 1, 9], image_id=2)],
        "categories": [{"id": 1, "keypoints": list(COCO.joints)}]})
    people = data.read_coco(tmp_path, "val2017")
    assert people.image_id.tolist() == [3, 2, 2]  # in the order of the list of images
    told = capsys.readouterr().out
    assert "annotations by category: 7 of 1; 1 of 2, left out\n" in told
    assert ("of 7 annotations left out: 1 marked as crowd, 1 without a labelled joint (of flag 1 "
            "or 2), 1 without a box in the picture, 1 of area 0\n") in told
    # -10..20 is clipped to 0..29 (width 31 counts from the clipped edge), 80..140 to 80..99
    assert people.box.tolist() == [[15, 89.5, 37.5, 23.75], [25, 30, 37.5, 50],
                                   [5, 9, 0, 10]]  # one is a pixel wide
    assert people.annotated.sum() == 3 and people.joints[0, 0].tolist() == [7, 8]


@pytest.mark.parametrize("id", [900100087038, 2**53 - 1])
def test_ids_are_whole_numbers_up_to_2_to_the_53(id, coco, tmp_path):
    content = data.read_json(coco / "annotations/person_keypoints_val2017.json")
    content["annotations"][-1]["id"] = id  # a crowd's, as in COCO's own file
    content["images"][2]["id"] = id
    for annotation in content["annotations"][4:6]:
        annotation["image_id"] = id
    path = tmp_path / "annotations/person_keypoints_val2017.json"
    write_file(path, content)
    people = data.read_coco(tmp_path, "val2017")
    assert people.image_id.tolist() == [7, 7, 8, 8, id, id] and people.truth.persons["id"][-1] == id
    results = [{"image_id": id, "category_id": 1, "score": 1,
                "keypoints": content["annotations"][4]["keypoints"]}]
    assert evaluate.coco_ap(people.truth, results, "results")["AP"] > 0
    for field, wrong in (("id", 2**53 + 1), ("id", id + 0.5), ("id", -2**60),
                         ("image_id", float("nan")), ("image_id", 0.5)):
        content["annotations"][-1][field] = wrong
        write_file(path, content)
        with pytest.raises(InputError, match=r"person 6, .* not a whole number below 2\^53"):
            data.read_coco(tmp_path, "val2017")


@pytest.mark.parametrize("spoil, complaint", [
    (lambda content: content["annotations"][2]["keypoints"].pop(), "person 2, .*50 values, not 51"),
    (lambda content: content["annotations"][2].pop("image_id"), "person 2, .*'image_id' is miss"),
    (lambda content: content["annotations"][2].update(image_id=None), "person 2, |image_id"),
    (lambda content: content["annotations"][2].update(bbox=[1] * 8), "person 2, .*bbox has 8"),
    (lambda content: content["annotations"][2].update(bbox=["x"] * 4), "bbox.*'x'"),
    (lambda content: content["annotations"][2].update(area=1e300), "area of person 2, .* is 1"),
    (lambda content: content["annotations"][2].pop("category_id"), "'category_id' is missing"),
    (lambda content: content["annotations"][2].update(category_id="dog"), "'dog'"),
    (lambda content: content["annotations"].clear(), "of 0 annotations left out: none; .* nobody"),
    (lambda content: content["images"].clear(), "it is .., not a list with entries"),
    (lambda content: content.update(images={"1": {}}), "it is a dictionary, not a list"),
    (lambda content: content.update(annotations={"1": {}}), "it is a dictionary, not a list"),
    (lambda content: content.pop("images"), "'images' is missing"),
    (lambda content: content["images"].insert(1, {"width": 2}), "picture 1, .*'id' is missing"),
    (lambda content: content["images"][1].update(width=-1), "width of picture 1, .*is -1"),
    (lambda content: [item.update(area=0) for item in content["annotations"]], "6 of area 0; ther"),
    (lambda content: [item.update(image_id=5) for item in content["annotations"]],
     "6 in pictures that are not listed; there"),
    (lambda content: [item.update(iscrowd=1) for item in content["annotations"]], "7 marked as c"),
    (lambda content: content["images"].append(None), "NoneType")])
def test_a_malformed_coco_entry_is_named_with_its_file(spoil, complaint, coco, tmp_path):
    content = data.read_json(coco / "annotations/person_keypoints_val2017.json")
    spoil(content)
    write_file(tmp_path / "annotations/person_keypoints_val2017.json", content)
    with pytest.raises(InputError, match=f"person_keypoints_val2017.json.*{complaint}"):
        data.read_coco(tmp_path, "val2017")


def test_detected_boxes_are_neither_clipped_nor_shortened(coco):
    people = data.read_coco(coco, "val2017", COCO, coco / "detections.json")
    annotated = data.read_coco(coco, "val2017")
    assert np.allclose(people.box, annotated.box + (0.5, 0.5, 1.25, 1.25))
    assert (people.box_score == 0.9).all() and (annotated.box_score == 1).all()
    assert not people.annotated.any()


@pytest.mark.parametrize("box, width", [([10, 20, 90, 40], 90), ([10, 20, 30, 80], 60),
                                        ([10, 20, 60, 80], 60)])
def test_a_box_is_widened_to_the_shape_of_the_crop_and_padded_by_a_quarter(box, width):
    padded = data.padded(np.array([box]))
    assert padded.tolist() == [[10 + box[2] / 2, 20 + box[3] / 2, 1.25 * box[2], 1.25 * box[3]]]
    assert data.fitted_width(padded, (256, 192)).tolist() == pytest.approx([1.25 * width])
    size = transform(np.array([[width * 1.25, 0], [0, 0]]), affine(padded[0], (256, 192)))
    assert size[0, 0] - size[1, 0] == pytest.approx(192)  # its width becomes the crop's


@pytest.mark.parametrize("split, folder", [
    ("val2017", "images/val2017"), ("val2017", "val2017"), ("test-dev2017", "images/test2017")])
def test_cocos_pictures_are_found_where_it_has_them(split, folder, coco, tmp_path):
    name = "person_keypoints" if split == "val2017" else "image_info"
    content = data.read_json(coco / "annotations/person_keypoints_val2017.json")
    write_file(tmp_path / f"annotations/{name}_{split}.json", content)
    (tmp_path / folder).mkdir(parents=True)
    people = data.read_coco(tmp_path, split)
    assert people.folder == tmp_path / folder and people.files.tolist()[-1] == "2.jpg"


def test_overfitting_takes_the_people_in_the_first_pictures_and_scores_them_alone(coco):
    recipe = argparse.Namespace(**train.default_recipe("coco") | {
        "overfit": 2, "data": coco, "splits": ("val2017", "none"), "input": (64, 64)})
    dataset, people = train.load_data(recipe, scored=True)
    assert dataset.people is people and dataset.augmentation is None
    assert people.image_id.tolist() == [7, 7, 8, 8]
    assert people.files.tolist() == ["0.jpg", "0.jpg", "1.jpg", "1.jpg"]
    perfect = np.concatenate([people.joints, np.ones((4, 17, 1))], 2)
    metrics = scored(perfect, people, network_of(None, (64, 64), "coco"))
    assert metrics["AP"] == metrics["AR"] == pytest.approx(1)


def test_detections_belong_to_pictures_by_file_name_or_by_id(coco, tmp_path, capsys):
    box = {"bbox": [1, 2, 3, 4], "score": 0.5}
    write_file(tmp_path / "boxes.json", [
        {**box, "file_name": "val2017/1.jpg"}, {**box, "image_id": 7}, {**box, "image_id": 1},
        {**box, "file_name": "9.jpg"}, {**box, "image_id": 8, "bbox": [1, 2, 0, 4]},
        {**box, "image_id": 9, "category_id": 18}])
    people = data.read_coco(coco, "val2017", COCO, tmp_path / "boxes.json")
    assert people.image_id.tolist() == [8, 7]  # 1.jpg is picture 8 there
    told = capsys.readouterr().out
    assert ("boxes.json: of 6 boxes left out: 1 of other categories than [1], 2 of no picture here,"
            " or of a name that several have\n") in told
    assert "boxes.json: of 3 boxes left out: 1 of no size\n" in told


def test_synthetic_people_are_drawn_once_and_are_others_in_valid_and_partly_outside(
        tmp_path, monkeypatch, capsys):
    entry, picture = data.synthetic_person(3, 4)
    again, other = data.synthetic_person(3, 4)
    assert entry == again and picture.tobytes() == other.tobytes()
    people = data.load_people("synthetic", tmp_path / "new/synthetic", "train", MPII)
    assert "drawing synthetic people into" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["synthetic"]
    monkeypatch.setattr(data, "synthetic_person", lambda seed, number: pytest.fail("drawn again"))
    others = data.load_people("synthetic", tmp_path / "new/synthetic", "valid", MPII)
    monkeypatch.undo()
    assert (len(people), len(others)) == (400, 200)
    assert 0.8 < people.annotated.mean() < 0.99
    whole = people.annotated.all(1)
    share = np.ptp(people.joints[whole], axis=1).max(1) / people.box[whole, 2]
    assert 0.8 < share.mean() < 1  # of the box's width
    seen = {joints.tobytes() for joints in people.joints}
    assert not any(joints.tobytes() in seen for joints in others.joints)
    for row in (0, 3):
        assert people.picture(row).tobytes() == data.synthetic_person(0, row)[1].tobytes()
        inside = people.joints[row][people.annotated[row]]
        assert np.allclose(people.box[row, :2], (inside.min(0) + inside.max(0)) / 2, atol=80)


def test_of_processes_that_draw_synthetic_people_one_is_the_first(tmp_path, monkeypatch, mpii):
    monkeypatch.setattr(data, "draw_synthetic", lambda root: root.mkdir())

    def slow_rename(part, root):
        shutil.copytree(mpii, root)  # another process's
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(Path, "rename", slow_rename)
    assert len(data.read_synthetic(tmp_path / "synthetic", "train")) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["synthetic"]
    monkeypatch.undo()
    write_file(tmp_path / "file", "no folder")
    with pytest.raises(InputError, match="file/synthetic can't be written .* --data names another"):
        data.read_synthetic(tmp_path / "file/synthetic", "train")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "CMYK", "1"])
def test_pictures_of_every_mode_are_read(mode, tmp_path):
    picture = Image.fromarray(np.full((20, 30), 128, np.uint8)).convert("RGB").convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    picture.save(path)
    opened = data.open_picture(path)
    assert opened.mode == "RGB" and opened.size == (30, 20)
    assert abs(np.asarray(opened).mean() - 128) < 3 or mode == "1"


def test_a_picture_is_turned_by_its_exif_only_where_that_is_asked_for(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png", exif=exif)
    assert data.open_picture(tmp_path / "a.png").size == (30, 20)  # as data sets annotate it
    assert data.open_picture(tmp_path / "a.png", upright=True).size == (20, 30)


def test_a_truncated_picture_is_named(mpii, tmp_path):
    (tmp_path / "a.jpg").write_bytes((mpii / "images/0.jpg").read_bytes()[:2000])
    with pytest.raises(InputError, match="a.jpg can't be read"):
        data.open_picture(tmp_path / "a.jpg")


def test_samples_do_not_depend_on_the_number_of_loader_processes(mpii):
    people = data.read_mpii(mpii, "train")
    dataset = PoseDataset(people, (64, 64), MPII, DATASETS["mpii"].augmentation, seed=1)
    batches = [[(2, 0), (2, 5)], [(3, 0), (2, 3)]]
    loaders = [data.make_loader(dataset, batches, workers) for workers in (0, 2)]
    assert [loader.num_workers for loader in loaders] == [0, 2]
    for alone, helped in zip(*loaders):
        assert all(torch.equal(x, y) for x, y in zip(alone, helped))


def test_augmentation_is_drawn_as_documented():
    draws = [data.draw_augmentation(np.random.default_rng(n), 0.25, 40) for n in range(2000)]
    factors, degrees, flips = map(np.array, zip(*draws))
    assert 39 < degrees.max() <= 40 and -40 <= degrees.min() < -39
    assert 22 < np.sqrt((degrees ** 2).mean()) < 24  # uniform
    assert 0.13 < (factors == 1.25).mean() < 0.19 and 0.13 < (factors == 0.75).mean() < 0.19
    assert 0.45 < flips.mean() < 0.55
    for one, other in itertools.combinations((factors, degrees, flips), 2):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.1
    assert [(info.size, info.augmentation) for info in DATASETS.values()] == [
        ((128, 128), (0.1, 5)), ((256, 256), (0.25, 40)), ((256, 192), (0.30, 40))]


def test_a_pose_is_drawn_with_a_colour_for_each_side_and_without_unsure_joints():
    people = dotted_people()
    keypoints = np.column_stack([people.joints[0], np.ones(16)])
    keypoints[MPII.joints.index("left knee"), 2] = 0.3
    drawn = Image.new("RGB", people.loaded.size, "white")
    data.draw_pose(drawn, keypoints, MPII, threshold=0.3)

    def colour(*names):  # amid these joints
        points = [people.joints[0][MPII.joints.index(name)] for name in names]
        return drawn.getpixel(tuple(np.mean(points, axis=0).round().astype(int).tolist()))

    assert colour("right ankle") == data.RIGHT and colour("left ankle") == data.LEFT
    assert colour("head top") == data.MIDDLE and colour("left knee") == (255, 255, 255)
    alone = Image.new("RGB", drawn.size, "white")
    two = np.zeros((16, 3))
    two[[10, 11]] = [(20, 20, 1), (80, 20, 1)]
    data.draw_pose(alone, two, MPII)
    assert alone.getpixel((50, 20)) == data.RIGHT  # the limb between right wrist and elbow
    assert alone.getpixel((50, 24)) == (255, 255, 255)


def test_a_heatmap_is_laid_over_the_pixels_that_it_is_about():
    heatmap = np.zeros((16, 12))
    heatmap[5, 9] = 1
    drawn = np.asarray(data.heat(Image.new("RGB", (48, 64)), heatmap))[..., 0].astype(int)
    y, x = np.argwhere(drawn == drawn.max()).mean(0)
    assert abs(x - 4 * 9) <= 2 and abs(y - 4 * 5) <= 2 and drawn.max() > 200
    assert drawn[4 * 5 - 8, 4 * 9] == drawn[4 * 5 + 8, 4 * 9] == 0


def test_pictures_are_put_side_by_side_row_by_row():
    tiles = [Image.new("RGB", (10, 6), (number, 0, 0)) for number in range(5)]
    sheet = data.grid(tiles, columns=3, gap=2)
    assert sheet.size == (3 * 12 + 2, 2 * 8 + 2)
    for n in range(5):
        assert sheet.getpixel((5 + 12 * (n % 3), 4 + 8 * (n // 3))) == (n, 0, 0)


@pytest.mark.parametrize("values, expected", [
    ([1, 4], [1, 2, 3, 4]), ([1, 1], [1, 2]), ([1, 200], [0, 50, 100, 150, 200]),
    ([1, 25], [0, 5, 10, 15, 20, 25]), ([0, 3.96, 0.994], [0, 1, 2, 3, 4]),
    ([0, 96.23], [0, 20, 40, 60, 80, 100]), ([0, 0.204], [0, 0.05, 0.1, 0.15, 0.2, 0.25]),
    ([-0.3, 0.4], [-0.4, -0.2, 0, 0.2, 0.4]), ([0.5, 0.5], [0.4, 0.6, 0.8, 1, 1.2, 1.4, 1.6])])
def test_axes_are_marked_with_round_numbers(values, expected):
    assert np.allclose(data.round_numbers(values), expected)


def test_axes_have_room_for_every_value():
    draw = ImageDraw.Draw(Image.new("RGB", (200, 100)))
    place = data.draw_axes(draw, (20, 10, 180, 90), [1, 5], [-1, 3], "x", "y")
    assert place(1, -1) == (20, 90) and place(5, 3) == (180, 10) and place(3, 1) == (100, 50)
    place = data.draw_axes(draw, (20, 10, 180, 90), [1], [2], "x", "y")  # a single point
    assert place(1, 2) == (20, 90)


def test_a_sheet_of_samples_shows_crops_with_joints_beside_their_targets():
    people = dotted_people()
    dataset = PoseDataset(people, (128, 128), MPII)
    sheet = np.asarray(data.show_samples(dataset, count=2)).astype(int)
    assert sheet.shape == (136, 4 * 132 + 4, 3)
    _, _, joints, visible = dataset[0]
    for joint, (x, y) in enumerate(joints.round().int().tolist()):
        pixel = sheet[4 + y, 4 + x]
        target = sheet[4 + y, 4 + 132 + x]
        if 4 < x < 124 and 4 < y < 124:
            assert (tuple(pixel) == data.joint_colour(MPII, joint)) == bool(visible[joint])
            assert (target.min() > 60) == bool(visible[joint])  # white to red there
    plain = data.show_samples(dataset, targets=False, count=2)
    assert plain.size == (2 * 132 + 4, 136)


def test_progress_is_shown_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(data.progress([5, 6, 7], "steps")) == [5, 6, 7]
    assert "2/3 steps" in capsys.readouterr().err


def test_progress_is_a_line_a_minute_in_a_file_of_logs(capsys, monkeypatch):
    now = [0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for _ in data.progress(range(20), "steps"):
        now[0] += 25
    assert capsys.readouterr().err.splitlines() == [
        "  3/20 steps", "  6/20 steps", "  9/20 steps", "  12/20 steps", "  15/20 steps",
        "  18/20 steps"]
    assert list(data.progress(range(3), "steps")) == [0, 1, 2] and not capsys.readouterr().err


def test_processes_that_write_one_file_do_not_share_its_unfinished_part(tmp_path, monkeypatch):
    with data.writing(tmp_path / "a.json") as mine:
        monkeypatch.setattr(os, "getpid", lambda: 1)
        with data.writing(tmp_path / "a.json") as other:
            other.write_text("[2]")
        mine.write_text("[1]")
    assert mine != other and data.read_json(tmp_path / "a.json") == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"),
                                   RuntimeError("[enforce fail at inline_container.cc:672] x")])
def test_a_file_is_written_whole_or_not_at_all(fault, tmp_path, monkeypatch):
    write_file(tmp_path / "new/file", "old")

    def full(number):
        raise fault
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="(No space left on device|inline_container.*).; what was"):
        with data.writing(tmp_path / "new/file") as part:
            part.write_text("new")
    assert (tmp_path / "new/file").read_text("utf-8") == "old"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


# ---------------------------------------------------------------------------- evaluate.py: MPII

def test_pckh_counts_errors_of_exactly_half_a_head(tmp_path):
    from scipy.io import savemat

    rng = np.random.default_rng(0)
    joints = rng.integers(50, 200, (40, 16, 2)).astype(float)
    sizes = rng.choice([10., 20.], 40)
    annotated = rng.random((40, 16)) < 0.9
    offset = rng.choice([0, 0.1, 0.11, 0.5, 0.51, 1], (40, 16, 1)) * np.where(
        rng.random((40, 16, 1)) < 0.5, [[[1, 0]]], [[[0, -1]]])
    predictions = joints + offset * sizes[:, None, None]
    scores = evaluate.pckh(predictions, joints, annotated, sizes)
    right = [[(np.abs(offset[n, j]).max() <= 0.5) for n in range(40) if annotated[n, j]]
             for j in range(16)]
    percent = [100 * np.mean(row) for row in right]
    for column in ("Shoulder", "Elbow", "Wrist", "Hip", "Knee", "Ankle"):
        sides = [percent[MPII.joints.index(f"{side} {column.lower()}")]
                 for side in ("left", "right")]
        assert scores[column] == pytest.approx(np.mean(sides)), column
    assert scores["Head"] == pytest.approx(percent[MPII.joints.index("head top")])
    assert scores["Mean"] == pytest.approx(100 * np.mean(sum(right[:6] + right[8:], [])))
    tenth = [np.abs(offset[n, j]).max() <= 0.1 for n in range(40) for j in range(16)
             if annotated[n, j] and j not in (6, 7)]
    assert scores["Mean@0.1"] == pytest.approx(100 * np.mean(tenth))
    nobody = evaluate.pckh(predictions, joints, annotated & (np.arange(16) > 0), sizes)
    assert np.isnan(nobody["Ankle"]) and not np.isnan(nobody["Mean"])

    # the same through files: gt_valid.mat when it is there, and a pred.mat made elsewhere
    write_file(tmp_path / "annot/valid.json", [
        {"image": "none.jpg", "center": [9, 9], "scale": size / 25, "joints": person.tolist(),
         "joints_vis": seen.astype(int).tolist()}
        for size, person, seen in zip(sizes, joints, annotated)])
    savemat(tmp_path / "pred.mat", {"preds": predictions})
    from_json = run("evaluate.py", "--results", tmp_path / "pred.mat", "--dataset", "mpii",
                    "--data", tmp_path, "--out", tmp_path / "json")
    assert "half a head size, 25 * scale of the JSON" in from_json
    corners = np.zeros((2, 2, 40))
    corners[1, 0] = sizes / 0.6
    savemat(tmp_path / "annot/gt_valid.mat", {
        "pos_gt_src": joints.transpose(1, 2, 0), "jnt_missing": 1 - annotated.T,
        "headboxes_src": corners})
    from_mat = run("evaluate.py", "--results", tmp_path / "pred.mat", "--dataset", "mpii", "--data",
                   tmp_path, "--out", tmp_path / "mat")
    assert "0.6 * head box diagonal in gt_valid.mat" in from_mat
    for folder in ("json", "mat"):
        written = data.read_json(tmp_path / folder / "metrics.json")
        assert list(written) == ["Head", "Shoulder", "Elbow", "Wrist", "Hip", "Knee", "Ankle",
                                 "Mean", "Mean@0.1"]
        assert written["Mean"] == pytest.approx(scores["Mean"], abs=1e-9)


@pytest.mark.parametrize("key, spoil, complaint", [
    ("headboxes_src", lambda array: array * 0, "the head box of person 0 is empty"),
    ("headboxes_src", lambda array: array * np.nan, "headboxes_src.*NaN"),
    ("jnt_missing", lambda array: array[:, 1:], r"jnt_missing.*\(16, 5\), not \(16, 6\)")])
def test_a_mat_file_that_cannot_be_scored_with_gets_a_sentence(
        key, spoil, complaint, mpii, tmp_path):
    from scipy.io import savemat

    people = data.read_mpii(mpii, "train")
    corners = np.zeros((2, 2, 6))
    corners[1] = 9
    write_file(tmp_path / "annot/valid.json", data.read_json(mpii / "annot/train.json"))
    mat = {"pos_gt_src": people.joints.transpose(1, 2, 0), "jnt_missing": 1 - people.annotated.T,
           "headboxes_src": corners}
    savemat(tmp_path / "annot/gt_valid.mat", mat | {key: spoil(mat[key])})
    with pytest.raises(InputError, match=f"gt_valid.mat.*{complaint}"):
        data.read_mpii(tmp_path, "valid")


def network_of(model, size, name="mpii", **info):
    """A Predictor around any function of images."""
    return evaluate.Predictor(model, evaluate.model_info(name, SKELETONS[name], size) | info)


def predicted(network, people, *protocol, **loading):
    return evaluate.predict(network, evaluate.crop_loader(network, people, **loading),
                            *protocol)[-1]


def scored(keypoints, people, network):
    return evaluate.score(evaluate.results_of(keypoints, people, network), people)


def seeing(images):
    """A stub network that knows which side is which: heatmaps (B,16,h,w) of the dots of
    dotted_people. In a mirrored picture the dot of the right wrist is the left wrist's, as it is
    for a network that looks at people. A picture that is upside down is refused."""
    heatmaps = torch.zeros(len(images), 16, images.shape[2] // 4, images.shape[3] // 4)
    for image, maps in zip(images, heatmaps):
        pixels = 255 * (image.permute(1, 2, 0).numpy() * (0.229, 0.224, 0.225)
                        + (0.485, 0.456, 0.406))
        quarters = [[np.argwhere((np.abs(pixels - quarter) < 3).all(2)).mean(0) for quarter in row]
                    for row in QUARTERS]
        assert quarters[0][0][0] < quarters[1][0][0], "upside down"
        mirrored = quarters[0][0][1] > quarters[0][1][1]
        for joint, colour in enumerate(COLOURS[:16]):
            place = np.argwhere((np.abs(pixels - colour) < 3).all(2))
            y, x = place.mean(0) / 4
            rows, columns = np.ogrid[:maps.shape[1], :maps.shape[2]]
            maps[partners(MPII)[joint] if mirrored else joint] = torch.from_numpy(
                np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 8))
    return [heatmaps]


@pytest.mark.parametrize("flip", [False, True])
def test_predictions_lie_on_the_joints_also_with_the_flip_test(flip):
    people = dotted_people()
    found = predicted(network_of(seeing, (128, 128)), people, flip)
    pixel = 200 * 1.25 / 32  # of the heatmap, in pixels of the picture
    assert np.abs(found[..., :2] - people.joints).max() < 0.6 * pixel
    # the mirrored map is a quarter of a pixel off, so that the mean of the two is a little lower
    assert found[..., 2].min() > 0.95


@pytest.mark.parametrize("flip, shift, offset", [*itertools.product([False, True], repeat=3)])
def test_prediction_is_the_published_protocol_step_by_step(flip, shift, offset):
    people = dotted_people()
    people.box = np.array([(90., 70, 300, 300), (101, 83.5, 30, 210)])
    widths = (300, 140)  # of the boxes in the shape of the crop, 96x64
    rng = np.random.default_rng(0)
    queue = [torch.from_numpy(rng.random((2, 16, 24, 16)).astype(np.float32)) for _ in range(4)]
    given = [maps.numpy() for maps in queue]
    network = network_of(lambda images: [queue.pop(0), queue.pop(0)], (96, 64))
    found = predicted(network, people, flip, shift, offset)
    heatmaps = given[1]  # the last stage's
    if flip:
        mirrored = given[3][..., ::-1][:, partners(MPII)].copy()
        if shift:
            mirrored[..., 1:] = mirrored[..., :-1].copy()
        heatmaps = (given[1] + mirrored) / 2
    for row, joint in itertools.product(range(2), range(16)):
        point = decode_slowly(heatmaps[row, joint], offset)
        zoom = widths[row] / 16  # pixels of the picture in one of the heatmap
        expected = people.box[row, :2] + (np.array(point) - (8, 12)) * zoom
        assert np.allclose(found[row, joint, :2], expected)
        assert found[row, joint, 2] == pytest.approx(heatmaps[row, joint].max())


def test_crops_are_mirrored_where_the_network_is():
    seen = []

    def stub(crops):
        seen.append(crops)
        return [torch.rand(len(crops), 16, 16, 16)]

    stub.model = None
    stub.device = torch.device("meta")  # any device but the CPU
    stub.size = (64, 64)
    stub.skeleton = MPII
    predicted(stub, dotted_people(), True)
    assert [crops.device.type for crops in seen] == ["meta"] * 2


def test_persons_of_one_picture_are_decoded_once(coco, monkeypatch):
    people = data.read_coco(coco, "val2017")
    expected = [data.crop(people.picture(row), affine(
        people.box[row], (64, 48)), (64, 48)) for row in range(6)]
    opened = []
    open_picture = data.open_picture
    monkeypatch.setattr(data, "open_picture",
                        lambda path, size: opened.append(path.name) or open_picture(path))
    dataset = PoseDataset(people, (64, 48), COCO)
    assert all(np.array_equal(dataset[row][1], expected[row]) for row in range(6))
    assert opened == ["0.jpg", "1.jpg", "2.jpg"]
    assert np.array_equal(dataset[1][1], expected[1]) and len(opened) == 4


def test_a_network_sees_pictures_as_its_file_says():
    seen = []
    crops = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    for info in ({}, {"colour": "BGR"}, {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}):
        network = network_of(lambda images: seen.append(images) or [torch.zeros(2, 16, 16, 16)],
                             (64, 64), **info)
        network(crops)
    picture = crops.permute(0, 3, 1, 2) / 255
    values = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    assert torch.allclose(seen[0], (picture - values[0]) / values[1], atol=1e-6)
    assert torch.allclose(seen[1], (picture.flip(1) - values[0]) / values[1], atol=1e-6)
    values = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])[..., None, None]
    assert torch.allclose(seen[2], (picture - values[0]) / values[1], atol=1e-6)


def test_auto_takes_cuda_or_the_cpu_and_leaves_mps_alone(monkeypatch):
    for cuda, mps, auto in ((True, False, "cuda"), (True, True, "cuda"), (False, True, "cpu"),
                            (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        assert evaluate.choose_device("auto") == auto and evaluate.choose_device("cpu") == "cpu"
        for name, there in (("cuda", cuda), ("mps", mps)):
            if there:
                assert evaluate.choose_device(name) == name
            else:
                with pytest.raises(InputError, match=f"--device {name}: .* no such device"):
                    evaluate.choose_device(name)


def test_channels_are_last_in_the_memory_of_cpus_and_gpus_only(weights):
    crops = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    assert data.normalise(crops).is_contiguous(memory_format=torch.channels_last)
    # any other device stands in for a Mac's
    assert data.normalise(crops.to("meta")).is_contiguous()
    formats = {name: data.memory_format(torch.device(name)) for name in ("cuda", "mps")}
    assert formats == {"cuda": torch.channels_last, "mps": torch.contiguous_format}
    model = evaluate.open_predictor(weights[0]).model
    assert model.stem.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_evaluation_uses_tf32_as_the_training_did(mpii, tmp_path):
    for precision, allowed in (("float32", False), ("tf32", True), ("bfloat16", True)):
        torch.backends.cudnn.allow_tf32 = not allowed
        evaluate.set_precision(precision)
        assert torch.backends.cudnn.allow_tf32 == allowed, precision
    for precision, allowed in (("float32", False), ("tf32", True)):  # and training sets it
        torch.backends.cudnn.allow_tf32 = not allowed
        run("train.py", *arguments(mpii, tmp_path / precision, "--epochs", 1, "--precision",
                                   precision))
        assert torch.backends.cudnn.allow_tf32 == allowed
        info = lapx.load_file(tmp_path / precision / "last.pt")["info"]
        assert info["precision"] == precision


@pytest.mark.parametrize("size", [(128, 128), (128, 96), (130, 94)])
def test_perfect_heatmaps_give_back_the_joints(size, synthetic):
    people = data.read_mpii(synthetic, "valid").rows(slice(0, 24))
    dataset = PoseDataset(people, size, MPII)
    queue = []
    inside = np.zeros((24, 16), bool)  # the heatmap
    for row in range(24):
        _, _, joints, visible = dataset[row]
        h, w = data.heatmap_size(*size)
        inside[row] = ((joints >= 0) & (joints < torch.tensor([4 * w - 2, 4 * h - 2]))).all(1)
        queue.append(data.gaussian_targets(joints[None], visible[None], size)[0])
    network = network_of(lambda images: [queue.pop(0)], size)
    found = predicted(network, people, False, batch_size=1)
    pixels = data.fitted_width(people.box, size) / size[1]  # of the picture in one of the crop
    error = np.abs(found[..., :2] - people.joints).max(2)[people.annotated & inside]
    assert error.max() < 2.6 * pixels.max()  # half a heatmap pixel, and the quarter offset
    assert found[~people.annotated, 2].max() == 0


def test_predictions_do_not_depend_on_batches_and_processes(weights, mpii):
    network = evaluate.open_predictor(weights[0])
    people = data.read_mpii(mpii, "valid")
    results = [predicted(network, people, batch_size=size, workers=workers)
               for size, workers in ((1, 0), (4, 2), (6, 1))]
    assert np.allclose(results[0], results[1], atol=1e-4)
    assert np.allclose(results[0], results[2], atol=1e-4)


def test_a_network_predicts_as_in_evaluation_even_amid_training(weights):
    network = evaluate.open_predictor(weights[0])
    expected = predicted(network, dotted_people())
    network.model.train()
    assert np.array_equal(predicted(network, dotted_people()), expected)


def test_heatmaps_of_another_stride_or_number_of_joints_are_refused(mpii):
    network = network_of(lambda images: [torch.zeros(len(images), 16, 8, 8)], (64, 64))
    with pytest.raises(InputError, match=r"\(16, 8, 8\)\], not heatmaps \(16, 16, 16\)"):
        predicted(network, data.read_mpii(mpii, "valid"))


def out_of_gpu_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


@pytest.mark.parametrize("fault, sentence", [
    (out_of_gpu_memory, "a smaller --batch-size or --input"),
    (lambda: torch.empty(2**50), "a smaller --batch-size or --input"),
    (lambda: np.empty(2**50), "a smaller --batch-size or --input"),
    (lambda: bytes(2**60), "the memory does not suffice"),
    (lambda: nn.BatchNorm1d(3)(torch.ones(1, 3)), "larger --batch-size")])
def test_faults_of_memory_and_batches_get_a_sentence(fault, sentence):
    with pytest.raises(SystemExit, match=sentence):
        data.run(fault)


@pytest.mark.parametrize("fault, workers", [
    (ValueError("out of memory"), 0), (ValueError("out of memory"), 1), (KeyError("x"), 1),
    (RuntimeError("the DataLoader worker of mine"), 0), (MemoryError("of my own"), 1),
    (RuntimeError("more than 1 value per channel"), 0)])
def test_faults_of_the_code_keep_their_traceback(fault, workers, mpii, tmp_path, monkeypatch):
    def crop(picture, matrix, size):
        raise fault

    monkeypatch.setattr(data, "crop", crop)
    started = Started(tmp_path / "log.txt", ["train.py", *arguments(
        mpii, tmp_path / "run", "--workers", workers)])
    assert started.end() == 1
    assert "in crop\n    raise fault" in started.printed()
    assert f"{type(fault).__name__}: {fault}\n" in started.printed()


def test_evaluating_mpii_writes_metrics_and_predictions(weights, mpii, tmp_path, monkeypatch):
    text = run("evaluate.py", "--weights", weights[0], "--dataset", "mpii", "--data", mpii,
               "--both", "--out", tmp_path)
    assert ("mpii valid, 4 persons, boxes annotated (gt),\ninput 64x64, flip test with shift"
            in text)
    assert max(map(len, text.splitlines())) <= 80 or "wrote" in text.splitlines()[-1]
    assert "no flip test" in text and "Mean@0.1" in text
    again = run("evaluate.py", "--results", tmp_path / "pred.mat", "--data", mpii,
                "--out", tmp_path / "b")
    assert data.read_json(tmp_path / "metrics.json") == data.read_json(tmp_path / "b/metrics.json")
    assert text.splitlines()[-3] in again  # the numbers
    without = data.read_json(tmp_path / "metrics_no_flip.json")
    assert [f"{value:8.2f}" for value in without.values()] == [
        f"{value:>8}" for value in text.split("Mean@0.1\n")[1].split("\n")[0].split()]
    people = data.read_mpii(mpii, "valid")
    found = [predicted(evaluate.open_predictor(weights[0]), people, flip) for flip in (False, True)]
    preds = data.read_mat(tmp_path / "pred.mat", {"preds": (4, 16, 2)})["preds"]
    assert np.allclose(preds, found[1][..., :2] + 1)  # with the flip test
    monkeypatch.setattr(evaluate, "score", lambda preds, people: {"Mean": (preds - 1).sum()})
    run("evaluate.py", "--weights", weights[0], "--data", mpii, "--both", "--out", tmp_path)
    for flip, name in enumerate(("metrics_no_flip.json", "metrics.json")):
        assert data.read_json(tmp_path / name)["Mean"] == pytest.approx(found[flip][..., :2].sum())


@pytest.mark.parametrize("flags, expected", [
    ([], (True, True, True)), (["--no-flip"], (False, True, True)),
    (["--no-shift"], (True, False, True)), (["--no-offset"], (True, True, False))])
def test_the_flags_of_the_protocol_have_their_effect_and_are_told(
        flags, expected, weights, mpii, tmp_path):
    from scipy.io import loadmat

    text = run("evaluate.py", "--weights", weights[0], "--data", mpii, "--out", tmp_path, *flags)
    people = data.read_mpii(mpii, "valid")
    network = evaluate.open_predictor(weights[0])
    written = loadmat(str(tmp_path / "pred.mat"))["preds"]
    for protocol in itertools.product([True, False], repeat=3):
        found = predicted(network, people, *protocol)[..., :2] + 1  # from 1, as MPII's are
        same = protocol == expected or not protocol[0] and not expected[0] and protocol[2]
        assert np.allclose(written, found, atol=1e-3) == same, protocol
    told = {"--no-flip": "no flip test\n", "--no-shift": "flip test without shift\n",
            "--no-offset": "with shift, no quarter offset\n"}
    assert told.get(*flags or [""], "with shift\n") in text


def test_bgr_networks_see_blue_first(weights, mpii, tmp_path):
    picture = data.open_picture(mpii / "images/0.jpg")
    picture.save(tmp_path / "a.png")
    Image.fromarray(np.asarray(picture)[..., ::-1]).save(tmp_path / "b.png")
    for name, flags in (("a", ["--bgr"]), ("a", []), ("b", [])):
        run("evaluate.py", "--weights", weights[0], "--image", tmp_path / f"{name}.png", "--out",
            tmp_path / f"{name}{len(flags)}", *flags)
    a1, a0, b0 = (data.read_json(tmp_path / name)["persons"] for name in (
        "a1/a_pose.json", "a0/a_pose.json", "b0/b_pose.json"))
    assert a1 == b0 != a0


# ---------------------------------------------------------------------------- evaluate.py: COCO

def pycocotools_ap(truth, results):
    """The ten numbers by pycocotools, of parsed files."""
    from pycocotools.coco import COCO as Reference
    from pycocotools.cocoeval import COCOeval

    reference = Reference()
    reference.dataset = copy.deepcopy(truth)
    reference.createIndex()
    judge = COCOeval(reference, reference.loadRes(copy.deepcopy(results)), "keypoints")
    judge.evaluate(), judge.accumulate(), judge.summarize()
    return judge.stats


def random_coco(rng, kind):
    """A COCO ground truth and results with crowds, people without joints, ties and false alarms."""
    images = [{"id": int(number)} for number in rng.permutation(30)[:rng.integers(1, 10)]]
    annotations = []
    results = []
    for image in images:
        people = []
        for _ in range(rng.integers(0, 5)):
            box = np.concatenate([rng.uniform(0, 400, 2), rng.uniform(10, 200, 2)])
            keypoints = np.column_stack([box[:2] + rng.random((17, 2)) * box[2:],
                                         rng.integers(0, 3, 17)])
            keypoints = keypoints.round() if kind == "whole pixels" else keypoints
            keypoints *= rng.random() < 0.85
            area = float(rng.choice([box[2] * box[3] * 0.6, 1024, 9216], p=[0.8, 0.1, 0.1]))
            for _ in range(rng.integers(1, 3)):  # now and then twice the same
                annotations.append({
                    "id": len(annotations) + (kind != "id 0"), "image_id": image["id"],
                    "category_id": 1, "iscrowd": int(rng.random() < 0.1), "bbox": box.tolist(),
                    "area": area, "keypoints": keypoints.ravel().tolist(),
                    "num_keypoints": int((keypoints[:, 2] > 0).sum())})
            people.append((keypoints, area))
        for _ in range(rng.integers(0, 30)):
            found = np.column_stack([rng.uniform(0, 500, (17, 2)), rng.random(17)])
            if people and rng.random() < 0.7:
                keypoints, area = people[rng.integers(len(people))]
                noise = rng.choice([0, 0.02, 0.1, 0.3]) * np.sqrt(area)
                found[:, :2] = keypoints[:, :2] + noise * rng.standard_normal((17, 2))
            score = rng.integers(0, 4) / 4 if kind == "ties" else rng.random()
            results.append({"image_id": image["id"], "category_id": 1, "score": float(score),
                            "keypoints": found.ravel().tolist()})
            if kind == "boxes that are empty":
                results[-1]["bbox"] = []
            if kind == "boxes":  # now and then of an area where medium begins or ends
                sides = [rng.choice([32, 96])] * 2 if rng.random() < 0.2 else rng.uniform(5, 200, 2)
                results[-1]["bbox"] = [0, 0, *map(float, sides)]
    if kind == "an id twice" and len(annotations) > 3:
        annotations[1]["id"] = annotations[0]["id"]
    for item in annotations:
        if kind == "num_keypoints" and rng.random() < 0.3:  # contradicts the flags
            item["num_keypoints"] = 17 * (item["num_keypoints"] == 0)
        if kind == "pictures that are not listed" and rng.random() < 0.2:
            item["image_id"] = 99
    for item in [*annotations, *results]:
        item["category_id"] = int(rng.choice([1, 4, 5])) if kind == "categories" else 1
    return {"images": images, "annotations": annotations, "info": {},
            "categories": [{"id": id, "name": "a", "keypoints": []} for id in (5, 1, 4)]}, results


@pytest.mark.parametrize("kind", [
    "plain", "whole pixels", "ties", "boxes", "id 0", "an id twice", "categories", "num_keypoints",
    "pictures that are not listed", "boxes that are empty"])
def test_average_precision_equals_pycocotools(kind, capsys, tmp_path):
    rng = np.random.default_rng(zlib.crc32(kind.encode()))
    for _ in range(12):
        truth, results = random_coco(rng, kind)
        if not results:
            continue
        file = {**truth, "images": [{**image, "width": 600, "height": 600, "file_name": "x"}
                                    for image in truth["images"]]}
        write_file(tmp_path / "truth.json", file)
        ours = evaluate.coco_ap(data.read_coco_file(tmp_path / "truth.json", COCO),
                                results, "results")
        assert list(ours) == "AP AP50 AP75 APM APL AR AR50 AR75 ARM ARL".split()
        assert np.abs(pycocotools_ap(truth, results) - list(ours.values())).max() < 1e-9


def test_a_detection_finds_the_most_similar_free_person_and_others_only_for_want_of_one():
    nobody = [False, False, False]
    for similarity, ignored, crowd, expected in (
            ([[0.5, 0.49, 0]], nobody, nobody, [0]),  # exactly the threshold is enough
            ([[0.49, 0.49, 0]], nobody, nobody, [-1]),
            ([[0.6, 0.8, 0.7], [0.6, 0.8, 0.7], [0.6, 0.8, 0.7], [0.6, 0.8, 0.7]], nobody, nobody,
             [1, 2, 0, -1]),
            ([[0.6, 0.6, 0.5]], nobody, nobody, [1]),  # of equals the later one
            ([[0.6, 0.9, 0]], [False, True, False], nobody, [0]),  # ignored ones come last
            ([[0.4, 0.9, 0], [0.4, 0.9, 0]], [False, True, False], nobody, [1, -1]),
            ([[0.4, 0.9, 0], [0.4, 0.9, 0]], [False, True, False], [False, True, False], [1, 1])):
        assert evaluate.match(similarity, ignored, crowd, 0.5) == expected


def some_persons(image_ids, widths, box_scores):
    N = len(image_ids)
    return data.People(
        folder=Path(), files=np.array([""] * N), image_id=np.array(image_ids),
        box=np.array([[0, 0, width, 0] for width in widths]), joints=None, annotated=None,
        box_score=np.array(box_scores))


def test_a_persons_score_is_the_mean_of_joint_scores_above_a_fifth_times_the_boxs():
    people = some_persons([5, 4, 5], [100] * 3, [1, 0.5, 0.9])
    people.category_id = np.array([3, 3, 4])
    keypoints = np.random.default_rng(0).uniform(0, 1000, (3, 17, 3))
    keypoints[..., 2] = [[0.1] * 15 + [0.8, 0.4], [0.2] * 17, [0.4] * 17]
    results = evaluate.coco_results(keypoints, people, network_of(None, (256, 192), "coco"))
    assert [(result["image_id"], round(result["score"], 9), result["category_id"])
            for result in results] == [(5, 0.6, 3), (4, 0, 3), (5, 0.36, 4)]
    assert results[0]["keypoints"] == keypoints[0].flatten().tolist()  # x, y, score


@pytest.mark.parametrize("similarity, kept", [(0.91, [1]), (0.89, [1, 0])])
@pytest.mark.parametrize("name", ["coco", "mpii"])
def test_of_persons_of_an_oks_above_nine_tenths_the_better_stays(similarity, kept, name):
    people = some_persons([5, 5, 6], [100, 180, 180], [0.8, 0.9, 0.9])
    # the mean area of the two padded boxes, which have the shape of the input
    area = (100 ** 2 + 180 ** 2) / 2 * 256 / 192
    sigmas = np.array(SKELETONS[name].sigmas or [0.07] * 16)

    def oks(distance):
        return np.mean(np.exp(-distance ** 2 / (2 * sigmas) ** 2 / (2 * area)))

    near, far = 0, 100  # pixels; find the distance of that similarity
    for _ in range(60):
        middle = (near + far) / 2
        near, far = (middle, far) if oks(middle) > similarity else (near, middle)
    keypoints = np.random.default_rng(0).uniform(100, 900, (3, len(sigmas), 3))
    keypoints[1:, :, :2] = keypoints[0, :, :2] + (0.6 * near, 0.8 * near)
    keypoints[..., 2] = 0.5
    keypoints[0, 0, 2] = 0  # is not looked at here
    _, rows = evaluate.rescore(keypoints, people, network_of(None, (256, 192), name))
    assert rows == kept + [2]  # the person on another picture stays
    people.category_id = np.array([1, 2, 1])
    _, rows = evaluate.rescore(keypoints, people, network_of(None, (256, 192), name))
    assert sorted(rows) == [0, 1, 2]  # as do those of another category


def test_evaluating_coco_writes_what_the_server_takes(weights, coco, tmp_path, monkeypatch):
    from pycocotools.coco import COCO as Reference

    rescored = []
    rescore = evaluate.rescore
    monkeypatch.setattr(evaluate, "rescore",
                        lambda *arguments: rescored.append(1) or rescore(*arguments))
    text = run("evaluate.py", "--weights", weights[1], "--dataset", "coco", "--data", coco,
               "--boxes", coco / "detections.json", "--out", tmp_path)
    assert len(rescored) == 1  # once for the file and the score
    assert f"boxes of {coco / 'detections.json'}" in text
    metrics = data.read_json(tmp_path / "metrics.json")
    assert list(metrics) == ["AP", "AP50", "AP75", "APM", "APL", "AR", "AR50", "AR75", "ARM", "ARL"]
    truth = coco / "annotations/person_keypoints_val2017.json"
    assert len(Reference(str(truth)).loadRes(str(tmp_path / "results.json")).anns) == 6
    run("evaluate.py", "--results", tmp_path / "results.json", "--annotations", truth,
        "--out", tmp_path / "b")
    assert data.read_json(tmp_path / "b/metrics.json") == metrics
    text = run("evaluate.py", "--weights", weights[1], "--dataset", "coco", "--data", coco,
               "--split", "test2017", "--boxes", coco / "detections.json", "--out", tmp_path / "c")
    assert "coco test2017: there is no score, as nobody has a labelled joint" in text
    assert (tmp_path / "c/results.json").exists()
    assert not (tmp_path / "c/metrics.json").exists()


def test_a_network_of_own_joints_is_scored_without_naming_them_again(coco, tmp_path):
    own = lapx.Skeleton(("nose", "left eye", "right eye"), ((1, 2),), ((0, 1), (0, 2)), (0.05,) * 3)
    config = replace(TINY, num_joints=3)
    torch.save({"config": asdict(config), "model": LAPX(config).state_dict(),
                "info": evaluate.model_info("coco", own, (64, 64))}, tmp_path / "own.pt")
    content = data.read_json(coco / "annotations/person_keypoints_val2017.json")
    for annotation in content["annotations"]:
        annotation["keypoints"] = annotation["keypoints"][:9]
    content["categories"][0]["keypoints"] = list(own.joints)
    write_file(tmp_path / "annotations/person_keypoints_val2017.json", content)
    (tmp_path / "images").symlink_to(coco / "images")
    text = run("evaluate.py", "--weights", tmp_path / "own.pt", "--data", tmp_path, "--out",
               tmp_path / "out")
    assert "coco val2017" in text and "AP" in text


# ---------------------------------------------------------------------------- evaluate.py: pictures

def test_own_pictures_are_upright_and_in_their_own_pixels(weights, tmp_path):
    picture = figure(9, 0)[1]
    picture.save(tmp_path / "upright.png")
    lying = picture.transpose(Image.Transpose.ROTATE_90)  # as a phone stores it, with a note
    exif = Image.Exif()
    exif[0x0112] = 6
    lying.save(tmp_path / "phone.png", exif=exif)
    write_file(tmp_path / "broken.jpg", "x")
    code, text = run("evaluate.py", "--weights", weights[0], "--image", tmp_path,
                     "--box", 20, 10, 100, 120, "--threshold", -1, "--heatmaps",
                     "--attention", "left wrist", "--out", tmp_path / "out", check=False)
    assert code == 1 and "broken.jpg can't be read" in text
    assert "1 of 3 pictures could not be done" in text
    upright, phone = (data.read_json(tmp_path / f"out/{name}_pose.json")["persons"]
                      for name in ("upright", "phone"))
    assert upright == phone and upright[0]["box"] == [20, 10, 100, 120]
    assert list(upright[0]["joints"]) == list(MPII.joints)
    drawn = Image.open(tmp_path / "out/phone_pose.png")
    assert drawn.size == picture.size and drawn.tobytes() != picture.tobytes()
    assert (tmp_path / "out/phone_heatmaps.png").exists()
    assert (tmp_path / "out/phone_attention.png").exists()


def test_predict_picture_is_what_the_command_does(weights, tmp_path):
    picture = figure(9, 1)[1]
    picture.save(tmp_path / "p.png")
    run("evaluate.py", "--weights", weights[0], "--image", tmp_path / "p.png", "--box", 5, 5, 90,
        150, "--box", 60, 5, 90, 150, "--out", tmp_path / "out")
    written = data.read_json(tmp_path / "out/p_pose.json")["persons"]
    network = evaluate.open_predictor(weights[0])
    boxes = [[5, 5, 90, 150], [60, 5, 90, 150]]
    found = evaluate.predict_picture(network, picture, boxes)
    assert found == written
    for flag, name in (("--no-flip", "flip"), ("--no-shift", "shift"),
                       ("--no-offset", "quarter_offset")):
        run("evaluate.py", "--weights", weights[0], "--image", tmp_path / "p.png", "--box", 5, 5,
            90, 150, "--box", 60, 5, 90, 150, "--out", tmp_path / name, flag)
        other = data.read_json(tmp_path / name / "p_pose.json")["persons"]
        assert other == evaluate.predict_picture(network, picture, boxes, **{name: False}) != found


def test_a_picture_without_boxes_is_one_box(weights):
    network = evaluate.open_predictor(weights[0])
    picture = figure(9, 1)[1]
    assert picture.width != picture.height
    whole, = evaluate.predict_picture(network, picture)
    assert whole["box"] == [0, 0, picture.width, picture.height]
    assert [whole] == evaluate.predict_picture(network, picture, [whole["box"]])


def test_persons_above_the_threshold_are_drawn_the_best_one_last(weights, tmp_path, monkeypatch):
    figure(9, 1)[1].save(tmp_path / "7.png")
    persons = [{"box": [0, 0, 50, 50], "score": score,
                "joints": {name: [1.0, 2.0, score] for name in MPII.joints}}
               for score in (0.9, 0.6, 0.31, 0.3, 0.1)]
    monkeypatch.setattr(evaluate, "predict_picture", lambda *given, **protocol: persons)
    drawn = []
    monkeypatch.setattr(data, "draw_pose", lambda picture, keypoints, skeleton, threshold=0: (
        drawn.append((keypoints[0, 2], threshold))))
    text = run("evaluate.py", "--weights", weights[0], "--image", tmp_path / "7.png", "--threshold",
               0.3, "--out", tmp_path / "out")
    assert drawn[-3:] == [(0.31, 0.3), (0.6, 0.3), (0.9, 0.3)]
    assert "persons: 5, drawn: 3 (scores above 0.3)" in text
    assert data.read_json(tmp_path / "out/7_pose.json")["persons"] == persons


def watched_tiles(monkeypatch):
    """The pictures, maps and captions that are drawn as tiles of a sheet from now on."""
    tiles = []
    heat = data.heat
    monkeypatch.setattr(data, "heat", lambda picture, heatmap, caption: tiles.append(
        (picture, np.asarray(heatmap), caption)) or heat(picture, heatmap, caption))
    return tiles


def test_heatmaps_are_drawn_stage_by_stage_and_joint_by_joint_with_their_peaks(monkeypatch):
    stages = [torch.zeros(1, 16, 16, 24) for _ in range(2)]
    for stage, heatmaps in enumerate(stages):
        for joint in range(16):
            heatmaps[0, joint, 5 + stage, 2 + joint] = 0.5 + joint / 100
    tiles = watched_tiles(monkeypatch)
    network = network_of(lambda images: stages, (64, 96))
    sheet = evaluate.draw_heatmaps(network, figure(9, 1)[1], {"box": [10, 20, 60, 40]})
    assert len(tiles) == 32 and sheet.size == (8 * 196 + 4, 4 * 132 + 4)
    for number, (picture, heatmap, caption) in enumerate(tiles):
        stage, joint = divmod(number, 16)
        expected = stages[stage][0, joint] / (0.5 + joint / 100)
        assert picture.size == (192, 128) and np.allclose(heatmap, expected)
        assert caption == f"stage {stage + 1}: {MPII.joints[joint]}\npeak {0.5 + joint / 100:.2f}"
        row, column = divmod(number, 8)
        tile = np.asarray(sheet)[4 + 132 * row:132 * (row + 1), 4 + 196 * column:196 * (column + 1)]
        y, x = np.argwhere((tile == data.MIDDLE).all(2)).mean(0)  # the mark of the peak
        assert abs(x - 8 * (2 + joint)) < 1 and abs(y - 8 * (5 + stage)) < 1


def test_attention_is_drawn_from_the_cell_that_the_joint_lies_in(monkeypatch):
    model = scrambled(TINY)
    looks = torch.rand(1, 6, 6).softmax(2)  # of 2 x 3 cells
    monkeypatch.setattr(lapx.NonLocal, "attention_map", lambda module, x: looks)
    tiles = watched_tiles(monkeypatch)
    network = network_of(model, (128, 192))
    picture = Image.new("RGB", (192, 128))
    for row, column in itertools.product(range(2), range(3)):
        joint = [64 * column + 10, 64 * row + 40, 1.0]
        # a box that becomes the crop: a quarter of margin is added
        box = [(1 - 1 / 1.25) * 96, (1 - 1 / 1.25) * 64, 192 / 1.25, 128 / 1.25]
        sheet = evaluate.draw_attention(network, picture, {"box": box, "joints": {"pelvis": joint}},
                                        "pelvis")
        (seen, spread, caption), = tiles
        tiles.clear()
        expected = looks[0, 3 * row + column].reshape(2, 3)
        expected = 0.6 * (expected - expected.min()) / (expected.max() - expected.min())
        assert seen.size == (384, 256) and spread.shape == (256, 384)
        assert np.allclose(spread[64::128, 64::128], expected)
        assert caption.startswith("stage 1, gamma") and "from the pelvis's cell" in caption
        frame = np.argwhere((np.asarray(sheet)[4:-4, 4:-4] == data.MIDDLE).all(2))
        assert frame.min(0).tolist() == [128 * row, 128 * column]


def test_results_do_not_replace_pictures_nor_each_other(weights, tmp_path):
    for name in ("p.png", "p_pose.png", "other/p.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        figure(9, 0)[1].save(tmp_path / name)
    before = (tmp_path / "p_pose.png").read_bytes()
    for out, places in ((".", ["."]), ("out", [".", "other"])):
        code, text = run("evaluate.py", "--weights", weights[0], "--out", tmp_path / out,
                         "--image", *(tmp_path / place for place in places), check=False)
        assert code == 1 and "results are written to --out by the picture's name" in text
    assert (tmp_path / "p_pose.png").read_bytes() == before and not (tmp_path / "out").exists()


def test_a_picture_without_a_detection_is_no_error(weights, mpii, tmp_path):
    write_file(tmp_path / "boxes.json", 
        [{"file_name": "1.jpg", "bbox": [10, 10, 90, 120], "score": 0.5}])
    text = run("evaluate.py", "--weights", weights[0], "--image", mpii / "images/0.jpg",
               mpii / "images/1.jpg", "--boxes", tmp_path / "boxes.json", "--out", tmp_path)
    assert "0.jpg: persons: 0, drawn: 0" in text and "1.jpg: persons: 1," in text
    person, = data.read_json(tmp_path / "1_pose.json")["persons"]
    expected, = evaluate.predict_picture(evaluate.open_predictor(weights[0]), data.open_picture(
        mpii / "images/1.jpg"), [[10, 10, 90, 120]])
    assert person["joints"] == expected["joints"]
    assert person["score"] == pytest.approx(0.5 * expected["score"])  # times the box's
    shutil.copy(mpii / "images/1.jpg", tmp_path / "0012.jpg")  # as COCO names its pictures
    box = {"image_id": 12, "bbox": [10, 10, 90, 120], "score": 1}
    write_file(tmp_path / "ids.json", [box])
    run("evaluate.py", "--weights", weights[0], "--image", tmp_path / "0012.jpg", "--boxes",
        tmp_path / "ids.json", "--out", tmp_path / "ids")
    person, = data.read_json(tmp_path / "ids/0012_pose.json")["persons"]
    assert person["joints"] == expected["joints"]
    code, text = run("evaluate.py", "--weights", weights[0], "--image", mpii / "images/0.jpg",
                     "--boxes", tmp_path / "boxes.json", "--out", tmp_path, check=False)
    assert code == 1 and "boxes.json: of 1 boxes left out: 1 of no picture here" in text


@pytest.mark.parametrize("name, dataset, size", [
    ("LAPX_COCO_384_288.tar", "coco", (384, 288)), ("LAPX_COCO_256_192.tar", "coco", (256, 192)),
    ("epoch_120_150.pt", "mpii", (256, 256))])
def test_bare_weights_are_taken_for_what_their_name_and_shapes_say(
        name, dataset, size, tmp_path, capsys):
    config = replace(TINY, num_joints=len(SKELETONS[dataset].joints))
    torch.save({"state_dict": LAPX(config).state_dict()}, tmp_path / name)
    network = evaluate.open_predictor(tmp_path / name)
    assert network.size == size and network.skeleton == SKELETONS[dataset]
    assert network.info["colour"] == "RGB"
    assert f"taken for {dataset}'s and {size[0]}x{size[1]}" in capsys.readouterr().out


def test_bare_weights_of_other_joints_need_to_be_told_which(tmp_path):
    torch.save(LAPX(replace(TINY, num_joints=5)).state_dict(), tmp_path / "five.pt")
    with pytest.raises(InputError, match="five.pt must be a network that tells .* --skeleton NAME"):
        evaluate.open_predictor(tmp_path / "five.pt")


@pytest.mark.parametrize("change", [
    {"mean": [0.5, 0.5]}, {"std": 1}, {"colour": "CMYK"}, {"input": [64]}, {"dataset": "lsp"},
    {"skeleton": vars(MPII) | {"limbs": ((0, 16),)}}, {"skeleton": vars(MPII) | {"limbs": (0, 1)}}])
def test_a_network_whose_facts_do_not_fit_together_gets_a_sentence(change, weights, tmp_path):
    content = lapx.load_file(weights[0])
    torch.save({**content, "info": content["info"] | change}, tmp_path / "odd.pt")
    with pytest.raises(InputError, match="odd.pt must be a network that tells its joints, input"):
        evaluate.open_predictor(tmp_path / "odd.pt")


def test_every_stage_is_decoded_in_one_pass():
    people = dotted_people()
    stages = [torch.rand(16, 16, 16), torch.rand(16, 16, 16)]  # (K,h,w)
    calls = []

    def network(images):
        calls.append(len(images))
        return [heatmaps.expand(len(images), -1, -1, -1) for heatmaps in stages]

    predictor = network_of(network, (64, 64))
    loader = evaluate.crop_loader(predictor, people, batch_size=2)
    found = evaluate.predict(predictor, loader, flip=False)
    assert found.shape == (2, 2, 16, 3) and calls == [2]
    for heatmaps, keypoints in zip(stages, found):
        alone = predicted(network_of(lambda images: [heatmaps.expand(len(images), -1, -1, -1)],
                                     (64, 64)), people, False)
        assert np.array_equal(keypoints, alone)


def test_every_stage_is_scored_on_request(weights, mpii, tmp_path):
    torch.manual_seed(1)
    two = LAPX(TINY)
    info = evaluate.model_info("mpii", MPII, (64, 64))
    torch.save({"config": asdict(TINY), "model": two.state_dict(), "info": info},
               tmp_path / "two.pt")
    flags = ("--data", mpii, "--workers", 0, "--no-flip", "--out", tmp_path)
    text = run("evaluate.py", "--weights", tmp_path / "two.pt", "--stages", *flags)
    rows = re.findall(r"^ +([12]) +(.*)$", text, re.M)
    assert "stage   Head  Shoulder" in text and [number for number, _ in rows] == ["1", "2"]
    written = data.read_json(tmp_path / "metrics.json")
    first, last = written.pop("stages")
    assert written == last != first
    assert rows[1][1].split()[-2] == f"{last['Mean']:.2f}"
    run("evaluate.py", "--weights", tmp_path / "two.pt", *flags)
    assert data.read_json(tmp_path / "metrics.json") == last
    status, text = run("evaluate.py", "--weights", weights[0], "--stages", *flags, check=False)
    assert status == 1 and "gives the heatmaps of one stage: leave out --stages" in text


def test_the_worst_people_are_shown_beside_the_truth(monkeypatch, mpii):
    people = data.read_mpii(mpii, "valid")
    keypoints = np.dstack([people.joints, np.ones((4, 16))])
    keypoints[2, :3, 0] += 1000  # three joints far off
    keypoints[1, :9, 0] += 1000
    sheets = []
    monkeypatch.setattr(data, "show_samples", lambda *given, **named: sheets.append((given, named)))
    evaluate.draw_worst(keypoints, people, network_of(None, (64, 64)), count=2)
    ((samples,), named), = sheets
    assert samples.people.files.tolist() == [people.files[row] for row in (1, 1, 2, 2)]
    for shown, true, row in zip(samples.people.joints[::2], samples.people.joints[1::2], (1, 2)):
        assert np.array_equal(shown, keypoints[row, :, :2])
        assert np.array_equal(true, people.joints[row])
    first, truth, second, _ = named["captions"]
    assert first.startswith(f"{people.files[1]}\nPCKh ") and truth == "the truth"
    own = [evaluate.pckh(keypoints[[row], :, :2], people.joints[[row]], people.annotated[[row]],
                         people.head_size[[row]])["Mean"] for row in (1, 2)]
    assert [float(text.split()[-1]) for text in (first, second)] == [
        float(f"{value:.3g}") for value in own] and own[0] < own[1] < 100


def test_the_worst_of_cocos_people_have_the_lowest_oks(tmp_path, monkeypatch):
    stick_figures(tmp_path, (1, 4))
    people = data.read_coco(tmp_path, "val2017", STICK)
    keypoints = np.dstack([people.joints, np.ones(people.annotated.shape)])
    keypoints[3, :, 0] += 5
    captions = []
    monkeypatch.setattr(data, "show_samples", lambda *given, **named: captions.extend(
        named["captions"]))
    predictor = evaluate.Predictor(None, evaluate.model_info("coco", STICK, (64, 64)))
    evaluate.draw_worst(keypoints, people, predictor, count=2)
    person = people.truth.persons
    row = np.flatnonzero(person["area"] == people.area[3])[0]
    oks, = evaluate.object_keypoint_similarity(
        keypoints[[3], :, :2], person["keypoints"][row], person["area"][row], None,
        people.truth.sigmas)
    assert captions[0] == f"{people.files[3]}\nOKS {oks:.3g}" and oks < 1
    assert captions[2].endswith("OKS 1")


def test_scores_are_told_in_percent_and_no_score_as_minus_one(tmp_path, capsys):
    evaluate.report([{"AP": 0.5, "APM": -1.0}], "what was scored", "", tmp_path / "metrics.json")
    assert capsys.readouterr().out.splitlines()[-2].split() == ["50.00", "-1.00"]
    evaluate.report([{"Head": np.nan, "Mean": 50.0}], "", "of a kind", tmp_path / "metrics.json")
    assert data.read_json(tmp_path / "metrics.json") == {"Head": None, "Mean": 50}
    assert "half a head size, of a kind;" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, complaint", [
    (["--weights", "none.pt"], "none.pt: there is no such file"),
    (["--results", "none.mat", "--dataset", "synthetic", "--data", "S"], "none.mat: there is no"),
    (["--results", "none.json"], "scored against --annotations FILE"),
    ([], "give --weights FILE"),
    (["--weights", "W", "--input", "256x20"], "not HEIGHTxWIDTH"),
    (["--weights", "W", "--batch-size", "0"], "'0' is no whole number 1.."),
    (["--weights", "W", "--workers", "1000"], "'1000' is no whole number 0.."),
    (["--weights", "W", "--annotations", "none.json"], "--annotations means nothing with a data"),
    (["--weights", "W", "--image", "x.jpg", "--data", "x"], "--data means nothing with --image"),
    (["--results", "x.json", "--no-flip"], "--no-flip means nothing with --results"),
    (["--weights", "W", "--dataset", "mpii", "--boxes", "none.json"], "--boxes means nothing with"),
    (["--weights", "W", "--skeleton", "coco"], "not heatmaps (17, 16, 16)"),
    (["--weights", "W", "--dataset", "synthetic", "--data", "S", "--split", "test"],
     "no annotations of split 'test'"),
    (["--weights", "W", "--image", "none.jpg"], "none.jpg: there is no such file"),
    (["--weights", "x.onnx", "--device", "cuda"], "ONNX files run on the CPU here"),
    (["--weights", "W", "--dataset", "mpii", "--data", "none"],
     "no annotations of split 'valid'"),
    (["--results", "x.json", "--annotations", "x.json", "--skeleton", "mpii"], "needs a sigma")])
def test_mistakes_of_the_user_get_a_sentence_and_a_status(
        arguments, complaint, weights, synthetic, tmp_path):
    places = {"W": weights[0], "S": synthetic}
    arguments = [places.get(argument, argument) for argument in arguments]
    status, said = run("evaluate.py", *arguments, "--out", tmp_path, check=False)
    assert status != 0 and complaint in said and "Traceback" not in said


# ---------------------------------------------------------------------------- broken files

JUNK = [None, "x", -1, 0, 1e300, float("nan"), 10**400, [], {}, [[]], [1] * 7, "1" * 300, True]


def broken(content, rng):
    """A copy of parsed JSON in which something is missing or is junk."""
    content = json.loads(json.dumps(content))
    node = content
    while True:
        key = rng.choice(list(node)) if isinstance(node, dict) else int(rng.integers(len(node)))
        if isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.85:
            node = node[key]
        elif rng.random() < 0.3:
            del node[key]
            return content
        else:
            node[key] = JUNK[rng.integers(len(JUNK))]
            return content


def damaged(content, rng):
    """A copy of bytes, some of which are others, and whose end is missing."""
    content = bytearray(content)
    for place in rng.integers(len(content), size=rng.integers(1, 60)):
        content[place] = rng.integers(256)
    return bytes(content[:rng.integers(1, len(content) + 1)])


def refused(read, count):
    """How many of `count` broken files are refused in a sentence by read(rng), which breaks one and
    reads it. The others may be read, but nothing else may happen."""
    errors = []
    for number in range(count):
        try:
            read(np.random.default_rng(number))
        except InputError as error:
            wrapped = "must be" in str(error) or "can't be read" in str(error)
            assert error.__cause__ or not wrapped, error
            assert not isinstance(error.__cause__, (NameError, ImportError)), error
            errors.append(error)
    return len(errors)


def test_broken_json_ends_in_a_sentence(mpii, coco, tmp_path, capsys):
    truth = data.read_coco(coco, "val2017").truth
    results = [{"image_id": 7, "category_id": 1, "score": 0.5, "keypoints": [1.0] * 51}] * 3

    def read(content, path, reader):
        def read_broken(rng):
            text = json.dumps(broken(content, rng))
            end = len(text) if rng.random() < 0.8 else rng.integers(len(text))
            write_file(tmp_path / path, text[:end])
            return reader()
        return read_broken

    for content, path, reader in (
            (data.read_json(mpii / "annot/train.json"), "annot/train.json",
             lambda: data.read_mpii(tmp_path, "train")),
            (data.read_json(truth.path), "annotations/person_keypoints_val2017.json",
             lambda: data.read_coco(tmp_path, "val2017")),
            (data.read_json(coco / "detections.json"), "boxes.json",
             lambda: data.read_coco(coco, "val2017", COCO, tmp_path / "boxes.json")),
            (results, "results.json", lambda: evaluate.coco_ap(
                truth, data.read_json(tmp_path / "results.json"), "results.json"))):
        assert refused(read(content, path, reader), 40) > 8, path


@pytest.mark.filterwarnings("ignore")
def test_a_broken_mat_file_ends_in_a_sentence(tmp_path):
    from scipy.io import savemat

    savemat(tmp_path / "good.mat", {"preds": np.ones((3, 16, 2)), "other": "x"})
    content = (tmp_path / "good.mat").read_bytes()

    def read(rng):
        (tmp_path / "a.mat").write_bytes(damaged(content, rng))
        data.read_mat(tmp_path / "a.mat", {"preds": (3, 16, 2)})

    assert refused(read, 60) > 40


def test_a_broken_checkpoint_ends_in_a_sentence(weights, tmp_path):
    content = weights[0].read_bytes()[:40000]
    checkpoint = lapx.load_file(weights[0])

    def read_bytes(rng):
        (tmp_path / "a.pt").write_bytes(damaged(content, rng))
        evaluate.open_predictor(tmp_path / "a.pt")

    def read_info(rng):
        torch.save({**checkpoint, **broken({"info": checkpoint["info"]}, rng)}, tmp_path / "b.pt")
        evaluate.open_predictor(tmp_path / "b.pt")

    assert refused(read_bytes, 40) > 30 and refused(read_info, 6) > 1


def test_a_broken_picture_ends_in_a_sentence(mpii, tmp_path):
    content = (mpii / "images/0.jpg").read_bytes()

    def read(rng):
        (tmp_path / "a.jpg").write_bytes(damaged(content, rng))
        data.open_picture(tmp_path / "a.jpg", upright=True)

    assert refused(read, 60) > 40


def test_json_that_is_nested_too_deep_gets_a_sentence(tmp_path):
    write_file(tmp_path / "deep.json", "[" * 100000)
    with pytest.raises(InputError, match="deep.json must be JSON"):
        data.read_json(tmp_path / "deep.json")


# ---------------------------------------------------------------------------- files of users

def with_changes(coco, folder, change):
    """The coco folder's validation split with changed annotations, as both splits of a folder."""
    content = data.read_json(coco / "annotations/person_keypoints_val2017.json")
    change(content)
    for split in ("train2017", "val2017"):
        write_file(folder / f"annotations/person_keypoints_{split}.json", content)
        (folder / "images").mkdir(exist_ok=True)
        (folder / "images" / split).symlink_to(coco / "images/val2017")
    return folder


def as_published(folder):
    """A small data set with all that is odd in COCO's own files, in both splits."""
    rng = np.random.default_rng(1)
    limbs = [[a + 1, b + 1] for a, b in COCO.limbs]  # counted from 1
    images = []
    annotations = []
    for number in range(6):
        width, height = (320, 240) if number % 2 else (240, 320)
        images.append({
            "license": 4, "file_name": f"{number + 139:012}.jpg", "height": height, "width": width,
            "coco_url": "http://x.org/1.jpg", "date_captured": "2013-11-14 11:18:45",
            "flickr_url": "http://y.org/1.jpg", "id": number + 139})
        for place in range(3):  # the third is partly outside, and so are his joints
            box = [60.5 * place, 20.25, 120.0, 180.75] if place < 2 else [-10, height - 90, 99, 120]
            keypoints = np.zeros((17, 3))
            labelled = rng.random(17) < 0.7
            flags = rng.integers(1, 3, 17)
            keypoints[labelled] = np.column_stack(
                [box[:2] + rng.random((17, 2)) * box[2:], flags])[labelled].round()
            annotations.append({
                "segmentation": [[10.5, 20.25, 30, 40, 50, 60]], "iscrowd": 0, "category_id": 1,
                "num_keypoints": int(labelled.sum()), "area": 0.55 * box[2] * box[3], "bbox": box,
                "keypoints": keypoints.ravel().tolist(), "image_id": number + 139,
                "id": 183000 + 10 * number + place})
        annotations.append({  # a small person that nobody labelled
            **annotations[-1], "num_keypoints": 0, "keypoints": [0] * 51, "area": 90.0,
            "bbox": [5.1, 6.2, 9.3, 14.4], "id": 183009 + 10 * number})
    crowd = {**annotations[3], "iscrowd": 1, "id": 900100087038, "bbox": [0, 0, 300.5, 60],
             "segmentation": {"counts": [272, 2, 4, 4], "size": [320, 240]}, "area": 9000}
    person = {"supercategory": "person", "id": 1, "name": "person", "skeleton": limbs,
              "keypoints": [name.replace(" ", "_") for name in COCO.joints]}
    for split in ("train2017", "val2017"):
        write_file(folder / f"annotations/person_keypoints_{split}.json", json.dumps({
            "info": {"year": 2017}, "licenses": [{"id": 4}], "images": images,
            "annotations": [*annotations, crowd], "categories": [person]}))
        for image in images:
            pixels = rng.integers(0, 255, (image["height"], image["width"], 3), np.uint8)
            path = folder / f"images/{split}/{image['file_name']}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)


def test_a_file_like_cocos_own_is_trained_on_and_scored(tmp_path):
    as_published(tmp_path)
    text = run("train.py", "--dataset", "coco", "--data", tmp_path, "--variant", "tiny", "--input",
               "64x64", "--epochs", 1, "--batch-size", 6, "--workers", 0, "--out", tmp_path / "run")
    for split in ("train2017", "val2017"):
        assert (f"_{split}.json: annotations by category: 25 of person\n{tmp_path}/annotations/"
                f"person_keypoints_{split}.json: of 25 annotations left out: 1 marked as crowd, 6 "
                f"without a labelled joint (of flag 1 or 2)\ncoco {split}: 18 persons in 6 pictures"
                ) in text
    row, = lapx.load_file(tmp_path / "run/last.pt")["history"]
    assert row["loss"] > 0 and row["AP"] >= 0
    text = run("evaluate.py", "--weights", tmp_path / "run/last.pt", "--data", tmp_path,
               "--no-flip", "--out", tmp_path / "out")
    assert "pycocotools" not in text
    truth = data.read_json(tmp_path / "annotations/person_keypoints_val2017.json")
    people = data.read_coco(tmp_path, "val2017")
    found = np.random.default_rng(0).normal(0, 3, (18, 17, 3)) + np.dstack(
        [people.joints, np.ones((18, 17))])
    perfect = evaluate.coco_results(found, people, network_of(None, (64, 64), "coco"))
    for results in (data.read_json(tmp_path / "out/results.json"), perfect):
        write_file(tmp_path / "results.json", results)
        run("evaluate.py", "--results", tmp_path / "results.json", "--annotations",
            people.truth.path, "--out", tmp_path)
        metrics = data.read_json(tmp_path / "metrics.json")
        assert np.allclose([*metrics.values()], pycocotools_ap(truth, results), atol=1e-9)
    assert metrics["AP"] > 0.3
    assert data.read_json(tmp_path / "out/metrics.json")["AP"] == row["AP"]


@pytest.mark.parametrize("value", [float("nan"), None, float("inf"), 1e300])
def test_coordinates_of_joints_that_are_not_annotated_do_not_matter(value, coco, mpii, tmp_path):
    def change(content):
        for annotation in content["annotations"]:
            for place in range(0, 51, 3):
                if annotation["keypoints"][place + 2] == 0:
                    annotation["keypoints"][place:place + 2] = [value, value]

    root = with_changes(coco, tmp_path, change)
    people = data.read_coco(root, "val2017")
    expected = data.read_coco(coco, "val2017")
    assert not people.annotated.all() and np.array_equal(people.joints, expected.joints)
    for name, column in expected.truth.persons.items():  # what AP compares with
        assert np.array_equal(people.truth.persons[name], column)
    entries = data.read_json(mpii / "annot/train.json")
    for entry in entries:
        entry["joints_vis"][3] = 0
        entry["joints"][3] = [value, value]
    write_file(tmp_path / "annot/train.json", entries)
    people = data.read_mpii(tmp_path, "train")
    assert (people.joints[:, 3] == -2).all() and not people.annotated[:, 3].any()
    entries[2]["joints_vis"][3] = 1
    write_file(tmp_path / "annot/train.json", entries)
    with pytest.raises(InputError, match="joints of person 2, counted from 0"):
        data.read_mpii(tmp_path, "train")

    def spoil(content):
        content["annotations"][1]["keypoints"][:3] = [value, 5, 2]

    with_changes(coco, tmp_path / "b", spoil)
    with pytest.raises(InputError, match="keypoints of person 1, counted from 0"):
        data.read_coco(tmp_path / "b", "val2017")


@pytest.mark.parametrize("field, value, reason", [
    ("keypoints", [], "without a labelled joint"), ("keypoints", None, "without a labelled joint"),
    ("keypoints", ..., "without a labelled joint"), ("bbox", [], "without a box"),
    ("bbox", None, "without a box"), ("bbox", ..., "without a box"),
    ("bbox", [float("nan"), 5, 50, 50], "without a box"), ("bbox", [0, 0, 0, 0], "without a box"),
    ("bbox", [900, 5, 50, 50], "without a box"), ("area", 0, "of area 0"), ("area", ..., ""),
    ("area", None, ""), ("id", ..., ""), ("num_keypoints", None, ""), ("iscrowd", None, ""),
    ("image_id", 4, "in pictures that are not listed")])
def test_who_lacks_something_is_used_without_it_or_left_out_and_counted(
        field, value, reason, coco, tmp_path, capsys):
    def change(content):
        annotation = content["annotations"][2]
        annotation[field] = value
        if value is ...:
            del annotation[field]

    people = data.read_coco(with_changes(coco, tmp_path, change), "val2017")
    told = capsys.readouterr().out
    assert len(people) == (5 if reason else 6) and len(people.truth.persons["id"]) == 7
    assert not reason or f"1 {reason}" in told
    expected = data.read_coco(coco, "val2017")
    kept = np.arange(6) != 2 if reason else slice(None)
    assert np.array_equal(people.joints, expected.joints[kept])


def test_pictures_without_a_size_are_read_and_no_box_is_clipped(coco, tmp_path):
    def change(content):
        del content["images"][0]["width"]
        content["images"][1].update(width=0, height=None)
        content["annotations"][1]["bbox"][2] = 9999
        content["images"] += content["images"][:1]  # one that is listed twice

    people = data.read_coco(with_changes(coco, tmp_path, change), "val2017")
    assert people.picture_size.tolist() == [[0, 330]] * 2 + [[0, 0]] * 2 + [[660, 330]] * 2
    assert people.box[1, 2] == pytest.approx(1.25 * 9998)
    assert people.picture(2).size == (660, 330) and len(people.truth.files) == 3


def test_training_needs_no_area_and_no_score_is_made_up(coco, tmp_path):
    def change(content):
        for annotation in content["annotations"]:
            del annotation["area"]

    root = with_changes(coco, tmp_path, change)
    text = run("train.py", "--dataset", "coco", "--data", root, "--variant", "tiny", "--input",
               "64x64", "--epochs", 2, "--batch-size", 6, "--workers", 0, "--out", tmp_path / "run")
    assert "epochs are not scored: 7 annotations have no area or box, which OKS needs" in text
    lines = [line.split() for line in text.splitlines() if re.match(r" +\d/2 ", line)]
    assert [words[4] for words in lines] == ["-", "-"]
    assert "AP50" not in text and "/run/: last.pt, log.csv" in text
    assert (tmp_path / "run/predictions.png").exists()
    assert not (tmp_path / "run/best.pt").exists()
    text = run("evaluate.py", "--weights", tmp_path / "run/last.pt", "--data", root, "--out",
               tmp_path / "out")
    assert "there is no score, as 7 annotations have no area or box" in text
    assert not (tmp_path / "out/metrics.json").exists()
    status, text = run("evaluate.py", "--results", tmp_path / "out/results.json", "--annotations",
                       root / "annotations/person_keypoints_val2017.json", check=False)
    assert status == 1 and "can't be scored: 7 annotations have no area or box" in text


def test_flags_say_whether_a_joint_is_labelled(coco, tmp_path):
    def unlabelled(content):  # although there are coordinates and num_keypoints
        for annotation in content["annotations"]:
            annotation["keypoints"][2::3] = [0] * 17

    root = with_changes(coco, tmp_path / "a", unlabelled)
    with pytest.raises(InputError, match="out: 1 marked as crowd, 6 without a labelled joint"):
        data.read_coco(root, "val2017")
    results = [{"image_id": 7, "category_id": 1, "keypoints": [0] * 51, "score": 1}]
    write_file(tmp_path / "results.json", results)
    status, text = run("evaluate.py", "--results", tmp_path / "results.json", "--annotations",
                       root / "annotations/person_keypoints_val2017.json", check=False)
    assert status == 1 and "can't be scored: nobody has a labelled joint" in text
    root = with_changes(coco, tmp_path / "b", lambda content: [
        annotation.update(num_keypoints=0) for annotation in content["annotations"][:2]])
    assert len(data.read_coco(root, "val2017")) == 6
    text = run("evaluate.py", "--results", tmp_path / "results.json", "--annotations",
               root / "annotations/person_keypoints_val2017.json", "--out", tmp_path)
    assert "2 annotations go by num_keypoints, against their flags; so it is in" in text


def test_nobody_to_find_is_no_score_of_minus_one_hundred(coco, tmp_path):
    root = with_changes(coco, tmp_path, lambda content: [
        annotation.update(num_keypoints=0) for annotation in content["annotations"]])
    text = run("train.py", "--dataset", "coco", "--data", root, "--variant", "tiny", "--input",
               "64x64", "--epochs", 1, "--batch-size", 6, "--workers", 0, "--out", tmp_path / "run")
    line = next(line for line in text.splitlines() if line.startswith("   1/1"))
    assert line.split()[4] == "-" and "7 annotations go by num_keypoints" in text


NAMES = [name.replace(" ", "_") for name in COCO.joints]
AP10K = ("left_eye right_eye nose neck root_of_tail left_shoulder left_elbow left_front_paw "
         "right_shoulder right_elbow right_front_paw left_hip left_knee left_back_paw right_hip "
         "right_knee right_back_paw").split()


@pytest.mark.parametrize("categories, ids, read, told", [
    ([(1, "person", NAMES)], [1] * 7, 6, "by category: 7 of person\n"),
    ([(1, "person", [name.upper() for name in COCO.joints])], [1] * 7, 6, "7 of person\n"),
    ([(1, "person", [f" {name.replace(' ', '-')}" for name in COCO.joints])], [1] * 7, 6, "7 of p"),
    ([(1, "person", [f"kp{place}" for place in range(17)])], [1] * 7, 6, "7 of person\n"),
    ([(1, "person", list(range(1, 18)))], [1] * 7, 6, "7 of person\n"),
    ([], [0] * 7, 6, "7 of 0\n"),
    ([(0, "person", None)], [0] * 7, 6, "7 of person\n"),
    ([(1, "dog", []), (2, "person", NAMES)], [1, 2, 2, 2, 2, 2, 2], 5,
     "1 of dog, left out; 6 of person\n"),
    ([(1, "dog", None), (2, "cat", None)], [1, 2, 2, 2, 2, 2, 2], 6, "1 of dog; 6 of cat\n"),
    ([(1, "lion", NAMES), (7, "cat", NAMES), (9, "goat", AP10K)], [7, 7, 1, 9, 1, 1, 7], 5,
     "3 of cat; 3 of lion; 1 of goat, left out\n"),
    ([("1", "person", NAMES)], [1] * 7, 6, "7 of person\n"),
    ([(1, "person", NAMES)], ["1", 1, 1.0, "1", 1, 1, 1], 6, "7 of person\n"),
    ([(1, "person", NAMES)], [None, None, 1, 1, 1, 1, 1], 4, "2 of -1, left out; 5 of person\n"),
    ([(1, "person", NAMES), (2, "dog", None)], [2] * 7, 0, "7 of dog, left out\n")])
def test_categories_with_the_skeletons_joints_are_read_and_all_are_counted(
        categories, ids, read, told, coco, tmp_path, capsys):
    def change(content):
        content["categories"] = [{"id": id, "name": name} | ({} if joints is None else {
            "keypoints": joints}) for id, name, joints in categories]
        for annotation, id in zip(content["annotations"], ids):
            annotation["category_id"] = id

    root = with_changes(coco, tmp_path, change)
    if not read:
        with pytest.raises(InputError, match="of 0 annotations left out: none; there is nobody"):
            data.read_coco(root, "val2017")
    else:
        people = data.read_coco(root, "val2017")
        assert len(people) == read
        read_ids = {int(float(id or 0)) for id in ids} & {*people.truth.categories}
        assert {*people.category_id.tolist()} == read_ids
    assert told in capsys.readouterr().out


@pytest.mark.parametrize("joints, theirs, ours", [
    (AP10K, "left eye", "nose"), ([*NAMES[:15], NAMES[16], NAMES[15]], "right ankle", "left ankle"),
    ([*NAMES, "neck"], "neck", "no joint"), (NAMES[:16], "no joint", "right ankle")])
def test_joints_of_other_names_or_in_another_order_are_refused(
        joints, theirs, ours, coco, tmp_path):
    root = with_changes(coco, tmp_path, lambda content: content["categories"][0].update(
        keypoints=joints))
    with pytest.raises(InputError, match=f"first '{theirs}' in place of '{ours}'.* SKELETONS"):
        data.read_coco(root, "val2017")
    own = lapx.Skeleton(tuple(joints), (), (), (0.1,) * len(joints))
    numbered = lapx.Skeleton(tuple(f"kp{place}" for place in range(17)), (), (), (0.1,) * 17)
    if len(joints) == 17:
        assert len(data.read_coco(root, "val2017", skeleton=numbered)) == 6
        assert len(data.read_coco(root, "val2017", skeleton=own)) == 6


def test_numbered_joints_in_another_order_are_refused(coco, tmp_path):
    names = [f"kp{place}" for place in range(17)]
    own = lapx.Skeleton(tuple(names), (), (), (0.1,) * 17)
    names[4:6] = names[5], names[4]
    root = with_changes(coco, tmp_path, lambda content: content["categories"][0].update(
        keypoints=names))
    with pytest.raises(InputError, match="first 'kp5' in place of 'kp4'"):
        data.read_coco(root, "val2017", skeleton=own)


def test_results_of_several_categories_are_written_with_theirs(coco, weights, tmp_path):
    def change(content):
        content["categories"] = [{"id": id, "name": str(id), "keypoints": NAMES} for id in (3, 8)]
        for number, annotation in enumerate(content["annotations"]):
            annotation["category_id"] = (3, 8)[number % 2]

    root = with_changes(coco, tmp_path, change)
    detections = data.read_json(coco / "detections.json")
    for detection, category in zip(detections, (3, 8, 8, 8, 5)):
        detection["category_id"] = category
    write_file(tmp_path / "boxes.json", detections)
    for boxes, expected in (("gt", [3, 3, 3, 8, 8, 8]), (tmp_path / "boxes.json", [3, 8, 8, 8])):
        run("evaluate.py", "--weights", weights[1], "--data", root, "--boxes", boxes, "--out",
            tmp_path)
        results = data.read_json(tmp_path / "results.json")
        assert sorted(result["category_id"] for result in results) == expected
        truth = data.read_json(root / "annotations/person_keypoints_val2017.json")
        metrics = data.read_json(tmp_path / "metrics.json")
        assert np.allclose([*metrics.values()], pycocotools_ap(truth, results), atol=1e-9)
    write_file(tmp_path / "results.json", [{**results[0], "category_id": 1}])
    status, text = run("evaluate.py", "--results", tmp_path / "results.json", "--annotations",
                       root / "annotations/person_keypoints_val2017.json", check=False)
    assert status == 1 and "some with the category_id [3, 8]" in text
    assert "all 1 are of others" in text


@pytest.mark.parametrize("field, needed", [("area", True), ("bbox", True), ("id", False)])
def test_persons_without_joints_need_area_and_box_to_be_scored(field, needed, coco, tmp_path):
    def change(content):
        content["annotations"][2].update(keypoints=[], num_keypoints=0, area=5)
        del content["annotations"][2][field]

    root = with_changes(coco, tmp_path, change)
    file = data.read_coco_file(root / "annotations/person_keypoints_val2017.json", COCO)
    reason = evaluate.unscored_file(file)
    assert reason.startswith("1 annotations have no area or box") == needed


def test_two_pictures_of_one_id_are_refused(coco, tmp_path):
    root = with_changes(coco, tmp_path, lambda content: content["images"][2].update(id=7))
    with pytest.raises(InputError, match="gives two pictures the id 7: 0.jpg and 2.jpg"):
        data.read_coco(root, "val2017")


@pytest.mark.parametrize("ids, lost", [([1, 2, 1, 2, 1, 2, 1], 5), ([0, 1, 2, 3, 4, 5, 6], 1),
                                       ([11, 12, 13, 14, 15, 16, 17], 0)])
def test_annotation_ids_that_cost_precision_are_told(ids, lost, coco, tmp_path, capsys):
    def change(content):
        for annotation, id in zip(content["annotations"], ids):
            annotation["id"] = id

    root = with_changes(coco, tmp_path, change)
    people = data.read_coco(root, "val2017")
    capsys.readouterr()
    assert evaluate.unscored(people) == ""
    told = capsys.readouterr().out
    assert (f"{lost} annotations have no id, 0 or another's id, and count" in told) == (lost > 0)
    perfect = np.dstack([people.joints, np.ones((6, 17))])
    network = network_of(None, (64, 64), "coco")
    results = evaluate.coco_results(perfect, people, network)
    ours = [*evaluate.score(results, people).values()]
    truth = data.read_json(root / "annotations/person_keypoints_val2017.json")
    assert np.allclose(ours, pycocotools_ap(truth, results), atol=1e-9)
    assert ours[0] == pytest.approx(1) if not lost else ours[0] < 0.99


def test_the_picture_that_was_annotated_is_the_one_that_is_cropped(coco, tmp_path):
    upright = Image.open(coco / "images/val2017/1.jpg").convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    folder = tmp_path / "images/val2017"
    shutil.copytree(coco / "images/val2017", folder)
    shutil.copytree(coco / "annotations", tmp_path / "annotations")
    path = folder / "1.jpg"
    # as a phone stores it; annotated upright
    upright.transpose(Image.Transpose.ROTATE_90).save(path, "PNG", exif=exif)
    people = data.load_people("coco", tmp_path, "val2017", COCO)
    assert people.picture(2).tobytes() == upright.tobytes()
    upright.save(path, "PNG", exif=exif)  # annotated as it is stored, which is COCO's way
    assert people.picture(2).tobytes() == upright.tobytes()
    for other in (upright.reduce(2), upright.transpose(Image.Transpose.ROTATE_90)):
        other.save(path, "PNG")
        message = f"1.jpg is {other.width}x{other.height}, in the annotations 660x330"
        with pytest.raises(InputError, match=message):  # when it is cropped
            PoseDataset(people, (64, 64), COCO)[3]
        with pytest.raises(InputError, match=message):  # before anything starts
            data.load_people("coco", tmp_path, "val2017", COCO)


@pytest.mark.parametrize("levels, mode", [
    (np.linspace(0, 65535, 200), np.uint16), (np.linspace(7000, 9000, 200), np.uint16),
    (np.linspace(7000, 9000, 200), ">u2"), (np.linspace(0, 1, 200), np.float32),
    (np.linspace(-40, 120, 200), np.float32), (np.linspace(0, 99999, 200), np.int32)])
def test_grey_levels_beyond_8_bits_are_scaled_from_the_darkest_to_the_brightest(
        levels, mode, tmp_path):
    picture = Image.fromarray(np.tile(levels.astype(mode), (20, 1)))
    picture.save(tmp_path / "a.tif")
    found = np.asarray(data.open_picture(tmp_path / "a.tif"))
    assert found.shape == (20, 200, 3) and found[0, 0, 0] == 0 and found[0, -1, 2] == 255
    assert np.abs(found[..., 1] - np.linspace(0, 255, 200)).max() < 2


def test_grey_levels_that_are_unknown_or_all_the_same_are_black(tmp_path):
    levels = np.array([[np.nan, 0, 100, np.inf, -np.inf]], np.float32)
    Image.fromarray(levels).save(tmp_path / "a.tif")
    found = np.asarray(data.open_picture(tmp_path / "a.tif"))
    assert found[0, :, 0].tolist() == [0, 0, 255, 255, 0]
    Image.fromarray(np.full((2, 2), 5, np.uint16)).save(tmp_path / "b.png")
    assert not np.asarray(data.open_picture(tmp_path / "b.png")).any()


@pytest.mark.filterwarnings("ignore:Image size")
def test_a_large_picture_is_opened_and_one_that_memory_does_not_hold_is_not(tmp_path):
    Image.new("1", (14000, 13000)).save(tmp_path / "a.png")  # Pillow's own limit is 179 million
    assert data.open_picture(tmp_path / "a.png").size == (14000, 13000)
    Image.new("1", (17000, 16000)).save(tmp_path / "b.png")
    with pytest.raises(InputError, match="at most 268 million pixels.*272000000 pixels"):
        data.open_picture(tmp_path / "b.png")


def test_what_a_folder_has_besides_pictures_is_counted(weights, tmp_path):
    for name in ("a.png", "b.JPG"):
        figure(9, 0)[1].save(tmp_path / name)
    for name in ("._a.png", "c.heic", "d.HEIC", "e.jfif", "f.txt", "sub/g.png", ".DS_Store", "h"):
        write_file(tmp_path / name, b"no picture")
    text = run("evaluate.py", "--weights", weights[0], "--image", tmp_path, "--out",
               tmp_path / "sub/out")
    assert (f"{tmp_path}: not taken for pictures: 1 .HEIC, 1 .heic, 1 .jfif, 1 .txt, 1 folder, "
            "1 h, 2 hidden\n") in text
    assert {path.name for path in (tmp_path / "sub/out").glob("*.png")} == {
        "a_pose.png", "b_pose.png"}
    status, text = run("evaluate.py", "--weights", weights[0], "--image", tmp_path / "c.heic",
                       "--out", tmp_path / "out", check=False)
    assert status == 1 and "in a format that Pillow knows, unlike HEIC (convert it" in text


@pytest.mark.parametrize("entry, expected", [
    ({"file_name": "cam1/0001.jpg"}, 0), ({"file_name": "cam2/0001.jpg"}, 1),
    ({"file_name": "cam2\\0001.jpg"}, 1), ({"file_name": "./cam2/0001.jpg"}, 1),
    ({"file_name": "set/cam2/0001.jpg"}, 1), ({"file_name": "/data/set/cam2/0001.jpg"}, 1),
    ({"file_name": "/a/data/set/cam2/0001.jpg"}, -1), ({"file_name": "cam3/0001.jpg"}, -1),
    ({"file_name": "other/cam2/0001.jpg"}, -1),
    ({"file_name": "0001.jpg"}, -1), ({"file_name": "7.jpg"}, 2), ({"file_name": "cam2/7.jpg"}, -1),
    ({"file_name": "1.jpg"}, -1),
    ({"file_name": unicodedata.normalize("NFC", "é.jpg")}, 3),
    ({"file_name": unicodedata.normalize("NFD", "é.jpg")}, 3),
    ({"image_id": "7"}, 2), ({"image_id": 7}, 2), ({"image_id": 7.0}, 2),
    ({"image_id": "7.jpg"}, 2), ({"image_id": "007"}, 2), ({"image_id": "cam2/0001"}, 1),
    ({"image_id": "0001"}, -1),
    ({"image_id": 1}, -1), ({"image_id": "²³"}, 4), ({"image_id": 23}, -1),
    ({"image_id": None}, -1), ({"file_name": None, "image_id": 7}, 2),
    ({"file_name": "/mnt/data/set/cam1/7.jpg"}, 2), ({"file_name": "/mnt/set/cam1/7.jpg"}, -1),
    ({"file_name": "top.jpg"}, 5), ({"file_name": "cam1/top.jpg"}, 6)])
def test_a_box_belongs_to_the_picture_that_its_name_or_number_says(entry, expected):
    names = ["cam1/0001.jpg", "cam2/0001.jpg", "cam1/7.jpg", unicodedata.normalize("NFD", "é.jpg"),
             "cam1/²³.jpg", "top.jpg", "cam1/top.jpg"]
    numbers = [1, 1, 7, None, None, None, None]
    assert data.picture_finder(numbers, "/mnt/data/set", names)(entry) == expected
    assert data.picture_finder([None], "/mnt", ["a.jpg"])({"image_id": None}) == -1


def test_boxes_of_another_camera_do_not_land_in_this_ones_picture(weights, tmp_path, monkeypatch):
    for name in ("cam1/0001.png", "cam2/0001.png", "cam1/²³.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        figure(9, 0)[1].save(tmp_path / name)
    write_file(tmp_path / "boxes.json", [
        {"file_name": f"cam{number}/0001.png", "bbox": [10 * number, 10, 50, 80], "score": 0.9}
        for number in (1, 2)])
    monkeypatch.chdir(tmp_path / "cam2")
    for picture, left in (("../cam1", 10), ("0001.png", 20), (tmp_path / "cam2/0001.png", 20)):
        text = run("evaluate.py", "--weights", weights[0], "--image", picture, "--boxes",
                   tmp_path / "boxes.json", "--out", tmp_path / "out")
        person, = data.read_json(tmp_path / "out/0001_pose.json")["persons"]
        assert person["box"][0] == left and "1 of no picture here" in text
    assert data.read_json(tmp_path / "out/²³_pose.json")["persons"] == []


@pytest.mark.parametrize("change, complaint", [
    ({"joints": ("a", "b", "a")}, "different names"), ({"joints": "abc"}, "different names"),
    ({"limbs": ((1, 2), (2, 3))}, "limbs from 1"),
    ({"limbs": ((-1, 0),)}, "indices from 0 to 2"), ({"flip_pairs": ((0, 3),)}, "indices from 0"),
    ({"flip_pairs": ((0, 1), (1, 2))}, "one of flip_pairs"),
    ({"flip_pairs": ((1, 1),)}, "one of flip_pairs"), ({"sigmas": (0.1, 0.1)}, "as many sigmas"),
    ({"flip_pairs": (0, 1)}, "unpack"), ({"limbs": ((0, 1, 2),)}, "unpack"),
    ({"flip_pairs": None}, "None"), ({"sigmas": 0.1}, "float")])
def test_a_skeleton_is_checked_when_it_is_made(change, complaint):
    good = {"joints": ("a", "b", "c"), "flip_pairs": ((0, 1),), "limbs": ((0, 2),)}
    assert lapx.Skeleton(**good, sigmas=(0.1,) * 3).sigmas and not lapx.Skeleton(**good).sigmas
    with pytest.raises((ValueError, TypeError), match=complaint):
        lapx.Skeleton(**good | change)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_json_is_read_in_all_forms_of_unicode(encoding, tmp_path):
    (tmp_path / "a.json").write_text('{"name": "é"}', encoding=encoding)
    assert data.read_json(tmp_path / "a.json") == {"name": "é"}


@pytest.mark.parametrize("content, found", [
    ([], r"it is \[\], not a list with entries"), ({}, "it is {}, not a list"),
    ({"images": []}, "a dictionary, not a list"), (5, "is 5, not a list"), (None, "is None, not")])
def test_json_that_is_something_else_is_told_as_what_it_is(content, found, coco, mpii, tmp_path):
    write_file(tmp_path / "a.json", content)
    truth = coco / "annotations/person_keypoints_val2017.json"
    status, text = run("evaluate.py", "--results", tmp_path / "a.json", "--annotations", truth,
                       check=False)
    assert status == 1 and "a.json must be a list of results" in text and re.search(found, text)
    with pytest.raises(InputError, match=f"a list of boxes.*{found}"):
        data.read_coco(coco, "val2017", boxes=tmp_path / "a.json")
    write_file(tmp_path / "annot/train.json", content)
    with pytest.raises(InputError, match=f"a list of persons.*{found}"):
        data.read_mpii(tmp_path, "train")
    write_file(tmp_path / "annotations/person_keypoints_val2017.json", content or [1])
    with pytest.raises(InputError, match="not a dictionary|'images' is missing|a list with entr"):
        data.read_coco(tmp_path, "val2017")


def test_own_splits_stay_with_the_network(mpii, tmp_path, monkeypatch):
    (tmp_path / "annot").mkdir()
    for split, name in (("default", "train"), ("test", "valid")):
        shutil.copy(mpii / f"annot/{name}.json", tmp_path / f"annot/{split}.json")
    (tmp_path / "images").symlink_to(mpii / "images")
    run("train.py", *arguments(tmp_path, tmp_path / "run", "--splits", "default", "test",
                               "--epochs", 1))
    network = evaluate.open_predictor(tmp_path / "run/last.pt")
    assert network.splits == ("default", "test")
    images = export.calibration_images(network, argparse.Namespace(data=tmp_path, image=None))
    assert len(images) == 6
    text = run("evaluate.py", "--weights", tmp_path / "run/last.pt", "--data", tmp_path, "--out",
               tmp_path / "out")
    assert "mpii test, 4 persons" in text


def test_without_flip_pairs_nothing_is_mirrored(mpii, tmp_path, monkeypatch):
    one_sided = replace(MPII, flip_pairs=())
    people = dotted_people(skeleton=one_sided)
    for skeleton, sorts in ((one_sided, 1), (MPII, 2)):
        samples = PoseDataset(people, (64, 64), skeleton, (0, 0))
        assert len({samples[epoch, 0][1].numpy().tobytes() for epoch in range(20)}) == sorts
    monkeypatch.setitem(SKELETONS, "one-sided", one_sided)
    text = run("train.py", *arguments(mpii, tmp_path / "run", "--skeleton", "one-sided", "--epochs",
                                      1))
    assert "no flip pairs: nothing is mirrored, and there is no flip test" in text
    assert "last epoch, no flip test" in text and "flip test with shift" not in text
    for flags in ([], ["--both"], ["--no-flip"]):
        text = run("evaluate.py", "--weights", tmp_path / "run/last.pt", "--data", mpii, "--out",
                   tmp_path, *flags)
        assert ", no flip test" in text and "with shift" not in text
    network = evaluate.open_predictor(tmp_path / "run/last.pt")
    people = data.read_mpii(mpii, "valid")
    assert np.array_equal(predicted(network, people, True), predicted(network, people, False))


@pytest.mark.parametrize("name, value", [("WORLD_SIZE", "2"), ("WORLD_SIZE", ""), ("RANK", "1")])
def test_several_processes_need_a_launcher(name, value, mpii, tmp_path, monkeypatch):
    monkeypatch.setenv(name, value)
    status, text = run("train.py", *arguments(mpii, tmp_path / "run"), check=False)
    assert status == 1 and "torchrun --nproc_per_node" in text and not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------- train.py

def test_loss_is_the_papers_equation():
    generator = torch.manual_seed(0)
    outputs = [torch.rand(2, 3, 4, 5, generator=generator) for _ in range(3)]
    targets = torch.rand(2, 3, 4, 5, generator=generator)
    weights = torch.tensor([[1., 0, 1], [1, 1, 1]])
    expected = 0
    for heatmaps in outputs:
        for b in range(2):
            for k in range(3):
                distance = heatmaps[b, k] - targets[b, k]
                expected += weights[b, k] * (distance ** 2).sum() / (2 * 3) / 2 / 3
    assert train.heatmap_loss(outputs, targets, weights).item() == pytest.approx(expected.item())
    masked = [heatmaps.clone() for heatmaps in outputs]
    masked[0][0, 1] += 5  # a joint of weight 0
    assert torch.equal(train.heatmap_loss(masked, targets, weights),
                       train.heatmap_loss(outputs, targets, weights))


def test_gamma_is_frozen_then_raised_then_learnt():
    model = LAPX(TINY)
    gamma = model.non_locals()[1].gamma
    for epochs, expected in ((0, 0), (10, 0), (35, 0.1), (59, 0.196), (60, 0.2)):
        value = train.gamma_at(epochs, warmup=10, ramp=50, target=0.2)
        assert value == pytest.approx(expected)
        frozen = train.set_gamma(model.non_locals().values(), value)
        assert gamma.item() == pytest.approx(expected)
        # while it is 0 the whole Non-Local module is frozen, then gamma alone
        assert len(frozen) == (9 if expected == 0 else 1) and any(p is gamma for p in frozen)
    assert train.gamma_at(60.001, 10, 50, 0.2) is None
    assert train.set_gamma(model.non_locals().values(), None) == []
    assert gamma.item() == pytest.approx(0.2)  # the schedule leaves it alone


def test_learning_rate_drops_after_the_milestones():
    rates = [train.learning_rate(epoch, 1.0, 0.5, [105, 150, 175, 190])
             for epoch in (0, 104, 105, 149, 150, 174, 175, 189, 190, 199)]
    assert rates == [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.0625, 0.0625]


@pytest.mark.parametrize("dataset, paper", [
    ("mpii", dict(epochs=200, batch_size=32, lr=3e-4, lr_decay=0.5,
                  milestones=(105, 150, 175, 190), input=(256, 256), scale_range=0.25,
                  splits=("train", "valid"), skeleton="mpii")),
    ("coco", dict(epochs=210, batch_size=32, lr=2e-4, lr_decay=0.4,
                  milestones=(120, 160, 190), input=(256, 192), scale_range=0.3,
                  splits=("train2017", "val2017"), skeleton="coco"))])
def test_the_recipe_is_the_papers(dataset, paper):
    ours = dict(gamma_warmup=10, gamma_ramp=50, gamma_target=0.2, rotation_range=40, seed=0,
                variant="lapx", init="", overfit=0, compile=False, precision="auto")
    recipe = train.new_recipe({"dataset": dataset})
    assert {name: recipe[name] for name in paper | ours} == paper | ours


def epoch_batches(persons, batch_size, seed, epoch, rank=0, world=1):
    batches = train.EpochBatches(persons, batch_size, seed, rank, world)
    batches.epoch = epoch
    assert len(list(batches)) == len(batches)
    return list(batches)


def test_batches_are_shared_out_and_reshuffled():
    shares = [epoch_batches(11, 4, 7, 0, rank, 2) for rank in (0, 1)]
    rows = [row for batches in shares for batch in batches for _, row in batch]
    assert len(shares[0]) == 2 and len(set(rows)) == 8
    assert all(len(batch) == 2 for batches in shares for batch in batches)
    whole = epoch_batches(11, 4, 7, 0)
    for number, batch in enumerate(whole):  # the shares of a batch are the batch
        assert sorted(batch) == sorted(shares[0][number] + shares[1][number])
    later = epoch_batches(11, 4, 7, 1)
    other = epoch_batches(11, 4, 8, 0)
    assert later[0][0][0] == 1 and other[0][0][0] == 0
    orders = [[row for batch in batches for _, row in batch] for batches in (whole, later, other)]
    assert all(one != two for one, two in itertools.combinations(orders, 2))
    assert len(epoch_batches(12, 4, 7, 0)) == 3  # nobody is left out who fills a batch
    seen = {row for epoch in range(20) for batch in epoch_batches(11, 4, 7, epoch)
            for _, row in batch}
    assert seen == set(range(11))


def test_precision_follows_the_device(monkeypatch):
    assert train.fast_precision("cuda") == "tf32"
    assert data.cpu_info() or sys.platform != "linux"
    for flags, precision in (("fpu sse avx512_bf16 x", "bfloat16"), ("amx_bf16", "bfloat16"),
                             ("fpu avx512f bf16_not", "float32")):
        monkeypatch.setattr(data, "cpu_info", lambda: f"flags : {flags}\n")
        assert train.fast_precision("cpu") == precision


def recipe_of(**changes):
    recipe = train.default_recipe("mpii") | dict(input=(64, 64), precision="float32") | changes
    return argparse.Namespace(**recipe)


def test_an_epoch_is_the_papers_recipe_step_by_step(mpii):
    dataset = PoseDataset(data.read_mpii(mpii, "train"), (64, 64), MPII, (0.25, 40), seed=1)
    recipe = recipe_of(lr=1e-3, lr_decay=0.1, milestones=[2], gamma_warmup=1, gamma_ramp=1.5,
                       gamma_target=0.3)
    torch.manual_seed(0)
    model = LAPX(TINY)
    slow = copy.deepcopy(model)
    context = slow.stages[0].hourglass.neck.non_local
    # eps: else a step is 1e-3 at first for the smallest gradient, too, whose sign is rounding's
    optimiser = torch.optim.Adam(model.parameters(), eps=1e-3)
    slow_optimiser = torch.optim.Adam(slow.parameters(), eps=1e-3)
    for epoch in range(4):
        batches = epoch_batches(6, 3, 1, epoch)
        model.eval()  # as after an evaluation
        found, waited = train.train_epoch(model, model.non_locals().values(), optimiser,
                                          data.make_loader(dataset, batches, 0), epoch, recipe,
                                          torch.device("cpu"))
        slow.train()
        losses = []
        for step, batch in enumerate(batches):
            done = epoch + step / 2
            if done <= 1:  # frozen: as if the module were not there
                context.forward = lambda x: x
            else:
                context.__dict__.pop("forward", None)
                context.gamma.requires_grad_(done > 2.5)  # then learnt
                if done <= 2.5:
                    context.gamma.data.fill_(0.3 * (done - 1) / 1.5)
            samples = [dataset[index] for index in batch]
            images = torch.stack([image for _, image, _, _ in samples]).permute(0, 3, 1, 2) / 255
            images = ((images - torch.tensor([0.485, 0.456, 0.406])[:, None, None])
                      / torch.tensor([0.229, 0.224, 0.225])[:, None, None])
            loss = 0
            for heatmaps in slow(images):  # PAPER eq. 4.1 and 4.2
                for maps, (_, _, joints, visible) in zip(heatmaps, samples):
                    targets, mask = slow_targets(joints.numpy(), visible, (64, 64), 2)
                    error = (maps - torch.from_numpy(targets).float()).square().sum((1, 2))
                    loss = loss + (torch.from_numpy(mask).float() * error).sum() / (2 * 16) / 3 / 2
            slow_optimiser.param_groups[0]["lr"] = 1e-3 if epoch < 2 else 1e-4
            slow_optimiser.zero_grad()
            loss.backward()
            slow_optimiser.step()
            losses.append(loss.item())
        assert found.tolist() == pytest.approx(losses, rel=1e-3), epoch
        differences = torch.cat([(tensor - slow_tensor).flatten().abs() for tensor, slow_tensor in
                                 zip(model.state_dict().values(), slow.state_dict().values())])
        assert differences.mean() < 5e-6 and (differences > 1e-4).float().mean() < 0.01, epoch
        assert context.gamma.item() == pytest.approx(
            model.non_locals()[1].gamma.item(), abs=1e-5)
        assert 0 < waited < 100


def test_an_epoch_tells_how_long_it_waited_for_samples(monkeypatch):
    clock = [0.0]  # seconds
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    crops = torch.zeros(4, 64, 64, 3, dtype=torch.uint8)
    model = LAPX(TINY)

    class Slow(list):
        def __iter__(self):
            for batch in list.__iter__(self):
                clock[0] += 0.5
                yield batch

    def slow(images):
        clock[0] += 2
        return model(images)

    slow.train = model.train
    loader = Slow([(None, crops, torch.ones(4, 16, 2), torch.ones(4, 16))] * 3)
    _, waited = train.train_epoch(slow, [], torch.optim.Adam(model.parameters()), loader, 0,
                                  recipe_of(), torch.device("cpu"))
    assert waited == 3 * 0.5


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_only_bfloat16_computes_in_bfloat16_and_not_the_loss(precision):
    model = LAPX(TINY)
    kinds = []
    model.stem.conv.register_forward_hook(lambda module, x, output: kinds.append(output.dtype))
    batch = (None, torch.zeros(2, 64, 64, 3, dtype=torch.uint8), torch.ones(2, 16, 2),
             torch.ones(2, 16))
    train.train_epoch(model, [], torch.optim.Adam(model.parameters()), [batch], 0,
                      recipe_of(precision=precision), torch.device("cpu"))
    assert kinds == [torch.bfloat16 if precision == "bfloat16" else torch.float32]
    outputs = [torch.full((1, 1, 8, 8), 100, dtype=torch.bfloat16)]
    loss = train.heatmap_loss(outputs, torch.full((1, 1, 8, 8), 0.1), torch.ones(1, 1))
    assert loss.item() == pytest.approx(99.9 ** 2 * 64 / 2)


def arguments(mpii, out, *more):
    """A run of seconds: a small network, six pictures, two batches of three an epoch."""
    return ["--dataset", "mpii", "--data", mpii, "--input", "64x64", "--variant", "tiny",
            "--epochs", 4, "--batch-size", 3, "--gamma-warmup", 1, "--gamma-ramp", 1,
            "--workers", 0, "--device", "cpu", "--out", out, *more]


@pytest.fixture(scope="session")
def finished(mpii, tmp_path_factory):
    """The folder and the output of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return out, run("train.py", *arguments(mpii, out))


def same_weights(a, b):
    a, b = (lapx.load_file(folder / "last.pt") for folder in (a, b))
    return len(a["history"]) == len(b["history"]) and all(
        torch.equal(a["model"][name], b["model"][name]) for name in a["model"])


def test_a_run_prints_and_writes_what_it_should(finished, mpii):
    out, text = finished
    assert "--epochs 4, not 200: milestones and gamma schedule are scaled in proportion" in text
    assert "mpii train: 6 persons in 6 pictures\nmpii valid: 4 persons in 4 pictures\n" in text
    assert sum(line.split("/")[0].strip().isdigit() for line in text.splitlines()) == 4
    for flip in ("no flip test", "flip test with shift"):
        assert f"mpii, 4 persons, boxes annotated (gt),\ninput 64x64, last epoch, {flip}" in text
    assert sorted(path.name for path in out.iterdir()) == [
        "best.pt", "curve.png", "last.pt", "log.csv", "predictions.png", "recipe.json", "worst.png"]
    with open(out / "log.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["epoch", "lr", "loss", "gamma1", "images_per_second", "waiting",
                             "precision", "accumulate", *evaluate.PCKH_COLUMNS, "Mean", "Mean@0.1",
                             "seconds"]
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert [float(row["lr"]) for row in rows] == pytest.approx([3e-4, 3e-4, 3e-4, 7.5e-5])
    told = [line.split()[1:5] for line in text.splitlines() if re.match(r" +\d/4 ", line)]
    assert told == [[f"{float(row['lr']):.2e}", f"{float(row['gamma1']):.3f}",
                     f"{float(row['loss']):.5f}", f"{float(row['Mean']):.2f}"] for row in rows]
    recipe = data.read_json(out / "recipe.json")["recipe"]
    assert recipe["milestones"] == [2.1, 3, 3.5, 3.8] and recipe["rotation_range"] == 40
    assert max(map(len, text[text.index("   epoch"):].splitlines()[:-1])) <= 80
    best, last = (lapx.load_file(out / name) for name in ("best.pt", "last.pt"))
    assert best["info"] == last["info"] == {
        "dataset": "mpii", "skeleton": vars(MPII), "input": [64, 64], "colour": "RGB",
        "splits": ("train", "valid"), "variant": "tiny",
        "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
        "precision": recipe["precision"]} and recipe["precision"] != "auto"
    assert best["config"] == asdict(TINY) and json.loads(json.dumps(best["recipe"])) == recipe
    for group in last["optimiser"]["param_groups"]:  # Adam as torch has it
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.999), 1e-8, 0)
    scores = run("evaluate.py", "--weights", out / "last.pt", "--data", mpii, "--both", "--out",
                 out.parent / "e").splitlines()
    for line in scores:
        if line.strip()[:1].isdigit():
            assert line in text  # evaluate.py finds what training printed, and needs no flags


def test_epochs_scale_the_schedules_in_proportion_where_nothing_else_is_said(capsys):
    recipe = train.new_recipe({"dataset": "coco", "epochs": 21})
    assert recipe["milestones"] == (12, 16, 19)
    assert (recipe["gamma_warmup"], recipe["gamma_ramp"]) == (1, 5)
    recipe = train.new_recipe({"dataset": "coco", "epochs": 21, "gamma_ramp": 7.0})
    assert (recipe["gamma_warmup"], recipe["gamma_ramp"]) == (1, 7)


def test_gamma_in_a_run_is_frozen_and_then_learnt_from_a_fresh_state(finished):
    with open(finished[0] / "log.csv", encoding="utf-8") as file:
        gammas = [float(row["gamma1"]) for row in csv.DictReader(file)]
    assert gammas[0] == 0 and gammas[1] == pytest.approx(0.05)  # half of tiny's target
    assert gammas[2] != 0.1 and gammas[3] != gammas[2]
    last = lapx.load_file(finished[0] / "last.pt")
    names = [name for name, _ in LAPX(TINY).named_parameters()]
    steps = {name: int(last["optimiser"]["state"][index]["step"])
             for index, name in enumerate(names)}
    assert steps["stem.conv.weight"] == 8
    for name, count in steps.items():  # the module rests for 3 of 8 steps, gamma is set for 2 more
        if "non_local" in name:
            assert count == (3 if name.endswith("gamma") else 5), name


def test_a_run_trains_on_augmented_samples_of_its_own_seed(mpii, tmp_path, monkeypatch):
    seen = []

    def watch(crops):
        seen.append(crops)
        return data.normalise(crops)

    monkeypatch.setattr(train, "normalise", watch)
    people = data.read_mpii(mpii, "train")
    for seed, flags, augmentation in ((7, [], (0.25, 40)), (8, [], (0.25, 40)),
                                      (7, ["--scale-range", 0.1, "--rotation-range", 5], (0.1, 5))):
        seen.clear()
        run("train.py", *arguments(mpii, tmp_path / f"{seed}{len(flags)}", "--epochs", 2, "--seed",
                                   seed, *flags))
        samples = PoseDataset(people, (64, 64), MPII, augmentation, seed)
        batches = epoch_batches(6, 3, seed, 0) + epoch_batches(6, 3, seed, 1)
        assert len(seen) == 4
        for crops, batch in zip(seen, batches):
            assert torch.equal(crops, torch.stack([samples[index][1] for index in batch]))


def test_a_run_starts_from_the_weights_of_its_seed_or_of_init(finished, mpii, tmp_path):
    def start(*flags):
        out = tmp_path / str(flags[-1]).replace("/", "_")
        text = run("train.py", *arguments(mpii, out, "--epochs", 1, "--lr", 1e-30, *flags))
        return lapx.load_file(out / "last.pt")["model"], text

    learnt = [name for name, _ in LAPX(TINY).named_parameters() if not name.endswith("gamma")]
    for seed in (3, 4):
        torch.manual_seed(seed)
        expected = LAPX(TINY).state_dict()
        found, _ = start("--seed", seed)
        assert all(torch.allclose(found[name], expected[name], atol=1e-20) for name in learnt)
    expected = lapx.load_file(finished[0] / "best.pt")["model"]
    found, text = start("--init", finished[0] / "best.pt")
    assert all(torch.allclose(found[name], expected[name], atol=1e-20) for name in learnt)
    assert f"weights from {finished[0] / 'best.pt'}; 0 tensors afresh: none" in text
    assert found["stages.0.hourglass.neck.non_local.gamma"] == pytest.approx(0)  # starts anew


def test_best_is_the_best_epoch_and_last_the_last_one(mpii, tmp_path, monkeypatch):
    # of four epochs; of the two stages in the last one, without and with flip test
    scores = [10, 30, 20, 25, 1, 2, 3, 4]
    seen = []
    found = []

    def results_of(keypoints, people, network):
        seen.append(network.model.stem.conv.weight.clone())
        return keypoints

    def score(keypoints, people):
        assert len(people) == len(keypoints) == 4  # the validation people
        found.append(keypoints)
        return {"Mean": float(scores[len(seen) - 1])}

    monkeypatch.setattr(evaluate, "results_of", results_of)
    monkeypatch.setattr(evaluate, "score", score)
    text = run("train.py", *arguments(mpii, tmp_path / "run"))
    assert len(seen) == 8 and all(torch.equal(seen[3], weight) for weight in seen[4:])
    # an epoch is scored as the end is: in evaluation mode, without the flip test
    assert np.array_equal(found[3], found[5]) and not np.array_equal(found[5], found[7])
    best, last = (lapx.load_file(tmp_path / f"run/{name}.pt") for name in ("best", "last"))
    assert [row["Mean"] for row in best["history"]] == [10, 30]
    assert torch.equal(best["model"]["stem.conv.weight"], seen[1])
    assert torch.equal(last["model"]["stem.conv.weight"], seen[3])
    assert [row["Mean"] for row in last["history"]] == scores[:4]
    assert re.findall(r"^ +([12]) +(\d\.00)$", text, re.M) == [
        ("1", "1.00"), ("2", "2.00"), ("1", "3.00"), ("2", "4.00")]


def test_a_score_that_is_no_number_is_not_the_best(tmp_path):
    model = LAPX(TINY)
    optimiser = torch.optim.Adam(model.parameters())
    history = []
    for number, (score, best) in enumerate(((np.nan, False), (5, True), (np.nan, False))):
        history.append({"epoch": number + 1, "Mean": score})
        train.save(tmp_path, network_of(model, (64, 64)), recipe_of(), optimiser, history, "Mean")
        assert len(lapx.load_file(tmp_path / "last.pt")["history"]) == number + 1
        assert (tmp_path / "best.pt").exists() == best
        (tmp_path / "best.pt").unlink(missing_ok=True)


def test_the_end_of_a_run_draws_what_was_found_with_the_flip_test(mpii, tmp_path, monkeypatch):
    people = data.read_mpii(mpii, "valid")
    found = {flip: np.random.default_rng(flip).uniform(0, 100, (4, 16, 3)) for flip in (0, 1)}
    for keypoints in found.values():
        keypoints[..., 2] /= 250  # scores from 0 to 0.4
    seen = []
    sheets = []
    monkeypatch.setattr(evaluate, "predict", lambda network, crops, flip: found[int(flip)][None])
    monkeypatch.setattr(evaluate, "score", lambda results, people: seen.append(
        (results, people)) or {"Mean": 50.0})
    monkeypatch.setattr(data, "show_samples", lambda samples, *given, **more: sheets.append(
        samples) or Image.new("RGB", (9, 9)))
    network = network_of(LAPX(TINY), (64, 80))
    train.report(tmp_path, recipe_of(), [{"epoch": 1, "loss": 1, "Mean": 50, "gamma1": 0}], "Mean",
                 network, evaluate.crop_loader(network, people))
    assert [np.array_equal(results, found[flip][..., :2] + 1)
            for flip, (results, _) in enumerate(seen)] == [True] * 2
    assert all(truth is people for _, truth in seen)
    _, samples = sheets  # the worst, the first
    assert np.array_equal(samples.people.joints, found[1][..., :2])
    assert np.array_equal(samples.people.annotated, found[1][..., 2] > 0.2)
    assert samples.size == (128, 128) and not samples.augmentation


def test_an_epoch_is_scored_by_the_average_precision_of_coco_people(tmp_path, monkeypatch):
    monkeypatch.setitem(SKELETONS, "stick", STICK)
    stick_figures(tmp_path / "stick", (6, 4))
    text = run("train.py", "--dataset", "coco", "--data", tmp_path / "stick", "--skeleton", "stick",
               "--variant", "tiny", "--input", "64x64", "--batch-size", 3, "--epochs", 1,
               "--workers", 0, "--device", "cpu", "--out", tmp_path / "run")
    assert "coco train2017: 6 persons in 6 pictures\n" in text and "val2017: 4 persons" in text
    last = lapx.load_file(tmp_path / "run/last.pt")
    row, = last["history"]
    line = next(line for line in text.splitlines() if line.strip().startswith("1/1"))
    assert line.split()[4] == f"{100 * row['AP']:.2f}" and "AP images/s" in text
    assert last["info"]["dataset"] == "coco" and len(last["info"]["skeleton"]["joints"]) == 5


def test_loaders_are_made_once_and_have_a_number_of_processes_that_follows_the_cpus(
        mpii, tmp_path, monkeypatch):
    made = []
    make_loader = data.make_loader
    monkeypatch.setattr(data, "make_loader", lambda dataset, *arguments: made.append(
        len(dataset)) or make_loader(dataset, *arguments))
    run("train.py", *arguments(mpii, tmp_path / "run", "--epochs", 2))
    assert made == [6, 4] or made == [4, 6]

    def default():
        parser = argparse.ArgumentParser()
        data.add_workers_argument(parser.add_argument)
        return parser.parse_args([]).workers

    monkeypatch.setattr(data, "cpu_count", lambda: 96)
    assert default() == 1  # beside a CPU that computes
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for cpus, processes, workers in ((96, 1, 16), (16, 1, 15), (16, 4, 3), (1, 1, 0), (2, 4, 0)):
        monkeypatch.setattr(data, "cpu_count", lambda: cpus)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert default() == workers


def test_the_number_of_loader_processes_changes_nothing(finished, mpii, tmp_path):
    run("train.py", *arguments(mpii, tmp_path / "run", "--workers", 2))
    assert same_weights(finished[0], tmp_path / "run")


def test_a_killed_run_resumes_to_the_very_same_weights(finished, mpii, tmp_path):
    rng = np.random.default_rng(time.time_ns())
    out = tmp_path / "run"
    for text in ("   1/4", "go on with:", "go on with:"):
        started = Started(tmp_path / f"{time.time_ns()}.txt", ["train.py", *arguments(
            mpii, out, "--resume")])
        started.wait_for(text)
        time.sleep(rng.uniform(0, 0.5))
        started.process.kill()  # SIGKILL, while it trains, evaluates or saves
        if started.end() == 0:  # it was quicker
            break
        write_file(out / ".part123.last.pt", "half of a file")
    run("train.py", *arguments(mpii, out, "--resume"))
    assert same_weights(finished[0], out)
    assert len((out / "log.csv").read_text("utf-8").splitlines()) == 5
    assert not list(out.glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_at_once_and_the_command_to_go_on_is_there(
        number, finished, mpii, tmp_path):
    out = tmp_path / "run"
    started = Started(tmp_path / "log.txt", ["train.py", *arguments(mpii, out)])
    started.wait_for("   1/4")
    os.kill(started.process.pid, number)
    assert started.end(20) == -number and "Traceback" not in started.printed()
    assert f"go on with: python train.py --resume --out {out}\n" in started.printed()
    run("train.py", "--resume", "--out", out, "--workers", 0, "--device", "cpu")
    assert same_weights(finished[0], out)


def test_a_resumed_run_keeps_its_recipe_and_its_folder(finished, mpii, tmp_path):
    text = run("train.py", *arguments(mpii, finished[0], "--resume"))
    assert "all 4 epochs are done: nothing to do" in text
    write_file(tmp_path / "other/best.pt", b"of somebody else")
    code, text = run("train.py", "--data", mpii, "--out", tmp_path / "b", check=False)
    assert code == 1 and "needs a --dataset" in text
    for more, complaint in (
            ([], "is not empty: --resume"),
            (["--resume", "--out", tmp_path / "other"], "other has no recipe.json; --out DIR"),
            (["--out", tmp_path / "other"], "is not empty"),
            (["--resume", "--epochs", 5], "is a run with epochs 4"),
            (["--resume", "--batch-size", 2], "is a run with batch_size 3"),
            (["--resume", "--variant", "lap"], "is a run with variant tiny")):
        code, text = run("train.py", *arguments(mpii, finished[0], *more), check=False)
        assert code == 1 and complaint in text and "Traceback" not in text
    out = tmp_path / "end"  # stopped after the last epoch, before it was scored and drawn
    shutil.copytree(finished[0], out)
    (out / "predictions.png").unlink()
    run("train.py", "--resume", "--out", out, "--workers", 0, "--device", "cpu")
    assert (out / "predictions.png").exists() and same_weights(finished[0], out)
    out = tmp_path / "again"  # stopped before the first epoch was saved: the same recipe, anew
    write_file(out / "recipe.json", data.read_json(finished[0] / "recipe.json"))
    run("train.py", "--resume", "--out", out, "--workers", 0, "--device", "cpu")
    assert same_weights(finished[0], out)


def test_what_a_resumed_run_may_change_is_told_and_all_else_is_refused(
        finished, tmp_path, capsys):
    path = finished[0] / "recipe.json"
    recipe = {name: tuple(value) if isinstance(value, list) else value
              for name, value in data.read_json(path)["recipe"].items()}
    for name in train.default_recipe("mpii"):
        if name in ("data", "lr", "precision", "accumulate"):
            assert train.read_recipe(path, {name: "other"}) == recipe | {name: "other"}
            assert f"the recipe changes: {name} {recipe[name]} -> other" in capsys.readouterr().out
        else:
            with pytest.raises(InputError, match=f"is a run with {name} .* and keeps it"):
                train.read_recipe(path, {name: "other"})
    content = data.read_json(path)
    content["recipe"]["factor"] = 0.5
    write_file(tmp_path / "recipe.json", content)
    with pytest.raises(InputError, match="another version's: start another run"):
        train.read_recipe(tmp_path / "recipe.json", {})


def test_of_two_runs_started_together_one_gets_the_folder(tmp_path):
    train.write_recipe(tmp_path / "run", recipe_of(seed=1), False, {})
    with pytest.raises(InputError, match=r"recipe.json can't be written \(File exists\)"):
        train.write_recipe(tmp_path / "run", recipe_of(seed=2), False, {})
    assert data.read_json(tmp_path / "run/recipe.json")["recipe"]["seed"] == 1
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["recipe.json"]


def shortened(finished, folder):
    """A copy of a finished run that looks as if it had been stopped before its last epoch."""
    saved = lapx.load_file(finished / "last.pt")
    torch.save({**saved, "history": saved["history"][:-1]}, folder / "last.pt")
    shutil.copy(finished / "recipe.json", folder)


def test_another_learning_rate_is_told_and_recorded(finished, tmp_path):
    shortened(finished[0], tmp_path)
    text = run("train.py", "--resume", "--out", tmp_path, "--lr", 1e-5, "--workers", 0,
               "--device", "cpu")
    assert "resumed after epoch 3" in text
    assert "the recipe changes: lr 0.0003 -> 1e-05" in text
    with open(tmp_path / "log.csv", encoding="utf-8") as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file)]
    assert rates == pytest.approx([3e-4, 3e-4, 3e-4, 2.5e-6])  # a quarter, after two milestones
    assert data.read_json(tmp_path / "recipe.json")["recipe"]["lr"] == 1e-5


def without_norm(module, x):
    """Stands in for BatchNorm, which would see another batch in each process."""
    return x * module.weight[:, None, None] + module.bias[:, None, None]


def two_processes(folder, *commands, status=0):
    """Runs train.py in two processes, as torchrun does -> what they printed. commands: of both, or
    of each. The first must end with that status; then the second is killed, if it did not end with
    it, too, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [Started(folder / f"{rank}.txt", ["train.py", *commands[rank % len(commands)]],
                       RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                       MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)) for rank in range(2)]
    assert started[0].end() == status, started[0].printed()
    assert started[1].end(1 if status else 20) in (status, None), started[1].printed()
    return [process.printed() for process in started]


def test_a_step_of_two_processes_is_the_step_of_one_with_the_whole_batch(
        mpii, tmp_path, monkeypatch):
    monkeypatch.setattr(nn.BatchNorm2d, "forward", without_norm)
    flags = ["--batch-size", 4, "--epochs", 1, "--precision", "float32"]  # one step
    two_processes(tmp_path, arguments(mpii, tmp_path / "two", *flags))
    run("train.py", *arguments(mpii, tmp_path / "one", *flags))
    one, two = (lapx.load_file(tmp_path / f"{name}/last.pt") for name in ("one", "two"))
    assert two["history"][0]["loss"] == pytest.approx(one["history"][0]["loss"], rel=1e-5)
    states = [saved["optimiser"]["state"] for saved in (one, two)]
    assert states[0].keys() == states[1].keys()
    for number in states[0]:  # Adam's mean is a tenth of the first step's gradient
        expected = states[0][number]["exp_avg"]
        found = states[1][number]["exp_avg"]
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max())
    speeds = [saved["history"][0]["images_per_second"] * saved["history"][0]["seconds"]
              for saved in (one, two)]
    assert min(speeds) > 3  # all processes' images are counted: four a step


def test_two_processes_train_save_and_score_one_network_and_every_person_once(mpii, tmp_path):
    out = tmp_path / "run"
    flags = ["--batch-size", 4, "--epochs", 2]
    (tmp_path / "mpii").symlink_to(mpii)  # on another machine the data may lie elsewhere
    printed = two_processes(tmp_path, arguments(mpii, out, *flags),
                            arguments(tmp_path / "mpii", out, *flags))
    assert printed[0].count("2/2") == 1 and not printed[1]  # one process talks, and nobody warns
    assert "Warning" not in printed[0]
    saved = lapx.load_file(out / "last.pt")
    assert saved["model"]["stem.bn.num_batches_tracked"] == 2  # 6 persons, batches of 4
    facts = data.read_json(out / "recipe.json")["facts"]
    assert facts["processes"] == 2
    text = run("evaluate.py", "--weights", out / "last.pt", "--data", mpii, "--both", "--out",
               tmp_path / "e")
    for line in text.splitlines():  # the four persons' scores are those of the saved network
        if line.strip()[:1].isdigit():
            assert line in printed[0]


def test_two_processes_learn_what_one_learns_from_a_batch_in_two_parts(mpii, tmp_path):
    flags = ["--batch-size", 4, "--epochs", 1, "--precision", "float32"]  # one step
    two_processes(tmp_path, arguments(mpii, tmp_path / "two", *flags))
    # here BatchNorm sees half a batch as well
    text = run("train.py", *arguments(mpii, tmp_path / "one", *flags, "--accumulate", 2))
    assert "images/s" in text
    one, two = (lapx.load_file(tmp_path / f"{name}/last.pt") for name in ("one", "two"))
    assert two["history"][0]["loss"] == pytest.approx(one["history"][0]["loss"], rel=1e-5)
    for number, state in one["optimiser"]["state"].items():
        found = two["optimiser"]["state"][number]["exp_avg"]
        expected = state["exp_avg"]
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max() + 1e-9)
    assert one["model"]["stem.bn.num_batches_tracked"] == 2  # parts
    assert {int(state["step"]) for state in one["optimiser"]["state"].values()} == {1}


def test_a_batch_in_parts_without_batchnorm_is_the_batch(mpii, tmp_path, monkeypatch):
    monkeypatch.setattr(nn.BatchNorm2d, "forward", without_norm)
    flags = ["--batch-size", 6, "--epochs", 1, "--precision", "float32"]
    for parts in (1, 3):
        run("train.py", *arguments(mpii, tmp_path / str(parts), *flags, "--accumulate", parts))
    one, three = (lapx.load_file(tmp_path / f"{parts}/last.pt") for parts in (1, 3))
    assert three["history"][0]["loss"] == pytest.approx(one["history"][0]["loss"], rel=1e-5)
    for number, state in one["optimiser"]["state"].items():
        found = three["optimiser"]["state"][number]["exp_avg"]
        expected = state["exp_avg"]
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max())
    text = run("train.py", *arguments(mpii, tmp_path / "four", *flags, "--accumulate", 4))
    assert "6 persons in batches of 6 for 1 processes, --accumulate 4: the batches are of 4" in text
    code, text = run("train.py", *arguments(mpii, tmp_path / "7", *flags, "--accumulate", 7),
                     check=False)
    assert code == 1 and "--accumulate 7: they are too few" in text


def test_a_resumed_run_may_change_what_cures_it(finished, mpii, tmp_path):
    text = run("train.py", *arguments(mpii, tmp_path / "run", "--epochs", 2, "--batch-size", 6,
                                      "--precision", "float32", "--init", finished[0] / "best.pt"))
    assert "weights from" in text
    shortened(tmp_path / "run", tmp_path)
    text = run("train.py", "--resume", "--out", tmp_path, "--accumulate", 3, "--precision",
               "tf32", "--workers", 0, "--device", "cpu")
    assert "the recipe changes: accumulate 1 -> 3" in text
    assert "resumed after epoch 1" in text and "weights from" not in text  # --init's were before
    history = lapx.load_file(tmp_path / "last.pt")["history"]
    assert [row["accumulate"] for row in history] == [1, 3]
    assert [row["precision"] for row in history] == ["float32", "tf32"]


def test_epochs_are_scored_as_often_as_one_wishes_and_the_last_one_always(
        finished, mpii, tmp_path, monkeypatch):
    out = tmp_path / "run"
    text = run("train.py", *arguments(mpii, out, "--eval-every", 3))
    history = lapx.load_file(out / "last.pt")["history"]
    assert ["Mean" in row for row in history] == [False, False, True, True]
    assert same_weights(finished[0], out)
    scores = [line.split()[4] for line in text.splitlines() if re.match(r" +\d/4 ", line)]
    assert scores[:2] == ["-", "-"] and scores[2:] == [f"{row['Mean']:.2f}" for row in history[2:]]
    with open(out / "log.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["Mean"] == "" for row in rows] == [True, True, False, False]
    assert [row["loss"] != "" for row in rows] == [True] * 4 and (out / "curve.png").exists()
    best = max((row for row in history if "Mean" in row), key=lambda row: row["Mean"])
    assert lapx.load_file(out / "best.pt")["history"][-1]["Mean"] == best["Mean"]
    monkeypatch.setattr(evaluate, "score", lambda *given: {"Mean": 0.5})  # as low as it may be
    clock = iter([0, 5, 10, 10, 30, 40, 40, 50, 60])  # the epochs take 10, 30 and 20 seconds
    monkeypatch.setattr(train, "time", argparse.Namespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(train, "timed", lambda loader, waits: loader)
    text = run("train.py", *arguments(mpii, tmp_path / "low", "--epochs", 3, "--eval-every", 2))
    assert lapx.load_file(tmp_path / "low/best.pt")["history"][-1]["Mean"] == 0.5
    left = [line.split()[-1] for line in text.splitlines() if re.match(r" +\d/3 ", line)]
    assert left == ["0:00:20", "0:00:20", "0:00:00"]  # by the mean of the last two epochs


def test_two_processes_that_are_not_about_to_do_the_same_are_refused(finished, mpii, tmp_path):
    (tmp_path / "one").mkdir()
    shortened(finished[0], tmp_path / "one")
    flags = ["--batch-size", 3, "--resume"]
    write_file(tmp_path / "two/recipe.json", data.read_json(tmp_path / "one/recipe.json"))
    shutil.copytree(tmp_path / "one", tmp_path / "other")  # as many epochs, but of another run
    saved = lapx.load_file(tmp_path / "other/last.pt")
    saved["history"][-1]["loss"] = 0.5
    torch.save(saved, tmp_path / "other/last.pt")
    for one, two, complaint in (  # as on two machines: each with a folder and flags of its own
            (arguments(mpii, tmp_path / "one", *flags), arguments(mpii, tmp_path / "two", *flags),
             "process 1 has epochs done 0, process 0 has 3"),
            (arguments(mpii, tmp_path / "one", *flags), arguments(mpii, tmp_path / "other", *flags),
             "process 1 has last loss 0.5, process 0 has"),
            (arguments(mpii, tmp_path / "new", "--batch-size", 4),
             arguments(mpii, tmp_path / "new", "--batch-size", 4, "--lr", 1e-5),
             "process 1 has lr 1e-05, process 0 has 0.0003")):
        before = sorted(tmp_path.rglob("*.*"))
        printed = two_processes(tmp_path, one, two, status=1)
        assert complaint in printed[0] and "Traceback" not in printed[0] and not printed[1]
        assert set(tmp_path.rglob("*.*")) - {*before} <= {tmp_path / "0.txt", tmp_path / "1.txt"}


def test_what_is_wrong_is_told_by_one_process(mpii, tmp_path):
    printed = two_processes(tmp_path, arguments(mpii, tmp_path / "run", "--data", "none"), status=1)
    assert printed[0].count("error: there are no annotations") == 1 and not printed[1]
    printed = two_processes(tmp_path, arguments(mpii, tmp_path / "run", "--compile"), status=1)
    assert "error: --compile is for one process" in printed[0] and not printed[1]


def test_what_is_wrong_in_another_process_is_told_by_it_in_the_end(monkeypatch):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "1"),
                        ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    ended = []
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(train.dist, "destroy_process_group", lambda: ended.append(True))
    for name in ("stdout", "stderr"):  # to be restored after this test
        monkeypatch.setattr(sys, name, getattr(sys, name))
    stderr = sys.stderr
    with pytest.raises(SystemExit, match="there are no annotations of split"):
        call("train.py", ["--dataset", "mpii", "--data", "none"])
    assert waited == [10] and sys.stderr is stderr and ended == [True]


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(
        finished, mpii, tmp_path):
    shortened(finished[0], tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    code, text = run("train.py", "--resume", "--out", tmp_path, "--lr", 1e30, "--workers", 0,
                     "--device", "cpu", check=False)
    assert code == 1 and "epoch 4, step 2, with lr" in text and "Traceback" not in text
    assert (tmp_path / "last.pt").read_bytes() == before


@pytest.mark.parametrize("spoil, complaint", [
    (lambda saved: saved.pop("history"), "'history' is missing"),
    (lambda saved: saved["optimiser"]["param_groups"].clear(), "param"),
    (lambda saved: saved["model"].pop("stem.conv.weight"), "Missing.*stem.conv.weight")])
def test_a_checkpoint_that_cannot_be_resumed_gets_a_sentence(spoil, complaint, finished, tmp_path):
    shortened(finished[0], tmp_path)
    saved = lapx.load_file(tmp_path / "last.pt")
    spoil(saved)
    torch.save(saved, tmp_path / "last.pt")
    code, text = run("train.py", "--resume", "--out", tmp_path, "--device", "cpu", check=False)
    assert code == 1 and re.search(f"last.pt must be a last.pt of train.*{complaint}", text), text


@pytest.mark.parametrize("content", ["{", {"recipe": {}}, {"recipe": {"dataset": "mpii"}}])
def test_a_recipe_that_cannot_be_resumed_gets_a_sentence(content, tmp_path):
    write_file(tmp_path / "recipe.json", content)
    code, text = run("train.py", "--resume", "--out", tmp_path, check=False)
    assert code == 1 and "recipe.json must be" in text and "Traceback" not in text


def test_sizes_are_given_as_height_and_width():
    assert data.image_size("256x192") == (256, 192) and data.image_size("64X4096") == (64, 4096)
    for text in ("63x64", "64x63", "4097x64", "64x4097", "256", "256x", "x64", "64x64x64"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not HEIGHTxWIDTH"):
            data.image_size(text)


@pytest.mark.parametrize("flag, value", [
    ("--lr", 0), ("--gamma-warmup", -1), ("--gamma-ramp", 0), ("--scale-range", 1),
    ("--scale-range", -0.1), ("--rotation-range", 181)])
def test_impossible_numbers_of_a_recipe_are_refused(flag, value, mpii, tmp_path):
    code, text = run("train.py", *arguments(mpii, tmp_path / "run", flag, value), check=False)
    assert code == 1 and "--lr and --gamma-ramp must be above 0" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_breaks_during_training_stops_it_with_its_path(workers, mpii, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(mpii, root)
    (root / "images/4.jpg").write_bytes((mpii / "images/4.jpg").read_bytes()[:3000])
    code, text = run("train.py", *arguments(root, tmp_path / "run", "--workers", workers),
                     check=False)
    assert code == 1 and "4.jpg can't be read" in text and "Traceback" not in text


def test_a_loader_process_that_is_killed_gets_a_sentence(mpii, tmp_path):
    started = Started(tmp_path / "log.txt", ["train.py", *arguments(
        mpii, tmp_path / "run", "--workers", 1, "--epochs", 100)])
    started.wait_for("   1/100")
    pid = started.process.pid
    worker, *_ = Path(f"/proc/{pid}/task/{pid}/children").read_text("utf-8").split()
    os.kill(int(worker), signal.SIGKILL)
    assert started.end(60) == 1
    assert "a loader process died" in started.printed() and "Traceback" not in started.printed()


def test_fine_tuning_takes_every_layer_that_fits_and_names_the_others(tmp_path):
    loaded = LAPX(TINY)
    torch.save(loaded.state_dict(), tmp_path / "16.pt")
    model = LAPX(replace(TINY, num_joints=17))
    missing = lapx.load_fitting(model, tmp_path / "16.pt")
    # the two heads, and the way of the heatmaps to the next stage
    assert missing == ["stages.0.head.weight", "stages.0.head.bias",
                       "stages.0.heatmaps_to_next.weight", "stages.1.head.weight",
                       "stages.1.head.bias"]
    assert torch.equal(model.stem.conv.weight, loaded.stem.conv.weight)
    broken = loaded.state_dict()
    broken["stem.conv.weight"][0, 0, 0, 0] = np.nan
    torch.save(broken, tmp_path / "broken.pt")
    with pytest.raises(ValueError, match="stem.conv.weight has NaN"):
        lapx.load_fitting(model, tmp_path / "broken.pt")
    with pytest.raises(InputError, match="no layer of the shape of one of this network"):
        lapx.load_fitting(LAPX(replace(TINY, channels=208)), tmp_path / "16.pt")


# the README's example of own joints
STICK = eval(re.search(r'"stick": (Skeleton\((?s:.)*?\n    \)),', README)[1],
             {"Skeleton": lapx.Skeleton})


def stick_figures(root, counts=(400, 40)):
    """Writes a data set of five joints in COCO's layout; the README's example of own joints."""
    picked = [9, 15, 10, 5, 0]  # of MPII's 16: head top, left and right wrist, left and right ankle
    for seed, (split, count) in enumerate(zip(("train2017", "val2017"), counts)):
        folder = Path(root) / "images" / split
        folder.mkdir(parents=True, exist_ok=True)
        images = []
        annotations = []
        for number in range(count):
            person, picture = figure(10 + seed, number)
            picture.save(folder / f"{number}.jpg", quality=95)
            width, height = picture.size
            images.append({"id": number, "file_name": f"{number}.jpg", "width": width,
                           "height": height})
            keypoints = []
            for joint in picked:
                x, y = person["joints"][joint]  # COCO counts pixels from 0, and 2 is visible
                keypoints += [x - 1, y - 1, 2] if person["joints_vis"][joint] else [0, 0, 0]
            annotations.append({"id": number + 1, "image_id": number, "category_id": 5,
                                "iscrowd": 0, "bbox": [0, 0, width, height],
                                "area": 0.5 * width * height, "keypoints": keypoints})
        write_file(Path(root) / f"annotations/person_keypoints_{split}.json", {
            "images": images, "annotations": annotations,
            "categories": [{"id": 5, "name": "stick figure", "keypoints": list(STICK.joints)}]})


def test_own_joints_train_and_are_scored_as_the_readme_says(tmp_path, monkeypatch):
    monkeypatch.setitem(SKELETONS, "stick", STICK)
    stick_figures(tmp_path / "stick", (6, 4))
    run("train.py", "--dataset", "coco", "--data", tmp_path / "stick", "--skeleton", "stick",
        "--input", "64x64", "--batch-size", 3, "--epochs", 1, "--workers", 0, "--device", "cpu",
        "--variant", "tiny", "--out", tmp_path / "run")
    text = run("evaluate.py", "--weights", tmp_path / "run/best.pt", "--data", tmp_path / "stick",
               "--out", tmp_path)
    assert "coco val2017, 4 persons" in text and "AP" in text
    results = data.read_json(tmp_path / "results.json")
    assert results[0]["category_id"] == 5 and len(results[0]["keypoints"]) == 15
    run("evaluate.py", "--results", tmp_path / "results.json", "--skeleton", "stick",
        "--annotations", tmp_path / "stick/annotations/person_keypoints_val2017.json", "--out",
        tmp_path)


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_the_trial_runs_of_cuda_graphs_leave_no_trace(monkeypatch, precision):
    model = LAPX(TINY).eval()
    before = copy.deepcopy(model.state_dict())
    seen = []

    def trials(module, images):  # stands in for torch's, which needs a GPU
        seen.append((torch.is_autocast_enabled("cuda"), torch.is_autocast_cache_enabled()))
        assert module.training and module[0].training and images[0].shape == (2, 3, 64, 64)
        module(*images)
        return module

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", trials)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # else autocast is off
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert train.with_cuda_graphs(model, 2, (64, 64), precision)[0] is model
    assert seen == [(precision == "bfloat16", False)]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_cuda_graphs_are_for_one_gpu_and_batches_in_one_part(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, mode: (model, mode))
    monkeypatch.setattr(train, "with_cuda_graphs", lambda *arguments: arguments)
    for device, compiled, accumulate, expected in (
            ("cpu", False, 1, "model"), ("cpu", True, 1, ("model", None)),
            ("cuda", False, 1, ("model", 8, (64, 64), "float32")), ("cuda", False, 2, "model"),
            ("cuda", True, 1, ("model", "reduce-overhead")), ("cuda", True, 2, ("model", None))):
        recipe = recipe_of(compile=compiled, accumulate=accumulate)
        assert train.accelerated("model", recipe, torch.device(device), 8, 1) == expected


def gpu_batch(persons=4):
    """A batch as the loader gives it to a GPU."""
    generator = torch.Generator().manual_seed(0)
    crops = torch.randint(0, 256, (persons, 64, 64, 3), generator=generator, dtype=torch.uint8)
    joints = 64 * torch.rand(persons, 16, 2, generator=generator)
    return None, crops.pin_memory(), joints.pin_memory(), torch.ones(persons, 16).pin_memory()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_no_step_waits_for_the_gpu(gpu, precision):
    model = LAPX(TINY).to(gpu, memory_format=data.memory_format(gpu))
    optimiser = torch.optim.Adam(model.parameters(), fused=True)
    recipe = recipe_of(precision=precision)
    batches = [gpu_batch()] * 4
    for graphs in (False, True):
        wrapped = train.with_cuda_graphs(model, 4, (64, 64), precision) if graphs else model
        non_locals = model.non_locals().values()
        # makes the constants
        train.train_epoch(wrapped, non_locals, optimiser, batches, 0, recipe, gpu)

        class Watched(list):  # waiting is an error within the epoch, but for its last step
            def __iter__(self):
                for number, batch in enumerate(list.__iter__(self)):
                    torch.cuda.set_sync_debug_mode("error" if number < 3 else "default")
                    yield batch

        for epoch in (0, 30, 70):  # gamma is frozen, rises, is learnt
            train.train_epoch(wrapped, non_locals, optimiser, Watched(batches), epoch, recipe, gpu)


@pytest.mark.parametrize("precision, tolerance",
                         [("float32", 1e-4), ("tf32", 1e-2), ("bfloat16", 5e-2)])
def test_a_gpu_learns_and_predicts_what_the_cpu_does(gpu, precision, tolerance):
    losses = {}
    heatmaps = {}
    for name, device in (("cpu", torch.device("cpu")), ("cuda", gpu), ("cuda graphs", gpu)):
        model = scrambled(TINY).to(device, memory_format=data.memory_format(device))
        evaluate.set_precision(precision)
        network = network_of(model, (64, 64))
        network.device = device
        heatmaps[name] = network(gpu_batch()[1])[-1].cpu()
        wrapped = model
        if name == "cuda graphs":
            before = copy.deepcopy(model.state_dict())
            wrapped = train.with_cuda_graphs(model, 4, (64, 64), precision)
            assert all(torch.equal(before[key], tensor) for key, tensor in
                       model.state_dict().items())
        optimiser = torch.optim.Adam(model.parameters(), fused=True)
        recipe = recipe_of(precision="float32" if device.type == "cpu" else precision)
        losses[name] = [loss for epoch in (0, 30, 70) for loss in train.train_epoch(
            wrapped, model.non_locals().values(), optimiser, [gpu_batch()] * 2, epoch, recipe,
            device)[0].tolist()]
    for name in list(losses)[1:]:
        assert largest_difference(heatmaps[name], heatmaps["cpu"]) < tolerance, name
        assert losses[name] == pytest.approx(losses["cpu"], rel=tolerance), name


def test_a_run_on_a_gpu_is_killed_goes_on_and_is_the_cpus(gpu, mpii, tmp_path):
    def flags(device):
        made = arguments(mpii, tmp_path / device, "--device", device, "--precision", "float32",
                         "--workers", 2, "--input", "128x128", "--resume")
        return ["lapx" if flag == "tiny" else str(flag) for flag in made]  # in another process, too

    run("train.py", *flags("cpu"))
    with subprocess.Popen([sys.executable, "train.py", *flags("cuda")], cwd=HERE,
                          stdout=subprocess.PIPE, text=True) as process:
        while not process.stdout.readline().startswith("   2/4"):
            assert process.poll() is None
        process.kill()
    assert "resumed after epoch" in run("train.py", *flags("cuda"))
    losses = [[row["loss"] for row in lapx.load_file(tmp_path / name / "last.pt")["history"]]
              for name in ("cpu", "cuda")]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    for device in ("cuda", "cpu"):
        run("evaluate.py", "--weights", tmp_path / "cuda/last.pt", "--data", mpii, "--device",
            device, "--out", tmp_path / device)
    scores = [data.read_json(tmp_path / f"{device}/metrics.json") for device in ("cuda", "cpu")]
    assert scores[0] == pytest.approx(scores[1], abs=2)  # a joint of the 56


def test_compiling_in_bfloat16_on_a_cpu_is_refused_before_anything_starts(mpii, tmp_path):
    code, text = run("train.py", *arguments(mpii, tmp_path / "run", "--compile", "--precision",
                                            "bfloat16"), check=False)
    assert code == 1 and "--compile needs --precision float32 on a CPU" in text
    assert not (tmp_path / "run").exists()


def test_what_is_compiled_is_trained_and_the_network_itself_is_saved(
        mpii, tmp_path, monkeypatch):
    modes = []
    steps = []

    def compiled(model, mode=None):  # stands in for torch's compiler, which takes minutes
        modes.append(mode)
        wrapper = nn.Sequential(model)
        wrapper.register_forward_hook(lambda wrapper, images, outputs: steps.append(len(images[0])))
        return wrapper

    monkeypatch.setattr(torch, "compile", compiled)
    flags = ["--precision", "float32", "--epochs", 1]
    run("train.py", *arguments(mpii, tmp_path / "plain", *flags))
    assert not modes
    run("train.py", *arguments(mpii, tmp_path / "run", *flags, "--compile"))
    assert modes == [None] and steps == [3] * 2
    assert same_weights(tmp_path / "plain", tmp_path / "run")


def test_a_curve_is_drawn_for_every_gamma():
    row = {"epoch": 1, "loss": 2, "Mean": 50, "gamma1": 0.1, "gamma2": 0.2, "gamma3": 0.3}
    colours = {colour for _, colour in train.draw_curve([row], "Mean").getcolors(10**6)}
    assert {data.RIGHT, data.LEFT, data.MIDDLE} <= colours


def test_samples_are_drawn_without_a_run(mpii, tmp_path):
    code, text = run("train.py", "--show", tmp_path / "samples.jpg", check=False)
    assert code != 0 and "samples.jpg must end in .png" in text
    run("train.py", *arguments(mpii, tmp_path / "run", "--show", tmp_path / "samples.png"))
    sheet = Image.open(tmp_path / "samples.png")
    assert sheet.size == (6 * 68 + 4, 4 * 68 + 4) and len(sheet.getcolors(10**6)) > 100
    assert not (tmp_path / "run").exists()


def test_overfitting_scores_the_pictures_it_trains_on_as_they_are(mpii, tmp_path, monkeypatch):
    learnt = []
    predicted = []
    for seen, module in ((learnt, train), (predicted, evaluate)):
        monkeypatch.setattr(module, "normalise", lambda crops, *given, seen=seen: (
            seen.append(crops) or data.normalise(crops, *given)))
    text = run("train.py", *arguments(mpii, tmp_path / "run", "--overfit", 2, "--epochs", 1))
    assert "overfitting 2 persons, unaugmented" in text and "the batches are of 2" in text
    dataset = PoseDataset(data.read_mpii(mpii, "train"), (64, 64), MPII)
    expected = [dataset[row][1] for row in range(2)]
    assert all(torch.equal(crops, torch.stack(expected)) for crops in predicted[:2])
    assert len(learnt) == 1  # in any order
    assert sorted(learnt[0].tolist()) == sorted(crop.tolist() for crop in expected)


# ---------------------------------------------------------------------------- export.py

CBAM = LAPXConfig(16, 16, 1, False, "CBAM", "CBAM", ("CBAM",))


def scrambled(config):
    """A network whose every tensor matters, as those of a trained one do."""
    torch.manual_seed(1)
    model = LAPX(config).eval()
    for name, tensor in model.state_dict().items():
        if name.endswith("running_mean") or name.endswith("bias"):
            tensor.normal_(0, 0.1)
        elif name.endswith("running_var"):
            tensor.uniform_(1, 1.5)
        elif name.endswith(("alpha", "gamma")):
            tensor.normal_(0.6, 0.1)
    return model


def largest_difference(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("variant", ["lapx", "lap", "row3", "row5", "row9"])
def test_each_form_for_export_is_the_same_function(variant):
    config = VARIANTS[variant]
    model = scrambled(replace(config, channels=config.channels // 4)).double()
    images = torch.randn(2, 3, 64, 80, dtype=torch.float64)
    with torch.no_grad():
        expected = model(images)
        for form in (export.folded, export.fast, export.quantisable):
            found = export.Outputs(form(model), all_stages=True)(images)
            assert len(found) == len(expected) == model.config.stages
            for stage, heatmaps in zip(expected, found):
                assert largest_difference(heatmaps, stage) < 1e-12, form


def test_making_a_form_for_export_leaves_the_network_as_it_was():
    model = scrambled(TINY)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export.fast(model)
    export.quantisable(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_file_gives_the_last_stage_or_all_of_them_and_their_keypoints():
    model = scrambled(TINY)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        first, last = model(images)
        for all_stages, keypoints in itertools.product([False, True], repeat=2):
            found = export.Outputs(model, all_stages, keypoints)(images)
            expected = [first] * all_stages + [last] + [decode_to_pixels(last)] * keypoints
            assert len(found) == len(expected) and all(map(torch.equal, found, expected))


def test_the_fast_elu_is_elu_for_every_number():
    extremes = torch.tensor([-1e30, -1e-30, 0, 1e-30, 1e30])
    x = torch.cat([torch.linspace(-30, 30, 10001), extremes])
    assert torch.allclose(export.fast_elu(None, x), nn.functional.elu(x), rtol=1e-6, atol=1.2e-7)


@pytest.mark.parametrize("top", [8, 0.5])
def test_elu_in_8_bits_is_elu_to_a_step_and_a_half(top):
    z = torch.linspace(-6, top, 3 * 64 * 64).reshape(1, 3, 64, 64)
    proto = export.to_onnx(nn.Sequential(nn.ELU(), nn.MaxPool2d(1)), (64, 64), ["heatmaps"])
    proto = export.quantised(proto, z, 1)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    found, = session.run(None, {"images": z.numpy()})
    step = (6 + max(top, 4.5)) / 255  # of z, which is rounded twice, as is the result
    assert np.abs(found - nn.functional.elu(z).numpy()).max() < 1.5 * step + 0.01  # e^-4.5 / 4


@pytest.fixture(scope="session", autouse=True)
def started(request, mpii, tmp_path_factory):
    """What takes long is done by another process while the other tests run: `export.py --costs`,
    and in a folder with tiny.pt, one.pt and cbam.pt the ONNX files of onnx_files."""
    if not any({"onnx_files", "table"} & {*item.fixturenames} for item in request.session.items):
        yield None  # no test that was chosen needs them
        return
    folder = tmp_path_factory.mktemp("onnx")
    for name, config in (("tiny", TINY), ("one", ONE_STAGE), ("cbam", CBAM)):
        torch.save({"config": asdict(config), "model": scrambled(config).state_dict(),
                    "info": evaluate.model_info("mpii", MPII, (64, 96), variant=name)},
                   folder / f"{name}.pt")
    process = Started(folder / "log.txt", ["export.py", "--costs"], *(
        ["export.py", "--weights", folder / f"{checkpoint}.pt", "--out", folder / f"{name}.onnx",
         *flags] for name, checkpoint, *flags in (
            ("plain", "one", "--plain"), ("fast", "tiny", "--keypoints", "--all-stages"),
            ("int8", "one", "--int8", "--bgr", "--data", mpii, "--batch", "2"),
            ("cbam", "cbam", "--int8", "--image", mpii / "images"))))
    yield folder, process
    process.process.kill()


@pytest.fixture(scope="session")
def onnx_files(started):
    """The folder with plain.onnx and int8.onnx of one.pt, fast.onnx of tiny.pt and cbam.onnx, in 8
    bits, of cbam.pt; and what was printed."""
    folder, process = started
    assert process.end(300) == 0, process.printed()
    return folder, process.printed()


@pytest.fixture(scope="session")
def table(started):
    """The rows of `python export.py --costs`: {(variant, input, joints): the other columns}."""
    _, process = started
    process.wait_for("row14")
    process.wait_for("opset")  # the line is whole
    lines = process.printed().split("opset")[0].splitlines()[2:]
    rows = [line.replace("|", " ").split() for line in lines if re.match("lap|row", line)]
    return {(name, size, joints): columns for name, size, joints, *columns in rows}


def test_counts_agree_with_every_figure_of_the_paper(table):
    assert {name for name, *_ in table} == {*PAPERS}
    for row, (_, _, _, thop_parameters, printed, _, thop_flops, *printed_flops) in table.items():
        assert f"{int(thop_parameters) / 1e6:.2f}" == printed, row
        # LAP's 6.247 is 6.25, and printed as 6.24
        assert printed_flops in ([], [thop_flops], ["6.24"] if thop_flops == "6.25" else []), row
    paper = {("lapx", "256x256", "16"): ["2.30", "3.45"],
             ("lapx", "256x192", "17"): ["2.30", "2.59"],
             ("lapx", "384x288", "17"): ["2.30", "5.82"],
             ("lap", "256x256", "16"): ["2.34", "3.70"],
             ("lap", "256x192", "17"): ["2.34", "2.78"], ("lap", "384x288", "17"): ["2.34", "6.24"]}
    assert {row: [columns[4], columns[-1]] for row, columns in table.items()
            if len(columns) == 8} == paper
    millions = "2.30 2.26 2.25 2.23 2.28 2.26 2.26 2.26 2.26 2.26 2.30 2.30 2.30 2.30".split()
    assert [table[f"row{row}", "256x256", "16"][4] for row in range(1, 15)] == millions


@pytest.mark.parametrize("variant, stages, channels, parameters, gigamacs", [
    ("lapx", 3, 208, 2311111, 3.3446), ("lap", 2, 256, 2338570, 3.6063),
    ("row1", 2, 256, 2297120, 3.6050), ("row2", 3, 208, 2258720, 3.3423),
    ("row3", 4, 180, 2253709, 3.2279), ("row4", 5, 160, 2230160, 3.1282),
    ("row5", 3, 208, 2275238, 3.3435), ("row6", 3, 208, 2259035, 3.3435),
    ("row7", 3, 208, 2266832, 3.3423), ("row8", 3, 208, 2267147, 3.3435),
    ("row9", 3, 208, 2259140, 3.3439), ("row10", 3, 208, 2267252, 3.3439)])
def test_true_parameters_and_multiply_adds(variant, stages, channels, parameters, gigamacs, table):
    columns = table[variant, "256x256", "16"]
    assert [*map(int, columns[:3]), float(columns[5])] == [stages, channels, parameters, gigamacs]


@pytest.mark.parametrize("name, context", [("int8", {"query", "key", "value", "out"}),
                                           ("cbam", set())])
def test_a_file_in_8_bits_is_close_to_the_network_and_in_8_bits_but_for_heads(
        name, context, onnx_files, mpii):
    import onnx

    checkpoint = onnx_files[0] / {"int8": "one.pt", "cbam": "cbam.pt"}[name]
    people = data.read_mpii(mpii, "valid")
    dataset = PoseDataset(people, (64, 96), MPII)
    crops = torch.stack([dataset[row][1] for row in range(4)])
    network = evaluate.open_predictor(checkpoint, bgr=name == "int8")
    found, = evaluate.open_predictor(onnx_files[0] / f"{name}.onnx")(crops)
    expected = network(crops)[-1]
    assert 0 < (found - expected).pow(2).mean() < 0.1 ** 2 * expected.pow(2).mean()
    graph = onnx.load(onnx_files[0] / f"{name}.onnx").graph
    weights = [node.input[1] for node in graph.node if node.op_type == "Conv"]
    in_float = {weight.split(".")[-2] for weight in weights if "DequantizeLinear" not in weight}
    assert in_float == {"head"} | context
    assert sum("DequantizeLinear" in weight for weight in weights) > 60
    made = {output: node.op_type for node in graph.node for output in node.output}
    elus = [node for node in graph.node if node.op_type == "Sigmoid"
            and made[node.input[0]] == "DequantizeLinear"]
    assert len(elus) > 30 and not any(node.op_type == "Elu" for node in graph.node)


def test_the_ranges_of_an_8_bit_file_are_those_of_training_crops(weights, mpii):
    people = data.read_mpii(mpii, "train")
    crops = torch.stack([PoseDataset(people, (64, 64), MPII)[row][1] for row in range(6)])
    for bgr in (False, True):
        network = evaluate.open_predictor(weights[0], bgr=bgr)
        images = export.calibration_images(network, argparse.Namespace(data=mpii, image=None))
        assert torch.equal(images, data.normalise(crops, bgr))
        three = export.calibration_images(network, argparse.Namespace(data=mpii, image=None), 3)
        assert torch.equal(three, images[[0, 2, 5]])  # spread over the split
        folder = argparse.Namespace(data=None, image=[mpii / "images"])
        images = export.calibration_images(network, folder, count=3)
        whole = data.open_picture(sorted((mpii / "images").iterdir())[2])
        box = [0, 0, *whole.size]
        crop, _ = evaluate.crop_of(network, whole, box)
        assert len(images) == 3 and torch.equal(images[2:], data.normalise(crop, bgr))


def test_a_file_that_computes_something_else_is_not_written(onnx_files, tmp_path, monkeypatch):
    import onnx

    folder, _ = onnx_files
    for name, checkpoint, *flags in (("plain", "one", "--plain"),
                                     ("fast", "tiny", "--keypoints", "--all-stages")):
        out = tmp_path / f"{name}.onnx"
        # the file that was written before stands in for the exporter, which takes long
        monkeypatch.setattr(export, "to_onnx",
                            lambda *arguments: onnx.load(folder / f"{name}.onnx"))
        run("export.py", "--weights", folder / f"{checkpoint}.pt", *flags, "--out", out)
        assert out.exists()
        out.unlink()
        for place in [0, 1] if name == "fast" else [0]:  # every stage is looked at
            saved = lapx.load_file(folder / f"{checkpoint}.pt")
            saved["model"][f"stages.{place}.head.bias"][3] += 1e-3
            torch.save(saved, tmp_path / "other.pt")
            status, text = run("export.py", "--weights", tmp_path / "other.pt", *flags, "--out",
                               out, check=False)
            assert status == 1 and "no file is written" in text and not out.exists()
    monkeypatch.setattr(export, "keypoints_of", lambda heatmaps: decode_to_pixels(heatmaps) + 0.01)
    status, text = run("export.py", "--weights", folder / "tiny.pt", *flags, "--out", out,
                       check=False)
    assert status == 1 and "keypoints in the file differ" in text and not out.exists()


def test_an_export_may_differ_by_what_float32_itself_loses(onnx_files, tmp_path, monkeypatch):
    import onnx

    folder, printed = onnx_files
    differences = re.findall(r"largest difference (\S+) of the largest value", printed)
    assert len(differences) == 2 and all(float(text) < 1e-5 for text in differences)
    model = lapx.create_model(weights=folder / "tiny.pt").eval()
    images = torch.randn(2, 3, 64, 96)
    session = evaluate.open_session(folder / "fast.onnx")
    found = torch.from_numpy(np.stack(session.run(["heatmaps1", "heatmaps"],
                                                  {"images": images.numpy()})))
    with torch.no_grad():
        own = torch.stack(model(images))
        exact = torch.stack(copy.deepcopy(model).double()(images.double()))
    errors = [largest_difference(heatmaps.double(), exact) for heatmaps in (found, own)]
    assert export.errors_of(session, "", model, images, np.inf) == pytest.approx(errors, rel=1e-4)
    assert all(1e-8 < error < 1e-5 for error in errors) and errors[0] != errors[1]
    monkeypatch.setattr(export, "to_onnx", lambda *arguments: onnx.load(folder / "plain.onnx"))
    for error, own, written in ((9e-5, 1e-7, True), (1.1e-4, 1e-7, False), (1.3e-4, 4.7e-5, True),
                                (1.5e-4, 4.7e-5, False), (np.nan, 1, False), (1e-7, np.nan, True)):
        monkeypatch.setattr(export, "errors_of", lambda session, path, model, images, order: (
            [error, own] if len(images) == 2 else [0, 0]))  # the worst batch counts
        out = tmp_path / f"{error}{own}.onnx"
        status, _ = run("export.py", "--weights", folder / "one.pt", "--plain", "--out", out,
                        check=False)
        assert (status == 0) == out.exists() == written, (error, own)


def decode_to_pixels(heatmaps):
    points, scores = decode(heatmaps)
    return torch.cat([4 * points, scores[..., None]], 2)


def test_a_broken_onnx_file_ends_in_a_sentence(onnx_files, tmp_path):
    import onnx

    content = (onnx_files[0] / "plain.onnx").read_bytes()
    model = onnx.load(onnx_files[0] / "plain.onnx")
    info = json.loads(model.metadata_props[0].value)

    def read_bytes(rng):
        (tmp_path / "a.onnx").write_bytes(damaged(content, rng))
        evaluate.open_predictor(tmp_path / "a.onnx")

    def read_info(rng):
        onnx.helper.set_model_props(model, {"lapx": json.dumps(broken(info, rng))})
        onnx.save(model, tmp_path / "b.onnx")
        evaluate.open_predictor(tmp_path / "b.onnx")

    assert refused(read_bytes, 20) > 15 and refused(read_info, 20) > 3


def test_an_exported_file_says_how_to_use_it(onnx_files):
    folder, printed = onnx_files
    assert printed.count("difference") == printed.count("wrote") == 4, printed
    session = evaluate.open_session(folder / "fast.onnx")
    assert [output.name for output in session.get_outputs()] == [
        "heatmaps1", "heatmaps", "keypoints"]
    assert session.get_inputs()[0].shape == ["batch", 3, 64, 96]
    info = json.loads(session.get_modelmeta().custom_metadata_map["lapx"])
    assert info["input"] == [64, 96] and info["colour"] == "RGB" and info["mean"] == list(lapx.MEAN)
    assert info["skeleton"]["joints"] == list(MPII.joints) and info["variant"] == "tiny"
    assert info["skeleton"]["flip_pairs"] == [list(pair) for pair in MPII.flip_pairs]
    session = evaluate.open_session(folder / "int8.onnx")
    assert session.get_inputs()[0].shape == [2, 3, 64, 96]
    info = json.loads(session.get_modelmeta().custom_metadata_map["lapx"])
    assert info["colour"] == "BGR" and info["bits"] == 8


def test_the_fast_file_has_no_operator_that_onnx_runtime_is_slow_at(onnx_files):
    import onnx

    kinds = {name: {node.op_type for node in onnx.load(onnx_files[0] / f"{name}.onnx").graph.node}
             for name in ("fast", "plain")}
    assert "Elu" in kinds["plain"] and "Elu" not in kinds["fast"]


def test_an_exported_file_predicts_what_the_checkpoint_predicts(onnx_files, mpii, tmp_path):
    folder, _ = onnx_files
    people = data.read_mpii(mpii, "valid")
    tiny, fast, one, plain, int8 = (
        predicted(evaluate.open_predictor(folder / name, "cpu"), people, batch_size=3)
        for name in ("tiny.pt", "fast.onnx", "one.pt", "plain.onnx", "int8.onnx"))
    assert np.allclose(plain, one, atol=1e-3) and np.allclose(fast, tiny, atol=1e-3)
    assert int8.shape == one.shape and not np.allclose(int8, one, atol=1e-3)
    text = run("evaluate.py", "--weights", folder / "fast.onnx", "--dataset", "mpii",
               "--data", mpii, "--out", tmp_path)
    assert "input 64x96" in text and "Mean@0.1" in text


@pytest.mark.parametrize("count", [1, 4, 5, 10])
def test_a_file_of_a_fixed_batch_gives_each_picture_its_outputs(count):
    class Session:  # stands in for ONNX Runtime's, of a file made with --batch 4
        def get_inputs(self):
            return [argparse.Namespace(name="images", shape=[4, 3, 64, 64])]

        def run(self, names, feed):
            assert feed["images"].shape == (4, 3, 64, 64)
            return [feed["images"], -feed["images"]]

    images = torch.rand(count, 3, 64, 64)
    same, negative = evaluate.run_session(Session(), "4.onnx", images)
    assert torch.equal(same, images) and torch.equal(negative, -images)


def test_keypoints_in_the_file_are_those_of_decode_in_pixels_of_the_input(onnx_files):
    session = evaluate.open_session(onnx_files[0] / "fast.onnx")
    images = torch.randn(5, 3, 64, 96)
    _, heatmaps, keypoints = session.run(None, {"images": images.numpy()})
    assert np.allclose(keypoints, decode_to_pixels(torch.from_numpy(heatmaps)))


def test_other_engines_have_the_operators_of_keypoints():
    class Decoding(nn.Module):
        def forward(self, heatmaps):
            return (export.keypoints_of(heatmaps),)

    nodes = export.to_onnx(Decoding(), (16, 12), ["keypoints"]).graph.node
    # OpenCV 5.0 has none of these for whole numbers
    assert not {"And", "Mod", "Clip", "Where"} & {node.op_type for node in nodes}


@pytest.fixture(scope="session")
def deployed(tmp_path_factory):
    """A folder with pose.py, and photo.jpg with several people in it, stored lying."""
    folder = tmp_path_factory.mktemp("deployed")
    assert run("export.py", "--pose", folder / "pose.py") == f"wrote {folder / 'pose.py'}\n"
    sheet = Image.new("RGB", (500, 400))
    for number, corner in enumerate(((0, 0), (200, 0), (0, 200), (200, 200))):
        sheet.paste(figure(3, number)[1], corner)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    sheet.rotate(90, expand=True).save(folder / "photo.jpg", quality=95, exif=exif)
    return folder


@pytest.mark.parametrize("flip", (False, True))
@pytest.mark.parametrize("name", ("fast", "int8"))  # the latter: BGR, batches of 2
def test_pose_finds_what_evaluate_finds_without_torch(name, flip, onnx_files, deployed):
    boxes = [[150, 120, 60, 90], [10, 20, 100, 160], [220, 210, 90, 140]]
    path = onnx_files[0] / f"{name}.onnx"
    done = subprocess.run([sys.executable, "-c", f"""
import sys
sys.modules.update(dict.fromkeys(("torch", "scipy", "onnx", "lapx", "data", "evaluate")))
from PIL import Image
from pose import Pose
pose = Pose({str(path)!r}, threads=1)
found = pose(Image.open("photo.jpg"), {boxes}, flip={flip})
assert pose(Image.open("photo.jpg"), []).shape == (0, 16, 3)
print(found.tolist(), pose.joints)"""], cwd=deployed, capture_output=True, text=True)
    found, joints = re.match(r"(\[\[.*\]\]) (\[.*\])$", done.stdout, re.S).groups()
    expected = evaluate.predict_picture(evaluate.open_predictor(path), data.open_picture(
        deployed / "photo.jpg", upright=True), boxes, flip=flip)
    assert len(expected) == 3 and json.loads(joints.replace("'", '"')) == [*MPII.joints]
    for person in expected:
        own = json.loads(found)[boxes.index(person["box"])]
        assert np.allclose(own, [*person["joints"].values()], rtol=0, atol=1e-4)


def test_the_readmes_lines_of_deployment_run(onnx_files, deployed, monkeypatch, capsys):
    code = next(block for block in re.findall(r"```python\n((?s:.)*?)```", README)
                if "from pose import Pose" in block)
    (deployed / "lapx.onnx").symlink_to(onnx_files[0] / "fast.onnx")
    monkeypatch.chdir(deployed)
    monkeypatch.syspath_prepend(deployed)
    found = {}
    exec(code, found)
    assert found["keypoints"].shape == (1, 16, 3) and "left wrist" in capsys.readouterr().out


def test_pose_takes_the_whole_picture_without_boxes(onnx_files):
    pose = data.Pose(onnx_files[0] / "fast.onnx")
    picture = figure(3, 1)[1]
    assert np.array_equal(pose(picture), pose(picture, [[0, 0, *picture.size]]))


@pytest.mark.parametrize("boxes", ([[0, 0, 0, 9]], [[0, 0, 9, -1]], [[0, 0, 9, np.nan]]))
def test_pose_refuses_what_is_no_box(boxes, onnx_files):
    with pytest.raises(ValueError, match="a box is left, top, width, height, unlike one of "):
        data.Pose(onnx_files[0] / "fast.onnx")(Image.new("RGB", (50, 50)), boxes)


def test_pose_refuses_grey_levels_of_more_than_8_bits(onnx_files):
    with pytest.raises(ValueError, match="the picture's mode is I;16: bring it to 8 bits first"):
        data.Pose(onnx_files[0] / "fast.onnx")(Image.new("I;16", (50, 50)))


def test_pose_refuses_a_file_without_joints(onnx_files, tmp_path):
    model = export.onnx.load(onnx_files[0] / "fast.onnx")
    del model.metadata_props[:]
    export.onnx.save(model, tmp_path / "peer.onnx")
    with pytest.raises(ValueError, match="peer.onnx is not a file of LAPX's export.py"):
        data.Pose(tmp_path / "peer.onnx")


def test_numpys_decoding_is_lapxs():
    heatmaps = torch.randn(4, 16, 5, 7)  # small: many peaks at the border
    heatmaps[0, :8] -= 9  # nothing above 0
    heatmaps[1, :8, 2, 2:5] = 9  # peaks of several pixels
    points, scores = decode(heatmaps)
    found = data.Pose.decode(heatmaps.numpy())
    assert np.array_equal(found[..., :2], points) and np.array_equal(found[..., 2], scores)


def test_the_readmes_lines_of_python_run(weights, tmp_path, monkeypatch, capsys):
    code = next(block for block in re.findall(r"```python\n((?s:.)*?)```",
                                              README)
                if "predict_picture" in block)
    figure(3, 1)[1].save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    exec(code.replace('"mpii"', repr(str(weights[0]))), {})
    assert re.match(r"[\d.]+ \[.*, .*, .*\]", capsys.readouterr().out)


def test_an_execution_provider_that_is_missing_gets_a_sentence(onnx_files):
    status, text = run("export.py", "--time", onnx_files[0] / "fast.onnx", "--provider", "Abacus",
                       check=False)
    assert status == 1 and "can't use --provider Abacus here; it has " in text and ", CPU" in text


def test_counting_a_file_counts_the_network(onnx_files):
    path = onnx_files[0] / "plain.onnx"
    feed = export.random_inputs(path)
    parameters, multiply_adds = export.count_onnx(path, feed)
    elements = []
    model = LAPX(ONE_STAGE).eval()
    for module in model.modules():  # the BatchNorms that are convolutions in the file
        if isinstance(module, lapx.Block):
            module.bn1.register_forward_hook(
                lambda norm, x, output: elements.append(output.numel()))
    model(torch.zeros(1, 3, 64, 96))
    expected, _, cost, _ = export.count(ONE_STAGE, 64, 96)
    assert multiply_adds == cost + sum(elements)
    assert 0.9 < parameters / expected < 1.1  # BatchNorms are folded


def test_timing_writes_a_table_and_a_figure(onnx_files, tmp_path, monkeypatch):
    files = [onnx_files[0] / f"{name}.onnx" for name in ("plain", "fast", "int8")]
    measured = []  # for each number of threads (runs, files)
    run_times = export.run_times
    monkeypatch.setattr(export, "run_times", lambda *arguments: measured.append(
        run_times(*arguments)) or measured[-1])
    text = run("export.py", "--time", *files, "--runs", 3, "--threads", 1, 2, "--out", tmp_path)
    facts = data.read_json(tmp_path / "timing.json")
    rows = list(csv.DictReader((tmp_path / "timing.csv").read_text("utf-8").splitlines()))
    assert len(facts["results"]) == len(rows) == 6 and facts["cpu"] in text
    for number, row in enumerate(facts["results"]):
        assert row["threads"] == 1 + number // 3 and row["ms_10"] <= row["ms"] <= row["ms_90"]
        times = sorted(measured[number // 3][:, number % 3])
        assert len(times) == 3 and times[1] == row["ms"] > 0  # the median
        first = facts["results"][3 * (number // 3)]
        assert row["ratio"] == pytest.approx(first["ms"] / row["ms"])
        images = 2 if row["file"].endswith("int8.onnx") else 1  # a run's
        assert row["fps"] == pytest.approx(1000 * images / row["ms"]) and 0 < row["ram_mb"] < 999
    table = text[text.index("file  "):text.index("wrote")]
    assert len(table.splitlines()) == 7 and max(map(len, table.splitlines())) <= 80
    assert len(Image.open(tmp_path / "timing.png").getcolors(10**6)) > 3


def test_a_profile_names_the_operators(onnx_files):
    text = run("export.py", "--profile", onnx_files[0] / "plain.onnx", "--runs", 2)
    assert "Conv" in text and "total" in text


@pytest.mark.parametrize("arguments, complaint", [
    (["--time", "none.onnx"], "none.onnx: there is no such file"),
    (["--profile", __file__], "must be an ONNX file that ONNX Runtime can run"),
    (["--weights", "plain.onnx"], "is an ONNX file already"),
    (["--weights", "tiny.pt", "--int8", "--data", "none"], "no annotations of split 'train'"),
    (["--weights", "tiny.pt", "--out", "lapx"], "must end in .onnx"),
    (["--weights", "tiny.pt", "--skeleton", "coco"], "not heatmaps (17, 16, 24)"),
    (["--time", "plain.onnx", "--input", "64x64"], "leave out --input"),
    (["--time", "plain.onnx", "--batch", "2"], "--batch means nothing with --time"),
    (["--time", "plain.onnx", "--keypoints"], "--keypoints means nothing with --time"),
    (["--weights", "tiny.pt", "--runs", "3"], "--runs means nothing with --weights"),
    (["--weights", "tiny.pt", "--image", "x.jpg"], "--image means nothing with --weights"),
    (["--profile", "plain.onnx", "--out", "x"], "--out means nothing with --profile"),
    (["--weights", "tiny.pt", "--plain", "--int8"], "--int8"), ([], "is required")])
def test_export_says_what_is_wrong(arguments, complaint, onnx_files, monkeypatch):
    monkeypatch.chdir(onnx_files[0])
    status, said = run("export.py", *arguments, check=False)
    assert status != 0 and complaint in said and "Traceback" not in said


@pytest.mark.parametrize("arguments, complaint", [
    (["--input", "64x64"], "a network for images (1, 3, 64, 64), see --input"),
    (["--skeleton", "coco"], "gives [(16, 16, 24)], not heatmaps (17, 16, 24)")])
def test_an_onnx_file_that_does_not_fit_gets_a_sentence(arguments, complaint, onnx_files, mpii,
                                                        tmp_path):
    status, said = run("evaluate.py", "--weights", onnx_files[0] / "plain.onnx", "--image",
                       mpii / "images/0.jpg", "--out", tmp_path, *arguments, check=False)
    assert status == 1 and complaint in said and "Traceback" not in said


def test_an_onnx_file_of_others_needs_to_be_told_size_and_joints(tmp_path):
    import onnx
    from onnx import TensorProto, helper

    graph = helper.make_graph([helper.make_node("AveragePool", ["x"], ["y"], kernel_shape=[4, 4],
                                                strides=[4, 4]),
                               helper.make_node("Concat", ["y"] * 6, ["z"], axis=1),
                               helper.make_node("Slice", ["z", "a", "b", "c"], ["h"])], "peer",
                              [helper.make_tensor_value_info("x", TensorProto.FLOAT,
                                                             ["n", 3, "h", "w"])],
                              [helper.make_tensor_value_info("h", TensorProto.FLOAT, None)],
                              [helper.make_tensor(name, TensorProto.INT64, [1], [value])
                               for name, value in (("a", 0), ("b", 17), ("c", 1))])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9),
              tmp_path / "peer.onnx")
    with pytest.raises(InputError, match="--input HxW and --skeleton NAME"):
        evaluate.open_predictor(tmp_path / "peer.onnx")
    network = evaluate.open_predictor(tmp_path / "peer.onnx", size=(64, 96), skeleton="coco")
    heatmaps, = network(torch.zeros(2, 64, 96, 3, dtype=torch.uint8))
    assert heatmaps.shape == (2, 17, 16, 24)
