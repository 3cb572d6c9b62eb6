"""Evaluation: classifiers trained on synthetic images, distances between sets of images, and studies of both."""

from dpfast.evaluation.classifier import (
    ClassifierObjective,
    ClassifierSpec,
    accuracy,
    build_classifier,
    predict_classes,
    predict_probabilities,
    train_classifier,
)
from dpfast.evaluation.networks import Classifier, ResNet18, SmallCNN, WideResNet

__all__ = [
    "Classifier",
    "ClassifierObjective",
    "ClassifierSpec",
    "ResNet18",
    "SmallCNN",
    "WideResNet",
    "accuracy",
    "build_classifier",
    "predict_classes",
    "predict_probabilities",
    "train_classifier",
]
