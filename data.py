"""People and their pictures: crops, augmentation, targets; readers for MPII and COCO, drawings.

The protocol is that of SimpleBaseline and HRNet, whose numbers are published. Every random choice
is a function of (seed, epoch, person), so that a run can be repeated and resumed exactly, whatever
the number of loader processes.

Coordinates, everywhere: x to the right, y down, in pixels, counted from 0; whole numbers are the
centres of pixels. A person's box is (x, y, width, height): its center and its size in pixels of the
picture, a quarter of margin included (COCO's bbox has the top left corner instead, and no margin).
Sizes are (height, width), as in torch; only those of Pillow pictures and of boxes are (width,
height). A crop is what the network sees of a picture: one person.
"""

import argparse
import csv
import ctypes
import functools
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
import unicodedata
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

# Torch's threads sleep while they wait, in place of spinning: beside another busy program a network
# then trains 1.7 times as fast on a CPU; on a quiet machine it trains up to 7 % more slowly. OpenMP
# reads this when torch is loaded, so scripts import this file first.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from lapx import MEAN, SKELETONS, STD, STRIDE, InputError


# ---------------------------------------------------------------------------- geometry

def affine(box, size, rotation=0.0, flip=False):
    """The affine transform used everywhere, from a picture to the crop of a box: a 3x3 matrix, with
    (u, v, 1) = matrix (x, y, 1). Its inverse leads back: np.linalg.inv(matrix).

    The box, widened to the crop's shape, fills the crop. size: (height, width) of the crop.
    rotation: degrees; positive turns the person in the crop counter-clockwise. flip: mirrored left
    to right, about the box's center. That comes to (width/2, height/2), half a pixel right of and
    below the crop's middle (SimpleBaseline's protocol)."""
    height, width = size
    cos = math.cos(math.radians(rotation))
    sin = math.sin(math.radians(rotation))
    zoom = width / fitted_width(box, size)
    matrix = np.eye(3)
    matrix[:2, :2] = zoom * np.array([[cos, sin], [-sin, cos]])
    if flip:  # the picture is mirrored first, then turned
        matrix[:, 0] *= -1
    matrix[:2, 2] = np.array([width / 2, height / 2]) - matrix[:2, :2] @ box[:2]
    return matrix


def fitted_width(boxes, size):
    """The widths (...) of boxes (...,4), widened to the shape of a crop, size (height, width)."""
    height, width = size
    return np.maximum(boxes[..., 2], boxes[..., 3] * width / height)


def transform(points, matrix):
    """Points (...,K,2) through a 3x3 matrix, or points (N,K,2) through N of them (N,3,3)."""
    turned = points @ np.swapaxes(matrix[..., :2, :2], -1, -2)
    return turned + matrix[..., None, :2, 2]  # the last column moves them


def crop(picture, matrix, size):
    """The crop (height, width) of a Pillow picture: (H,W,3) uint8. Bilinear, black outside.

    matrix: from the picture to the crop. The published numbers used OpenCV's warpAffine: half a
    pixel outside the picture it still sees half of the edge's colour, while Pillow sees black. With
    a black ring of one pixel around the picture Pillow does the same. Pillow truncates grey levels,
    OpenCV rounds them."""
    height, width = size
    inverse = np.linalg.inv(matrix)[:2]
    inverse[:, 2] += 1  # the ring
    inverse[:, 2] += 0.5 * (1 - inverse[:, 0] - inverse[:, 1])  # Pillow's centres are at i + 0.5
    ringed = ImageOps.expand(picture, 1)
    return np.array(ringed.transform((width, height), Image.Transform.AFFINE,
                                     tuple(inverse.ravel()), Image.Resampling.BILINEAR))


# ---------------------------------------------------------------------------- a sample

def draw_augmentation(rng, scale_range, rotation_range):
    """-> a factor for the box's size, from 1 - scale_range to 1 + scale_range; degrees, at most
    rotation_range either way; whether to mirror. PAPER §4.1."""
    # PAPER SILENT: distribution of the scale. SimpleBaseline's normal one, clipped at one sigma,
    # with its 0.25 for MPII and 0.30 for COCO.
    scale = 1 + scale_range * np.clip(rng.standard_normal(), -1, 1)
    # PAPER SILENT: distribution of the rotation. Uniform within the paper's 40 degrees, for every
    # sample, which is 23 degrees rms. SimpleBaseline's code, given 40, turns 60 % of the samples by
    # a normal angle of sigma 40, clipped at 80, which is 30 degrees rms.
    rotation = rng.uniform(-rotation_range, rotation_range)
    flip = rng.random() < 0.5  # PAPER SILENT: share of mirrored samples. Half of them.
    # PAPER SILENT: other augmentation. None: no half bodies (HRNet's for COCO), no shift, no
    # change of colours.
    return scale, rotation, flip


def flip_order(skeleton):
    """The index of each joint's mirror image, (K,)."""
    order = np.arange(len(skeleton.joints))
    for a, b in skeleton.flip_pairs:
        order[[a, b]] = order[[b, a]]
    return order


class PoseDataset(torch.utils.data.Dataset):
    """Crops of People, arrays with a row for each person (below). dataset[epoch, row] is the same
    whenever seed, epoch and row are; dataset[row] is that of epoch 0. augmentation: (scale_range,
    rotation_range), or None.

    -> row, crop (H,W,3) uint8, joints (K,2) float32 in pixels of the crop, annotated (K,) float32.
    """

    def __init__(self, people, size, skeleton, augmentation=None, seed=0):
        self.people = people
        self.size = size
        self.skeleton = skeleton
        self.augmentation = augmentation
        self.seed = seed
        self.opened_id = None  # of the last picture: in evaluation others who are in it follow

    def __len__(self):
        return len(self.people)

    def __getitem__(self, index):
        epoch, row = index if isinstance(index, tuple) else (0, index)
        people = self.people
        box = people.box[row].copy()
        rotation = 0.0
        flip = False
        if self.augmentation:
            # numpy pads seeds with zeros, so (0, 3), with which train.EpochBatches shuffles an
            # epoch, would be the stream of (0, 3, 0): the 1 makes it another one
            rng = np.random.default_rng((self.seed, epoch, row, 1))
            scale, rotation, flip = draw_augmentation(rng, *self.augmentation)
            box[2:] *= scale
            flip = flip and len(self.skeleton.flip_pairs) > 0
        matrix = affine(box, self.size, rotation, flip)
        if self.opened_id != people.image_id[row]:
            self.opened = people.picture(row)
            self.opened_id = people.image_id[row]
        cropped = crop(self.opened, matrix, self.size)
        joints = transform(people.joints[row], matrix).astype(np.float32)
        annotated = people.annotated[row].astype(np.float32)
        if flip:
            order = flip_order(self.skeleton)
            joints = joints[order]
            annotated = annotated[order]
        return row, torch.from_numpy(cropped), torch.from_numpy(joints), torch.from_numpy(annotated)


def normalise(images, bgr=False, mean=MEAN, std=STD):
    """Crops (B,H,W,3) uint8 RGB, on any device -> the network's input (B,3,H,W) float32.

    (x / 255 - mean) / std of each channel. bgr: the channels in the order blue, green, red, with
    the same numbers."""
    images = images.flip(3) if bgr else images  # the colours, not the picture
    # constant: a tensor that is made once, as a copy to a GPU would make each step wait
    images = (images / 255 - constant(mean, images.device)) / constant(std, images.device)
    images = images.permute(0, 3, 1, 2)
    return images.contiguous(memory_format=memory_format(images.device))


def gaussian_targets(joints, annotated, size):
    """Heatmaps to learn: joints (B,K,2) in pixels of an input of size (H,W), annotated (B,K) ->
    targets (B,K,h,w), mask (B,K), on the joints' device.

    A Gaussian of height 1 around the heatmap pixel nearest to the joint, cut off at 3 sigma. The
    mask is 1 for joints to learn, else 0. Rounding and the test of the border are those of
    SimpleBaseline to the last pixel: rounded towards 0, and on the left and at the top a Gaussian
    that ends just outside still counts, so that its joint is learnt as an empty map."""
    # PAPER SILENT: width of the targets. SimpleBaseline's 2 heatmap pixels, 3 above 256 (384x288).
    # A narrow one is hard to find for the network, a wide one has no clear peak.
    sigma = 3 if max(size) > 256 else 2
    h, w = heatmap_size(*size)
    radius = 3 * sigma
    centers = (joints / STRIDE + 0.5).trunc()  # (B,K,2) heatmap pixels
    limits = constant((w, h), joints.device)
    # DIFFERS: joints outside the crop. The paper masks them; the published protocol, which we
    # follow, masks those whose Gaussian ends outside, by more than a pixel on the left or top.
    on_map = ((centers - radius < limits) & (centers + radius + 1 >= 0)).all(2)  # (B,K)
    # DIFFERS: occluded joints. The paper masks "invisible" joints; as in the published protocol we
    # mask those that nobody annotated, and learn those that are annotated but occluded.
    mask = annotated * on_map
    x = torch.arange(w, device=joints.device) - centers[..., 0, None, None]  # (B,K,1,w)
    y = torch.arange(h, device=joints.device)[:, None] - centers[..., 1, None, None]  # (B,K,h,1)
    drawn = (x.abs() <= radius) & (y.abs() <= radius) & (mask > 0.5)[..., None, None]
    return torch.exp(-(x ** 2 + y ** 2) / (2 * sigma ** 2)) * drawn, mask


def heatmap_size(height, width):
    """The size (h, w) of the heatmaps for an input of that size: H/4 and W/4, if they are multiples
    of 4. The stem's convolution halves and rounds up, its pooling halves and rounds down."""
    return (height + 1) // 2 // 2, (width + 1) // 2 // 2


# ================================================= Behind the scenes: data sets, pictures, scripts

@dataclass
class People:
    """The N persons of a split: arrays with a row for each, which loader processes share (Python
    objects would be copied into each process, as counting references writes to them)."""

    folder: Path  # of the pictures
    files: np.ndarray  # (N,) text, the picture's file below the folder
    image_id: np.ndarray  # (N,) int64
    box: np.ndarray  # (N,4) center x, y, width, height, in pixels of the picture, margin included
    joints: np.ndarray  # (N,K,2) pixels of the picture
    annotated: np.ndarray  # (N,K) bool, even if occluded
    box_score: np.ndarray  # (N,) of the detected box; 1 for annotated ones
    head_size: np.ndarray | None = None  # (N,) pixels, what PCKh measures with
    head_source: str = ""  # what the head sizes are, in words
    truth: "CocoFile | None" = None  # what average precision compares with
    category_id: np.ndarray | None = None  # (N,) int64
    area: np.ndarray | None = None  # (N,) square pixels, what OKS measures with
    picture_size: np.ndarray | None = None  # (N,2) width, height as annotated; 0 if they are not
    loaded: Image.Image | None = None  # the one picture that all are in, instead of files
    unscored: str = ""  # why they can't be scored, in words

    def __len__(self):
        return len(self.files)

    def rows(self, which):
        """The People of some rows (a slice or indices)."""
        return replace(self, **{name: value[which] for name, value in vars(self).items()
                                if isinstance(value, np.ndarray)})

    def picture(self, row):
        """The picture that a person is in, a Pillow picture in RGB."""
        if self.loaded:
            return self.loaded
        size = (0, 0) if self.picture_size is None else tuple(self.picture_size[row].tolist())
        return open_picture(self.folder / self.files[row], size=size)


def load_people(dataset, root, split, skeleton, boxes="gt"):
    """The People of a split, or of a detector's boxes in it (a file; COCO only); their number is
    printed. root: the data set's folder, None for data/DATASET. InputError if a picture is missing;
    a broken one, or one that was not annotated, shows when it is opened, five of them here."""
    people = DATASETS[dataset].read(Path(root or f"data/{dataset}"), split, skeleton, boxes)
    names, which = np.unique(people.files, return_inverse=True)
    print(f"{dataset} {split}: {len(people)} persons in {len(names)} pictures", flush=True)
    people.files = np.array(find_pictures(people.folder, names.tolist()))[which]
    for row in np.linspace(0, len(people) - 1, 5).astype(int):
        people.picture(row)
    return people


def make_loader(dataset, batches, workers, pin_memory=False):
    """A DataLoader over batches (lists of indices), whose processes share the dataset's arrays."""
    fork = workers and sys.platform == "linux"  # elsewhere processes can't share, and copy them
    return torch.utils.data.DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, pin_memory=pin_memory,
        persistent_workers=workers > 0, multiprocessing_context="fork" if fork else None)


@functools.lru_cache
def constant(values, device):
    """A tuple of numbers as a tensor, made once."""
    return torch.tensor(values, device=device)


def memory_format(device):
    """How networks and images lie in a device's memory: channels last, which is faster on CPUs and
    GPUs. Not on a Mac's mps: BatchNorm's gradients were wrong there (pytorch 175189, 181411)."""
    return torch.channels_last if device.type in ("cpu", "cuda") else torch.contiguous_format


# ---------------------------------------------------------------------------- MPII

PADDING = 1.25  # the boxes of both data sets are enlarged by this


def read_mpii(root, split, skeleton=SKELETONS["mpii"], *unused):
    """The People of MPII's annot/{split}.json. Splits: train, valid, trainval, test (no joints).

    Pixels are counted from 1 there, and scale is the body's height / 200, since MPII's reference
    person is 200 pixels high. The adjustments are SimpleBaseline's: the center goes down by 15 *
    scale (the annotated one is the torso's, too high for the whole person), the box is a square,
    padded, and pixels count from 0. Where gt_{split}.mat lies beside the JSON, joints and head
    sizes are taken from there, as in the published evaluation."""
    if len(skeleton.joints) != 16:
        raise InputError(f"{root} has MPII's 16 joints, not {len(skeleton.joints)}; joints of your "
                         "own go into COCO's layout, for --dataset coco")
    other = split.replace("valid", "val")  # HRNet's names, then mmpose's
    path = find_file(root, split, f"annot/{split}.json", f"annotations/mpii_{other}.json")
    entries = read_json(path)
    with reading(path, "a list of persons, each with image"):
        expect(entries, list)
        if not {"joints", "joints_vis"} & set(entries[0]):  # the test split
            nothing = {"joints": [[0, 0]] * 16, "joints_vis": [0] * 16}
            entries = [nothing | entry for entry in entries]
        files = np.array([entry["image"] for entry in entries], str)
    N = len(files)
    persons = read_columns(path, "person", entries, {
        "center": (2,), "scale": (), "joints_vis": (16,), "joints": (16, 2)})
    annotated = persons["joints_vis"] > 0
    persons["joints"][~annotated] = -1  # whatever stands there does not matter
    check_columns(path, "person", persons, {"scale": 1e-3})
    center = persons["center"]
    scale = persons["scale"]
    boxed = center[:, 0] != -1  # else there is no center
    center[:, 1] += np.where(boxed, 15 * scale, 0)
    side = 200 * np.where(boxed, PADDING, 1) * scale
    people = People(
        folder=root / "images", files=files, image_id=np.unique(files, return_inverse=True)[1],
        box=np.column_stack([center - 1, side, side]), joints=persons["joints"] - 1,
        annotated=annotated, box_score=np.ones(N),
        head_size=25 * scale,  # MPII's scale was made so, to within 1e-4 pixels
        head_source="25 * scale of the JSON")
    for mat in (path.with_name(f"gt_{split}.mat"), path.with_name(f"mpii_gt_{other}.mat")):
        if mat.is_file():
            arrays = read_mat(mat, {"pos_gt_src": (16, 2, N), "jnt_missing": (16, N),
                                    "headboxes_src": (2, 2, N)})
            corners = arrays["headboxes_src"]  # (2 corners, x y, N)
            people.joints = arrays["pos_gt_src"].transpose(2, 0, 1) - 1
            people.annotated = arrays["jnt_missing"].T == 0
            people.head_size = 0.6 * np.linalg.norm(corners[1] - corners[0], axis=0)
            people.head_source = f"0.6 * head box diagonal in {mat.name}"
            if not people.head_size.all():
                raise InputError(f"{mat}: the head box of person {people.head_size.argmin()} is "
                                 "empty; fetch the file again, or leave it out")
    return people


def read_mat(path, shapes):
    """Arrays of a MATLAB file as float64: {key: array} for {key: shape}; InputError if it is
    missing or broken, lacks a key, has another shape or has NaN."""
    from scipy.io import loadmat  # only where it is needed: it takes a second to import

    arrays = {}
    with reading(path, f"a MATLAB file with {', '.join(shapes)} of one split") as where:
        content = loadmat(str(path), appendmat=False)
        for key, shape in shapes.items():
            where.entry = key
            arrays[key] = np.array(content[key], np.float64)
            if arrays[key].shape != shape or not np.isfinite(arrays[key]).all():
                raise ValueError(f"its shape is {arrays[key].shape}, not {shape}, or it has NaN")
    return arrays


# ---------------------------------------------------------------------------- COCO

@dataclass
class CocoFile:
    """COCO's annotation file: I pictures and the M persons in them."""

    path: Path
    sigmas: np.ndarray  # (K,) of the joints
    categories: list  # the ids of those that are read
    files: np.ndarray  # (I,) text
    images: dict  # of arrays (I,): id, width, height; 0 where a size is not known
    persons: dict  # of arrays (M,...): id, image_id, category_id, bbox, area (both -1 where they
    # are missing), iscrowd, num_keypoints, keypoints (K,3)


def read_coco_file(path, skeleton):
    """COCO's annotation file -> CocoFile; prints what is read. A test split's has pictures only."""
    K = len(skeleton.joints)
    if not skeleton.sigmas:
        raise InputError("OKS, COCO's metric, needs a sigma for each joint of the skeleton")

    def without_outline(item):  # the outlines take most of the memory
        item.pop("segmentation", None)
        return item

    content = read_json(path, without_outline)
    with reading(path, "a COCO annotation file with images and annotations"):
        content = {"annotations": [], "categories": []} | expect(content, dict)
        for field in ("annotations", "categories"):
            if content[field] != []:
                expect(content[field], list)
        pictures = expect(content["images"], list)
        files = np.array([item.get("file_name", "") for item in pictures], str)
        category = np.array([item["category_id"] for item in content["annotations"]], float)
        category[np.isnan(category)] = -1
        categories = read_categories(path, content, category.tolist(), skeleton)
    of_use = np.isin(category, categories)
    images = read_columns(path, "picture", pictures, {"id": (), "width": (), "height": ()},
                          {"width": 0, "height": 0})
    check_columns(path, "picture", images, {"width": 0, "height": 0})
    persons = read_columns(
        path, "person", list(itertools.compress(content["annotations"], of_use)),
        {"id": (), "image_id": (), "bbox": (4,), "area": (), "iscrowd": (), "num_keypoints": (),
         "keypoints": (3 * K,)},
        {"id": 0, "bbox": -1, "area": -1, "iscrowd": 0, "num_keypoints": -1, "keypoints": 0})
    keypoints = persons["keypoints"].reshape(-1, K, 3)  # x, y, flag
    keypoints[~(keypoints[..., 2] > 0)] = 0  # whatever stands there does not matter
    persons["keypoints"] = keypoints
    check_columns(path, "person", persons)
    count = persons["num_keypoints"]
    persons["num_keypoints"] = np.where(count < 0, (keypoints[..., 2] > 0).sum(1), count)
    persons["category_id"] = category[of_use]
    _, first, place = np.unique(images["id"], return_index=True, return_inverse=True)
    for twin in np.flatnonzero(files != files[first[place]]):
        raise InputError(f"{path} gives two pictures the id {images['id'][twin]:.0f}: "
                         f"{files[first[place[twin]]]} and {files[twin]}; number them anew")
    first.sort()  # a picture may be listed twice
    images = {name: column[first] for name, column in images.items()}
    return CocoFile(Path(path), np.array(skeleton.sigmas), categories, files[first], images,
                    persons)


def read_categories(path, content, category, skeleton):
    """The ids of the categories of a COCO file, parsed, that have the skeleton's joints; if none
    names joints, of those whose annotations have some. category: of all annotations; how many each
    has is printed. InputError if joints are named, but nowhere the skeleton's, in their order."""
    own, numbered = tidy(skeleton.joints)
    joints = {float(item["id"]): tidy(expect(item["keypoints"], list))
              for item in content["categories"] if item.get("keypoints")}
    if not joints:
        joints = {id: (own, numbered) for id, item in zip(category, content["annotations"])
                  if item.get("keypoints")} or {1: (own, numbered)}
    others = {id: [pair for pair in itertools.zip_longest(theirs, own, fillvalue="no joint")
                   if pair[0] != pair[1] and only == numbered]
              for id, (theirs, only) in joints.items()}
    chosen = [int(id) for id, pairs in others.items() if not pairs]
    if not chosen:
        theirs, ours = next(iter(others.values()))[0]
        raise InputError(f"{path} has other joints than the skeleton, first {theirs!r} in place of "
                         f"{ours!r}; choose another --skeleton, or put an entry with the file's "
                         "joints, in their order, into SKELETONS in lapx.py")
    names = {float(item["id"]): item.get("name", item["id"]) for item in content["categories"]}
    counts = [f"{count} of {names.get(id, f'{id:g}')}{'' if id in chosen else ', left out'}"
              for id, count in Counter(category).items()]
    print(f"{path}: annotations by category: {'; '.join(counts) or 'none'}")
    return chosen


def tidy(names):
    """Names of joints in one way of writing; whether they are but numbered, as "kp1" and "kp2"."""
    names = [re.sub(r"[\W_]+", " ", str(name).lower()).strip() for name in names]
    bare = {re.sub(r"\d+", "", name) for name in names}
    return names, len(bare) == 1 and bare != {*names}


def read_coco(root, split, skeleton=SKELETONS["coco"], boxes="gt"):
    """The People of COCO's annotations/person_keypoints_{split}.json with a labelled joint; or, of
    a detector's boxes (a file) in these pictures, without joints, in the file's order.

    As in HRNet, detected boxes are neither clipped nor shortened."""
    file = read_coco_file(find_file(
        root, split, f"annotations/person_keypoints_{split}.json",
        f"annotations/image_info_{split}.json"), skeleton)
    name = split.replace("-dev", "")  # test-dev2017's pictures are in test2017
    folder = root / "images" / name
    folder = folder if folder.is_dir() else root / name
    if boxes == "gt":
        rows, pictures, found = annotated_boxes(file)
        category = file.persons["category_id"][rows]
        area = file.persons["area"][rows]
        scores = np.ones(len(rows))
        keypoints = file.persons["keypoints"][rows]
    else:
        find = picture_finder(file.images["id"].tolist(), folder, file.files.tolist())
        pictures, category, found, scores = read_detections(boxes, find, file.categories)
        area = None
        keypoints = np.zeros((len(pictures), len(skeleton.joints), 3))
    sizes = np.column_stack([file.images["width"], file.images["height"]])
    return People(
        folder=folder, files=file.files[pictures], box=padded(found), box_score=scores,
        image_id=file.images["id"][pictures].astype(np.int64), joints=keypoints[..., :2],
        annotated=keypoints[..., 2] > 0, truth=file, category_id=category.astype(np.int64),
        area=area, picture_size=sizes[pictures].astype(int))


def annotated_boxes(file):
    """The n persons of a CocoFile to learn from or to score, in the order of its pictures -> their
    rows (n,); rows of their pictures (n,); boxes (n,4), as in HRNet clipped to the picture,
    ordinary ones a pixel less wide and high."""
    persons = file.persons
    order = np.argsort(file.images["id"], kind="stable")
    image = np.searchsorted(file.images["id"], persons["image_id"], sorter=order)
    image = order[np.minimum(image, len(order) - 1)]  # (M,)
    extent = np.column_stack([file.images["width"], file.images["height"]])[image]  # (M,2)
    low = np.maximum(0, persons["bbox"][:, :2])
    high = low + np.maximum(0, persons["bbox"][:, 2:] - 1)
    high = np.where(extent > 0, np.minimum(extent - 1, high), high)
    rows = leave_out(file.path, "annotations", {
        "marked as crowd": persons["iscrowd"] > 0,
        "without a labelled joint (of flag 1 or 2)": ~persons["keypoints"].any((1, 2)),
        "in pictures that are not listed": file.images["id"][image] != persons["image_id"],
        "without a box in the picture": ~((high >= low).all(1) & (high > low).any(1)),
        "of area 0": persons["area"] == 0})
    rows = rows[np.argsort(image[rows], kind="stable")]
    return rows, image[rows], np.column_stack([low, high - low])[rows]


def padded(boxes):
    """Boxes (N,4) as left, top, width, height -> as People have them, the margin included."""
    return np.column_stack([boxes[:, :2] + boxes[:, 2:] / 2, PADDING * boxes[:, 2:]])


def read_detections(path, find, categories=(1,)):
    """A detector's boxes, from a JSON list of {image_id or file_name, bbox [x, y, w, h], score},
    and category_id where there are others than categories[0].

    find: a picture_finder. -> of those in the pictures the places of their pictures (N,), the ids
    of their categories (N,), boxes (N,4), scores (N,)."""
    with reading(path, "a list of boxes, each with image_id or file_name"):
        entries = expect(read_json(path), list)
        pictures = np.array([find(entry) for entry in entries])
        category = np.array([entry.get("category_id", categories[0]) for entry in entries], float)
    rows = leave_out(path, "boxes", {
        f"of other categories than {categories}": ~np.isin(category, categories),
        "of no picture here, or of a name that several have": pictures < 0})
    columns = read_columns(path, "box", [entries[row] for row in rows], {"bbox": (4,), "score": ()})
    check_columns(path, "box", columns)
    sized = leave_out(path, "boxes", {"of no size": ~(columns["bbox"][:, 2:] > 0).all(1)})
    rows = rows[sized]
    return pictures[rows], category[rows], columns["bbox"][sized], columns["score"][sized]


# ---------------------------------------------------------------------------- what readers share

def read_columns(path, name, entries, shapes, missing=None):
    """A list of dictionaries, parsed from a file -> {field: array (N, *shape), float64}.

    shapes: {field: shape of its value}. missing: {field: number for what is absent, null, empty or,
    but for keypoints, NaN}. InputError with the file and the entry, a `name`, that does not fit."""
    missing = missing or {}
    columns = {}
    hint = " (--skeleton names joints of one's own)" if "keypoints" in shapes else ""
    with reading(path, f"a list, of which each {name} has {', '.join(shapes)}{hint}") as where:
        for field, shape in shapes.items():
            values = []
            for row, entry in enumerate(entries):
                where.entry = f"{name} {row}, counted from 0"
                value = entry.get(field) if field in missing else entry[field]
                if field in missing and value in (None, []):
                    value = np.full(shape, missing[field]).tolist()
                if shape and len(value) != shape[0]:
                    raise ValueError(f"{field} has {len(value)} values, not {shape[0]}")
                values.append(value)
            where.entry = field
            column = np.array(values, np.float64).reshape(len(values), *shape)
            if field in missing and field != "keypoints":  # of a joint its flag decides
                unknown = np.isnan(column)
                column[unknown.any(1) if shape else unknown] = missing[field]
            columns[field] = column
    return columns


def check_columns(path, name, columns, lowest=None):
    """InputError with the file and the entry, a `name`, for a number that is NaN or not from
    {field: lowest} to 1e10; ids are whole numbers below 2^53, which float64 holds."""
    for field, column in columns.items():
        low = (lowest or {}).get(field, -1e10)
        good = (column >= low) & (column <= 1e10)
        wanted = f"from {low:g} to 1e10"
        if field in ("id", "image_id"):  # COCO numbers its crowds like 900100087038
            good = (abs(column) < 2 ** 53) & (column % 1 == 0)
            wanted = "a whole number below 2^53"
        for row, *place in np.argwhere(~good)[:1]:
            raise InputError(f"{path}: {field} of {name} {row}, counted from 0, is "
                             f"{column[(row, *place)]:.17g}, not {wanted}")


def leave_out(path, entries, reasons):
    """The rows for which no reason, {words: (N,) bool}, holds. How many are left out for which is
    printed; InputError if nothing is left."""
    left = np.ones(len(next(iter(reasons.values()))), bool)
    told = []
    for reason, holds in reasons.items():
        if (left & holds).any():
            told.append(f"{np.sum(left & holds)} {reason}")
        left &= ~holds
    summary = f"{path}: of {len(left)} {entries} left out: {', '.join(told) or 'none'}"
    if not left.any():
        raise InputError(f"{summary}; there is nobody left")
    if told:
        print(summary)
    return np.flatnonzero(left)


def name_parts(name):
    """The folders and the file of a name: "cam1/1.jpg", "cam1\\1.jpg" -> ["cam1", "1.jpg"]. Letters
    such as é, which can be written in two ways, are written in one."""
    parts = re.split(r"[/\\]", unicodedata.normalize("NFC", name))
    return [part for part in parts if part not in ("", ".")]


def picture_finder(numbers, folder, names):
    """A function from a box to the place of its picture in lists of the pictures' numbers and names
    below a folder; -1 if it is none of them, or may be several. The box's file_name is the name or
    its end, with folders ("cam1/1.jpg") or without; its image_id the number, also as text, or the
    name, also without its ending."""
    places = {}
    for place, (number, name) in enumerate(zip(numbers, names)):
        parts = name_parts(os.path.abspath(os.path.join(folder, name)))
        ends = ["/".join(parts[start:]) for start in (0, -4, -3, -2, -1)]
        for key in {number, *ends, *(os.path.splitext(end)[0] for end in ends)} - {None}:
            places[key] = -1 if key in places else place
    places |= {"/".join(name_parts(name)): place for place, name in enumerate(names)}

    def find(entry):
        name = entry.get("file_name") or entry["image_id"]
        place = places.get(int(name) if str(name).isdecimal() else name, -1)
        if place < 0 and isinstance(name, str):
            place = places.get("/".join(name_parts(name)), -1)
        return place

    return find


def find_file(root, split, *names):
    """The first of some names below root that exists; InputError with all of them."""
    paths = [root / name for name in names]
    for path in paths:
        if path.is_file():
            return path
    raise InputError(f"there are no annotations of split {split!r}: no "
                     f"{' and no '.join(map(str, paths))} (README.md tells where they are from)")


def find_pictures(folder, names):
    """Files below a folder -> their names as the disk has them, see name_parts. InputError if some
    are missing. Each folder is listed once, as looking at each file takes minutes on a network
    disk; only a name that is not listed is looked at: some systems know several spellings."""
    there = {}
    for place, _, files in os.walk(folder):
        for file in files:
            path = os.path.join(place, file)[len(str(folder)) + 1:]
            there["/".join(name_parts(path))] = path
    keys = ["/".join(name_parts(name)) for name in names]
    missing = [str(folder / name) for name, key in zip(names, keys)
               if key not in there and not (folder / name).is_file()]
    if missing:
        raise InputError(f"{len(missing)} of {len(names)} pictures are not there; the first ones:"
                         "\n  " + "\n  ".join(missing[:5]))
    return [there.get(key, name) for name, key in zip(names, keys)]


# ---------------------------------------------------------------------------- synthetic people

def synthetic_person(seed, number):
    """A figure that faces us, one in four partly outside: an entry of MPII's JSON; its picture."""
    rng = np.random.default_rng((seed, number))

    def step(angle, length):  # radians from straight down, to the right; in head lengths
        return length * np.array([math.sin(angle), math.cos(angle)])

    lean = rng.normal(0, 0.3)
    across = rng.uniform(0.6, 1) * np.array([math.cos(lean), -math.sin(lean)])
    place = {"pelvis": np.zeros(2), "thorax": -step(lean, 2.4), "upper neck": -step(lean, 2.8),
             "head top": -step(lean, 3.8)}
    for name, side in (("right", -1), ("left", 1)):  # the person's right is on our left
        thigh = lean + side * rng.uniform(-0.2, 0.8)
        arm = lean + side * rng.uniform(-0.2, 2.8)
        hip = side * 0.5 * across
        knee = hip + step(thigh, 1.6)
        shoulder = place["thorax"] + side * 0.85 * across
        elbow = shoulder + step(arm, 1.3)
        place |= {f"{name} hip": hip, f"{name} knee": knee,
                  f"{name} ankle": knee + step(thigh - side * rng.uniform(-0.1, 0.9), 1.6),
                  f"{name} shoulder": shoulder, f"{name} elbow": elbow,
                  f"{name} wrist": elbow + step(arm + side * rng.uniform(-1, 2), 1.1)}
    joints = np.array([place[name] for name in SKELETONS["mpii"].joints])

    size = rng.integers(160, 321, 2)  # width, height
    extent = np.ptp(joints, axis=0)
    head = rng.uniform(0.5, 1.1) * (size / extent).min()  # its length in pixels
    joints = rng.uniform(0, 1, 2) * (size - head * extent) + head * (joints - joints.min(0))
    inside = np.clip(joints, 0, size - 1)
    scale = 0.6 * 1.25 * head / 25  # as if of a head box of 1 by 0.75 head lengths
    center = (inside.min(0) + inside.max(0)) / 2 + 1 - (0, 15 * scale)  # MPII counts from 1
    entry = {"center": center.tolist(), "scale": scale, "joints": (joints + 1).tolist(),
             "joints_vis": (joints == inside).all(1).astype(int).tolist()}
    rng = np.random.default_rng((seed, number, 1))
    return entry, draw_figure(dict(zip(SKELETONS["mpii"].joints, joints)), head, size, rng)


def draw_figure(joints, head, size, rng):
    """A synthetic person's picture, in any colours, before rectangles. joints: {name: x, y}."""
    # drawn at twice its size and averaged down, as Pillow's lines have hard edges
    def colour():
        return tuple(rng.integers(20, 236, 3).tolist())

    picture = Image.new("RGB", tuple((2 * size).tolist()), colour())
    draw = ImageDraw.Draw(picture)
    for corner in 2 * rng.uniform(0, 1, (10, 2)) * size:
        draw.rectangle((*corner, *corner + 2 * head * rng.uniform(0.3, 4, 2)), colour())

    def limb(thickness, fill, *names):
        points = [tuple(2 * joints[name] + 0.5) for name in names]
        draw.line(points, fill, round(2 * thickness * head), "curve")
        for point in points:
            draw.circle(point, thickness * head, fill)

    skin = colour()
    shirt = colour()
    trousers = colour()
    trunk = ("right shoulder", "left shoulder", "left hip", "right hip")
    draw.polygon([tuple(2 * joints[name]) for name in trunk], shirt)
    limb(0.3, shirt, "right shoulder", "left shoulder")
    limb(0.2, skin, "upper neck", "thorax")
    joints["face"] = (joints["upper neck"] + joints["head top"]) / 2
    limb(0.9, skin, "face")
    for side in ("right", "left"):
        limb(0.3, trousers, f"{side} hip", f"{side} knee", f"{side} ankle")
        limb(0.24, skin, f"{side} shoulder", f"{side} elbow", f"{side} wrist")
    return picture.reduce(2)


def read_synthetic(root, split, *given):
    """The People of the synthetic data set: 400 to train on, 200 others as valid. It is in MPII's
    layout, and is drawn into the folder root, whole or not at all, if that is empty or missing."""
    if not root.exists() or not any(root.iterdir()):
        print(f"drawing synthetic people into {root}", flush=True)
        part = root.with_name(f".part{os.getpid()}.{root.name}")
        try:
            draw_synthetic(part)
            part.rename(root)
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            if not (root / "annot").exists():  # else another process was quicker
                raise InputError(f"{root} can't be written ({error.strerror}); --data names "
                                 "another folder, with --dataset synthetic") from error
    return read_mpii(root, split, *given)


def draw_synthetic(root):
    (root / "annot").mkdir(parents=True)
    (root / "images").mkdir()
    for seed, (name, count) in enumerate((("train", 400), ("valid", 200))):
        entries = []
        for number in range(count):
            entry, picture = synthetic_person(seed, number)
            entries.append(entry | {"image": f"{name}{number}.png"})
            picture.save(root / "images" / entries[-1]["image"])
        (root / f"annot/{name}.json").write_text(json.dumps(entries))


@dataclass(frozen=True)
class DatasetInfo:
    read: object  # function (root, split, skeleton, boxes) -> People
    skeleton: str
    splits: tuple  # names: to train on, to validate on
    size: tuple  # (height, width) of the network's input
    augmentation: tuple  # scale_range, rotation_range: see draw_augmentation


DATASETS = {
    "synthetic": DatasetInfo(read_synthetic, "mpii", ("train", "valid"), (128, 128), (0.1, 5)),
    "mpii": DatasetInfo(read_mpii, "mpii", ("train", "valid"), (256, 256), (0.25, 40)),
    "coco": DatasetInfo(read_coco, "coco", ("train2017", "val2017"), (256, 192), (0.30, 40)),
}


# ---------------------------------------------------------------------------- pictures

Image.MAX_IMAGE_PIXELS = 2 ** 27  # Pillow warns of more, and refuses twice as many: 1 GiB in RGB
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def open_picture(path, upright=False, size=(0, 0)):
    """A picture from a file, decoded: a Pillow picture in RGB. InputError if it can't be.

    upright: turned as its EXIF orientation says. Data sets annotate the pixels as they are stored,
    unless that contradicts size, the (width, height) in the annotations (0: any)."""
    with reading(path, "a whole picture, of at most 268 million pixels and in a format that Pillow "
                 "knows, unlike HEIC (convert it, fetch it again, or leave it out)"):
        with Image.open(path) as picture:
            picture.load()
            if upright or 0 not in size and picture.size != size:
                picture = ImageOps.exif_transpose(picture)
            if 0 not in size and picture.size != size:
                raise InputError(f"{path} is {picture.width}x{picture.height}, in the annotations "
                                 f"{size[0]}x{size[1]}; fetch the picture that was annotated")
            if picture.mode[0] in "IF":  # 16 or 32 bits, or fractions: thermal cameras, X-rays
                levels = np.asarray(picture, np.float64)
                known = levels[np.isfinite(levels)]
                levels = np.nan_to_num((levels - known.min()) / max(np.ptp(known), 1e-9))
                picture = Image.fromarray((255 * levels.clip(0, 1)).astype(np.uint8))
            return picture.convert("RGB")


LEFT = (255, 150, 30)  # colours of the person's own sides
RIGHT = (40, 150, 255)
MIDDLE = (90, 230, 90)
font = functools.lru_cache(ImageFont.load_default)


def joint_colour(skeleton, *indices):
    """The colour of a joint, or of a limb between two: the side that its name tells."""
    names = " ".join(skeleton.joints[index] for index in indices)
    return LEFT if "left" in names else RIGHT if "right" in names else MIDDLE


def draw_pose(picture, keypoints, skeleton, threshold=0.0):
    """Draws a skeleton onto a picture, in place. keypoints: (K,3) as x, y, score in its pixels.

    Joints whose score is at most threshold are left out, with their limbs. The lines are as thick
    as suits the person."""
    draw = ImageDraw.Draw(picture)
    shown = keypoints[:, 2] > threshold
    extent = np.ptp(keypoints[shown, :2], axis=0).max() if shown.any() else 0
    width = max(1, round(max(extent, 50) / 60))
    points = [tuple(point) for point in keypoints[:, :2].tolist()]
    for a, b in skeleton.limbs:
        if shown[a] and shown[b]:
            draw.line((points[a], points[b]), joint_colour(skeleton, a, b), width)
    for index in np.flatnonzero(shown):
        draw.circle(points[index], width + 0.5, joint_colour(skeleton, index), (0, 0, 0))


def heat(picture, heatmap, caption=""):
    """A picture, dimmed, with a heatmap (h,w) of values from 0 to 1 laid over it from black through
    red to white, and a caption. The heatmap's pixel (0, 0) lies on the picture's."""
    level = Image.fromarray((255 * np.clip(heatmap, 0, 1)).astype(np.uint8))
    x, y = np.divide(level.size, picture.size)
    level = level.transform(picture.size, Image.Transform.AFFINE, (x, 0, 0.5 - x / 2, 0, y,
                            0.5 - y / 2), Image.Resampling.BILINEAR)
    glow = ImageOps.colorize(level, "black", "white", mid="red")
    dimmed = Image.blend(picture.convert("L").convert("RGB"), Image.new("RGB", picture.size), 0.5)
    drawn = Image.composite(glow, dimmed, level)
    write_caption(drawn, caption)
    return drawn


def write_caption(picture, text):
    """Writes into the upper left corner of a picture, in place."""
    ImageDraw.Draw(picture).text((3, 2), text, "white", font(size=12), stroke_width=1,
                                 stroke_fill="black")


def grid(pictures, columns, gap=4):
    """Pictures of one size side by side, row by row, on white."""
    width, height = pictures[0].size
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        sheet.paste(picture, (gap + column * (width + gap), gap + row * (height + gap)))
    return sheet


def round_numbers(values):
    """Two to seven round numbers, evenly spaced, that enclose the values; of whole values, whole
    ones."""
    low = min(values)
    span = (max(values) - low) or 1.0
    whole = all(float(value).is_integer() for value in values)
    power = 10.0 ** math.floor(math.log10(span))
    step = next(step for step in power * np.array([0.2, 0.25, 0.5, 1, 2])
                if span / step <= 5 and (step.is_integer() or not whole))
    return step * np.arange(math.floor(low / step), math.ceil((low + span) / step) + 1)


def draw_axes(draw, box, xs, ys, xlabel, ylabel):
    """A pair of axes in a box (left, top, right, bottom) of a picture, with room for the values xs
    and ys -> a function from (x, y) to the position in pixels."""
    left, top, right, bottom = box
    columns = round_numbers(xs)
    rows = round_numbers(ys)

    def position(x, y):
        across = (x - columns[0]) / (columns[-1] - columns[0])
        up = (y - rows[0]) / (rows[-1] - rows[0])
        return left + across * (right - left), bottom - up * (bottom - top)

    for x in columns:
        draw.text((position(x, 0)[0], bottom + 4), f"{x:g}", "black", font(size=12), "ma")
    for y in rows:
        draw.text((left - 6, position(0, y)[1]), f"{y:g}", "black", font(size=12), "rm")
        draw.line((left, position(0, y)[1], right, position(0, y)[1]), (225, 225, 225))
    draw.rectangle(box, outline="black")
    draw.text(((left + right) / 2, bottom + 22), xlabel, "black", font(size=14), "ma")
    draw.text((left, top - 6), ylabel, "black", font(size=14), "ls")
    return position


def show_samples(dataset, targets=True, count=12, captions=()):
    """A sheet of samples: each crop with its joints and caption, and its targets, if wanted."""
    sheet = []
    for number in range(count):
        epoch, row = divmod(number, len(dataset))  # of few people more epochs
        _, image, joints, annotated = dataset[epoch, row]
        picture = Image.fromarray(image.numpy())
        maps, mask = gaussian_targets(joints[None], annotated[None], dataset.size)
        learnt = heat(picture, maps[0].amax(0).numpy())
        draw_pose(picture, torch.cat([joints, mask[0, :, None]], 1).numpy(), dataset.skeleton)
        write_caption(picture, captions[number] if captions else "")
        sheet += [picture, learnt] if targets else [picture]
    return grid(sheet, columns=6)


# ---------------------------------------------------------------------------- deployment

def run_onnx(session, images):
    """An ONNX Runtime session's outputs for images (B,3,H,W), a list of numpy arrays. A file of a
    fixed batch gets as many as it wants, the last ones repeated."""
    takes = session.get_inputs()[0]
    fixed = isinstance(takes.shape[0], int)
    batch = takes.shape[0] if fixed else 32
    runs = []
    for start in range(0, len(images), batch):
        part = images[start:start + batch]
        if fixed:
            part = np.resize(part, (batch, *part.shape[1:]))
        runs.append(session.run(None, {takes.name: part}))
    return [np.concatenate(parts)[:len(images)] for parts in zip(*runs)]


class Pose:
    """The joints of persons by an ONNX file of export.py: Pose("lapx.onnx")(picture, boxes).

    It needs numpy, Pillow and onnxruntime alone, and nothing of this project but functions that
    need no more: `export.py --pose pose.py` writes them and the class to a file. joints: the K
    names. A joint is where evaluate.predict_picture has it; of doubles none is left out."""

    def __init__(self, path, threads=0, provider="CPUExecutionProvider"):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads  # 0: one per core
        self.session = onnxruntime.InferenceSession(path, options, [provider])
        metadata = self.session.get_modelmeta().custom_metadata_map
        if "lapx" not in metadata:
            raise ValueError(f"{path} is not a file of LAPX's export.py: it names no joints")
        self.info = json.loads(metadata["lapx"])
        self.joints = self.info["skeleton"]["joints"]

    def __call__(self, picture, boxes=None, flip=False):
        """A Pillow picture of 8 bits; boxes (n,4) of persons in it, as left, top, width, height,
        default: the whole picture -> (n,K,3), x and y in pixels of the upright picture, counted
        from 0, and score, about 1 for a joint in clear view.

        flip: the flip test, twice the time for somewhat better joints. ValueError for other
        pictures and boxes."""
        if picture.mode[0] in "IF":
            raise ValueError(f"the picture's mode is {picture.mode}: bring it to 8 bits first")
        picture = ImageOps.exif_transpose(picture).convert("RGB")
        boxes = np.array([[0, 0, *picture.size]] if boxes is None else boxes, float).reshape(-1, 4)
        if not (boxes[:, 2:] > 0).all():
            raise ValueError(f"a box is left, top, width, height, unlike one of {boxes.tolist()}")
        if len(boxes) == 0:
            return np.zeros((0, len(self.joints), 3))
        size = self.info["input"]  # height, width
        to_crop = np.stack([affine(box, size) for box in padded(boxes)])  # (n,3,3)
        crops = np.stack([crop(picture, matrix, size) for matrix in to_crop])  # (n,H,W,3)
        heatmaps = self.heatmaps(crops)  # (n,K,h,w)
        if flip and self.info["skeleton"]["flip_pairs"]:
            order = np.arange(len(self.joints))
            for pair in self.info["skeleton"]["flip_pairs"]:
                order[pair] = order[pair[::-1]]
            mirrored = self.heatmaps(crops[:, :, ::-1])[:, order, :, ::-1]
            shifted = np.concatenate([mirrored[..., :1], mirrored[..., :-1]], axis=3)
            heatmaps = (heatmaps + shifted) / 2
        found = self.decode(heatmaps)  # in heatmap pixels
        found[..., :2] = transform(STRIDE * found[..., :2], np.linalg.inv(to_crop))
        return found

    def heatmaps(self, crops):
        """Crops (n,H,W,3) uint8 RGB -> heatmaps (n,K,h,w)."""
        images = crops.astype(np.float32)
        if self.info["colour"] == "BGR":
            images = images[..., ::-1]
        images = (images / 255 - np.float32(self.info["mean"])) / np.float32(self.info["std"])
        images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))  # (n,3,H,W)
        names = [output.name for output in self.session.get_outputs()]
        return run_onnx(self.session, images)[names.index("heatmaps")]

    @staticmethod
    def decode(heatmaps):
        """Heatmaps (n,K,h,w) -> (n,K,3), x and y in heatmap pixels, score: lapx.decode in numpy."""
        h, w = heatmaps.shape[2:]
        y, x = np.divmod(heatmaps.reshape(*heatmaps.shape[:2], h * w).argmax(2), w)  # (n,K)
        n, k = np.indices(x.shape)
        scores = heatmaps[n, k, y, x]
        right = np.sign(heatmaps[n, k, y, (x + 1) % w] - heatmaps[n, k, y, x - 1])
        down = np.sign(heatmaps[n, k, (y + 1) % h, x] - heatmaps[n, k, y - 1, x])
        inside = (x > 1) & (x < w - 1) & (y > 1) & (y < h - 1)
        points = np.stack([x + 0.25 * inside * right, y + 0.25 * inside * down], axis=2)
        points *= (scores > 0)[..., None]
        return np.concatenate([points, scores[..., None]], axis=2)


# ---------------------------------------------------------------------------- files

@contextmanager
def reading(path, wanted):
    """Around the reading of somebody's file: whatever goes wrong becomes an InputError that names
    the file, what it must be (`wanted`) and the entry that the code inside was at (`where.entry`).
    """
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


@contextmanager
def writing(path):
    """Gives a path beside `path` to write to, which takes its place when all is written: a crash, a
    full disk or a kill leaves the old file. The folder is made if need be."""
    path = Path(path)
    part = path.with_name(f".part{os.getpid()}.{path.name}")  # no other process's
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, RuntimeError) and "inline_container" not in reason:
            raise  # else it is torch.save's word for a full disk
        raise InputError(f"{path} can't be written ({reason}); what was there before is untouched"
                         ) from error
    finally:
        part.unlink(missing_ok=True)


def write_table(path, rows):
    """Dictionaries -> a CSV file; their keys are the columns."""
    with writing(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row),
                               lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def read_json(path, object_hook=None):
    """A parsed JSON file, in any of Unicode's forms; InputError if it is missing or broken."""
    with reading(path, "JSON, the whole of it (fetch it again)"):
        return json.loads(Path(path).read_bytes(), object_hook=object_hook)


def expect(value, kind):
    """The value, if it is of the kind, list or dict, and not empty; else ValueError."""
    if not isinstance(value, kind) or not value:
        names = {dict: "a dictionary", list: "a list"}
        found = names.get(type(value), value) if value else value
        raise ValueError(f"it is {found}, not {names[kind]} with entries")
    return value


# ---------------------------------------------------------------------------- scripts

def progress(items, what):
    """The items, one by one, while a line of the terminal shows how many went; where there is none,
    a file of logs gets a line a minute."""
    told = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        if sys.stderr.isatty():
            end = "\r" if done < len(items) else f"\r{'':60}\r"
            print(f"  {done}/{len(items)} {what} ", end=end, file=sys.stderr, flush=True)
        elif time.monotonic() - told > 60:
            told = time.monotonic()
            print(f"  {done}/{len(items)} {what}", file=sys.stderr, flush=True)


def cpu_info():
    """What the system tells of its processor, where it tells it in a file; else nothing."""
    path = Path("/proc/cpuinfo")
    return path.read_text("utf-8") if path.exists() else ""


def cpu_count():
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# What some faults mean to a user, by how they begin: these have no other cause. What was raised in
# a loader process ("Caught ...") keeps its traceback, for those who extend a reader.
SENTENCES = {
    r"\w*MemoryError: (?!Caught)|RuntimeError: \[enforce fail at alloc_cpu":
    "the memory does not suffice; choose a smaller --batch-size or --input, or for train.py a "
    "larger --accumulate, which a resumed run takes, too",
    "ValueError: Expected more than 1 value per channel":
    "BatchNorm can't train on a single value per channel; choose a larger --batch-size or --input, "
    "or a smaller --accumulate",
    r"RuntimeError: DataLoader worker \(pid":
    "a loader process died, often for want of memory; fewer --workers may help (--resume goes on)",
}


def run(main):
    """Calls a script's main(). The user's mistakes end in a sentence and exit status 1."""
    keep_memory()
    try:
        main()
        sys.stdout.flush()
    except InputError as error:  # from a loader process it comes wrapped in a traceback
        sys.exit(f"error: {str(error).split('InputError: ')[-1].strip()}")
    except (RuntimeError, ValueError, MemoryError) as error:
        for pattern, sentence in SENTENCES.items():
            if re.match(pattern, f"{type(error).__name__}: {error}"):
                sys.exit(f"error: {sentence}")
        raise
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, head or less, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def keep_memory():
    """Lets glibc keep freed memory instead of returning large blocks and getting them back page by
    page: on a CPU batches of 32 at 256x256 train twice as fast; batches of 8 gain nothing (Zen 3).
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-4, 0)  # M_MMAP_MAX: no blocks of their own
            libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: return nothing before 2 GiB are free


def image_size(text):
    """"256x192" -> (256, 192), height and width; an argparse type."""
    match = re.fullmatch(r"(\d+)x(\d+)", text.lower())
    sides = tuple(map(int, match.groups())) if match else (0, 0)
    if min(sides) < 64 or max(sides) > 4096:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, both from 64 to 4096")
    return sides


def number_from(lowest, highest=10**9):
    """An argparse type: whole numbers from lowest to highest."""
    def number(text):
        if not text.isdecimal() or not lowest <= int(text) <= highest:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number {lowest}..{highest}")
        return int(text)
    return number


def refuse_unused(parser, args, mode, used):
    """A flag that has no effect in a mode ends in a sentence. used: the names that have one."""
    for name, value in vars(args).items():
        if name not in used.split() and value != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} means nothing with {mode}")


def add_data_arguments(parser, dataset, size):
    """The flags that all scripts share which read a data set; the defaults in words."""
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=DATASETS, help=f"which people (default: {dataset})")
    group.add_argument("--data", metavar="DIR",
                       help="the data set's folder (default: data/DATASET)")
    group.add_argument("--skeleton", choices=SKELETONS, help="the joints, an entry of SKELETONS in "
                       "lapx.py (default: the data set's own)")
    group.add_argument("--input", type=image_size, metavar="HxW",
                       help=f"the network's input (default: {size})")


def add_workers_argument(add):
    """The flag for the number of loader processes. The processes of a machine share its CPUs."""
    share = cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    default = max(0, min(16, share - 1)) if torch.cuda.is_available() else 1
    add("--workers", type=number_from(0, cpu_count()), default=default, metavar="N",
        help="loader processes (default: %(default)s; where there is a GPU, one less than the "
        "CPUs, at most 16, else 1)")
