"""Read the thirteen sources of MedMax in their published formats.

build          Build one of the thirteen sources as a folder of records; `data.prepare build` is its
               program.
captions       Read sources of images with captions: PMC-OA and Quilt-1M.
conversations  Read sources in LLaVA's format: two of LLaVA-Med, two of PubMedVision,
               Quilt-Instruct.
reports        Read MIMIC-CXR: chest radiographs, as JPG or DICOM, with the reports of their
               studies.
row            Define one row of a source in the schema of the MedMax release, or the reason for its
               rejection.
vqa            Read sources of open and closed questions in their own JSON: VQA-RAD and SLAKE.
"""
