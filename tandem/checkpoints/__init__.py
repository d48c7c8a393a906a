"""What a trained model is: its files, their verification, and the registry of names, versions and aliases."""
