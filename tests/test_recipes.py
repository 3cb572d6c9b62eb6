"""Recipes: what a file may say, and what is said when it says something else."""

import math
import re

import pytest

from dpfast.errors import ConfigError
from dpfast.recipes import all_keys, defaults, fingerprint, flatten, load, names, parts, to_toml
from dpfast.recipes.loader import _FOLDER


@pytest.mark.parametrize("name", names())
def test_bundled_recipes_load_and_survive_being_written(name, tmp_path):
    recipe = load(name, ["fold=2", "target_epsilon=inf", "timesteps=[[0.5, 0, 300], [0.5, 300, 1000]]"])
    path = tmp_path / "copy.toml"
    path.write_text(to_toml(recipe))
    assert load(path) == recipe
    assert load(name) != recipe


@pytest.mark.parametrize("name", ["\0", "\x7f", '\x1b"\\\n\t', "\x85é"])
def test_strange_names_survive_being_written(name, tmp_path):
    recipe = load("digits", [f"data.private=a{name}b"])
    path = tmp_path / "copy.toml"
    path.write_text(to_toml(recipe), encoding="utf-8")
    assert load(path) == recipe
    assert recipe.data.private == f"a{name}b"


def test_a_folder_named_like_a_recipe_is_none(tmp_path):
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(ConfigError, match=r"no recipe file .*folder\.toml: expected an existing \.toml file"):
        load(str(tmp_path / "folder.toml"))
    (tmp_path / "own.toml").write_text('base = "folder.toml"')
    with pytest.raises(ConfigError, match=r"no recipe file folder\.toml"):
        load(str(tmp_path / "own.toml"))


def test_a_setting_that_is_no_text_is_refused():
    with pytest.raises(ConfigError, match=r"'data\.private=\\udc80': expected text in UTF-8"):
        load("digits", ["data.private=\udc80"])


def test_the_process_and_its_settings_survive_being_written(tmp_path):
    recipe = load("digits", ["process=edm", "sampler=heun", "sigma_data=0.3", "p_mean=-2", "p_std=1.5"])
    path = tmp_path / "copy.toml"
    path.write_text(to_toml(recipe))
    assert load(path) == recipe
    diffusion = load(path).diffusion
    assert (diffusion.process, diffusion.sigma_data, diffusion.p_mean, diffusion.p_std) == ("edm", 0.3, -2, 1.5)
    usual = load("digits").diffusion
    assert (usual.process, usual.sigma_data, usual.p_mean, usual.p_std) == ("ddpm", 0.5, -1.2, 1.2)


@pytest.mark.parametrize("name", names())
def test_every_value_of_a_bundled_recipe_says_where_it_comes_from(name):
    text = (_FOLDER / f"{name}.toml").read_text()
    if name.endswith("-small"):
        assert "stand-ins" in text.split("\nbase")[0]  # that the settings are for speed is said once, of all
        return
    named = ("base", "name", "device", "form")
    values = [line for line in text.splitlines() if re.match(r"\w+ = ", line) and not line.startswith(named)]
    assert [line for line in values if "#" not in line] == []


def test_digits_holds_the_headline_setting():
    recipe = load("digits")
    assert recipe.private.target_epsilon == 10
    assert recipe.private.target_delta == 1e-4
    assert recipe.data.fold is None


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("private.stps=3", ["private.stps", "private.steps"]),
        ("tarepsilon=3", ["tarepsilon", "private.target_epsilon"]),
        ("steps=3", ["pretrain.steps", "private.steps", "sample.steps"]),
        ("private.steps=3.5", ["private.steps", "a whole number", "3.5"]),
        ("private.steps=true", ["private.steps", "a whole number", "True"]),
        ("private.steps=0", ["private.steps", "above 0"]),
        ("attention=3", ["model.attention", "a list"]),
        ("widths=[16, 'x']", ["model.widths[1]", "a whole number", "'x'"]),
        ("timesteps=[[1, 2]]", ["private.timesteps[0]", "3 values"]),
        ("target_epsilon=abc", ["private.target_epsilon", "a number", "'abc'"]),
        ("target_epsilon=-1", ["private.target_epsilon", "above 0", "-1"]),
        ("target_epsilon=nan", ["private.target_epsilon", "above 0", "nan"]),
        ("private.flip=1", ["private.flip", "true or false", "1"]),
        ("sampler=dimm", ["sample.sampler", "'ddim'", "nearest"]),
        ("process=emd", ["diffusion.process", "'ddpm' or 'edm'", "nearest: 'edm'"]),
        ("sigma_data=0", ["diffusion.sigma_data", "above 0", "at most 1"]),
        ("p_mean=nan", ["diffusion.p_mean", "from -10 to below 10", "nan"]),
        ("fold=5", ["data.fold", "below 5", "5"]),
        ("name=../up", ["name", "../up"]),
        ("private=3", ["data.private"]),
        ("nothing", ["key=value"]),
    ],
)
def test_a_wrong_setting_is_named_with_its_cure(override, said):
    with pytest.raises(ConfigError) as caught:
        load("digits", [override])
    assert [part for part in said if part not in str(caught.value)] == []


def test_a_bare_key_an_int_for_a_float_and_infinity_are_taken():
    recipe = load("digits", ["target_epsilon=1", "fold = 3"])
    assert recipe.private.target_epsilon == 1.0
    assert isinstance(recipe.private.target_epsilon, float)
    assert recipe.data.fold == 3
    assert load("digits", ["target_epsilon=inf"]).private.target_epsilon == math.inf
    assert load("digits", ["fold=3", "fold=none"]).data.fold is None


def test_a_file_may_state_only_what_differs(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('base = "digits"\nname = "mine"\n[private]\nsteps = 7\n')
    recipe = load(path)
    assert (recipe.name, recipe.private.steps) == ("mine", 7)
    assert recipe.private.augmult == load("digits").private.augmult


def test_a_file_without_base_must_be_complete(tmp_path):
    path = tmp_path / "short.toml"
    path.write_text('name = "short"\nseed = 0\n')
    with pytest.raises(ConfigError, match=r"lacks data, model.*base = \"digits\""):
        load(path)


def test_unknown_keys_in_a_file_name_the_nearest(tmp_path):
    path = tmp_path / "typo.toml"
    path.write_text('base = "digits"\n[private]\naugmlut = 2\n')
    with pytest.raises(ConfigError, match=r"private\.augmlut.*private\.augmult"):
        load(path)


@pytest.mark.parametrize("content", ["steps =", 'base = "loop.toml"', "base = 3"])
def test_files_that_are_no_recipe(tmp_path, content):
    path = tmp_path / "loop.toml"
    path.write_text(content)
    with pytest.raises(ConfigError):
        load(path)


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match=r"digitz.*'digits'"):
        load("digitz")
    with pytest.raises(ConfigError, match=r"nowhere\.toml"):
        load("nowhere.toml")


def test_parts_and_fingerprint_follow_the_values():
    first, second = load("digits"), load("digits", ["private.steps=7"])
    assert parts(first, "pretrain", "seed") == parts(second, "pretrain", "seed")
    assert fingerprint(parts(first, "private")) != fingerprint(parts(second, "private"))
    assert fingerprint(parts(first, "private")) == fingerprint(parts(load("digits"), "private"))


def test_defaults_are_those_of_whole_tables():
    """Of a table in part, a record may lack keys that there were."""
    found = defaults(parts(load("digits"), "seed", "diffusion", "data.private", "data.fold", "performance.dtype"))
    assert found == {
        "diffusion.process": "ddpm",
        "diffusion.sigma_data": 0.5,
        "diffusion.p_mean": -1.2,
        "diffusion.p_std": 1.2,
    }


def test_all_keys_are_those_of_a_recipe():
    assert all_keys() == list(flatten(load("digits")))
