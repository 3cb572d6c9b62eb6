"""Scores of image sets: against independent computations, at their ends, and in bounded memory."""

import hashlib
import json
import math
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from scipy import linalg
from sklearn.neighbors import NearestNeighbors
from torch import nn
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from dpfast.checkpoint import weights_fingerprint
from dpfast.data import font_digits, real_digits
from dpfast.errors import ConfigError, DataError, FileError
from dpfast.evaluation import ClassifierSpec, build_classifier, neighbors
from dpfast.evaluation.extractors import (
    classifier_extractor,
    feature_blocks,
    features,
    module_extractor,
    torchscript_extractor,
)
from dpfast.evaluation.frechet import frechet_of_features
from dpfast.evaluation.neighbors import overlap
from dpfast.evaluation.scores import ScoreSettings, image_scores, inception_score, kernel_distance

SMALL = ScoreSettings(kid_subsets=5, kid_subset_size=50, splits=2)


def normal(count, width=12, seed=0, shift=0.0, scale=1.0):
    """float32 features with correlated columns of different sizes."""
    random = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(width, width)) * np.geomspace(1, 0.1, width)
    return torch.from_numpy(scale * random.normal(size=(count, width)) @ mixing + shift).float()


PAIR = normal(300, seed=1), normal(260, seed=2, shift=0.3, scale=0.8)


class Flat(nn.Module):
    """Pixels as features, through one weight."""

    def __init__(self, value=1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(value))

    def forward(self, images):
        return self.scale * images.flatten(1).float() / 255


class Scripted(nn.Module):
    """Has the interface of StyleGAN's Inception."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3 * 64, 5)

    def forward(self, images: torch.Tensor, return_features: bool = False, no_output_bias: bool = False):
        values = images.float().flatten(1) / 255
        if return_features:
            return values
        logits = values @ self.head.weight.T
        return (logits if no_output_bias else logits + self.head.bias).softmax(1)


def script(module, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module).save(str(path))
    return path


# Against independent computations


def test_fid_against_scipys_matrix_root():
    a, b = (x.double().numpy() for x in PAIR)
    root = linalg.sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False))
    spread = np.trace(np.cov(a, rowvar=False)) + np.trace(np.cov(b, rowvar=False)) - 2 * np.trace(root).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + spread
    for block in (7, 1000):
        assert frechet_of_features(*(x.split(block) for x in PAIR)) == pytest.approx(expected, rel=1e-5)
    assert frechet_of_features(*(x.split(99) for x in PAIR[::-1])) == pytest.approx(expected, rel=1e-5)


def mmd_by_loops(x, y):
    """Gretton et al. 2012, lemma 6, term by term."""
    k = lambda a, b: (a @ b / len(a) + 1) ** 3  # noqa: E731
    m = len(x)
    within = sum(k(s[i], s[j]) for s in (x, y) for i in range(m) for j in range(m) if i != j)
    return within / (m * (m - 1)) - 2 * sum(k(a, b) for a in x for b in y) / m**2


@pytest.mark.filterwarnings("ignore:.*will save all extracted features in buffer")
def test_kid_against_loops_and_torchmetrics():
    a, b = (x[:60] for x in PAIR)
    ours, spread = kernel_distance(a, b, subsets=2, subset_size=60)
    assert ours == pytest.approx(mmd_by_loops(a.double().numpy(), b.double().numpy()), rel=1e-9)
    assert spread == pytest.approx(0, abs=1e-12)
    metric = KernelInceptionDistance(feature=nn.Identity(), subsets=1, subset_size=60)
    metric.update(a.double(), real=True)
    metric.update(b.double(), real=False)
    assert ours == pytest.approx(float(metric.compute()[0]), rel=1e-5)


def test_kid_over_subsets_estimates_that_of_all():
    whole, _ = kernel_distance(*(x[:260] for x in PAIR), subsets=1, subset_size=260)
    mean, spread = kernel_distance(*PAIR, subsets=200, subset_size=60)
    assert abs(mean - whole) < 4 * spread / math.sqrt(200) + 0.05 * whole
    assert spread > 0
    assert kernel_distance(*PAIR, subset_size=60) == kernel_distance(*PAIR, subset_size=60)
    assert kernel_distance(*PAIR, subset_size=60) != kernel_distance(*PAIR, subset_size=60, seed=1)


@pytest.mark.filterwarnings("ignore:.*will save all extracted features in buffer", "ignore:std")
def test_inception_score_against_its_formula_and_torchmetrics():
    logits = 3 * normal(200, width=6, seed=3)
    p = logits.double().softmax(1).numpy()
    expected = np.exp(np.mean(np.sum(p * (np.log(p) - np.log(p.mean(0))), axis=1)))
    value, spread = inception_score(logits.softmax(1), splits=1)
    assert value == pytest.approx(expected, rel=1e-5)
    assert spread == 0
    metric = InceptionScore(feature=nn.Identity(), splits=1)
    metric.update(logits.double())
    assert value == pytest.approx(float(metric.compute()[0]), rel=1e-5)


def test_inception_score_of_parts():
    """Two classes, certain: 2 where both occur alike; images of one class have 1. Shuffled, as parts may be sorted."""
    certain = torch.eye(2).repeat_interleave(500, 0)
    mean, spread = inception_score(certain, splits=10)
    assert 1.9 < mean < 2
    assert 0 < spread < 0.1
    assert inception_score(certain[:500], splits=10) == (1.0, 0.0)


def overlap_by_hand(real, fake, k_precision=3, k_coverage=5):
    """The definitions of both papers, distances and neighbours from scikit-learn."""
    real, fake = real.double().numpy(), fake.double().numpy()

    def radii(x, k):
        return NearestNeighbors(n_neighbors=k + 1).fit(x).kneighbors(x)[0][:, k]

    distance = np.linalg.norm(real[:, None] - fake[None], axis=2)
    close = distance <= radii(real, k_coverage)[:, None]
    return {
        "precision": (distance <= radii(real, k_precision)[:, None]).any(0).mean(),
        "recall": (distance <= radii(fake, k_precision)[None]).any(1).mean(),
        "density": close.sum() / (k_coverage * len(fake)),
        "coverage": close.any(1).mean(),
    }


@pytest.mark.parametrize("block", [7, 50, 2048])
@pytest.mark.parametrize("ks", [(3, 5), (7, 2)])
def test_overlap_against_scikit_learn(block, ks):
    found = overlap(*PAIR, precision_neighbors=ks[0], coverage_neighbors=ks[1], block=block)
    assert vars(found) == pytest.approx(overlap_by_hand(*PAIR, *ks), abs=1e-12)
    assert 0 < found.recall < found.precision < 1
    assert 0 < found.coverage < 1


def test_precision_and_recall_change_places():
    there, back = overlap(*PAIR), overlap(*PAIR[::-1])
    assert (there.precision, there.recall) == (back.recall, back.precision)


# At the ends


def test_identical_sets():
    a = PAIR[0]
    found = overlap(a, a.clone(), block=64)
    assert (found.precision, found.recall, found.coverage) == (1, 1, 1)
    assert found.density == pytest.approx(6 / 5)
    assert frechet_of_features([a], [a]) == pytest.approx(0, abs=1e-4)
    assert (
        kernel_distance(a, a, subsets=1, subset_size=300)[0] < 0
    )  # a pair of equal images counts between the sets only


def test_disjoint_sets():
    a, b = normal(100, seed=1), normal(100, seed=2, shift=1000.0)
    found = overlap(a, b)
    assert (found.precision, found.recall, found.density, found.coverage) == (0, 0, 0, 0)
    assert frechet_of_features([a], [b]) == pytest.approx(12 * 1000.0**2, rel=0.01)


def test_one_image_over_and_over_lies_in_the_manifold_and_covers_nothing():
    """Copies have radius 0; rounding must not tear them apart, wherever the origin lies."""
    for offset in (0.0, 300.0):
        real = normal(100, seed=1) + offset
        found = overlap(real, real[:1].repeat(100, 1))
        assert (found.precision, found.recall) == (1.0, 0.01)
        assert found.coverage == pytest.approx(0.07, abs=0.06)


def test_sets_far_from_the_origin():
    a, b = (1000.0 + 0.001 * x for x in PAIR)
    assert vars(overlap(a, b)) == pytest.approx(overlap_by_hand(a, b), abs=1e-12)


def test_too_few_images_are_refused():
    few = normal(5)
    with pytest.raises(DataError, match="more than 5 images in each set, got 300 real and 5 synthetic"):
        overlap(PAIR[0], few)
    with pytest.raises(DataError, match="subsets of 1000 images"):
        kernel_distance(*PAIR)
    with pytest.raises(DataError, match="10 splits needs as many images, got 5"):
        inception_score(few.softmax(1))
    extractor, digits = module_extractor("flat", Flat()), font_digits(60, seed=0)
    with pytest.raises(DataError, match=r"1000 images or more .*, got 60 real and 60 .*ScoreSettings\.fitting\(60\)"):
        image_scores(extractor, digits, digits)


def test_what_is_no_extractor_or_image_set_is_named_with_its_cure():
    digits = font_digits(60, seed=0)
    with pytest.raises(
        ConfigError, match=r"extractor must be an Extractor, got Flat; give module_extractor\("
    ) as caught:
        image_scores(Flat(), digits, digits.images)
    assert "synthetic must be an ImageSet, got Tensor (60, 1, 8, 8); give ImageSet(" in str(caught.value)
    assert "real" not in str(caught.value)


def test_settings_that_make_no_score_are_refused():
    with pytest.raises(ConfigError, match="kid_subset_size=1, splits=0"):
        ScoreSettings(kid_subset_size=1, splits=0)


# Extractors


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite_are_refused(value):
    digits = font_digits(60, seed=0)
    with pytest.raises(DataError, match=r"'flat': some features are NaN or infinite.*float32"):
        image_scores(module_extractor("flat", Flat(value)), digits, digits, settings=SMALL)


def test_features_of_a_wrong_shape_are_refused():
    extractor = module_extractor("images", nn.Identity())
    with pytest.raises(DataError, match=r"expected \[4, d\] for 4 images, got \(4, 1, 8, 8\)"):
        features(extractor, font_digits(4, seed=0).images)


def test_images_of_two_shapes_are_refused():
    with pytest.raises(DataError, match=r"\(1, 8, 8\) \(real\) and \(1, 16, 16\)"):
        image_scores(
            module_extractor("flat", Flat()), font_digits(60, seed=0), font_digits(60, seed=0, size=16), settings=SMALL
        )


def test_scores_carry_what_they_depend_on():
    real, fonts = real_digits("train").select(range(120)), font_digits(100, seed=0)
    model = build_classifier(real, ClassifierSpec(), seed=0)
    scores = image_scores(classifier_extractor("untrained", model), real, fonts, settings=SMALL, batch_size=16)
    assert (scores.extractor, scores.sha256) == ("untrained", weights_fingerprint(model))
    assert (scores.real_images, scores.synthetic_images, scores.settings) == (120, 100, SMALL)
    a, b = (model.features(s.images).detach() for s in (real, fonts))
    assert scores.fid == pytest.approx(frechet_of_features([a], [b]), rel=1e-5)
    assert vars(overlap(a, b)).items() <= vars(scores).items()
    assert (scores.kid, scores.kid_std) == pytest.approx(kernel_distance(a, b, subsets=5, subset_size=50), rel=1e-5)
    ours = inception_score(model(fonts.images).softmax(1).detach(), splits=2)
    assert (scores.inception_score, scores.inception_score_std) == pytest.approx(ours, rel=1e-5)
    assert json.loads(json.dumps(scores.to_dict()))["settings"]["splits"] == 2
    of_pixels = image_scores(module_extractor("flat", Flat()), real, fonts, settings=SMALL)
    assert of_pixels.inception_score is None
    assert of_pixels.sha256 != image_scores(module_extractor("flat", Flat(2.0)), real, fonts, settings=SMALL).sha256


def test_a_local_torchscript_file(tmp_path):
    path, module = tmp_path / "inception.pt", Scripted()
    extractor = torchscript_extractor(script(module, path))
    assert extractor.name == "inception.pt"
    assert extractor.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    grey = font_digits(20, seed=0).images
    torch.testing.assert_close(features(extractor, grey), grey.repeat(1, 3, 1, 1).flatten(1) / 255)
    logits = grey.repeat(1, 3, 1, 1).flatten(1) / 255 @ module.head.weight.T
    torch.testing.assert_close(extractor.probabilities(grey), logits.softmax(1))
    plain = torchscript_extractor(script(Flat(), tmp_path / "flat.pt"), name="pixels")
    assert plain.name == "pixels"
    assert plain.probabilities is None
    torch.testing.assert_close(features(plain, grey), features(extractor, grey))


def test_files_that_are_no_torchscript(tmp_path):
    with pytest.raises(FileError, match="there is none"):
        torchscript_extractor(tmp_path / "missing.pt")
    with pytest.raises(FileError, match="there is none"):
        torchscript_extractor(tmp_path)
    (tmp_path / "text.pt").write_text("not a network")
    with pytest.raises(FileError, match="no TorchScript file"):
        torchscript_extractor(tmp_path / "text.pt")


# In bounded memory


def test_features_are_read_in_chunks_of_bytes():
    seen = []

    class Watching(Flat):
        def forward(self, images):
            seen.append((len(images), images.dtype))
            return super().forward(images)

    images = font_digits(70, seed=0).images
    extractor = module_extractor("flat", Watching())
    whole = features(extractor, images, batch_size=32)
    assert seen == [(32, torch.uint8), (32, torch.uint8), (6, torch.uint8)]
    torch.testing.assert_close(torch.cat(list(feature_blocks(extractor, images))), whole)
    torch.testing.assert_close(whole, images.flatten(1) / 255)


def test_distances_are_taken_a_block_at_a_time(monkeypatch):
    largest = []
    real = neighbors.squared_distances
    spy = lambda *blocks: largest.append(real(*blocks)) or largest[-1]  # noqa: E731
    monkeypatch.setattr(neighbors, "squared_distances", spy)
    overlap(*PAIR, block=50)
    assert max(d.numel() for d in largest) == 50 * 50
    assert len(largest) == 6 * 6 + 6 * 6 + 6 * 6


STREAMED = """
import re, sys
from pathlib import Path
import torch
from dpfast.data import ImageSet
from dpfast.data.shards import ShardFolder
from dpfast.evaluation import ClassifierSpec, train_classifier
from dpfast.evaluation.extractors import module_extractor
from dpfast.evaluation.scores import ScoreSettings, image_scores

def used():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def note(*_):
    global peak
    peak = max(peak, used())

class Coarse(torch.nn.Module):
    def forward(self, images):
        return torch.nn.functional.avg_pool2d(images.float(), 16).flatten(1)

torch.set_num_threads(1)
count, folder = int(sys.argv[1]), Path(sys.argv[2])
shards = ShardFolder.claim(
    folder, {"count": count, "shard_size": 500, "image_shape": [3, 64, 64], "classes": ["a", "b"], "seed": 0}
)
for number, labels in shards:
    shards.write(number, torch.randint(0, 256, (len(labels), 3, 64, 64), dtype=torch.uint8), labels)
real = ImageSet(torch.randint(0, 256, (1000, 3, 64, 64), dtype=torch.uint8), torch.arange(1000) % 2, ("a", "b"))
peak = 0
images = shards.load()
image_scores(module_extractor("coarse", Coarse()), real, images, settings=ScoreSettings(kid_subsets=2), progress=note)
train_classifier(images, spec=ClassifierSpec(steps=3, batch_size=8), seed=0, progress=note)
note()
print(peak)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_number_of_samples(tmp_path):
    """12,000 images are 147 MB, 2,000 are 25."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}  # some keep all memory
    # What is freed goes back at once: otherwise the allocator's own habits are measured.
    env |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    few, many = (
        int(subprocess.check_output([sys.executable, "-c", STREAMED, str(count), str(tmp_path / str(count))], env=env))
        for count in (2000, 12000)
    )
    assert many - few < 16e6
