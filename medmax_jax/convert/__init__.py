"""Read and write checkpoints: Meta, Hugging Face, PEFT and this project's own layout.

__main__            Convert checkpoints of the Chameleon family between layouts, exactly in both
                    directions.
adapters            LoRA adapters: PEFT's layout, this project's, and a training run's.
check               Check whether a checkpoint is what was published, and computes the same here as
                    in torch.
convert             Convert from a path to a path atomically: read, merge, quantize, write.
full_check          The ten checks of published weights that only their owner can run, and a page of
                    the results.
hf                  Hugging Face's layout of the Chameleon family.
inspect_checkpoint  Describe a checkpoint from its headers and a few percent of its weights.
meta                Meta's layout, in which Chameleon, Anole and MedMax are published.
model_card          The model card (README.md) of a converted model: its origin, data and terms.
native              This project's layout: a model folder.
safetensors_stream  Weight files of a folder: read by ranges, written as a stream; at most one
                    tensor in memory.
state_dict          The common form of all layouts: named tensors that are not yet read.
torch_reference     The part of `check` that runs in a Python with torch and transformers; it
                    imports nothing of this project.
vqgan               The VQGAN's tensors: names and layout of taming-transformers and of this
                    project.
"""
