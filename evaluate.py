"""Scores and draws predictions: PCKh on MPII, OKS average precision on COCO, one's own pictures.

    python evaluate.py --weights FILE --dataset mpii --data data/mpii        # the paper's columns
    python evaluate.py --weights FILE --dataset coco --data data/coco --boxes DETECTIONS.json
    python evaluate.py --results pred.mat --dataset mpii --data data/mpii    # made elsewhere
    python evaluate.py --results results.json --annotations GROUND_TRUTH.json
    python evaluate.py --weights FILE --image photo.jpg --box 120 40 200 380

FILE is a checkpoint of train.py, one of the authors' .tar files or an ONNX file of export.py. Both
metrics are written here by hand, in numpy; COCO's equals pycocotools to the last digits.
"""

import argparse
import io
import json
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import data
from data import (DATASETS, PADDING, PoseDataset, affine, flip_order, invert, normalise,
                  transform)
from lapx import (MEAN, SKELETONS, STD, STRIDE, InputError, Skeleton, decode, from_checkpoint,
                  heatmap_size, load_file, variant_name)


# ---------------------------------------------------------------------------- PCKh (MPII)

PCKH_JOINTS = {"Head": [9], "Shoulder": [12, 13], "Elbow": [11, 14], "Wrist": [10, 15],
               "Hip": [2, 3], "Knee": [1, 4], "Ankle": [0, 5]}


def mpii_truth(people, root, split):
    """What PCKh compares with: joints (N,16,2) in 1-based pixels, annotated (N,16), head sizes (N,)
    in pixels, and where they are from.

    The sizes are 0.6 times the diagonal of the head box in gt_{split}.mat. Without that file the
    JSON is enough: in MPII the same number is 25 * scale, to within 1e-4 pixels.
    """
    for name in data.mpii_files(split)[1::2]:
        if root is not None and (Path(root) / name).is_file():
            mat = read_mat(Path(root) / name, "pos_gt_src", "jnt_missing", "headboxes_src")
            shapes, N = [array.shape for array in mat.values()], len(people)
            if shapes != [(16, 2, N), (16, N), (2, 2, N)]:
                raise InputError(f"{Path(root) / name} has arrays of the shapes {shapes} for {N} "
                                 "persons; the JSON and it must be of one split")
            corners = mat["headboxes_src"]  # (2 corners, x y, N)
            sizes = 0.6 * np.linalg.norm(corners[1] - corners[0], axis=0)
            return (mat["pos_gt_src"].transpose(2, 0, 1), mat["jnt_missing"].T == 0, sizes,
                    f"head boxes of {Path(name).name}")
    padded = people.center[:, 0] != -2  # -1 in the JSON: no box, so neither moved nor padded
    sizes = 25 * people.scale / np.where(padded, PADDING, 1)
    return people.joints.astype(np.float64) + 1, people.visible, sizes, "head size 25 * scale"


def read_mat(path, *keys):
    """Arrays of a MATLAB file as float64; InputError if it is missing, broken or lacks a key."""
    from scipy.io import loadmat  # only where it is needed: it takes a second to import

    try:
        with open(path, "rb") as file:
            content = loadmat(file)
        return {key: np.asarray(content[key], np.float64) for key in keys}
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except KeyError as error:
        raise InputError(f"{path} has no array {error}; it holds "
                         f"{', '.join(key for key in content if key[0] != '_')}") from None
    except Exception as error:  # scipy raises what it likes on a damaged file
        raise InputError(f"{path} is not a readable MATLAB file ({error})") from None


def pckh(predictions, joints, annotated, head_sizes):
    """Percentage of joints within half a head size of the truth, as published for MPII.

    predictions, joints (N,16,2) in one frame; annotated (N,16) bool; head_sizes (N,) in pixels.
    -> {column: percentage}, NaN where nothing is annotated. A column is the unweighted mean of left
    and right; Mean is over all annotated joints but pelvis and thorax. Mean@0.1 is at 0.10; what
    SimpleBaseline and HRNet print under that name is at 0.11, the eleventh of their thresholds.
    """
    distance = np.linalg.norm(predictions - joints, axis=2) / head_sizes[:, None]  # (N,16)
    with np.errstate(invalid="ignore"):  # 0 / 0: no such joint is annotated
        def percentage(joints, threshold=0.5):
            counted = annotated[:, joints]
            return 100 * ((distance[:, joints] <= threshold) & counted).sum() / counted.sum()

        scores = {name: float(np.mean([percentage([joint]) for joint in joints]))
                  for name, joints in PCKH_JOINTS.items()}
        counted = [joint for joint in range(16) if joint not in (6, 7)]
        scores["Mean"] = float(percentage(counted))
        scores["Mean@0.1"] = float(percentage(counted, 0.1))
    return scores


# ---------------------------------------------------------------------------- AP (COCO)

COCO_METRICS = ("AP", "AP50", "AP75", "APM", "APL", "AR", "AR50", "AR75", "ARM", "ARL")
THRESHOLDS = np.linspace(0.5, 0.95, 10)  # T: the OKS from which on a detection is a hit
RECALLS = np.linspace(0, 1, 101)
AREAS = ((0, 1e10), (32 ** 2, 96 ** 2), (96 ** 2, 1e10))  # all, medium, large; both ends included
MAX_DETECTIONS = 20  # per picture


def results_arrays(entries, source, num_joints, category=1):
    """COCO results, a parsed file -> image_ids (N,), keypoints (N,K,3), scores (N,), areas (N,).

    The area is that of the box, if the first result has one, else of the joints' extent, as in
    pycocotools. InputError, naming source, if it is not a list of such results.
    """
    try:
        entries = [entry for entry in entries if entry["category_id"] == category]
        image_ids = np.array([entry["image_id"] for entry in entries])
        scores = np.array([entry["score"] for entry in entries], np.float64)
        keypoints = np.array([entry["keypoints"] for entry in entries], np.float64)
        keypoints = keypoints.reshape(len(entries), num_joints, 3)
        if entries[0].get("bbox"):
            areas = np.array([entry["bbox"][2] * entry["bbox"][3] for entry in entries], np.float64)
        else:
            areas = np.prod(np.ptp(keypoints[..., :2], axis=1), axis=1)
        good = np.isfinite(keypoints).all() and np.isfinite(scores).all()
    except (KeyError, TypeError, ValueError, IndexError):
        good = False
    if not good:
        raise InputError(f"{source} must be a list, not empty, of {{image_id, category_id "
                         f"{category}, keypoints: {3 * num_joints} numbers, score}}")
    return image_ids, keypoints, scores, areas


def object_keypoint_similarity(found, truth, visible, areas, boxes, sigmas):
    """OKS of P pairs: found and truth (P,K,2) pixels, visible (P,K) bool, the true persons' areas
    (P,) and boxes (P,4) x, y, width, height -> (P,).

    The mean over the labelled joints of exp(-d^2 / (2 (2 sigma)^2 area)). For a person without any
    labelled joint, d is the distance to its box, enlarged threefold, over all joints.
    """
    corner, extent = boxes[:, None, :2], boxes[:, None, 2:]
    difference = found - truth
    outside = np.maximum(0, corner - extent - found) + np.maximum(0, found - corner - 2 * extent)
    unlabelled = ~visible.any(1)
    difference = np.where(unlabelled[:, None, None], outside, difference)
    counted = visible | unlabelled[:, None]
    squared = difference[..., 0] ** 2 + difference[..., 1] ** 2
    exponent = squared / (2 * sigmas) ** 2 / (areas[:, None] + np.spacing(1)) / 2
    # Summed as pycocotools sums, over the counted joints alone and side by side, so that equal
    # similarities come out equal to the last bit: ties decide who is matched.
    first = np.argsort(~counted, axis=1, kind="stable")
    terms, number = np.take_along_axis(np.exp(-exponent), first, axis=1), counted.sum(1)
    similarity = np.empty(len(found))
    for n in np.unique(number):
        rows = number == n
        similarity[rows] = np.ascontiguousarray(terms[rows, :n]).sum(1) / n
    return similarity


def last_argmax(values):
    """The position of the last maximum along the last axis."""
    return values.shape[-1] - 1 - values[..., ::-1].argmax(-1)


def coco_ap(content, image_ids, keypoints, scores, areas, sigmas):
    """The ten numbers of COCO's keypoint task, equal to pycocotools: {AP, AP50, ..., ARL}.

    content: the parsed annotation file. The rest: detections, as results_arrays returns them.
    -1 where there is nobody to find. All pictures are matched side by side: the loop runs over the
    (at most 20) detections of a picture in the order of their scores, not over the pictures.
    """
    sigmas, K, T = np.asarray(sigmas), len(sigmas), len(THRESHOLDS)
    images = np.unique([image["id"] for image in content["images"]])
    known = set(images.tolist())
    unknown = np.setdiff1d(image_ids, images)
    if len(unknown):
        raise InputError(f"the results name {len(unknown)} pictures that the annotations don't "
                         f"have (first: {unknown[0]}); are both of the same split?")
    category = data.person_category(content)
    # an id that occurs twice means its last annotation both times, as in pycocotools
    last = {truth["id"]: truth for truth in content["annotations"]}
    truths = [last[truth["id"]] for truth in content["annotations"]
              if truth["category_id"] == category]
    truths = [truth for truth in truths if truth["image_id"] in known]
    truth_image = np.searchsorted(images, [truth["image_id"] for truth in truths])
    points = np.array([truth["keypoints"] for truth in truths], np.float64).reshape(-1, K, 3)
    boxes = np.array([truth["bbox"] for truth in truths], np.float64).reshape(-1, 4)
    # one row more than persons in what follows: row -1 stands for nobody
    truth_area = np.array([truth["area"] for truth in truths] + [0], np.float64)
    crowd = np.array([bool(truth.get("iscrowd")) for truth in truths] + [False])
    unlabelled = np.array([truth["num_keypoints"] == 0 for truth in truths] + [True])
    # pycocotools marks a match by the annotation's id, so that an id of 0 counts as no match
    marked = np.array([truth["id"] != 0 for truth in truths] + [False])

    # The detections: by picture, highest score first, 20 of each at most
    image = np.searchsorted(images, image_ids)
    order = np.lexsort((-scores, image))  # stable
    rank = np.arange(len(order)) - np.searchsorted(image[order], image[order])
    order, rank = order[rank < MAX_DETECTIONS], rank[rank < MAX_DETECTIONS]
    image, keypoints, scores, areas = image[order], keypoints[order], scores[order], areas[order]

    # Similarities of all pairs of one picture, (I pictures, 20, G persons); -1 where there is none
    by_image = np.argsort(truth_image, kind="stable")
    slot = np.empty(len(truths), int)  # a person's place among those of its picture
    slot[by_image] = np.arange(len(truths)) - np.searchsorted(truth_image[by_image],
                                                              truth_image[by_image])
    G = slot.max(initial=0) + 1
    person = np.full((len(images), G), -1)  # (I,G) -> row in truths
    person[truth_image, slot] = np.arange(len(truths))
    pair_detection, pair_slot = np.nonzero(person[image] >= 0)
    pair_person = person[image[pair_detection], pair_slot]
    similarity = np.full((len(images), MAX_DETECTIONS, G), -1.0)
    similarity[image[pair_detection], rank[pair_detection], pair_slot] = object_keypoint_similarity(
        keypoints[pair_detection, :, :2], points[pair_person, :, :2], points[pair_person, :, 2] > 0,
        truth_area[pair_person], boxes[pair_person], sigmas)

    by_score = np.argsort(-scores, kind="stable")
    precisions, recalls = [], []
    for low, high in AREAS:
        # a detection that is matched to one of these is left out
        ignored = crowd | unlabelled | (truth_area < low) | (truth_area > high)
        taken = np.zeros((len(images), T, G), bool)
        matches = np.full((len(images), MAX_DETECTIONS, T), -1)  # -> row in truths
        for number in range(MAX_DETECTIONS):
            rows = np.flatnonzero((similarity[:, number] >= THRESHOLDS[0]).any(1))
            candidates = person[rows, None]  # (R,1,G)
            values = similarity[rows, number, None]  # (R,1,G)
            free = (values >= THRESHOLDS[:, None]) & (~taken[rows] | crowd[candidates])  # (R,T,G)
            # the most similar person that counts, else the most similar that is ignored
            counts = np.where(free & ~ignored[candidates], values, -1)
            rest = np.where(free & ignored[candidates], values, -1)
            best = np.where((counts > 0).any(2), last_argmax(counts), last_argmax(rest))  # (R,T)
            hit = free.any(2)
            matches[rows, number] = np.where(hit, person[rows[:, None], best], -1)
            r, t = np.nonzero(hit)
            taken[rows[r], t, best[r, t]] = True

        match = matches[image, rank].T  # (T, detections)
        found = (match >= 0) & marked[match]
        outside = (areas < low) | (areas > high)
        left_out = np.where(match >= 0, ignored[match], outside) | (~found & outside)
        found, left_out = found[:, by_score], left_out[:, by_score]
        total = np.count_nonzero(~ignored)
        if total == 0:
            precisions.append(np.full((T, len(RECALLS)), -1.0))
            recalls.append(np.full(T, -1.0))
            continue
        true = np.cumsum(found & ~left_out, axis=1).astype(float)
        false = np.cumsum(~found & ~left_out, axis=1).astype(float)
        recall, precision = true / total, true / (true + false + np.spacing(1))
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        at = np.zeros((T, len(RECALLS)))
        for t in range(T):
            position = np.searchsorted(recall[t], RECALLS, side="left")
            reached = position < recall.shape[1]
            at[t, reached] = precision[t, position[reached]]
        precisions.append(at)
        recalls.append(recall[:, -1] if recall.shape[1] else np.zeros(T))

    (p, p_medium, p_large), (r, r_medium, r_large) = precisions, recalls
    values = (p, p[0], p[5], p_medium, p_large, r, r[0], r[5], r_medium, r_large)
    return {name: float(np.mean(value)) for name, value in zip(COCO_METRICS, values)}


def person_scores(keypoints, people):
    """The score of each person, (N,): the mean of its joint scores above 0.2, 0 if there is none,
    times the score of its box (SimpleBaseline)."""
    counted = keypoints[..., 2] > 0.2
    return ((keypoints[..., 2] * counted).sum(1) / np.maximum(counted.sum(1), 1)) * people.score


def box_areas(people, size):
    """The areas (N,) of the padded boxes, which have the shape of the network's input, in pixels of
    the pictures."""
    return (200 * people.scale) ** 2 * size[0] / size[1]


def coco_results(keypoints, people, size, sigmas):
    """Predictions -> what COCO's server takes: a list of {image_id, category_id, keypoints, score}.

    keypoints (N,K,3) in pixels of the pictures. Of persons on one picture that are more alike than
    an OKS of 0.9 only the best is kept.
    """
    scores = person_scores(keypoints, people)
    areas = box_areas(people, size)
    rows_of = {}  # pictures in the order of their first appearance
    for row, image_id in enumerate(people.image_id.tolist()):
        rows_of.setdefault(image_id, []).append(row)
    results = []
    for image_id, rows in rows_of.items():
        rows = np.array(rows)
        for row in rows[oks_nms(keypoints[rows, :, :2], scores[rows], areas[rows], sigmas)]:
            results.append({"image_id": image_id, "category_id": 1,
                            "keypoints": keypoints[row].ravel().tolist(),
                            "score": float(scores[row])})
    return results


def oks_nms(points, scores, areas, sigmas, threshold=0.9):
    """Which persons of one picture to keep, best first: those not more similar than threshold to a
    better one. points (n,K,2), scores (n,), areas (n,), all in pixels of the picture.

    Unlike in the metric, all joints count and the area is the mean of the two boxes' (HRNet).
    """
    squared = ((points[:, None] - points[None]) ** 2).sum(3)  # (n,n,K)
    area = (areas[:, None] + areas[None]) / 2 + np.spacing(1)
    similarity = np.exp(-squared / (2 * np.asarray(sigmas)) ** 2 / (2 * area[..., None])).mean(2)
    kept = []
    for row in np.argsort(-scores, kind="stable"):
        if (similarity[row, kept] <= threshold).all():
            kept.append(row)
    return np.array(kept)


# ---------------------------------------------------------------------------- prediction

def model_info(config, dataset, skeleton, size):
    """All that belongs to a network's weights, as plain types: kept in checkpoints and ONNX files,
    so that no flag has to be repeated."""
    return {"variant": config and variant_name(config), "dataset": dataset,
            "skeleton": asdict(skeleton), "input": list(size), "mean": list(MEAN),
            "std": list(STD), "colour": "RGB"}


def open_session(path, threads=0, profile=None, optimised=True):
    """An ONNX Runtime session on the CPU; InputError if the file is not one for it.

    threads: 0 for one per core. profile: a prefix of the file that it writes its profile to.
    optimised: False runs the graph as it is written.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    if not Path(path).is_file():
        raise InputError(f"{path}: there is no such file")
    try:
        return onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has no public classes of errors
        raise InputError(f"{path} can't be opened by ONNX Runtime "
                         f"({str(error).splitlines()[0]})") from None


class Network:
    """A trained network and all that belongs to it, from a checkpoint or an ONNX file.

    network(images): crops (B,H,W,3) uint8 -> the last stage's heatmaps (B,K,h,w), a float32 tensor.
    InputError if the file is broken, or lacks what neither it nor the arguments tell.
    """

    def __init__(self, path, device="cpu", size=None, skeleton=None, bgr=False):
        self.device, self.model, self.session, config = torch.device(device), None, None, None
        if Path(path).suffix == ".onnx":
            self.device, self.session = torch.device("cpu"), open_session(path)
            info = json.loads(self.session.get_modelmeta().custom_metadata_map.get("lapx", "null"))
        else:
            content = load_file(path)
            self.model = from_checkpoint(content, path).eval().to(
                self.device, memory_format=torch.channels_last)  # faster on CPUs and GPUs
            config = self.model.config
            guess = {16: "mpii", 17: "coco"}.get(config.num_joints)
            info = content.get("info") if isinstance(content, dict) else None
            if info is None and guess:  # weights alone, such as the authors' LAPX_MPII_256_256.tar
                told = re.search(r"(\d{2,})[_x](\d{2,})", Path(path).stem)
                told = tuple(map(int, told.groups())) if told else DATASETS[guess].size
                info = model_info(config, guess, SKELETONS[guess], told)
                print(f"{path} does not tell its joints and input; taken for {guess}'s and "
                      f"{'{}x{}'.format(*size or told)}, unless --skeleton and --input say "
                      "otherwise")
        if not info and not (size and skeleton):
            raise InputError(f"{path} does not tell its input size and joints; name them with "
                             "--input HxW and --skeleton NAME (an entry of SKELETONS in lapx.py)")
        self.info = info or model_info(config, None, skeleton, size)
        if skeleton is None:
            skeleton = Skeleton(**{name: tuple(tuple(value) if isinstance(value, list) else value
                                               for value in values)
                                   for name, values in self.info["skeleton"].items()})
        if config and config.num_joints != len(skeleton.joints):
            raise InputError(f"{path} predicts {config.num_joints} joints, but --skeleton names "
                             f"{len(skeleton.joints)}")
        self.skeleton, self.size = skeleton, tuple(size or self.info["input"])
        self.bgr = bgr or self.info["colour"] == "BGR"
        self.info = {**self.info, "skeleton": asdict(skeleton), "input": list(self.size),
                     "colour": "BGR" if self.bgr else "RGB"}
        if self.session:
            self.check_onnx(path)

    def check_onnx(self, path):
        """Finds the outputs that are heatmaps; InputError if the file's shapes don't fit."""
        def fits(shape, wanted):  # what is open has a name in place of a number
            return len(shape) == 4 and all(not isinstance(fixed, int) or fixed == number
                                           for fixed, number in zip(shape[1:], wanted))

        takes, gives = self.session.get_inputs()[0].shape, self.session.get_outputs()
        if not fits(takes, (3, *self.size)):
            raise InputError(f"{path} takes images of the shape {takes}, not (B, 3, "
                             f"{self.size[0]}, {self.size[1]}); choose --input accordingly")
        K = len(self.skeleton.joints)
        self.outputs = [output.name for output in gives
                        if fits(output.shape, (K, *heatmap_size(*self.size)))]
        if not self.outputs:
            raise InputError(f"{path} gives no heatmaps of {K} joints, but outputs of the shapes "
                             f"{[output.shape for output in gives]}; choose --skeleton accordingly")

    def prepare(self, images):
        return normalise(images.to(self.device, non_blocking=True), self.bgr,
                         self.info["mean"], self.info["std"])

    @torch.no_grad()
    def stages(self, images):
        """The heatmaps of all stages that the network gives, a list of (B,K,h,w)."""
        images = self.prepare(images)
        if self.session is None:
            return [heatmaps.float() for heatmaps in self.model(images)]
        takes = self.session.get_inputs()[0]
        batch = takes.shape[0] if isinstance(takes.shape[0], int) else len(images)
        filled = np.concatenate([images.numpy(), np.zeros((-len(images) % batch, *images.shape[1:]),
                                                          np.float32)])
        runs = [self.session.run(self.outputs, {takes.name: filled[start:start + batch]})
                for start in range(0, len(filled), batch)]
        return [torch.from_numpy(np.concatenate(parts)[:len(images)]) for parts in zip(*runs)]

    def __call__(self, images):
        return self.stages(images)[-1]


def flip_back(heatmaps, order, shift=True):
    """The heatmaps (B,K,h,w) of mirrored crops -> as if of the crops themselves.

    Mirrored, left and right joints exchanged, and moved one pixel to the right: with heatmap pixel
    x on input pixel 4x, the mirrored map is 3/4 of a pixel off. Column 0 stays where it was.
    """
    heatmaps = heatmaps.flip(3)[:, order]
    if shift:
        heatmaps = torch.cat([heatmaps[..., :1], heatmaps[..., :-1]], dim=3)
    return heatmaps


def predict(heatmaps_of, people, size, skeleton, flips=(True,), shift=True, quarter_offset=True,
            batch_size=32, workers=0, pin_memory=False, progress=None):
    """Joints of people: for each entry of flips (with the flip test or without) an array (N,K,3) of
    x, y in pixels of the pictures (0-based) and score.

    heatmaps_of: function of crops (B,H,W,3) uint8 -> heatmaps (B,K,h,w). The flip test averages the
    heatmaps of a crop and of its mirror image. progress: called with the number of persons done.
    """
    K, order = len(skeleton.joints), flip_order(skeleton).tolist()
    keypoints = [np.zeros((len(people), K, 3)) for _ in flips]
    matrices = np.array([invert(affine(center, scale, size))
                         for center, scale in zip(people.center, people.scale)])
    batches = [range(start, min(start + batch_size, len(people)))
               for start in range(0, len(people), batch_size)]
    loader = data.make_loader(PoseDataset(people, size, skeleton), batches, workers, pin_memory)
    for rows, images, *_ in loader:
        rows = rows.numpy()
        heatmaps = heatmaps_of(images)
        if any(flips):
            mirrored = flip_back(heatmaps_of(images.flip(2)), order, shift)
        for result, flip in zip(keypoints, flips):
            points, scores = decode((heatmaps + mirrored) / 2 if flip else heatmaps, quarter_offset)
            points = points.cpu().double().numpy() * STRIDE
            result[rows, :, :2] = transform(points, matrices[rows])
            result[rows, :, 2] = scores.cpu().numpy()
        if not all(np.isfinite(result[rows]).all() for result in keypoints):
            raise InputError("the network's heatmaps are NaN or infinite; take an earlier "
                             "checkpoint")
        if progress:
            progress(rows[-1] + 1)
    return keypoints


def show_progress(total, what="persons"):
    """A function that writes "done/total" over one line of a terminal; None when there is none."""
    if not sys.stderr.isatty():
        return None
    start = time.monotonic()

    def show(done):
        left = (time.monotonic() - start) * (total - done) / done
        end = "\r" if done < total else "\r" + " " * 60 + "\r"
        print(f"  {done}/{total} {what}, {left:.0f} s left   ", end=end, file=sys.stderr,
              flush=True)
    return show


# ---------------------------------------------------------------------------- scores of a data set

def read_truth(people, dataset, root, split, rows=None):
    """What the predictions of a split are scored against; of some rows of its people, if given.

    COCO: the parsed annotation file. Else: what mpii_truth returns.
    """
    if dataset != "coco":
        *arrays, compared = mpii_truth(people, root, split)
        return (*(array if rows is None else array[rows] for array in arrays), compared)
    path = Path(root) / f"annotations/person_keypoints_{split}.json"
    content = data.read_coco_json(path, people.joints.shape[1])
    if rows is not None:
        wanted = set(people.image_id[rows].tolist())
        content["images"] = [image for image in content["images"] if image["id"] in wanted]
    return content


def score(keypoints, people, truth, size, skeleton):
    """Predictions (N,K,3), in pixels of the pictures, against read_truth's -> {metric: value}."""
    if isinstance(truth, dict):
        results = coco_results(keypoints, people, size, skeleton.sigmas)
        arrays = results_arrays(results, "the predictions", len(skeleton.joints))
        return coco_ap(truth, *arrays, skeleton.sigmas)
    return pckh(keypoints[..., :2] + 1, *truth[:3])


def format_metrics(metrics):
    """Two lines, the names and the numbers, in fixed columns."""
    scale, digits = (100, 2) if "AP" in metrics else (1, 2)
    values = ["-" if np.isnan(value) else f"{value * scale:.{digits}f}" if value >= 0 else "-1"
              for value in metrics.values()]
    return (" ".join(f"{name:>9}" for name in metrics), " ".join(f"{value:>9}" for value in values))


def write_metrics(out, metrics, name="metrics.json"):
    plain = {key: None if np.isnan(value) else value for key, value in metrics.items()}
    data.write_file(Path(out) / name, json.dumps(plain, indent=1) + "\n")


def write_predictions(out, keypoints, people, dataset, size, skeleton):
    """pred.mat as MPII's evaluation takes it, or results.json as COCO's server does. -> path."""
    if dataset == "coco":
        path = Path(out) / "results.json"
        data.write_file(path, json.dumps(coco_results(keypoints, people, size, skeleton.sigmas)))
    else:
        from scipy.io import savemat

        path, buffer = Path(out) / "pred.mat", io.BytesIO()
        savemat(buffer, {"preds": keypoints[..., :2] + 1})
        data.write_file(path, buffer.getvalue())
    return path


def read_people(args, split, size, skeleton):
    """The people to predict: annotated boxes, or those of a detector. -> People, boxes in words."""
    root = args.data or Path("data") / args.dataset
    if args.dataset != "coco" or (args.boxes == "gt" and find_coco(root, split)[1]):
        return data.load_people(args.dataset, root, split, size, skeleton), "gt"
    path, annotated = find_coco(root, split)
    if args.boxes == "gt":
        raise InputError(f"{path.name} has no persons; give a detector's with --boxes FILE.json")
    images = data.read_coco_json(path, len(skeleton.joints))["images"]
    people = data.read_boxes(args.boxes, images, data.coco_image_folder(root, split), size,
                             len(skeleton.joints))
    print(f"coco {split}: {len(people)} boxes of {args.boxes} in {len(images)} pictures",
          flush=True)
    data.check_pictures(people, "coco", split)
    return people, str(args.boxes)


def find_coco(root, split):
    """COCO's annotation file of a split, and whether it has persons (a test split's has none)."""
    path = data.find_file(root, [f"annotations/person_keypoints_{split}.json",
                                 f"annotations/image_info_{split}.json"], "coco", split)
    return path, path.name.startswith("person_keypoints")


def evaluate_dataset(args):
    """Predicts a split with a network and scores it, or only predicts if nothing is annotated."""
    network = open_network(args)
    args.dataset = args.dataset or network.info["dataset"]
    if not args.dataset:
        raise InputError(f"{args.weights} does not say what it was trained on; name a --dataset, "
                         "or an --image")
    info = DATASETS[args.dataset]
    split, root = args.split or info.valid, args.data or Path("data") / args.dataset
    ours, theirs = len(network.skeleton.joints), len(SKELETONS[info.skeleton].joints)
    if args.dataset != network.info["dataset"] and not args.skeleton and ours != theirs:
        raise InputError(f"{args.weights} predicts {ours} joints, {args.dataset} has {theirs}; "
                         "choose another --dataset")
    people, boxes = read_people(args, split, network.size, network.skeleton)
    flips = [False, True] if args.both else [not args.no_flip]
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{args.out} can't be made ({error.strerror})") from None
    annotated = find_coco(root, split)[1] if args.dataset == "coco" else people.visible.any()
    truth = read_truth(people, args.dataset, root, split) if annotated else None
    start = time.monotonic()
    predictions = predict(network, people, network.size, network.skeleton, flips, not args.no_shift,
                          not args.no_offset, args.batch_size, args.workers,
                          network.device.type == "cuda", show_progress(len(people)))
    seconds = time.monotonic() - start
    print(f"{len(people) / seconds:.1f} persons/s", flush=True)
    path = write_predictions(args.out, predictions[-1], people, args.dataset, network.size,
                             network.skeleton)
    if not annotated:
        print(f"{args.dataset} {split} has no annotated joints: wrote {path}, nothing to score")
        return
    for keypoints, flip in zip(predictions, flips):
        metrics = score(keypoints, people, truth, network.size, network.skeleton)
        words = ("flip test" + ("" if args.no_shift else " with shift")) if flip else "no flip test"
        report(metrics, f"{args.dataset} {split}, {len(people)} persons, boxes {boxes}, "
                        f"input {network.size[0]}x{network.size[1]}, {words}"
                        + (", no quarter offset" if args.no_offset else ""), truth)
        write_metrics(args.out, metrics, "metrics.json" if flip == flips[-1]
                      else "metrics_no_flip.json")
    print(f"wrote {path} and {Path(args.out) / 'metrics.json'}")


def report(metrics, what, truth):
    """Prints a result: what was scored and how, the columns, the numbers."""
    if isinstance(truth, dict):
        print(f"{what}\nOKS average precision, 20 detections a picture, in percent:")
    else:
        print(f"{what}\nPCKh@0.5: distance <= half of 0.6 * head box diagonal ({truth[3]}); "
              "Mean over 14 joints, without pelvis and thorax")
    print("\n".join(format_metrics(metrics)), flush=True)


def evaluate_results(args):
    """Scores predictions made elsewhere; needs neither network nor pictures."""
    path = Path(args.results)
    if path.suffix == ".mat":
        args.dataset = args.dataset or "mpii"
        split, root = args.split or "valid", args.data or Path("data") / args.dataset
        people = DATASETS[args.dataset].read(root, split)
        predictions = read_mat(path, "preds")["preds"]
        if predictions.shape != (len(people), 16, 2):
            raise InputError(f"{path} must have preds of the shape ({len(people)}, 16, 2) for "
                             f"{args.dataset} {split}, but they are {predictions.shape}")
        if not np.isfinite(predictions).all():
            raise InputError(f"{path} has preds that are NaN or infinite")
        truth = mpii_truth(people, root, split)
        metrics = pckh(predictions, *truth[:3])
        report(metrics, f"{path}: {args.dataset} {split}, {len(people)} persons", truth)
    else:
        if not args.annotations:
            raise InputError("to score COCO results, name the annotations with --annotations FILE")
        skeleton = SKELETONS[args.skeleton or "coco"]
        content = data.read_coco_json(args.annotations, len(skeleton.joints))
        arrays = results_arrays(data.read_json(path), path, len(skeleton.joints),
                                data.person_category(content))
        metrics = coco_ap(content, *arrays, skeleton.sigmas)
        report(metrics, f"{path}: {len(arrays[0])} detections, {args.annotations}", content)
    write_metrics(args.out, metrics)
    print(f"wrote {Path(args.out) / 'metrics.json'}")


# ---------------------------------------------------------------------------- own pictures

PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"}


def pictures_in(places):
    """The pictures among files and in folders, as paths; InputError if there is none."""
    paths = [path for place in places for path in
             (sorted(path for path in place.iterdir() if path.suffix.lower() in PICTURES)
              if place.is_dir() else [place])]
    if not paths:
        raise InputError(f"{places[0]} has no pictures ({', '.join(sorted(PICTURES))})")
    return paths


def evaluate_pictures(args):
    """Predicts, draws and writes one's own pictures; a broken one is told and left out."""
    network, failed, used = open_network(args), 0, set()
    if args.attention and args.attention not in network.skeleton.joints:
        raise InputError(f"--attention {args.attention!r} is none of the network's joints: "
                         f"{', '.join(network.skeleton.joints)}")
    paths = pictures_in(args.image)
    detected = data.read_detections(args.boxes) if args.boxes != "gt" else None
    for path in paths:
        stem = path.stem
        while stem in used:  # pictures of one name from several folders
            stem += "_"
        used.add(stem)
        try:
            picture, _ = data.open_picture(path, upright=True)
            picture = picture.convert("RGB")
            boxes = args.box or [[0, 0, *picture.size]]
            scores = np.ones(len(boxes))
            if detected is not None:
                names, boxes, scores = detected
                rows = np.flatnonzero(np.array(names) == path.stem.lstrip("0"))
                if not len(rows):
                    raise InputError(f"{path}: {args.boxes} has no person in it")
                boxes, scores = boxes[rows], scores[rows]
            persons = predict_picture(network, picture, np.array(boxes, float), scores, args)
            sheets = {}
            if args.heatmaps:
                sheets["heatmaps"] = [draw_heatmaps(network, picture, box) for box, *_ in persons]
            if args.attention:
                sheets["attention"] = [draw_attention(network, picture, box, keypoints,
                                                      args.attention)
                                       for box, keypoints, _ in persons]
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            failed += 1
            continue
        write_picture(Path(args.out), stem, path, picture, persons, sheets, network, args.threshold)
    if failed:
        sys.exit(f"error: {failed} of {len(paths)} pictures could not be done")


def predict_picture(network, picture, boxes, scores, args):
    """-> a list of (box, keypoints (K,3), score) for a picture, best first, doubles left out."""
    corner, extent = boxes[:, :2], boxes[:, 2:]
    if not (np.isfinite(boxes).all() and (extent > 0).all() and (corner < picture.size).all()
            and (corner + extent > 0).all()):
        raise InputError(f"a box must be X Y W H, with W and H above 0, and lie at least partly in "
                         f"the picture of {picture.width}x{picture.height}, not all of "
                         f"{boxes.tolist()[:5]} do")
    K = len(network.skeleton.joints)
    people = data.people_in_boxes(boxes, scores, network.size, K, image=picture)
    keypoints, = predict(network, people, network.size, network.skeleton, [not args.no_flip],
                         not args.no_shift, not args.no_offset, args.batch_size)
    score = person_scores(keypoints, people)
    sigmas = network.skeleton.sigmas or [0.07] * K  # about the mean of COCO's
    areas = box_areas(people, network.size)
    return [(boxes[row], keypoints[row], score[row])
            for row in oks_nms(keypoints[..., :2], score, areas, sigmas)]


def write_picture(out, stem, path, picture, persons, sheets, network, threshold):
    """Writes what was found in a picture: the drawing, the JSON and sheets, beside each other."""
    joints = network.skeleton.joints
    content = [{"box": list(map(float, box)), "score": float(score), "joints": [
        {"name": name, "x": float(x), "y": float(y), "score": float(s)}
        for name, (x, y, s) in zip(joints, keypoints)]} for box, keypoints, score in persons]
    data.write_file(out / f"{stem}_pose.json",
                    json.dumps({"picture": str(path), "persons": content}, indent=1) + "\n")
    drawn, shown = picture.copy(), [person for person in persons if person[2] > threshold]
    for _, keypoints, _ in reversed(shown):
        data.draw_pose(drawn, keypoints, network.skeleton, threshold)
    data.write_png(out / f"{stem}_pose.png", drawn)
    for name, pictures in sheets.items():
        for number, sheet in enumerate(pictures):
            data.write_png(out / f"{stem}_{name}{number or ''}.png", sheet)
    print(f"{path}: {len(persons)} persons, {len(shown)} drawn (scores above {threshold:g}) -> "
          f"{out / stem}_pose.png, .json", flush=True)


def crop_of(network, picture, box):
    """The crop of a box as the network sees it: (1,H,W,3) uint8, and its matrix."""
    (center,), (scale,) = data.box_to_center_scale(box, network.size)
    matrix = affine(center, scale, network.size)
    return torch.from_numpy(data.crop(picture, matrix, network.size))[None], matrix


def draw_heatmaps(network, picture, box):
    """A sheet: a row for each stage, a column for each joint, the heatmap over the crop."""
    images, _ = crop_of(network, picture, box)
    height, width = network.size
    seen = Image.fromarray(images[0].numpy()).resize((128, 128 * height // width))
    stages = network.stages(images)
    tiles = [data.titled(data.heat(seen, heatmap, max(float(heatmap.max()), 1e-6)),
                         f"{number}: {name} {float(heatmap.max()):.2f}", 16)
             for number, stage in enumerate(stages, start=1)
             for name, heatmap in zip(network.skeleton.joints, stage[0].cpu())]
    return data.grid(tiles, columns=len(network.skeleton.joints))


def draw_attention(network, picture, box, keypoints, joint):
    """Where the Non-Local modules look from the cell that a joint lies in, one tile a stage."""
    from lapx import NonLocal

    maps, hooks = [], []
    for number, stage in enumerate(network.model.stages if network.model else [], start=1):
        for module in stage.modules():
            if isinstance(module, NonLocal):
                hooks.append(module.register_forward_hook(
                    lambda module, inputs, _, number=number: maps.append(
                        (number, float(module.gamma), inputs[0].shape[2:],
                         module.attention(inputs[0])[0].float().cpu().numpy()))))
    if not hooks:
        raise InputError("--attention needs a checkpoint of a variant with Non-Local modules")
    images, matrix = crop_of(network, picture, box)
    network(images)
    for hook in hooks:
        hook.remove()
    seen, tiles = Image.fromarray(images[0].numpy()), []
    seen = seen.resize((2 * seen.width, 2 * seen.height))
    (x, y), = transform(keypoints[network.skeleton.joints.index(joint), :2][None], matrix)
    for number, gamma, (h, w), attention in maps:
        cell_width, cell_height = seen.width / w, seen.height / h
        column = int(np.clip(2 * x // cell_width, 0, w - 1))
        row = int(np.clip(2 * y // cell_height, 0, h - 1))
        looks = attention[row * w + column].reshape(h, w)
        low, high = looks.min(), looks.max()
        spread = Image.fromarray(looks - low).resize(seen.size, Image.Resampling.NEAREST)
        tile = data.heat(seen, spread, max(high - low, 1e-9) / 0.6)  # the picture shines through
        ImageDraw.Draw(tile).rectangle(
            (column * cell_width, row * cell_height, (column + 1) * cell_width,
             (row + 1) * cell_height), outline=data.MIDDLE, width=3)
        tiles.append(data.titled(tile, f"stage {number}, gamma {gamma:.2f}, from the {joint}'s "
                                       f"cell: {low:.1%} to {high:.1%} a cell"))
    return data.grid(tiles, columns=len(tiles))


# ---------------------------------------------------------------------------- command line

def open_network(args):
    return Network(args.weights, choose_device(args.device), args.input,
                   SKELETONS[args.skeleton] if args.skeleton else None, args.bgr)


def choose_device(name):
    """auto -> the best device there is: cuda, mps or cpu. InputError if a named one is missing."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    if name == "auto":
        return next(device for device, present in there.items() if present)
    if not there[name]:
        raise InputError(f"--device {name}: torch {torch.__version__} finds no such device here")
    return name


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, metavar="FILE", help="checkpoint, .tar or .onnx")
    data.add_data_arguments(parser, "what the network was trained on", "the network's own")
    group = parser.add_argument_group("a data set")
    group.add_argument("--split", help="default: valid, or val2017 for coco")
    group.add_argument("--boxes", default="gt", metavar="gt|FILE", help="persons to look at: the "
                       "annotated ones, or a person-detection JSON (default: %(default)s)")
    group.add_argument("--results", metavar="FILE", help="score predictions made elsewhere: "
                       "pred.mat (key preds, (N,16,2), 1-based) or COCO results.json")
    group.add_argument("--annotations", metavar="JSON", help="COCO's, for --results")
    group.add_argument("--both", action="store_true", help="score without and with the flip test")
    group = parser.add_argument_group("own pictures")
    group.add_argument("--image", type=Path, nargs="+", metavar="PATH", help="pictures or folders")
    group.add_argument("--box", type=float, nargs=4, action="append", metavar=("X", "Y", "W", "H"),
                       help="a person, in pixels of the upright picture; may be repeated (default: "
                       "the whole picture)")
    group.add_argument("--threshold", type=float, default=0.2,
                       help="joints and persons below are not drawn (default: %(default)s)")
    group.add_argument("--heatmaps", action="store_true", help="also draw every stage's heatmaps")
    group.add_argument("--attention", metavar="JOINT", help="also draw where the Non-Local modules "
                       'look from that joint, such as "left wrist"')
    group = parser.add_argument_group("how")
    for flag, what in (("--no-flip", "no flip test"),
                       ("--no-shift", "no shift of the mirrored map"),
                       ("--no-offset", "no quarter-pixel offset"),
                       ("--bgr", "the network was trained on BGR pictures")):
        group.add_argument(flag, action="store_true", help=what)
    group.add_argument("--batch-size", type=data.number_from(1), default=32,
                       help="default: %(default)s")
    group.add_argument("--workers", type=data.number_from(0), default=2,
                       help="loader processes (default: %(default)s)")
    group.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    group.add_argument("--out", type=Path, metavar="DIR", default=Path("runs/evaluation"),
                       help="default: %(default)s")
    args = parser.parse_args()
    if not (args.weights or args.results):
        parser.error("give --weights FILE, or --results FILE to score predictions made elsewhere")
    mode = "results" if args.results else "image" if args.image else "dataset"
    for flag, modes in (("weights", "image dataset"), ("both", "dataset"),
                        ("annotations", "results"), ("split", "dataset results"),
                        ("box", "image"), ("heatmaps", "image"), ("attention", "image")):
        if getattr(args, flag) and mode not in modes:
            parser.error(f"--{flag} means nothing with --{mode}")
    if args.boxes != "gt" and (args.box or mode == "results"):
        parser.error("--boxes means nothing with --box or --results")
    if args.both and args.no_flip:
        parser.error("--both is without and with the flip test, --no-flip without")
    (evaluate_results if args.results else evaluate_pictures if args.image
     else evaluate_dataset)(args)


if __name__ == "__main__":
    data.run(main)
