"""Template sets, and what is refused of a user's own."""

import pytest

from concat_jax.text.templates import TEMPLATES, find_templates


def test_template_sets():
    assert TEMPLATES["single"] == ("a photo of a {}.",)
    counts = {name: len(set(templates)) for name, templates in TEMPLATES.items()}
    assert counts == {"name": 1, "single": 1, "eight": 8, "fourteen": 14, "eighty": 80}
    assert all(t.count("{}") == 1 for templates in TEMPLATES.values() for t in templates)
    # The published seven that were chosen among the eighty are among the eight.
    assert set(TEMPLATES["eight"][:7]) <= set(TEMPLATES["eighty"])
    assert TEMPLATES["eighty"][0] == "a bad photo of a {}."
    assert TEMPLATES["eighty"][-1] == "a tattoo of the {}."
    # With either article, but for four of their own.
    words = [t.replace("the ", "a ", 1) for t in TEMPLATES["eighty"]]
    alone = {t for t in words if words.count(t) == 1}
    assert alone == {
        "a photo of many {}.",
        "a photo of my {}.",
        "a photo of one {}.",
        "itap of my {}.",
    }


def test_templates_are_found_by_name_or_given():
    assert find_templates("eight") is TEMPLATES["eight"]
    assert find_templates(["a map of {}", "{}"]) == ("a map of {}", "{}")
    assert find_templates("a map of {}") == ("a map of {}",)


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        (
            "ninety",
            "no template set 'ninety'; use one of name, single, eight, fourteen, eighty, or a list",
        ),
        ("", "no template set ''"),
        (["a photo"], "'a photo' must hold '{}' once"),
        ("{} and {}", "'{} and {}' must hold '{}' once"),
        ([], "There are no templates"),
        ([1], "The template 1 must hold"),
    ],
)
def test_bad_templates_are_refused(choice, sentence):
    with pytest.raises(ValueError, match=sentence):
        find_templates(choice)
