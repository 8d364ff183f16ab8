"""Config sections to dataclasses, nearest names, arguments of config files."""

import dataclasses
import math
import string
from collections.abc import Mapping
from typing import Any

import ml_collections
import pytest

from concat_jax.core import config as configuration


@dataclasses.dataclass(frozen=True)
class Settings:
    steps: int
    rate: float = 0.1
    every: int = 0
    parts: configuration.Count = 2
    sizes: tuple[int, ...] = (1,)
    share: configuration.Share = 0.5
    width: configuration.Positive = 1.0
    widths: tuple[configuration.Positive, ...] = (1.0, 2.0)
    threshold: float | None = None
    method: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.rate > 1:
            raise ValueError(f"rate is {self.rate} and must be at most 1.")


def test_build_takes_given_fields_and_defaults():
    section = {"steps": 3, "rate": 0.5, "every": 0, "parts": 0}
    built = configuration.build(Settings, section, "config.x")
    assert built == Settings(steps=3, rate=0.5, parts=0)
    assert built.method == {}


def test_build_takes_config_dicts_and_turns_lists_into_tuples():
    section = ml_collections.ConfigDict({"steps": 3, "sizes": [1, 2], "method": {"a": 1}})
    built = configuration.build(Settings, section, "config.x")
    assert built.sizes == (1, 2)
    assert dict(built.method) == {"a": 1}


def test_the_ends_of_a_range_are_of_it():
    section = dict(steps=3, share=1, width=1e-9, widths=[2], sizes=(), threshold=None)
    built = configuration.build(Settings, section, "config.x")
    assert (built.share, built.width, built.widths, built.threshold) == (1, 1e-9, (2,), None)
    assert configuration.build(Settings, section | {"share": 0, "threshold": 0.5}, "x").share == 0


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"steps": 3, "rat": 1.0}, "config.x has no key 'rat'; did you mean 'rate'?"),
        ({"steps": 3, "zzz": 1.0}, "config.x has no key 'zzz'; there are steps, "),
        ({"rate": 1.0}, "config.x lacks the key 'steps'."),
        ({"steps": 3.5}, "config.x.steps is 3.5 and must be a whole number."),
        ({"steps": True}, "config.x.steps is True and must be a whole number."),
        ({"steps": 3, "rate": "no"}, "config.x.rate is 'no' and must be a number."),
        ({"steps": 3, "rate": 2.0}, "In config.x: rate is 2.0 and must be at most 1."),
        ({"steps": 0}, "config.x.steps is 0 and must be at least 1."),
        ({"steps": 3, "every": -1}, "config.x.every is -1 and must be at least 0."),
        ({"steps": 3, "parts": -1}, "config.x.parts is -1 and must be at least 0."),
        ({"steps": 3, "rate": -1.0}, "config.x.rate is -1.0 and must be at least 0."),
        ({"steps": 3, "rate": math.nan}, "config.x.rate is nan and must be finite."),
        ({"steps": 3, "rate": math.inf}, "config.x.rate is inf and must be finite."),
        ({"steps": 3, "share": 1.5}, "config.x.share is 1.5 and must be in 0..1."),
        ({"steps": 3, "share": -0.5}, "config.x.share is -0.5 and must be in 0..1."),
        ({"steps": 3, "width": 0.0}, "config.x.width is 0.0 and must be above 0."),
        ({"steps": 3, "widths": (1, 0)}, "config.x.widths holds what is 0 and must be above 0."),
        ({"steps": 3, "widths": (1, "a")}, "config.x.widths holds what is 'a' and must be a numb"),
        ({"steps": 3, "widths": 1.0}, "config.x.widths is 1.0 and must be a tuple, as (1.0, 2.0)."),
        ({"steps": 3, "widths": ()}, "config.x.widths is () and must be a tuple, as (1.0, 2.0)."),
        ({"steps": 3, "threshold": "no"}, "config.x.threshold is 'no' and must be a number."),
    ],
)
def test_build_names_what_is_wrong(section, message):
    with pytest.raises(ValueError) as error:
        configuration.build(Settings, section, "config.x")
    assert str(error.value).startswith(message)


def test_check_choice():
    configuration.check_choice("con", ("con", "cat"), "kind is")
    with pytest.raises(ValueError, match="^kind is 'cta'; did you mean 'cat'\\?$"):
        configuration.check_choice("cta", ("con", "cat"), "kind is")
    with pytest.raises(ValueError, match="^kind is 'ONXX'; did you mean 'onnx'\\?$"):
        configuration.check_choice("ONXX", ("jax", "savedmodel", "onnx"), "kind is")
    with pytest.raises(ValueError, match="^kind is 'tflite'; there are jax, onnx\\.$"):
        configuration.check_choice("tflite", ("jax", "onnx"), "kind is")
    many = (*string.ascii_lowercase, "distributed")
    with pytest.raises(ValueError, match="^kind is 'stage'; there are a, b, .*, distributed\\.$"):
        configuration.check_choice("stage", many, "kind is")
    with pytest.raises(ValueError, match="^kind is 'cta'\\.$"):
        configuration.check_choice("cta", (), "kind is")


def test_flat_gives_dotted_keys_with_comparable_values():
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.train = dict(con=dict(takes=dict(clip="clip"), sizes=[1, 2]), empty={})
    assert configuration.flat(config) == {
        "seed": 0,
        "train.con.takes.clip": "clip",
        "train.con.sizes": (1, 2),
    }


def test_variants_change_a_recipe_in_their_order():
    def change(key):
        return lambda config: config.update(last=key, **{key: True})

    config = configuration.with_arguments(
        ml_collections.ConfigDict({"last": ""}),
        "mini,smoke",
        smoke=change("smoke"),
        mini=change("mini"),
    )
    assert config.to_dict() == {"last": "mini", "smoke": True, "mini": True}
    with pytest.raises(ValueError, match="no argument 'smok'; did you mean 'smoke'"):
        configuration.with_arguments(config, "mini,smok", smoke=change(""), mini=change(""))
