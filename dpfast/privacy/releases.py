"""Other releases from the same data, whose cost is set aside before the training's noise is calibrated."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dpfast.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class GaussianRelease:
    """``count`` sums over the data, each with Gaussian noise: a noised histogram, a noised validation score.

    noise_multiplier: standard deviation of the noise over the most that one image can change the sum (L2).
    sample_rate: each image takes part with this probability (Poisson sampled anew each time); 1 means all.
    """

    description: str
    noise_multiplier: float
    count: int = 1
    sample_rate: float = 1.0

    def __post_init__(self) -> None:
        if not (self.noise_multiplier > 0 and self.count >= 1 and 0 < self.sample_rate <= 1):
            raise ConfigError(f"{self}: expected noise_multiplier > 0, count >= 1 and 0 < sample_rate <= 1")


def to_event(release: Any) -> Any:
    """The dp-accounting event of a ``GaussianRelease`` or of an event itself; ConfigError for anything
    else.
    """
    import dp_accounting as dp

    if isinstance(release, GaussianRelease):
        noise = dp.GaussianDpEvent(release.noise_multiplier)
        return dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(release.sample_rate, noise), release.count)
    if isinstance(release, dp.DpEvent):
        try:
            hash(release)
        except TypeError:
            raise ConfigError(f"other_releases: list the parts of {release} one by one, without composing") from None
        return release
    raise ConfigError(f"other_releases: expected a GaussianRelease or a dp_accounting.DpEvent, got {release!r}")


def to_dict(release: Any) -> dict[str, Any]:
    """JSON form of a release; ``from_dict`` is its inverse."""
    if isinstance(release, GaussianRelease):
        return {"type": "GaussianRelease", **asdict(release)}
    values = {field.name: getattr(release, field.name) for field in type(release).__attrs_attrs__}
    nested = {name: to_dict(v) if hasattr(v, "__attrs_attrs__") else v for name, v in values.items()}
    return {"type": type(release).__name__, **nested}


def from_dict(values: Mapping[str, Any]) -> Any:
    """The release that ``to_dict`` described."""
    from dp_accounting import dp_event

    name = values["type"]
    fields = {key: _field(value) for key, value in values.items() if key != "type"}
    return GaussianRelease(**fields) if name == "GaussianRelease" else getattr(dp_event, name)(**fields)


def _field(value: Any) -> Any:
    if isinstance(value, Mapping):
        return from_dict(value)
    return tuple(value) if isinstance(value, list) else value
