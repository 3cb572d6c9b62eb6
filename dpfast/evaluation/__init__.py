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
from dpfast.evaluation.extractors import Extractor, classifier_extractor, module_extractor, torchscript_extractor
from dpfast.evaluation.networks import Classifier, ResNet18, SmallCNN, WideResNet
from dpfast.evaluation.scores import ImageScores, ScoreSettings, image_scores

__all__ = [
    "Classifier",
    "ClassifierObjective",
    "ClassifierSpec",
    "Extractor",
    "ImageScores",
    "ResNet18",
    "ScoreSettings",
    "SmallCNN",
    "WideResNet",
    "accuracy",
    "build_classifier",
    "classifier_extractor",
    "image_scores",
    "module_extractor",
    "predict_classes",
    "predict_probabilities",
    "torchscript_extractor",
    "train_classifier",
]
