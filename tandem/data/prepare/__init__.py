"""Prepare commands: from what a person has (a zip, a folder, an address) to a dataset on the volume, whole or absent.

sources     folders and archives, read and never altered      download   addresses, resumed
staging     build aside, publish by one rename                 images     one image, checked and converted
image_writer, image_dataset, tiny_imagenet, image_folder, dummy   lines, text_dataset, text, wikitext
"""

from tandem.data.prepare.dummy import prepare_dummy
from tandem.data.prepare.image_folder import prepare_image_folder
from tandem.data.prepare.text import prepare_text
from tandem.data.prepare.tiny_imagenet import prepare_tiny_imagenet
from tandem.data.prepare.wikitext import prepare_wikitext

__all__ = ["prepare_dummy", "prepare_image_folder", "prepare_text", "prepare_tiny_imagenet", "prepare_wikitext"]
