"""Evaluation: a classifier trained on synthetic images, and the Frechet distance."""

from dpfast.evaluation.classifier import (
    ClassifierObjective,
    ClassifierSpec,
    SmallCNN,
    accuracy,
    build_classifier,
    predict_classes,
    train_classifier,
)

__all__ = [
    "ClassifierObjective",
    "ClassifierSpec",
    "SmallCNN",
    "accuracy",
    "build_classifier",
    "predict_classes",
    "train_classifier",
]
