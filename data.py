"""People and their pictures: readers for MPII and COCO, drawn people, crops, targets, drawings.

    python data.py --dataset mpii --data data/mpii --split train --show samples.png
    python data.py --dataset mpii --data data/mpii --time          # samples per second

The protocol is that of SimpleBaseline and HRNet, whose numbers are published. Everything random
is a function of (seed, epoch, person), so that a run can be repeated and resumed exactly, whatever
the number of loader processes.

Coordinates, everywhere: x to the right, y down, in pixels, 0-based, whole numbers are the centres
of pixels. A person's box is (center, scale): `center` its middle in pixels of the picture, `scale`
its width / 200, a quarter of margin included. Sizes are (height, width), as in torch.
"""

import argparse
import contextlib
import ctypes
import functools
import io
import json
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from lapx import MEAN, SKELETONS, STD, STRIDE, InputError, heatmap_size

PADDING = 1.25  # the boxes of both data sets are enlarged by this
FETCH = {  # where the files come from, for the message when they are not there
    "mpii": "pictures: https://datasets.d2.mpi-inf.mpg.de/andriluka14cvpr/mpii_human_pose_v1.tar.gz"
            "\nannotations: https://download.openmmlab.com/mmpose/datasets/mpii_annotations.tar",
    "coco": "pictures: http://images.cocodataset.org/zips/{pictures}.zip\nannotations: "
            "http://images.cocodataset.org/annotations/{annotations}.zip",
}


@dataclass
class People:
    """The N persons of a split: arrays with a row each, which loader processes share.

    A hundred thousand small Python objects would be copied into every process page by page, as
    counting references writes to them; an array is not written to.
    """

    folder: Path  # of the pictures
    files: np.ndarray  # (N,) bytes, the picture's file below the folder; drawn people: b""
    image_id: np.ndarray  # (N,) int64; the figure's number for drawn people
    center: np.ndarray  # (N,2) float64, pixels of the picture
    scale: np.ndarray  # (N,) float64, width of the padded box / 200
    joints: np.ndarray  # (N,K,2) float32, pixels of the picture
    visible: np.ndarray  # (N,K) bool: annotated, be it occluded (both data sets train on those)
    score: np.ndarray  # (N,) float64, of the detected box; 1 for annotated ones
    seed: int | None = None  # of drawn people
    image: Image.Image | None = None  # a picture in memory that all of them are in

    def __len__(self):
        return len(self.files)

    def rows(self, which):
        """The People of some rows (a slice or indices)."""
        return replace(self, **{field.name: getattr(self, field.name)[which]
                                for field in fields(self)
                                if isinstance(getattr(self, field.name), np.ndarray)})

    def path(self, row):
        return self.folder / os.fsdecode(self.files[row])

    def picture(self, row, reduction=1):
        """Person row's picture and its reduction, as open_picture returns them."""
        if self.image is not None:
            return self.image, 1
        if self.seed is not None:
            return draw_person(self.seed, int(self.image_id[row]))[1], 1
        return open_picture(self.path(row), reduction)


# ---------------------------------------------------------------------------- geometry

def affine(center, scale, size, rotation=0.0, flip=False):
    """The one map of this project, from a picture to a crop of a box: a 2x3 matrix M with
    (u, v) = M (x, y, 1); both frames have whole numbers at pixel centres.

    center, scale: the box. size: (height, width) of the crop. rotation: degrees, positive turns the
    box clockwise and so the person counter-clockwise. flip: mirrored left to right.
    The centre comes to (width/2, height/2); the box's width fills the crop's width, and the same
    factor holds for y (SimpleBaseline: the box's height is never looked at).
    """
    height, width = size
    cos, sin = math.cos(math.radians(rotation)), math.sin(math.radians(rotation))
    linear = width / (200.0 * scale) * np.array([[cos, sin], [-sin, cos]])
    if flip:  # mirrored about the centre: the same crop as that of the mirrored picture
        linear[:, 0] *= -1
    return np.column_stack([linear, np.array([width / 2, height / 2]) - linear @ center])


def invert(matrix):
    """The inverse of an affine 2x3 matrix, 2x3."""
    linear = np.linalg.inv(matrix[:, :2])
    return np.column_stack([linear, -linear @ matrix[:, 2]])


def transform(points, matrix):
    """Points (...,2) through an affine 2x3 matrix, or through N of them (N,2,3) row by row."""
    return (np.einsum("...kj,...ij->...ki", points, matrix[..., :2]) + matrix[..., None, :, 2])


def box_to_center_scale(boxes, size):
    """Boxes (N,4) as x, y, width, height -> centers (N,2), scales (N,).

    The box is widened to the shape of the crop, size (height, width), then padded.
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    width = np.maximum(boxes[:, 2], boxes[:, 3] * size[1] / size[0])
    return boxes[:, :2] + boxes[:, 2:] / 2, width / 200 * PADDING


def crop(picture, matrix, size, reduction=1):
    """The crop (height, width) of a Pillow picture, bilinear, black outside: (H,W,3) uint8.

    matrix: from the full picture to the crop. reduction: by how much the picture at hand is
    smaller. Pillow's AFFINE maps the crop to the picture and puts pixel centres at i + 0.5, hence
    the half pixels. OpenCV's warpAffine, which the published numbers used, rounds where Pillow
    truncates (half a grey level) and blends into the black outside; the picture is cut to the part
    needed with a ring of black around, so that Pillow does the latter too.
    """
    height, width = size
    inverse = invert(matrix)
    inverse[:, 2] += 0.5 * (1 - inverse[:, 0] - inverse[:, 1])
    inverse /= reduction
    corners = transform(np.array([[0, 0], [width, 0], [0, height], [width, height]]), inverse)
    low = np.maximum(np.floor(corners.min(0)) - 1, -1)
    high = np.minimum(np.ceil(corners.max(0)) + 1, np.array(picture.size) + 1)
    if (low >= high).any():
        return np.zeros((height, width, 3), np.uint8)
    part = picture.crop((*low.astype(int), *high.astype(int)))
    inverse[:, 2] -= low
    part = part if part.mode == "RGB" else part.convert("RGB")
    return np.array(part.transform((width, height), Image.Transform.AFFINE,
                                   tuple(inverse.ravel()), Image.Resampling.BILINEAR))


def open_picture(path, reduction=1, upright=False):
    """A picture from a file, decoded: (Pillow image in RGB or greyscale, the reduction made).

    reduction: how much smaller the picture may be; JPEGs are decoded at 1/2, 1/4 or 1/8, which
    saves time, everything else is not reduced. upright: turn it as its EXIF orientation says; data
    sets annotate the pixels as they are stored. InputError if it is missing or can't be decoded.
    """
    try:
        with Image.open(path) as picture:
            full_width = picture.width
            if reduction >= 2:
                steps = 2 ** min(3, int(math.log2(reduction)))
                picture.draft("RGB", (max(1, picture.width // steps),
                                      max(1, picture.height // steps)))
            if picture.mode in ("RGB", "L"):
                picture.load()
            elif picture.mode.startswith("I;16"):  # 16 bits a pixel, which convert() would clip
                picture = picture.point(lambda value: value / 256).convert("L")
            else:  # palette, alpha, CMYK and what else there is
                picture = picture.convert("RGBA" if "transparency" in picture.info else "RGB")
                picture = picture.convert("RGB")
            reduction = round(full_width / picture.width)
            return (ImageOps.exif_transpose(picture) if upright else picture), reduction
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such picture") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: the picture can't be decoded ({error}); fetch it again, or "
                         "leave it out") from None


# ---------------------------------------------------------------------------- readers

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
                         "untouched") from None


def write_png(path, picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_file(path, buffer.getvalue())


def read_json(path, object_hook=None):
    """A parsed JSON file; InputError if it is missing or broken."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file, object_hook=object_hook)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); fetch it again") from None
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror})") from None


def find_file(root, names, dataset, split):
    """The first of names below root that exists; InputError naming all and where to get them."""
    for name in names:
        if (Path(root) / name).is_file():
            return Path(root) / name
    raise InputError(f"there are no annotations of {dataset} split {split!r}; looked for\n  "
                     + "\n  ".join(str(Path(root) / name) for name in names)
                     + f"\n{where_to_fetch(dataset, split)}")


def where_to_fetch(dataset, split):
    return FETCH[dataset].format(pictures=split.replace("-dev", ""), annotations=(
        "image_info_test2017" if split.startswith("test") else "annotations_trainval2017"))


def mpii_files(split):
    """MPII's (json, mat) of a split below the data folder, as HRNet names them, then as mmpose."""
    other = {"valid": "val"}.get(split, split)
    return (f"annot/{split}.json", f"annot/gt_{split}.mat",
            f"annotations/mpii_{other}.json", f"annotations/mpii_gt_{other}.mat")


def read_mpii(root, split, size=None, skeleton=SKELETONS["mpii"]):
    """The People of MPII's annot/{split}.json. Splits: train, valid, trainval, test (no joints)."""
    path = find_file(root, mpii_files(split)[::2], "mpii", split)
    entries = read_json(path)
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path} is not a list of persons")
    return mpii_people(entries, path, Path(root) / "images", len(skeleton.joints))


def mpii_people(entries, source, folder, num_joints):
    """MPII's JSON entries -> People. source names them in errors.

    An entry has the centre, scale and joints with 1-based pixels, scale = body height / 200, since
    MPII's reference person is 200 pixels high. The adjustments are SimpleBaseline's: the centre
    goes down by 15 * scale (the annotated centre is the torso's, too high for the whole person),
    then the box is padded, then everything 0-based. joints_vis is 1 where a joint is annotated,
    occluded or not.
    """
    center, scale, joints, visible = [], [], [], []
    for number, entry in enumerate(entries):
        try:
            center.append([float(value) for value in entry["center"]])
            scale.append(float(entry["scale"]))
            joints.append(entry.get("joints", [[0, 0]] * num_joints))
            visible.append(entry.get("joints_vis", [0] * num_joints))
            ok = (isinstance(entry["image"], str) and len(center[-1]) == 2
                  and ("joints" in entry) == ("joints_vis" in entry)
                  and np.shape(joints[-1]) == (num_joints, 2)
                  and np.shape(visible[-1]) == (num_joints,) and scale[-1] > 0
                  and np.isfinite([*center[-1], scale[-1], *np.ravel(joints[-1]),
                                   *visible[-1]]).all())
        except (KeyError, TypeError, ValueError):
            ok = False
        if not ok:
            raise InputError(f"{source}: person {number} (from 0) must have image, center [x, y], "
                             f"scale > 0, {num_joints} joints [x, y] and {num_joints} joints_vis, "
                             f"but is {json.dumps(entry)[:200]}")
    center, scale = np.array(center), np.array(scale)
    center[:, 1] += np.where(center[:, 0] != -1, 15 * scale, 0)
    scale *= np.where(center[:, 0] != -1, PADDING, 1)
    names = np.array([os.fsencode(entry["image"]) for entry in entries])
    _, image_id = np.unique(names, return_inverse=True)
    return People(Path(folder), names, image_id, center - 1, scale,
                  (np.array(joints) - 1).astype(np.float32), np.array(visible) > 0,
                  np.ones(len(entries)))


def coco_image_folder(root, split):
    """Where a split's pictures lie: images/val2017 or val2017 (test-dev2017's in test2017)."""
    name = split.replace("-dev", "")
    folder = Path(root) / "images" / name
    return folder if folder.is_dir() or not (Path(root) / name).is_dir() else Path(root) / name


def read_coco_json(path, num_joints):
    """COCO's annotation file, checked, without the outlines, which take most of its memory."""
    def without_outline(item):
        item.pop("segmentation", None)
        return item

    content, item, K = read_json(path, without_outline), None, num_joints
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise InputError(f"{path} is not a COCO annotation file: it has no list of images")
    try:
        category = person_category(content)
        for item in content["images"]:
            if not isinstance(item["file_name"], str) or item["width"] + item["height"] <= 0:
                raise ValueError
        ids = {image["id"] for image in content["images"]}
        for item in content.setdefault("annotations", []):
            if item["category_id"] == category:
                if item.get("iscrowd"):
                    item.setdefault("keypoints", [0] * 3 * K)
                points = item["keypoints"]
                item.setdefault("num_keypoints", sum(flag > 0 for flag in points[2::3]))
                ok = (len(points) == 3 * K and len(item["bbox"]) == 4 and item["image_id"] in ids
                      and math.isfinite(sum(points) + sum(item["bbox"]) + item["area"]
                                        + item["id"]))
                if not ok:
                    raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(f"{path}: an image must have id, file_name, width and height, an "
                         "annotation id, category_id, a known image_id, bbox [x, y, w, h], area "
                         f"and {3 * K} numbers as keypoints, but one is "
                         f"{json.dumps(item)[:200]}") from None
    return content


def person_category(content):
    """The id of the category whose annotations have keypoints; COCO's person is 1."""
    ids = [category["id"] for category in content.get("categories", []) if "keypoints" in category]
    return ids[0] if ids else 1


def read_coco(root, split, size=(256, 192), skeleton=SKELETONS["coco"]):
    """The People of COCO's annotations/person_keypoints_{split}.json with a labelled joint.

    size: (height, width) of the crops, whose shape the boxes take. As in HRNet, an ordinary box
    loses one pixel of width and height when it is clipped to the picture, and joints that are
    labelled but occluded count like all others.
    """
    path = find_file(root, [f"annotations/person_keypoints_{split}.json"], "coco", split)
    K = len(skeleton.joints)
    content = read_coco_json(path, K)
    category = person_category(content)
    order = {image["id"]: number for number, image in enumerate(content["images"])}
    rows, boxes, keypoints = [], [], []
    for annotation in content["annotations"]:
        if annotation.get("iscrowd") or annotation["category_id"] != category or not any(
                annotation["keypoints"]):
            continue
        row = order[annotation["image_id"]]
        image, (x, y, w, h) = content["images"][row], annotation["bbox"]
        left, top = max(0, x), max(0, y)
        right = min(image["width"] - 1, left + max(0, w - 1))
        bottom = min(image["height"] - 1, top + max(0, h - 1))
        if annotation["area"] > 0 and right >= left and bottom >= top:
            rows.append(row)
            boxes.append((left, top, right - left, bottom - top))
            keypoints.extend(annotation["keypoints"])
    if not rows:
        raise InputError(f"{path} has no person with a labelled joint")
    by_image = np.argsort(rows, kind="stable")  # in the order of the list of images
    keypoints = np.array(keypoints, np.float32).reshape(-1, K, 3)[by_image]
    images = [content["images"][row] for row in np.array(rows)[by_image]]
    center, scale = box_to_center_scale(np.array(boxes)[by_image], size)
    return People(coco_image_folder(root, split),
                  np.array([os.fsencode(image["file_name"]) for image in images]),
                  np.array([image["id"] for image in images]), center, scale,
                  keypoints[..., :2].copy(), keypoints[..., 2] > 0, np.ones(len(rows)))


def read_detections(path):
    """A detector's persons, from a JSON list of {image_id or file_name, category_id (1, the
    default, is a person), bbox [x, y, w, h], score}.

    -> names of their pictures (without folder, ending and leading zeros), boxes (N,4), scores (N,).
    """
    try:
        entries = [entry for entry in read_json(path) if entry.get("category_id", 1) == 1]
        names = [Path(str(entry["file_name"] if "file_name" in entry else entry["image_id"])
                      ).stem.lstrip("0") for entry in entries]
        boxes = np.array([entry["bbox"] for entry in entries], np.float64).reshape(-1, 4)
        scores = np.array([entry["score"] for entry in entries], np.float64)
        good = np.isfinite(boxes).all() and np.isfinite(scores).all() and (boxes[:, 2:] > 0).all()
    except (KeyError, TypeError, ValueError, AttributeError):
        good = False
    if not good:
        raise InputError(f"{path} must be a list of {{image_id or file_name, bbox [x, y, w, h], "
                         "score} with finite numbers and boxes of some size")
    return names, boxes, scores


def people_in_boxes(boxes, scores, size, num_joints, folder="", files=None, image_id=None,
                    image=None):
    """Boxes (N,4) of persons without joints -> People. As in HRNet, detected boxes are neither
    clipped nor shortened."""
    N, (center, scale) = len(boxes), box_to_center_scale(boxes, size)
    return People(Path(folder), np.zeros(N, "S1") if files is None else files,
                  np.zeros(N, int) if image_id is None else image_id, center, scale,
                  np.zeros((N, num_joints, 2), np.float32), np.zeros((N, num_joints), bool), scores,
                  image=image)


def read_boxes(path, images, folder, size, num_joints):
    """Detected boxes -> People without joints, in the file's order.

    images: COCO's list of images; boxes of pictures that are not in it are left out.
    """
    names, boxes, scores = read_detections(path)
    known = {str(image["id"]): image for image in images}
    rows = [row for row, name in enumerate(names) if name in known]
    if not rows:
        raise InputError(f"{path} has no box of a person in any of the {len(images)} pictures")
    images = [known[names[row]] for row in rows]
    return people_in_boxes(boxes[rows], scores[rows], size, num_joints, folder,
                           np.array([os.fsencode(image["file_name"]) for image in images]),
                           np.array([image["id"] for image in images]))


def check_pictures(people, dataset, split):
    """Looks at every picture before a run starts: it must be there and have a readable header.

    InputError lists the first few that are not, their count and where to fetch them.
    """
    if people.seed is not None:
        return

    def problem(name):
        path = people.folder / os.fsdecode(name)
        try:
            with Image.open(path):
                return None
        except FileNotFoundError:
            return f"{path} is missing"
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return f"{path} is not a readable picture ({error})"

    names = np.unique(people.files)
    with ThreadPoolExecutor(8) as pool:
        problems = [text for text in pool.map(problem, names) if text]
    if problems:
        raise InputError(f"{len(problems)} of the {len(names)} pictures of {dataset} split "
                         f"{split!r} can't be used:\n  "
                         + "\n  ".join(problems[:5] + ["..."] * (len(problems) > 5))
                         + f"\n{where_to_fetch(dataset, split)}")


# ---------------------------------------------------------------------------- drawn people

def draw_person(seed, number, paint=True):
    """A drawn person: (an entry as in MPII's JSON, the picture; None without paint). The same for
    the same seed and number.

    An articulated figure that faces us, in one of many poses, sizes and clothes, before a cluttered
    background, with things in front of it now and then, and parts of it outside the picture.
    """
    rng = np.random.default_rng((seed, number))
    uniform, chance = rng.uniform, lambda probability: rng.random() < probability
    width, height = rng.integers(160, 321, 2)

    # The pose, in head lengths, around the pelvis. Angles in radians from straight down; side -1 is
    # the person's right, which we see on the left.
    def step(angle, length):
        return length * np.array([math.sin(angle), math.cos(angle)])

    lean = rng.normal(0, 0.2) + (uniform(-1.5, 1.5) if chance(0.1) else 0)
    across = np.array([math.cos(lean), -math.sin(lean)]) * uniform(0.6, 1)
    pelvis = np.zeros(2)
    thorax = pelvis - step(lean, 2.4)
    neck = thorax - step(lean, 0.4)
    head = neck - step(lean + rng.normal(0, 0.2), 1)
    joints = [None] * 16  # MPII's order
    joints[6:10] = pelvis, thorax, neck, head
    sitting = uniform(0.4, 0.8) if chance(0.2) else 1  # thighs towards us look shorter
    for side, hip_knee_ankle, shoulder_elbow_wrist in ((-1, (2, 1, 0), (12, 11, 10)),
                                                       (1, (3, 4, 5), (13, 14, 15))):
        hip, shoulder = pelvis + side * 0.5 * across, thorax + side * 0.85 * across
        thigh, arm = lean + side * uniform(-0.2, 0.8), lean + side * uniform(-0.2, 2.8)
        knee = hip + step(thigh, 1.8 * uniform(0.85, 1) * sitting)
        ankle = knee + step(thigh - side * uniform(-0.1, 0.9), 1.7 * uniform(0.85, 1))
        elbow = shoulder + step(arm, 1.4 * uniform(0.75, 1))
        wrist = elbow + step(arm + side * uniform(-1, 2), 1.2 * uniform(0.75, 1))
        for index, joint in zip(hip_knee_ankle + shoulder_elbow_wrist,
                                (hip, knee, ankle, shoulder, elbow, wrist)):
            joints[index] = joint

    # Its place: the size follows the picture's height; one in four is partly outside.
    joints = np.array(joints)
    extent = joints.max(0) - joints.min(0)
    unit = uniform(0.5, 0.95) * min(height / extent[1], width / extent[0])  # pixels per head length
    unit *= uniform(1, 1.6) if chance(0.25) else 1
    room = np.array([width, height]) - unit * extent
    joints = joints * unit + (rng.uniform(0, 1, 2) * room - unit * joints.min(0))

    # The annotation, as MPII's: 1-based, missing joints at (-1, -1) with joints_vis 0. MPII's scale
    # is 1/25 of 0.6 times the head box's diagonal, which is here 1.25 head lengths.
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
    def colour():
        return tuple(int(value) for value in rng.integers(20, 236, 3))

    def corners(low, high):
        return 2 * rng.uniform(0, 1, (rng.integers(low, high), 2)) * (width, height)

    background = np.linspace(colour(), colour(), 2 * height)[:, None].repeat(2 * width, 1)
    image = Image.fromarray(background.astype(np.uint8))
    draw = ImageDraw.Draw(image)

    def capsule(points, thickness, fill):  # points in pixels of the picture
        points, radius = [tuple(2 * point + 0.5) for point in points], thickness * unit
        draw.line(points, fill, round(2 * radius), "curve")
        for x, y in points:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill)

    for corner in corners(5, 12):
        shape = draw.rectangle if chance(0.5) else draw.ellipse
        shape((*corner, *corner + 2 * unit * rng.uniform(0.3, 4, 2)), colour())
    tone = uniform(0.35, 1)
    skin = (int(255 * tone), int(214 * tone), int(180 * tone))
    shirt, trousers, hair, shoes = colour(), colour(), colour(), colour()
    long_sleeves, long_trousers = chance(0.5), chance(0.6)
    for hip, knee, ankle in (joints[[2, 1, 0]], joints[[3, 4, 5]]):
        capsule((hip, knee), 0.36, trousers)
        capsule((knee, ankle), 0.27, trousers if long_trousers else skin)
        capsule((ankle, ankle + (0, 0.1 * unit)), 0.3, shoes)
    draw.polygon([tuple(2 * joints[index]) for index in (12, 13, 3, 2)], shirt)
    capsule(joints[[12, 13]], 0.3, shirt)
    capsule(joints[[2, 3]], 0.36, trousers)
    capsule(joints[[7, 8]], 0.2, skin)
    across, up = joints[13] - joints[12], joints[9] - joints[8]
    across = across / max(np.linalg.norm(across), 1e-6) * 0.22 * unit
    capsule((joints[8] + 0.62 * up, joints[8] + 0.62 * up), 0.95, hair)
    capsule((joints[8] + 0.4 * up, joints[8] + 0.55 * up), 0.8, skin)
    for eye in (-across, across):
        capsule((joints[8] + 0.55 * up + eye,) * 2, 0.13, (30, 30, 30))
    for shoulder, elbow, wrist in (joints[[12, 11, 10]], joints[[13, 14, 15]]):
        capsule((shoulder, elbow), 0.27, shirt)
        capsule((elbow, wrist), 0.22, shirt if long_sleeves else skin)
        capsule((wrist, wrist), 0.26, skin)
    for corner in corners(0, 3) if chance(0.4) else ():  # things in front
        draw.rectangle((*corner, *corner + 2 * unit * rng.uniform(0.3, 1.6, 2)), colour())
    image = np.asarray(image.reduce(2), np.float32) + rng.normal(0, 6, (height, width, 1))
    return entry, Image.fromarray(image.clip(0, 255).astype(np.uint8))


def read_drawn(root, split, size=None, skeleton=SKELETONS["mpii"], counts=(1200, 200)):
    """The People of the drawn data set; splits train and valid, which share no figure."""
    if split not in ("train", "valid"):
        raise InputError(f"the drawn people have the splits train and valid, not {split!r}")
    seed, count = {"train": (0, counts[0]), "valid": (1, counts[1])}[split]
    entries = [draw_person(seed, number, paint=False)[0] for number in range(count)]
    return replace(mpii_people(entries, "drawn people", "", 16), seed=seed,
                   image_id=np.arange(count))


# ---------------------------------------------------------------------------- the data sets

@dataclass(frozen=True)
class Augmentation:
    """How a training sample is varied. None of it moves the box or changes colours."""

    scale: float  # the box's size is multiplied by 1 + scale * z, within 1 - scale .. 1 + scale
    rotation: float = 40.0  # degrees at most
    rotated: float = 0.6  # the share of samples that is rotated
    flipped: float = 0.5  # the share that is mirrored

    def draw(self, rng):
        """-> factor of the box's size, degrees, whether to mirror.

        The paper says rotation within 40 degrees either way, random scale, flips. It is silent on
        the rest, where the values are SimpleBaseline's: z standard normal, three samples in five
        rotated, by half the bound times a standard normal.
        """
        factor = np.clip(1 + self.scale * rng.standard_normal(), 1 - self.scale, 1 + self.scale)
        degrees = np.clip(self.rotation / 2 * rng.standard_normal(), -self.rotation, self.rotation)
        return factor, degrees * (rng.random() < self.rotated), rng.random() < self.flipped


@dataclass(frozen=True)
class DatasetInfo:
    read: object  # function (root, split, size, skeleton) -> People
    skeleton: str
    train: str  # the names of the splits
    valid: str
    size: tuple  # (height, width) of the network's input
    augmentation: Augmentation


DATASETS = {
    "synthetic": DatasetInfo(read_drawn, "mpii", "train", "valid", (128, 128), Augmentation(0.25)),
    "mpii": DatasetInfo(read_mpii, "mpii", "train", "valid", (256, 256), Augmentation(0.25)),
    "coco": DatasetInfo(read_coco, "coco", "train2017", "val2017", (256, 192), Augmentation(0.30)),
}


def flip_order(skeleton):
    """The index of each joint's mirror image, (K,)."""
    order = np.arange(len(skeleton.joints))
    for a, b in skeleton.flip_pairs:
        order[[a, b]] = b, a
    return order


class PoseDataset(torch.utils.data.Dataset):
    """Crops of people. dataset[row], or dataset[epoch, row], which decides how it is varied.

    -> row, crop (H,W,3) uint8, joints (K,2) float32 in pixels of the crop, visible (K,) float32.
    Without an augmentation a crop has the exact pixels of the protocol; with one, JPEGs that are
    larger than the crop are decoded at reduced size, which is faster and alters the blur alone.
    """

    def __init__(self, people, size, skeleton, augmentation=None, seed=0):
        self.people, self.size, self.augmentation, self.seed = people, size, augmentation, seed
        self.order = flip_order(skeleton)

    def __len__(self):
        return len(self.people)

    def __getitem__(self, index):
        people, (epoch, row) = self.people, index if isinstance(index, tuple) else (0, index)
        scale, degrees, flip, reduction = people.scale[row], 0.0, False, 1
        if self.augmentation:
            rng = np.random.default_rng((self.seed, epoch, row))
            factor, degrees, flip = self.augmentation.draw(rng)
            scale = scale * factor
            reduction = 200 * scale / self.size[1]  # picture pixels per pixel of the crop
        matrix = affine(people.center[row], scale, self.size, degrees, flip)
        picture, reduction = people.picture(row, reduction)
        image = crop(picture, matrix, self.size, reduction)
        order = self.order if flip else slice(None)
        joints = transform(people.joints[row][order], matrix)
        return (row, torch.from_numpy(image), torch.from_numpy(joints.astype(np.float32)),
                torch.from_numpy(people.visible[row][order].astype(np.float32)))


def make_loader(dataset, batches, workers, pin_memory=False):
    """A DataLoader over batches (lists of indices), whose processes share the dataset's arrays."""
    fork = workers and sys.platform == "linux"  # elsewhere processes can't share, and copy them
    return torch.utils.data.DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, pin_memory=pin_memory,
        persistent_workers=workers > 0, worker_init_fn=_leave_process_group,
        multiprocessing_context="fork" if fork else None)


def _leave_process_group(worker):
    if hasattr(os, "setpgrp"):  # Ctrl-C, which goes to a whole group, is the main process's affair
        os.setpgrp()


def normalise(images, bgr=False, mean=MEAN, deviation=STD):
    """Crops (B,H,W,3) uint8 RGB, on any device -> the network's input (B,3,H,W) float32.

    Divided by 255, minus the mean, by the deviation of each channel; channels last in memory. bgr:
    the channels in the order blue, green, red with the same numbers, as SimpleBaseline feeds them.
    """
    mean, deviation = (torch.tensor(values, device=images.device) for values in (mean, deviation))
    images = images.flip(3) if bgr else images
    return ((images / 255 - mean) / deviation).permute(0, 3, 1, 2)


def target_sigma(size):
    """The targets' standard deviation in heatmap pixels: 2, or 3 if an input's side exceeds 256."""
    return 3 if max(size) > 256 else 2


def gaussian_targets(joints, visible, size, sigma):
    """Heatmaps to learn: joints (B,K,2) in pixels of an input of size (H,W), visible (B,K) ->
    targets (B,K,h,w), weights (B,K), on the joints' device.

    A Gaussian of height 1 around the pixel nearest to the joint, cut off at 3 sigma. The weight is
    0 where a joint is not annotated or more than 3 sigma outside the map. Rounding and the test of
    the border are those of SimpleBaseline to the last pixel: int() truncates towards 0, and the
    low side is one pixel looser than the high side.
    """
    h, w = heatmap_size(*size)
    radius = 3 * sigma
    centers = (joints / STRIDE + 0.5).trunc()  # (B,K,2) heatmap pixels
    limits = torch.tensor([w, h], device=joints.device)
    on_map = ((centers - radius < limits) & (centers + radius + 1 >= 0)).all(2)
    weights = visible * on_map

    def profile(length, centers):  # (B,K) -> (B,K,length)
        distance = torch.arange(length, device=joints.device) - centers[..., None]
        return torch.exp(-distance ** 2 / (2 * sigma ** 2)) * (distance.abs() <= radius)

    targets = profile(h, centers[..., 1])[..., :, None] * profile(w, centers[..., 0])[..., None, :]
    return targets * (weights > 0.5)[..., None, None], weights


# ---------------------------------------------------------------------------- drawing

LEFT, RIGHT, MIDDLE = (255, 150, 30), (40, 150, 255), (90, 230, 90)  # the person's own sides
font = functools.lru_cache(ImageFont.load_default)


def joint_colour(skeleton, *indices):
    """The colour of a joint, or of a limb between two: the side that its name tells."""
    names = " ".join(skeleton.joints[index] for index in indices)
    return LEFT if "left" in names else RIGHT if "right" in names else MIDDLE


def draw_pose(picture, keypoints, skeleton, threshold=0.0, width=None):
    """Draws a skeleton onto a picture, in place. keypoints: (K,3) as x, y, score in its pixels.

    Joints whose score is at most threshold are left out, with their limbs. width: of the lines in
    pixels, by default in proportion to the person.
    """
    draw = ImageDraw.Draw(picture)
    shown = keypoints[:, 2] > threshold
    if width is None:
        extent = np.ptp(keypoints[shown, :2], axis=0).max() if shown.any() else 0
        width = max(1, round(max(extent, 50) / 60))
    points = [tuple(float(value) for value in point) for point in keypoints[:, :2]]
    for a, b in skeleton.limbs:
        if shown[a] and shown[b]:
            draw.line((points[a], points[b]), joint_colour(skeleton, a, b), width)
    for index in np.flatnonzero(shown):
        (x, y), radius = points[index], width * 0.9 + 0.5
        draw.ellipse((x - radius, y - radius, x + radius, y + radius),
                     joint_colour(skeleton, index), (0, 0, 0) if radius > 3 else None)


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
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        sheet.paste(picture, (gap + column * (width + gap), gap + row * (height + gap)))
    return sheet


def ticks(low, high, most=6):
    """Round numbers from low to high, at most so many."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= most)
    return [step * number for number in range(math.ceil(low / step - 1e-9),
                                              math.floor(high / step + 1e-9) + 1)]


class Axes:
    """A pair of axes with round ticks in a box (left, top, right, bottom) of a picture.

    axes(x, y) -> the position in the picture's pixels. xs, ys: the values to make room for.
    """

    def __init__(self, draw, box, xs, ys, xlabel, ylabel, margin=0.05):
        self.box, self.ranges = box, []
        for values in (xs, ys):
            low, high = min(values), max(values)
            room = (high - low) * margin if high > low else abs(high) * 0.1 or 1
            self.ranges.append((low - room, high + room))
        left, top, right, bottom = box
        for value in ticks(*self.ranges[0]):
            x, _ = self(value, self.ranges[1][0])
            draw.line((x, top, x, bottom), (225, 225, 225))
            draw.text((x, bottom + 4), f"{value:g}", (0, 0, 0), font(size=12), "ma")
        for value in ticks(*self.ranges[1]):
            _, y = self(self.ranges[0][0], value)
            draw.line((left, y, right, y), (225, 225, 225))
            draw.text((left - 6, y), f"{value:g}", (0, 0, 0), font(size=12), "rm")
        draw.rectangle(box, outline=(0, 0, 0))
        draw.text(((left + right) / 2, bottom + 22), xlabel, (0, 0, 0), font(size=14), "ma")
        draw.text((left, top - 6), ylabel, (0, 0, 0), font(size=14), "ls")

    def __call__(self, x, y):
        (x0, x1), (y0, y1) = self.ranges
        left, top, right, bottom = self.box
        return (left + (x - x0) / (x1 - x0) * (right - left),
                bottom - (y - y0) / (y1 - y0) * (bottom - top))


def line_charts(xs, panels, xlabel, width=720, height=240):
    """Charts below each other: panels is a list of (name, {a curve's name: its values over xs})."""
    picture = Image.new("RGB", (width, height * len(panels)), "white")
    draw = ImageDraw.Draw(picture)
    for number, (name, curves) in enumerate(panels):
        box = (70, number * height + 30, width - 20, (number + 1) * height - 50)
        values = [value for curve in curves.values() for value in curve if math.isfinite(value)]
        axes = Axes(draw, box, xs, values or [0], xlabel, name)
        right = box[2]
        for (label, curve), colour in zip(curves.items(), (RIGHT, LEFT, MIDDLE) * len(curves)):
            points = [axes(x, y) for x, y in zip(xs, curve) if math.isfinite(y)]
            draw.line(points, colour, 2)
            for x, y in points if len(points) <= 60 else ():
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
            draw.text((right, box[1] - 6), label, colour, font(size=14), "rs")
            right -= draw.textlength(label, font(size=14)) + 12
    return picture


def titled(picture, text, height=18):
    """A picture with a line of text above it."""
    sheet = Image.new("RGB", (picture.width, picture.height + height), "white")
    sheet.paste(picture, (0, height))
    ImageDraw.Draw(sheet).text((2, 1), text, (0, 0, 0), font(size=height - 6))
    return sheet


def show_samples(dataset, skeleton, count=12):
    """A sheet of training samples: each crop with its joints, beside it all its targets."""
    sheet = []
    for number in range(count):
        _, image, joints, visible = dataset[number // len(dataset), number % len(dataset)]
        picture = Image.fromarray(image.numpy())
        targets, weights = gaussian_targets(joints[None], visible[None], dataset.size,
                                            target_sigma(dataset.size))
        sheet.append(heat(picture, targets[0].amax(0)))
        draw_pose(picture, torch.cat([joints, weights[0, :, None]], 1).numpy(), skeleton)
        sheet.insert(-1, picture)
    return grid(sheet, columns=6)


# ---------------------------------------------------------------------------- command line

def run(main):
    """Calls a script's main(). The user's mistakes end in a sentence and exit status 1."""
    keep_memory()
    try:
        main()
    except InputError as error:  # from a loader process it comes wrapped in a traceback
        sys.exit(f"error: {str(error).split('InputError: ')[-1].strip()}")
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
    if not (cross and height.isdigit() and width.isdigit() and min(int(height), int(width)) >= 64):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not HEIGHTxWIDTH with numbers from 64 on, such as 256x192")
    return int(height), int(width)


def number_from(lowest):
    """An argparse type: whole numbers from lowest on."""
    def number(text):
        if not text.isdigit() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {lowest} on")
        return int(text)
    return number


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


SIZES = "256x256 for mpii, 256x192 for coco, 128x128 for synthetic"


def load_people(dataset, root, split, size, skeleton, quiet=False):
    """The People of a split, counted on the screen, their pictures checked."""
    if dataset == "coco" and len(skeleton.sigmas) != len(skeleton.joints):
        raise InputError("OKS, the metric of --dataset coco, needs a sigma for each joint in "
                         "SKELETONS")
    if dataset != "coco" and len(skeleton.joints) != 16:
        raise InputError(f"--dataset {dataset} has MPII's 16 joints, not {len(skeleton.joints)}; "
                         "put joints of your own into COCO's layout, for --dataset coco")
    people = DATASETS[dataset].read(root, split, size, skeleton)
    if not quiet:
        print(f"{dataset} {split}: {len(people)} persons in {len(np.unique(people.image_id))} "
              "pictures", flush=True)
        check_pictures(people, dataset, split)
    return people


def measure(dataset, workers, count=400):
    """Prints samples per second: of this process, by part, and of a loader with processes."""
    people, seconds = dataset.people, np.zeros(3)
    for number in range(count):
        row = number % len(people)
        clock = [time.perf_counter()]
        scale, reduction = people.scale[row], 200 * people.scale[row] / dataset.size[1]
        picture, reduction = people.picture(row, reduction if dataset.augmentation else 1)
        clock.append(time.perf_counter())
        crop(picture, affine(people.center[row], scale, dataset.size), dataset.size, reduction)
        clock.append(time.perf_counter())
        gaussian_targets(torch.from_numpy(people.joints[row][None]),
                         torch.from_numpy(people.visible[row][None]), dataset.size, 2)
        clock.append(time.perf_counter())
        seconds += np.diff(clock)
    seconds /= count
    print(f"one process: {1 / seconds[:2].sum():.0f} samples/s; a sample takes "
          + ", ".join(f"{name} {1e3 * value:.2f} ms"
                      for name, value in zip(("decode", "crop", "targets"), seconds))
          + " (targets are made on the training device, in batches)")
    batches = [[(0, row % len(people)) for row in range(start, start + 32)]
               for start in range(0, count + 8 * 32, 32)]
    if workers:
        loader = iter(make_loader(dataset, batches, workers))
        for _ in range(8):  # while the processes start
            next(loader)
        start = time.perf_counter()
        total = sum(len(batch[0]) for batch in loader)
        print(f"{workers} processes: {total / (time.perf_counter() - start):.0f} samples/s")


def main():
    parser = argparse.ArgumentParser(description="Look at training samples, or time them.",
                                     epilog=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser, "synthetic, drawn on the fly", SIZES)
    parser.add_argument("--split", help="default: the training split")
    parser.add_argument("--show", type=Path, metavar="PNG", help="write a sheet of samples")
    parser.add_argument("--time", action="store_true", help="print samples per second")
    parser.add_argument("--workers", type=number_from(0), default=2, help="default: %(default)s")
    parser.add_argument("--seed", type=number_from(0), default=0, help="default: %(default)s")
    args = parser.parse_args()
    if not (args.show or args.time):
        parser.error("give --show PNG to look at samples, --time to time them, or both")
    if args.show and args.show.suffix != ".png":
        parser.error(f"--show {args.show} must end in .png")
    args.dataset = args.dataset or "synthetic"
    info = DATASETS[args.dataset]
    size, skeleton = args.input or info.size, SKELETONS[args.skeleton or info.skeleton]
    people = load_people(args.dataset, args.data or Path("data") / args.dataset,
                         args.split or info.train, size, skeleton)
    dataset = PoseDataset(people, size, skeleton, info.augmentation, args.seed)
    if args.show:
        write_png(args.show, show_samples(dataset, skeleton))
        print(f"wrote {args.show}")
    if args.time:
        measure(dataset, args.workers)


if __name__ == "__main__":
    run(main)
