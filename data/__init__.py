"""Data: the sample images, the documents made of them, and the pipeline that packs them."""
