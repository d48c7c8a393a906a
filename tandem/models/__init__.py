"""What a network is: torchvision classifiers, and language models behind one forward contract."""
