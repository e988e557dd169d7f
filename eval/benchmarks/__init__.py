"""Benchmarks beyond MedMax's own, each with its card and the reader of its published files.

card           Defines the card of a task, and the row that a reader of a benchmark's files yields.
deeptumorvqa   Reads and scores DeepTumorVQA v2 with one axial CT slice per question (its input
               2d_image).
fields         Reads what the rows of several benchmarks share: lettered options, and images inside
               a row.
gmai_mmbench   Reads and scores GMAI-MMBench VAL: one question about one image, of 284 data sets.
kormedmcqa     Reads and scores KorMedMCQA-V: the Korean medical licensing examination, with images.
kvasir_vqa     Reads Kvasir-VQA-x1: open questions about endoscopic images of the digestive tract.
medbookvqa     Reads and scores MedBookVQA: questions about figures of open-access textbooks, four
               options.
medframeqa     Reads and scores MedFrameQA: questions about 2 to 5 frames of a medical video.
medgen         Reads MedGEN-Bench: questions, edits and generations from medical images and an
               instruction.
mediconfusion  Reads and scores MediConfusion: one question about each of two images, with opposite
               answers.
medthink       Reads and scores R-RAD and R-SLAKE of MedThink: questions with an answer and its
               rationale.
medxpertqa     Reads and scores MedXpertQA-MM: examination questions about one to six images, five
               options.
smmile         Reads and scores SMMILE and SMMILE++: questions with in-context examples of their
               own.
"""
