"""Where files are: local disks, Google Cloud Storage, the Hugging Face hub.

atomic_folder   Create a checkpoint folder atomically, on a local disk or under gs://.
folder          The files of a checkpoint, under a local folder or under gs://bucket/prefix.
gcs             Access gs://bucket/prefix by Google's client library; used through folder.py.
hub             Files that are published on the Hugging Face hub, as local paths.
image_paths     Resolve the image paths that data files state; a path never leaves its image folder.
lease           A lock object under gs:// that ends with its holder: one process writes a folder at
                a time.
workdir         The folder that a program writes: a local one, or a local copy of a gs:// prefix.
"""
