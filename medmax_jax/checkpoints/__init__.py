"""Training checkpoints and weight files.

checksums         Is a saved step what training had in memory? Two chains of SHA-256, both checked
                  on restore.
export            Folders that other programs read: whole models, and adapters for one base model.
manager           Checkpoints of a run: Orbax for the arrays, and digests that tell whether they
                  are whole.
resume            May a run go on from a checkpoint? Everything that changes its numbers must be
                  the same.
safetensors_file  Weights on disk: any pytree of arrays as one safetensors file with dotted names.
torch_file        torch's .pth and .ckpt files, read and written without torch; nothing in a file
                  is executed.
torch_unpickler   data.pkl of a torch file as inert values: pickle's opcodes, run without pickle
                  and without calls.
zarr_arrays       Named arrays of any size in blocks: zarr3 by TensorStore, on a disk or gs://, for
                  any mesh.
"""
