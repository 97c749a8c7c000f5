"""What is looked through before a run: config, annotations, images, disk."""
