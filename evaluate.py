"""Scores and draws predictions: PCKh on MPII, OKS average precision on COCO,
one's own pictures.

  python evaluate.py --weights FILE --dataset mpii
  python evaluate.py --weights FILE --dataset coco --boxes DETECTIONS.json
  python evaluate.py --results pred.mat --dataset mpii        # made elsewhere
  python evaluate.py --results results.json --annotations GROUND_TRUTH.json
  python evaluate.py --weights FILE --image photo.jpg --box 120 40 200 380

FILE is mpii, coco or coco-384x288 (the authors' weights, fetched once), a
checkpoint of train.py, one of the authors' files or an ONNX file of export.py.
Both metrics are written here by hand, in numpy; COCO's equals pycocotools."""

import argparse
import io
import json
import re
import sys
from collections import defaultdict
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import data
from data import (DATASETS, PoseDataset, affine, flip_order, normalise, people_in_boxes, plural,
                  read_columns, transform)
from lapx import (MEAN, MIN_SIZE, SKELETONS, STD, STRIDE, InputError, Skeleton, decode,
                  from_checkpoint, heatmap_size, load_file, reading, variant_name, weights_path)


# ---------------------------------------------------------------------------- heatmaps to joints

def flip_back(heatmaps, order, shift=True):
    """The heatmaps (B,K,h,w) of mirrored crops -> as if of the crops themselves.

    Mirrored, left and right joints exchanged (order (K,)), and moved one pixel to the right, except
    column 0: since heatmap pixel x lies on input pixel 4x, the mirrored map is 3/4 of a pixel too
    far left (SimpleBaseline shifts by a whole one, and 1/4 remains)."""
    heatmaps = heatmaps.flip(3)[:, order]
    if shift:
        heatmaps = torch.cat([heatmaps[..., :1], heatmaps[..., :-1]], dim=3)
    return heatmaps


def predict(network, people, flip=True, shift=True, quarter_offset=True, batch_size=32, workers=0):
    """Joints of People: (N,K,3) as x, y in pixels of the pictures, counted from 0, and score.

    network: a Network (below). flip: the flip test, which averages the heatmaps of a crop and of
    its mirror image; shift, quarter_offset: see flip_back and lapx.decode. The test-time protocol
    is the paper's and SimpleBaseline's."""
    keypoints = np.zeros((len(people), len(network.flip_order), 3))
    batches = [range(start, min(start + batch_size, len(people)))
               for start in range(0, len(people), batch_size)]
    samples = PoseDataset(people, network.size, network.skeleton)
    loader = data.make_loader(samples, batches, workers, network.device.type == "cuda")
    for rows, crops, _, _ in data.progress(loader, "batches"):
        rows = rows.numpy()
        heatmaps = network(crops)  # (B,K,h,w)
        if flip:
            mirrored = network(crops.flip(2))  # crops are (B,H,W,3)
            heatmaps = (heatmaps + flip_back(mirrored, network.flip_order, shift)) / 2
        points, scores = decode(heatmaps, quarter_offset)  # (B,K,2), (B,K)
        to_picture = np.linalg.inv([affine(people.center[row], people.scale[row], network.size)
                                    for row in rows])  # (B,3,3)
        keypoints[rows, :, :2] = transform(STRIDE * points.cpu().double().numpy(), to_picture)
        keypoints[rows, :, 2] = scores.cpu().numpy()
        if not np.isfinite(keypoints[rows]).all():
            raise InputError("the network's heatmaps are NaN or infinite; take an earlier "
                             "checkpoint")
    return keypoints


# ---------------------------------------------------------------------------- PCKh (MPII)

PCKH_COLUMNS = {"Head": [9], "Shoulder": [12, 13], "Elbow": [11, 14], "Wrist": [10, 15],
                "Hip": [2, 3], "Knee": [1, 4], "Ankle": [0, 5]}
PELVIS_AND_THORAX = (6, 7)


def pckh(predictions, joints, visible, head_sizes):
    """PCKh, the percentage of joints within half a head size of the truth: {column: percentage}.

    predictions, joints (N,16,2) in one frame; visible (N,16) bool; head_sizes (N,) in pixels.
    A distance of exactly half a head size is a hit. A column is the unweighted mean of left and
    right; Mean is over all visible joints but pelvis and thorax. NaN where no joint is visible."""
    distance = np.linalg.norm(predictions - joints, axis=2) / head_sizes[:, None]  # (N,16)

    def percentage(indices, threshold):
        counted = visible[:, indices]
        hits = (distance[:, indices] <= threshold) & counted
        return 100 * hits.sum() / counted.sum() if counted.any() else np.nan

    scores = {name: float(np.mean([percentage([index], 0.5) for index in indices]))
              for name, indices in PCKH_COLUMNS.items()}
    others = [index for index in range(16) if index not in PELVIS_AND_THORAX]
    scores["Mean"] = float(percentage(others, 0.5))
    # DIFFERS: Mean@0.1. Ours is at 0.10; what SimpleBaseline and HRNet print under that name is at
    # 0.11, the eleventh of their thresholds. The paper does not print it.
    scores["Mean@0.1"] = float(percentage(others, 0.1))
    return scores


# ---------------------------------------------------------------------------- OKS and AP (COCO)

COCO_METRICS = ("AP", "AP50", "AP75", "APM", "APL", "AR", "AR50", "AR75", "ARM", "ARL")
THRESHOLDS = np.linspace(0.5, 0.95, 10)  # T: the OKS from which on a detection is a hit
RECALLS = np.linspace(0, 1, 101)
AREAS = ((0, 1e10), (32 ** 2, 96 ** 2), (96 ** 2, 1e10))  # all, medium, large; both ends included
MAX_DETECTIONS = 20  # per picture


def object_keypoint_similarity(found, truth, area, box, sigmas):
    """OKS of D detections with one person: found (D,K,2) and truth (K,3) in pixels, the person's
    area and box (x, y, width, height), sigmas (K,) -> (D,).

    The mean over the labelled joints of exp(-d^2 / (2 (2 sigma)^2 area)), d being the distance."""
    labelled = truth[:, 2] > 0
    if labelled.any():
        difference = found[:, labelled] - truth[labelled, :2]  # (D,L,2), L labelled joints
        sigmas = sigmas[labelled]
    else:  # the distance of all joints to the box, enlarged by itself on each side (pycocotools)
        corner = box[:2]
        extent = box[2:]
        difference = (np.maximum(0, corner - extent - found)
                      + np.maximum(0, found - corner - 2 * extent))
    squared = difference[..., 0] ** 2 + difference[..., 1] ** 2  # (D,L)
    exponent = squared / (2 * sigmas) ** 2 / (area + np.spacing(1)) / 2
    # contiguous: summed in pycocotools' order, equal to the last bit, as ties decide matches
    return np.ascontiguousarray(np.exp(-exponent)).sum(1) / len(sigmas)


def match(similarity, ignored, crowd, threshold):
    """Which person each detection of a picture finds, greedily: similarity (D lists of G), the
    detections from the highest score down; ignored, crowd (G,) -> D indices, -1 for nobody.

    A detection takes the most similar person that is still free (of equals the later one, as in
    pycocotools). One that is ignored is taken only if none that counts is similar enough. A crowd
    is never used up."""
    order = sorted(range(len(ignored)), key=lambda person: ignored[person])  # stable
    taken = set()
    matches = []
    for row in similarity:
        best = -1
        least = min(threshold, 1 - 1e-10)
        for person in order:
            if person in taken and not crowd[person]:
                continue
            if best >= 0 and ignored[person] and not ignored[best]:
                break
            if row[person] >= least:
                best = person
                least = row[person]
        if best >= 0:
            taken.add(best)
        matches.append(best)
    return matches


def precision_and_recall(scores, hit, left_out, total):
    """Detections of the whole data set -> precision at RECALLS (T,101), final recall (T,).

    scores (D,); hit, left_out (T,D) bool; total: how many persons there are to find. -1 if none."""
    precision = np.full((len(THRESHOLDS), len(RECALLS)), -1.0)
    if total == 0:
        return precision, np.full(len(THRESHOLDS), -1.0)
    order = np.argsort(-scores, kind="stable")
    true = np.cumsum((hit & ~left_out)[:, order], axis=1)  # (T,D)
    false = np.cumsum((~hit & ~left_out)[:, order], axis=1)
    falling = true / (true + false + np.spacing(1))
    falling = np.maximum.accumulate(falling[:, ::-1], axis=1)[:, ::-1]  # it falls with recall
    falling = np.column_stack([falling, np.zeros(len(THRESHOLDS))])  # 0 for recalls never reached
    recall = true / total
    for t in range(len(THRESHOLDS)):
        precision[t] = falling[t, np.searchsorted(recall[t], RECALLS)]
    return precision, recall.max(1, initial=0)


def coco_ap(file, results, sigmas):
    """The ten numbers of COCO's keypoint task, equal to pycocotools: {AP, AP50, ..., ARL}.

    file: a data.CocoFile. results: columns image_id (D,), keypoints (D,K,3), score (D,), area (D,)
    of detections, as results_columns gives them. -1 where there is nobody to find."""
    persons = file.persons
    sigmas = np.asarray(sigmas)
    unknown = np.setdiff1d(results["image_id"], file.images["id"])
    if len(unknown):
        raise InputError(f"the results name {plural(len(unknown), 'picture')} that {file.path} "
                         f"does not have (first: {unknown[0]:.0f}); are both of the same split?")
    last = {id: row for row, id in enumerate(persons["id"])}
    persons_in = defaultdict(list)
    for id in persons["id"]:  # an id that occurs twice is its last annotation twice (pycocotools)
        persons_in[persons["image_id"][last[id]]].append(last[id])
    detections_in = defaultdict(list)
    for row in np.argsort(-results["score"], kind="stable"):
        detections_in[results["image_id"][row]].append(row)

    pictures = []
    for image in np.unique(file.images["id"]):
        detections = np.array(detections_in[image][:MAX_DETECTIONS], int)  # (D,) rows
        people = np.array(persons_in[image], int)  # (G,) rows
        points = results["keypoints"][detections, :, :2]
        similarity = [object_keypoint_similarity(points, persons["keypoints"][row],
                                                 persons["area"][row], persons["bbox"][row], sigmas)
                      for row in people]
        similarity = np.array(similarity).reshape(len(people), len(detections)).T  # (D,G)
        pictures.append((detections, people, similarity))
    all_detections = np.concatenate([detections for detections, _, _ in pictures])
    all_people = np.concatenate([people for _, people, _ in pictures])

    crowd = persons["iscrowd"] > 0
    precisions = []
    recalls = []
    for low, high in AREAS:
        ignored = crowd | (persons["num_keypoints"] == 0)
        ignored |= (persons["area"] < low) | (persons["area"] > high)
        hit = []
        left_out = []
        for detections, people, similarity in pictures:
            matches = np.full((len(THRESHOLDS), len(detections)), -1)
            if similarity.size and similarity.max() >= THRESHOLDS[0]:  # else nobody is found
                matches = np.array([match(similarity.tolist(), ignored[people].tolist(),
                                          crowd[people].tolist(), t) for t in THRESHOLDS])
            # a match of -1 picks what is appended. pycocotools marks a match by the annotation's
            # id, so that an id of 0 is no match
            found = np.append(people, -1)[matches]  # (T,D) rows
            matched = np.append(persons["id"], 0)[found] != 0
            area = results["area"][detections]
            outside = (area < low) | (area > high)
            hit.append(matched)
            left_out.append(np.append(ignored, False)[found] | (~matched & outside))
        precision, recall = precision_and_recall(
            results["score"][all_detections], np.concatenate(hit, axis=1),
            np.concatenate(left_out, axis=1), np.count_nonzero(~ignored[all_people]))
        precisions.append(precision)
        recalls.append(recall)

    values = []
    for of_all, of_medium, of_large in (precisions, recalls):
        values += [of_all, of_all[0], of_all[5], of_medium, of_large]  # [0]: OKS 0.5, [5]: 0.75
    return {name: float(np.mean(value)) for name, value in zip(COCO_METRICS, values)}


# ---------------------------------------------------------------------------- results

def rescore(keypoints, people, network):
    """Predictions (N,K,3) -> the score of each person (N,), and the rows of those to keep.

    A score is the mean of the joint scores above 0.2, 0 if there is none, times the score of the
    box (SimpleBaseline). Of persons on one picture that are more alike than an OKS of 0.9 the best
    is kept. Unlike in the metric all joints count, and the area is the mean of the two padded
    boxes', which have the shape of the network's input (HRNet)."""
    counted = keypoints[..., 2] > 0.2
    mean = (keypoints[..., 2] * counted).sum(1) / np.maximum(counted.sum(1), 1)
    scores = mean * people.score
    areas = (200 * people.scale) ** 2 * network.size[0] / network.size[1]  # pixels of the pictures
    labelled = keypoints.copy()
    labelled[..., 2] = 1
    sigmas = np.array(network.skeleton.sigmas or [0.07] * keypoints.shape[1])  # COCO's mean
    kept = {image_id: [] for image_id in people.image_id.tolist()}  # the best ones first
    for row in np.argsort(-scores, kind="stable"):
        better = kept[people.image_id[row]]
        area = (areas[better] + areas[row]) / 2
        similarity = object_keypoint_similarity(keypoints[better, :, :2], labelled[row],
                                                area[:, None], None, sigmas)
        if (similarity <= 0.9).all():
            better.append(row)
    return scores, [row for rows in kept.values() for row in rows]


def coco_results(keypoints, people, network):
    """Predictions -> what COCO's server takes: a list of {image_id, category_id, keypoints, score}.

    keypoints (N,K,3) in pixels of the pictures."""
    scores, kept = rescore(keypoints, people, network)
    return [{"image_id": int(people.image_id[row]), "category_id": people.truth.category,
             "keypoints": keypoints[row].ravel().tolist(), "score": float(scores[row])}
            for row in kept]


def results_columns(entries, path, num_joints, category):
    """COCO results, a parsed file -> {image_id (D,), keypoints (D,K,3), score (D,), area (D,)}.

    The area is that of the box, if the first result has one, else of the joints' extent, as in
    pycocotools. InputError, naming path, if it is not a list of such results."""
    with reading(path, f"a list of results, some with the category_id {category} of persons"):
        entries = [entry for entry in entries if entry["category_id"] == category]
        boxed = "bbox" in entries[0]
    shapes = {"image_id": (), "score": (), "keypoints": (3 * num_joints,)}
    columns = read_columns(path, "result", entries, shapes | ({"bbox": (4,)} if boxed else {}))
    columns["keypoints"] = columns["keypoints"].reshape(len(entries), num_joints, 3)
    extent = columns["bbox"][:, 2:] if boxed else np.ptp(columns["keypoints"][..., :2], axis=1)
    columns["area"] = extent[:, 0] * extent[:, 1]
    return columns


# ---------------------------------------------------------------------------- a network from a file

def model_info(config, dataset, skeleton, size, precision="tf32"):
    """All that belongs to a network's weights, as plain types: kept in checkpoints and ONNX files,
    so that no flag has to be repeated."""
    return {"variant": config and variant_name(config), "dataset": dataset,
            "skeleton": asdict(skeleton), "input": list(size), "mean": list(MEAN),
            "std": list(STD), "colour": "RGB", "precision": precision}


class Network:
    """A network and all that belongs to it, made by open_network.

    network(crops): crops (B,H,W,3) uint8 RGB -> the last stage's heatmaps (B,K,h,w), float32.
    forward: function of normalised images (B,3,H,W) -> list with S heatmaps. info: model_info's.
    model: the LAPX, None for an ONNX file. path names it in errors."""

    def __init__(self, forward, info, device="cpu", model=None, path="the network"):
        self.forward = forward
        self.info = info
        self.device = torch.device(device)
        self.model = model
        self.path = path
        with reading(path, "a network with its joints, input size, mean, std and colours") as where:
            where.entry = "what train.py and export.py store as info"
            self.skeleton = Skeleton(**{
                key: tuple(map(tuple, value)) if key in ("flip_pairs", "limbs") else tuple(value)
                for key, value in info["skeleton"].items()})
            self.size = data.image_size("{}x{}".format(*info["input"]))
            self.normalisation = ({"RGB": False, "BGR": True}[info["colour"]],
                                  tuple(map(float, info["mean"])), tuple(map(float, info["std"])))
            self.dataset = info["dataset"]
            # values that don't fit each other fail here
            self.flip_order = flip_order(self.skeleton).tolist()
            data.draw_pose(Image.new("RGB", (1, 1)), np.ones((len(self.flip_order), 3)),
                           self.skeleton)
            normalise(torch.zeros(1, 1, 1, 3), *self.normalisation)
            DATASETS[self.dataset or "mpii"]
        # Evaluation computes as training did, but for bfloat16, which is for training alone. The
        # switch is torch's for the whole process.
        torch.backends.cudnn.allow_tf32 = info.get("precision") != "float32"

    def prepare(self, crops):
        """Crops (B,H,W,3) uint8 -> the network's input (B,3,H,W), on its device."""
        return normalise(crops.to(self.device, non_blocking=True), *self.normalisation)

    @torch.no_grad()
    def stages(self, crops):
        """The heatmaps of all stages that the network gives, a list of (B,K,h,w)."""
        outputs = self.forward(self.prepare(crops))
        wanted = (len(self.flip_order), *heatmap_size(*self.size))
        heatmaps = [output.float() for output in outputs if output.shape[1:] == wanted]
        if not heatmaps:
            found = [tuple(output.shape[1:]) for output in outputs]
            raise InputError(f"{self.path} gives {found}, not heatmaps {wanted} (joints, height, "
                             "width); choose --skeleton and --input accordingly")
        return heatmaps

    def __call__(self, crops):
        return self.stages(crops)[-1]


def open_network(path, device="auto", size=None, skeleton=None, bgr=False):
    """A Network from a file of weights, a name in lapx.WEIGHTS, or an ONNX file (on the CPU).

    size (height, width), skeleton (a name in SKELETONS), bgr: what the file does not tell, or is to
    be changed. InputError if the file is broken, or neither tells all that is needed."""
    path = weights_path(path)
    model = None
    if path.suffix == ".onnx":
        if device not in ("auto", "cpu"):
            raise InputError(f"{path}: ONNX files run on the CPU here; leave out --device")
        device = "cpu"
        session = open_session(path)
        forward = session_forward(session, path)
        with reading(path, "an ONNX file whose metadata is JSON under the key lapx"):
            info = json.loads(session.get_modelmeta().custom_metadata_map.get("lapx", "null"))
    else:
        device = choose_device(device)
        content = load_file(path)
        model = from_checkpoint(content, path).eval()
        forward = model.to(device, memory_format=torch.channels_last)  # faster on CPUs and GPUs
        info = content.get("info") if isinstance(content, dict) else None
        info = info or guess_info(model.config, path)
    if info is None and size and skeleton:
        info = model_info(model and model.config, None, SKELETONS[skeleton], size)
    if not isinstance(info, dict):
        raise InputError(f"{path} does not tell its input size and joints; name them with --input "
                         "HxW and --skeleton NAME (an entry of SKELETONS in lapx.py)")
    changes = {"input": size and list(size), "skeleton": skeleton and asdict(SKELETONS[skeleton]),
               "colour": "BGR" if bgr else None}
    info = info | {key: value for key, value in changes.items() if value}
    network = Network(forward, info, device, model, path)
    if model and model.config.num_joints != len(network.flip_order):
        raise InputError(f"{path} predicts {model.config.num_joints} joints, not "
                         f"{len(network.flip_order)}; choose another --skeleton")
    return network


def guess_info(config, path):
    """The info of weights alone, such as the authors': from the number of joints and, as in
    LAPX_MPII_256_256.tar, from the file's name. None for joints other than MPII's and COCO's."""
    dataset = {16: "mpii", 17: "coco"}.get(config.num_joints)
    if dataset is None:
        return None
    found = re.search(r"(?<!\d)(\d{2,4})[_x](\d{2,4})(?!\d)", path.stem)
    height, width = map(int, found.groups()) if found else (0, 0)
    if min(height, width) < MIN_SIZE or height % 32 or width % 32:  # an epoch, perhaps
        height, width = DATASETS[dataset].size
    print(f"{path} does not tell its joints and input; taken for {dataset}'s and {height}x{width}, "
          "unless --skeleton and --input say otherwise")
    return model_info(config, dataset, SKELETONS[dataset], (height, width))


def choose_device(name):
    """auto -> the best device there is: cuda, mps or cpu. InputError if a named one is missing."""
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    there.append("cpu")
    if name not in ("auto", *there):
        raise InputError(f"--device {name}: torch {torch.__version__} finds no such device here")
    return there[0] if name == "auto" else name


def open_session(path, threads=0, profile=None, optimised=True):
    """An ONNX Runtime session on the CPU; InputError if the file is not one for it.

    threads: 0 for one per core. profile: a prefix of the file that it writes its profile to.
    optimised: False runs the graph as it is written."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    with reading(path, "an ONNX file that ONNX Runtime can run"):
        open(path).close()  # a missing file is told as such
        return onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])


def session_forward(session, path):
    """An ONNX Runtime session -> function of images (B,3,H,W) -> its outputs, a list of tensors.

    A batch that the file fixes is filled up."""
    takes = session.get_inputs()[0]

    def forward(images):
        with reading(path, f"a network for float32 images {tuple(images.shape)}, see --input"):
            batch = takes.shape[0] if isinstance(takes.shape[0], int) else len(images)
            missing = np.zeros((-len(images) % batch, *images.shape[1:]), np.float32)
            filled = np.concatenate([images.numpy(), missing])
            runs = [session.run(None, {takes.name: filled[start:start + batch]})
                    for start in range(0, len(filled), batch)]
            return [torch.from_numpy(np.concatenate(parts)[:len(images)]) for parts in zip(*runs)]

    return forward


# ---------------------------------------------------------------------------- scoring a split

def score(keypoints, people, network):
    """Predictions (N,K,3) of a whole split, in pixels of the pictures -> {metric: value}."""
    if people.truth is None:
        return pckh(keypoints[..., :2] + 1, people.joints + 1, people.visible, people.head_size)
    results = coco_results(keypoints, people, network)
    columns = results_columns(results, "the predictions", keypoints.shape[1], people.truth.category)
    return coco_ap(people.truth, columns, network.skeleton.sigmas)


def report(metrics, what, heads):
    """Prints a result: what was scored and how, the columns, the numbers. heads: what PCKh's head
    sizes are, in words."""
    coco = "AP" in metrics
    print(what)
    print(f"OKS average precision in percent, {MAX_DETECTIONS} detections a picture" if coco else
          f"PCKh@0.5: distance <= half a head size, {heads};\nMean over 14 joints, without pelvis "
          "and thorax")
    width = 7 if coco else 8
    print(" ".join(f"{name:>{width}}" for name in metrics))
    print(" ".join(f"{value if value < 0 or not coco else 100 * value:{width}.2f}"
                   for value in metrics.values()), flush=True)


def write_metrics(path, metrics):
    data.write_file(path, {key: None if np.isnan(value) else value
                           for key, value in metrics.items()})
    print(f"wrote {path}")


def write_predictions(out, keypoints, people, network):
    """pred.mat as MPII's evaluation takes it, or results.json as COCO's server does."""
    if people.truth:
        path = out / "results.json"
        content = json.dumps(coco_results(keypoints, people, network))
    else:
        from scipy.io import savemat

        path = out / "pred.mat"
        buffer = io.BytesIO()
        savemat(buffer, {"preds": keypoints[..., :2] + 1})
        content = buffer.getvalue()
    data.write_file(path, content)
    print(f"wrote {path}")


def network_of(args):
    return open_network(args.weights, args.device, args.input, args.skeleton, args.bgr)


def protocol(args):
    """The flags of the test-time protocol, as predict takes them."""
    return dict(flip=not args.no_flip, shift=not args.no_shift, batch_size=args.batch_size,
                quarter_offset=not args.no_offset)


def evaluate_dataset(args):
    """Predicts a split with a network and scores it, or only predicts if nothing is annotated."""
    network = network_of(args)
    dataset = args.dataset or network.dataset
    if not dataset:
        raise InputError(f"{args.weights} does not say what it was trained on; name a --dataset, "
                         "or an --image")
    if dataset != "coco" and args.boxes != "gt":
        raise InputError(f"--boxes means nothing with {dataset}, whose boxes are annotated")
    split = args.split or DATASETS[dataset].splits[1]
    people = data.load_people(dataset, data.data_folder(args.data, dataset), split, network.size,
                              network.skeleton, args.boxes)
    scored = (people.truth.persons["num_keypoints"] if people.truth else people.visible).any()
    # DIFFERS: boxes of COCO's persons. The paper's numbers are with a detector's boxes, ours are
    # with annotated ones unless --boxes names a file: about 2 AP more. The result line says which.
    boxes = "annotated (gt)" if args.boxes == "gt" else f"of {args.boxes}"
    for flip in [False, True] if args.both else [not args.no_flip]:
        keypoints = predict(network, people, **protocol(args) | {"flip": flip},
                            workers=args.workers)
        write_predictions(args.out, keypoints, people, network)
        if scored:
            metrics = score(keypoints, people, network)
            options = [("no flip test" if not flip else "flip test without shift" if args.no_shift
                        else "flip test with shift")] + ["no quarter offset"] * args.no_offset
            report(metrics, f"{dataset} {split}, {plural(len(people), 'person')}, boxes {boxes},\n"
                   f"input {network.size[0]}x{network.size[1]}, {', '.join(options)}",
                   people.head_source)
            name = "metrics.json" if flip or not args.both else "metrics_no_flip.json"
            write_metrics(args.out / name, metrics)
    if not scored:
        print(f"{dataset} {split} has no annotated joints, so there is no score")


def evaluate_results(args):
    """Scores predictions made elsewhere; needs neither network nor pictures."""
    path = Path(args.results)
    if path.suffix == ".mat":
        dataset = args.dataset or "mpii"
        split = args.split or "valid"
        if dataset == "coco" or args.annotations or args.skeleton:
            raise InputError(f"{path}: a .mat file has MPII's joints; --annotations, --skeleton "
                             "and coco mean nothing with it")
        people = DATASETS[dataset].read(data.data_folder(args.data, dataset), split)
        predictions = data.read_mat(path, {"preds": (len(people), 16, 2)})["preds"]
        metrics = pckh(predictions, people.joints + 1, people.visible, people.head_size)
        report(metrics, f"{path}: {dataset} {split}, {plural(len(people), 'person')}",
               people.head_source)
    else:
        if not args.annotations or args.data or args.split or args.dataset not in (None, "coco"):
            raise InputError("COCO results are scored against --annotations FILE, and by that "
                             "alone (no --dataset, --data or --split)")
        skeleton = SKELETONS[args.skeleton or "coco"]
        K = len(skeleton.joints)
        truth = data.read_coco_file(args.annotations, K)
        if not truth.persons["num_keypoints"].any():
            raise InputError(f"{args.annotations} has nobody with labelled joints to score")
        columns = results_columns(data.read_json(path), path, K, truth.category)
        metrics = coco_ap(truth, columns, skeleton.sigmas)
        count = plural(len(columns["score"]), "detection")
        report(metrics, f"{path}: {count}, {args.annotations}", None)
    write_metrics(args.out / "metrics.json", metrics)


# ---------------------------------------------------------------------------- own pictures

PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"}


def people_in_picture(network, picture, boxes, scores=None):
    """Boxes (n,4) in a Pillow picture -> People. scores (n,): of the boxes, default 1."""
    n = len(boxes)
    return people_in_boxes(boxes, np.ones(n) if scores is None else np.asarray(scores, float),
                           network.size, len(network.skeleton.joints), image_id=np.zeros(n, int),
                           source=picture.convert("RGB"), files=np.zeros(n, "S1"))


def predict_picture(network, picture, boxes=None, scores=None, flip=True, shift=True,
                    quarter_offset=True, batch_size=32):
    """The persons in a Pillow picture, best first, doubles left out; each is a dictionary of plain
    types {"box": [x, y, width, height], "score": s, "joints": {name: [x, y, score], ...}}.

    boxes (n,4): x, y, width, height of each person in pixels; default: one that fills the picture.
    scores (n,): of the boxes, default 1. The others: see predict. InputError for impossible boxes.
    """
    boxes = np.array([[0, 0, *picture.size]] if boxes is None else boxes, float).reshape(-1, 4)
    low = boxes[:, :2]
    high = low + boxes[:, 2:]
    if not ((high > low) & (high > 0) & (low < picture.size) & np.isfinite(high)).all():
        raise InputError(f"a box must be X Y W H, with W and H above 0, and lie at least partly in "
                         f"the picture of {picture.width}x{picture.height}, not all of "
                         f"{boxes.tolist()[:5]} do")
    people = people_in_picture(network, picture, boxes, scores)
    keypoints = predict(network, people, flip, shift, quarter_offset, batch_size)
    found, kept = rescore(keypoints, people, network)
    return [{"box": boxes[row].tolist(), "score": float(found[row]),
             "joints": dict(zip(network.skeleton.joints, keypoints[row].tolist()))} for row in kept]


def pictures_in(places):
    """The pictures among files and in folders, as paths; InputError if there is none."""
    paths = []
    for place in map(Path, places):
        paths += [path for path in sorted(place.iterdir())
                  if path.suffix.lower() in PICTURES] if place.is_dir() else [place]
    if not paths:
        raise InputError(f"{places[0]} has no pictures ({', '.join(sorted(PICTURES))})")
    return paths


def evaluate_pictures(args):
    """Predicts, draws and writes one's own pictures; a broken one is told and left out."""
    network = network_of(args)
    if args.attention and args.attention not in network.skeleton.joints:
        raise InputError(f"--attention {args.attention!r} is none of the network's joints: "
                         f"{', '.join(network.skeleton.joints)}")
    if args.attention and not (network.model and network.model.non_locals()):
        raise InputError("--attention needs a checkpoint of a variant with Non-Local modules")
    paths = pictures_in(args.image)
    if args.out.resolve() in [path.resolve().parent for path in paths]:
        raise InputError(f"{args.out} has the pictures themselves; choose another --out")
    if len({path.stem for path in paths}) < len(paths):
        raise InputError("two pictures have the same name, by which results are written: give them "
                         "one by one, with another --out each")
    detected = {path: (args.box, None) for path in paths}
    if args.boxes != "gt":
        found, boxes, scores = data.read_detections(
            args.boxes, {int(path.stem): path for path in paths if path.stem.isdigit()},
            {path.name: path for path in paths})
        rows = {path: [] for path in paths}
        for row, path in enumerate(found):
            rows[path].append(row)
        detected = {path: (boxes[rows[path]], scores[rows[path]]) for path in paths}
    failed = 0
    for path in paths:
        try:
            picture = data.open_picture(path, upright=True)
            persons = predict_picture(network, picture, *detected[path], **protocol(args))
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            failed += 1
            continue
        write_picture(args, path, picture, persons, network)
    if failed:
        sys.exit(f"error: {failed} of {plural(len(paths), 'picture')} could not be done")


def write_picture(args, path, picture, persons, network):
    """Writes what was found in a picture: the drawing, the JSON and sheets, beside each other."""
    start = args.out / path.stem
    data.write_file(f"{start}_pose.json", {"picture": str(path), "persons": persons})
    shown = [person for person in persons if person["score"] > args.threshold]
    drawn = picture.copy()
    for person in reversed(shown):
        keypoints = np.array(list(person["joints"].values()))
        data.draw_pose(drawn, keypoints, network.skeleton, args.threshold)
    data.write_file(f"{start}_pose.png", drawn)
    for number, person in enumerate(shown):
        if args.heatmaps:
            data.write_file(f"{start}_heatmaps{number or ''}.png",
                            draw_heatmaps(network, picture, person))
        if args.attention:
            data.write_file(f"{start}_attention{number or ''}.png",
                            draw_attention(network, picture, person, args.attention))
    print(f"{path}: {plural(len(persons), 'person')}, {len(shown)} drawn (scores above "
          f"{args.threshold:g}) -> {start}_pose.png, .json", flush=True)


def crop_of(network, picture, box):
    """The crop of a box as the network sees it: (1,H,W,3) uint8, and its matrix."""
    people = people_in_picture(network, picture, np.array([box], float))
    _, crop, _, _ = PoseDataset(people, network.size, network.skeleton)[0]
    return crop[None], affine(people.center[0], people.scale[0], network.size)


def draw_heatmaps(network, picture, person):
    """A sheet of all stages' heatmaps over the crop, eight joints a row, the peaks marked."""
    crops, _ = crop_of(network, picture, person["box"])
    factor = 192 / network.size[1]
    seen = Image.fromarray(crops[0].numpy()).resize((192, round(network.size[0] * factor)))
    blank = Image.new("RGB", seen.size, "white")
    tiles = []
    for number, heatmaps in enumerate(network.stages(crops), start=1):
        points, scores = decode(heatmaps.cpu())
        for k, name in enumerate(network.skeleton.joints):
            peak = float(scores[0, k])
            tile = data.heat(seen, heatmaps[0, k].cpu().numpy() / max(peak, 1e-6),
                             f"stage {number}: {name}\npeak {peak:.2f}")
            ImageDraw.Draw(tile).circle((factor * STRIDE * points[0, k]).tolist(), 5,
                                        outline=data.MIDDLE, width=2)
            tiles.append(tile)
        tiles += [blank] * (-len(network.skeleton.joints) % 8)  # a stage begins a row
    return data.grid(tiles, columns=8)


def draw_attention(network, picture, person, joint):
    """Where the Non-Local modules look from the cell that a joint lies in, one tile a stage."""
    crops, matrix = crop_of(network, picture, person["box"])
    factor = max(1, round(384 / network.size[1]))
    seen = Image.fromarray(crops[0].numpy())
    seen = seen.resize((factor * seen.width, factor * seen.height))
    keypoint = np.array([person["joints"][joint][:2]])
    place = factor * transform(keypoint, matrix)[0]  # x, y in `seen`
    tiles = []

    def draw(number, module, inputs, output):  # a forward hook
        h, w = inputs[0].shape[2:]
        cell = np.array([seen.width / w, seen.height / h])
        column, row = np.clip(place // cell, 0, (w - 1, h - 1)).astype(int)
        attention = module.attention(inputs[0])[0]  # (h*w,h*w)
        looks = attention[row * w + column].reshape(h, w).float().cpu().numpy()
        spread = (looks - looks.min()) / max(np.ptp(looks), 1e-9)
        spread = Image.fromarray(0.6 * spread).resize(seen.size, Image.Resampling.NEAREST)
        tile = data.heat(seen, spread, f"stage {number}, gamma {module.gamma.item():.2f}, from "
                         f"the {joint}'s cell\n{looks.min():.1%} (dark) to {looks.max():.1%} "
                         "(bright) of its attention a cell")
        corner = cell * (column, row)
        ImageDraw.Draw(tile).rectangle((*corner, *corner + cell), outline=data.MIDDLE, width=3)
        tiles.append(tile)

    hooks = [stage.hourglass.neck.non_local.register_forward_hook(partial(draw, number))
             for number, stage in enumerate(network.model.stages, start=1)
             if hasattr(stage.hourglass.neck, "non_local")]
    network(crops)
    for hook in hooks:
        hook.remove()
    return data.grid(tiles, columns=len(tiles))


# ---------------------------------------------------------------------------- flags

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--weights", metavar="FILE", help="mpii, coco, coco-384x288, a checkpoint, .tar or .onnx")
    add("--out", type=Path, metavar="DIR", default=Path("runs/evaluation"),
        help="default: %(default)s")
    data.add_data_arguments(parser, "what the network was trained on", "the network's own")
    add = parser.add_argument_group("a data set").add_argument
    add("--split", help="default: valid, or val2017 for coco")
    add("--boxes", default="gt", metavar="gt|FILE", help="persons to look at: the annotated ones, "
        "or a person-detection JSON (default: %(default)s)")
    add("--both", action="store_true", help="score without and with the flip test")
    add("--workers", type=data.number_from(0, data.cpu_count()), default=min(2, data.cpu_count()),
        help="loader processes (default: %(default)s)")
    add("--results", metavar="FILE", help="score predictions made elsewhere: pred.mat (key preds, "
        "(N,16,2), 1-based) or COCO results.json")
    add("--annotations", metavar="JSON", help="COCO's, for --results")
    add = parser.add_argument_group("own pictures").add_argument
    add("--image", type=Path, nargs="+", metavar="PATH", help="pictures or folders")
    add("--box", type=float, nargs=4, action="append", metavar=("X", "Y", "W", "H"), help="a "
        "person, in pixels of the upright picture; may be repeated (default: the whole picture)")
    add("--threshold", type=float, default=0.2,
        help="joints and persons below are not drawn (default: %(default)s)")
    add("--heatmaps", action="store_true", help="also draw every stage's heatmaps")
    add("--attention", metavar="JOINT", help="also draw where the Non-Local modules look from that "
        'joint, such as "left wrist"')
    add = parser.add_argument_group("how").add_argument
    add("--no-flip", action="store_true", help="no flip test")
    add("--no-shift", action="store_true", help="no shift of the mirrored map")
    add("--no-offset", action="store_true", help="no quarter-pixel offset")
    add("--bgr", action="store_true", help="the network was trained on BGR pictures")
    add("--batch-size", type=data.number_from(1), default=32, help="default: %(default)s")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    args = parser.parse_args()
    if not (args.weights or args.results):
        parser.error("give --weights FILE, or --results FILE to score predictions made elsewhere")
    if args.both and (args.no_flip or args.no_shift):
        parser.error("--both is without and with the flip test and its shift")
    if args.box and args.boxes != "gt":
        parser.error("--box and --boxes are two ways to say the same; give one of them")
    network = "weights skeleton input bgr no_flip no_shift no_offset batch_size device boxes out"
    if args.results:
        data.refuse_unused(parser, args, "--results",
                           "results annotations dataset data split skeleton out")
        evaluate_results(args)
    elif args.image:
        data.refuse_unused(parser, args, "--image",
                           f"{network} image box threshold heatmaps attention")
        evaluate_pictures(args)
    else:
        data.refuse_unused(parser, args, "a data set", f"{network} dataset data split both workers")
        evaluate_dataset(args)


if __name__ == "__main__":
    data.run(main)
