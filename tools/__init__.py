"""What makes the files that the package ships; not part of the package."""
