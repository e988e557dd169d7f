"""Training checkpoints and weight files.

checksums         Verify that a saved step equals what training had in memory, by two chains of
                  SHA-256.
export            Write folders that other programs read: complete models, and adapters for one
                  base model.
hub               Files that are published on the Hugging Face hub, as a local folder.
manager           Checkpoints of a run: Orbax for the arrays, and digests that detect damage.
resume            Decide whether a run may resume from a checkpoint: settings that affect its
                  results must be the same.
safetensors_file  Store any pytree of arrays as one safetensors file with dotted names.
torch_file        Read and write torch's .pth and .ckpt files without torch; nothing in a file is
                  executed.
torch_unpickler   Read data.pkl of a torch file as inert values: pickle's opcodes, run without
                  pickle and without calls.
zarr_arrays       Store named arrays of any size in blocks: zarr3 by TensorStore, on a disk or
                  gs://, for any mesh.
"""
