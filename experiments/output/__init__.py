"""What commands write: files of images and their names."""
