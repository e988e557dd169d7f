"""Images to VQGAN codes.

batch_encoder   Pictures to codes on all devices of a process, decoded in threads while others are
                encoded.
dicom           A DICOM radiograph to a grey picture; only pixels leave this file.
dicom_bounds    Bound what a DICOM file makes pydicom allocate, and name the decoder that a file
                needs.
document_codes  Codes of the pictures that documents show: encoded here, or read from a folder of
                `tokenize`.
encoder         What turns pictures into codes: the encoder of a model folder, views, picture files
                to pixels.
store           Pictures to VQGAN codes at scale: any number of processes, killed and started again
                at any point.
store_reader    Reads a folder of codes, by picture of its list or by the bytes of a picture's file.
"""
