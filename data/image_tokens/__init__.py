"""Convert images to VQGAN codes.

batch_encoder   Convert images to codes on all devices of a process; threads decode files in the
                meantime.
dicom           Convert a DICOM radiograph to a gray image; only pixels leave this module.
dicom_bounds    Limit the memory that pydicom allocates for a DICOM file, and name the decoder a
                file requires.
document_codes  Provide the codes of document images: encoded here, or read from a folder written by
                `tokenize`.
encoder         Load the encoder of a model folder, the views of images, and image files as pixels.
store           Convert images to VQGAN codes at scale: any number of processes, restartable at any
                point.
store_reader    Read a folder of codes, by index in its list or by the bytes of an image file.
"""
