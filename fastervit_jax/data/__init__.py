"""Images in: from records on disk to normalised batches on the devices."""
