import click
import pytest

from tandem.cli.data import data, prepare
from tandem.data.prepare import dummy, tiny_imagenet, wikitext


@pytest.mark.parametrize(("command", "recipe"), [("tiny-imagenet", tiny_imagenet), ("wikitext-2", wikitext)])
def test_the_defaults_in_the_help_are_those_of_the_recipes(command: str, recipe: object) -> None:
    defaults = {option.name: option.default for option in prepare.commands[command].params}
    assert (defaults["source"], defaults["name"]) == (
        getattr(recipe, "DEFAULT_URL"),  # noqa: B009 the type of a module has no such attribute
        getattr(recipe, "DEFAULT_NAME"),  # noqa: B009
    )


def test_the_defaults_of_dummy_data_are_those_of_the_recipe() -> None:
    options = {option.name: option for option in prepare.commands["dummy"].params}
    assert [options[name].default for name in ("name", "classes", "images", "val_images", "image_size")] == [
        dummy.DEFAULT_NAME,
        dummy.DEFAULT_CLASSES,
        dummy.DEFAULT_IMAGES,
        dummy.DEFAULT_VAL_IMAGES,
        dummy.DEFAULT_IMAGE_SIZE,
    ]
    size = options["image_size"].type
    assert isinstance(size, click.IntRange)
    assert (size.min, size.max) == (dummy.SMALLEST_SIDE, dummy.LARGEST_SIDE)


def test_every_command_takes_json() -> None:
    commands: list[click.Command] = [*prepare.commands.values(), data.commands["list"]]
    assert all("as_json" in {option.name for option in command.params} for command in commands)
