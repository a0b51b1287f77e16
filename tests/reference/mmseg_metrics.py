"""mmsegmentation's areas and scores, step by step on arrays: per image, summed over the data set, then divided."""

import numpy as np


def intersect_and_union(
    prediction: np.ndarray, label: np.ndarray, num_classes: int, ignore_index: int, reduce_zero_label: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Areas of one image by class: right, right or wrong (union), predicted, labelled."""
    label = label.astype(np.uint8)
    if reduce_zero_label:
        label[label == 0] = 255
        label = label - 1
        label[label == 254] = 255
    mask = label != ignore_index
    prediction, label = prediction[mask], label[mask]
    right = prediction[prediction == label]
    bins = {"bins": num_classes, "range": (0, num_classes - 1)}  # the last bin has its right edge, too
    area_intersect, area_prediction, area_label = (np.histogram(x, **bins)[0] for x in (right, prediction, label))
    return area_intersect, area_prediction + area_label - area_intersect, area_prediction, area_label


def total_area_to_metrics(areas: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]) -> dict[str, object]:
    """Scores of a data set from the areas of its images; NaN where nothing is divided by nothing."""
    intersect, union, _, label = (sum(part).astype(np.float64) for part in zip(*areas, strict=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        iou, accuracy = intersect / union, intersect / label
        all_accuracy = intersect.sum() / label.sum()
    mean = {name: np.nanmean(v) if not np.isnan(v).all() else np.nan for name, v in (("iou", iou), ("acc", accuracy))}
    return {"aAcc": all_accuracy, "mIoU": mean["iou"], "mAcc": mean["acc"], "IoU": iou, "Acc": accuracy}
