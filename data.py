"""People and their pictures: crops, targets, readers for MPII and COCO, drawings.

    python data.py --dataset mpii --data data/mpii --show samples.png

The protocol is that of SimpleBaseline and HRNet, whose numbers are published.
Every random choice is a function of (seed, epoch, person), so that a run can be
repeated and resumed exactly, whatever the number of loader processes.

Coordinates, everywhere: x to the right, y down, in pixels, counted from 0; whole
numbers are the centres of pixels. A person's box is (center, scale): center is
its middle in pixels of the picture, scale its width / 200, a quarter of margin
included. Sizes are (height, width), as in torch.
"""

import argparse
import contextlib
import csv
import ctypes
import functools
import io
import json
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from lapx import MEAN, SKELETONS, STD, STRIDE, InputError, heatmap_size, reading


# ---------------------------------------------------------------------------- geometry

def affine(center, scale, size, rotation=0.0, flip=False):
    """The affine transform used everywhere, from a picture to the crop of a box: a 2x3 matrix M
    with (u, v) = M (x, y, 1).

    center, scale: the box. size: (height, width) of the crop. rotation: degrees; positive turns the
    box clockwise, so the person in the crop counter-clockwise. flip: mirrored left to right. The
    box's center comes to (width/2, height/2), half a pixel right of and below the crop's middle,
    and its width fills the crop's width; the same factor holds for y (SimpleBaseline's protocol:
    the box's height is never looked at).
    """
    height, width = size
    cos = math.cos(math.radians(rotation))
    sin = math.sin(math.radians(rotation))
    linear = width / (200.0 * scale) * np.array([[cos, sin], [-sin, cos]])
    if flip:  # mirrored about the center: the same crop as that of the mirrored picture
        linear[:, 0] *= -1
    return np.column_stack([linear, np.array([width / 2, height / 2]) - linear @ center])


def invert(matrix):
    """The inverse of an affine 2x3 matrix, 2x3."""
    linear = np.linalg.inv(matrix[:, :2])
    return np.column_stack([linear, -linear @ matrix[:, 2]])


def transform(points, matrix):
    """Points (...,2) through a 2x3 matrix, or points (N,K,2) through N of them (N,2,3)."""
    return np.einsum("...kj,...ij->...ki", points, matrix[..., :2]) + matrix[..., None, :, 2]


def crop(picture, matrix, size):
    """The crop (height, width) of a Pillow picture: (H,W,3) uint8. Bilinear, black outside.

    matrix: from the picture to the crop. The published numbers used OpenCV's warpAffine. OpenCV
    rounds grey levels, Pillow truncates. OpenCV blends the picture's edge into the black outside;
    Pillow does so only if the black is in the picture, so it gets a black ring of one pixel.
    """
    height, width = size
    inverse = invert(matrix)
    inverse[:, 2] += 0.5 * (1 - inverse[:, 0] - inverse[:, 1])  # Pillow's centres are at i + 0.5
    corners = transform(np.array([[0, 0], [width, 0], [0, height], [width, height]]), inverse)
    low = np.maximum(np.floor(corners.min(0)) - 1, -1)
    high = np.minimum(np.ceil(corners.max(0)) + 1, np.array(picture.size) + 1)
    if (low >= high).any():  # the box lies outside the picture
        return np.zeros((height, width, 3), np.uint8)
    part = picture.crop((*low.astype(int), *high.astype(int)))
    inverse[:, 2] -= low
    return np.array(part.transform((width, height), Image.Transform.AFFINE,
                                   tuple(inverse.ravel()), Image.Resampling.BILINEAR))


# ---------------------------------------------------------------------------- a sample

@dataclass(frozen=True)
class Augmentation:
    """How a training sample is varied. Nothing moves the box or changes colours."""

    scale: float  # the box's size is multiplied by a number from 1 - scale to 1 + scale
    rotation: float  # degrees at most, either way

    def draw(self, rng):
        """-> the factor of the box's size, degrees, whether to mirror."""
        # PAPER SILENT: distribution of the scale. SimpleBaseline's normal one, cut at one sigma,
        # with its 0.25 for MPII and 0.30 for COCO.
        factor = 1 + self.scale * np.clip(rng.standard_normal(), -1, 1)
        # PAPER SILENT: distribution of the rotation. Uniform within the paper's 40 degrees, for
        # every sample: 23 degrees rms. SimpleBaseline's code with a factor of 40: normal, sigma 40,
        # cut at 80, in 60 % of the samples: 30 degrees rms.
        degrees = rng.uniform(-self.rotation, self.rotation)
        flip = rng.random() < 0.5  # PAPER SILENT: share of mirrored samples. Half of them.
        # PAPER SILENT: other augmentation. None: no half bodies (HRNet's for COCO), no shift.
        return factor, degrees, flip


def flip_order(skeleton):
    """The index of each joint's mirror image, (K,)."""
    order = np.arange(len(skeleton.joints))
    for a, b in skeleton.flip_pairs:
        order[[a, b]] = order[[b, a]]
    return order


class PoseDataset(torch.utils.data.Dataset):
    """Crops of People (below). dataset[epoch, row] varies with the seed, epoch and row alone;
    dataset[row] is epoch 0.

    -> row, crop (H,W,3) uint8, joints (K,2) float32 in pixels of the crop, visible (K,) float32.
    """

    def __init__(self, people, size, skeleton, augmentation=None, seed=0):
        self.people = people
        self.size = size
        self.augmentation = augmentation
        self.seed = seed
        self.mirrored = flip_order(skeleton)

    def __len__(self):
        return len(self.people)

    def __getitem__(self, index):
        epoch, row = index if isinstance(index, tuple) else (0, index)
        people = self.people
        scale = people.scale[row]
        degrees = 0.0
        flip = False
        if self.augmentation:
            rng = np.random.default_rng((self.seed, epoch, row, 1))  # 1: not the shuffle's
            factor, degrees, flip = self.augmentation.draw(rng)
            scale = scale * factor
        matrix = affine(people.center[row], scale, self.size, degrees, flip)
        image = crop(people.picture(row), matrix, self.size)
        joints = transform(people.joints[row], matrix).astype(np.float32)
        visible = people.visible[row].astype(np.float32)
        if flip:
            joints = joints[self.mirrored]
            visible = visible[self.mirrored]
        return row, torch.from_numpy(image), torch.from_numpy(joints), torch.from_numpy(visible)


def make_loader(dataset, batches, workers, pin_memory=False):
    """A DataLoader over batches (lists of indices), whose processes share the dataset's arrays."""
    fork = workers and sys.platform == "linux"  # elsewhere processes can't share, and copy them
    return torch.utils.data.DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, pin_memory=pin_memory,
        persistent_workers=workers > 0, multiprocessing_context="fork" if fork else None)


@functools.lru_cache
def constant(values, device):
    """A tuple of numbers as a tensor, made once: each copy to a GPU would make a step wait."""
    return torch.tensor(values, device=device)


def normalise(images, bgr=False, mean=MEAN, std=STD):
    """Crops (B,H,W,3) uint8 RGB, on any device -> the network's input (B,3,H,W) float32.

    Divided by 255, minus the mean, by the standard deviation of each channel; channels last in
    memory. bgr: the channels in the order blue, green, red, with the same numbers.
    """
    images = images.flip(3) if bgr else images
    images = (images / 255 - constant(mean, images.device)) / constant(std, images.device)
    return images.permute(0, 3, 1, 2)


def target_sigma(size):
    """The targets' standard deviation in heatmap pixels, for inputs of size (height, width)."""
    # PAPER SILENT: width of the targets. SimpleBaseline's 2 pixels, 3 at 384x288.
    return 3 if max(size) > 256 else 2


def gaussian_targets(joints, visible, size, sigma):
    """Heatmaps to learn: joints (B,K,2) in pixels of an input of size (H,W), visible (B,K) ->
    targets (B,K,h,w), weights (B,K), on the joints' device.

    A Gaussian of height 1 around the heatmap pixel nearest to the joint, cut off at 3 sigma. The
    weight is 1 for joints to learn, else 0. Rounding and the test of the border are those of
    SimpleBaseline to the last pixel: int() truncates towards 0, and the low side is a pixel looser.
    """
    h, w = heatmap_size(*size)
    radius = 3 * sigma
    centers = (joints / STRIDE + 0.5).trunc()  # (B,K,2) heatmap pixels
    limits = constant((w, h), joints.device)
    # DIFFERS: joints outside the crop. The paper masks them; the published protocol, which we
    # follow, masks those from whose Gaussian nothing reaches into the map.
    on_map = ((centers - radius < limits) & (centers + radius + 1 >= 0)).all(2)  # (B,K)
    # DIFFERS: occluded joints. The paper masks "invisible" joints; as in the published protocol we
    # mask those that nobody annotated, and learn those that are annotated but occluded.
    weights = visible * on_map

    def profile(length, middle):  # (B,K) -> (B,K,length)
        distance = torch.arange(length, device=joints.device) - middle[..., None]
        return torch.exp(-distance ** 2 / (2 * sigma ** 2)) * (distance.abs() <= radius)

    rows = profile(h, centers[..., 1])[..., :, None]  # (B,K,h,1)
    columns = profile(w, centers[..., 0])[..., None, :]  # (B,K,1,w)
    return rows * columns * (weights > 0.5)[..., None, None], weights


# ---------------------------------------------------------------------------- people and readers

@dataclass
class People:
    """The N persons of a split: arrays with a row for each, which loader processes share.

    A hundred thousand small Python objects would be copied into every process page by page, as
    counting references writes to them; an array is not written to.
    """

    folder: Path  # of the pictures
    files: np.ndarray  # (N,) bytes, the picture's file below the folder
    image_id: np.ndarray  # (N,) int64
    center: np.ndarray  # (N,2) float64, pixels of the picture
    scale: np.ndarray  # (N,) float64, width of the padded box / 200
    joints: np.ndarray  # (N,K,2) float32, pixels of the picture
    visible: np.ndarray  # (N,K) bool: annotated, be it occluded
    score: np.ndarray  # (N,) float64, of the detected box; 1 for annotated ones
    seed: int | None = None  # of synthetic people, who have no files
    image: Image.Image | None = None  # a picture in memory that all of them are in
    category: int = 1  # COCO's id of the category "person"
    left_out: str = ""  # how many persons of the split are not here and why, in words

    def __len__(self):
        return len(self.files)

    def rows(self, which):
        """The People of some rows (a slice or indices)."""
        return replace(self, **{name: value[which] for name, value in vars(self).items()
                                if isinstance(value, np.ndarray)})

    def picture(self, row):
        """The picture that a person is in, a Pillow picture in RGB."""
        if self.image is not None:
            return self.image
        if self.seed is not None:
            return synthetic_person(self.seed, int(self.image_id[row]))[1]
        return open_picture(self.folder / os.fsdecode(self.files[row]))


PADDING = 1.25  # the boxes of both data sets are enlarged by this


def box_to_center_scale(boxes, size):
    """Boxes (N,4) as x, y, width, height -> centers (N,2), scales (N,).

    A box is widened to the shape of the crop, size (height, width), then padded.
    """
    height, width = size
    widths = np.maximum(boxes[:, 2], boxes[:, 3] * width / height)
    return boxes[:, :2] + boxes[:, 2:] / 2, widths / 200 * PADDING


def people_in_boxes(boxes, scores, size, num_joints, **others):
    """Boxes (N,4) of persons without joints -> People. As in HRNet, detected boxes are neither
    clipped nor shortened. others: more fields of People."""
    N = len(boxes)
    center, scale = box_to_center_scale(boxes, size)
    unknown = dict(folder=Path(), files=np.zeros(N, "S1"), image_id=np.zeros(N, np.int64))
    return People(**unknown | others, center=center, scale=scale, score=scores,
                  joints=np.zeros((N, num_joints, 2), np.float32),
                  visible=np.zeros((N, num_joints), bool))


def read_columns(path, name, entries, shapes, missing={}, lowest={}):
    """A list of dictionaries, parsed from a file -> {field: array (N, *shape), float64}.

    shapes: {field: shape of its value}. missing: {field: value where an entry lacks it}. lowest:
    {field: smallest value}. InputError with the file and the entry, which is a `name`, where a
    field is absent, has another number of values, or has one that is not a number up to 1e10.
    """
    columns = {}
    with reading(path, f"a list, of which each {name} has {', '.join(shapes)}") as where:
        for field, shape in shapes.items():
            values = []
            for number, entry in enumerate(entries):
                where.entry = f"{name} {number}, counted from 0"
                value = entry.get(field, missing[field]) if field in missing else entry[field]
                if shape and len(value) != shape[0]:
                    raise ValueError(f"{field} has {plural(len(value), 'value')}, not {shape[0]}")
                values.append(value)
            where.entry = field
            column = np.array(values, np.float64).reshape(len(values), *shape)
            low = lowest.get(field, -1e10)
            good = (column >= low) & (column <= 1e10)  # NaN is neither
            bad = ~good.reshape(len(values), math.prod(shape)).all(1)
            if bad.any():
                where.entry = f"{name} {bad.argmax()}, counted from 0; {bad.sum()} such"
                raise ValueError(f"{field} is {column[bad.argmax()].tolist()}, not from {low:g} to "
                                 "1e10")
            columns[field] = column
    return columns


def mpii_files(split, kind):
    """MPII's file of a split below the data folder, as HRNet names it, then as mmpose does: the
    persons (kind "json") or the head boxes ("mat")."""
    other = split.replace("valid", "val")
    if kind == "json":
        return [f"annot/{split}.json", f"annotations/mpii_{other}.json"]
    return [f"annot/gt_{split}.mat", f"annotations/mpii_gt_{other}.mat"]


def read_mpii(root, split, size=None, skeleton=SKELETONS["mpii"]):
    """The People of MPII's annot/{split}.json. Splits: train, valid, trainval, test (no joints)."""
    path = find_file(root, mpii_files(split, "json"), "mpii", split)
    return mpii_people(read_json(path), path, Path(root) / "images")


def mpii_people(entries, path, folder):
    """MPII's entries -> People. Pixels are counted from 1 there, and scale is the body's height /
    200, since MPII's reference person is 200 pixels high.

    The adjustments are SimpleBaseline's: the center goes down by 15 * scale (the annotated one is
    the torso's, too high for the whole person), the box is padded, pixels count from 0.
    """
    with reading(path, "a list of persons, each with image"):
        names = np.array([os.fsencode(entry["image"]) for entry in entries])
        if "joints" in entries[0] or "joints_vis" in entries[0]:
            missing = {}
        else:  # the test split has neither
            missing = {"joints": [[0, 0]] * 16, "joints_vis": [0] * 16}
    persons = read_columns(path, "person", entries, {
        "center": (2,), "scale": (), "joints": (16, 2), "joints_vis": (16,)}, missing,
        lowest={"scale": 1e-3})
    center = persons["center"]
    scale = persons["scale"]
    boxed = center[:, 0] != -1
    center[:, 1] += np.where(boxed, 15 * scale, 0)
    scale = scale * np.where(boxed, PADDING, 1)
    _, image_id = np.unique(names, return_inverse=True)
    return People(Path(folder), names, image_id, center - 1, scale,
                  (persons["joints"] - 1).astype(np.float32), persons["joints_vis"] > 0,
                  np.ones(len(names)))


@dataclass
class CocoFile:
    """COCO's annotation file: I pictures and the M persons in them."""

    path: Path
    category: int  # the id of the category "person"
    file_name: list  # I names
    images: dict  # of arrays (I,): id, width, height
    persons: dict  # of arrays (M,...): the fields in coco_file


def read_coco_file(path, num_joints):
    """COCO's annotation file -> CocoFile. A test split's has pictures only."""
    def without_outline(item):  # the outlines take most of the memory
        item.pop("segmentation", None)
        return item

    return coco_file(read_json(path, without_outline), path, num_joints)


def coco_file(content, path, num_joints):
    """A parsed annotation file -> CocoFile; path names it in errors."""
    K = num_joints
    with reading(path, "a COCO annotation file with images and annotations") as where:
        categories = [item["id"] for item in content.get("categories", []) if "keypoints" in item]
        category = categories[0] if categories else 1
        names = [os.fspath(item.get("file_name", "")) for item in content["images"]]
        found = [item for item in content.get("annotations", []) if item["category_id"] == category]
        for number, item in enumerate(found):
            where.entry = f"person {number}, counted from 0"
            if item.get("iscrowd"):
                item.setdefault("keypoints", [0] * 3 * K)
            if len(item["keypoints"]) != 3 * K:
                raise ValueError(f"{len(item['keypoints'])} numbers as keypoints, not {3 * K}; "
                                 "joints of one's own are named with --skeleton")
    images = read_columns(path, "picture", content["images"], {"id": (), "width": (), "height": ()},
                          missing={"width": 1e10, "height": 1e10},  # then no box is clipped
                          lowest={"width": 1, "height": 1})
    persons = read_columns(path, "person", found, {
        "id": (), "image_id": (), "bbox": (4,), "area": (), "iscrowd": (), "num_keypoints": (),
        "keypoints": (3 * K,)}, missing={"iscrowd": 0, "num_keypoints": -1})
    persons["keypoints"] = persons["keypoints"].reshape(-1, K, 3)  # x, y, flag: 0 not labelled
    labelled = (persons["keypoints"][..., 2] > 0).sum(1)
    persons["num_keypoints"] = np.where(persons["num_keypoints"] < 0, labelled,
                                        persons["num_keypoints"])
    unknown = np.setdiff1d(persons["image_id"], images["id"])
    if len(unknown):
        raise InputError(f"{path} has persons in {plural(len(unknown), 'picture')} that it does "
                         f"not list as images (first: image_id {unknown[0]:.0f})")
    return CocoFile(Path(path), category, names, images, persons)


def coco_path(root, split):
    """COCO's annotation file of a split; a test split's has another name."""
    return find_file(root, [f"annotations/person_keypoints_{split}.json",
                            f"annotations/image_info_{split}.json"], "coco", split)


def coco_folder(root, split):
    """Where a split's pictures lie: images/val2017 or val2017 (test-dev2017's in test2017)."""
    name = split.replace("-dev", "")
    other = Path(root) / name
    folder = Path(root) / "images" / name
    return other if other.is_dir() and not folder.is_dir() else folder


def read_coco(root, split, size=(256, 192), skeleton=SKELETONS["coco"]):
    """The People of COCO's annotations/person_keypoints_{split}.json with a labelled joint.

    size: (height, width) of the crops, whose shape the boxes take. As in HRNet, an ordinary box
    loses one pixel of width and height when it is clipped to the picture.
    """
    file = read_coco_file(coco_path(root, split), len(skeleton.joints))
    persons = file.persons
    order = np.argsort(file.images["id"], kind="stable")
    image = order[np.searchsorted(file.images["id"], persons["image_id"], sorter=order)]  # (M,)
    x, y, w, h = persons["bbox"].T
    left = np.maximum(0, x)
    top = np.maximum(0, y)
    right = np.minimum(file.images["width"][image] - 1, left + np.maximum(0, w - 1))
    bottom = np.minimum(file.images["height"][image] - 1, top + np.maximum(0, h - 1))
    boxes = np.column_stack([left, top, right - left, bottom - top])
    single = persons["iscrowd"] == 0
    labelled = single & persons["keypoints"].any((1, 2))
    sized = (boxes[:, 2:] >= 0).all(1) & (boxes[:, 2:] > 0).any(1) & (persons["area"] > 0)
    rows = np.flatnonzero(labelled & sized)
    left_out = (f"of {plural(single.sum(), 'person')} {labelled.sum()} with labelled joints, "
                f"{np.sum(labelled & ~sized)} of them without area or box")
    if not len(rows):
        raise InputError(f"{file.path} has nobody to learn from or to score: {left_out}")
    rows = rows[np.argsort(image[rows], kind="stable")]  # in the order of the list of images
    names = np.array([os.fsencode(file.file_name[row]) for row in image[rows]])
    center, scale = box_to_center_scale(boxes[rows], size)
    joints = persons["keypoints"][rows]
    return People(coco_folder(root, split), names, persons["image_id"][rows].astype(np.int64),
                  center, scale, joints[..., :2].astype(np.float32), joints[..., 2] > 0,
                  np.ones(len(rows)), category=file.category,
                  left_out=left_out if len(rows) < single.sum() else "")


def read_detections(path, by_id, by_name, category=1):
    """A detector's boxes, from a JSON list of {image_id or file_name, bbox [x, y, w, h], score},
    and category_id where there are others than persons.

    by_id, by_name: {image_id: picture}, {file name: picture}, whatever a picture is to the caller.
    -> the pictures, a list; boxes (N,4); scores (N,). What belongs to none of the pictures, or has
    no size, is left out and told.
    """
    with reading(path, "a list of boxes, each with image_id or file_name") as where:
        entries = [entry for entry in read_json(path)
                   if entry.get("category_id", category) == category]
        pictures = []
        for number, entry in enumerate(entries):
            where.entry = f"box {number}, counted from 0"
            if "file_name" in entry:
                name = entry["file_name"]
                pictures.append(by_name.get(name, by_name.get(Path(name).name)))
            else:
                pictures.append(by_id.get(entry["image_id"]))
    columns = read_columns(path, "box", entries, {"bbox": (4,), "score": ()})
    known = np.array([picture is not None for picture in pictures], bool)
    sized = (columns["bbox"][:, 2:] > 0).all(1)
    rows = np.flatnonzero(known & sized)
    if len(rows) < len(entries):
        print(f"{path}: of {plural(len(entries), 'box', 'es')} {np.sum(~known)} of no picture here "
              f"and {np.sum(known & ~sized)} of no size left out")
    return [pictures[row] for row in rows], columns["bbox"][rows], columns["score"][rows]


def read_boxes(path, root, split, size, num_joints):
    """Detected boxes in COCO's pictures of a split -> People without joints, in that order."""
    file = read_coco_file(coco_path(root, split), num_joints)
    by_id = {int(image_id): row for row, image_id in enumerate(file.images["id"])}
    by_name = {name: row for row, name in enumerate(file.file_name)}
    rows, boxes, scores = read_detections(path, by_id, by_name, file.category)
    if not rows:
        raise InputError(f"{path} has no box of a person in any of the pictures of {file.path}")
    return people_in_boxes(
        boxes, scores, size, num_joints, folder=coco_folder(root, split),
        files=np.array([os.fsencode(file.file_name[row]) for row in rows]),
        image_id=file.images["id"][rows].astype(np.int64), category=file.category)


def load_people(dataset, root, split, size, skeleton, boxes="gt"):
    """The People of a split, or of a detector's boxes in it (a file; COCO only).

    Their number is printed, and every picture is looked at: InputError if one is missing or has no
    readable header, before any work starts.
    """
    if dataset == "coco" and len(skeleton.sigmas) != len(skeleton.joints):
        raise InputError("OKS, the metric of --dataset coco, needs a sigma for each joint in "
                         "SKELETONS")
    if dataset != "coco" and len(skeleton.joints) != 16:
        raise InputError(f"--dataset {dataset} has MPII's 16 joints, not {len(skeleton.joints)}; "
                         "put joints of your own into COCO's layout, for --dataset coco")
    if boxes == "gt":
        people = DATASETS[dataset].read(root, split, size, skeleton)
    else:
        people = read_boxes(boxes, root, split, size, len(skeleton.joints))
    what = plural(len(people), "person") if boxes == "gt" else plural(len(people), "box", "es")
    names = np.unique(people.files if people.seed is None else people.image_id)
    print(f"{dataset} {split}: {what} in {plural(len(names), 'picture')}"
          + (f" ({people.left_out})" if people.left_out else ""), flush=True)
    if people.seed is not None:
        return people

    def problem(name):
        path = people.folder / os.fsdecode(name)
        try:
            with reading(path, "a picture"), Image.open(path):
                return None
        except InputError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        problems = [text for text in pool.map(problem, names) if text]
    if problems:
        raise InputError(f"{len(problems)} of the {plural(len(names), 'picture')} of {dataset} "
                         f"split {split!r} can't be used:\n  "
                         + "\n  ".join(problems[:5] + ["..."] * (len(problems) > 5)))
    return people


def find_file(root, names, dataset, split):
    """The first of some names below root that exists; InputError with all of them."""
    for name in names:
        if (Path(root) / name).is_file():
            return Path(root) / name
    raise InputError(f"there are no annotations of {dataset} split {split!r}; looked for\n  "
                     + "\n  ".join(str(Path(root) / name) for name in names)
                     + "\n(README.md says under Data where the published ones are from)")


# ---------------------------------------------------------------------------- synthetic people

def synthetic_person(seed, number, paint=True):
    """A drawn person: (an entry as in MPII's JSON, the picture or None). The same for the same seed
    and number.

    A figure that faces us, in one of many poses, sizes and clothes, before a cluttered background,
    with things in front of it now and then, and parts of it outside the picture.
    """
    rng = np.random.default_rng((seed, number))
    width, height = rng.integers(160, 321, 2)

    # The pose, in head lengths, around the pelvis. Angles in radians from straight down. Side -1 is
    # the person's right, which we see on the left. Joints in MPII's order.
    def step(angle, length):
        return length * np.array([math.sin(angle), math.cos(angle)])

    lean = rng.normal(0, 0.3)
    across = np.array([math.cos(lean), -math.sin(lean)]) * rng.uniform(0.6, 1)
    joints = np.zeros((16, 2))  # the pelvis, 6, stays at (0, 0)
    joints[7] = -step(lean, 2.4)
    joints[8] = joints[7] - step(lean, 0.4)
    joints[9] = joints[8] - step(lean + rng.normal(0, 0.2), 1)
    legs = {-1: (2, 1, 0), 1: (3, 4, 5)}  # hip, knee, ankle
    arms = {-1: (12, 11, 10), 1: (13, 14, 15)}  # shoulder, elbow, wrist
    for side in (-1, 1):
        hip, knee, ankle = legs[side]
        shoulder, elbow, wrist = arms[side]
        thigh = lean + side * rng.uniform(-0.2, 0.8)
        arm = lean + side * rng.uniform(-0.2, 2.8)
        joints[hip] = side * 0.5 * across
        joints[knee] = joints[hip] + step(thigh, 1.8 * rng.uniform(0.6, 1))
        joints[ankle] = joints[knee] + step(thigh - side * rng.uniform(-0.1, 0.9), 1.6)
        joints[shoulder] = joints[7] + side * 0.85 * across
        joints[elbow] = joints[shoulder] + step(arm, 1.4 * rng.uniform(0.75, 1))
        joints[wrist] = joints[elbow] + step(arm + side * rng.uniform(-1, 2), 1.1)

    # Its place. unit: pixels per head length. One person in four is partly outside the picture.
    extent = np.ptp(joints, axis=0)
    unit = rng.uniform(0.5, 0.95) * min(height / extent[1], width / extent[0])
    if rng.random() < 0.25:
        unit *= rng.uniform(1, 1.6)
    room = np.array([width, height]) - unit * extent
    joints = unit * (joints - joints.min(0)) + rng.uniform(0, 1, 2) * room

    # The annotation, as MPII's: pixels from 1, missing joints at (-1, -1). MPII's scale is 1/25 of
    # 0.6 times the head box's diagonal, which is here 1.25 head lengths.
    visible = ((joints >= 0) & (joints <= (width - 1, height - 1))).all(1)
    scale = 0.6 * 1.25 * unit / 25
    seen = joints[visible] if visible.any() else joints
    center = (seen.min(0) + seen.max(0)) / 2 + rng.normal(0, 0.15 * unit, 2) + 1 - (0, 15 * scale)
    entry = {"image": "", "center": center.tolist(), "scale": scale,
             "joints": np.where(visible[:, None], joints + 1, -1).tolist(),
             "joints_vis": visible.astype(int).tolist()}
    if not paint:
        return entry, None

    # The picture, drawn at twice its size and averaged down, as Pillow's lines have hard edges.
    image = Image.new("RGB", (2 * width, 2 * height), tuple(rng.integers(20, 236, 3).tolist()))
    draw = ImageDraw.Draw(image)

    def colour():
        return tuple(rng.integers(20, 236, 3).tolist())

    def clutter(count, largest):  # rectangles of up to so many head lengths
        for corner in 2 * rng.uniform(0, 1, (count, 2)) * (width, height):
            draw.rectangle((*corner, *corner + 2 * unit * rng.uniform(0.3, largest, 2)), colour())

    def limb(points, thickness, fill):
        points = [tuple(2 * point + 0.5) for point in points]
        radius = thickness * unit
        draw.line(points, fill, round(2 * radius), "curve")
        for x, y in points:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill)

    clutter(rng.integers(5, 12), 4)
    skin = tuple((rng.uniform(0.35, 1) * np.array([255, 214, 180])).astype(int).tolist())
    shirt = colour()
    trousers = colour()
    sleeve = shirt if rng.random() < 0.5 else skin
    leg = trousers if rng.random() < 0.6 else skin
    for hip, knee, ankle in legs.values():
        limb(joints[[hip, knee]], 0.36, trousers)
        limb(joints[[knee, ankle]], 0.27, leg)
    draw.polygon([tuple(2 * joints[index]) for index in (12, 13, 3, 2)], shirt)
    limb(joints[[12, 13]], 0.3, shirt)
    limb(joints[[2, 3]], 0.36, trousers)
    limb(joints[[7, 8]], 0.2, skin)
    up = joints[9] - joints[8]
    limb([joints[8] + 0.62 * up], 0.95, colour())  # hair, then the face
    limb([joints[8] + 0.4 * up, joints[8] + 0.55 * up], 0.8, skin)
    for shoulder, elbow, wrist in arms.values():
        limb(joints[[shoulder, elbow]], 0.27, shirt)
        limb(joints[[elbow, wrist]], 0.22, sleeve)
        limb(joints[[wrist]], 0.26, skin)
    if rng.random() < 0.4:
        clutter(rng.integers(1, 3), 1.6)  # in front
    pixels = np.asarray(image.reduce(2), np.float32) + rng.normal(0, 6, (height, width, 1))
    return entry, Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def read_synthetic(root, split, size=None, skeleton=SKELETONS["mpii"]):
    """The People of the synthetic data set; splits train and valid, which share nobody."""
    counts = {"train": 1200, "valid": 200}
    if split not in counts:
        raise InputError(f"synthetic people have the splits train and valid, not {split!r}")
    seed = list(counts).index(split)
    entries = [synthetic_person(seed, number, paint=False)[0] for number in range(counts[split])]
    people = mpii_people(entries, "synthetic people", "")
    return replace(people, seed=seed, image_id=np.arange(len(people)))


@dataclass(frozen=True)
class DatasetInfo:
    read: object  # function (root, split, size, skeleton) -> People
    skeleton: str
    train: str  # the names of the splits
    valid: str
    size: tuple  # (height, width) of the network's input
    augmentation: Augmentation


DATASETS = {
    "synthetic": DatasetInfo(read_synthetic, "mpii", "train", "valid", (128, 128),
                             Augmentation(scale=0.25, rotation=20)),
    "mpii": DatasetInfo(read_mpii, "mpii", "train", "valid", (256, 256),
                        Augmentation(scale=0.25, rotation=40)),
    "coco": DatasetInfo(read_coco, "coco", "train2017", "val2017", (256, 192),
                        Augmentation(scale=0.30, rotation=40)),
}


# ---------------------------------------------------------------------------- pictures

def open_picture(path, upright=False):
    """A picture from a file, decoded: a Pillow picture in RGB.

    upright: turned as its EXIF orientation says; data sets annotate the pixels as they are stored.
    InputError if it is missing or can't be decoded.
    """
    with reading(path, "a whole picture (fetch it again, or leave it out)"):
        with Image.open(path) as picture:
            picture.load()
            if picture.mode.startswith("I;16"):  # 16 bits a pixel, which convert() would clip
                picture = picture.point(lambda value: value / 256).convert("L")
            if "transparency" in picture.info:
                picture = picture.convert("RGBA")
            if upright:
                picture = ImageOps.exif_transpose(picture)
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
    as suits the person.
    """
    draw = ImageDraw.Draw(picture)
    shown = keypoints[:, 2] > threshold
    extent = np.ptp(keypoints[shown, :2], axis=0).max() if shown.any() else 0
    width = max(1, round(max(extent, 50) / 60))
    points = [tuple(point) for point in keypoints[:, :2].tolist()]
    for a, b in skeleton.limbs:
        if shown[a] and shown[b]:
            draw.line((points[a], points[b]), joint_colour(skeleton, a, b), width)
    for index in np.flatnonzero(shown):
        radius = width * 0.9 + 0.5
        draw.circle(points[index], radius, joint_colour(skeleton, index),
                    (0, 0, 0) if radius > 3 else None)


def heat(picture, heatmap, maximum=1.0):
    """A picture, dimmed, with a heatmap (h,w) laid over it from black through red to white."""
    level = np.clip(np.asarray(heatmap, np.float32) / maximum, 0, 1)
    level = Image.fromarray((255 * level).astype(np.uint8)).resize(picture.size)
    level = np.asarray(level, np.float32)[..., None] / 255
    glow = 255 * np.clip(3 * level - [0, 1, 2], 0, 1)
    grey = np.asarray(picture.convert("L"), np.float32)[..., None] * 0.5
    return Image.fromarray((grey * (1 - level) + glow * level).astype(np.uint8))


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


def titled(picture, lines):
    """A picture with lines of text above it."""
    height = 14 * len(lines) + 4
    sheet = Image.new("RGB", (picture.width, picture.height + height), "white")
    sheet.paste(picture, (0, height))
    ImageDraw.Draw(sheet).text((2, 1), "\n".join(lines), (0, 0, 0), font(size=11), spacing=2)
    return sheet


def ticks(low, high):
    """Round numbers from low to high, six at most."""
    step = 10.0 ** math.floor(math.log10(high - low))
    step *= next(factor for factor in (0.2, 0.5, 1, 2) if (high - low) / (step * factor) <= 5)
    return step * np.arange(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)


class Axes:
    """A pair of axes in a box (left, top, right, bottom) of a picture, with round ticks.

    axes(x, y) -> the position in the picture's pixels. xs, ys: the values to make room for.
    """

    def __init__(self, draw, box, xs, ys, xlabel, ylabel):
        self.box = box
        self.low = np.array([min(xs), min(ys)], float)
        self.high = np.array([max(xs), max(ys)], float)
        self.high += np.where(self.high > self.low, 0, 1)
        left, top, right, bottom = box
        for value in ticks(self.low[0], self.high[0]):
            x, _ = self(value, 0)
            draw.line((x, top, x, bottom), (225, 225, 225))
            draw.text((x, bottom + 4), f"{value:.4g}", (0, 0, 0), font(size=12), "ma")
        for value in ticks(self.low[1], self.high[1]):
            _, y = self(0, value)
            draw.line((left, y, right, y), (225, 225, 225))
            draw.text((left - 6, y), f"{value:.4g}", (0, 0, 0), font(size=12), "rm")
        draw.rectangle(box, outline=(0, 0, 0))
        draw.text(((left + right) / 2, bottom + 22), xlabel, (0, 0, 0), font(size=14), "ma")
        draw.text((left, top - 6), ylabel, (0, 0, 0), font(size=14), "ls")

    def __call__(self, x, y):
        left, top, right, bottom = self.box
        across, up = (np.array([x, y]) - self.low) / (self.high - self.low)
        return left + across * (right - left), bottom - up * (bottom - top)


def line_charts(xs, panels, xlabel):
    """Charts below each other: panels is {name: {a curve's name: its values over xs}}."""
    width = 720
    height = 240
    picture = Image.new("RGB", (width, height * len(panels)), "white")
    draw = ImageDraw.Draw(picture)
    for number, (name, curves) in enumerate(panels.items()):
        box = (70, number * height + 30, width - 20, (number + 1) * height - 50)
        values = [value for curve in curves.values() for value in curve if math.isfinite(value)]
        axes = Axes(draw, box, xs, values or [0], xlabel, name)
        right = box[2]
        for (label, curve), colour in zip(curves.items(), (RIGHT, LEFT, MIDDLE) * len(curves)):
            points = [axes(x, y) for x, y in zip(xs, curve) if math.isfinite(y)]
            draw.line(points, colour, 2)
            for point in points if len(points) <= 60 else ():
                draw.circle(point, 3, colour)
            draw.text((right, box[1] - 6), label, colour, font(size=14), "rs")
            right -= draw.textlength(label, font(size=14)) + 12
    return picture


def show_samples(dataset, skeleton, count=12):
    """A sheet of training samples: each crop with its joints, beside it all its targets."""
    sheet = []
    for number in range(count):
        epoch, row = divmod(number, len(dataset))
        _, image, joints, visible = dataset[epoch, row]
        picture = Image.fromarray(image.numpy())
        targets, weights = gaussian_targets(joints[None], visible[None], dataset.size,
                                            target_sigma(dataset.size))
        learnt = heat(picture, targets[0].amax(0))
        draw_pose(picture, torch.cat([joints, weights[0, :, None]], 1).numpy(), skeleton)
        sheet += [picture, learnt]
    return grid(sheet, columns=6)


# ---------------------------------------------------------------------------- files and flags

def read_json(path, object_hook=None):
    """A parsed JSON file; InputError if it is missing or broken."""
    with reading(path, "JSON, the whole of it (fetch it again)"):
        return json.loads(Path(path).read_text(encoding="utf-8"), object_hook=object_hook)


def write_file(path, content):
    """Bytes or text to a file, all or nothing: a crash, a full disk or a kill leaves the old one.

    Written beside it, brought to the disk, then renamed. The folder is made if need be.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise InputError(f"{path} can't be written ({error.strerror}); what was there before is "
                         "untouched") from error


SIGNATURE = "evaluate.py of the LAPX reference implementation"  # in all that we draw


def write_png(path, picture):
    """A Pillow picture to a PNG file, signed."""
    buffer = io.BytesIO()
    signature = PngInfo()
    signature.add_text("Software", SIGNATURE)
    picture.save(buffer, "PNG", pnginfo=signature, icc_profile=None)  # would stand before it
    write_file(path, buffer.getvalue())


def is_ours(path):
    """Whether a file is signed: then it may be replaced, and is no picture of the user's."""
    with reading(path, "a file"), open(path, "rb") as file:
        return SIGNATURE.encode() in file.read(1000)


def write_csv(path, rows):
    """A list of dictionaries with the same keys to a CSV file."""
    buffer = io.StringIO()
    table = csv.DictWriter(buffer, rows[0], lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_file(path, buffer.getvalue())


def plural(count, noun, ending="s"):
    """(1, "person") -> "1 person"; (2, "person") -> "2 persons"."""
    return f"{count} {noun}{ending if count != 1 else ''}"


def cpu_count():
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@contextlib.contextmanager
def computing(batch_size, size):
    """Around a network's work: faults of memory and of the batch's size become a sentence."""
    try:
        yield
    except InputError:
        raise
    except (RuntimeError, ValueError, MemoryError) as error:
        text = str(error)
        task = f"batches of {batch_size} at {size[0]}x{size[1]}"
        if isinstance(error, MemoryError) or any(words in text for words in (  # torch has no class
                "out of memory", "can't allocate memory", "bad_alloc")):
            raise InputError(f"the memory does not suffice for {task}; choose a smaller "
                             "--batch-size or --input") from error
        if "more than 1 value per channel" in text:
            raise InputError(f"BatchNorm can't train on {task}: a channel has a single value; "
                             "choose a larger --batch-size or --input") from error
        raise


def run(main):
    """Calls a script's main(). The user's mistakes end in a sentence and exit status 1."""
    keep_memory()
    try:
        main()
        sys.stdout.flush()
    except InputError as error:  # from a loader process it comes wrapped in a traceback
        sys.exit(f"error: {str(error).split('InputError: ')[-1].strip()}")
    except RuntimeError as error:  # torch raises it wherever the main process is
        if "DataLoader worker" not in str(error):
            raise
        sys.exit("error: a loader process died, often for want of memory; try again with fewer "
                 "--workers (train.py goes on with --resume auto)")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, head or less, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def keep_memory():
    """Lets glibc keep freed memory instead of returning every large block to the system and getting
    it back page by page: on a CPU, batches of 32 at 256x256 then train 1.7 times as fast."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-4, 0)  # M_MMAP_MAX: no blocks of their own
            libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: return nothing before 2 GiB are free


def image_size(text):
    """"256x192" -> (256, 192), height and width; an argparse type."""
    height, cross, width = text.lower().partition("x")
    if not (cross and height.isdigit() and width.isdigit()
            and 64 <= min(int(height), int(width)) <= max(int(height), int(width)) <= 4096):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not HEIGHTxWIDTH with numbers from 64 to 4096, such as 256x192")
    return int(height), int(width)


def number_from(lowest, highest=None):
    """An argparse type: whole numbers from lowest on, to highest if given."""
    def number(text):
        if not text.isdigit() or int(text) < lowest or (highest and int(text) > highest):
            limit = f" to {highest}" if highest else " on"
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a whole number from {lowest}{limit}")
        return int(text)
    return number


def refuse_unused(parser, args, mode, used):
    """A flag that has no effect in a mode ends in a sentence. used: the names that have one."""
    for name, value in vars(args).items():
        if name not in used and value != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} means nothing with {mode}")


def add_data_arguments(parser, dataset, size):
    """The flags that all scripts share which read a data set; the defaults in words."""
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=DATASETS, help=f"which people (default: {dataset})")
    group.add_argument("--data", type=Path, metavar="DIR",
                       help="the data set's folder (default: data/DATASET)")
    group.add_argument("--skeleton", choices=SKELETONS, help="the joints, an entry of SKELETONS in "
                       "lapx.py (default: the data set's own)")
    group.add_argument("--input", type=image_size, metavar="HxW",
                       help=f"the network's input (default: {size})")


def data_folder(given, dataset):
    """The folder of a data set: what --data gives, else data/DATASET."""
    if given and dataset == "synthetic":
        raise InputError("--data means nothing with synthetic people, who have no files; name a "
                         "--dataset")
    return given or Path("data") / dataset


def main():
    parser = argparse.ArgumentParser(description="Draws a sheet of training samples with their "
                                     "joints and targets.")
    add_data_arguments(parser, "synthetic, drawn on the fly", "the data set's own")
    parser.add_argument("--split", help="default: the training split")
    parser.add_argument("--show", type=Path, metavar="PNG", required=True,
                        help="the file to write")
    parser.add_argument("--seed", type=number_from(0), default=0, help="default: %(default)s")
    args = parser.parse_args()
    if args.show.suffix != ".png":
        parser.error(f"--show {args.show} must end in .png")
    dataset = args.dataset or "synthetic"
    known = DATASETS[dataset]
    size = args.input or known.size
    skeleton = SKELETONS[args.skeleton or known.skeleton]
    people = load_people(dataset, data_folder(args.data, dataset), args.split or known.train, size,
                         skeleton)
    samples = PoseDataset(people, size, skeleton, known.augmentation, args.seed)
    write_png(args.show, show_samples(samples, skeleton))
    print(f"wrote {args.show}")


if __name__ == "__main__":
    run(main)
