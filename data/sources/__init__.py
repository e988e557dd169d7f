"""The thirteen sources of MedMax, read in the formats that they are published in.

build          One of the thirteen sources to a folder of records; `data.prepare build` is its
               program.
captions       Sources of pictures with captions: PMC-OA and Quilt-1M.
conversations  Sources in LLaVA's conversation format: two of LLaVA-Med, two of PubMedVision,
               Quilt-Instruct.
reports        MIMIC-CXR: chest radiographs, as JPG or DICOM, with the reports of their studies.
row            One row of a source in the released schema, or the reason why there is none.
vqa            Sources of open and closed questions in their own JSON: VQA-RAD and SLAKE.
"""
