"""What an example is: images and text, prepared once and read many times."""
